"""Tables of a run, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.env import Env
from benchmarks.grid import DERIVATIVES
from benchmarks.results import Group, Row, geomean, group, ratios

TITLES = {
    "inference": "Inference",
    "forward_train": "Forward for training",
    "train": "Forward and backward",
    "step": "One streaming step",
    "inference_packed": "Inference, packed",
    "train_packed": "Forward and backward, packed",
    "train_over_T": "Forward and backward, growth with T",
    "train_over_B": "Forward and backward, growth with B",
    "train_odd_H": "Forward and backward, sizes that fit no vector",
    "cell_inference": "Cells, steps in a row",
    "cell_forward_train": "Cells, steps in a row, recorded",
    "cell_train": "Cells, steps in a row, forward and backward",
    "layer_inference": "Layers asked for a few steps, inference",
    "layer_forward_train": "Layers asked for a few steps, forward for training",
    "layer_train": "Layers asked for a few steps, forward and backward",
    "compiled_cell_inference": "Cells, steps in a row, both sides compiled",
    "compiled_cell_train": "Cells, steps in a row, forward and backward, both sides compiled",
    "compiled_layer_inference": "Lone layers asked for a step, inference, both sides compiled",
    "compiled_layer_train": "Lone layers asked for a step, forward and backward, both sides compiled",
    "memory": "Peak memory of a training step",
    "double_backward": "Double backward: the gradient of |gradient|²",
    "per_sample": "Each sample's gradient by vmap; plain: forward and backward",
    "jvp_input": "Forward mode, a tangent of x; plain: inference",
    "jvp_weights": "Forward mode, tangents of the weights; plain: forward for training",
    "hessian_vector": "Hessian-vector product by jvp of grad; plain: forward and backward",
    "compiled_inference": "A lone layer compiled, inference; plain: eager",
    "compiled_train": "A lone layer compiled, forward and backward; plain: eager",
    "compiled_model": "A layer with its head and loss compiled, a training step; plain: eager",
    "compile": "torch.compile of forward and backward, and one run",
}
NAMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "plain": "plain", "rnnfast": "rnnfast"}
CELLS = {"lstm": "LSTM", "rnn": "Elman", "gru": "GRU"}

Cell = str | float
"""A float is a ratio, coloured where there is colour."""


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    lines: list[list[Cell]]
    left: int = 2  # columns from the left that hold words


# ---------------------------------------------------------------------------------------------- content


def tables(rows: Sequence[Row], env: Env) -> list[Table]:
    """The summary, then a table for each pass."""
    groups = group(rows)
    passes = [name for name in TITLES if any(g["pass"] == name for g in groups)]
    return [summary(groups), *(pass_table([g for g in groups if g["pass"] == name], env) for name in passes)]


def summary(groups: Sequence[Group]) -> Table:
    """Slowest cell and geometric mean of each cell type and pass."""
    others = others_of(groups)
    header = ["", "pass", "rows"] + [f"{what} vs {NAMES[o]}" for o in others for what in ("lowest", "geomean")]
    has_plain = any(g.cost for g in groups)
    header += ["at most / plain"] * has_plain
    lines: list[list[Cell]] = []
    for name, title in TITLES.items():
        for cell, cell_title in CELLS.items():
            some = [g for g in groups if (g["pass"], g["cell"]) == (name, cell)]
            if some:
                line: list[Cell] = [cell_title, title, str(len(some)), *_lowest_and_mean(some, others)]
                lines.append([*line, *[_highest_cost(some)] * has_plain])
    return Table("Summary", header, lines)


def _lowest_and_mean(groups: Sequence[Group], others: Sequence[str]) -> list[Cell]:
    found = [ratios(groups, other) for other in others]
    return [cell for values in found for cell in ((min(values), geomean(values)) if values else ("", ""))]


def _highest_cost(groups: Sequence[Group]) -> str:
    costs = [g.cost for g in groups if g.cost]
    return in_plain_passes(max(costs)) if costs else ""


def in_plain_passes(cost: float | None) -> str:
    """A cost, of which less is better: a word, not a ratio."""
    return "" if cost is None else f"{cost:.2f}"


def others_of(groups: Sequence[Group]) -> list[str]:
    """Who rnnfast is compared with: torch, and ONNX Runtime where it ran."""
    return [name for name in ("torch", "onnxruntime") if any(name in g.by_impl for g in groups)]


def pass_table(groups: Sequence[Group], env: Env) -> Table:
    """A line for each job of one pass, then the geometric means."""
    others, counted = others_of(groups), groups[0]["pass"] not in ("memory", *DERIVATIVES)
    plain = ["plain"] * any("plain" in g.by_impl for g in groups)
    impls = [*others, *plain, "rnnfast"]
    header = ["", "shape", *(NAMES[name] for name in impls)] + ["GFLOP/s", "of peak"] * counted
    header += [f"{NAMES['rnnfast']} / plain" for _ in plain] + [f"vs {NAMES[name]}" for name in others]
    twins = any(g.same_code for g in groups)
    header += ["same code"] * twins
    lines: list[list[Cell]] = []
    for g in groups:
        shape = " ".join([g["shape"], *(f"[{failure}]" for failure in g.failures)])
        costs = [_cost(g.by_impl.get(name)) for name in impls] + (_rates(g.ours, env) if counted else [])
        costs += [in_plain_passes(g.cost) for _ in plain]
        found = (g.ratio(name) for name in others)
        line: list[Cell] = [CELLS[g["cell"]], shape, *costs, *("" if ratio is None else ratio for ratio in found)]
        lines.append([*line, *["yes" if g.same_code else ""] * twins])
    gap = [""] * (len(header) - 2 - len(others) - twins)
    for cell, title in CELLS.items():
        some = [g for g in groups if g["cell"] == cell and g.ratio("torch")]
        if len(some) > 1:
            means: list[Cell] = [geomean(found) if (found := ratios(some, o)) else "" for o in others]
            lines.append([title, "geometric mean", *gap, *means, *[""] * twins])
    return Table(TITLES[groups[0]["pass"]], header, lines)


def _cost(row: Row | None) -> str:
    """Median and spread, or peak memory; '' where a contender has no kernel, 'wrong' where it disagrees."""
    if row is None:
        return ""
    if "peak_bytes" in row:
        return f"{row['peak_bytes'] / 1e6:.1f} MB"
    if row["median_s"] is None:
        return "wrong"
    if row["samples"] == 1:
        return seconds(row["median_s"])
    return f"{seconds(row['median_s'])} ({row['iqr_s'] / row['median_s']:.0%})"


def _rates(row: Row, env: Env) -> list[str]:
    share = fma_share(row, env)
    return [
        "" if row["gflops"] is None else f"{row['gflops']:.3g}",
        "" if share is None else f"{share:.0%}",
    ]


def fma_share(row: Row, env: Env) -> float | None:
    """Share of the CPU's FMA peak that a row's products reach; None on another device and for a wrong result."""
    if row["device"] != "cpu" or row["gflops"] is None:
        return None
    return row["gflops"] / env["fma_peak_gflops"][row["dtype"]]


def seconds(value: float) -> str:
    """Three digits with the unit that suits."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((unit for unit, scale in units.items() if value >= 0.9995 * scale), "µs")
    return f"{value / units[unit]:#.3g}".rstrip(".") + f" {unit}"


def caption(env: Env) -> str:
    """Machine, threads, versions, date and command in a sentence or two."""
    v = env["versions"]
    threads = f"{env['threads']} thread" + "s" * (env["threads"] > 1)
    peak = f"FMA peak {env['fma_peak_gflops']['float32']:.0f} GFLOP/s in float32"
    cpu = f"{env['cpu']}, {env['cores']} cores, {env['rnnfast']['isa']}; {threads}, {peak}"
    versions = ", ".join(f"{name} {v[key]}" for key, name in NAMES.items() if key in v)
    return f"{env['gpu'] or cpu}. {versions}. {env['date'][:10]}, {env['command']}"


NOTE = (
    "Medians of samples taken in turns; in parentheses their interquartile range as a share of the median. GFLOP/s and"
    " the share of the FMA peak are rnnfast's."
)


# ------------------------------------------------------------------------------------------- two faces


def print_tables(console: Console, content: Sequence[Table]) -> None:
    for table in content:
        rich = RichTable(title=table.title, title_justify="left", header_style="bold", pad_edge=False)
        for i, name in enumerate(table.header):
            rich.add_column(name, justify="left" if i < table.left else "right", overflow="fold")
        for line in table.lines:
            rich.add_row(*(_coloured(cell) for cell in line))
        console.print(rich)


def _coloured(cell: Cell) -> Text:
    if isinstance(cell, str):
        return Text(cell, style="red" if cell == "wrong" else "")
    return Text(_ratio(cell), style="red" if cell < 1 else "yellow" if cell < 1.1 else "green")


def _ratio(value: float) -> str:
    return f"{value:.2f}×"


def to_markdown(content: Sequence[Table], env: Env) -> str:
    return f"{caption(env)}\n\n{NOTE}\n\n{markdown_tables(content)}"


def markdown_tables(content: Sequence[Table]) -> str:
    return "\n".join(f"### {table.title}\n\n" + "\n".join(_markdown_lines(table)) + "\n" for table in content)


def _markdown_lines(table: Table) -> list[str]:
    rule = [":--" if i < table.left else "--:" for i in range(len(table.header))]
    lines = [[cell if isinstance(cell, str) else _ratio(cell) for cell in line] for line in table.lines]
    return ["| " + " | ".join(line) + " |" for line in (table.header, rule, *lines)]
