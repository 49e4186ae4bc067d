"""rnnfast's layers beside torch's: whatever is said to one is said to the other, and both must answer alike.

Numbers over the whole table of cases are test_parity.py's; here it is options, kinds of input, errors, copies,
dropout, and what has no kernel. `kernel_calls` tells the kernels from torch's own operators: without it a layer that
always fell back would pass everything here.
"""

# ruff: noqa: E741 (I is the legend's letter)
from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import fallback
from rnnfast._autograd import op

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # torch's, on how it runs them
    pytest.mark.filterwarnings("ignore:dropout option adds dropout"),  # likewise, with one layer
]
LAYERS = ("LSTM", "RNN")


class Calls(list):
    """Every call of the kernels, by the shape of its input; `of` counts those of one function."""

    def of(self, run: Callable[[], Any]) -> int:
        before = len(self)
        run()
        return len(self) - before


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads are not the point here, and waiting for each other on a busy machine they take ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture
def kernel_calls(monkeypatch) -> Calls:
    calls, recurrent = Calls(), op.recurrent

    def spy(mode, x, *rest):
        calls.append(x.shape)
        return recurrent(mode, x, *rest)

    monkeypatch.setattr(op, "recurrent", spy)
    return calls


@pytest.fixture
def unwarned(monkeypatch) -> None:
    """As in a new process, no reason for falling back has been given yet."""
    monkeypatch.setattr(fallback, "_warned", set())


def tensors(result: Any) -> list[Tensor]:
    """Every tensor of a layer's result, a PackedSequence's too."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


def assert_alike(got: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        assert a.stride() == b.stride()


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch's and rnnfast's, each made from the same seed."""
    made = []
    for library in (nn, rnnfast):
        torch.manual_seed(0)
        made.append(getattr(library, name)(*args, **kwargs))
    return made[0], made[1]


def packed(T: int, B: int, I: int, sort: bool, **kwargs) -> PackedSequence:
    lengths = [max(1, T - 2 * b) for b in range(B)]
    lengths = lengths if sort else lengths[1:] + lengths[:1]
    return pack_padded_sequence(torch.randn(T, B, I, **kwargs), lengths, enforce_sorted=sort)


# ------------------------------------------------------------------------------------- every option


@st.composite
def calls(draw) -> tuple[str, dict, Any, Any]:
    """A layer's name, its arguments, an input, and initial states or None, all float64."""
    name, kind = draw(st.sampled_from(LAYERS)), draw(st.sampled_from(("padded", "unbatched", "sorted", "unsorted")))
    T, B, I, H = (draw(st.integers(1, n)) for n in (6, 5, 9, 11))
    options = {
        "input_size": I,
        "hidden_size": H,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from((0.0, 0.4, 1.0))),
        "bidirectional": draw(st.booleans()),
        "dtype": torch.float64,
    }
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    elif draw(st.booleans()) and H > 1:
        options["proj_size"] = draw(st.integers(1, H - 1))
    torch.manual_seed(draw(st.integers(0, 9)))
    double = {"dtype": torch.float64}
    if kind == "padded":
        x: Any = torch.randn(*((B, T) if options["batch_first"] else (T, B)), I, **double)
    elif kind == "unbatched":
        x = torch.randn(T, I, **double)
    else:
        x = packed(T, B, I, sort=kind == "sorted", **double)
    LD = options["num_layers"] * (1 + options["bidirectional"])
    lead = (LD,) if kind == "unbatched" else (LD, B)
    h0 = torch.randn(*lead, options.get("proj_size", H), **double)
    hx: Any = (h0, torch.randn(*lead, H, **double)) if name == "LSTM" else h0
    return name, options, x, draw(st.sampled_from((None, hx)))


@given(calls(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_options(call: tuple[str, dict, Any, Any], training: bool) -> None:
    """Weights, description, results, their memory layout, gradients, dropout: from one seed, all are torch's."""
    name, options, x, hx = call
    torchs, ours = pair(name, **options)
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    assert [[w.shape for w in some] for some in ours.all_weights] == [
        [w.shape for w in some] for some in torchs.all_weights
    ]
    gradients, results = [], []
    for layer in (torchs, ours):
        torch.manual_seed(1)
        results.append(layer.train(training)(x, hx))
        weighted = sum((t * torch.arange(t.numel()).view(t.shape)).sum() for t in tensors(results[-1])[:1])
        gradients.append(torch.autograd.grad(weighted, list(layer.parameters()), allow_unused=True))
        results[-1] = (results[-1], torch.rand(1))  # as many random numbers were drawn
    assert_alike(results[1], results[0])
    zeros = [torch.zeros_like(p) for p in ours.parameters()]
    for a, b, zero in zip(gradients[1], gradients[0], zeros, strict=True):
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_run(name: str, dtype: torch.dtype, kernel_calls: Calls) -> None:
    """Once for the whole stack, whatever the kind of input; and never in torch's own layers."""
    torchs, ours = pair(name, 3, 4, num_layers=2, bidirectional=True, dropout=0.5, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    inputs = [x, x[:, 0], packed(5, 2, 3, True, dtype=dtype), packed(5, 2, 3, False, dtype=dtype), x.mT.mT[::2]]
    for x in inputs:
        states = tensors(ours(x)[1])
        hx = tuple(states) if name == "LSTM" else states[0]
        assert kernel_calls.of(lambda x=x: ours(x)) == 1
        assert kernel_calls.of(lambda x=x, hx=hx: ours(x, hx)) == 1
        assert kernel_calls.of(lambda x=x: torchs(x)) == 0


def test_unsorted_batch_is_each_sequence_alone() -> None:
    """Lengths in any order: states and outputs belong to the sequences as the user gave them."""
    torch.manual_seed(0)
    layer = rnnfast.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    lengths, x = [2, 5, 1, 3], torch.randn(5, 4, 3, dtype=torch.float64)
    h0, c0 = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    y, (h_n, c_n) = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), (h0, c0))
    padded, _ = pad_packed_sequence(y)
    for b, T in enumerate(lengths):
        alone, (h, c) = layer(x[:T, b], (h0[:, b], c0[:, b]))
        for a, b_ in ((padded[:T, b], alone), (h_n[:, b], h), (c_n[:, b], c)):
            torch.testing.assert_close(a, b_, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_stream(name: str) -> None:
    """Step by step with the states carried on is the same as the whole sequence."""
    _, layer = pair(name, 3, 4, num_layers=2, dtype=torch.float64)
    x, hx, steps = torch.randn(6, 1, 3, dtype=torch.float64), None, []
    with torch.no_grad():
        for t in range(6):
            y, hx = layer(x[t : t + 1], hx)
            steps.append(y)
        expected, last = layer(x)
    torch.testing.assert_close(torch.cat(steps), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(tensors(hx), tensors(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------- bad input


def outcome(run: Callable[[ModuleType], Any], library: ModuleType) -> tuple[Any, Exception | None]:
    """The result, from a fixed seed, or the error."""
    torch.manual_seed(0)
    try:
        return run(library), None
    except Exception as error:
        return None, error


def assert_same_outcome(run: Callable[[ModuleType], Any], same_words: bool = True) -> None:
    """The same type of error as from torch, as a rule in the same words; the same result if torch takes it."""
    (expected, torchs), (got, ours) = outcome(run, nn), outcome(run, rnnfast)
    assert type(ours) is type(torchs), f"torch: {torchs!r}, rnnfast: {ours!r}"
    if torchs is None:
        assert_alike(got, expected, 1e-5, 1e-6)
    elif same_words:
        assert str(ours) == str(torchs)


BAD_LAYERS = [
    *[((), {}), ((3,), {}), ((0, 4), {}), ((3, 0), {}), ((3.0, 4), {}), ((3, 4.0), {}), ((3, 4, 0), {})],
    *[((3, 4), {k: v}) for k, v in (("bias", 1), ("batch_first", 1), ("mode", "LSTM"), ("no_such", 1))],
    *[((3, 4), {"dropout": p}) for p in (-0.1, 1.5, True, "much")],
]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        *[(name, *bad) for name in LAYERS for bad in BAD_LAYERS],
        *[("RNN", (3, 4), {"proj_size": p}) for p in (0, 2)],
        *[("RNN", (3, 4), {"nonlinearity": f}) for f in ("TANH", "sigmoid", None)],
        *[("RNN", (3, 4, 1, f), {}) for f in (True, "sigmoid")],
        ("RNN", (3, 4, 1, "relu"), {"nonlinearity": "relu"}),
        *[("LSTM", (3, 4), {"proj_size": p}) for p in (-1, 4, 5)],
        *[("LSTM", (3, 4), {"nonlinearity": "tanh"}), ("LSTM", (3, 4, 1, "relu"), {})],
    ],
)
def test_bad_arguments(name: str, args: tuple, kwargs: dict) -> None:
    assert_same_outcome(lambda library: getattr(library, name)(*args, **kwargs))


X, H0, C0 = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)  # of layers with I=3, H=4
SORTED, UNSORTED = packed(5, 2, 3, sort=True), packed(5, 2, 3, sort=False)
BAD_INPUTS = {
    **{f"{n}D": X[(0,) * (3 - n)] if n < 3 else X[None] for n in (0, 1, 4)},
    **{"wide": torch.zeros(5, 2, 4), "narrow": X[..., :2], "unbatched_narrow": X[:, 0, :2]},
    **{"no_steps": X[:0], "no_steps_unbatched": X[:0, 0], "nothing": X[:0, :0], "no_features": X[..., :0]},
    **{str(t): X.to(t) for t in (torch.float64, torch.int64, torch.bfloat16, torch.complex64, torch.bool)},
    **{"meta": X.to("meta"), "sparse": X.to_sparse()},
    "packed_narrow": PackedSequence(SORTED.data[:, :2], SORTED.batch_sizes),
    "packed_3D": PackedSequence(X, SORTED.batch_sizes),
    "packed_float64": PackedSequence(SORTED.data.double(), SORTED.batch_sizes),
    "packed_too_few_rows": PackedSequence(SORTED.data[:-1], SORTED.batch_sizes),
    "packed_int32": PackedSequence(SORTED.data, SORTED.batch_sizes.int()),
    "packed_no_sizes": PackedSequence(SORTED.data, SORTED.batch_sizes[:0]),
}
OTHER_WORDS = ("sparse", "packed_too_few_rows")  # torch's come from deep inside
NOT_TENSORS = {"none": None, "list": [[1.0]], "numpy": X.numpy(), "number": 1.0}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input(name: str, bad: str) -> None:
    assert_same_outcome(lambda library: getattr(library, name)(3, 4)(BAD_INPUTS[bad]), bad not in OTHER_WORDS)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", NOT_TENSORS)
def test_not_a_tensor(name: str, bad: str) -> None:
    assert_same_outcome(lambda library: getattr(library, name)(3, 4)(NOT_TENSORS[bad]), same_words=False)


def strange_states(h: Tensor, c: Tensor) -> dict[str, Any]:
    """What is not quite the initial states of an LSTM, made from h and c, which are. Little of it does torch take."""
    return {
        **{"no_c": (h,), "too_many": (h, c, c), "bare": h, "stacked": torch.stack([h, c]), "text": "hc"},
        **{"nones": (None, None), "h_none": (None, c), "c_none": (h, None), "empty": ()},
        **{"h_wide": (torch.cat([h, h], -1), c), "c_wide": (h, torch.cat([c, c], -1))},
        **{"flat": (h[0], c[0]), "deep": (h[None], c[None]), "h_flat": (h[0], c), "c_flat": (h, c[0])},
        **{"float64": (h.double(), c.double()), "h_int": (h.int(), c), "c_half": (h, c.half())},
    }


STRANGE_HX = {
    **{f"LSTM_{bad}": ("LSTM", X, hx) for bad, hx in strange_states(H0, C0).items()},
    **{f"LSTM_packed_{bad}": ("LSTM", SORTED, hx) for bad, hx in strange_states(H0, C0).items() if bad != "deep"},
    **{f"LSTM_unsorted_{bad}": ("LSTM", UNSORTED, hx) for bad, hx in strange_states(H0, C0).items() if bad != "deep"},
    "LSTM_batch": ("LSTM", X, (H0[:, :1], C0[:, :1])),
    "LSTM_c_batch": ("LSTM", X, (H0, C0[:, :1])),
    "LSTM_packed_batch": ("LSTM", SORTED, (H0[:, :1], C0[:, :1])),
    "LSTM_unbatched_3D": ("LSTM", X[:, 0], (H0, C0)),
    "LSTM_layers": ("LSTM", X, (H0.repeat(2, 1, 1), C0.repeat(2, 1, 1))),
    **{f"RNN_{k}": ("RNN", X, h) for k, h in (("pair", (H0, C0)), ("flat", H0[0]), ("batch", H0[:, :1]))},
    **{f"RNN_{t}": ("RNN", X, H0.to(t)) for t in (torch.float64, torch.int32)},
    **{"RNN_wide": ("RNN", X, torch.zeros(1, 2, 5)), "RNN_unbatched_3D": ("RNN", X[:, 0], H0)},
    **{"RNN_packed_flat": ("RNN", SORTED, H0[0]), "RNN_packed_batch": ("RNN", UNSORTED, H0[:, :1])},
}


@pytest.mark.parametrize("strange", STRANGE_HX)
def test_strange_hx(strange: str) -> None:
    name, x, hx = STRANGE_HX[strange]
    # Of packed input torch checks no states, so what it says comes from deep inside; "text" is no tensor's attribute.
    same_words = "text" not in strange and not (name == "LSTM" and isinstance(x, PackedSequence))
    assert_same_outcome(lambda library: getattr(library, name)(3, 4)(x, hx), same_words)


@pytest.mark.parametrize("x", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "c"), [((6, 2, 4), (4, 2, 4)), ((4, 2, 4), (2, 2, 4)), ((1, 4, 2, 4), (1, 4, 2, 4))])
@pytest.mark.filterwarnings("ignore::rnnfast.fallback.FallbackWarning")
def test_packed_states_of_other_layers(x: PackedSequence, dtype: torch.dtype, h: tuple, c: tuple) -> None:
    """torch.nn.LSTM reads out of bounds here and, as a rule, takes the process with it."""
    layer = rnnfast.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[[01]\] size \(4, 2, 4\), got"):
        layer(x.to(dtype), (torch.zeros(h, dtype=dtype), torch.zeros(c, dtype=dtype)))


CORRUPT_SIZES = {"rising": [2, 2, 2, 1, 2], "first": [1, 2, 2, 2, 2], "negative": [4, 4, 4, -3], "sum": [4, 3, 3]}


@pytest.mark.parametrize("sizes", CORRUPT_SIZES.values(), ids=CORRUPT_SIZES)
def test_corrupt_batch_sizes(sizes: list[int]) -> None:
    """A PackedSequence that no pack_sequence makes. torch refuses it too, but by what its operators stumble on."""
    x = PackedSequence(torch.zeros(9, 3), torch.tensor(sizes))
    with pytest.raises(RuntimeError):
        nn.LSTM(3, 4)(x)
    with pytest.raises((RuntimeError, ValueError), match="batch_sizes"):
        rnnfast.LSTM(3, 4)(x)


def test_oversized_states_of_an_unsorted_batch(kernel_calls: Calls) -> None:
    """torch takes the states of the first B sequences out of more; so do we, with its operators."""
    torchs, ours = pair("LSTM", 3, 4)
    hx = torch.randn(2, 1, 5, 4).unbind()
    assert kernel_calls.of(lambda: assert_alike(ours(UNSORTED, hx), torchs(UNSORTED, hx), 1e-5, 1e-6)) == 0


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(name: str, batch_first: bool) -> None:
    torchs, ours = pair(name, 3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = X[:, :0].transpose(0, 1) if batch_first else X[:, :0]
    got, expected = ours(x), torchs(x)
    assert [t.shape for t in tensors(got)] == [t.shape for t in tensors(expected)]
    sum(t.sum() for t in tensors(got)).backward()
    assert not any(p.grad.any() for p in ours.parameters())


# ------------------------------------------------------------------------------ copies and weights


@pytest.fixture(params=LAYERS)
def layer(request) -> nn.Module:
    return pair(request.param, 3, 4)[1]


def run(layer: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    x = torch.linspace(-1, 1, 30).view(5, 2, 3) if x is None else x
    x = x.to(next(layer.parameters()).dtype)
    return tensors(layer(x))


def save_and_load(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), save_and_load])
def test_copy(layer: nn.Module, copied: Callable[[nn.Module], nn.Module], kernel_calls: Calls) -> None:
    twin, before = copied(layer), run(layer)
    assert type(twin) is type(layer) and repr(twin) == repr(layer)
    assert kernel_calls.of(lambda: assert_alike(run(twin), before, rtol=0, atol=0)) == 1
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_alike(run(layer), before, rtol=0, atol=0)  # nothing is shared
    assert not torch.equal(run(twin)[0], before[0])


@pytest.mark.parametrize("name", LAYERS)
def test_state_of_an_old_pickle(name: str) -> None:
    """Before 1.8 torch pickled no proj_size."""
    layer = pair(name, 3, 4, num_layers=2)[1]
    state = layer.__getstate__()
    del state["proj_size"]
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    assert_alike(run(old), run(layer), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_both_ways(name: str) -> None:
    ours, torchs = getattr(rnnfast, name)(3, 4), getattr(nn, name)(3, 4)
    ours.load_state_dict(torchs.state_dict())
    assert_alike(run(ours), run(torchs), 1e-5, 1e-6)
    torchs = getattr(nn, name)(3, 4)
    torchs.load_state_dict(ours.state_dict())
    assert_alike(run(ours), run(torchs), 1e-5, 1e-6)


def test_to_another_dtype(layer: nn.Module, kernel_calls: Calls) -> None:
    expected = run(layer)
    assert kernel_calls.of(lambda: assert_alike(run(layer.double()), [t.double() for t in expected], 1e-5, 1e-6)) == 1
    assert kernel_calls.of(lambda: assert_alike(run(layer.to(torch.float32)), expected, rtol=0, atol=0)) == 1


CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "assigned": lambda layer, w: setattr(layer, w, nn.Parameter(getattr(layer, w).detach() * 2)),
    "data": lambda layer, w: setattr(getattr(layer, w), "data", getattr(layer, w).detach() * 2),
    "data_in_place": lambda layer, w: getattr(layer, w).data.mul_(2),
    "numpy": lambda layer, w: getattr(layer, w).detach().numpy().fill(0.3),
    "pruned": lambda layer, w: prune.random_unstructured(layer, w, 0.5),
    "weight_norm": lambda layer, w: (
        parametrizations.weight_norm(layer, w).get_parameter(f"parametrizations.{w}.original0").data.mul_(2)
    ),
    "old_weight_norm": lambda layer, w: nn.utils.weight_norm(layer, w).get_parameter(f"{w}_g").data.mul_(2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_changed_weights(name: str, change: str, kernel_calls: Calls) -> None:
    """The weights of this call count, however they got there since the last one."""
    torchs, ours = pair(name, 3, 4)
    x = torch.ones(5, 2, 3)
    h = torch.ones(1, 2, 4)
    hx = (h, h) if "LSTM" in name else h
    before = tensors(ours(x, hx))[0]
    for each in (torchs, ours):
        torch.manual_seed(0)
        CHANGES[change](each, next(n for n, _ in each.named_parameters() if "weight_hh" in n))
    assert kernel_calls.of(lambda: assert_alike(ours(x, hx), torchs(x, hx), 1e-5, 1e-6)) == 1
    assert not torch.allclose(tensors(ours(x, hx))[0], before)


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call(name: str) -> None:
    torchs, ours = pair(name, 3, 4)
    x = torch.ones(5, 2, 3)
    other = {key: p.detach() * 2 for key, p in ours.named_parameters()}
    expected = torch.func.functional_call(torchs, other, (x,))
    assert_alike(torch.func.functional_call(ours, other, (x,)), expected, 1e-5, 1e-6)
    assert not torch.allclose(tensors(ours(x))[0], tensors(expected)[0])


def test_weight_of_a_wrong_shape() -> None:
    layer = rnnfast.LSTM(3, 4)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(16, 5))
    with pytest.raises(RuntimeError, match="5"):
        layer(X)


# ---------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_from_a_seed(name: str, p: float, dtype: torch.dtype, kernel_calls: Calls) -> None:
    """Large enough for torch to draw the numbers of a mask in its vectorised way; and two masks in a row."""
    torchs, ours = pair(name, 5, 40, num_layers=3, dropout=p, bidirectional=True, dtype=dtype)
    bound = 1e-4 if dtype == torch.float32 else 1e-10
    for x in (torch.randn(30, 8, 5, dtype=dtype), packed(30, 8, 5, False, dtype=dtype)):
        results = []
        for layer in (torchs, ours):
            torch.manual_seed(7)
            y, state = layer(x)
            results.append((y, state, torch.rand(1)))
        assert_alike(results[1], results[0], bound, bound)
        assert len(kernel_calls) == 1
        kernel_calls.clear()


def test_dropout_only_in_training() -> None:
    _, layer = pair("LSTM", 3, 4, num_layers=2, dropout=0.5)
    first, second = layer(X + 1)[0], layer(X + 1)[0]
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(X + 1)[0], layer(X + 1)[0])


# ------------------------------------------------------------------------------ what has no kernel


FALLBACKS = {"torch.complex64": torch.complex64, "torch.complex128": torch.complex128}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reason", FALLBACKS)
def test_fallback(name: str, reason: str, unwarned, kernel_calls: Calls) -> None:
    """torch's operators to the last bit, gradients too; one warning, which points to the call."""
    torchs, ours = pair(name, 3, 4, dtype=FALLBACKS[reason])
    x = torch.ones(5, 2, 3).to(FALLBACKS[reason])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = ours(x)
        ours(x), copy.deepcopy(ours)(x)
    given = [w for w in caught if w.category is fallback.FallbackWarning]
    assert len(given) == 1 and reason in str(given[0].message) and "torch's own operators" in str(given[0].message)
    assert given[0].filename == __file__
    assert_alike(got, torchs(x), rtol=0, atol=0)
    tensors(got)[0].abs().sum().backward()
    tensors(torchs(x))[0].abs().sum().backward()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not kernel_calls


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LAYERS)
def test_meta(name: str, unwarned) -> None:
    """Shapes only, so nobody needs to know who computes nothing."""
    torchs, ours = pair(name, 3, 4, device="meta")
    x = torch.empty(5, 2, 3, device="meta")
    got, expected = tensors(ours(x)), tensors(torchs(x))
    assert [(t.device.type, t.shape) for t in got] == [("meta", t.shape) for t in expected]


@pytest.mark.filterwarnings("error::rnnfast.fallback.FallbackWarning")
def test_no_warning_without_reason(layer: nn.Module, unwarned) -> None:
    """Neither where a kernel runs nor for bad input nor for an empty batch, which torch takes over quietly."""
    run(layer), run(layer.double())
    for bad in (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, device="meta"), torch.zeros(2, 9).double()):
        with pytest.raises((RuntimeError, ValueError)):
            layer(bad)
    layer(torch.zeros(5, 0, 3).double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [False, True])
def test_trace(name: str, grad: bool, unwarned) -> None:
    """A traced layer holds torch's operators, so it computes from other inputs too, and loads without rnnfast."""
    _, ours = pair(name, 3, 4)
    lead = (5, 2)
    with torch.set_grad_enabled(grad):
        with pytest.warns(fallback.FallbackWarning, match=r"torch\.jit\.trace"):
            traced = torch.jit.trace(ours, (torch.zeros(*lead, 3),))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        x = torch.randn(*[n + 1 for n in lead], 3)
        assert_alike(torch.jit.load(buffer)(x), ours(x), 1e-5, 1e-6)
