"""Leaky units: continuous-time recurrent networks, and echo state networks whose weights learn."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from rnnfast._input import weights_of
from rnnfast._layer import Layer

__all__ = ["LeakyRNN"]

_Device: TypeAlias = torch.device | str | int | None


class LeakyRNN(Layer):
    """Elman's network with leaky units: each takes over a share `leak` of what it is driven to and keeps the rest.

    For each layer and direction, * elementwise, f = tanh or relu:

        h_t = (1 - a) * h_{t-1} + a * f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    This is Euler's step of a continuous-time network, a = dt/tau (Funahashi & Nakamura 1993), and the unit of echo
    state networks (Jaeger et al. 2007, eq. 3 with a scaled input). a = 1 is `RNN`.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, recompute, device,
            dtype: as for `RNN`.
        leak: a, a number, or a tensor (H) of one for each unit; in (0,1], and below 1 if it is learned. The same for
            all layers to begin with. Default 1.
        learn_leak: learn it, one number or one for each unit as `leak` was given, in each layer and direction; default
            False. The parameters are `leak_logit_l0`, ..., a = 1 / (1 + exp(-logit)), which stays in (0,1); fixed ones
            are buffers `leak_l0`, ....

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional h_0 (L*D,B,H); resets, see
        `rnnfast.modules`.
    Outputs: output (T,B,D*H) like the input, h_n like h_0.

    Raises:
        ValueError: another nonlinearity; a leak out of (0,1], or learned and not below 1; one of another shape.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        leak: float | Tensor = 1.0,
        learn_leak: bool = False,
        recompute: int | str | None = None,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        given = torch.tensor(leak, device="cpu") if isinstance(leak, (int, float)) else leak.detach()
        given = given.double()
        if given.shape not in ((), (hidden_size,)):
            raise ValueError(f"leak: expected a number or shape ({hidden_size},), got shape {tuple(given.shape)}")
        if not bool(((given > 0) & ((given < 1) if learn_leak else (given <= 1))).all()):
            raise ValueError(f"leak: expected numbers in (0, 1{')' if learn_leak else ']'}, got {leak}")
        self.nonlinearity, self.learn_leak = nonlinearity, learn_leak
        mode = f"RNN_{nonlinearity.upper()}"
        where: Any = {"device": device, "dtype": dtype}
        RNNBase.__init__(
            self, mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **where
        )
        if recompute is not None:
            self.recompute = recompute
        self.mode = f"LEAKY_{nonlinearity.upper()}"
        like: Tensor = self.weight_ih_l0  # type: ignore[assignment]
        for suffix in self._suffixes():
            value = given.to(device=like.device)
            if learn_leak:
                logit = torch.nn.Parameter(value.logit().to(like.dtype))
                self.register_parameter(f"leak_logit{suffix}", logit)
            else:
                self.register_buffer(f"leak{suffix}", value.to(like.dtype))

    def _suffixes(self) -> list[str]:
        """Of the names of each layer and direction."""
        ways = ("", "_reverse")[: 2 if self.bidirectional else 1]
        return [f"_l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    @property
    def leak(self) -> Tensor:
        """a in force, (L*D,H)."""
        return torch.cat([self._leak(suffix) for suffix in self._suffixes()])

    def _leak(self, suffix: str) -> Tensor:
        """(1,H)"""
        a = getattr(self, f"leak_logit{suffix}").sigmoid() if self.learn_leak else getattr(self, f"leak{suffix}")
        return a.expand(1, self.hidden_size)

    def reset_parameters(self) -> None:
        """Draws the weights anew, uniform in +-1/sqrt(H) as torch's layers; the leaks stay."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0
        for weight in weights_of(self, self._flat_weights_names):
            torch.nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do: cuDNN has no leaky units."""

    def _kernel_weights(self) -> list[Tensor]:
        flat, each = super()._kernel_weights(), 4 if self.bias else 2
        own = zip(range(0, len(flat), each), self._suffixes(), strict=True)
        return [weight for i, suffix in own for weight in (*flat[i : i + each], self._leak(suffix))]

    def _torch_forward(self, input: Any, hx: Any) -> Any:  # type: ignore[override]
        return self._by_operators(input, hx, None)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", nonlinearity={self.nonlinearity!r}, learn_leak={self.learn_leak}"
