"""System identification of a driven, damped oscillator: a noisy trajectory in, two numbers out (many-to-one).

    x'' + 2 gamma x' + omega0^2 x = cos(Omega t)        x(0), x'(0), gamma, omega0 differ from one to the next

The network reads T noisy positions and tells the damping gamma and the natural frequency omega0.

    python examples/oscillator.py
    python examples/oscillator.py --epochs 3 --plot x.png
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

T, B, H, L = 50, 32, 64, 2  # steps, batch, hidden size, layers
TRAIN, TEST = 2000, 500  # trajectories
OMEGA, NOISE = 1.5, 0.05  # frequency of the drive; standard deviation of the measured position
TIMES = np.linspace(0, 20, T)
LOW, HIGH = np.array([0.02, 0.8]), np.array([0.40, 2.5])  # range of (gamma, omega0)
NAMES = ("damping gamma", "frequency omega0")


def trajectories(count, rng):
    """Noisy positions (T,count,1) and the parameters (count,2) behind them, all in one call of the integrator."""
    gamma, omega0 = rng.uniform(LOW, HIGH, (count, 2)).T

    def motion(t, state):
        x, v = state.reshape(2, count)
        return np.concatenate([v, np.cos(OMEGA * t) - 2 * gamma * v - omega0**2 * x])

    start = rng.normal(size=2 * count)
    solution = solve_ivp(motion, (0, TIMES[-1]), start, t_eval=TIMES, rtol=1e-6, atol=1e-8)
    positions = solution.y[:count].T  # (T,count)
    measured = positions + NOISE * rng.normal(size=positions.shape)
    parameters = np.stack([gamma, omega0], axis=1)
    return torch.tensor(measured[..., None], dtype=torch.float32), torch.tensor(parameters, dtype=torch.float32)


class Identifier(nn.Module):
    """A whole trajectory (T,B,1) -> its parameters (B,2)."""

    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(input_size=1, hidden_size=H, num_layers=L)
        self.readout = nn.Linear(H, 2)
        self.register_buffer("middle", torch.tensor((LOW + HIGH) / 2, dtype=torch.float32))
        self.register_buffer("width", torch.tensor((HIGH - LOW) / np.sqrt(12), dtype=torch.float32))

    def forward(self, x):
        _, (h_n, _) = self.lstm(x)  # h_n (L,B,H): all that it remembers of the trajectory
        return self.middle + self.width * self.readout(h_n[-1])


def train(model, x, parameters, epochs):
    """Adam with a cosine schedule, the error in units of each parameter's spread. -> the loss of each epoch"""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for _ in (progress := tqdm(range(epochs), desc="training", unit="epoch")):
        total = 0.0
        for rows in torch.randperm(TRAIN).split(B):
            optimizer.zero_grad()
            loss = ((model(x[:, rows]) - parameters[rows]) / model.width).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        scheduler.step()
        losses.append(total / TRAIN)
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def plot(path, x, truth, estimate):
    """Left three trajectories, then estimate against truth for each parameter."""
    _, axes = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[1.5, 1, 1], layout="constrained")
    order = truth[:, 0].argsort()
    for row, k in enumerate(order[[TEST // 10, TEST // 2, -TEST // 10]]):  # weak, middling and strong damping
        label = rf"$\gamma$ = {truth[k, 0]:.2f}, $\omega_0$ = {truth[k, 1]:.2f}"
        axes[0].plot(TIMES, x[:, k, 0] - 5 * row, ".-", lw=0.7, ms=4, label=label)
    axes[0].set(xlabel="time", ylabel="position (shifted)", title="what the network reads")
    axes[0].set_ylim(top=9)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    for k, symbol in enumerate([r"$\gamma$", r"$\omega_0$"]):
        axes[k + 1].plot([LOW[k], HIGH[k]], [LOW[k], HIGH[k]], "k", lw=0.8)
        axes[k + 1].plot(truth[:, k], estimate[:, k], ".", ms=3, alpha=0.6)
        axes[k + 1].set(xlabel=f"true {symbol}", ylabel=f"estimated {symbol}", title=f"{symbol}, unseen trajectories")
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plot", default="oscillator.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    x, parameters = trajectories(TRAIN, rng)  # (T,TRAIN,1), (TRAIN,2)
    x_test, truth = trajectories(TEST, rng)
    model = Identifier()
    losses = train(model, x, parameters, args.epochs)
    with torch.no_grad():
        estimate = model(x_test)  # (TEST,2)

    spread = truth.std(dim=0)
    error = (estimate - truth).square().mean(dim=0).sqrt()
    table = Table("parameter", "spread in the data", "RMS error", "explained (R²)", title=f"{TEST} unseen trajectories")
    for k, name in enumerate(NAMES):
        table.add_row(name, f"{spread[k]:.3f}", f"{error[k]:.3f}", f"{1 - (error[k] / spread[k]) ** 2:.3f}")
    console = Console()
    console.print(f"training loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    console.print(table)
    plot(args.plot, x_test, truth, estimate)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
