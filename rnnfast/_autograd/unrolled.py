"""A call that gives every state and gate, each of them differentiable at every step.

The node gives views of what a training forward pass keeps anyway; its backward pass takes a gradient for each of them.
Where that is differentiated once more, and under torch's transforms, torch's operators run (`composite.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._autograd.levels import Node, is_recorded, is_transformed
from rnnfast._backends import composite, schema, sweeps
from rnnfast._backends.types import Constants, Inner, Inputs, Outputs, Past, SomeOutputs, Stack, present
from rnnfast.fallback import warn_once


class States(NamedTuple):
    """Of all layers and steps."""

    hidden: Tensor  # (L-1,N,D*R) outputs of the layers below the top, before dropout
    c: Tensor | None  # (L,D,N,H)
    gates: Tensor | None  # (L,D,N,G,H) activated; None of a cell whose gate is h


_C = len(Constants())
_P = _C + 2


def unroll(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, States]:
    """The outputs of a call, and its states."""
    flat = inputs.flat()
    if is_transformed():
        warn_once("unroll under a transform")
        return by_composite(stack, inputs, constants)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        some = _Unrolled.apply(stack, *constants, *flat)
    else:
        outputs, reserve = schema.forward(stack, inputs, constants, keep=True)
        assert reserve is not None
        some = *present(outputs), *present(_parts(Past(stack, inputs, constants, outputs.y, reserve)))
    return sort(stack, some)


def by_composite(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, States]:
    """The same in operators that can be differentiated and transformed."""
    outputs, trace = composite.trace_of(stack, inputs, constants)
    gates = stack.cell.activate(trace.z) if stack.cell.saves_gates else None
    return outputs, States(trace.hidden, trace.c, gates)


def sort(stack: Stack, some: Sequence[Tensor]) -> tuple[Outputs, States]:
    n = 2 + stack.has_c
    hidden, *rest = some[n:]
    c = rest[0] if stack.has_c else None
    return Outputs.of(some[:n]), States(hidden, c, rest[-1] if stack.cell.saves_gates else None)


def _parts(past: Past) -> States:
    backend = schema.backend_for(past.y)
    gates = backend.activations(past) if past.stack.cell.saves_gates else None
    return States(backend.hidden(past), backend.states(past), gates)


class _Unrolled(Node):
    """(stack, *constants, x, h0, c0, *weights) -> y, h_n, c_n if there is c, hidden, c if there is, gates if saved."""

    @staticmethod
    def forward(stack, *args):
        constants, inputs = Constants(*args[:_C]), Inputs.of(args[_C:])
        outputs, reserve = schema.forward(stack, inputs, constants, keep=True)
        past = Past(stack, inputs, constants, outputs.y, reserve)
        return *present(outputs), *present(_parts(past)), reserve

    @classmethod
    def apply(cls, *args):
        return super().apply(*args)[:-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        stack, *args = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_C], output[0], output[-1], *args[_C:])
        ctx.stack = stack

    @staticmethod
    def backward(ctx, *cotangents):
        if all(d is None for d in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        stack, saved, cell = ctx.stack, ctx.saved_tensors, ctx.stack.cell
        wanted = ctx.needs_input_grad[1 + _C :]
        constants, inputs = Constants(*saved[:_C]), Inputs.of(saved[_P:])
        if is_recorded():
            grads = _recorded_gradients(stack, inputs, constants, cotangents[:-1], wanted)
            return *(None,) * (1 + _C), *grads
        past = Past(stack, inputs, constants, *saved[_C:_P])
        outputs, states = sort(stack, cotangents[:-1])
        dz = None
        if states.gates is not None:
            gates = schema.backend_for(past.y).activations(past)
            dz = cell.pull(gates, states.gates * cell.slopes(gates))
        hidden = states.hidden if stack.L > 1 else None
        inner = Inner(dz, states.c, hidden)
        return *(None,) * (1 + _C), *schema.backward(past, SomeOutputs(*outputs), wanted, 1, inner).flat()


def _recorded_gradients(
    stack: Stack, inputs: Inputs, constants: Constants, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same in operators that can be differentiated."""
    warn_once("second derivatives of unroll")
    flat = inputs.flat()
    needed = [d is not None for d in cotangents]

    def run(*some: Tensor) -> tuple[Tensor, ...]:
        given = iter(some)
        here = Inputs.of(next(given) if want else t for want, t in zip(wanted, flat, strict=True))  # type: ignore
        outputs, states = by_composite(stack, here, constants)
        all_of = *present(outputs), *present(states)
        return tuple(t for t, need in zip(all_of, needed, strict=True) if need)

    at = [t for t, want in zip(flat, wanted, strict=True) if want and t is not None]
    with sweeps.undisturbed(at[0].device):
        _, pull, *_ = torch.func.vjp(run, *at)
        grads = iter(pull(present(cotangents)))
    return [next(grads) if want else None for want in wanted]
