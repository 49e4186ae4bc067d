"""Resets: every episode is a sequence of its own, in everything that a layer does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import fallback

T, B, I, H = 9, 4, 3, 5  # noqa: E741

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": rnnfast.LSTM,
    "projected": lambda *sizes, **how: rnnfast.LSTM(*sizes, proj_size=2, **how),
    "RNN": rnnfast.RNN,
    "GRU": rnnfast.GRU,
    "LeakyRNN": lambda *sizes, **how: rnnfast.LeakyRNN(*sizes, leak=0.4, learn_leak=True, **how),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str, **how: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind](I, H, dtype=torch.float64, **how)


def drawn(layer: Any, *, seed: int = 1) -> tuple[Tensor, Any, Tensor]:
    """x (T,B,I), hx, resets (T,B) with episodes of one step, sequences with none and with one at 0"""
    torch.manual_seed(seed)
    D = 2 if layer.bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(layer.num_layers * D, B, layer.proj_size or H, dtype=torch.float64, requires_grad=True)
    c = torch.randn(layer.num_layers * D, B, H, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[[3, 4, 0, 7], [0, 0, 1, 1]] = True
    resets[T - 1, 3] = True
    return x, (h, c) if layer.mode == "LSTM" else h, resets


def leaves(layer: Any, x: Tensor, hx: Any) -> list[Tensor]:
    return [x, *(hx if isinstance(hx, tuple) else (hx,)), *layer.parameters()]


def of(hx: Any, f: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(f, hx)) if isinstance(hx, tuple) else f(hx)


def by_episodes(layer: Any, x: Tensor, hx: Any, resets: Tensor, lengths: list[int] | None = None) -> Tensor:
    """y (T,B,D*R), episode by episode; only a layer of its own sees both ends of each."""
    columns = []
    for b in range(x.size(1)):
        end = T if lengths is None else lengths[b]
        starts = [0, *(t for t in range(1, end) if resets[t, b]), end]
        parts = []
        for start, stop in pairwise(starts):
            own = None
            if start == 0 and not resets[0, b] and hx is not None:
                own = of(hx, lambda s, b=b: s[:, b : b + 1])
            parts.append(layer(x[start:stop, b : b + 1], own)[0])
        columns.append(torch.cat([*parts, x.new_zeros(T - end, 1, parts[0].size(2))]))
    return torch.cat(columns, 1)


def one_layer(kind: str, D: int) -> tuple[Any, Tensor, Any, Tensor]:
    layer = make(kind, bidirectional=D == 2)
    return layer, *drawn(layer)


def gradients(y: Tensor, at: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), at, retain_graph=True)


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(got), list(want), rtol=1e-11, atol=1e-11)


@every_layer
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_each_episode_is_a_sequence(kind: str, D: int, given: bool) -> None:
    layer, x, hx, resets = one_layer(kind, D)
    if not given:
        hx = None
    y, want = layer(x, hx, resets=resets)[0], by_episodes(layer, x, hx, resets)
    assert_close([y], [want])
    at = leaves(layer, x, hx) if given else [x, *layer.parameters()]
    assert_close(gradients(y, at), gradients(want, at))


@every_layer
@pytest.mark.parametrize("D", [1, 2])
def test_packed(kind: str, D: int) -> None:
    """In an order that is not sorted, the mask packed as the input, or padded in the order before packing."""
    layer, x, hx, resets = one_layer(kind, D)
    lengths = [5, 9, 1, 8]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    mask = pack_padded_sequence(resets.float(), torch.tensor(lengths), enforce_sorted=False)
    mask = mask._replace(data=mask.data.bool())
    runs = [layer(packed, hx, resets=given)[0].data for given in (mask, resets)]
    assert torch.equal(*runs)
    want = pack_padded_sequence(by_episodes(layer, x, hx, resets, lengths), torch.tensor(lengths), enforce_sorted=False)
    assert_close([runs[0]], [want.data])
    at = leaves(layer, x, hx)
    assert_close(gradients(runs[0], at), gradients(want.data, at))


@every_layer
def test_layouts(kind: str) -> None:
    layer, x, hx, resets = one_layer(kind, 1)
    y, state = layer(x, hx, resets=resets)
    turned = make(kind, batch_first=True)
    turned.load_state_dict(layer.state_dict())
    other, _ = turned(x.transpose(0, 1), hx, resets=resets.T)
    assert torch.equal(other.transpose(0, 1), y)
    one, _ = layer(x[:, 0], of(hx, lambda s: s[:, 0]), resets=resets[:, 0])
    assert_close([one], [y[:, 0]])
    last = of(state, lambda s: s[-1])
    assert_close([(last[0] if isinstance(last, tuple) else last)], [y[-1]])


@every_layer
def test_steps_one_by_one(kind: str) -> None:
    """A rollout, with the mask of each step, is the whole sequence."""
    layer, x, hx, resets = one_layer(kind, 1)
    whole, want = layer(x, hx, resets=resets)
    state, steps = hx, []
    for t in range(T):
        y, state = layer(x[t : t + 1], state, resets=resets[t : t + 1])
        steps.append(y)
    assert_close([torch.cat(steps)], [whole])
    at = leaves(layer, x, hx)
    assert_close(gradients(torch.cat(steps), at), gradients(whole, at))
    assert_close(state if isinstance(state, tuple) else [state], want if isinstance(want, tuple) else [want])


@every_layer
@pytest.mark.parametrize("D", [1, 2])
def test_double_backward_and_forward_mode(kind: str, D: int) -> None:
    layer, x, hx, resets = one_layer(kind, D)
    at = leaves(layer, x, hx)
    second = []
    for y in (layer(x, hx, resets=resets)[0], by_episodes(layer, x, hx, resets)):
        firsts = torch.autograd.grad(y.sin().sum(), at, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), at, allow_unused=True))
    assert_close([g for g in second[0] if g is not None], [g for g in second[1] if g is not None])

    v = torch.randn_like(x)
    got = jvp(lambda x: layer(x, of(hx, Tensor.detach), resets=resets)[0], (x.detach(),), (v,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), v)
        want = torch.autograd.forward_ad.unpack_dual(by_episodes(layer, dual, of(hx, Tensor.detach), resets))
    assert_close(got, want)


@every_layer
def test_each_samples_gradient(kind: str) -> None:
    layer, x, _, resets = one_layer(kind, 1)
    weights = {name: w.detach() for name, w in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(layer, weights, (x.unsqueeze(1),), {"resets": mask.unsqueeze(1)})[0].square().sum()

    got = vmap(grad(loss), (None, 1, 1))(weights, x.detach(), resets)
    for b in range(B):
        want = grad(loss)(weights, x[:, b].detach(), resets[:, b])
        assert_close([got[name][b] for name in want], want.values())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_once(kind: str) -> None:
    layer = LAYERS[kind](I, H)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, mask: layer(x, resets=mask)[0], backend=backend, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        x, mask = torch.randn(T, B, I), torch.rand(T, B) < 0.3
        torch.testing.assert_close(compiled(x, mask), layer(x, resets=mask)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_training(kind: str) -> None:
    layer = LAYERS[kind](I, H)
    x, mask = torch.randn(T, B, I, requires_grad=True), torch.rand(T, B) < 0.3
    compiled = torch.compile(lambda x, mask: layer(x, resets=mask)[0], backend="aot_eager", fullgraph=True)
    at = [x, *layer.parameters()]
    torch.testing.assert_close(gradients(compiled(x, mask), at), gradients(layer(x, resets=mask)[0], at))


@pytest.mark.filterwarnings("ignore::rnnfast.modules.FallbackWarning")
def test_numbers_without_a_kernel() -> None:
    fallback._warned.clear()
    layer = rnnfast.GRU(I, H)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    want = layer(x, resets=resets)[0]
    y = layer.to(torch.complex64)(x.to(torch.complex64), resets=resets)[0]
    torch.testing.assert_close(y, want.to(torch.complex64))


def test_bad_masks() -> None:
    layer, x = rnnfast.LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match=r"resets: expected shape \(9, 4\), got \(4, 9\)"):
        layer(x, resets=torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"resets: expected dtype torch.bool, got torch.float32"):
        layer(x, resets=torch.zeros(T, B))
    with pytest.raises(RuntimeError, match=r"resets: expected device cpu like the input, got meta"):
        layer(x, resets=torch.zeros(T, B, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match=r"resets: expected a Tensor like the input, got list"):
        layer(x, resets=[[True]])  # type: ignore[arg-type]
    packed = pack_padded_sequence(x, torch.tensor([9, 8, 2, 1]))
    other = pack_padded_sequence(torch.zeros(T, B), torch.tensor([9, 8, 3, 1]))
    with pytest.raises(RuntimeError, match="resets: expected a PackedSequence of the same lengths in the same order"):
        layer(packed, resets=other._replace(data=other.data.bool()))
    turned = pack_padded_sequence(torch.zeros(T, B), torch.tensor([2, 9, 1, 8]), enforce_sorted=False)
    same = PackedSequence(turned.data.bool(), packed.batch_sizes, turned.sorted_indices, turned.unsorted_indices)
    with pytest.raises(RuntimeError, match="in the same order"):
        layer(packed, resets=same)
    with pytest.raises(RuntimeError, match=r"resets: expected shape \(9, 4\)"):
        layer(packed, resets=torch.zeros(T, 3, dtype=torch.bool))
