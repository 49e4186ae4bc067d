"""What others make of rnnfast's layers: type checks, torch.fx, TorchScript, quantization, subclasses of users."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import rnnfast
from rnnfast._autograd import op

TWINS = {nn.LSTM: rnnfast.LSTM, nn.RNN: rnnfast.RNN}


class Model(nn.Module):
    """Every kind of layer, one of them twice, with and without states; x (T,B,3), h and c (2,B,4)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.LSTM(3, 4, 2, dropout=0.3)])
        self.again = self.steps[0]
        self.rnn = nn.RNN(4, 4)
        self.cell = nn.LSTMCell(4, 4)
        self.last = nn.RNNCell(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        y, state = self.steps[0](x)
        z, _ = self.again(x, (h, state[1]))
        y, _ = self.rnn(y + z, hx=c[:1])
        h1, c1 = self.cell(y[-1], (h[0], c[1]))
        return self.last(h1) + self.last(c1, hx=h[0, :, :2])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def converted() -> Model:
    torch.manual_seed(0)
    return rnnfast.convert(Model())


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The modes of all calls of the kernels."""
    modes, recurrent = [], op.recurrent
    monkeypatch.setattr(op, "recurrent", lambda *args: modes.append(args[0]) or recurrent(*args))
    return modes


def run(model: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients in training, from one seed."""
    torch.manual_seed(2)
    y = model(*given)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("kind", TWINS, ids=lambda kind: kind.__name__)
def test_a_layer_is_torchs(kind: type) -> None:
    """Initialisers, checks of the kind of state, torchrl: they ask isinstance(layer, torch.nn.LSTM)."""
    for layer in (TWINS[kind](3, 4), rnnfast.convert(kind(3, 4))):
        assert isinstance(layer, kind) and type(layer) is not kind
        assert [other for other in TWINS if isinstance(layer, other)] == [kind]


# --- torch.fx ---------------------------------------------------------------------------------------------------------


class Watching(fx.Tracer):
    """As torchvision's feature extraction does: keeps the path of the module at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def call_module(self, m, forward, args, kwargs):
        self.paths.append(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def modules_called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_symbolic_trace(converted: Model, given) -> None:
    expected = run(converted, given)
    traced = fx.symbolic_trace(converted)
    paths = ["steps.0", "steps.0", "rnn", "cell", "last", "last"]
    assert modules_called(traced.graph) == paths == modules_called(fx.symbolic_trace(Model()).graph)
    for again in (traced, fx.symbolic_trace(traced), copy.deepcopy(traced)):
        assert modules_called(again.graph) == paths and type(again.get_submodule("rnn")) is rnnfast.RNN
        assert_same(run(again, given), expected)
    rnnfast.revert(traced)
    assert {type(traced.get_submodule(path)) for path in paths} == {*TWINS, nn.LSTMCell, nn.RNNCell}


def test_tracers_of_others(converted: Model) -> None:
    tracer = Watching()
    assert modules_called(tracer.trace(converted)) == tracer.paths


def hooked() -> nn.Module:
    layer = nn.LSTM(3, 4)
    layer.register_forward_hook(lambda _, args, outputs: (2 * outputs[0], outputs[1]))
    return layer


def wrapped() -> nn.Module:
    layer = rnnfast.LSTM(3, 4)
    forward = layer.forward
    layer.forward = lambda x: (2 * forward(x)[0], None)  # as libraries do that offload weights or count operations
    return layer


class Doubled(nn.LSTM):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return 2 * super().forward(x)[0], None


@pytest.mark.parametrize("make", [hooked, wrapped, lambda: Doubled(3, 4)], ids=["hooked", "wrapped", "subclass"])
def test_nothing_is_traced_that_would_run_twice(make: Callable[[], nn.Module]) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
            return m is not self.root

    model, x = rnnfast.convert(nn.Sequential(make())), torch.randn(5, 2, 3)
    with pytest.raises(fx.proxy.TraceError, match=r"again in its graph. Call rnnfast.revert\(model\) first"):
        fx.symbolic_trace(model)
    traced = fx.GraphModule(model, Leaves().trace(model))
    assert isinstance(traced.get_submodule("0"), rnnfast.LSTM) and torch.equal(traced(x)[0], model(x)[0])


# --- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_script(converted: Model, given, calls: list[str]) -> None:
    """TorchScript has torch's layers, on the same Parameters; the model has them too, and is told so."""
    expected, modules = run(converted, given), dict(converted.named_parameters())
    with pytest.warns(UserWarning, match=r"takes torch's layers in place of rnnfast's.* rnnfast.convert\(model\)"):
        scripted = torch.jit.script(converted)
    calls.clear()
    for a, b in zip(run(scripted, given), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not calls and type(converted.cell) is nn.LSTMCell and converted.again is converted.steps[0]
    assert dict(converted.named_parameters()) == modules
    assert_same(run(rnnfast.convert(converted), given), expected)
    assert calls


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_no_script_of_own_layers() -> None:
    class Own(rnnfast.LSTM):
        pass

    with pytest.raises(RuntimeError, match=r"knows no .*Own: only layers that rnnfast.revert\(model\)"):
        torch.jit.script(nn.Sequential(Own(3, 4)))


# --- torch.ao.quantization --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_dynamic_quantization(converted: Model) -> None:
    """It goes by the exact class. A warning says that it leaves layers alone; what is torch's again it takes."""
    quantize = torch.ao.quantization.quantize_dynamic
    with pytest.warns(UserWarning, match=r"leaves them as they are; .* call rnnfast.revert\(model\) first"):
        left = quantize(converted)
    assert type(left.again) is rnnfast.LSTM and not hasattr(left.again, "qconfig")
    assert type(quantize(rnnfast.revert(converted)).again) is torch.ao.nn.quantized.dynamic.LSTM


def test_qconfig_is_an_attribute(converted: Model) -> None:
    with pytest.warns(UserWarning, match="does not know"):
        converted.rnn.qconfig = config = object()
    assert converted.rnn.qconfig is config
    assert rnnfast.revert(converted).rnn.qconfig is config
    with pytest.raises(AttributeError, match="qconfig"):
        rnnfast.LSTM(3, 4).qconfig  # noqa: B018


# --- a user's own layers ----------------------------------------------------------------------------------------------


class Ragged(ABC, nn.RNNBase):
    """Such a base as forecasting packages have: a forward of its own, which calls that of torch's layer."""

    @abstractmethod
    def blank(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, scale: float = 1) -> Tensor:
        y, _ = super().forward(x, hx=self.blank(x) if hx is None else hx)
        return y * scale


class RaggedLSTM(Ragged, nn.LSTM):
    def __init__(self, size: int) -> None:
        super().__init__(size, 4)
        self.note = "kept"

    def blank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * (torch.ones(1, x.size(1), 4),)


class Plain(nn.LSTM):
    pass


@pytest.mark.parametrize("make", [lambda: RaggedLSTM(3), lambda: Plain(3, 4)], ids=["ragged", "plain"])
def test_own_layers(make: Callable[[], nn.Module], calls: list[str]) -> None:
    layer, x = make(), torch.randn(5, 2, 3)
    own, expected = type(layer), layer(x)
    rnnfast.convert(layer)
    assert isinstance(layer, own) and isinstance(layer, rnnfast.LSTM)
    got = layer(x)
    torch.testing.assert_close(got, expected)
    assert calls == ["LSTM"] and repr(layer) == repr(make())
    for copied in (copy.deepcopy(layer), *(pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(6))):
        assert type(copied) is type(layer) and vars(copied).keys() == vars(layer).keys()
        torch.testing.assert_close(copied(x), got, rtol=0, atol=0)
    assert type(rnnfast.convert(make())) is type(layer)  # one class, however many layers
    assert type(rnnfast.revert(layer)) is own
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_own_layers_compile() -> None:
    model = rnnfast.convert(nn.Sequential(RaggedLSTM(3)))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()


def test_dynamo_goes_on_refusing_torchs_own() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(nn.LSTM(3, 4), fullgraph=True, backend="eager")(torch.zeros(1, 1, 3))
    torch._dynamo.reset()


# --- weights for cuDNN ------------------------------------------------------------------------------------------------


def test_flat_weights(monkeypatch) -> None:
    """Where torch's operators run, they find the weights as they want them, and copy them at no call."""
    flattened = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: flattened.append(self))
    layer = rnnfast.LSTM(3, 4)
    layer.double()
    assert flattened == [layer, layer]
    torch.compile(lambda: layer.flatten_parameters(), fullgraph=True, backend="eager")()  # as many models do
    assert flattened == [layer, layer]
    torch._dynamo.reset()
