"""The project's goals on a GPU, and what results of `--preset gpu` say about each.

python -m benchmarks.gpu_goals FILE.json ...     microseconds a step and the goals, from all files together
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.report import CELLS, Cell, Table, print_tables
from benchmarks.results import Group, Row, geomean, group

Chosen = Callable[[Group], bool]
WIDTH = 130


@dataclass(frozen=True)
class Ratio:
    """The lowest ratio to cuDNN among some groups; of memory, cuDNN's / rnnfast's."""

    work: str
    chosen: Chosen
    goal: float
    aim: float | None = None  # of the geometric mean

    def line(self, groups: Sequence[Group]) -> list[Cell]:
        goal = f"≥ {self.goal}×" + (f", geomean {self.aim}×" if self.aim else "")
        some = [g for g in groups if self.chosen(g)]
        wrong = [g for g in some if g.failures]
        if wrong:
            return [self.work, goal, f"wrong: {_where(wrong[0])}", "not met"]
        found = [(ratio, g) for g in some if (ratio := g.ratio("torch")) is not None]
        if not found:
            return [self.work, goal, "", "not measured"]
        lowest, g = min(found, key=lambda pair: pair[0])
        mean = geomean(ratio for ratio, _ in found)
        short = [f"{1 - lowest / self.goal:.0%} short"] * (lowest < self.goal)
        if self.aim and mean < self.aim:
            short.append(f"geomean {1 - mean / self.aim:.0%} short of its aim")
        measured = f"lowest {lowest:.2f}× ({_where(g)}), geomean {mean:.2f}×, {len(found)} cells"
        return [self.work, goal, measured, ", ".join(short) or "met"]


@dataclass(frozen=True)
class StepTime:
    """Microseconds of a step, at most."""

    work: str
    chosen: Chosen
    goal: float

    def line(self, groups: Sequence[Group]) -> list[Cell]:
        goal = f"≤ {self.goal} µs"
        some = [g for g in groups if self.chosen(g)]
        times = [time for g in some if (time := step_time(g.ours)) is not None]
        if not times:
            return [self.work, goal, "wrong" if some else "", "not met" if some else "not measured"]
        slowest = max(times)
        short = f"{slowest / self.goal - 1:.0%} too long" if slowest > self.goal else "met"
        return [self.work, goal, f"{slowest:.2f} µs", short]


def step_time(row: Row) -> float | None:
    """Microseconds a step; None for a wrong result."""
    return None if row["median_s"] is None else row["median_s"] / row["T"] * 1e6


def _where(g: Group) -> str:
    return f"{CELLS[g['cell']]} {g['pass']} {g['shape']}"


def _plain(cell: str, dtype: str) -> Chosen:
    """One layer, one direction, padded."""
    return lambda g: (
        (g["cell"], g["dtype"], g["L"], g["D"]) == (cell, dtype, 1, 1) and g["pass"] in ("inference", "train")
    )


def _inference_at(dtype: str, H: int, B: int) -> Chosen:
    return lambda g: _plain("lstm", dtype)(g) and (g["pass"], g["H"], g["B"]) == ("inference", H, B)


def _is_persistent_by_cudnn(g: Group) -> bool:
    """Does torch take cuDNN's kernels that keep W_hh on the chip? Here for plain float16."""
    return g["H"] % 128 == g["I"] % 128 == 0 and g["H"] <= 1024 and g["B"] % 8 == 0 and g["B"] <= 128


def _has_options(g: Group) -> bool:
    return g["pass"].endswith("_packed") or (g["pass"] != "memory" and (g["L"] > 1 or g["D"] > 1))


GOALS = (
    Ratio("LSTM bfloat16", _plain("lstm", "bfloat16"), 1.3, aim=2.5),
    Ratio(
        "LSTM float16, cuDNN's persistent range",
        lambda g: _plain("lstm", "float16")(g) and _is_persistent_by_cudnn(g),
        1.0,
    ),
    Ratio("LSTM float32 (TF32), H ≥ 256", lambda g: _plain("lstm", "float32")(g) and g["H"] >= 256, 1.3),
    Ratio("Elman", lambda g: any(_plain("rnn", d)(g) for d in ("bfloat16", "float16", "float32")), 1.3),
    Ratio("packed, two layers, both directions", _has_options, 1.3),
    StepTime("LSTM bfloat16 H512 B16, a step forward", _inference_at("bfloat16", 512, 16), 1.5),
    StepTime("LSTM float16 H768 B16, a step forward", _inference_at("float16", 768, 16), 2.0),
    Ratio("peak memory of a training step, cuDNN's / rnnfast's", lambda g: g["pass"] == "memory", 1.0),
)


def tables(rows: Sequence[Row]) -> list[Table]:
    """The goals, each with "met" or by how much it is missed."""
    groups = group(rows)
    return [Table("Goals", ["work", "goal", "measured", "met"], [goal.line(groups) for goal in GOALS], left=4)]


def step_table(rows: Sequence[Row]) -> Table:
    """Microseconds a step of both, and the ratio."""
    lines: list[list[Cell]] = []
    for g in group(rows):
        torchs = g.by_impl.get("torch")
        if g["pass"] == "memory" or torchs is None:
            continue
        times = [step_time(row) for row in (torchs, g.ours)]
        cells = ["wrong" if time is None else f"{time:.2f}" for time in times]
        lines.append([CELLS[g["cell"]], f"{g['pass']} {g['shape']}", *cells, g.ratio("torch") or ""])
    return Table("Microseconds a step", ["", "pass", "cuDNN", "rnnfast", "ratio"], lines)


def read(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in json.loads(path.read_text())["results"]]


def main(arguments: Sequence[str]) -> int:
    rows = read(path for name in arguments if (path := Path(name)).is_file())
    console = Console(width=WIDTH)
    print_tables(console, [step_table(rows), *tables(rows)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
