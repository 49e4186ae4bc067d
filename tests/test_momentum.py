"""MomentumSchedule: the paper's numbers, the paper's update, and a resume that changes nothing."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import rnnfast
from rnnfast.optim import MomentumSchedule, momentum

A = np.diag([0.1, 1.0, 7.0])  # a quadratic, theta^T A theta / 2
START = np.array([1.0, -2.0, 0.5])


@pytest.fixture
def soon(monkeypatch):
    """The schedules' phases shortened, so that a test sees all of them."""
    monkeypatch.setattr(momentum, "LOW_UPDATES", 7)
    monkeypatch.setattr(momentum, "PERIOD", 4)


def sgd(lr=0.05, mu=0.5, **options):
    w = torch.tensor(START, requires_grad=True)
    return w, SGD([w], lr=lr, momentum=mu, nesterov=True, **options)


def update(w, optimizer):
    optimizer.zero_grad()
    (w @ torch.tensor(A) @ w / 2).backward()
    optimizer.step()


def papers(mus, lrs):
    """theta_t and theta_t + mu_t v_t for t = 1, 2, ... of Nesterov's accelerated gradient as the paper writes it."""
    theta, v, thetas, places = START, np.zeros(3), [], []
    for t, lr in enumerate(lrs):
        v = mus[t] * v - lr * A @ (theta + mus[t] * v)
        theta = theta + v
        thetas.append(theta)
        places.append(theta + mus[t + 1] * v)
    return np.array(thetas), np.array(places)


def papers_places(mus, lrs):
    return papers(mus, lrs)[1]


def constant(t, mu, updates):
    return min(0.9, mu) if t >= updates - 7 else 0.9 if t < 7 else mu


def increasing(t, mu, updates):
    return min(0.9, mu) if t >= updates - 7 else min(1 - 2 ** (-1 - math.log2(t // 4 + 1)), mu)


@pytest.mark.parametrize("mu", [0.0, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("schedule", ["constant", "increasing"])
@pytest.mark.parametrize("rates", [lambda t: 0.05, lambda t: 0.05 / (1 + t), lambda t: 0.01 * (1 + t % 3)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("updates", [None, 40])
def test_the_update_is_the_papers(soon, mu, schedule, rates, foreach, updates):
    """Against the paper's recursion in float64, with momentum and learning rate changing: where the gradient is taken,
    and theta."""
    steps = 40
    w, optimizer = sgd(lr=1.0, foreach=foreach)
    learning_rate = LambdaLR(optimizer, rates)
    scheduler = MomentumSchedule(optimizer, mu, schedule, updates)
    thetas, places = [], []
    for _ in range(steps):
        update(w, optimizer)
        learning_rate.step()
        scheduler.step()
        place = w.detach().numpy().copy()
        with scheduler.at_theta():
            thetas.append(w.detach().numpy().copy())
        assert np.array_equal(w.detach().numpy(), place)  # to the last bit
        places.append(place)
    mu_at = {"constant": constant, "increasing": increasing}[schedule]
    mus = [mu_at(t, mu, math.inf if updates is None else updates) for t in range(steps + 1)]
    expected = papers(mus, [rates(t) for t in range(steps)])
    assert np.allclose(thetas, expected[0], rtol=1e-10, atol=1e-13)
    assert np.allclose(places, expected[1], rtol=1e-10, atol=1e-13)


def test_momentum_that_vanishes_and_returns(soon, monkeypatch):
    """torch leaves its buffers alone while the momentum is 0: what they hold must not come back later."""
    mus = [0.5, 0.5, 0.0, 0.0, 0.9, 0.9, 0.0, 0.8, 0.8, 0.8, 0.8, 0.8]
    monkeypatch.setattr(MomentumSchedule, "momentum_at", lambda self, t: mus[t])
    w, optimizer = sgd()
    scheduler = MomentumSchedule(optimizer, 0.5)
    thetas, places = [], []
    for _ in range(10):
        update(w, optimizer)
        scheduler.step()
        places.append(w.detach().numpy().copy())
        with scheduler.at_theta():
            thetas.append(w.detach().numpy().copy())
    expected = papers(mus, [0.05] * 10)
    assert np.allclose(thetas, expected[0], rtol=1e-12, atol=1e-15)
    assert np.allclose(places, expected[1], rtol=1e-12, atol=1e-15)


def test_theta_comes_back_after_an_error_and_is_where_it_is_before_the_first_update():
    w, optimizer = sgd()
    frozen = torch.ones(2, requires_grad=True)
    optimizer.add_param_group({"params": [frozen], "nesterov": True})
    scheduler = MomentumSchedule(optimizer, 0.98)
    with scheduler.at_theta():
        assert np.array_equal(w.detach().numpy(), START)
    update(w, optimizer)
    scheduler.step()
    place = w.detach().clone()
    with pytest.raises(ZeroDivisionError), scheduler.at_theta():
        assert not torch.equal(w, place) and torch.equal(frozen, torch.ones(2))
        raise ZeroDivisionError
    assert torch.equal(w, place) and w.requires_grad
    with scheduler.at_theta():
        theta = w.detach().clone()
        with scheduler.at_theta():
            assert torch.equal(w, theta)
        assert torch.equal(w, theta)
        state = scheduler.state_dict()
        with pytest.raises(RuntimeError, match="the update would be lost"):
            scheduler.step()
    assert torch.equal(w, place) and scheduler.state_dict() == state
    again = MomentumSchedule(sgd()[1], 0.98)
    again.load_state_dict({**state, "velocity_lrs": [0.05]})  # it was saved at theta, and is not there now
    again.step()


def test_learning_rate_zero_moves_nothing_and_starts_afresh():
    w, optimizer = sgd(lr=1.0)
    rates = [0.05, 0.05, 0.0, 0.05, 0.05, 0.05]
    learning_rate = LambdaLR(optimizer, lambda t: rates[t])
    scheduler = MomentumSchedule(optimizer, 0.9)
    places = []
    for _ in range(5):
        update(w, optimizer)
        learning_rate.step()
        scheduler.step()
        places.append(w.detach().clone())
    assert torch.equal(places[1], places[2])
    g = torch.tensor(A) @ places[2]
    assert torch.allclose(places[3], places[2] - 0.05 * (1 + 0.9) * g)  # no velocity but this update's own
    assert places[4].isfinite().all()


def test_numbers_of_the_paper():
    _, optimizer = sgd()
    rnn = MomentumSchedule(optimizer, 0.98)
    assert [rnn.momentum_at(t) for t in (0, 999, 1000, 49_999)] == [0.9, 0.9, 0.98, 0.98]
    falls = MomentumSchedule(optimizer, 0.98, updates=50_000)
    assert [falls.momentum_at(t) for t in (0, 999, 1000, 48_999, 49_000)] == [0.9, 0.9, 0.98, 0.98, 0.9]
    auto = MomentumSchedule(sgd()[1], 0.99, "increasing", updates=20_000)
    # floor(t/250): 0, 0, 1, 2, 48, 49, 100, then the last 1000 updates
    found = [auto.momentum_at(t) for t in (0, 249, 250, 500, 12_249, 12_250, 18_999, 19_000)]
    assert found == pytest.approx([0.5, 0.5, 0.75, 1 - 1 / 6, 1 - 1 / 98, 0.99, 0.99, 0.9])
    assert MomentumSchedule(sgd()[1], 0.99, "increasing").momentum_at(10**6) == 0.99
    assert MomentumSchedule(sgd()[1], 0.0, "increasing", updates=2000).momentum_at(1500) == 0


@pytest.mark.parametrize("order", ["optimizer first", "schedule first"])
@pytest.mark.parametrize("stop", [3, 6, 7, 8, 20])
def test_resume_is_exact(soon, order, stop):
    def both(w, optimizer):
        return LambdaLR(optimizer, lambda t: 0.05 / (1 + t)), MomentumSchedule(optimizer, 0.98)

    def run(w, optimizer, schedulers, steps):
        for _ in range(steps):
            update(w, optimizer)
            for scheduler in schedulers:
                scheduler.step()

    w, optimizer = sgd(lr=1.0)
    schedulers = both(w, optimizer)
    run(w, optimizer, schedulers, stop)
    file = io.BytesIO()
    torch.save([w.detach(), optimizer.state_dict(), *(s.state_dict() for s in schedulers)], file)
    run(w, optimizer, schedulers, 30)

    file.seek(0)
    place, *states = torch.load(file, weights_only=True)
    again, fresh = sgd(lr=1.0)
    resumed = both(again, fresh)
    again.data.copy_(place)
    loads = list(zip([fresh, *resumed], states, strict=True))
    for target, state in loads if order == "optimizer first" else reversed(loads):
        target.load_state_dict(copy.deepcopy(state))
    run(again, fresh, resumed, 30)
    assert torch.equal(w, again)
    assert resumed[1].last_epoch == stop + 30


def test_made_after_the_optimizers_state_was_loaded(soon):
    w, optimizer = sgd()
    scheduler = MomentumSchedule(optimizer, 0.98)
    for _ in range(10):
        update(w, optimizer)
        scheduler.step()
    again, fresh = sgd()
    again.data.copy_(w.detach())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = MomentumSchedule(fresh, 0.98)
    resumed.load_state_dict(scheduler.state_dict())
    for a, optimizer_, scheduler_ in ((w, optimizer, scheduler), (again, fresh, resumed)):
        update(a, optimizer_)
        scheduler_.step()
        update(a, optimizer_)
    assert torch.equal(w, again)


def test_groups_keep_their_own_learning_rates():
    a, b = (torch.tensor(START, requires_grad=True) for _ in range(2))
    optimizer = SGD([{"params": [a]}, {"params": [b], "lr": 0.01}], lr=0.05, momentum=0.5, nesterov=True)
    scheduler = MomentumSchedule(optimizer, 0.9)
    for _ in range(5):
        for w in (a, b):
            w.grad = torch.tensor(A) @ w.detach()
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.05, 0.01]
    for w, lr in ((a, 0.05), (b, 0.01)):
        assert np.allclose(w.detach().numpy(), papers_places([0.9] * 6, [lr] * 5)[-1], rtol=1e-12)


def test_momentum_zero_from_the_first_update():
    """SGD refuses momentum=0 with nesterov when it is made, but runs with it."""
    w, optimizer = sgd(mu=0.5)
    scheduler = MomentumSchedule(optimizer, 0.0, "increasing")
    for _ in range(3):
        update(w, optimizer)
        scheduler.step()
    expected = np.linalg.matrix_power(np.eye(3) - 0.05 * A, 3) @ START
    assert np.allclose(w.detach().numpy(), expected, rtol=1e-14)


def test_a_network_trains():
    torch.manual_seed(0)
    rnn = rnnfast.init.echo_state_(rnnfast.RNN(2, 20))
    x, y = torch.randn(10, 8, 2), torch.randn(10, 8, 20) / 4
    optimizer = SGD(rnn.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler, losses = MomentumSchedule(optimizer, 0.98), []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (rnn(x)[0] - y).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bad_arguments():
    w, optimizer = sgd()
    with pytest.raises(TypeError, match=r"should be a torch.optim.SGD, got Adam"):
        MomentumSchedule(torch.optim.Adam([w]), 0.9)
    with pytest.raises(ValueError, match="nesterov=True"):
        MomentumSchedule(SGD([w], lr=0.1, momentum=0.9), 0.9)
    for mu in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"mu should be in \[0,1\), got"):
            MomentumSchedule(optimizer, mu)
    with pytest.raises(ValueError, match="schedule should be one of constant, increasing, got 'cosine'"):
        MomentumSchedule(optimizer, 0.9, "cosine")
    for schedule in ("constant", "increasing"):
        with pytest.raises(ValueError, match="updates should be a positive number, got 0"):
            MomentumSchedule(optimizer, 0.9, schedule, updates=0)
