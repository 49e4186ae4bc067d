"""NeuralNetClassifier around an LSTM: 2 epochs of Adam, predict_proba"""

from __future__ import annotations

import torch
from skorch import NeuralNetClassifier

from tests.clients.compare import Results, Steps, Swap
from tests.clients.models import Classifier, parameters, sequences


def run(swap: Swap) -> Steps:
    torch.manual_seed(0)
    x, classes = (tensor.numpy() for tensor in sequences(B=256))
    net = NeuralNetClassifier(
        Classifier, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, batch_size=64, verbose=0
    ).initialize()
    swap(net.module_)

    def steps() -> Results:
        net.partial_fit(x, classes, epochs=2)
        return {"probabilities": torch.from_numpy(net.predict_proba(x)), **parameters(net.module_)}

    return steps
