"""Where torch's default device or dtype is another one, everything gives the same numbers, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import diagnose, init, tasks

T, B, I, H = 5, 3, 4, 6  # noqa: E741
LARGE = {"T": 2, "B": 600, "I": 130, "H": 130}  # y, h_n and the weights' gradients take more than 256 KB


def drawn(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, device="cpu", dtype=torch.float32).requires_grad_(requires_grad)


def generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(1)


def layer_of(cell: str, *sizes: int, **options: Any) -> Any:
    return getattr(rnnfast, cell)(*sizes, **options, device="cpu", dtype=torch.float32)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses; numbers as tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_of(one)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_of(vars(value))
    elif isinstance(value, (int, float)):
        yield torch.tensor(value, device="cpu", dtype=torch.float64)


# Each makes what it needs, on the CPU, and returns what is run with another default.


def _layer(cell: str, large: bool = False, **options: Any) -> Callable[[], Any]:
    """Outputs, gradients and gradients of those."""
    sizes = LARGE if large else {"T": T, "B": B, "I": I, "H": H}
    layer, x = layer_of(cell, sizes["I"], sizes["H"], **options), drawn(sizes["T"], sizes["B"], sizes["I"])

    def run() -> Any:
        torch.manual_seed(0)
        y, states = layer(x)
        wrt = [x, *layer.parameters()]
        first = torch.autograd.grad(y.square().sum(), wrt, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt)
        return y, states, first, second

    return run


def _inference(cell: str) -> Callable[[], Any]:
    layer, x = layer_of(cell, I, H), drawn(T, B, I)

    def run() -> Any:
        with torch.inference_mode():
            return layer(x)

    return run


def _packed() -> Callable[[], Any]:
    layer = layer_of("LSTM", I, H, num_layers=2, bidirectional=True, dropout=0.5)
    packed = pack_padded_sequence(drawn(T, B, I), torch.tensor([3, 5, 2], device="cpu"), enforce_sorted=False)

    def run() -> Any:
        torch.manual_seed(0)
        y, states = layer(packed)
        return y.data, states, torch.autograd.grad(y.data.square().sum(), list(layer.parameters()))

    return run


def _cell(cell: str) -> Callable[[], Any]:
    layer, x = layer_of(cell, I, H), drawn(B, I)

    def run() -> Any:
        states = layer(x)
        h = states[0] if isinstance(states, tuple) else states
        return states, torch.autograd.grad(h.square().sum(), [x, *layer.parameters()])

    return run


def _func(large: bool) -> Callable[[], Any]:
    """torch.func's transforms: forward mode, over reverse mode too, and a gradient for each sample."""
    sizes = LARGE if large else {"T": T, "B": B, "I": I, "H": H}
    layer, x = layer_of("LSTM", sizes["I"], sizes["H"]), drawn(sizes["T"], sizes["B"], sizes["I"], requires_grad=False)
    v, weights = drawn(*x.shape, requires_grad=False), {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    def run() -> Any:
        jvp = torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))
        hvp = torch.func.jvp(torch.func.grad(lambda x: loss(weights, x)), (x,), (v,))
        samples = x[:, :3].transpose(0, 1)
        return jvp, hvp, torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, samples.unsqueeze(2))

    return run


def _forward_mode() -> Callable[[], Any]:
    layer, x, v = layer_of("RNN", I, H, num_layers=2), drawn(T, B, I, requires_grad=False), drawn(T, B, I)

    def run() -> Any:
        with torch.autograd.forward_ad.dual_level():
            y, h_n = layer(torch.autograd.forward_ad.make_dual(x, v.detach()))
            return [*torch.autograd.forward_ad.unpack_dual(y), *torch.autograd.forward_ad.unpack_dual(h_n)]

    return run


def _autocast() -> Callable[[], Any]:
    layer, x = layer_of("RNN", I, H), drawn(T, B, I)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    return run


def _bfloat16() -> Callable[[], Any]:
    layer, x = layer_of("LSTM", I, H).bfloat16(), drawn(T, B, I).bfloat16()

    def run() -> Any:
        return layer(x)

    return run


def _fallback() -> Callable[[], Any]:
    layer, x = layer_of("LSTM", I, H).to(torch.complex64), drawn(T, B, I).to(torch.complex64)

    def run() -> Any:
        return layer(x)

    return run


def _converted() -> Callable[[], Any]:
    model, x = nn.Sequential(nn.LSTM(I, H, device="cpu", dtype=torch.float32)), drawn(T, B, I)
    return lambda: rnnfast.revert(rnnfast.convert(model)) and rnnfast.convert(model)(x)


def _hessian_free() -> Callable[[], Any]:
    layer, x = layer_of("RNN", I, H), drawn(T, B, I, requires_grad=False)
    optimizer = rnnfast.optim.HessianFree(layer.parameters(), precondition=True)

    def run() -> Any:
        before = [p.detach().clone() for p in layer.parameters()]
        reports = [optimizer.step(lambda: layer(x)[0], lambda y: (y - 0.5).square().mean()) for _ in range(2)]
        after = [p.detach().clone() for p in layer.parameters()]
        with torch.no_grad():
            torch._foreach_copy_(list(layer.parameters()), before)
        optimizer.state.clear()
        optimizer.param_groups[0]["damping"] = 0.1
        return reports, after

    return run


def _momentum() -> Callable[[], Any]:
    layer, x = layer_of("RNN", I, H), drawn(T, B, I, requires_grad=False)
    start = {name: p.clone() for name, p in layer.state_dict().items()}

    def run() -> Any:
        layer.load_state_dict(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        schedule = rnnfast.optim.MomentumSchedule(optimizer, 0.99, "increasing")
        for _ in range(3):
            optimizer.zero_grad()
            layer(x)[0].square().sum().backward()
            optimizer.step()
            schedule.step()
        return layer.state_dict(), optimizer.param_groups[0]["momentum"]

    return run


def _gradient_flow(packed: bool, probe: bool) -> Callable[[], Any]:
    layer, x = layer_of("LSTM", I, H, num_layers=2, bidirectional=True), drawn(T, B, I)
    lengths = torch.tensor([5, 4, 2], device="cpu")

    def run() -> Any:
        def loss() -> Tensor:
            y = layer(pack_padded_sequence(x, lengths) if packed else x)[0]
            return (y.data if isinstance(y, PackedSequence) else y).square().sum()

        flow = diagnose.gradient_flow(layer, loss, probe, generator())
        assert str(flow)
        return flow, flow.horizon(), flow.quantiles("carried_h")

    return run


def _lyapunov() -> Callable[[], Any]:
    layer, x = layer_of("LSTM", I, H), drawn(T, B, I, requires_grad=False)
    return lambda: diagnose.lyapunov(layer, x, 3, generator=generator())


def _init(function: Callable[..., nn.Module], **options: Any) -> Callable[[], Any]:
    layer = layer_of("LSTM", I, H, num_layers=2)
    draws = {} if function in (init.identity_, init.forget_bias_) else {"generator": generator()}

    def run() -> Any:
        for one in draws.values():
            one.manual_seed(1)
        function(layer, **options, **draws)
        return [p.detach().clone() for p in layer.parameters()]

    return run


def _initial_state() -> Callable[[], Any]:
    layer = layer_of("LSTM", I, H)
    return lambda: init.InitialState(layer, 0.5, generator())(3)


def _readout() -> Callable[[], Any]:
    readout, sample = nn.Linear(H, 3, device="cpu", dtype=torch.float32), drawn(T, B, 3, requires_grad=False)
    targets = sample, sample > 0, torch.tensor([0, 2, 2], device="cpu")

    def run() -> Any:
        biases = [init.output_bias_(readout, target).bias.detach().clone() for target in targets]
        return biases, init.Center(sample)(sample), init.spectral_radius(sample[0])

    return run


def _task(name: str) -> Callable[[], Any]:
    def run() -> Any:
        task = tasks.make(name, 30)
        batch = task.sample(4, generator())
        torch.manual_seed(0)
        sample = task.sample(2)
        outputs = batch.x.new_zeros(int(batch.mask.sum()), task.output_size)
        return batch, sample, task.wrong(outputs, batch.y, batch.mask), task.loss(outputs, batch.y[batch.mask])

    return run


RUNS: dict[str, Callable[[], Callable[[], Any]]] = {
    "LSTM": lambda: _layer("LSTM"),
    "RNN": lambda: _layer("RNN", nonlinearity="relu"),
    "large LSTM": lambda: _layer("LSTM", large=True),
    "large RNN": lambda: _layer("RNN", large=True),
    "stack with dropout": lambda: _layer("LSTM", num_layers=2, dropout=0.5, bidirectional=True),
    "projected": lambda: _layer("LSTM", proj_size=2),
    "LSTM inference": lambda: _inference("LSTM"),
    "RNN inference": lambda: _inference("RNN"),
    "packed": _packed,
    "LSTMCell": lambda: _cell("LSTMCell"),
    "RNNCell": lambda: _cell("RNNCell"),
    "transforms": lambda: _func(large=False),
    "large transforms": lambda: _func(large=True),
    "forward mode": _forward_mode,
    "autocast": _autocast,
    "bfloat16": _bfloat16,
    "fallback": _fallback,
    "converted": _converted,
    "HessianFree": _hessian_free,
    "MomentumSchedule": _momentum,
    "gradient_flow": lambda: _gradient_flow(packed=False, probe=False),
    "gradient_flow, packed": lambda: _gradient_flow(packed=True, probe=False),
    "gradient_flow, probe": lambda: _gradient_flow(packed=False, probe=True),
    "lyapunov": _lyapunov,
    "echo_state_": lambda: _init(init.echo_state_, nonzero=3),
    "identity_": lambda: _init(init.identity_),
    "orthogonal_": lambda: _init(init.orthogonal_),
    "forget_bias_": lambda: _init(init.forget_bias_),
    "chrono_": lambda: _init(init.chrono_, t_max=20),
    "readout": _readout,
    "initial state": _initial_state,
    **{name: lambda name=name: _task(name) for name in tasks.TASKS},  # type: ignore[misc]
}


@pytest.mark.filterwarnings("ignore::rnnfast.fallback.FallbackWarning", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", RUNS)
def test_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    run = RUNS[name]()
    expected = list(tensors_of(run()))
    assert expected
    with torch.device("meta"):
        elsewhere = list(tensors_of(run()))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wider = list(tensors_of(run()))
    finally:
        torch.set_default_dtype(default)
    for found in (elsewhere, wider):
        assert [t.device.type for t in found] == ["cpu"] * len(expected)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_default_device_that_is_not_there() -> None:
    """torch.set_default_device, which nobody leaves again; outputs large enough to be kept."""
    layer, x = layer_of("LSTM", 130, 130), drawn(2, 600, 130)
    expected = layer(x)[0]
    torch.set_default_device("cuda" if not torch.cuda.is_available() else "meta")
    try:
        assert torch.equal(layer(x)[0], expected)
    finally:
        torch.set_default_device(None)
