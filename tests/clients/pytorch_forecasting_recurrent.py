"""RecurrentNetwork, LSTM of 2 layers: 8 steps, forecasts"""

from __future__ import annotations

from pytorch_forecasting import RecurrentNetwork

from tests.clients.compare import Steps, Swap
from tests.clients.encoder_decoder import train


def run(swap: Swap) -> Steps:
    return train(RecurrentNetwork, swap)
