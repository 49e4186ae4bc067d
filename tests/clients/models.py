"""A model and data of the kind that clients train which bring none of their own."""

from __future__ import annotations

import torch


class Classifier(torch.nn.Module):
    """Two layers of LSTM (B,T,I) -> scores of classes (B,K), from the last step."""

    def __init__(self, I: int = 8, H: int = 64, K: int = 3) -> None:  # noqa: E741 (the dims legend)
        super().__init__()
        self.lstm = torch.nn.LSTM(I, H, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(H, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def sequences(B: int = 64, T: int = 40, I: int = 8, K: int = 3) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: E741
    """Noise (B,T,I) and classes (B,)."""
    return torch.randn(B, T, I), torch.randint(K, (B,))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
