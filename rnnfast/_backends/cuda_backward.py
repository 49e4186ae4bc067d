"""The way back of a call on a GPU: sweeps from the top layer down, and the products that follow each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends.cuda_call import Call, Saved, Weights
from rnnfast._backends.cuda_sweeps import products_as_cudnns
from rnnfast._backends.sizes import reserve_per_row
from rnnfast._backends.sweeps import BackwardArrays, Sweep
from rnnfast._backends.types import Inner, Past, SomeInputs, SomeOutputs


class _Layer(NamedTuple):
    """What is known of a layer once its backward sweep is done."""

    weights: Weights
    below: Tensor  # (N,I) or (N,D*R) what entered it
    out: Tensor  # (N,D,R) what it gave
    m: Tensor | None  # (N,D,H) projected
    dz: Tensor  # (N,D,G,H)
    d_unit: Tensor | None  # (N,D,U,H)
    dh: Tensor | None  # (N,D,P) projected
    dx: Tensor | None  # (N,I) or (N,D*R)
    dh0: Tensor  # (D,B,R)
    dc: Tensor | None  # (D,B,H) wide, dL/dc_0


class BackwardSweep:
    """From the top layer down."""

    def __init__(self, past: Past, cotangents: SomeOutputs, inner: Inner) -> None:
        self.call = call = Call(past.stack, past.inputs, past.constants)
        s, stack = call.sizes, past.stack
        self.y = call.dense("y", past.y, call.shapes.outputs.shapes[0]).view(s.N, stack.D * s.R)
        size = s.N * reserve_per_row(stack, s.H, s.P)
        self.saved = Saved(call, call.dense("reserve", past.reserve, (size,)))
        dy, self.dh_n, self.dc_n = call.dense_outputs("gradient of ", cotangents)
        self.d_out = None if dy is None else dy.view(s.N, stack.D * s.R)  # of the layer that is next
        L, D = stack.L, stack.D
        shapes = (L, D, s.N, stack.gates, s.H), (L, D, s.N, s.H), (L - 1, s.N, D * s.R)
        named = zip(("z", "c", "hidden outputs"), inner, shapes, strict=True)
        self.inner = Inner(*(None if t is None else call.dense(f"gradient of {n}", t, shape) for n, t, shape in named))

    def out(self, layer: int) -> Tensor:
        """(N,D*R)"""
        return self.y if layer == self.call.stack.L - 1 else self.saved.hidden(layer)

    def below(self, layer: int) -> Tensor:
        """(N,I) or (N,D*R)"""
        if layer == 0:
            return self.call.x
        masks = self.call.dropout
        return self.out(layer - 1) if masks is None else self.out(layer - 1) * masks[layer - 1]

    def run(self, layer: int, wants_dx: bool, d_cells: Tensor | None = None, dm: Tensor | None = None) -> _Layer:
        call, saved, cell = self.call, self.saved, self.call.stack.cell
        s, D, G = call.sizes, call.stack.D, call.stack.gates
        w, out = call.weights_of(layer), self.out(layer).view(s.N, D, s.R)
        dc, dh0 = call.wide_state(self.dc_n, layer), call.empty(D, s.B, s.R)
        dz, dh = call.empty(s.N, D, G, s.H), call.empty(s.N, D, s.P) if s.P else None
        dz_more, dc_more, hidden = self.inner
        if dz_more is not None:
            dz.copy_(dz_more[layer].transpose(0, 1))
        if hidden is not None and layer < call.stack.L - 1:
            self.d_out = hidden[layer] if self.d_out is None else self.d_out + hidden[layer]
        m = saved.m(layer)
        d_unit = call.empty(s.N, D, cell.unit_parameters, s.H) if cell.unit_parameters else None
        arrays = BackwardArrays(
            saved.gates(layer) if cell.saves_gates else out.unsqueeze(2),
            saved.c(layer),
            w.w_hh,
            w.w_hr,
            call.of_layer(call.c0, layer),
            None if self.d_out is None else self.d_out.view(s.N, D, s.R),
            call.of_layer(self.dh_n, layer),
            dc,
            dz,
            dh,
            dh0,
            d_cells,
            out,
            call.of_layer(call.h0, layer),
            w.unit,
            d_unit,
            dm,
            None if dc_more is None else dc_more[layer].transpose(0, 1).contiguous(),
        )
        call.run_backward(arrays, dz_more is not None)
        with products_as_cudnns(dz):
            # In torch's order of gates, whose sums end with the large ones.
            dx = dz[:, :, cell.in_torch_order(cell.input)].flatten(1) @ call.torchs_w_ih(layer) if wants_dx else None
        self.d_out = dx
        if layer > 0 and call.dropout is not None and dx is not None:
            self.d_out = dx * call.dropout[layer - 1]
        return _Layer(w, self.below(layer), out, m, dz, d_unit, dh, dx, dh0, dc)


class Gradients:
    """Those that are wanted, in the order of the inputs; of the weights (groups,...) if there are several groups."""

    def __init__(self, call: Call, wanted: Sequence[bool], groups: int) -> None:
        s = call.sizes
        counts = [s.B] if call.batch_sizes is None else call.batch_sizes.tolist()
        if any(n % groups for n in counts):
            raise RuntimeError(f"groups: expected a divisor of the sequences at every step, got {groups} for {counts}")
        self.call, self.groups = call, groups
        self.wanted = [
            want and t is not None for want, t in zip(wanted, (call.x, call.h0, call.c0, *call.weights), strict=True)
        ]
        self.states: tuple[list[Tensor], list[Tensor | None]] = [], []
        self.x: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * len(call.weights)

    def add_layer(self, layer: int, one: _Layer) -> None:
        """Layers come from the top down."""
        self.states[0].insert(0, one.dh0)
        self.states[1].insert(0, one.dc)
        if layer == 0 and one.dx is not None:
            self.x = one.dx.view(self.call.shapes.inputs.shapes[0])
        D, per = self.call.stack.D, self.call.stack.weights_each(self.weights)
        for d in range(D):
            first = (layer * D + d) * per
            wanted = self.wanted[3 + first : 3 + first + per]
            if any(wanted):
                own = self._weights(one, d, wanted, layer)
                self.weights[first : first + per] = own

    def _weights(self, one: _Layer, d: int, wanted: Sequence[bool], layer: int) -> list[Tensor | None]:
        """Of one direction, in torch's order."""
        cell = self.call.stack.cell
        dz_x, dz_h = (one.dz[:, d, cell.in_torch_order(slots)].flatten(1) for slots in (cell.input, cell.recurrent))
        some = [
            self._product(dz_x, one.below) if wanted[0] else None,
            self._recurrent(dz_h, one, d, layer) if wanted[1] else None,
        ]
        if self.call.stack.bias:
            some += [self._sum(dz) if want else None for dz, want in zip((dz_x, dz_h), wanted[2:4], strict=True)]
        if one.dh is not None and one.m is not None:
            some.append(self._product(one.dh[:, d], one.m[:, d]) if wanted[-1] else None)
        if one.d_unit is not None:
            some.append(self._sum(one.d_unit[:, d]) if wanted[-1] else None)
        return some

    def _sum(self, a: Tensor) -> Tensor:
        """Of rows (N,...), for each group on its own if there are several"""
        total = self._rows(a).sum(0)
        return total if self.groups > 1 else total[0]

    def _rows(self, a: Tensor) -> Tensor:
        """(n,groups,...) of rows (n*groups,...): sequence b is of group b % groups at every step"""
        return a.unflatten(0, (-1, self.groups))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b of rows a (n,j), b (n,k), for each group on its own if there are several"""
        with products_as_cudnns(a):
            if self.groups == 1:
                return a.T @ b
            return torch.bmm(self._rows(a).permute(1, 2, 0), self._rows(b).transpose(0, 1))

    def _recurrent(self, dz: Tensor, one: _Layer, d: int, layer: int) -> Tensor:
        """Of W_hh (g*H,R): dz^T h of the step before, which at the first step is h_0"""
        call, h = self.call, one.out[:, d]
        h0 = None if call.h0 is None else call.h0[layer * call.stack.D + d]  # (B,R)
        B, N = call.sizes.B, call.sizes.N
        if call.offsets is not None or call.sweep.resets is not None:
            given = h.new_zeros((B, call.sizes.R)) if h0 is None else h0
            states = torch.cat([h, given, h.new_zeros((1, call.sizes.R))])
            return self._product(dz, states[_rows_before(call.sweep, h.device, reverse=d == 1)])
        later, before, first_dz = (dz[B:], h[:-B], dz[:B]) if d == 0 else (dz[:-B], h[B:], dz[-B:])
        if h0 is None:
            return self._product(later, before)
        total = self._product(first_dz, h0)
        return total if N == B else total.add_(self._product(later, before))

    def some(self) -> SomeInputs:
        x, h0, c0, *_ = self.wanted
        dh0, dc0 = ([d for d in layers if d is not None] for layers in self.states)
        return SomeInputs(
            self.x if x else None,
            torch.cat(dh0) if h0 else None,
            torch.cat(dc0).to(self.call.like.dtype) if c0 else None,
            self.weights,
        )


def _rows_before(s: Sweep, device: torch.device, reverse: bool) -> Tensor:
    """(N) where the state before each row is: the row of the same sequence one step before, in the order of a
    direction; N + b where that is what was given to sequence b; N + B where it is zeros."""
    step, b = s.rows(device)
    N = len(step)
    offsets = torch.arange(s.T + 1, device=device) * s.B if s.offsets is None else s.offsets
    if reverse:
        before = offsets[step + 1] + b
        follows = before < offsets[(step + 2).clamp(max=s.T)]
    else:
        before = offsets[(step - 1).clamp(min=0)] + b
        follows = step > 0
    first = N + b
    if s.resets is not None:
        follows &= ~(s.resets[before.clamp(max=N - 1)] if reverse else s.resets)
        first = torch.where(step < s.first_reset()[b], first, N + s.B)
    return torch.where(follows, before, first)
