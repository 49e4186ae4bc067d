"""RecurrentPPO, MlpLstmPolicy, on CartPole: 2 rollouts of 128 steps and their updates"""

from __future__ import annotations

from sb3_contrib import RecurrentPPO

from tests.clients.compare import Results, Steps, Swap
from tests.clients.models import parameters


def run(swap: Swap) -> Steps:
    agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=128, batch_size=64, n_epochs=4, seed=0, device="cpu")
    swap(agent.policy)

    def steps() -> Results:
        agent.learn(256)
        return parameters(agent.policy)

    return steps
