"""One layer's way through time in torch's own operators, on any device: what a CUDA kernel computes, in a few lines.

`sweep_forward` and `sweep_backward` are the contract of the CUDA extension (csrc/cuda/sweep.h), array by array; they
stand in for it on the CPU, where the tests run, and RNNFAST_CUDA_KERNEL=composite puts them in its place on a GPU.
`with_tangents` is a whole stack and its derivative along a direction, `second` the second derivatives of a stack: plain
torch that can be differentiated and transformed any number of times, where no kernel goes on.

N rows: the (step, sequence) pairs, step by step. "Wide" is the dtype that sums and states have: float64 for float64,
float32 for everything else. Arrays are in the dtype of the layer where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends.cpu import Inputs, Outputs, SomeInputs, SomeOutputs, Stack


class Sweep(NamedTuple):
    """Sizes of one layer's way through time. P is 0 without projection. batch_sizes (T) int64 on the CPU, not
    increasing; None: B sequences at each step. offsets (T+1) int64 on the device of the arrays: the first row of each
    step, given with batch_sizes."""

    cell: int
    D: int
    H: int
    P: int
    T: int
    B: int
    batch_sizes: Tensor | None
    offsets: Tensor | None

    def steps(self, d: int) -> list[tuple[int, int]]:
        """First row and number of sequences of each step, in the order in which direction d takes them."""
        counts = [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()
        rows = accumulate(counts, initial=0)
        return list(zip(rows, counts, strict=False))[:: -1 if d else 1]


class ForwardArrays(NamedTuple):
    """What a forward sweep reads and writes."""

    gates: Tensor  # (N,D,G,H) in: W_ih x + b_ih + b_hh; out, LSTM with cells: activated. Elman: the same memory as y
    w_hh: Tensor  # (D,G*H,R)
    w_hr: Tensor | None  # (D,P,H)
    h0: Tensor | None  # (D,B,R); None: zeros
    c: Tensor | None  # (D,B,H) wide, LSTM; in: c_0, out: c_n
    cells: Tensor | None  # (N,D,H) out, LSTM; None: neither wanted nor the gates
    m: Tensor | None  # (N,D,H) out, projected: o * tanh(c)
    y: Tensor  # (N,D,R) out
    h_n: Tensor  # (D,B,R) out


class BackwardArrays(NamedTuple):
    """What a backward sweep reads and writes."""

    gates: Tensor  # (N,D,G,H) activated; Elman: y
    cells: Tensor | None  # (N,D,H), LSTM
    w_hh: Tensor  # (D,G*H,R)
    w_hr: Tensor | None  # (D,P,H)
    c0: Tensor | None  # (D,B,H); None: zeros
    dy: Tensor | None  # (N,D,R); None: zeros
    dh_n: Tensor | None  # (D,B,R); None: zeros
    dc: Tensor | None  # (D,B,H) wide, LSTM; in: dL/dc_n, out: dL/dc_0
    dz: Tensor  # (N,D,G,H) out, dL/d pre-activations; in, if `add`: what to add to it
    dh: Tensor | None  # (N,D,P) out, projected: dL/d h_t
    dh0: Tensor  # (D,B,R) out
    d_cells: Tensor | None  # (N,D,H) out, LSTM: dL/d c_t; None: not wanted


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sweep_forward(s: Sweep, a: ForwardArrays) -> None:
    """Step by step, each direction in its own order."""
    dtype = wide(a.y.dtype)
    for d in range(s.D):
        w_hh = a.w_hh[d].to(dtype).T
        h = a.y.new_zeros((s.B, s.P or s.H), dtype=dtype)  # what recurs, as it was stored
        if a.h0 is not None:
            h.copy_(a.h0[d])
        for row, n in s.steps(d):
            at = slice(row, row + n), d
            z = a.gates[at].to(dtype) + (h[:n] @ w_hh).view(n, -1, s.H)  # (n,G,H)
            if s.cell == 2:
                assert a.c is not None
                gates, c, out = lstm_step(z, a.c[d, :n])
                a.c[d, :n] = c
                if a.cells is not None:
                    a.gates[at] = gates.to(a.gates.dtype)
                    a.cells[at] = c.to(a.y.dtype)
            else:
                out = elman_step(s.cell, z)
            if a.m is not None and a.w_hr is not None:
                a.m[at] = out.to(a.y.dtype)
                out = a.m[at].to(dtype) @ a.w_hr[d].to(dtype).T
            a.y[at] = out.to(a.y.dtype)
            h[:n] = a.y[at].to(dtype)
        a.h_n[d] = h.to(a.h_n.dtype)


def elman_step(cell: int, z: Tensor) -> Tensor:
    """h of pre-activations z (n,1,H)"""
    return z[:, 0].relu() if cell == 1 else z[:, 0].tanh()


def lstm_step(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (n,4,H), c_t and o * tanh(c_t) (n,H) of pre-activations z (n,4,H) and c_{t-1}."""
    i, f, g, o = z[:, 0].sigmoid(), z[:, 1].sigmoid(), z[:, 2].tanh(), z[:, 3].sigmoid()
    c = f * c + i * g
    return torch.stack([i, f, g, o], 1), c, o * c.tanh()


def sweep_backward(s: Sweep, a: BackwardArrays, add: bool) -> None:
    """The steps of the forward sweep from the last to the first."""
    dtype = wide(a.dz.dtype)
    for d in range(s.D):
        w_hh = a.w_hh[d].to(dtype)
        dh = a.dz.new_zeros((s.B, s.P or s.H), dtype=dtype)  # dL/d h_t by way of the steps after t
        if a.dh_n is not None:
            dh.copy_(a.dh_n[d])
        steps = s.steps(d)
        for k in reversed(range(s.T)):
            row, n = steps[k]
            at = slice(row, row + n), d
            into = dh[:n] if a.dy is None else dh[:n] + a.dy[at].to(dtype)
            if a.dh is not None and a.w_hr is not None:
                a.dh[at] = into.to(a.dh.dtype)
                into = a.dh[at].to(dtype) @ a.w_hr[d].to(dtype)
            if s.cell == 2:
                dz = _lstm_backward(s, a, d, at, _cells_before(s, a, d, k, steps), into)
            else:
                h = a.gates[at][:, 0].to(dtype)
                dz = into * ((h > 0) if s.cell == 1 else 1 - h * h)
            if add:
                dz = dz.view(n, -1, s.H) + a.dz[at].to(dtype)
            a.dz[at] = dz.view(n, -1, s.H).to(a.dz.dtype)
            dh[:n] = a.dz[at].flatten(1).to(dtype) @ w_hh
        a.dh0[d] = dh.to(a.dh0.dtype)


def _cells_before(s: Sweep, a: BackwardArrays, d: int, k: int, steps: list[tuple[int, int]]) -> Tensor:
    """(n,H) wide: c of the step before step k, c_0 of the sequences that begin there."""
    assert a.cells is not None and a.dc is not None
    _, n = steps[k]
    first = torch.zeros_like(a.dc[d, :n]) if a.c0 is None else a.c0[d, :n].to(a.dc.dtype, copy=True)
    if k:
        row, before = steps[k - 1]
        some = min(n, before)
        first[:some] = a.cells[row : row + some, d].to(a.dc.dtype)
    return first


def _lstm_backward(s: Sweep, a: BackwardArrays, d: int, at: tuple[slice, int], before: Tensor, dh: Tensor) -> Tensor:
    """dz (n,4,H) of dL/d(o * tanh(c)) (n,H)"""
    assert a.cells is not None and a.dc is not None
    n = len(dh)
    i, f, g, o = a.gates[at].to(dh.dtype).unbind(1)
    tanh_c = a.cells[at].to(dh.dtype).tanh()
    dc = a.dc[d, :n] + dh * o * (1 - tanh_c * tanh_c)
    if a.d_cells is not None:
        a.d_cells[at] = dc.to(a.d_cells.dtype)
    a.dc[d, :n] = dc * f
    into = dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)
    return torch.stack(into, 1)


# --- a whole stack and its tangents -----------------------------------------------------------------------------------


def with_tangents(
    stack: Stack, inputs: Inputs, tangents: SomeInputs, batch_sizes: Tensor | None, dropout: Tensor | None
) -> tuple[Outputs, Outputs, Tensor]:
    """Outputs, their derivative along `tangents` (None: zeros), that of the pre-activations (L,D,N,G,H)."""
    x, x_dot = inputs.x.flatten(0, -2), _or_zeros(tangents.x, inputs.x).flatten(0, -2)  # (N,I)
    H, R = inputs.weights[0].size(0) // stack.gates, inputs.weights[1].size(1)
    counts = _counts(inputs.x, batch_sizes)
    B, per = counts[0], len(inputs.weights) // (stack.L * stack.D)
    h_n, c_n, h_n_dot, c_n_dot, z_dot = _lists(5)
    for layer in range(stack.L):
        ys, y_dots = _lists(2)
        for d in range(stack.D):
            k = layer * stack.D + d
            own = slice(k * per, (k + 1) * per)
            cell = _DualCell(stack, inputs.weights[own], tangents.weights[own])
            h, h_dot = (_state(t, k, (B, R), x) for t in (inputs.h0, tangents.h0))
            c, c_dot = (_state(t, k, (B, H), x) for t in (inputs.c0, tangents.c0))
            steps = list(zip(counts, *(z.split(counts) for z in cell.project((x, x_dot))), strict=True))
            y, y_dot, zs = _lists(3)
            for n, *into in steps[:: -1 if d else 1]:
                before = (_first(n, h), _first(n, h_dot)), (_first(n, c), _first(n, c_dot))
                z, one, out = cell.step((into[0], into[1]), *before)
                h, h_dot = _put_first(out[0], h), _put_first(out[1], h_dot)
                c, c_dot = _put_first(one[0], c), _put_first(one[1], c_dot)
                y.append(out[0])
                y_dot.append(out[1])
                zs.append(z)
            for some, last in zip((h_n, h_n_dot, c_n, c_n_dot), (h, h_dot, c, c_dot), strict=True):
                some.append(last)
            for many, one_way in zip((ys, y_dots, z_dot), (y, y_dot, zs), strict=True):
                many.append(torch.cat(one_way[:: -1 if d else 1]))
        x, x_dot = torch.cat(ys, 1), torch.cat(y_dots, 1)
        if dropout is not None and layer < stack.L - 1:
            mask = dropout[layer].flatten(0, -2)
            x, x_dot = x * mask, x_dot * mask
    shape = *inputs.x.shape[:-1], stack.D * R

    def outputs(y: Tensor, h: list[Tensor], c: list[Tensor]) -> Outputs:
        return Outputs(y.reshape(shape), torch.stack(h), torch.stack(c) if stack.lstm else None)

    z_all = torch.stack(z_dot).reshape(stack.L, stack.D, -1, stack.gates, H)
    return outputs(x, h_n, c_n), outputs(x_dot, h_n_dot, c_n_dot), z_all


def second(
    stack: Stack,
    inputs: Inputs,
    tangents: SomeInputs,
    batch_sizes: Tensor | None,
    dropout: Tensor | None,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See kernels.second."""
    n, at = len(inputs.flat()), inputs.flat()
    triples = zip(tangents.flat(), at, wanted_first, strict=True)
    both = [_or_zeros(v, t) if want and t is not None else v for v, t, want in triples] + at
    chosen = [want and t is not None for want, t in zip((*wanted_first, *wanted_plain), both, strict=True)]

    def placed(some: Iterable[Tensor], others: Sequence[Tensor | None]) -> tuple[SomeInputs, SomeInputs]:
        given = iter(some)
        values = [next(given) if flag else other for flag, other in zip(chosen, others, strict=True)]
        (x_dot, h0_dot, c0_dot, *weights_dot), (x, h0, c0, *weights) = values[:n], values[n:]
        return SomeInputs(x_dot, h0_dot, c0_dot, weights_dot), SomeInputs(x, h0, c0, weights)

    def number(*some: Tensor) -> tuple[Tensor, list[Tensor]]:
        """<first, tangent outputs> + <plain, outputs>, and the tangent outputs themselves."""
        along, here = placed(some, both)
        outputs, outputs_dot, _ = with_tangents(stack, Inputs(*here), along, batch_sizes, dropout)  # type: ignore[arg-type]
        pairs = zip((*first, *plain), (*outputs_dot, *outputs), strict=True)
        products = [(d * o).sum() for d, o in pairs if d is not None and o is not None]
        return sum(products, inputs.x.new_zeros(())), [o for o in outputs_dot if o is not None]

    given = [t for t, flag in zip(both, chosen, strict=True) if flag]
    with undisturbed(inputs.x.device):
        S, pull, (y, h_n, *c_n) = torch.func.vjp(number, *given, has_aux=True)  # type: ignore[misc]  # aux is the third
        grads = pull(torch.ones_like(S))
    return Outputs(y, h_n, c_n[0] if c_n else None), *placed(grads, [None] * len(both))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """What stands in for a kernel takes numbers as they are, so without autocast, and uses torch.func, which refuses to
    run where hooks on saved tensors are set."""
    hooks, autograd = [], torch._C._autograd
    while (pair := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for pair in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(*pair)


def _lists(count: int) -> list[list[Tensor]]:
    return [[] for _ in range(count)]


def _counts(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """Number of sequences at each step."""
    if batch_sizes is None:
        return [x.size(1)] * x.size(0)
    counts = batch_sizes.tolist()
    if any(isinstance(n, torch.SymInt) for n in counts):
        raise NotImplementedError(
            "rnnfast: torch.compile cannot trace third derivatives, or forward mode over forward mode, of packed "
            "sequences, whose lengths it does not know. Where the weights require gradients, it traces one derivative "
            "more than was asked for. Use padded sequences, or compile something smaller."
        )
    return counts


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def _state(states: Tensor | None, k: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if states is None else states[k]


def _first(n: int, states: Tensor) -> Tensor:
    return states if len(states) == n else states[:n]


def _put_first(some: Tensor, states: Tensor) -> Tensor:
    return some if len(states) == len(some) else torch.cat([some, states[len(some) :]])


_Dual = tuple[Tensor, Tensor]  # a value and its derivative along the direction
_Weight = tuple[Tensor, Tensor | None]  # the same; None: zeros


class _DualCell:
    """One layer and direction, values and derivatives side by side."""

    def __init__(self, stack: Stack, w: list[Tensor], w_dot: list[Tensor | None]) -> None:
        self.stack = stack
        pairs = list(zip(w, w_dot, strict=True))
        self.w_ih, self.w_hh = pairs[:2]
        self.biases = pairs[2:4] if stack.bias else []
        self.w_hr = pairs[-1] if len(pairs) == (5 if stack.bias else 3) else None

    def project(self, x: _Dual) -> _Dual:
        """What enters the pre-activations (N,G*H) from outside."""
        z, z_dot = self._product(x, self.w_ih)
        for b, b_dot in self.biases:
            z, z_dot = z + b, z_dot if b_dot is None else z_dot + b_dot
        return z, z_dot

    def step(self, z: _Dual, h: _Dual, c: _Dual) -> tuple[Tensor, _Dual, _Dual]:
        """z_dot (n,G*H), c_t, h_t"""
        zs = [a + b for a, b in zip(z, self._product(h, self.w_hh), strict=True)]
        gates: list[_Dual] = list(zip(*(a.chunk(self.stack.gates, 1) for a in zs), strict=True))
        if not self.stack.lstm:
            return zs[1], c, _bend(torch.relu if self.stack.cell == 1 else torch.tanh, gates[0])
        i, f, o = (_bend(torch.sigmoid, gates[k]) for k in (0, 1, 3))
        g = _bend(torch.tanh, gates[2])
        c = f[0] * c[0] + i[0] * g[0], f[1] * c[0] + f[0] * c[1] + i[1] * g[0] + i[0] * g[1]
        t = _bend(torch.tanh, c)
        m = o[0] * t[0], o[1] * t[0] + o[0] * t[1]
        return zs[1], c, m if self.w_hr is None else self._product(m, self.w_hr)

    @staticmethod
    def _product(a: _Dual, w: _Weight) -> _Dual:
        dot = a[1] @ w[0].T
        return a[0] @ w[0].T, dot if w[1] is None else dot + a[0] @ w[1].T


_SLOPE: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {  # of a nonlinearity, by its value
    torch.tanh: lambda a: 1 - a * a,
    torch.sigmoid: lambda a: a * (1 - a),
    torch.relu: lambda a: (a > 0).to(a.dtype),
}


def _bend(f: Callable[[Tensor], Tensor], z: _Dual) -> _Dual:
    a = f(z[0])
    return a, _SLOPE[f](a) * z[1]
