"""What autograd hands out and asks back: checkpoints, hooks on saved tensors, only the gradients asked for, the same
bits every time; and gradients of each sample for Opacus."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import LARGE, Case, make_inputs, make_module
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast._autograd import op
from rnnfast._backends import cpu, schema

EXAMPLES = [
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2),
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2, proj=4, bias=False),
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2, lengths=(5, 3, 2)),
    Case("RNN_TANH", T=5, B=3, I=3, H=6, L=2, D=2),
    Case("RNN_RELU", T=5, B=3, I=3, H=6, L=2, lengths=(5, 3, 2)),
]
every_example = pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.id)


class Problem:
    """A layer, its leaves (x, the initial states, the weights), and one smooth number of all its outputs."""

    def __init__(self, case: Case, library: Any = rnnfast, dtype: torch.dtype = torch.float64) -> None:
        inputs = make_inputs(case, dtype)
        self.module = make_module(library, case, inputs)
        self.packed = inputs.packed
        leaves = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0}
        leaves = {name: a.clone().requires_grad_() for name, a in leaves.items() if a is not None}
        self.leaves = leaves | dict(self.module.named_parameters())

    def outputs(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, state = self.module(
            x if self.packed is None else self.packed._replace(data=x), states if len(states) == 2 else states[0]
        )
        return y if self.packed is None else y.data, *(state if isinstance(state, tuple) else (state,))

    def loss(self, run: Callable[..., Any] = lambda function, *inputs: function(*inputs)) -> Tensor:
        states = [self.leaves[name] for name in ("h0", "c0") if name in self.leaves]
        return sum(output.sin().sum() for output in run(self.outputs, self.leaves["x"], *states))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.leaves.values()), retain_graph=True))

    def second(self, loss: Tensor) -> list[Tensor]:
        """Gradients of the squared norm of the gradients."""
        leaves = list(self.leaves.values())
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    def third(self, loss: Tensor) -> list[Tensor]:
        """Gradients of a number of gradients of the squared norm of the gradients."""
        leaves = list(self.leaves.values())
        for _ in range(2):
            loss = sum(g.square().sum() for g in torch.autograd.grad(loss, leaves, create_graph=True))
        return list(torch.autograd.grad(loss, leaves))


def assert_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------ checkpoints and saved tensors


@every_example
def test_checkpoint(case: Case) -> None:
    """Computed again instead of kept: the same bits, by both of torch's ways, and one more forward pass."""
    problem = Problem(case)
    want = problem.gradients(problem.loss())

    def run(function: Callable[..., Any], *inputs: Tensor) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False)

    assert_bits(problem.gradients(problem.loss(run)), want)
    problem.loss(lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=True)).backward()
    assert_bits([leaf.grad for leaf in problem.leaves.values()], want)


@every_example
def test_second_derivatives_of_a_checkpoint(case: Case) -> None:
    problem = Problem(case)
    loss = problem.loss(lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=False))
    assert_bits(problem.second(loss), problem.second(problem.loss()))


@every_example
def test_checkpoint_of_second_derivatives(case: Case) -> None:
    """The squared norm of gradients, computed again for its own gradient; what was saved is unpacked once."""
    problem = Problem(case)
    leaves = list(problem.leaves.values())

    def norm(*_: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(problem.loss(), leaves, create_graph=True))

    got = torch.autograd.grad(checkpoint(norm, *leaves, use_reentrant=False), leaves)
    assert_bits(list(got), problem.second(problem.loss()))


def test_checkpoint_drops_what_it_dropped(monkeypatch) -> None:
    """The pass that is run again draws the same dropout masks."""
    torch.manual_seed(0)
    layer, x = rnnfast.LSTM(3, 4, 3, dropout=0.5), torch.randn(5, 2, 3)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        gradients.append(list(torch.autograd.grad(run(x)[0].sum(), list(layer.parameters()))))
    assert_bits(*gradients)


def every_second(a: Tensor) -> Tensor:
    return torch.stack([a, a + 1], dim=-1)[..., 0]


def one_byte_on(a: np.ndarray) -> Tensor:
    """Where no number should begin."""
    return torch.from_numpy(np.frombuffer(b"x" + a.tobytes(), dtype=a.dtype, offset=1).reshape(a.shape))


# What hooks may do to a saved tensor without changing a number.
HOOKS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": save_on_cpu,
    "clone": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "numpy": lambda: saved_tensors_hooks(lambda a: a.detach().numpy().copy(), torch.from_numpy),
    "strided": lambda: saved_tensors_hooks(lambda a: a, every_second),
    "unaligned": lambda: saved_tensors_hooks(lambda a: a.detach().numpy(), one_byte_on),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@every_example
@pytest.mark.parametrize("hooks", HOOKS)
def test_saved_tensors_hooks(case: Case, hooks: str) -> None:
    """Saved elsewhere, in another layout: the same bits, in derivatives of any order."""
    problem = Problem(case)
    want = problem.gradients(problem.loss()), problem.second(problem.loss())
    with HOOKS[hooks]():
        loss = problem.loss()
    assert_bits(problem.gradients(loss), want[0])
    assert_bits(problem.second(loss), want[1])
    with HOOKS[hooks]():
        assert_bits(problem.second(problem.loss()), want[1])
        third = problem.third(problem.loss())
    assert_close(third, problem.third(problem.loss()))  # torch's operators, whose bits depend on the layout


@every_example
def test_saved_tensors_in_fewer_bits(case: Case) -> None:
    """Quantised and back: every gradient is off by what quantising does, no more."""
    problem = Problem(case)
    want = problem.gradients(problem.loss())
    with saved_tensors_hooks(lambda a: (a.float(), a.dtype), lambda kept: kept[0].to(kept[1])):
        loss = problem.loss()
    for a, b in zip(problem.gradients(loss), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("unpack", "message"),
    [
        (lambda a: a.float(), "expected dtype"),
        (lambda a: a[:1], "expected shape"),
        (lambda a: a.to("meta"), "expected device cpu|on the CPU"),
    ],
)
def test_hooks_that_hand_back_something_else(unpack: Callable[[Tensor], Tensor], message: str) -> None:
    """One saved tensor after the other: refused, whichever it is, before a kernel reads it."""
    problem = Problem(EXAMPLES[0])
    count = 0

    def counted(a: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1, a

    with saved_tensors_hooks(counted, lambda kept: kept[1]):
        outputs = problem.outputs(*(problem.leaves[name] for name in ("x", "h0", "c0")))
    total = count
    assert total == 2 + len(problem.leaves)  # y, what the pass kept, the leaves
    for bad in range(total):
        count = 0
        with saved_tensors_hooks(counted, lambda kept, bad=bad: unpack(kept[1]) if kept[0] == bad else kept[1]):
            outputs = problem.outputs(*(problem.leaves[name] for name in ("x", "h0", "c0")))
        with pytest.raises(RuntimeError, match=message):
            outputs[0].sum().backward()


@pytest.mark.parametrize("name", ["x", "h0", "c0", "weight_hh_l1_reverse", "bias_ih_l0"])
def test_second_derivative_after_a_change_in_place(name: str) -> None:
    """As torch does for the first derivative (test_robust): the second one reads the same tensors again."""
    problem = Problem(EXAMPLES[0])
    leaves = list(problem.leaves.values())
    first = torch.autograd.grad(problem.loss(), leaves, create_graph=True)
    with torch.no_grad():
        problem.leaves[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


# --------------------------------------------------------------------------------- only what was asked for


class Wanted(list):
    """The names of the gradients that each call of the backward kernel computes, in order."""


@pytest.fixture
def wanted(monkeypatch) -> Wanted:
    calls, backward = Wanted(), cpu.backward

    def spy(past, cotangents, wanted, *rest):
        grads = backward(past, cotangents, wanted, *rest)
        assert [g is not None for g in grads.flat()] == [
            want and t is not None for want, t in zip(wanted, past.inputs.flat(), strict=True)
        ]
        calls.append([k for k, want in enumerate(wanted) if want])
        return grads

    monkeypatch.setattr(schema.cpu, "backward", spy)
    return calls


LEAVES = ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@pytest.mark.parametrize("asked", [("x",), ("h0", "c0"), ("h0",), ("weight_hh_l0",), ("x", "bias_ih_l0"), LEAVES])
def test_only_what_was_asked_for(asked: tuple[str, ...], wanted: Wanted) -> None:
    """That is, what requires a gradient. Of these torch.autograd.grad may be asked for fewer; an autograd.Function does
    not get to know that, but the same bits come out."""
    case = Case("LSTM", T=4, B=3, I=5, H=7)
    everything = Problem(case)
    want = dict(zip(LEAVES, everything.gradients(everything.loss()), strict=True))
    assert wanted.pop() == list(range(7))

    problem = Problem(case)
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(name in asked)
    assert_bits(list(torch.autograd.grad(problem.loss(), [problem.leaves[n] for n in asked])), [want[n] for n in asked])
    assert wanted.pop() == [LEAVES.index(name) for name in asked]

    assert not wanted

    got = torch.autograd.grad(everything.loss(), [everything.leaves[n] for n in asked])
    assert_bits(list(got), [want[n] for n in asked])


def test_frozen_layers_cost_nothing(wanted: Wanted) -> None:
    """Below what is trained no kernel goes back; nothing is kept, either, if nothing needs a gradient."""
    below, above = rnnfast.RNN(3, 4), rnnfast.RNN(4, 5)
    below.requires_grad_(False)
    y, _ = below(torch.randn(6, 2, 3))
    assert y.grad_fn is None
    above(y)[0].sum().backward()
    assert wanted == [[3, 4, 5, 6]]  # not x


def test_a_transform_asks_for_its_own_alone(wanted: Wanted) -> None:
    """Parameters that require a gradient belong to the graph outside, not to torch.func's."""
    layer, x = rnnfast.RNN(3, 4), torch.randn(6, 2, 3)
    with torch.no_grad():
        grad(lambda x: layer(x)[0].square().sum())(x)
    assert wanted == [[0]]


def test_unused(wanted: Wanted) -> None:
    layer = rnnfast.LSTM(3, 4, dtype=torch.float64)
    x, elsewhere = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, requires_grad=True)
    y, (h_n, c_n) = layer(x)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(y.sum(), [x, elsewhere], retain_graph=True)
    dx, nothing = torch.autograd.grad(y.sum(), [x, elsewhere], allow_unused=True, retain_graph=True)
    assert dx is not None and nothing is None
    (zeros,) = torch.autograd.grad(y[:0].sum(), [x], retain_graph=True)  # a gradient of zeros is a gradient
    assert torch.equal(zeros, torch.zeros_like(x))
    assert len(wanted) == 3
    (dx,) = torch.autograd.grad([y, h_n, c_n], [x], [None if t is None else torch.ones_like(t) for t in (y, h_n, c_n)])
    assert torch.isfinite(dx).all()


# --------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("case", [*LARGE[:3], *LARGE[5:]], ids=lambda case: case.id)
def test_deterministic(case: Case) -> None:
    """Forward, reverse, second order, forward mode, one over the other: run to run, and for 1, 2, 3 threads."""
    problem = Problem(case, dtype=torch.float32)
    leaves = tuple(problem.leaves.values())
    names = list(problem.leaves)[-len(list(problem.module.parameters())) :]
    generator = torch.Generator().manual_seed(0)
    direction = tuple(torch.randn(leaf.shape, generator=generator) for leaf in leaves)
    states = len(leaves) - len(names) - 1

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, *rest = leaves
        hx = tuple(rest[:states]) if states == 2 else rest[0]
        weights = dict(zip(names, rest[states:], strict=True))
        data = x if problem.packed is None else problem.packed._replace(data=x)
        y, state = functional_call(problem.module, weights, (data, hx))
        return y if problem.packed is None else y.data, *(state if states == 2 else (state,))

    def number(*leaves: Tensor) -> Tensor:
        return sum(output.double().sin().sum() for output in outputs(*leaves))

    def everything() -> list[Tensor]:
        primal, tangent = jvp(outputs, leaves, direction)
        slope, curve = jvp(grad(number, tuple(range(len(leaves)))), leaves, direction)
        reverse = problem.second(number(*leaves))
        return [*primal, *tangent, *slope, *curve, *reverse]

    torch.use_deterministic_algorithms(True)
    try:
        torch.set_num_threads(1)
        want = everything()
        assert all(torch.isfinite(t).all() for t in want)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_bits(everything(), want)
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------- frameworks that want a gradient for each sample


class Sequences(rnnfast.LSTM):
    """The adapter that the README shows: only the output sequence, since Opacus knows layers of one tensor."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[0]


class States(rnnfast.RNN):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[0]


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            Sequences(3, 5, 2, bidirectional=True, batch_first=True), States(10, 4, batch_first=True), nn.Linear(4, 2)
        )

    def loss(self, x: Tensor) -> Tensor:
        return self(x)[:, -1].square().sum()


@pytest.fixture
def kernel_calls(monkeypatch) -> list[torch.Size]:
    calls, recurrent = [], op.recurrent
    monkeypatch.setattr(op, "recurrent", lambda mode, x, *rest: calls.append(x.shape) or recurrent(mode, x, *rest))
    return calls


@pytest.fixture
def per_sample() -> tuple[Classifier, Tensor, list[Tensor]]:
    """A model, x (B,T,I), and its weight gradients (B,...) from one sequence after the other."""
    torch.manual_seed(0)
    model, x = Classifier().double(), torch.randn(6, 7, 3, dtype=torch.float64)
    weights = list(model.parameters())
    each = [torch.autograd.grad(model.loss(x[b : b + 1]), weights) for b in range(len(x))]
    return model, x, [torch.stack(gradients) for gradients in zip(*each, strict=True)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_of_a_layer_from_its_outputs(per_sample, kernel_calls) -> None:
    """What Opacus does, without it: functional_call on a copy of each layer whose own weights have no numbers."""
    model, x, want = per_sample
    layer = model[0]
    y = layer(x).detach().requires_grad_()  # (B,T,D*R)
    (dy,) = torch.autograd.grad(model[2](model[1](y))[:, -1].square().sum(), y)
    stateless = copy.deepcopy(layer).to("meta")

    def loss(weights: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(stateless, weights, x.unsqueeze(0)) * dy.unsqueeze(0)).sum()

    weights = {name: p.detach() for name, p in layer.named_parameters()}
    before = len(kernel_calls)
    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, dy)
    assert_close(list(got.values()), want[: len(got)])
    assert len(kernel_calls) == before + 1  # for all samples


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("force_functorch", [False, True])
def test_opacus(per_sample, force_functorch: bool) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model, x, want = per_sample
    wrapped = grad_sample.GradSampleModule(model, loss_reduction="sum", force_functorch=force_functorch)
    wrapped(x)[:, -1].square().sum().backward()
    assert_close([p.grad_sample for p in model.parameters()], want)
