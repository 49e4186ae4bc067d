"""Generate a whole trajectory from a few numbers: the network as a solver of a damped oscillator (one-to-many).

    x'' + 2 gamma x' + omega0^2 x = 0        given x(0), x'(0), gamma, omega0        wanted x(t_1) ... x(t_T)

A small network turns the four numbers into the initial state of an LSTM, which then generates the whole trajectory. Its
answer is held against the exact solution, also for twice as many steps as it was trained on.

    python examples/trajectory.py
    python examples/trajectory.py --epochs 3 --plot x.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import rnnfast

T, B, H, L = 50, 32, 64, 1  # steps, batch, hidden size, layers
TRAIN, TEST = 2000, 500  # trajectories
DT = 0.2  # time between two steps
LOW, HIGH = np.array([-1, -1, 0.0, 0.8]), np.array([1, 1, 0.3, 2.0])  # ranges of x(0), x'(0), gamma, omega0


def exact(conditions, steps):
    """Conditions (count,4) -> the underdamped solution at DT, 2 DT, ..., (steps,count,1)."""
    x0, v0, gamma, omega0 = conditions.T
    t = DT * np.arange(1, steps + 1)[:, None]  # (steps,1)
    omega = np.sqrt(omega0**2 - gamma**2)
    x = np.exp(-gamma * t) * (x0 * np.cos(omega * t) + (v0 + gamma * x0) / omega * np.sin(omega * t))
    return torch.tensor(x[..., None], dtype=torch.float32)


class Generator(nn.Module):
    """Four numbers (B,4) -> positions (steps,B,1)."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, H), nn.Tanh(), nn.Linear(H, 2 * H))
        self.lstm = rnnfast.LSTM(input_size=4, hidden_size=H, num_layers=L)
        self.readout = nn.Linear(H, 1)
        self.register_buffer("middle", torch.tensor((LOW + HIGH) / 2, dtype=torch.float32))
        self.register_buffer("width", torch.tensor((HIGH - LOW) / 2, dtype=torch.float32))

    def forward(self, conditions, steps):
        conditions = (conditions - self.middle) / self.width  # each in -1..1
        h, c = self.encode(conditions).unsqueeze(0).chunk(2, dim=-1)  # (1,B,H) each
        output, _ = self.lstm(conditions.expand(steps, -1, -1), (h.contiguous(), c.contiguous()))
        return self.readout(output)


def train(model, conditions, x, epochs):
    """conditions (TRAIN,4), x (T,TRAIN,1) -> the loss of each epoch"""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for _ in (progress := tqdm(range(epochs), desc="training", unit="epoch")):
        total = 0.0
        for rows in torch.randperm(TRAIN).split(B):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(conditions[rows], T), x[:, rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        scheduler.step()
        losses.append(total / TRAIN)
        progress.set_postfix(loss=f"{losses[-1]:.5f}")
    return losses


def plot(path, conditions, truth, generated):
    """A weakly, a middling and a strongly damped trajectory beside the exact ones, then the error over time."""
    order = conditions[:, 2].argsort()
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[1.8, 1], layout="constrained")
    t = DT * np.arange(1, len(truth) + 1)
    for row, k in enumerate(order[[TEST // 10, TEST // 2, -TEST // 10]]):
        left.plot(t, truth[:, k, 0] - 3 * row, "k", lw=0.8, label="exact" if row == 0 else None)
        label = rf"LSTM, $\gamma$ = {conditions[k, 2]:.2f}, $\omega_0$ = {conditions[k, 3]:.2f}"
        left.plot(t, generated[:, k, 0] - 3 * row, "--", label=label)
    left.set(xlabel="time", ylabel="position (shifted)", title="whole trajectories from four numbers each")
    left.set_ylim(top=4)
    left.legend(loc="upper right", ncols=2, fontsize=8)
    right.semilogy(t, truth.square().mean(dim=(1, 2)).sqrt(), "k", lw=0.8, label="RMS position")
    right.semilogy(t, (generated - truth).square().mean(dim=(1, 2)).sqrt(), "C3", label="RMS error of the LSTM")
    right.set(xlabel="time", title="unseen initial states and parameters")
    right.legend(loc="center left")
    for axes in (left, right):
        axes.axvspan(DT * T, t[-1], color="0.94", zorder=0)
        axes.text(DT * T, axes.get_ylim()[0], " longer than trained on", va="bottom", fontsize=8)
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", default="trajectory.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    seen, unseen = rng.uniform(LOW, HIGH, (TRAIN, 4)), rng.uniform(LOW, HIGH, (TEST, 4))
    model = Generator()
    losses = train(model, torch.tensor(seen, dtype=torch.float32), exact(seen, T), args.epochs)

    truth = exact(unseen, 2 * T)  # (2T,TEST,1)
    with torch.no_grad():
        generated = model(torch.tensor(unseen, dtype=torch.float32), 2 * T)

    table = Table("steps", "RMS position", "RMS error", title=f"{TEST} unseen trajectories")
    for name, part in (f"1 to {T}, as trained", slice(0, T)), (f"{T + 1} to {2 * T}, beyond", slice(T, 2 * T)):
        position, error = truth[part].square().mean().sqrt(), (generated - truth)[part].square().mean().sqrt()
        table.add_row(name, f"{position:.3f}", f"{error:.3f}")
    console = Console()
    console.print(f"training loss {losses[0]:.5f} in the first epoch, {losses[-1]:.5f} in the last")
    console.print(table)
    plot(args.plot, unseen, truth, generated)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
