"""Command line: `python -m benchmarks --preset quick`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import bars, env, gpu_goals, report
from benchmarks.contenders import has_onnx
from benchmarks.grid import CELLS, DERIVATIVES, PRESETS, STEPS, Job
from benchmarks.results import Row
from benchmarks.run import run_job
from benchmarks.steps import has_compiler
from rnnfast._backends import cuda_sweeps

WIDTH = 130  # of tables that go to a file
WITH_GOALS = ("derivatives", "full")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time rnnfast against torch.nn.")
    presets = (
        "tiny: seconds, quick: 3 min, derivatives (and torch.compile): 3 min, cells (and layers of a step): 5 min,"
        " full: 28 min, gpu (--device cuda): 8 min"
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=presets)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--cells", default=",".join(CELLS), help="any of " + ",".join(CELLS))
    parser.add_argument("--filter", type=regex, default="", metavar="REGEX", help="only rows that it is found in")
    parser.add_argument("--seconds", type=float, help="what the timing aims to take; default: see --preset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the ratios as a PNG")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable CUDA device (torch.cuda.is_available() is False)")
    if options.device == "cuda" and not cuda_sweeps.is_built():
        parser.error("--device cuda: this installation has no CUDA kernels; build it with RNNFAST_CUDA=on")
    if options.preset == "gpu" and options.device != "cuda":
        parser.error("--preset gpu: its 16-bit layers have kernels with --device cuda only")
    for path in filter(None, (options.json, options.markdown, options.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.seconds is None:
        options.seconds = PRESETS[options.preset].seconds
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    options.jobs = select(PRESETS[options.preset].jobs, options.cells.split(","), options.filter)
    if not options.jobs:
        parser.error("--cells and --filter leave nothing to measure")
    if options.plot and all(job.kind in ("memory", *DERIVATIVES, *STEPS) for job in options.jobs):
        parser.error(
            "--plot: of memory, derivatives, torch.compile and cells there is no plot, and nothing else is measured"
        )
    return options


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"invalid regular expression {text!r}: {error}") from error


def select(jobs: Sequence[Job], cells: Sequence[str], pattern: re.Pattern[str]) -> list[Job]:
    return [job for job in jobs if job.shape.cell in cells and pattern.search(job.label)]


def run_jobs(
    jobs: Sequence[Job],
    seconds: float,
    device: str,
    threads: int,
    console: Console,
    after_each: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all jobs. Each job may take an equal share of the time that is left; small ones come first and pass
    on what they do not need, derivatives last. `after_each` gets the rows that there are after each job."""
    done: dict[Job, list[Row]] = {}
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in sorted(jobs, key=lambda job: job.flops or math.inf):
            progress.update(task, description=job.label)
            left = seconds - (time.perf_counter() - start)
            done[job] = run_job(job, device, threads, left / (len(jobs) - len(done)))
            progress.advance(task)
            after_each([row for job in jobs for row in done.get(job, [])])
    return [row for job in jobs for row in done[job]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    torch.set_num_threads(options.threads)
    if not has_onnx():
        console.print("ONNX Runtime is not installed (pip install onnx onnxruntime): its column is left out.")
    if any(job.is_compiled for job in options.jobs) and not has_compiler():
        console.print("There is no C++ compiler for torch.compile: what would be compiled is left out.")
        options.jobs = [job for job in options.jobs if not job.is_compiled]
    machine = env.describe(options.device, options.threads)
    sizes = bars.streamed_sizes(options.jobs)
    before = env.limits(options.threads, sizes)

    def keep(rows: list[Row]) -> None:
        if options.json:
            write_json(options.json, machine | before, rows)

    rows = run_jobs(options.jobs, options.seconds, options.device, options.threads, console, keep)
    machine |= env.higher(before, env.limits(options.threads, sizes))
    return write(options, console, machine, rows)


def write_json(path: Path, machine: env.Env, rows: list[Row]) -> None:
    """A whole file at any time: a run that is cut off keeps what it has."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps({"env": machine, "results": rows}, indent=1) + "\n")
    unfinished.replace(path)


def write(options: argparse.Namespace, console: Console, machine: env.Env, rows: list[Row]) -> int:
    """Everything that was asked for; returns the exit status, 1 if some result was wrong."""
    goals = bars.tables(rows, machine) if options.device == "cpu" and options.preset in WITH_GOALS else []
    goals += gpu_goals.tables(rows) if options.preset == "gpu" else []
    content = report.tables(rows, machine) + goals
    report.print_tables(console, content)
    console.print(f"{report.caption(machine)}\n{report.NOTE}", markup=False)
    if options.json:
        write_json(options.json, machine, rows)
    if options.markdown:
        options.markdown.write_text(report.to_markdown(content, machine))
    if options.plot:
        from benchmarks.plot import save_plot

        save_plot(options.plot, rows, machine)
    wrong = [row for row in rows if row["check"] != "ok"]
    for row in wrong:
        console.print(f"WRONG {row['cell']} {row['pass']} {row['shape']} {row['impl']}: {row['check']}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
