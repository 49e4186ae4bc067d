"""Swap the recurrent layers of any model, in place and back."""

from __future__ import annotations

import logging

import torch
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from rnnfast import modules

_log = logging.getLogger("rnnfast")
_TWINS = {
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNN: modules.RNN,
    torch.nn.LSTMCell: modules.LSTMCell,
    torch.nn.RNNCell: modules.RNNCell,
}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Make every torch.nn.LSTM, RNN, LSTMCell and RNNCell inside `model` run on rnnfast, in place.

    Only the class of the layer changes: it stays the same object with the same Parameters, so optimizers, hooks, shared
    layers, train/eval mode and whatever else refers to it go on as before. Subclasses, parametrized and scripted layers
    and GRUs are left alone. The logger 'rnnfast' tells which layers were swapped (INFO) and which were not, and why
    (WARNING).

    Returns:
        `model`.
    """
    return _swap(model, _TWINS)


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert`: every rnnfast layer inside `model` becomes torch's again, in place.

    Returns:
        `model`.
    """
    return _swap(model, {ours: torchs for torchs, ours in _TWINS.items()})


def _swap(model: torch.nn.Module, twins: dict[type, type]) -> torch.nn.Module:
    for name, module in model.named_modules():  # each shared module once
        label = name or "(the model itself)"
        if type(module) in twins:
            old, new = type(module), twins[type(module)]
            # Both come from the same torch base class and keep all state in __dict__.
            module.__class__ = new
            _log.info("%s: %s.%s became %s.%s", label, old.__module__, old.__name__, new.__module__, new.__name__)
        elif reason := _why_not(module, twins):
            _log.warning("%s: %s left as it is: %s", label, type(module).__name__, reason)
    return model


def _why_not(module: torch.nn.Module, twins: dict[type, type]) -> str | None:
    """Why a recurrent layer is not swapped; None for what is no candidate."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript" if module.original_name in {cls.__name__ for cls in _TWINS} else None
    if not isinstance(module, (RNNBase, RNNCellBase)) or type(module) in twins.values():
        return None
    if isinstance(module, (torch.nn.GRU, torch.nn.GRUCell)):
        return "there is no kernel for GRU"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; swap it before parametrizing"
    return f"{type(module).__qualname__} is a subclass whose forward may differ"
