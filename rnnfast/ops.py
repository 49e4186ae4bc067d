"""The recurrent op: what torch sees of the compiled kernels, what is saved, what is differentiable.

One call runs a whole stack of layers and directions, and is one node of the autograd graph. It has two faces over the
same two functions `_forward` and `_backward`: `_Recurrent`, an autograd.Function for eager mode, and the torch.library
ops `rnnfast::forward` and `rnnfast::backward`, which torch.compile, torch.export and fake tensors need.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _C

CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "LSTM": 2}
_KERNELS = {
    torch.float32: (_C.forward_float32, _C.backward_float32),
    torch.float64: (_C.forward_float64, _C.backward_float64),
}
DTYPES = tuple(_KERNELS)


class Stack(NamedTuple):
    """The constants of a stack: cell (index of CELLS), L layers, D directions, has it biases."""

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


class Sizes(NamedTuple):
    """T steps, B batch, I input size, H hidden size, P proj_size (0: none), N rows."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int
    N: int

    @property
    def R(self) -> int:
        return self.P or self.H


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of recurrent layers over a sequence.

    Args:
        mode: 'RNN_TANH', 'RNN_RELU' or 'LSTM'.
        x: (T,B,I) padded, or (N,I) packed with `batch_sizes`; float32 or float64 on the CPU, any strides.
        batch_sizes: (T) int64 on the CPU, not increasing, as `PackedSequence.batch_sizes`; None: padded.
        h0: (L*D,B,R), R = P if projected else H; None: zeros.
        c0: (L*D,B,H), LSTM only; None: zeros.
        weights: for each layer and direction w_ih (G*H,I), w_hh (G*H,R), b_ih (G*H), b_hh (G*H) if `has_bias`,
            w_hr (P,H) if projected, in one flat list.
        dropout_masks: (L-1,T,B,D*R) or (L-1,N,D*R), factors on the output of each layer below the top; None: ones.

    Returns:
        y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None for Elman), differentiable in x, h0, c0, weights.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than the rest asks for.
    """
    stack = Stack(CELLS[mode], num_layers, 2 if bidirectional else 1, has_bias)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not _is_plain(x):
        y, h_n, c_n, _ = torch.ops.rnnfast.forward(
            x, batch_sizes, h0, c0, weights, dropout_masks, *stack, _any_requires_grad(x, h0, c0, weights)
        )
        return y, h_n, c_n if stack.lstm else None
    if _any_requires_grad(x, h0, c0, weights) or torch._C._are_functorch_transforms_active():
        y, h_n, c_n, _ = _Recurrent.apply(stack, batch_sizes, dropout_masks, x, h0, c0, *weights)
        return y, h_n, c_n
    y, h_n, c_n, _ = _forward(stack, x, batch_sizes, h0, c0, weights, dropout_masks, keep=False)
    return y, h_n, c_n


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def _any_requires_grad(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (
        x.requires_grad
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
        or any(w.requires_grad for w in weights)
    )


# --- sizes and memory -------------------------------------------------------------------------------------------


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


def _sizes(stack: Stack, x: Tensor, batch_sizes: Tensor | None, weights: list[Tensor]) -> Sizes:
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    projected = len(weights) == stack.L * stack.D * (5 if stack.bias else 3)
    if batch_sizes is None:
        T, B, I = x.shape  # noqa: E741
        return Sizes(T, B, I, H, R if projected else 0, T * B)
    N, I = x.shape  # noqa: E741
    return Sizes(batch_sizes.numel(), int(batch_sizes[0]), I, H, R if projected else 0, N)


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not like.dtype:
        raise RuntimeError(f"{name}: expected dtype {like.dtype} like the input, got {tensor.dtype}")
    if tensor.device != like.device:
        raise RuntimeError(f"{name}: expected device {like.device} like the input, got {tensor.device}")


def _check(
    stack: Stack,
    s: Sizes,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    dropout: Tensor | None,
) -> None:
    """Everything that keeps the kernels inside their arrays."""
    if x.dtype not in _KERNELS or x.device.type != "cpu":
        raise RuntimeError(f"input: expected float32 or float64 on the CPU, got {x.dtype} on {x.device}")
    shapes = _weight_shapes(stack, s.I, s.H, s.P)
    if len(weights) != len(shapes):
        raise RuntimeError(f"weights: expected {len(shapes)} tensors, got {len(weights)}")
    for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        _expect(f"weights[{i}]", weight, shape, x)
    _expect("h0", h0, (stack.L * stack.D, s.B, s.R), x)
    _expect("c0", c0, (stack.L * stack.D, s.B, s.H), x)
    _expect("dropout_masks", dropout, (stack.L - 1, *x.shape[:-1], stack.D * s.R), x)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The same numbers, laid out as the kernels read them."""
    if tensor is None:
        return None
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(stack: Stack, s: Sizes, batch_sizes: Tensor | None) -> _C.Shape:
    shape = _C.Shape(stack.cell, s.T, s.B, s.I, s.H, s.P, stack.L, stack.D, stack.bias, _address(batch_sizes))
    if shape.rows != s.N:
        raise RuntimeError(f"input: expected {shape.rows} rows, the sum of batch_sizes, got {s.N}")
    return shape


@lru_cache(maxsize=512)
def _reserve_per_row(stack: Stack, I: int, H: int, P: int) -> int:  # noqa: E741
    return _C.Shape(stack.cell, 1, 1, I, H, P, stack.L, stack.D, stack.bias, 0).reserve_per_row


def _outputs(stack: Stack, s: Sizes, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    LD = stack.L * stack.D
    y = x.new_empty((*x.shape[:-1], stack.D * s.R))
    h_n = x.new_empty((LD, s.B, s.R))
    c_n = x.new_empty((LD, s.B, s.H)) if stack.lstm else None
    reserve = x.new_empty((s.N * _reserve_per_row(stack, s.I, s.H, s.P),)) if keep else None
    return y, h_n, c_n, reserve


# --- the two functions ------------------------------------------------------------------------------------------


def _forward(
    stack: Stack,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    dropout: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n (None for Elman), and what the backward pass needs (None unless `keep`)."""
    s = _sizes(stack, x, batch_sizes, weights)
    _check(stack, s, x, h0, c0, weights, dropout)
    x, batch_sizes, h0, c0, dropout = map(_dense, (x, batch_sizes, h0, c0, dropout))
    weights = [_dense(w) for w in weights]
    y, h_n, c_n, reserve = _outputs(stack, s, x, keep)
    _KERNELS[x.dtype][0](
        _shape(stack, s, batch_sizes),
        torch.get_num_threads(),
        [w.data_ptr() for w in weights],
        *map(_address, (x, h0, c0, dropout, y, h_n, c_n)),
        # An empty reserve has no address; anything but 0 tells the kernel that this is training.
        0 if reserve is None else reserve.data_ptr() or y.data_ptr(),
    )
    return y, h_n, c_n, reserve


def _backward(
    stack: Stack,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    dropout: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients for x, h0, c0 and each weight: those that are `wanted`, None for the rest."""
    s = _sizes(stack, x, batch_sizes, weights)
    _check(stack, s, x, h0, c0, weights, dropout)
    _expect("dy", dy, y.shape, x)
    _expect("dh_n", dh_n, (stack.L * stack.D, s.B, s.R), x)
    _expect("dc_n", dc_n, (stack.L * stack.D, s.B, s.H), x)
    x, batch_sizes, h0, c0, dropout, dy, dh_n, dc_n = map(_dense, (x, batch_sizes, h0, c0, dropout, dy, dh_n, dc_n))
    weights = [_dense(w) for w in weights]
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else None
        for t, want in zip((x, h0, c0, *weights), wanted, strict=True)
    ]
    _KERNELS[x.dtype][1](
        _shape(stack, s, batch_sizes),
        torch.get_num_threads(),
        [w.data_ptr() for w in weights],
        *map(_address, (x, h0, c0, dropout, y, reserve, dy, dh_n, dc_n, *grads[:3])),
        list(map(_address, grads[3:])),
    )
    return grads


# --- eager mode -------------------------------------------------------------------------------------------------


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(stack, batch_sizes, dropout, x, h0, c0, *weights):
        return _forward(stack, x, batch_sizes, h0, c0, list(weights), dropout, keep=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        stack, batch_sizes, dropout, x, h0, c0, *weights = inputs
        y, _, _, reserve = output
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, dropout, x, h0, c0, y, reserve, *weights)
        ctx.stack = stack

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_n, dc_n, _):
        wanted = list(ctx.needs_input_grad[3:])
        batch_sizes, dropout, x, h0, c0, y, reserve, *weights = ctx.saved_tensors
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (3 + len(wanted))
        grads = _backward(ctx.stack, x, batch_sizes, h0, c0, weights, dropout, y, reserve, dy, dh_n, dc_n, wanted)
        return (None, None, None, *grads)


# --- torch.library: compile, export, fake tensors ---------------------------------------------------------------

_library = torch.library.Library("rnnfast", "DEF")
_STACK = "int cell, int layers, int directions, bool bias"
_INPUTS = "Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? dropout"
_library.define(f"forward({_INPUTS}, {_STACK}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"backward({_INPUTS}, {_STACK}, Tensor y, Tensor reserve, Tensor? dy, Tensor? dh_n, Tensor? dc_n, bool[] wanted)"
    " -> Tensor[]"
)


@torch.library.impl(_library, "forward", "CPU")
def _(x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, keep):
    stack = Stack(cell, layers, directions, bias)
    y, h_n, c_n, reserve = _forward(stack, x, batch_sizes, h0, c0, weights, dropout, keep)
    return y, h_n, x.new_empty(0) if c_n is None else c_n, x.new_empty(0) if reserve is None else reserve


@torch.library.impl(_library, "backward", "CPU")
def _(
    x,
    batch_sizes,
    h0,
    c0,
    weights,
    dropout,
    cell,
    layers,
    directions,
    bias,
    y,
    reserve,
    dy,
    dh_n,
    dc_n,
    wanted,
):
    stack = Stack(cell, layers, directions, bias)
    grads = _backward(stack, x, batch_sizes, h0, c0, weights, dropout, y, reserve, dy, dh_n, dc_n, wanted)
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake("rnnfast::forward", lib=_library)
def _(x, batch_sizes, h0, c0, weights, dropout, cell, layers, directions, bias, keep):
    stack = Stack(cell, layers, directions, bias)
    H, R = weights[0].size(0) // stack.gates, weights[1].size(1)
    P = R if len(weights) == layers * directions * (5 if bias else 3) else 0
    if batch_sizes is None:
        B = x.size(1)
    elif h0 is not None:
        B = h0.size(1)
    else:  # the first batch size is data
        B = torch.library.get_ctx().new_dynamic_size()
    N = x.numel() // x.size(-1)
    return (
        x.new_empty((*x.shape[:-1], directions * R)),
        x.new_empty((layers * directions, B, R)),
        x.new_empty((layers * directions, B, H) if stack.lstm else 0),
        x.new_empty(N * _reserve_per_row(stack, x.size(-1), H, P) if keep else 0),
    )


@torch.library.register_fake("rnnfast::backward", lib=_library)
def _(
    x,
    batch_sizes,
    h0,
    c0,
    weights,
    dropout,
    cell,
    layers,
    directions,
    bias,
    y,
    reserve,
    dy,
    dh_n,
    dc_n,
    wanted,
):
    inputs = (x, h0, c0, *weights)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, want in zip(inputs, wanted, strict=True)
        if want
    ]


def _setup_context(ctx, inputs, output):
    x, batch_sizes, h0, c0, weights, dropout, *stack, _ = inputs
    y, _, _, reserve = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, dropout, x, h0, c0, y, reserve, *weights)
    ctx.stack = stack
    ctx.weights_wanted = [w.requires_grad for w in weights]


def _registered_backward(ctx, dy, dh_n, dc_n, _):
    batch_sizes, dropout, x, h0, c0, y, reserve, *weights = ctx.saved_tensors
    if not Stack(*ctx.stack).lstm:
        dc_n = None
    wants = [*(ctx.needs_input_grad[i] for i in (0, 2, 3)), *ctx.weights_wanted]
    grads = iter(
        torch.ops.rnnfast.backward(
            x, batch_sizes, h0, c0, weights, dropout, *ctx.stack, y, reserve, dy, dh_n, dc_n, wants
        )
    )
    dx, dh0, dc0, *dw = (next(grads) if want else None for want in wants)
    return dx, None, dh0, dc0, dw, None, *(None,) * 5


torch.library.register_autograd("rnnfast::forward", _registered_backward, setup_context=_setup_context, lib=_library)
