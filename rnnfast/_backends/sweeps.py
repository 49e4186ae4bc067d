"""One layer's way through time in torch's own operators, on any device: what a CUDA kernel computes, in a few lines.

`sweep_forward` and `sweep_backward` are the contract of the CUDA extension (csrc/cuda/sweep.h), array by array; they
stand in for it on the CPU, where the tests run, and RNNFAST_CUDA_KERNEL=composite puts them in its place on a GPU.

N rows: the (step, sequence) pairs, step by step. "Wide" is the dtype that sums and states have: float64 for float64,
float32 for everything else. Arrays are in the dtype of the layer where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends.cells import CELLS, Cell


class Sweep(NamedTuple):
    """Sizes of one layer's way through time. P is 0 without projection. batch_sizes (T) int64 on the CPU, not
    increasing; None: B sequences at each step. offsets (T+1) int64 on the device of the arrays: the first row of each
    step, given with batch_sizes. resets (N) bool on that device, or None."""

    cell_index: int
    D: int
    H: int
    P: int
    T: int
    B: int
    batch_sizes: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None = None

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_index]

    @property
    def counts(self) -> list[int]:
        """Number of sequences at each step."""
        return [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N) the step and (N) the sequence of each row."""
        if self.offsets is None:
            row = torch.arange(self.T * self.B, device=device)
            return row // self.B, row % self.B
        row = torch.arange(sum(self.counts), device=device)
        step = torch.searchsorted(self.offsets, row, right=True) - 1
        return step, row - self.offsets[step]

    def first_reset(self) -> Tensor:
        """(B) int64: the first step of each sequence with a reset, T if there is none; only with resets."""
        assert self.resets is not None
        step, b = self.rows(self.resets.device)
        never = step.new_full((self.B,), self.T)
        return never.scatter_reduce(0, b, step.masked_fill(~self.resets, self.T), "amin")


class ForwardArrays(NamedTuple):
    """What a forward sweep reads and writes. Gates are in the order of slots, w_hh and z of the slots `recurrent`."""

    gates: Tensor  # (N,D,G,H) in: W_ih x with biases; out, if kept: activated. Of a cell that saves none: y
    w_hh: Tensor  # (D,g*H,R)
    w_hr: Tensor | None  # (D,P,H)
    h0: Tensor | None  # (D,B,R); None: zeros
    c: Tensor | None  # (D,B,H) wide, of a cell with c; in: c_0, out: c_n
    cells: Tensor | None  # (N,D,H) out, of a cell with c; None: neither wanted nor the gates
    m: Tensor | None  # (N,D,H) out, projected: the cell's output
    y: Tensor  # (N,D,R) out
    h_n: Tensor  # (D,B,R) out
    unit: Tensor | None = None  # (D,U,H)


class BackwardArrays(NamedTuple):
    """What a backward sweep reads and writes."""

    gates: Tensor  # (N,D,G,H) activated; of a cell that saves none y
    cells: Tensor | None  # (N,D,H), of a cell with c
    w_hh: Tensor  # (D,g*H,R)
    w_hr: Tensor | None  # (D,P,H)
    c0: Tensor | None  # (D,B,H); None: zeros
    dy: Tensor | None  # (N,D,R); None: zeros
    dh_n: Tensor | None  # (D,B,R); None: zeros
    dc: Tensor | None  # (D,B,H) wide, of a cell with c; in: dL/dc_n, out: dL/dc_0
    dz: Tensor  # (N,D,G,H) out, dL/d pre-activations; in, if `add`: what to add to it
    dh: Tensor | None  # (N,D,P) out, projected: dL/d h_t
    dh0: Tensor  # (D,B,R) out
    d_cells: Tensor | None  # (N,D,H) out, of a cell with c: dL/d c_t; None: not wanted
    y: Tensor | None = None  # (N,D,R), of a cell that carries h
    h0: Tensor | None = None  # (D,B,R), the same; None: zeros
    unit: Tensor | None = None  # (D,U,H)
    d_unit: Tensor | None = None  # (N,D,U,H) out
    dm: Tensor | None = None  # (N,D,H) out, dL/d output of the cell; None: not wanted
    dc_more: Tensor | None = None  # (N,D,H), of a cell with c: what to add to dL/dc_t


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Step(NamedTuple):
    """One step of a direction: its rows, and of each where its state comes from: the row of the same sequence that the
    direction took before, what was given at the beginning, or zeros."""

    rows: slice
    n: int
    carried: int  # so many sequences have a row before; the others begin here
    keeps: Tensor | None = None  # (n,1) bool, of those that have a row before; None: all keep it
    given: Tensor | None = None  # (n,1) bool, of all: does what was given enter here? None: of those that begin

    def before(self, last: Tensor, first: Tensor | None) -> Tensor:
        """The state (n,...) before the step, of that after the last one (B,...) and that given (B,...; None: zeros)."""
        last = last[: self.n]
        if self.keeps is None and self.carried == self.n:
            return last
        if first is None:
            first = torch.zeros_like(last)
        if self.keeps is None or self.given is None:
            return torch.cat([last[: self.carried], first[self.carried : self.n]])
        return torch.where(self.keeps, last, torch.where(self.given, first[: self.n], torch.zeros_like(last)))

    def carry_back(self, d: Tensor, last: Tensor, first: Tensor) -> None:
        """The transpose of `before`: d (n,...) becomes that of the last state and, where it entered, the given one."""
        if self.keeps is None or self.given is None:
            last[: self.carried] = d[: self.carried]
            first[self.carried : self.n] = d[self.carried :]
        else:
            last[: self.n] = torch.where(self.keeps, d, torch.zeros_like(d))
            first[: self.n] = torch.where(self.given, d, first[: self.n])


def steps_of(counts: list[int], resets: Tensor | None, reverse: bool) -> list[Step]:
    """The steps in the order in which a direction takes them. counts: sequences at each step; resets (N).

    Each episode is a sequence of its own: what was given enters the one that begins at 0 without a reset.
    """
    firsts = list(accumulate(counts, initial=0))
    T, order = len(counts), range(len(counts))[:: -1 if reverse else 1]
    anew = in_first = None
    if resets is not None:
        B = counts[0]
        anew = [torch.cat([r, r.new_zeros(B - len(r))]) for r in resets.split(counts)]  # T times (B)
        anew.append(torch.ones_like(anew[0]))
        in_first = [seen for seen in torch.stack(anew[:T]).cumsum(0).eq(0).unbind(0)]  # no reset so far
    steps = []
    for t in order:
        n, before = counts[t], t + 1 if reverse else t - 1
        carried = min(n, counts[before]) if 0 <= before < T else 0
        rows = slice(firsts[t], firsts[t] + n)
        if anew is None or in_first is None:
            steps.append(Step(rows, n, carried))
            continue
        has = torch.arange(n, device=anew[0].device) < carried
        begins = ~has | anew[t + 1 if reverse else t][:n]
        given = begins & in_first[t][:n]
        steps.append(Step(rows, n, carried, ~begins.unsqueeze(1), given.unsqueeze(1)))
    return steps


def sweep_forward(s: Sweep, a: ForwardArrays) -> None:
    """Step by step, each direction in its own order."""
    dtype, cell = wide(a.y.dtype), s.cell
    for d in range(s.D):
        w_hh = a.w_hh[d].to(dtype).T
        unit = None if a.unit is None else a.unit[d].to(dtype)
        h = a.y.new_zeros((s.B, s.P or s.H), dtype=dtype)  # what recurs, as it was stored
        h0 = None if a.h0 is None else a.h0[d].to(dtype)
        c0 = None if a.c is None else a.c[d].clone()
        for step in steps_of(s.counts, s.resets, d == 1):
            at, n = (step.rows, d), step.n
            h_prev = step.before(h, h0)
            z = a.gates[at].to(dtype, copy=True)  # (n,G,H)
            z[:, cell.recurrent] += (h_prev @ w_hh).view(n, -1, s.H)
            gates = cell.activate(z)
            state = h_prev if cell.carries_h else None if a.c is None else step.before(a.c[d], c0)
            state = cell.carry(gates, state, unit)
            m = cell.output(gates, state)
            if cell.saves_gates:
                a.gates[at] = gates.to(a.gates.dtype)
            if a.c is not None and state is not None:
                a.c[d, :n] = state
                if a.cells is not None:
                    a.cells[at] = state.to(a.y.dtype)
            if a.m is not None and a.w_hr is not None:
                a.m[at] = m.to(a.y.dtype)
                m = a.m[at].to(dtype) @ a.w_hr[d].to(dtype).T
            a.y[at] = m.to(a.y.dtype)
            h[:n] = a.y[at].to(dtype)
        a.h_n[d] = h.to(a.h_n.dtype)


def sweep_backward(s: Sweep, a: BackwardArrays, add: bool) -> None:
    """The steps of the forward sweep from the last to the first."""
    dtype, cell = wide(a.dz.dtype), s.cell
    for d in range(s.D):
        w_hh = a.w_hh[d].to(dtype)
        dh = a.dz.new_zeros((s.B, s.P or s.H), dtype=dtype)  # dL/d h_t by way of the steps after t
        if a.dh_n is not None:
            dh.copy_(a.dh_n[d])
        dh0 = torch.zeros_like(dh)
        dc0 = None if a.dc is None else torch.zeros_like(a.dc[d])
        steps = steps_of(s.counts, s.resets, d == 1)
        for k in reversed(range(s.T)):
            step = steps[k]
            at, n = (step.rows, d), step.n
            into = dh[:n] if a.dy is None else dh[:n] + a.dy[at].to(dtype)
            if a.dh is not None and a.w_hr is not None:
                a.dh[at] = into.to(a.dh.dtype)
                into = a.dh[at].to(dtype) @ a.w_hr[d].to(dtype)
            if a.dm is not None:
                a.dm[at] = into.to(a.dm.dtype)
            dz, before = _step_backward(s, a, d, step, steps[k - 1] if k else None, into)
            a.dz[at] = (dz + a.dz[at].to(dtype) if add else dz).to(a.dz.dtype)
            back = a.dz[at][:, cell.recurrent].flatten(1).to(dtype) @ w_hh
            if cell.carries_h and before is not None:
                back = back + before
            elif a.dc is not None and dc0 is not None and before is not None:
                step.carry_back(before, a.dc[d], dc0)
            step.carry_back(back, dh, dh0)
        a.dh0[d] = dh0.to(a.dh0.dtype)
        if a.dc is not None and dc0 is not None:
            a.dc[d] = dc0


def _step_backward(
    s: Sweep, a: BackwardArrays, d: int, step: Step, last: Step | None, dm: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz (n,G,H) of a step from dL/d output of the cell (n,H), and dL/d the state before it."""
    at, cell, dtype = (step.rows, d), s.cell, dm.dtype
    gates = a.gates[at].to(dtype)
    unit = None if a.unit is None else a.unit[d].to(dtype)
    with undisturbed(dm.device), torch.enable_grad():
        if not (cell.has_c or cell.carries_h):
            _, pull, *_ = torch.func.vjp(lambda gates: cell.output(gates, None), gates)
            return cell.pull(gates, pull(dm)[0] * cell.slopes(gates)), None
        states, first = (a.cells, a.c0) if cell.has_c else (a.y, a.h0)
        assert states is not None
        _, pull, *_ = torch.func.vjp(cell.output, gates, states[at].to(dtype))
        d_gates, d_state = pull(dm)
        if a.dc is not None:
            d_state = d_state + a.dc[d, : step.n]
            if a.dc_more is not None:
                d_state = d_state + a.dc_more[at].to(dtype)
            if a.d_cells is not None:
                a.d_cells[at] = d_state.to(a.d_cells.dtype)
        before = _state_before(s, states, first, d, step, last, dtype)
        given = [gates, before] if unit is None else [gates, before, unit.expand(step.n, -1, -1).transpose(0, 1)]
        _, pull, *_ = torch.func.vjp(cell.carry, *given)
        more, d_before, *d_unit = pull(d_state)
        if a.d_unit is not None:
            a.d_unit[at] = d_unit[0].transpose(0, 1).to(a.d_unit.dtype)
        return cell.pull(gates, (d_gates + more) * cell.slopes(gates)), d_before


def _state_before(
    s: Sweep, states: Tensor, first: Tensor | None, d: int, step: Step, last: Step | None, dtype: torch.dtype
) -> Tensor:
    """(n,H) wide: the state after the step before, or that given, or zeros."""
    whole = states.new_zeros((s.B, states.size(-1)), dtype=dtype)
    if last is not None:
        whole[: last.n] = states[last.rows, d].to(dtype)
    return step.before(whole, None if first is None else first[d].to(dtype))


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
