"""Fewer bits on the CPU: how much faster, how exact, and do networks still learn alike?

    python -m benchmarks.precision                               # speed and errors, preset quick
    python -m benchmarks.precision --preset full --json FILE
    python -m benchmarks.precision --curves --plot curves.png --csv curves.csv

torch.set_float32_matmul_precision says what float32 layers may round ("highest", "high", "medium"); autocast and
bfloat16 modules compute with 16 bits. Beside them torch.nn's layers in float32, under autocast and in bfloat16.
--curves trains examples, so it needs what they need: pip install '.[examples]'.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks import env, precision_curves, precision_errors, precision_speed
from benchmarks.__main__ import write_json
from benchmarks.report import Table, caption, markdown_tables, print_tables
from benchmarks.results import Row

CELLS = ("lstm", "gru", "rnn")
PARTS = ("speed", "errors", "curves")
WIDTH = 160  # of tables that go to a file
TITLE = "16 bits on the CPU"


@dataclass(frozen=True)
class Preset:
    """hidden, batches: I = H and B that are timed. error_hidden, error_seeds: whose errors are measured. epochs,
    curve_seeds: how long and how often the examples train. seconds: what the timing aims to take."""

    hidden: tuple[int, ...]
    batches: tuple[int, ...]
    error_hidden: tuple[int, ...]
    error_seeds: int
    epochs: dict[str, int]
    curve_seeds: int
    seconds: float


PRESETS = {
    "tiny": Preset((64,), (8,), (64,), 2, {"sunspots": 2, "digits": 2}, 2, seconds=0.5),
    "quick": Preset((128, 256, 512), (1, 32), (64, 256), 3, {"sunspots": 30, "digits": 30}, 5, seconds=60),
    "full": Preset(
        (64, 128, 200, 256, 320, 512, 1024),
        (1, 8, 32, 64),
        (64, 256, 512),
        5,
        {"sunspots": 100, "digits": 150},
        5,
        seconds=900,
    ),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="tiny: seconds, quick: minutes, full: 30 min a cell"
    )
    parser.add_argument("--speed", action="store_true", help="the times alone")
    parser.add_argument("--errors", action="store_true", help="the distance from float64 alone")
    parser.add_argument("--curves", action="store_true", help="train two examples; without any of these: speed, errors")
    parser.add_argument("--cells", default="lstm", help="any of " + ",".join(CELLS) + " (rnn: Elman)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--seconds", type=float, help="what the timing aims to take; default: the preset's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and results")
    markdown = "write what is printed as Markdown; without FILE print it so"
    parser.add_argument("--markdown", type=Path, nargs="?", const=Path("-"), metavar="FILE", help=markdown)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the loss curves as a PNG")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the loss curves as numbers")
    options = parser.parse_args(arguments)
    options.cells = options.cells.split(",")
    options.parts = [part for part in PARTS if getattr(options, part)] or ["speed", "errors"]
    if not set(options.cells) <= set(CELLS):
        parser.error(f"--cells: expected some of {','.join(CELLS)}, got {','.join(options.cells)}")
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if (options.plot or options.csv) and "curves" not in options.parts:
        parser.error("--plot and --csv are of the loss curves: ask for --curves, too")
    for path in filter(None, (options.json, options.markdown, options.plot, options.csv)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    return options


# ---------------------------------------------------------------------------------------------- measured


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Part by part, the rows of a job, of a layer or of a training run at a time."""
    preset = PRESETS[options.preset]
    if "speed" in options.parts:
        jobs = precision_speed.jobs_of(options.cells, preset.hidden, preset.batches)
        seconds = preset.seconds if options.seconds is None else options.seconds
        for job in (progress := tqdm(jobs, desc="speed")):
            progress.set_postfix_str(job.label)
            yield precision_speed.measure(job, seconds / len(jobs))
    if "errors" in options.parts:
        layers = [
            (cell, H, seed) for cell in options.cells for H in preset.error_hidden for seed in range(preset.error_seeds)
        ]
        for cell, H, seed in (progress := tqdm(layers, desc="errors")):
            progress.set_postfix_str(f"{cell} H{H} seed {seed}")
            yield precision_errors.measure(cell, H, seed)
    if "curves" in options.parts:
        for row in precision_curves.measure(preset.epochs, preset.curve_seeds):
            yield [row]


def of_part(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


# -------------------------------------------------------------------------------------------------- shown


def tables(rows: Sequence[Row], machine: env.Env) -> list[Table]:
    """The goals first, then everything."""
    speed, errors, curves = (of_part(rows, part) for part in PARTS)
    goals = (precision_speed.goals(speed) if speed else []) + (precision_errors.goals(errors) if errors else [])
    made = [Table("Goals", ["work", "goal", "measured", "met"], goals, left=4)] if goals else []
    made += precision_speed.tables(speed, machine) if speed else []
    made += precision_errors.tables(errors) if errors else []
    return made + ([precision_curves.table(curves)] if curves else [])


def notes(rows: Sequence[Row], machine: env.Env) -> list[str]:
    """What one has to know to read the tables, a paragraph each."""
    flags = [flag for flag in machine["flags"] if flag in ("avx512_bf16", "amx_bf16", "bf16")]
    info = ", ".join(f"{key} {value}" for key, value in machine["rnnfast"].items())
    found = [f"{caption(machine)}. 16-bit instructions: {', '.join(flags) or 'none'}. rnnfast.info(): {info}."]
    found.append(
        "highest, high, medium: rnnfast in float32 with that torch.set_float32_matmul_precision; autocast: the same"
        " float32 layer under autocast to bfloat16; bfloat16: a module of bfloat16 parameters."
    )
    if of_part(rows, "speed"):
        found.append(
            'Medians of samples taken in turns, in parentheses their interquartile range; "a / b": how many times as'
            f" fast a is. {precision_speed.peak_note(machine['flags'])}"
        )
    if of_part(rows, "errors"):
        sizes = f"T{precision_errors.T} B{precision_errors.B}, I = H"
        found.append(
            f"Errors at {sizes}, all seeds together: how far from torch in float64 on the numbers that the format is"
            " given; bfloat16 modules have rounded weights and read rounded input."
        )
    if of_part(rows, "curves"):
        found.append(
            "Loss curves: the whole model has the format, torch's linear layer that reads the states out, too; the same"
            " seed means the same initial weights and the same batches."
        )
    return found


def to_markdown(rows: Sequence[Row], machine: env.Env) -> str:
    """A section of RESULTS.md."""
    return "\n\n".join([f"# {TITLE}", *notes(rows, machine), markdown_tables(tables(rows, machine))])


def show(options: argparse.Namespace, rows: list[Row], machine: env.Env) -> None:
    to_stdout = options.markdown == Path("-")
    if to_stdout:
        print(to_markdown(rows, machine))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    print_tables(console, tables(rows, machine))
    for note in notes(rows, machine):
        console.print(note, markup=False)


def write(options: argparse.Namespace, rows: list[Row], machine: env.Env) -> None:
    if options.json:
        write_json(options.json, machine, rows)
    if options.markdown and options.markdown != Path("-"):
        options.markdown.write_text(to_markdown(rows, machine))
    curves = of_part(rows, "curves")
    if options.plot:
        precision_curves.save_plot(options.plot, curves, caption(machine))
    if options.csv:
        precision_curves.save_csv(options.csv, curves)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a result was wrong."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    machine = env.describe("cpu", options.threads)
    command = ["python", "-m", "benchmarks.precision", *(sys.argv[1:] if arguments is None else arguments)]
    machine["command"] = shlex.join(command)
    before = env.limits(options.threads, [])
    rows: list[Row] = []
    for some in measure(options):
        rows += some
        if options.json:
            write_json(options.json, machine | before, rows)
    machine |= env.higher(before, env.limits(options.threads, []))
    show(options, rows, machine)
    write(options, rows, machine)
    return report_wrong(rows)


def report_wrong(rows: Sequence[Row]) -> int:
    """What torch refuses is not wrong."""
    wrong = [row for row in of_part(rows, "speed") if row["check"] != "ok"]
    for row in wrong:
        print(f"{row['cell']} {row['pass']} {row['shape']} {row['impl']}: {row['check']}", file=sys.stderr)
    return 1 if any(not row["impl"].startswith("torch") for row in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
