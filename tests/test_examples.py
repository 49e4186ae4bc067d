"""Every example runs in a shortened form, learns, and writes its plot; torch and rnnfast train alike."""

import io
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.image
import matplotlib.pyplot as plt

import rnnfast

EXAMPLES = Path(__file__).parents[1] / "examples"
# These have tests of their own.
OTHERS = {"echo_state", "four_ways", "gradient_flow", "momentum_search", "recurrent_ppo"}
EPOCHS = {
    "sunspots": 3,
    "co2": 3,
    "oscillator": 2,
    "trajectory": 3,
    "lorenz": 2,
    "digits": 10,
    "ddp": 8,
    "hessian_free": 2,
}
OPTIONS = {"hessian_free": ("--T", "20")}  # 100 steps take a minute
NUMBER = r"\d+\.\d+(?:e[-+]\d+)?"


def run(name, folder, *options):
    """Runs one example in an empty folder -> (what it printed, its plot (height,width,4)). In this process, which has
    imported all that an example needs."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed), torch.random.fork_rng():
        patched.chdir(folder)
        patched.setenv("COLUMNS", "120")
        patched.setattr(sys, "argv", [f"{name}.py", *options, "--plot", "x.png"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    plt.close("all")
    return printed.getvalue(), plot_in(folder)


def run_apart(name, folder, *options):
    """The same in a process of its own."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *options, "--plot", "x.png"]
    environment = os.environ | {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, plot_in(folder)


def plot_in(folder):
    assert [path.name for path in folder.iterdir()] == ["x.png"]
    image = matplotlib.image.imread(folder / "x.png")
    assert image.shape[1] > 1000 and image[..., :3].std() > 0.02  # something is drawn
    return image


def cells(text):
    """The rows of the tables in `text`, a list of strings each."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if line[:1] == "│"]


def row(text, name):
    """The numbers in the row that starts with `name`."""
    (found,) = [row for row in cells(text) if row[0] == name]
    return [float(cell) for cell in found[1:] if re.fullmatch(NUMBER, cell)]


def losses(text):
    """Training loss in the first epoch and in the last."""
    return list(map(float, re.search(f"training loss ({NUMBER}) .* ({NUMBER}) in the last", text).groups()))


@pytest.fixture(scope="module")
def printed(built_once):
    """What each example prints; it runs when first asked for."""

    def of(name):
        def build(folder):
            (folder / "empty").mkdir()
            way = run_apart if name == "ddp" else run  # which starts processes of its own script
            text, _ = way(name, folder / "empty", "--epochs", str(EPOCHS[name]), *OPTIONS.get(name, ()))
            (folder / "printed").write_text(text, encoding="utf-8")

        return (built_once(f"example_{name}", build) / "printed").read_text(encoding="utf-8")

    return of


def test_every_example_is_tested_and_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(EPOCHS) | OTHERS
    listed = re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(scripts)


@pytest.mark.parametrize("name", sorted(set(EPOCHS) - {"sunspots"}))
def test_loss_falls(printed, name):
    first, last = losses(printed(name))
    assert 0 < last < 0.95 * first


def test_sunspots_loss_curves_agree(printed):
    text = printed("sunspots")
    (first, last) = [list(map(float, r[1:3])) for r in cells(text) if r[0] in ("1", str(EPOCHS["sunspots"]))]
    assert first == pytest.approx([first[0]] * 2, rel=1e-4) and last == pytest.approx([last[0]] * 2, rel=1e-4)
    assert last[0] < 0.95 * first[0]
    assert float(re.search(f"the loss curves agree: largest relative difference ({NUMBER})", text)[1]) < 1e-4


def test_sunspots_times_and_ratio(printed):
    text = printed("sunspots")
    theirs, ours = (
        float(re.search(rf"{name} .* ({NUMBER}) ms an epoch", text)[1]) for name in ("torch.*", "rnnfast.*")
    )
    ratio = float(re.search(f"ratio of the medians, one thread: ({NUMBER})", text)[1])
    assert ratio == pytest.approx(theirs / ours, rel=0.05)


def test_co2_beats_no_change(printed):
    ours, no_change = row(printed("co2"), "next week")
    assert ours < no_change


def test_oscillator_finds_the_frequency(printed):
    spread, error, explained = row(printed("oscillator"), "frequency omega0")
    assert error < 0.3 * spread
    assert explained == pytest.approx(1 - (error / spread) ** 2, abs=0.01)


def test_trajectory_follows_the_exact_one(printed):
    position, error = row(printed("trajectory"), "1 to 50, as trained")
    assert error < 0.3 * position


def test_lorenz_outlives_the_held_observation(printed):
    assert row(printed("lorenz"), "encoder-decoder")[0] > 4 * row(printed("lorenz"), "last observation, held")[0]


def test_digits_need_rows(printed):
    text = printed("digits")
    assert "model.rnn is a rnnfast.RNN" in text
    accuracy = [float(r[1]) for r in cells(text) if r[0] in map(str, range(2, 9))]
    assert len(accuracy) == 7
    assert accuracy[0] > 0.2 and max(accuracy) > 0.5 and max(accuracy[3:]) > accuracy[0]  # guessing gives 0.1


def test_hessian_free_and_the_others_are_listed(printed):
    text = printed("hessian_free")
    assert [r[0] for r in cells(text) if r[0] in ("HF", "SGD", "Adam")] == ["HF", "SGD", "Adam"]
    assert "HF: solved for 0 of 1 seeds" in text and "SGD: solved for 0 of 1 seeds" in text


def test_hessian_free_solves_a_short_task():
    from examples import hessian_free

    task = rnnfast.tasks.memorisation_5bit(20)
    course = hessian_free.train("HF", task, 0, budget=math.inf, steps=40)
    assert course.solved and course.errors[0] > 0.5 and len(course.losses) == len(course.errors)


def test_hessian_free_draws_no_sequence_twice():
    from examples import hessian_free

    task = rnnfast.tasks.memorisation_5bit(11)
    x, y, mask = hessian_free.draw(task, 400, torch.Generator().manual_seed(0))
    assert x.shape == (11, 32, 4) and mask.shape == y.shape == (11, 32)
    assert torch.unique(x, dim=1).size(1) == 32 and torch.equal(y[-5:], x[:5].argmax(-1))  # still the same sequences


def test_same_seed_gives_the_same_result(printed, tmp_path):
    again, _ = run_apart("digits", tmp_path, "--epochs", str(EPOCHS["digits"]))
    assert again == printed("digits")


def test_gradient_flow_tells_the_networks_apart(tmp_path):
    text, _ = run("gradient_flow", tmp_path, "--epochs", "150")
    verdicts = {r[0]: r[1] for r in cells(text)}
    assert verdicts["tanh, spectral radius 0.5"] == verdicts["LSTM, forget bias 0"] == "vanishing"
    assert verdicts["tanh, spectral radius 1.5"] in ("exploding", "healthy")
    assert verdicts["ReLU, identity"] == "healthy"


@pytest.mark.parametrize("accuracy", [1e-6, pytest.param(1e-12, marks=pytest.mark.long)])
def test_small_echo_state_networks_are_measured(tmp_path, monkeypatch, accuracy):
    """The Lorenz equations to an accuracy that is enough for so small a network, which is fast, or as the example has
    them."""
    exact = rnnfast.tasks.lorenz
    monkeypatch.setattr(
        rnnfast.tasks, "lorenz", lambda *args, **options: exact(*args, **options | {"rtol": accuracy, "atol": accuracy})
    )
    text, _ = run("echo_state", tmp_path, "--units", "100", "--seeds", "1")
    found = {r[0]: float(r[3]) for r in cells(text) if r[0] in ("mackey_glass", "narma10", "lorenz", "memory")}
    assert found["mackey_glass"] < 0.1 and found["narma10"] < 0.6  # of a standard deviation
    assert found["lorenz"] > 1 and 0.9 < found["memory"] <= 1


def test_recurrent_ppo_returns_agree(tmp_path):
    pytest.importorskip("sb3_contrib")
    text, _ = run("recurrent_ppo", tmp_path, "--steps", "2048")
    (first, last) = [list(map(float, r[1:])) for r in cells(text) if r[0] in ("1024", "2048")]
    assert first[0] == first[1] > 10 and last[0] > 10  # the same episodes before the first update
    theirs, ours = (
        float(re.search(rf"^{name} +({NUMBER}) s in all", text, re.M)[1]) for name in ("sb3-contrib", "rnnfast")
    )
    ratio = float(re.search(f"ratio of the times, one thread: ({NUMBER})", text)[1])
    assert ratio == pytest.approx(theirs / ours, rel=0.05)
