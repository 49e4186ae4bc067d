"""NeuralForecast with LSTM, 2 layers: 8 steps, predict"""

from __future__ import annotations

import pandas
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM

from tests.clients.compare import Results, Steps, Swap
from tests.clients.forecasts import QUIET, STEPS, series
from tests.clients.models import parameters


def run(swap: Swap) -> Steps:
    y = series()
    data = pandas.DataFrame({"unique_id": "series", "ds": pandas.RangeIndex(len(y)), "y": y})
    model = LSTM(
        h=12,
        input_size=48,
        encoder_hidden_size=64,
        decoder_hidden_size=64,
        max_steps=STEPS,
        random_seed=0,
        accelerator="cpu",
        **QUIET,
    )
    forecast = NeuralForecast([swap(model)], freq=1)

    def steps() -> Results:
        forecast.fit(data)
        predicted = torch.from_numpy(forecast.predict()["LSTM"].to_numpy())
        return {"forecast": predicted, **parameters(forecast.models[0])}

    return steps
