"""rnnfast.Stream: the numbers of the layer, step by step and in chunks of any size; calls, states, files, errors."""

from __future__ import annotations

import copy
import pickle
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

import rnnfast
from rnnfast import _C

Options = dict[str, Any]

# Every cell, depth, projection and bias; sizes with every remainder of a vector, of a group of vectors and of a tile.
LAYERS: list[tuple[str, int, int, int, Options]] = [
    ("LSTM", 1, 1, 1, {}),
    ("LSTM", 1, 3, 4, {"num_layers": 2}),
    ("LSTM", 1, 1, 64, {}),
    ("LSTM", 1, 5, 33, {"bias": False}),
    ("LSTM", 3, 2, 20, {"num_layers": 3, "proj_size": 7}),
    ("LSTM", 7, 4, 80, {"num_layers": 2, "batch_first": True}),
    ("LSTM", 70, 3, 9, {"proj_size": 8}),
    ("RNN", 1, 2, 16, {"num_layers": 2}),
    ("GRU", 1, 3, 4, {"num_layers": 2}),
    ("GRU", 4, 5, 33, {"bias": False}),
    ("LeakyRNN", 2, 3, 20, {"num_layers": 2, "leak": 0.3}),
    ("LeakyRNN", 1, 3, 17, {"nonlinearity": "relu", "leak": 0.5, "learn_leak": True}),
    ("RNN", 4, 7, 130, {"nonlinearity": "relu"}),
    ("RNN", 2, 33, 5, {"bias": False, "num_layers": 2}),
]
DTYPES = [torch.float32, torch.float64]
every_layer = pytest.mark.parametrize(("name", "B", "I", "H", "options"), LAYERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make(name: str, I: int, H: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:  # noqa: E741
    torch.manual_seed(0)
    return getattr(rnnfast, name)(I, H, dtype=dtype, **options)


def run_layer(layer: Any, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """x (T,B,I) -> y (T,B,R) and the state, by torch.nn's layer of the same weights."""
    torchs = rnnfast.revert(copy.deepcopy(layer))
    torchs.batch_first = False
    with torch.no_grad():
        return torchs(x, hx)


def tolerance(layer: Any, x: Tensor, exact: Tensor) -> float:
    """Four times the error of torch's own float32, and a rounding of the result; of float64, a bound on roundings."""
    eps, largest = torch.finfo(x.dtype).eps, max(1.0, exact.abs().max().item())
    if x.dtype == torch.float64:
        return eps * len(x) * (layer.input_size + layer.hidden_size + 10) * largest
    own = (run_layer(layer, x)[0].double() - exact).abs().max().item()
    return 4 * own + 4 * eps * largest


def exact_outputs(layer: Any, x: Tensor) -> Tensor:
    return run_layer(copy.deepcopy(layer).double(), x.double())[0]


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.isa
@every_layer
@every_dtype
def test_equals_the_layer(name: str, B: int, I: int, H: int, options: Options, dtype: torch.dtype) -> None:  # noqa: E741
    layer = make(name, I, H, dtype, **options)
    stream = rnnfast.Stream(layer, B)
    x = torch.randn(60, B, I, dtype=dtype)
    exact = exact_outputs(layer, x)
    y = stream(x)
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y.double() - exact).abs().max().item() <= tolerance(layer, x, exact)
    _, state = run_layer(layer, x)
    own = stream.state
    for mine, theirs in zip(own if name == "LSTM" else [own], state if name == "LSTM" else [state], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs)


@every_layer
def test_chunks_of_every_size(name: str, B: int, I: int, H: int, options: Options) -> None:  # noqa: E741
    stream = rnnfast.Stream(make(name, I, H, **options), B)
    x = torch.randn(110, B, I)
    expected = torch.stack([stream(step) for step in x])
    for size in (1, 2, 3, 7, 47, 48, 49, 110):
        stream.reset()
        assert torch.equal(torch.cat([stream(chunk) for chunk in x.split(size)]), expected), size


def test_a_hundred_thousand_steps() -> None:
    """No error adds up: what a contracting network has rounded long ago is forgotten."""
    layer = make("LSTM", 1, 16)
    stream = rnnfast.Stream(layer)
    x = torch.randn(100_000, 1, 1)
    exact = exact_outputs(layer, x)
    off = (stream(x).double() - exact).abs()
    assert off[-1000:].max() <= off[:1000].max() * 4 and off.max() <= tolerance(layer, x[:1000], exact[:1000]) * 4


@pytest.mark.parametrize(("name", "B", "H"), [("LSTM", 1, 300), ("LSTM", 40, 64), ("RNN", 1, 800), ("RNN", 13, 300)])
def test_threads_change_no_bit(name: str, B: int, H: int) -> None:
    layer = make(name, 16, H, num_layers=2)
    x, got = torch.randn(9, B, 16), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got.append(rnnfast.Stream(layer, B)(x))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("O", [1, 5, 40])
def test_head(dtype: torch.dtype, bias: bool, O: int) -> None:  # noqa: E741
    layer = make("LSTM", 3, 20, dtype, num_layers=2, proj_size=6)
    head = torch.nn.Linear(6, O, bias=bias, dtype=dtype)
    stream, x = rnnfast.Stream(layer, 2, head=head), torch.randn(70, 2, 3, dtype=dtype)
    with torch.no_grad():
        expected = head(run_layer(layer, x)[0])
    assert stream.output_size == O
    torch.testing.assert_close(stream(x), expected)
    stream.reset()
    torch.testing.assert_close(stream(x[0]), expected[0])
    with torch.no_grad():
        head.weight.mul_(2)
        if bias:
            head.bias.zero_()
    stream.reset()
    stream.refresh()
    torch.testing.assert_close(stream(x), head(run_layer(layer, x)[0]).detach())


def test_torchs_layers() -> None:
    torch.manual_seed(0)
    for layer in (torch.nn.LSTM(3, 4), torch.nn.RNN(3, 4, nonlinearity="relu")):
        x = torch.randn(5, 1, 3)
        torch.testing.assert_close(rnnfast.Stream(layer)(x), layer(x)[0].detach())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_inputs(value: float) -> None:
    layer = make("LSTM", 3, 20)
    stream, x = rnnfast.Stream(layer, 2), torch.randn(4, 2, 3)
    expected = stream(x)
    bad = x.clone()
    bad[1, 0, 1] = value
    stream.reset()
    y = stream(bad)
    assert torch.equal(y.isnan(), run_layer(layer, bad)[0].isnan()) and torch.equal(y[:, 1], expected[:, 1])
    stream.reset([True, False])
    assert torch.equal(stream(x)[:, 0], expected[:, 0])


# ------------------------------------------------------------------------------------------ calls


def both_kinds(x: Tensor) -> list[Any]:
    return [x, x.numpy()]


@every_dtype
@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 1, 3)])
def test_answers_in_kind(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make("RNN", 3, 4, dtype)
    x = torch.randn(shape, dtype=dtype)
    answers = []
    for kind in both_kinds(x):
        y = rnnfast.Stream(layer)(kind)
        assert type(y) is type(kind) and tuple(y.shape) == (*shape[:-1], 4) and str(y.dtype) == str(kind.dtype)
        answers.append(torch.as_tensor(y))
    assert torch.equal(*answers)
    torch.testing.assert_close(answers[0].view(-1, 1, 4), run_layer(layer, x.view(-1, 1, 3))[0])


def test_answers_are_new() -> None:
    stream, x = rnnfast.Stream(make("RNN", 3, 4)), torch.randn(1, 3)
    for kind in both_kinds(x):
        first = stream(kind)
        kept = torch.as_tensor(first).clone()
        stream(kind)
        assert torch.equal(torch.as_tensor(first), kept)


def odd_strides(x: Tensor) -> list[Any]:
    """The same numbers laid out in ways that C++ leaves to Python."""
    spaced = torch.empty(*x.shape, 2)[..., 0].copy_(x)
    read_only, big_endian = x.numpy().copy(), x.numpy().astype(">f4")
    read_only.flags.writeable = False
    view = x.numpy()[..., ::-1].copy()[..., ::-1]
    matrix = x.numpy().view(type("Mine", (np.ndarray,), {}))
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    return [spaced, spaced.numpy(), read_only, big_endian, view, matrix, negated, torch.nn.Parameter(x)]


def test_any_layout() -> None:
    x = torch.randn(5, 2, 3)
    expected = rnnfast.Stream(make("LSTM", 3, 4), 2)(x)
    for odd in odd_strides(x):
        y = rnnfast.Stream(make("LSTM", 3, 4), 2)(odd)
        assert isinstance(y, Tensor if isinstance(odd, Tensor) else np.ndarray)
        assert torch.equal(torch.as_tensor(y), expected)


def test_any_strides() -> None:
    """A step of sequences that lie one after another, one number for all, numbers from the last to the first."""
    x = torch.randn(4, 10, 6)
    tensors = [x[:, 3, :3], x[:, :, 0].t()[2:5].t(), x[:1, 0, :3].expand(4, 3), x[..., ::2].transpose(0, 1)]
    for strided in tensors:
        assert not strided.is_contiguous()
        expected = rnnfast.Stream(make("LSTM", 3, 5), 4)(strided.contiguous())
        for kind in both_kinds(strided):
            assert torch.equal(torch.as_tensor(rnnfast.Stream(make("LSTM", 3, 5), 4)(kind)), expected)
    backwards = x[:, 0, :3].numpy()[::-1, ::-1]
    expected = rnnfast.Stream(make("LSTM", 3, 5), 4)(torch.tensor(backwards.copy()))
    assert np.array_equal(rnnfast.Stream(make("LSTM", 3, 5), 4)(backwards), expected)
    alone = x[0, 0, ::2]
    for kind in both_kinds(alone):
        y = torch.as_tensor(rnnfast.Stream(make("LSTM", 3, 5))(kind))
        assert torch.equal(y, rnnfast.Stream(make("LSTM", 3, 5))(alone.contiguous()))


def test_out() -> None:
    x = torch.randn(60, 2, 3)
    expected = rnnfast.Stream(make("LSTM", 3, 4), 2)(x)
    plain, spaced = torch.zeros(60, 2, 4), torch.zeros(60, 2, 8)[..., ::2]
    for out in (plain, plain.clone().numpy(), spaced, spaced.clone().numpy(), torch.zeros(4, 2, 60).permute(2, 1, 0)):
        for kind in both_kinds(x):
            stream = rnnfast.Stream(make("LSTM", 3, 4), 2)
            assert stream(kind, out=out) is out and torch.equal(torch.as_tensor(out), expected)
            out[...] = 0
    assert torch.equal(rnnfast.Stream(make("LSTM", 3, 4), 2)(x, out=None), expected)


@pytest.mark.parametrize("steps", [1, 60])
def test_out_may_be_the_input(steps: int) -> None:
    """In its place, or shifted against it."""
    memory = torch.randn(steps + 1, 1, 4)
    expected = rnnfast.Stream(make("LSTM", 4, 4))(memory[1:])
    for first in (0, 1):
        moved = torch.zeros(steps + 2, 1, 4)
        x = moved[first : steps + first].copy_(memory[1:])
        for target in (x, moved[1 : steps + 1]):
            x.copy_(memory[1:])
            assert torch.equal(rnnfast.Stream(make("LSTM", 4, 4))(x, out=target), expected)


def test_out_may_overlap_inputs_of_another_size() -> None:
    memory = torch.randn(60 * 9)
    x, target = memory[:180].view(60, 1, 3), memory[: 60 * 5].view(60, 1, 5)
    expected = rnnfast.Stream(make("LSTM", 3, 5))(x.clone())
    assert torch.equal(rnnfast.Stream(make("LSTM", 3, 5))(x, out=target), expected)


def test_a_torch_that_cannot_be_asked() -> None:
    """Before 2.10 torch had no way for C to read a tensor."""
    expected, x = rnnfast.Stream(make("LSTM", 3, 4))(torch.ones(2, 1, 3)), torch.ones(2, 1, 3)

    class Blind(rnnfast.Stream):
        def __init__(self, layer: Any) -> None:
            _C.Stream.__init__(self, rnnfast.Stream(layer)._to_bytes(), 1, np.ndarray, object)

    y = Blind(make("LSTM", 3, 4))(x)
    assert isinstance(y, Tensor) and torch.equal(y, expected)


def test_compiled_callers() -> None:
    stream, x = rnnfast.Stream(make("LSTM", 3, 4)), torch.randn(1, 3)
    expected = stream(x) * 2
    stream.reset()
    assert torch.equal(torch.compile(lambda x: stream(x) * 2, backend="eager")(x), expected)


CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "width": (torch.ones(2, 4), RuntimeError, r"Expected 3, got 4"),
    "batch": (torch.ones(3, 3), RuntimeError, r"batch of 2, got 3"),
    "batch of a chunk": (torch.ones(5, 1, 3), RuntimeError, r"batch of 2, got 1"),
    "one sequence": (torch.ones(3), RuntimeError, r"\(2,3\) or \(T,2,3\), got \(3,\)"),
    "dimensions": (torch.ones(1, 1, 2, 3), RuntimeError, r"got \(1, 1, 2, 3\)"),
    "a number": (torch.tensor(1.0), RuntimeError, r"got \(\)"),
    "no steps": (torch.ones(0, 2, 3), RuntimeError, "larger than 0"),
    "dtype": (torch.ones(2, 3, dtype=torch.float64), ValueError, r"torch.float64.*torch.float32"),
    "integers": (torch.ones(2, 3, dtype=torch.int64), ValueError, r"torch.int64.*torch.float32"),
    "dtype of an array": (np.ones((2, 3)), ValueError, r"float64.*float32"),
    "width of an array": (np.ones((2, 4), np.float32), RuntimeError, r"Expected 3, got 4"),
    "objects": (np.ones((2, 3), object), ValueError, "object"),
    "a list": ([[1.0] * 3] * 2, TypeError, "NumPy array or a torch.Tensor, got list"),
    "nothing": (None, TypeError, "NoneType"),
    "masked": (np.ma.masked_array(np.ones((2, 3), np.float32)), TypeError, "MaskedArray"),
    "another device": (torch.ones(2, 3, device="meta"), RuntimeError, "meta"),
    "sparse": (torch.ones(2, 3).to_sparse(), TypeError, "Sparse"),
}


@pytest.mark.parametrize("what", CALLS)
def test_bad_inputs(what: str) -> None:
    """An error of torch's type, and the state as it was."""
    x, error, message = CALLS[what]
    stream = rnnfast.Stream(make("LSTM", 3, 4), 2)
    stream(torch.ones(2, 3))
    before = stream.state
    with pytest.raises(error, match=message):
        stream(x)
    assert all(map(torch.equal, stream.state, before))


OUTS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.ones(2, 3), RuntimeError, r"\(2, 4\), got \(2, 3\)"),
    "dimensions": (torch.ones(1, 2, 4), RuntimeError, r"\(2, 4\), got \(1, 2, 4\)"),
    "dtype": (torch.ones(2, 4, dtype=torch.float64), ValueError, "float64"),
    "a list": ([[0.0] * 4] * 2, TypeError, "list"),
    "read-only": (np.zeros((2, 4), np.float32), RuntimeError, "read-only"),
    "read-only, one number": (np.broadcast_to(np.float32(0), (2, 4)), RuntimeError, "read-only"),
}
OUTS["read-only"][0].flags.writeable = False


@pytest.mark.parametrize("what", OUTS)
def test_bad_out(what: str) -> None:
    out, error, message = OUTS[what]
    stream = rnnfast.Stream(make("LSTM", 3, 4), 2)
    before = stream.state
    for x in both_kinds(torch.ones(2, 3)):
        with pytest.raises(error, match=message):
            stream(x, out=out)
    assert all(map(torch.equal, stream.state, before))


def test_bad_arguments() -> None:
    stream, x = rnnfast.Stream(make("LSTM", 3, 4)), torch.ones(1, 3)
    for arguments, keywords in [((), {}), ((x, x), {}), ((x,), {"hx": None}), ((x,), {"out": None, "hx": None})]:
        with pytest.raises(TypeError):
            stream(*arguments, **keywords)  # type: ignore[arg-type]


def test_one_thread_at_a_time() -> None:
    """A second one gets an error instead of a state that two have written."""
    torch.set_num_threads(1)
    stream = rnnfast.Stream(make("LSTM", 256, 256))
    x, got, refused = torch.randn(10_000, 1, 256), [], 0
    expected = stream(x)
    stream.reset()
    state = stream.state
    first = threading.Thread(target=lambda: got.append(stream(x)))
    first.start()
    while not refused and first.is_alive():
        try:
            stream._get_state(*(part.data_ptr() for part in state))
        except RuntimeError:
            refused = 1
    for use in (stream.reset, stream.refresh, stream._to_bytes, lambda: stream(x[0])):
        try:
            use()
        except RuntimeError as error:
            refused += str(error) == "this stream is being used by another thread"
    first.join()
    assert refused > 1 and torch.equal(got[0], expected)
    stream.reset()
    assert torch.equal(stream(x), expected)  # it can be used again


# ------------------------------------------------------------------------------------------ state


def test_state_goes_to_the_layer_and_back() -> None:
    for name in ("LSTM", "RNN"):
        layer, x = make(name, 3, 20, num_layers=2), torch.randn(8, 2, 3)
        stream = rnnfast.Stream(layer, 2)
        expected = stream(x)
        stream.reset()
        stream(x[:5])
        torch.testing.assert_close(run_layer(layer, x[5:], stream.state)[0], expected[5:])
        _, state = run_layer(layer, x[:5])
        stream.state = state
        torch.testing.assert_close(stream(x[5:]), expected[5:])
        stream.state = tuple(part.numpy() for part in state) if name == "LSTM" else state.numpy()
        torch.testing.assert_close(stream(x[5:]), expected[5:])


def test_state_is_a_copy() -> None:
    stream, x = rnnfast.Stream(make("LSTM", 3, 4)), torch.randn(1, 3)
    stream(x)
    h, c = stream.state
    kept = h.clone(), c.clone()
    stream(x)
    assert torch.equal(h, kept[0]) and torch.equal(c, kept[1])
    h.zero_()
    assert stream.state[0].abs().max() > 0
    stream.state = h[:, 0], c[:, 0]  # of one sequence, as torch has it
    assert torch.equal(stream.state[1], c)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_reset_of_some(kind: Any) -> None:
    stream, x = rnnfast.Stream(make("LSTM", 3, 20, num_layers=2), 3), torch.randn(1, 3, 3)
    first, second = stream(x), stream(x)
    stream.reset()
    stream(x)
    stream.reset(kind([True, False, True]))
    y = stream(x)
    assert torch.equal(y[:, 1], second[:, 1]) and torch.equal(y[:, ::2], first[:, ::2])
    stream.reset()
    assert torch.equal(stream(x), first)


def test_bad_states() -> None:
    stream = rnnfast.Stream(make("LSTM", 3, 4, proj_size=2), 2)
    h, c = stream.state
    assert h.shape == (1, 2, 2) and c.shape == (1, 2, 4)
    before = stream.state
    bad: list[tuple[Any, type[Exception], str]] = [
        (h, RuntimeError, "pair"),
        ((h,), RuntimeError, "pair"),
        ((c, c), RuntimeError, r"state h: expected shape \(1, 2, 2\), got \(1, 2, 4\)"),
        ((h, h), RuntimeError, r"state c: expected shape \(1, 2, 4\)"),
        ((h[:, 0], c[:, 0]), RuntimeError, "shape"),
        ((h.double(), c), ValueError, "float64"),
        ((h, None), TypeError, "NoneType"),
        (None, RuntimeError, "pair"),
    ]
    for state, error, message in bad:
        with pytest.raises(error, match=message):
            stream.state = state
    for mask, error in (([True], RuntimeError), ([1, 0], TypeError), (torch.ones(2, 1) > 0, RuntimeError)):
        with pytest.raises(error):
            stream.reset(mask)
    assert all(map(torch.equal, stream.state, before))


# ------------------------------------------------------------------------------------------ layers


def test_a_snapshot_until_it_is_refreshed() -> None:
    layer, x = make("LSTM", 3, 20), torch.randn(6, 1, 3)
    stream = rnnfast.Stream(layer)
    before = stream(x[:3])
    layer.weight_hh_l0.data.mul_(0.5)  # which no version counter sees
    stream.reset()
    assert torch.equal(stream(x[:3]), before)
    state = stream.state
    stream.refresh()
    assert all(map(torch.equal, stream.state, state))
    torch.testing.assert_close(stream(x[3:]), run_layer(layer, x[3:], state)[0])


def test_weights_that_are_made_from_others() -> None:
    """Of parametrizations, of pruning and of torch's older weight norm: those that a call of the layer has now."""
    x = torch.randn(6, 1, 3)
    for change in (
        lambda layer: torch.nn.utils.parametrizations.orthogonal(layer, "weight_hh_l0"),
        lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
        lambda layer: torch.nn.utils.weight_norm(layer, "weight_hh_l0"),
    ):
        layer = make("RNN", 3, 6)
        change(layer)
        stream = rnnfast.Stream(layer)
        with torch.no_grad():
            torch.testing.assert_close(stream(x), layer(x)[0])
            for parameter in layer.parameters():
                parameter.mul_(1.5)
            stream.reset()
            stream.refresh()
            torch.testing.assert_close(stream(x), layer(x)[0])


class Doubled(rnnfast.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


class Named(rnnfast.LSTM):
    """Nothing of its own."""


def with_hook(layer: Any) -> Any:
    layer.register_forward_hook(lambda *_: None)
    return layer


BAD_LAYERS: dict[str, tuple[Any, type[Exception], str]] = {
    "bidirectional": (lambda: rnnfast.LSTM(3, 4, bidirectional=True), ValueError, "bidirectional"),
    "cell": (lambda: rnnfast.LSTMCell(3, 4), TypeError, "LSTMCell"),
    "linear": (lambda: torch.nn.Linear(3, 4), TypeError, "Linear"),
    "none": (lambda: None, TypeError, "NoneType"),
    "forward": (lambda: Doubled(3, 4), TypeError, "forward of its own"),
    "hook": (lambda: with_hook(rnnfast.LSTM(3, 4)), ValueError, "hooks"),
    "bfloat16": (lambda: rnnfast.LSTM(3, 4, dtype=torch.bfloat16), ValueError, "bfloat16"),
    "meta": (lambda: rnnfast.LSTM(3, 4, device="meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("what", BAD_LAYERS)
def test_bad_layers(what: str) -> None:
    make_layer, error, message = BAD_LAYERS[what]
    with pytest.raises(error, match=message):
        rnnfast.Stream(make_layer())


def test_bad_options() -> None:
    layer = rnnfast.LSTM(3, 4, proj_size=2)
    for batch_size, error in (
        (0, ValueError),
        (-1, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (2**40, ValueError),
    ):
        with pytest.raises(error, match="batch"):
            rnnfast.Stream(layer, batch_size)  # type: ignore[arg-type]
    heads: list[tuple[Any, type[Exception], str]] = [
        (torch.nn.Linear(4, 1), RuntimeError, "in_features 2, got 4"),
        (torch.nn.Linear(2, 1, dtype=torch.float64), ValueError, "float64"),
        (torch.nn.Sequential(torch.nn.Linear(2, 1)), TypeError, "Sequential"),
        (with_hook(torch.nn.Linear(2, 1)), ValueError, "hooks"),
    ]
    for head, error, message in heads:
        with pytest.raises(error, match=message):
            rnnfast.Stream(layer, head=head)


def test_subclasses_without_a_forward() -> None:
    torch.manual_seed(0)
    layer, x = Named(3, 4), torch.randn(2, 1, 3)
    torch.testing.assert_close(rnnfast.Stream(layer)(x), layer(x)[0].detach())


def test_sizes_that_have_changed() -> None:
    layer = make("LSTM", 3, 4)
    stream = rnnfast.Stream(layer)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.ones(16, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        stream.refresh()


# ------------------------------------------------------------------------------------------ files


@every_layer
@every_dtype
def test_save_and_load(
    name: str,
    B: int,
    I: int,  # noqa: E741
    H: int,
    options: Options,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    layer = make(name, I, H, dtype, **options)
    head = torch.nn.Linear(options.get("proj_size") or H, 3, dtype=dtype) if B % 2 else None
    stream, x = rnnfast.Stream(layer, B, head=head), torch.randn(3, B, I, dtype=dtype)
    stream.save(tmp_path / "model.rnn")
    expected = stream(x)
    loaded = rnnfast.Stream.load(tmp_path / "model.rnn", B)
    assert torch.equal(loaded(x), expected) and repr(loaded) == repr(stream)
    assert loaded.layer is None and loaded.dtype == dtype
    loaded.save(str(tmp_path / "again.rnn"))
    assert (tmp_path / "again.rnn").read_bytes() == (tmp_path / "model.rnn").read_bytes()
    with pytest.raises(RuntimeError, match="no layer"):
        loaded.refresh()


def test_the_format() -> None:
    """As docs/stream.md has it, read by NumPy alone."""
    layer = make("LSTM", 3, 4, num_layers=2, proj_size=2)
    head = torch.nn.Linear(2, 5)
    file = rnnfast.Stream(layer, head=head)._to_bytes()
    assert file[:8] == b"RNNFAST\0"
    assert np.frombuffer(file, "<u4", 2, 8).tolist() == [1, 4]
    assert file[16:32].rstrip(b"\0") == b"lstm"
    assert np.frombuffer(file, "<i8", 5, 32).tolist() == [3, 4, 2, 2, 5]  # I, H, P, L, O
    assert np.frombuffer(file, "<u4", 2, 72).tolist() == [3, 0]
    weights = [getattr(layer, name) for name in layer._flat_weights_names] + [head.weight, head.bias]
    numbers = np.concatenate([weight.detach().numpy().ravel() for weight in weights])
    assert np.array_equal(np.frombuffer(file, "<f4", offset=80, count=numbers.size), numbers)
    assert len(file) == 80 + numbers.nbytes + 4 and np.frombuffer(file[-4:], "<u4")[0] == zlib.crc32(file[:-4])


def test_damaged_files(tmp_path: Path) -> None:
    file = rnnfast.Stream(make("LSTM", 3, 4))._to_bytes()

    def load(damaged: bytes) -> rnnfast.Stream:
        (tmp_path / "model.rnn").write_bytes(damaged)
        return rnnfast.Stream.load(tmp_path / "model.rnn")

    load(file)
    for size in (*range(0, len(file), 7), len(file) - 1):
        with pytest.raises(ValueError, match=r"cut off|no model"):
            load(file[:size])
    for bit in range(0, 8 * len(file), 11):
        flipped = bytearray(file)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            load(bytes(flipped))
    with pytest.raises(ValueError, match="expected 1, got 2"):
        load(file[:8] + b"\2" + file[9:])
    with pytest.raises(ValueError, match="no model"):
        load(b"PK" + file)
    with pytest.raises(FileNotFoundError):
        rnnfast.Stream.load(tmp_path / "nowhere.rnn")
    with pytest.raises(ValueError, match="batch"):
        rnnfast.Stream.load(tmp_path / "model.rnn", 0)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_copies_go_on_from_the_state(clone: Any) -> None:
    stream, x = rnnfast.Stream(make("LSTM", 3, 4), 2), torch.randn(2, 3)
    stream(x)
    other = clone(stream)
    assert type(other) is rnnfast.Stream and other.batch_size == 2
    expected = stream(x)
    assert torch.equal(other(x), expected) and torch.equal(other(x), stream(x))
