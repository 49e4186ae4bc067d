"""Recursive least squares with forgetting: the exact minimiser of what it documents, and bounded where inputs stop
exciting.

Tolerances. The truth is a QR of all weighted rows at once, its error and that of the recursion are round-off times the
condition number of these rows, K; a hundred and more steps of rounding are allowed for by a factor of 1000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rnnfast.reservoir import EchoState, readout

EPS = float(np.finfo(np.float64).eps)


def network(units: int = 17, **options) -> EchoState:
    return EchoState(1, units, 1, **({"density": 0.4, "bias_scale": 0.3, "spectral_radius": 0.8} | options))


def target(u: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """(T,1): of the inputs one and three steps ago, with noise."""
    y = 0.5 * np.roll(u, 1, 0) + np.roll(u, 3, 0) ** 2
    y[:3] = 0
    return y + noise * np.random.default_rng(7).normal(size=y.shape)


def features(esn: EchoState, u: np.ndarray) -> np.ndarray:
    """(T,Z)"""
    states = EchoState(**esn.get_params()).states(u)
    return np.concatenate([np.ones((len(u), 1)), u, states], axis=1)


def learn(esn: EchoState, u: np.ndarray, y: np.ndarray, block: int, forgetting: float, ridge: float) -> EchoState:
    for t in range(0, len(u), block):
        esn.partial_fit(u[t : t + block], y[t : t + block], forgetting=forgetting, ridge=ridge)
    return esn


def minimiser(X: np.ndarray, y: np.ndarray, forgetting: float, ridge: float) -> tuple[np.ndarray, float]:
    """W of min sum_i f^(n-i) |y_i - W x_i|^2 + ridge |W|^2, and K. The heaviest rows first."""
    weights = forgetting ** (np.arange(len(X)) / 2)[:, None]
    rows = np.concatenate([weights * X[::-1], math.sqrt(ridge) * np.eye(X.shape[1])])
    values = np.concatenate([weights * y[::-1], np.zeros((X.shape[1], y.shape[1]))])
    q, r = np.linalg.qr(rows)
    return np.linalg.solve(r, q.T @ values).T, float(np.linalg.cond(r))


def assert_minimises(esn: EchoState, u: np.ndarray, y: np.ndarray, forgetting: float, ridge: float) -> None:
    W, K = minimiser(features(esn, u), y, forgetting, ridge)
    assert np.abs(esn.W_out_ - W).max() <= 1000 * EPS * K * np.abs(W).max()


@pytest.mark.parametrize("block", [1, 7, 250])
@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.97, 0.9, 0.7, 0.5])
def test_exciting_inputs(forgetting: float, block: int) -> None:
    """The exact minimiser with f^n ridge, whatever the blocks."""
    u = np.random.default_rng(0).normal(size=(250, 1))
    y = target(u, 0.1)
    esn = learn(network(), u, y, block, forgetting, 1e-2)
    assert_minimises(esn, u, y, forgetting, 1e-2 * forgetting**250)


@pytest.mark.parametrize("units, forgetting", [(100, 0.95), (60, 0.99), (30, 0.9)])
def test_exciting_inputs_for_long(units: int, forgetting: float) -> None:
    u = np.random.default_rng(1).normal(size=(20_000, 1))
    y = target(u, 0.1)
    esn = learn(network(units, leak=0.5), u, y, 5000, forgetting, 1e-2)
    recent = slice(-min(20_000, int(70 / -math.log(forgetting))), None)  # what was before has less than 1e-30 weight
    W, K = minimiser(features(esn, u)[recent], y[recent], forgetting, 0.0)
    assert np.abs(esn.W_out_ - W).max() <= 1000 * EPS * K * np.abs(W).max()


SERIES = {
    "sine": lambda t: np.sin(0.2 * t),
    "constant": lambda t: np.full(len(t), 0.7),
    "zeros": lambda t: np.zeros(len(t)),
    "another sine": lambda t: np.where(t < 10_000, np.sin(0.2 * t), 0.7 * np.sin(0.31 * t)),
    "noise at last": lambda t: np.where(t < 19_000, np.sin(0.2 * t), np.random.default_rng(3).normal(size=len(t))),
}


def assert_as_good_as_the_window(esn: EchoState, u: np.ndarray, y: np.ndarray, forgetting: float, ridge: float) -> None:
    """On the last 200 rows, after all others were learned."""
    X = features(esn, u)
    recent = slice(len(u) - 200 - int(40 / (1 - forgetting)), len(u) - 200)
    W, _ = minimiser(X[recent], y[recent], forgetting, ridge)
    got, best = (np.sqrt(np.mean((X[-200:] @ V.T - y[-200:]) ** 2)) for V in (esn.W_out_, W))
    # where rows fill the window, a ridge moves predictions by up to sqrt(ridge (1-f)) |W|
    assert got <= 1.2 * best + math.sqrt(ridge * (1 - forgetting)) * np.linalg.norm(W)


@pytest.mark.parametrize("forgetting, noise", [(0.99, 0.01), (0.95, 0.0)])
@pytest.mark.parametrize("name", SERIES)
def test_inputs_that_stop_exciting(name: str, forgetting: float, noise: float) -> None:
    """Predictions are as good as those of ridge regression on the last, weighted rows; weights stay in the bounds that
    the ridge gives them."""
    u = SERIES[name](np.arange(20_000 + 200))[:, None]
    y = target(u, noise)
    esn = learn(network(60, spectral_radius=0.9), u[:20_000], y[:20_000], 2500, forgetting, 1e-6)
    assert_as_good_as_the_window(esn, u, y, forgetting, 1e-6)
    # r |W|^2 is less than the whole loss of W = 0
    weights = forgetting ** np.arange(20_000 - 1, -1, -1.0)[:, None]
    least = 1e-6 * min(1e-4, forgetting ** (2 * 62))
    assert np.linalg.norm(esn.W_out_) <= math.sqrt((weights * y[:20_000] ** 2).sum() / least)


def test_a_sine_for_very_long() -> None:
    u = np.sin(0.2 * np.arange(200_200))[:, None]
    y = target(u, 0.01)
    esn = learn(network(30), u[:200_000], y[:200_000], 50_000, 0.99, 1e-6)
    assert_as_good_as_the_window(esn, u, y, 0.99, 1e-6)


@pytest.mark.parametrize("forgetting", [0.99, 0.9])
def test_the_ridge_that_is_held(forgetting: float) -> None:
    """It is in the documented loss, the same for all blocks, and between the bounds that are documented."""
    u = np.sin(0.2 * np.arange(2500))[:, None]
    y = target(u, 0.1)
    networks = [learn(network(60), u, y, block, forgetting, 1e-4) for block in (11, 500, 2500)]
    left = [esn._learner.left for esn in networks]
    np.testing.assert_allclose(left, left[0], rtol=1e-12)
    assert 1e-4 * 1e-4 <= left[0] <= 1e-4 * 1e-3
    for esn in networks:
        assert_minimises(esn, u, y, forgetting, left[0])


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    u = np.sin(0.2 * np.arange(1000))[:, None]
    y = target(u, 0.1)
    with_it = learn(network(), u, y, 100, 0.95, 1e-3)
    monkeypatch.setattr(readout, "dtpqrt", None)
    without = learn(network(), u, y, 100, 0.95, 1e-3)
    np.testing.assert_allclose(without.W_out_, with_it.W_out_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_sine_after_a_fit(ridge: float) -> None:
    """What the fit has learned fades away; without a ridge, too, W stays bounded."""
    u = np.random.default_rng(0).normal(size=(600, 1))
    esn = network().fit(u, target(u, 0.1), ridge=ridge)
    sine = np.sin(0.2 * np.arange(20_200))[:, None]
    y = target(sine)
    learn(esn, sine[:20_000], y[:20_000], 5000, 0.98, 1.0)
    assert_as_good_as_the_window(esn, sine, y, 0.98, 1e-3)


@pytest.mark.parametrize("forgetting", [0.1, 1e-3, 1e-200, 5e-324])
def test_hardly_any_memory(forgetting: float) -> None:
    """The last row is reproduced, and nothing else is asked for."""
    u = np.random.default_rng(0).normal(size=(50, 1))
    y = target(u)
    esn = learn(network(), u, y, 1, forgetting, 1e-6)
    assert np.abs(features(esn, u)[-1] @ esn.W_out_.T - y[-1]).max() < 1e-5


def test_states_that_explode() -> None:
    u = np.random.default_rng(0).normal(size=(3000, 1))
    with pytest.warns(RuntimeWarning, match="spectral radius"):
        esn = network(unit="relu", spectral_radius=3.0)
        with pytest.raises(RuntimeError, match="left the finite numbers"):
            esn.partial_fit(u, target(u))


def test_from_several_sequences() -> None:
    """A list: each from the state 0, one after another; after a batch there is no one state to go on from."""
    rng = np.random.default_rng(0)
    us = [rng.normal(size=(T, 1)) for T in (60, 0, 45)]
    ys = [target(u) if len(u) else u for u in us]
    esn = network().partial_fit(us, ys, washout=5)
    fitted = network().fit([us[0], us[2]], [ys[0], ys[2]], washout=5)
    np.testing.assert_allclose(esn.W_out_, fitted.W_out_, rtol=1e-7, atol=1e-9)
    assert np.array_equal(esn.state_, fitted.state_)
    batch = np.stack([us[0], us[0]])
    esn.fit(batch, np.stack([ys[0], ys[0]]), washout=5)
    with pytest.raises(ValueError, match=r"one sequence.*2.*\[x\]"):
        esn.partial_fit(us[0], ys[0])
    esn.partial_fit([us[0]], [ys[0]])
    assert torch.is_tensor(esn.partial_fit([torch.tensor(us[0])], [torch.tensor(ys[0])]).state_)
