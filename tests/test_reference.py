"""The NumPy reference itself: against torch's float64 layers, and against finite differences of itself.

The two are independent. torch says what has to be computed; finite differences say that backward is the
gradient of forward, dropout masks included (torch draws its own, so it cannot be asked about those).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import CASES, GRADCHECK_CASES, Case, error, make_inputs, run_reference, run_torch, scale

from rnnfast import reference

# Two float64 implementations of the same sums: a few thousand roundings of 2^-53 at most.
TOLERANCE = 1e-12


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_torch(case: Case) -> None:
    inputs = make_inputs(case)
    expected, got = run_torch(case, inputs), run_reference(case, inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        assert error(got[name], expected[name]) <= TOLERANCE * (1 + scale(expected[name])), name


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.id)
def test_gradient_is_derivative(case: Case) -> None:
    """d/ds loss(inputs + s * direction) at s = 0, by central differences, is <gradient, direction>."""
    inputs, random = make_inputs(case), np.random.default_rng(1)
    batch_sizes = None if inputs.packed is None else inputs.packed.batch_sizes.numpy()
    states = [np.zeros_like(inputs.dh_n) if inputs.h0 is None else inputs.h0.numpy()]
    if case.mode == "LSTM":
        states.append(np.zeros_like(inputs.dc_n) if inputs.c0 is None else inputs.c0.numpy())
    leaves = [inputs.x.numpy(), *states, *(w.numpy() for w in inputs.weights.values())]
    incoming = [a.numpy() for a in (inputs.dy, inputs.dh_n, inputs.dc_n) if a is not None]

    resets = None if inputs.resets is None else inputs.resets.numpy()

    def forward(leaves: list[np.ndarray]) -> tuple:
        x, h0, *rest = leaves
        c0 = rest.pop(0) if case.mode == "LSTM" else None
        options = case.L, case.D == 2, case.bias, inputs.dropout_masks, resets
        return reference.forward(case.mode, x, batch_sizes, h0, c0, rest, *options)

    def loss(leaves: list[np.ndarray]) -> float:
        return sum(float((a * da).sum()) for a, da in zip(forward(leaves), incoming, strict=False))

    d = reference.backward(forward(leaves)[-1], *incoming)
    gradients = [d.x, d.h0, *([] if d.c0 is None else [d.c0]), *d.weights]
    assert [g.shape for g in gradients] == [a.shape for a in leaves]

    step = 5e-5  # truncation ~step⁴ = 1e-17, rounding ~1e-16 / step = 1e-12; relu bends no closer
    for k, gradient in enumerate(gradients):  # one leaf at a time, so that no error hides behind another leaf
        direction = random.standard_normal(leaves[k].shape)
        near, far = (
            loss([a + s * direction if j == k else a for j, a in enumerate(leaves)])
            - loss([a - s * direction if j == k else a for j, a in enumerate(leaves)])
            for s in (step, 2 * step)
        )
        slope = (8 * near - far) / (12 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7, abs=1e-8)


def test_dropout_masks_stand_between_layers() -> None:
    """A mask of zeros cuts the second layer off from the first; a mask of ones changes nothing."""
    case = Case("LSTM", T=4, B=2, I=3, H=5, L=2)
    inputs = make_inputs(case)
    arguments = ("LSTM", inputs.x, None, inputs.h0, inputs.c0, list(inputs.weights.values()), 2, False, True)
    plain = reference.forward(*arguments)
    ones = reference.forward(*arguments, np.ones((1, 4, 2, 5)))
    assert np.array_equal(plain[0], ones[0])

    y, _, _, tape = reference.forward(*arguments, np.zeros((1, 4, 2, 5)))
    assert not np.array_equal(plain[0], y)
    d = reference.backward(tape, np.ones_like(y), np.zeros((2, 2, 5)), np.zeros((2, 2, 5)))
    assert not d.x.any()
    assert not any(dw.any() for dw in d.weights[:4])  # the first layer
    assert all(dw.any() for dw in d.weights[5:])  # the second layer, but for w_ih, whose input is zero
    assert not d.weights[4].any()


def test_sigmoid_is_exact_at_the_ends() -> None:
    z = np.array([-np.inf, -800.0, 0.0, 800.0, np.inf, np.nan])
    with np.errstate(over="raise"):
        np.testing.assert_array_equal(reference.sigmoid(z), [0.0, 0.0, 0.5, 1.0, 1.0, np.nan])


class Stack(NamedTuple):
    """A padded or packed batch of four sequences through a stack of two layers, H = 5."""

    mode: str
    D: int
    bias: bool
    packed: bool

    T, B, I, H, L = 6, 4, 3, 5, 2  # noqa: E741

    @property
    def sizes(self) -> np.ndarray:
        return np.array([4, 4, 3, 3, 1, 1]) if self.packed else np.full(self.T, self.B)

    @property
    def has_c(self) -> bool:
        return reference.CELLS[self.mode].has_c

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """x, h0, c0 and weights as w0, w1, ...; of another seed a direction in their space."""
        random, cell = np.random.default_rng(seed), reference.CELLS[self.mode]
        rows, states = (int(self.sizes.sum()),) if self.packed else (self.T, self.B), (self.L * self.D, self.B, self.H)
        arrays = {"x": random.standard_normal((*rows, self.I)), "h0": random.standard_normal(states)}
        arrays |= {"c0": random.standard_normal(states)} if self.has_c else {}
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.L):
            GH = cell.gates * self.H
            one: list[tuple[int, ...]] = [(GH, self.D * self.H if layer else self.I), (GH, self.H)]
            one += [(GH,)] * 2 * self.bias + [(cell.unit_parameters, self.H)] * (cell.unit_parameters > 0)
            shapes += one * self.D
        return arrays | {f"w{k}": random.uniform(-0.4, 0.5, shape) for k, shape in enumerate(shapes)}

    def forward(self, arrays: dict[str, np.ndarray], resets: np.ndarray | None = None) -> tuple:
        weights = [a for name, a in arrays.items() if name.startswith("w")]
        sizes = self.sizes if self.packed else None
        x, h0, c0 = (arrays.get(name) for name in ("x", "h0", "c0"))
        return reference.forward(self.mode, x, sizes, h0, c0, weights, self.L, self.D == 2, self.bias, None, resets)

    def cotangents(self, seed: int) -> list[np.ndarray]:
        y, h_n, c_n, _ = self.forward(self.draw(0))
        random = np.random.default_rng(seed)
        return [random.standard_normal(a.shape) for a in (y, h_n, c_n) if a is not None]

    def gradients(self, tape: reference.Tape, cotangents: list[np.ndarray]) -> dict[str, np.ndarray]:
        d = reference.backward(tape, *cotangents)
        named = {"x": d.x, "h0": d.h0} | ({} if d.c0 is None else {"c0": d.c0})
        return named | {f"w{k}": w for k, w in enumerate(d.weights)}


STACKS = [Stack(*options) for options in itertools.product(reference.CELLS, (1, 2), (True, False), (True, False))]


def some_resets(stack: Stack) -> np.ndarray:
    """(T,B|N): sequence 0 begins with one, 1 has one in the middle and one at its end, 2 neighbouring ones, 3 none."""
    resets = np.zeros((stack.T, stack.B), dtype=bool)
    resets[0, 0] = resets[3, 0] = resets[2, 1] = resets[3, 1] = resets[1, 2] = resets[2, 2] = True
    return resets[np.arange(stack.B) < stack.sizes[:, None]] if stack.packed else resets


@pytest.mark.parametrize("stack", [s for s in STACKS if s.mode == "GRU"], ids=str)
def test_gru_is_torchs(stack: Stack) -> None:
    arrays = stack.draw(0)
    tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
    gru = torch.nn.GRU(stack.I, stack.H, stack.L, bias=stack.bias, bidirectional=stack.D == 2, dtype=torch.float64)
    weights = [a for name, a in tensors.items() if name.startswith("w")]
    for parameter, weight in zip(gru.parameters(), weights, strict=True):
        parameter.data = weight.data
    x = tensors["x"]
    if stack.packed:
        x = torch.nn.utils.rnn.PackedSequence(x, torch.from_numpy(stack.sizes))
    y, h_n = gru(x, tensors["h0"])
    outputs = [y.data if stack.packed else y, h_n]
    got = stack.forward(arrays)
    cotangents = stack.cotangents(1)
    leaves = [tensors["x"], tensors["h0"], *gru.parameters()]
    expected = torch.autograd.grad(outputs, leaves, [torch.from_numpy(a) for a in cotangents])
    gradients = stack.gradients(got[-1], cotangents)
    for a, b in zip([*outputs, *expected], [*got[:2], *gradients.values()], strict=True):
        assert error(b, a.detach().numpy()) <= TOLERANCE * (1 + scale(b))


@pytest.mark.parametrize("f", ["TANH", "RELU"])
def test_a_leak_of_one_is_none(f: str) -> None:
    leaky, elman = Stack(f"LEAKY_{f}", 2, True, False), Stack(f"RNN_{f}", 2, True, False)
    plain = elman.draw(0)
    weights = [a for name, a in plain.items() if name.startswith("w")]
    with_leak = [a for k in range(0, 16, 4) for a in (*weights[k : k + 4], np.ones((1, 5)))]
    arrays = {"x": plain["x"], "h0": plain["h0"]} | {f"w{k}": a for k, a in enumerate(with_leak)}
    got, expected = leaky.forward(arrays), elman.forward(plain)
    assert np.array_equal(got[0], expected[0])
    cotangents = elman.cotangents(1)
    d, d_plain = leaky.gradients(got[-1], cotangents), elman.gradients(expected[-1], cotangents)
    kept = [a for k, a in enumerate(d.values()) if k < 2 or (k - 2) % 5 < 4]
    for a, b in zip(kept, d_plain.values(), strict=True):
        assert np.array_equal(a, b)


def test_leaky_units_are_those_of_reservoirs() -> None:
    random = np.random.default_rng(0)
    w_in, w, bias, x, h0 = (random.standard_normal(shape) for shape in ((5, 3), (5, 5), 5, (7, 3), 5))
    reservoir = reference.Reservoir(w_in, w, np.zeros((5, 0)), bias, 0.3)
    expected = reference.reservoir_states(reservoir, x, np.zeros((7, 0)), h0, np.zeros(0))
    weights = [w_in, w, bias, np.zeros(5), np.full((1, 5), 0.3)]
    y = reference.forward("LEAKY_TANH", x[:, None], None, h0[None, None], None, weights, 1, False, True)[0]
    assert error(y[:, 0], expected) <= TOLERANCE


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_resets_are_sequences_of_their_own(stack: Stack) -> None:
    """Outputs and gradients of each episode, run on its own as a batch of one."""
    arrays, cotangents, resets = stack.draw(0), stack.cotangents(1), some_resets(stack)
    *outputs, tape = stack.forward(arrays, resets)
    got = stack.gradients(tape, cotangents)
    runs = np.arange(stack.B) < stack.sizes[:, None]

    def padded(rows: np.ndarray) -> np.ndarray:  # (T,B,...), not a number where no sequence runs
        if not stack.packed:
            return rows
        out = np.full((*runs.shape, *rows.shape[1:]), np.nan)
        out[runs] = rows
        return out

    begins = np.zeros(runs.shape, dtype=bool)
    begins[runs] = resets.reshape(-1)
    x, y, dy, dx = (padded(a) for a in (arrays["x"], outputs[0], cotangents[0], got["x"]))
    weights = {name: a for name, a in arrays.items() if name.startswith("w")}
    sums = {name: np.zeros_like(a) for name, a in weights.items()}
    one = stack._replace(packed=False)
    for b in range(stack.B):
        length = int(runs[:, b].sum())
        starts = [t for t in range(length) if t == 0 or begins[t, b]]
        for t0, t1 in zip(starts, [*starts[1:], length], strict=True):
            here = (slice(t0, t1), slice(b, b + 1))
            initial = {name: arrays[name][:, b : b + 1] for name in ("h0", "c0") if name in arrays}
            if t0 > 0 or begins[0, b]:
                initial = {name: np.zeros_like(a) for name, a in initial.items()}
            *of_one, tape = one.forward({"x": x[here]} | initial | weights)
            last = [t1 == length, t0 == 0][: stack.D] * stack.L  # does the direction end here, with h_n (and c_n)?
            ends = np.reshape(last, (-1, 1, 1))
            of_states = [np.where(ends, d[:, b : b + 1], 0.0) for d in cotangents[1:]]
            d = one.gradients(tape, [dy[here], *of_states])
            assert error(of_one[0], y[here]) <= TOLERANCE
            for state, whole in zip(of_one[1:], outputs[1:], strict=True):
                if state is not None:
                    assert error(np.where(ends, state, 0.0), np.where(ends, whole[:, b : b + 1], 0.0)) <= TOLERANCE
            assert error(d["x"], dx[here]) <= TOLERANCE * (1 + scale(d["x"]))
            if t0 == 0:
                for name in initial:
                    expected = d[name] if not begins[0, b] else np.zeros_like(d[name])
                    assert error(got[name][:, b : b + 1], expected) <= TOLERANCE * (1 + scale(expected))
            for name, total in sums.items():
                total += d[name]
    for name, total in sums.items():
        assert error(got[name], total) <= TOLERANCE * (1 + scale(total)), name


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("stack", [s for s in STACKS if s.bias], ids=str)
def test_gradient_of_each_cell_is_derivative(stack: Stack, with_resets: bool) -> None:
    resets = some_resets(stack) if with_resets else None
    arrays, cotangents = stack.draw(0), stack.cotangents(1)
    gradients = stack.gradients(stack.forward(arrays, resets)[-1], cotangents)
    direction = stack.draw(2)

    def loss(step: float, name: str) -> float:
        moved = arrays | {name: arrays[name] + step * direction[name]}
        outputs = [a for a in stack.forward(moved, resets)[:3] if a is not None]
        return sum(float((a * da).sum()) for a, da in zip(outputs, cotangents, strict=True))

    for name, gradient in gradients.items():
        slope = (loss(1e-5, name) - loss(-1e-5, name)) / 2e-5
        assert slope == pytest.approx(float((gradient * direction[name]).sum()), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("count", [3, 7, 9])
def test_wrong_number_of_weights(count: int) -> None:
    weights = [np.ones((4, 1))] * count
    with pytest.raises(ValueError, match=f"expected 4 or 5 weights for each of 2 units, got {count}"):
        reference.forward("LSTM", np.ones((2, 1, 1)), None, None, None, weights, 2, False, True)
