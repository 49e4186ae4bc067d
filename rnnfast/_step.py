"""A single step of a layer by torch's own operators, where those are faster than a kernel.

Those are the steps that a compiler fuses with what is around them, where a kernel would be a stranger; a recorded step
of an Elman network, of which one layer in one direction takes less time than a node of ours; and a step of 16-bit
numbers without a fused operator in torch, of which widening the weights would take longer. Measured in
benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast import _input
from rnnfast._autograd import op

if TYPE_CHECKING:
    from rnnfast._layer import Layer

_RECORDED: dict[str, Callable[..., Any]] = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
_CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm_cell,
    "GRU": torch.gru_cell,
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
}


def by_torch(
    layer: Layer, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """y, h_n, c_n of a step x (1,B,I), or packed (B,I), of a layer without projection on the CPU; None: a kernel is
    faster."""
    if torch.compiler.is_compiling():
        return _by_cells(layer, x, h0, c0, weights) if layer.mode in _CELLS else None
    if not torch.is_grad_enabled():
        return None
    run = _RECORDED.get(layer.mode)
    if run is None or layer.num_layers > 1 or layer.bidirectional or not op.leaves_mere_graph((x, h0, *weights)):
        return None
    rows = x.unsqueeze(0) if x.dim() == 2 else x
    h0 = rows.new_zeros((1, rows.size(1), layer.hidden_size)) if h0 is None else h0
    y, h_n = run(rows, h0, weights, layer.bias, 1, 0.0, False, False, False)
    return y.squeeze(0) if x.dim() == 2 else y, h_n, None


def is_torchs_in_16_bits(layer: Layer, input: Any) -> bool:
    """Is this a single step of 16-bit numbers that torch's layer itself does faster?"""
    if not isinstance(input, Tensor) or layer.mode == "LSTM" or layer.mode not in _CELLS:
        return False
    if input.dtype in _input.HALVES:
        is_faster = _input.autocast_dtype(input) is None
    else:
        is_faster = layer.mode in _RECORDED and torch.is_grad_enabled() and _input.autocast_dtype(input) is not None
    if not is_faster or not input.is_cpu or input.dim() < 2 or torch.compiler.is_compiling():
        return False
    return input.size(1 if layer.batch_first and input.dim() == 3 else 0) == 1 and op.is_mere_call()


def _by_cells(
    layer: Layer, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layer by layer."""
    D, each, masks = 2 if layer.bidirectional else 1, 4 if layer.bias else 2, layer._dropout_masks(x)
    rows = x if x.dim() == 2 else x.squeeze(0)  # what goes into the layer at hand
    zeros, cell = rows.new_zeros((rows.size(0), layer.hidden_size)), _CELLS[layer.mode]
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(layer.num_layers):
        for i in range(k * D, k * D + D):
            h, own = zeros if h0 is None else h0[i], weights[i * each : (i + 1) * each]
            if layer.mode == "LSTM":
                h, c = cell(rows, (h, zeros if c0 is None else c0[i]), *own)
                c_n.append(c)
            else:
                h = cell(rows, h, *own)
            h_n.append(h)
        rows = torch.cat(h_n[-D:], 1)
        if masks is not None and k < layer.num_layers - 1:
            rows = rows * masks[k].view_as(rows)
    return rows if x.dim() == 2 else rows.unsqueeze(0), torch.stack(h_n), torch.stack(c_n) if c_n else None
