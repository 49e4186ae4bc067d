"""RecurrentPPO's frames a second on CartPole: sb3-contrib's MlpLstmPolicy, rnnfast's, and rnnfast's RecurrentPPO.

    python -m benchmarks.rl [--threads N] [--json FILE] [--markdown FILE]

Eight environments of 128 steps, in which episodes end after some twenty steps. `train` is an epoch over that rollout,
`collect` the rollout itself, a step at a time; both with everything that sb3-contrib does around the LSTMs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent import MlpLstmPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor
from tqdm import tqdm

import rnnfast.rl.sb3
from benchmarks import env
from benchmarks.__main__ import write_json
from benchmarks.contenders import Contender
from benchmarks.report import Cell, Table, markdown_tables, print_tables
from benchmarks.results import Row
from benchmarks.run import TOLERANCES, find_failures
from benchmarks.timing import Timing, cpu_timer, time_in_turns

ALGORITHMS = {  # each with its policy; the last one does not pad
    "sb3-contrib": (RecurrentPPO, MlpLstmPolicy),
    "rnnfast policy": (RecurrentPPO, rnnfast.rl.sb3.MlpLstmPolicy),
    "rnnfast": (rnnfast.rl.sb3.RecurrentPPO, rnnfast.rl.sb3.MlpLstmPolicy),
}
T, B = 128, 8  # steps of a rollout, environments


@dataclass(frozen=True)
class Size:
    """Hidden units of an LSTM, LSTMs on top of each other, and frames of a minibatch."""

    H: int
    L: int
    N: int


SIZES = (Size(64, 1, 128), Size(256, 1, 128), Size(256, 2, 128), Size(64, 1, 1024), Size(256, 1, 1024))
PASSES = ("train", "collect")


class Learner:
    """A model with a rollout to learn from. The same seed: the same weights, environments and actions."""

    def __init__(self, algorithm: type[RecurrentPPO], policy: type, size: Size) -> None:
        self.model = algorithm(
            policy,
            make_vec_env("CartPole-v1", n_envs=B, seed=0),
            n_steps=T,
            batch_size=size.N,
            n_epochs=1,
            seed=0,
            device="cpu",
            policy_kwargs={"lstm_hidden_size": size.H, "n_lstm_layers": size.L},
        )
        _, self.callback = self.model._setup_learn(T * B, ConvertCallback(None))
        self.collect()

    def collect(self) -> None:
        self.model.collect_rollouts(self.model.env, self.callback, self.model.rollout_buffer, T)

    def train(self) -> None:
        self.model.train()

    def evaluated(self, rollout: RolloutBuffer) -> dict[str, Tensor]:
        """What a minibatch of a rollout gives, and the gradients of the parameters."""
        buffer, policy = copy.deepcopy(rollout), self.model.policy
        buffer.__class__ = type(self.model.rollout_buffer)
        np.random.seed(0)  # the same minibatch for every learner
        batch = next(buffer.get(self.model.batch_size))
        policy.set_training_mode(True)
        values, log_prob, entropy = policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten(), batch.lstm_states, batch.episode_starts
        )
        outputs = {"values": values.flatten(), "log_prob": log_prob, "entropy": entropy}
        outputs = {name: a[batch.mask > 0] for name, a in outputs.items()}
        policy.zero_grad()
        torch.stack([a.square().mean() for a in outputs.values()]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        return {name: a.detach() for name, a in outputs.items()} | gradients


def compare(size: Size, budget_s: float) -> list[Row]:
    """The rows of a size, three for each pass."""
    learners = {name: Learner(*parts, size) for name, parts in ALGORITHMS.items()}
    rollout = learners["sb3-contrib"].model.rollout_buffer
    checked = [
        Contender(name, learner.train, lambda learner=learner: learner.evaluated(rollout))
        for name, learner in learners.items()
    ]
    failures = find_failures(checked, TOLERANCES["float32", "cpu"])
    rows = []
    for what in PASSES:
        runs = {name: getattr(learner, what) for name, learner in learners.items()}
        timings = time_in_turns(runs, cpu_timer, budget_s)
        rows += [_row(size, what, name, timings, failures[name]) for name in runs]
    return rows


def _row(size: Size, what: str, name: str, timings: dict[str, Timing], failure: str) -> Row:
    timing = timings[name]
    row: Row = {"cell": "lstm", "pass": what, "impl": name, "T": T, "B": B, "I": 4, "H": size.H, "L": size.L, "D": 1}
    row |= {"dtype": "float32", "device": "cpu", "shape": f"H{size.H} L{size.L} N{size.N}"}
    row |= {"median_s": timing.median_s, "iqr_s": timing.iqr_s, "samples": timing.samples, "check": failure or "ok"}
    return row | {
        "frames_per_s": T * B / timing.median_s,
        "ratio_vs_sb3-contrib": timings["sb3-contrib"].median_s / timing.median_s,
    }


def table(rows: Sequence[Row]) -> Table:
    lines: list[list[Cell]] = []
    for k in range(0, len(rows), len(ALGORITHMS)):
        job = rows[k : k + len(ALGORITHMS)]
        rates = [f"{row['frames_per_s']:.0f} ({row['iqr_s'] / row['median_s']:.0%})" for row in job]
        ratios = [row["ratio_vs_sb3-contrib"] if row["check"] == "ok" else "wrong" for row in job[1:]]
        lines.append([job[0]["pass"], job[0]["shape"], *rates, *ratios])
    title = f"RecurrentPPO, frames a second, T{T} and {B} environments"
    return Table(title, ["", "", *ALGORITHMS, "ratio, policy", "ratio, rnnfast"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="what timing a row aims to take (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    machine = env.describe("cpu", options.threads)
    machine["command"] = shlex.join(["python", "-m", "benchmarks.rl", *(arguments or sys.argv[1:])])
    machine["versions"] |= {name: importlib.metadata.version(name) for name in ("sb3-contrib", "gymnasium")}
    rows: list[Row] = []
    for size in tqdm(SIZES, desc="RecurrentPPO"):
        rows += compare(size, options.seconds)
        if options.json:
            write_json(options.json, machine, rows)
    found = table(rows)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    about = f"{machine['cpu']}, {machine['rnnfast']['isa']}, {options.threads} threads; {versions}"
    about += "; medians of samples taken in turns, in parentheses their interquartile range"
    console = Console()
    print_tables(console, [found])
    console.print(about)
    if options.markdown:
        options.markdown.write_text(f"{about}\n\n{markdown_tables([found])}")
    wrong = [f"WRONG {row['pass']} {row['shape']}: {row['check']}" for row in rows if row["check"] != "ok"]
    for line in wrong:
        console.print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
