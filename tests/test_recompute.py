"""recompute: the plain call's numbers and gradients, in the memory of a few segments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_resets import B, H, I, T, drawn, every_layer, leaves, make
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import fallback
from rnnfast._backends import schema


def results(layer: Any, at: list[Tensor], *args: Any, **more: Any) -> list[Tensor]:
    torch.manual_seed(3)
    y, state = layer(*args, **more)
    y = y.data if hasattr(y, "batch_sizes") else y
    outputs = [y, *(state if isinstance(state, tuple) else (state,))]
    total = sum((torch.randn_like(t) * t).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(total, at, retain_graph=True)]


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(got), list(want), rtol=1e-11, atol=1e-11)


@every_layer
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("how", ["padded", "packed", "resets"])
def test_the_plain_calls_gradients(kind: str, L: int, D: int, how: str) -> None:
    layer = make(kind, num_layers=L, bidirectional=D == 2)
    x, hx, resets = drawn(layer)
    at = leaves(layer, x, hx)
    given: Any = pack_padded_sequence(x, torch.tensor([9, 4, 3, 1])) if how == "packed" else x
    mask = resets if how == "resets" else None
    if mask is not None and D == 2:
        layer.recompute = 3
        with pytest.raises(NotImplementedError, match="resets and given initial states"):
            layer(given, hx, resets=mask)
        hx, at = None, [x, *layer.parameters()]
        layer.recompute = None
    want = results(layer, at, given, hx, resets=mask)
    for recompute in (1, 4, T, "sqrt"):
        layer.recompute = recompute
        assert_close(results(layer, at, given, hx, resets=mask), want)


def test_dropouts_masks() -> None:
    for D in (1, 2):
        layer = make("LSTM", num_layers=3, bidirectional=D == 2, dropout=0.5)
        x, hx, _ = drawn(layer)
        at = leaves(layer, x, hx)
        want = results(layer, at, x, hx)
        layer.recompute = 2
        assert_close(results(layer, at, x, hx), want)


def test_nothing_is_kept_but_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps' reserves there are at a time, of 100 steps: those of a segment."""
    kept = []
    forward = schema.forward

    def spy(stack, inputs, constants, keep):
        outputs, reserve = forward(stack, inputs, constants, keep)
        kept.append(0 if reserve is None else len(inputs.x))
        return outputs, reserve

    monkeypatch.setattr(schema, "forward", spy)
    layer = rnnfast.GRU(I, H, recompute="sqrt")
    x = torch.randn(100, B, I, requires_grad=True)
    layer(x)[0].sum().backward()
    assert max(kept) == 10 and sum(kept) == 100
    with torch.no_grad():
        kept.clear()
        layer(x)
        assert kept == [0]  # one call where nothing is differentiated


def test_an_option_that_stays() -> None:
    layer = rnnfast.LSTM(I, H, recompute=7)
    assert layer.recompute == 7 and rnnfast.LSTM(I, H).recompute is None
    assert copy.deepcopy(layer).recompute == 7 and pickle.loads(pickle.dumps(layer)).recompute == 7
    model = torch.nn.Sequential(layer)
    rnnfast.convert(rnnfast.revert(model))
    assert type(model[0]) is rnnfast.LSTM and model[0].recompute == 7
    assert rnnfast.LeakyRNN(I, H, recompute="sqrt").recompute == "sqrt"


@pytest.mark.parametrize("bad", [0, -1, "squirt", 2.5, True])
def test_bad_values(bad: Any) -> None:
    layer = rnnfast.LSTM(I, H)
    layer.recompute = bad
    with pytest.raises(ValueError, match="recompute: expected None, a number of steps from 1 on, or 'sqrt', got"):
        layer(torch.randn(T, B, I, requires_grad=True))


@pytest.mark.filterwarnings("ignore::rnnfast.modules.FallbackWarning")
def test_second_derivatives() -> None:
    fallback._warned.clear()
    layer = make("GRU")
    x, hx, _ = drawn(layer)
    at, both = leaves(layer, x, hx), []
    for recompute in (None, 4):
        layer.recompute = recompute
        firsts = torch.autograd.grad(layer(x, hx)[0].sin().sum(), at, create_graph=True)
        both.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), at))
    assert_close(*both)


def test_compiled() -> None:
    layer = rnnfast.LSTM(I, H, recompute=4)
    x = torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x)[0], backend="aot_eager", fullgraph=True)
    at = [x, *layer.parameters()]
    got, want = (torch.autograd.grad(f(x).sin().sum(), at) for f in (compiled, lambda x: layer(x)[0]))
    torch.testing.assert_close(got, want)
