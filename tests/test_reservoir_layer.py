"""EchoState.module under everything that traces, transforms or copies it: the numbers and gradients of eager mode, or a
clear error. No address of the compiled core may cross a graph."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from rnnfast.reservoir import EchoState, EchoStateLayer

UNITS = 7


def fitted(dtype: str = "float64", **options) -> EchoState:
    x = np.random.default_rng(0).normal(size=(150, 2))
    esn = EchoState(2, UNITS, 2, **({"density": 0.4, "leak": 0.5, "bias_scale": 0.4, "dtype": dtype} | options))
    return esn.fit(x, np.roll(x, 1, axis=0), ridge=1e-2, washout=20)


def trainable(dtype: str = "float64", **options) -> EchoStateLayer:
    return fitted(dtype, **options).module().requires_grad_()


def inputs(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, 2, generator=torch.Generator().manual_seed(B * T), dtype=dtype)


def loss(layer, x: Tensor) -> Tensor:
    y, h = layer(x)
    return y.square().sum() + h.sum()


def gradients(layer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    weights = list(layer.parameters())
    return [loss(layer, x).detach(), *torch.autograd.grad(loss(layer, x), [x, *weights])]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ torch.compile, torch.export


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend, dtype", [("eager", "float64"), ("aot_eager", "float32")])
def test_one_graph_for_all_sizes(backend: str, dtype: str) -> None:
    layer = trainable(dtype)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for i, (B, T) in enumerate([(4, 10), (3, 7)]):
        x = inputs(B, T, getattr(torch, dtype))
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = gradients(compiled, x)
        torch.testing.assert_close(got, gradients(layer, x))
    torch.testing.assert_close(compiled(x[0]), layer(x[0]))  # (T,I)


@pytest.mark.usefixtures("fresh_compiler")
def test_graphs_that_break() -> None:
    """Without fullgraph; a break before and after the layer."""
    layer = trainable()

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        y, h = layer(x)
        torch._dynamo.graph_break()
        return y.square().sum() + h.sum()

    torch.testing.assert_close(run(inputs(3, 8)), loss(layer, inputs(3, 8)))


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    layer, x = trainable("float32"), inputs(3, 6, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_inside_compile() -> None:
    layer, x = trainable(), inputs(2, 5)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: loss(layer, x))(x)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_autocast() -> None:
    """The reservoir in its own precision; the readout as autocast has it."""
    layer, x = trainable("float32"), inputs(2, 5, torch.float32)
    with torch.autocast("cpu"):
        y, h = layer(x.bfloat16().float())
        again, state = layer(x.bfloat16())
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(h, layer(x.bfloat16().float())[1])
    assert torch.equal(y, again) and torch.equal(h, state)
    torch.testing.assert_close(compiled, (y, h), rtol=0, atol=0)
    grads = torch.autograd.grad(y.float().sum(), list(layer.parameters()))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.usefixtures("fresh_compiler")
def test_estimators_inside_compile() -> None:
    """They run as they are; in one graph they cannot, which is an error."""
    esn, x = fitted(), inputs(1, 40)[0]

    def run(x: Tensor) -> list[Tensor]:
        other = EchoState(2, 10, 2, density=0.5).fit(x, x, washout=5)
        other.partial_fit(x, x, forgetting=0.9)
        numbers = other.W_.toarray(), other.W_out_, other.effective_spectral_radius(), other.score(x, x)
        return [
            esn.predict(2 * x) + 1,
            esn.states(x),
            esn.generate(3),
            esn.state_,
            esn.module()(x)[0],
            *map(torch.as_tensor, numbers),
        ]

    got, want = torch.compile(run, backend="aot_eager")(x), run(x)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="predict"):
        torch.compile(lambda x: esn.predict(x), backend="eager", fullgraph=True)(x)


def test_export_save_load(tmp_path) -> None:
    layer = fitted().module()
    dims = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    exported = torch.export.export(layer, (inputs(4, 5),), dynamic_shapes=(dims,))
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(loaded(inputs(3, 11)), layer(inputs(3, 11)))


# ------------------------------------------------------------------------------------------ weights that are not dense


def test_weights_in_any_layout() -> None:
    """Columns first, as a part of a wider tensor, with the sign still to be changed."""
    layer, x = trainable(), inputs(2, 6)
    want = layer(x)
    layouts = {
        "columns first": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
        "a part": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "negated": lambda t: torch._neg_view(-t),
    }
    for change in layouts.values():
        weights = {name: change(weight.detach()) for name, weight in layer.named_parameters()}
        torch.testing.assert_close(torch.func.functional_call(layer, weights, (change(x),)), want)
    esn = fitted()
    assert np.array_equal(esn.predict(torch._neg_view(-x)), esn.predict(x))


def test_copies() -> None:
    layer, x = trainable(), inputs(2, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(gradients(other, x), gradients(layer, x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer).float()(x.float())[0].double(), layer(x)[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ torch.func, higher orders


def test_vmap() -> None:
    layer, x = trainable(), inputs(4, 6)
    want = layer(x)[0]
    torch.testing.assert_close(torch.func.vmap(lambda x: layer(x)[0])(x), want)
    torch.testing.assert_close(torch.func.vmap(lambda x: layer(x)[0], in_dims=1)(x.transpose(0, 1)), want)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(lambda x: torch.func.functional_call(layer, weights, (x,)), x)

    each = torch.func.vmap(torch.func.grad(run), in_dims=(None, 0))(weights, x)
    for name, gradient in zip(weights, gradients(layer, x)[2:], strict=True):
        torch.testing.assert_close(each[name].sum(0), gradient)
    stacked = {name: torch.stack([weight, 0.9 * weight]) for name, weight in weights.items()}
    both = torch.func.vmap(run, in_dims=(0, None))(stacked, x)
    smaller = {name: 0.9 * weight for name, weight in weights.items()}
    torch.testing.assert_close(both, torch.stack([run(weights, x), run(smaller, x)]))


@pytest.mark.parametrize("unit", ["tanh", "relu", "identity"])
def test_second_derivatives(unit: str) -> None:
    layer = trainable(unit=unit, spectral_radius=0.5)
    names = [name for name, _ in layer.named_parameters()]

    def outputs(x: Tensor, *weights: Tensor):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(outputs, (inputs(2, 3).requires_grad_(), *layer.parameters()))
    x = inputs(1, 3)
    hessians = [
        torch.func.jacrev(torch.func.jacrev(lambda x: loss(layer, x)))(x),
        torch.autograd.functional.hessian(lambda x: loss(layer, x), x),
    ]
    torch.testing.assert_close(*hessians)


def test_forward_mode_is_an_error() -> None:
    layer, x = trainable(), inputs(2, 3)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    with pytest.raises(NotImplementedError, match="jvp"), torch.no_grad(), torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))


# ------------------------------------------------------------------------------------------ odd inputs


def test_no_sequences() -> None:
    layer, x = trainable(), inputs(2, 6)[:0]
    assert [tuple(t.shape) for t in layer(x)] == [(0, 6, 2), (0, UNITS)]
    assert all(bool((g == 0).all()) for g in gradients(layer, x))


def test_meta() -> None:
    """Shapes without numbers, as other layers give them."""
    layer = trainable().to("meta")
    assert [tuple(t.shape) for t in layer(inputs(3, 6).to("meta"))] == [(3, 6, 2), (3, UNITS)]


def test_clear_errors() -> None:
    layer, x = trainable(), inputs(3, 6)
    half = copy.deepcopy(layer).half()
    for call, kind, message in [
        (lambda: layer(x.float()), RuntimeError, "x.*float64.*float32"),
        (lambda: layer(x.half()), RuntimeError, "x.*float64.*float16"),
        (lambda: layer(x.long()), RuntimeError, "x.*float64.*int64"),
        (lambda: layer(x.to(torch.complex128)), RuntimeError, "x.*float64.*complex128"),
        (lambda: half(x.half()), RuntimeError, "float32 or float64.*float16"),
        (lambda: layer(x.to("meta")), RuntimeError, "x.*on cpu.*on meta"),
        (lambda: layer(x, torch.zeros(3, UNITS, dtype=x.dtype, device="meta")), RuntimeError, "h0.*on cpu.*on meta"),
        (lambda: layer(x, torch.zeros(3, UNITS)), RuntimeError, "h0.*float64.*float32"),
        (lambda: layer(x, x.new_zeros(UNITS)), ValueError, r"h0.*\(3, 7\).*\(7,\)"),
        (lambda: layer(x[0], x.new_zeros(3, UNITS)), ValueError, r"h0.*\(7,\).*\(3, 7\)"),
        (lambda: layer(x[..., :1]), ValueError, r"x.*\(T,2\).*\(3, 6, 1\)"),
        (lambda: layer(x[None]), ValueError, r"x.*\(T,2\).*\(1, 3, 6, 2\)"),
        (lambda: layer(x[:, :0]), RuntimeError, r"at least one step.*\(3, 0, 2\)"),
        (lambda: layer(x.numpy()), TypeError, "Tensor.*ndarray"),
    ]:
        with pytest.raises(kind, match=message):
            call()
