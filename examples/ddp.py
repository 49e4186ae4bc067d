"""Train on as many processes as you like: an LSTM under DistributedDataParallel forecasts the sea off Peru.

Monthly sea surface temperature in the region where El Niño shows first; the forecast is how far each of the next six
months will be from what is usual for it. Every process takes its share of each batch and DDP averages the gradients, so
the training is the same for 1, 2, 4, ... processes, but for rounding.

    python examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --epochs 3 --plot x.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import statsmodels.api as sm
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import rnnfast

T, AHEAD, B, H = 12, 6, 32, 16  # months seen, months forecast, batch of all processes together, hidden size
TEST = 120  # the last months, never trained on


class Forecaster(nn.Module):
    """Deviations of T months (B,T) -> those of the next AHEAD months (B,AHEAD)."""

    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(input_size=1, hidden_size=H, batch_first=True)
        self.readout = nn.Linear(H, AHEAD)

    def forward(self, x):
        output, _ = self.lstm(x.unsqueeze(-1))  # (B,T,H)
        return self.readout(output[:, -1])


def train(model, windows, epochs, rank, processes):
    """windows (N,T+AHEAD) -> the loss of each epoch, over all processes"""
    sampler = DistributedSampler(windows, processes, rank, seed=0)
    loader = DataLoader(TensorDataset(windows), B // processes, sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for epoch in (progress := tqdm(range(epochs), desc="training", unit="epoch", disable=rank != 0)):
        sampler.set_epoch(epoch)  # another order every time, the same on all processes
        total = torch.zeros(())
        for (rows,) in loader:  # (B/processes,T+AHEAD)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(rows[:, :T]), rows[:, T:])
            loss.backward()  # here DDP averages the gradients
            optimizer.step()
            total += loss.detach() * len(rows)
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / len(windows))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def report(path, processes, losses, windows, forecast):
    """Loss, RMS error of each month ahead, plot. windows (TEST,T+AHEAD), forecast (TEST,AHEAD), in degrees."""
    errors = {
        "the network": forecast - windows[:, T:],
        "as far off as now": windows[:, T - 1 : T] - windows[:, T:],
        "as usual for the month": -windows[:, T:],
    }
    errors = {name: error.square().mean(dim=0).sqrt() for name, error in errors.items()}
    console = Console()
    console.print(f"{processes} process(es), {B // processes} of {B} sequences of a batch each")
    console.print(f"training loss {losses[0]:.6f} in the first epoch, {losses[-1]:.6f} in the last")
    ahead = range(1, AHEAD + 1)
    table = Table("months ahead", *map(str, ahead), title="RMS error in °C, the last ten years")
    for name, error in errors.items():
        table.add_row(name, *(f"{value:.2f}" for value in error))
    console.print(table)

    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[2, 1], layout="constrained")
    left.plot(windows[:, T + 2], "k", lw=0.8, label="measured")
    left.plot(forecast[:, 2], "C3", label="forecast three months before")
    left.set(xlabel="month of the last ten years", ylabel="deviation, °C", title="sea surface off Peru")
    for name, error in errors.items():
        right.plot(ahead, error, ".-", label=name)
    right.set(xlabel="months ahead", ylabel="RMS error, °C")
    for axes in (left, right):
        axes.legend(fontsize=8)
    plt.savefig(path, dpi=120)
    console.print(f"saved {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--plot", default="ddp.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a thread a process
    torch.manual_seed(0)
    rank, processes = 0, 1
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
    if B % processes:
        raise SystemExit(f"expected a number of processes that divides the batch of {B}, got {processes}")

    data = sm.datasets.elnino.load_pandas().data.drop(columns="YEAR").to_numpy()  # (61 years, 12 months), °C
    usual = data[: -TEST // 12].mean(axis=0)  # (12)
    scale = (data - usual).std()
    series = torch.tensor((data - usual).ravel() / scale, dtype=torch.float32)  # (732)
    windows = series.unfold(0, T + AHEAD, 1)
    seen, unseen = windows[: -TEST - AHEAD], windows[-TEST:]  # no month to be forecast is in both
    seen = seen[len(seen) % B :]  # whole batches: else DistributedSampler repeats a window to give all as many

    model = Forecaster()
    losses = train(DistributedDataParallel(model) if processes > 1 else model, seen, args.epochs, rank, processes)
    if rank == 0:
        with torch.no_grad():
            forecast = model(unseen[:, :T])
        report(args.plot, processes, np.array(losses), scale * unseen, scale * forecast)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
