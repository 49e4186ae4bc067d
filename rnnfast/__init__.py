"""Fast recurrent layers for PyTorch: drop-in LSTM, GRU and Elman networks on fused kernels.

Change `torch.nn.LSTM` to `rnnfast.LSTM`, or call `rnnfast.convert(model)`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  before _C: both use the OpenMP runtime that torch brings

from rnnfast import _C

_C.select_isa(os.environ.get("RNNFAST_ISA", ""))

from rnnfast.convert import convert, revert  # noqa: E402
from rnnfast.info import __version__, info  # noqa: E402
from rnnfast.modules import GRU, LSTM, RNN, GRUCell, LeakyRNN, LSTMCell, RNNCell  # noqa: E402

if TYPE_CHECKING:
    from rnnfast import diagnose, init, optim, rl, tasks
    from rnnfast.reservoir import EchoState
    from rnnfast.stream import Stream

_SUBMODULES = ("diagnose", "init", "optim", "rl", "tasks")  # imported when first asked for: `import rnnfast` stays fast
_LAZY = {"EchoState": "rnnfast.reservoir", "Stream": "rnnfast.stream"}  # likewise, and the modules they are in

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "EchoState",
    "GRUCell",
    "LSTMCell",
    "LeakyRNN",
    "RNNCell",
    "Stream",
    "__version__",
    "convert",
    "diagnose",
    "info",
    "init",
    "optim",
    "revert",
    "rl",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"rnnfast.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rnnfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_LAZY})
