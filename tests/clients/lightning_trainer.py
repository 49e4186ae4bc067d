"""Trainer.fit of an LSTM classifier: 8 steps of Adam"""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.compare import Results, Steps, Swap
from tests.clients.models import Classifier, parameters, sequences


class Task(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, classes = batch
        return torch.nn.functional.cross_entropy(self.model(x), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def run(swap: Swap) -> Steps:
    torch.manual_seed(0)
    task = swap(Task())
    loader = DataLoader(TensorDataset(*sequences(B=8 * 64)), batch_size=64)
    trainer = lightning.Trainer(
        max_steps=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    def steps() -> Results:
        trainer.fit(task, loader)
        return parameters(task)

    return steps
