"""Training of pytorch-forecasting's recurrent networks. Their LSTM is a subclass of torch's that lets sequences without
observations through."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import pandas
import torch
from pytorch_forecasting import TimeSeriesDataSet

from tests.clients.compare import Results, Steps, Swap
from tests.clients.forecasts import series, trainer_options
from tests.clients.models import parameters


def train(network: Any, swap: Swap) -> Steps:
    lightning.seed_everything(0, verbose=False)
    y = series()
    frame = pandas.DataFrame({"time": range(len(y)), "value": y, "series": "0"})
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=24,  # of one batch sequences of different lengths
        max_encoder_length=48,
        max_prediction_length=12,
        time_varying_unknown_reals=["value"],
    )
    model = swap(network.from_dataset(data, hidden_size=64, rnn_layers=2, dropout=0.0))
    trainer = lightning.Trainer(**trainer_options())
    loader = data.to_dataloader(train=True, batch_size=64, num_workers=0)
    x, _ = next(iter(data.to_dataloader(train=False, batch_size=64, num_workers=0)))

    def steps() -> Results:
        trainer.fit(model, loader)
        with torch.no_grad():
            return {"prediction": model(x)["prediction"], **parameters(model)}

    return steps
