"""What a client computes and how long it takes, with torch's layers, rnnfast's, and torch's in float64."""

from __future__ import annotations

import functools
import statistics
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch.nn.utils.rnn import PackedSequence

import rnnfast

Swap: TypeAlias = Callable[[torch.nn.Module], torch.nn.Module]
Results: TypeAlias = Mapping[str, torch.Tensor]
Steps: TypeAlias = Callable[[], Results]
Client: TypeAlias = Callable[[Swap], Steps]

FACTOR = 4  # sums in another order err by another amount of the same size: so many times torch's own error is allowed
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """How far the results of both are from those of layers in float64, and the CPU time of each."""

    torch_error: float
    rnnfast_error: float
    worst: str  # the result that is furthest off, measured by what is allowed for it
    agrees: bool
    calls: int  # of rnnfast's layers
    torch_s: float
    rnnfast_s: float

    @property
    def speed(self) -> float:
        return self.torch_s / self.rnnfast_s


def compare(client: Client, rounds: int) -> Comparison:
    """Runs `client` once with each kind of layer for its results, then `rounds` times in turns for the time."""
    exact, by_torch = client(_to_float64)(), client(_leave)()
    with mock.patch.object(rnnfast._autograd.op, "recurrent", wraps=rnnfast._autograd.op.recurrent) as recurrent:
        ours = client(rnnfast.convert)()
    errors = {name: (_error(by_torch[name], exact[name]), _error(ours[name], exact[name])) for name in exact}
    worst = max(errors, key=lambda name: errors[name][1] / _allowed(errors[name][0]))
    torch_error, rnnfast_error = errors[worst]
    torch_s, rnnfast_s = _time_in_turns([functools.partial(client, swap) for swap in (_leave, rnnfast.convert)], rounds)
    return Comparison(
        torch_error,
        rnnfast_error,
        worst,
        rnnfast_error <= _allowed(torch_error),
        recurrent.call_count,
        torch_s,
        rnnfast_s,
    )


def _allowed(torch_error: float) -> float:
    return FACTOR * max(torch_error, EPS)


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the difference relative to that of `exact`; NaN, which agrees with nothing, if either has one."""
    result, exact = result.detach().double(), exact.detach().double()
    if result.shape != exact.shape:
        raise AssertionError(f"shape {tuple(result.shape)} in place of {tuple(exact.shape)}")
    length = exact.norm().item()
    return (result - exact).norm().item() / (length or 1.0)


def _time_in_turns(starts: list[Callable[[], Steps]], rounds: int) -> list[float]:
    """Median CPU time of the steps that each of `starts` returns: wall time counts who computes beside, too."""
    samples: list[list[float]] = [[] for _ in starts]
    for _ in range(rounds):
        for start, times in zip(starts, samples, strict=True):
            steps = start()
            before = time.process_time()
            steps()
            times.append(time.process_time() - before)
    return [statistics.median(times) for times in samples]


def _leave(model: torch.nn.Module) -> torch.nn.Module:
    return model


def _to_float64(model: torch.nn.Module) -> torch.nn.Module:
    """Let every recurrent layer of `model` compute in float64 and round what it returns: the class is swapped in place,
    as rnnfast.convert does."""
    for layer in model.modules():
        for base, exact in _EXACT.items():
            if isinstance(layer, base):
                layer.__class__ = _below(type(layer), exact)
    return model


@functools.cache
def _below(cls: type, exact: type) -> type:
    """`cls` with `exact` between it and torch's layer, which both are subclasses of."""
    return types.new_class(cls.__name__, (exact,) if cls in _EXACT else (cls, exact))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.to(dtype))
    if isinstance(value, (tuple, list)):
        return tuple(_cast(one, dtype) for one in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _make_exact(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def forward(self: torch.nn.Module, input: Any, hx: Any = None) -> Any:
        weights = {name: weight.double() for name, weight in self.named_parameters()}
        plain = object.__new__(base)  # the same layer, with forward as torch has it
        plain.__dict__ = vars(self) | {"_parameters": dict(self._parameters)}
        if hasattr(plain, "_flat_weights"):
            plain._flat_weights = list(self._flat_weights)
        return _cast(
            torch.func.functional_call(plain, weights, (_cast(input, torch.double), _cast(hx, torch.double))),
            torch.float32,
        )

    return type(base.__name__, (base,), {"forward": forward})


_EXACT = {base: _make_exact(base) for base in (torch.nn.LSTM, torch.nn.RNN, torch.nn.LSTMCell, torch.nn.RNNCell)}
