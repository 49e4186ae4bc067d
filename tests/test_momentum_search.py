"""examples/momentum_search.py: a row for each run, whole or not at all; what is stopped goes on; rows make a table."""

from __future__ import annotations

import csv
import sys

import matplotlib.image
import pytest
import torch

from examples import four_ways, momentum_search
from rnnfast import tasks
from rnnfast.optim import momentum

UPDATES, FALL, LOOK = 40, 10, 15


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Phases and tests of a size that a test can wait for, in an empty folder."""
    for module in (momentum, momentum_search):
        monkeypatch.setattr(module, "LOW_UPDATES", FALL)
    monkeypatch.setattr(momentum_search, "LOOK", LOOK)
    monkeypatch.setattr(momentum_search, "TEST", 200)
    monkeypatch.chdir(tmp_path)


def search(monkeypatch, *options):
    arguments = ["--T", "20", "--updates", UPDATES, "--csv", "runs.csv", *options]
    monkeypatch.setattr(sys, "argv", ["momentum_search.py", *map(str, arguments)])
    momentum_search.main()


def rows(path="runs.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "command")}


def test_a_row_says_what_became_of_a_run(monkeypatch):
    search(
        monkeypatch,
        "--mu",
        0.98,
        "--rate",
        "3e-3",
        "--clip",
        2,
        "--first-clip",
        1,
        "--seed",
        5,
        "--cue",
        2,
        "--biases",
        "--no-state",
        "--input-scale",
        0.5,
    )
    (row,) = rows()
    settings = [row[name] for name in (*momentum_search.SETTINGS, "seed")]
    assert settings == [
        "addition",
        "20",
        "2",
        "False",
        "0.98",
        "0.003",
        "1.0",
        "2.0",
        "True",
        "False",
        "0.5",
        "40",
        "5",
    ]
    assert row["command"].endswith("--cue 2 --biases --no-state --input-scale 0.5")

    # once more by hand
    task = tasks.addition(20, cue=2)
    test = task.sample(200, torch.Generator().manual_seed(1_000_005))
    torch.manual_seed(5)
    recipe = four_ways.Recipe(0.98, 3e-3, 1.0, 2.0, True, False, 0.5, UPDATES)
    way = four_ways.Momentum(task, torch.Generator().manual_seed(5), recipe)
    curve = {}
    for update in range(UPDATES + 1):
        with way.schedule.at_theta():
            curve[update] = task.error(way.network(test.x, test.mask), test.y, test.mask)
        if update == UPDATES - FALL:
            ahead = task.error(way.network(test.x, test.mask), test.y, test.mask)
        way.update()
    looks = (0, 15, 30, 40)
    assert row["curve"] == " ".join(f"{update}:{curve[update]:.6g}" for update in looks)
    assert [float(row[name]) for name in ("ahead", "theta", "wrong", "lowest")] == [
        ahead, curve[30], curve[40], min(curve[update] for update in looks)
    ]  # fmt: skip


def test_a_row_has_the_sensitivity_of_the_outputs(monkeypatch):
    monkeypatch.setattr(momentum_search, "ASKED", 30)
    search(monkeypatch, "--rate", 0, "--clip", 1, "--seed", 3, "--input-scale", 0.1)
    (row,) = rows()
    recipe = four_ways.Recipe(0.995, 0.0, 1.0, 1.0, False, True, 0.1, UPDATES)
    way = momentum_search.Run("addition", 20, 3, False, recipe, 3).make_way(tasks.addition(20, cue=3))
    test = tasks.addition(20, cue=3).sample(200, torch.Generator().manual_seed(1_000_003))
    x, mask, wanted = test.x[:, :30], test.mask[:, :30], test.y[:, :30][test.mask[:, :30]].flatten()
    outputs = way.network(x, mask).flatten()
    jacobian = torch.stack(
        [
            torch.cat(
                [part.flatten() for part in torch.autograd.grad(one, way.network.parameters(), retain_graph=True)]
            )
            for one in outputs
        ]
    ).double()
    values, directions = torch.linalg.eigh(jacobian @ jacobian.T / 30)
    found = torch.tensor([float(value) for value in row["singular"].split()])
    torch.testing.assert_close(found, values.flip(0)[:10].sqrt().float(), rtol=6e-3, atol=0.0)  # three digits
    error = (outputs - wanted).double()
    share = (directions[:, -10:].T @ error).square().sum() / error.square().sum()
    assert float(row["error_along"]) == pytest.approx(share.item(), abs=2e-4)


def test_memory_counts_symbols_and_has_no_cue(monkeypatch):
    search(monkeypatch, "--task", "memorisation_5bit", "--rate", 0, "--clip", 1)
    (row,) = rows()
    assert row["cue"] == "0"
    assert 5 <= float(row["wrong"]) < 20 and row["wrong"] == row["lowest"]  # of 20 symbols
    search(monkeypatch, "--task", "memorisation_5bit", "--rate", 0, "--clip", 1, "--recall-only", "--resume")
    assert 1 < float(rows()[1]["wrong"]) <= 5 and rows()[1]["recall_only"] == "True"  # of 5


def test_what_was_stopped_goes_on(monkeypatch):
    options = "--rate", "1e-3", "1e-2", "--seed", 0, 1
    search(monkeypatch, *options, "--csv", "whole.csv")
    perform, performed = momentum_search.perform, []

    def stopped(run):
        if len(performed) == 3:
            raise KeyboardInterrupt
        performed.append(run)
        return perform(run)

    monkeypatch.setattr(momentum_search, "perform", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(monkeypatch, *options)
    assert len(rows()) == 3
    monkeypatch.setattr(momentum_search, "perform", perform)
    search(monkeypatch, *options, "--resume")
    assert [without_seconds(row) for row in rows()] == [without_seconds(row) for row in rows("whole.csv")]
    expected = [(rate, clip, seed) for rate, clip in (("0.001", "1.0"), ("0.01", "0.1")) for seed in "01"]
    assert [(row["rate"], row["clip"], row["seed"]) for row in rows()] == expected
    assert [row["first_clip"] for row in rows()] == ["0.25", "0.25", "0.025", "0.025"]

    monkeypatch.setattr(momentum_search, "perform", stopped)  # would stop
    search(monkeypatch, *options, "--resume")
    assert len(rows()) == 4
    with pytest.raises(KeyboardInterrupt):
        search(monkeypatch, "--rate", "1e-3", "--mu", 0.9, "--resume")  # another run


def test_a_file_of_runs_is_not_added_to_by_mistake(monkeypatch, capsys):
    search(monkeypatch, "--rate", 0, "--clip", 1)
    with pytest.raises(SystemExit):
        search(monkeypatch, "--rate", "1e-3")
    assert "runs.csv has 1 runs: --resume adds to them" in capsys.readouterr().err and len(rows()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--T", 5], "T=5 is too short for addition"),
        (["--cue", 60], "cue should be 0 to 9 steps"),
        (["--updates", 5], "--updates should be at least 10, after the fall of mu, got 5"),
    ],
)
def test_command_refuses(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        search(monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_divergence_is_on_record(monkeypatch):
    search(monkeypatch, "--rate", "1e30", "--clip", "inf")
    (row,) = rows()
    assert row["wrong"] == "nan" and row["curve"].endswith("15:1")


def test_table_and_plot(monkeypatch, capsys):
    search(monkeypatch, "--T", 80, "--updates", 20, "--mu", 0, 0.995, "--seed", 0, 1)
    search(monkeypatch, "--T", 80, "--updates", 10, "--resume")  # a shorter one
    capsys.readouterr()
    search(monkeypatch, "--plot", "runs.png")
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    cells = [line for line in lines if line[0] == "addition"]
    assert len(cells) == 3
    found = rows()
    for line in cells:
        group = [row for row in found if [row["mu"], row["updates"]] == [line[4], line[11]]]
        assert line[12] == str(len(group)) and line[13] == {"0.0": "0.39", "0.995": "0.00025"}[line[4]]
        for cell, column in zip(line[14:], ("ahead", "theta", "wrong"), strict=True):
            assert cell == f"{sum(float(row[column]) for row in group) / len(group):.5f}"
    image = matplotlib.image.imread("runs.png")
    assert image.shape[1] > 500 and image[..., :3].std() > 0.02
