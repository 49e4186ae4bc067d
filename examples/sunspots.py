"""Forecast the yearly sunspot number: the same network trained with torch.nn.LSTM and with rnnfast.LSTM.

Both start from one seed, see the same batches in the same order and take turns epoch by epoch, so whatever else the
machine does slows both. The loss curves agree; the clock does not.

    python examples/sunspots.py
    python examples/sunspots.py --epochs 3 --plot x.png
"""

import argparse
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import statsmodels.api as sm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import rnnfast

T, B, H, L = 32, 32, 64, 2  # steps (years, about three cycles), batch, hidden size, layers
TEST = 50  # the last years, never trained on
LAYERS = {"torch.nn.LSTM": nn.LSTM, "rnnfast.LSTM": rnnfast.LSTM}


class Forecaster(nn.Module):
    """From the last T years the next one: (T,B,1) -> (B,)."""

    def __init__(self, lstm_class):
        super().__init__()
        self.lstm = lstm_class(input_size=1, hidden_size=H, num_layers=L)
        self.readout = nn.Linear(H, 1)

    def forward(self, x):
        output, _ = self.lstm(x)  # (T,B,H)
        return x[-1, :, 0] + self.readout(output[-1]).squeeze(-1)  # the network learns the change from year to year


class Trainer:
    """A forecaster, its optimizer, its loss curve and the seconds each epoch took."""

    def __init__(self, lstm_class, seed=0):
        torch.manual_seed(seed)  # the same initial weights and the same order of batches for every trainer
        self.model = Forecaster(lstm_class)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.losses, self.seconds = [], []

    def epoch(self, windows, targets):
        """One pass over windows (N,T) and targets (N,)."""
        start, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(windows), generator=self.generator).split(B):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(windows[rows].T.unsqueeze(-1)), targets[rows])
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(rows)
        self.losses.append(total / len(windows))
        self.seconds.append(time.perf_counter() - start)


def load():
    """-> years (309,), sunspots (309,), and the latter with square roots standardized, as a tensor; mean and std."""
    data = sm.datasets.sunspots.load_pandas().data
    years, sunspots = data["YEAR"].to_numpy().astype(int), data["SUNACTIVITY"].to_numpy()
    root = np.sqrt(sunspots)  # counts: the square root makes the noise about equal at every level
    mean, std = root[:-TEST].mean(), root[:-TEST].std()
    return years, sunspots, torch.tensor((root - mean) / std, dtype=torch.float32), mean, std


def windows_of(series):
    """Every T years and the year after them: series (N,) -> (N-T,T), (N-T,)"""
    return series[:-1].unfold(0, T, 1), series[T:]


@torch.no_grad()
def roll_out(model, window, steps):
    """Closed loop: every forecast is read as if it had been measured. window (T,) -> (steps,)."""
    series = window.clone()
    for _ in range(steps):
        series = torch.cat([series, model(series[-T:].view(T, 1, 1))])
    return series[T:]


def plot(path, years, sunspots, one_step, closed_loop, trainers):
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[2, 1], layout="constrained")
    left.plot(years[-TEST - T :], sunspots[-TEST - T :], "k.-", lw=0.8, label="measured")
    left.plot(years[-TEST:], one_step, "C0", label="next year, from measured years")
    left.plot(years[-TEST:], closed_loop, "C3--", label="closed loop: 50 years from its own forecasts")
    left.axvspan(years[-TEST] - 0.5, years[-1] + 0.5, color="0.94", zorder=0)
    left.set(xlabel="year", ylabel="sunspot number", ylim=(0, 275), title="forecast of the years left out (grey)")
    left.legend(loc="upper left", fontsize=8)
    for (name, trainer), style in zip(trainers.items(), ["C1-", "C2--"], strict=True):
        right.semilogy(range(1, len(trainer.losses) + 1), trainer.losses, style, lw=2, label=name)
    right.set(xlabel="epoch", ylabel="training loss (MSE)", title="one seed, two implementations")
    right.legend()
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--plot", default="sunspots.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for both alike; two threads wait for each other whenever another program takes a core

    years, sunspots, series, mean, std = load()
    windows, targets = windows_of(series)

    def number(z):
        return np.maximum(z.numpy() * std + mean, 0) ** 2  # back from a standardized root to a sunspot number

    trainers = {name: Trainer(lstm_class) for name, lstm_class in LAYERS.items()}
    for epoch in tqdm(range(args.epochs), desc="training both", unit="epoch"):
        turns = list(trainers.values())
        for trainer in turns if epoch % 2 else reversed(turns):
            trainer.epoch(windows[:-TEST], targets[:-TEST])

    theirs, ours = trainers.values()
    console = Console()
    table = Table("epoch", *(f"loss, {name}" for name in trainers), "difference", title="training loss")
    for k in sorted({0, *range(9, args.epochs, 10), args.epochs - 1}):
        a, b = theirs.losses[k], ours.losses[k]
        table.add_row(str(k + 1), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(table)
    difference = max(abs(a - b) / a for a, b in zip(theirs.losses, ours.losses, strict=True))
    verdict = "agree" if difference < 1e-3 else "DIFFER"
    console.print(f"the loss curves {verdict}: largest relative difference {difference:.1e}")

    with torch.no_grad():
        one_step = number(ours.model(windows[-TEST:].T.unsqueeze(-1)))
    closed_loop = number(roll_out(ours.model, windows[-TEST], TEST))
    truth, last_year, last_cycle = sunspots[-TEST:], sunspots[-TEST - 1 : -1], sunspots[-TEST - 11 : -11]
    table = Table("forecast of the last 50 years", "RMS error", title="in sunspots")
    for name, forecast in (
        ("next year, rnnfast.LSTM", one_step),
        ("next year = this year", last_year),
        ("50 years in closed loop", closed_loop),
        ("as 11 years before", last_cycle),
    ):
        table.add_row(name, f"{np.sqrt(np.mean((forecast - truth) ** 2)):.1f}")
    console.print(table)

    for name, trainer in trainers.items():
        milliseconds = 1e3 * np.median(trainer.seconds)
        console.print(f"{name:14} {sum(trainer.seconds):6.2f} s in all, {milliseconds:6.1f} ms an epoch (median)")
    console.print(f"ratio of the medians, one thread: {np.median(theirs.seconds) / np.median(ours.seconds):.2f}")
    plot(args.plot, years, sunspots, one_step, closed_loop, trainers)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
