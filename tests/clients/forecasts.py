"""What the clients that forecast time series train: a series, and how Lightning's Trainer is told to be brief."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as lightning

from tests.clients.compare import Swap

STEPS = 8
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class SwapOnSetup(lightning.Callback):
    """Swaps the layers of a model that its package makes in `fit`, before the first step."""

    def __init__(self, swap: Swap) -> None:
        self.swap = swap

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.swap(pl_module)


def trainer_options(*callbacks: lightning.Callback) -> dict[str, Any]:
    return {"max_steps": STEPS, "accelerator": "cpu", "callbacks": list(callbacks), **QUIET}


def series(T: int = 600) -> np.ndarray:
    """(T,), float32: two sines and noise."""
    t = np.arange(T)
    noise = np.random.default_rng(0).normal(scale=0.1, size=T)
    return (np.sin(t / 7) + 0.5 * np.sin(t / 23) + noise).astype(np.float32)
