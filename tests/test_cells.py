"""Every cell by every way that there is: the kernels of the CPU, a GPU's way by torch's operators, torch's operators.

All passes of all of them agree in float64, for all cells of csrc/cells, with episodes and without.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast._backends import composite, cpu, cuda
from rnnfast._backends.cells import CELLS, Cell
from rnnfast._backends.types import Constants, Inner, Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack

I, H, T, B, L = 4, 6, 7, 4, 2  # noqa: E741
BATCH_SIZES = torch.tensor([4, 4, 3, 3, 2, 1, 1])

every = [
    pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.mode),
    pytest.mark.parametrize("D", [1, 2]),
    pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"]),
    pytest.mark.parametrize("resets", [False, True], ids=["", "resets"]),
]


class Drawn:
    """A call of a stack of two layers in float64, and directions and cotangents for all of it."""

    def __init__(self, cell: Cell, D: int, packed: bool, resets: bool, P: int = 0) -> None:
        torch.manual_seed(0)
        rows = (int(BATCH_SIZES.sum()),) if packed else (T, B)
        R = P or H
        self.stack = Stack(cell.index, L, D, True)
        weights: list[Tensor] = []
        for layer in range(L):
            shapes = cell.weight_shapes(H, D * R if layer else I, P, True)
            for _ in range(D):
                own = [self.normal(*shape) / H**0.5 for shape in shapes]
                if cell.unit_parameters:
                    own[-1] = own[-1].sigmoid()
                weights += own
        c0 = self.normal(L * D, B, H) if cell.has_c else None
        self.inputs = Inputs(self.normal(*rows, I), self.normal(L * D, B, R), c0, weights)
        self.constants = Constants(
            BATCH_SIZES if packed else None,
            torch.rand(L - 1, *rows, D * R, dtype=torch.float64).round() * 2,
            torch.rand(rows) < 0.3 if resets else None,
        )
        self.along = SomeInputs.of(None if t is None else torch.randn_like(t) for t in self.inputs.flat())
        self.wanted = [t is not None for t in self.inputs.flat()]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def past(self, backend) -> tuple[Outputs, Past]:
        outputs, reserve = backend.forward(self.stack, self.inputs, self.constants, True)
        return outputs, Past(self.stack, self.inputs, self.constants, outputs.y, reserve)

    def like(self, outputs: Outputs) -> SomeOutputs:
        return SomeOutputs(*(None if t is None else torch.randn_like(t) for t in outputs))


def assert_close(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def with_every(test):
    for mark in every:
        test = mark(test)
    return test


@with_every
def test_all_passes(cell: Cell, D: int, packed: bool, resets: bool) -> None:
    d = Drawn(cell, D, packed, resets)
    outputs, past = d.past(cpu)
    want, trace = composite.trace_of(d.stack, d.inputs, d.constants)
    assert_close(outputs, want)
    assert_close([cpu.states(past), cpu.hidden(past)], [trace.c, trace.hidden])
    assert_close([cpu.activations(past)], [cell.activate(trace.z)])

    _, dots, z_dot = composite.with_tangents(d.stack, d.inputs, d.along, d.constants)
    z = torch.empty_like(z_dot)
    assert_close(cpu.tangent(past, d.along, z), dots)
    assert_close([z], [z_dot])
    still = SomeInputs(*d.along[:3], [None] * len(d.inputs.weights))
    both = cpu.forward_dual(d.stack, d.inputs, d.constants, still)
    assert_close([*both[0], *both[1]], [*want, *composite.with_tangents(d.stack, d.inputs, still, d.constants)[1]])

    first, plain = d.like(outputs), d.like(outputs)
    got = cpu.second(past, d.along, first, plain, d.wanted, d.wanted)
    exact = composite.second(d.stack, d.inputs, d.along, d.constants, first, plain, d.wanted, d.wanted)
    assert_close(got[0], exact[0])
    assert_close([*got[1].flat(), *got[2].flat()], [*exact[1].flat(), *exact[2].flat()])


@with_every
def test_the_way_of_a_gpu(cell: Cell, D: int, packed: bool, resets: bool) -> None:
    d = Drawn(cell, D, packed, resets)
    (outputs, past), (others, other) = d.past(cpu), d.past(cuda)
    assert_close(others, outputs)
    cotangents = d.like(outputs)
    c, hidden = cpu.states(past), cpu.hidden(past)
    inner = Inner(
        torch.randn_like(cpu.activations(past)), None if c is None else torch.randn_like(c), torch.randn_like(hidden)
    )
    for more in (Inner(), inner):
        want, got = (f.backward(p, cotangents, d.wanted, 1, more).flat() for f, p in ((cpu, past), (cuda, other)))
        assert_close(got, want)
    assert_close(cuda.sweep_back(other, cotangents), cpu.sweep_back(past, cotangents))
    assert_close([cuda.activations(other), cuda.hidden(other)], [cpu.activations(past), hidden])


@with_every
def test_groups(cell: Cell, D: int, packed: bool, resets: bool) -> None:
    """Weight gradients of each group are those of its sequences alone."""
    if packed:
        pytest.skip("groups divide the batch at every step")
    d = Drawn(cell, D, packed, resets)
    outputs, past = d.past(cpu)
    cotangents = d.like(outputs)
    grads = cpu.backward(past, cotangents, d.wanted, 2)
    assert_close(cuda.backward(d.past(cuda)[1], cotangents, d.wanted, 2).flat(), grads.flat())
    for g in range(2):
        own = slice(g, None, 2)
        inputs = Inputs(
            d.inputs.x[:, own], *(None if s is None else s[:, own] for s in d.inputs[1:3]), d.inputs.weights
        )
        dropout, mask = d.constants.dropout, d.constants.resets
        constants = Constants(None, dropout[:, :, own], None if mask is None else mask[:, own])
        part, reserve = cpu.forward(d.stack, inputs, constants, True)
        given = SomeOutputs(*(None if t is None else t[:, own] for t in cotangents))
        alone = cpu.backward(Past(d.stack, inputs, constants, part.y, reserve), given, d.wanted)
        assert_close([w[g] for w in grads.weights], alone.weights)


def test_a_leak_of_one_is_elman() -> None:
    torch.manual_seed(0)
    x, rnn, leaky = torch.randn(9, 3, I), rnnfast.RNN(I, H, 2), rnnfast.LeakyRNN(I, H, 2)
    leaky.load_state_dict(rnn.state_dict(), strict=False)
    for a, b in zip(rnn(x), leaky(x), strict=True):
        assert torch.equal(a, b)
