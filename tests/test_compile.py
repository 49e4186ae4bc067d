"""torch.compile and torch.export of models with rnnfast layers: one graph, any T and B, results as in eager mode."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast


class Model(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = torch.nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.layer(x)[0])


def models() -> list[Model]:
    torch.manual_seed(0)
    return [
        Model(rnnfast.LSTM(5, 8, 2, bidirectional=True), 16),
        Model(rnnfast.LSTM(5, 8, proj_size=3, batch_first=True), 3),
        Model(rnnfast.RNN(5, 8, nonlinearity="relu"), 8),
    ]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model", models(), ids=["lstm", "projected", "relu"])
def test_one_graph_for_all_sizes(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = [(7, 3), (9, 4), (20, 2), (50, 8)]
    for i, (T, B) in enumerate(sizes):
        x = torch.randn(T, B, 5)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(x)
            got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        want_y = model(x)
        want = torch.autograd.grad(want_y.square().sum(), list(model.parameters()))
        torch.testing.assert_close(y, want_y, rtol=1e-6, atol=1e-6)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inference_by_inductor() -> None:
    model, x = models()[0], torch.randn(6, 2, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_autocast(name: str) -> None:
    layer, x = getattr(rnnfast, name)(5, 8), torch.randn(6, 2, 5)
    with torch.autocast("cpu"):
        want = layer(x)[0]
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    weights = list(layer.parameters())
    grads = [torch.autograd.grad(y.float().sum(), weights) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_transforms_inside_compile() -> None:
    model, x = models()[0], torch.randn(6, 2, 5)

    def gradient(x):
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    def tangent(x):
        return torch.func.jvp(model, (x,), (x.cos(),))[1]

    for function in (gradient, tangent):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)


def test_export_save_load(tmp_path) -> None:
    model = models()[0].eval()
    dims = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    exported = torch.export.export(model, (torch.randn(4, 3, 5),), dynamic_shapes=(dims,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(11, 2, 5)
    torch.testing.assert_close(loaded(x), model(x))


def test_compiled_packed_sequence() -> None:
    layer = rnnfast.LSTM(5, 8)
    packed = pack_padded_sequence(torch.randn(6, 3, 5), torch.tensor([6, 2, 4]), enforce_sorted=False)

    def run(data, batch_sizes, h0, c0):
        weights = list(layer._flat_weights)
        return rnnfast._autograd.op.recurrent("LSTM", data, batch_sizes, h0, c0, weights, 1, False, True)[0]

    states = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(packed.data, packed.batch_sizes, *states)
    torch.testing.assert_close(got, run(packed.data, packed.batch_sizes, *states))
