"""The gradients of a loss through time inside one layer, and what their norms mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.rnn import RNNBase

from rnnfast._autograd import nodes, op
from rnnfast._backends.types import Past, SomeOutputs
from rnnfast._layer import Layer
from rnnfast.diagnose.sweep import SATURATED, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VANISHED, EXPLODED = 1e-3, 1e3  # of a gradient, over the whole sequence


@dataclass(frozen=True)
class GradientFlow:
    """Norms of gradients over time, and what they mean. L layers, D directions, T steps, B sequences; NaN where a
    shorter sequence has ended. "Before" and "after" are as the direction runs: the reverse one goes from T-1 to 0.

    Attributes:
        T: steps.
        injected_h, carried_h, total_h: (L,D,T,B) norms of the parts of dL/dh_t and of their sum.
        injected_c, carried_c, total_c: likewise of dL/dc_t; None without c.
        gain: (L,D,T,B) |carried_t| / |dL/dh_{t+1}|, NaN at the last step and where nothing arrived.
        log_slope: (L,D) by how much the logarithm of a gradient changes in a step on its way back: the slope of a line
            fitted to the sum of log(median gain) over the steps. Negative: it vanishes.
        lag_share: (L,D,T) share of |dW_hh| by lag: the norm of what step T-1-lag (of the way of the direction) adds to
            dW_hh, all sequences together, over the sum of these norms.
        saturated: (L,D) share of |h| > 0.99.
        gates_closed, gates_open: (L,D,k) shares below 0.01 and above 0.99 of the gates that are logistic, i,f,o of an
            LSTM, r,z of a GRU; None for Elman.
        memory: (L,D) -1 / ln(mean share of its state that a unit keeps, f or z), steps in which a state falls to 1/e;
            None for Elman.
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
        layer: a recurrent layer of rnnfast. The closure calls it exactly once, on numbers that have a kernel.
        closure: () -> scalar loss.
        probe: ignore the loss, and send a random unit vector back from the last state of the top layer of each sequence
            (and direction) instead. What arrives at step t then is how strongly the end depends on step t.
        generator: where the probe's vectors are drawn from, default torch's global one.

    Raises:
        TypeError: the layer is none of rnnfast's, or the closure returns no scalar tensor.
        RuntimeError: the closure called the layer never, more than once, without a graph, or where no kernel runs; or
            the loss does not depend on the layer.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer should be a recurrent layer of rnnfast, got {type(layer).__name__}")
    loss, node = _run(layer, closure)
    past = nodes.past_of(node)
    if probe:
        cotangents = _probe(past, generator)
    else:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"closure() should return a scalar tensor, got {_described(loss)}")
        cotangents = _cotangents(loss, node, past)
    with torch.no_grad():
        return GradientFlow(**Sweep(past, cotangents).measured())


def _run(layer: RNNBase, closure: Callable[[], Any]) -> tuple[Any, Any]:
    """-> what the closure returned, and the autograd node of the layer's call."""
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        with torch.enable_grad(), op.observed():
            result = closure()
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise RuntimeError(f"closure() should call the layer once, it called it {len(outputs)} times")
    y = outputs[0].data if isinstance(outputs[0], nn.utils.rnn.PackedSequence) else outputs[0]
    node = y.grad_fn
    while node is not None and not nodes.is_forward(node):
        node = node.next_functions[0][0] if node.next_functions else None  # a transpose, say
    if node is None:
        raise RuntimeError(
            "the layer's call left no graph of rnnfast's: was there no_grad(), did nothing require a gradient, or did "
            f"torch's own operators run ({y.dtype} on {y.device})?"
        )
    return result, node


def _cotangents(loss: Tensor, node: Any, past: Past) -> SomeOutputs:
    edges = [GradientEdge(node, k) for k in range(2 + past.stack.has_c)]
    found = torch.autograd.grad(loss, edges, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise RuntimeError("the loss does not depend on the layer's outputs")
    return SomeOutputs.of(found)


def _probe(past: Past, generator: Generator | None) -> SomeOutputs:
    """Random unit vectors at the last states (D,B,R) of the top layer."""
    stack, (y, weights) = past.stack, (past.y, past.inputs.weights)
    sizes = past.constants.batch_sizes
    B = y.size(1) if sizes is None else int(sizes[0])
    vectors = torch.randn(stack.D, B, weights[1].size(1), dtype=y.dtype, device="cpu", generator=generator)
    d_h = y.new_zeros(stack.L * stack.D, *vectors.shape[1:])
    d_h[-stack.D :] = vectors / vectors.norm(dim=-1, keepdim=True)
    return SomeOutputs(None, d_h, None)


def _positive(values: Tensor) -> Any:
    """For a log scale: NaN in place of 0."""
    return torch.where(values > 0, values, math.nan).numpy()


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
