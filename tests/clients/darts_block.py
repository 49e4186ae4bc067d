"""BlockRNNModel, LSTM: 8 steps, predict"""

from __future__ import annotations

import torch
from darts import TimeSeries
from darts.models import BlockRNNModel

from tests.clients.compare import Results, Steps, Swap
from tests.clients.forecasts import SwapOnSetup, series, trainer_options
from tests.clients.models import parameters


def run(swap: Swap) -> Steps:
    data = TimeSeries.from_values(series())
    forecaster = BlockRNNModel(
        model="LSTM",
        input_chunk_length=48,
        output_chunk_length=12,
        hidden_dim=64,
        random_state=0,
        pl_trainer_kwargs=trainer_options(SwapOnSetup(swap)),
    )

    def steps() -> Results:
        forecaster.fit(data, epochs=1, verbose=False)
        forecast = torch.from_numpy(forecaster.predict(12, verbose=False).values())
        return {"forecast": forecast, **parameters(forecaster.model)}

    return steps
