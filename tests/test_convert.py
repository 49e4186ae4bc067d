"""rnnfast.convert and revert: the layers of any model change class in place, and nothing else about the model does."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rnnfast
from rnnfast._autograd import op

TWINS = {nn.LSTM: rnnfast.LSTM, nn.RNN: rnnfast.RNN}
every_layer = pytest.mark.parametrize("kind", TWINS, ids=lambda kind: kind.__name__)


class Model(nn.Module):
    """Every kind of layer, in every kind of container, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.middle = nn.Sequential(nn.Linear(8, 5), nn.Tanh())
        self.steps = nn.ModuleList([nn.LSTMCell(5, 6), nn.RNNCell(6, 4, nonlinearity="relu")])
        self.heads = nn.ModuleDict({"main": nn.RNN(4, 3, nonlinearity="relu"), "projected": nn.LSTM(3, 4, proj_size=2)})
        self.again = self.heads["main"]
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.encoder(x)[0]) * self.scale  # (B,T,5)
        state, h, steps = None, None, []
        for t in range(y.size(1)):
            state = self.steps[0](y[:, t], state)
            h = self.steps[1](state[0], h)
            steps.append(h)
        y, _ = self.heads["main"](torch.stack(steps))  # (T,B,3)
        return self.heads["projected"](y)[0] + self.again(torch.stack(steps))[0][..., :2]


def model(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def layers(of: nn.Module) -> dict[str, type]:
    """The class of everything in a model, by name; a shared module under each of its names."""
    return {name: type(module) for name, module in of.named_modules(remove_duplicate=False)}


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def input_of(layer: nn.Module) -> Tensor:
    """For a layer with I=3."""
    lead = (2,) if isinstance(layer, nn.modules.rnn.RNNCellBase) else (5, 2)
    return torch.linspace(-1, 1, 30)[: 3 * torch.tensor(lead).prod()].view(*lead, 3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads are not the point here, and waiting for each other on a busy machine they take ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 3, dtype=torch.float64)  # (B,T,I)


@pytest.fixture
def log(caplog) -> Callable[[], list[tuple[str, str]]]:
    """Level and text of what the package has logged since it was last asked."""
    caplog.set_level(logging.INFO, logger="rnnfast")

    def read() -> list[tuple[str, str]]:
        records = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "rnnfast"]
        caplog.clear()
        return records

    return read


# -------------------------------------------------------------------------------- there and back


def test_every_layer_changes_class(log) -> None:
    m = model()
    before = layers(m)
    assert rnnfast.convert(m) is m
    assert layers(m) == {name: TWINS.get(kind, kind) for name, kind in before.items()}
    assert layers(m) != before
    swapped = [name for name, module in m.named_modules() if type(module) in TWINS.values()]
    messages = log()
    assert [level for level, _ in messages] == ["INFO"] * len(swapped)
    for name, (_, text) in zip(swapped, messages, strict=True):  # a shared layer is told of once
        assert text.startswith(f"{name}: torch.nn.modules.rnn.") and "became rnnfast.modules." in text
    assert rnnfast.convert(m) is m and not log()  # nothing is left to do, nothing to say

    assert rnnfast.revert(m) is m
    assert layers(m) == before
    assert [text.split(":")[0] for _, text in log()] == swapped
    assert rnnfast.revert(m) is m and not log()


def test_the_model_keeps_everything_else() -> None:
    m = model().eval()
    m.encoder.train()
    m.steps[1].requires_grad_(False)
    m.heads["main"].note = note = object()  # a user's attribute
    modules, attributes = dict(m.named_modules()), {name: dict(vars(part)) for name, part in m.named_modules()}
    parameters, buffers = dict(m.named_parameters()), dict(m.named_buffers())
    described, state = repr(m), copy.deepcopy(m.state_dict())

    for swap in (rnnfast.convert, rnnfast.revert):
        swap(m)
        assert repr(m) == described
        assert m.again is m.heads["main"] and m.again.note is note
        for now, then in (
            (m.named_modules(), modules),
            (m.named_parameters(), parameters),
            (m.named_buffers(), buffers),
        ):
            now = dict(now)
            assert list(now) == list(then) and all(now[name] is then[name] for name in then)
        for name, part in m.named_modules():
            assert vars(part).keys() == attributes[name].keys()
            assert all(vars(part)[key] is value for key, value in attributes[name].items())
        assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), state.values(), strict=True))
    assert m.encoder.training and not m.training


def test_results_and_gradients(x: Tensor, monkeypatch) -> None:
    """In training with dropout, from one seed: torch's to rounding when converted, to the last bit when reverted."""
    calls, recurrent = [], op.recurrent
    monkeypatch.setattr(op, "recurrent", lambda *args: calls.append(args[0]) or recurrent(*args))

    def run(m: Model) -> list[Tensor]:
        torch.manual_seed(2)
        y = m(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))]

    m = model()
    expected = run(m)
    assert not calls
    for a, b in zip(run(rnnfast.convert(m)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert sorted(calls) == ["LSTM"] * 2 + ["RNN_RELU"] * 2  # the cells are torch's
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(run(rnnfast.revert(m)), expected, strict=True))
    assert not calls


@every_layer
def test_a_layer_by_itself(kind: type, log) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4)
    x = input_of(layer)
    expected = tensors(layer(x))
    assert rnnfast.convert(layer) is layer and type(layer) is TWINS[kind]
    assert log() == [
        ("INFO", f"(the model itself): torch.nn.modules.rnn.{kind.__name__} became rnnfast.modules.{kind.__name__}")
    ]
    for a, b in zip(tensors(layer(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert rnnfast.revert(layer) is layer and type(layer) is kind
    assert all(torch.equal(a, b) for a, b in zip(tensors(layer(x)), expected, strict=True))


@pytest.mark.parametrize("swap", [rnnfast.convert, rnnfast.revert])
@pytest.mark.parametrize("thing", [None, 3, nn.LSTM, [nn.LSTM(1, 1)]])
def test_no_model(swap: Callable, thing: Any) -> None:
    with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(thing).__name__}"):
        swap(thing)


# ---------------------------------------------------------------------------- what goes on as before


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_an_optimizer_goes_on(x: Tensor, make: Callable) -> None:
    """Ten steps, with a change of sides in the middle of them and back, are ten steps of torch's."""

    def train(swaps: dict[int, Callable]) -> list[float]:
        m, losses = model(), []
        optimizer = make(m.parameters(), lr=0.01)
        torch.manual_seed(3)
        for step in range(10):
            swaps.get(step, lambda m: m)(m)
            optimizer.zero_grad()
            loss = (m(x) - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train({})
    assert expected[-1] < expected[0]
    assert train({3: rnnfast.convert, 7: rnnfast.revert}) == pytest.approx(expected, rel=1e-8)


@every_layer
def test_hooks(kind: type) -> None:
    layer, seen = kind(3, 4), []
    x = input_of(layer).requires_grad_()
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    layer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    next(layer.parameters()).register_hook(lambda _: seen.append("gradient"))
    for swap in (rnnfast.convert, rnnfast.revert):
        seen.clear()
        swap(layer)
        sum(t.sum() for t in tensors(layer(x))).backward()
        layer.load_state_dict(layer.state_dict())
        assert sorted(seen) == ["after", "backward", "before", "gradient", "load", "save"]


def test_tied_weights() -> None:
    """One Parameter in two layers stays one, and collects both gradients."""
    m = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    m[1].weight_hh_l0 = m[0].weight_hh_l0
    x = torch.randn(5, 2, 4)

    def gradient() -> Tensor:
        y = m[1](m[0](x)[0])[0]
        return torch.autograd.grad(y.sum(), m[0].weight_hh_l0)[0]

    expected = gradient()
    rnnfast.convert(m)
    assert m[1].weight_hh_l0 is m[0].weight_hh_l0
    torch.testing.assert_close(gradient(), expected)


def test_copies_and_files(x: Tensor) -> None:
    """A converted model is copied and saved as what it is; its state_dict fits torch's."""
    m = rnnfast.convert(model())
    m.eval()
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(m), torch.load(buffer, weights_only=False)):
        assert layers(twin) == layers(m) and torch.equal(twin(x), m(x))
    torchs = model().eval()
    torchs.load_state_dict(m.state_dict())
    torch.testing.assert_close(torchs(x), m(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("change", ["prune", "old_weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_hooks_compute(change: str) -> None:
    """Pruning and the old weight_norm leave the class alone and put the weight there before each call."""
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    if change == "prune":
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    else:
        nn.utils.weight_norm(layer, "weight_hh_l0").weight_hh_l0_g.data.mul_(2)
    expected = layer(x)[0]
    rnnfast.convert(layer)
    assert type(layer) is rnnfast.LSTM
    torch.testing.assert_close(layer(x)[0], expected)
    hidden = next(p for name, p in layer.named_parameters() if name in ("weight_hh_l0_orig", "weight_hh_l0_g"))
    layer(x)[0].sum().backward()
    assert hidden.grad.any()


# --------------------------------------------------------------------------------- what stays


class Gated(nn.LSTM):
    """A user's own layer, with an opinion on what torch's forward does."""

    def check_input(self, *args: Any) -> None:
        super().check_input(*args)


class Registered(nn.LSTM):
    """A user's own layer that wants to know of every subclass."""

    def __init_subclass__(cls) -> None:
        raise ValueError("two layers of one name")


class Lazy(nn.modules.lazy.LazyModuleMixin, nn.RNN):
    cls_to_become = nn.RNN

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.weight_ih_l0 = nn.UninitializedParameter()

    def initialize_parameters(self, x: Tensor) -> None:
        self.weight_ih_l0.materialize((4, x.size(-1)))
        nn.init.ones_(self.weight_ih_l0)
        self._init_flat_weights()


def replaced_forward() -> nn.Module:
    layer = nn.LSTM(3, 4)
    original = layer.forward
    layer.forward = lambda *args: original(*args)  # as libraries do that offload weights or count operations
    return layer


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.ModuleList([nn.LSTM(3, 4)]), {nn.LSTM})[0]


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Gated(3, 4), "Gated is a subclass that overrides check_input"),
    "no_subclass": (lambda: Registered(3, 4), "Registered has no subclass: two layers of one name"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "parametrized"),
    "replaced_forward": (replaced_forward, "forward was replaced"),
    "scripted_cell": (lambda: torch.jit.script(nn.GRUCell(3, 4)), "TorchScript"),
    "traced": (lambda: torch.jit.trace(nn.RNN(3, 4), (torch.zeros(5, 2, 3),)), "TorchScript"),
    "quantized": (quantized, "quantized"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("kind", STAY)
def test_left_alone(kind: str, log) -> None:
    """With one warning, though it is there twice, of where and why; it works as before, its neighbour is converted."""
    make, reason = STAY[kind]
    layer, x = make(), input_of(nn.GRUCell(3, 4) if kind.endswith("cell") else nn.GRU(3, 4))
    m = nn.ModuleDict({"neighbour": nn.RNN(3, 4), "odd": layer, "again": layer})
    before, expected = layers(m), tensors(layer(x))
    rnnfast.convert(m)
    assert type(m["neighbour"]) is rnnfast.RNN
    assert {name: k for name, k in layers(m).items() if name != "neighbour"} == {
        name: k for name, k in before.items() if name != "neighbour"
    }
    assert all(torch.equal(a, b) for a, b in zip(tensors(layer(x)), expected, strict=True))
    told = [text for level, text in log() if level == "WARNING"]
    assert len(told) == 1 and told[0].startswith("odd: ") and reason in told[0]
    rnnfast.revert(m)  # nothing was ours, so there is nothing to say of it
    assert layers(m) == before and [level for level, _ in log()] == ["INFO"]


def test_lazy(log) -> None:
    layer, x = Lazy(), torch.randn(5, 2, 3)
    rnnfast.convert(layer)
    assert type(layer) is Lazy and "no weights before its first call" in log()[0][1]
    expected = layer(x)[0]
    torch.testing.assert_close(rnnfast.convert(layer)(x)[0], expected)
    assert type(layer) is rnnfast.RNN


@pytest.mark.parametrize(
    ("swap", "what"),
    [(rnnfast.convert, "torch.nn.LSTM, RNN or GRU"), (rnnfast.revert, "layer of rnnfast")],
    ids=["convert", "revert"],
)
def test_nothing_to_swap(swap: Callable, what: str, log) -> None:
    """One line says so, and none speaks of what is no recurrent layer."""
    swap(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.TransformerEncoderLayer(4, 2)))
    assert [(level, text.partition(what)[1:]) for level, text in log()] == [("WARNING", (what, " in Sequential"))]


def test_nothing_to_swap_is_seen(run_python) -> None:
    """Also by a user who has set up no logging."""
    done = run_python("-c", "import torch, rnnfast; rnnfast.convert(torch.nn.Linear(1, 1))")
    assert done.stderr == "convert: there is no torch.nn.LSTM, RNN or GRU in Linear\n"


def test_subclasses_on_request(log) -> None:
    class Own(nn.LSTM):
        pass

    m = nn.ModuleList([nn.LSTM(3, 4), Own(3, 4)])
    rnnfast.convert(m, subclasses=False)
    assert [type(layer) for layer in m] == [rnnfast.LSTM, Own]
    assert [level for level, _ in log()] == ["INFO", "WARNING"]
    rnnfast.convert(m)
    assert isinstance(m[1], Own) and isinstance(m[1], rnnfast.LSTM)
    assert log() == [("INFO", "1: test_convert.Own became test_convert.Own on rnnfast")]


def test_slots() -> None:
    class Slotted(nn.LSTM):
        __slots__ = ("extra",)

    layer = Slotted(3, 4)
    layer.extra = 5
    assert isinstance(rnnfast.convert(layer), rnnfast.LSTM) and layer.extra == 5
    assert type(rnnfast.revert(layer)) is Slotted and layer.extra == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.RNNCell])
def test_cells_need_no_conversion(kind: type, log) -> None:
    """rnnfast's are torch's, whatever was done to them."""
    cells = [kind(3, 4), parametrizations.weight_norm(kind(3, 4), "weight_hh"), torch.jit.script(kind(3, 4))]
    before = [type(cell) for cell in cells]
    for swap in (rnnfast.convert, rnnfast.revert):
        for cell in cells:
            swap(cell)
        assert [type(cell) for cell in cells] == before and "INFO" not in dict(log())
    assert before[0] is getattr(rnnfast, kind.__name__)


class Ours(rnnfast.LSTM):
    """A user's own layer on rnnfast's."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Ours(3, 4), "Ours is a subclass"),
        (lambda: parametrizations.weight_norm(rnnfast.LSTM(3, 4), "weight_hh_l0"), "parametrized"),
    ],
    ids=["subclass", "parametrized"],
)
def test_revert_leaves_alone(layer: Callable[[], nn.Module], reason: str, log) -> None:
    m = nn.ModuleList([layer(), rnnfast.RNN(3, 4)])
    before = type(m[0])
    rnnfast.convert(m)
    assert not log()  # all rnnfast's already
    rnnfast.revert(m)
    assert type(m[0]) is before and type(m[1]) is nn.RNN
    (level, text), _ = log()
    assert level == "WARNING" and text.startswith("0: ") and reason in text


def test_converted_and_then_parametrized(x: Tensor) -> None:
    """As the log advises: the parametrized layer then runs on rnnfast, and trains."""
    torchs, ours = nn.LSTM(3, 4, dtype=x.dtype), nn.LSTM(3, 4, dtype=x.dtype)
    ours.load_state_dict(torchs.state_dict())
    rnnfast.convert(ours)
    for layer in (torchs, ours):
        parametrizations.weight_norm(layer, "weight_hh_l0")
    assert isinstance(ours, rnnfast.LSTM)
    results = []
    for layer in (torchs, ours):
        y = layer(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_compiled_before_it_is_converted(x: Tensor) -> None:
    """What torch.compile made for torch's layer is not used for ours, nor the other way round."""
    m = nn.Sequential(nn.LSTM(3, 4, dtype=x.dtype))
    compiled = torch.compile(m, backend="eager")
    expected = m(x)[0]
    with torch.no_grad():
        for swap, kind in ((lambda m: m, nn.LSTM), (rnnfast.convert, rnnfast.LSTM), (rnnfast.revert, nn.LSTM)):
            swap(compiled)
            assert type(m[0]) is kind
            torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()
