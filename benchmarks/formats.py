"""In which numbers a layer computes: who is measured by `python -m benchmarks.precision`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import make_module
from benchmarks.grid import Shape


@dataclass(frozen=True)
class Format:
    """A library, and how it is told which numbers to take.

    library: "torch" or "rnnfast". bits: of a product's factors, at least. precision: for
    torch.set_float32_matmul_precision. autocast: is forward under autocast to bfloat16? dtype: of parameters and input.
    """

    name: str
    library: str
    bits: int = 32
    precision: str = "highest"
    autocast: bool = False
    dtype: torch.dtype = torch.float32


_ALL = (
    Format("torch float32", "torch"),
    Format("torch autocast", "torch", 16, autocast=True),
    Format("torch bfloat16", "torch", 16, dtype=torch.bfloat16),
    Format("highest", "rnnfast"),
    Format("high", "rnnfast", precision="high"),  # sums of two bfloat16 numbers: 32 bits, nearly as exact as float32
    Format("medium", "rnnfast", 16, precision="medium"),
    Format("autocast", "rnnfast", 16, autocast=True),
    Format("bfloat16", "rnnfast", 16, dtype=torch.bfloat16),
)
FORMATS = {f.name: f for f in _ALL}
"""torch first, whose float32 the others are checked against."""


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Also a decorator. The setting belongs to the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def under_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward only, as torch advises: the backward pass takes the types that the forward pass took."""
    return torch.autocast("cpu", torch.bfloat16)(forward)


def prepare(module: nn.Module, f: Format) -> nn.Module:
    """The module itself, with parameters of the format's dtype, under autocast if that is what the format says."""
    module.to(f.dtype)
    if f.autocast:
        module.forward = under_autocast(module.forward)
    return module


@lru_cache
def refusal(f: Format, cell: str) -> str:
    """What torch says if it has no such layer on this CPU; '' if it has. rnnfast has all of them everywhere."""
    if f.library != "torch":
        return ""
    module = prepare(make_module(torch.nn, Shape(cell, T=2, B=1, I=2, H=2)), f)
    try:
        module(torch.zeros(2, 1, 2, dtype=f.dtype))[0].sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
