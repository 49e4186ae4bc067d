"""Recurrent layers in torch's own operators, on any device: what the kernels compute, in a few lines.

`sweep_forward` and `sweep_backward` are one layer's way through time and the contract of the CUDA extension
(csrc/cuda/sweep.h), array by array; they stand in for it on the CPU, where the tests run, and
RNNFAST_CUDA_KERNEL=composite puts them in its place on a GPU. `forward` is a whole stack, `with_tangents` and `second`
are its derivatives: plain torch that can be differentiated and transformed any number of times, where no kernel is.

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

from rnnfast._backends.cells import CELLS, Cell
from rnnfast._backends.types import Constants, Inputs, Outputs, SomeInputs, SomeOutputs, Stack


class Sweep(NamedTuple):
    """Sizes of one layer's way through time. P is 0 without projection. batch_sizes (T) int64 on the CPU, not
    increasing; None: B sequences at each step. offsets (T+1) int64 on the device of the arrays: the first row of each
    step, given with batch_sizes."""

    cell_index: int
    D: int
    H: int
    P: int
    T: int
    B: int
    batch_sizes: Tensor | None
    offsets: Tensor | None

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_index]

    def steps(self, d: int) -> list[tuple[int, int]]:
        """First row and number of sequences of each step, in the order in which direction d takes them."""
        counts = [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()
        rows = accumulate(counts, initial=0)
        return list(zip(rows, counts, strict=False))[:: -1 if d else 1]


class ForwardArrays(NamedTuple):
    """What a forward sweep reads and writes."""

    gates: Tensor  # (N,D,G,H) in: W_ih x + b_ih + b_hh; out, with cells: activated. Not saved: the same memory as y
    w_hh: Tensor  # (D,G*H,R)
    w_hr: Tensor | None  # (D,P,H)
    h0: Tensor | None  # (D,B,R); None: zeros
    c: Tensor | None  # (D,B,H) wide, of a cell with c; in: c_0, out: c_n
    cells: Tensor | None  # (N,D,H) out, of a cell with c; None: neither wanted nor the gates
    m: Tensor | None  # (N,D,H) out, projected: the cell's output
    y: Tensor  # (N,D,R) out
    h_n: Tensor  # (D,B,R) out


class BackwardArrays(NamedTuple):
    """What a backward sweep reads and writes."""

    gates: Tensor  # (N,D,G,H) activated; not saved: y
    cells: Tensor | None  # (N,D,H), of a cell with c
    w_hh: Tensor  # (D,G*H,R)
    w_hr: Tensor | None  # (D,P,H)
    c0: Tensor | None  # (D,B,H); None: zeros
    dy: Tensor | None  # (N,D,R); None: zeros
    dh_n: Tensor | None  # (D,B,R); None: zeros
    dc: Tensor | None  # (D,B,H) wide, of a cell with c; in: dL/dc_n, out: dL/dc_0
    dz: Tensor  # (N,D,G,H) out, dL/d pre-activations; in, if `add`: what to add to it
    dh: Tensor | None  # (N,D,P) out, projected: dL/d h_t
    dh0: Tensor  # (D,B,R) out
    d_cells: Tensor | None  # (N,D,H) out, of a cell with c: dL/d c_t; None: not wanted


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sweep_forward(s: Sweep, a: ForwardArrays) -> None:
    """Step by step, each direction in its own order."""
    dtype, cell = wide(a.y.dtype), s.cell
    for d in range(s.D):
        w_hh = a.w_hh[d].to(dtype).T
        h = a.y.new_zeros((s.B, s.P or s.H), dtype=dtype)  # what recurs, as it was stored
        if a.h0 is not None:
            h.copy_(a.h0[d])
        for row, n in s.steps(d):
            at = slice(row, row + n), d
            gates = cell.activate(a.gates[at].to(dtype) + (h[:n] @ w_hh).view(n, -1, s.H))  # (n,G,H)
            c = cell.carry(gates, None if a.c is None else a.c[d, :n])
            m = cell.output(gates, c)
            if a.c is not None and c is not None:
                a.c[d, :n] = c
                if a.cells is not None:
                    a.gates[at] = gates.to(a.gates.dtype)
                    a.cells[at] = c.to(a.y.dtype)
            if a.m is not None and a.w_hr is not None:
                a.m[at] = m.to(a.y.dtype)
                m = a.m[at].to(dtype) @ a.w_hr[d].to(dtype).T
            a.y[at] = m.to(a.y.dtype)
            h[:n] = a.y[at].to(dtype)
        a.h_n[d] = h.to(a.h_n.dtype)


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
            dz = _step_backward(s, a, d, k, steps, into)
            a.dz[at] = (dz + a.dz[at].to(dtype) if add else dz).to(a.dz.dtype)
            dh[:n] = a.dz[at].flatten(1).to(dtype) @ w_hh
        a.dh0[d] = dh.to(a.dh0.dtype)


def _step_backward(s: Sweep, a: BackwardArrays, d: int, k: int, steps: list[tuple[int, int]], dm: Tensor) -> Tensor:
    """dz (n,G,H) of step k from dL/d output of the cell (n,H); dc becomes that of the step before."""
    row, n = steps[k]
    at = slice(row, row + n), d
    gates = a.gates[at].to(dm.dtype)
    with undisturbed(dm.device), torch.enable_grad():
        if a.cells is None or a.dc is None:
            _, pull, *_ = torch.func.vjp(lambda gates: s.cell.output(gates, None), gates)
            return pull(dm)[0] * s.cell.slopes(gates)
        _, pull, *_ = torch.func.vjp(s.cell.output, gates, a.cells[at].to(dm.dtype))
        d_gates, dc = pull(dm)
        dc = dc + a.dc[d, :n]
        if a.d_cells is not None:
            a.d_cells[at] = dc.to(a.d_cells.dtype)
        _, pull, *_ = torch.func.vjp(s.cell.carry, gates, _cells_before(a, d, k, steps))
        more, before = pull(dc)
        a.dc[d, :n] = before
        return (d_gates + more) * s.cell.slopes(gates)


def _cells_before(a: BackwardArrays, d: int, k: int, steps: list[tuple[int, int]]) -> Tensor:
    """(n,H) wide: c of the step before step k, c_0 of the sequences that begin there."""
    assert a.cells is not None and a.dc is not None
    _, n = steps[k]
    first = torch.zeros_like(a.dc[d, :n]) if a.c0 is None else a.c0[d, :n].to(a.dc.dtype, copy=True)
    if k:
        row, before = steps[k - 1]
        some = min(n, before)
        first[:some] = a.cells[row : row + some, d].to(a.dc.dtype)
    return first


# --- a whole stack and its derivatives --------------------------------------------------------------------------------


def forward(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, Tensor]:
    """Outputs, and the pre-activations (L,D,N,G,H)."""
    x = inputs.x.flatten(0, -2)  # (N,I)
    counts = _counts(inputs.x, constants.batch_sizes)
    h_n, c_n, zs = _lists(3)
    for layer in range(stack.L):
        ways = [_Way(stack, inputs, layer, d, counts).run(x) for d in range(stack.D)]
        x = torch.cat([way.y for way in ways], 1)
        for way in ways:
            h_n.append(way.h)
            c_n += [] if way.c is None else [way.c]
            zs.append(way.z)
        if constants.dropout is not None and layer < stack.L - 1:
            x = x * constants.dropout[layer].flatten(0, -2)
    y = x.reshape(*inputs.x.shape[:-1], x.size(-1))
    z = torch.stack(zs).unflatten(0, (stack.L, stack.D))
    return Outputs(y, torch.stack(h_n), torch.stack(c_n) if c_n else None), z


class _Done(NamedTuple):
    """One layer and direction: all outputs and pre-activations, the last states."""

    y: Tensor  # (N,R)
    z: Tensor  # (N,G,H)
    h: Tensor  # (B,R)
    c: Tensor | None  # (B,H)


class _Way:
    """One layer's way through time in one direction."""

    def __init__(self, stack: Stack, inputs: Inputs, layer: int, d: int, counts: list[int]) -> None:
        i = layer * stack.D + d
        each = stack.weights_each(inputs.weights)
        self.w_ih, self.w_hh, *rest = inputs.weights[i * each : (i + 1) * each]
        self.biases = rest[:2] if stack.bias else []
        self.H, R, P = stack.units(inputs.weights)
        self.w_hr = rest[-1] if P else None
        self.cell, self.counts, self.reverse = stack.cell, counts, d == 1
        B, new_zeros = counts[0], inputs.x.new_zeros
        self.h = new_zeros((B, R)) if inputs.h0 is None else inputs.h0[i]
        self.c: Tensor | None = None
        if self.cell.has_c:
            self.c = new_zeros((B, self.H)) if inputs.c0 is None else inputs.c0[i]

    def run(self, x: Tensor) -> _Done:
        """x (N,I)"""
        z = x @ self.w_ih.T
        for bias in self.biases:
            z = z + bias
        y, zs = _lists(2)
        for one in z.split(self.counts)[:: -1 if self.reverse else 1]:
            n = len(one)
            own = (one + _first(n, self.h) @ self.w_hh.T).unflatten(1, (self.cell.gates, self.H))
            gates = self.cell.activate(own)
            c = self.cell.carry(gates, None if self.c is None else _first(n, self.c))
            h = self.cell.output(gates, c)
            h = h if self.w_hr is None else h @ self.w_hr.T
            self.h = _put_first(h, self.h)
            if self.c is not None and c is not None:
                self.c = _put_first(c, self.c)
            y.append(h)
            zs.append(own)
        order = -1 if self.reverse else 1
        return _Done(torch.cat(y[::order]), torch.cat(zs[::order]), self.h, self.c)


def push_forward(
    function: Callable[..., tuple[Tensor, ...]], at: Sequence[Tensor], along: Iterable[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of the function, and their derivative along a direction: the transpose of the gradients, which are linear
    in the cotangents. (torch.func.jvp refuses to run within torch.autograd.forward_ad.)"""
    results, pull, *_ = torch.func.vjp(function, *at)
    _, push, *_ = torch.func.vjp(lambda *cotangents: pull(cotangents), *map(torch.zeros_like, results))
    return results, push(tuple(along))


def with_tangents(
    stack: Stack, inputs: Inputs, tangents: SomeInputs, constants: Constants
) -> tuple[Outputs, Outputs, Tensor]:
    """Outputs, their derivative along `tangents` (None: zeros), that of the pre-activations (L,D,N,G,H)."""
    flat, moved = inputs.flat(), [v is not None for v in tangents.flat()]

    def run(*some: Tensor) -> tuple[Tensor, ...]:
        here = Inputs.of(_placed(moved, some, flat))  # type: ignore[arg-type]
        outputs, z = forward(stack, here, constants)
        return *(t for t in outputs if t is not None), z

    at = [t for t, flag in zip(flat, moved, strict=True) if flag and t is not None]
    along = [v for v in tangents.flat() if v is not None]
    with undisturbed(inputs.x.device):
        (*outputs, _), (*outputs_dot, z_dot) = push_forward(run, at, along)
    return Outputs.of(outputs), Outputs.of(outputs_dot), z_dot


def second(
    stack: Stack,
    inputs: Inputs,
    tangents: SomeInputs,
    constants: Constants,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See Backend.second."""
    n, at = len(inputs.flat()), inputs.flat()
    triples = zip(tangents.flat(), at, wanted_first, strict=True)
    both = [torch.zeros_like(t) if v is None and want and t is not None else v for v, t, want in triples] + at
    chosen = [want and t is not None for want, t in zip((*wanted_first, *wanted_plain), both, strict=True)]

    def number(*some: Tensor) -> tuple[Tensor, list[Tensor]]:
        """<first, tangent outputs> + <plain, outputs>, and the tangent outputs themselves."""
        values = _placed(chosen, some, both)
        along, here = SomeInputs.of(values[:n]), Inputs.of(values[n:])  # type: ignore[arg-type]
        outputs, outputs_dot, _ = with_tangents(stack, here, along, constants)
        pairs = zip((*first, *plain), (*outputs_dot, *outputs), strict=True)
        products = [(d * o).sum() for d, o in pairs if d is not None and o is not None]
        return sum(products, inputs.x.new_zeros(())), [o for o in outputs_dot if o is not None]

    given = [t for t, flag in zip(both, chosen, strict=True) if flag]
    with undisturbed(inputs.x.device):
        S, pull, outputs_dot = torch.func.vjp(number, *given, has_aux=True)  # type: ignore[misc]  # aux is the third
        grads = _placed(chosen, pull(torch.ones_like(S)), [None] * len(both))
    return Outputs.of(outputs_dot), SomeInputs.of(grads[:n]), SomeInputs.of(grads[n:])


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


def _placed(flags: Sequence[bool], some: Iterable[Tensor], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`some` where a flag is set, `others` elsewhere."""
    given = iter(some)
    return [next(given) if flag else other for flag, other in zip(flags, others, strict=True)]


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


def _first(n: int, states: Tensor) -> Tensor:
    return states if len(states) == n else states[:n]


def _put_first(some: Tensor, states: Tensor) -> Tensor:
    return some if len(states) == len(some) else torch.cat([some, states[len(some) :]])
