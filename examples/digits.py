"""Read handwritten digits row by row, as sequences of unequal length, and classify them (many-to-one, packed).

Each 8 x 8 image is a sequence of 8 rows of 8 pixels, of which only the first 2 to 8 are shown, so one batch holds
sequences of every length and goes in as a PackedSequence. The model is written with torch.nn.RNN and moved to rnnfast
by one call. How much of a digit must one see to know it?

    python examples/digits.py
    python examples/digits.py --epochs 3 --plot x.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

import rnnfast

T, B, H, L = 8, 32, 64, 2  # steps (rows of an image), batch, hidden size, layers
SHORTEST = 2
TEST = 597  # images, never trained on; 1200 are left to train on


class Classifier(nn.Module):
    """Sequences x (T,B,8), of which the first lengths (B,) rows count -> one score for each digit (B,10)."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(input_size=8, hidden_size=H, num_layers=L)
        self.readout = nn.Linear(H, 10)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        _, h_n = self.rnn(packed)  # h_n (L,B,H), for each sequence after its own last step
        return self.readout(h_n[-1])


def load():
    """-> x (T,N,8), digit (N,): 1797 images of 64 pixels, 0 to 16, in a random order"""
    images, digit = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digit))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, T, 8).transpose(0, 1)
    return x, torch.tensor(digit[order])


def training(model, x, digit, epochs):
    """x (T,N,8), digit (N,); every image is cut anew to a random length each time. Yields the loss of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(digit)).split(B):
            lengths = torch.randint(SHORTEST, T + 1, (len(rows),))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[:, rows], lengths), digit[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        scheduler.step()
        yield total / len(digit)


def train(model, x, digit, epochs):
    """`training` with a progress bar -> the loss of each epoch"""
    losses = []
    for loss in (progress := tqdm(training(model, x, digit, epochs), desc="training", total=epochs, unit="epoch")):
        losses.append(loss)
        progress.set_postfix(loss=f"{loss:.4f}")
    return losses


def plot(path, x, accuracy, probability):
    """One image, what the network believes after each row of it, and the accuracy over all of them."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[1, 1.2, 1.2], layout="constrained")
    left.imshow(x, cmap="gray_r", extent=(0.5, 8.5, 8.5, 0.5))
    left.set(ylabel="row = step", title="one unseen digit", xticks=[], yticks=range(1, T + 1))
    image = middle.imshow(probability, vmin=0, vmax=1, aspect="auto", extent=(-0.5, 9.5, T + 0.5, SHORTEST - 0.5))
    middle.set(xlabel="digit", ylabel="rows seen", title="what the network believes", xticks=range(10))
    plt.colorbar(image, ax=middle, label="probability")
    right.plot(list(accuracy), list(accuracy.values()), "o-")
    right.axhline(0.1, color="0.5", ls="--", label="guessing")
    right.set(xlabel="rows seen", ylabel="accuracy", ylim=(0, 1), title=f"{TEST} unseen digits")
    right.legend()
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--plot", default="digits.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    x, digit = load()
    model = Classifier()
    rnnfast.convert(model)  # from here on model.rnn is an rnnfast.RNN, with the same parameters
    losses = train(model, x[:, TEST:], digit[TEST:], args.epochs)

    accuracy, scores = {}, {}
    with torch.no_grad():
        for length in range(SHORTEST, T + 1):
            scores[length] = model(x[:, :TEST], torch.full((TEST,), length))  # (TEST,10)
            accuracy[length] = (scores[length].argmax(dim=-1) == digit[:TEST]).float().mean().item()

    console = Console()
    table = Table("rows seen", "accuracy", title=f"{TEST} unseen digits")
    for length, value in accuracy.items():
        table.add_row(str(length), f"{value:.3f}")
    console.print(f"model.rnn is a {type(model.rnn).__module__.split('.')[0]}.{type(model.rnn).__name__}")
    console.print(f"training loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    console.print(table)
    plot(args.plot, x[:, 0], accuracy, torch.stack([s[0].softmax(dim=-1) for s in scores.values()]))
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
