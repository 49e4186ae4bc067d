"""Layers that stand in for torch's: what tools find that know torch.nn's recurrent layers by their class.

A layer of ours is a subclass of torch's. So it passes every `isinstance`, and a user's own subclass of torch's layer
runs on our kernels once ours stands before torch's in its order of resolution. What goes by more than that is dealt
with here: torch.compile, torch.fx, TorchScript and torch.ao.quantization.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch._dynamo.variables.builder import VariableBuilder

_newobj: Any = vars(copyreg)["__newobj__"]  # what pickle says in place of a class, if that has no way of its own

__all__ = ["Twin", "torchs", "twin_of"]


class Twin(torch.nn.Module):
    """A layer that stands in for one of torch's, which its class names as `_twin`; a subclass of it has none."""

    def _symbolic(self, input: Any, hx: Any) -> torch.fx.Proxy | None:
        """The call as a node of the graph that torch.fx is tracing, as are calls of torch's layers; None: it is not."""
        args = (input,) if hx is None else (input, hx)
        tracer = _tracer(args)
        if tracer is None or tracer.root is self:
            return None
        ours: Any = [cls for cls in type(self).__mro__ if torchs(cls) or cls is type(self)][-1]
        hooks = self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks
        if any(hooks) or inspect.getattr_static(self, "forward") is not ours.forward:
            raise torch.fx.proxy.TraceError(
                f"rnnfast: hooks or a forward around that of this {type(self).__name__} would run when torch.fx traces "
                "it, and again in its graph. Call rnnfast.revert(model) first and convert what was traced, or trace "
                "with a Tracer whose is_leaf_module says True of it"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles, and leaves in the model: torch's layer, with all that this one has."""
        cls = torchs(type(self))
        if cls is None:
            raise RuntimeError(
                f"rnnfast: torch.jit.script knows no {type(self).__qualname__}: only layers that rnnfast.revert(model) "
                "makes torch's again; torch.jit.trace takes this one"
            )
        warnings.warn(
            "torch.jit.script takes torch's layers in place of rnnfast's, in the model that was given, too; "
            "rnnfast.convert(model) swaps them again",
            stacklevel=2,
        )
        layer = object.__new__(cls)
        object.__setattr__(layer, "__dict__", vars(self))
        return layer

    @property
    def qconfig(self) -> Any:
        """How torch.ao.quantization was asked to treat this layer, which it can't; in the layer's `__dict__`."""
        try:
            return vars(self)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            "torch.ao.quantization does not know rnnfast's layers and leaves them as they are; to quantize them, call "
            "rnnfast.revert(model) first",
            stacklevel=2,
        )
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]


def torchs(cls: type) -> type[torch.nn.Module] | None:
    """The class that this one stands in for, if it is a twin."""
    return vars(cls).get("_twin")


def twin_of(cls: type[torch.nn.Module], ours: type[Twin]) -> type[Twin]:
    """The class that stands in for a user's subclass `cls` of the layer of torch that `ours` stands in for.

    Its forward, if `cls` has none of its own, and what `super()` finds there, are those of `ours`.

    Raises:
        Exception: of any kind; whatever `cls`, its metaclass or its `__init_subclass__` has against a subclass.
    """
    made: list[Any] = [one for one in cls.__subclasses__() if torchs(one) is cls]
    return made[0] if made else _make_twin(cls, ours)


def _make_twin(cls: type[torch.nn.Module], ours: type[Twin]) -> type[Twin]:
    def reduce(self: Twin, protocol: Any) -> Any:
        """As `cls` does it, but for the class, which nobody finds by its name."""
        reduced = cls.__reduce_ex__(self, max(2, protocol))
        if not isinstance(reduced, tuple) or reduced[0] is not _newobj or reduced[1][0] is not made:
            return reduced
        return _new, (cls, ours, *reduced[1][1:]), *reduced[2:]

    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"_twin": cls, "__reduce_ex__": reduce}
    made: Any = types.new_class(cls.__name__, (cls, ours), exec_body=lambda namespace: namespace.update(members))
    return made


def _new(cls: type[torch.nn.Module], ours: type[Twin], *args: Any) -> Twin:
    """What a file has in place of a class that was made here."""
    made = twin_of(cls, ours)
    return made.__new__(made, *args)


def _tracer(values: Iterable[Any]) -> torch.fx.Tracer | None:
    """The tracer of the first proxy of torch.fx among these, in tuples and lists, too."""
    for value in values:
        if isinstance(value, torch.fx.Proxy) and isinstance(value.tracer, torch.fx.Tracer):
            return value.tracer
        if isinstance(value, (tuple, list)) and (tracer := _tracer(value)) is not None:
            return tracer
    return None


def _let_dynamo_trace() -> None:
    """Dynamo refuses every torch.nn.LSTM and RNN, since it can't trace torch's operators; it is told to try ours."""
    wrap_module = VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap(self: VariableBuilder, value: torch.nn.Module) -> Any:
        if not isinstance(value, Twin):
            return wrap_module(self, value)
        with torch._dynamo.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    VariableBuilder.wrap_module = wrap  # type: ignore[method-assign]


_let_dynamo_trace()
