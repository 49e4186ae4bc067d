"""Single steps of one sequence on one thread: rnnfast.Stream beside torch and ONNX Runtime, and in C beside RTNeural.

    python -m benchmarks.stream [--json FILE] [--plot FILE] [--markdown FILE] [--sizes 8 64 ...] [--steps N]

Builds the C library in build/stream (a minute the first time), needs CMake, ninja and a C++ compiler. Without ONNX
Runtime (`pip install onnx onnxruntime`) its column stays empty, and without RTNeural, too: its headers and those of
xsimd are looked for on the compiler's include path (CPLUS_INCLUDE_PATH).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

import rnnfast
from benchmarks.contenders import ONNX, has_onnx, make_data, onnx_contender
from benchmarks.env import describe, limits
from benchmarks.grid import Job, Shape
from benchmarks.report import Cell, Table, markdown_tables, print_tables, seconds
from benchmarks.timing import cpu_timer, time_in_turns

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
SIZES = (4, 8, 16, 20, 32, 40, 64, 80, 128, 256, 512, 1024)
STEPS = 100_000
LARGE_WORK = 2e9  # multiply-adds that all steps of one size may take in C; larger ones run fewer steps
LARGE_BYTES = 2**20  # of weights, from which on reading them is what a step waits for
RATE = 48_000
CHECKED = 8  # steps in which contenders are compared before they are timed
TOLERANCE = 1e-5
NAMES = {"torch": "torch", ONNX: "ONNX Runtime", "tensor": "Stream, tensor", "array": "Stream, array"}


# ------------------------------------------------------------------------------------------ Python


def step_in_python(H: int, budget_s: float) -> list[Row]:
    """An LSTM's step, I = H: every library as its users call it, its state kept, all from the same weights."""
    shape = Shape("lstm", T=1, B=1, I=H, H=H)
    data = make_data(shape, "cpu")
    layer = torch.nn.LSTM(H, H)
    layer.load_state_dict(data.weights)
    x = data.x[0]
    runs: dict[str, Callable[[], Any]] = {
        "torch": _torchs_step(layer, data.x),
        "tensor": _step_of(rnnfast.Stream(layer), x),
        "array": _step_of(rnnfast.Stream(layer), x.numpy()),
    }
    if has_onnx():
        contender = onnx_contender(Job(shape, "step", "step"), data, 1)
        runs[ONNX] = lambda: contender.run()[0]
    _check(runs)
    timings = time_in_turns(runs, cpu_timer, budget_s)
    return [
        {"where": "python", "impl": name, "H": H, "I": H, "median_s": timing.median_s, "iqr_s": timing.iqr_s}
        for name, timing in timings.items()
    ]


def _torchs_step(layer: torch.nn.LSTM, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    state = None

    def run() -> torch.Tensor:
        nonlocal state
        with torch.inference_mode():
            y, state = layer(x, state)
        return y

    return run


def _step_of(stream: rnnfast.Stream, x: Any) -> Callable[[], Any]:
    return lambda: stream(x)


def _check(runs: dict[str, Callable[[], Any]]) -> None:
    """They give the same, step by step.

    Raises:
        RuntimeError: one of them does not.
    """
    for _ in range(CHECKED):
        found = {name: np.asarray(run()).ravel() for name, run in runs.items()}
        for name, y in found.items():
            if np.abs(y - found["torch"]).max() > TOLERANCE:
                raise RuntimeError(f"{NAMES[name]} gives something else than torch")


# ------------------------------------------------------------------------------------------ C


def build_program(folder: Path) -> Path:
    """The library in build/stream and the program that times it, for this machine: so is RTNeural compiled, too."""
    build, prefix, program = ROOT / "build/stream", folder / "installed", folder / "stream_steps"
    source = ROOT / "benchmarks/stream_steps.cpp"
    options = ["-std=c++17", "-O3", "-march=native", "-DNDEBUG", "-w", f"-I{prefix}/include", f"-L{prefix}/lib"]
    for command in (
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DRNNFAST_PYTHON=OFF"],
        ["cmake", "--build", build, "--target", "rnnfast_stream"],
        ["cmake", "--install", build, "--component", "stream", "--prefix", prefix],
        ["c++", *options, source, "-lrnnfast_stream", "-lpthread", "-o", program],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return program


def steps_in_c(program: Path, H: int, I: int, steps: int, folder: Path) -> list[Row]:  # noqa: E741
    """Steps of an LSTM; of one input with a readout of one output, as RTNeural's users have it, or I = H without."""
    torch.manual_seed(0)
    head = torch.nn.Linear(H, 1) if I == 1 else None
    rnnfast.Stream(torch.nn.LSTM(I, H), head=head).save(folder / "model.rnn")
    count = max(200, min(steps, int(LARGE_WORK / (4 * H * (I + H)))))
    command = [program, folder / "model.rnn", str(count)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if found.pop("off") > TOLERANCE:
        raise RuntimeError(f"RTNeural gives something else at H = {H}")
    return [{"where": "c", "impl": name, "H": H, "I": I, "steps": count, **times} for name, times in found.items()]


# ------------------------------------------------------------------------------------------ the run


def measure(sizes: Sequence[int], steps: int, budget_s: float) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_program(folder)
        for H in tqdm(sizes, desc="units"):
            rows += step_in_python(H, budget_s)
            rows += steps_in_c(program, H, 1, steps, folder) + steps_in_c(program, H, H, steps, folder)
    return rows


def times(rows: Sequence[Row], where: str, I: int | None, value: str = "median_s") -> dict[str, dict[int, float]]:  # noqa: E741
    """By implementation and H; I None: as large as H."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["where"] == where and row["I"] == (I or row["H"]):
            found.setdefault(row["impl"], {})[row["H"]] = row[value]
    return found


def tables(rows: Sequence[Row], read_gbs: dict[int, float]) -> list[Table]:
    python, same, audio = times(rows, "python", None), times(rows, "c", None), times(rows, "c", 1)
    late = times(rows, "c", 1, "single_999_s")["rnnfast"]
    usual = times(rows, "c", 1, "single_median_s")["rnnfast"]
    sizes = sorted(python["array"])

    def cell(of: dict[str, dict[int, float]], name: str, H: int) -> Cell:
        return seconds(of[name][H]) if H in of.get(name, {}) else ""

    def ratio(of: dict[str, dict[int, float]], name: str, ours: str, H: int) -> Cell:
        return of[name][H] / of[ours][H] if H in of.get(name, {}) else ""

    in_python: list[list[Cell]] = [
        [
            str(H),
            *(cell(python, name, H) for name in NAMES),
            ratio(python, ONNX, "array", H),
            ratio(python, "torch", "tensor", H),
            cell(same, "rnnfast", H),
            *(f"{(python[name][H] - same['rnnfast'][H]) * 1e6:.2f} µs" for name in ("tensor", "array")),
            f"{bytes_of(H) / same['rnnfast'][H] * 1e-9 / read_gbs[H]:.0%}" if bytes_of(H) >= LARGE_BYTES else "",
        ]
        for H in sizes
    ]
    in_c: list[list[Cell]] = [
        [
            str(H),
            cell(audio, "RTNeural", H),
            cell(audio, "rnnfast", H),
            cell(audio, "rnnfast, blocks of 48", H),
            ratio(audio, "RTNeural", "rnnfast", H),
            f"{1 / RATE / audio['rnnfast'][H]:.1f}",
            seconds(usual[H]),
            seconds(late[H]),
            f"{late[H] / usual[H]:.2f}",
        ]
        for H in sizes
    ]
    beside = ["array vs ONNX Runtime", "tensor vs torch"]
    above = ["in C", "tensor above C", "array above C", "of read bandwidth"]
    audio_header = ["H", "RTNeural", "rnnfast", "in blocks of 48", "vs RTNeural", "times as fast as 48 kHz"]
    alone = ["one alone", "99.9 % of them", "to the median"]
    title = "One step in Python, LSTM, I = H, B = 1, float32, one thread"
    return [
        Table(title, ["H", *NAMES.values(), *beside, *above], in_python, left=1),
        Table("One step in C, LSTM, one input, readout of one output", [*audio_header, *alone], in_c, left=1),
    ]


def bytes_of(H: int) -> int:
    """W_ih and W_hh of an LSTM with I = H, float32."""
    return 4 * 2 * 4 * H * H


def save_plot(path: Path, rows: Sequence[Row], about: str) -> None:
    """µs a step against H, in Python and in C, with a line at 48 kHz."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    drawn = (("in Python, I = H", times(rows, "python", None)), ("in C, one input and output", times(rows, "c", 1)))
    for axes, (title, found) in zip(panels, drawn, strict=True):
        for name, by_size in found.items():
            ours = name in ("array", "tensor") or name.startswith("rnnfast")
            sizes = sorted(by_size)
            axes.plot(
                sizes, [by_size[H] * 1e6 for H in sizes], marker=".", lw=2 if ours else 1, label=NAMES.get(name, name)
            )
        axes.axhline(1e6 / RATE, color="black", lw=0.8, ls=":")
        axes.text(4, 1.05e6 / RATE, "48 kHz", fontsize=8, va="bottom")
        axes.set(xscale="log", yscale="log", xlabel="H", title=title)
        axes.set_xticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1024"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("µs a step")
    figure.suptitle("One step of an LSTM, one sequence, float32, one thread")
    figure.supxlabel(about, fontsize=7, color="#444444")
    figure.savefig(path, dpi=160, format="png")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="H")
    parser.add_argument("--steps", type=int, default=STEPS, help="in C, for the quantile (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size in Python (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = measure(options.sizes, options.steps, options.seconds)
    measured = limits(1, {bytes_of(H) for H in options.sizes})["read_gbs"]
    read_gbs = {H: measured[str(bytes_of(H))] for H in options.sizes}
    env = describe("cpu", 1)
    env |= {
        "command": "python -m benchmarks.stream",
        "seconds": round(time.perf_counter() - start),
        "read_gbs": measured,
    }
    about = f"{env['cpu']}, {env['rnnfast']['isa']}, torch {torch.__version__}, {env['date'][:10]}"
    found = tables(rows, read_gbs)
    console = Console()
    print_tables(console, found)
    console.print(about)
    if options.json:
        options.json.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(f"{about}\n\n{markdown_tables(found)}")
    if options.plot:
        save_plot(options.plot, rows, about)


if __name__ == "__main__":
    main()
