"""Weekly CO2 above Mauna Loa: next-step forecasts at every step (many-to-many, aligned), then a roll-out of ten years.

CO2 climbs out of every range seen in training, so the network works on what does not climb: the level relative to the
mean of the year that ends with this week. It also reads the season as an angle, which is known in advance. Rolled out,
it lives on its own forecasts. The breath of the northern forests stays in shape and in phase for ten years; the growth,
a small offset of that level, comes out too small, and a simple extrapolation does better.

    python examples/co2.py
    python examples/co2.py --epochs 5 --plot x.png
"""

import argparse

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

T, B, H, L = 104, 32, 64, 1  # steps (two years of weeks), batch, hidden size, layers
TEST = 520  # the last ten years, never trained on
YEAR = 52  # weeks


class Forecaster(nn.Module):
    """After every step a forecast of the next level: (T,B,3) -> (T,B,1), and the state to go on from."""

    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(input_size=3, hidden_size=H, num_layers=L)  # level, cos and sin of the season
        self.readout = nn.Linear(H, 1)

    def forward(self, x, state=None):
        output, state = self.lstm(x, state)  # (T,B,H)
        return x[..., :1] + self.readout(output), state  # the network learns the change from week to week


@torch.no_grad()
def roll_out(model, x):
    """Closed loop: reads the first T steps of x (T+steps,3), then its own forecasts and only the season from x."""
    forecast, state = model(x[:T].unsqueeze(1))
    levels = [forecast[-1:]]  # (1,1,1) each
    for season in x[T:-1, 1:]:
        forecast, state = model(torch.cat([levels[-1], season.view(1, 1, 2)], dim=-1), state)
        levels.append(forecast)
    return torch.cat(levels).flatten()  # (steps,)


def train(model, x, epochs):
    """Windows of T weeks, targets the levels one week later. x (N,3) -> the loss of each epoch"""
    windows = x.unfold(0, T + 1, 4)  # (windows,3,T+1), one every four weeks
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for _ in (progress := tqdm(range(epochs), desc="training", unit="epoch")):
        total = 0.0
        for rows in torch.randperm(len(windows)).split(B):
            batch = windows[rows].permute(2, 0, 1)  # (T+1,B,3)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batch[:-1])[0], batch[1:, :, :1])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        scheduler.step()
        losses.append(total / len(windows))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def plot(path, dates, co2, closed_loop, repeated):
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[1, 1.6], layout="constrained")
    left.plot(dates, co2, "k", lw=0.8)
    left.set(ylabel="CO$_2$ / ppm", title="weekly CO$_2$, Mauna Loa (grey: left out)")
    shown = slice(-TEST - 2 * YEAR, None)
    right.plot(dates[shown], co2[shown], "k", lw=1, label="measured")
    right.plot(dates[-TEST:], repeated, "C0:", lw=1.2, label="the last known year, repeated, + mean growth")
    right.plot(dates[-TEST:], closed_loop, "C3--", lw=1.4, label="LSTM in closed loop")
    right.set(ylabel="CO$_2$ / ppm", title="ten years from the network's own forecasts")
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.axvspan(dates[-TEST], dates[-1], color="0.94", zorder=0)
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--plot", default="co2.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    data = sm.datasets.co2.load_pandas().data["co2"]  # 2284 weeks, 1958-2001, some of them missing
    filled = data.interpolate()
    dates, co2 = filled.index.to_numpy(), filled.to_numpy()
    level = (filled - filled.rolling(YEAR).mean()).to_numpy()[YEAR - 1 :]  # the first year has no year before it
    std = level[:-TEST].std()
    angle = 2 * np.pi * filled.index.dayofyear.to_numpy()[YEAR - 1 :] / 365.25
    x = torch.tensor(np.stack([level / std, np.cos(angle), np.sin(angle)], axis=1), dtype=torch.float32)  # (N,3)

    model = Forecaster()
    losses = train(model, x[:-TEST], args.epochs)

    past = x[-TEST - T : -1].unfold(0, T, 1).permute(2, 0, 1)  # (T,TEST,3), the T weeks before each week left out
    with torch.no_grad():
        one_step = std * model(past)[0][-1, :, 0].numpy()  # (TEST,)
    closed_loop = list(co2[-TEST - YEAR : -TEST])
    for value in std * roll_out(model, x[-TEST - T :]).numpy():  # back from levels to ppm
        closed_loop.append((YEAR * value + sum(closed_loop[1 - YEAR :])) / (YEAR - 1))
    closed_loop, truth, ahead = np.array(closed_loop[YEAR:]), co2[-TEST:], np.arange(TEST)
    growth = (co2[-TEST - 1] - co2[-2 * TEST - 1]) / TEST  # ppm a week, over the ten years before
    repeated = np.resize(co2[-TEST - YEAR : -TEST], TEST) + growth * YEAR * (1 + ahead // YEAR)

    def rms(error):
        return f"{np.sqrt(np.mean(np.square(error))):.3f}"

    table = Table("forecast of", "LSTM", "baseline", "which is", title="the last ten years: RMS error in ppm")
    table.add_row("next week", rms(one_step - level[-TEST:]), rms(co2[-TEST - 1 : -1] - truth), "no change")
    table.add_row("ten years", rms(closed_loop - truth), rms(repeated - truth), "the last year again + growth")
    console = Console()
    console.print(f"{len(co2)} weeks, {data.isna().sum()} missing ones interpolated")
    console.print(f"training loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    console.print(table)
    plot(args.plot, dates, co2, closed_loop, repeated)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
