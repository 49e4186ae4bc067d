"""The kernels as torch.library ops, `rnnfast::forward`, `backward`, `tangent`, `second` and variants of them.

Calls that somebody traces (torch.compile, torch.export, fake tensors, a counter of flops or any other dispatch mode) go
through the ops, others straight to `backend_for` their device: for a single streaming step the way through the
dispatcher would cost more than the step. The ops have no derivatives of their own; those are the business of
`rnnfast._autograd` alone. One file for all of them: an op is its schema, its run, its fake and its flops, and these
have to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._C._profiler import _RecordFunctionFast
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from rnnfast._backends import cpu, cuda, flops
from rnnfast._backends.sizes import adjoints_per_row, reserve_per_row
from rnnfast._backends.types import (
    NOTHING,
    Backend,
    Constants,
    FusedBackend,
    Inner,
    Inputs,
    Outputs,
    Past,
    SavedGradients,
    SomeInputs,
    SomeOutputs,
    Stack,
)

_library = torch.library.Library("rnnfast", "DEF")
_FUSED: FusedBackend = cpu
_STACK = "int cell, int layers, int directions, bool bias, int precision"
_CONSTANTS = "Tensor? batch_sizes, Tensor? dropout, Tensor? resets"
_CALL = f"{_STACK}, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, {_CONSTANTS}"
_PAST = f"{_CALL}, Tensor y, Tensor reserve"
_TANGENTS = "Tensor? x_dot, Tensor? h0_dot, Tensor? c0_dot, Tensor?[] weights_dot"

# Where x is among the arguments of an op; where those of a call end, those of a finished one, and its cotangents.
_X = len(Stack._fields)
_INPUTS_END = _X + len(Inputs._fields)
_CALL_END = _INPUTS_END + len(Constants._fields)
_PAST_END = _CALL_END + 2
_COTANGENTS_END = _PAST_END + 3


def backend_for(x: Tensor) -> Backend:
    """Of tensors on the device of x. Refuses no tensor; its functions do."""
    return cuda if x.is_cuda else cpu


def _cotangents(name: str) -> str:
    return f"Tensor? {name}_y, Tensor? {name}_h_n, Tensor? {name}_c_n"


def _call(args: tuple) -> tuple[Stack, Inputs, Constants]:
    return Stack(*args[:_X]), Inputs(*args[_X:_INPUTS_END]), Constants(*args[_INPUTS_END:_CALL_END])


def _past(args: tuple) -> Past:
    return Past(*_call(args), *args[_CALL_END:_PAST_END])


def _flat(past: Past) -> list[Any]:
    return [*past.stack, *past.inputs, *past.constants, past.y, past.reserve]


def _present(tensors: Any) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _unflatten(wanted: Any, some: Any) -> SomeInputs:
    """The gradients that were wanted, in their places."""
    given = iter(some)
    return SomeInputs.of(next(given) if want else None for want in wanted)


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


def is_fused(x: Tensor) -> bool:
    """Is there a FusedBackend for tensors like x, or ops for it?"""
    return backend_for(x) is _FUSED and _is_plain(x)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(stack: Stack, inputs: Inputs, constants: Constants, keep: bool) -> tuple[Outputs, Tensor | None]:
    """See Backend.forward."""
    if not is_traced(inputs.x):
        return _directly(backend_for(inputs.x).forward, inputs.x, stack, inputs, constants, keep)
    some = torch.ops.rnnfast.forward(*stack, *inputs, *constants, keep)
    reserve = some.pop() if keep else None
    return Outputs.of(some), reserve


def _forward(*args):
    backend = backend_for(args[_X])
    forward = cuda.forward_by_sweeps if backend is cuda else backend.forward  # a reserve as large as the fake's
    outputs, reserve = forward(*_call(args), args[_CALL_END])
    return _present((*outputs, reserve))


def _outputs_fake(stack: Stack, inputs: Inputs, constants: Constants) -> list[Tensor]:
    x, h0, _, weights = inputs
    H, R, _ = stack.units(weights)
    B: int | torch.SymInt
    if constants.batch_sizes is None:
        B = x.size(1)
    else:  # how many sequences run at the first step is data, unless an initial state tells
        B = h0.size(1) if h0 is not None else torch.library.get_ctx().new_dynamic_size()
    outputs = [x.new_empty((*x.shape[:-1], stack.D * R)), x.new_empty((stack.L * stack.D, B, R))]
    return outputs + [x.new_empty((stack.L * stack.D, B, H))] * stack.has_c


def _forward_fake(*args):
    stack, inputs, constants = _call(args)
    outputs = _outputs_fake(stack, inputs, constants)
    return [*outputs, *[_rows_fake(stack, inputs, reserve_per_row)] * args[_CALL_END]]


def _rows_fake(stack: Stack, inputs: Inputs, per_row: Callable[[Stack, int, int], int]) -> Tensor:
    """So many numbers for each of the N rows."""
    x = inputs.x
    H, _, P = stack.units(inputs.weights)  # fixed; T and B may be symbols
    N = x.size(0) * x.size(1) if x.dim() == 3 else x.size(0)
    return x.new_empty(N * per_row(stack, H, P))


def forward_dual(stack: Stack, inputs: Inputs, constants: Constants, tangents: SomeInputs) -> tuple[Outputs, Outputs]:
    """See FusedBackend.forward_dual."""
    if not is_traced(inputs.x):
        return _directly(_FUSED.forward_dual, inputs.x, stack, inputs, constants, tangents)
    some = torch.ops.rnnfast.forward_dual(*stack, *inputs, *constants, *tangents[:3])
    half = len(some) // 2
    return Outputs.of(some[:half]), Outputs.of(some[half:])


def _without_weights(args: tuple) -> SomeInputs:
    """The tangents of a `forward_dual`."""
    x_dot, h0_dot, c0_dot = args[_CALL_END:]
    return SomeInputs(x_dot, h0_dot, c0_dot, [None] * len(_call(args)[1].weights))


def _forward_dual(*args):
    outputs, outputs_dot = _FUSED.forward_dual(*_call(args), _without_weights(args))
    return _present((*outputs, *outputs_dot))


def _forward_dual_fake(*args):
    return [t for _ in range(2) for t in _outputs_fake(*_call(args))]


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(
    past: Past,
    cotangents: SomeOutputs,
    wanted: Any,
    groups: int = 1,
    inner: Inner = NOTHING,
) -> SomeInputs:
    """See Backend.backward."""
    if not is_traced(past.y):
        return _directly(backend_for(past.y).backward, past.y, past, cotangents, wanted, groups, inner)
    return _unflatten(wanted, torch.ops.rnnfast.backward(*_flat(past), *cotangents, list(wanted), groups, *inner))


def _given_cotangents(args: tuple) -> SomeOutputs:
    return SomeOutputs(*args[_PAST_END:_COTANGENTS_END])


def _backward(*args):
    backend = backend_for(args[_X])
    wanted, groups, *inner = args[_COTANGENTS_END:]
    return _present(backend.backward(_past(args), _given_cotangents(args), wanted, groups, Inner(*inner)).flat())


def _gradients_fake(inputs: Inputs, wanted: list[bool], groups: int) -> list[Tensor]:
    leads: list[tuple[int, ...]] = [()] * 3 + [(groups,) if groups > 1 else ()] * len(inputs.weights)
    triples = zip(leads, inputs.flat(), wanted, strict=True)
    return [t.new_empty((*lead, *t.shape)) for lead, t, want in triples if want and t is not None]


def _backward_fake(*args):
    return _gradients_fake(_call(args)[1], *args[_COTANGENTS_END : _COTANGENTS_END + 2])


def backward_adjoints(past: Past, cotangents: SomeOutputs, wanted: Any) -> tuple[SomeInputs, Tensor]:
    """See FusedBackend.backward_adjoints."""
    if not is_traced(past.y):
        return _directly(_FUSED.backward_adjoints, past.y, past, cotangents, wanted)
    *some, adjoints = torch.ops.rnnfast.backward_adjoints(*_flat(past), *cotangents, list(wanted))
    return _unflatten(wanted, some), adjoints


def _backward_adjoints(*args):
    past = _past(args)
    grads, adjoints = _FUSED.backward_adjoints(past, _given_cotangents(args), args[_COTANGENTS_END])
    cpu.clear_padding(past, adjoints)  # makes equal calls give equal outputs, as is expected of an op
    return _present((*grads.flat(), adjoints))


def _backward_adjoints_fake(*args):
    stack, inputs, _ = _call(args)
    adjoints = _rows_fake(stack, inputs, adjoints_per_row)
    return [*_gradients_fake(inputs, args[_COTANGENTS_END], 1), adjoints]


def backward_saved(past: Past, cotangents: SomeOutputs, d_reserve: Tensor, wanted: Any) -> SomeInputs:
    """See FusedBackend.backward_saved."""
    if not is_traced(past.y):
        return _directly(_FUSED.backward_saved, past.y, past, cotangents, d_reserve, wanted)
    return _unflatten(wanted, torch.ops.rnnfast.backward_saved(*_flat(past), *cotangents, d_reserve, list(wanted)))


def _backward_saved(*args):
    return _present(_FUSED.backward_saved(_past(args), _given_cotangents(args), *args[_COTANGENTS_END:]).flat())


def _backward_saved_fake(*args):
    return _gradients_fake(_call(args)[1], args[_COTANGENTS_END + 1], 1)


# --- tangent ----------------------------------------------------------------------------------------------------------


def tangent(past: Past, tangents: SomeInputs) -> Outputs:
    """See Backend.tangent."""
    if not is_traced(past.y):
        return _directly(backend_for(past.y).tangent, past.y, past, tangents)
    return Outputs.of(torch.ops.rnnfast.tangent(*_flat(past), *tangents))


def _tangent(*args):
    return _present(backend_for(args[_X]).tangent(_past(args), SomeInputs(*args[_PAST_END:])))


def _tangent_fake(*args):
    return _outputs_fake(*_call(args))


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
    """See Backend.second."""
    if not is_traced(past.y):
        return _directly(
            backend_for(past.y).second, past.y, past, tangents, first, plain, wanted_first, wanted_plain, groups
        )
    wanted = list(wanted_first), list(wanted_plain)
    some = torch.ops.rnnfast.second(*_flat(past), *tangents, *first, *plain, *wanted, groups)
    n = 2 + past.stack.has_c
    grads = iter(some[n:])
    return Outputs.of(some[:n]), _unflatten(wanted_first, grads), _unflatten(wanted_plain, grads)


def _second(*args):
    i = _PAST_END
    tangents, first, plain = SomeInputs(*args[i : i + 4]), SomeOutputs(*args[i + 4 : i + 7]), args[i + 7 : i + 10]
    outputs, *grads = backend_for(args[_X]).second(_past(args), tangents, first, SomeOutputs(*plain), *args[i + 10 :])
    return _present((*outputs, *grads[0].flat(), *grads[1].flat()))


def _second_fake(*args):
    wanted_first, wanted_plain, groups = args[-3:]
    grads = [_gradients_fake(_call(args)[1], wanted, groups) for wanted in (wanted_first, wanted_plain)]
    return _tangent_fake(*args) + grads[0] + grads[1]


def second_local(
    past: Past, adjoints: Tensor, tangents: SomeInputs, wanted: Any
) -> tuple[Outputs, SomeInputs, SavedGradients]:
    """See FusedBackend.second_local."""
    if not is_traced(past.y):
        return _directly(_FUSED.second_local, past.y, past, adjoints, tangents, wanted)
    *some, y, reserve = torch.ops.rnnfast.second_local(*_flat(past), adjoints, *tangents, list(wanted))
    n = 2 + past.stack.has_c
    return Outputs.of(some[:n]), _unflatten(wanted, some[n:]), SavedGradients(y, reserve)


def _second_local(*args):
    adjoints, *tangents, wanted = args[_PAST_END:]
    outputs, grads, d_saved = _FUSED.second_local(_past(args), adjoints, SomeInputs(*tangents), wanted)
    return _present((*outputs, *grads.flat(), *d_saved))


def _second_local_fake(*args):
    past = _past(args)
    grads = _gradients_fake(past.inputs, args[-1], 1)
    return [*_tangent_fake(*args), *grads, torch.empty_like(past.y), torch.empty_like(past.reserve)]


# --- all of them ------------------------------------------------------------------------------------------------------


def _given(tangents: SomeInputs) -> list[bool]:
    """Which of them are there?"""
    return [t is not None for t in tangents.flat()]


def _moved(args: tuple) -> list[bool]:
    """Of the tangents that follow a finished call."""
    return _given(SomeInputs(*args[_PAST_END : _PAST_END + 4]))


class _Op(NamedTuple):
    schema: str
    run: Callable[..., list[Tensor]]
    fake: Callable[..., list[Tensor]]
    flops: Callable[[flops.Products, tuple], int]  # of all arguments


_D = _cotangents("d")
_OPS = {
    "forward": _Op(f"{_CALL}, bool keep", _forward, _forward_fake, lambda call, args: call.forward()),
    "forward_dual": _Op(
        f"{_CALL}, Tensor? x_dot, Tensor? h0_dot, Tensor? c0_dot",
        _forward_dual,
        _forward_dual_fake,
        lambda call, args: call.forward() + call.linear(_given(_without_weights(args))),
    ),
    "backward": _Op(
        f"{_PAST}, {_D}, bool[] wanted, int groups, Tensor? d_z, Tensor? d_inner_c, Tensor? d_hidden",
        _backward,
        _backward_fake,
        lambda call, args: call.linear(args[_COTANGENTS_END]),
    ),
    "backward_adjoints": _Op(
        f"{_PAST}, {_D}, bool[] wanted",
        _backward_adjoints,
        _backward_adjoints_fake,
        lambda call, args: call.linear(args[-1]),
    ),
    "backward_saved": _Op(
        f"{_PAST}, {_D}, Tensor d_reserve, bool[] wanted",
        _backward_saved,
        _backward_saved_fake,
        lambda call, args: call.linear(args[-1]),
    ),
    "tangent": _Op(f"{_PAST}, {_TANGENTS}", _tangent, _tangent_fake, lambda call, args: call.linear(_moved(args))),
    "second": _Op(
        f"{_PAST}, {_TANGENTS}, {_cotangents('first')}, {_cotangents('plain')}, "
        "bool[] wanted_first, bool[] wanted_plain, int groups",
        _second,
        _second_fake,
        lambda call, args: call.linear(args[-3]) + call.second(_moved(args), args[-2]) + call.linear(args[-2]),
    ),
    "second_local": _Op(
        f"{_PAST}, Tensor adjoints, {_TANGENTS}, bool[] wanted",
        _second_local,
        _second_local_fake,
        lambda call, args: call.second(_given(SomeInputs(*args[_PAST_END + 1 : -1])), args[-1]),
    ),
}


def _define(name: str, op: _Op) -> None:
    _library.define(f"{name}({op.schema}) -> Tensor[]")
    for device in ("CPU", "CUDA"):
        _library.impl(name, op.run, device)
    torch.library.register_fake(f"rnnfast::{name}", op.fake, lib=_library)

    @register_flop_formula(getattr(torch.ops.rnnfast, name), get_raw=True)
    def count(*args, out_val=None):
        stack, inputs, constants = _call(args)
        return op.flops(flops.Products(stack, inputs, constants.batch_sizes), args)


for _name, _op in _OPS.items():
    _define(_name, _op)


@torch.ops.rnnfast.forward.default.py_impl(ProxyTorchDispatchMode)
def _forward_recorded(mode, *args):
    """What a traced graph gets of a call: the op; under torch.onnx.export, operators that ONNX has."""
    with mode:
        if not torch.onnx.is_in_onnx_export():
            return torch.ops.rnnfast.forward.default._op_dk(DispatchKey.Python, *args)
        from rnnfast._backends import onnx  # defines ops of its own, which nobody else needs

        reserve = [args[_X].new_empty(0)] * args[_CALL_END]  # for derivatives, which have no translation
        return [*_present(onnx.forward(*_call(args))), *reserve]
