"""Six recurrent networks before any training: what is left of a gradient on its way back through time.

A random unit vector is sent back from the last state; the plot shows how much of it arrives at each step before.

    python examples/gradient_flow.py
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import rnnfast
from rnnfast import init
from rnnfast.diagnose import gradient_flow

I, H, B = 4, 100, 32  # noqa: E741


def networks():
    """-> title, layer"""
    for radius in (0.5, 1.0, 1.5):
        yield f"tanh, spectral radius {radius}", init.echo_state_(rnnfast.RNN(I, H), radius, input_scale=0.1)
    yield "ReLU, identity", init.identity_(rnnfast.RNN(I, H, nonlinearity="relu"))
    for bias in (0.0, 1.0):
        yield f"LSTM, forget bias {bias:.0f}", init.forget_bias_(rnnfast.LSTM(I, H), bias)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200, metavar="T", help="steps to look back, default 200")
    parser.add_argument("--plot", default="gradient_flow.png", metavar="FILE")
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(args.epochs, B, I)
    table = Table("network", "verdict", "a step", "1/e after", "1/1000 after", "|h| > 0.99", min_width=100)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True, sharey=True)
    nets = list(networks())
    for (title, layer), ax in tqdm(list(zip(nets, axes.flat, strict=True)), desc="networks"):
        flow = gradient_flow(layer, lambda layer=layer: layer(x)[0].sum(), probe=True)
        flow.plot(ax).set(
            title=title, ylim=(1e-12, 1e6), ylabel="|dL/dh_t|" if ax in axes[:, 0] else "", xlabel="step t"
        )
        ((verdict,),) = flow.verdicts()
        near, far = (flow.horizon(fraction).item() for fraction in (1 / torch.e, 1e-3))
        step = f"x {flow.log_slope.exp().item():.4f}"
        table.add_row(title, verdict, step, f"{near:.3g}", f"{far:.3g}", f"{flow.saturated.item():.1%}")
    figure.savefig(args.plot, dpi=110)
    console = Console()
    console.print(table)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
