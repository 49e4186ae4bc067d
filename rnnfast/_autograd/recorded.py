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
from rnnfast._backends.types import Constants, Inner, Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack

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


def record(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Tensor, Tensor, Tensor | None]:
    """A call within `recording`."""
    calls = _recorded.get()
    assert calls is not None
    *outputs, s = _Recorded.apply(stack, *constants, *inputs.flat())
    calls.append((s, outputs[1].size(1)))
    return Outputs.of(outputs)


_C = len(Constants())


class _Recorded(torch.autograd.Function):
    """(stack, *constants, x, h0, c0, *weights) -> y, h_n, c_n if there is c, s."""

    @staticmethod
    def forward(ctx, stack, *args):
        constants, inputs = Constants(*args[:_C]), Inputs.of(args[_C:])
        backend = schema.backend_for(inputs.x)
        outputs, reserve = backend.forward(stack, inputs, constants, keep=True)
        a = backend.activations(Past(stack, inputs, constants, outputs.y, reserve))
        root = stack.cell.slopes(a).clamp_(min=0).sqrt_()
        ctx.save_for_backward(root, *constants, outputs.y, reserve, *inputs.flat())
        ctx.stack = stack
        ctx.set_materialize_grads(False)
        return *(t for t in outputs if t is not None), stack.cell.scales(a)

    @staticmethod
    def backward(ctx, *cotangents):
        root, *saved = (None if t is None else t.detach() for t in ctx.saved_tensors)
        y, reserve, *flat = saved[_C:]
        past = Past(ctx.stack, Inputs.of(flat), Constants(*saved[:_C]), y, reserve)
        wanted = ctx.needs_input_grad[1 + _C :]
        given = iter(_Pull.apply(past, root, wanted, *cotangents))
        return *(None,) * (1 + _C), *(next(given) if want else None for want in wanted)


class _Pull(torch.autograd.Function):
    """(past, ds/dz, wanted, cotangents of y, h_n, c_n if there is c, s) -> the wanted gradients, linear in the
    cotangents."""

    @staticmethod
    def forward(ctx, past, root, wanted, *cotangents):
        ctx.past, ctx.root, ctx.wanted = past, root, wanted
        ctx.set_materialize_grads(False)
        *some, ds = cotangents
        dz = None if ds is None else root * ds
        grads = schema.backend_for(past.y).backward(past, SomeOutputs.of(some), wanted, inner=Inner(dz))
        return tuple(g for g, want in zip(grads.flat(), wanted, strict=True) if want)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *tangents):
        given = iter(tangents)
        along = SomeInputs.of(next(given) if want else None for want in ctx.wanted)
        z = torch.empty_like(ctx.root, memory_format=torch.contiguous_format)
        outputs = schema.backend_for(ctx.past.y).tangent(ctx.past, along, z_tangent=z)
        some = *(t for t in outputs if t is not None), z.mul_(ctx.root)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(t if need else None for t, need in zip(some, needed, strict=True))
