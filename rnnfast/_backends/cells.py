"""The cells that there are: what csrc/cells says of each, and the same cell in torch's operators.

A step of a cell begins with pre-activations z (...,G,H), a slot for each gate: W_ih x + b_ih adds to the slots `input`,
W_hh h + b_hh to the slots `recurrent`. `activate` makes gates of them, `carry` a new state of gates and state, `output`
h_t of both. The torch side is what everything without a kernel is made of; `composite.py` takes its derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _C


class Nonlinearity(NamedTuple):
    """a(u), its slope as a function of a, and its scale s(a) = integral of sqrt(slope) du, on which it bends the same
    everywhere."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]


TANH = Nonlinearity(torch.tanh, lambda a: 1 - a * a, lambda a: a.clamp(-1, 1).arcsin())
SIGMOID = Nonlinearity(torch.sigmoid, lambda a: a * (1 - a), lambda a: (2 * a - 1).clamp(-1, 1).arcsin())
RELU = Nonlinearity(torch.relu, lambda a: (a > 0).to(a.dtype), torch.clone)
LINEAR = Nonlinearity(torch.clone, torch.ones_like, torch.zeros_like)  # bends nowhere: no scale


class Cell:
    """A cell whose h_t is its only gate; others are its subclasses.

    Attributes:
        mode: torch's name of it, as in the attribute `mode` of its modules; name: that of csrc/cells.
        index: its place in CELLS and in csrc/cells/list.h.
        gates: G, slots of pre-activations.
        input, recurrent: the slots that W_ih x and W_hh h add to.
        torch_gates: of each slot, which gate of torch's W_ih and W_hh belongs to it.
        has_c: carries a state c beside h; else `carries_h`, the state is h itself, or there is none.
        saves_gates: a training pass saves its gates; else they are h.
        projects: may have W_hr.
        unit_parameters: U, parameters of each unit beside the weights.
    """

    def __init__(self, mode: str, traits: _C.Cell, nonlinearities: Sequence[Nonlinearity]) -> None:
        self.mode, self.name, self.index, self.gates = mode, traits.name, traits.index, traits.gates
        self.input, self.recurrent = (
            slice(first, first + count) for first, count in (traits.input_gates, traits.recurrent_gates)
        )
        self.torch_gates = tuple(traits.torch_gates)
        self.has_c, self.carries_h = traits.state == "own", traits.state == "output"
        self.saves_gates, self.projects, self.unit_parameters = (
            traits.saves_gates,
            traits.projects,
            traits.unit_parameters,
        )
        self.nonlinearities = tuple(nonlinearities)

    def weights_each(self, bias: bool, projected: bool) -> int:
        """Weights of one layer and direction."""
        return 2 + 2 * bias + projected + (self.unit_parameters > 0)

    def are_matrices(self, bias: bool, projected: bool) -> list[bool]:
        """Which weights of one layer and direction enter products with rows on the left."""
        return [True, True, *[False] * (2 * bias), *[True] * projected, *[False] * (self.unit_parameters > 0)]

    def weight_shapes(self, H: int, I: int, P: int, bias: bool) -> list[tuple[int, ...]]:  # noqa: E741
        """Of one layer and direction with I inputs, as torch orders them."""
        rows = [len(self.torch_gates[slots]) * H for slots in (self.input, self.recurrent)]
        shapes: list[tuple[int, ...]] = [(rows[0], I), (rows[1], P or H)]
        shapes += [(n,) for n in rows] if bias else []
        shapes += [(P, H)] if P else []
        return shapes + ([(self.unit_parameters, H)] if self.unit_parameters else [])

    def to_slots(self, w: Tensor, slots: slice) -> Tensor:
        """Rows (g*H,...) of torch's weights as (g,H,...), in the order of `input` or `recurrent`."""
        gates = self.torch_gates[slots]
        w = w.unflatten(0, (len(gates), -1))
        return w if gates == tuple(range(len(gates))) else torch.stack([w[gate] for gate in gates])

    def in_torch_order(self, slots: slice) -> slice | list[int]:
        """The same slots in the order of torch's gates."""
        gates = self.torch_gates[slots]
        if gates == tuple(range(len(gates))):
            return slots
        return [slots.start + gates.index(gate) for gate in range(len(gates))]

    def pre_activations(self, zx: Tensor, zh: Tensor) -> Tensor:
        """z (n,G,H) of W_ih x + b_ih (n,g,H) and W_hh h + b_hh (n,g,H) in the order of slots."""
        if self.input == self.recurrent:
            return zx + zh
        z = torch.nn.functional.pad(zx, (0, 0, self.input.start, self.gates - self.input.stop))
        return z + torch.nn.functional.pad(zh, (0, 0, self.recurrent.start, self.gates - self.recurrent.stop))

    def activate(self, z: Tensor) -> Tensor:
        """The gates (...,G,H) of pre-activations z."""
        return self._each(lambda kind, u: kind.apply(u), z)

    def slopes(self, a: Tensor) -> Tensor:
        """da/du (...,G,H) of gates a and what their nonlinearities are applied to."""
        return self._each(lambda kind, a: kind.slope(a), a)

    def scales(self, a: Tensor) -> Tensor:
        """s (...,G,H) of gates a, see Nonlinearity."""
        return self._each(lambda kind, a: kind.scale(a), a)

    def scale_slopes(self, a: Tensor) -> Tensor:
        """ds/du (...,G,H) of gates a."""
        bends = torch.tensor([kind is not LINEAR for kind in self.nonlinearities], device=a.device)
        return self.slopes(a).clamp_(min=0).sqrt_().mul_(bends.to(a.dtype).unsqueeze(-1))

    def pull(self, a: Tensor, du: Tensor) -> Tensor:
        """dL/dz of dL/du, where u is what the nonlinearities are applied to."""
        return du

    def push(self, a: Tensor, dz: Tensor) -> Tensor:
        """The tangent of u along that of z."""
        return dz

    def _each(self, f: Callable[[Nonlinearity, Tensor], Tensor], gates: Tensor) -> Tensor:
        if len(self.nonlinearities) == 1:
            return f(self.nonlinearities[0], gates)
        return torch.stack([f(*pair) for pair in zip(self.nonlinearities, gates.unbind(-2), strict=True)], -2)

    def carry(self, a: Tensor, state: Tensor | None, unit: Tensor | None = None) -> Tensor | None:
        """The state (...,H) after a step with gates a, of that before it and the unit parameters (U,H)."""
        return None

    def keep(self, a: Tensor, unit: Tensor | None = None) -> Tensor:
        """The share (...,H) of the state that `carry` keeps."""
        raise NotImplementedError(f"a {self.mode} has no state")

    def output(self, a: Tensor, state: Tensor | None) -> Tensor:
        """h (...,H) of gates a and the state after the step, before a projection."""
        return a[..., 0, :] if state is None else state


class Lstm(Cell):
    def carry(self, a: Tensor, state: Tensor | None, unit: Tensor | None = None) -> Tensor:
        assert state is not None
        i, f, g, _ = a.unbind(-2)
        return f * state + i * g

    def keep(self, a: Tensor, unit: Tensor | None = None) -> Tensor:
        return a[..., 1, :]

    def output(self, a: Tensor, state: Tensor | None) -> Tensor:
        assert state is not None
        return a[..., 3, :] * state.tanh()


class Gru(Cell):
    """Slots x_n,r,z,h_n, gates n,r,z,h_n; n = tanh(x_n + r * h_n)."""

    def activate(self, z: Tensor) -> Tensor:
        r, u, h_n = z[..., 1, :].sigmoid(), z[..., 2, :].sigmoid(), z[..., 3, :]
        return torch.stack([(z[..., 0, :] + r * h_n).tanh(), r, u, h_n], -2)

    def pull(self, a: Tensor, du: Tensor) -> Tensor:
        _, r, _, h_n = a.unbind(-2)
        d_n, d_r, d_z, d_h_n = du.unbind(-2)
        return torch.stack([d_n, d_r + d_n * h_n * r * (1 - r), d_z, d_h_n + d_n * r], -2)

    def push(self, a: Tensor, dz: Tensor) -> Tensor:
        _, r, _, h_n = a.unbind(-2)
        x_n, d_r, d_z, d_h_n = dz.unbind(-2)
        return torch.stack([x_n + d_r * h_n * r * (1 - r) + d_h_n * r, d_r, d_z, d_h_n], -2)

    def carry(self, a: Tensor, state: Tensor | None, unit: Tensor | None = None) -> Tensor:
        assert state is not None
        n, _, z, _ = a.unbind(-2)
        return n + z * (state - n)

    def keep(self, a: Tensor, unit: Tensor | None = None) -> Tensor:
        return a[..., 2, :]


class Leaky(Cell):
    def carry(self, a: Tensor, state: Tensor | None, unit: Tensor | None = None) -> Tensor:
        assert state is not None and unit is not None
        return (1 - unit[0]) * state + unit[0] * a[..., 0, :]

    def keep(self, a: Tensor, unit: Tensor | None = None) -> Tensor:
        assert unit is not None
        return (1 - unit[0]).expand_as(a[..., 0, :])


def _cells() -> Sequence[Cell]:
    traits = {one.name: one for one in _C.cells()}
    known = [
        Cell("RNN_TANH", traits["tanh"], [TANH]),
        Cell("RNN_RELU", traits["relu"], [RELU]),
        Lstm("LSTM", traits["lstm"], [SIGMOID, SIGMOID, TANH, SIGMOID]),
        Gru("GRU", traits["gru"], [TANH, SIGMOID, SIGMOID, LINEAR]),
        Leaky("LEAKY_TANH", traits["leaky_tanh"], [TANH]),
        Leaky("LEAKY_RELU", traits["leaky_relu"], [RELU]),
    ]
    return sorted(known, key=lambda cell: cell.index)


CELLS = tuple(_cells())
BY_MODE = {cell.mode: cell for cell in CELLS}
