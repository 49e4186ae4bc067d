"""A call that keeps its states at the ends of segments alone, and runs each segment again in the backward pass.

With segments of k of N steps' rows, N/k + k rows are kept in place of N (Chen et al. 2016, Training deep nets with
sublinear memory cost, section 4). A stack in one direction is a chain of segments as a whole. With two directions a
layer above needs both of those below, so each layer and direction is a chain of its own, and the layers' outputs are
kept, too; the reverse one is a chain on the sequences back to front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast._autograd.levels import Node, is_recorded
from rnnfast._backends import schema
from rnnfast._backends.types import Constants, Inputs, Outputs, Past, SomeOutputs, Stack
from rnnfast.fallback import warn_once


def run(stack: Stack, inputs: Inputs, constants: Constants, segment: int) -> Outputs:
    """The outputs of a call; segment: steps of a segment, at least 1."""
    if stack.D == 1:
        return _chain(stack, inputs, constants, segment)
    if constants.resets is not None and inputs.h0 is not None:
        raise NotImplementedError(
            "rnnfast: a bidirectional layer cannot recompute with both resets and given initial states; give no hx, or "
            "set recompute to None"
        )
    back = _Back(inputs.x, constants)
    each = stack.weights_each(inputs.weights)
    one = stack._replace(L=1, D=1)
    x, h_n, c_n = inputs.x, [], []
    for layer in range(stack.L):
        ways = []
        for d in range(2):
            i = 2 * layer + d
            h0, c0 = (None if state is None else state[i : i + 1] for state in (inputs.h0, inputs.c0))
            own = Inputs(back(x) if d else x, h0, c0, inputs.weights[i * each : (i + 1) * each])
            resets = back.resets if d else constants.resets
            done = _chain(one, own, Constants(constants.batch_sizes, None, resets), segment)
            ways.append(back(done.y) if d else done.y)
            h_n.append(done.h_n)
            c_n += [] if done.c_n is None else [done.c_n]
        x = torch.cat(ways, -1)
        if constants.dropout is not None and layer < stack.L - 1:
            x = x * constants.dropout[layer]
    return Outputs(x, torch.cat(h_n), torch.cat(c_n) if c_n else None)


class _Back:
    """Sequences back to front, each within its own length."""

    def __init__(self, x: Tensor, constants: Constants) -> None:
        self.rows: Tensor | None = None
        sizes, resets = constants.batch_sizes, constants.resets
        if sizes is not None:
            lengths = (sizes.unsqueeze(1) > torch.arange(int(sizes[0]), device="cpu")).sum(0)  # (B)
            first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])  # (T)
            t = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
            b = torch.arange(x.size(0), device="cpu") - first[t]
            self.rows = (first[lengths[b] - 1 - t] + b).to(x.device)
        self.resets = None
        if resets is not None:  # an episode begins, back to front, before the step that begins one
            begins = self(resets)
            self.resets = torch.zeros_like(resets)
            if self.rows is None:
                self.resets[1:] = begins[:-1]
            else:
                last = torch.arange(x.size(0), device=x.device)
                after = last >= int(sizes[0])  # type: ignore[index]  # rows that have one before
                before = (first[(t - 1).clamp(min=0)] + b).to(x.device)
                self.resets = begins[before] & after

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(0) if self.rows is None else x[self.rows]


# --- a chain of segments ----------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Steps of a segment: their rows, and how many sequences run at the first one."""

    rows: slice  # of (T,B,...) or (N,...)
    B: int
    batch_sizes: Tensor | None

    def of(self, constants: Constants) -> Constants:
        _, dropout, resets = constants
        return Constants(
            self.batch_sizes,
            None if dropout is None else dropout[:, self.rows],
            None if resets is None else resets[self.rows],
        )


def _spans(x: Tensor, batch_sizes: Tensor | None, segment: int) -> Iterator[_Span]:
    if batch_sizes is None:
        for t in range(0, x.size(0), segment):
            yield _Span(slice(t, min(t + segment, x.size(0))), x.size(1), None)
        return
    row = 0
    for sizes in batch_sizes.split(segment):
        count = int(sizes.sum())
        yield _Span(slice(row, row + count), int(sizes[0]), sizes)
        row += count


_C = len(Constants())


def _chain(stack: Stack, inputs: Inputs, constants: Constants, segment: int) -> Outputs:
    *some, _ = _Recomputed.apply((stack, segment), *constants, *inputs.flat())
    return Outputs.of(some)


def _segment_inputs(inputs: Inputs, span: _Span, states: Tensor) -> Inputs:
    """states (L,B,R) or (L,B,R+H), h and c side by side"""
    R = inputs.weights[1].size(1)
    h, c = states[:, : span.B, :R], states[:, : span.B, R:]
    return Inputs(inputs.x[span.rows], h.contiguous(), c.contiguous() if c.size(2) else None, inputs.weights)


def _joined(h: Tensor, c: Tensor | None) -> Tensor:
    return h if c is None else torch.cat([h, c], 2)


def _first_states(stack: Stack, inputs: Inputs, B: int) -> Tensor:
    H, R, _ = stack.units(inputs.weights)
    zeros = inputs.x.new_zeros
    h = zeros((stack.L, B, R)) if inputs.h0 is None else inputs.h0
    if not stack.has_c:
        return h
    return torch.cat([h, zeros((stack.L, B, H)) if inputs.c0 is None else inputs.c0], 2)


class _Recomputed(Node):
    """((stack, segment), *constants, x, h0, c0, *weights) -> y, h_n, c_n if there is c, states at the beginnings of the
    segments (S,L,B,R) or (S,L,B,R+H)."""

    @staticmethod
    def forward(spec, *args):
        stack, segment = spec
        constants, inputs = Constants(*args[:_C]), Inputs.of(args[_C:])
        spans = list(_spans(inputs.x, constants.batch_sizes, segment))
        R = inputs.weights[1].size(1)
        states = _first_states(stack, inputs, spans[0].B)
        y = inputs.x.new_empty((*inputs.x.shape[:-1], R))
        starts = states.new_empty((len(spans), *states.shape))
        for k, span in enumerate(spans):
            starts[k] = states
            own = _segment_inputs(inputs, span, states)
            (y[span.rows], *last), _ = schema.forward(stack, own, span.of(constants), keep=False)
            states = torch.cat([_joined(*last), states[:, span.B :]], 1)
        h_n, c_n = states[..., :R].contiguous(), states[..., R:].contiguous()
        return (y, h_n, c_n, starts) if stack.has_c else (y, h_n, starts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, *args = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, output[-1])
        ctx.spec = spec

    @staticmethod
    def backward(ctx, *cotangents):
        if all(d is None for d in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        (stack, segment), (*args, starts) = ctx.spec, ctx.saved_tensors
        constants, inputs = Constants(*args[:_C]), Inputs.of(args[_C:])
        wanted = ctx.needs_input_grad[1 + _C :]
        d_outputs = SomeOutputs.of(cotangents[:-1])
        if is_recorded():
            grads = _recorded_gradients(stack, inputs, constants, d_outputs, wanted)
        else:
            grads = _gradients(stack, inputs, constants, segment, starts, d_outputs, wanted)
        return *(None,) * (1 + _C), *grads


def _gradients(
    stack: Stack,
    inputs: Inputs,
    constants: Constants,
    segment: int,
    starts: Tensor,
    d: SomeOutputs,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """From the last segment to the first."""
    spans = list(_spans(inputs.x, constants.batch_sizes, segment))
    R = inputs.weights[1].size(1)
    d_h, d_c = (_or_zeros(part, like) for part, like in ((d.h_n, starts[0][..., :R]), (d.c_n, starts[0][..., R:])))
    d_states = torch.cat([d_h, d_c], 2)
    total: list[Tensor | None] = [None] * len(wanted)
    dx = torch.empty_like(inputs.x) if wanted[0] else None
    asks = [wanted[0], True, stack.has_c, *wanted[3:]]
    for span, states in zip(reversed(spans), reversed(starts.unbind(0)), strict=True):
        own, fixed = _segment_inputs(inputs, span, states), span.of(constants)
        outputs, reserve = schema.forward(stack, own, fixed, keep=True)
        assert reserve is not None
        d_own = d_states[:, : span.B]
        given = SomeOutputs(
            None if d.y is None else d.y[span.rows],
            d_own[..., :R].contiguous(),
            d_own[..., R:].contiguous() if stack.has_c else None,
        )
        grads = schema.backward(Past(stack, own, fixed, outputs.y, reserve), given, asks)
        if dx is not None and grads.x is not None:
            dx[span.rows] = grads.x
        assert grads.h0 is not None
        d_states = torch.cat([_joined(grads.h0, grads.c0), d_states[:, span.B :]], 1)
        for k, grad in enumerate(grads.weights, 3):
            if grad is not None:
                before = total[k]
                total[k] = grad if before is None else before.add_(grad)
    total[0] = dx
    total[1] = d_states[..., :R] if wanted[1] else None
    total[2] = d_states[..., R:] if wanted[2] else None
    return total


def _or_zeros(part: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if part is None else part


def _recorded_gradients(
    stack: Stack, inputs: Inputs, constants: Constants, d: SomeOutputs, wanted: Sequence[bool]
) -> list[Any]:
    """The same by nodes that can be differentiated, and keep every step."""
    from rnnfast._autograd.nodes import Forward

    warn_once("second derivatives of a layer with recompute, which keep every step")
    with torch.enable_grad():
        flat = inputs.flat()
        outputs = Forward.apply(stack, *constants, *flat)[:-1]
        pairs = [(o, g) for o, g in zip(outputs, d, strict=False) if g is not None]
        given, along = [o for o, _ in pairs], [g for _, g in pairs]
        at = [t for t, want in zip(flat, wanted, strict=True) if want and t is not None]
        grads = iter(torch.autograd.grad(given, at, along, create_graph=True))
    return [next(grads) if want else None for want in wanted]
