"""Gradient flow against torch.autograd on cells unrolled by hand; Lyapunov exponents against what is known of them."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import diagnose
from rnnfast.diagnose import GradientFlow, gradient_flow, lyapunov

matplotlib.use("Agg")
T, B, I, H = 5, 3, 2, 4  # noqa: E741

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "no_bias": ("LSTM", {"bias": False}),
    "tanh_stack": ("RNN", {"num_layers": 3}),
    "lstm_stack": ("LSTM", {"num_layers": 2}),
    "bidirectional": ("LSTM", {"bidirectional": True}),
    "bidirectional_stack": ("RNN", {"bidirectional": True, "num_layers": 2}),
    "projected": ("LSTM", {"proj_size": 3, "num_layers": 2}),
    "batch_first": ("LSTM", {"batch_first": True}),
}
LENGTHS = [3, 5, 2]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    cell, options = LAYERS[name]
    layer = getattr(rnnfast, cell)(I, H, **options).double()
    for p in layer.parameters():
        p.data *= 2  # some saturation
    return layer


@pytest.fixture(autouse=True, params=["one part", "parts of a step", "parts of two"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps gradient_flow works on at a time must not show."""
    steps = {"one part": T, "parts of a step": 1, "parts of two": 2}[request.param]
    monkeypatch.setattr(diagnose.sweep, "PART", steps * B * H)


class Unrolled:
    """The same layer, step by step for each sequence on its own, with every h_t, c_t and what was injected in reach."""

    def __init__(self, layer: nn.Module, xs: list[Tensor], h0: Tensor, c0: Tensor) -> None:
        D = 2 if layer.bidirectional else 1
        L, B = layer.num_layers, len(xs)
        self.h = [[[{} for _ in range(B)] for _ in range(D)] for _ in range(L)]  # [l][d][b][t]
        self.c = [[[{} for _ in range(B)] for _ in range(D)] for _ in range(L)]
        self.y = []
        for b, x in enumerate(xs):
            rows = list(x)
            for l in range(L):  # noqa: E741
                outputs = []
                for d in range(D):
                    outputs.append(self.run(layer, l, d, b, rows, h0[l * D + d, b], c0[l * D + d, b]))
                rows = [torch.cat([way[t] for way in outputs]) for t in range(len(rows))]
            self.y.append(torch.stack(rows))

    def run(self, layer, l, d, b, rows, h, c):  # noqa: E741
        end = f"_l{l}" + ("_reverse" if d else "")
        weight = {name: getattr(layer, name + end, None) for name in ("weight_ih", "weight_hh", "weight_hr")}
        bias = getattr(layer, "bias_ih" + end) + getattr(layer, "bias_hh" + end) if layer.bias else 0
        for t in range(len(rows)) if d == 0 else reversed(range(len(rows))):
            z = weight["weight_ih"] @ rows[t] + weight["weight_hh"] @ h + bias
            if layer.mode == "LSTM":
                i, f, g, o = z.chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                self.c[l][d][b][t] = c
                h = o.sigmoid() * c.tanh()
                if weight["weight_hr"] is not None:
                    h = weight["weight_hr"] @ h
            else:
                h = z.tanh() if layer.mode == "RNN_TANH" else z.relu()
            self.h[l][d][b][t] = h
        return [self.h[l][d][b][t] for t in range(len(rows))]


def inputs_of(layer: nn.Module, lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(1)
    LD = layer.num_layers * (2 if layer.bidirectional else 1)
    xs = [torch.randn(n, I, dtype=torch.float64) for n in lengths]
    R = layer.proj_size or H
    return xs, torch.randn(LD, B, R, dtype=torch.float64), torch.randn(LD, B, H, dtype=torch.float64)


def loss_of(ys: list[Tensor]) -> Tensor:
    """Of y (steps,D*R) of each sequence: every step has its own weight."""
    total = torch.zeros((), dtype=torch.float64)
    for b, y in enumerate(ys):
        scale = torch.linspace(0.3, 2, y.numel(), dtype=torch.float64).view_as(y)
        total = total + (b + 1) * (scale * y).square().sum()
    return total


def flow_of(layer: nn.Module, lengths: list[int], **options: Any) -> GradientFlow:
    xs, h0, c0 = inputs_of(layer, lengths)
    hx = (h0, c0) if layer.mode == "LSTM" else h0

    def closure() -> Tensor:
        if len(set(lengths)) > 1:
            padded = nn.utils.rnn.pad_sequence(xs)
            packed = layer(pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False), hx)[0]
            y, _ = nn.utils.rnn.pad_packed_sequence(packed)
            return loss_of([y[:n, b] for b, n in enumerate(lengths)])
        x = torch.stack(xs, dim=0 if layer.batch_first else 1)
        y = layer(x, hx)[0]
        return loss_of(list(y.unbind(0 if layer.batch_first else 1)))

    return gradient_flow(layer, closure, **options)


@pytest.mark.parametrize("lengths", [[T] * B, LENGTHS], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_gradient(name: str, lengths: list[int]) -> None:
    """Norms of dL/dh_t and dL/dc_t, and of their injected and carried parts, against autograd on each h_t."""
    layer = make(name)
    xs, h0, c0 = inputs_of(layer, lengths)
    flow = flow_of(layer, lengths)
    order = sorted(range(B), key=lambda b: -lengths[b]) if len(set(lengths)) > 1 else list(range(B))  # as packed
    net = Unrolled(layer, xs, h0, c0)
    loss, D = loss_of(net.y), 2 if layer.bidirectional else 1
    for l in range(layer.num_layers):  # noqa: E741
        for d in range(D):
            for place, b in enumerate(order):
                steps = range(lengths[b])
                hs = [net.h[l][d][b][t] for t in steps]
                totals = torch.autograd.grad(loss, hs, retain_graph=True, allow_unused=True, materialize_grads=True)
                for t in steps:
                    after = t + 1 if d == 0 else t - 1
                    carried = torch.zeros_like(hs[t])
                    if after in steps:
                        carried = carried_h(net, l, d, b, t, after, loss)
                    expect(flow.total_h[l, d, t, place], totals[t].norm())
                    expect(flow.carried_h[l, d, t, place], carried.norm())
                    expect(flow.injected_h[l, d, t, place], (totals[t] - carried).norm())
                    if after in steps:
                        expect(flow.gain[l, d, t, place], carried.norm() / totals[after].norm())
                    if layer.mode == "LSTM":
                        c = net.c[l][d][b]
                        (d_c,) = torch.autograd.grad(loss, c[t], retain_graph=True)
                        expect(flow.total_c[l, d, t, place], d_c.norm())
                        through = torch.zeros_like(d_c)
                        if after in steps:
                            (d_after,) = torch.autograd.grad(loss, c[after], retain_graph=True)
                            (through,) = torch.autograd.grad(c[after], c[t], d_after, retain_graph=True)
                            through = through - via_h(net, l, d, b, t, after, d_after)
                        expect(flow.carried_c[l, d, t, place], through.norm())
                        expect(flow.injected_c[l, d, t, place], (d_c - through).norm())
                assert flow.total_h[l, d, lengths[b] :, place].isnan().all()
    assert flow.T == T and str(flow).count("layer") == layer.num_layers * D


@pytest.mark.parametrize("name", ["tanh", "lstm"])
def test_a_thousand_steps(name: str) -> None:
    """|dL/dh_t| at every t of T=1000 against autograd on each h_t."""
    layer = make(name)
    for p in layer.parameters():
        p.data /= 2  # back to torch's initial weights, under which errors do not grow with T
    lengths = [1000] * B
    flow = flow_of(layer, lengths)
    net = Unrolled(layer, *inputs_of(layer, lengths))
    loss = loss_of(net.y)
    for b in range(len(lengths)):
        hs = [net.h[0][0][b][t] for t in range(1000)]
        totals = torch.stack(torch.autograd.grad(loss, hs, retain_graph=True))
        expect(flow.total_h[0, 0, :, b], totals.norm(dim=-1))


def expect(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)


def carried_h(net: Unrolled, l: int, d: int, b: int, t: int, after: int, loss: Tensor) -> Tensor:  # noqa: E741
    """What reaches h_t by the state of the next step alone: the next step's h and c as functions of h_t, with c_t and
    the layers above held fixed (what goes by them is injected, or belongs to c)."""
    h, c = net.h[l][d][b], net.c[l][d][b]
    if not c:
        (d_after,) = torch.autograd.grad(loss, h[after], retain_graph=True)
        (d_h,) = torch.autograd.grad(h[after], h[t], d_after, retain_graph=True)
        return d_h
    d_h_after, d_c_after = torch.autograd.grad(loss, [h[after], c[after]], retain_graph=True)
    (by_c,) = torch.autograd.grad(c[after], h[t], d_c_after, retain_graph=True)
    # h_after sees h_t by its output gate, beside c_after
    (by_h,) = torch.autograd.grad(h[after], h[t], d_h_after, retain_graph=True)
    (c_share,) = torch.autograd.grad(h[after], c[after], d_h_after, retain_graph=True)
    (by_h_and_c,) = torch.autograd.grad(c[after], h[t], c_share, retain_graph=True)
    return by_c + by_h - by_h_and_c


def via_h(net: Unrolled, l: int, d: int, b: int, t: int, after: int, d_after: Tensor) -> Tensor:  # noqa: E741
    """The part of dc_after/dc_t that goes by h_t."""
    h, c = net.h[l][d][b], net.c[l][d][b]
    (d_h,) = torch.autograd.grad(c[after], h[t], d_after, retain_graph=True)
    (d_c,) = torch.autograd.grad(h[t], c[t], d_h, retain_graph=True)
    return d_c


@pytest.mark.parametrize("name", ["tanh", "lstm", "bidirectional"])
def test_probe_is_a_unit_vector_at_the_end(name: str) -> None:
    flow = flow_of(make(name), [T] * B, probe=True, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(flow.total_h[-1, 0, -1], torch.ones(B, dtype=torch.float64))
    assert (flow.injected_h[-1, 0, :-1] == 0).all()
    again = flow_of(make(name), [T] * B, probe=True, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(again.total_h, flow.total_h, rtol=0, atol=0)


def test_lag_share_is_of_the_weight_gradient() -> None:
    layer = make("tanh")
    xs, h0, c0 = inputs_of(layer, [T] * B)
    flow = flow_of(layer, [T] * B)
    net = Unrolled(layer, xs, h0, c0)
    loss = loss_of(net.y)
    norms = []
    for t in reversed(range(T)):
        part = torch.zeros(H, H, dtype=torch.float64)
        for b in range(B):
            h = net.h[0][0][b]
            (d_h,) = torch.autograd.grad(loss, h[t], retain_graph=True)
            part += torch.outer(d_h * (1 - h[t].detach() ** 2), h[t - 1].detach() if t else h0[0, b])
        norms.append(part.norm())
    torch.testing.assert_close(flow.lag_share[0, 0], torch.stack(norms) / sum(norms))


# ----------------------------------------------------------------------------------------------- what it means


def linear(factor: float, T: int = 40) -> tuple[nn.Module, GradientFlow]:
    """A ReLU layer that only ever sees positive states: h_t = factor * h_{t-1} + x_t, so that the gain is known."""
    layer = rnnfast.RNN(1, 3, nonlinearity="relu").double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_hh_l0.copy_(factor * torch.eye(3, dtype=torch.float64))
        layer.weight_ih_l0.fill_(1.0)
    x = torch.rand(T, 2, 1, dtype=torch.float64) + 0.1
    return layer, gradient_flow(layer, lambda: layer(x)[0][-1].sum())


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.5, "vanishing"), (0.95, "healthy"), (1.0, "healthy"), (1.5, "exploding")]
)
def test_verdict_slope_and_horizon(factor: float, verdict: str) -> None:
    _, flow = linear(factor)
    assert flow.verdicts() == [[verdict]]
    torch.testing.assert_close(flow.gain[0, 0, :-1], torch.full((39, 2), factor, dtype=torch.float64))
    assert flow.log_slope[0, 0].item() == pytest.approx(math.log(factor), abs=1e-12)
    expected = -1 / math.log(factor) if factor < 1 else math.inf
    assert flow.horizon()[0, 0].item() == pytest.approx(expected)
    assert flow.horizon(1e-3)[0, 0].item() == pytest.approx(expected * math.log(1000))
    assert verdict in str(flow)


@pytest.mark.parametrize("lengths", [[30, 30], [30, 10]], ids=["padded", "packed"])
def test_saturation_gates_and_memory(lengths: list[int]) -> None:
    layer = rnnfast.LSTM(1, 2).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.bias_ih_l0.copy_(torch.tensor([9.0, 9.0, 1.0, 1.0, 9.0, -9.0, -9.0, 9.0]))  # i,f,g,o of 2 units each
    x = pack_padded_sequence(torch.randn(30, 2, 1, dtype=torch.float64), torch.tensor(lengths))
    flow = gradient_flow(layer, lambda: layer(x)[0].data.sum())
    f = 1 / (1 + math.exp(-1.0))
    assert flow.gates_open[0, 0].tolist() == [1.0, 0.0, 0.5]
    assert flow.gates_closed[0, 0].tolist() == [0.0, 0.0, 0.5]
    assert flow.memory[0, 0].item() == pytest.approx(-1 / math.log(f))
    h = layer(x)[0].data
    assert flow.saturated[0, 0].item() == (h.abs() > 0.99).double().mean().item()
    assert flow.saturated[0, 0] > 0.3


def test_first_step_that_is_not_finite() -> None:
    layer, _ = linear(1.0)
    x = torch.rand(12, 2, 1, dtype=torch.float64)
    x[7, 1] = math.inf
    flow = gradient_flow(layer, lambda: layer(x)[0][:7].sum())
    assert flow.nonfinite_h.tolist() == [[7]] and flow.nonfinite_gradient.tolist() == [[-1]]
    assert flow.verdicts() == [["not finite"]]
    layer.weight_hh_l0.data *= 1e200
    flow = gradient_flow(layer, lambda: layer(x[:3])[0].sum())
    assert flow.nonfinite_gradient.item() >= 0


def test_first_step_of_each_direction_that_is_not_finite() -> None:
    layer = rnnfast.RNN(1, 3, nonlinearity="relu", bidirectional=True).double()
    x = torch.rand(12, 2, 1, dtype=torch.float64)
    x[3, 1] = x[7, 0] = math.nan
    assert gradient_flow(layer, lambda: layer(x)[0].sum()).nonfinite_h.tolist() == [[3, 7]]


def test_steps_after_the_end_do_not_count() -> None:
    """The gradient of the last step of a short sequence would overflow at the next, which there is not."""
    layer = rnnfast.RNN(1, 1, nonlinearity="relu", bidirectional=True).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.0)
        layer.weight_ih_l0_reverse.fill_(1.0)
        layer.weight_hh_l0_reverse.fill_(1e200)
    x = pack_padded_sequence(torch.ones(3, 2, 1, dtype=torch.float64), torch.tensor([3, 2]))
    flow = gradient_flow(layer, lambda: layer(x)[0].data[1, 1])  # the short one, step 0, reverse
    assert flow.total_h[0, 1, :2, 1].tolist() == [1.0, 1e200]
    assert flow.nonfinite_gradient.tolist() == [[-1, -1]]


def test_dropout_between_layers() -> None:
    """What the layer above injects goes through the mask of its dropout."""
    lower, upper = rnnfast.LSTM(I, H).double(), rnnfast.LSTM(H, H).double()
    stack = rnnfast.LSTM(I, H, num_layers=2, dropout=0.5).double()
    stack.load_state_dict({**lower.state_dict(), **{k.replace("l0", "l1"): w for k, w in upper.state_dict().items()}})
    x = torch.randn(T, B, I, dtype=torch.float64)

    def seeded() -> Tensor:
        torch.manual_seed(2)
        return stack(x)[0].square().sum()

    flow = gradient_flow(stack, seeded)
    y = lower(x)[0]
    torch.manual_seed(2)  # the same units as torch's dropout are left out
    loss = upper(nn.functional.dropout(y, 0.5))[0].square().sum()
    expect(loss, seeded())
    (injected,) = torch.autograd.grad(loss, y)
    expect(flow.injected_h[0, 0], injected.norm(dim=-1))


def test_no_gradient_is_carried() -> None:
    layer, _ = linear(1.0)
    layer.weight_hh_l0.data.zero_()
    flow = gradient_flow(layer, lambda: layer(torch.rand(6, 2, 1, dtype=torch.float64))[0].sum())
    assert (flow.carried_h == 0).all() and flow.verdicts() == [["no gradient"]]


def test_inside_a_model() -> None:
    """The model's own gradients, parameters and hooks are not touched."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": rnnfast.LSTM(I, H), "out": nn.Linear(H, 1)})
    x = torch.randn(T, B, I)
    flow = gradient_flow(model["rnn"], lambda: model["out"](model["rnn"](x)[0][-1]).square().mean())
    assert flow.total_h.shape == (1, 1, T, B) and (flow.total_h > 0).all()
    assert all(p.grad is None for p in model.parameters()) and not model["rnn"]._forward_hooks


def test_plot() -> None:
    import matplotlib.pyplot as plt

    flow = flow_of(make("lstm_stack"), LENGTHS)
    ax = flow.plot()
    assert ax.get_yscale() == "log" and len(ax.lines) == 4
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [f"layer {i}: {flow.verdicts()[i][0]}" for i in range(2)]
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_ydata())[:-1], flow.quantiles("carried_h")[1, 0, 0, :-1])
    assert flow.plot(ax) is ax
    plt.close("all")


def test_errors() -> None:
    layer, x = rnnfast.RNN(I, H), torch.randn(T, B, I)
    with pytest.raises(TypeError, match=r"layer should be a recurrent layer of rnnfast, got GRU"):
        gradient_flow(nn.GRU(I, H), lambda: x.sum())
    with pytest.raises(RuntimeError, match="should call the layer once, it called it 0 times"):
        gradient_flow(layer, lambda: x.sum())
    with pytest.raises(RuntimeError, match="should call the layer once, it called it 2 times"):
        gradient_flow(layer, lambda: layer(x)[0].sum() + layer(x)[0].sum())
    with pytest.raises(TypeError, match=r"should return a scalar tensor, got shape \(5, 3, 4\)"):
        gradient_flow(layer, lambda: layer(x)[0])
    with pytest.raises(RuntimeError, match="does not depend on the layer"):
        gradient_flow(layer, lambda: layer(x)[0].detach().sum() + torch.zeros((), requires_grad=True))
    with pytest.raises(RuntimeError, match="left no graph of rnnfast's"):
        gradient_flow(layer.to(torch.complex64), lambda: layer(x.to(torch.complex64))[0].abs().sum())
    with pytest.raises(ValueError, match="fraction should be between 0 and 1, got 2"):
        linear(0.5)[1].horizon(2)


# ----------------------------------------------------------------------------------------------- Lyapunov exponents


def test_exponents_of_a_linear_layer() -> None:
    """Logarithms of the moduli of the eigenvalues of W_hh, in float64 and float32."""
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        layer = rnnfast.RNN(1, 3, nonlinearity="relu").to(dtype)
        W = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.6, 0.1], [0.0, 0.0, 0.3]], dtype=dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
            layer.weight_hh_l0.copy_(W)
            layer.weight_ih_l0.fill_(1.0)
        x = torch.rand(400, 2, 1, dtype=dtype) + 0.1
        found = lyapunov(layer, x, k=3, skip=100, generator=torch.Generator().manual_seed(0))
        expected = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64).log().expand(2, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["tanh", "tanh_stack", "lstm", "lstm_stack", "projected", "batch_first"])
def test_exponents_are_those_of_the_product_of_jacobians(name: str) -> None:
    """All exponents of a short trajectory add up to log |det| of its Jacobian; QR after every step changes nothing."""
    layer = make(name)
    for p in layer.parameters():
        p.data /= 2  # an unsaturated layer: else the determinant is too small to be exact
    xs, h0, c0 = inputs_of(layer, [T] * B)
    lstm, L = layer.mode == "LSTM", layer.num_layers
    hx = (h0, c0) if lstm else h0
    R = layer.proj_size or H
    size = L * (R + (H if lstm else 0))
    x = torch.stack(xs, dim=0 if layer.batch_first else 1)
    found = lyapunov(layer, x, k=size, hx=hx, every=2)
    assert found.shape == (B, size)
    torch.testing.assert_close(lyapunov(layer, x, k=size, hx=hx, every=1).sum(1), found.sum(1), rtol=1e-6, atol=1e-8)
    for b in range(B):

        def end(state: Tensor, b: int = b) -> Tensor:
            h, c = state[: L * R].view(L, 1, R), state[L * R :].view(L, 1, -1)
            one = torch.stack([xs[b]], dim=0 if layer.batch_first else 1)
            last = layer(one, (h, c) if lstm else h)[1]
            return torch.cat([part.flatten() for part in (last if lstm else [last])])

        state = torch.cat([part[:, b].flatten() for part in ((h0, c0) if lstm else (h0,))])
        J = torch.autograd.functional.jacobian(end, state)
        expected = torch.linalg.slogdet(J)[1] / T
        torch.testing.assert_close(found[b].sum(), expected, rtol=1e-6, atol=1e-8)


def outside(layer: nn.Module, name: str, kwargs: bool) -> None:
    """Computed by a hook of the user's own from a parameter that torch knows nothing of."""
    layer.source = nn.Parameter(layer._parameters.pop(name).detach())

    def compute(module: nn.Module, *args: Any) -> None:
        setattr(module, name, module.source * 2)

    layer.register_forward_pre_hook(compute, with_kwargs=kwargs)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer, name: prune.random_unstructured(layer, name, 0.3),
    "by a hook": lambda layer, name: outside(layer, name, kwargs=False),
    "by a hook with kwargs": lambda layer, name: outside(layer, name, kwargs=True),
    "put there": lambda layer, name: layer._parameters.update({name: nn.Parameter(layer._parameters[name] * 2)}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize("way", COMPUTED)
def test_exponents_are_those_of_the_weights_of_today(way: str, cell: str) -> None:
    """Whatever computes the weights, of whatever an optimizer has made since of what it computes them from."""
    layer, plain = make(cell).eval(), make(cell)
    COMPUTED[way](layer, "weight_hh_l0")
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = lyapunov(layer, x, k=3, generator=torch.Generator().manual_seed(0))
    layer(x)  # so that hooks have run
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(getattr(layer, name))
    expected = lyapunov(plain, x, k=3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_exponents_inside_functional_call() -> None:
    layer, x = make("tanh"), torch.randn(T, B, I, dtype=torch.float64)

    class Exponents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return lyapunov(self.layer, x, generator=torch.Generator().manual_seed(0))

    weights = {f"layer.{name}": 0.5 * p.detach() for name, p in layer.named_parameters()}
    found = torch.func.functional_call(Exponents(), weights, (x,))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    assert torch.equal(found, Exponents()(x))


def test_bad_arguments_of_lyapunov() -> None:
    layer, x = rnnfast.RNN(I, H), torch.randn(T, B, I)
    with pytest.raises(TypeError, match="got Linear"):
        lyapunov(nn.Linear(I, H), x)
    with pytest.raises(ValueError, match="bidirectional"):
        lyapunov(rnnfast.RNN(I, H, bidirectional=True), x)
    with pytest.raises(ValueError, match=r"with 2 columns, got \(5, 3, 7\)"):
        lyapunov(layer, torch.randn(T, B, 7))
    with pytest.raises(ValueError, match="k should be 1 to 4, the numbers in the state, got 5"):
        lyapunov(layer, x, k=5)
    with pytest.raises(ValueError, match="skip 0 to 4, got 10 and 5"):
        lyapunov(layer, x, skip=5)


def test_module_is_public() -> None:
    assert rnnfast.diagnose is diagnose
