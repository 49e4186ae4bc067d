"""One call of a recurrent stack: straight to a backend, as a node of the autograd graph, or as a transform asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rnnfast._autograd import levels, recomputed, recorded, unrolled
from rnnfast._autograd.nodes import Forward
from rnnfast._autograd.unrolled import by_composite as unroll_by_operators
from rnnfast._backends import schema
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.cpu import DTYPES
from rnnfast._backends.precision import IN_FORCE
from rnnfast._backends.types import Constants, Inputs, Outputs, Past, SomeInputs, Stack, present

__all__ = ["DTYPES", "recompute", "recurrent", "unroll", "unroll_by_operators"]

_observed: ContextVar[bool] = ContextVar("observed", default=False)


def recurrent(
    mode: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    dropout_masks: Tensor | None = None,
    resets: Tensor | None = None,
    precision: int = IN_FORCE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of recurrent layers over a sequence.

    Args:
        mode: of the module: 'RNN_TANH', 'RNN_RELU', 'LSTM', 'GRU', 'LEAKY_TANH' or 'LEAKY_RELU'.
        x: (T,B,I) padded, or (N,I) packed with `batch_sizes`; float32 or float64 on the CPU, any strides, where 16-bit
            numbers come as float32; on a GPU also float16 and bfloat16 (`rnnfast._backends.cuda`).
        batch_sizes: (T) int64 on the CPU, not increasing, as `PackedSequence.batch_sizes`; None: padded.
        h0: (L*D,B,R), R = P if projected else H; None: zeros.
        c0: (L*D,B,H), LSTM only; None: zeros.
        weights: for each layer and direction w_ih (g*H,I), w_hh (g*H,R), b_ih (g*H), b_hh (g*H) if `has_bias`,
            w_hr (P,H) if projected, unit parameters (U,H) if the cell has any, in one flat list; g is 1 for Elman and
            leaky units, 3 for a GRU, 4 for an LSTM.
        dropout_masks: (L-1,T,B,D*R) or (L-1,N,D*R), factors on the output of each layer below the top; None: ones.
            Constants: not differentiable.
        resets: (T,B) or (N) bool, sequence b begins anew at step t; None: none does. Constants.
        precision: of the products on the CPU, of this call and of its derivatives, see `rnnfast._backends.precision`.

    Returns:
        y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None for Elman), differentiable in x, h0, c0, weights:
        by kernels twice in reverse mode, once in forward mode, and once each in either order; beyond that by torch's
        operators, after one warning.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than the rest asks for.
    """
    stack = Stack(BY_MODE[mode].index, num_layers, 2 if bidirectional else 1, has_bias, precision)
    constants = Constants(batch_sizes, dropout_masks, resets)
    if torch.compiler.is_dynamo_compiling():
        return _recurrent_in_graph(stack, constants, x, h0, c0, weights)
    return _recurrent(stack, Inputs(x, h0, c0, weights), constants)


def _recurrent(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Tensor, Tensor, Tensor | None]:
    transformed = levels.is_transformed()
    needs_graph = _any_requires_grad(inputs.flat())
    if needs_graph and not transformed and recorded.is_recording():
        return recorded.record(stack, inputs, constants)
    if transformed:
        args = [*inputs.flat(), *constants]
        both = levels.dual_alone(args, lambda pairs: _dual(stack, len(inputs.flat()), pairs))
        if both is not None:
            return Outputs.of(both)
    if transformed or needs_graph:
        return Outputs.of(Forward.apply(stack, *constants, *inputs.flat())[:-1])
    return schema.forward(stack, inputs, constants, keep=False)[0]


def unroll(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, unrolled.States]:
    """As `recurrent`, and every state and gate."""
    if not torch.compiler.is_dynamo_compiling():
        return unrolled.unroll(stack, inputs, constants)
    some = _unrolled_in_graph(stack, constants, *inputs)
    return unrolled.sort(stack, some)


def recompute(stack: Stack, inputs: Inputs, constants: Constants, segment: int) -> Outputs:
    """As `recurrent`; a backward pass computes every `segment` steps anew."""
    if torch.compiler.is_dynamo_compiling():
        return Outputs.of(_recomputed_in_graph(stack, constants, segment, *inputs))
    return _recompute(stack, inputs, constants, segment)


def _recompute(stack: Stack, inputs: Inputs, constants: Constants, segment: int) -> Outputs:
    if levels.is_transformed() or recorded.is_recording() or not _any_requires_grad(inputs.flat()):
        return Outputs(*_recurrent(stack, inputs, constants))
    return recomputed.run(stack, inputs, constants, segment)


@torch.compiler.allow_in_graph
def _recomputed_in_graph(stack, constants, segment, *inputs):
    return present(_recompute(Stack(*stack), Inputs(*inputs), Constants(*constants), segment))


@torch.compiler.allow_in_graph
def _unrolled_in_graph(stack, constants, *inputs):
    outputs, states = unrolled.unroll(Stack(*stack), Inputs(*inputs), Constants(*constants))
    return present((*outputs, *states))


@torch.compiler.allow_in_graph
def _recurrent_in_graph(stack, constants, *inputs):
    """What Dynamo leaves as one call in its graph; the nodes below it are traced by what comes after Dynamo."""
    return _recurrent(Stack(*stack), Inputs(*inputs), Constants(*constants))


def _any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_mere_call() -> bool:
    """Will a call be recorded by nobody but autograd?"""
    return not (levels.is_transformed() or recorded.is_recording() or _observed.get())


def leaves_mere_graph(tensors: Iterable[Tensor | None]) -> bool:
    """Will a call with these tensors be recorded by autograd, and by nobody else?"""
    return is_mere_call() and _any_requires_grad(tensors)


@contextmanager
def observed() -> Iterator[None]:
    """Calls of layers within are nodes that `nodes.is_forward` knows, wherever there is a kernel."""
    token = _observed.set(True)
    try:
        yield
    finally:
        _observed.reset(token)


def _dual(stack: Stack, n: int, pairs: list[tuple[Any, Tensor | None]]) -> tuple[tuple, tuple] | None:
    """Outputs and their tangents, of n inputs and the constants with their tangents, where nobody wants a graph."""
    values = [value for value, _ in pairs]
    inputs, constants = Inputs.of(values[:n]), Constants(*values[n:])
    tangents = SomeInputs.of(tangent for _, tangent in pairs[:n])
    moved = present(tangents.flat())
    if not moved or not schema.is_fused(inputs.x) or _any_requires_grad((*inputs.flat(), *moved)):
        return None
    if all(tangent is None for tangent in tangents.weights):
        both = schema.forward_dual(stack, inputs, constants, tangents)
        return present(both[0]), present(both[1])
    outputs, reserve = schema.forward(stack, inputs, constants, keep=True)
    assert reserve is not None
    outputs_dot = schema.tangent(Past(stack, inputs, constants, outputs.y, reserve), tangents)
    return present(outputs), present(outputs_dot)
