"""examples/four_ways.py: the command runs, learns, and tells the truth about it; its parts do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from examples import four_ways
from rnnfast import tasks

ROOT = Path(__file__).parents[1]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "examples.four_ways", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def test_command_tells_what_happened(tmp_path):
    files = {"--plot": tmp_path / "x.png", "--json": tmp_path / "x.json"}
    options = [part for pair in files.items() for part in pair]
    done = command("--task", "temporal_order", "--T", 10, "--budget", 2, "--ways", "sgd", "lstm", "momentum", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
    image = matplotlib.image.imread(files["--plot"])
    assert image.shape[1] > 1000 and image[..., :3].std() > 0.02  # something is drawn

    saved = json.loads(files["--json"].read_text())
    courses = {course["way"]: course for course in saved["courses"]}
    assert list(courses) == ["sgd", "lstm", "momentum"]
    assert saved["about"]["arguments"]["T"] == 10 and saved["about"]["arguments"]["seed"] == 0
    for course in courses.values():
        assert len(course["seconds"]) == len(course["updates"]) == len(course["errors"]) == len(course["wrong"]) > 1
        assert course["updates"][0] == 0 and course["seconds"] == sorted(course["seconds"])
        assert course["errors"][0] > 0.3  # before any update
        assert (course["errors"][-1] < tasks.SOLVED) == (course["ended"] == "solved")
        row = next(line for line in done.stdout.splitlines() if line[:1] == "│" and course["title"] in line)
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert cells[1] == f"{course['errors'][-1]:.3f}" and cells[2] == f"{course['wrong'][-1]:.3f}"
        assert cells[3] == str(course["updates"][-1]) and cells[5] == course["ended"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "addition", "--T", "5"], "T=5 is too short for addition"),
        (["--task", "addition", "--cue", "60"], "cue should be 0 to 19 steps"),
        (["--task", "subtraction"], "invalid choice: 'subtraction'"),
        (["--ways", "prayer"], "invalid choice: 'prayer'"),
    ],
)
def test_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["four_ways.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        four_ways.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_tasks_options_are_those_of_the_command():
    generator = torch.Generator()
    x, _, mask = four_ways.make_task("xor", 40, 3, True).sample(5, generator)
    last = mask.int().argmax(dim=0)
    assert (x[last - 3, torch.arange(5), 1] == -1).all()
    assert four_ways.make_task("memorisation_20bit", 40, 3, True).sample(5, generator).mask.sum() == 50
    assert four_ways.make_task("memorisation_20bit", 40, 3, False).sample(5, generator).mask.sum() == 200
    assert four_ways.make_task("permutation", 40, 3, True).name == "permutation"


@pytest.mark.parametrize("name", ["addition", "temporal_order", "memorisation_5bit"])
def test_flush_right(name):
    x, _, mask = tasks.make(name, 40).sample(30, torch.Generator().manual_seed(0))
    moved, sequence, step = four_ways.flush_right(x, mask)
    steps = x.size(0)
    assert moved.shape == (30, steps, x.size(2))
    where, which = mask.nonzero(as_tuple=True)
    assert torch.equal(sequence, which)  # the order of y[mask]
    assert torch.equal(moved[sequence, step], x[where, which])
    for b in range(30):
        length = int(mask[:, b].nonzero().max()) + 1
        assert torch.equal(moved[b, steps - length :], x[:length, b]) and (moved[b, : steps - length] == 0).all()
        assert step[sequence == b].max() == steps - 1


class Fake:
    """A way whose outputs are right after some updates, or not finite."""

    title = "fake"

    def __init__(self, task, generator, right_after=3, break_after=10**9):
        self.task, self.right_after, self.break_after, self.count = task, right_after, break_after, 0

    def update(self):
        self.count += 1

    def outputs(self, x, mask):
        if self.count >= self.break_after:
            return torch.full((int(mask.sum()), 1), float("nan"))
        good = float(self.count >= self.right_after)
        numbers, marks = x.unbind(-1)
        sums = (numbers * (marks == 1)).sum(0)[mask.nonzero()[:, 1]]  # (N)
        return (sums + 1 - good)[:, None]


@pytest.mark.parametrize(
    ("options", "limits", "ended", "updates", "error"),
    [
        ({}, {"updates": 100}, "solved", 3, 0),
        ({}, {"updates": 10, "until_solved": False}, "limit", 10, 0),
        ({"right_after": 50}, {"updates": 10}, "limit", 10, 1),
        ({"break_after": 2}, {"updates": 10}, "diverged", 2, 1),
    ],
)
def test_training_ends_for_a_reason(monkeypatch, options, limits, ended, updates, error):
    monkeypatch.setitem(four_ways.WAYS, "fake", lambda task, generator: Fake(task, generator, **options))
    task = tasks.addition(40)
    test = task.sample(50, torch.Generator().manual_seed(0))
    course = four_ways.train("fake", task, test, 0, four_ways.Limits(looks=1000, **limits))  # a look at every update
    assert (course.ended, course.updates[-1], course.errors[-1]) == (ended, updates, error)
    assert course.updates == list(range(updates + 1)) and course.errors[0] == 1


def test_an_lstm_learns_an_order():
    task = tasks.temporal_order(10)
    test = task.sample(300, torch.Generator().manual_seed(1))
    course = four_ways.train("lstm", task, test, 0, four_ways.Limits(updates=2000))
    assert course.ended == "solved" and course.errors[0] > 0.3


def test_an_echo_state_network_adds():
    task = tasks.addition(40)
    test = task.sample(300, torch.Generator().manual_seed(1))
    course = four_ways.train("esn", task, test, 0, four_ways.Limits(updates=4))
    assert course.ended == "solved" and course.errors[0] > 0.8


def test_momentum_learns_an_order():
    task = tasks.temporal_order(20)
    test = task.sample(300, torch.Generator().manual_seed(1))
    course = four_ways.train("momentum", task, test, 0, four_ways.Limits(updates=1500))
    assert course.ended == "solved" and course.errors[0] > 0.3


def test_momentum_is_tested_at_theta():
    task = tasks.addition(20)
    x, _, mask = task.sample(50, torch.Generator().manual_seed(1))
    way = four_ways.Momentum(task, torch.Generator().manual_seed(0))
    for _ in range(3):
        way.update()
    outputs = way.outputs(x, mask)
    assert not torch.equal(way.outputs_ahead(x, mask), outputs)
    with way.schedule.at_theta():
        assert torch.equal(way.outputs_ahead(x, mask), outputs)


@pytest.mark.parametrize(
    ("changes", "names", "scale", "rate"),
    [
        ({}, {"weight_ih_l0", "weight_hh_l0", "weight", "bias", "h_0"}, 0.001, 1e-3),
        (
            {"biases": True, "state": False, "rate": 0.1, "input_scale": 0.5},
            {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight", "bias"},
            0.5,
            0.1,
        ),
    ],
)
def test_a_recipe_decides_what_is_learned_and_how_fast(changes, names, scale, rate):
    recipe = four_ways.recipe_for("addition", **changes)
    way = four_ways.Momentum(tasks.addition(20), torch.Generator().manual_seed(0), recipe)
    parameters = dict(way.network.named_parameters())
    assert {name.split(".")[-1] for name in parameters} == names
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    (group,) = way.optimizer.param_groups
    assert parameters["rnn.weight_ih_l0"].std().item() == pytest.approx(scale, rel=0.2)  # of 200
    assert group["lr"] == rate
    way.update()
    assert all(not torch.equal(before[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize(
    ("task", "changes", "bounds"),
    [
        ("addition", {}, (0.25, 1)),
        ("addition", {"rate": 2e-3, "clip": None}, (0.125, 0.5)),
        ("addition", {"rate": 2e-3, "clip": 3}, (3, 3)),
        ("addition", {"first_clip": 0.5}, (0.5, 1)),
        ("temporal_order", {}, (0.5, 0.5)),
        ("temporal_order", {"rate": 1e-2, "first_clip": 2, "clip": 3}, (2, 3)),
    ],
)
def test_the_bound_on_the_gradient_widens_once_the_lag_is_found(monkeypatch, task, changes, bounds):
    seen, losses = [], iter([0.6, 0.4, 0.7, 0.6])  # of what a guess would have

    def update(way):
        seen.append(way.clip)
        return next(losses) * way.guess

    monkeypatch.setattr(four_ways, "AVERAGED", 1)
    monkeypatch.setattr(four_ways.Gradients, "update", update)
    recipe = four_ways.recipe_for(task, **changes)
    way = four_ways.Momentum(tasks.make(task, 20), torch.Generator().manual_seed(0), recipe)
    for _ in range(4):
        way.update()
    assert seen == pytest.approx([bounds[0]] * 2 + [bounds[1]] * 2)


def test_a_guess_is_what_the_loss_is_compared_to():
    way = four_ways.Momentum(tasks.addition(20), torch.Generator().manual_seed(0))
    assert way.loss == way.guess == pytest.approx(1 / 6, rel=0.1)  # two uniform numbers
    way.update()
    assert 0 < abs(way.loss - way.guess) < way.guess / 10


def test_hessian_free_runs():
    task = tasks.temporal_order(10)
    test = task.sample(300, torch.Generator().manual_seed(1))
    course = four_ways.train("hf", task, test, 0, four_ways.Limits(updates=3))
    assert course.ended in ("solved", "limit") and course.errors[-1] < course.errors[0]


def test_two_runs_are_the_same():
    task = tasks.temporal_order(10)
    test = task.sample(100, torch.Generator().manual_seed(1))
    runs = [four_ways.train("momentum", task, test, 0, four_ways.Limits(updates=5)) for _ in range(2)]
    assert runs[0].errors == runs[1].errors and runs[0].wrong == runs[1].wrong and runs[0].updates[-1] == 5
