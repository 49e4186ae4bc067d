"""Swap the recurrent layers of any model, in place and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import torch

from rnnfast import modules
from rnnfast._twins import Twin, torchs, twin_of

_log = logging.getLogger("rnnfast")
_OURS: dict[type[torch.nn.Module], type[Twin]] = {
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNN: modules.RNN,
    torch.nn.GRU: modules.GRU,
}
_NAMES = {"LSTM", "RNN", "GRU", "GRUCell"}

# What torch's forward asks of its own class, and ours does not.
_ASKED = {
    "_flat_weights",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
}

_FREE = {"forward", "flatten_parameters"}  # what ours has, and a subclass may override

_Verdict: TypeAlias = "type[torch.nn.Module] | str | None"  # a layer's new class; why it has none; nothing to say of it


def convert(model: torch.nn.Module, subclasses: bool = True) -> torch.nn.Module:
    """Make every torch.nn.LSTM, RNN and GRU inside `model` run on rnnfast, in place.

    Only the class of the layer changes: it stays the same object with the same Parameters, so optimizers, hooks, shared
    layers, train/eval mode and whatever else refers to it go on as before. The new class is a subclass of the old one.
    That of a user's own layer, a subclass of torch's, keeps all its methods; what it has inherited from torch's layer,
    or calls of it by `super()`, is rnnfast's.

    LSTMCell, RNNCell and GRUCell have nothing to change: rnnfast's are torch.nn's, since a single step has no loop to
    make faster.

    Left alone are own layers that override a method which torch's forward calls and rnnfast's does not, layers
    whose `forward` was replaced on the object, and layers that are parametrized, sharded, quantized or compiled by
    TorchScript. The logger 'rnnfast' tells which layers were swapped (INFO), which were not and why (WARNING), and that
    there was none (WARNING). Tools that go by a layer's exact class do not find it: `revert` before quantization.

    Args:
        model: any module, a single layer too.
        subclasses: also users' own layers, subclasses of torch's; default True.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    if not _swap(model, lambda module: _to_ours(module, subclasses)) and not _has(model, Twin):
        _log.warning("convert: there is no torch.nn.LSTM, RNN or GRU in %s", type(model).__name__)
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert`: every rnnfast layer inside `model`, converted or not, becomes torch's again, in place.

    Args, returns, raises and logs as `convert`.
    """
    if not _swap(model, _to_torchs) and not _has(model, *_OURS):
        _log.warning("revert: there is no layer of rnnfast in %s", type(model).__name__)
    return model


def _has(model: torch.nn.Module, *kinds: type[torch.nn.Module]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())


def _swap(model: torch.nn.Module, judge: Callable[[torch.nn.Module], _Verdict]) -> bool:
    """Gives every layer the class that it is to have. Was there anything to do, or to say?"""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    said = False
    for name, module in model.named_modules():  # each shared module once
        label, old, verdict = name or "(the model itself)", type(module), judge(module)
        if isinstance(verdict, str):
            _log.warning("%s: %s left as it is: %s", label, old.__name__, verdict)
        elif verdict is not None:
            module.__class__ = verdict  # one is a subclass of the other, and has no state of its own
            _log.info("%s: %s became %s", label, _describe(old), _describe(verdict))
        said |= verdict is not None
    return said


def _describe(cls: type[torch.nn.Module]) -> str:
    name = f"{cls.__module__}.{cls.__name__}"
    return name if torchs(cls) in (None, *_OURS) else f"{name} on rnnfast"


def _to_ours(module: torch.nn.Module, subclasses: bool) -> _Verdict:
    cls = type(module)
    if isinstance(module, Twin):
        return None
    base = next((kind for kind in _OURS if isinstance(module, kind)), None)
    if base is None:
        return _why_no_twin(module)
    reason = _why_not(module)
    if reason is not None or cls is base:
        return reason or _OURS[base]
    if not subclasses:
        return f"{cls.__qualname__} is a subclass"
    return _why_not_own(cls, base) or _own(cls, base)


def _to_torchs(module: torch.nn.Module) -> _Verdict:
    if not isinstance(module, Twin):
        return None
    if isinstance(module, modules.LeakyRNN):
        return "torch has no leaky units"
    return _why_not(module) or torchs(type(module)) or f"{type(module).__qualname__} is a subclass of rnnfast's layer"


def _why_not(module: torch.nn.Module) -> str | None:
    """Why this layer cannot be swapped, whatever its class; None: it can."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; swap it before parametrizing"
    if any(map(torch.nn.parameter.is_lazy, module.parameters(recurse=False))):
        return "it has no weights before its first call"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def _own(cls: type[torch.nn.Module], base: type[torch.nn.Module]) -> _Verdict:
    try:
        return twin_of(cls, _OURS[base])
    except Exception as error:  # of the user's own __init_subclass__ or metaclass
        return f"{cls.__qualname__} has no subclass: {error}"


def _why_not_own(cls: type[torch.nn.Module], base: type[torch.nn.Module]) -> str | None:
    """Why a subclass of torch's layer cannot run on ours; None: it can."""
    if cls.__module__.startswith("torch."):
        return f"{cls.__qualname__} is a subclass that torch has made of it; swap it before that"
    ours = {name for part in _OURS[base].__mro__ if issubclass(part, Twin) for name in vars(part)}
    own = {name for part in cls.__mro__ if part not in base.__mro__ for name in vars(part)}
    taken = sorted(name for name in own & (ours - _FREE | _ASKED) if not name.startswith("__"))
    return f"{cls.__qualname__} is a subclass that overrides {', '.join(taken)}" if taken else None


def _why_no_twin(module: torch.nn.Module) -> str | None:
    """Why a recurrent layer has no twin; None: it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript" if module.original_name in _NAMES else None
    if type(module).__module__.startswith("torch.ao.nn.") and type(module).__name__ in _NAMES:
        return "it is quantized"
    return None
