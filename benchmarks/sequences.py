"""What a sequence may carry: the cost of resets, unroll and recompute beside a plain call of the same layer.

python -m benchmarks.sequences [--threads N] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

import rnnfast
from benchmarks.env import cpu_info
from benchmarks.memory import resident_peak
from benchmarks.report import Table, markdown_tables, print_tables, seconds
from benchmarks.timing import Run, cpu_timer, time_in_turns

LAYERS = {"LSTM": rnnfast.LSTM, "GRU": rnnfast.GRU, "Elman": rnnfast.RNN}
T, B, H = 128, 64, 128
RESET_SHARE = 0.03
LONG_T, LONG_B, LONG_H = 100_000, 1, 128
RECOMPUTES: tuple[int | str | None, ...] = (None, "sqrt")


def training(layer: torch.nn.Module, call: Callable[[], Any], loss: Callable[[Any], torch.Tensor]) -> Run:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        loss(call()).backward()

    return run


def of_output(result: Any) -> torch.Tensor:
    return result[0].sum()


def of_states(unrolled: Any) -> torch.Tensor:
    """A loss on every c, or h where there is none."""
    return (unrolled.h if unrolled.c is None else unrolled.c).sum() + unrolled.output.sum()


def steps(kind: str) -> dict[str, Run]:
    """Training steps of one layer: plain, with resets, with a loss on every state."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind](H, H), torch.randn(T, B, H)
    resets = torch.rand(T, B) < RESET_SHARE
    return {
        "plain": training(layer, lambda: layer(x), of_output),
        "resets": training(layer, lambda: layer(x, resets=resets), of_output),
        "unroll": training(layer, lambda: layer.unroll(x), of_states),
    }


def long_step(kind: str, recompute: int | str | None) -> Run:
    torch.manual_seed(0)
    layer, x = LAYERS[kind](8, LONG_H, recompute=recompute), torch.randn(LONG_T, LONG_B, 8)
    return training(layer, lambda: layer(x), lambda result: result[0][-1].sum())


def peak_of(kind: str, recompute: int | str | None, threads: int) -> int:
    """Bytes that a long training step adds, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, kind, recompute, threads).result()


def _peak_here(kind: str, recompute: int | str | None, threads: int) -> int:
    torch.set_num_threads(threads)
    small = LAYERS[kind](8, 8, recompute=2)
    small(torch.randn(4, 1, 8))[0].sum().backward()  # loads what is loaded once
    return resident_peak(long_step(kind, recompute))


def measure(threads: int) -> list[dict[str, Any]]:
    rows = []
    for kind in tqdm(LAYERS, desc="layers"):
        for name, timing in time_in_turns(steps(kind), cpu_timer, budget_s=3).items():
            rows.append({"layer": kind, "pass": name, "median_s": timing.median_s, "iqr_s": timing.iqr_s})
        runs = {str(recompute): long_step(kind, recompute) for recompute in RECOMPUTES}
        for name, timing in time_in_turns(runs, cpu_timer, budget_s=20).items():
            peak = peak_of(kind, None if name == "None" else name, threads)
            rows.append(
                {"layer": kind, "pass": f"recompute={name}", "median_s": timing.median_s, "iqr_s": timing.iqr_s}
                | {"peak_bytes": peak}
            )
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    by = {(row["layer"], row["pass"]): row for row in rows}
    short = Table(
        f"Training steps, T{T} B{B} I{H} H{H}: resets at {RESET_SHARE:.0%} of the steps, a loss on every state",
        ["layer", "plain", "resets", "/ plain", "unroll", "/ plain"],
        [],
        left=1,
    )
    for kind in LAYERS:
        plain, resets, unroll = (by[kind, name]["median_s"] for name in ("plain", "resets", "unroll"))
        cells = [seconds(plain), seconds(resets), f"{resets / plain:.2f}", seconds(unroll), f"{unroll / plain:.2f}"]
        short.lines.append([kind, *cells])
    long = Table(
        f"recompute='sqrt' beside a plain step, T{LONG_T} B{LONG_B} I8 H{LONG_H}",
        ["layer", "plain", "recompute", "/ plain", "memory plain", "recompute", "/ plain"],
        [],
        left=1,
    )
    for kind in LAYERS:
        plain, less = (by[kind, f"recompute={r}"] for r in RECOMPUTES)
        times, peaks = ([row[key] for row in (plain, less)] for key in ("median_s", "peak_bytes"))
        cells = [seconds(times[0]), seconds(times[1]), f"{times[1] / times[0]:.2f}"]
        cells += [f"{peak / 2**20:.0f} MiB" for peak in peaks] + [f"1/{peaks[0] / peaks[1]:.1f}"]
        long.lines.append([kind, *cells])
    return [short, long]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.threads)
    made = tables(rows)
    versions = f"rnnfast {rnnfast.__version__}, torch {torch.__version__}"
    about = f"{cpu_info().get('model name')}, {rnnfast.info()['isa']}, {options.threads} threads; {versions}"
    console = Console()
    print_tables(console, made)
    console.print(about)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    if options.markdown:
        options.markdown.write_text(f"{about}\n\n{markdown_tables(made)}")


if __name__ == "__main__":
    main()
