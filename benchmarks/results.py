"""The rows of a run, brought together by job."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""One contender's result of one job: an element of "results" in the JSON file."""


@dataclass(frozen=True)
class Group:
    """The rows of one job, by contender."""

    by_impl: dict[str, Row]

    def __getitem__(self, key: str) -> Any:
        """What all rows of the job share: cell, pass, T, B, ..."""
        return self.ours[key]

    @property
    def ours(self) -> Row:
        return self.by_impl["rnnfast"]

    def ratio(self, other: str) -> float | None:
        """Median (or peak memory) of `other` / that of rnnfast; None if one of them is missing."""
        return self.ours.get(f"ratio_vs_{other}")

    @property
    def cost(self) -> float | None:
        """Median of rnnfast in units of its own pass without the transform; None where there is no such pass."""
        ratio = self.ratio("plain")
        return None if ratio is None else 1 / ratio

    @property
    def same_code(self) -> bool:
        """Do both sides run the same code, so that the ratio is 1 but for noise?"""
        return bool(self.ours.get("same_code"))

    @property
    def failures(self) -> list[str]:
        return [f"{name}: {row['check']}" for name, row in self.by_impl.items() if row["check"] != "ok"]


def group(rows: Iterable[Row]) -> list[Group]:
    """Rows of the same job come together, in the order of the run."""
    jobs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        jobs.setdefault((row["cell"], row["pass"], row["shape"]), {})[row["impl"]] = row
    return [Group(by_impl) for by_impl in jobs.values()]


def ratios(groups: Iterable[Group], other: str) -> list[float]:
    found = (g.ratio(other) for g in groups)
    return [ratio for ratio in found if ratio is not None]


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
