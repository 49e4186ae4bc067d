"""Where torch's transforms stand, and a node of the graph that goes through them: everything that is private to torch.

torch.func's transforms (grad, jvp, vmap, functionalize), forward mode and torch's older vmap each are a level; a node
called on one goes to the level below it and comes back. torch.autograd.Function does so, too, at a cost of 450 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, _make_dual, _unpack_dual
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    is_legacy_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.autograd_function import VmapInfo, enable_single_level_autograd_function
from torch._functorch.pyfunctorch import (
    FunctionalizeInterpreter,
    GradInterpreter,
    JvpInterpreter,
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
)
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def is_transformed() -> bool:
    """Is a torch.func transform, a forward-mode level or torch's older vmap active?"""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_tls_included(_OLD_VMAP_MODE)
    )


def is_recorded() -> bool:
    """Will the derivative that is taken now be differentiated itself?"""
    return torch.is_grad_enabled() or is_transformed()


def is_differentiable(tensor: Tensor | None) -> bool:
    """Does a transform outside of the present one, or autograd in either mode, follow this tensor?"""
    while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor is None:
        return False
    is_dual = torch._C._is_fwd_grad_enabled() and torch._unpack_dual(tensor, level=0).tangent is not None
    return is_dual or (tensor.requires_grad and torch.is_grad_enabled())


class Node(torch.autograd.Function):
    """A Function whose `apply` does what torch.autograd.Function's does, without two detours of its own: in eager mode
    without a search for default arguments, which reads the signature of `forward` again at every call, for 25 µs, as
    much as a short call takes; on a level of torch.func without a new class and walks through trees of arguments, for
    450 µs."""

    @classmethod
    def apply(cls, *args):
        args = unwrap_dead_wrappers(args)
        interpreter = peek_interpreter_stack()
        if interpreter is None:
            if _is_tls_included(_OLD_VMAP_MODE) and (level := max(map(_old_vmap_level, args))):
                return _apply_old_vmap(cls, level, args)
            return super(torch.autograd.Function, cls).apply(*args)
        if interpreter.key() == TransformType.Jvp:
            return _apply_forward_mode(cls, JvpInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Grad:
            return _apply_reverse_mode(cls, GradInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Vmap:
            return _apply_vmap(cls, VmapInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Functionalize:
            return _apply_functionalized(cls, FunctionalizeInterpreter(interpreter), args)
        return super().apply(*args)


def _apply_reverse_mode(node: type[Node], interpreter: GradInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node in the graph of a level of torch.func's reverse mode, which must see no tensors but its own."""
    lift = interpreter._cptr.lift
    with enable_single_level_autograd_function():
        args = tuple(lift(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return _on_level(node).apply(*args)  # type: ignore[attr-defined]  # torch's class is not annotated


@cache
def _on_level(node: type[Node]) -> type[_SingleLevelFunction]:
    """The Function of a node on any level: goes to the level below, and comes back."""

    def forward(*args):
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        args = [_unwrap_for_grad(arg, level) if isinstance(arg, Tensor) else arg for arg in args]
        # A Function's forward runs with both modes off; lower() restores what was asked for.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            outputs = node.apply(*args)
        return tuple(_wrap_for_grad(output, level) for output in outputs)

    functions = {"forward": forward, "setup_context": node.setup_context, "backward": node.backward}
    members = {name: staticmethod(function) for name, function in functions.items()}
    return type(node.__name__, (_SingleLevelFunction,), members)


def _apply_vmap(node: type[Node], interpreter: VmapInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node's own rule, on the level below; what it says is mapped has a hidden dimension again."""
    level = interpreter.level()
    pairs = [_unwrap_batched(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    values, dims = tuple(value for value, _ in pairs), tuple(dim for _, dim in pairs)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return node.apply(*values)
        info = VmapInfo(interpreter.batch_size(), interpreter.randomness())
        outputs, out_dims = node.vmap(info, dims, *values)
    both = zip(outputs, out_dims, strict=True)
    return tuple(output if dim is None else _add_batch_dim(output, dim, level) for output, dim in both)


def _apply_functionalized(node: type[Node], interpreter: FunctionalizeInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node on the level below: it changes nothing in place."""
    level = FunctorchFunctionalizeAPI(interpreter)
    values: Any = level.unwrap_tensors(args)
    with level.redispatch_to_next():
        outputs = node.apply(*values)
    return level.wrap_tensors(outputs)


# torch's older vmap (torch._vmap_internals), with levels and tensors of its own, runs many cotangents or tangents at
# once for torch.autograd.grad(is_grads_batched=True), torch.autograd.functional and torch.autograd.gradcheck. It is no
# interpreter of torch.func's; a key of the dispatcher says that it is active, which the threads of the backward pass
# inherit. The nodes of the graph are below it.

_OLD_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
_is_tls_included = torch._C._dispatch_tls_is_dispatch_key_included


def _old_vmap_level(arg: Any) -> int:
    """The innermost level at which an argument is mapped; 0 if at none."""
    level = 0
    while isinstance(arg, Tensor) and is_legacy_batchedtensor(arg):
        level += 1
        arg = torch._remove_batch_dim(arg, level, 1, 0)  # does no more than add a dimension where it is not mapped
    return level


def _apply_old_vmap(node: type[Node], level: int, args: tuple) -> tuple[Tensor, ...]:
    """The node's own rule, on the level below, as `_apply_vmap` does."""
    dims = tuple(0 if _old_vmap_level(arg) == level else None for arg in args)
    pairs = zip(args, dims, strict=True)
    values = [arg if dim is None else torch._remove_batch_dim(arg, level, 1, dim) for arg, dim in pairs]
    size = next(value.size(0) for value, dim in zip(values, dims, strict=True) if dim == 0)
    outputs, out_dims = node.vmap(VmapInfo(size, "error"), dims, *values)
    # Forward mode cannot keep a tangent whose strides, without that dimension, are not those of its value.
    both = zip(outputs, out_dims, strict=True)
    return tuple(
        output if dim is None else torch._add_batch_dim(output.movedim(dim, 0).contiguous(), 0, level)
        for output, dim in both
    )


_DUAL = 0  # the level of dual numbers, torch's only one, which Dynamo's graphs enter without forward_ad's knowledge


class _Context:
    """Of a call in torch.func's forward mode: what `setup_context` leaves for `jvp`."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Reverse mode makes contexts of its own, on the levels below."""

    mark_non_differentiable = set_materialize_grads = save_for_backward


def _as_dual(arg: Any) -> tuple[Any, Tensor | None]:
    """Value and tangent; arguments that are no tensors have none."""
    return _unpack_dual(arg, level=_DUAL) if isinstance(arg, Tensor) else (arg, None)


def _make_duals(outputs: tuple, outputs_dot: tuple) -> tuple[Tensor, ...]:
    both = zip(outputs, outputs_dot, strict=True)
    return tuple(a if a_dot is None else _make_dual(a, a_dot, level=_DUAL) for a, a_dot in both)


def _apply_forward_mode(node: type[Node], interpreter: JvpInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node and its tangent node, on the level below that of the transform; what has a tangent is a dual again."""
    primals, tangents = zip(*_on_level_below(args, interpreter.level()), strict=True)
    with interpreter.lower():
        outputs = node.apply(*primals)
        if all(tangent is None for tangent in tangents):
            return outputs
        context = _Context()
        node.setup_context(context, primals, outputs)
        outputs_dot = node.jvp(context, *tangents)
    return _make_duals(outputs, outputs_dot)


def _on_level_below(args: Iterable[Any], level: int) -> list[tuple[Any, Tensor | None]]:
    """Value and tangent of what is a dual on a level of torch.func; nothing else has a tangent there."""
    return [
        (arg, None) if not isinstance(arg, Tensor) or maybe_get_level(arg) != level else _unwrapped_dual(arg, level)
        for arg in args
    ]


def _unwrapped_dual(arg: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
    value, tangent = _as_dual(arg)
    return _unwrap_for_grad(value, level), None if tangent is None else _unwrap_for_grad(tangent, level)


def asked_for(ctx: Any, saved: Any) -> list[bool]:
    """Of each tensor that the node was given, all of them saved: does the backward pass that runs go on to it? It may
    have been asked for fewer gradients than those of what requires one, which is all that needs_input_grad says."""
    edges = iter(ctx.next_functions)  # one for each tensor
    return [arg is not None and _is_run(next(edges)[0]) for arg in saved]


def _is_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for, or nobody knows
        return True


Dual = Callable[[list[tuple[Any, Tensor | None]]], "tuple[tuple, tuple] | None"]


def dual_alone(args: Iterable[Any], dual: Dual) -> tuple[Tensor, ...] | None:
    """dual(values and tangents of args) -> outputs and their tangents, as outputs with tangents, where forward mode is
    all that is asked for; None if there is more to it, or if `dual` gives none."""
    interpreter = peek_interpreter_stack()
    both = None
    if interpreter is None:
        if forward_ad._current_level >= 0 and not _is_tls_included(_OLD_VMAP_MODE):
            both = dual([_as_dual(arg) for arg in args])
    elif interpreter.key() == TransformType.Jvp:
        pairs = _on_level_below(args, interpreter.level())
        with JvpInterpreter(interpreter).lower():
            if peek_interpreter_stack() is None:
                both = dual(pairs)
    return None if both is None else _make_duals(*both)
