"""rnnfast.tasks: targets worked out again from the inputs, criteria tried, series held against their equations."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import rnnfast
from rnnfast import tasks

LENGTHS = {name: 60 for name in tasks.TASKS}
LEAST = {
    "addition": 20,
    "multiplication": 20,
    "xor": 10,
    "temporal_order": 10,
    "temporal_order_3bit": 10,
    "permutation": 2,
    "memorisation_5bit": 11,
    "memorisation_20bit": 21,
}
VARIABLE = ["addition", "multiplication", "xor", "temporal_order", "temporal_order_3bit"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sequences(name, T=60, B=200):
    """Each sequence by itself: x (length,I), y of its targets, and where they stand."""
    task = tasks.make(name, T)
    x, y, mask = task.sample(B, generator(), torch.float64)
    for b in range(B):
        where = mask[:, b].nonzero().flatten()
        end = int(where[-1]) + 1
        assert (x[end:, b] == 0).all() and (y[~mask[:, b], b] == 0).all()
        yield x[:end, b].numpy(), y[where, b].numpy(), where.tolist()


def right_outputs(task, y, mask):
    """Outputs (N,O) without an error."""
    targets = y[mask]
    if y.is_floating_point():
        return targets.clone() if task.name != "xor" else 8 * targets - 4
    return 8 * torch.nn.functional.one_hot(targets, task.output_size).to(torch.float32)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_shapes_and_dtypes(name):
    task = tasks.make(name, 60)
    for dtype in (torch.float32, torch.float64):
        x, y, mask = task.sample(7, generator(), dtype)
        assert x.shape == (66 if name in VARIABLE else 60, 7, task.input_size)
        assert mask.shape == x.shape[:2] and mask.dtype == torch.bool
        assert x.dtype == dtype
        if y.is_floating_point():
            assert y.dtype == dtype and y.shape == (*mask.shape, task.output_size)
        else:
            assert y.dtype == torch.int64 and y.shape == mask.shape and y.min() >= 0 and y.max() < task.output_size
    assert (task.name, task.T) == (name, 60)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_seed_decides(name):
    task = tasks.make(name, 60)
    first, again, other = (task.sample(20, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, other.x)
    double = task.sample(20, generator(1), torch.float64)
    assert torch.equal(double.x.float(), first.x)


@pytest.mark.parametrize("name", VARIABLE)
def test_lengths_fill_their_range(name):
    lengths = [len(x) for x, _, _ in sequences(name, T=60)]
    assert set(lengths) == set(range(60, 67))


@pytest.mark.parametrize(
    ("name", "combine", "places"),
    [
        ("addition", lambda a, b: a + b, [range(1, 6), range(6, 30)]),
        ("multiplication", lambda a, b: a * b, [range(1, 6), range(6, 30)]),
        ("xor", lambda a, b: float(a != b), [range(1, 12), range(18, 30)]),
    ],
)
def test_marked_numbers(name, combine, places):
    found, numbers = [set(), set()], []
    for x, y, where in sequences(name):
        marked = np.flatnonzero(x[:, 1] == 1)
        assert len(marked) == 2 and x[0, 1] == x[-1, 1] == -1 and (x[:, 1] != 0).sum() == 4
        assert where == [len(x) - 1]
        assert y.item() == combine(*x[marked, 0])
        for seen, place in zip(found, marked, strict=True):
            seen.add(int(place))
        numbers.extend(x[:, 0])
    assert found == [set(place) for place in places]
    mean, std = (0.5, 0.5) if name == "xor" else (0.5, 12**-0.5)
    assert np.mean(numbers) == pytest.approx(mean, abs=0.02) and np.std(numbers) == pytest.approx(std, abs=0.01)
    assert set(numbers) == {0, 1} if name == "xor" else 0 <= min(numbers) < max(numbers) < 1


@pytest.mark.parametrize("name", ["addition", "multiplication", "xor"])
@pytest.mark.parametrize("cue", [3, 29])
def test_a_cue_some_steps_before_the_target(name, cue):
    """The same sequences, the mark elsewhere."""
    plain, early = (task.sample(200, generator()) for task in (tasks.make(name, 60), tasks.make(name, 60, cue=cue)))
    assert torch.equal(plain.y, early.y) and torch.equal(plain.mask, early.mask)
    assert torch.equal(plain.x[..., 0], early.x[..., 0])
    last = plain.mask.int().argmax(dim=0)  # (B)
    plain.x[last, torch.arange(200), 1] = 0
    plain.x[last - cue, torch.arange(200), 1] = -1
    assert torch.equal(plain.x, early.x)
    assert ((early.x[..., 1] == 1).sum(dim=0) == 2).all()  # it never hides a marked number


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("temporal_order", [range(1, 7), range(24, 31)]),
        ("temporal_order_3bit", [range(1, 7), range(18, 25), range(30, 37)]),
    ],
)
def test_temporal_order(name, places):
    found, classes = [set() for _ in places], set()
    for x, y, where in sequences(name):
        assert (x.sum(axis=1) == 1).all() and ((x == 0) | (x == 1)).all()
        symbols = x.argmax(axis=1)
        special = np.flatnonzero((symbols == 4) | (symbols == 5))
        assert len(special) == len(places)
        assert symbols[0] == 7 and symbols[-1] == 6 and (np.delete(symbols, [0, -1]) < 6).all()
        assert where == [len(x) - 1]
        assert y.item() == sum(int(symbols[place] - 4) << k for k, place in enumerate(special))
        classes.add(y.item())
        for seen, place in zip(found, special, strict=True):
            seen.add(int(place))
    assert found == [set(place) for place in places]
    assert classes == set(range(2 ** len(places)))


def test_permutation():
    first = []
    for x, y, where in sequences("permutation"):
        symbols = x.argmax(axis=1)
        assert where == list(range(60)) and (x.sum(axis=1) == 1).all()
        assert (symbols[1:] >= 2).all() and (y[:-1] == symbols[1:]).all() and y[-1] == symbols[0]
        first.append(symbols[0])
    assert set(first) == {0, 1} and 0.35 < np.mean(first) < 0.65


@pytest.mark.parametrize(("name", "count", "alphabet"), [("memorisation_5bit", 5, 2), ("memorisation_20bit", 10, 5)])
def test_memorisation(name, count, alphabet):
    shown = set()
    for x, y, where in sequences(name):
        symbols = x.argmax(axis=1)
        assert where == list(range(60)) and (x.sum(axis=1) == 1).all()
        assert (symbols[:count] < alphabet).all() and symbols[-count - 1] == alphabet + 1
        assert (np.delete(symbols[count:], 60 - 2 * count - 1) == alphabet).all()
        assert (y[:-count] == alphabet).all() and (y[-count:] == symbols[:count]).all()
        shown.add(tuple(symbols[:count]))
    assert len(shown) == 32 if alphabet == 2 else len(shown) == 200


@pytest.mark.parametrize(("name", "count"), [("memorisation_5bit", 5), ("memorisation_20bit", 10)])
def test_recall_only(name, count):
    """The same sequences, targets at their ends."""
    whole, recall = tasks.make(name, 60), tasks.make(name, 60, recall_only=True)
    x, y, mask = recall.sample(30, generator())
    every = whole.sample(30, generator())
    assert torch.equal(x, every.x) and torch.equal(y[-count:], every.y[-count:])
    assert mask[-count:].all() and not mask[:-count].any() and (y[:-count] == 0).all()
    outputs = right_outputs(whole, every.y, every.mask).view(60, 30, -1)
    outputs[:-count] = outputs[:-count].flip(-1)
    outputs[-1, 3] = outputs[-1, 3].roll(1)
    assert recall.wrong(outputs[-count:].flatten(0, 1), y, mask).tolist() == [int(b == 3) for b in range(30)]
    assert recall.output_size == whole.output_size


@pytest.mark.parametrize("name", tasks.TASKS)
def test_criterion(name):
    task = tasks.make(name, 60)
    _, y, mask = task.sample(50, generator())
    outputs = right_outputs(task, y, mask)
    assert task.error(outputs, y, mask) == 0 < tasks.SOLVED
    assert task.loss(outputs, y[mask]) < 0.1

    sequence = mask.nonzero(as_tuple=True)[1]
    last = {int(b): int(n) for n, b in enumerate(sequence)}  # the place in outputs of each sequence's last target
    for bad in (float("nan"), 100.0, -100.0):
        broken = outputs.clone()
        broken[last[3]] = bad if y.is_floating_point() else torch.full((task.output_size,), bad)
        if not np.isnan(bad) and not y.is_floating_point():  # all alike: make another class the largest
            broken[last[3], (y[mask][last[3]] + 1) % task.output_size] = 200
        counts = task.wrong(broken, y, mask)
        expected = torch.zeros(50, dtype=torch.int64)
        expected[3] = 1
        if name == "xor" and (bad > 0) == (y[mask][last[3]] > 0.5):
            expected[3] = int(np.isnan(bad))
        assert torch.equal(counts, expected)
        assert task.error(broken, y, mask) == pytest.approx(expected.sum().item() / 50)


def test_a_real_output_may_be_off_by_a_twenty_fifth():
    task = tasks.addition(60)
    _, y, mask = task.sample(2, generator(), torch.float64)
    off = torch.tensor([[0.039], [-0.041]], dtype=torch.float64)
    order = mask.nonzero()[:, 1]
    assert task.wrong(y[mask] + off, y, mask)[order].tolist() == [0, 1]


def test_permutation_counts_only_the_recall():
    task = tasks.permutation(20)
    _, y, mask = task.sample(5, generator())
    outputs = right_outputs(task, y, mask).view(20, 5, 100)
    outputs[:19] = 0
    assert task.error(outputs.flatten(0, 1), y, mask) == 0
    outputs[19] = 0
    assert task.error(outputs.flatten(0, 1), y, mask) > 0


def test_memorisation_counts_wrong_symbols():
    task = tasks.memorisation_5bit(20)
    _, y, mask = task.sample(5, generator())
    outputs = right_outputs(task, y, mask).view(20, 5, 3)
    outputs[[0, 17, 19], 2] = outputs[[0, 17, 19], 2].roll(1, dims=-1)
    assert task.wrong(outputs.flatten(0, 1), y, mask).tolist() == [0, 0, 3, 0, 0]
    assert task.error(outputs.flatten(0, 1), y, mask) == pytest.approx(0.2)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_shortest_length(name):
    task = tasks.make(name, LEAST[name])
    x, _, mask = task.sample(300, generator())
    assert x.isfinite().all() and mask.any(dim=0).all()
    if name in ("addition", "multiplication", "xor"):
        assert ((x[..., 1] == 1).sum(dim=0) == 2).all()
    with pytest.raises(ValueError, match=rf"T={LEAST[name] - 1} is too short for {name}, .* T >= {LEAST[name]}"):
        tasks.make(name, LEAST[name] - 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown task 'subtraction'; there are addition, multiplication"):
        tasks.make("subtraction", 100)
    for cue in (-1, 30):
        with pytest.raises(
            ValueError, match=f"cue should be 0 to 29 steps before the end for xor with T=60, got {cue}"
        ):
            tasks.make("xor", 60, cue=cue)
    with pytest.raises(TypeError, match="cue"):
        tasks.make("permutation", 60, cue=3)
    with pytest.raises(ValueError, match="batch should be at least 1, got 0"):
        tasks.addition(100).sample(0)


def test_a_network_learns_a_short_task():
    """The example of the package's docstring, on the easiest of the tasks."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = tasks.make("temporal_order", 10)
    lstm, readout = rnnfast.LSTM(task.input_size, 32), torch.nn.Linear(32, task.output_size)
    optimizer = torch.optim.Adam([*lstm.parameters(), *readout.parameters()], lr=0.02)
    random = generator()
    for _ in range(200):
        x, y, mask = task.sample(64, random)
        loss = task.loss(readout(lstm(x)[0][mask]), y[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y, mask = task.sample(1000, random)
    assert task.error(readout(lstm(x)[0][mask]).detach(), y, mask) < tasks.SOLVED


# ------------------------------------------------------------------------------------------ series


def mackey_glass_by_steps(until, tau=17.0, initial=1.2):
    """The solution at t = 1, 2, ..., by scipy's solver from one multiple of tau to the next: (until,)"""
    pieces = []

    def past(t):
        if t <= 0:
            return initial
        return pieces[min(int(t // tau), len(pieces) - 1)](t)[0]

    def motion(t, x):
        delayed = past(t - tau)
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

    x = initial
    for k in range(int(np.ceil(until / tau))):
        solution = solve_ivp(
            motion, (k * tau, (k + 1) * tau), [x], method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True
        )
        pieces.append(solution.sol)
        x = solution.y[0, -1]
    return np.array([pieces[min(int(t // tau), len(pieces) - 1)](t)[0] for t in range(1, until + 1)])


def test_mackey_glass_solves_its_equation_to_fourth_order():
    truth = mackey_glass_by_steps(120)
    errors = [
        np.abs(tasks.mackey_glass(120, washout=0, substeps=substeps)[:, 0] - truth).max() for substeps in (5, 10, 20)
    ]
    assert errors[1] < 1e-5
    assert errors[0] / errors[1] > 11 and errors[1] / errors[2] > 11  # 16 for order 4


def test_mackey_glass_options():
    whole = tasks.mackey_glass(300, washout=0)
    assert whole.shape == (300, 1) and whole.dtype == np.float64
    assert np.array_equal(tasks.mackey_glass(100, washout=200), whole[200:])
    assert np.abs(tasks.mackey_glass(150, dt=2.0, substeps=20, washout=0) - whole[1::2]).max() < 1e-12
    series = tasks.mackey_glass(3000)
    assert 0.2 < series.min() < 0.6 and 1.2 < series.max() < 1.5 and series.std() > 0.2  # it neither dies nor blows up
    assert np.abs(tasks.mackey_glass(500, initial=0.9) - tasks.mackey_glass(500)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps should be at least 1, got 0"),
        ({"steps": 10, "washout": -1}, "washout should not be negative, got -1"),
        ({"steps": 10, "tau": 17.03}, "tau=17.03 should be a whole number of integration steps"),
        ({"steps": 10, "dt": 0.0}, "should be positive"),
        ({"steps": 10, "substeps": 0}, "should be positive"),
    ],
)
def test_mackey_glass_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.mackey_glass(**options)


def test_lorenz_solves_its_equation():
    series = tasks.lorenz(2000, 0.01)
    assert series.shape == (2000, 3) and series.dtype == np.float64
    x, y, z = series[2:-2].T
    slopes = (8 * (series[3:-1] - series[1:-3]) - (series[4:] - series[:-4])) / 0.12  # central differences, order 4
    expected = np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=1)
    assert np.abs(slopes - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.allclose(tasks.lorenz(50, washout=100), tasks.lorenz(150, washout=0)[100:], atol=1e-6)
    assert np.allclose(series.mean(axis=0)[2], 23.5, atol=1.5)


def test_lorenz_refuses():
    with pytest.raises(ValueError, match=r"dt should be positive, got -0.1"):
        tasks.lorenz(10, -0.1)
    with pytest.raises(ValueError, match="steps should be at least 1, got 0"):
        tasks.lorenz(0)


def test_narma10_follows_its_recursion():
    u, y = tasks.narma10(500, seed=3)
    assert u.shape == y.shape == (500, 1)
    u, y = u[:, 0], y[:, 0]
    for t in range(10, 500):  # row t holds u(t) and y(t+1)
        assert y[t] == pytest.approx(
            0.3 * y[t - 1] + 0.05 * y[t - 1] * y[t - 10 : t].sum() + 1.5 * u[t - 9] * u[t] + 0.1
        )
    assert u.min() >= 0 and u.max() <= 0.5 and u.std() > 0.13
    assert np.array_equal(u, tasks.narma10(500, seed=3)[0][:, 0])
    assert not np.array_equal(u, tasks.narma10(500, seed=4)[0][:, 0])


def test_narma10_never_diverges_silently(monkeypatch):
    for seed in range(4):
        _, y = tasks.narma10(2000, seed=seed)
        assert np.isfinite(y).all() and y.max() <= 1

    class Half:  # 0.3 y + 0.5 y^2 + 0.475 = y has no solution: without an end y grows
        def uniform(self, low, high, count):
            return np.full(count, 0.5)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Half())
    with pytest.raises(RuntimeError, match="NARMA-10 diverged for each of 100 inputs of 700 steps"):
        tasks.narma10(500)


def test_delay_line_and_memory_capacity():
    u, past = tasks.delay_line(400, 6, seed=0)
    assert u.shape == (400, 1) and past.shape == (400, 6)
    for k in range(1, 7):
        assert np.array_equal(past[k:, k - 1], u[:-k, 0])
    assert tasks.memory_capacity(past, past) == pytest.approx(6)
    assert tasks.memory_capacity(3 - 2 * past, past) == pytest.approx(6)  # correlation does not see scale and offset
    assert tasks.memory_capacity(np.zeros_like(past), past) == 0
    noise = np.random.default_rng(1).standard_normal(past.shape)
    expected = sum(np.corrcoef(noise[:, k] + past[:, k], past[:, k])[0, 1] ** 2 for k in range(6))
    assert tasks.memory_capacity(noise + past, past) == pytest.approx(expected)


def test_memory_capacity_refuses():
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3, 1\)"):
        tasks.memory_capacity(np.ones((3, 2)), np.ones((3, 1)))
    with pytest.raises(ValueError, match="finite"):
        tasks.memory_capacity(np.full((3, 2), np.nan), np.ones((3, 2)))
    with pytest.raises(ValueError, match="delays should be at least 1, got 0"):
        tasks.delay_line(10, 0)


# ------------------------------------------------------------------------------------------ imports


def test_import_is_lazy_and_does_without_scipy():
    script = """
import sys
sys.modules["scipy"] = sys.modules["scipy.integrate"] = None  # as if not installed
import rnnfast
assert not {"rnnfast.init", "rnnfast.optim", "rnnfast.tasks"} & set(sys.modules), "imported too soon"
assert {"init", "optim", "tasks", "diagnose", "EchoState"} <= set(dir(rnnfast))
rnnfast.tasks.addition(50).sample(2), rnnfast.init.echo_state_(rnnfast.RNN(2, 20)), rnnfast.optim.MomentumSchedule
for call in (lambda: rnnfast.tasks.lorenz(10), lambda: rnnfast.init.echo_state_(rnnfast.RNN(2, 300))):
    try:
        call()
    except ImportError as error:
        assert "rnnfast[learn]" in str(error), error
    else:
        raise AssertionError("scipy was not missed")
try:
    rnnfast.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
