"""Norms of what one backward sweep carries through time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rnnfast._backends import schema
from rnnfast._backends.cells import SIGMOID
from rnnfast._backends.types import Past, SomeOutputs

SATURATED = 0.99  # |h|; and gates above it, or below 1 - it
PART = 2**18  # numbers of h that are worked on at a time: what becomes of them stays in the cache


class Sweep:
    """One backward sweep, and norms of its parts. Everything is laid out padded, (T,B,...), with zeros after the end of
    a shorter sequence."""

    def __init__(self, past: Past, cotangents: SomeOutputs) -> None:
        self.past, self.cotangents, self.stack = past, cotangents, past.stack
        self.H, self.R, _ = self.stack.units(past.inputs.weights)
        batch_sizes, dropout, resets = past.constants
        backend = schema.backend_for(past.y)
        dz, dm, dc = backend.sweep_back(past, cotangents)
        self.packed, device = batch_sizes is not None, past.y.device
        if batch_sizes is None:
            batch_sizes = torch.full((past.y.size(0),), past.y.size(1), device=device)
        sizes = batch_sizes.to(device)
        self.T, self.B = len(sizes), int(sizes[0])
        self.mask = torch.arange(self.B, device=device) < sizes[:, None]  # (T,B)
        self.dz = self.pad(dz)  # (L,D,T,B,G,H)
        self.d_state: Tensor | None = None  # (L,D,T,B,H) dL/d state after the step
        if self.stack.has_c or self.stack.cell.carries_h:
            self.d_state = self.pad(dm if dc is None else dc)
        self.resets = None if resets is None else self.pad(resets.reshape(1, 1, -1, 1))[0, 0]  # (T,B,1)
        self.gates: Tensor | None = None
        if self.d_state is not None:
            self.gates = self.pad(backend.activations(past))  # (L,D,T,B,G,H)
        self.outputs = [self.pad_columns(rows) for rows in (*backend.hidden(past), past.y)]  # L times (T,B,D*R)
        self.d_y = None if cotangents.y is None else self.pad_columns(cotangents.y)  # (T,B,D*R)
        self.dropout = [] if dropout is None else [self.pad_columns(part) for part in dropout]

    def pad(self, rows: Tensor) -> Tensor:
        """(L,D,N,...) -> (L,D,T,B,...)"""
        lead, rest = rows.shape[:2], rows.shape[3:]
        if not self.packed:
            return rows.unflatten(2, (self.T, self.B))
        padded = rows.new_zeros(*lead, self.T, self.B, *rest)
        padded[:, :, self.mask] = rows
        return padded

    def pad_columns(self, rows: Tensor) -> Tensor:
        """(T,B,D*R), or (N,D*R) if packed -> (T,B,D*R)"""
        return self.pad(rows.reshape(1, 1, -1, self.stack.D * self.R))[0, 0]

    def weights(self, layer: int, d: int) -> list[Tensor]:
        """w_ih, w_hh, ..."""
        each = self.stack.weights_each(self.past.inputs.weights)
        i = (layer * self.stack.D + d) * each
        return self.past.inputs.weights[i : i + each]

    def measured(self) -> dict[str, Any]:
        """All attributes of GradientFlow."""
        parts = [[self.one(layer, d) for d in range(self.stack.D)] for layer in range(self.stack.L)]
        names = parts[0][0].keys()
        stacked = {name: torch.stack([torch.stack([p[name] for p in row]) for row in parts]) for name in names}
        return stacked | {"T": self.T}

    def one(self, layer: int, d: int) -> dict[str, Tensor]:
        """All attributes of GradientFlow for one layer and direction."""
        steps = max(1, PART // (self.B * self.R))
        parts = [_Part(self, layer, d, t, min(t + steps, self.T)) for t in range(0, self.T, steps)]
        measured = [part.measured() for part in parts]
        all_steps = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
        norms = {
            name: torch.where(self.mask, all_steps.pop(name), math.nan)
            for name in list(all_steps)
            if name.endswith(("_h", "_c"))
        }  # (T,B) each
        N = int(self.mask.sum())
        arrived = _after(norms["total_h"], d, 0, self.T)
        gain = torch.where(arrived > 0, norms["carried_h"] / arrived, math.nan)  # (T,B)
        lags = all_steps["lag_norms"]  # (T)
        result = norms | {
            "gain": gain,
            "log_slope": _log_slope(gain, d),
            "lag_share": (lags.flip(0) if d == 0 else lags) / lags.sum(),
            "saturated": all_steps["saturated"].sum() / (N * self.R),
            "nonfinite_h": _first(all_steps["h_nonfinite"], d),
            "nonfinite_gradient": _first(all_steps["gradient_nonfinite"], 1 - d),
        }
        if self.d_state is not None:
            result["gates_closed"] = all_steps["gates_closed"].sum(0) / (N * self.H)
            result["gates_open"] = all_steps["gates_open"].sum(0) / (N * self.H)
            result["memory"] = -1 / (all_steps["kept"].sum() / (N * self.H)).log()
        return result


class _Part:
    """Steps t0 to t1-1 of one layer and direction: few enough that what is computed of them stays in the cache."""

    def __init__(self, sweep: Sweep, layer: int, d: int, t0: int, t1: int) -> None:
        self.sweep, self.layer, self.d, self.t0, self.t1 = sweep, layer, d, t0, t1
        self.columns = slice(d * sweep.R, (d + 1) * sweep.R)
        self.mask = sweep.mask[t0:t1]  # (n,B), n = t1 - t0

    def measured(self) -> dict[str, Tensor]:
        """Norms (n,B) by the names of GradientFlow's attributes, what else there is for each step (n), and counts and
        sums (1) and (1,3), float64."""
        sweep, cell = self.sweep, self.sweep.stack.cell
        w_hh = cell.to_slots(sweep.weights(self.layer, self.d)[1], cell.recurrent).flatten(0, 1)  # (g*H,R)
        injected = self.injected()  # (n,B,R)
        carried = self.after(sweep.dz[self.layer, self.d, :, :, cell.recurrent].flatten(2)) @ w_hh  # (n,B,R)
        if cell.carries_h:
            carried = carried + self.kept()
        total = carried + injected
        h = sweep.outputs[self.layer][self.t0 : self.t1, :, self.columns]  # (n,B,R)
        result = {
            "injected_h": _norms(injected),
            "carried_h": _norms(carried),
            "total_h": _norms(total),
            "lag_norms": self.lag_norms(),
            "saturated": _count(h.abs() > SATURATED),
            "h_nonfinite": self.nonfinite(h),
            "gradient_nonfinite": self.nonfinite(total),
        }
        return result | (self.of_gates() if sweep.d_state is not None else {}) | (self.of_c() if cell.has_c else {})

    def kept(self) -> Tensor:
        """What reaches dL/d state (n,B,H) by way of the next state alone."""
        assert self.sweep.d_state is not None
        return self.after(self.keep()) * self.after(self.sweep.d_state[self.layer, self.d])

    def keep(self) -> Tensor:
        """The share of its state that each unit keeps (T,B,H)"""
        assert self.sweep.gates is not None
        cell = self.sweep.stack.cell
        unit = self.sweep.weights(self.layer, self.d)[-1] if cell.unit_parameters else None
        return cell.keep(self.sweep.gates[self.layer, self.d], unit)

    def of_c(self) -> dict[str, Tensor]:
        assert self.sweep.d_state is not None
        dc, carried = self.sweep.d_state[self.layer, self.d, self.t0 : self.t1], self.kept()  # (n,B,H)
        return {"injected_c": _norms(dc - carried), "carried_c": _norms(carried), "total_c": _norms(dc)}

    def of_gates(self) -> dict[str, Tensor]:
        assert self.sweep.gates is not None
        gates = self.sweep.gates[self.layer, self.d, self.t0 : self.t1][self.mask]  # (rows,G,H)
        which = [gates[:, k] for k, kind in enumerate(self.sweep.stack.cell.nonlinearities) if kind is SIGMOID]
        none = gates.new_zeros((1, 0), dtype=torch.float64)
        return {
            "gates_closed": torch.stack([_count(gate < 1 - SATURATED) for gate in which], dim=1) if which else none,
            "gates_open": torch.stack([_count(gate > SATURATED) for gate in which], dim=1) if which else none,
            "kept": self.keep()[self.t0 : self.t1][self.mask].sum().double()[None],
        }

    def after(self, x: Tensor) -> Tensor:
        """(T,B,K) -> (n,B,K): at t what belongs to the step that the direction runs after t, and takes its state"""
        resets = self.sweep.resets
        if resets is not None and self.d == 0:
            x = x.masked_fill(resets, 0)
        after = _after(x, self.d, self.t0, self.t1)
        if resets is not None and self.d == 1:
            after = after.masked_fill(resets[self.t0 : self.t1], 0)
        return after

    def injected(self) -> Tensor:
        """What comes into dL/dh_t (n,B,R) from above: y, h_n at each sequence's last step, the next layer."""
        sweep, layer, steps = self.sweep, self.layer, slice(self.t0, self.t1)
        D, cotangents = sweep.stack.D, sweep.cotangents
        if layer + 1 < sweep.stack.L:
            above = [self.from_above(e, steps) for e in range(D)]  # (n,B,D*R)
            d_y = sum(above[1:], above[0])
            if sweep.dropout:
                d_y = d_y * sweep.dropout[layer][steps]
        elif sweep.d_y is not None:
            d_y = sweep.d_y[steps]
        else:
            d_y = sweep.dz.new_zeros(self.t1 - self.t0, sweep.B, D * sweep.R)
        injected = d_y[..., self.columns]
        if cotangents.h_n is None:
            return injected
        return self.with_states(injected, self.last(self.d), cotangents.h_n[layer * D + self.d], add=True)

    def from_above(self, e: int, steps: slice) -> Tensor:
        """What direction e of the next layer gives back (n,B,D*R)"""
        cell, layer = self.sweep.stack.cell, self.layer + 1
        w_ih = cell.to_slots(self.sweep.weights(layer, e)[0], cell.input).flatten(0, 1)
        return self.sweep.dz[layer, e, steps, :, cell.input].flatten(2) @ w_ih

    def lag_norms(self) -> Tensor:
        """dW_hh is the sum over t and b of dz_tb h_{t-1,b}^T. -> norms (n) of what each step adds, the roots of
        the sums over b,b' of (dz_tb . dz_tb') (h_tb . h_tb')."""
        sweep, h0 = self.sweep, self.sweep.past.inputs.h0
        dz = sweep.dz[self.layer, self.d, self.t0 : self.t1, :, sweep.stack.cell.recurrent].flatten(2)  # (n,B,g*H)
        h = sweep.outputs[self.layer][..., self.columns]  # (T,B,R)
        before = _after(h, 1 - self.d, self.t0, self.t1)  # (n,B,R)
        if sweep.resets is not None:
            before = before.masked_fill(self.begins(), 0)
        if h0 is not None:
            before = self.with_states(before, self.last(1 - self.d), h0[self.layer * sweep.stack.D + self.d], add=False)
        squares = ((dz @ dz.transpose(1, 2)) * (before @ before.transpose(1, 2))).sum((1, 2))  # (n)
        return squares.clamp(min=0).sqrt()

    def begins(self) -> Tensor:
        """Does an episode begin here, as the direction runs? (n,B,1)"""
        resets = self.sweep.resets
        assert resets is not None
        return resets[self.t0 : self.t1] if self.d == 0 else _after(resets, 0, self.t0, self.t1)

    def nonfinite(self, x: Tensor) -> Tensor:
        """(n,B,K) -> (n), whether a step holds inf or NaN"""
        return (~x.abs().amax(2).isfinite() & self.mask).any(1)

    def last(self, d: int) -> Tensor:
        """The last step of each sequence in the order of direction d (B)"""
        lengths = self.sweep.mask.sum(0)
        return lengths - 1 if d == 0 else torch.zeros_like(lengths)

    def with_states(self, x: Tensor, at: Tensor, states: Tensor, add: bool) -> Tensor:
        """x (n,B,R) with states (B,R) put, or added, at steps `at` (B) where those are among the part's"""
        here = ((at >= self.t0) & (at < self.t1)).nonzero().flatten()
        if here.numel() == 0:
            return x
        return x.index_put((at[here] - self.t0, here), states[here], accumulate=add)


def _after(x: Tensor, d: int, t0: int, t1: int) -> Tensor:
    """Of x (T,...), what belongs to the step that direction d runs after t, for t0 <= t < t1; zeros after the last."""
    none = x.new_zeros(1, *x.shape[1:])
    if d == 0:
        return x[t0 + 1 : t1 + 1] if t1 < x.size(0) else torch.cat([x[t0 + 1 :], none])
    return x[t0 - 1 : t1 - 1] if t0 > 0 else torch.cat([none, x[: t1 - 1]])


def _norms(x: Tensor) -> Tensor:
    """(n,B,K) -> (n,B)"""
    return torch.linalg.vector_norm(x, dim=-1)


def _count(which: Tensor) -> Tensor:
    """Of a mask -> (1), float64"""
    return torch.count_nonzero(which).double()[None]


def _first(which: Tensor, d: int) -> Tensor:
    """Of a mask (T) the first step in the order of direction d, -1: none."""
    where = which.nonzero().flatten()
    return where.new_tensor(-1) if where.numel() == 0 else where[0 if d == 0 else -1]


def _log_slope(gain: Tensor, d: int) -> Tensor:
    """A line through the sum of log(median gain) from the end of the sequence on; NaN if there is none."""
    logs = torch.nanquantile(gain, 0.5, dim=-1).log()  # (T)
    logs = (logs.flip(0) if d == 0 else logs)[1:]  # in the order of the way back
    if logs.numel() == 0 or not logs.isfinite().all():
        logs = logs[logs.isfinite()]
        if logs.numel() == 0:
            return gain.new_tensor(math.nan)
    fallen = torch.cat([logs.new_zeros(1), logs.cumsum(0)])
    k = torch.arange(len(fallen), dtype=fallen.dtype, device=fallen.device)
    k -= k.mean()
    return (k * fallen).sum() / k.square().sum()
