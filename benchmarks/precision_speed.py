"""How fast a layer is in each format: torch.nn's and rnnfast's in turns, in one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks.contenders import LIBRARIES, Contender, Data, as_contender, load_module, make_data
from benchmarks.env import Env
from benchmarks.formats import FORMATS, Format, matmul_precision, prepare, refusal
from benchmarks.grid import Job, Shape
from benchmarks.report import CELLS, Cell, Table, seconds
from benchmarks.results import Row, geomean
from benchmarks.run import find_failures
from benchmarks.timing import Timing, cpu_timer, time_in_turns

PASSES = {"inference": "inference", "train": "forward and backward"}
# They tell another function from another rounding, no more; errors are measured by precision_errors.py. 16 bits: two
# roundings of bfloat16 numbers, over many steps.
TOLERANCES = {32: 1e-4, 16: 8e-2}
RATIOS = (  # (who, beside whom)
    ("autocast", "torch autocast"),
    ("bfloat16", "torch bfloat16"),
    ("autocast", "highest"),
    ("bfloat16", "highest"),
    ("medium", "highest"),
    ("high", "highest"),
    ("highest", "torch float32"),
)
SHARES = ("highest", "autocast", "bfloat16")  # whose share of the peak is shown


def steps_of(H: int) -> int:
    """T: fewer steps where each takes long."""
    return 20 if H >= 1024 else 50 if H >= 512 else 100


def jobs_of(cells: Iterable[str], hidden: Iterable[int], batches: Sequence[int]) -> list[Job]:
    """I = H"""
    shapes = [Shape(cell, steps_of(H), B, H, H) for cell in cells for H in hidden for B in batches]
    return [Job(shape, kind, kind) for shape in shapes for kind in PASSES]


# ---------------------------------------------------------------------------------------------- measured


def measure(job: Job, budget_s: float) -> list[Row]:
    """A row for each format. What torch refuses or what computes something else is not timed."""
    data = make_data(job.shape, "cpu")
    refusals = {name: refusal(f, job.shape.cell) for name, f in FORMATS.items()}
    with torch.set_grad_enabled(job.trains):
        contenders = [contender(f, job, data) for name, f in FORMATS.items() if not refusals[name]]
        checks = refusals | failures_of(contenders)
        sound = {c.name: c.run for c in contenders if not checks[c.name]}
        timings = time_in_turns(sound, cpu_timer, budget_s)
    return [_row(job, name, timings.get(name), checks[name]) for name in FORMATS]


def contender(f: Format, job: Job, data: Data) -> Contender:
    module = prepare(load_module(LIBRARIES[f.library], job.shape, data, "cpu").train(job.trains), f)
    x = data.x.to(f.dtype)
    with torch.no_grad():
        output_dtype = module(x)[0].dtype  # under autocast bfloat16 of some layers, float32 of others
    plain = as_contender(f.name, module, job.kind, Data(x, data.dy.to(output_dtype), data.weights))
    at_precision = matmul_precision(f.precision)
    return replace(plain, run=at_precision(plain.run), results=at_precision(plain.results))


def failures_of(contenders: Sequence[Contender]) -> dict[str, str]:
    """Where each differs from torch's float32; '' if nowhere."""
    found: dict[str, str] = {}
    for bits, tolerance in TOLERANCES.items():
        some = [c for c in contenders if FORMATS[c.name].bits == bits and c is not contenders[0]]
        found |= find_failures([contenders[0], *some], tolerance)
    return found


def _row(job: Job, name: str, timing: Timing | None, failure: str) -> Row:
    s, f = job.shape, FORMATS[name]
    row: Row = {"part": "speed", "cell": s.cell, "pass": job.kind, "impl": name, "shape": s.label}
    row |= {"T": s.T, "B": s.B, "I": s.I, "H": s.H, "bits": f.bits, "check": failure or "ok"}
    if timing is None:
        return row | {"median_s": None, "iqr_s": None, "samples": 0, "gflops": None}
    row |= {"median_s": timing.median_s, "iqr_s": timing.iqr_s, "samples": timing.samples}
    return row | {"gflops": (job.flops or 0) / timing.median_s * 1e-9}


# ------------------------------------------------------------------------------------------------- tables

Line = Mapping[str, Row]
"""The rows of one job, by format."""


def lines_of(rows: Iterable[Row]) -> list[Line]:
    jobs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        jobs.setdefault((row["cell"], row["pass"], row["shape"]), {})[row["impl"]] = row
    return list(jobs.values())


def ratio(line: Line, ours: str, other: str) -> float | None:
    """How many times as fast `ours` is; None if one of them was not timed."""
    a, b = line[ours]["median_s"], line[other]["median_s"]
    return b / a if a and b else None


def tables(rows: Sequence[Row], env: Env) -> list[Table]:
    """For each cell and pass the times, then the ratios that matter and the share of the peak."""
    made = []
    for cell, cell_title in CELLS.items():
        for kind, title in PASSES.items():
            some = lines_of(row for row in rows if (row["cell"], row["pass"]) == (cell, kind))
            if some:
                made.append(_times(f"{cell_title}, {title}", some))
                made.append(_ratios(f"{cell_title}, {title}: times as fast", some, env))
    return made


def _times(title: str, lines: Sequence[Line]) -> Table:
    return Table(title, ["shape", *FORMATS], [[_shape(x), *(_time(x[name]) for name in FORMATS)] for x in lines], 1)


def _shape(line: Line) -> str:
    return line["highest"]["shape"]


def _time(row: Row) -> str:
    if row["median_s"] is None:
        return "refused" if row["impl"].startswith("torch") else "wrong"
    return f"{seconds(row['median_s'])} ({row['iqr_s'] / row['median_s']:.0%})"


def _ratios(title: str, lines: Sequence[Line], env: Env) -> Table:
    header = ["shape", *(f"{ours} / {other}" for ours, other in RATIOS), *(f"{name}, of peak" for name in SHARES)]
    content: list[list[Cell]] = []
    for line in lines:
        found = [ratio(line, *pair) for pair in RATIOS]
        shares = [_share(line[name], env) for name in SHARES]
        content.append([_shape(line), *("" if value is None else value for value in found), *shares])
    if len(lines) > 1:
        content.append(["geometric mean", *_means(lines), *[""] * len(SHARES)])
    return Table(title, header, content, left=1)


def _means(lines: Sequence[Line]) -> list[Cell]:
    found = ([r for line in lines if (r := ratio(line, *pair))] for pair in RATIOS)
    return [geomean(some) if some else "" for some in found]


def _share(row: Row, env: Env) -> str:
    """Of the multiply-add peak of so many bits, if there are units for them."""
    peaks = env["fma_peak_gflops"]
    peak = peaks.get("bfloat16", peaks["float32"]) if row["bits"] == 16 else peaks["float32"]
    return "" if row["gflops"] is None else f"{row['gflops'] / peak:.0%}"


def peak_note(flags: Sequence[str]) -> str:
    """What 16 bits can give on a CPU with these flags."""
    note = "Shares are of the peak of multiply-adds of so many bits, measured in the same run. "
    if "amx_bf16" in flags:
        return note + "AMX multiplies bfloat16 numbers at many times the rate of float32."
    if "avx512_bf16" in flags:
        return note + (
            "AVX512-BF16 multiplies and adds at twice the rate of float32, so a pass would be 2x as fast as float32's"
            " only if all but its products took no time: the bar of 2x is out of reach here."
        )
    return note + "This CPU has no 16-bit products: what is rounded is computed in float32."


# -------------------------------------------------------------------------------------------------- goals


def goals(rows: Sequence[Row]) -> list[list[Cell]]:
    """work, goal, measured, met; a goal of None is a figure that is only told."""
    train = [x for x in lines_of(rows) if x["highest"]["pass"] == "train"]
    inference = [x for x in lines_of(rows) if x["highest"]["pass"] == "inference"]
    large = [x for x in train if x["highest"]["B"] >= 32 and 128 <= x["highest"]["H"] <= 512]
    made = [
        _goal("autocast / torch autocast, forward and backward", train, ("autocast", "torch autocast"), 1.3, 2.0),
        _goal("autocast / torch autocast, inference", inference, ("autocast", "torch autocast"), None),
        _goal("bfloat16 / highest, forward and backward, B ≥ 32, H 128 to 512", large, ("bfloat16", "highest"), 2.0),
        _goal("autocast / highest, the same", large, ("autocast", "highest"), 2.0),
        _goal("medium / highest, the same", large, ("medium", "highest"), None),
        _goal("high / highest, forward and backward", train, ("high", "highest"), None),
        _goal("highest / torch float32, forward and backward", train, ("highest", "torch float32"), None),
    ]
    return [line for line in made if line]


def _goal(
    work: str, lines: Sequence[Line], pair: tuple[str, str], goal: float | None, aim: float | None = None
) -> list[Cell]:
    """Empty where nothing was measured."""
    found = [(value, line) for line in lines if (value := ratio(line, *pair)) is not None]
    if not found:
        return []
    lowest, where = min(found, key=lambda pair: pair[0])
    cell = CELLS[where["highest"]["cell"]]
    measured = f"lowest {lowest:.2f}× ({cell} {_shape(where)}), geomean {geomean(value for value, _ in found):.2f}×"
    wanted = "" if goal is None else f"≥ {goal}×" + (f", aim {aim}×" if aim else "")
    return [work, wanted, measured, "" if goal is None else "yes" if lowest >= goal else "no"]
