"""A job from its check of results to its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import derivatives, steps
from benchmarks.contenders import LIBRARIES, Contender, make_contenders, make_data
from benchmarks.grid import DERIVATIVES, STEPS, Job
from benchmarks.memory import peak_bytes
from benchmarks.results import Row
from benchmarks.timing import Timer, Timing, cpu_timer, cuda_timer, time_in_turns

# Largest difference from the expected result, in units of its largest element. They tell another function from another
# order of sums, no more: the tests hold the tight bounds. On CUDA torch may use TF32, ten bits of mantissa.
TOLERANCES = {
    ("float32", "cpu"): 1e-4,
    ("float64", "cpu"): 1e-10,
    ("float32", "cuda"): 1e-2,
    ("float64", "cuda"): 1e-10,
    ("float16", "cuda"): 1e-2,  # two roundings of 16-bit numbers, over many steps
    ("bfloat16", "cuda"): 8e-2,
}


def run_job(job: Job, device: str, threads: int, budget_s: float) -> list[Row]:
    """Check the contenders against the first one, time those that agree, and return a row for each of them."""
    if job.kind == "memory":
        return _memory_rows(job, device, threads)
    if job.kind == "compile":
        return [_compile_row(job, device)]
    with torch.set_grad_enabled(job.trains):
        contenders = _contenders(job, device, threads)
        failures = find_failures(contenders, TOLERANCES[job.shape.dtype, device])
        sound = {c.name: c.run for c in contenders if not failures[c.name]}
        timings = time_in_turns(sound, timer_of(device), budget_s)
    rows = [_time_row(job, device, c.name, timings, failures[c.name]) for c in contenders]
    return [row | {"same_code": c.same_code} for row, c in zip(rows, contenders, strict=True)]


def _contenders(job: Job, device: str, threads: int) -> list[Contender]:
    if job.kind in DERIVATIVES:
        return derivatives.make_contenders(job, device)
    if job.kind in STEPS:
        return steps.make_contenders(job, make_data(job.shape, device), device)
    return make_contenders(job, device, threads)


def timer_of(device: str) -> Timer:
    return cuda_timer if device == "cuda" else cpu_timer


def find_failures(contenders: Sequence[Contender], tolerance: float) -> dict[str, str]:
    """For each contender where it differs from the first one, '' if nowhere."""
    expected = contenders[0].results()
    found = {c.name: _difference(c.results(), expected, tolerance) for c in contenders[1:]}
    return {contenders[0].name: ""} | found


def _difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> str:
    for name, a in got.items():
        b = expected[name]
        if a.shape != b.shape:
            return f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        largest = b.abs().max().double() or 1.0  # zeros: dL/dW_hh of a step that starts from zeros
        error = (a.double() - b.double()).abs().max() / largest
        if not error <= tolerance:
            return f"{name}: off by {error:.1e} of the largest element, allowed {tolerance:.0e}"
    return ""


# ------------------------------------------------------------------------------------------------- rows


def _time_row(job: Job, device: str, name: str, timings: Mapping[str, Timing], failure: str) -> Row:
    timing = timings.get(name)
    row = _row(job, device, name) | {"check": failure or "ok"}
    if timing is None:
        return row
    row |= {"median_s": timing.median_s, "iqr_s": timing.iqr_s}
    row |= {"gflops": job.flops / timing.median_s * 1e-9 if job.flops else None}
    row |= {"samples": timing.samples, "calls_per_sample": timing.calls}
    row |= {f"ratio_vs_{other}": t.median_s / timing.median_s for other, t in timings.items()}
    return row


def _compile_row(job: Job, device: str) -> Row:
    timing, contenders = derivatives.time_compilation(job, device)
    failure = find_failures(contenders, TOLERANCES[job.shape.dtype, device])["rnnfast"]
    return _time_row(job, device, "rnnfast", {} if failure else {"rnnfast": timing}, failure)


def _memory_rows(job: Job, device: str, threads: int) -> list[Row]:
    peaks = {name: peak_bytes(job, name, device, threads) for name in LIBRARIES}
    return [
        _row(job, device, name) | {"check": "ok", "peak_bytes": peak, "ratio_vs_torch": peaks["torch"] / peak}
        for name, peak in peaks.items()
    ]


def _row(job: Job, device: str, name: str) -> Row:
    """What every row has; what is not measured stays None."""
    s = job.shape
    row: Row = {"cell": s.cell, "pass": job.name, "impl": name}
    row |= {"T": s.T, "B": s.B, "I": s.I, "H": s.H, "L": s.L, "D": s.D, "P": s.P, "N": s.N, "dtype": s.dtype}
    row |= {"device": device, "shape": s.label, "median_s": None, "iqr_s": None, "gflops": None}
    return row | {"ratio_vs_torch": None}
