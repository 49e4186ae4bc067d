"""HessianFree: its products against explicit float64 matrices, its steps against direct solutions, and its safety."""

from __future__ import annotations

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast._autograd import recorded
from rnnfast.optim import GaussNewton, HessianFree, hessian_free

T, B, I, H, O = 5, 3, 2, 4, 3  # noqa: E741

LAYERS = {
    "tanh": lambda: rnnfast.RNN(I, H),
    "tanh deep": lambda: rnnfast.RNN(I, H, 2, bidirectional=True),
    "relu": lambda: rnnfast.RNN(I, H, 2, nonlinearity="relu"),
    "lstm": lambda: rnnfast.LSTM(I, H),
    "lstm deep": lambda: rnnfast.LSTM(I, H, 2, bidirectional=True),
    "projected": lambda: rnnfast.LSTM(I, H, 2, proj_size=2),
}
LOSSES = {
    "squared": (lambda: torch.randn(T, B, O), F.mse_loss),
    "cross-entropy": (
        lambda: torch.randint(O, (T, B)),
        lambda outputs, y: F.cross_entropy(outputs.flatten(0, 1), y.flatten()),
    ),
    "logistic": (lambda: torch.randint(2, (T, B, O)).double(), F.binary_cross_entropy_with_logits),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """x (T,B,I) -> outputs (T,B,O)"""

    def __init__(self, layer="tanh"):
        super().__init__()
        self.rnn = LAYERS[layer]()
        width = (self.rnn.proj_size or H) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, O)
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Forward:
    """() -> model(x)"""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __call__(self):
        return self.model(self.x)


def problem(layer="tanh", loss="squared"):
    """-> model, forward, loss"""
    model, x = Net(layer), torch.randn(T, B, I)
    draw, formula = LOSSES[loss]
    y = draw()
    return model, Forward(model, x), lambda outputs: formula(outputs, y)


def like(model, vector):
    """(W) -> its parts like the parameters"""
    parameters = list(model.parameters())
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def jacobian(model, function):
    """d function(model with parameters as given) / d parameters, (outputs,W), by torch's own operators."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    J = jacrev(lambda p: function(dict(zip(names, p, strict=True))).flatten())([p.detach() for p in parameters])
    return torch.cat([j.flatten(1) for j in J], dim=1)


def model_jacobian(model, x):
    """Of a net's outputs, (T*B*O,W)"""
    plain = rnnfast.revert(copy.deepcopy(model))
    return jacobian(plain, lambda p: functional_call(plain, p, (x,)))


def gauss_newton(model, forward, loss):
    """G by its definition, (W,W)"""
    J = model_jacobian(model, forward.x)
    outputs = forward().detach()
    curvature = hessian(loss)(outputs).reshape(outputs.numel(), outputs.numel())
    return J.T @ curvature @ J


def plain_slopes_and_z(rnn, weights, x):
    """Every unit's pre-activations, (L*D,T,B,G,H), and the slopes there, by the equations."""
    D, lstm = 2 if rnn.bidirectional else 1, rnn.mode == "LSTM"
    G, all_z, all_slopes = 4 if lstm else 1, [], []
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(D):
            suffix = f"_l{layer}" + ("_reverse" if d else "")
            w_ih, w_hh, b_ih, b_hh = (weights[n + suffix] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h, c = x.new_zeros(B, w_hh.size(1)), x.new_zeros(B, H)
            zs, slopes, hs = [None] * T, [None] * T, [None] * T
            for t in reversed(range(T)) if d else range(T):
                z = x[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh  # (B,G*H)
                if lstm:
                    i, f, g, o = z.chunk(4, dim=1)
                    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
                    c = f * c + i * g
                    h = o * c.tanh()
                    slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], dim=1)
                    if rnn.proj_size:
                        h = h @ weights["weight_hr" + suffix].T
                elif rnn.mode == "RNN_TANH":
                    h = z.tanh()
                    slope = 1 - h * h
                else:
                    h = z.relu()
                    slope = (z > 0).to(z)
                zs[t], slopes[t], hs[t] = z.view(B, G, H), slope.view(B, G, H), h
            all_z.append(torch.stack(zs))
            all_slopes.append(torch.stack(slopes))
            outputs.append(torch.stack(hs))
        x = torch.cat(outputs, dim=-1)
    return torch.stack(all_z), torch.stack(all_slopes)


def structural(model, x):
    """S by its definition, (W,W); the head's weights have none."""
    weights = {name.removeprefix("rnn."): p.detach() for name, p in model.named_parameters()}
    J = jacobian(
        model, lambda p: plain_slopes_and_z(model.rnn, {n.removeprefix("rnn."): w for n, w in p.items()}, x)[0]
    )
    slopes = plain_slopes_and_z(model.rnn, weights, x)[1].flatten()
    return J.T @ (slopes[:, None] * J) / B


def step_of(model, forward, loss, **options):
    """A step as far as it gets before anything is decided."""
    return hessian_free._Step(HessianFree(model.parameters(), **options), forward, loss, None)


# ------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layer", LAYERS)
def test_product_is_that_with_the_matrix(layer, loss):
    model, forward, loss = problem(layer, loss)
    G = gauss_newton(model, forward, loss)
    linearised = GaussNewton(forward, loss, list(model.parameters()))
    for _ in range(3):
        v = torch.randn(G.size(0))
        assert flat(linearised.product(like(model, v))).sub(G @ v).abs().max() < 1e-12 * (1 + (G @ v).abs().max())
    expected = torch.autograd.grad(loss(forward()), list(model.parameters()))
    assert flat(linearised.gradient()).sub(flat(expected)).abs().max() < 1e-13
    assert linearised.loss.item() == pytest.approx(loss(forward()).item(), rel=1e-14)


@pytest.mark.parametrize("layer", LAYERS)
def test_structural_damping_is_that_with_the_matrix(layer):
    model, forward, loss = problem(layer)
    x = forward.x
    G, S = gauss_newton(model, forward, loss), structural(model, x)
    assert S.diagonal().max() > 0.01
    linearised = GaussNewton(forward, loss, list(model.parameters()))
    for weight in (0.3, 7.0):
        v = torch.randn(G.size(0))
        expected = (G + weight * S) @ v
        error = flat(linearised.product(like(model, v), weight)).sub(expected).abs().max()
        assert error < 1e-12 * expected.abs().max()


def test_structural_damping_is_the_martens_sutskever_term():
    """dz_t += lambda mu (1 - h_t^2) R{z_t}: by hand in one backward sweep."""
    model, forward, loss = problem()
    x, rnn, weight = forward.x, model.rnn, 0.7
    v = [torch.randn_like(p) for p in model.parameters()]
    w_hh = rnn.weight_hh_l0.detach()
    v_ih, v_hh, v_b, v_b2, *_ = v
    h, Rh = [torch.zeros(B, H)], [torch.zeros(B, H)]
    Rz = []
    for t in range(T):
        h.append(rnn(x)[0][t].detach())
        Rz.append(x[t] @ v_ih.T + h[t] @ v_hh.T + v_b + v_b2 + Rh[t] @ w_hh.T)
        Rh.append((1 - h[-1] ** 2) * Rz[-1])
    dz, d_ih, d_hh, d_b = torch.zeros(B, H), torch.zeros(H, I), torch.zeros(H, H), torch.zeros(H)
    for t in reversed(range(T)):
        dz = (1 - h[t + 1] ** 2) * (dz @ w_hh) + weight / B * (1 - h[t + 1] ** 2) * Rz[t]
        d_ih, d_hh, d_b = d_ih + dz.T @ x[t], d_hh + dz.T @ h[t], d_b + dz.sum(0)
    linearised = GaussNewton(forward, loss, list(model.parameters()))
    difference = flat(linearised.product(v, weight)) - flat(linearised.product(v))
    assert difference[: -O * H - O].sub(flat([d_ih, d_hh, d_b, d_b])).abs().max() < 1e-13
    assert difference[-O * H - O :].abs().max() < 1e-15


def test_recorded_states_are_the_arcsine():
    model, forward, _ = problem("lstm deep")
    x = forward.x
    with recorded.recording() as calls:
        result = model.rnn(x)
    (s, sequences), (y, (h_n, c_n)) = calls[0], model.rnn(x)
    z = plain_slopes_and_z(model.rnn, dict(model.rnn.named_parameters()), x)[0]
    i, f, g, o = z.unbind(3)
    expected = [(2 * i.sigmoid() - 1).arcsin(), (2 * f.sigmoid() - 1).arcsin(), g.tanh().arcsin()]
    expected = torch.stack([*expected, (2 * o.sigmoid() - 1).arcsin()], dim=3)
    assert sequences == B and s.sub(expected.reshape(s.shape)).abs().max() < 1e-13
    assert torch.equal(result[0], y) and torch.equal(result[1][0], h_n) and torch.equal(result[1][1], c_n)
    assert not recorded.is_recording()


def test_saturated_units_are_finite():
    model, forward, _ = problem()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        with torch.no_grad():
            for p in model.rnn.parameters():
                p.mul_(1e4)
        x = forward.x.to(dtype)
        assert (model.rnn(x)[0].abs() == 1).any()
        linearised = GaussNewton(lambda x=x: model(x), lambda o: o.square().sum(), list(model.parameters()))
        product = linearised.product([torch.randn_like(p) for p in model.parameters()], 1.0)
        assert all(p.isfinite().all() for p in product)


def test_packed_several_calls_frozen_and_unused():
    """A sequence's padding adds nothing; layers may be called twice; some parameters are frozen, some unused."""
    rnn, head, unused = rnnfast.RNN(H, H), nn.Linear(H, O), nn.Linear(2, 2)
    rnn.bias_ih_l0.requires_grad_(False)
    x, lengths = torch.randn(T, B, H), [5, 3, 2]
    parameters = [p for p in [*rnn.parameters(), *head.parameters(), *unused.parameters()] if p.requires_grad]

    def forward():
        out, h_n = rnn(pack_padded_sequence(x, lengths))
        return head(rnn(out, h_n)[1])

    separate = copy.deepcopy(rnn)
    loss = torch.nn.MSELoss()
    target = torch.randn(1, B, O)
    packed = GaussNewton(forward, lambda o: loss(o, target), parameters)
    v = [torch.randn_like(p) for p in parameters]

    def one_by_one():
        outs = []
        for b, n in enumerate(lengths):
            out, h_n = separate(x[:n, b : b + 1])
            outs.append(head(separate(out, h_n)[1]))
        return torch.cat(outs, dim=1)

    theirs = [p for p in [*separate.parameters(), *head.parameters(), *unused.parameters()] if p.requires_grad]
    split = GaussNewton(one_by_one, lambda o: loss(o, target), theirs)
    for weight in (0.0, 0.5):
        ours, other = packed.product(v, weight), split.product(v, weight / B)  # one call has B sequences, the others 1
        for a, b in zip(ours, other, strict=True):
            assert a.sub(b).abs().max() < 1e-13
    assert all(p.abs().max() == 0 for p in ours[-2:])


def test_models_without_our_layers():
    model = nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, O))
    x, y = torch.randn(7, I), torch.randn(7, O)
    J = jacobian(model, lambda p: functional_call(model, p, (x,)))
    linearised = GaussNewton(lambda: model(x), lambda o: (o - y).square().sum() / 2, list(model.parameters()))
    v = torch.randn(J.size(1))
    assert flat(linearised.product(like(model, v), 1.0)).sub(J.T @ (J @ v)).abs().max() < 1e-13


def test_a_loss_that_is_linear_has_no_curvature():
    model, forward, _ = problem()
    linearised = GaussNewton(forward, torch.sum, list(model.parameters()))
    assert all(p.abs().max() == 0 for p in linearised.product([torch.ones_like(p) for p in model.parameters()]))


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("precondition", [False, True])
def test_conjugate_gradients_solve_the_damped_system(monkeypatch, precondition):
    monkeypatch.setattr(hessian_free, "PROGRESS", 0.0)
    model, forward, loss = problem("lstm")
    G, S = gauss_newton(model, forward, loss), structural(model, forward.x)
    eye = torch.eye(G.size(0))
    options = {"damping": 0.2, "mu": 0.5, "weight_decay": 0.01, "cg_steps": 500, "precondition": precondition}
    step = step_of(model, forward, loss, **options)
    w = flat(model.parameters())
    g = flat(torch.autograd.grad(loss(forward()), list(model.parameters()))) + 0.01 * w
    expected = torch.linalg.solve(G + 0.2 * 0.5 * S + 0.21 * eye, -g)
    start = torch.randn_like(w)
    for first in (torch.zeros_like(w), start):
        result = step.conjugate_gradients(first)
        assert result.path[-1].sub(expected).abs().max() < 1e-9 * expected.abs().max()
    assert step.promised(expected) == pytest.approx(float(g @ expected + expected @ (G + 0.01 * eye) @ expected / 2))


def test_cg_starts_from_part_of_its_last_result():
    model, forward, loss = problem()
    optimizer = HessianFree(model.parameters(), decay=0.7)
    first = hessian_free._Step(optimizer, forward, loss, None)
    assert first.first_guess().abs().max() == 0
    result = first.conjugate_gradients(first.first_guess())
    optimizer.step(forward, loss)
    second = hessian_free._Step(optimizer, forward, loss, None)
    assert torch.equal(second.first_guess(), 0.7 * result.path[-1])
    assert second.conjugate_gradients(second.first_guess()).path[0].sub(0.7 * result.path[-1]).abs().max() == 0


def test_path_of_cg(monkeypatch):
    """Each kept result is 1.3 times as many steps in as the one before, or a step more; the last one comes once."""
    monkeypatch.setattr(hessian_free, "PROGRESS", 0.0)
    model, forward, loss = problem("lstm")
    step = step_of(model, forward, loss, cg_steps=20)
    path = step.conjugate_gradients(torch.zeros_like(step.w)).path
    ends = []
    for steps in (1, 2, 3, 4, 6, 7, 10, 12, 16, 20):
        step.group["cg_steps"] = steps
        ends.append(step.conjugate_gradients(torch.zeros_like(step.w)).path[-1])
    assert len(path) == len(ends) + 1 and path[0].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(path[1:], ends, strict=True))


def test_preconditioner_is_the_mean_squared_gradient(monkeypatch):
    monkeypatch.setattr(hessian_free, "SIGNS", 4000)
    model, forward, loss = problem()
    step = step_of(model, forward, loss, damping=0.1, precondition=True)
    outputs = forward()
    (slope,) = torch.autograd.grad(loss(outputs), outputs)
    J = model_jacobian(model, forward.x)
    squares = (J * slope.flatten()[:, None]).square().sum(0) * (T * B)
    assert torch.allclose(step.preconditioner(), (squares + 0.1) ** -0.75, rtol=0.2)


def test_stop_rule():
    stalled = hessian_free.has_stalled
    assert not stalled([0.0] + [-1.0] * 10)  # fewer than k = 10 steps to look back over
    assert stalled([0.0] + [-1.0] * 11)
    assert not stalled([0.0] + [1.0] * 11)  # worse than where the weights are
    gain = [-(1 + 6e-4 * i) for i in range(50)]  # of 1 + 6e-4 * 49, so relative progress is below 6e-4 a step
    assert not stalled(gain) and stalled([-(1 + 4e-4 * i) for i in range(50)])
    late = [-1.0] * 271 + [-1.02] * 31  # k = 30
    assert stalled(late) and not stalled(late[:-1])


def quadratic(**options):
    """Linear regression: the loss is its quadratic model."""
    model = nn.Linear(6, 2)
    x, y = torch.randn(40, 6), torch.randn(40, 2)
    optimizer = HessianFree(model.parameters(), **options)
    return model, optimizer, lambda: model(x), lambda o: F.mse_loss(o, y), x, y


def test_quadratic_is_solved_in_one_step(monkeypatch):
    monkeypatch.setattr(hessian_free, "PROGRESS", 1e-12)
    model, optimizer, forward, loss, x, y = quadratic(damping=1e-12)
    before = loss(forward()).item()
    report = optimizer.step(forward, loss)
    ones = torch.cat([x, torch.ones(40, 1)], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution
    assert model.weight.sub(expected[:6].T).abs().max() < 1e-8 and model.bias.sub(expected[6]).abs().max() < 1e-8
    assert report.loss == pytest.approx(before) and report.new_loss == pytest.approx(loss(forward()).item())
    assert report.rho == pytest.approx(1) and report.rate == 1 and not report.rejected
    assert report.damping == 1e-12 and optimizer.param_groups[0]["damping"] == pytest.approx(1e-12 * 2 / 3)
    assert 7 <= report.cg_steps < 60


def test_step_of_a_damped_quadratic(monkeypatch):
    """With much damping the step is short, and exactly the direct solution; weight decay counts."""
    monkeypatch.setattr(hessian_free, "PROGRESS", 1e-14)
    model, optimizer, forward, loss, x, _ = quadratic(damping=3.0, weight_decay=0.5)
    w = flat(model.parameters())
    G = gauss_newton_of_linear(x)
    g = flat(torch.autograd.grad(loss(forward()), list(model.parameters()))) + 0.5 * w
    expected = w - torch.linalg.solve(G + 3.5 * torch.eye(14), g)
    report = optimizer.step(forward, loss)
    assert flat(model.parameters()).sub(expected).abs().max() < 1e-7
    assert report.new_loss == pytest.approx(loss(forward()).item() + 0.25 * float(expected @ expected))
    assert report.rho == pytest.approx(1)


def gauss_newton_of_linear(x):
    """Of mse_loss(Linear(6,2)(x)) in (weight (2,6), bias (2)), (14,14)"""
    model = nn.Linear(6, 2)
    J = jacobian(model, lambda p: functional_call(model, p, (x,)))
    return J.T @ J * (2 / J.size(0))


def test_damping_follows_the_reduction_ratio(monkeypatch):
    for rho, factor in [(0.9, 2 / 3), (0.5, 1.0), (0.1, 1.5), (-1.0, 1.5)]:
        _, optimizer, forward, loss, *_ = quadratic(damping=0.3)
        monkeypatch.setattr(hessian_free._Step, "promised", lambda step, d, rho=rho: step.fall(d) / rho)
        monkeypatch.setattr(
            hessian_free._Step, "fall", lambda step, d: step.loss_at(step.w + d) - step.value, raising=False
        )
        report = optimizer.step(forward, loss)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(0.3 * factor)
        assert math.isnan(report.rho) if rho < 0 else report.rho == pytest.approx(rho)


def test_curvature_of_other_sequences():
    model, forward, loss = problem("lstm")
    other = Net("lstm")
    other.load_state_dict(model.state_dict())
    x, y = torch.randn(T, 2, I), torch.randn(T, 2, O)
    second = (lambda: model(x)), (lambda o: F.mse_loss(o, y))
    step = hessian_free._Step(HessianFree(model.parameters(), mu=0.0), forward, loss, second)
    v = torch.randn_like(step.w)
    expected = GaussNewton(*second, list(model.parameters())).product(like(model, v))
    assert step.product(v, 0.5).sub(flat(expected) + 0.5 * v).abs().max() < 1e-14
    assert step.gradient.sub(flat(torch.autograd.grad(loss(forward()), list(model.parameters())))).abs().max() < 1e-14
    assert HessianFree(model.parameters()).step(forward, loss, second).new_loss < loss(forward()).item() + 1


def test_backtracking_takes_the_best_of_the_path():
    model, forward, loss = problem()
    step = step_of(model, forward, loss)
    losses = {1.0: 0.5, 2.0: 0.3, 3.0: 0.2, 4.0: 0.25}
    step.loss_at = lambda w: losses[round(float((w - step.w)[0]), 6)]
    path = [torch.full_like(step.w, k) for k in (1.0, 2.0, 3.0, 4.0)]
    d, value = step.best(path)
    assert d[0] == 3.0 and value == 0.2


def test_line_search_shortens():
    model, forward, loss = problem()
    step = step_of(model, forward, loss)
    d = -step.gradient
    slope, accepted = float(step.gradient @ d), []

    def loss_at(w):
        rate = float(((w - step.w) @ d) / (d @ d))
        accepted.append(rate)
        return step.value + (0.011 if rate < 0.6 else 0.009) * rate * slope

    step.loss_at = loss_at
    rate, value = step.line_search(d, step.value + 0.009 * slope)  # it falls, but by too little
    assert rate == pytest.approx(0.8**3) and accepted == pytest.approx([0.8, 0.64, 0.512])
    assert value == pytest.approx(step.value + 0.011 * rate * slope)


def trained(model, optimizer, forward, loss, steps):
    return [optimizer.step(forward, loss) for _ in range(steps)], flat(model.parameters())


@pytest.mark.parametrize("layer", ["tanh", "lstm deep"])
def test_learns_and_reports(layer):
    model, forward, loss = problem(layer, "cross-entropy")
    reports, _ = trained(model, HessianFree(model.parameters()), forward, loss, 15)
    assert reports[-1].new_loss < 0.1 * reports[0].loss
    for before, after in pairwise(reports):
        assert after.loss == pytest.approx(before.new_loss, rel=1e-12)
    assert all(r.new_loss < r.loss and r.cg_steps >= 1 and 0 < r.rate <= 1 for r in reports if not r.rejected)
    assert len({r.damping for r in reports}) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_exact(dtype):
    model = Net("tanh deep").to(dtype)
    x, y = torch.randn(T, B, I, dtype=dtype), torch.randn(T, B, O, dtype=dtype)

    def run(model, optimizer, steps):
        return trained(model, optimizer, lambda: model(x), lambda o: F.mse_loss(o, y), steps)

    optimizer = HessianFree(model.parameters(), damping=0.02, precondition=True)
    run(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = run(model, optimizer, 3)
    file.seek(0)
    saved = torch.load(file)
    again = Net("tanh deep").to(dtype)
    again.load_state_dict(saved["model"])
    resumed = HessianFree(again.parameters())
    resumed.load_state_dict(saved["optimizer"])
    reports, w = run(again, resumed, 3)
    assert reports == expected[0] and torch.equal(w, expected[1])
    without = HessianFree(again.parameters(), damping=0.02, precondition=True)
    again.load_state_dict(saved["model"])
    assert run(again, without, 3)[0] != reports  # the state matters


def test_grad_is_left_alone():
    model, forward, loss = problem()
    model.head.bias.grad = torch.full((O,), 3.0)
    HessianFree(model.parameters()).step(forward, loss)
    assert model.rnn.weight_hh_l0.grad is None and torch.equal(model.head.bias.grad, torch.full((O,), 3.0))


# ------------------------------------------------------------------------------------------ safety


def unchanged(model):
    """-> a check that the parameters are the same tensors with the same numbers in the same place"""
    before = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]

    def check():
        for p, (same, address, values) in zip(model.parameters(), before, strict=True):
            assert p is same and p.data_ptr() == address and torch.equal(p, values)

    return check


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_whatever_is_raised_the_weights_stay(error):
    for fails_at in range(1, 12):
        model, forward, loss = problem()
        check, calls = unchanged(model), []

        def failing(calls=calls, forward=forward, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise error("no")
            return forward()

        try:
            HessianFree(model.parameters()).step(failing, loss)
        except error:
            check()
        else:
            assert fails_at > 3  # beyond all calls
            break
    else:
        pytest.fail("a step of a small problem calls forward less often")


def test_dropout_is_found():
    model, _, loss = problem()
    x, drop = torch.randn(T, B, I), nn.Dropout(0.5)
    check = unchanged(model)
    with pytest.raises(RuntimeError, match="same whenever the weights are the same"):
        HessianFree(model.parameters()).step(lambda: drop(model(x)), loss)
    check()


def test_loss_that_is_not_convex():
    model, forward, _ = problem()
    check = unchanged(model)
    with pytest.raises(ValueError, match="convex in the outputs"):
        HessianFree(model.parameters(), damping=1e-3).step(forward, lambda o: -o.square().mean())
    check()


def test_loss_that_is_not_finite():
    model, forward, _ = problem()
    check = unchanged(model)
    for value in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="finite at the start"):
            HessianFree(model.parameters()).step(forward, lambda o, value=value: o.sum() * 0 + value)
    check()


def rejected(model, forward, loss, reason):
    optimizer, check = HessianFree(model.parameters(), damping=0.4), unchanged(model)
    report = optimizer.step(forward, loss)
    assert reason in report.rejected and report.rate == 0 and report.new_loss == report.loss
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.6)
    check()


class Twisted(torch.autograd.Function):
    """x, whose gradients are multiplied with a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_gradient_that_is_not_finite_is_rejected():
    model, forward, loss = problem()
    rejected(model, forward, lambda o: loss(Twisted.apply(o, math.inf)), "gradient is not finite")


def test_curvature_that_is_not_finite_is_rejected():
    model, forward, _ = problem()
    zero = torch.zeros(T, B, O)
    rejected(model, forward, lambda o: o.sum() + (o * zero).abs().pow(1.5).sum(), "curvature is not finite")


def test_direction_along_which_the_loss_grows_is_rejected():
    model, forward, loss = problem()
    rejected(model, forward, lambda o: loss(Twisted.apply(o, -1.0)), "does not fall")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping should be positive, got 0.0"),
        ({"damping": math.nan}, "damping should be positive, got nan"),
        ({"mu": -1.0}, "mu should be >= 0, got -1.0"),
        ({"cg_steps": 0}, "cg_steps should be at least 1, got 0"),
        ({"decay": 1.1}, r"decay should be in \[0,1\], got 1.1"),
        ({"weight_decay": -0.1}, "weight_decay should be >= 0, got -0.1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HessianFree(Net().parameters(), **options)


def test_bad_problems():
    model, forward, loss = problem()
    optimizer = HessianFree(model.parameters())
    with pytest.raises(ValueError, match="one parameter group"):
        HessianFree([{"params": model.rnn.parameters()}, {"params": model.head.parameters()}])
    with pytest.raises(TypeError, match="should return a tensor, got tuple"):
        optimizer.step(lambda: (forward(),), loss)
    with pytest.raises(TypeError, match=r"scalar tensor, got shape \(5, 3, 3\)"):
        optimizer.step(forward, torch.square)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        optimizer.step(forward, lambda o: 1.0)
    with pytest.raises(RuntimeError, match="depend on the parameters, got constants"):
        optimizer.step(lambda: forward().detach(), loss)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="require gradients, got none"):
        optimizer.step(forward, loss)


# ------------------------------------------------------------------------------------------ several processes

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from test_hessian_free import Net, flat
from rnnfast.optim import HessianFree

rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo", init_method=f"file://{folder}/store{processes}", rank=rank, world_size=processes)
torch.manual_seed(0)
model = Net("tanh deep")
x, y = torch.randn(5, 4, 2), torch.randn(5, 4, 3)
mine = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
parallel = DistributedDataParallel(model)
optimizer = HessianFree(model.parameters(), damping=0.5, cg_steps=8, process_group=dist.group.WORLD)
reports = [optimizer.step(lambda: parallel(x[:, mine]), lambda o: F.mse_loss(o, y[:, mine])) for _ in range(4)]
torch.save((reports, flat(model.parameters())), f"{folder}/{processes}.{rank}")
dist.destroy_process_group()
"""


def test_two_processes_make_the_step_of_one(run_python, tmp_path):
    def run(rank, processes):
        return run_python("-c", WORKER, str(rank), str(processes), str(tmp_path), GLOO_SOCKET_IFNAME="lo")

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, (0, 0, 1), (1, 2, 2)))
    assert all(d.returncode == 0 for d in done), "\n".join(d.stderr for d in done)
    (one, w), (first, w1), (second, w2) = (
        torch.load(tmp_path / name, weights_only=False) for name in ("1.0", "2.0", "2.1")
    )
    assert first == second and torch.equal(w1, w2)
    # more steps of CG, or less damping, would show how it enlarges rounding, which differs
    assert w1.sub(w).abs().max() < 1e-9 and one[-1].new_loss < 0.9 * one[0].loss
    for a, b in zip(one, first, strict=True):
        assert b.new_loss == pytest.approx(a.new_loss, rel=1e-8) and b.damping == a.damping
