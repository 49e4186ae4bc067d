"""What users hand in, as tensors of one kind: sequences (B,T,I) with targets (B,T,O), and back.

Dims: T steps, B sequences, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences of the same length, one after another in memory."""

    x: Tensor  # (B,T,I)
    y: Tensor | None  # (B,T,O)


class Kind(NamedTuple):
    """What was handed in, and what therefore is handed back."""

    torch: bool
    batched: bool
    device: torch.device | None = None

    def back(self, result: Tensor) -> Any:
        """(B,...) -> (B,...) or (...), NumPy or torch"""
        result = result if self.batched else result[0]
        return result.to(self.device) if self.torch else result.numpy()


def batches(x: Any, y: Any, I: int, O: int, dtype: torch.dtype) -> list[tuple[Batch, Kind]]:  # noqa: E741
    """One array of either (y may be None), or lists of arrays (T_i,I) and (T_i,O) of any lengths; x None if I = 0."""
    if isinstance(y if x is None else x, (list, tuple)):
        xs, ys = _sequence("x", x, y), _sequence("y", y, x)
        if len(xs) != len(ys):
            raise ValueError(f"x and y: expected as many sequences of either, got {len(xs)} and {len(ys)}")
        if not xs:
            raise ValueError("x: expected at least one sequence, got none")
        return [_batch(one, other, I, O, dtype) for one, other in zip(xs, ys, strict=True)]
    return [_batch(x, y, I, O, dtype)]


def _sequence(name: str, some: Any, other: Any) -> Sequence[Any]:
    if some is None:
        return [None] * len(other)
    if not isinstance(some, (list, tuple)):
        raise TypeError(f"{name}: expected a list of arrays like the other one, got {type(some).__name__}")
    return some


def _batch(x: Any, y: Any, I: int, O: int, dtype: torch.dtype) -> tuple[Batch, Kind]:  # noqa: E741
    if x is None and I:
        raise ValueError(f"x: expected input_size={I} numbers a step, got None")
    given = y if x is None else x
    kind = Kind(isinstance(given, Tensor), np.ndim(given) == 3, given.device if isinstance(given, Tensor) else None)
    x_tensor = None if x is None else as_tensor("x", x, I, dtype)
    y_tensor = None if y is None else as_tensor("y", y, O, dtype)
    if x_tensor is None:
        if y_tensor is None:
            raise ValueError("x and y: expected one of them at least, got None and None")
        x_tensor = y_tensor.new_zeros((*y_tensor.shape[:2], 0))
    elif y_tensor is not None and y_tensor.shape[:2] != x_tensor.shape[:2]:
        raise ValueError(
            "x and y: expected as many sequences and steps of either, got shapes "
            f"{tuple(np.shape(x))} and {tuple(np.shape(y))}"
        )
    return Batch(x_tensor, y_tensor), kind


def as_tensor(name: str, array: Any, width: int, dtype: torch.dtype) -> Tensor:
    """(T,width) or (B,T,width) -> dense (B,T,width) on the CPU, finite."""
    tensor = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array, dtype=np.float64))
    if tensor.dim() not in (2, 3) or tensor.shape[-1] != width:
        raise ValueError(f"{name}: expected shape (T,{width}) or (B,T,{width}), got {tuple(tensor.shape)}")
    tensor = tensor if tensor.dim() == 3 else tensor[None]
    tensor = tensor.to(dtype).contiguous()
    wrong = ~torch.isfinite(tensor)
    if wrong.any():
        b, t, i = (int(n) for n in wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected finite numbers, got {float(tensor[b, t, i])} in sequence {b}, step {t}, column {i}"
        )
    return tensor


def chunks(T: int, size: int) -> Iterator[slice]:
    for start in range(0, T, size):
        yield slice(start, min(T, start + size))
