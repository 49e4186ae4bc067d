"""The compiled kernels as functions of tensors: sizes are checked, outputs allocated, addresses passed.

Nothing here knows autograd; `rnnfast.ops` builds derivatives from these four functions. Shapes are those of
`rnnfast.ops.recurrent`; `past` is a finished forward pass, tangents are directions of the same shapes as what they
belong to (None: zeros), and gradients that are not wanted are None.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _C

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}
DTYPES = tuple(_SUFFIX)
_FORWARD = {dtype: getattr(_C, f"forward_{name}") for dtype, name in _SUFFIX.items()}
_BACKWARD = {dtype: getattr(_C, f"backward_{name}") for dtype, name in _SUFFIX.items()}
_TANGENT = {dtype: getattr(_C, f"tangent_{name}") for dtype, name in _SUFFIX.items()}
_SECOND = {dtype: getattr(_C, f"second_{name}") for dtype, name in _SUFFIX.items()}


class Stack(NamedTuple):
    """The constants of a stack: cell (0 tanh, 1 relu, 2 lstm), L layers, D directions, has it biases."""

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

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [self.x, self.h0, self.c0, *self.weights]


class Outputs(NamedTuple):
    """y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None for Elman)."""

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
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int
    N: int

    @property
    def R(self) -> int:
        return self.P or self.H


def _sizes(stack: Stack, inputs: Inputs, batch_sizes: Tensor | None) -> _Sizes:
    x, weights = inputs.x, inputs.weights
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    P = R if stack.projected(weights) else 0
    if batch_sizes is None:
        T, B, I = x.shape  # noqa: E741
        return _Sizes(T, B, I, H, P, T * B)
    N, I = x.shape  # noqa: E741
    return _Sizes(batch_sizes.numel(), int(batch_sizes[0]), I, H, P, N)


# --- everything that keeps the kernels inside their arrays ------------------------------------------------------------


@lru_cache(maxsize=512)
def _weight_shapes(stack: Stack, I: int, H: int, P: int) -> list[tuple[int, ...]]:  # noqa: E741
    shapes: list[tuple[int, ...]] = []
    for layer in range(stack.L):
        width = I if layer == 0 else stack.D * (P or H)
        one = [(stack.gates * H, width), (stack.gates * H, P or H)]
        one += [(stack.gates * H,)] * 2 if stack.bias else []
        one += [(P, H)] if P else []
        shapes += one * stack.D
    return shapes


def _dense(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The same numbers laid out as the kernels read them, after a check that they are what the kernels expect."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise RuntimeError(f"{name}: expected dtype {dtype} like the input, got {tensor.dtype}")
    if not tensor.is_cpu:
        raise RuntimeError(f"{name}: expected device cpu like the input, got {tensor.device}")
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    # numpy arrays may start between two numbers
    return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@lru_cache(maxsize=512)
def _padded_shape(stack: Stack, s: _Sizes) -> _C.Shape:
    return _C.Shape(stack.cell, s.T, s.B, s.I, s.H, s.P, stack.L, stack.D, stack.bias, 0)


def _packed_shape(stack: Stack, s: _Sizes, batch_sizes: Tensor) -> _C.Shape:
    """The shape keeps a pointer to batch_sizes; the caller keeps batch_sizes."""
    shape = _C.Shape(stack.cell, s.T, s.B, s.I, s.H, s.P, stack.L, stack.D, stack.bias, batch_sizes.data_ptr())
    if shape.rows != s.N:
        raise RuntimeError(f"input: expected {shape.rows} rows, the sum of batch_sizes, got {s.N}")
    return shape


class _Call:
    """A checked call on dense arrays: the sizes, and how the parts of it are passed."""

    def __init__(self, stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None) -> None:
        x = inputs.x
        self.dtype = x.dtype
        if self.dtype not in _SUFFIX or not x.is_cpu:
            raise RuntimeError(f"input: expected float32 or float64 on the CPU, got {x.dtype} on {x.device}")
        self.stack = stack
        self.sizes = s = _sizes(stack, inputs, batch_sizes)
        self.rows = x.shape[:-1]
        self.inputs = self.dense_inputs("", inputs)
        self.dropout = _dense("dropout_masks", dropout, (stack.L - 1, *self.rows, stack.D * s.R), self.dtype)
        if batch_sizes is None:
            self.shape = _padded_shape(stack, s)
        else:
            self.batch_sizes = _dense("batch_sizes", batch_sizes, (s.T,), torch.int64)
            self.shape = _packed_shape(stack, s, self.batch_sizes)

    @classmethod
    def of(cls, past: Past) -> _Call:
        return cls(past.stack, past.inputs, past.batch_sizes, past.dropout)

    def dense_inputs(self, what: str, inputs: Inputs) -> Inputs:
        stack, s, dtype = self.stack, self.sizes, self.dtype
        shapes = _weight_shapes(stack, s.I, s.H, s.P)
        if len(inputs.weights) != len(shapes):
            raise RuntimeError(f"{what}weights: expected {len(shapes)} tensors, got {len(inputs.weights)}")
        return Inputs(
            _dense(f"{what}x", inputs.x, (*self.rows, s.I), dtype),
            _dense(f"{what}h0", inputs.h0, (stack.L * stack.D, s.B, s.R), dtype),
            _dense(f"{what}c0", inputs.c0, (stack.L * stack.D, s.B, s.H), dtype),
            [
                _dense(f"{what}weight", weight, shape, dtype)
                for weight, shape in zip(inputs.weights, shapes, strict=True)
            ],
        )

    def dense_outputs(self, what: str, outputs: Outputs) -> Outputs:
        LD, s, dtype = self.stack.L * self.stack.D, self.sizes, self.dtype
        return Outputs(
            _dense(f"{what}y", outputs.y, (*self.rows, self.stack.D * s.R), dtype),
            _dense(f"{what}h_n", outputs.h_n, (LD, s.B, s.R), dtype),
            _dense(f"{what}c_n", outputs.c_n, (LD, s.B, s.H), dtype),
        )

    def start(self) -> tuple[_C.Shape, int, list[int]]:
        return self.shape, torch.get_num_threads(), _addresses(*self.inputs.weights)

    def past(self, past: Past) -> list[int]:
        x, h0, c0, _ = self.inputs
        return _addresses(x, h0, c0, self.dropout, past.y, past.reserve)

    def z_shape(self) -> tuple[int, ...]:
        stack, s = self.stack, self.sizes
        return stack.L, stack.D, s.N, stack.gates, s.H

    def empty_outputs(self) -> Outputs:
        LD, s, new_empty = self.stack.L * self.stack.D, self.sizes, self.inputs.x.new_empty
        y, h_n = new_empty((*self.rows, self.stack.D * s.R)), new_empty((LD, s.B, s.R))
        return Outputs(y, h_n, new_empty((LD, s.B, s.H)) if self.stack.lstm else None)

    def empty_gradients(self, wanted: list[bool], groups: int) -> Inputs:
        """Room for the gradients: of the weights with a leading dimension `groups` if there are several."""
        lead = (groups,) if groups > 1 else ()
        x, h0, c0 = (
            torch.empty_like(t) if t is not None and want else None
            for t, want in zip(self.inputs[:3], wanted, strict=False)
        )
        weights = [
            w.new_empty((*lead, *w.shape)) if want else None
            for w, want in zip(self.inputs.weights, wanted[3:], strict=True)
        ]
        return Inputs(x, h0, c0, weights)


@lru_cache(maxsize=512)
def reserve_per_row(stack: Stack, H: int, P: int) -> int:
    """Numbers that a training forward pass keeps for each of the N rows."""
    return _C.Shape(stack.cell, 1, 1, 1, H, P, stack.L, stack.D, stack.bias, 0).reserve_per_row


def _new_reserve(size: int, like: Tensor) -> Tensor:
    """Uninitialised (size), if large in memory that the core keeps for the next pass."""
    bytes = size * like.element_size()
    if bytes < _C.LARGE_MEMORY:
        return like.new_empty(size)
    return torch.frombuffer(_C.Memory(bytes), dtype=like.dtype)


# --- the four functions -----------------------------------------------------------------------------------------------


def forward(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """The outputs, and if `keep` the reserve (N * reserve_per_row) that the derivatives need."""
    call = _Call(stack, inputs, batch_sizes, dropout)
    s, (x, h0, c0, _) = call.sizes, call.inputs
    outputs = call.empty_outputs()
    reserve = _new_reserve(s.N * reserve_per_row(stack, s.H, s.P), x) if keep else None
    # An empty reserve has no address; anything but 0 tells the kernel that this is training.
    kept = 0 if reserve is None else reserve.data_ptr() or outputs.y.data_ptr()
    _FORWARD[x.dtype](*call.start(), [*_addresses(x, h0, c0, call.dropout, *outputs), kept])
    return outputs, reserve


def backward(
    past: Past, cotangents: Outputs, wanted: list[bool], groups: int = 1, z_cotangent: Tensor | None = None
) -> Inputs:
    """Gradients of <cotangents, outputs>, and if given of <z_cotangent (L,D,N,G,H), pre-activations> more; of the
    weights for each group of sequences (b % groups) on its own."""
    call = _Call.of(past)
    d = call.dense_outputs("gradient of ", cotangents)
    dz = _dense("gradient of z", z_cotangent, call.z_shape(), call.dtype)
    grads = call.empty_gradients(wanted, groups)
    _BACKWARD[past.y.dtype](
        *call.start(), call.past(past), _addresses(*d, *grads[:3]), _addresses(*grads.weights), groups, *_addresses(dz)
    )
    return grads


def tangent(past: Past, tangents: Inputs, z_tangent: Tensor | None = None) -> Outputs:
    """The derivative of the outputs along `tangents`; if given, z_tangent (L,D,N,G,H) becomes that of the
    pre-activations."""
    call = _Call.of(past)
    v = call.dense_inputs("tangent of ", tangents)
    outputs = call.empty_outputs()
    if z_tangent is not None and _dense("tangent of z", z_tangent, call.z_shape(), call.dtype) is not z_tangent:
        raise RuntimeError("tangent of z: expected a contiguous tensor to write to")
    _TANGENT[past.y.dtype](
        *call.start(), call.past(past), _addresses(*v[:3], *outputs), _addresses(*v.weights), *_addresses(z_tangent)
    )
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


def second(
    past: Past,
    tangents: Inputs,
    first: Outputs,
    plain: Outputs,
    wanted_first: list[bool],
    wanted_plain: list[bool],
    groups: int = 1,
) -> tuple[Outputs, Inputs, Inputs]:
    """Second derivatives: of S = <first, tangent outputs> + <plain, outputs>.

    Returns:
        The tangent outputs, the gradients of S with respect to the tangents, and with respect to the inputs.
    """
    call = _Call.of(past)
    v = call.dense_inputs("tangent of ", tangents)
    first, plain = call.dense_outputs("gradient of ", first), call.dense_outputs("gradient of ", plain)
    outputs = call.empty_outputs()
    to_first, to_plain = call.empty_gradients(wanted_first, groups), call.empty_gradients(wanted_plain, groups)
    _SECOND[past.y.dtype](
        *call.start(),
        call.past(past),
        _addresses(*v[:3], *outputs),
        _addresses(*v.weights),
        _addresses(*first, *to_first[:3]),
        _addresses(*to_first.weights),
        _addresses(*plain, *to_plain[:3]),
        _addresses(*to_plain.weights),
        groups,
    )
    return outputs, to_first, to_plain
