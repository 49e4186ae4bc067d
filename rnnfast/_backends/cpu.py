"""The compiled kernels as functions of tensors: sizes are checked, outputs allocated, addresses passed.

Nothing here knows autograd; `rnnfast._autograd` builds derivatives from these functions. Shapes are those of
`rnnfast._autograd.op.recurrent`; `past` is a finished forward pass, tangents are directions of the same shapes as what
they belong to (None: zeros), and gradients that are not wanted are None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rnnfast import _C
from rnnfast._backends import memory

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}
DTYPES = tuple(_SUFFIX)
_FORWARD = {dtype: getattr(_C, f"forward_{name}") for dtype, name in _SUFFIX.items()}
_FORWARD_DUAL = {dtype: getattr(_C, f"forward_dual_{name}") for dtype, name in _SUFFIX.items()}
_BACKWARD = {dtype: getattr(_C, f"backward_{name}") for dtype, name in _SUFFIX.items()}
_TANGENT = {dtype: getattr(_C, f"tangent_{name}") for dtype, name in _SUFFIX.items()}
_SECOND = {dtype: getattr(_C, f"second_{name}") for dtype, name in _SUFFIX.items()}


class Stack(NamedTuple):
    """The constants of a stack: cell (an index in CELLS), L layers, D directions, has it biases."""

    cell: int
    L: int
    D: int
    bias: bool

    @property
    def lstm(self) -> bool:
        return self.cell == 2

    @property
    def gates(self) -> int:
        return 4 if self.lstm else 1

    def projected(self, weights: list[Tensor]) -> bool:
        return len(weights) == self.L * self.D * (5 if self.bias else 3)


class Inputs(NamedTuple):
    """What a derivative is taken in: x (T,B,I) or (N,I), h0 (L*D,B,R), c0 (L*D,B,H), weights as torch orders them."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]

    def flat(self) -> list[Tensor | None]:
        return [self.x, self.h0, self.c0, *self.weights]


class SomeInputs(NamedTuple):
    """Tangents or gradients, one for each of the inputs that has one."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [self.x, self.h0, self.c0, *self.weights]


class Outputs(NamedTuple):
    """y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None for Elman)."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None


class SomeOutputs(NamedTuple):
    """Gradients, one for each of the outputs that has one."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None


class Past(NamedTuple):
    """A finished forward pass."""

    stack: Stack
    inputs: Inputs
    batch_sizes: Tensor | None
    dropout: Tensor | None
    y: Tensor
    reserve: Tensor


class _Sizes(NamedTuple):
    stack: Stack
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int
    N: int
    packed: bool

    @property
    def R(self) -> int:
        return self.P or self.H


def _sizes(stack: Stack, inputs: Inputs, batch_sizes: Tensor | None) -> _Sizes:
    x, weights = inputs.x, inputs.weights
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    P = R if stack.projected(weights) else 0
    if batch_sizes is None:
        T, B, I = x.shape  # noqa: E741
        return _Sizes(stack, T, B, I, H, P, T * B, False)
    N, I = x.shape  # noqa: E741
    return _Sizes(stack, batch_sizes.numel(), int(batch_sizes[0]), I, H, P, N, True)


_Shape: TypeAlias = tuple[int, ...]


class _Arrays(NamedTuple):
    """Tensors that are passed together."""

    names: Sequence[str]
    shapes: list[_Shape]
    layout: _C.Layout


def _arrays(names: Sequence[str], shapes: list[_Shape], dtype: torch.dtype) -> _Arrays:
    return _Arrays(names, shapes, _C.Layout(Tensor, shapes, dtype.itemsize))


class _Shapes(NamedTuple):
    inputs: _Arrays  # x, h0, c0, weights
    outputs: _Arrays  # y, h_n, c_n
    dropout: _Shape
    large: bool  # is one of the inputs or outputs so large that memory for it is kept?


@lru_cache(maxsize=512)
def _shapes(s: _Sizes, dtype: torch.dtype) -> _Shapes:
    """Of every array of a call of these sizes."""
    stack, LD = s.stack, s.stack.L * s.stack.D
    rows = (s.N,) if s.packed else (s.T, s.B)
    states: list[_Shape] = [(LD, s.B, s.R), (LD, s.B, s.H)]
    y = (*rows, stack.D * s.R)
    weights: list[_Shape] = []
    for layer in range(stack.L):
        width = s.I if layer == 0 else stack.D * s.R
        one: list[_Shape] = [(stack.gates * s.H, width), (stack.gates * s.H, s.R)]
        one += [(stack.gates * s.H,)] * 2 if stack.bias else []
        one += [(s.P, s.H)] if s.P else []
        weights += one * stack.D
    inputs, outputs = [(*rows, s.I), *states, *weights], [y, *states]
    return _Shapes(
        inputs=_arrays(["x", "h0", "c0", *["weight"] * len(weights)], inputs, dtype),
        outputs=_arrays(("y", "h_n", "c_n"), outputs, dtype),
        dropout=(stack.L - 1, *y),
        large=max(map(prod, [*inputs, *outputs])) * dtype.itemsize >= memory.LARGE,
    )


@lru_cache(maxsize=512)
def _shape_of_a_row(stack: Stack, H: int, P: int) -> _C.Shape:
    return _C.Shape(stack.cell, 1, 1, 1, H, P, stack.L, stack.D, stack.bias, 0)


@lru_cache(maxsize=512)
def reserve_per_row(stack: Stack, H: int, P: int) -> int:
    """Numbers that a training forward pass keeps for each of the N rows."""
    return _shape_of_a_row(stack, H, P).reserve.size


@lru_cache(maxsize=512)
def swept_per_row(stack: Stack, H: int, P: int) -> int:
    """Numbers that `backward_kept` leaves for each of the N rows."""
    return _shape_of_a_row(stack, H, P).adjoints.size


@lru_cache(maxsize=512)
def _kept_arrays(s: _Sizes, dtype: torch.dtype) -> _Arrays:
    """y and the reserve of a call of these sizes, which have been checked."""
    reserve = s.N * reserve_per_row(s.stack, s.H, s.P)
    return _arrays(("y", "reserve"), [_shapes(s, dtype).outputs.shapes[0], (reserve,)], dtype)


# --- everything that keeps the kernels inside their arrays ------------------------------------------------------------


def _dense(name: str, tensor: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
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
    what: str, arrays: _Arrays, tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Sequence[Tensor | None], list[int]]:
    """As `_dense`, and their addresses, which last as long as somebody holds the tensors: they may be copies. Most
    tensors are as they should be, which the core sees much faster."""
    names, shapes, layout = arrays
    addresses = layout.addresses(tensors)
    if addresses is None:
        tensors = [
            tensor if tensor is None else _dense(what + name, tensor, shape, dtype)
            for name, tensor, shape in zip(names, tensors, shapes, strict=True)
        ]
        addresses = _addresses(tensors)
    return tensors, addresses


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [_address(tensor) for tensor in tensors]


def _shape(s: _Sizes, batch_sizes: int) -> _C.Shape:
    stack = s.stack
    return _C.Shape(stack.cell, s.T, s.B, s.I, s.H, s.P, stack.L, stack.D, stack.bias, batch_sizes)


@lru_cache(maxsize=512)
def _padded_shape(s: _Sizes) -> _C.Shape:
    return _shape(s, 0)


class _Call:
    """A checked call on dense arrays, and how they are passed."""

    def __init__(self, stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None) -> None:
        x = inputs.x
        self.dtype = x.dtype
        if self.dtype not in _SUFFIX or not x.is_cpu:
            raise RuntimeError(f"input: expected float32 or float64 on the CPU, got {x.dtype} on {x.device}")
        self.sizes = s = _sizes(stack, inputs, batch_sizes)
        self.shapes = shapes = _shapes(s, self.dtype)
        # No methods of its own: a call that refers to itself keeps its tensors until the garbage collector comes.
        self.kept_empty = partial(memory.empty, self.dtype)
        self.own_empty = partial(memory.empty, self.dtype, slack=0.25)  # what is no result of a user's
        self.new_empty = self.kept_empty if shapes.large else x.new_empty
        self.inputs, self.inputs_at = self.dense_inputs("", inputs.flat())
        self.dropout = None if dropout is None else _dense("dropout_masks", dropout, shapes.dropout, self.dtype)
        if batch_sizes is None:
            self.shape = _padded_shape(s)
            return
        self.batch_sizes = _dense("batch_sizes", batch_sizes, (s.T,), torch.int64)  # the shape keeps its address
        self.shape = _shape(s, self.batch_sizes.data_ptr())
        if self.shape.rows != s.N:
            raise RuntimeError(f"input: expected {self.shape.rows} rows, the sum of batch_sizes, got {s.N}")

    def dense_inputs(self, what: str, inputs: list[Tensor | None]) -> tuple[Sequence[Tensor | None], list[int]]:
        """x, h0, c0, weights, or something as large as each of them; and their addresses."""
        arrays = self.shapes.inputs
        if len(inputs) != len(arrays.shapes):
            raise RuntimeError(f"{what}weights: expected {len(arrays.shapes) - 3} tensors, got {len(inputs) - 3}")
        return _all_dense(what, arrays, inputs, self.dtype)

    def dense_outputs(self, what: str, outputs: SomeOutputs) -> tuple[Sequence[Tensor | None], list[int]]:
        """y, h_n, c_n, or something as large as each of them; and their addresses."""
        return _all_dense(what, self.shapes.outputs, outputs, self.dtype)

    def start(self) -> tuple[_C.Shape, int, list[int], int]:
        """What every kernel takes first: shape, threads, inputs, dropout."""
        return self.shape, torch.get_num_threads(), self.inputs_at, _address(self.dropout)

    def z_shape(self) -> _Shape:
        stack, s = self.sizes.stack, self.sizes
        return stack.L, stack.D, s.N, stack.gates, s.H

    def reserve_shape(self) -> _Shape:
        return _kept_arrays(self.sizes, self.dtype).shapes[1]

    def empty_outputs(self) -> Outputs:
        new_empty, (y, h_n, c_n) = self.new_empty, self.shapes.outputs.shapes
        return Outputs(new_empty(*y), new_empty(*h_n), new_empty(*c_n) if self.sizes.stack.lstm else None)

    def empty_gradients(self, wanted: Sequence[bool], groups: int) -> SomeInputs:
        """Room for the gradients: of the weights with a leading dimension `groups` if there are several."""
        shapes, new_empty = self.shapes.inputs.shapes, self.new_empty
        if groups > 1:
            shapes = [*shapes[:3], *((groups, *shape) for shape in shapes[3:])]
            new_empty = self.kept_empty
        x, h0, c0, *weights = (
            new_empty(*shape) if want and tensor is not None else None
            for tensor, shape, want in zip(self.inputs, shapes, wanted, strict=True)
        )
        return SomeInputs(x, h0, c0, weights)


class _PastCall(_Call):
    """A call that goes on from a finished forward pass."""

    def __init__(self, past: Past) -> None:
        super().__init__(past.stack, past.inputs, past.batch_sizes, past.dropout)
        arrays = _kept_arrays(self.sizes, self.dtype)
        self.kept, self.kept_at = _all_dense("", arrays, (past.y, past.reserve), self.dtype)

    def start(self) -> tuple[_C.Shape, int, list[int], int, int, int]:  # type: ignore[override]
        """What every kernel after a forward pass takes first: as above, then y and the reserve."""
        y, reserve = self.kept_at
        return *super().start(), y, reserve


# --- the four functions -----------------------------------------------------------------------------------------------


def forward(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """The outputs, and if `keep` the reserve (N * reserve_per_row) that the derivatives need."""
    call = _Call(stack, inputs, batch_sizes, dropout)
    outputs = call.empty_outputs()
    reserve = call.own_empty(*call.reserve_shape()) if keep else None
    # An empty reserve has no address; anything but 0 tells the kernel that this is training.
    kept = 0 if reserve is None else reserve.data_ptr() or outputs.y.data_ptr()
    _FORWARD[call.dtype](*call.start(), _addresses(outputs), kept)
    return outputs, reserve


def forward_dual(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, tangents: SomeInputs
) -> tuple[Outputs, Outputs]:
    """The outputs, and their derivative along `tangents` of x, h0 and c0, in one pass that keeps nothing. The weights
    have no tangents."""
    if any(t is not None for t in tangents.weights):
        raise ValueError("forward_dual: expected no tangents of weights")
    call = _Call(stack, inputs, batch_sizes, dropout)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    outputs, outputs_dot = call.empty_outputs(), call.empty_outputs()
    _FORWARD_DUAL[call.dtype](*call.start(), _addresses(outputs), v_at, _addresses(outputs_dot))
    return outputs, outputs_dot


def backward(
    past: Past,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int = 1,
    z_cotangent: Tensor | None = None,
) -> SomeInputs:
    """Gradients of <cotangents, outputs>, and if given of <z_cotangent (L,D,N,G,H), pre-activations> more; of the
    weights for each group of sequences (b % groups) on its own."""
    call = _PastCall(past)
    if z_cotangent is not None:
        z_cotangent = _dense("gradient of z", z_cotangent, call.z_shape(), call.dtype)
    return _backward(call, cotangents, wanted, groups, z=z_cotangent)


def _backward(
    call: _PastCall,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int,
    *,
    z: Tensor | None = None,
    kept: Tensor | None = None,
    swept: Tensor | None = None,
) -> SomeInputs:
    _d, d_at = call.dense_outputs("gradient of ", cotangents)
    grads = call.empty_gradients(wanted, groups)
    _BACKWARD[call.dtype](
        *call.start(), d_at, _address(z), _address(kept), _addresses(grads.flat()), groups, _address(swept)
    )
    return grads


def backward_kept(
    past: Past, cotangents: SomeOutputs, wanted: Sequence[bool], groups: int = 1
) -> tuple[SomeInputs, Tensor]:
    """As `backward`, and what the pass carried through time, for `second_local`."""
    call = _PastCall(past)
    swept = call.own_empty(call.shape.adjoints.size)
    return _backward(call, cotangents, wanted, groups, swept=swept), swept


def clear_padding(past: Past, swept: Tensor) -> None:
    """Zeros where `backward_kept` leaves memory as it was, between the rows of dL/d pre-activations."""
    stack, weights = past.stack, past.inputs.weights
    GH, R = weights[0].size(0), weights[1].size(1)
    width = _shape_of_a_row(stack, GH // stack.gates, R if stack.projected(weights) else 0).adjoints.dz_stride
    rows = stack.L * stack.D * (past.y.numel() // past.y.size(-1))
    swept[: rows * width].view(rows, width)[:, GH:] = 0


def backward_bent(past: Past, cotangents: SomeOutputs, reserve: Tensor, wanted: Sequence[bool]) -> SomeInputs:
    """As `backward`, with a gradient of the reserve on top, as `second_local` gives it."""
    call = _PastCall(past)
    reserve = _dense("gradient of the reserve", reserve, call.reserve_shape(), call.dtype)
    return _backward(call, cotangents, wanted, 1, kept=reserve)


def sweep_back(past: Past, cotangents: SomeOutputs) -> tuple[Tensor, Tensor | None]:
    """What a backward pass carries through time: dL/d pre-activations (L,D,N,G*H), dL/dc_t (L,D,N,H) (None for Elman).
    Gradients of inputs and weights are not computed."""
    wanted = [False] * len(past.inputs.flat())
    call = _PastCall(past)
    s, at = call.sizes, call.shape.adjoints
    swept = call.own_empty(at.size)
    _backward(call, cotangents, wanted, 1, swept=swept)
    L, D, N, H, GH = s.stack.L, s.stack.D, s.N, s.H, s.stack.gates * s.H
    width = at.dz_stride
    dz = swept.as_strided((L, D, N, GH), (D * N * width, N * width, width, 1), at.dz)
    dc = swept.as_strided((L, D, N, H), (D * N * H, N * H, H, 1), at.dc) if s.stack.lstm else None
    return dz, dc


def tangent(past: Past, tangents: SomeInputs, z_tangent: Tensor | None = None) -> Outputs:
    """The derivative of the outputs along `tangents`; if given, z_tangent (L,D,N,G,H) becomes that of the
    pre-activations."""
    call = _PastCall(past)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    outputs = call.empty_outputs()
    z = 0
    if z_tangent is not None:
        if _dense("tangent of z", z_tangent, call.z_shape(), call.dtype) is not z_tangent:
            raise RuntimeError("tangent of z: expected a contiguous tensor to write to")
        z = z_tangent.data_ptr()
    _TANGENT[call.dtype](*call.start(), v_at, _addresses(outputs), z)
    return outputs


def activations(past: Past) -> Tensor:
    """What the nonlinearities made of the pre-activations, (L,D,N,G,H): h of an Elman network, the gates of an LSTM.

    A view or a copy of what the forward pass kept.
    """
    s, (_, L, D, _) = _sizes(past.stack, past.inputs, past.batch_sizes), past.stack
    if past.stack.lstm:
        return past.reserve[: L * D * s.N * 4 * s.H].view(L, D, s.N, 4, s.H)
    below = past.reserve.view(L - 1, s.N, D, s.H)
    return torch.cat([below, past.y.view(1, s.N, D, s.H)]).permute(0, 2, 1, 3).unsqueeze(3)


class Bend(NamedTuple):
    """Gradients with respect to what a forward pass gave and kept: y, and the reserve, in place of whose gates are
    their pre-activations."""

    y: Tensor
    reserve: Tensor


def second_local(
    past: Past, swept: Tensor, tangents: SomeInputs, wanted: Sequence[bool], groups: int = 1
) -> tuple[Outputs, SomeInputs, Bend]:
    """The derivative of a backward pass, one node of the graph on its own: of S = <its gradients, tangents>.

    Args:
        swept: what the pass has left, see `backward_kept`.

    Returns:
        The gradients of S with respect to its cotangents, which are the tangent outputs; to the inputs, as far as they
        enter the backward pass themselves; and to what it had from the forward pass.
    """
    call = _PastCall(past)
    _v, v_at = call.dense_inputs("tangent of ", tangents.flat())
    swept = _dense("swept", swept, (call.shape.adjoints.size,), call.dtype)
    outputs, grads = call.empty_outputs(), call.empty_gradients(wanted, groups)
    bend = Bend(call.new_empty(*call.shapes.outputs.shapes[0]), call.own_empty(*call.reserve_shape()))
    _SECOND[call.dtype](
        *call.start(),
        swept.data_ptr(),
        v_at,
        _addresses(outputs),
        _addresses(grads.flat()),
        groups,
        *_addresses(bend),
    )
    return outputs, grads, bend


def second(
    past: Past,
    tangents: SomeInputs,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
    groups: int = 1,
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """Second derivatives: of S = <first, tangent outputs> + <plain, outputs>.

    Returns:
        The tangent outputs, the gradients of S with respect to the tangents, and with respect to the inputs.
    """
    to_first, swept = backward_kept(past, first, wanted_first, groups)
    outputs, direct, bend = second_local(past, swept, tangents, wanted_plain, groups)
    call = _PastCall(past)
    (dy, dh_n, dc_n), _ = call.dense_outputs("gradient of ", plain)
    cotangents = SomeOutputs(bend.y if dy is None else bend.y.add_(dy), dh_n, dc_n)
    to_plain = _backward(call, cotangents, wanted_plain, groups, kept=bend.reserve)
    for grad, more in zip(to_plain.flat(), direct.flat(), strict=True):
        if grad is not None and more is not None:
            grad.add_(more)
    return outputs, to_first, to_plain
