"""The compiled kernels as functions of tensors: sizes are checked, outputs allocated, addresses passed.

The module is a `types.FusedBackend`, where each function and its arguments are explained; it is one file as that is
one protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast import _C
from rnnfast._backends import memory
from rnnfast._backends.precision import HIGHEST, IN_FORCE, in_force
from rnnfast._backends.sizes import (
    Arrays,
    Shape,
    Shapes,
    Sizes,
    check_resets,
    saved_arrays,
    shape_of_a_row,
    shapes_of,
    sizes_of,
    sizes_of_past,
)
from rnnfast._backends.types import (
    NOTHING,
    Adjoints,
    Constants,
    Inner,
    Inputs,
    Outputs,
    Past,
    SavedGradients,
    SomeInputs,
    SomeOutputs,
    Stack,
)

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}
DTYPES = tuple(_SUFFIX)
_FLOAT64 = torch.float64
# Of each dtype, memory for results of a user's, and for what is none.
_EMPTY = {dtype: (partial(memory.empty, dtype), partial(memory.empty, dtype, slack=0.25)) for dtype in DTYPES}
_FORWARD = {dtype: getattr(_C, f"forward_{name}") for dtype, name in _SUFFIX.items()}
_FORWARD_DUAL = {dtype: getattr(_C, f"forward_dual_{name}") for dtype, name in _SUFFIX.items()}
_BACKWARD = {dtype: getattr(_C, f"backward_{name}") for dtype, name in _SUFFIX.items()}
_TANGENT = {dtype: getattr(_C, f"tangent_{name}") for dtype, name in _SUFFIX.items()}
_SECOND = {dtype: getattr(_C, f"second_{name}") for dtype, name in _SUFFIX.items()}


# --- everything that keeps the kernels inside their arrays ------------------------------------------------------------


def dense(name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The same numbers laid out as the kernels read them, after a check that they are what the kernels expect."""
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise RuntimeError(f"{name}: expected dtype {dtype} like the input, got {tensor.dtype}")
    if not tensor.is_cpu:
        raise RuntimeError(f"{name}: expected device cpu like the input, got {tensor.device}")
    if tensor._is_zerotensor():
        return tensor.clone()  # zeros that forward mode has not written down
    tensor = tensor.resolve_neg().contiguous()
    if tensor.data_ptr() == 0 and tensor.numel():
        raise RuntimeError(
            f"{name}: expected numbers in memory, got a {type(tensor).__name__} that has none of its own"
        )
    # numpy arrays may start between two numbers
    return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor


def _all_dense(
    what: str, arrays: Arrays, tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Sequence[Tensor | None], list[int]]:
    """As `dense`, and their addresses, which last as long as somebody holds the tensors: they may be copies. Most
    tensors are as they should be, which the core sees much faster."""
    names, shapes, layout = arrays
    addresses = layout.addresses(tensors)
    if addresses is None:
        tensors = [
            tensor if tensor is None else dense(what + name, tensor, shape, dtype)
            for name, tensor, shape in zip(names, tensors, shapes, strict=True)
        ]
        addresses = _addresses(tensors)
    return tensors, addresses


def _dense_beside_bfloat16(
    arrays: Arrays, inputs: Sequence[Tensor | None], s: Sizes
) -> tuple[Sequence[Tensor | None], list[int]]:
    """As `_all_dense`, of inputs of float32 whose matrices are bfloat16."""
    L, D, bias = s.stack.L, s.stack.D, s.stack.bias
    are_matrices = [False] * 3 + s.stack.cell.are_matrices(bias, s.P > 0) * (L * D)
    tensors = [
        tensor if tensor is None else dense(name, tensor, shape, torch.bfloat16 if is_matrix else torch.float32)
        for name, tensor, shape, is_matrix in zip(arrays.names, inputs, arrays.shapes, are_matrices, strict=True)
    ]
    return tensors, _addresses(tensors)


def as_resets(resets: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """The same in one block, after a check."""
    check_resets(resets, shape, device)
    return resets.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [_address(tensor) for tensor in tensors]


def shape_of(s: Sizes, batch_sizes: int, resets: int = 0, precision: int = HIGHEST) -> _C.Shape:
    """With the addresses of batch_sizes and resets, 0 for None."""
    cell, L, D, bias, _ = s.stack
    return _C.Shape(cell, s.T, s.B, s.I, s.H, s.P, L, D, bias, batch_sizes, resets, precision)


def _precision(stack: Stack, dtype: torch.dtype) -> int:
    """Of the products of a pass that runs now."""
    precision = stack.precision
    return HIGHEST if dtype is _FLOAT64 else in_force() if precision == IN_FORCE else precision


class _Padded(NamedTuple):
    sizes: Sizes
    shapes: Shapes
    shape: Any  # _C.Shape; None of sizes that no tensors can have, which will be said of one of them


@lru_cache(maxsize=512)
def _padded(stack: Stack, x: Shape, rows: int, R: int, weights: int, dtype: torch.dtype, precision: int) -> _Padded:
    """All that is the same for every padded call of these shapes."""
    s = sizes_of(stack, x, rows, R, weights)
    return _Padded(s, shapes_of(s, dtype), shape_of(s, 0, precision=precision) if s.H else None)


class _Call:
    """A checked call on dense arrays, and how they are passed."""

    def __init__(self, stack: Stack, inputs: Inputs, constants: Constants, bfloat16_weights: bool = False) -> None:
        x = inputs.x
        self.bfloat16_weights = bfloat16_weights
        batch_sizes, dropout, resets = constants
        self.dtype = x.dtype
        if self.dtype not in _SUFFIX or not x.is_cpu:
            raise RuntimeError(f"input: expected float32 or float64 on the CPU, got {x.dtype} on {x.device}")
        weights = inputs.weights
        of = stack, x.shape, weights[0].size(0), weights[1].size(1), len(weights)
        precision = _precision(stack, self.dtype)
        if batch_sizes is None:
            self.sizes, self.shapes, self.shape = _padded(*of, self.dtype, precision)
        else:
            self.sizes = sizes_of(*of, batch_sizes)
            self.shapes = shapes_of(self.sizes, self.dtype)
        shapes = self.shapes
        # No methods of its own: a call that refers to itself keeps its tensors until the garbage collector comes.
        self.pooled_empty, self.own_empty = _EMPTY[self.dtype]
        self.new_empty = self.pooled_empty if shapes.large else x.new_empty
        self.inputs, self.inputs_at = self.dense_inputs("", inputs.flat())
        self.dropout = None if dropout is None else dense("dropout_masks", dropout, shapes.dropout, self.dtype)
        if batch_sizes is None and resets is None:
            return
        s = self.sizes
        # The shape keeps the addresses of both.
        self.batch_sizes = None if batch_sizes is None else dense("batch_sizes", batch_sizes, (s.T,), torch.int64)
        self.resets = None if resets is None else as_resets(resets, shapes.rows, x.device)
        self.shape = shape_of(s, _address(self.batch_sizes), _address(self.resets), precision)
        if self.shape.rows != s.N:
            raise RuntimeError(f"input: expected {self.shape.rows} rows, the sum of batch_sizes, got {s.N}")

    def dense_inputs(self, what: str, inputs: list[Tensor | None]) -> tuple[Sequence[Tensor | None], list[int]]:
        """x, h0, c0, weights, or something as large as each of them; and their addresses."""
        arrays = self.shapes.inputs
        if len(inputs) != len(arrays.shapes):
            raise RuntimeError(f"{what}weights: expected {len(arrays.shapes) - 3} tensors, got {len(inputs) - 3}")
        if self.bfloat16_weights:
            return _dense_beside_bfloat16(arrays, inputs, self.sizes)
        return _all_dense(what, arrays, inputs, self.dtype)

    def dense_outputs(self, what: str, outputs: SomeOutputs) -> tuple[Sequence[Tensor | None], list[int]]:
        """y, h_n, c_n, or something as large as each of them; and their addresses."""
        return _all_dense(what, self.shapes.outputs, outputs, self.dtype)

    def start(self) -> tuple[_C.Shape, int, list[int], int]:
        """What every kernel takes first: shape, threads, inputs, dropout."""
        return self.shape, torch.get_num_threads(), self.inputs_at, _address(self.dropout)

    def z_shape(self) -> Shape:
        stack, s = self.sizes.stack, self.sizes
        return stack.L, stack.D, s.N, stack.gates, s.H

    def inner_shapes(self) -> tuple[Shape, Shape, Shape]:
        """Of Inner"""
        (L, D, N, _, H), s = self.z_shape(), self.sizes
        return self.z_shape(), (L, D, N, H), (L - 1, N, D * s.R)

    def reserve_shape(self) -> Shape:
        return saved_arrays(self.sizes, self.dtype).shapes[1]

    def empty_outputs(self) -> Outputs:
        new_empty, (y, h_n, c_n) = self.new_empty, self.shapes.outputs.shapes
        return Outputs(new_empty(*y), new_empty(*h_n), new_empty(*c_n) if self.sizes.stack.has_c else None)

    def empty_gradients(self, wanted: Sequence[bool], groups: int) -> SomeInputs:
        """Room for the gradients: of the weights with a leading dimension `groups` if there are several."""
        shapes, new_empty = self.shapes.inputs.shapes, self.new_empty
        if groups > 1:
            shapes = [*shapes[:3], *((groups, *shape) for shape in shapes[3:])]
            new_empty = self.pooled_empty
        return SomeInputs.of(
            new_empty(*shape) if want and tensor is not None else None
            for tensor, shape, want in zip(self.inputs, shapes, wanted, strict=True)
        )


class _PastCall(_Call):
    """A call that goes on from a finished forward pass."""

    def __init__(self, past: Past) -> None:
        super().__init__(past.stack, past.inputs, past.constants)
        arrays = saved_arrays(self.sizes, self.dtype)
        self.saved, self.saved_at = _all_dense("", arrays, (past.y, past.reserve), self.dtype)

    def start(self) -> tuple[_C.Shape, int, list[int], int, int, int]:  # type: ignore[override]
        """What every kernel after a forward pass takes first: as above, then y and the reserve."""
        y, reserve = self.saved_at
        return *super().start(), y, reserve


# --- the functions ----------------------------------------------------------------------------------------------------


def forward(stack: Stack, inputs: Inputs, constants: Constants, keep: bool) -> tuple[Outputs, Tensor | None]:
    """See Backend.forward. The reserve has N * reserve_per_row numbers, as csrc/cpu/stack/layout.h says. Beside float32
    the matrices among the weights may be bfloat16, if nobody differentiates."""
    bfloat16_weights = inputs.weights[0].dtype is torch.bfloat16
    call = _Call(stack, inputs, constants, bfloat16_weights)
    outputs = call.empty_outputs()
    reserve = call.own_empty(*call.reserve_shape()) if keep else None
    # An empty reserve has no address; anything but 0 tells the kernel that this is training.
    at = 0 if reserve is None else reserve.data_ptr() or outputs.y.data_ptr()
    _FORWARD[call.dtype](*call.start(), _addresses(outputs), at, bfloat16_weights)
    return outputs, reserve


def forward_dual(stack: Stack, inputs: Inputs, constants: Constants, tangents: SomeInputs) -> tuple[Outputs, Outputs]:
    """See FusedBackend.forward_dual."""
    if any(t is not None for t in tangents.weights):
        raise ValueError("forward_dual: expected no tangents of weights")
    call = _Call(stack, inputs, constants)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    outputs, outputs_dot = call.empty_outputs(), call.empty_outputs()
    _FORWARD_DUAL[call.dtype](*call.start(), _addresses(outputs), v_at, _addresses(outputs_dot))
    return outputs, outputs_dot


def backward(
    past: Past,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int = 1,
    inner: Inner = NOTHING,
) -> SomeInputs:
    """See Backend.backward."""
    call = _PastCall(past)
    if inner is not NOTHING:
        shapes = zip(("z", "c", "hidden outputs"), inner, call.inner_shapes(), strict=True)
        inner = Inner(
            *(None if t is None else dense(f"gradient of {n}", t, shape, call.dtype) for n, t, shape in shapes)
        )
    return _backward(call, cotangents, wanted, groups, inner=inner)


def _backward(
    call: _PastCall,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int,
    *,
    inner: Inner = NOTHING,
    d_reserve: Tensor | None = None,
    adjoints: Tensor | None = None,
) -> SomeInputs:
    _d, d_at = call.dense_outputs("gradient of ", cotangents)
    grads = call.empty_gradients(wanted, groups)
    to = _addresses(grads.flat())
    inner_at = _addresses(inner)
    _BACKWARD[call.dtype](*call.start(), d_at, inner_at, _address(d_reserve), to, groups, _address(adjoints))
    return grads


def backward_adjoints(
    past: Past, cotangents: SomeOutputs, wanted: Sequence[bool], groups: int = 1
) -> tuple[SomeInputs, Tensor]:
    """See FusedBackend.backward_adjoints."""
    call = _PastCall(past)
    adjoints = call.own_empty(call.shape.adjoints.size)
    return _backward(call, cotangents, wanted, groups, adjoints=adjoints), adjoints


def clear_padding(past: Past, adjoints: Tensor) -> None:
    """Zeros where `backward_adjoints` leaves memory as it was, between the rows of dL/d pre-activations."""
    stack, weights = past.stack, past.inputs.weights
    H, _, P = stack.units(weights)
    width = shape_of_a_row(stack, H, P).adjoints.dz_stride
    rows = stack.L * stack.D * (past.y.numel() // past.y.size(-1))
    adjoints[: rows * width].view(rows, width)[:, stack.gates * H :] = 0


def backward_saved(past: Past, cotangents: SomeOutputs, d_reserve: Tensor, wanted: Sequence[bool]) -> SomeInputs:
    """See FusedBackend.backward_saved."""
    call = _PastCall(past)
    d_reserve = dense("gradient of the reserve", d_reserve, call.reserve_shape(), call.dtype)
    return _backward(call, cotangents, wanted, 1, d_reserve=d_reserve)


def sweep_back(past: Past, cotangents: SomeOutputs) -> Adjoints:
    """See Backend.sweep_back."""
    wanted = [False] * len(past.inputs.flat())
    call = _PastCall(past)
    s, at, cell = call.sizes, call.shape.adjoints, past.stack.cell
    adjoints = call.own_empty(at.size)
    _backward(call, cotangents, wanted, 1, adjoints=adjoints)
    rows = past.stack.L, past.stack.D, s.N

    def part(start: int, stride: int, *shape: int) -> Tensor:
        """(L,D,N,*shape), rows so many numbers apart"""
        strides = past.stack.D * s.N * stride, s.N * stride, stride
        return adjoints.as_strided((*rows, *shape), (*strides, *(s.H, 1)[2 - len(shape) :]), start)

    return Adjoints(
        part(at.dz, at.dz_stride, cell.gates, s.H),
        part(at.dm, s.H, s.H),
        part(at.dc, s.H, s.H) if cell.has_c else None,
    )


def tangent(past: Past, tangents: SomeInputs, z_tangent: Tensor | None = None) -> Outputs:
    """See Backend.tangent."""
    call = _PastCall(past)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    outputs = call.empty_outputs()
    z = 0
    if z_tangent is not None:
        if dense("tangent of z", z_tangent, call.z_shape(), call.dtype) is not z_tangent:
            raise RuntimeError("tangent of z: expected a contiguous tensor to write to")
        z = z_tangent.data_ptr()
    _TANGENT[call.dtype](*call.start(), v_at, _addresses(outputs), z)
    return outputs


def activations(past: Past) -> Tensor:
    """See Backend.activations: a view or a copy of what the forward pass kept."""
    stack, reserve = past.stack, past.reserve
    s, L, D = sizes_of_past(past), stack.L, stack.D
    if stack.cell.saves_gates:
        return reserve[: L * D * s.N * stack.gates * s.H].view(L, D, s.N, stack.gates, s.H)
    outputs = torch.cat([hidden(past), past.y.reshape(1, s.N, D * s.R)])
    return outputs.view(L, s.N, D, 1, s.H).transpose(1, 2)


def hidden(past: Past) -> Tensor:
    """See Backend.hidden: a view."""
    s, L, D = sizes_of_past(past), past.stack.L, past.stack.D
    return past.reserve[past.reserve.numel() - (L - 1) * s.N * D * s.R :].view(L - 1, s.N, D * s.R)


def states(past: Past) -> Tensor | None:
    """See Backend.states: a view."""
    if not past.stack.has_c:
        return None
    s, L, D = sizes_of_past(past), past.stack.L, past.stack.D
    size, before = L * D * s.N * s.H, past.stack.gates  # which are saved, of a cell with c
    return past.reserve[before * size : (before + 1) * size].view(L, D, s.N, s.H)


def second_local(
    past: Past, adjoints: Tensor, tangents: SomeInputs, wanted: Sequence[bool], groups: int = 1
) -> tuple[Outputs, SomeInputs, SavedGradients]:
    """See FusedBackend.second_local."""
    call = _PastCall(past)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    adjoints = dense("adjoints", adjoints, (call.shape.adjoints.size,), call.dtype)
    outputs, grads = call.empty_outputs(), call.empty_gradients(wanted, groups)
    d_saved = SavedGradients(call.new_empty(*call.shapes.outputs.shapes[0]), call.own_empty(*call.reserve_shape()))
    _SECOND[call.dtype](
        *call.start(),
        adjoints.data_ptr(),
        v_at,
        _addresses(outputs),
        _addresses(grads.flat()),
        groups,
        *_addresses(d_saved),
    )
    return outputs, grads, d_saved


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
    to_first, adjoints = backward_adjoints(past, first, wanted_first, groups)
    outputs, direct, d_saved = second_local(past, adjoints, tangents, wanted_plain, groups)
    call = _PastCall(past)
    (dy, dh_n, dc_n), _ = call.dense_outputs("gradient of ", plain)
    cotangents = SomeOutputs(d_saved.y if dy is None else d_saved.y.add_(dy), dh_n, dc_n)
    to_plain = _backward(call, cotangents, wanted_plain, groups, d_reserve=d_saved.reserve)
    for grad, more in zip(to_plain.flat(), direct.flat(), strict=True):
        if grad is not None and more is not None:
            grad.add_(more)
    return outputs, to_first, to_plain
