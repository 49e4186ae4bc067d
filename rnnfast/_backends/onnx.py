"""What `torch.onnx.export` makes of recurrent layers: ONNX's operators LSTM, GRU and RNN, one node for each layer.

`forward` is traced in place of the op `rnnfast::forward` (see `schema.py`); T and B may be symbols. ONNX has no
projection, and ONNX Runtime no LSTM and RNN of float64 and bfloat16; there each direction of a layer is a Scan.

Source: https://onnx.ai/onnx/operators/, LSTM, RNN and Scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.types import Constants, Inputs, Outputs, Stack

__all__ = ["forward", "parameters"]

_DIRECTIONS = {1: "forward", 2: "bidirectional"}
_DTYPES = (torch.float32, torch.float16)  # that ONNX Runtime has both operators for


def forward(stack: Stack, inputs: Inputs, constants: Constants) -> Outputs:
    """The outputs of `Backend.forward`, in operators that `torch.onnx.export` can translate.

    Raises:
        NotImplementedError: packed input, or resets.
    """
    dropout = constants.dropout
    if constants.resets is not None:
        raise NotImplementedError("rnnfast: resets inside a sequence have no ONNX operator; export without them")
    if constants.batch_sizes is not None:
        raise NotImplementedError(
            "rnnfast: packed input has no ONNX operator. Export the model on padded input, or with "
            "torch.onnx.export(..., dynamo=False)."
        )
    x, h0, c0, weights = inputs
    per = len(weights) // stack.L
    has_operator = stack.cell.mode in _OPERATORS and not stack.units(weights)[2]
    run = _node if x.dtype in _DTYPES and has_operator else _scans
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
    return Outputs.of([x, *(torch.cat(some) for some in zip(*states, strict=True))])


# --- a layer as one node ----------------------------------------------------------------------------------------------


class _Operator(NamedTuple):
    """The operator that ONNX has for a cell."""

    name: str
    order: tuple[int, ...] = (0,)  # of ONNX's gates: which of torch's each is
    activations: tuple[str, ...] = ()  # that differ from ONNX's defaults
    linear_before_reset: bool = False  # does r act on what W_hh has made of h?


_OPERATORS = {
    "RNN_TANH": _Operator("RNN", activations=("Tanh",)),
    "RNN_RELU": _Operator("RNN", activations=("Relu",)),
    "LSTM": _Operator("LSTM", order=(0, 3, 1, 2)),
    "GRU": _Operator("GRU", order=(1, 0, 2), linear_before_reset=True),
}


def parameters(weights: Sequence[Tensor], mode: str, D: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weights of one layer without projection as ONNX's operators take them.

    Args:
        weights: w_ih (G*H,I), w_hh (G*H,H), and if it has biases b_ih (G*H), b_hh (G*H), of each direction in turn.
        mode: of torch's module: 'LSTM', 'GRU', 'RNN_TANH' or 'RNN_RELU'.
        D: number of directions.

    Returns:
        W (D,G*H,I), R (D,G*H,H), B (D,2*G*H) or None, the gates in ONNX's order.
    """
    per, order = len(weights) // D, _OPERATORS[mode].order
    w_ih, w_hh, *biases = (torch.stack([_ordered(w, order) for w in weights[k::per]]) for k in range(per))
    return w_ih, w_hh, torch.cat(biases, 1) if biases else None


def _ordered(w: Tensor, order: Sequence[int]) -> Tensor:
    """(G*H,...) with the gates in another order."""
    if len(order) == 1:
        return w
    gates = w.unflatten(0, (len(order), -1))
    return torch.cat([gates[gate] for gate in order])


def _node(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,D*H), h_n (D,B,H), and of a cell with c c_n (D,B,H)"""
    W, R, B = parameters(weights, stack.cell.mode, stack.D)
    how: dict[str, Any] = {"direction": _DIRECTIONS[stack.D], "hidden_size": R.size(2)}
    name, _, activations, linear_before_reset = _OPERATORS[stack.cell.mode]
    if activations:
        how["activations"] = list(activations) * stack.D
    if linear_before_reset:
        how["linear_before_reset"] = 1
    states = (h0, c0) if stack.has_c else (h0,)
    y, *last = getattr(torch.ops.onnx, name).opset14(x, W, R, B, None, *states, **how)
    return [y.squeeze(1) if stack.D == 1 else y.transpose(1, 2).flatten(2), *last]


# The operators as ops of torch: torch.onnx.export takes what is called onnx::NAME.opsetVERSION for ONNX's own. They
# compute, too, for torch.onnx.export(verify=True) and for whoever runs the exported program.


def _lstm(X, W, R, B, sequence_lens, initial_h, initial_c, *, direction, hidden_size):
    return _run("LSTM", X, W, R, B, initial_h, initial_c)


def _gru(X, W, R, B, sequence_lens, initial_h, *, direction, hidden_size, linear_before_reset):
    return _run("GRU", X, W, R, B, initial_h, None)


def _rnn(X, W, R, B, sequence_lens, initial_h, *, direction, hidden_size, activations):
    return _run(f"RNN_{activations[0].upper()}", X, W, R, B, initial_h, None)


def _run(mode: str, X: Tensor, W: Tensor, R: Tensor, B: Tensor | None, *states: Tensor | None) -> tuple[Tensor, ...]:
    stack = Stack(BY_MODE[mode].index, 1, W.size(0), B is not None)
    order = _OPERATORS[mode].order
    back = [order.index(gate) for gate in range(len(order))]
    weights = []
    for d in range(stack.D):
        arrays = W[d], R[d], *(() if B is None else B[d].chunk(2))
        weights += [_ordered(w, back) for w in arrays]
    y, *last = torch.ops.rnnfast.forward(*stack, X, *states, weights, *Constants(), False)
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
_define("GRU.opset14", f"({_INPUTS}, *, {_HOW}, int linear_before_reset) -> (Tensor, Tensor)", _gru, 1)
_define("RNN.opset14", f"({_INPUTS}, *, {_HOW}, str[] activations) -> (Tensor, Tensor)", _rnn, 1)


# --- a layer as loops -------------------------------------------------------------------------------------------------


def _scans(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,D*R), h_n (D,B,R), and of a cell with c c_n (D,B,H)"""
    per = len(weights) // stack.D
    ways = []
    for d in range(stack.D):
        h, c = (None if state is None else state[d] for state in (h0, c0))
        y, *last = _scan(stack, x.flip(0) if d else x, weights[d * per :][:per], h, c)
        ways.append([y.flip(0) if d else y, *last])
    ys, *states = zip(*ways, strict=True)
    return [torch.cat(ys, 2), *(torch.stack(state) for state in states)]


def _scan(stack: Stack, x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[Tensor]:
    """y (T,B,R), h_n (B,R), and of a cell with c c_n (B,H)"""
    cell = stack.cell
    w_ih, w_hh, *rest = weights
    w_ih, w_hh = cell.to_slots(w_ih, cell.input), cell.to_slots(w_hh, cell.recurrent)  # (g,H,I), (g,H,R)
    H, R, B = w_hh.size(1), w_hh.size(2), x.size(1)
    zx = x @ w_ih.flatten(0, 1).T  # (T,B,g*H)
    b_hh = x.new_zeros(w_hh.shape[:2])
    if stack.bias:
        zx = zx + cell.to_slots(rest[0], cell.input).flatten()
        b_hh = cell.to_slots(rest[1], cell.recurrent)
    more = rest[2 if stack.bias else 0 :]  # W_hr (P,H), or the unit parameters (U,H)
    states = [x.new_zeros(B, R) if h0 is None else h0]
    if cell.has_c:
        states.append(x.new_zeros(B, H) if c0 is None else c0)

    def step(h: Tensor, *args: Tensor) -> list[Tensor]:
        *c, zx, w_hh, b_hh = args[: len(args) - len(more)]
        last = args[len(args) - len(more) :]
        zh = (h @ w_hh.T + b_hh).view(-1, b_hh.numel() // H, H)
        gates = cell.activate(cell.pre_activations(zx.view(-1, zx.size(-1) // H, H), zh))
        state = h if cell.carries_h else c[0] if c else None
        state = cell.carry(gates, state, last[0] if cell.unit_parameters else None)
        h = cell.output(gates, state)
        if cell.projects and last:
            h = h @ last[0].T
        return [h, *([state] if cell.has_c and state is not None else []), h.clone()]

    # Detached, since the exporter runs the graph once more, and scan's derivative fails where B is a symbol.
    constants = [w_hh.flatten(0, 1), b_hh.flatten(), *more]
    start, steps, constants = ([t.detach() for t in some] for some in (states, [zx], constants))
    *last, y = scan_op(step, start, steps, constants)
    return [y, *last]
