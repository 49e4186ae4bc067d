"""The NumPy reference itself: against torch's float64 layers, and against finite differences of itself.

The two are independent. torch says what has to be computed; finite differences say that backward is the
gradient of forward, dropout masks included (torch draws its own, so it cannot be asked about those).
"""

from __future__ import annotations

import numpy as np
import pytest
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

    def forward(leaves: list[np.ndarray]) -> tuple:
        x, h0, *rest = leaves
        c0 = rest.pop(0) if case.mode == "LSTM" else None
        return reference.forward(
            case.mode, x, batch_sizes, h0, c0, rest, case.L, case.D == 2, case.bias, inputs.dropout_masks
        )

    def loss(leaves: list[np.ndarray]) -> float:
        return sum(float((a * da).sum()) for a, da in zip(forward(leaves), incoming, strict=False))

    d = reference.backward(forward(leaves)[-1], *incoming)
    gradients = [d.x, d.h0, *([] if d.c0 is None else [d.c0]), *d.weights]
    assert [g.shape for g in gradients] == [a.shape for a in leaves]

    step = 1e-5  # truncation ~step² = 1e-10, rounding ~1e-16 / step = 1e-11
    for k, gradient in enumerate(gradients):  # one leaf at a time, so that no error hides behind another leaf
        direction = random.standard_normal(leaves[k].shape)
        ahead, behind = (
            loss([a + s * direction if j == k else a for j, a in enumerate(leaves)]) for s in (step, -step)
        )
        slope = (ahead - behind) / (2 * step)
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


@pytest.mark.parametrize("count", [3, 7, 9])
def test_wrong_number_of_weights(count: int) -> None:
    weights = [np.ones((4, 1))] * count
    with pytest.raises(ValueError, match=f"expected 4 or 5 weights for each of 2 units, got {count}"):
        reference.forward("LSTM", np.ones((2, 1, 1)), None, None, None, weights, 2, False, True)
