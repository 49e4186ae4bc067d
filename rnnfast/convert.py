"""Swap the recurrent layers of any model, in place and back."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from rnnfast import modules

_log = logging.getLogger("rnnfast")
_TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNN: modules.RNN,
    torch.nn.LSTMCell: modules.LSTMCell,
    torch.nn.RNNCell: modules.RNNCell,
}
_NAMES = {"LSTM", "RNN", "GRU", "LSTMCell", "RNNCell", "GRUCell"}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Make every torch.nn.LSTM, RNN, LSTMCell and RNNCell inside `model` run on rnnfast, in place.

    Only the class of the layer changes: it stays the same object with the same Parameters, so optimizers, hooks, shared
    layers, train/eval mode and whatever else refers to it go on as before. Left alone are GRUs, subclasses, layers
    whose `forward` was replaced, and layers that are parametrized, quantized or compiled by TorchScript. The logger
    'rnnfast' tells which layers were swapped (INFO) and which were not, and why (WARNING).

    Args:
        model: any module, a single layer too.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    return _swap(model, _TWINS, also=_why_no_twin)


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert`: every rnnfast layer inside `model`, converted or not, becomes torch's again, in place.

    Args, returns, raises and logs as `convert`.
    """
    return _swap(model, {ours: torchs for torchs, ours in _TWINS.items()}, also=lambda module: None)


def _swap(
    model: torch.nn.Module,
    twins: dict[type[torch.nn.Module], type[torch.nn.Module]],
    also: Callable[[torch.nn.Module], str | None],
) -> torch.nn.Module:
    """Gives every layer its twin's class; `also` tells what else is worth a line in the log, and why."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    module: torch.nn.Module
    for name, module in model.named_modules():  # each shared module once
        label, old = name or "(the model itself)", type(module)
        reason = _why_not(module) if isinstance(module, tuple(twins)) else also(module)
        if reason is not None:
            _log.warning("%s: %s left as it is: %s", label, old.__name__, reason)
        elif old in twins:
            # Both come from the same torch base class and keep all state in __dict__.
            module.__class__ = new = twins[old]
            _log.info("%s: %s.%s became %s.%s", label, old.__module__, old.__name__, new.__module__, new.__name__)
    return model


def _why_not(module: torch.nn.Module) -> str | None:
    """Why a layer that has a twin cannot be swapped; None: it can."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; swap it before parametrizing"
    if type(module) not in _TWINS and type(module) not in _TWINS.values():
        return f"{type(module).__qualname__} is a subclass whose forward may differ"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def _why_no_twin(module: torch.nn.Module) -> str | None:
    """Why a recurrent layer has no twin; None: it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript" if module.original_name in _NAMES else None
    if isinstance(module, (torch.nn.GRU, torch.nn.GRUCell)):
        return "there is no kernel for GRU"
    if type(module).__module__.startswith("torch.ao.nn.") and type(module).__name__ in _NAMES:
        return "it is quantized"
    return None
