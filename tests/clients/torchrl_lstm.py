"""LSTMModule over trajectories that end within the batch (is_init), recurrent mode: 4 steps of Adam"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.modules import LSTMModule, set_recurrent_mode

from tests.clients.compare import Results, Steps, Swap
from tests.clients.models import parameters


def run(swap: Swap) -> Steps:
    B, T, I, H = 32, 40, 8, 64  # noqa: E741 (the dims legend)
    torch.manual_seed(0)
    module = LSTMModule(input_size=I, hidden_size=H, in_key="observation", out_key="features")
    swap(module)
    optimizer = torch.optim.Adam(module.parameters())
    zeros = torch.zeros(B, T, 1, H)
    data = TensorDict(
        {
            "observation": torch.randn(B, T, I),
            "is_init": torch.rand(B, T, 1) < 0.05,
            "recurrent_state_h": zeros,
            "recurrent_state_c": zeros.clone(),
        },
        batch_size=[B, T],
    )
    target = torch.randn(B, T, H)

    def steps() -> Results:
        for _ in range(4):
            with set_recurrent_mode(True):
                features = module(data.clone())["features"]
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(features, target).backward()
            optimizer.step()
        return {"features": features, **parameters(module)}

    return steps
