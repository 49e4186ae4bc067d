"""torchrl's recurrent modules on rnnfast's layers, with `is_init` as resets.

    rnnfast.rl.torchrl.LSTMModule(...)    # was torchrl.modules.LSTMModule(...); GRUModule likewise

torchrl's own cut a batch at every episode start, pad the pieces to one length and put the results together again, or
go through it step by step ("scan"). Here a batch of any episodes is one call of the layer. All else is theirs:
arguments, keys, recurrent mode, primers, parameters and their names, results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast._layer import Layer
from rnnfast.convert import convert

try:
    from tensordict import TensorDictBase
    from tensordict.nn import dispatch
    from torchrl import modules as theirs
except ModuleNotFoundError as error:
    raise ImportError("rnnfast.rl.torchrl needs torchrl: pip install 'rnnfast[rl]'") from error

__all__ = ["GRUModule", "LSTMModule"]

_BACKENDS = ("pad", "auto")  # of torchrl, that resets take the place of; whoever asks for another one gets it


class LSTMModule(theirs.LSTMModule):
    """torchrl's LSTMModule on `rnnfast.LSTM`.

    In recurrent mode, with a `recurrent_backend` of "pad" (default) or "auto", episodes that begin within a sequence
    are resets of one call. torchrl's own ways remain for a single step, bidirectional layers, the backends "scan"
    and "triton", a layer made python-based, and recorded states that are not zero, or want a gradient, where an
    episode begins within a sequence.

    Args:
        all of torchrl's LSTMModule, with the same defaults; a layer given as `lstm` is converted in place.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _convert(self.lstm)

    def make_cudnn_based(self) -> LSTMModule:
        """Undoes `make_python_based`: the layer is an `rnnfast.LSTM` again. -> self"""
        super().make_cudnn_based()
        _convert(self.lstm)
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict if _in_one_call(self, self.lstm, tensordict) else super().forward(tensordict)


class GRUModule(theirs.GRUModule):
    """torchrl's GRUModule on `rnnfast.GRU`; see `LSTMModule`.

    Args:
        all of torchrl's GRUModule, with the same defaults; a layer given as `gru` is converted in place.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _convert(self.gru)

    def make_cudnn_based(self) -> GRUModule:
        """Undoes `make_python_based`: the layer is an `rnnfast.GRU` again. -> self"""
        super().make_cudnn_based()
        _convert(self.gru)
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict if _in_one_call(self, self.gru, tensordict) else super().forward(tensordict)


def _convert(layer: torch.nn.Module) -> None:
    if isinstance(layer, (torch.nn.LSTM, torch.nn.GRU)):  # torchrl's python-based ones are neither
        convert(layer)


def _in_one_call(module: Any, layer: torch.nn.Module, tensordict: TensorDictBase) -> bool:
    """Runs a batch (...,T) in which episodes begin within sequences, and sets the results. False: it is for torchrl."""
    shape = tensordict.shape
    if not module.recurrent_mode or module.recurrent_backend not in _BACKENDS or len(shape) == 0:
        return False
    if not isinstance(layer, Layer) or layer.bidirectional:
        return False

    def rows(a: Tensor) -> Tensor:
        return a.reshape(-1, *a.shape[len(shape) - 1 :])  # (B,T,...)

    begins = rows(tensordict["is_init"]).squeeze(-1).clone()  # (B,T)
    begins[:, 0] = False  # where a sequence begins or goes on is in the state recorded at its first step
    states = [tensordict.get(key, None) for key in module.in_keys[1:-1]]
    given = [rows(state) for state in states if state is not None]  # (B,T,L,R), (B,T,L,H)
    if not begins.any() or len(given) not in (0, len(states)) or not all(_are_zero(state, begins) for state in given):
        return False
    hx: Any = [state[:, 0].transpose(0, 1) for state in given] or None  # (L,B,R), (L,B,H)
    hx = hx[0] if len(given) == 1 else hx
    x = rows(tensordict[module.in_keys[0]])  # (B,T,I)
    done = layer.unroll(x, hx, resets=begins)
    results = [done.output] + [_at_ends(state, begins) for state in (done.h, done.c) if state is not None]
    for key, result in zip(module.out_keys, results, strict=True):
        tensordict.set(key, result.reshape(*shape, *result.shape[2:]))
    return True


def _are_zero(states: Tensor, begins: Tensor) -> bool:
    """Are the states, (B,T,L,H), zeros and constant where an episode begins? torchrl starts from them there."""
    return not (states.requires_grad or states[begins].any())


def _at_ends(states: Tensor, begins: Tensor) -> Tensor:
    """(L,T,B,H) -> (B,T,L,H), where an episode or the sequence ends; zero elsewhere, as torchrl has it."""
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], 1)
    return states.permute(2, 1, 0, 3).masked_fill(~ends[:, :, None, None], 0)
