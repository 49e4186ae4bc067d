"""The kernels as torch.library ops, `rnnfast::forward`, `backward`, `tangent`, `second` and variants of them.

Calls that somebody traces (torch.compile, torch.export, fake tensors, a counter of flops or any other dispatch mode) go
through the ops, others straight to `kernels_for` their device: for a single streaming step the way through the
dispatcher would cost more than the step. The ops have no derivatives of their own; those are the business of
`rnnfast._autograd.nodes` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._C._profiler import _RecordFunctionFast
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from rnnfast._backends import cpu, cuda, flops
from rnnfast._backends.cpu import Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack

_library = torch.library.Library("rnnfast", "DEF")
_STACK = "int cell, int layers, int directions, bool bias"
_CALL = f"{_STACK}, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? dropout"
_PAST = f"{_CALL}, Tensor y, Tensor reserve"
_TANGENTS = "Tensor? x_dot, Tensor? h0_dot, Tensor? c0_dot, Tensor?[] weights_dot"


def kernels_for(x: Tensor) -> ModuleType:
    """The functions of `rnnfast._backends.cpu` for tensors on the device of x. Refuses no tensor; the functions do."""
    return cuda if x.is_cuda else cpu


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


def _outputs(some: list[Tensor]) -> Outputs:
    y, h_n, *c_n = some
    return Outputs(y, h_n, c_n[0] if c_n else None)


def _unflatten(wanted: Any, some: Any) -> SomeInputs:
    """The gradients that were wanted, in their places."""
    given = iter(some)
    x, h0, c0, *weights = (next(given) if want else None for want in wanted)
    return SomeInputs(x, h0, c0, weights)


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def is_traced(x: Tensor) -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or not _is_plain(x)


def _directly(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """The result of function(*args); a profiler sees a call of the op, with the shape of x."""
    if not torch.autograd._profiler_enabled():
        return function(*args)
    with _RecordFunctionFast(f"rnnfast::{function.__name__}", [x]):
        return function(*args)


def has_variants(x: Tensor) -> bool:
    """Are there `forward_dual`, `backward_kept`, `backward_bent` and `second_local` for tensors like x?"""
    return kernels_for(x) is cpu and _is_plain(x)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """See cpu.forward."""
    if not is_traced(inputs.x):
        return _directly(kernels_for(inputs.x).forward, inputs.x, stack, inputs, batch_sizes, dropout, keep)
    some = torch.ops.rnnfast.forward(*stack, *inputs, batch_sizes, dropout, keep)
    reserve = some.pop() if keep else None
    return _outputs(some), reserve


def _forward(*args):
    functions = kernels_for(args[4])
    forward = cuda.forward_by_sweeps if functions is cuda else functions.forward  # a reserve as large as the fake's
    outputs, reserve = forward(*_call(args[:10]), args[10])
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
    return [*outputs, *[_rows_fake(stack, inputs, cpu.reserve_per_row)] * args[10]]


def _rows_fake(stack: Stack, inputs: Inputs, per_row: Callable[[Stack, int, int], int]) -> Tensor:
    """So many numbers for each of the N rows."""
    x, _, _, weights = inputs
    H, R = int(weights[0].size(0)) // stack.gates, int(weights[1].size(1))  # fixed; T and B may be symbols
    N = x.size(0) * x.size(1) if x.dim() == 3 else x.size(0)
    return x.new_empty(N * per_row(stack, H, R if stack.projected(weights) else 0))


def forward_dual(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, tangents: SomeInputs
) -> tuple[Outputs, Outputs]:
    """See cpu.forward_dual."""
    if not is_traced(inputs.x):
        return _directly(cpu.forward_dual, inputs.x, stack, inputs, batch_sizes, dropout, tangents)
    some = torch.ops.rnnfast.forward_dual(*stack, *inputs, batch_sizes, dropout, *tangents[:3])
    half = len(some) // 2
    return _outputs(some[:half]), _outputs(some[half:])


def _forward_dual(*args):
    tangents = SomeInputs(*args[10:13], [None] * len(args[7]))
    outputs, outputs_dot = cpu.forward_dual(*_call(args[:10]), tangents)
    return _present((*outputs, *outputs_dot))


def _forward_dual_fake(*args):
    return [t for _ in range(2) for t in _outputs_fake(*_call(args[:10])[:3])]


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(past: Past, cotangents: SomeOutputs, wanted: Any, groups: int = 1) -> SomeInputs:
    """See cpu.backward."""
    if not is_traced(past.y):
        return _directly(kernels_for(past.y).backward, past.y, past, cotangents, wanted, groups)
    return _unflatten(wanted, torch.ops.rnnfast.backward(*_flat(past), *cotangents, list(wanted), groups))


def _backward(*args):
    return _present(kernels_for(args[4]).backward(_past(args), SomeOutputs(*args[12:15]), *args[15:]).flat())


def _gradients_fake(inputs: Inputs, wanted: list[bool], groups: int) -> list[Tensor]:
    leads: list[tuple[int, ...]] = [()] * 3 + [(groups,) if groups > 1 else ()] * len(inputs.weights)
    triples = zip(leads, inputs.flat(), wanted, strict=True)
    return [t.new_empty((*lead, *t.shape)) for lead, t, want in triples if want and t is not None]


def _backward_fake(*args):
    return _gradients_fake(Inputs(*args[4:8]), *args[15:])


def backward_kept(past: Past, cotangents: SomeOutputs, wanted: Any) -> tuple[SomeInputs, Tensor]:
    """See cpu.backward_kept."""
    if not is_traced(past.y):
        return _directly(cpu.backward_kept, past.y, past, cotangents, wanted)
    *some, swept = torch.ops.rnnfast.backward_kept(*_flat(past), *cotangents, list(wanted))
    return _unflatten(wanted, some), swept


def _backward_kept(*args):
    past = _past(args)
    grads, swept = cpu.backward_kept(past, SomeOutputs(*args[12:15]), args[15])
    cpu.clear_padding(past, swept)  # makes equal calls give equal outputs, as is expected of an op
    return _present((*grads.flat(), swept))


def _backward_kept_fake(*args):
    inputs = Inputs(*args[4:8])
    return [*_gradients_fake(inputs, args[15], 1), _rows_fake(Stack(*args[:4]), inputs, cpu.swept_per_row)]


def backward_bent(past: Past, cotangents: SomeOutputs, reserve: Tensor, wanted: Any) -> SomeInputs:
    """See cpu.backward_bent."""
    if not is_traced(past.y):
        return _directly(cpu.backward_bent, past.y, past, cotangents, reserve, wanted)
    return _unflatten(wanted, torch.ops.rnnfast.backward_bent(*_flat(past), *cotangents, reserve, list(wanted)))


def _backward_bent(*args):
    return _present(cpu.backward_bent(_past(args), SomeOutputs(*args[12:15]), *args[15:]).flat())


def _backward_bent_fake(*args):
    return _gradients_fake(Inputs(*args[4:8]), args[16], 1)


# --- tangent ----------------------------------------------------------------------------------------------------------


def tangent(past: Past, tangents: SomeInputs) -> Outputs:
    """See cpu.tangent."""
    if not is_traced(past.y):
        return _directly(kernels_for(past.y).tangent, past.y, past, tangents)
    return _outputs(torch.ops.rnnfast.tangent(*_flat(past), *tangents))


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
    """See cpu.second."""
    if not is_traced(past.y):
        return _directly(
            kernels_for(past.y).second, past.y, past, tangents, first, plain, wanted_first, wanted_plain, groups
        )
    wanted = list(wanted_first), list(wanted_plain)
    some = iter(torch.ops.rnnfast.second(*_flat(past), *tangents, *first, *plain, *wanted, groups))
    outputs = Outputs(next(some), next(some), next(some) if past.stack.lstm else None)
    return outputs, _unflatten(wanted_first, some), _unflatten(wanted_plain, some)


def second_local(past: Past, swept: Tensor, tangents: SomeInputs, wanted: Any) -> tuple[Outputs, SomeInputs, cpu.Bend]:
    """See cpu.second_local."""
    if not is_traced(past.y):
        return _directly(cpu.second_local, past.y, past, swept, tangents, wanted)
    *some, y, reserve = torch.ops.rnnfast.second_local(*_flat(past), swept, *tangents, list(wanted))
    n = 3 if past.stack.lstm else 2
    return _outputs(some[:n]), _unflatten(wanted, some[n:]), cpu.Bend(y, reserve)


def _second_local(*args):
    outputs, grads, bend = cpu.second_local(_past(args), args[12], SomeInputs(*args[13:17]), args[17])
    return _present((*outputs, *grads.flat(), *bend))


def _second_local_fake(*args):
    past = _past(args)
    grads = _gradients_fake(past.inputs, args[17], 1)
    return [*_tangent_fake(*args), *grads, torch.empty_like(past.y), torch.empty_like(past.reserve)]


def _second(*args):
    tangents, first, plain = SomeInputs(*args[12:16]), SomeOutputs(*args[16:19]), SomeOutputs(*args[19:22])
    outputs, *grads = kernels_for(args[4]).second(_past(args), tangents, first, plain, *args[22:])
    return _present((*outputs, *grads[0].flat(), *grads[1].flat()))


def _second_fake(*args):
    wanted_first, wanted_plain, groups = args[22:]
    inputs = Inputs(*args[4:8])
    grads = [_gradients_fake(inputs, wanted, groups) for wanted in (wanted_first, wanted_plain)]
    return _tangent_fake(*args) + grads[0] + grads[1]


# --- all of them ------------------------------------------------------------------------------------------------------


def _given(args: tuple) -> list[bool]:
    """Which of x_dot, h0_dot, c0_dot and weights_dot are there?"""
    x, h0, c0, weights = args
    return [t is not None for t in (x, h0, c0, *weights)]


class _Op(NamedTuple):
    schema: str
    run: Callable[..., list[Tensor]]
    fake: Callable[..., list[Tensor]]
    flops: Callable[[flops.Products, tuple], int]  # of the arguments


_D = _cotangents("d")
_OPS = {
    "forward": _Op(f"{_CALL}, bool keep", _forward, _forward_fake, lambda call, _: call.forward()),
    "forward_dual": _Op(
        f"{_CALL}, Tensor? x_dot, Tensor? h0_dot, Tensor? c0_dot",
        _forward_dual,
        _forward_dual_fake,
        lambda call, args: call.forward() + call.linear(_given((*args[10:], [None] * len(args[7])))),
    ),
    "backward": _Op(
        f"{_PAST}, {_D}, bool[] wanted, int groups",
        _backward,
        _backward_fake,
        lambda call, args: call.linear(args[15]),
    ),
    "backward_kept": _Op(
        f"{_PAST}, {_D}, bool[] wanted",
        _backward_kept,
        _backward_kept_fake,
        lambda call, args: call.linear(args[15]),
    ),
    "backward_bent": _Op(
        f"{_PAST}, {_D}, Tensor d_reserve, bool[] wanted",
        _backward_bent,
        _backward_bent_fake,
        lambda call, args: call.linear(args[16]),
    ),
    "tangent": _Op(f"{_PAST}, {_TANGENTS}", _tangent, _tangent_fake, lambda call, args: call.linear(_given(args[12:]))),
    "second": _Op(
        f"{_PAST}, {_TANGENTS}, {_cotangents('first')}, {_cotangents('plain')}, "
        "bool[] wanted_first, bool[] wanted_plain, int groups",
        _second,
        _second_fake,
        lambda call, args: call.linear(args[22]) + call.second(_given(args[12:16]), args[23]) + call.linear(args[23]),
    ),
    "second_local": _Op(
        f"{_PAST}, Tensor swept, {_TANGENTS}, bool[] wanted",
        _second_local,
        _second_local_fake,
        lambda call, args: call.second(_given(args[13:17]), args[17]),
    ),
}


def _define(name: str, op: _Op) -> None:
    _library.define(f"{name}({op.schema}) -> Tensor[]")
    for device in ("CPU", "CUDA"):
        _library.impl(name, op.run, device)
    torch.library.register_fake(f"rnnfast::{name}", op.fake, lib=_library)

    @register_flop_formula(getattr(torch.ops.rnnfast, name), get_raw=True)
    def count(*args, out_val=None):
        return op.flops(flops.Products(*_call(args[:10])[:3]), args)


for _name, _op in _OPS.items():
    _define(_name, _op)


@torch.ops.rnnfast.forward.default.py_impl(ProxyTorchDispatchMode)
def _forward_recorded(mode, *args):
    """What a traced graph gets of a call: the op; under torch.onnx.export, operators that ONNX has."""
    with mode:
        if not torch.onnx.is_in_onnx_export():
            return torch.ops.rnnfast.forward.default._op_dk(DispatchKey.Python, *args)
        from rnnfast._backends import onnx  # defines ops of its own, which nobody else needs

        reserve = [args[4].new_empty(0)] * args[10]  # for derivatives, which have no translation
        return [*_present(onnx.forward(*_call(args[:10]))), *reserve]
