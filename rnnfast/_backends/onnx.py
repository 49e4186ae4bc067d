"""What `torch.onnx.export` makes of recurrent layers: ONNX's operators LSTM and RNN, one node for each layer.

`forward` is traced in place of the op `rnnfast::forward` (see `schema.py`); T and B may be symbols. ONNX has no
projection, and ONNX Runtime no LSTM and RNN of float64 and bfloat16; there each direction of a layer is a Scan.

Source: https://onnx.ai/onnx/operators/, LSTM, RNN and Scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from rnnfast._backends import composite
from rnnfast._backends.cpu import Inputs, Outputs, Stack

__all__ = ["forward", "parameters"]

_ORDER = ((0, 1), (3, 4), (1, 3))  # of gates: from where to where torch's i,f,g,o holds ONNX's i,o,f,c
_ORDER_BACK = ((0, 1), (2, 4), (1, 2))
_DIRECTIONS = {1: "forward", 2: "bidirectional"}
_ACTIVATIONS = ("Tanh", "Relu")  # of an Elman network, by Stack.cell
_DTYPES = (torch.float32, torch.float16)  # that ONNX Runtime has both operators for


def forward(stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None) -> Outputs:
    """The outputs of `kernels.forward`, in operators that `torch.onnx.export` can translate.

    Raises:
        NotImplementedError: packed input.
    """
    if batch_sizes is not None:
        raise NotImplementedError(
            "rnnfast: packed input has no ONNX operator. Export the model on padded input, or with "
            "torch.onnx.export(..., dynamo=False)."
        )
    x, h0, c0, weights = inputs
    per = len(weights) // stack.L
    run = _node if x.dtype in _DTYPES and not stack.projected(weights) else _scans
    states: list[list[Tensor]] = []
    for layer in range(stack.L):
        at = slice(layer * stack.D, (layer + 1) * stack.D)
        x, *last = run(
            stack,
            x,
            weights[layer * per :][:per],
            None if h0 is None else h0[at],
            None if c0 is None else c0[at],
        )
        states.append(last)
        if dropout is not None and layer < stack.L - 1:
            x = x * dropout[layer]
    h_n, *c_n = (torch.cat(some) for some in zip(*states, strict=True))
    return Outputs(x, h_n, c_n[0] if c_n else None)


# --- a layer as one node ----------------------------------------------------------------------------------------------


def parameters(weights: Sequence[Tensor], gates: int, D: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weights of one layer without projection as ONNX's operators take them.

    Args:
        weights: w_ih (G*H,I), w_hh (G*H,H), and if it has biases b_ih (G*H), b_hh (G*H), of each direction in turn.
        gates: G, 4 of an LSTM, 1 of an Elman network.
        D: number of directions.

    Returns:
        W (D,G*H,I), R (D,G*H,H), B (D,2*G*H) or None, the gates in ONNX's order.
    """
    per = len(weights) // D
    w_ih, w_hh, *biases = (torch.stack([_ordered(w, gates, _ORDER) for w in weights[k::per]]) for k in range(per))
    return w_ih, w_hh, torch.cat(biases, 1) if biases else None


def _ordered(w: Tensor, gates: int, order: tuple[tuple[int, int], ...]) -> Tensor:
    """(G*H,...) with the gates in another order."""
    H = w.size(0) // gates
    return w if gates == 1 else torch.cat([w[start * H : end * H] for start, end in order])


def _node(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,D*H), h_n (D,B,H), and of an LSTM c_n (D,B,H)"""
    W, R, B = parameters(weights, stack.gates, stack.D)
    how: dict[str, Any] = {"direction": _DIRECTIONS[stack.D], "hidden_size": R.size(2)}
    if stack.lstm:
        y, *states = torch.ops.onnx.LSTM.opset14(x, W, R, B, None, h0, c0, **how)
    else:
        how["activations"] = [_ACTIVATIONS[stack.cell]] * stack.D
        y, *states = torch.ops.onnx.RNN.opset14(x, W, R, B, None, h0, **how)
    return [y.squeeze(1) if stack.D == 1 else y.transpose(1, 2).flatten(2), *states]


# The operators as ops of torch: torch.onnx.export takes what is called onnx::NAME.opsetVERSION for ONNX's own. They
# compute, too, for torch.onnx.export(verify=True) and for whoever runs the exported program.


def _lstm(X, W, R, B, sequence_lens, initial_h, initial_c, *, direction, hidden_size):
    return _run(2, X, W, R, B, initial_h, initial_c)


def _rnn(X, W, R, B, sequence_lens, initial_h, *, direction, hidden_size, activations):
    return _run(_ACTIVATIONS.index(activations[0]), X, W, R, B, initial_h, None)


def _run(cell: int, X: Tensor, W: Tensor, R: Tensor, B: Tensor | None, *states: Tensor | None) -> tuple[Tensor, ...]:
    stack = Stack(cell, 1, W.size(0), B is not None)
    weights = []
    for d in range(stack.D):
        arrays = W[d], R[d], *(() if B is None else B[d].chunk(2))
        weights += [_ordered(w, stack.gates, _ORDER_BACK) for w in arrays]
    y, *last = torch.ops.rnnfast.forward(*stack, X, *states, weights, None, None, False)
    return y.unflatten(2, (stack.D, -1)).transpose(1, 2).contiguous(), *last


def _fake(states: int, X: Tensor, W: Tensor, R: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    (T, B, _I), (D, _GH, H) = X.shape, R.shape
    return X.new_empty(T, D, B, H), *(X.new_empty(D, B, H) for _ in range(states))


_library = torch.library.Library("onnx", "FRAGMENT")


def _define(name: str, schema: str, run: Callable[..., tuple[Tensor, ...]], states: int) -> None:
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"onnx::{name}", partial(_fake, states), lib=_library)


_INPUTS = "Tensor X, Tensor W, Tensor R, Tensor? B, Tensor? sequence_lens, Tensor? initial_h"
_HOW = "str direction, int hidden_size"
_define("LSTM.opset14", f"({_INPUTS}, Tensor? initial_c, *, {_HOW}) -> (Tensor, Tensor, Tensor)", _lstm, 2)
_define("RNN.opset14", f"({_INPUTS}, *, {_HOW}, str[] activations) -> (Tensor, Tensor)", _rnn, 1)


# --- a layer as loops -------------------------------------------------------------------------------------------------


def _scans(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,D*R), h_n (D,B,R), and of an LSTM c_n (D,B,H)"""
    per = len(weights) // stack.D
    ways = []
    for d in range(stack.D):
        h, c = (None if state is None else state[d] for state in (h0, c0))
        y, *last = _scan(stack, x.flip(0) if d else x, weights[d * per :][:per], h, c)
        ways.append([y.flip(0) if d else y, *last])
    ys, *states = zip(*ways, strict=True)
    return [torch.cat(ys, 2), *(torch.stack(state) for state in states)]


def _scan(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,R), h_n (B,R), and of an LSTM c_n (B,H)"""
    w_ih, w_hh, *rest = weights
    bias, w_hr = (rest[0] + rest[1], rest[2:]) if stack.bias else (None, rest)
    H, R, B = w_hh.size(0) // stack.gates, w_hh.size(1), x.size(1)
    states = [x.new_zeros(B, R) if h0 is None else h0]
    if stack.lstm:
        states.append(x.new_zeros(B, H) if c0 is None else c0)

    def step(h: Tensor, *args: Tensor) -> list[Tensor]:
        *c, z, w_hh = args[: len(args) - len(w_hr)]
        z = (z + h @ w_hh.T).view(-1, stack.gates, H)
        if stack.lstm:
            _, *c, h = composite.lstm_step(z, *c)
        else:
            h = composite.elman_step(stack.cell, z)
        for w in args[len(args) - len(w_hr) :]:
            h = h @ w.T
        return [h, *c, h.clone()]

    z = torch.nn.functional.linear(x, w_ih, bias)  # (T,B,G*H)
    # Detached, since the exporter runs the graph once more, and scan's derivative fails where B is a symbol.
    start, steps, constants = ([t.detach() for t in some] for some in (states, [z], [w_hh, *w_hr]))
    *last, y = scan_op(step, start, steps, constants)
    return [y, *last]
