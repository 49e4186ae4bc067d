"""Forecast chaos: an encoder reads noisy observations of Lorenz-63, a decoder rolls the future out (delayed).

    x' = 10 (y - x)        y' = x (28 - z) - y        z' = x y - 8/3 z

The encoder's last state is all that passes to the decoder, which then reads its own last forecast (many-to-many,
delayed). Errors grow as exp(0.906 t), so the fair clock is the Lyapunov time, 1.10: how many of them does a forecast
stay valid?

    python examples/lorenz.py
    python examples/lorenz.py --epochs 3 --plot x.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.integrate import solve_ivp
from torch import nn
from tqdm import tqdm

import rnnfast

T, FUTURE, B, H, L = 30, 90, 64, 64, 1  # steps read, steps forecast, batch, hidden size, layers
DT, NOISE = 0.05, 0.02  # time between two steps; noise of the observations in standard deviations of the signal
LYAPUNOV_TIME = 1 / 0.906
TRAIN, TEST = 8000, 2000  # steps of one long trajectory
THRESHOLD = 0.4  # a forecast is valid until its error exceeds this fraction of the attractor's size


def lorenz(steps):
    """A trajectory on the attractor, each coordinate with mean 0 and standard deviation 1. -> (steps,3)"""

    def motion(t, state):
        x, y, z = state
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    times = 20 + DT * np.arange(steps)  # the first 20 time units lead onto the attractor
    states = solve_ivp(motion, (0, times[-1]), [1, 1, 1], t_eval=times, rtol=1e-9, atol=1e-9).y.T
    return torch.tensor((states - states.mean(axis=0)) / states.std(axis=0), dtype=torch.float32)


class Seq2Seq(nn.Module):
    """Observations (T,B,3) -> forecast (steps,B,3)."""

    def __init__(self):
        super().__init__()
        self.encoder = rnnfast.LSTM(input_size=3, hidden_size=H, num_layers=L)
        self.decoder = rnnfast.LSTM(input_size=3, hidden_size=H, num_layers=L)
        self.readout = nn.Linear(H, 3)

    def forward(self, x, steps):
        _, state = self.encoder(x)
        forecast = [x[-1:]]  # (1,B,3) each
        for _ in range(steps):
            output, state = self.decoder(forecast[-1], state)
            forecast.append(forecast[-1] + self.readout(output))
        return torch.cat(forecast[1:])


def train(model, noisy, clean, epochs):
    """Short futures first, longer ones as it learns: far futures teach nothing to a network that fails at near ones."""
    starts = torch.arange(0, TRAIN - T - FUTURE, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for epoch in (progress := tqdm(range(epochs), desc="training", unit="epoch")):
        steps, total = 5 + 20 * epoch // epochs, 0.0
        for rows in starts[torch.randperm(len(starts))].split(B):
            window = rows + torch.arange(T + steps)[:, None]  # (T+steps,B)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(noisy[window[:T]], steps), clean[window[T:]])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        scheduler.step()
        losses.append(total / len(starts))
        progress.set_postfix(steps=steps, loss=f"{losses[-1]:.5f}")
    return losses


def valid_times(error):
    """error (FUTURE,B) -> in Lyapunov times, (B,)"""
    wrong = torch.cat([error > THRESHOLD, torch.ones(1, error.shape[1], dtype=torch.bool)])
    return wrong.int().argmax(dim=0) * DT / LYAPUNOV_TIME


def plot(path, noisy, truth, forecast, times):
    """The window and the future for one start of typical valid time, then how long all the forecasts stay valid."""
    k = (times - times.median()).abs().argmin()
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1.8, 1])
    past, ahead = DT * np.arange(1 - T, 1) / LYAPUNOV_TIME, DT * np.arange(1, FUTURE + 1) / LYAPUNOV_TIME
    for row, name in enumerate("xyz"):
        axes = figure.add_subplot(grid[row, 0])
        axes.plot(past, noisy[:, k, row], "C0.", ms=4, label="observed")
        axes.plot(ahead, truth[:, k, row], "k", lw=0.8, label="future")
        axes.plot(ahead, forecast[:, k, row], "C3--", label="decoder")
        axes.axvline(times[k], color="0.6", lw=0.8)
        axes.set(ylabel=name, title="the grey line is the valid time" if row == 0 else None)
    axes.set(xlabel="time after the last observation / Lyapunov times", ylim=(-3.6, 2.5))
    axes.legend(loc="lower left", ncols=3, fontsize=8)
    right = figure.add_subplot(grid[:, 1])
    right.hist(times, bins=np.arange(0, ahead[-1] + 0.2, 0.2))
    right.axvline(times.median(), color="k", lw=1)
    right.set(xlabel="valid time / Lyapunov times", ylabel="forecasts", title="all forecasts (black: median)")
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plot", default="lorenz.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    clean = lorenz(TRAIN + TEST)
    noisy = clean + NOISE * torch.randn_like(clean)
    model = Seq2Seq()
    losses = train(model, noisy[:TRAIN], clean[:TRAIN], args.epochs)

    window = torch.arange(TRAIN, TRAIN + TEST - T - FUTURE, 5) + torch.arange(T + FUTURE)[:, None]  # (T+FUTURE,B)
    truth = clean[window[T:]]
    with torch.no_grad():
        forecast = model(noisy[window[:T]], FUTURE)
    size = 3**0.5  # RMS distance from the mean, as each coordinate has standard deviation 1
    times = valid_times((forecast - truth).norm(dim=-1) / size)
    unchanged = valid_times((noisy[window[T - 1]] - truth).norm(dim=-1) / size)

    table = Table("valid time / Lyapunov times", "median", "10 %", "90 %", title=f"{window.shape[1]} forecasts")
    for name, values in ("encoder-decoder", times), ("last observation, held", unchanged):
        table.add_row(name, *(f"{values.quantile(q):.2f}" for q in (0.5, 0.1, 0.9)))
    console = Console()
    console.print(f"training loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last, of longer futures")
    console.print(table)
    plot(args.plot, noisy[window[:T]], truth, forecast, times)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
