"""Fast recurrent layers for PyTorch: drop-in LSTM and Elman networks on fused kernels.

Change `torch.nn.LSTM` to `rnnfast.LSTM`, or call `rnnfast.convert(model)`.
"""

from __future__ import annotations

import os

import torch  # noqa: F401  before _C: both use the OpenMP runtime that torch brings

from rnnfast import _C

_C.select_isa(os.environ.get("RNNFAST_ISA", ""))

from rnnfast.convert import convert, revert  # noqa: E402
from rnnfast.info import __version__, info  # noqa: E402
from rnnfast.modules import LSTM, RNN, LSTMCell, RNNCell  # noqa: E402

__all__ = ["LSTM", "RNN", "LSTMCell", "RNNCell", "__version__", "convert", "info", "revert"]
