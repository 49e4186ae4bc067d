"""python -m benchmarks.stream in small: who is measured, that all compute the same, and what is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stream_c import compile_c, prefix  # noqa: F401  a fixture

pytest.importorskip("rich")
pytest.importorskip("tqdm")

from benchmarks import stream as benchmark
from benchmarks.report import markdown_tables, seconds

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "cc", "c++"))), reason="needs CMake, ninja and a C compiler"
)


@pytest.fixture(scope="module")
def rows(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:  # noqa: F811
    """Of a small run, with the library that is there."""
    folder = tmp_path_factory.mktemp("steps")
    program = compile_c(ROOT / "benchmarks/stream_steps.cpp", folder / "steps", prefix, "-std=c++17", "-O1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = benchmark.step_in_python(5, budget_s=0.05)
        for I in (1, 5):  # noqa: E741
            found += benchmark.steps_in_c(program, 5, I, 300, folder)
    finally:
        torch.set_num_threads(threads)
    return found


def test_who_is_measured(rows: list[dict[str, Any]]) -> None:
    python = {row["impl"] for row in rows if row["where"] == "python"}
    assert python >= {"torch", "tensor", "array"}
    for I in (1, 5):  # noqa: E741
        assert {"rnnfast", "rnnfast, blocks of 48"} <= {row["impl"] for row in rows if row["I"] == I}
    for row in rows:
        assert 0 < row["median_s"] < 0.1
        if row["where"] == "c":
            assert row["least_s"] <= row["median_s"] and row["single_median_s"] <= row["single_999_s"]
    json.dumps(rows)


def test_tables_and_plot(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = markdown_tables(benchmark.tables(rows, {5: 10.0}))
    (ours,) = [row for row in rows if row["impl"] == "array"]
    assert f" {seconds(ours['median_s'])} " in text and "48 kHz" in text
    benchmark.save_plot(tmp_path / "steps.png", rows, "a machine")
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_different_results_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="Stream, array gives something else"):
        benchmark._check({"torch": lambda: torch.zeros(3), "array": lambda: np.full(3, 1e-3)})
