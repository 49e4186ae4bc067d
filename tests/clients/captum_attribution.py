"""IntegratedGradients (20 steps) of an LSTM classifier"""

from __future__ import annotations

import torch
from captum.attr import IntegratedGradients

from tests.clients.compare import Results, Steps, Swap
from tests.clients.models import Classifier, sequences


def run(swap: Swap) -> Steps:
    torch.manual_seed(0)
    method = IntegratedGradients(swap(Classifier()))
    x, classes = sequences(B=16)

    def steps() -> Results:
        return {"attributions": method.attribute(x, target=classes, n_steps=20)}

    return steps
