"""Single steps, of cells and of layers: torch's operators where a kernel would be slower, torch's results everywhere.

No test takes times; for those there is `python -m benchmarks --preset cells`.
"""

# ruff: noqa: E741 (I is the legend's letter)
from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast._autograd import recorded
from rnnfast._backends import cpu
from rnnfast.diagnose import gradient_flow

CELLS = {nn.LSTMCell: rnnfast.LSTMCell, nn.RNNCell: rnnfast.RNNCell}
every_cell = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Every call of a kernel."""
    made: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        kernel = getattr(cpu, name)
        return lambda *args, **more: made.append(name) or kernel(*args, **more)

    for name in ("forward", "forward_dual", "backward", "tangent"):
        monkeypatch.setattr(cpu, name, spy(name))
    return made


class Operators:
    """A compiler that keeps the names of all operators that AOTAutograd gives it, forward and backward."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def keep(graph: torch.fx.GraphModule, example: Any) -> torch.fx.GraphModule:
            self.names |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
            return graph

        return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))

    def has_ours(self) -> bool:
        return any(name.startswith("rnnfast") for name in self.names)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result if part is not None for t in tensors(part)]


def assert_same(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- cells


@every_cell
def test_cells_are_torchs(kind: type, calls: list[str]) -> None:
    """Also under the name by which older pickles know them."""
    cell = pickle.loads(
        pickle.dumps(CELLS[kind](3, 4), protocol=2).replace(b"torch.nn.modules.rnn", b"rnnfast.modules")
    )
    assert type(cell) is kind is CELLS[kind]
    sum(t.sum() for t in tensors(cell(torch.ones(2, 3)))).backward()
    assert not calls


def _loop(cell: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A loss of three steps x (3,B,I) of a cell, from zeros that are mapped where x is: torch's cells ask for that."""
    zeros = x.new_zeros(x.size(1), cell.hidden_size)
    state = (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
    for x_t in x:
        state = functional_call(cell, weights, (x_t, state))
    return tensors(state)[0].square().sum()


@every_cell
def test_all_derivatives_of_cells(kind: type) -> None:
    """Third ones, forward mode over forward mode and over reverse, each sample's gradient: none is refused."""
    cell = rnnfast.convert(nn.ModuleList([kind(2, 3, dtype=torch.float64)]))[0]
    weights = {name: w.detach() for name, w in cell.named_parameters()}
    x, v = torch.randn(2, 3, 2, 2, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return _loop(cell, weights, x)

    def along(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(f, (x,), (v,))[1]

    def along_by_reverse(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (jacrev(f)(x) * v).sum()

    third = along(along(along(loss)))(x)
    torch.testing.assert_close(third, along_by_reverse(along_by_reverse(along_by_reverse(loss)))(x))
    torch.testing.assert_close(third, along(along_by_reverse(along(loss)))(x))
    step, slopes = 1e-4, []
    for at in (x + step * v, x - step * v):
        slopes.append(along(along(loss))(at))
    torch.testing.assert_close(third, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-5, atol=1e-7)
    each = vmap(grad(lambda w, x: _loop(cell, w, x.unsqueeze(1))), in_dims=(None, 1))(weights, x)
    whole = grad(lambda w: _loop(cell, w, x))(weights)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient)


@every_cell
@pytest.mark.parametrize("train", [False, True])
def test_compiled_loop_of_a_cell(kind: type, train: bool) -> None:
    """One graph for all steps, of operators that a compiler can fuse."""
    cell = rnnfast.convert(nn.ModuleList([kind(3, 4)]))[0]
    weights, x, operators = dict(cell.named_parameters()), torch.randn(3, 2, 3), Operators()
    compiled = operators.compile(lambda x: _loop(cell, weights, x))
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), _loop(cell, weights, x))
        if train:
            assert_same(
                *(
                    torch.autograd.grad(f(x), list(weights.values()))
                    for f in (compiled, lambda x: _loop(cell, weights, x))
                ),
                1e-5,
            )
    assert operators.names and not operators.has_ours()


# ------------------------------------------------------------------------------------------------ layers


KINDS = ("padded", "batch_first", "unbatched", "sorted", "unsorted")


def _input(kind: str, T: int, B: int, I: int) -> Any:
    x = torch.randn(T, B, I, dtype=torch.float64)
    if kind in ("sorted", "unsorted"):
        lengths = [T] * B if T == 1 or kind == "sorted" else [1] * (B - 1) + [T]
        return pack_padded_sequence(x, lengths, enforce_sorted=kind == "sorted")
    return {"padded": x, "batch_first": x.transpose(0, 1), "unbatched": x[:, 0]}[kind]


def _states(kind: str, name: str, LD: int, B: int, H: int, P: int = 0) -> Any:
    h, c = (torch.randn(LD, *([] if kind == "unbatched" else [B]), size, dtype=torch.float64) for size in (P or H, H))
    return (h, c) if name == "LSTM" else h


def _pair(name: str, I: int, H: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    torchs, ours = (getattr(library, name)(I, H, dtype=torch.float64, **options) for library in (nn, rnnfast))
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def _results(layer: nn.Module, x: Any, hx: Any, run: Callable[..., Any] | None = None) -> list[Tensor]:
    """Outputs, final states and gradients of a loss of all of them, from one seed."""
    torch.manual_seed(1)
    outputs = tensors((run or layer)(x, hx))
    loss = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum()
        for t in outputs
        if t.is_floating_point()
    )
    return [*outputs, *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu"}, {"bias": False}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_recorded_step_of_an_elman_layer(kind: str, options: dict, given: bool, calls: list[str]) -> None:
    """Torch's operators: no kernel is called, no weight packed; the states of an unsorted batch are its own."""
    torchs, ours = _pair("RNN", 3, 4, batch_first=kind == "batch_first", **options)
    x, hx = _input(kind, 1, 5, 3), _states(kind, "RNN", 1, 5, 4) if given else None
    assert_same(_results(ours, x, hx), _results(torchs, x, hx))
    assert not calls


KERNELS_RUN: dict[str, Callable[[], Any]] = {
    "no graph": lambda: torch.no_grad()(rnnfast.RNN(3, 4))(torch.ones(1, 2, 3)),
    "two steps": lambda: rnnfast.RNN(3, 4)(torch.ones(2, 2, 3)),
    "two layers": lambda: rnnfast.RNN(3, 4, 2)(torch.ones(1, 2, 3)),
    "two directions": lambda: rnnfast.RNN(3, 4, bidirectional=True)(torch.ones(1, 2, 3)),
    "lstm": lambda: rnnfast.LSTM(3, 4)(torch.ones(1, 2, 3)),
    "jvp": lambda: jvp(lambda x: rnnfast.RNN(3, 4)(x)[0], (torch.ones(1, 2, 3),), (torch.ones(1, 2, 3),)),
    "vmap": lambda: vmap(rnnfast.RNN(3, 4))(torch.ones(5, 1, 2, 3)),
}


@pytest.mark.parametrize("case", KERNELS_RUN)
def test_kernels_run_where_they_are_faster_or_asked_to_be_transformed(case: str, calls: list[str]) -> None:
    KERNELS_RUN[case]()
    assert calls


def test_third_derivative_of_a_recorded_step() -> None:
    layer = rnnfast.RNN(2, 3, dtype=torch.float64)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    slope = layer(x)[0].square().sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(slope, x, create_graph=True)
        slope = gradient.square().sum()
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("changed", [0, 1])
def test_outputs_of_a_step_are_changed_apart(changed: int) -> None:
    layer, x = rnnfast.RNN(3, 4), torch.randn(1, 2, 3)
    outputs, kept = layer(x), [t.detach().clone() for t in layer(x)]
    outputs[changed].mul_(2)
    assert_same(outputs[1 - changed], kept[1 - changed])
    sum(t.sum() for t in outputs).backward()
    assert_same(layer.weight_ih_l0.grad, _weighted(layer, x, changed))


def _weighted(layer: nn.Module, x: Tensor, doubled: int) -> Tensor:
    outputs = layer(x)
    return torch.autograd.grad(
        sum((2 if i == doubled else 1) * t.sum() for i, t in enumerate(outputs)), layer.weight_ih_l0
    )[0]


def test_a_step_is_still_a_node_for_those_who_look_for_it() -> None:
    layer, x = rnnfast.RNN(3, 4), torch.randn(1, 2, 3)
    flow = gradient_flow(layer, lambda: layer(x)[0].sum())
    torch.testing.assert_close(flow.total_h, torch.full((1, 1, 1, 2), 2.0))  # the norm of four ones
    with recorded.recording() as calls:
        layer(x)
    assert len(calls) == 1


COMPILED = {
    "lstm": ("LSTM", {}),
    "lstm_without_bias": ("LSTM", {"bias": False}),
    "lstm_deep": ("LSTM", {"num_layers": 3, "bidirectional": True, "dropout": 0.5}),
    "rnn": ("RNN", {}),
    "relu_deep": (
        "RNN",
        {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu", "dropout": 0.5, "bias": False},
    ),
}


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "padded") for case in COMPILED), *(("lstm_deep", kind) for kind in KINDS[1:])]
)
@pytest.mark.parametrize("given", [False, True])
def test_traced_step(case: str, kind: str, given: bool) -> None:
    """What a compiler sees of a step computes what torch's layer does, dropout from a seed too."""
    name, options = COMPILED[case]
    torchs, ours = _pair(name, 3, 4, batch_first=kind == "batch_first", **options)
    LD = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x, hx = _input(kind, 1, 5, 3), _states(kind, name, LD, 5, 4) if given else None
    if given and isinstance(x, PackedSequence):
        pytest.skip("how many sequences there are is data, which a compiler cannot compare with the states")

    def run(x: Any, hx: Any) -> Any:
        return ours(x, hx)

    if isinstance(x, PackedSequence):
        parts = tuple(x)
        compiled = torch.compile(lambda parts, hx: ours(PackedSequence(*parts), hx), fullgraph=True, backend="eager")
        got = _results(ours, x, hx, lambda _, hx: compiled(parts, hx))
    else:
        got = _results(ours, x, hx, torch.compile(run, fullgraph=True, backend="eager"))
    assert_same(got, _results(torchs, x, hx))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_compiled_step(name: str, train: bool) -> None:
    """No operator of ours in it, which the compiler could not fuse with others; in more steps there is."""
    ours, operators = _pair(name, 3, 4, num_layers=2)[1], Operators()
    compiled = operators.compile(ours)
    for T in (1, 3):
        with torch.set_grad_enabled(train):
            compiled(torch.randn(T, 2, 3, dtype=torch.float64))
        assert operators.names and operators.has_ours() == (T > 1)


# ----------------------------------------------------------------------------- kernels of a step or two


@pytest.mark.isa
@pytest.mark.parametrize("name", ["LSTM", "RNN"])
@pytest.mark.parametrize(("I", "H"), [(1000, 9), (3, 40), (50, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_of_rows(name: str, I: int, H: int, threads: int) -> None:
    """Each way in which rows are taken together, and weights packed or read where they lie, gives the same."""
    torch.set_num_threads(threads)
    torchs, ours = _pair(name, I, H, proj_size=H // 3) if name == "LSTM" and H > 3 else _pair(name, I, H)
    with torch.no_grad():
        for T in (1, 2):
            for B in (*range(1, 8), 13, 32, 64, 65):
                x, hx = torch.randn(T, B, I, dtype=torch.float64), _states("padded", name, 1, B, H, torchs.proj_size)
                assert_same(ours(x, hx), torchs(x, hx))
