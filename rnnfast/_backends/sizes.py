"""Sizes of a call, and the shapes of every array in it; the same for every device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rnnfast import _C
from rnnfast._backends import memory
from rnnfast._backends.types import Inputs, Past, Stack

Shape: TypeAlias = tuple[int, ...]


class Sizes(NamedTuple):
    stack: Stack
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int  # 0 without projection
    N: int
    packed: bool

    @property
    def R(self) -> int:
        return self.P or self.H


def sizes_of(stack: Stack, x: Shape, rows: int, R: int, weights: int, batch_sizes: Tensor | None = None) -> Sizes:
    """From the shape of x, the rows of the first w_ih, the columns of the first w_hh, and the number of weights."""
    H, _, P = stack.sizes_of_units(rows, R, weights)
    if batch_sizes is None:
        T, B, I = x  # noqa: E741
        return Sizes(stack, T, B, I, H, P, T * B, False)
    N, I = x  # noqa: E741
    return Sizes(stack, batch_sizes.numel(), int(batch_sizes[0]), I, H, P, N, True)


def sizes_of_call(stack: Stack, inputs: Inputs, batch_sizes: Tensor | None) -> Sizes:
    w_ih, w_hh, *_ = inputs.weights
    return sizes_of(stack, inputs.x.shape, w_ih.size(0), w_hh.size(1), len(inputs.weights), batch_sizes)


def sizes_of_past(past: Past) -> Sizes:
    return sizes_of_call(past.stack, past.inputs, past.constants.batch_sizes)


class Arrays(NamedTuple):
    """Tensors that are passed together."""

    names: Sequence[str]
    shapes: list[Shape]
    layout: _C.Layout


def _arrays(names: Sequence[str], shapes: list[Shape], dtype: torch.dtype) -> Arrays:
    return Arrays(names, shapes, _C.Layout(Tensor, shapes, dtype.itemsize))


class Shapes(NamedTuple):
    inputs: Arrays  # x, h0, c0, weights
    outputs: Arrays  # y, h_n, c_n
    rows: Shape  # (T,B) or (N)
    dropout: Shape
    large: bool  # is one of the inputs or outputs so large that memory for it is kept?


@lru_cache(maxsize=512)
def shapes_of(s: Sizes, dtype: torch.dtype) -> Shapes:
    """Of every array of a call of these sizes."""
    stack, LD = s.stack, s.stack.L * s.stack.D
    rows = (s.N,) if s.packed else (s.T, s.B)
    states: list[Shape] = [(LD, s.B, s.R), (LD, s.B, s.H)]
    y = (*rows, stack.D * s.R)
    weights: list[Shape] = []
    for layer in range(stack.L):
        width = s.I if layer == 0 else stack.D * s.R
        weights += stack.cell.weight_shapes(s.H, width, s.P, stack.bias) * stack.D
    inputs, outputs = [(*rows, s.I), *states, *weights], [y, *states]
    return Shapes(
        inputs=_arrays(["x", "h0", "c0", *["weight"] * len(weights)], inputs, dtype),
        outputs=_arrays(("y", "h_n", "c_n"), outputs, dtype),
        rows=rows,
        dropout=(stack.L - 1, *y),
        large=max(map(prod, [*inputs, *outputs])) * dtype.itemsize >= memory.LARGE,
    )


@lru_cache(maxsize=512)
def shape_of_a_row(stack: Stack, H: int, P: int) -> _C.Shape:
    return _C.Shape(stack.cell_index, 1, 1, 1, H, P, stack.L, stack.D, stack.bias, 0)


@lru_cache(maxsize=512)
def reserve_per_row(stack: Stack, H: int, P: int) -> int:
    """Numbers that a training forward pass keeps for each of the N rows."""
    return shape_of_a_row(stack, H, P).reserve.size


@lru_cache(maxsize=512)
def adjoints_per_row(stack: Stack, H: int, P: int) -> int:
    """Numbers that `backward_adjoints` leaves for each of the N rows."""
    return shape_of_a_row(stack, H, P).adjoints.size


@lru_cache(maxsize=512)
def saved_arrays(s: Sizes, dtype: torch.dtype) -> Arrays:
    """y and the reserve of a call of these sizes, which have been checked."""
    reserve = s.N * reserve_per_row(s.stack, s.H, s.P)
    return _arrays(("y", "reserve"), [shapes_of(s, dtype).outputs.shapes[0], (reserve,)], dtype)


def check_resets(resets: Tensor, shape: Shape, device: torch.device) -> None:
    """Raises RuntimeError unless they are bool, of this shape, on this device."""
    if resets.dtype != torch.bool:
        raise RuntimeError(f"resets: expected dtype torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != shape:
        raise RuntimeError(f"resets: expected shape {shape}, got {tuple(resets.shape)}")
    if resets.device != device:
        raise RuntimeError(f"resets: expected device {device} like the input, got {resets.device}")
