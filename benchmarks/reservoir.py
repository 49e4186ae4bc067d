"""Echo state networks: rnnfast.EchoState beside reservoirpy, and many at once beside one after another.

    python -m benchmarks.reservoir [--threads N] [--markdown FILE]

Without reservoirpy (`pip install reservoirpy==0.4.2`) its columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

import rnnfast
from benchmarks.env import cpu_info
from benchmarks.report import Cell, Table, markdown_tables, print_tables, seconds
from benchmarks.timing import Run, cpu_timer, time_in_turns
from rnnfast.reservoir import fit_many, predict_many

LEAK, RADIUS, RIDGE, WASHOUT = 0.3, 0.9, 1e-6, 100
LARGE = 5000  # units from which on a run is timed once


@dataclass(frozen=True)
class Size:
    """Of a reservoir, and how many steps it is fitted to and then run for."""

    units: int
    density: float
    fit: int
    run: int


SIZES = (
    Size(400, 0.1, 4000, 2000),
    Size(500, 0.1, 4000, 2000),
    Size(1000, 0.1, 4000, 2000),
    Size(2000, 0.1, 4000, 2000),
    Size(100, 5 / 100, 40_000, 10_000),  # five connections into each unit
    Size(1000, 5 / 1000, 40_000, 10_000),
    Size(10_000, 5 / 10_000, 4000, 2000),
)
MANY, MANY_UNITS, MANY_STEPS = 32, (100, 300), 4000
REST_S = 0.05  # for some ms after a run of reservoirpy a call on two threads takes up to twice as long as later


class Contender(NamedTuple):
    fit: Run
    run: Callable[[], np.ndarray]  # (steps,1)


def series(steps: int) -> np.ndarray:
    """(steps,1) a noisy oscillation"""
    noise = np.random.default_rng(0).normal(0, 0.1, (steps, 1))
    return np.sin(np.arange(steps) / 7)[:, None] + noise


def ours(size: Size, x: np.ndarray) -> Contender:
    esn = rnnfast.EchoState(1, size.units, 1, spectral_radius=RADIUS, leak=LEAK, density=size.density)
    return Contender(
        lambda: esn.fit(x[: size.fit], x[1 : size.fit + 1], ridge=RIDGE, washout=WASHOUT),
        lambda: esn.predict(x[size.fit : -1]),
    )


def theirs(size: Size, x: np.ndarray) -> Contender:
    from reservoirpy.nodes import Reservoir, Ridge

    reservoir = Reservoir(units=size.units, lr=LEAK, sr=RADIUS, rc_connectivity=size.density, seed=0)
    model = reservoir >> Ridge(ridge=RIDGE)
    return Contender(
        lambda: model.fit(x[: size.fit], x[1 : size.fit + 1], warmup=WASHOUT), lambda: model.run(x[size.fit : -1])
    )


def compare(size: Size, libraries: dict[str, Callable[[Size, np.ndarray], Contender]]) -> list[list[Cell]]:
    """A line for fit and one for run."""
    x = series(size.fit + size.run + 1)
    contenders = {name: make(size, x) for name, make in libraries.items()}
    errors = {}
    for name, contender in contenders.items():
        contender.fit()
        off = (contender.run() - x[size.fit + 1 :])[WASHOUT:]  # reservoirpy goes on from the fit, rnnfast from zeros
        errors[name] = np.sqrt(np.mean(off**2)) / x.std()
    accuracy = " / ".join(f"{errors[name]:.3f}" for name in libraries)
    lines = []
    for what, steps in (("fit", size.fit), ("run", size.run)):
        runs = {name: getattr(contender, what) for name, contender in contenders.items()}
        medians = _medians(runs, once=size.units >= LARGE)
        label = [str(size.units), f"{round(size.density * size.units)}", f"{what}, {steps} steps"]
        lines.append([*label, *_columns(medians, "reservoirpy"), accuracy])
    return lines


def many(units: int, same_matrix: bool) -> list[list[Cell]]:
    """MANY reservoirs at once, and one after another."""
    x = series(MANY_STEPS + 1)
    networks = [
        rnnfast.EchoState(1, units, 1, leak=0.2 + 0.02 * k, density=0.1, seed=0 if same_matrix else k)
        for k in range(MANY)
    ]

    def fit_each() -> None:
        for network in networks:
            network.fit(x[:-1], x[1:])

    def predict_each() -> None:
        for network in networks:
            network.predict(x[:-1])

    fit_each()
    pairs: dict[str, dict[str, Run]] = {
        "fit": {"one by one": fit_each, "rnnfast": lambda: fit_many(networks, x[:-1], x[1:])},
        "predict": {"one by one": predict_each, "rnnfast": lambda: predict_many(networks, x[:-1])},
    }
    differ = "leaks" if same_matrix else "seeds and leaks"
    return [
        [str(units), differ, what, *_columns(_medians(runs, once=False), "one by one")] for what, runs in pairs.items()
    ]


def rested_timer(run: Run, calls: int) -> float:
    time.sleep(REST_S)
    return cpu_timer(run, calls)


def _medians(runs: dict[str, Run], once: bool) -> dict[str, float]:
    if once:
        return {name: rested_timer(run, 1) for name, run in runs.items()}
    return {name: timing.median_s for name, timing in time_in_turns(runs, rested_timer, budget_s=5.0).items()}


def _columns(medians: dict[str, float], other: str) -> list[Cell]:
    """The other's time, ours, and the ratio."""
    mine = medians["rnnfast"]
    if other not in medians:
        return ["", seconds(mine), ""]
    return [seconds(medians[other]), seconds(mine), medians[other] / mine]


def tables() -> list[Table]:
    libraries: dict[str, Callable[[Size, np.ndarray], Contender]] = {"rnnfast": ours}
    if importlib.util.find_spec("reservoirpy"):
        libraries["reservoirpy"] = theirs
    beside: list[list[Cell]] = []
    for size in tqdm(SIZES, desc="beside reservoirpy"):
        beside += compare(size, libraries)
    at_once: list[list[Cell]] = []
    for units, same in tqdm([(units, same) for units in MANY_UNITS for same in (True, False)], desc="many at once"):
        at_once += many(units, same)
    header = ["units", "into each", "what", "reservoirpy", "rnnfast", "ratio", "NRMSE " + " / ".join(libraries)]
    return [
        Table("Echo state networks, float64", header, beside, left=3),
        Table(
            f"{MANY} reservoirs, {MANY_STEPS} steps",
            ["units", "differ in", "what", "one by one", "at once", "ratio"],
            at_once,
            left=3,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = tables()
    versions: list[Any] = [f"rnnfast {rnnfast.__version__}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("reservoirpy"):
        versions.append(f"reservoirpy {importlib.metadata.version('reservoirpy')}")
    about = f"{cpu_info().get('model name')}, {rnnfast.info()['isa']}, {args.threads} threads; {', '.join(versions)}"
    console = Console()
    print_tables(console, found)
    console.print(about)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(f"{about}\n\n{markdown_tables(found)}")


if __name__ == "__main__":
    main()
