"""Second derivatives for groups of sequences, group by group, as if each were a batch of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rnnfast._backends.sizes import shapes_of, sizes_of_call
from rnnfast._backends.types import Constants, Inputs, Outputs, Past, SomeInputs, SomeOutputs


class _Part:
    """The sequences b with b % groups = g of a batch: where their rows and states are."""

    def __init__(self, g: int, groups: int, batch_sizes: Tensor | None, device: torch.device) -> None:
        self.states: Any = slice(g, None, groups)  # of the batch dimension
        self.batch_sizes: Tensor | None = None
        self.rows: Any = self.states
        if batch_sizes is not None:
            counts = batch_sizes.tolist()
            firsts = accumulate(counts, initial=0)
            rows = [row + b for row, n in zip(firsts, counts, strict=False) for b in range(g, n, groups)]
            self.rows = torch.tensor(rows, device=device)
            self.batch_sizes = torch.tensor([len(range(g, n, groups)) for n in counts if n > g], device="cpu")

    def at(self, k: int, packed: bool) -> Any:
        """Index of tensor k of (rows, states, states)"""
        return self.rows if k == 0 and packed else (slice(None), self.rows if k == 0 else self.states)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """From (T,B,...) or (N,...)"""
        return tensor[self.at(0, self.batch_sizes is not None)]

    def of(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """From tensors (T,B,...) or (N,...), (L*D,B,...), (L*D,B,...)"""
        packed = self.batch_sizes is not None
        return [None if t is None else t[self.at(k, packed)] for k, t in enumerate(tensors)]


Second: TypeAlias = Callable[..., tuple[Outputs, SomeInputs, SomeInputs]]  # Backend.second


def second_by_groups(
    second: Second,
    past: Past,
    tangents: SomeInputs,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
    groups: int,
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See Backend.second, of which `second` is one without groups."""
    stack, inputs, (batch_sizes, dropout, resets) = past.stack, past.inputs, past.constants
    packed = batch_sizes is not None
    B = inputs.x.size(1) if batch_sizes is None else int(batch_sizes[0])
    if B % groups:
        raise ValueError(f"groups: expected a divisor of the batch {B}, got {groups}")
    parts = [_Part(g, groups, batch_sizes, inputs.x.device) for g in range(groups)]
    results = []
    for part in parts:
        masks = None if dropout is None else torch.stack([part.rows_of(mask) for mask in dropout])
        constants = Constants(part.batch_sizes, masks, None if resets is None else part.rows_of(resets))
        here = Inputs.of([*part.of(inputs[:3]), *inputs.weights])  # type: ignore[list-item]
        own = Past(stack, here, constants, past.y, past.reserve)
        along = SomeInputs.of([*part.of(tangents[:3]), *tangents.weights])
        cotangents = (SomeOutputs(*part.of(some)) for some in (first, plain))
        results.append(second(own, along, *cotangents, wanted_first, wanted_plain))

    shapes = shapes_of(sizes_of_call(stack, inputs, batch_sizes), inputs.x.dtype)

    def joined(some: Sequence[Sequence[Tensor | None]], shapes: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
        whole = [None if t is None else t.new_empty(shape) for t, shape in zip(some[0], shapes, strict=True)]
        for part, tensors in zip(parts, some, strict=True):
            for k, (t, one) in enumerate(zip(whole, tensors, strict=True)):
                if t is not None and one is not None:
                    t[part.at(k, packed)] = one
        return whole

    def gradients(some: Sequence[SomeInputs]) -> SomeInputs:
        weights = zip(*(one.weights for one in some), strict=True)
        stacked = [None if one[0] is None else torch.stack(one) for one in weights]
        return SomeInputs.of([*joined([one[:3] for one in some], shapes.inputs.shapes[:3]), *stacked])

    outputs, firsts, plains = zip(*results, strict=True)
    whole = Outputs(*joined(outputs, shapes.outputs.shapes))  # type: ignore[arg-type]
    return whole, gradients(firsts), gradients(plains)
