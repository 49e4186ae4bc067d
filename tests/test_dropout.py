"""Dropout between layers under vmap: masks are drawn as those of torch.nn.functional.dropout are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast

K, L = 3, 3


def stack(p: float) -> rnnfast.LSTM:
    return rnnfast.LSTM(4, 4, L, dropout=p, dtype=torch.float64)


class ByHand(nn.Module):
    """The same stack of single layers, with torch's dropout between them."""

    def __init__(self, layer: rnnfast.LSTM) -> None:
        super().__init__()
        self.p, self.layers = layer.dropout, nn.ModuleList()
        for k in range(L):
            single = rnnfast.LSTM(4, 4, dtype=torch.float64)
            for name in single._flat_weights_names:
                setattr(single, name, getattr(layer, name.replace("l0", f"l{k}")))
            self.layers.append(single)

    def forward(self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor]:
        for k, layer in enumerate(self.layers):
            if k > 0 and isinstance(x, PackedSequence):
                x = PackedSequence(F.dropout(x.data, self.p), *x[1:])
            elif k > 0:
                x = F.dropout(x, self.p)
            x, _ = layer(x, hx if hx is None else (hx[0][k : k + 1], hx[1][k : k + 1]))
        return (x,)


def of_input(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda k: model(x + k)[0]


def of_states(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda k: model(x, (h + k, h))[0]


def of_nothing(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda k: model(x)[0] + k


def of_packed(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    packed = pack_sequence([x[:4, 0], x[:2, 1]])
    return lambda k: model(PackedSequence(packed.data + k, *packed[1:]))[0].data


def of_gradient(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda k: grad(lambda h: model(x, (h, h))[0].square().sum())(h + k)


def of_tangent(model: nn.Module, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda k: jvp(lambda x: model(x, (h + k, h))[0], (x,), (x.cos(),))[1]


@pytest.mark.parametrize("p", [0.4, 1])
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("mapped", [of_input, of_states, of_nothing, of_packed, of_gradient, of_tangent])
def test_masks_of_samples(mapped: Callable, randomness: str, p: float) -> None:
    """Shared or not as asked for, whatever is mapped; and those that torch draws from this seed."""
    torch.manual_seed(0)
    layer, x, h = stack(p), torch.randn(5, 2, 4, dtype=torch.float64), torch.randn(L, 2, 4, dtype=torch.float64)
    shifts = torch.zeros(K, dtype=torch.float64)
    results = []
    for model in (layer, ByHand(layer)):
        torch.manual_seed(1)
        results.append(vmap(mapped(model, x, h), randomness=randomness)(shifts))
    torch.testing.assert_close(*results)
    assert torch.equal(results[0][0], results[0][1]) == (randomness == "same" or p == 1)


@pytest.mark.parametrize("mapped", [of_input, of_states, of_nothing, of_packed])
def test_no_randomness_asked_for(mapped: Callable) -> None:
    x, h = torch.randn(5, 2, 4, dtype=torch.float64), torch.randn(L, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(mapped(stack(0.4), x, h))(x.new_zeros(K))
    for quiet in (stack(0.4).eval(), stack(1), stack(0)):
        vmap(mapped(quiet, x, h))(x.new_zeros(K))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_ensemble(randomness: str) -> None:
    """Mapped weights, an input that all share, and gradients of each."""
    torch.manual_seed(0)
    layer, x = stack(0.4), torch.randn(5, 2, 4, dtype=torch.float64)
    weights, _ = stack_module_state([layer] * K)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, weights, (x,))[0].square().sum()

    torch.manual_seed(1)
    grads = vmap(grad(loss), randomness=randomness)(weights)["weight_ih_l1"]
    assert torch.equal(grads[0], grads[1]) == (randomness == "same")
    if randomness == "same":
        torch.manual_seed(1)
        expected = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_ih_l1)[0]
        torch.testing.assert_close(grads[0], expected)
