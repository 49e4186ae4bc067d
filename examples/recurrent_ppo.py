"""Balance a pole whose velocities are hidden: RecurrentPPO with sb3-contrib's LSTM policy and with rnnfast's.

Only positions are observed, so the policy has to remember. Both start from one seed and take turns rollout by rollout,
so whatever else the machine does slows both. Episodes end in the middle of a rollout all the time: sb3-contrib's
policy then calls its LSTMs once for each step, rnnfast's once for all of them.

    python examples/recurrent_ppo.py
    python examples/recurrent_ppo.py --steps 4096 --plot x.png
"""

import argparse
import time

import gymnasium
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent import MlpLstmPolicy
from stable_baselines3.common.env_util import make_vec_env
from tqdm import tqdm

import rnnfast.rl.sb3

T, B, H = 128, 8, 32  # steps of a rollout, environments, hidden size
POLICIES = {"sb3-contrib": MlpLstmPolicy, "rnnfast": rnnfast.rl.sb3.MlpLstmPolicy}


class Positions(gymnasium.ObservationWrapper):
    """CartPole's positions of cart and pole, without their velocities."""

    def __init__(self, env):
        super().__init__(env)
        low, high = env.observation_space.low[::2], env.observation_space.high[::2]
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation):
        return observation[::2]


class Trainer:
    """A model with random numbers of its own, and after each rollout the mean return and the seconds so far."""

    def __init__(self, policy):
        self.model = RecurrentPPO(
            policy,
            make_vec_env("CartPole-v1", n_envs=B, seed=0, wrapper_class=Positions),
            n_steps=T,
            batch_size=256,
            n_epochs=5,
            learning_rate=2e-3,
            gamma=0.98,
            seed=0,
            device="cpu",
            policy_kwargs={"lstm_hidden_size": H},
        )
        self.random = torch.get_rng_state(), np.random.get_state()
        self.steps, self.returns, self.seconds = [], [], []

    def rollout(self):
        """Collect T steps of every environment, and learn from them."""
        torch.set_rng_state(self.random[0])
        np.random.set_state(self.random[1])
        start = time.perf_counter()
        self.model.learn(T * B, reset_num_timesteps=not self.steps)
        self.seconds.append((self.seconds or [0.0])[-1] + time.perf_counter() - start)
        self.random = torch.get_rng_state(), np.random.get_state()
        self.steps.append(self.model.num_timesteps)
        self.returns.append(np.mean([episode["r"] for episode in self.model.ep_info_buffer]))


def plot(path, trainers):
    _, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    for (name, trainer), style in zip(trainers.items(), ["C1-", "C2--"], strict=True):
        for axis, x in zip(axes, (trainer.steps, trainer.seconds), strict=True):
            axis.plot(x, trainer.returns, style, lw=2, label=name)
    axes[0].set(xlabel="environment steps", ylabel="mean return of 100 episodes", title="one seed, two policies")
    axes[1].set(xlabel="seconds of training", title="the same, against time")
    axes[0].legend()
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40 * T * B, help=f"of the environments (default {40 * T * B})")
    parser.add_argument("--plot", default="recurrent_ppo.png", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)

    trainers = {name: Trainer(policy) for name, policy in POLICIES.items()}
    rollouts = max(1, args.steps // (T * B))
    for k in (progress := tqdm(range(rollouts), desc="training both", unit="rollout")):
        turns = list(trainers.values())
        for trainer in turns if k % 2 else reversed(turns):
            trainer.rollout()
        progress.set_postfix({name: f"{trainer.returns[-1]:.0f}" for name, trainer in trainers.items()})

    theirs, ours = trainers.values()
    console = Console()
    table = Table("environment steps", *(f"return, {name}" for name in trainers), title="mean return of 100 episodes")
    for k in sorted({0, *range(7, rollouts, 8), rollouts - 1}):
        table.add_row(str(ours.steps[k]), *(f"{trainer.returns[k]:.1f}" for trainer in trainers.values()))
    console.print(table)
    for name, trainer in trainers.items():
        rate = trainer.steps[-1] / trainer.seconds[-1]
        console.print(f"{name:11} {trainer.seconds[-1]:6.2f} s in all, {rate:6.1f} steps a second")
    console.print(f"ratio of the times, one thread: {theirs.seconds[-1] / ours.seconds[-1]:.2f}")
    plot(args.plot, trainers)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
