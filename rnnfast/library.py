"""The torch.library ops `rnnfast::forward` and `rnnfast::backward`: what torch.compile, torch.export and fake tensors see.

Dynamo refuses an autograd.Function that has a `jvp` of its own, so these ops carry the same two formulas as
`rnnfast.ops._Forward` for graphs that are traced. What is absent is an empty tensor here: op schemas know no optional
results.
"""

from __future__ import annotations

import torch

from rnnfast import kernels
from rnnfast.kernels import Inputs, Outputs, Past, Stack

_library = torch.library.Library("rnnfast", "DEF")
_INPUTS = "Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? dropout"
_STACK = "int cell, int layers, int directions, bool bias"
_COTANGENTS = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_library.define(f"forward({_INPUTS}, {_STACK}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"backward({_INPUTS}, {_STACK}, Tensor y, Tensor reserve, {_COTANGENTS}, bool[] wanted) -> Tensor[]")


@torch.library.impl(_library, "forward", "CPU")
def _(x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, keep):
    stack = Stack(cell, layers, directions, bias)
    (y, h_n, c_n), reserve = kernels.forward(stack, Inputs(x, h0, c0, weights), batch_sizes, dropout, keep)
    return y, h_n, x.new_empty(0) if c_n is None else c_n, x.new_empty(0) if reserve is None else reserve


@torch.library.impl(_library, "backward", "CPU")
def _(
    x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, y, reserve, dy, dh_n, dc_n, wanted
):  # fmt: skip
    stack = Stack(cell, layers, directions, bias)
    past = Past(stack, Inputs(x, h0, c0, weights), batch_sizes, dropout, y, reserve)
    grads = kernels.backward(past, Outputs(dy, dh_n, dc_n), wanted)
    return [grad for grad in grads.flat() if grad is not None]


@torch.library.register_fake("rnnfast::forward", lib=_library)
def _(x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, keep):
    stack = Stack(cell, layers, directions, bias)
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    P = R if stack.projected(weights) else 0
    if batch_sizes is None:
        N, B = x.size(0) * x.size(1), x.size(1)
    else:  # how many sequences run at the first step is data, unless an initial state tells
        N, B = x.size(0), h0.size(1) if h0 is not None else torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((*x.shape[:-1], directions * R)),
        x.new_empty((layers * directions, B, R)),
        x.new_empty((layers * directions, B, H) if stack.lstm else 0),
        x.new_empty(N * kernels.reserve_per_row(stack, x.size(-1), H, P) if keep else 0),
    )


@torch.library.register_fake("rnnfast::backward", lib=_library)
def _(
    x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, y, reserve, dy, dh_n, dc_n, wanted
):  # fmt: skip
    inputs = (x, h0, c0, *weights)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    x, batch_sizes, h0, c0, weights, dropout, *stack, _ = inputs
    y, _, _, reserve = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, dropout, x, h0, c0, y, reserve, *weights)
    ctx.stack = Stack(*stack)
    ctx.weights_wanted = [w.requires_grad for w in weights]


def _backward(ctx, dy, dh_n, dc_n, _):
    batch_sizes, dropout, x, h0, c0, y, reserve, *weights = ctx.saved_tensors
    wanted = [*(ctx.needs_input_grad[i] for i in (0, 2, 3)), *ctx.weights_wanted]
    cotangents = dy, dh_n, dc_n if ctx.stack.lstm else None
    some = iter(
        torch.ops.rnnfast.backward(
            x, batch_sizes, h0, c0, weights, dropout, *ctx.stack, y, reserve, *cotangents, wanted
        )
    )
    dx, dh0, dc0, *dw = (next(some) if want else None for want in wanted)
    return dx, None, dh0, dc0, dw, *(None,) * 6


torch.library.register_autograd("rnnfast::forward", _backward, setup_context=_setup_context, lib=_library)
