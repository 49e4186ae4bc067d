"""Initial states in a tuple of any type: a list, a NamedTuple, torch's own; they count as torch.nn.LSTM counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast
from rnnfast._autograd import op


class State(NamedTuple):
    h: Tensor
    c: Tensor


class Falsy(tuple):
    """A tuple by which a state has more to say than its length."""

    def __new__(cls, *tensors: Tensor) -> Falsy:
        return super().__new__(cls, tensors)

    def __bool__(self) -> bool:
        return False


TUPLES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda h, c: [h, c],
    "named": State,
    "torchs": lambda h, c: torch.return_types.aminmax((h, c)),
    "own": Falsy,
}


def tensors(result: Any) -> list[Tensor]:
    output, (h, c) = result
    return [output.data if isinstance(output, PackedSequence) else output, h, c]


@pytest.mark.parametrize("name", TUPLES)
@pytest.mark.parametrize("kind", ["padded", "batch_first", "unbatched", "packed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_tuples(name: str, kind: str, autocast: torch.dtype | None, monkeypatch) -> None:
    calls, recurrent = [], op.recurrent
    monkeypatch.setattr(op, "recurrent", lambda *args: calls.append(args) or recurrent(*args))
    torch.manual_seed(0)
    layer = rnnfast.LSTM(3, 4, 2, batch_first=kind == "batch_first")
    x: Any = torch.randn((5, 3) if kind == "unbatched" else (2, 2, 3))
    if kind == "packed":
        x = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    states = torch.randn(2, *(() if kind == "unbatched" else (2,)), 2, 4).unbind(-2)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        expected, got, without = tensors(layer(x, states)), tensors(layer(x, TUPLES[name](*states))), tensors(layer(x))
    assert all(map(torch.equal, got, expected)) and not torch.equal(got[0], without[0]) and len(calls) == 3
