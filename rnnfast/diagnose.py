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

from rnnfast import kernels, library, ops
from rnnfast.kernels import Inputs, Past, SomeInputs, SomeOutputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GradientFlow", "gradient_flow", "lyapunov"]

VANISHED, EXPLODED = 1e-3, 1e3  # of a gradient, over the whole sequence
SATURATED = 0.99  # |h|; and gates above it, or below 1 - it


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
        return torch.nanquantile(values, torch.tensor(q, dtype=values.dtype), dim=-1)

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
    from rnnfast.modules import LSTM, RNN

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
        with torch.enable_grad():
            result = closure()
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise RuntimeError(f"closure() should call the layer once, it called it {len(outputs)} times")
    y = outputs[0].data if isinstance(outputs[0], nn.utils.rnn.PackedSequence) else outputs[0]
    node = y.grad_fn
    while node is not None and not ops.is_forward_node(node):
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
    vectors = torch.randn(stack.D, B, weights[1].size(1), dtype=y.dtype, generator=generator)
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
        dz, dc = library.kernels_for(past.y).sweep_back(past, cotangents)  # (L,D,N,G*H), (L,D,N,H)
        self.packed = past.batch_sizes is not None
        sizes = past.batch_sizes if past.batch_sizes is not None else torch.full((past.y.size(0),), past.y.size(1))
        self.T, self.B = len(sizes), int(sizes[0])
        self.mask = torch.arange(self.B) < sizes[:, None]  # (T,B)
        self.dz = self.pad(dz)  # (L,D,T,B,G*H)
        self.dc = None if dc is None else self.pad(dc)  # (L,D,T,B,H)
        self.gates, self.cells, hidden = self.reserve()
        self.outputs = [*hidden, self.pad(past.y.view(1, 1, -1, past.y.size(-1)))[0, 0]]  # L times (T,B,D*R)

    def pad(self, rows: Tensor) -> Tensor:
        """(L,D,N,K) -> (L,D,T,B,K)"""
        lead, K = rows.shape[:2], rows.size(-1)
        if not self.packed:
            return rows.view(*lead, self.T, self.B, K)
        padded = rows.new_zeros(*lead, self.T, self.B, K)
        padded[:, :, self.mask] = rows
        return padded

    def reserve(self) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Activated gates (L,D,T,B,G,H) and cells (L,D,T,B,H) of an LSTM; (T,B,D*R) for each layer below the top."""
        stack, H, reserve = self.stack, self.H, self.past.reserve
        L, D, N = stack.L, stack.D, int(self.mask.sum())
        units = L * D * N * H
        hidden = reserve[reserve.numel() - (L - 1) * N * D * self.R :].view(L - 1, 1, N, D * self.R)
        lower = list(self.pad(hidden)[:, 0]) if L > 1 else []
        if not stack.lstm:
            return None, None, lower
        gates = self.pad(reserve[: 4 * units].view(L, D, N, 4 * H)).unflatten(-1, (4, H))
        return gates, self.pad(reserve[4 * units : 5 * units].view(L, D, N, H)), lower

    def weights(self, layer: int, d: int) -> list[Tensor]:
        """w_ih, w_hh, ..."""
        i = (layer * self.stack.D + d) * self.each
        return self.past.inputs.weights[i : i + self.each]

    def from_next(self, d: int, like: Tensor, write: Callable[[slice, Tensor], object]) -> Tensor:
        """What belongs to the step that direction d runs after t, at t, as large as `like` (T,B,...); zeros after a
        sequence's last. write(steps, out) fills `out` with what belongs to these steps."""
        to, of, last = (slice(-1), slice(1, None), -1) if d == 0 else (slice(1, None), slice(-1), 0)
        moved = torch.empty_like(like, memory_format=torch.contiguous_format)
        write(of, moved[to])
        moved[last] = 0
        return moved.mul_(self.mask.view(self.T, self.B, *[1] * (moved.dim() - 2))) if self.packed else moved

    def rows(self, x: Tensor) -> Tensor:
        """(T,B,...) -> (N,...)"""
        return x[self.mask] if self.packed else x.flatten(0, 1)

    def flow(self) -> GradientFlow:
        parts = [[self.one(layer, d) for d in range(self.stack.D)] for layer in range(self.stack.L)]
        names = parts[0][0].keys()
        stacked = {name: torch.stack([torch.stack([p[name] for p in row]) for row in parts]) for name in names}
        return GradientFlow(**stacked, T=self.T)

    def one(self, layer: int, d: int) -> dict[str, Tensor]:
        """All attributes of GradientFlow for one layer and direction."""
        dz, w_hh = self.dz[layer, d], self.weights(layer, d)[1]  # (T,B,G*H), (G*H,R)
        injected = self.injected(layer, d)  # (T,B,R)
        carried = self.from_next(d, injected, lambda t, out: torch.matmul(dz[t], w_hh, out=out))  # (T,B,R)
        total = carried + injected
        h = self.outputs[layer][..., d * self.R : (d + 1) * self.R]  # (T,B,R)
        result = {"injected_h": self.norms(injected), "carried_h": self.norms(carried), "total_h": self.norms(total)}
        result["gain"] = self.gain(result["carried_h"], result["total_h"], d)
        result["log_slope"] = _log_slope(result["gain"], d)
        result["lag_share"] = self.lag_share(dz, h, layer, d)
        result["saturated"] = _share(self.rows(h).abs() > SATURATED)
        result["nonfinite_h"] = _first_nonfinite(h, d)
        result["nonfinite_gradient"] = _first_nonfinite(total, 1 - d)
        return result | (self.one_of_cells(layer, d) if self.dc is not None else {})

    def one_of_cells(self, layer: int, d: int) -> dict[str, Tensor]:
        assert self.dc is not None and self.gates is not None
        dc, gates = self.dc[layer, d], self.gates[layer, d]  # (T,B,H), (T,B,G,H)
        carried = self.from_next(d, dc, lambda t, out: torch.mul(gates[t, :, 1], dc[t], out=out))
        gates = self.rows(gates)  # (N,G,H)
        return {
            "injected_c": self.norms(dc - carried),
            "carried_c": self.norms(carried),
            "total_c": self.norms(dc),
            "gates_closed": _shares(gates < 1 - SATURATED),
            "gates_open": _shares(gates > SATURATED),
            "memory": -1 / gates[:, 1].mean().double().log(),
        }

    def injected(self, layer: int, d: int) -> Tensor:
        """What comes into dL/dh_t (T,B,R) from above: y, h_n at each sequence's last step, the next layer."""
        columns = slice(d * self.R, (d + 1) * self.R)
        if layer + 1 < self.stack.L:
            above = [
                self.dz[layer + 1, e] @ self.weights(layer + 1, e)[0] for e in range(self.stack.D)
            ]  # (T,B,D*R) each
            d_y = sum(above[1:], above[0])
            if self.past.dropout is not None:
                d_y = d_y * self.pad(self.past.dropout[layer].reshape(1, 1, -1, d_y.size(-1)))[0, 0]
        elif self.cotangents.y is not None:
            d_y = self.pad(self.cotangents.y.reshape(1, 1, -1, self.stack.D * self.R))[0, 0]
        else:
            d_y = self.dz.new_zeros(self.T, self.B, self.stack.D * self.R)
        injected = d_y[..., columns].clone()
        if self.cotangents.h_n is not None:
            last = self.mask.sum(0) - 1 if d == 0 else torch.zeros(self.B, dtype=torch.int64)  # (B)
            injected[last, torch.arange(self.B)] += self.cotangents.h_n[layer * self.stack.D + d]
        return injected

    def norms(self, x: Tensor) -> Tensor:
        """(T,B,K) -> (T,B), NaN where no sequence is"""
        return torch.where(self.mask, torch.linalg.vector_norm(x, dim=-1), math.nan)

    def gain(self, carried: Tensor, total: Tensor, d: int) -> Tensor:
        """Of norms (T,B)"""
        arrived = self.from_next(d, total, lambda t, out: out.copy_(total[t]))  # (T,B)
        return torch.where(arrived > 0, carried / arrived, math.nan)

    def lag_share(self, dz: Tensor, h: Tensor, layer: int, d: int) -> Tensor:
        """Of dW_hh = sum over t of sum over b of dz_t h_{t-1}^T -> (T) by lag. The norm of step t's part is the root of
        sum over b,b' of (dz_tb . dz_tb') (h_tb . h_tb')."""
        before = self.from_next(1 - d, h, lambda t, out: out.copy_(h[t]))  # (T,B,R)
        if self.past.inputs.h0 is not None:
            first = torch.zeros(self.B, dtype=torch.int64) if d == 0 else self.mask.sum(0) - 1  # (B)
            before[first, torch.arange(self.B)] = self.past.inputs.h0[layer * self.stack.D + d]
        squares = ((dz @ dz.transpose(1, 2)) * (before @ before.transpose(1, 2))).sum((1, 2))  # (T)
        norms = squares.clamp(min=0).sqrt()
        return (norms.flip(0) if d == 0 else norms) / norms.sum()


def _log_slope(gain: Tensor, d: int) -> Tensor:
    """A line through the sum of log(median gain) from the end of the sequence on; NaN if there is none."""
    logs = torch.nanquantile(gain, 0.5, dim=-1).log()  # (T)
    logs = (logs.flip(0) if d == 0 else logs)[1:]  # in the order of the way back
    if logs.numel() == 0 or not logs.isfinite().all():
        logs = logs[logs.isfinite()]
        if logs.numel() == 0:
            return gain.new_tensor(math.nan)
    fallen = torch.cat([logs.new_zeros(1), logs.cumsum(0)])
    k = torch.arange(len(fallen), dtype=fallen.dtype)
    k -= k.mean()
    return (k * fallen).sum() / k.square().sum()


def _share(which: Tensor) -> Tensor:
    """Of a mask, float64"""
    return torch.count_nonzero(which).double() / which.numel()


def _shares(which: Tensor) -> Tensor:
    """(N,G,H) mask of an LSTM's gates -> (3) share of the units of i, f and o"""
    return torch.stack([_share(which[:, k]) for k in (0, 1, 3)])


def _first_nonfinite(x: Tensor, d: int) -> Tensor:
    """(T,B,K) -> the first step in the order of direction d that holds inf or NaN, -1: none."""
    if x.sum().isfinite():  # inf and NaN do not go away in a sum
        return torch.tensor(-1)
    where = (~x.isfinite()).flatten(1).any(-1).nonzero().flatten()
    return torch.tensor(-1) if where.numel() == 0 else where[0 if d == 0 else -1]


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
    for recurrent networks Vogt et al. 2022, On Lyapunov exponents for RNNs).

    Args:
        layer: rnnfast.LSTM or rnnfast.RNN, not bidirectional.
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
    from rnnfast.modules import LSTM, RNN

    if not isinstance(layer, (LSTM, RNN)):
        raise TypeError(f"layer should be a rnnfast.LSTM or rnnfast.RNN, got {type(layer).__name__}")
    if layer.bidirectional:
        raise ValueError("a bidirectional layer is no dynamical system in t: its exponents are not defined")
    if x.dim() != 3 or x.size(-1) != layer.input_size:
        raise ValueError(f"x should be a batch of sequences with {layer.input_size} columns, got {tuple(x.shape)}")
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

    stack = kernels.Stack(ops.CELLS[layer.mode], L, 1, layer.bias)
    weights = [p.detach() for p in layer._flat_weights if p is not None]
    directions = torch.randn(B, size, k, dtype=torch.float64, generator=generator)
    directions = torch.linalg.qr(directions).Q
    total = torch.zeros(B, k, dtype=torch.float64)
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


def _carry(
    stack: kernels.Stack, weights: list[Tensor], x: Tensor, state: list[Tensor], directions: Tensor
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
    outputs, reserve = library.kernels_for(inputs.x).forward(stack, inputs, None, None, keep=True)
    assert reserve is not None
    past = Past(stack, inputs, None, None, outputs.y, reserve)
    h_dot, *c_dot = tangents
    moved = library.kernels_for(past.y).tangent(
        past, SomeInputs(None, h_dot, c_dot[0] if c_dot else None, [None] * len(weights))
    )
    ends = [outputs.h_n, *([] if outputs.c_n is None else [outputs.c_n])]
    tangents = [moved.h_n, *([] if moved.c_n is None else [moved.c_n])]
    flat = [
        t.view(t.size(0), B, k, t.size(2)).permute(1, 0, 3, 2).reshape(B, -1, k).double() for t in tangents
    ]  # (B,L*R,k) and (B,L*H,k)
    return [e[:, ::k] for e in ends], torch.cat(flat, dim=1)
