"""A PNG of a run: how many times as fast as torch, and how time grows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.env import Env
from benchmarks.grid import DERIVATIVES, STEPS
from benchmarks.report import CELLS, NAMES, caption
from benchmarks.results import Group, Row, group

COLUMNS = {"inference": "inference", "forward_train": "forward for training", "train": "forward + backward"}
COLUMN_OF = {"step": "inference", "inference_packed": "inference", "train_packed": "train"}  # the rest: its own name
GROWTHS = {
    "train_over_T": ("T", "T", "µs a step", lambda row: row["median_s"] / row["T"] * 1e6),
    "train_over_B": ("B", "B", "µs a step and sequence", lambda row: row["median_s"] / row["N"] * 1e6),
    "train_odd_H": ("H", "H = I", "GFLOP/s", lambda row: row["gflops"]),
}
FASTER, SLOWER, PEER = "#1769aa", "#c62828", "#777777"
WIDTH, ROW, FRAME, GROWTH = 10.0, 0.19, 0.75, 2.6  # inches: figure, line of a panel, panel's frame, growth panel


def save_plot(path: Path, rows: Sequence[Row], env: Env) -> None:
    """One panel of ratios for each cell and pass; below them growth with T, B and H where the run has it. Derivatives,
    compiled models and single steps are left to the tables.

    Raises:
        ValueError: no row has a ratio of times.
    """
    groups = [g for g in group(rows) if g["pass"] not in ("memory", *DERIVATIVES, *STEPS) and g.ratio("torch")]
    if not groups:
        raise ValueError("nothing to plot: no row has a time of both torch and rnnfast")
    panels = {cell: [g for g in groups if g["cell"] == cell and column_of(g) in COLUMNS] for cell in CELLS}
    panels = {cell: some for cell, some in panels.items() if some}
    growths = [name for name in GROWTHS if any(g["pass"] == name for g in groups)]
    heights = [ROW * len(labels(some)) + FRAME for some in panels.values()] + [GROWTH] * bool(growths)
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 1.0), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    limits = ratio_limits([g for some in panels.values() for g in some])
    for part, (cell, some) in zip(parts, panels.items(), strict=False):
        draw_ratios(part, CELLS[cell], some, limits)
    if growths:
        draw_growths(parts[-1], growths, groups)
    figure.suptitle("Times as fast as torch.nn, same weights and threads", fontsize=12, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(caption(env), 160)), fontsize=7, color="#444444")
    figure.legend(handles=legend_marks(groups), fontsize=8, loc="upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=160, format="png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ ratios


def column_of(g: Group) -> str:
    return COLUMN_OF.get(g["pass"], g["pass"])


def label_of(g: Group) -> str:
    return g["shape"].replace("T1 ", "one step ", 1) if g["pass"] == "step" else g["shape"]


def labels(groups: Sequence[Group]) -> list[str]:
    """The lines of a row of panels: each shape once, streaming steps last."""
    return list(dict.fromkeys(label_of(g) for g in sorted(groups, key=lambda g: g["pass"] == "step")))


def ratio_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Of the x axis, the same for all panels; at the right there is room for the numbers."""
    rows = [row for g in groups for row in g.by_impl.values()]
    found = [row["ratio_vs_torch"] for row in rows if row["ratio_vs_torch"]]
    return min(0.7, *found) / 1.15, max(2.0, *found) * 1.9


def draw_ratios(part: Figure, title: str, groups: Sequence[Group], limits: tuple[float, float]) -> None:
    lines = labels(groups)
    for axes, (column, heading) in zip(part.subplots(1, len(COLUMNS), sharey=True), COLUMNS.items(), strict=True):
        for g in groups:
            if column_of(g) == column:
                _draw_line(axes, lines.index(label_of(g)), g)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", xlim=limits, ylim=(len(lines) - 0.4, -0.6))
        axes.set_title(f"{title}, {heading}", fontsize=9)
        _clean_ratio_axis(axes, limits)
        axes.set_yticks(range(len(lines)), lines, fontsize=7.5)


def _draw_line(axes: Axes, y: int, g: Group) -> None:
    """A bar from 1 to the ratio with its number, and a diamond for the peer."""
    ratio = g.ours["ratio_vs_torch"]
    colour = FASTER if ratio >= 1 else SLOWER
    axes.plot((1, ratio), (y, y), color=colour, linewidth=3, solid_capstyle="butt")
    axes.plot(ratio, y, "o", color=colour, markersize=5)
    peer = g.by_impl.get("onnxruntime", {}).get("ratio_vs_torch")
    if peer:
        axes.plot(peer, y, "D", markerfacecolor="white", markeredgecolor=PEER, markersize=4)
    right = max(1.0, ratio, peer or 0)
    axes.annotate(
        f"{ratio:.1f}" if ratio >= 9.95 else f"{ratio:.2f}",
        (right, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=colour,
    )


def _clean_ratio_axis(axes: Axes, limits: tuple[float, float]) -> None:
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if limits[0] <= tick <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=7.5)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def legend_marks(groups: Sequence[Group]) -> list[Line2D]:
    ours = Line2D([], [], color=FASTER, marker="o", linewidth=3, markersize=5, label=NAMES["rnnfast"])
    peer = Line2D([], [], color=PEER, marker="D", markerfacecolor="white", markersize=4, linewidth=0)
    peer.set_label(NAMES["onnxruntime"])
    return [ours, peer] if any("onnxruntime" in g.by_impl for g in groups) else [ours]


# ------------------------------------------------------------------------------------------------ growth


def draw_growths(part: Figure, names: Sequence[str], groups: Sequence[Group]) -> None:
    for axes, name in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        key, x_title, y_title, _ = GROWTHS[name]
        for cell, style in zip(CELLS, ("-", "--"), strict=True):
            some = [g for g in groups if (g["pass"], g["cell"]) == (name, cell)]
            for impl, colour in (("torch", PEER), ("rnnfast", FASTER)):
                label = f"{CELLS[cell]}, {NAMES[impl]}"
                axes.plot(*_curve(name, some, impl), style, color=colour, marker=".", linewidth=1.2, label=label)
        _clean_growth_axis(axes, x_title, y_title, logarithmic=name != "train_odd_H")
        axes.set_title(f"forward + backward: {y_title} over {key}", fontsize=9)
    part.axes[0].legend(fontsize=6.5, framealpha=0.9)


def _curve(name: str, groups: Sequence[Group], impl: str) -> tuple[list[float], list[float]]:
    """x and y; the sweeps of neighbouring H are not joined."""
    key, _, _, value = GROWTHS[name]
    x: list[float] = []
    y: list[float] = []
    for g in groups:
        if name == "train_odd_H" and x and g[key] > x[-1] + 1:
            x.append(x[-1])
            y.append(float("nan"))
        x.append(g[key])
        y.append(value(g.by_impl[impl]))
    return x, y


def _clean_growth_axis(axes: Axes, x_title: str, y_title: str, logarithmic: bool) -> None:
    if logarithmic:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_title, fontsize=8)
    axes.set_ylabel(y_title, fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
