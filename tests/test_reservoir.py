"""Echo state networks against the NumPy reference, scipy and scikit-learn.

Tolerances. States in float64 stay within some ulp of the reference as long as the reservoir forgets (spectral radius
below 1): 1e-13. A readout is as exact as its Gram matrix allows: errors of float64 times the condition number.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

import rnnfast
from rnnfast import reference
from rnnfast.reservoir import EchoState, fit_many, predict_many
from rnnfast.reservoir.matrix import RUN, sources

EPSILON = {"float64": 1e-13, "float32": 3e-5}


def reference_of(esn: EchoState) -> reference.Reservoir:
    W = esn.W_ if isinstance(esn.W_, np.ndarray) else esn.W_.toarray()
    return reference.Reservoir(esn.W_in_, W, esn.W_fb_, esn.bias_, esn.leak, esn.unit)


def reference_states(esn: EchoState, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return reference.reservoir_states(reference_of(esn), x, y, np.zeros(esn.reservoir_size), np.zeros(esn.output_size))


def features(x: np.ndarray, states: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x, states], axis=1)


def data(T: int, I: int = 2, O: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # noqa: E741
    """x (T,I) noise, y (T,O) leaky sums of it."""
    x = np.random.default_rng(seed).normal(size=(T, I))
    mix = np.random.default_rng(99).normal(size=(I, O))
    y = np.zeros((T, O))
    for t in range(1, T):
        y[t] = 0.8 * y[t - 1] + 0.3 * np.tanh(x[t] @ mix)
    return x, y


# H around the widths of vectors and runs; sparse, nearly dense, dense; all of the equation's terms
NETWORKS = [
    {"reservoir_size": 1, "density": 1.0},
    {"reservoir_size": 5, "density": 0.4, "leak": 0.5},
    {"reservoir_size": 17, "density": 0.2, "feedback": 0.5},
    {"reservoir_size": 37, "density": 1.0, "leak": 0.3, "bias_scale": 0.4, "feedback": 0.2},
    {"reservoir_size": 64, "density": 0.9, "unit": "relu", "spectral_radius": 0.5},
    {"reservoir_size": 130, "density": 0.05, "leak": 0.2, "unit": "identity", "input_scale": [0.1, 2.0]},
    {"reservoir_size": 250, "density": 0.1, "leak": 0.7, "feedback": 1.0, "bias_scale": 1.0},
    {"reservoir_size": 45, "topology": "cycle", "leak": 0.6, "feedback": 0.3},
]
every_network = pytest.mark.parametrize(
    "options", NETWORKS, ids=lambda o: f"{o['reservoir_size']}-{o.get('topology', o.get('density'))}"
)


def make(options: dict, **more) -> EchoState:
    return EchoState(**({"input_size": 2, "output_size": 2, "spectral_radius": 0.8, "seed": 3} | options | more))


# ------------------------------------------------------------------------------------------ the kernels


@every_network
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.isa
def test_states(options: dict, dtype: str) -> None:
    x, y = data(150)
    esn = make(options, dtype=dtype)
    truth, got = reference_states(esn, x, y), esn.states(x, y)
    assert got.shape == truth.shape and got.dtype == dtype
    assert np.abs(got - truth).max() <= EPSILON[dtype] * max(1, np.abs(truth).max())


@every_network
@pytest.mark.isa
def test_closed_loop(options: dict) -> None:
    """Driven by its outputs through W_fb, or in place of its inputs."""
    x, y = data(200)
    esn = make(options).fit(x, y, ridge=1e-2, washout=50)
    r, h, last = reference_of(esn), esn.state_, esn.output_
    assert np.array_equal(last, y[-1])
    if esn.feedback:
        truth = reference.reservoir_loop(r, esn.W_out_, x[:40], h, last)
        got = esn.generate(40, x[:40])
    else:
        # x_t is y_{t-1}: the same network with W_in in the place of W_fb, where W_out reads y_{t-1} for x_t
        truth, fed_back = [], last
        for _ in range(40):
            h = reference.reservoir_step(r, fed_back, h, np.zeros(2))
            fed_back = esn.W_out_ @ np.concatenate([[1.0], fed_back, h])
            truth.append(fed_back)
        got = esn.generate(40)
    assert np.abs(got - truth).max() <= 1e-11 * max(1, np.abs(truth).max())
    assert np.array_equal(esn.output_, got[-1])


@pytest.mark.parametrize("options", [NETWORKS[3], NETWORKS[6]], ids=["dense", "sparse"])
@pytest.mark.parametrize("B", [2, 9])
def test_batch_is_every_sequence_alone(options: dict, B: int) -> None:
    x, y = (np.stack(parts) for parts in zip(*(data(60, seed=b) for b in range(B)), strict=True))
    esn = make(options).fit(x, y, washout=10)
    states, loop = esn.states(x, y), esn.generate(20, x[:, :20])
    for b in range(B):
        assert np.array_equal(states[b], esn.states(x[b], y[b]))
        assert np.array_equal(loop[b], esn.generate(20, x[b, :20]))


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_threads_do_not_change_results(density: float) -> None:
    """Large enough that threads share the units of one sequence, and the sequences of a batch."""
    x, y = data(40)
    esn = EchoState(2, 900, 2, density=density, feedback=0.1, spectral_radius=0.8)
    esn.fit(x, y, washout=10)
    xs, ys = np.stack([x] * 20), np.stack([y] * 20)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((esn.states(x, y), esn.generate(10, x[:10]), esn.states(xs, ys), esn.generate(10, xs[:, :10])))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_noise() -> None:
    """h_t of a fit has the noise, as a plain solution with the same numbers; running the network has none."""
    x, y = data(300)
    esn = make({"reservoir_size": 20, "density": 0.5}, noise=0.1).fit(x, y, washout=20)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3, spawn_key=(5,))))
    noise = 0.1 * generator.standard_normal((300, 20))
    states = reference.reservoir_states(reference_of(esn), x, y, np.zeros(20), np.zeros(2), noise)
    expected = reference.ridge_regression(features(x, states)[20:], y[20:], 1e-6)
    assert np.allclose(esn.W_out_, expected, rtol=1e-9, atol=1e-11)
    assert np.abs(esn.states(x) - reference_states(esn, x, y)).max() < 1e-13


# ------------------------------------------------------------------------------------------ the weights


WEIGHTS = {
    "w_in": "0x1.0e6d354b2c4fcp-2",
    "bias": "0x1.ede60725eb0bcp-1",
    "w_fb": "0x1.6eaa71f73498ap-1",
    "w": "0x1.ec88f60000000p-1",
    "radius": "0x1.0fb0e762940dbp+1",
    "starts": [1, 3, 4, 9, 10, 21, 24, 29],
}


def test_same_seed_same_weights() -> None:
    """To the last bit: these numbers were drawn once, and no machine may draw others."""
    esn = EchoState(1, 40, 1, density=0.2, seed=7, bias_scale=1.0, feedback=1.0)
    assert esn.drawn.w_in[0, 0].hex() == WEIGHTS["w_in"]
    assert esn.drawn.bias[0].hex() == WEIGHTS["bias"]
    assert esn.drawn.w_fb[0, 0].hex() == WEIGHTS["w_fb"]
    assert float(esn.drawn.w[39, 7]).hex() == WEIGHTS["w"]
    assert esn.drawn.radius.hex() == WEIGHTS["radius"]
    assert esn.drawn.starts[0].tolist() == WEIGHTS["starts"]
    other = EchoState(3, 40, 2, density=0.2, seed=7)
    assert np.array_equal(esn.drawn.w, other.drawn.w)  # whatever it is connected to
    assert not np.array_equal(esn.drawn.w, EchoState(1, 40, 1, density=0.2, seed=8).drawn.w)


@pytest.mark.parametrize("H, density", [(10, 0.3), (150, 0.1), (300, 0.05), (300, 1.0)])
def test_spectral_radius(H: int, density: float) -> None:
    """Of small matrices (LAPACK) and of larger ones (ARPACK)."""
    esn = EchoState(1, H, 1, spectral_radius=0.7, leak=0.3, density=density)
    W = esn.W_ if density == 1 else esn.W_.toarray()
    assert np.abs(np.linalg.eigvals(W)).max() == pytest.approx(0.7, rel=1e-9)
    leaky = np.abs(np.linalg.eigvals(0.7 * np.eye(H) + 0.3 * W)).max()
    assert esn.effective_spectral_radius() == pytest.approx(leaky, rel=1e-9)


@pytest.mark.parametrize("H", [1, 2, 37, 100])
def test_cycle(H: int) -> None:
    """Each unit hears the one before, by weights of one modulus; every eigenvalue has that modulus."""
    W = make({"reservoir_size": H, "topology": "cycle", "spectral_radius": 0.7}).W_.toarray()
    unit, source = W.nonzero()
    assert np.array_equal(source, (unit - 1) % H) and len(unit) == H
    np.testing.assert_allclose(abs(W[unit, source]), 0.7, rtol=1e-15)
    np.testing.assert_allclose(abs(np.linalg.eigvals(W)), 0.7, rtol=1e-12)


@pytest.mark.parametrize("H, fan_in", [(5, 3), (16, 2), (40, 8), (333, 20)])
def test_connections(H: int, fan_in: int) -> None:
    """Every unit has fan_in different sources; taken together, units are sources about equally often."""
    esn = EchoState(1, H, 1, density=fan_in / H)
    from_units = sources(H, esn.drawn.starts)
    assert from_units.shape == (H, fan_in) and from_units.min() >= 0 and from_units.max() < H
    assert all(len(set(row)) == fan_in for row in from_units)
    dense = np.zeros((H, H))
    np.put_along_axis(dense, from_units, 0.9 / esn.drawn.radius * esn.drawn.w.astype(np.float64), axis=1)
    assert np.array_equal(dense, esn.W_.toarray())
    assert len(esn.drawn.starts) == -(-H // RUN)


# ------------------------------------------------------------------------------------------ the readout


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_readout_is_scipys(dtype: str) -> None:
    x, y = data(500)
    esn = make(NETWORKS[6], dtype=dtype).fit(x, y, ridge=1e-3, washout=60)
    X = features(x, reference_states(esn, x, y))[60:]
    # min |X w - y|^2 + ridge |w|^2 as a plain least squares problem, by SVD and without a Gram matrix
    stacked = np.concatenate([X, np.sqrt(1e-3) * np.eye(X.shape[1])])
    expected = scipy.linalg.lstsq(stacked, np.concatenate([y[60:], np.zeros((X.shape[1], 2))]))[0].T
    assert np.abs(esn.W_out_ - expected).max() <= (1e-8 if dtype == "float64" else 2e-2) * np.abs(expected).max()
    assert np.abs(X @ esn.W_out_.T - X @ expected.T).max() <= (1e-9 if dtype == "float64" else 1e-3)


def test_long_series_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks change nothing but round-off, and no array grows with T."""
    x, y = data(3000)
    whole = make(NETWORKS[2]).fit(x, y)
    monkeypatch.setattr("rnnfast.reservoir.ensemble.CHUNK_BYTES", 1)
    monkeypatch.setattr("rnnfast.reservoir.ensemble.MOST_BYTES", 1)
    largest = []
    run = rnnfast.reservoir.bank.Bank.drive

    def watched(self, u, h, states, *rest, **more):
        largest.append(states.shape[2])
        run(self, u, h, states, *rest, **more)

    monkeypatch.setattr("rnnfast.reservoir.bank.Bank.drive", watched)
    parts = make(NETWORKS[2]).fit(x, y)
    assert np.allclose(parts.W_out_, whole.W_out_, rtol=1e-8, atol=1e-10)
    assert max(largest) == 16 and np.array_equal(parts.state_, whole.state_)


def test_several_sequences() -> None:
    """A batch, and a list of any lengths, are one regression over all rows after each washout."""
    pairs = [data(T, seed=T) for T in (120, 90, 120)]
    esn = make(NETWORKS[2]).fit([x for x, _ in pairs], [y for _, y in pairs], ridge=1e-4, washout=30)
    X = np.concatenate([features(x, reference_states(esn, x, y))[30:] for x, y in pairs])
    Y = np.concatenate([y[30:] for _, y in pairs])
    assert np.allclose(esn.W_out_, reference.ridge_regression(X, Y, 1e-4), rtol=1e-9, atol=1e-11)
    same_length = [pairs[0], pairs[2]]
    listed = make(NETWORKS[2]).fit(*([pair[i] for pair in same_length] for i in (0, 1)), washout=30)
    batch = make(NETWORKS[2]).fit(*(np.stack([pair[i] for pair in same_length]) for i in (0, 1)), washout=30)
    assert np.allclose(listed.W_out_, batch.W_out_, rtol=1e-8, atol=1e-10)


def test_warm_start() -> None:
    pairs = [data(200, seed=s) for s in (1, 2)]
    both = make(NETWORKS[2]).fit([x for x, _ in pairs], [y for _, y in pairs])
    after = make(NETWORKS[2]).fit(*pairs[0])
    first = after.W_out_.copy()
    after.fit(*pairs[1], warm_start=True)
    assert np.allclose(after.W_out_, both.W_out_, rtol=1e-8, atol=1e-10) and not np.allclose(after.W_out_, first)


def test_leave_one_out() -> None:
    """The errors are those of fits to all rows but one."""
    x, y = data(80)
    ridges = [1e-4, 1e-1, 10.0]
    esn = make(NETWORKS[2]).fit(x, y, ridge=ridges, washout=20)
    X, Y = features(x, reference_states(esn, x, y))[20:], y[20:]
    for ridge in ridges:
        errors = []
        for i in range(len(X)):
            others = np.arange(len(X)) != i
            W = reference.ridge_regression(X[others], Y[others], ridge)
            errors.append((Y[i] - W @ X[i]) ** 2)
        assert esn.ridge_errors_[ridge] == pytest.approx(np.mean(errors), rel=1e-8)
    assert esn.ridge_ == min(ridges, key=esn.ridge_errors_.get)
    assert np.allclose(esn.W_out_, reference.ridge_regression(X, Y, esn.ridge_), rtol=1e-8, atol=1e-10)


def test_validation() -> None:
    (x, y), (xv, yv) = data(150), data(100, seed=5)
    ridges = [1e-6, 1.0, 100.0]
    esn = make(NETWORKS[6]).fit(x, y, ridge=ridges, washout=20, validation=(xv, yv))
    X, V = (features(a, reference_states(esn, a, b))[20:] for a, b in ((x, y), (xv, yv)))
    errors = [np.mean((yv[20:] - V @ reference.ridge_regression(X, y[20:], r).T) ** 2) for r in ridges]
    assert list(esn.ridge_errors_.values()) == pytest.approx(errors, rel=1e-6)
    assert esn.ridge_ == ridges[int(np.argmin(errors))]


# ------------------------------------------------------------------------------------------ online


@pytest.mark.parametrize("block", [1, 7, 200])
@pytest.mark.parametrize("forgetting", [1.0, 0.97])
def test_partial_fit(block: int, forgetting: float) -> None:
    """Any blocks: the minimum of sum_i f^(n-i) |y_i - W x_i|^2 + f^n ridge |W|^2."""
    x, y = data(150)
    esn = make(NETWORKS[2])
    for t in range(0, 150, block):
        esn.partial_fit(x[t : t + block], y[t : t + block], ridge=1e-2, forgetting=forgetting)
    X = features(x, reference_states(esn, x, y))
    weight = np.sqrt(forgetting ** np.arange(149, -1, -1))[:, None]
    expected = reference.ridge_regression(weight * X, weight * y, 1e-2 * forgetting**150)
    assert np.abs(esn.W_out_ - expected).max() <= 1e-7 * np.abs(expected).max()
    assert np.array_equal(esn.state_, make(NETWORKS[2]).states(x, y)[-1])


def test_partial_fit_after_fit() -> None:
    """Goes on from the sums, the ridge and the state of the fit."""
    x, y = data(300)
    esn = make(NETWORKS[2]).fit(x[:200], y[:200], ridge=1e-2, washout=50)
    esn.partial_fit(x[200:], y[200:])
    whole = make(NETWORKS[2]).fit(x, y, ridge=1e-2, washout=50)
    assert np.allclose(esn.W_out_, whole.W_out_, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize(
    "grid",
    [
        [{"leak": a, "spectral_radius": r, "input_scale": i} for a in (0.2, 1.0) for r in (0.5, 0.9) for i in (0.1, 1)],
        [{"seed": s} for s in range(5)],
        [{"seed": 1}, {"seed": 2, "leak": 0.5}, {"seed": 1, "noise": 0.1}],
        [{"seed": 2, "leak": 0.5}, {"seed": 1}, {"seed": 1, "bias_scale": 2.0}, {"seed": 2}],
    ],
    ids=["hyperparameters", "seeds", "uneven", "both"],
)
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_fit_many(grid: list[dict], density: float) -> None:
    x, y = (np.stack(part) for part in zip(data(120), data(120, seed=1), strict=True))
    ridges = [1e-4, 1e-2]
    networks = [make({"reservoir_size": 50, "density": density}, **options) for options in grid]
    assert fit_many(networks, x, y, ridge=ridges, washout=20) is networks
    predicted = predict_many(networks, x)
    for network, options, prediction in zip(networks, grid, predicted, strict=True):
        alone = make({"reservoir_size": 50, "density": density}, **options).fit(x, y, ridge=ridges, washout=20)
        assert np.allclose(network.W_out_, alone.W_out_, rtol=1e-8, atol=1e-10)
        assert network.ridge_ == alone.ridge_ and np.array_equal(network.state_, alone.state_)
        assert network.ridge_errors_ == pytest.approx(alone.ridge_errors_)
        assert np.allclose(prediction, alone.predict(x), rtol=0, atol=1e-8)


def test_fit_many_of_other_sizes_is_an_error() -> None:
    with pytest.raises(ValueError, match="reservoir_size"):
        fit_many([EchoState(1, 20, 1), EchoState(1, 30, 1)], *data(200, 1, 1))


# ------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("unit", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("leak", [1.0, 0.3])
def test_module(unit: str, leak: float) -> None:
    x, y = data(60)
    esn = EchoState(2, 12, 2, leak=leak, unit=unit, bias_scale=0.5, density=0.4, spectral_radius=0.6)
    layer = esn.fit(x, y, washout=10).module()
    inputs = torch.tensor(x[:7], requires_grad=True)
    assert np.abs(layer(inputs)[0].detach().numpy() - esn.predict(x[:7])).max() <= 1e-12
    assert [p.requires_grad for p in layer.parameters()] == [False, False, False, True]
    layer.requires_grad_()
    batch = torch.tensor(np.stack([x[:3], x[3:6]]), requires_grad=True)
    h0 = torch.tensor(esn.states(x[:2]), requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def outputs(batch, h0, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (batch, h0))

    assert torch.autograd.gradcheck(outputs, (batch, h0, *layer.parameters()))


def test_module_learns() -> None:
    """A gradient step through the reservoir lowers the loss, in one sequence without a batch too."""
    x, y = data(200)
    layer = EchoState(2, 30, 2, leak=0.5).fit(x, y, ridge=1.0).module().requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append((layer(torch.tensor(x))[0] - torch.tensor(y)).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"feedback=0\.5"):
        EchoState(2, 30, 2, feedback=0.5).fit(x, y).module()


# ------------------------------------------------------------------------------------------ conventions


def test_numpy_and_torch() -> None:
    x, y = data(200)
    esn = make(NETWORKS[2]).fit(x, y)
    tensors = make(NETWORKS[2]).fit(torch.tensor(x), torch.tensor(y))
    assert isinstance(esn.predict(x), np.ndarray) and isinstance(tensors.predict(torch.tensor(x)), torch.Tensor)
    assert np.array_equal(esn.predict(x), tensors.predict(torch.tensor(x)).numpy())
    assert isinstance(esn.generate(3, x[:3]), np.ndarray)
    assert isinstance(esn.predict(torch.tensor(x, requires_grad=True)), torch.Tensor)
    assert esn.predict(torch.tensor(x)).dtype == torch.float64


def test_scikit_learn() -> None:
    from sklearn.base import clone, is_regressor
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GridSearchCV, TimeSeriesSplit

    x, y = data(400)
    esn = EchoState(2, 30, 2, leak=0.5).fit(x, y)
    copied = clone(esn)
    assert copied.get_params() == esn.get_params() and not hasattr(copied, "W_out_")
    assert is_regressor(esn)
    assert esn.score(x, y) == pytest.approx(r2_score(y, esn.predict(x)))
    assert esn.score(x, y, washout=50) == pytest.approx(r2_score(y[50:], esn.predict(x)[50:]))
    search = GridSearchCV(EchoState(2, 30, 2), {"leak": [0.05, 0.5]}, cv=TimeSeriesSplit(3, test_size=60))
    search.fit(x, y, washout=20)
    assert search.best_params_["leak"] == 0.5
    assert repr(esn).startswith("EchoState(input_size=2, reservoir_size=30, output_size=2, ")


def test_set_params_forgets() -> None:
    x, y = data(200)
    esn = EchoState(2, 30, 2).fit(x, y)
    esn.set_params(leak=0.5)
    with pytest.raises(RuntimeError, match="fit"):
        esn.predict(x)
    assert np.array_equal(esn.fit(x, y).W_out_, EchoState(2, 30, 2, leak=0.5).fit(x, y).W_out_)
    with pytest.raises(ValueError, match="leaky"):
        esn.set_params(leaky=0.5)


def test_copies_go_on() -> None:
    x, y = data(200)
    esn = make(NETWORKS[2]).fit(x, y)
    for copied in (pickle.loads(pickle.dumps(esn)), copy.deepcopy(esn)):
        assert np.array_equal(copied.generate(5, x[:5]), copy.deepcopy(esn).generate(5, x[:5]))


def test_generate_goes_on() -> None:
    """A long run is two short ones, and a run from given states."""
    x, y = data(200)
    esn = make(NETWORKS[6]).fit(x, y, ridge=1e-2)
    state, output = esn.state_, esn.output_
    whole = esn.generate(20, x[:20])
    assert np.array_equal(whole, esn.generate(20, x[:20], state=state, output=output))
    esn.states(x, y)
    assert np.array_equal(whole, np.concatenate([esn.generate(8, x[:8]), esn.generate(12, x[8:20])]))


def test_prediction_with_feedback_runs_alone() -> None:
    x, y = data(200)
    esn = make(NETWORKS[6]).fit(x, y, ridge=1e-2)
    truth = reference.reservoir_loop(reference_of(esn), esn.W_out_, x, np.zeros(250), np.zeros(2))
    assert np.abs(esn.predict(x) - truth).max() <= 1e-11


# ------------------------------------------------------------------------------------------ bad input

WRONG = [
    ("reservoir_size", 0),
    ("input_size", -1),
    ("output_size", 1.5),
    ("spectral_radius", 0.0),
    ("spectral_radius", float("nan")),
    ("leak", 0.0),
    ("leak", 1.1),
    ("density", 0.0),
    ("density", 0.01),  # of 30 units: less than one connection
    ("density", 1.5),
    ("noise", -0.1),
    ("bias_scale", float("inf")),
    ("input_scale", [1.0, 2.0, 3.0]),
    ("unit", "sine"),
    ("dtype", "float16"),
    ("seed", -1),
]


@pytest.mark.parametrize("name, value", WRONG, ids=lambda v: str(v))
def test_arguments(name: str, value) -> None:
    options = {"input_size": 2, "reservoir_size": 30, "output_size": 2} | {name: value}
    with pytest.raises(ValueError, match=name) as error:
        EchoState(**options)
    assert str(value).strip("'") in str(error.value)


def bad_fits() -> dict[str, tuple[str, dict]]:
    x, y = data(200)
    broken = x.copy()
    broken[17, 1] = np.inf
    nan = y.copy()
    nan[3, 0] = np.nan
    constant = np.ones_like(x)
    return {
        "inf": ("x.*inf.*step 17, column 1", {"x": broken}),
        "nan": ("y.*nan.*step 3, column 0", {"y": nan}),
        "washout": ("washout of 200.*T=200", {"washout": 200}),
        "negative washout": ("washout.*-1", {"washout": -1}),
        "negative ridge": ("ridge.*-1e-06", {"ridge": -1e-6}),
        "one negative ridge": ("ridge.*-2", {"ridge": [1.0, -2.0]}),
        "nan ridge": ("ridge.*nan", {"ridge": float("nan")}),
        "no ridge": ("ridge", {"ridge": []}),
        "width": (r"x: expected shape.*\(T,2\).*\(200, 1\)", {"x": x[:, :1]}),
        "dimensions": (r"\(200,\)", {"y": y[:, 0]}),
        "steps": ("as many.*steps", {"y": y[:-1]}),
        "sequences": ("as many sequences", {"x": [x, x], "y": [y]}),
        "no sequences": ("at least one", {"x": [], "y": []}),
        "no x": ("input_size=2.*None", {"x": None}),
        "no y": ("y.*None", {"y": None}),
        "singular": ("singular with ridge=0", {"x": constant, "ridge": 0.0}),
        "too few rows": ("singular with ridge=0", {"x": x[:120], "y": y[:120], "ridge": 0.0}),
    }


@pytest.mark.parametrize("case", bad_fits())
def test_bad_fit(case: str) -> None:
    """An error that names what was wrong; the network stays as it was."""
    message, options = bad_fits()[case]
    x, y = data(200)
    esn = EchoState(2, 30, 2).fit(x, y)
    before = esn.W_out_.copy()
    kind = np.linalg.LinAlgError if "singular" in message else ValueError
    with pytest.raises(kind, match=message):
        esn.fit(**({"x": x, "y": y} | options))
    assert np.array_equal(esn.W_out_, before)


def test_bad_calls() -> None:
    x, y = data(200)
    esn = EchoState(2, 30, 2, feedback=0.5)
    with pytest.raises(RuntimeError, match="not fitted"):
        esn.predict(x)
    with pytest.raises(AttributeError, match="state_"):
        _ = esn.state_
    with pytest.raises(ValueError, match="needs y"):
        esn.states(x)
    esn.fit(x, y)
    for call, message in [
        (lambda: esn.generate(0, x), "steps"),
        (lambda: esn.generate(5), "input_size=2"),
        (lambda: esn.generate(5, x[:4]), "5 steps, got 4"),
        (lambda: esn.predict(x, state=np.zeros(7)), r"state.*\(30,\).*\(7,\)"),
        (lambda: esn.partial_fit(x, y, forgetting=1.2), "forgetting.*1.2"),
        (lambda: esn.partial_fit(np.stack([x, x]), np.stack([y, y])), "one sequence"),
        (lambda: EchoState(2, 30, 2).partial_fit(x, y, ridge=0.0), "ridge.*0"),
        (lambda: EchoState(2, 30, 1).fit(x, y[:, :1]).generate(5), "input_size=2, output_size=1"),
        (lambda: esn.score(x[:1], y[:1]), "more than one step"),
        (lambda: esn.score(x, np.ones_like(y)), "same target"),
        (lambda: esn.score(x, None), "expected targets, got None"),
        (lambda: esn.partial_fit(x, None), "expected targets, got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_loop_that_explodes_is_an_error() -> None:
    x, y = data(300, 2, 2)
    esn = EchoState(2, 30, 2, unit="identity", spectral_radius=0.9).fit(x, y)
    esn.W_out_ = 1e200 * np.ones_like(esn.W_out_)
    with pytest.raises(RuntimeError, match="left the finite numbers at step"):
        esn.generate(50)


def test_unstable_units_are_warned_of() -> None:
    """relu and identity have no bound; what counts is the radius of (1-a) I + a W."""
    for unit in ("relu", "identity"):
        with pytest.warns(RuntimeWarning, match=r"spectral radius.*1\.\d+"):
            EchoState(1, 30, 1, unit=unit, spectral_radius=1.3, leak=0.5).fit(*data(200, 1, 1), ridge=1.0)


def test_zero_matrix() -> None:
    from rnnfast.reservoir.weights import _rounded

    with pytest.raises(ValueError, match="spectral radius 0"):
        _rounded(0.0)
