"""Runs for table 5 of Sutskever et al. (2013): echo-state initialisation and momentum, one row of a CSV file for each.

    python -m examples.momentum_search --rate 3e-4 1e-3 --updates 5000 --csv runs.csv       # short runs find the rate
    python -m examples.momentum_search --rate 1e-3 --seed 0 1 2 3 --csv runs.csv --resume   # whole ones the error
    python -m examples.momentum_search --csv runs.csv --plot runs.png                       # wrong against updates

Every combination of the rates, bounds and seeds that are given is one run. With --resume those whose rows the file has
are left out, so the same command goes on where it was stopped. docs/four_ways.md has the results.
"""

import argparse
import csv
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import rnnfast
from examples.four_ways import FOUND, MARKED, MEMORY, Momentum, Recipe, make_task, recipe_for
from rnnfast import tasks
from rnnfast.optim.momentum import LOW_UPDATES

TEST = 10_000  # sequences: 0.00025 of them is 2.5
LOOK = 1000  # updates between two looks at them
ASKED, DIRECTIONS = 300, 10  # sequences whose outputs are derived by the weights; singular values that a row has of it
AT_ONCE = 20  # of them: all at once would take 12 GB
PAPER = {  # table 5, Nesterov's method: by task and T the wrong sequences, or wrong symbols in each, by mu
    ("addition", 80): {0.0: 0.39, 0.9: 0.02, 0.98: 0.21, 0.995: 0.00025},
    ("multiplication", 80): {0.0: 0.48, 0.9: 0.36, 0.98: 0.22, 0.995: 0.0013},
    ("memorisation_5bit", 200): {0.0: 1.27, 0.9: 1.02, 0.98: 0.96, 0.995: 0.63},
    ("memorisation_20bit", 80): {0.0: 5.37, 0.9: 2.77, 0.98: 0.0144, 0.995: 5e-5},
}


@dataclass(frozen=True)
class Run:
    """What decides a run."""

    task: str
    T: int
    cue: int
    recall_only: bool
    recipe: Recipe
    seed: int

    def settings(self):
        """The columns of a row that name the run."""
        return (
            {"task": self.task, "T": self.T, "cue": self.cue, "recall_only": self.recall_only}
            | asdict(self.recipe)
            | {"seed": self.seed}
        )

    def is_in(self, rows):
        """Is one of these rows this run's?"""
        mine = {name: str(value) for name, value in self.settings().items()}
        return any(mine.items() <= row.items() for row in rows)

    def make_way(self, task):
        torch.manual_seed(self.seed)
        return Momentum(task, torch.Generator().manual_seed(self.seed), self.recipe)


SETTINGS = ["task", "T", "cue", "recall_only", *(setting.name for setting in fields(Recipe))]  # but for the seed


def error_on(test, run, task, outputs):
    """What the table counts, the mean over the test sequences: wrong sequences, or wrong symbols in each."""
    wrong = task.wrong(outputs, test.y, test.mask).double()
    return (wrong if run.task in MEMORY else (wrong > 0).double()).mean().item()


def sensitivity(way, test):
    """Of numbers as outputs: the largest singular values s of their derivatives by all weights, root of the mean square
    over the sequences, and the share of the squared error that lies along these directions. The loss curves by 2 s^2,
    so Nesterov's method is stable up to rates of some 2/3 / s^2 of the largest, and slow where s is small."""
    weights, errors, rows = list(way.network.parameters()), [], []
    with way.schedule.at_theta():
        for x, y, mask in zip(*(part[:, :ASKED].split(AT_ONCE, 1) for part in test), strict=True):
            outputs = way.network(x, mask).flatten()
            gradients = torch.autograd.grad(outputs, weights, torch.eye(len(outputs)), is_grads_batched=True)
            rows.append(torch.cat([gradient.flatten(1) for gradient in gradients], 1).double())
            errors.append((outputs.detach() - y[mask].flatten()).double())
    error = torch.cat(errors)
    by_weights = torch.cat(rows) / math.sqrt(len(error))
    if not by_weights.isfinite().all():
        return {}
    along, values, _ = torch.linalg.svd(by_weights, full_matrices=False)
    share = (along[:, :DIRECTIONS].T @ error).square().sum() / error.square().sum()
    return {
        "singular": " ".join(f"{value:.3g}" for value in values[:DIRECTIONS]),
        "error_along": round(share.item(), 4),
    }


def perform(run):
    """-> a row: the run, and what became of it. `ahead` is the error before momentum falls, at theta + mu v, `theta` at
    theta then, `wrong` at theta in the end; `curve` is the error at theta, UPDATES:ERROR; `singular` and `error_along`
    as `sensitivity` in the end."""
    task = make_task(run.task, run.T, run.cue, run.recall_only)
    way, test = run.make_way(task), task.sample(TEST, torch.Generator().manual_seed(run.seed + 1_000_000))
    updates = run.recipe.updates
    falls, curve, ahead, start = updates - LOW_UPDATES, {}, float("nan"), time.perf_counter()
    title = f"{run.task} mu={run.recipe.mu} rate={run.recipe.rate} clip={run.recipe.clip} seed={run.seed}"
    for update in tqdm(range(updates + 1), desc=title, disable=None):
        if update % LOOK == 0 or update in (falls, updates):
            outputs = way.outputs(test.x, test.mask)
            curve[update] = error_on(test, run, task, outputs)
            if update == falls:
                ahead = error_on(test, run, task, way.outputs_ahead(test.x, test.mask))
            if not outputs.isfinite().all():
                break
        if update < updates:
            way.update()
    found = {
        "ahead": ahead,
        "theta": curve.get(falls, float("nan")),
        "wrong": curve.get(updates, float("nan")),  # NaN: diverged before
        "lowest": min(curve.values()),
        "seconds": round(time.perf_counter() - start),
        "curve": " ".join(f"{update}:{error:.6g}" for update, error in curve.items()),
        "singular": "",
        "error_along": "",
        "machine": f"{os.cpu_count()} cores, {rnnfast.info()['isa']}, {torch.get_num_threads()} threads",
        "versions": f"rnnfast {rnnfast.__version__}, torch {torch.__version__}",
        "command": "python -m examples.momentum_search " + " ".join(sys.argv[1:]),
    }
    if run.task in ("addition", "multiplication"):
        found |= sensitivity(way, test)
    return run.settings() | found


def read(path):
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    """Adds a row that is there whole or not at all, whenever the machine stops."""
    rows, new = [*read(path), row], Path(f"{path}.new")
    with open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ------------------------------------------------------------------------------------------ what a file of runs shows


def groups(rows):
    """Rows that differ in their seed only, by what they share; the table's cells first, the best of a cell first."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    return sorted(found.values(), key=lambda group: (group[0]["task"], float(group[0]["mu"]), mean(group, "wrong")))


def mean(rows, column):
    return sum(float(row[column]) for row in rows) / len(rows)


def papers(row):
    return PAPER.get((row["task"], int(row["T"])), {}).get(float(row["mu"]))


def table(rows):
    """The paper's error beside those of the runs, means over their seeds."""
    result = Table(*(name.replace("_", " ") for name in SETTINGS), "seeds")
    for column in ("paper", "ahead, before the fall", "theta, before the fall", "theta, at the end"):
        result.add_column(column, justify="right")
    for group in groups(rows):
        first, paper = group[0], papers(group[0])
        errors = (f"{mean(group, column):.5f}" for column in ("ahead", "theta", "wrong"))
        settings = (first[name] for name in SETTINGS)
        result.add_row(*settings, str(len(group)), "" if paper is None else f"{paper:g}", *errors)
    return result


def plot(path, rows):
    """Of the longest runs of each task the best group of each mu: their errors over updates, and the paper's value as a
    dashed line."""
    colors = {mu: f"C{number}" for number, mu in enumerate(sorted({row["mu"] for row in rows}, key=float))}
    longest = {}
    for row in rows:
        longest[row["task"]] = max(longest.get(row["task"], 0), int(row["updates"]))
    down, across = math.ceil(len(longest) / 2), min(2, len(longest))
    figure = plt.figure(figsize=(6.5 * across, 4.5 * down), layout="constrained")
    for place, (name, updates) in enumerate(longest.items(), 1):
        axis = figure.add_subplot(down, across, place)
        best = {}
        for group in groups([row for row in rows if row["task"] == name and int(row["updates"]) == updates]):
            best.setdefault(group[0]["mu"], group)
        least = 0.5 / TEST  # an axis that has no 0
        for mu, group in best.items():
            for row in group:
                points = [point.split(":") for point in row["curve"].split()]
                errors = [max(float(error), least) for _, error in points]
                axis.plot([int(update) for update, _ in points], errors, colors[mu], lw=1)
            paper = papers(group[0])
            axis.plot([], [], colors[mu], label=f"mu = {mu}" + ("" if paper is None else f" (paper {paper:g})"))
            if paper is not None:
                axis.axhline(paper, color=colors[mu], lw=1, ls="--")
        axis.set(xlabel="updates", yscale="log", title=f"{name}, T={group[0]['T']} (dashed: the paper)")
        axis.legend(fontsize=8)
    figure.supylabel("wrong of the test sequences, or wrong symbols in each", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="addition", choices=tasks.TASKS)
    parser.add_argument("--T", type=int, default=80, help="length, default 80")
    parser.add_argument("--cue", type=int, default=3, help="of the marked numbers, default 3 as in the code of 2011")
    parser.add_argument("--recall-only", action="store_true", help="targets of memory tasks at the recall alone")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.995], help="momentum, default 0.995")
    parser.add_argument("--rate", type=float, nargs="+", help="learning rates, default that of four_ways.py")
    parser.add_argument(
        "--clip", type=float, nargs="+", help="bounds on the gradient's norm, default that of four_ways.py"
    )
    parser.add_argument(
        "--first-clip",
        type=float,
        help=f"bound until the loss is {FOUND} times that of a guess, default likewise, or --clip",
    )
    parser.add_argument("--biases", action="store_true", help="hidden biases")
    parser.add_argument("--state", action=argparse.BooleanOptionalAction, default=True, help="learn the initial state")
    parser.add_argument("--input-scale", type=float, help="of the input weights, default that of four_ways.py")
    parser.add_argument(
        "--updates", type=int, default=50_000, help=f"default 50000; {LOW_UPDATES} of them after the fall"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--csv", default="momentum.csv", metavar="FILE", help="gets a row for each run")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has")
    parser.add_argument("--plot", metavar="FILE", help="draw what the file has, print its table, and run nothing")
    args = parser.parse_args()
    rows = read(args.csv)
    if args.plot:
        plot(args.plot, rows)
        Console(width=200).print(table(rows))
        return
    if rows and not args.resume:
        parser.error(f"{args.csv} has {len(rows)} runs: --resume adds to them")
    if args.updates < LOW_UPDATES:
        parser.error(f"--updates should be at least {LOW_UPDATES}, after the fall of mu, got {args.updates}")
    try:
        make_task(args.task, args.T, args.cue, args.recall_only)
    except ValueError as error:
        parser.error(str(error))
    cue, recall_only = args.cue if args.task in MARKED else 0, args.recall_only and args.task in MEMORY
    for mu, rate, clip, seed in product(args.mu, args.rate or [None], args.clip or [None], args.seed):
        given = {"rate": rate, "clip": clip, "first_clip": args.first_clip, "input_scale": args.input_scale}
        recipe = recipe_for(args.task, mu=mu, biases=args.biases, state=args.state, updates=args.updates, **given)
        run = Run(args.task, args.T, cue, recall_only, recipe, seed)
        if not run.is_in(rows):
            row = perform(run)
            append(args.csv, row)
            print(f"{run}: {row['wrong']}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
