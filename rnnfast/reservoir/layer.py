"""A reservoir with its readout as a torch module that autograd goes through.

Dims: T steps, B sequences, I inputs, H reservoir units, O outputs, Z features = 1 + I + H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnnfast.reservoir.bank import Bank, Inputs, Matrix

if TYPE_CHECKING:
    from rnnfast.reservoir.estimator import EchoState


class EchoStateLayer(nn.Module):
    """y_t = W_out [1, x_t, h_t] with h_t = (1-a) h_{t-1} + a f(W_in x_t + W h_{t-1} + b), differentiable in x, h_0 and
    all weights. Made by `EchoState.module`.

    The forward pass is the fused one. The backward pass walks back through time in torch, one product with W (H,H) a
    step; weight gradients are one product each over all steps. Once differentiable.

    Parameters: `w_in` (H,I), `w` (H,H), `bias` (H), which do not require a gradient until told to
    (`layer.requires_grad_()`), and `w_out` (O,Z), which does. A sparse W becomes dense, zeros included: mask its
    gradient if they have to stay.
    """

    w_in: nn.Parameter
    w: nn.Parameter
    bias: nn.Parameter

    def __init__(self, network: EchoState) -> None:
        super().__init__()
        dtype = network._one.dtype
        W = network.W_ if not hasattr(network.W_, "toarray") else network.W_.toarray()
        self.leak, self.unit = float(network.leak), network.unit
        for name, value in (("w_in", network.W_in_), ("w", W), ("bias", network.bias_)):
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=dtype), requires_grad=False))
        self.w_out = nn.Parameter(torch.tensor(network.W_out_, dtype=dtype))

    def extra_repr(self) -> str:
        H, I = self.w_in.shape  # noqa: E741
        return f"{I}, {H}, {self.w_out.shape[0]}, leak={self.leak}, unit={self.unit!r}"

    def states(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        """h (B,T,H) or (T,H) for x (B,T,I) or (T,I), from h0 (B,H) or (H), default 0."""
        if x.dim() not in (2, 3) or x.shape[-1] != self.w_in.shape[1]:
            I = self.w_in.shape[1]  # noqa: E741
            raise ValueError(f"x: expected shape (T,{I}) or (B,T,{I}), got {tuple(x.shape)}")
        if x.dim() == 2:
            return self.states(x[None], None if h0 is None else h0[None])[0]
        h0 = x.new_zeros(len(x), len(self.w)) if h0 is None else h0
        if h0.shape != (len(x), len(self.w)):
            raise ValueError(f"h0: expected shape {(len(x), len(self.w))}, got {tuple(h0.shape)}")
        return _Leaky.apply(x, h0, self.w_in, self.w, self.bias, self.leak, self.unit)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B,T,O) or (T,O), and h after the last step (B,H) or (H), for x and h0 as in `states`."""
        h = self.states(x, h0)
        y = nn.functional.linear(torch.cat([x, h], -1), self.w_out[:, 1:], self.w_out[:, 0])
        return y, h.select(-2, -1)


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h0: Tensor, w_in: Tensor, w: Tensor, bias: Tensor, leak: float, unit: str):
        numbers = [weight.detach().numpy() for weight in (w, w_in, bias)]
        bank = Bank(unit, x.dtype, [Matrix(numbers[0], None)], [Inputs(numbers[1], numbers[2], leak, 1.0)])
        h = torch.empty(1, *x.shape[:2], len(w), dtype=x.dtype)
        bank.drive(x, h0[None].clone(memory_format=torch.contiguous_format), h)
        ctx.leak, ctx.unit = leak, unit
        ctx.save_for_backward(x, h0, w_in, w, h[0])
        return h[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor):
        x, h0, w_in, w, h = ctx.saved_tensors
        a = ctx.leak
        before = torch.cat([h0[:, None], h[:, :-1]], 1)  # (B,T,H) h_{t-1}
        gate = a * _slope(ctx.unit, (h - (1 - a) * before) / a)  # (B,T,H) dh_t / dz_t
        dz = torch.empty_like(h)
        carried = torch.zeros_like(h0)  # dL/dh_t through the steps after t
        for t in range(h.shape[1] - 1, -1, -1):
            total = dh[:, t] + carried
            dz[:, t] = gate[:, t] * total
            carried = torch.addmm(total, dz[:, t], w, beta=1 - a)
        needs = ctx.needs_input_grad
        rows = dz.flatten(0, 1)  # (B*T,H)
        return (
            dz @ w_in if needs[0] else None,
            carried if needs[1] else None,
            rows.T @ x.flatten(0, 1) if needs[2] else None,
            rows.T @ before.flatten(0, 1) if needs[3] else None,
            rows.sum(0) if needs[4] else None,
            None,
            None,
        )


def _slope(unit: str, f: Tensor) -> Tensor:
    """df/dz from f(z)."""
    if unit == "tanh":
        return 1 - f * f
    return (f > 0).to(f.dtype) if unit == "relu" else torch.ones_like(f)
