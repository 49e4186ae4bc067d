"""A finished call of the op as a linear map: from steps in its inputs to those in its outputs, and back.

Curvature products multiply with the Jacobian J of a model and with its transpose hundreds of times at the same weights.
Calls made within `recording` are nodes for that purpose: what they do to cotangents, J^T u, is one sweep of
back-propagation through time, and differentiating that once more in u gives J v, one forward-mode sweep; both on what
the forward pass kept. The weights are constants in it (the nodes of `nodes.py` would add second derivatives).

A recorded call has one more output, s (L,D,N,G,H): every pre-activation z on the scale on which its nonlinearity a(z)
bends the same everywhere,

    s(z) = integral of sqrt(a'(z)) dz        tanh: arcsin(h)        sigmoid: arcsin(2 a - 1)        relu: h

so that half the squared distance in s has the curvature of the nonlinearity's matching loss, J_z^T diag(a'(z)) J_z, at
the weights where it is taken. This is what structural damping adds (see `rnnfast.optim.HessianFree`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from rnnfast._backends import schema
from rnnfast._backends.cpu import Inputs, Past, SomeInputs, SomeOutputs, Stack

__all__ = ["is_recording", "record", "recording"]

_recorded: ContextVar[list[tuple[Tensor, int]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[Tensor, int]]]:
    """Calls of recurrent layers within become linear maps; -> their s (L,D,N,G,H) and B, filled as they run."""
    calls: list[tuple[Tensor, int]] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    return _recorded.get() is not None


def record(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A call within `recording`; arguments and result as those of `ops.recurrent`."""
    calls = _recorded.get()
    assert calls is not None
    y, h_n, *c_n, s = _Recorded.apply(stack, batch_sizes, dropout, *inputs.flat())
    calls.append((s, h_n.size(1)))
    return y, h_n, c_n[0] if c_n else None


def _is_sigmoid(stack: Stack) -> list[bool]:
    """Of each gate."""
    return [True, True, False, True] if stack.lstm else [False]


def _bent(stack: Stack, a: Tensor) -> Tensor:
    """s of activations a, (L,D,N,G,H)"""
    if stack.cell == 1:
        return a.clone()
    gates = zip(a.unbind(3), _is_sigmoid(stack), strict=True)
    return torch.stack([(2 * a - 1 if sigmoid else a).clamp(-1, 1).arcsin() for a, sigmoid in gates], dim=3)


def _root_slope(stack: Stack, a: Tensor) -> Tensor:
    """ds/dz, the root of the slope of a(z), (L,D,N,G,H)"""
    if stack.cell == 1:
        return (a > 0).to(a.dtype)
    gates = zip(a.unbind(3), _is_sigmoid(stack), strict=True)
    slopes = [a * (1 - a) if sigmoid else 1 - a * a for a, sigmoid in gates]
    return torch.stack(slopes, dim=3).clamp_(min=0).sqrt_()


class _Recorded(torch.autograd.Function):
    """(stack, batch_sizes, dropout, x, h0, c0, *weights) -> y, h_n, c_n if LSTM, s."""

    @staticmethod
    def forward(ctx, stack, batch_sizes, dropout, *flat):
        x, h0, c0, *weights = flat
        inputs = Inputs(x, h0, c0, weights)
        outputs, reserve = schema.kernels_for(inputs.x).forward(stack, inputs, batch_sizes, dropout, keep=True)
        a = schema.kernels_for(x).activations(Past(stack, inputs, batch_sizes, dropout, outputs.y, reserve))
        ctx.save_for_backward(_root_slope(stack, a), batch_sizes, dropout, outputs.y, reserve, *flat)
        ctx.stack = stack
        ctx.set_materialize_grads(False)
        return *(t for t in outputs if t is not None), _bent(stack, a)

    @staticmethod
    def backward(ctx, *cotangents):
        root, batch_sizes, dropout, y, reserve, *flat = (None if t is None else t.detach() for t in ctx.saved_tensors)
        x, h0, c0, *weights = flat
        past = Past(ctx.stack, Inputs(x, h0, c0, weights), batch_sizes, dropout, y, reserve)
        wanted = ctx.needs_input_grad[3:]
        given = iter(_Pull.apply(past, root, wanted, *cotangents))
        return None, None, None, *(next(given) if want else None for want in wanted)


class _Pull(torch.autograd.Function):
    """(past, ds/dz, wanted, cotangents of y, h_n, c_n if LSTM, s) -> the wanted gradients, linear in the cotangents."""

    @staticmethod
    def forward(ctx, past, root, wanted, *cotangents):
        ctx.past, ctx.root, ctx.wanted = past, root, wanted
        ctx.set_materialize_grads(False)
        dy, dh_n, *dc_n, ds = cotangents
        dz = None if ds is None else root * ds
        grads = schema.kernels_for(past.y).backward(
            past, SomeOutputs(dy, dh_n, dc_n[0] if dc_n else None), wanted, z_cotangent=dz
        )
        return tuple(g for g, want in zip(grads.flat(), wanted, strict=True) if want)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *tangents):
        given = iter(tangents)
        x, h0, c0, *weights = (next(given) if want else None for want in ctx.wanted)
        z = torch.empty_like(ctx.root, memory_format=torch.contiguous_format)
        outputs = schema.kernels_for(ctx.past.y).tangent(ctx.past, SomeInputs(x, h0, c0, weights), z_tangent=z)
        some = *(t for t in outputs if t is not None), z.mul_(ctx.root)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(t if need else None for t, need in zip(some, needed, strict=True))
