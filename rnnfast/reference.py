"""Recurrent layers in NumPy float64: forward, and back-propagation through time (BPTT) written out.

This file is the truth that every kernel is tested against. It follows the equations line by line, one
time step after another, and is never optimised. It is one long file, to be read from top to bottom beside them:

    Elman   z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh            h_t = tanh(z_t)  or  relu(z_t)

    LSTM    (i,f,g,o)_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh    i, f, o through σ, g through tanh
            c_t = f * c_{t-1} + i * g                              m_t = o * tanh(c_t)
            h_t = W_hr m_t  if projected, else  m_t

    GRU     r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        the rows of r and of z
            n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))  h_t = (1-z) * n + z * h_{t-1}

    leaky   h_t = (1-a) * h_{t-1} + a * f(z_t), z_t as Elman's     f tanh or relu, a of each unit

Dims    T steps, B batch, I input size, H hidden size, G gates (1 Elman and leaky, 3 GRU, 4 LSTM), P proj_size, R size
        of h_t (P if projected, else H), L layers, D directions, U parameters of a unit on its own (1 leaky, else 0),
        N rows = sum of batch_sizes, n rows of one step.

Sequences are padded, x (T,B,I) with batch_sizes None, or packed, x (N,I) with batch_sizes (T,): step t
owns the next batch_sizes[t] rows, which belong to the first batch_sizes[t] sequences (longest first).
"T,B|N" in a shape stands for either form.

Resets cut a sequence into episodes, each as if it were a sequence of its own, in both directions: where resets (T,B|N)
is true, an episode begins. h0 and c0 belong to the episode that begins at step 0 without a reset there, which they
enter at its first step, or backwards in time at its last. All other episodes begin with zeros.

Sources
    Elman network     J. L. Elman, Finding structure in time, Cognitive Science 14 (1990)
    LSTM              S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997)
    forget gate f     F. A. Gers, J. Schmidhuber, F. Cummins, Learning to forget: continual prediction with
                      LSTM, Neural Computation 12 (2000)
    GRU               K. Cho et al., Learning phrase representations using RNN encoder-decoder for statistical machine
                      translation, EMNLP (2014); r after the product, as torch.nn.GRU
    leaky units       H. Jaeger et al., Optimization and applications of echo state networks with leaky-integrator
                      neurons, Neural Networks 20 (2007)
    projection W_hr   H. Sak, A. Senior, F. Beaufays, Long short-term memory recurrent neural network
                      architectures for large scale acoustic modeling, Interspeech (2014)
    The gate orders i,f,g,o and r,z,n, the two biases and the order of the weights are those of torch.nn.
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
    unit: Array | None = None  # (U,H)


class Origin(NamedTuple):
    """Where the states before a step come from: from the step before, else h0 and c0, else they are zeros."""

    goes_on: Array  # (n,1) bool
    under_way: Array  # (n,1) bool: where it does not go on, does the sequence begin here with h0 and c0?

    def choose(self, state: Array, initial: Array) -> Array:
        """The rows (n,R) before the step, of those of the step before and of h0."""
        return np.where(self.goes_on, state, np.where(self.under_way, initial, 0.0))

    def split(self, d: Array) -> tuple[Array, Array]:
        """Gradients of the two that `choose` chooses from."""
        return np.where(self.goes_on, d, 0.0), np.where(self.under_way & ~self.goes_on, d, 0.0)


class Step(NamedTuple):
    """What BPTT needs of one step of one layer and direction."""

    at: RowIndex  # where the step's rows lie in x and y
    origin: Origin  # where h_prev came from
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
    c0: Array | None  # (L*D,B,H), None for a cell without c
    weights: list[Array]  # flat, in the order in which they were given


tanh = np.tanh


def relu(z: Array) -> Array:
    return np.maximum(z, 0.0)


def linear(z: Array) -> Array:
    """What a GRU takes of n's recurrent part, which r scales."""
    return z


def sigmoid(z: Array) -> Array:
    """σ(z) = 1 / (1 + exp(-z)), arranged so that no exp overflows."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


# ------------------------------------------------------------------------------------------- the cells


class StepInputs(NamedTuple):
    """What enters a step of a cell."""

    z_x: Array  # (n,G*H)  W_ih x_t + b_ih
    z_h: Array  # (n,G*H)  W_hh h_{t-1} + b_hh
    h_prev: Array  # (n,R)  h_{t-1}
    c_prev: Array  # (n,H)  c_{t-1}
    unit: Array | None  # (U,H)


class StepGradients(NamedTuple):
    """Gradients of what enters a step of a cell; 0 where it does not matter. h_prev: past W_hh."""

    z_x: Array  # (n,G*H)
    z_h: Array  # (n,G*H)
    h_prev: Array | float = 0.0  # (n,H)
    c_prev: Array | float = 0.0  # (n,H)
    unit: Array | float = 0.0  # (U,H)


class Cell:
    """One step of one kind of unit: `forward` from its pre-activations, `backward` to their gradients."""

    gates: int  # G
    has_c = False  # carries c_t (n,H) beside h_t
    unit_parameters = 0  # U

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        """m_t and c_t (n,H), and what `backward` needs."""
        raise NotImplementedError

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        """The gradients of what was given, of dL/dm_t and of dL/dc_t as step t+1 left it."""
        raise NotImplementedError


class Tanh(Cell):
    gates = 1

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        h = tanh(given.z_x + given.z_h)
        return h, given.c_prev, (h,)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        (h,) = saved
        dz = dm * (1.0 - h**2)  # tanh' = 1 - tanh²
        return StepGradients(dz, dz)


class Relu(Cell):
    gates = 1

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        h = relu(given.z_x + given.z_h)
        return h, given.c_prev, (h,)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        (h,) = saved
        dz = np.where(h <= 0, 0.0, dm)  # relu' = 0 where h <= 0, else 1
        return StepGradients(dz, dz)


class LSTM(Cell):
    gates = 4
    has_c = True

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        i, f, g, o = np.split(given.z_x + given.z_h, 4, axis=1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * given.c_prev + i * g
        return o * tanh(c), c, (i, f, g, o, given.c_prev, c)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        i, f, g, o, c_prev, c = saved
        tanh_c = tanh(c)
        do = dm * tanh_c  # m_t = o * tanh(c_t)
        dc = dc + dm * o * (1.0 - tanh_c**2)
        di, df, dg = dc * g, dc * c_prev, dc * i  # c_t = f * c_{t-1} + i * g
        gates = [di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o)]  # σ' = σ (1 - σ)
        dz = np.concatenate(gates, axis=1)
        return StepGradients(dz, dz, c_prev=dc * f)


class GRU(Cell):
    gates = 3

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        r_x, z_x, n_x = np.split(given.z_x, 3, axis=1)
        r_h, z_h, n_h = np.split(given.z_h, 3, axis=1)
        r, z, n_h = sigmoid(r_x + r_h), sigmoid(z_x + z_h), linear(n_h)
        n = tanh(n_x + r * n_h)
        return (1.0 - z) * n + z * given.h_prev, given.c_prev, (r, z, n, n_h, given.h_prev)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        r, z, n, n_h, h_prev = saved
        dn, dz = dm * (1.0 - z), dm * (h_prev - n)  # h_t = (1-z) * n + z * h_{t-1}
        dn_x = dn * (1.0 - n**2)
        dr, dn_h = dn_x * n_h, dn_x * r  # n = tanh(n_x + r * n_h)
        dr, dz = dr * r * (1.0 - r), dz * z * (1.0 - z)
        d_x, d_h = np.concatenate([dr, dz, dn_x], axis=1), np.concatenate([dr, dz, dn_h], axis=1)
        return StepGradients(d_x, d_h, h_prev=dm * z)


class LeakyTanh(Cell):
    gates = 1
    unit_parameters = 1

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        z_x, z_h, h_prev, c_prev, a = given
        assert a is not None
        f = tanh(z_x + z_h)
        return (1.0 - a) * h_prev + a * f, c_prev, (f, h_prev, a)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        f, h_prev, a = saved
        dz = dm * a * (1.0 - f**2)
        return StepGradients(dz, dz, h_prev=dm * (1.0 - a), unit=(dm * (f - h_prev)).sum(axis=0))


class LeakyRelu(Cell):
    gates = 1
    unit_parameters = 1

    @staticmethod
    def forward(given: StepInputs) -> tuple[Array, Array, tuple[Array, ...]]:
        z_x, z_h, h_prev, c_prev, a = given
        assert a is not None
        f = relu(z_x + z_h)
        return (1.0 - a) * h_prev + a * f, c_prev, (f, h_prev, a)

    @staticmethod
    def backward(saved: tuple[Array, ...], dm: Array, dc: Array) -> StepGradients:
        f, h_prev, a = saved
        dz = np.where(f <= 0, 0.0, dm * a)
        return StepGradients(dz, dz, h_prev=dm * (1.0 - a), unit=(dm * (f - h_prev)).sum(axis=0))


CELLS: dict[str, type[Cell]] = {  # by torch's mode, and those that torch has not
    "RNN_TANH": Tanh,
    "RNN_RELU": Relu,
    "LSTM": LSTM,
    "GRU": GRU,
    "LEAKY_TANH": LeakyTanh,
    "LEAKY_RELU": LeakyRelu,
}


def _steps(x: Array, batch_sizes: Array | None, resets: Array | None, reverse: bool) -> list[tuple[RowIndex, Origin]]:
    """Where each step's rows lie in x and their states come from, in the order in which the direction visits them."""
    sizes = np.full(len(x), x.shape[1]) if batch_sizes is None else batch_sizes
    ends = np.cumsum(sizes)
    rows = [slice(int(end - n), int(end)) for end, n in zip(ends, sizes, strict=True)]
    at: list[RowIndex] = list(range(len(x))) if batch_sizes is None else list(rows)
    runs = np.arange(sizes[0]) < sizes[:, None]  # (T,B)
    begins = np.zeros(runs.shape, dtype=bool)  # (T,B) an episode
    if resets is not None:
        begins[runs] = np.asarray(resets, dtype=bool).reshape(-1)
    under_way = ~np.logical_or.accumulate(begins, axis=0)
    joined = (runs & ~begins)[1:]  # (T-1,B) are steps t and t+1 of one episode?
    alone = np.zeros((1, runs.shape[1]), dtype=bool)
    goes_on = np.concatenate([joined, alone] if reverse else [alone, joined])
    steps = [(at[t], Origin(goes_on[t, :n, None], under_way[t, :n, None])) for t, n in enumerate(sizes)]
    return steps[::-1] if reverse else steps


def _affine(x: Array, w: Array, b: Array | None) -> Array:
    """W x + b of the n rows of a step."""
    return x @ w.T if b is None else x @ w.T + b


def _zeros_like(w: Weights) -> Weights:
    return Weights._make(None if a is None else np.zeros_like(a) for a in w)


def _accumulate(dw: Weights, d: StepGradients, x: Array, h_prev: Array) -> None:
    """Add one step's share of the gradients of the weights: dL/dW = Σ_t dz_tᵀ input_t."""
    dw.w_ih[...] += d.z_x.T @ x
    dw.w_hh[...] += d.z_h.T @ h_prev
    if dw.b_ih is not None and dw.b_hh is not None:
        dw.b_ih[...] += d.z_x.sum(axis=0)
        dw.b_hh[...] += d.z_h.sum(axis=0)
    if dw.unit is not None:
        dw.unit[...] += d.unit


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
    resets: Array | None = None,  # (T,B|N)
    reverse: bool = False,
) -> tuple[Array, Array, Array, LayerTape]:
    """One direction, projected if w.w_hr is given: returns y (T,B|N,R), h_n (B,R), c_n (B,H) and the tape."""
    h, c = h0.copy(), c0.copy()
    y = np.zeros(x.shape[:-1] + h.shape[1:])
    steps = []
    for at, origin in _steps(x, batch_sizes, resets, reverse):
        x_t = x[at]
        n = len(x_t)
        h_prev, c_prev = origin.choose(h[:n], h0[:n]), origin.choose(c[:n], c0[:n])

        given = StepInputs(_affine(x_t, w.w_ih, w.b_ih), _affine(h_prev, w.w_hh, w.b_hh), h_prev, c_prev, w.unit)
        m, c_t, saved = cell.forward(given)
        h_t = m if w.w_hr is None else m @ w.w_hr.T

        y[at] = h[:n] = h_t
        c[:n] = c_t
        steps.append(Step(at, origin, x_t, h_prev, m, saved))
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
    dh0, dc0 = np.zeros_like(dh), np.zeros_like(dc)
    for at, origin, x, h_prev, m, saved in reversed(tape.steps):
        n = len(x)
        dh_t = dh[:n] + dy[at]  # from step t+1, and from the output

        dm = dh_t  # h_t = m_t, or h_t = W_hr m_t
        if w.w_hr is not None and dw.w_hr is not None:
            dm = dh_t @ w.w_hr
            dw.w_hr[...] += dh_t.T @ m
        d = tape.cell.backward(saved, dm, dc[:n])

        dx[at] = d.z_x @ w.w_ih
        dh[:n], dh_start = origin.split(d.z_h @ w.w_hh + d.h_prev)
        dc[:n], dc_start = origin.split(d.c_prev)
        dh0[:n] += dh_start
        dc0[:n] += dc_start
        _accumulate(dw, d, x, h_prev)
    return dx, dh0, dc0, dw


# ---------------------------------------------------------------------------- layers and directions


def _split_weights(cell: type[Cell], weights: Sequence[Array], units: int, has_bias: bool) -> list[Weights]:
    """Cut torch's flat list into one `Weights` for each of the L*D layers and directions."""
    size = len(weights) // units
    least = 2 + 2 * has_bias + (cell.unit_parameters > 0)
    sizes = (least, least + 1) if cell.has_c else (least,)  # only an LSTM may be projected
    if size * units != len(weights) or size not in sizes:
        expected = " or ".join(map(str, sizes))
        raise ValueError(f"expected {expected} weights for each of {units} units, got {len(weights)}")
    result = []
    for k in range(0, len(weights), size):
        w_ih, w_hh, *rest = weights[k : k + size]
        b_ih, b_hh = (rest.pop(0), rest.pop(0)) if has_bias else (None, None)
        last = rest[0] if rest else None
        w_hr, unit = (None, last) if cell.unit_parameters else (last, None)
        result.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr, unit))
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
    resets: ArrayLike | None = None,
) -> tuple[Array, Array, Array | None, Tape]:
    """A stack of layers and directions; everything is converted to float64.

    Args:
        mode: one of CELLS.
        x: (T,B,I) padded, or (N,I) packed.
        batch_sizes: (T,) integers that never increase, for a packed x; None for a padded one.
        h0: (L*D,B,R), None for zeros.
        c0: (L*D,B,H), None for zeros and for cells without c.
        weights: flat; for each layer and direction w_ih, w_hh, b_ih and b_hh if has_bias, w_hr if projected, unit
            (U,H) or (H,) if U is not 0.
        dropout_masks: (L-1,T,B|N,D*R), already divided by 1-p; mask l multiplies the output of layer l on its
            way into layer l+1. None for no dropout.
        resets: (T,B|N), true where an episode begins. None for sequences of one episode each.

    Returns:
        y (T,B|N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) or None without c, and the tape for `backward`.

    Raises:
        KeyError: mode is not one of CELLS.
        ValueError: the number of weights fits no stack of that many layers and directions.
    """
    rows = np.asarray(x, dtype=np.float64)
    L, D, cell = num_layers, 2 if bidirectional else 1, CELLS[mode]
    units = _split_weights(cell, [np.asarray(a, dtype=np.float64) for a in weights], L * D, has_bias)
    sizes = None if batch_sizes is None else np.asarray(batch_sizes)
    masks = None if dropout_masks is None else np.asarray(dropout_masks, dtype=np.float64)
    begins = None if resets is None else np.asarray(resets, dtype=bool)
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
                cell, rows, h0[k], c0[k], units[k], batch_sizes=sizes, resets=begins, reverse=reverse
            )
            outputs.append(y)
            tapes.append(tape)
        layers.append(tapes)
        rows = np.concatenate(outputs, axis=-1)  # (T,B|N,D*R)
        if masks is not None and layer < L - 1:
            rows = rows * masks[layer]
    return rows, h_n, c_n if cell.has_c else None, Tape(layers, masks)


def backward(
    tape: Tape,
    dy: Array,  # (T,B|N,D*R)
    dh_n: Array,  # (L*D,B,R)
    dc_n: Array | None = None,  # (L*D,B,H), None without c
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
        dy, dh0, dc0 if first.cell.has_c else None, [a for dw in reversed(dws) for a in dw if a is not None]
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
