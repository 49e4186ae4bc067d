"""unroll: every state and gate of a call, and a gradient for each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_resets import LAYERS, B, H, I, T, drawn, every_layer, gradients, leaves, make, of
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import fallback


@pytest.fixture(autouse=True)
def quiet(recwarn):
    fallback._warned.clear()


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(got), list(want), rtol=1e-11, atol=1e-11)


def parts(unrolled: Any) -> list[Tensor]:
    return [t for t in unrolled[2:] if t is not None]


@every_layer
def test_shapes_and_meaning(kind: str) -> None:
    layer = make(kind, num_layers=2, bidirectional=True)
    x, hx, _ = drawn(layer)
    u, (y, state) = layer.unroll(x, hx), layer(x, hx)
    R = layer.proj_size or H
    G = {"LSTM": 4, "projected": 4, "GRU": 3, "LeakyRNN": 1}.get(kind)
    assert torch.equal(u.output, y) and u.h.shape == (4, T, B, R)
    assert (u.c is None) == (layer.mode != "LSTM") and (u.gates is None) == (kind == "RNN")
    assert torch.equal(torch.cat([u.h[2], u.h[3]], -1), y)  # the top layer
    ends = [u.h[i][-1 if i % 2 == 0 else 0] for i in range(4)]
    h_n = state[0] if isinstance(state, tuple) else state
    assert torch.equal(torch.stack(ends), h_n)
    if u.c is not None:
        assert u.c.shape == (4, T, B, H)
        assert torch.equal(torch.stack([u.c[i][-1 if i % 2 == 0 else 0] for i in range(4)]), state[1])
    if u.gates is not None:
        assert u.gates.shape == (4, T, B, G, H)


def test_gates_are_torchs() -> None:
    """Each equation of the docstrings, from what unroll gives."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    lstm = make("LSTM")
    u = lstm.unroll(x)
    i, f, g, o = u.gates[0].unbind(2)
    before = torch.cat([torch.zeros_like(u.c[0, :1]), u.c[0, :-1]])
    assert_close([u.c[0], u.h[0]], [f * before + i * g, o * u.c[0].tanh()])
    w, h = lstm.weight_ih_l0, torch.cat([torch.zeros_like(u.h[0, :1]), u.h[0, :-1]])
    z = x @ w.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
    assert_close([i, g], [z[..., :H].sigmoid(), z[..., 2 * H : 3 * H].tanh()])
    gru = make("GRU")
    u = gru.unroll(x)
    r, z, n = u.gates[0].unbind(2)
    h = torch.cat([torch.zeros_like(u.h[0, :1]), u.h[0, :-1]])
    zx, zh = x @ gru.weight_ih_l0.T + gru.bias_ih_l0, h @ gru.weight_hh_l0.T + gru.bias_hh_l0
    assert_close([r, z], [(zx + zh)[..., k * H : (k + 1) * H].sigmoid() for k in (0, 1)])
    assert_close([n, u.h[0]], [(zx[..., 2 * H :] + r * zh[..., 2 * H :]).tanh(), (1 - z) * n + z * h])


@every_layer
@pytest.mark.parametrize("how", ["padded", "packed", "resets"])
def test_a_gradient_for_each(kind: str, how: str) -> None:
    """Against torch's operators, one part at a time and all at once."""
    layer = make(kind, num_layers=2, bidirectional=True)
    x, hx, resets = drawn(layer)
    given: Any = pack_padded_sequence(x, torch.tensor([9, 7, 4, 1])) if how == "packed" else x
    mask = resets if how == "resets" else None
    u = layer.unroll(given, hx, resets=mask)
    operators = jvp_free(layer, given, hx, mask)
    at = leaves(layer, x, hx)
    assert_close(parts(u), parts(operators))
    for got, want in zip(parts(u), parts(operators), strict=True):
        assert_close(gradients(got, at), gradients(want, at))
    both = [sum((t.sin() * k).sum() for k, t in enumerate(parts(one), 1)) for one in (u, operators)]
    both = [
        total + (one.output.data if how == "packed" else one.output).cos().sum()
        for total, one in zip(both, (u, operators), strict=True)
    ]
    assert_close(*(torch.autograd.grad(total, at, retain_graph=True) for total in both))


def jvp_free(layer: Any, x: Any, hx: Any, mask: Any) -> Any:
    """The same layer.unroll, by torch's operators alone."""
    read, layer._read = layer._read, lambda *args: None
    try:
        return layer.unroll(x, hx, resets=mask)
    finally:
        layer._read = read


@every_layer
def test_layouts(kind: str) -> None:
    """Time comes first always; one sequence has no batch; without a graph the same numbers."""
    layer, turned = make(kind, num_layers=2), make(kind, num_layers=2, batch_first=True)
    turned.load_state_dict(layer.state_dict())
    x, hx, _ = drawn(layer)
    u, v = layer.unroll(x, hx), turned.unroll(x.transpose(0, 1), hx)
    assert torch.equal(v.output.transpose(0, 1), u.output) and all(map(torch.equal, parts(u), parts(v)))
    one = layer.unroll(x[:, 1], of(hx, lambda s: s[:, 1]))
    assert_close(parts(one), [t[:, :, 1] for t in parts(u)])
    with torch.no_grad():
        assert all(map(torch.equal, parts(layer.unroll(x, hx)), parts(u)))
    packed = layer.unroll(pack_padded_sequence(x, torch.tensor([9, 9, 9, 9])), hx)
    assert all(torch.equal(a, b.flatten(1, 2)) for a, b in zip(parts(packed), parts(u), strict=True))


@pytest.mark.filterwarnings("ignore::rnnfast.modules.FallbackWarning")
@every_layer
def test_second_derivatives_and_transforms(kind: str) -> None:
    layer = make(kind)
    x, hx, _ = drawn(layer)
    at, results = leaves(layer, x, hx), []
    for u in (layer.unroll(x, hx), jvp_free(layer, x, hx, None)):
        total = sum(t.sin().sum() for t in parts(u))
        firsts = torch.autograd.grad(total, at, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), at))
    assert_close(*results)
    state = of(hx, Tensor.detach)
    function = lambda x: parts(layer.unroll(x, state))[-1]  # noqa: E731
    v = torch.randn_like(x)
    got, eps = jvp(function, (x.detach(),), (v,))[1], 1e-6
    step = (function(x.detach() + eps * v) - function(x.detach() - eps * v)) / (2 * eps)
    torch.testing.assert_close(got, step.detach(), rtol=1e-6, atol=1e-8)
    each = vmap(grad(lambda x: layer.unroll(x)[2].sum()), 1)(x.detach())
    alone = grad(lambda x: layer.unroll(x)[2].sum())(x[:, 2].detach())
    assert_close([each[2]], [alone])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiled(kind: str) -> None:
    layer = LAYERS[kind](I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(lambda x: parts(layer.unroll(x)), backend="aot_eager", fullgraph=True)
    at = [x, *layer.parameters()]
    got, want = (sum(t.sin().sum() for t in some) for some in (compiled(x), parts(layer.unroll(x))))
    torch.testing.assert_close(torch.autograd.grad(got, at), torch.autograd.grad(want, at))


@pytest.mark.filterwarnings("ignore::rnnfast.modules.FallbackWarning")
def test_numbers_without_a_kernel() -> None:
    layer = rnnfast.LSTM(I, H, dtype=torch.complex64)
    u = layer.unroll(torch.randn(T, B, I, dtype=torch.complex64))
    assert u.c is not None and u.c.dtype == torch.complex64 and u.gates is not None
    with pytest.raises(RuntimeError, match="size"):
        layer.unroll(torch.randn(T, B, I + 1, dtype=torch.complex64))
