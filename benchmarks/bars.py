"""The project's goals on the CPU, and what a run of `--preset full` or `derivatives` says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.env import Env
from benchmarks.grid import BASE, GATES, Job
from benchmarks.report import CELLS, Cell, Table, fma_share, seconds
from benchmarks.results import Group, Row, geomean, group, ratios


@dataclass(frozen=True)
class Bar:
    work: str
    goal: str
    measured: str
    met: bool | None  # None: to be read from the tables


Measure = Callable[[Sequence[Group], Env], Iterable[Bar]]


def tables(rows: Sequence[Row], env: Env) -> list[Table]:
    """A table for each part of the goals, without those that the run has no row of."""
    groups = group(rows)
    parts = {title: [bar for measure in measures for bar in measure(groups, env)] for title, measures in GOALS.items()}
    return [_table(title, bars) for title, bars in parts.items() if bars]


def _table(title: str, bars: Sequence[Bar]) -> Table:
    lines: list[list[Cell]] = [
        [bar.work, bar.goal, bar.measured, {True: "yes", False: "no", None: ""}[bar.met]] for bar in bars
    ]
    return Table(title, ["work", "goal", "measured", "met"], lines, left=4)


def is_plain(g: Group) -> bool:
    return g["dtype"] == "float32" and not g["P"] and g["D"] == 1 and g["L"] <= 2


def of_pass(groups: Sequence[Group], *passes: str) -> list[Group]:
    return [g for g in groups if g["pass"] in passes]


def _slowest(work: str, groups: Sequence[Group], other: str, goal: float) -> list[Bar]:
    """The lowest ratio of the groups against a goal."""
    found = [(ratio, g) for g in groups if (ratio := g.ratio(other)) is not None]
    if not found:
        return []
    lowest, g = min(found, key=lambda pair: pair[0])
    where = f"{CELLS[g['cell']]} {g['pass']} {g['shape']}"
    measured = f"lowest {lowest:.2f}× ({where}), geomean {geomean(ratios(groups, other)):.2f}×"
    return [Bar(work, f"≥ {goal}×", measured, lowest >= goal)]


def speed(groups: Sequence[Group], env: Env) -> list[Bar]:
    plain = [g for g in groups if is_plain(g)]
    train, inference = of_pass(plain, "train"), of_pass(plain, "inference")
    options = [g for g in of_pass(groups, "train") if not is_plain(g)]
    lstm, elman = ([g for g in train if g["cell"] == cell] for cell in ("lstm", "rnn"))
    return [
        *_slowest("LSTM forward + backward vs torch", lstm, "torch", 1.4),
        *_slowest("Elman forward + backward vs torch", elman, "torch", 1.8),
        *_slowest("inference vs torch", inference, "torch", 1.3),
        *_slowest("inference vs ONNX Runtime", inference, "onnxruntime", 1.0),
        *_slowest("float64, projection, 2 layers bidirectional, 4 layers vs torch", options, "torch", 1.5),
        *_slowest("one step, B=1 H=64, vs ONNX Runtime", _one_step(groups), "onnxruntime", 1.0),
        *_slowest("peak memory of a training step, torch's / rnnfast's", of_pass(groups, "memory"), "torch", 1.0),
    ]


def _one_step(groups: Sequence[Group]) -> list[Group]:
    return [g for g in of_pass(groups, "step") if (g["B"], g["H"], g["L"]) == (1, 64, 1)]


def peak_share(groups: Sequence[Group], env: Env) -> Iterable[Bar]:
    large = [g for g in groups if is_plain(g) and g["B"] >= 32 and g["H"] >= 256]
    for work, passes, goal in (
        ("forward", ("inference", "forward_train"), 0.75),
        ("forward + backward", ("train",), 0.68),
    ):
        shares = [share for g in of_pass(large, *passes) if (share := fma_share(g.ours, env)) is not None]
        if shares:
            measured = f"lowest {min(shares):.0%}, highest {max(shares):.0%}"
            yield Bar(f"share of the FMA peak, B ≥ 32, H ≥ 256, {work}", f"≥ {goal:.0%}", measured, min(shares) >= goal)


# ---------------------------------------------------------------------------------- one sequence, large H


def _streamed_bytes(cell: str, H: int) -> int:
    """W_hh (G*H,H) in float32, which a step of one sequence must read whole."""
    return 4 * GATES[cell] * H * H


def is_streamed(B: int, H: int, kind: str) -> bool:
    return kind == "inference" and B == 1 and H >= 1024


def streamed_sizes(jobs: Iterable[Job]) -> set[int]:
    return {_streamed_bytes(j.shape.cell, j.shape.H) for j in jobs if is_streamed(j.shape.B, j.shape.H, j.kind)}


def stream_share(groups: Sequence[Group], env: Env) -> Iterable[Bar]:
    """Time to read W_hh T times as fast as the memory allows, plus x W_ihᵀ at the FMA peak, over the time taken."""
    for g in groups:
        if is_streamed(g["B"], g["H"], g["pass"]) and g.ours["median_s"]:
            size = _streamed_bytes(g["cell"], g["H"])
            rate = env["read_gbs"][str(size)]
            products = 2 * g["N"] * GATES[g["cell"]] * g["H"] * g["I"] / env["fma_peak_gflops"][g["dtype"]]
            share = (g["T"] * size / rate + products) * 1e-9 / g.ours["median_s"]
            measured = f"{share:.0%} (W_hh of {size / 2**20:.0f} MiB at {rate:.0f} GB/s)"
            yield Bar(
                f"{CELLS[g['cell']]} {g['shape']}, share of the limit of streaming W_hh",
                "≥ 80%",
                measured,
                share >= 0.8,
            )


# ------------------------------------------------------------------------------------------------- growth


def packed(groups: Sequence[Group], env: Env) -> Iterable[Bar]:
    """Time of a packed batch in units of the same batch padded, beside its share of the tokens."""
    for g in of_pass(groups, "inference_packed", "train_packed"):
        plain = [p for p in of_pass(groups, g["pass"].removesuffix("_packed")) if _same_sizes(p, g)]
        if plain and g.ours["median_s"] and plain[0].ours["median_s"]:
            tokens, time = g["N"] / plain[0]["N"], g.ours["median_s"] / plain[0].ours["median_s"]
            measured = f"{time:.0%} of padded, {tokens:.0%} of the tokens; {g.ratio('torch'):.2f}× torch's packed"
            yield Bar(f"{CELLS[g['cell']]} {g['pass']}", "in proportion ±15%", measured, abs(time / tokens - 1) <= 0.15)


def _same_sizes(a: Group, b: Group) -> bool:
    return all(a[key] == b[key] for key in ("cell", "T", "B", "I", "H", "L", "D", "P", "dtype"))


def growth(groups: Sequence[Group], env: Env) -> Iterable[Bar]:
    for cell, title in CELLS.items():
        mine = [g for g in groups if g["cell"] == cell and g.ours["median_s"]]
        over_T, over_B, odd = (of_pass(mine, "train_" + name) for name in ("over_T", "over_B", "odd_H"))
        if over_T:
            costs = [f"{seconds(g.ours['median_s'] / g['T'])} (T {g['T']})" for g in over_T]
            yield Bar(f"{title}, time of a step as T grows", "constant", ", ".join(costs), None)
        if over_B:
            costs = [f"{seconds(g.ours['median_s'] / g['N'])} (B {g['B']})" for g in over_B]
            yield Bar(f"{title}, time of a row as B grows", "does not rise", ", ".join(costs), None)
        if odd:
            slow, fast = (pick(odd, key=lambda g: g.ours["gflops"]) for pick in (min, max))
            rates = f"{slow.ours['gflops']:.3g} GFLOP/s (H {slow['H']}) to {fast.ours['gflops']:.3g} (H {fast['H']})"
            yield Bar(f"{title}, H = {odd[0]['H']} to {odd[-1]['H']}", "no cliff", rates, None)


# -------------------------------------------------------------------------------------------- derivatives


def derivatives(groups: Sequence[Group], env: Env) -> list[Bar]:
    base = [g for g in of_pass(groups, "per_sample") if (g["T"], g["B"], g["I"], g["H"]) == BASE]
    layers = of_pass(groups, "compiled_inference", "compiled_train")
    return [
        *_slowest("double backward vs torch", of_pass(groups, "double_backward"), "torch", 4.0),
        *_slowest("vmap(grad) vs torch", base, "torch", 20.0),
        *_costliest("vmap(grad) / forward + backward", base, 2.0),
        *_costliest("jvp of x / forward", of_pass(groups, "jvp_input"), 2.0),
        *_costliest("jvp of the weights / forward", of_pass(groups, "jvp_weights"), 2.0),
        *_costliest("jvp of grad / forward + backward", of_pass(groups, "hessian_vector"), None),
        *_slowest("a model compiled vs eager", of_pass(groups, "compiled_model"), "plain", 1.0),
        *_slowest("a lone layer compiled vs eager", layers, "plain", 1.0),
        *_compile_time(of_pass(groups, "compile")),
    ]


def _costliest(work: str, groups: Sequence[Group], goal: float | None) -> list[Bar]:
    """The highest cost in units of the plain pass against a goal."""
    found = [(g.cost, g) for g in groups if g.cost is not None]
    if not found:
        return []
    highest, g = max(found, key=lambda pair: pair[0])
    measured = f"highest {highest:.2f} ({CELLS[g['cell']]} {g['pass']} {g['shape']})"
    return [Bar(work, "" if goal is None else f"≤ {goal}", measured, None if goal is None else highest <= goal)]


def _compile_time(groups: Sequence[Group]) -> Iterable[Bar]:
    times = [f"{seconds(g.ours['median_s'])} ({CELLS[g['cell']]} T {g['T']})" for g in groups if g.ours["median_s"]]
    if times:
        yield Bar("torch.compile and one run, as T grows", "seconds, constant", ", ".join(times), None)


GOALS: dict[str, tuple[Measure, ...]] = {
    "Goals": (speed, peak_share, stream_share, packed, growth),
    "Goals, derivatives and torch.compile": (derivatives,),
}
