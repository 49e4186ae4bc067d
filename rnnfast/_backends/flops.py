"""What the ops of `rnnfast._backends.schema` count for `torch.utils.flop_counter`: 2 m n k for each matrix product.

A sweep, one layer in one direction, multiplies its rows with up to three weights, w_ih, w_hh and w_hr; each product
takes 2 * rows * (numbers in the weight). Counted is what torch's operators take for the same derivative, product by
product: that of the first step with h_0 = 0, too, and only those that the wanted gradients or the given tangents need.
Packed rows whose lengths are unknown, those of fake tensors, count as if no step were the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends.cpu import Inputs, Stack

Flags = Sequence[bool]  # of x, h0, c0 and each weight: has it a tangent, or a gradient that is wanted?


class _Sweep(NamedTuple):
    """What the products of all rows with each weight take, and with w_hh those of the step that comes first."""

    ih: int
    hh: int
    hr: int  # 0 without projection
    first: int

    def products(self, ih: bool, hh: bool, hr: bool, h0: bool = True) -> int:
        return ih * self.ih + hh * (self.hh - (not h0) * self.first) + hr * self.hr


class _Reach(NamedTuple):
    """The flags of a sweep: of what it reads, what it gives, the state before it, its weights."""

    x: bool
    y: bool
    h0: bool
    ih: bool
    hh: bool
    hr: bool


class Products:
    """The matrix products of a call."""

    def __init__(self, stack: Stack, inputs: Inputs, batch_sizes: Tensor | None) -> None:
        x, weights, ways = inputs.x, inputs.weights, stack.L * stack.D
        self.stack, self.per = stack, len(weights) // ways
        N, first = x.size(0) * (x.size(1) if batch_sizes is None else 1), _first_rows(x, batch_sizes)
        self.sweeps = []
        for i in range(ways):
            own = [2 * w.numel() for w in weights[i * self.per :][: self.per]]
            hr = own[-1] if stack.units(weights)[2] else 0
            self.sweeps.append(_Sweep(N * own[0], N * own[1], N * hr, first[i % stack.D] * own[1]))

    def forward(self) -> int:
        return sum(sweep.products(True, True, True) for sweep in self.sweeps)

    def linear(self, flags: Flags) -> int:
        """Of the outputs' tangents along some inputs, or of these inputs' gradients: the same products, transposed."""
        pairs = zip(self.sweeps, self._reaches(flags), strict=True)
        return sum(s.products(r.x, r.y, r.y, r.h0) + s.products(r.ih, r.hh, r.hr) for s, r in pairs)

    def second(self, moved: Flags, wanted: Flags) -> int:
        """Of a tangent, and of its gradients as far as an input enters it itself: those of a weight by what it
        multiplies, those of what a weight's tangent multiplies."""
        triples = zip(self.sweeps, self._reaches(moved), self._reaches(wanted), strict=True)
        return self.linear(moved) + sum(_cross(s, m, w) + _cross(s, w, m) for s, m, w in triples)

    def _reaches(self, flags: Flags) -> Iterator[_Reach]:
        x, h0, c0, *weights = flags
        for layer in range(self.stack.L):
            y = False
            for d in range(self.stack.D):
                own = weights[(layer * self.stack.D + d) * self.per :][: self.per]
                reached = x or h0 or c0 or any(own)
                yield _Reach(x, reached, h0, own[0], own[1], own[-1])
                y = y or reached
            x = y


def _cross(sweep: _Sweep, a: _Reach, b: _Reach) -> int:
    return sweep.products(a.ih and b.x, a.hh and b.y, a.hr and b.y, b.h0)


def _first_rows(x: Tensor, batch_sizes: Tensor | None) -> tuple[int, int]:
    """How many rows the step has that comes first, of each direction."""
    if batch_sizes is None:
        return x.size(1), x.size(1)
    if type(batch_sizes) is not Tensor:
        return 0, 0
    with torch._C._DisableTorchDispatch():
        return int(batch_sizes[0]), int(batch_sizes[-1])
