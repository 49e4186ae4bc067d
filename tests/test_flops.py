"""FlopCounterMode counts for rnnfast layers what it counts for torch's, where those run torch's matrix products: on the
CPU in float64. (In float32 torch.nn.LSTM is one call of oneDNN, which counts 0.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnnfast

T, B, I, H, P = 6, 3, 5, 7, 4  # noqa: E741
LENGTHS = (6, 4, 1)
LAYERS: dict[str, dict[str, Any]] = {
    "lstm": {"num_layers": 2, "bidirectional": True},
    "lstm-projected": {"num_layers": 2, "proj_size": P, "bias": False},
    "rnn": {"num_layers": 2, "nonlinearity": "relu"},
}


def flops(function: Callable[..., Any], *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def layer(library: Any, name: str) -> nn.Module:
    make = library.LSTM if name.startswith("lstm") else library.RNN
    return make(I, H, **LAYERS[name], dtype=torch.float64)


def states(layer: nn.Module, needed: bool) -> Any:
    if not needed:
        return None
    LD = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = (torch.randn(LD, B, n, dtype=torch.float64, requires_grad=True) for n in (layer.proj_size or H, H))
    return (h, c) if layer.mode == "LSTM" else h


def run(layer: nn.Module, x: Tensor, packed: bool = False, hx: Any = None) -> Tensor:
    return layer(pack_padded_sequence(x, LENGTHS), hx)[0].data if packed else layer(x, hx)[0]


@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_first_derivatives(name: str, packed: bool, hx: bool) -> None:
    """Inference; all gradients, those of all weights, of x alone, of one weight alone."""
    x = torch.randn(T, B, I, dtype=torch.float64)

    def counts(library: Any) -> list[int]:
        one = layer(library, name)
        state = states(one, hx)

        def train(x: Tensor) -> None:
            run(one, x, packed, state).sum().backward()

        with torch.no_grad():
            found = [flops(run, one, x, packed, state)]
        found += [flops(train, x.clone().requires_grad_()), flops(train, x)]
        one.requires_grad_(False)
        found.append(flops(train, x.clone().requires_grad_()))
        one.weight_hh_l1.requires_grad_()
        return [*found, flops(train, x)]

    got = counts(rnnfast)
    assert got == counts(torch.nn) and all(got)


def test_by_hand() -> None:
    """Forward 2 m n k for W_ih and W_hh, backward twice that, but no gradients of x and of h_0."""
    N, x = T * B, torch.randn(T, B, I)
    one = rnnfast.LSTM(I, H)
    assert flops(one, x) == 2 * N * 4 * H * (I + H)
    back = 2 * N * 4 * H * (I + H) + 2 * (N - B) * 4 * H * H
    assert flops(lambda: one(x)[0].sum().backward()) == 2 * N * 4 * H * (I + H) + back
    cell = rnnfast.LSTMCell(I, H)
    assert flops(cell, x[0]) == 2 * B * 4 * H * (I + H)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name: str) -> None:
    """Of all weights, and of x: no more products than torch's operators take, whoever counts them."""
    x = torch.randn(T, B, I, dtype=torch.float64)

    def twice(one: nn.Module, x: Tensor, wanted: list[Tensor]) -> None:
        grads = torch.autograd.grad(run(one, x).square().sum(), wanted, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    def counts(library: Any) -> list[int]:
        one, leaf = layer(library, name), x.clone().requires_grad_()
        of_weights = flops(twice, one, x, list(one.parameters()))
        one.requires_grad_(False)
        return [of_weights, flops(twice, one, leaf * 1, [leaf])]

    assert counts(rnnfast) == counts(torch.nn)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode(name: str) -> None:
    """Along everything; along x alone torch multiplies with the zero tangents of the weights, too."""
    x = torch.randn(T, B, I, dtype=torch.float64)

    def counts(library: Any) -> int:
        one = layer(library, name)
        weights = {name: w.detach() for name, w in one.named_parameters()}
        hx = torch.utils._pytree.tree_map(torch.Tensor.detach, states(one, True))
        inputs = weights, x, hx
        return flops(jvp, lambda weights, x, hx: functional_call(one, weights, (x, hx))[0], inputs, inputs)

    assert counts(rnnfast) == counts(torch.nn)
    one = layer(rnnfast, name).requires_grad_(False)
    assert flops(run, one, x) < flops(jvp, lambda x: run(one, x), (x,), (x,)) < 2 * flops(run, one, x)


def test_by_module_and_compiled() -> None:
    model = nn.ModuleDict({"a": rnnfast.LSTM(I, H), "b": rnnfast.RNN(H, I)})

    def train(x: Tensor) -> None:
        model["b"](model["a"](x)[0])[0].sum().backward()

    x = torch.randn(T, B, I)
    with FlopCounterMode(display=False) as counter:
        train(x)
    found = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    assert found["LSTM"] + found["RNN"] == found["Global"] > found["LSTM"] > found["RNN"] > 0
    assert flops(torch.compile(train, backend="aot_eager"), x) == found["Global"]
    torch._dynamo.reset()
