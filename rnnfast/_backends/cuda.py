"""The kernels of NVIDIA GPUs as functions of tensors; the module is a `types.Backend`.

One layer after the other, both directions side by side. What is a product of all rows is one product by torch (W_ih x
before the time loop, weight gradients and dL/dx after it); the time loop is one call of a sweep, by the extension
`rnnfast._cuda` (csrc/cuda) or by `sweeps.py`, which also takes tensors on the CPU: so everything but
`cuda_sweeps.Extension` is tested without a GPU. Second derivatives and forward mode are composite. What cuDNN does
faster than sweeps (`cudnn.is_cudnns`) is one call of it for the whole stack; everything else works the same after that.

16-bit numbers: the sums of all products, the states c and dL/dc, and the gates and dL/dz before they are stored are
float32; stored gates, cells, h and dL/dz are 16-bit, as are the operands of the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnfast._backends import composite, cudnn
from rnnfast._backends.cuda_backward import BackwardSweep, Gradients
from rnnfast._backends.cuda_call import Call, Saved
from rnnfast._backends.groups import second_by_groups
from rnnfast._backends.sizes import reserve_per_row
from rnnfast._backends.sweeps import ForwardArrays
from rnnfast._backends.types import (
    NOTHING,
    Adjoints,
    Constants,
    Inner,
    Inputs,
    Outputs,
    Past,
    SomeInputs,
    SomeOutputs,
    Stack,
)


def forward(stack: Stack, inputs: Inputs, constants: Constants, keep: bool) -> tuple[Outputs, Tensor | None]:
    """See Backend.forward; the reserve may be cuDNN's."""
    call = Call(stack, inputs, constants)
    return cudnn.Cudnn(call).forward(keep) if cudnn.is_cudnns(call, keep) else _forward_by_sweeps(call, keep)


def forward_by_sweeps(stack: Stack, inputs: Inputs, constants: Constants, keep: bool) -> tuple[Outputs, Tensor | None]:
    """See Backend.forward: the reserve is as large as on the CPU."""
    return _forward_by_sweeps(Call(stack, inputs, constants), keep)


def _by_sweeps(past: Past) -> Past:
    """The same with a reserve that sweeps have written."""
    if not cudnn.is_by_cudnn(past):
        return past
    _, reserve = forward_by_sweeps(past.stack, past.inputs, past.constants, keep=True)
    assert reserve is not None
    return past._replace(reserve=reserve)


def _forward_by_sweeps(call: Call, keep: bool) -> tuple[Outputs, Tensor | None]:
    stack = call.stack
    s, L, D = call.sizes, stack.L, stack.D
    y, h_n, c_n = (call.empty(*shape) for shape in call.shapes.outputs.shapes)
    reserve = call.empty(s.N * reserve_per_row(stack, s.H, s.P)) if keep else None
    saved = Saved(call, reserve)
    below = call.x  # (N,I) or (N,D*R)
    for layer in range(L):
        w = call.weights_of(layer)
        out = y.view(s.N, D * s.R) if layer == L - 1 else saved.hidden(layer)
        gates = saved.gates(layer) if stack.cell.saves_gates else out
        gates = gates.view(s.N, D, stack.gates, s.H)
        call.start(below, w, gates)
        c = call.wide_state(call.c0, layer)
        arrays = ForwardArrays(
            gates,
            w.w_hh,
            w.w_hr,
            call.of_layer(call.h0, layer),
            c,
            saved.c(layer) if keep else None,
            saved.m(layer),
            out.view(s.N, D, s.R),
            call.of_layer(h_n, layer),  # type: ignore[arg-type]
            w.unit,
        )
        call.run_forward(arrays)
        if c is not None:
            call.of_layer(c_n, layer).copy_(c)  # type: ignore[union-attr]
        below = out
        if call.dropout is not None and layer < L - 1:
            below = below * call.dropout[layer]
    return Outputs(y, h_n, c_n if stack.has_c else None), reserve


def backward(
    past: Past,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int = 1,
    inner: Inner = NOTHING,
) -> SomeInputs:
    """See Backend.backward."""
    if cudnn.is_by_cudnn(past) and groups == 1 and inner == NOTHING and any(t is not None for t in cotangents):
        return cudnn.Cudnn(Call(past.stack, past.inputs, past.constants)).backward(past, cotangents, wanted)
    sweep = BackwardSweep(_by_sweeps(past), cotangents, inner)
    call = sweep.call
    grads = Gradients(call, wanted, groups)
    for layer in reversed(range(call.stack.L)):
        grads.add_layer(layer, sweep.run(layer, wants_dx=layer > 0 or wanted[0]))
    return grads.some()


def sweep_back(past: Past, cotangents: SomeOutputs) -> Adjoints:
    """See Backend.sweep_back."""
    sweep = BackwardSweep(_by_sweeps(past), cotangents, NOTHING)
    call, has_c = sweep.call, past.stack.has_c
    layers: list[Adjoints] = []
    for layer in reversed(range(past.stack.L)):
        states = [call.empty(call.sizes.N, past.stack.D, call.sizes.H) for _ in range(1 + has_c)]
        dm, dc = states[0], states[1] if has_c else None
        layers.insert(0, Adjoints(sweep.run(layer, wants_dx=layer > 0, d_cells=dc, dm=dm).dz, dm, dc))
    z, m, c = (None if some[0] is None else torch.stack(some).transpose(1, 2) for some in zip(*layers, strict=True))
    return Adjoints(z, m, c)  # type: ignore[arg-type]


def activations(past: Past) -> Tensor:
    """See Backend.activations."""
    past = _by_sweeps(past)
    call = Call(past.stack, past.inputs, past.constants)
    s, D, saved = call.sizes, past.stack.D, Saved(call, past.reserve)
    saves = past.stack.cell.saves_gates
    layers = [saved.gates(layer) for layer in range(past.stack.L)] if saves else [*hidden(past), past.y]
    return torch.stack([one.view(s.N, D, -1, s.H) for one in layers]).transpose(1, 2)


def hidden(past: Past) -> Tensor:
    """See Backend.hidden."""
    past = _by_sweeps(past)
    call = Call(past.stack, past.inputs, past.constants)
    saved, s = Saved(call, past.reserve), call.sizes
    layers = [saved.hidden(layer) for layer in range(past.stack.L - 1)]
    return torch.stack(layers) if layers else past.y.new_empty((0, s.N, past.stack.D * s.R))


def states(past: Past) -> Tensor | None:
    """See Backend.states."""
    past = _by_sweeps(past)
    saved = Saved(Call(past.stack, past.inputs, past.constants), past.reserve)
    layers = [c for c in map(saved.c, range(past.stack.L)) if c is not None]
    return torch.stack(layers).transpose(1, 2) if layers else None


def tangent(past: Past, tangents: SomeInputs, z_tangent: Tensor | None = None) -> Outputs:
    """See Backend.tangent."""
    call = Call(past.stack, past.inputs, past.constants)
    along = SomeInputs.of(call.dense_inputs("tangent of ", tangents.flat()))
    with torch.no_grad():
        _, outputs, z = composite.with_tangents(past.stack, past.inputs, along, past.constants)
    if z_tangent is not None:
        z_tangent.copy_(z)
    return outputs


def second(
    past: Past,
    tangents: SomeInputs,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
    groups: int = 1,
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See Backend.second."""
    if groups > 1:
        return second_by_groups(second, past, tangents, first, plain, wanted_first, wanted_plain, groups)
    call = Call(past.stack, past.inputs, past.constants)
    along = SomeInputs.of(call.dense_inputs("tangent of ", tangents.flat()))
    return composite.second(past.stack, past.inputs, along, past.constants, first, plain, wanted_first, wanted_plain)
