"""Teach a small LSTM an overdriven amplifier, for effect.c to play.

    python examples/stream/train.py --save effect.rnn     # half a minute

The amplifier: its gain falls while the input is loud, then it clips one half-wave earlier than the other, and its tone
control takes the highs away. What a network must keep of the past is an envelope and a filter's state.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rnnfast

RATE = 48_000
UNITS, BATCH, STEPS, WARM_UP = 16, 32, 1024, 256


def amplifier(x: np.ndarray) -> np.ndarray:
    """x (T,B) -> y (T,B)"""
    attack, tone = 1 - np.exp(-1 / (0.005 * RATE)), 1 - np.exp(-2 * np.pi * 4000 / RATE)
    envelope, low, y = np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.empty_like(x)
    for t, sample in enumerate(x):
        envelope += attack * (np.abs(sample) - envelope)
        driven = 6 * sample / (1 + 4 * envelope)
        low += tone * (np.tanh(driven + 0.2) - np.tanh(0.2) - low)
        y[t] = low
    return y


def guitar(steps: int, batch: int, random: np.random.Generator) -> np.ndarray:
    """(steps,batch) plucked strings, some loud, some not: harmonics that die away, the high ones sooner"""
    t = np.arange(steps)[:, None] / RATE - random.uniform(-0.05, 0.02, batch)
    pitch, loud = random.uniform(80, 600, batch), random.uniform(0.05, 1, batch)
    waves = sum(np.exp(-3 * k * np.abs(t)) * np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 9))
    return (loud * (t > 0) * waves / 2).astype(np.float32)


def loss_of(lstm: torch.nn.Module, head: torch.nn.Module, random: np.random.Generator) -> torch.Tensor:
    """Energy of what is off over the energy that there is."""
    x = guitar(WARM_UP + STEPS, BATCH, random)
    y = torch.from_numpy(amplifier(x)[WARM_UP:])
    got = head(lstm(torch.from_numpy(x)[..., None])[0])[WARM_UP:, :, 0]
    return (got - y).square().sum() / y.square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=Path("effect.rnn"))
    parser.add_argument("--updates", type=int, default=600)
    options = parser.parse_args()

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    lstm, head = rnnfast.LSTM(1, UNITS), torch.nn.Linear(UNITS, 1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.updates)
    losses = []
    for _ in tqdm(range(options.updates), desc="training"):
        optimizer.zero_grad()
        loss = loss_of(lstm, head, random)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        off = np.mean([loss_of(lstm, head, random).item() for _ in range(5)])
    print(f"energy that is off: {losses[0]:.3g} in the first update, {off:.3g} on new strings at the end")
    rnnfast.Stream(lstm, head=head).save(options.save)
    print(f"wrote {options.save}")


if __name__ == "__main__":
    main()
