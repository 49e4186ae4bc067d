"""Where gradients vanish or explode: what back-propagation through time carries, step by step.

The gradient of a loss with respect to h_t is a sum of two parts,

    dL/dh_t  =  injected_t  +  carried_t

*injected* comes from the loss (or the layer above) at step t itself, *carried* through time from step t+1. Only what
is carried can teach a recurrent network about the past, and losses at every step hide its decay, so the two are kept
apart; likewise for the cells of an LSTM, where carried_t = f_{t+1} * dL/dc_{t+1}. All of it stands in one backward
sweep of the kernel, without a hook for each step.

    flow = rnnfast.diagnose.gradient_flow(model.rnn, lambda: loss(model(x), y))
    print(flow)
    flow.plot()
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.rnn import RNNBase

from rnnfast import modules
from rnnfast._autograd import nodes
from rnnfast._backends import cpu, schema
from rnnfast._backends.cpu import Inputs, Past, SomeInputs, SomeOutputs
from rnnfast.modules import LSTM, RNN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GradientFlow", "gradient_flow", "lyapunov"]

VANISHED, EXPLODED = 1e-3, 1e3  # of a gradient, over the whole sequence
SATURATED = 0.99  # |h|; and gates above it, or below 1 - it
PART = 2**18  # numbers of h that are worked on at a time: what becomes of them stays in the cache


@dataclass(frozen=True)
class GradientFlow:
    """Norms of gradients over time, and what they mean. L layers, D directions, T steps, B sequences; NaN where a
    shorter sequence has ended. "Before" and "after" are as the direction runs: the reverse one goes from T-1 to 0.

    Attributes:
        T: steps.
        injected_h, carried_h, total_h: (L,D,T,B) norms of the parts of dL/dh_t and of their sum.
        injected_c, carried_c, total_c: likewise of dL/dc_t; None for Elman.
        gain: (L,D,T,B) |carried_t| / |dL/dh_{t+1}|, NaN at the last step and where nothing arrived.
        log_slope: (L,D) by how much the logarithm of a gradient changes in a step on its way back: the slope of a line
            fitted to the sum of log(median gain) over the steps. Negative: it vanishes.
        lag_share: (L,D,T) share of |dW_hh| by lag: the norm of what step T-1-lag (of the way of the direction) adds to
            dW_hh, all sequences together, over the sum of these norms.
        saturated: (L,D) share of |h| > 0.99.
        gates_closed, gates_open: (L,D,3) shares of the gates i,f,o below 0.01 and above 0.99; None for Elman.
        memory: (L,D) -1 / ln(mean f), steps in which a cell falls to 1/e; None for Elman.
        nonfinite_h, nonfinite_gradient: (L,D) the step at which the first state (forward) or gradient (on the way back)
            was inf or NaN, -1: none.
    """

    T: int
    injected_h: Tensor
    carried_h: Tensor
    total_h: Tensor
    gain: Tensor
    log_slope: Tensor
    lag_share: Tensor
    saturated: Tensor
    nonfinite_h: Tensor
    nonfinite_gradient: Tensor
    injected_c: Tensor | None = None
    carried_c: Tensor | None = None
    total_c: Tensor | None = None
    gates_closed: Tensor | None = None
    gates_open: Tensor | None = None
    memory: Tensor | None = None

    def horizon(self, fraction: float = 1 / math.e) -> Tensor:
        """(L,D) steps in which a gradient falls to `fraction` of itself, at `log_slope`; inf if it does not fall."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction should be between 0 and 1, got {fraction}")
        steps = math.log(fraction) / self.log_slope
        return torch.where(self.log_slope < 0, steps, math.inf)

    def verdicts(self) -> list[list[str]]:
        """For each layer and direction 'vanishing', 'healthy' or 'exploding': a gradient that travels over all T steps
        at `log_slope` becomes less than 10^-3 of itself, or more than 10^3, or neither; 'not finite' if there is inf or
        NaN, 'no gradient' if nothing is carried at all."""
        return [
            [self._verdict(layer, d) for d in range(self.log_slope.size(1))] for layer in range(self.log_slope.size(0))
        ]

    def _verdict(self, layer: int, d: int) -> str:
        if self.nonfinite_gradient[layer, d] >= 0 or self.nonfinite_h[layer, d] >= 0:
            return "not finite"
        change = self.log_slope[layer, d].item() * self.T
        if math.isnan(change):
            return "no gradient"
        return "vanishing" if change < math.log(VANISHED) else "exploding" if change > math.log(EXPLODED) else "healthy"

    def quantiles(self, norms: str, q: tuple[float, ...] = (0.25, 0.5, 0.75)) -> Tensor:
        """Over the sequences of one of the (L,D,T,B) attributes -> (len(q),L,D,T)."""
        values = getattr(self, norms)
        return torch.nanquantile(values, values.new_tensor(q), dim=-1)

    def __str__(self) -> str:
        lines = []
        for layer, row in enumerate(self.verdicts()):
            for d, verdict in enumerate(row):
                slope, e, k = (x[layer, d].item() for x in (self.log_slope, self.horizon(), self.horizon(VANISHED)))
                text = f"layer {layer}{' reverse' if d else ''}: {verdict}, x {math.exp(slope):.3g} a step"
                if math.isfinite(e):
                    text += f", 1/e after {e:.3g} steps, 1/1000 after {k:.3g}"
                text += f"; |h| > {SATURATED}: {self.saturated[layer, d]:.1%}"
                if self.memory is not None:
                    text += f"; cells remember {self.memory[layer, d]:.3g} steps"
                lines.append(text)
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Medians of carried (solid) and injected (dotted) norms over t, on a log scale, a colour for each layer and
        direction; the band holds the middle half of the sequences. Needs matplotlib.

        Returns:
            The axes drawn on, new ones if `ax` is None.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        t = range(self.T)
        carried, injected = self.quantiles("carried_h"), self.quantiles("injected_h")  # (3,L,D,T)
        for layer, row in enumerate(self.verdicts()):
            for d, verdict in enumerate(row):
                color = f"C{layer * len(row) + d}"
                low, median, high = (_positive(part) for part in carried[:, layer, d])
                label = f"layer {layer}{' reverse' if d else ''}: {verdict}"
                ax.plot(t, median, color=color, lw=1.5, label=label)
                ax.fill_between(t, low, high, color=color, alpha=0.2, lw=0)
                ax.plot(t, _positive(injected[1, layer, d]), color=color, lw=1, ls=":")
        ax.set(xlabel="step t", ylabel="|dL/dh_t|, carried (solid), injected (dotted)", yscale="log")
        ax.legend(fontsize=8)
        return ax


def gradient_flow(
    layer: nn.Module, closure: Callable[[], Tensor], probe: bool = False, generator: Generator | None = None
) -> GradientFlow:
    """Follow the gradients of a loss through time inside one layer (a stack of L layers and D directions).

    A closure, because that serves a layer alone and a layer inside a model alike, and is the line that a training
    script has already: it runs the forward pass and returns the loss. The loss's gradient with respect to what the
    layer gave out is computed by autograd; the rest is one backward sweep of the kernel. `.grad` is not touched.

    Args:
        layer: rnnfast.LSTM or rnnfast.RNN. The closure calls it exactly once, on float32 or float64 on the CPU.
        closure: () -> scalar loss.
        probe: ignore the loss, and send a random unit vector back from the last state of the top layer of each sequence
            (and direction) instead. What arrives at step t then is how strongly the end depends on step t.
        generator: where the probe's vectors are drawn from, default torch's global one.

    Raises:
        TypeError: the layer is no rnnfast.LSTM or rnnfast.RNN, or the closure returns no scalar tensor.
        RuntimeError: the closure called the layer never, more than once, without a graph, or where no kernel runs; or
            the loss does not depend on the layer.
    """
    if not isinstance(layer, (LSTM, RNN)):
        raise TypeError(f"layer should be a rnnfast.LSTM or rnnfast.RNN, got {type(layer).__name__}")
    loss, node = _run(layer, closure)
    past = _past(node)
    if probe:
        cotangents = _probe(past, generator)
    else:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"closure() should return a scalar tensor, got {_described(loss)}")
        cotangents = _cotangents(loss, node, past)
    with torch.no_grad():
        return _Sweep(past, cotangents).flow()


def _run(layer: RNNBase, closure: Callable[[], Any]) -> tuple[Any, Any]:
    """-> what the closure returned, and the autograd node of the layer's call."""
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        with torch.enable_grad(), nodes.observed():
            result = closure()
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise RuntimeError(f"closure() should call the layer once, it called it {len(outputs)} times")
    y = outputs[0].data if isinstance(outputs[0], nn.utils.rnn.PackedSequence) else outputs[0]
    node = y.grad_fn
    while node is not None and not nodes.is_forward_node(node):
        node = node.next_functions[0][0] if node.next_functions else None  # a transpose, say
    if node is None:
        raise RuntimeError(
            "the layer's call left no graph of rnnfast's: was there no_grad(), did nothing require a gradient, or did "
            f"torch's own operators run ({y.dtype} on {y.device})?"
        )
    return result, node


def _past(node: Any) -> Past:
    batch_sizes, dropout, y, reserve, x, h0, c0, *weights = node.saved_tensors
    return Past(node.stack, Inputs(x, h0, c0, weights), batch_sizes, dropout, y, reserve)


def _cotangents(loss: Tensor, node: Any, past: Past) -> SomeOutputs:
    edges = [GradientEdge(node, k) for k in range(3 if past.stack.lstm else 2)]
    found = torch.autograd.grad(loss, edges, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise RuntimeError("the loss does not depend on the layer's outputs")
    y, h_n, *c_n = found
    return SomeOutputs(y, h_n, c_n[0] if c_n else None)


def _probe(past: Past, generator: Generator | None) -> SomeOutputs:
    """Random unit vectors at the last states (D,B,R) of the top layer."""
    stack, (y, weights) = past.stack, (past.y, past.inputs.weights)
    B = y.size(1) if past.batch_sizes is None else int(past.batch_sizes[0])
    vectors = torch.randn(stack.D, B, weights[1].size(1), dtype=y.dtype, device="cpu", generator=generator)
    d_h = y.new_zeros(stack.L * stack.D, *vectors.shape[1:])
    d_h[-stack.D :] = vectors / vectors.norm(dim=-1, keepdim=True)
    return SomeOutputs(None, d_h, None)


class _Sweep:
    """One backward sweep, and norms of its parts. Everything is laid out padded, (T,B,...), with zeros after the end of
    a shorter sequence."""

    def __init__(self, past: Past, cotangents: SomeOutputs) -> None:
        self.past, self.cotangents, self.stack = past, cotangents, past.stack
        weights = past.inputs.weights
        self.H, self.R = weights[0].size(0) // self.stack.gates, weights[1].size(1)
        self.each = len(weights) // (self.stack.L * self.stack.D)
        dz, dc = schema.kernels_for(past.y).sweep_back(past, cotangents)  # (L,D,N,G*H), (L,D,N,H)
        self.packed = past.batch_sizes is not None
        device, sizes = past.y.device, past.batch_sizes
        sizes = torch.full((past.y.size(0),), past.y.size(1), device=device) if sizes is None else sizes.to(device)
        self.T, self.B = len(sizes), int(sizes[0])
        self.mask = torch.arange(self.B, device=device) < sizes[:, None]  # (T,B)
        self.dz = self.pad(dz)  # (L,D,T,B,G*H)
        self.dc = None if dc is None else self.pad(dc)  # (L,D,T,B,H)
        self.gates, hidden = self.reserve()
        self.outputs = [*hidden, self.pad_columns(past.y)]  # L times (T,B,D*R)
        self.d_y = None if cotangents.y is None else self.pad_columns(cotangents.y)  # (T,B,D*R)
        self.dropout = [self.pad_columns(part) for part in past.dropout] if past.dropout is not None else []

    def pad(self, rows: Tensor) -> Tensor:
        """(L,D,N,K) -> (L,D,T,B,K)"""
        lead, K = rows.shape[:2], rows.size(-1)
        if not self.packed:
            return rows.view(*lead, self.T, self.B, K)
        padded = rows.new_zeros(*lead, self.T, self.B, K)
        padded[:, :, self.mask] = rows
        return padded

    def pad_columns(self, rows: Tensor) -> Tensor:
        """(T,B,D*R), or (N,D*R) if packed -> (T,B,D*R)"""
        return self.pad(rows.reshape(1, 1, -1, self.stack.D * self.R))[0, 0]

    def reserve(self) -> tuple[Tensor | None, list[Tensor]]:
        """Activated gates (L,D,T,B,G,H) of an LSTM; (T,B,D*R) for each layer below the top."""
        stack, reserve = self.stack, self.past.reserve
        L, D, N = stack.L, stack.D, int(self.mask.sum())
        hidden = reserve[reserve.numel() - (L - 1) * N * D * self.R :].view(L - 1, N, D * self.R)
        lower = [self.pad_columns(part) for part in hidden]
        if not stack.lstm:
            return None, lower
        gates = reserve[: L * D * N * 4 * self.H].view(L, D, N, 4 * self.H)
        return self.pad(gates).unflatten(-1, (4, self.H)), lower

    def weights(self, layer: int, d: int) -> list[Tensor]:
        """w_ih, w_hh, ..."""
        i = (layer * self.stack.D + d) * self.each
        return self.past.inputs.weights[i : i + self.each]

    def flow(self) -> GradientFlow:
        parts = [[self.one(layer, d) for d in range(self.stack.D)] for layer in range(self.stack.L)]
        names = parts[0][0].keys()
        stacked = {name: torch.stack([torch.stack([p[name] for p in row]) for row in parts]) for name in names}
        return GradientFlow(**stacked, T=self.T)

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
        if self.dc is not None:
            result["gates_closed"] = all_steps["gates_closed"].sum(0) / (N * self.H)
            result["gates_open"] = all_steps["gates_open"].sum(0) / (N * self.H)
            result["memory"] = -1 / (all_steps["forget"].sum() / (N * self.H)).log()
        return result


class _Part:
    """Steps t0 to t1-1 of one layer and direction: few enough that what is computed of them stays in the cache."""

    def __init__(self, sweep: _Sweep, layer: int, d: int, t0: int, t1: int) -> None:
        self.sweep, self.layer, self.d, self.t0, self.t1 = sweep, layer, d, t0, t1
        self.columns = slice(d * sweep.R, (d + 1) * sweep.R)
        self.mask = sweep.mask[t0:t1]  # (n,B), n = t1 - t0

    def measured(self) -> dict[str, Tensor]:
        """Norms (n,B) by the names of GradientFlow's attributes, what else there is for each step (n), and counts and
        sums (1) and (1,3), float64."""
        sweep, w_hh = self.sweep, self.sweep.weights(self.layer, self.d)[1]  # (G*H,R)
        injected = self.injected()  # (n,B,R)
        carried = self.after(sweep.dz[self.layer, self.d]) @ w_hh  # (n,B,R)
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
        return result | (self.of_cells() if sweep.dc is not None else {})

    def of_cells(self) -> dict[str, Tensor]:
        assert self.sweep.dc is not None and self.sweep.gates is not None
        all_dc, all_gates = (
            self.sweep.dc[self.layer, self.d],
            self.sweep.gates[self.layer, self.d],
        )  # (T,B,H), (T,B,G,H)
        dc = all_dc[self.t0 : self.t1]  # (n,B,H)
        carried = self.after(all_gates[:, :, 1]) * self.after(all_dc)  # (n,B,H)
        gates = all_gates[self.t0 : self.t1]  # (n,B,G,H)
        gates = gates[self.mask] if self.sweep.packed else gates.flatten(0, 1)  # (rows,G,H)
        i_f_o = [gates[:, k] for k in (0, 1, 3)]  # (rows,H) each
        return {
            "injected_c": _norms(dc - carried),
            "carried_c": _norms(carried),
            "total_c": _norms(dc),
            "gates_closed": torch.stack([_count(gate < 1 - SATURATED) for gate in i_f_o], dim=1),
            "gates_open": torch.stack([_count(gate > SATURATED) for gate in i_f_o], dim=1),
            "forget": gates[:, 1].sum().double()[None],
        }

    def after(self, x: Tensor) -> Tensor:
        """(T,B,K) -> (n,B,K): at t what belongs to the step that the direction runs after t"""
        return _after(x, self.d, self.t0, self.t1)

    def injected(self) -> Tensor:
        """What comes into dL/dh_t (n,B,R) from above: y, h_n at each sequence's last step, the next layer."""
        sweep, layer, steps = self.sweep, self.layer, slice(self.t0, self.t1)
        D, cotangents = sweep.stack.D, sweep.cotangents
        if layer + 1 < sweep.stack.L:
            above = [sweep.dz[layer + 1, e, steps] @ sweep.weights(layer + 1, e)[0] for e in range(D)]  # (n,B,D*R)
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

    def lag_norms(self) -> Tensor:
        """dW_hh is the sum over t and b of dz_tb h_{t-1,b}^T. -> norms (n) of what each step adds, the roots of
        the sums over b,b' of (dz_tb . dz_tb') (h_tb . h_tb')."""
        sweep, h0 = self.sweep, self.sweep.past.inputs.h0
        dz = sweep.dz[self.layer, self.d, self.t0 : self.t1]  # (n,B,G*H)
        h = sweep.outputs[self.layer][..., self.columns]  # (T,B,R)
        before = _after(h, 1 - self.d, self.t0, self.t1)  # (n,B,R)
        if h0 is not None:
            before = self.with_states(before, self.last(1 - self.d), h0[self.layer * sweep.stack.D + self.d], add=False)
        squares = ((dz @ dz.transpose(1, 2)) * (before @ before.transpose(1, 2))).sum((1, 2))  # (n)
        return squares.clamp(min=0).sqrt()

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


def _positive(values: Tensor) -> Any:
    """For a log scale: NaN in place of 0."""
    return torch.where(values > 0, values, math.nan).numpy()


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# ------------------------------------------------------------------------------------------ Lyapunov exponents


@torch.no_grad()
def lyapunov(
    layer: nn.Module,
    x: Tensor,
    k: int = 1,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    every: int = 10,
    skip: int = 0,
    generator: Generator | None = None,
) -> Tensor:
    """The k leading Lyapunov exponents of a layer driven by x, from the largest down, per step and sequence.

    They say how fast nearby states part (positive) or meet: exp(exponent) is the mean factor of a step. k random
    tangents of the state (h, and c of an LSTM, of all layers) are carried along the real trajectory by the forward-mode
    kernel, and made orthonormal by QR every few steps; the logarithms of R's diagonal add up (Benettin et al. 1980;
    for recurrent networks Vogt et al. 2022, On Lyapunov exponents for RNNs). Dropout between layers is left out.

    Args:
        layer: rnnfast.LSTM or rnnfast.RNN, not bidirectional. Its weights are those that a call would take, also where
            a parametrization or a hook that runs before a call computes them; such hooks run once.
        x: (T,B,I), or (B,T,I) if the layer is batch_first; float32 or float64 on the CPU.
        k: how many, at most the size of the state.
        hx: initial state, as the layer takes it; default zeros.
        every: steps between two QR decompositions. Fewer where the exponents lie far apart.
        skip: steps at the beginning that align the tangents, and do not count.
        generator: where the tangents are drawn from, default torch's global one.

    Returns:
        (B,k), -inf where a direction dies out completely.

    Raises:
        TypeError: the layer is no rnnfast.LSTM or rnnfast.RNN.
        ValueError: it is bidirectional, x has another shape, k, `every` or `skip` is out of range.
    """
    if not isinstance(layer, (LSTM, RNN)):
        raise TypeError(f"layer should be a rnnfast.LSTM or rnnfast.RNN, got {type(layer).__name__}")
    if layer.bidirectional:
        raise ValueError("a bidirectional layer is no dynamical system in t: its exponents are not defined")
    if x.dim() != 3 or x.size(-1) != layer.input_size:
        raise ValueError(f"x should be a batch of sequences with {layer.input_size} columns, got {tuple(x.shape)}")
    weights = _weights(layer, x)
    x = x.transpose(0, 1) if layer.batch_first else x  # (T,B,I)
    T, B = x.shape[:2]
    lstm, L, R = layer.mode == "LSTM", layer.num_layers, layer.proj_size or layer.hidden_size
    size = L * (R + (layer.hidden_size if lstm else 0))
    if not 1 <= k <= size:
        raise ValueError(f"k should be 1 to {size}, the numbers in the state, got {k}")
    if every < 1 or not 0 <= skip < T:
        raise ValueError(f"every should be at least 1 and skip 0 to {T - 1}, got {every} and {skip}")
    if hx is None:
        hx = (x.new_zeros(L, B, R), x.new_zeros(L, B, layer.hidden_size)) if lstm else x.new_zeros(L, B, R)
    state = list(hx) if isinstance(hx, tuple) else [hx]  # (L,B,R) and (L,B,H)

    stack = cpu.Stack(nodes.CELLS[layer.mode], L, 1, layer.bias)
    directions = torch.randn(B, size, k, dtype=torch.float64, device="cpu", generator=generator).to(x.device)
    directions = torch.linalg.qr(directions).Q
    total = torch.zeros(B, k, dtype=torch.float64, device=x.device)
    ends = sorted({*range(every, T, every), skip, T} - {0})
    start = 0
    for end in ends:
        chunk = x[start:end].repeat_interleave(k, dim=1)  # (steps,B*k,I)
        state, directions = _carry(stack, weights, chunk, state, directions)
        directions, r = torch.linalg.qr(directions)
        if start >= skip:
            total += r.diagonal(dim1=-2, dim2=-1).abs().log()
        start = end
    return (total / (T - skip)).sort(dim=-1, descending=True).values


def _weights(layer: RNNBase, x: Tensor) -> list[Tensor]:
    """Those that a call of the layer on x would take: hooks before it may compute them (pruning, weight_norm)."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            hook(layer, (x,), {})
        else:
            hook(layer, (x,))
    return [weight.detach() for weight in modules._weights(layer, layer._flat_weights_names)]


def _carry(
    stack: cpu.Stack, weights: list[Tensor], x: Tensor, state: list[Tensor], directions: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The states (L,B,...) and k tangents of each, (B,S,k), after the steps of x (T,B*k,I). Copies of a sequence stand
    side by side, each with a tangent of its own."""
    B, k = directions.size(0), directions.size(2)
    widths = [s.size(0) * s.size(2) for s in state]
    tangents = [
        part.reshape(B, s.size(0), s.size(2), k).permute(1, 0, 3, 2).reshape(s.size(0), B * k, s.size(2)).to(x.dtype)
        for part, s in zip(directions.split(widths, dim=1), state, strict=True)
    ]  # (L,B*k,R) and (L,B*k,H)
    h0, *c0 = (s.repeat_interleave(k, dim=1) for s in state)
    inputs = Inputs(x, h0, c0[0] if c0 else None, weights)
    outputs, reserve = schema.kernels_for(inputs.x).forward(stack, inputs, None, None, keep=True)
    assert reserve is not None
    past = Past(stack, inputs, None, None, outputs.y, reserve)
    h_dot, *c_dot = tangents
    moved = schema.kernels_for(past.y).tangent(
        past, SomeInputs(None, h_dot, c_dot[0] if c_dot else None, [None] * len(weights))
    )
    ends = [outputs.h_n, *([] if outputs.c_n is None else [outputs.c_n])]
    tangents = [moved.h_n, *([] if moved.c_n is None else [moved.c_n])]
    flat = [
        t.view(t.size(0), B, k, t.size(2)).permute(1, 0, 3, 2).reshape(B, -1, k).double() for t in tangents
    ]  # (B,L*R,k) and (B,L*H,k)
    return [e[:, ::k] for e in ends], torch.cat(flat, dim=1)
