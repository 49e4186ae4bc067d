"""What looks at a model while it runs: dispatch modes, profilers, functionalization, tracing. They see the ops of
rnnfast._backends.schema, in derivatives too, and change no result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast


class Seen(TorchDispatchMode):
    """Which of rnnfast's ops were called?"""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rnnfast":
            self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def layer() -> rnnfast.LSTM:
    torch.manual_seed(0)
    return rnnfast.LSTM(3, 4, 2, dtype=torch.float64)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)


def penalty(layer: rnnfast.LSTM, x: Tensor) -> tuple[Tensor, ...]:
    (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), list(layer.parameters()))


def along_x(layer: rnnfast.LSTM, x: Tensor) -> Tensor:
    return jvp(lambda x: layer(x)[0], (x.detach(),), (x.detach(),))[1]


def along_all(layer: rnnfast.LSTM, x: Tensor) -> Tensor:
    weights = {name: w.detach() for name, w in layer.named_parameters()}
    run = torch.func.functional_call
    return jvp(lambda w, x: run(layer, w, (x,))[0], (weights, x.detach()), (weights, x.detach()))[1]


def test_modes_see_every_kernel(layer: rnnfast.LSTM, x: Tensor) -> None:
    """And the same kernels run as without: results are equal bit by bit."""
    for function, names in (
        (penalty, {"forward", "backward_adjoints", "second_local", "backward_saved"}),
        (along_x, {"forward_dual"}),
        (along_all, {"forward", "tangent"}),
    ):
        grad_needed = function is penalty
        layer.requires_grad_(grad_needed)
        want = function(layer, x)
        with Seen() as seen:
            got = function(layer, x)
        assert seen.names == names
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_mode_entered_between_the_derivatives(layer: rnnfast.LSTM, x: Tensor) -> None:
    (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with Seen() as seen:
        got = torch.autograd.grad(g.square().sum(), list(layer.parameters()))
    assert seen.names == {"second_local", "backward_saved"}
    torch.testing.assert_close(got, penalty(layer, x), rtol=0, atol=0)


def test_profiler_names_the_calls(layer: rnnfast.LSTM, x: Tensor) -> None:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        with torch.no_grad():
            layer(x)
        layer(x)[0].sum().backward()
    shapes = [event.input_shapes[0] for event in profiler.events() if event.name == "rnnfast::forward"]
    assert shapes == [[5, 2, 3]] * 2
    assert "rnnfast::backward" in {event.name for event in profiler.events()}


def test_functionalize(layer: rnnfast.LSTM, x: Tensor) -> None:
    """Changes in place before and behind the layer, alone, in a graph, under and over the other transforms."""
    x = x.detach()

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        x[0].mul_(2)
        y = layer(x)[0].clone()
        y[0].add_(1)
        return y.square()

    def loss(x: Tensor) -> Tensor:
        return run(x).sum()

    def tangent(x: Tensor) -> Tensor:
        return jvp(run, (x,), (x,))[1]

    want, want_grad, want_tangent = run(x), grad(loss)(x), tangent(x)
    leaf = x.clone().requires_grad_()
    graph = make_fx(functionalize(run))(x)
    pairs = [
        (functionalize(run)(x), want),
        (graph(x), want),
        (torch.autograd.grad(functionalize(run)(leaf).sum(), leaf)[0], want_grad),
        (functionalize(grad(loss))(x), want_grad),
        (grad(functionalize(loss))(x), want_grad),
        (functionalize(tangent)(x), want_tangent),
        (functionalize(vmap(run))(x[None])[0], want),
        (vmap(functionalize(run))(x[None])[0], want),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
    assert torch.ops.rnnfast.forward.default in {node.target for node in graph.graph.nodes}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_graph_of_second_derivatives(mode: str, layer: rnnfast.LSTM, x: Tensor) -> None:
    weights = [w.detach() for w in layer.parameters()]

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weights = [w.detach().requires_grad_() for w in weights]
        x = x.detach().requires_grad_()
        y = rnnfast._autograd.op.recurrent("LSTM", x, None, None, None, weights, 2, False, True)[0]
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), weights)

    graph = make_fx(run, tracing_mode=mode)(x, *weights)
    torch.testing.assert_close(graph(x, *weights), penalty(layer, x))
