"""What users hand in, as tensors of one kind: sequences (B,T,I) with targets (B,T,O), and back.

Dims: T steps, B sequences, I inputs, O outputs.
"""

from __future__ import annotations

import numbers
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

    @classmethod
    def of(cls, given: Any, batched: bool) -> Kind:
        return cls(True, batched, given.device) if isinstance(given, Tensor) else cls(False, batched)

    def back(self, result: Tensor) -> Any:
        """(B,...) -> (B,...) or (...), NumPy or torch"""
        result = result if self.batched else result[0]
        return result.to(self.device) if self.torch else result.numpy()


class Given(NamedTuple):
    """All that a call was handed: one array of each, or a list of them."""

    pairs: list[tuple[Batch, Kind]]
    listed: bool

    def back(self, results: Sequence[Tensor]) -> Any:
        """One for each pair -> what the user gets."""
        some = [kind.back(result) for (_, kind), result in zip(self.pairs, results, strict=True)]
        return some if self.listed else some[0]

    def each(self, name: str, value: Any) -> list[Any]:
        """What belongs to each pair: of a list one each, of anything else the same for all."""
        n = len(self.pairs)
        if not self.listed or value is None:
            return [value] * n
        if not isinstance(value, (list, tuple)) and np.ndim(value) < 2:
            return [value] * n
        if len(value) != n:
            raise ValueError(f"{name}: expected one, or one for each of {n} sequences, got {len(value)}")
        return list(value)


def given(x: Any, y: Any, I: int, O: int, dtype: torch.dtype) -> Given:  # noqa: E741
    """One array of either (y may be None), or lists of arrays (T_i,I) and (T_i,O) of any lengths; x None if I = 0."""
    if not isinstance(y if x is None else x, (list, tuple)):
        return Given([_batch("", x, y, I, O, dtype)], False)
    xs, ys = _sequence("x", x, y), _sequence("y", y, x)
    if len(xs) != len(ys):
        raise ValueError(f"x and y: expected as many sequences of either, got {len(xs)} and {len(ys)}")
    if not xs:
        raise ValueError(f"{'y' if x is None else 'x'}: expected at least one sequence, got none")
    both = zip(xs, ys, strict=True)
    return Given([_batch(f"[{i}]", one, other, I, O, dtype) for i, (one, other) in enumerate(both)], True)


def _sequence(name: str, some: Any, other: Any) -> Sequence[Any]:
    if some is None:
        return [None] * len(other)
    if not isinstance(some, (list, tuple)):
        raise TypeError(f"{name}: expected a list of arrays like the other one, got {type(some).__name__}")
    return some


def _batch(place: str, x: Any, y: Any, I: int, O: int, dtype: torch.dtype) -> tuple[Batch, Kind]:  # noqa: E741
    if x is None and I:
        raise ValueError(f"x{place}: expected input_size={I} numbers a step, got None")
    y_tensor = None if y is None else _sequences(f"y{place}", y, O, dtype)
    if x is not None:
        x_tensor = _sequences(f"x{place}", x, I, dtype)
    elif y_tensor is not None:
        x_tensor = y_tensor.new_zeros((*y_tensor.shape[:-1], 0))
    else:
        raise ValueError(f"x{place} and y{place}: expected one of them at least, got None and None")
    kind = Kind.of(y if x is None else x, x_tensor.dim() == 3)
    batch = Batch(_batched(x_tensor), None if y_tensor is None else _batched(y_tensor))
    if batch.y is not None and batch.y.shape[:2] != batch.x.shape[:2]:
        raise ValueError(
            f"x{place} and y{place}: expected as many sequences and steps of either, got shapes "
            f"{tuple(np.shape(x))} and {tuple(np.shape(y))}"
        )
    return batch, kind


def _batched(tensor: Tensor) -> Tensor:
    """(T,width) or (B,T,width) -> (B,T,width)"""
    return tensor if tensor.dim() == 3 else tensor[None]


def _sequences(name: str, array: Any, width: int, dtype: torch.dtype) -> Tensor:
    """(T,width) or (B,T,width), finite."""
    tensor = as_tensor(name, array, dtype)
    if tensor.dim() not in (2, 3) or tensor.shape[-1] != width:
        raise ValueError(f"{name}: expected shape (T,{width}) or (B,T,{width}), got {tuple(tensor.shape)}")
    finite = torch.isfinite(tensor)
    if not finite.all():
        *b, t, i = (int(n) for n in (~finite).nonzero()[0])
        raise ValueError(
            f"{name}: expected finite numbers, got {float(tensor[(*b, t, i)])} in sequence {b[0] if b else 0}, "
            f"step {t}, column {i}"
        )
    return tensor


def as_tensor(name: str, array: Any, dtype: torch.dtype) -> Tensor:
    """Real numbers of any kind, dense and on the CPU."""
    tensor = _checked(name, array) if isinstance(array, Tensor) else torch.from_numpy(_as_numpy(name, array))
    return tensor.detach().cpu().to(dtype).resolve_neg().contiguous()


def _checked(name: str, tensor: Tensor) -> Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(
            f"{name}: expected numbers, got a tensor that a transform of torch.func follows; EchoState.module gives a "
            "layer that transforms go through"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        what = "nested" if tensor.is_nested else tensor.dtype if tensor.is_quantized else tensor.layout
        raise ValueError(f"{name}: expected a dense tensor of numbers, got one {what} on device {tensor.device}")
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor


def _as_numpy(name: str, array: Any) -> np.ndarray:
    """A copy in float64; hidden numbers of a masked array are NaN."""
    if isinstance(array, np.ma.MaskedArray) and array.dtype.kind in "biuf":
        array = np.ma.filled(array.astype(np.float64), np.nan)
    try:
        found = np.asarray(array)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: expected an array of real numbers, got {type(array).__name__}: {error}") from None
    real = found.dtype.kind in "biuf"
    if found.dtype.kind == "O":  # such as columns of different dtypes come in
        real = found.ndim > 0 and all(isinstance(value, numbers.Real) for value in found.flat)
    if not real:
        what = f"dtype {found.dtype}" if found.ndim else repr(array)
        raise ValueError(f"{name}: expected an array of real numbers, got {what}")
    return np.array(found, np.float64)


def as_count(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return int(value)


def chunks(T: int, size: int) -> Iterator[slice]:
    for start in range(0, T, size):
        yield slice(start, min(T, start + size))
