"""Do networks learn alike in each format? The loss curves of two examples, from several seeds."""

from __future__ import annotations

import csv
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import rnnfast
from benchmarks.formats import FORMATS, Format, matmul_precision, under_autocast
from benchmarks.report import Cell, Table
from benchmarks.results import Row

COMPARED = ("highest", "high", "medium", "autocast")
STYLES = {"highest": "k-", "high": "C0--", "medium": "C1-.", "autocast": "C3:"}

Training = Callable[[Format, int, int], Iterator[float]]
"""training(format, seed, epochs): yields the training loss of each epoch. The same seed: the same initial weights and
batches in every format."""


def sunspots(f: Format, seed: int, epochs: int) -> Iterator[float]:
    from examples import sunspots as example

    windows, targets = example.windows_of(example.load()[2])
    trainer = example.Trainer(rnnfast.LSTM, seed)
    set_format(trainer.model, f)
    for _ in range(epochs):
        trainer.epoch(windows[: -example.TEST], targets[: -example.TEST])
        yield trainer.losses[-1]


def digits(f: Format, seed: int, epochs: int) -> Iterator[float]:
    from examples import digits as example

    x, digit = example.load()
    torch.manual_seed(seed)
    model = rnnfast.convert(example.Classifier())
    set_format(model, f)
    yield from example.training(model, x[:, example.TEST :], digit[example.TEST :], epochs)


TRAININGS: dict[str, tuple[str, Training]] = {
    "sunspots": ("sunspots, LSTM: mean squared error", sunspots),
    "digits": ("digits, Elman: cross-entropy", digits),
}


def set_format(model: nn.Module, f: Format) -> None:
    """Autocast for the whole model, the loss in float32, as it is under autocast."""
    if f.autocast:
        forward = under_autocast(model.forward)
        model.forward = lambda *inputs: forward(*inputs).float()


def measure(epochs: dict[str, int], seeds: int) -> Iterator[Row]:
    """A row for each run. Formats take turns, so that a run that is cut off has as many of each."""
    runs = [(example, seed, name) for example in TRAININGS for seed in range(seeds) for name in COMPARED]
    for example, seed, name in (progress := tqdm(runs, desc="loss curves", unit="run")):
        progress.set_postfix_str(f"{example}, seed {seed}, {name}")
        start = time.perf_counter()
        with torch.random.fork_rng(), matmul_precision(FORMATS[name].precision):
            losses = list(TRAININGS[example][1](FORMATS[name], seed, epochs[example]))
        row: Row = {"part": "curves", "example": example, "impl": name, "seed": seed, "losses": losses}
        yield row | {"seconds": time.perf_counter() - start}


# -------------------------------------------------------------------------------------------------- shown


def curves(rows: Sequence[Row], example: str, name: str) -> np.ndarray:
    """(seeds,epochs)"""
    return np.array([row["losses"] for row in rows if (row["example"], row["impl"]) == (example, name)])


def table(rows: Sequence[Row]) -> Table:
    """The loss of the last epoch, and how far it is from that of "highest" with the same seed."""
    lines: list[list[Cell]] = []
    for example, (title, _) in TRAININGS.items():
        exact = curves(rows, example, "highest")[:, -1]
        for name in COMPARED:
            final = curves(rows, example, name)[:, -1]
            difference = (final - exact) / exact
            shown = "" if name == "highest" else f"{difference.mean():+.2%} ± {difference.std(ddof=1):.2%}"
            lines.append([title, name, f"{final.mean():.5f} ± {final.std(ddof=1):.5f}", shown])
    epochs = ", ".join(f"{example} {curves(rows, example, 'highest').shape[1]} epochs" for example in TRAININGS)
    seeds = len({row["seed"] for row in rows})
    title = f"Training loss at the end, mean ± standard deviation of {seeds} seeds; {epochs}"
    return Table(title, ["example", "format", "loss", "from highest, same seed"], lines)


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each epoch of each run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["example", "format", "seed", "epoch", "loss"])
        for row in rows:
            for epoch, loss in enumerate(row["losses"], start=1):
                writer.writerow([row["example"], row["impl"], row["seed"], epoch, loss])


def save_plot(path: Path, rows: Sequence[Row], caption: str) -> None:
    """A panel for each example: mean and range over the seeds; below it how far the mean is from that of "highest"."""
    figure, panels = plt.subplots(2, len(TRAININGS), figsize=(12, 7), height_ratios=[2, 1], layout="constrained")
    for (above, below), (example, (title, _)) in zip(panels.T, TRAININGS.items(), strict=True):
        _draw_losses(above, rows, example)
        _draw_differences(below, rows, example)
        above.set_title(title)
    figure.suptitle("Training loss in each format, the same seeds", fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(caption, 160)), fontsize=7, color="0.3")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _draw_losses(axes: Axes, rows: Sequence[Row], example: str) -> None:
    for name, style in STYLES.items():
        losses = curves(rows, example, name)
        epochs = np.arange(1, losses.shape[1] + 1)
        (line,) = axes.semilogy(epochs, losses.mean(0), style, label=name)
        axes.fill_between(epochs, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format("{x:g}")
    axes.set(ylabel="training loss: mean and range")
    axes.legend()


def _draw_differences(axes: Axes, rows: Sequence[Row], example: str) -> None:
    """In per cent of the loss of "highest" with the same seed."""
    exact = curves(rows, example, "highest")
    epochs = np.arange(1, exact.shape[1] + 1)
    axes.axhline(0, color="black", linewidth=1)
    for name in COMPARED[1:]:
        difference = 100 * (curves(rows, example, name) / exact - 1)
        (line,) = axes.plot(epochs, difference.mean(0), STYLES[name])
        colour = line.get_color()
        axes.fill_between(epochs, difference.min(0), difference.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="epoch", ylabel="% from highest")
