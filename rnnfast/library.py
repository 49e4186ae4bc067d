"""The four kernels as torch.library ops, `rnnfast::forward`, `backward`, `tangent` and `second`.

Tensors that are traced (by torch.compile, torch.export, fake tensors) go through the ops, plain ones straight to
`kernels_for` their device: for a single streaming step the way through the dispatcher would cost more than the step.
The ops have no derivatives of their own; those are the business of `rnnfast.ops` alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from rnnfast import cuda, kernels
from rnnfast.kernels import Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack

_library = torch.library.Library("rnnfast", "DEF")
_STACK = "int cell, int layers, int directions, bool bias"
_CALL = f"{_STACK}, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? dropout"
_PAST = f"{_CALL}, Tensor y, Tensor reserve"
_TANGENTS = "Tensor? x_dot, Tensor? h0_dot, Tensor? c0_dot, Tensor?[] weights_dot"


def kernels_for(x: Tensor) -> ModuleType:
    """The functions of `rnnfast.kernels` for tensors on the device of x. Refuses no tensor; the functions do."""
    return cuda if x.is_cuda else kernels


def _cotangents(name: str) -> str:
    return f"Tensor? {name}_y, Tensor? {name}_h_n, Tensor? {name}_c_n"


def _call(args: tuple) -> tuple[Stack, Inputs, Tensor | None, Tensor | None]:
    return Stack(*args[:4]), Inputs(*args[4:8]), *args[8:10]


def _past(args: tuple) -> Past:
    return Past(*_call(args[:10]), *args[10:12])


def _flat(past: Past) -> list[Any]:
    return [*past.stack, *past.inputs, *past[2:]]


def _present(tensors: Any) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _unflatten(wanted: Any, some: Any) -> SomeInputs:
    """The gradients that were wanted, in their places."""
    given = iter(some)
    x, h0, c0, *weights = (next(given) if want else None for want in wanted)
    return SomeInputs(x, h0, c0, weights)


def _is_traced(x: Tensor) -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """May functions of `rnnfast.kernels` be called that are no ops, and that `rnnfast.cuda` lacks?"""
    return kernels_for(x) is kernels and not _is_traced(x)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """See kernels.forward."""
    if not _is_traced(inputs.x):
        return kernels_for(inputs.x).forward(stack, inputs, batch_sizes, dropout, keep)
    some = torch.ops.rnnfast.forward(*stack, *inputs, batch_sizes, dropout, keep)
    reserve = some.pop() if keep else None
    return Outputs(some[0], some[1], some[2] if stack.lstm else None), reserve


def _forward(*args):
    outputs, reserve = kernels_for(args[4]).forward(*_call(args[:10]), args[10])
    return _present((*outputs, reserve))


def _outputs_fake(stack: Stack, inputs: Inputs, batch_sizes: Tensor | None) -> list[Tensor]:
    x, h0, _, weights = inputs
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    B: int | torch.SymInt
    if batch_sizes is None:
        B = x.size(1)
    else:  # how many sequences run at the first step is data, unless an initial state tells
        B = h0.size(1) if h0 is not None else torch.library.get_ctx().new_dynamic_size()
    outputs = [x.new_empty((*x.shape[:-1], stack.D * R)), x.new_empty((stack.L * stack.D, B, R))]
    return outputs + [x.new_empty((stack.L * stack.D, B, H))] * stack.lstm


def _forward_fake(*args):
    stack, inputs, batch_sizes, _ = _call(args[:10])
    outputs = _outputs_fake(stack, inputs, batch_sizes)
    if args[10]:
        x, _, _, weights = inputs
        H, R = int(weights[0].size(0)) // stack.gates, int(weights[1].size(1))  # fixed; T and B may be symbols
        rows = x.size(0) if batch_sizes is not None else x.size(0) * x.size(1)
        per_row = kernels.reserve_per_row(stack, H, R if stack.projected(weights) else 0)
        outputs.append(x.new_empty(rows * per_row))
    return outputs


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(past: Past, cotangents: SomeOutputs, wanted: Any, groups: int = 1) -> SomeInputs:
    """See kernels.backward."""
    if not _is_traced(past.y):
        return kernels_for(past.y).backward(past, cotangents, wanted, groups)
    return _unflatten(wanted, torch.ops.rnnfast.backward(*_flat(past), *cotangents, list(wanted), groups))


def _backward(*args):
    return _present(kernels_for(args[4]).backward(_past(args), SomeOutputs(*args[12:15]), *args[15:]).flat())


def _gradients_fake(inputs: Inputs, wanted: list[bool], groups: int) -> list[Tensor]:
    leads: list[tuple[int, ...]] = [()] * 3 + [(groups,) if groups > 1 else ()] * len(inputs.weights)
    triples = zip(leads, inputs.flat(), wanted, strict=True)
    return [t.new_empty((*lead, *t.shape)) for lead, t, want in triples if want and t is not None]


def _backward_fake(*args):
    return _gradients_fake(Inputs(*args[4:8]), *args[15:])


# --- tangent ----------------------------------------------------------------------------------------------------------


def tangent(past: Past, tangents: SomeInputs) -> Outputs:
    """See kernels.tangent."""
    if not _is_traced(past.y):
        return kernels_for(past.y).tangent(past, tangents)
    some = torch.ops.rnnfast.tangent(*_flat(past), *tangents)
    return Outputs(some[0], some[1], some[2] if past.stack.lstm else None)


def _tangent(*args):
    return _present(kernels_for(args[4]).tangent(_past(args), SomeInputs(*args[12:16])))


def _tangent_fake(*args):
    past = _past(args)
    return _outputs_fake(past.stack, past.inputs, past.batch_sizes)


# --- second -----------------------------------------------------------------------------------------------------------


def second(
    past: Past,
    tangents: SomeInputs,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Any,
    wanted_plain: Any,
    groups: int = 1,
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See kernels.second."""
    if not _is_traced(past.y):
        return kernels_for(past.y).second(past, tangents, first, plain, wanted_first, wanted_plain, groups)
    wanted = list(wanted_first), list(wanted_plain)
    some = iter(torch.ops.rnnfast.second(*_flat(past), *tangents, *first, *plain, *wanted, groups))
    outputs = Outputs(next(some), next(some), next(some) if past.stack.lstm else None)
    return outputs, _unflatten(wanted_first, some), _unflatten(wanted_plain, some)


def _second(*args):
    tangents, first, plain = SomeInputs(*args[12:16]), SomeOutputs(*args[16:19]), SomeOutputs(*args[19:22])
    outputs, *grads = kernels_for(args[4]).second(_past(args), tangents, first, plain, *args[22:])
    return _present((*outputs, *grads[0].flat(), *grads[1].flat()))


def _second_fake(*args):
    wanted_first, wanted_plain, groups = args[22:]
    inputs = Inputs(*args[4:8])
    grads = [_gradients_fake(inputs, wanted, groups) for wanted in (wanted_first, wanted_plain)]
    return _tangent_fake(*args) + grads[0] + grads[1]


_OPS = {
    "forward": (f"{_CALL}, bool keep", _forward, _forward_fake),
    "backward": (f"{_PAST}, {_cotangents('d')}, bool[] wanted, int groups", _backward, _backward_fake),
    "tangent": (f"{_PAST}, {_TANGENTS}", _tangent, _tangent_fake),
    "second": (
        f"{_PAST}, {_TANGENTS}, {_cotangents('first')}, {_cotangents('plain')}, "
        "bool[] wanted_first, bool[] wanted_plain, int groups",
        _second,
        _second_fake,
    ),
}
for _name, (_schema, _run, _fake) in _OPS.items():
    _library.define(f"{_name}({_schema}) -> Tensor[]")
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"rnnfast::{_name}", _fake, lib=_library)


@torch.ops.rnnfast.forward.default.py_impl(ProxyTorchDispatchMode)
def _forward_recorded(mode, *args):
    """What a traced graph gets of a call: the op; under torch.onnx.export, operators that ONNX has."""
    with mode:
        if not torch.onnx.is_in_onnx_export():
            return torch.ops.rnnfast.forward.default._op_dk(DispatchKey.Python, *args)
        from rnnfast import onnx  # defines ops of its own, which nobody else needs

        reserve = [args[4].new_empty(0)] * args[10]  # for derivatives, which have no translation
        return [*_present(onnx.forward(*_call(args[:10]))), *reserve]
