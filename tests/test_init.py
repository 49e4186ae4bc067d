"""rnnfast.init: what each initialisation promises, on layers and cells of rnnfast and torch.nn alike."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast
from rnnfast import init

LAYERS = {
    "RNN": lambda library, **options: library.RNN(3, 20, **options),
    "LSTM": lambda library, **options: library.LSTM(3, 20, **options),
    "two layers, two directions": lambda library, **options: library.LSTM(
        3, 20, num_layers=2, bidirectional=True, **options
    ),
    "projected": lambda library, **options: library.LSTM(3, 20, proj_size=16, **options),
    "RNNCell": lambda library, **options: library.RNNCell(3, 20, **options),
    "LSTMCell": lambda library, **options: library.LSTMCell(3, 20, **options),
    "GRU": lambda library, **options: library.GRU(3, 20, num_layers=2, **options),
}
LSTMS = [name for name in LAYERS if not name.startswith(("RNN", "GRU"))]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


@pytest.fixture(params=[rnnfast, nn], ids=["rnnfast", "torch"])
def library(request):
    return request.param


def named(rnn, start):
    """The parameters whose names start so, in float64 NumPy, by name."""
    found = {name: p.detach().double().numpy() for name, p in rnn.named_parameters() if name.startswith(start)}
    assert found
    return found


def blocks(rnn):
    """Every gate's recurrent weights (H,R), with w_hr (P,H) if the layer projects, else None."""
    projections = {name.removeprefix("weight_hr"): p.detach().double().numpy() for name, p in rnn.named_parameters()}
    for name, w in named(rnn, "weight_hh").items():
        for block in np.split(w, len(w) // rnn.hidden_size):
            yield block, projections.get(name.removeprefix("weight_hh"))


@pytest.mark.parametrize("name", LAYERS)
def test_echo_state_has_its_radius_its_zeros_and_its_scales(library, name):
    rnn = LAYERS[name](library, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert init.echo_state_(rnn, 1.3, nonzero=7, input_scale=0.01, generator=generator) is rnn
    for block, w_hr in blocks(rnn):
        loop = block if w_hr is None else block @ w_hr  # (H,H): the other order of the product that is scaled
        assert np.abs(np.linalg.eigvals(loop)).max() == pytest.approx(1.3, rel=1e-9)
        assert ((block != 0).sum(axis=1) == 7).all()
    drawn = np.concatenate([w.ravel() for w in named(rnn, "weight_ih").values()])
    assert drawn.std() == pytest.approx(0.01, rel=0.5) and (drawn != 0).all()
    assert all((b == 0).all() for b in named(rnn, "bias").values())
    columns = {tuple(np.flatnonzero(row)) for block, _ in blocks(rnn) for row in block}
    assert len(columns) > 15  # every unit listens to others of its own


def test_echo_state_draws_what_the_generator_says():
    def weights(seed, dtype=torch.float64):
        rnn = init.echo_state_(rnnfast.RNN(2, 30, dtype=dtype), generator=torch.Generator().manual_seed(seed))
        return rnn.weight_hh_l0.detach(), rnn.weight_ih_l0.detach()

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert all(torch.equal(a.float(), b) for a, b in zip(weights(1), weights(1, torch.float32), strict=True))
    assert not torch.equal(weights(1)[0], weights(2)[0])


def test_echo_state_stands_for_large_networks():
    rnn = init.echo_state_(rnnfast.RNN(1, 400, dtype=torch.float64), 0.9, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.eigvals(rnn.weight_hh_l0.detach()).abs().max().item() == pytest.approx(0.9, rel=1e-9)


def test_echo_state_works_as_an_echo(library):
    """At radius 0.9 a difference of the initial states dies out, at 1.5 it does not: the scaling reaches the layer."""
    left = {}
    for radius in (0.9, 1.5):
        rnn = init.echo_state_(
            library.RNN(1, 100, dtype=torch.float64), radius, generator=torch.Generator().manual_seed(0)
        )
        x = 0.01 * torch.randn(300, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ends = [rnn(x, torch.full((1, 1, 100), h, dtype=torch.float64))[1] for h in (0.1, 0.2)]
        left[radius] = (ends[0] - ends[1]).norm().item()
    assert left[0.9] < 1e-6 and left[1.5] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectral_radius": 0.0}, "spectral_radius should be a positive number, got 0.0"),
        ({"spectral_radius": float("nan")}, "spectral_radius should be a positive number, got nan"),
        ({"nonzero": 0}, "nonzero should be 1 to 20, .*, got 0"),
        ({"nonzero": 21}, "nonzero should be 1 to 20, .*, got 21"),
        ({"input_scale": -1.0}, "input_scale should be a number >= 0, got -1.0"),
    ],
)
def test_echo_state_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        init.echo_state_(rnnfast.RNN(3, 20), **options)


def test_echo_state_of_zero_spectral_radius_says_so():
    lstm = rnnfast.LSTM(3, 20, proj_size=16)
    nn.init.zeros_(lstm.weight_hr_l0)
    with pytest.raises(ValueError, match=r"spectral radius 0 .*weight_hr zero"):
        init.echo_state_(lstm)


@pytest.mark.parametrize("name", LAYERS)
def test_identity(library, name):
    rnn = LAYERS[name](library)
    before = named(rnn, "weight_ih")
    assert init.identity_(rnn, 0.5) is rnn
    assert all((block == 0.5 * np.eye(*block.shape)).all() for block, _ in blocks(rnn))
    assert all((b == 0).all() for b in named(rnn, "bias").values())
    assert all((w == before[key]).all() for key, w in named(rnn, "weight_ih").items())


def test_identity_keeps_a_relu_state():
    rnn = init.identity_(rnnfast.RNN(2, 5, nonlinearity="relu"))
    h0 = torch.rand(1, 3, 5)
    assert torch.equal(rnn(torch.zeros(50, 3, 2), h0)[1], h0)


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal(library, name):
    rnn = LAYERS[name](library, dtype=torch.float64)
    others = named(rnn, "weight_ih") | named(rnn, "bias")
    assert init.orthogonal_(rnn, 2.0, generator=torch.Generator().manual_seed(0)) is rnn
    values = [np.linalg.svd(block, compute_uv=False) for block, _ in blocks(rnn)]
    assert np.allclose(values, 2.0, rtol=1e-12)
    again = init.orthogonal_(LAYERS[name](library, dtype=torch.float64), 2.0, torch.Generator().manual_seed(0))
    assert all((a == b).all() for (a, _), (b, _) in zip(blocks(rnn), blocks(again), strict=True))
    first, *rest = [block for block, _ in blocks(rnn)]
    assert all(not np.allclose(first, block) for block in rest)
    assert all((p == others[key]).all() for key, p in (named(rnn, "weight_ih") | named(rnn, "bias")).items())


def gate_bias(rnn, gate):
    """The bias that a gate sees, b_ih + b_hh, of all layers and directions, (count,H)."""
    H, sums = rnn.hidden_size, []
    for name, b_ih in named(rnn, "bias_ih").items():
        sums.append((b_ih + named(rnn, name.replace("ih", "hh"))[name.replace("ih", "hh")])[gate * H : (gate + 1) * H])
    return np.array(sums)


@pytest.mark.parametrize("name", LSTMS)
def test_forget_bias_is_a_sum(library, name):
    lstm = LAYERS[name](library)
    others = [gate_bias(lstm, gate) for gate in (0, 2, 3)]
    assert init.forget_bias_(lstm, 1.5) is lstm
    assert (gate_bias(lstm, 1) == 1.5).all()
    assert all((gate_bias(lstm, gate) == b).all() for gate, b in zip((0, 2, 3), others, strict=True))


def test_forget_bias_opens_the_gate():
    """With all weights and inputs zero but the bias, a cell keeps s(1) of itself a step."""
    lstm = rnnfast.LSTM(1, 4, dtype=torch.float64)
    for p in lstm.parameters():
        nn.init.zeros_(p)
    init.forget_bias_(lstm)
    zeros, ones = torch.zeros(1, 1, 4, dtype=torch.float64), torch.ones(1, 1, 4, dtype=torch.float64)
    _, (_, c) = lstm(torch.zeros(3, 1, 1, dtype=torch.float64), (zeros, ones))
    assert c.flatten().tolist() == pytest.approx([(1 / (1 + np.exp(-1))) ** 3] * 4)


@pytest.mark.parametrize("name", LSTMS)
def test_chrono(library, name):
    lstm = LAYERS[name](library, dtype=torch.float64)
    assert init.chrono_(lstm, 101, generator=torch.Generator().manual_seed(0)) is lstm
    forget, u = gate_bias(lstm, 1), np.exp(gate_bias(lstm, 1))
    assert (gate_bias(lstm, 0) == -forget).all()
    assert u.min() >= 1 and u.max() <= 100 and 35 < u.mean() < 65 and u.std() > 15  # U(1,100): 50.5, 28.6
    again = init.chrono_(LAYERS[name](library, dtype=torch.float64), 101, generator=torch.Generator().manual_seed(0))
    assert (gate_bias(again, 1) == forget).all()


@pytest.mark.parametrize("t_max", [2, 1.5, float("nan"), float("inf")])
def test_chrono_needs_a_time(t_max):
    with pytest.raises(ValueError, match="t_max should be a number of steps above 2, got"):
        init.chrono_(rnnfast.LSTM(2, 3), t_max)


@pytest.mark.parametrize("function", [init.forget_bias_, lambda rnn: init.chrono_(rnn, 10)])
def test_gate_biases_need_an_lstm_with_biases(function):
    with pytest.raises(TypeError, match=r"should be an LSTM or LSTMCell, .* got RNN"):
        function(rnnfast.RNN(2, 3))
    with pytest.raises(ValueError, match="bias=False"):
        function(rnnfast.LSTM(2, 3, bias=False))


@pytest.mark.parametrize(
    "function",
    [init.echo_state_, init.identity_, init.orthogonal_, init.forget_bias_, lambda rnn: init.chrono_(rnn, 10)],
)
def test_other_modules_are_refused(function):
    with pytest.raises(TypeError, match="rnn should be a recurrent layer or cell, got Linear"):
        function(nn.Linear(3, 20))


@pytest.mark.parametrize("function", [init.forget_bias_, lambda rnn: init.chrono_(rnn, 10)])
@pytest.mark.parametrize("module", [rnnfast.GRU(3, 20), nn.GRUCell(3, 20), rnnfast.LeakyRNN(3, 20)])
def test_a_forget_gate_is_an_lstms(function, module):
    with pytest.raises(TypeError, match=f"rnn should be an LSTM.*, got {type(module).__name__}"):
        function(module)


def test_layers_without_bias_and_graphs_stay_whole():
    rnn = init.echo_state_(init.identity_(init.orthogonal_(rnnfast.RNN(3, 20, bias=False))))
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in rnn.parameters())
    rnn(torch.randn(4, 2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


# --------------------------------------------------------------------------------------------- spectral radius


def test_spectral_radius_of_known_matrices():
    turn = np.array([[0.0, -2.0], [2.0, 0.0]])  # eigenvalues +-2i
    assert init.spectral_radius(turn) == pytest.approx(2)
    assert init.spectral_radius(torch.tensor(turn, dtype=torch.float32)) == pytest.approx(2)
    assert init.spectral_radius(scipy.sparse.csr_array(turn)) == pytest.approx(2)
    assert init.spectral_radius(np.zeros((3, 3))) == 0
    assert init.spectral_radius(scipy.sparse.csr_array((300, 300))) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_arpack_agrees_with_all_eigenvalues(sparse):
    random = np.random.default_rng(0)
    matrix = random.standard_normal((300, 300)) * (random.random((300, 300)) < 0.05)
    given = scipy.sparse.csr_array(matrix) if sparse else matrix
    radius = init.spectral_radius(given)
    assert radius == pytest.approx(np.abs(np.linalg.eigvals(matrix)).max(), rel=1e-10)
    assert radius == init.spectral_radius(given)  # to the last bit


def test_without_convergence_all_eigenvalues_are_found(monkeypatch):
    def no_convergence(*args, **options):
        raise scipy.sparse.linalg.ArpackNoConvergence("no convergence", np.zeros(0), np.zeros((0, 0)))

    matrix = np.random.default_rng(0).standard_normal((300, 300))
    expected = init.spectral_radius(matrix)
    monkeypatch.setattr(scipy.sparse.linalg, "eigs", no_convergence)
    assert init.spectral_radius(matrix) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
def test_spectral_radius_needs_a_square_matrix(shape):
    with pytest.raises(ValueError, match="matrix should be square, got shape"):
        init.spectral_radius(np.ones(shape))


def test_spectral_radius_needs_finite_numbers():
    with pytest.raises(ValueError, match="finite"):
        init.spectral_radius(np.array([[np.nan]]))


# --------------------------------------------------------------------------------------------- computed weights


class Halved(nn.Module):
    """A parametrization without a right inverse."""

    def forward(self, original):
        return original / 2


class Doubled(Halved):
    def right_inverse(self, value):
        return value * 2


INITIALISATIONS = {
    "echo_state_": lambda rnn: init.echo_state_(rnn, nonzero=4, generator=torch.Generator().manual_seed(0)),
    "identity_": init.identity_,
    "orthogonal_": lambda rnn: init.orthogonal_(rnn, generator=torch.Generator().manual_seed(0)),
}
SETTABLE = {
    "weight_norm": parametrizations.weight_norm,
    "two": lambda rnn, name: parametrize.register_parametrization(
        parametrizations.weight_norm(rnn, name), name, Doubled()
    ),
}
REFUSED = {
    "no right inverse": (lambda rnn, name: parametrize.register_parametrization(rnn, name, Halved()), "Halved"),
    "spectral_norm": (parametrizations.spectral_norm, "SpectralNorm, which makes something else"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal, which makes something else"),
    "old weight_norm": (torch.nn.utils.weight_norm, "WeightNorm and cannot be set"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "SpectralNorm and cannot be set"),
    "pruned": (lambda rnn, name: prune.random_unstructured(rnn, name, 0.3), "RandomUnstructured and cannot be set"),
    "pruned twice": (
        lambda rnn, name: [prune.random_unstructured(rnn, name, 0.3), prune.l1_unstructured(rnn, name, 0.1)],
        "PruningContainer and cannot be set",
    ),
    "from outside": (
        lambda rnn, name: rnn._parameters.update({name: rnn._parameters[name] * 1}),
        "and cannot be set",
    ),
}
COMPUTED = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's older ways


@pytest.mark.parametrize("way", SETTABLE)
@pytest.mark.parametrize("initialise", INITIALISATIONS)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTMCell"])
def test_parametrized_weights_are_set(library, cell, initialise, way):
    """What the layer computes with is what it would be without the parametrization, and is trained through it."""
    name, x = "weight_hh" if cell == "LSTMCell" else "weight_hh_l0", torch.randn(5, 3)
    rnn, plain = getattr(library, cell)(3, 8), getattr(library, cell)(3, 8)
    plain.load_state_dict(rnn.state_dict())
    SETTABLE[way](rnn, name)
    originals = [p for n, p in rnn.named_parameters() if "original" in n]
    INITIALISATIONS[initialise](rnn)
    INITIALISATIONS[initialise](plain)
    torch.testing.assert_close(getattr(rnn, name), getattr(plain, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(rnn(x)[0], plain(x)[0], rtol=0, atol=1e-5)
    assert [p for n, p in rnn.named_parameters() if "original" in n] == originals and originals
    rnn(x)[0].sum().backward()
    assert all(p.grad is not None for p in originals)


@COMPUTED
@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTMCell"])
def test_computed_weights_are_refused(library, cell, way):
    """With an error that names the weight and what computes it; nothing is changed, the weights before it neither."""
    rnn = getattr(library, cell)(3, 8).eval()
    compute, message = REFUSED[way]
    compute(rnn, "weight_hh" if cell == "LSTMCell" else "weight_hh_l0")
    before = {name: value.clone() for name, value in rnn.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weight_hh\w* of \w*{cell} is computed.*{message}"):
        INITIALISATIONS["echo_state_"](rnn)
    after = rnn.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_a_parametrization_can_be_is_set():
    for way in (parametrizations.orthogonal, parametrizations.spectral_norm):
        rnn = init.orthogonal_(way(rnnfast.RNN(3, 8), "weight_hh_l0"))
        w = rnn.weight_hh_l0.detach()
        torch.testing.assert_close(w @ w.T, torch.eye(8), rtol=0, atol=1e-5)


@COMPUTED
@pytest.mark.parametrize("compute", [torch.nn.utils.weight_norm, lambda rnn, name: prune.identity(rnn, name)])
def test_computed_weights_that_are_not_set_do_not_matter(compute):
    lstm = rnnfast.LSTM(3, 8, proj_size=4)
    compute(lstm, "weight_ih_l0")
    compute(lstm, "weight_hr_l0")
    init.chrono_(init.orthogonal_(lstm), 20)
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            if name.startswith("weight_hr"):
                p.mul_(3)  # a call of the layer would compute with it
    prune.remove(lstm, "weight_ih_l0") if hasattr(lstm, "weight_ih_l0_orig") else torch.nn.utils.remove_weight_norm(
        lstm, "weight_ih_l0"
    )
    init.echo_state_(lstm, 0.9, nonzero=3)
    lstm(torch.randn(2, 3))
    for block in lstm.weight_hh_l0.split(8):
        assert torch.linalg.eigvals(lstm.weight_hr_l0 @ block).abs().max().item() == pytest.approx(0.9, rel=1e-4)


def test_biases_are_computed_too():
    lstm = parametrize.register_parametrization(rnnfast.LSTM(3, 8), "bias_ih_l0", Doubled())
    init.forget_bias_(lstm, 2.0)
    assert (lstm.bias_ih_l0[8:16] == 2).all() and (lstm.parametrizations.bias_ih_l0.original[8:16] == 4).all()
    readout = parametrize.register_parametrization(nn.Linear(4, 3), "bias", Doubled())
    init.output_bias_(readout, torch.ones(5, 3))
    assert torch.equal(readout(torch.zeros(4)), torch.ones(3))
    readout = nn.Linear(4, 3)
    prune.random_unstructured(readout, "bias", 1)
    with pytest.raises(ValueError, match="bias of Linear is computed by RandomUnstructured and cannot be set"):
        init.output_bias_(readout, torch.ones(5, 3))


# --------------------------------------------------------------------------------------------- inputs and outputs


def test_center_subtracts_the_mean_of_its_sample():
    sample = torch.randn(50, 8, 3, dtype=torch.float64) + torch.tensor([1.0, 2.0, 3.0])
    center = init.Center(sample)
    assert torch.allclose(center(sample).mean(dim=(0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    x = torch.zeros(4, 2, 3, dtype=torch.float64)
    assert torch.equal(center(x)[0, 0], -sample.reshape(-1, 3).mean(dim=0))
    assert list(center.state_dict()) == ["mean"] and not list(center.parameters())


@pytest.mark.parametrize("sample", [torch.zeros(0, 3), torch.tensor([[1.0, float("nan")]])])
def test_center_refuses(sample):
    with pytest.raises(ValueError, match="sample should be"):
        init.Center(sample)


# with shapes of h_0 and c_0 for 5 sequences
STATES = {
    "RNN": ((1, 5, 20), None),
    "LSTM": ((1, 5, 20), (1, 5, 20)),
    "two layers, two directions": ((4, 5, 20), (4, 5, 20)),
    "projected": ((1, 5, 16), (1, 5, 20)),
    "RNNCell": ((5, 20), None),
    "LSTMCell": ((5, 20), (5, 20)),
    "GRU": ((2, 5, 20), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_initial_state_is_what_the_layer_takes_and_learns(library, name):
    rnn = LAYERS[name](library, dtype=torch.float64)
    state = init.InitialState(rnn, std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(*([] if name.endswith("Cell") else [6]), 5, 3, dtype=torch.float64)
    hx = state(5)
    pair = hx if isinstance(hx, tuple) else (hx, None)
    assert tuple(None if s is None else tuple(s.shape) for s in pair) == STATES[name]
    assert all(torch.equal(s[..., :1, :].expand_as(s), s) for s in pair if s is not None)  # the same for all sequences
    assert list(state.state_dict()) == ["h_0", "c_0"][: 1 + (pair[1] is not None)]

    def loss(of):
        out = rnn(x, of)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    loss(hx).backward()
    for parameter in state.parameters():  # a difference quotient along the gradient
        slope, step = parameter.grad.norm().item(), 1e-6 * parameter.grad / parameter.grad.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step
                values.append(loss(state(5)).item())
            parameter += step
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)

    one = rnn(x[..., 2, :], state())  # without a batch dimension
    many = rnn(x, state(5))
    one, many = (out[0] if isinstance(out, tuple) else out for out in (one, many))
    assert torch.allclose(one, many[..., 2, :], rtol=1e-12, atol=1e-12)


def test_initial_state_starts_at_the_default_state_or_from_its_generator():
    for rnn in (rnnfast.LSTM(3, 20), nn.GRU(3, 20), nn.GRUCell(3, 20)):
        assert all((p == 0).all() and p.requires_grad for p in init.InitialState(rnn).parameters())
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    a, b = (init.InitialState(rnnfast.LSTM(3, 500), 0.2, seed) for seed in seeds)
    assert torch.equal(a.c_0, b.c_0) and not torch.equal(a.c_0, a.h_0)
    assert a.h_0.std().item() == pytest.approx(0.2, rel=0.15)  # 4.7 standard errors
    half = init.InitialState(rnnfast.LSTM(3, 20, dtype=torch.bfloat16))
    assert half(2)[0].dtype == torch.bfloat16


def test_initial_state_refuses():
    with pytest.raises(TypeError, match="an RNN, LSTM or GRU layer or cell, got Linear"):
        init.InitialState(nn.Linear(3, 3))
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std should be a number >= 0"):
            init.InitialState(rnnfast.RNN(3, 20), std)


def test_output_bias_predicts_the_mean():
    readout, zeros = nn.Linear(4, 3), torch.zeros(1, 4)
    values = torch.randn(10, 6, 3)
    assert init.output_bias_(readout, values) is readout
    assert torch.allclose(readout(zeros)[0], values.mean(dim=(0, 1)), atol=1e-6)

    init.output_bias_(readout, torch.tensor([[True, False, True], [True, False, False]]))
    assert torch.allclose(readout(zeros)[0].sigmoid(), torch.tensor([3 / 4, 1 / 4, 1 / 2]))

    init.output_bias_(readout, torch.tensor([0, 0, 0, 1]))
    assert torch.allclose(readout(zeros)[0].softmax(0), torch.tensor([4 / 7, 2 / 7, 1 / 7]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(5, 2), r"should be \(...,3\) .* got shape \(5, 2\)"),
        (torch.tensor([0, 3]), "should be classes 0 to 2, got 0 to 3"),
        (torch.zeros(0, dtype=torch.int64), "got none"),
        (torch.full((5, 3), float("inf")), "finite"),
        (torch.zeros(0, 3), "not empty"),
        (torch.zeros(0, 3, dtype=torch.bool), "not empty"),
    ],
)
def test_output_bias_refuses_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        init.output_bias_(nn.Linear(4, 3), targets)


def test_output_bias_needs_a_bias():
    with pytest.raises(TypeError, match=r"readout should be a torch.nn.Linear, got RNN"):
        init.output_bias_(rnnfast.RNN(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="bias=False"):
        init.output_bias_(nn.Linear(4, 3, bias=False), torch.zeros(1, 3))
