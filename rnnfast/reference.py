"""Elman and LSTM layers in NumPy float64: forward, and back-propagation through time (BPTT) written out.

This file is the truth that every kernel is tested against. It follows the equations line by line, one
time step after another, and is never optimised. Read it beside them:

    Elman   z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh            h_t = tanh(z_t)  or  relu(z_t)

    LSTM    (i,f,g,o)_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh    i, f, o through σ, g through tanh
            c_t = f * c_{t-1} + i * g                              m_t = o * tanh(c_t)
            h_t = W_hr m_t  if projected, else  m_t

Dims    T steps, B batch, I input size, H hidden size, G gates (1 Elman, 4 LSTM), P proj_size, R size of
        h_t (P if projected, else H), L layers, D directions, N rows = sum of batch_sizes, n rows of one step.

Sequences are padded, x (T,B,I) with batch_sizes None, or packed, x (N,I) with batch_sizes (T,): step t
owns the next batch_sizes[t] rows, which belong to the first batch_sizes[t] sequences (longest first).
"T,B|N" in a shape stands for either form.

Sources
    Elman network     J. L. Elman, Finding structure in time, Cognitive Science 14 (1990)
    LSTM              S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997)
    forget gate f     F. A. Gers, J. Schmidhuber, F. Cummins, Learning to forget: continual prediction with
                      LSTM, Neural Computation 12 (2000)
    projection W_hr   H. Sak, A. Senior, F. Beaufays, Long short-term memory recurrent neural network
                      architectures for large scale acoustic modeling, Interspeech (2014)
    The gate order i,f,g,o, the two biases and the order of the weights are those of torch.nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
RowIndex = int | slice  # of one step's rows: x[t] of a padded x, x[a:b] of a packed one


class Weights(NamedTuple):
    """The weights of one layer and direction, in torch's order; also the gradients with respect to them."""

    w_ih: Array  # (G*H,I)
    w_hh: Array  # (G*H,R)
    b_ih: Array | None = None  # (G*H,)
    b_hh: Array | None = None  # (G*H,)
    w_hr: Array | None = None  # (P,H)


class Step(NamedTuple):
    """What BPTT needs of one step of one layer and direction."""

    at: RowIndex  # where the step's rows lie in x and y
    x: Array  # (n,I)  x_t
    h_prev: Array  # (n,R)  h_{t-1}
    m: Array  # (n,H)  what the cell gives: h_t, or what is projected to it
    saved: tuple[Array, ...]  # the cell's own, (n,H) each


class LayerTape(NamedTuple):
    """What one layer and direction recorded: its steps in the order in which they were computed."""

    cell: type[Cell]
    steps: list[Step]
    w: Weights
    x_shape: tuple[int, ...]  # (T,B,I) or (N,I)


class Tape(NamedTuple):
    """What a stack of layers recorded."""

    layers: list[list[LayerTape]]  # [L][D]
    dropout_masks: Array | None  # (L-1,T,B|N,D*R)


class Gradients(NamedTuple):
    """Gradients of the loss with respect to everything that entered `forward`."""

    x: Array  # (T,B|N,I)
    h0: Array  # (L*D,B,R)
    c0: Array | None  # (L*D,B,H), None for Elman
    weights: list[Array]  # flat, in the order in which they were given


tanh = np.tanh


def relu(z: Array) -> Array:
    return np.maximum(z, 0.0)


def sigmoid(z: Array) -> Array:
    """σ(z) = 1 / (1 + exp(-z)), arranged so that no exp overflows."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


# ------------------------------------------------------------------------------------------- the cells


class Cell:
    """One step of one kind of unit: `forward` from its pre-activations, `backward` to their gradients."""

    gates: int  # G
    has_state = False  # carries c_t (n,H) beside h_t

    @staticmethod
    def forward(z: Array, c_prev: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        """m_t and c_t (n,H) of z_t (n,G*H) and c_{t-1} (n,H), and what `backward` needs."""
        raise NotImplementedError

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> tuple[Array, Array]:
        """dL/dz_t (n,G*H) and dL/dc_{t-1} of dL/dm_t and of dL/dc_t as step t+1 left it."""
        raise NotImplementedError


class Tanh(Cell):
    gates = 1

    @staticmethod
    def forward(z: Array, c_prev: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        h = tanh(z)
        return h, c_prev, (h,)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> tuple[Array, Array]:
        (h,) = saved
        return dm * (1.0 - h**2), dc  # tanh' = 1 - tanh²


class Relu(Cell):
    gates = 1

    @staticmethod
    def forward(z: Array, c_prev: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        h = relu(z)
        return h, c_prev, (h,)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> tuple[Array, Array]:
        (h,) = saved
        return np.where(h <= 0, 0.0, dm), dc  # relu' = 0 where h <= 0, else 1


class LSTM(Cell):
    gates = 4
    has_state = True

    @staticmethod
    def forward(z: Array, c_prev: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        i, f, g, o = np.split(z, 4, axis=1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c_prev + i * g
        return o * tanh(c), c, (i, f, g, o, c_prev, c)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> tuple[Array, Array]:
        i, f, g, o, c_prev, c = saved
        tanh_c = tanh(c)
        do = dm * tanh_c  # m_t = o * tanh(c_t)
        dc = dc + dm * o * (1.0 - tanh_c**2)
        di, df, dg = dc * g, dc * c_prev, dc * i  # c_t = f * c_{t-1} + i * g
        dz = [di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o)]  # σ' = σ (1 - σ)
        return np.concatenate(dz, axis=1), dc * f


CELLS: dict[str, type[Cell]] = {"RNN_TANH": Tanh, "RNN_RELU": Relu, "LSTM": LSTM}  # by torch's mode


def _steps(x: Array, batch_sizes: Array | None, reverse: bool) -> list[RowIndex]:
    """Where each step's rows lie in x, in the order in which the direction visits the steps."""
    if batch_sizes is None:
        at: list[RowIndex] = list(range(len(x)))
    else:
        ends = np.cumsum(batch_sizes)
        at = [slice(int(end - n), int(end)) for end, n in zip(ends, batch_sizes, strict=True)]
    return at[::-1] if reverse else at


def _affine(x: Array, h: Array, w: Weights) -> Array:
    """W_ih x_t + b_ih + W_hh h_{t-1} + b_hh for the n rows of a step: (n,I), (n,R) -> (n,G*H)."""
    z = x @ w.w_ih.T + h @ w.w_hh.T
    return z if w.b_ih is None else z + w.b_ih + w.b_hh


def _zeros_like(w: Weights) -> Weights:
    return Weights._make(None if a is None else np.zeros_like(a) for a in w)


def _accumulate_affine(dw: Weights, dz: Array, x: Array, h_prev: Array) -> None:
    """Add one step's share of the gradients of `_affine`'s weights: dL/dW = Σ_t dz_tᵀ input_t."""
    dw.w_ih[...] += dz.T @ x
    dw.w_hh[...] += dz.T @ h_prev
    if dw.b_ih is not None and dw.b_hh is not None:
        dw.b_ih[...] += dz.sum(axis=0)
        dw.b_hh[...] += dz.sum(axis=0)


# ------------------------------------------------------------------------ one layer, one direction
#
# The state h (B,R) is updated in its first n rows only. Forwards in time, a sequence that has ended keeps its
# last state; backwards in time, one that has not begun keeps h0. Either way h is h_n after the last step.


def layer_forward(
    cell: type[Cell],
    x: Array,  # (T,B|N,I)
    h0: Array,  # (B,R)
    c0: Array,  # (B,H)
    w: Weights,
    *,
    batch_sizes: Array | None = None,  # (T,) of a packed x
    reverse: bool = False,
) -> tuple[Array, Array, Array, LayerTape]:
    """One direction, projected if w.w_hr is given: returns y (T,B|N,R), h_n (B,R), c_n (B,H) and the tape."""
    h, c = h0.copy(), c0.copy()
    y = np.zeros(x.shape[:-1] + h.shape[1:])
    steps = []
    for at in _steps(x, batch_sizes, reverse):
        x_t = x[at]
        n = len(x_t)
        h_prev = h[:n].copy()

        m, c_t, saved = cell.forward(_affine(x_t, h_prev, w), c[:n].copy())
        h_t = m if w.w_hr is None else m @ w.w_hr.T

        y[at] = h[:n] = h_t
        c[:n] = c_t
        steps.append(Step(at, x_t, h_prev, m, saved))
    return y, h, c, LayerTape(cell, steps, w, x.shape)


def layer_backward(
    tape: LayerTape,
    dy: Array,  # (T,B|N,R)
    dh_n: Array,  # (B,R)
    dc_n: Array,  # (B,H)
) -> tuple[Array, Array, Array, Weights]:
    """BPTT through `layer_forward`: returns dx (T,B|N,I), dh0 (B,R), dc0 (B,H) and the gradients of the weights.

    The pair (dL/dh_t, dL/dc_t) travels back in time.
    """
    w = tape.w
    dx, dh, dc, dw = np.zeros(tape.x_shape), dh_n.copy(), dc_n.copy(), _zeros_like(w)
    for at, x, h_prev, m, saved in reversed(tape.steps):
        n = len(x)
        dh_t = dh[:n] + dy[at]  # from step t+1, and from the output

        dm = dh_t  # h_t = m_t, or h_t = W_hr m_t
        if w.w_hr is not None and dw.w_hr is not None:
            dm = dh_t @ w.w_hr
            dw.w_hr[...] += dh_t.T @ m
        dz, dc[:n] = tape.cell.backward(saved, dm, dc[:n])

        dx[at] = dz @ w.w_ih
        dh[:n] = dz @ w.w_hh
        _accumulate_affine(dw, dz, x, h_prev)
    return dx, dh, dc, dw


# ---------------------------------------------------------------------------- layers and directions


def _split_weights(weights: Sequence[Array], units: int, has_bias: bool) -> list[Weights]:
    """Cut torch's flat list into one `Weights` for each of the L*D layers and directions."""
    size = len(weights) // units
    b = 2 if has_bias else 0
    projected = size == 3 + b
    if size * units != len(weights) or size not in (2 + b, 3 + b):
        raise ValueError(f"expected {2 + b} or {3 + b} weights for each of {units} units, got {len(weights)}")
    result = []
    for k in range(0, len(weights), size):
        w_ih, w_hh, *rest = weights[k : k + size]
        b_ih, b_hh = rest[:2] if has_bias else (None, None)
        result.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None))
    return result


def forward(
    mode: str,
    x: ArrayLike,
    batch_sizes: ArrayLike | None,
    h0: ArrayLike | None,
    c0: ArrayLike | None,
    weights: Sequence[ArrayLike],
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    dropout_masks: ArrayLike | None = None,
) -> tuple[Array, Array, Array | None, Tape]:
    """A stack of layers and directions; everything is converted to float64.

    Args:
        mode: one of CELLS, as torch names them.
        x: (T,B,I) padded, or (N,I) packed.
        batch_sizes: (T,) integers that never increase, for a packed x; None for a padded one.
        h0: (L*D,B,R), None for zeros.
        c0: (L*D,B,H), None for zeros and for Elman.
        weights: flat; for each layer and direction w_ih, w_hh, b_ih and b_hh if has_bias, w_hr if projected.
        dropout_masks: (L-1,T,B|N,D*R), already divided by 1-p; mask l multiplies the output of layer l on its
            way into layer l+1. None for no dropout.

    Returns:
        y (T,B|N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) or None for Elman, and the tape for `backward`.

    Raises:
        KeyError: mode is not one of CELLS.
        ValueError: the number of weights fits no stack of that many layers and directions.
    """
    rows = np.asarray(x, dtype=np.float64)
    L, D, cell = num_layers, 2 if bidirectional else 1, CELLS[mode]
    units = _split_weights([np.asarray(a, dtype=np.float64) for a in weights], L * D, has_bias)
    sizes = None if batch_sizes is None else np.asarray(batch_sizes)
    masks = None if dropout_masks is None else np.asarray(dropout_masks, dtype=np.float64)
    B = rows.shape[1] if sizes is None else int(sizes[0])
    H, R = units[0].w_hh.shape[0] // cell.gates, units[0].w_hh.shape[1]
    h0 = np.zeros((L * D, B, R)) if h0 is None else np.asarray(h0, dtype=np.float64)
    c0 = np.zeros((L * D, B, H)) if c0 is None else np.asarray(c0, dtype=np.float64)

    h_n, c_n, layers = np.zeros_like(h0), np.zeros_like(c0), []
    for layer in range(L):
        outputs, tapes = [], []
        for direction in range(D):
            k = layer * D + direction
            reverse = direction == 1
            y, h_n[k], c_n[k], tape = layer_forward(
                cell, rows, h0[k], c0[k], units[k], batch_sizes=sizes, reverse=reverse
            )
            outputs.append(y)
            tapes.append(tape)
        layers.append(tapes)
        rows = np.concatenate(outputs, axis=-1)  # (T,B|N,D*R)
        if masks is not None and layer < L - 1:
            rows = rows * masks[layer]
    return rows, h_n, c_n if cell.has_state else None, Tape(layers, masks)


def backward(
    tape: Tape,
    dy: Array,  # (T,B|N,D*R)
    dh_n: Array,  # (L*D,B,R)
    dc_n: Array | None = None,  # (L*D,B,H), None for Elman
) -> Gradients:
    """BPTT through `forward`: from dL/dy, dL/dh_n, dL/dc_n to the gradients of x, h0, c0 and every weight."""
    L, D = len(tape.layers), len(tape.layers[0])
    dh0 = np.zeros_like(dh_n)
    first = tape.layers[0][0]
    if dc_n is None:  # nothing reaches it, and without a state it is nothing
        dc_n = np.zeros((*dh_n.shape[:2], first.w.w_hh.shape[0] // first.cell.gates))
    dc0 = np.zeros_like(dc_n)
    dws: list[Weights] = []  # filled from the last unit to the first

    for layer in reversed(range(L)):
        if tape.dropout_masks is not None and layer < L - 1:
            dy = dy * tape.dropout_masks[layer]
        dx = np.zeros(tape.layers[layer][0].x_shape)  # (T,B|N,I), or (T,B|N,D*R) above the first layer
        dys = np.split(dy, D, axis=-1)  # [D] of (T,B|N,R)
        for direction in reversed(range(D)):
            k = layer * D + direction
            unit = tape.layers[layer][direction]
            dx_k, dh0[k], dc0[k], dw = layer_backward(unit, dys[direction], dh_n[k], dc_n[k])
            dx += dx_k  # both directions read the same input
            dws.append(dw)
        dy = dx
    return Gradients(
        dy, dh0, dc0 if first.cell.has_state else None, [a for dw in reversed(dws) for a in dw if a is not None]
    )


# ------------------------------------------------------------------------ echo state networks
#
# One sequence. The states and the readout of an echo state network with leaky units (rate a):
#
#     h_t = (1-a) h_{t-1} + a f(W_in x_t + W h_{t-1} + W_fb y_{t-1} + b) + noise_t        y_t = W_out [1, x_t, h_t]
#
# H. Jaeger, The "echo state" approach to analysing and training recurrent neural networks, GMD Report 148 (2001);
# leaky units: H. Jaeger et al., Neural Networks 20 (2007).

UNITS: dict[str, Callable[[Array], Array]] = {"tanh": tanh, "relu": relu, "identity": lambda z: z}


class Reservoir(NamedTuple):
    """The weights that are drawn and never trained."""

    w_in: Array  # (H,I)
    w: Array  # (H,H)
    w_fb: Array  # (H,O)
    bias: Array  # (H,)
    leak: float  # a
    unit: str = "tanh"  # f


def reservoir_step(r: Reservoir, x: Array, h: Array, y: Array) -> Array:
    """h_t (H,) from x_t (I,), h_{t-1} (H,) and y_{t-1} (O,), without the noise."""
    z = r.w_in @ x + r.w @ h + r.w_fb @ y + r.bias
    return (1 - r.leak) * h + r.leak * UNITS[r.unit](z)


def reservoir_states(r: Reservoir, x: Array, y: Array, h0: Array, y0: Array, noise: Array | None = None) -> Array:
    """Teacher forcing: all h_t (T,H) for x (T,I), with y (T,O) fed back, from h0 (H,) and y0 (O,)."""
    states = []
    h, fed_back = h0, y0
    for t in range(len(x)):
        h = reservoir_step(r, x[t], h, fed_back)
        if noise is not None:
            h = h + noise[t]
        fed_back = y[t]
        states.append(h)
    return np.array(states)


def reservoir_loop(r: Reservoir, w_out: Array, x: Array, h0: Array, y0: Array) -> Array:
    """Closed loop: y (T,O) for x (T,I), with the network's own outputs fed back. w_out (O,1+I+H)."""
    outputs = []
    h, y = h0, y0
    for t in range(len(x)):
        h = reservoir_step(r, x[t], h, y)
        y = w_out @ np.concatenate([[1.0], x[t], h])
        outputs.append(y)
    return np.array(outputs)


def ridge_regression(features: Array, targets: Array, ridge: float) -> Array:
    """W (O,Z) with the least sum of squares of targets (n,O) - features (n,Z) W^T, plus ridge times that of W."""
    gram = features.T @ features + ridge * np.eye(features.shape[1])
    return np.linalg.solve(gram, features.T @ targets).T
