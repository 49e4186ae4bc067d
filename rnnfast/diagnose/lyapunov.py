"""Lyapunov exponents of a layer, from the tangents that its kernel carries."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from rnnfast._backends import schema
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.types import Constants, Inputs, Past, SomeInputs, Stack
from rnnfast._layer import Layer


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
        TypeError: the layer is none of rnnfast's.
        ValueError: it is bidirectional, x has another shape, k, `every` or `skip` is out of range.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer should be a recurrent layer of rnnfast, got {type(layer).__name__}")
    if layer.bidirectional:
        raise ValueError("a bidirectional layer is no dynamical system in t: its exponents are not defined")
    if x.dim() != 3 or x.size(-1) != layer.input_size:
        raise ValueError(f"x should be a batch of sequences with {layer.input_size} columns, got {tuple(x.shape)}")
    weights = _weights(layer, x)
    x = x.transpose(0, 1) if layer.batch_first else x  # (T,B,I)
    T, B = x.shape[:2]
    stack = Stack(BY_MODE[layer.mode].index, layer.num_layers, 1, layer.bias)
    L, H, R = stack.L, layer.hidden_size, layer.proj_size or layer.hidden_size
    size = L * (R + H * stack.has_c)
    if not 1 <= k <= size:
        raise ValueError(f"k should be 1 to {size}, the numbers in the state, got {k}")
    if every < 1 or not 0 <= skip < T:
        raise ValueError(f"every should be at least 1 and skip 0 to {T - 1}, got {every} and {skip}")
    if hx is None:
        hx = (x.new_zeros(L, B, R), x.new_zeros(L, B, H)) if stack.has_c else x.new_zeros(L, B, R)
    state = list(hx) if isinstance(hx, tuple) else [hx]  # (L,B,R) and (L,B,H)

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


def _weights(layer: Layer, x: Tensor) -> list[Tensor]:
    """Those that a call of the layer on x would take: hooks before it may compute them (pruning, weight_norm)."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            hook(layer, (x,), {})
        else:
            hook(layer, (x,))
    return [weight.detach() for weight in layer._kernel_weights()]


def _carry(
    stack: Stack, weights: list[Tensor], x: Tensor, state: list[Tensor], directions: Tensor
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
    backend = schema.backend_for(x)
    outputs, reserve = backend.forward(stack, inputs, Constants(), keep=True)
    assert reserve is not None
    h_dot, *c_dot = tangents
    along = SomeInputs(None, h_dot, c_dot[0] if c_dot else None, [None] * len(weights))
    moved = backend.tangent(Past(stack, inputs, Constants(), outputs.y, reserve), along)
    ends = [outputs.h_n, *([] if outputs.c_n is None else [outputs.c_n])]
    tangents = [moved.h_n, *([] if moved.c_n is None else [moved.c_n])]
    flat = [
        t.view(t.size(0), B, k, t.size(2)).permute(1, 0, 3, 2).reshape(B, -1, k).double() for t in tangents
    ]  # (B,L*R,k) and (B,L*H,k)
    return [e[:, ::k] for e in ends], torch.cat(flat, dim=1)
