"""The cells that there are: what csrc/cells says of each, and the same cell in torch's operators.

A step of a cell begins with pre-activations z (...,G,H): `activate` makes gates of them, `carry` a new state of gates
and state, `output` h_t of both. The torch side is what everything without a kernel is made of (`composite.py` takes its
derivatives from it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _C


class Nonlinearity(NamedTuple):
    """a(z), its slope as a function of a, and its scale s(a) = integral of sqrt(slope) dz."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]


TANH = Nonlinearity(torch.tanh, lambda a: 1 - a * a, lambda a: a.clamp(-1, 1).arcsin())
SIGMOID = Nonlinearity(torch.sigmoid, lambda a: a * (1 - a), lambda a: (2 * a - 1).clamp(-1, 1).arcsin())
RELU = Nonlinearity(torch.relu, lambda a: (a > 0).to(a.dtype), torch.clone)


@dataclass(frozen=True)
class Cell:
    """A cell without a state: h_t is its only gate."""

    mode: str  # torch's name, as in the attribute `mode` of its modules
    traits: _C.Cell  # of csrc/cells
    nonlinearities: tuple[Nonlinearity, ...]  # of each gate

    def __post_init__(self) -> None:
        for name in ("index", "gates", "saves_gates", "projects"):
            object.__setattr__(self, name, getattr(self.traits, name))
        object.__setattr__(self, "has_c", self.traits.has_state)

    index: int = 0
    gates: int = 0
    saves_gates: bool = False
    projects: bool = False
    has_c: bool = False  # a state c beside h

    def weight_shapes(self, H: int, I: int, P: int, bias: bool) -> list[tuple[int, ...]]:  # noqa: E741
        """Of one layer and direction with I inputs, as torch orders them."""
        G = self.gates
        shapes: list[tuple[int, ...]] = [(G * H, I), (G * H, P or H)]
        shapes += [(G * H,)] * 2 if bias else []
        return shapes + ([(P, H)] if P else [])

    def activate(self, z: Tensor) -> Tensor:
        """The gates (...,G,H) of pre-activations z."""
        return self._each(lambda kind, z: kind.apply(z), z)

    def slopes(self, a: Tensor) -> Tensor:
        """da/dz (...,G,H) of gates a."""
        return self._each(lambda kind, a: kind.slope(a), a)

    def scales(self, a: Tensor) -> Tensor:
        """The scale (...,G,H) on which each nonlinearity bends the same everywhere, of gates a."""
        return self._each(lambda kind, a: kind.scale(a), a)

    def _each(self, f: Callable[[Nonlinearity, Tensor], Tensor], gates: Tensor) -> Tensor:
        if len(self.nonlinearities) == 1:
            return f(self.nonlinearities[0], gates)
        return torch.stack([f(*pair) for pair in zip(self.nonlinearities, gates.unbind(-2), strict=True)], -2)

    def carry(self, a: Tensor, state: Tensor | None) -> Tensor | None:
        """The state (...,H) after a step with gates a, of that before it."""
        return None

    def output(self, a: Tensor, state: Tensor | None) -> Tensor:
        """h (...,H) of gates a and the state after the step, before a projection."""
        return a[..., 0, :]


class Lstm(Cell):
    def carry(self, a: Tensor, state: Tensor | None) -> Tensor:
        assert state is not None
        i, f, g, _ = a.unbind(-2)
        return f * state + i * g

    def output(self, a: Tensor, state: Tensor | None) -> Tensor:
        assert state is not None
        return a[..., 3, :] * state.tanh()


def _cells() -> Sequence[Cell]:
    traits = {one.name: one for one in _C.cells()}
    known = [
        Cell("RNN_TANH", traits["tanh"], (TANH,)),
        Cell("RNN_RELU", traits["relu"], (RELU,)),
        Lstm("LSTM", traits["lstm"], (SIGMOID, SIGMOID, TANH, SIGMOID)),
    ]
    return sorted(known, key=lambda cell: cell.index)


CELLS = tuple(_cells())
BY_MODE = {cell.mode: cell for cell in CELLS}
