"""Products of fewer bits: torch's float32 matmul precision on the CPU, 16-bit modules, autocast.

Nothing here asks whether this CPU has units for 16-bit factors. Where it has none, float32 kernels run whatever the
precision says, and every bound holds all the more.
"""

# ruff: noqa: E741 (I is the legend's letter)
from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from cases import (
    CASES,
    LEAKY,
    ULP32,
    Case,
    Inputs,
    Results,
    error,
    make_inputs,
    run_module,
    run_reference,
    run_torch,
    scale,
    sensitivity,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from benchmarks.formats import matmul_precision
from rnnfast import _C, reference
from rnnfast._backends import cpu
from rnnfast._backends.precision import HIGH, HIGHEST, MEDIUM
from rnnfast.diagnose import gradient_flow

pytestmark = [
    pytest.mark.filterwarnings("error::rnnfast.fallback.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # torch's, on how it runs them
]
HALVES = torch.bfloat16, torch.float16
HALF_ULP = 2.0**-8  # of bfloat16, relative, at most
T, B, I, H = 7, 3, 5, 9


@pytest.fixture(autouse=True)
def restore_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [] if result is None else [t for part in result for t in tensors(part)]


# ------------------------------------------------------------------------------------------- who says what, and when


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The precision of every pass of a kernel."""
    made: list[int] = []
    ask = cpu._precision

    def spy(*args: Any) -> int:
        made.append(ask(*args))
        return made[-1]

    monkeypatch.setattr(cpu, "_precision", spy)
    return made


NAMES = {"highest": HIGHEST, "high": HIGH, "medium": MEDIUM}


@pytest.mark.parametrize("packed", [False, True])
def test_each_pass_asks_when_it_runs(packed: bool, passes: list[int]) -> None:
    layer, x = rnnfast.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    for forward, backward in itertools.product(NAMES, repeat=2):
        given: Any = pack_padded_sequence(x, torch.tensor([T, 4, 1])) if packed else x
        passes.clear()
        with matmul_precision(forward):
            y = tensors(layer(given)[0])[0]
        with matmul_precision(backward):
            y.sum().backward()
        assert passes == [NAMES[forward], NAMES[backward]]
        passes.clear()
        with matmul_precision(forward), torch.no_grad():
            layer(given), jvp(lambda x: layer(x)[0], (x.detach(),), (x.detach(),))
        assert set(passes) == {NAMES[forward]}


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_other_numbers_have_their_own(dtype: torch.dtype, passes: list[int]) -> None:
    layer, x = rnnfast.GRU(I, H, dtype=dtype), torch.randn(T, B, I, dtype=dtype)
    for name in NAMES:
        with matmul_precision(name):
            layer(x)[0].sum().backward()
    assert passes == [MEDIUM if dtype == torch.bfloat16 else HIGHEST] * 6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_outlives_its_context(dtype: torch.dtype, passes: list[int]) -> None:
    """The backward pass runs after it."""
    layer, x = rnnfast.GRU(I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", dtype):
        y = layer(x)[0]
    with matmul_precision("high"):
        y.sum().backward()
    assert passes == [MEDIUM if dtype == torch.bfloat16 else HIGHEST] * 2


def trained(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    call(x).float().sum().backward()


def penalized(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (g,) = torch.autograd.grad(call(x).float().square().sum(), x, create_graph=True)
    g.float().square().sum().backward()


def compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch._dynamo.reset()
    trained(torch.compile(call, fullgraph=True, backend="aot_eager"), x)


USES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "trained": trained,
    "penalized": penalized,
    "compiled": compiled,
    "jvp": lambda call, x: jvp(call, (x.detach(),), (x.detach(),)),
    "compiled jvp": lambda call, x: compiled(lambda x: jvp(call, (x,), (x.cos(),))[1], x),
    "vmap": lambda call, x: vmap(grad(lambda x: call(x).float().sum()))(x.detach().unsqueeze(2)),
    "second": lambda call, x: jvp(grad(lambda x: call(x).float().square().sum()), (x.detach(),), (x.detach(),)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["plain", "unroll", "recompute"])
def test_every_use_has_the_calls(use: str, how: str, passes: list[int]) -> None:
    """16-bit numbers their own, whatever torch says; float32 what it says."""
    for dtype, precision in ((torch.bfloat16, MEDIUM), (torch.float16, HIGHEST), (torch.float32, HIGH)):
        layer = rnnfast.LSTM(I, H, recompute=3 if how == "recompute" else None, dtype=dtype)
        call = (lambda x: layer.unroll(x)[2]) if how == "unroll" else (lambda x: layer(x)[0])  # noqa: B023
        passes.clear()
        with matmul_precision("high"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of it is torch's operators'
            USES[use](call, torch.randn(T, B, I, dtype=dtype, requires_grad=True))
        by_operators = how == "unroll" and use not in ("trained", "compiled")
        assert set(passes) <= {precision} if by_operators else set(passes) == {precision}


def test_compiled_asks_when_it_runs(passes: list[int]) -> None:
    """The way back may run under another one than the graph was made under."""
    layer, x = rnnfast.GRU(I, H), torch.randn(T, B, I)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for forward, backward in itertools.product(NAMES, repeat=2):
        with matmul_precision(forward):
            y = call(x)[0]
        with matmul_precision(backward):
            passes.clear()
            y.sum().backward()
        assert passes == [NAMES[backward]]


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has no other way to say it")
def test_torchs_newer_setting(passes: list[int]) -> None:
    """After which torch.get_float32_matmul_precision raises."""
    layer, x = rnnfast.RNN(I, H), torch.randn(T, B, I)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        for setting, precision in {"ieee": HIGHEST, "tf32": HIGH, "bf16": MEDIUM, "none": HIGHEST}.items():
            matmul.fp32_precision = setting
            passes.clear()
            layer(x)
            assert passes == [precision]
    finally:
        matmul.fp32_precision = before


def test_info() -> None:
    for name in NAMES:
        with matmul_precision(name):
            assert rnnfast.info()["matmul_precision"] == name


# ------------------------------------------------------------------------------- products of fewer bits, in a reference


class _Products(np.ndarray):
    """float64 numbers, of whose products every factor goes through `of_factors`; what is made of them is so, too."""

    of_factors: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda a: a)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: tuple = (), **how: Any) -> Any:
        plain = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in inputs]
        if ufunc is np.matmul:
            plain = [self.of_factors(a) for a in plain]
        if out:
            how["out"] = tuple(np.asarray(a) for a in out)
        result = getattr(ufunc, method)(*plain, **how)
        return out[0] if out else result.view(type(self)) if isinstance(result, np.ndarray) else result


class _Numpy(ModuleType):
    """NumPy, as `rnnfast.reference` sees it, with other products."""

    def __getattr__(self, name: str) -> Any:
        known = getattr(np, name)
        if isinstance(known, (type, np.ufunc)) or not callable(known):
            return known

        def make(*args: Any, **how: Any) -> Any:
            made = known(*args, **how)
            return made.view(_Products) if isinstance(made, np.ndarray) and made.dtype == np.float64 else made

        return make


def with_products(of_factors: Callable[[np.ndarray], np.ndarray], case: Case, inputs: Inputs) -> Results:
    """The reference, of whose products the factors are what `of_factors` makes of them."""
    with (
        mock.patch.object(reference, "np", _Numpy("numpy")),
        mock.patch.object(_Products, "of_factors", staticmethod(of_factors)),
    ):
        return {name: np.asarray(a) for name, a in run_reference(case, inputs).items()}


# How far rounding moves a factor at most, relative to it. Of the sum of two bfloat16 the second is rounded, and the
# product of both seconds is left out: 3 * HALF_ULP^2 of a product, half of that for each factor.
FACTOR = {"highest": 0.0, "high": 1.5 * HALF_ULP**2, "medium": HALF_ULP}


def signs(a: np.ndarray, draw: int) -> np.ndarray:
    """-1 or 1 for each number, the same for equal ones."""
    scrambled = np.ascontiguousarray(a, np.float64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * draw)
    return 1.0 - 2.0 * ((scrambled >> np.uint64(40)) & np.uint64(1))


def moved_by_products(case: Case, inputs: Inputs, truth: Results, precision: str, draws: int = 8) -> dict[str, float]:
    """How far each tensor of the truth moves when every factor of every product moves by as much as rounding may move
    it, up or down; a number that enters several products moves the same way in all of them."""
    moved = dict.fromkeys(truth, 0.0)
    for draw in range(draws):

        def move(a: np.ndarray, draw: int = draw) -> np.ndarray:
            return a * (1 + FACTOR[precision] * signs(a, draw))

        results = with_products(move, case, inputs)
        moved = {name: max(moved[name], error(results[name], truth[name])) for name in truth}
    return moved


def failures(got: Results, truth: Results, bounds: dict[str, float]) -> list[str]:
    """A line for each tensor that is too far from the truth."""
    errors = {name: error(got[name], truth[name]) for name in got}
    return [f"{name}: {errors[name]:.2e} > {bounds[name]:.2e}" for name in got if not errors[name] <= bounds[name]]


def bounds_of(case: Case, inputs: Inputs, truth: Results, precision: str) -> dict[str, float]:
    """What rounded factors, float32 arithmetic and float32 results may cost together, see `cases.sensitivity`. The
    gradients of a relu jump where its z moves past 0: none for those."""
    products = moved_by_products(case, inputs, truth, precision)
    others = sensitivity(case, inputs, truth)
    bounds = {name: products[name] + 2 * others[name] + ULP32 * scale(truth[name]) for name in truth}
    jumps = case.mode.endswith("RELU")
    return {name: math.inf if jumps and name.startswith("d_") else bound for name, bound in bounds.items()}


ODD = [
    Case(mode, T=4, B=B, I=I, H=H, L=L, D=D)
    for mode, (B, I, H, L, D) in itertools.product(
        ("LSTM", "RNN_TANH", "GRU", "LEAKY_TANH"),
        ((5, 1, 1, 1, 1), (1, 3, 7, 2, 1), (4, 7, 3, 1, 2), (11, 33, 33, 1, 1), (2, 1, 33, 2, 2), (3, 33, 1, 1, 1)),
    )
]
OPTIONS = [
    Case("LSTM", T=6, B=5, I=7, H=33, L=2, D=2, proj=3, lengths=(6, 1, 4, 6, 2)),
    Case("LSTM", T=9, B=5, I=33, H=20, resets=0.3),
    Case("RNN_TANH", T=9, B=5, I=3, H=40, bias=False, batch_first=True),
    Case("RNN_RELU", T=3, B=16, I=33, H=64),
    Case("GRU", T=6, B=5, I=7, H=33, L=2, lengths=(6, 1, 4, 6, 2), resets=0.3),
    Case("LEAKY_RELU", T=4, B=5, I=7, H=33, hx=False),
]


@pytest.mark.units
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("case", [*ODD, *OPTIONS], ids=lambda case: case.id)
def test_float32_modules(case: Case, precision: str) -> None:
    """No further from the truth than rounded factors take them."""
    inputs = make_inputs(case, torch.float32)
    truth = run_reference(case, inputs)
    bounds = bounds_of(case, inputs, truth, precision)
    with matmul_precision(precision):
        assert not failures(run_module(rnnfast, case, inputs), truth, bounds)
        assert not failures(run_module(rnnfast, case, inputs, inference=True), truth, bounds)


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(a)).float().bfloat16().double().numpy()


@pytest.mark.units
@pytest.mark.parametrize("case", [case for case in OPTIONS if "RELU" not in case.mode], ids=lambda case: case.id)
def test_medium_is_what_rounded_factors_make(case: Case) -> None:
    """Far closer to the reference with rounded factors than rounding takes it from the truth; not equal, since a factor
    may lie so near the middle that float32 sums round it to the other side."""
    if not _C.has_products(MEDIUM):
        pytest.skip("no units for 16-bit numbers")
    inputs = make_inputs(case, torch.float32)
    moved = moved_by_products(case, inputs, run_reference(case, inputs), "medium")
    bounds = {name: 0.1 * size for name, size in moved.items()}
    with matmul_precision("medium"):
        got = run_module(rnnfast, case, inputs)
    assert not failures(got, with_products(to_bfloat16, case, inputs), bounds)


@pytest.mark.units
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.id)
def test_precision_changed_on_the_way_back(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    truth = run_reference(case, inputs)
    bounds = bounds_of(case, inputs, truth, "medium")
    for forward, backward in (("highest", "medium"), ("medium", "highest"), ("high", "medium")):

        def run(module: nn.Module, forward: str = forward) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                with matmul_precision(forward):
                    return module(*args, **more)

            return call

        with matmul_precision(backward):
            assert not failures(run_module(rnnfast, case, inputs, run=run), truth, bounds)


# ---------------------------------------------------------------------------------------- as exact as torch's, or more


def under(autocast: bool, module: nn.Module) -> Callable[..., Any]:
    """Only the forward pass is under autocast."""

    def call(*args: Any, **more: Any) -> Any:
        with torch.autocast("cpu", enabled=autocast):
            return module(*args, **more)

    return call


def torchs_results(case: Case, inputs: Inputs, autocast: bool) -> Results | None:
    """None under autocast where torch has no such layer, whose operators alone do not say what a layer rounds, or where
    its LSTM refuses bfloat16 on this CPU."""
    if not autocast:
        return run_torch(case, inputs)
    if case.mode in LEAKY or case.resets:
        return None
    try:
        return run_module(nn, case, inputs, run=partial(under, autocast))
    except RuntimeError:
        return None


def in_bfloat16(case: Case, autocast: bool, seed: int = 0) -> Inputs:
    """Numbers that bfloat16 has, of that dtype or for a float32 module under autocast."""
    rounded = make_inputs(case, torch.bfloat16, seed)
    if not autocast:
        return rounded

    def wider(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: wider(one) for name, one in value.items()}
        if isinstance(value, PackedSequence):
            return value.to(torch.float32)
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Inputs(**{name: wider(value) for name, value in vars(rounded).items()})


def kind_of(name: str) -> str:
    """d_weight_ih for d_weight_ih_l1_reverse"""
    return name.split("_l")[0]


class Errors:
    """Sums of squares of errors relative to each tensor's largest element, for each kind of tensor."""

    def __init__(self) -> None:
        self.ours: dict[str, float] = {}
        self.torchs: dict[str, float] = {}

    def add(self, case: Case, autocast: bool, seed: int = 0) -> None:
        """Unless there is nothing to compare with."""
        inputs = in_bfloat16(case, autocast, seed)
        truth, torchs = run_reference(case, inputs), torchs_results(case, inputs, autocast)
        if torchs is None:
            return
        got = run_module(rnnfast, case, inputs, run=partial(under, autocast))
        assert got.keys() == truth.keys()
        for name in truth:
            size = scale(truth[name]) or 1.0
            for errors, results in ((self.ours, got), (self.torchs, torchs)):
                square = float(np.square((results[name] - truth[name]) / size).sum())
                errors[kind_of(name)] = errors.get(kind_of(name), 0.0) + square

    def assert_ours_are_least(self) -> None:
        ratios = {kind: (self.ours[kind] / self.torchs[kind]) ** 0.5 for kind in self.ours}
        assert all(ratio <= 1.0 for ratio in ratios.values()), ratios


SIZES: dict[str, Any] = {"T": 20, "B": 6, "I": 16, "H": 33}
LENGTHS = (20, 3, 17, 9, 20, 1)
LAYERS = [
    Case("LSTM", **SIZES),
    Case("LSTM", L=2, D=2, **SIZES),
    Case("LSTM", proj=12, **SIZES),
    Case("LSTM", L=2, lengths=LENGTHS, **SIZES),
    Case("LSTM", D=2, resets=0.2, hx=False, **SIZES),
    Case("RNN_TANH", **SIZES),
    Case("RNN_TANH", L=2, D=2, **SIZES),
    Case("RNN_RELU", **SIZES),
    Case("RNN_RELU", L=2, lengths=LENGTHS, **SIZES),
    Case("GRU", **SIZES),
    Case("GRU", L=2, D=2, hx=False, **SIZES),
    Case("GRU", L=2, lengths=LENGTHS, resets=0.2, **SIZES),
    Case("LEAKY_TANH", L=2, **SIZES),
]
both_ways = pytest.mark.parametrize("autocast", [False, True], ids=["module", "autocast"])


@both_ways
@pytest.mark.units
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_errors_are_at_most_torchs(case: Case, autocast: bool) -> None:
    """Of each output and gradient: root mean square over the tensors of a kind and some draws."""
    errors = Errors()
    for seed in range(4):
        errors.add(case, autocast, seed)
    errors.assert_ours_are_least()


@both_ways
def test_errors_over_the_table_are_at_most_torchs(autocast: bool) -> None:
    """Where a tensor is too small to tell by itself, all together."""
    errors = Errors()
    for case in CASES[::9]:
        errors.add(case, autocast)
    errors.assert_ours_are_least()


# ------------------------------------------------------------------------------------------------- dtypes are torch's


def outcome(run: Callable[[], Any]) -> Any:
    """Dtypes, or what it raises."""
    try:
        return [t.dtype for t in tensors(run())]
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)


KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda library, **how: library.LSTM(I, H, **how),
    "projected": lambda library, **how: library.LSTM(I, H, proj_size=2, **how),
    "stack": lambda library, **how: library.LSTM(I, H, 2, bidirectional=True, **how),
    "RNN": lambda library, **how: library.RNN(I, H, **how),
    "GRU": lambda library, **how: library.GRU(I, H, **how),
}
REFUSED = "could not create a primitive"  # by oneDNN's LSTM, whose dtype is autocast's, if the CPU lacks instructions


@pytest.mark.filterwarnings("ignore::rnnfast.fallback.FallbackWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
def test_dtypes(kind: str, autocast: torch.dtype | None) -> None:
    """Of every module on every input, or torch's error; with states of the input's dtype and of the module's."""
    dtypes = torch.float32, torch.float64, *HALVES
    for of_module, of_x, of_states in itertools.product(dtypes, dtypes, (None, *dtypes)):
        x = torch.randn(T, B, I, dtype=of_x)
        layers = [KINDS[kind](library, dtype=of_module) for library in (rnnfast, nn)]
        LD = layers[0].num_layers * (2 if layers[0].bidirectional else 1)
        h, c = (torch.zeros(LD, B, size, dtype=of_states) for size in (layers[0].proj_size or H, H))
        hx = None if of_states is None else (h, c) if layers[0].mode == "LSTM" else h
        for given in (x, pack_padded_sequence(x, torch.tensor([T, 4, 1]))):
            for graph in (True, False):
                with torch.set_grad_enabled(graph), under_dtype(autocast):
                    got, expected = (outcome(lambda: layer(given, hx)) for layer in layers)  # noqa: B023
                if autocast and expected[0] is RuntimeError and REFUSED in expected[1]:
                    expected = [autocast] * 3
                assert got == expected, (of_module, of_x, of_states, given is x, graph)


def under_dtype(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


# -------------------------------------------------------------------------------- the float32 call, on rounded numbers
#
# A 16-bit call is to the last bit what a float32 layer of the same weights makes of the same numbers at its precision,
# rounded in the end: every option, derivative and transform is that of float32.

OURS: dict[str, Callable[..., Any]] = {
    "LSTM": rnnfast.LSTM,
    "projected": partial(rnnfast.LSTM, proj_size=4),
    "RNN": rnnfast.RNN,
    "GRU": rnnfast.GRU,
    "LeakyRNN": partial(rnnfast.LeakyRNN, leak=0.25),
}
every_kind = pytest.mark.parametrize("kind", OURS)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_way = pytest.mark.parametrize("way", ["module", "autocast"])


def rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(rounded(one, dtype) for one in value)
    return value.detach().to(dtype)


class Twins:
    """A layer called in 16 bits, `ours`, and a float32 layer of the same numbers, `float32`: functions of x and what a
    layer takes more, both of which give and take tensors of `dtype`."""

    def __init__(self, kind: str, dtype: torch.dtype, way: str = "module", **how: Any) -> None:
        torch.manual_seed(0)
        self.dtype, self.autocast = dtype, way == "autocast"
        self.layer = OURS[kind](I, H, **how)
        self.layer = self.layer.to(dtype).to(torch.float32 if self.autocast else dtype)  # the numbers of both
        self.wide = copy.deepcopy(self.layer).float()

    def drawn(self, T: int = T, B: int = B) -> tuple[Tensor, Any]:
        """x (T,B,I), hx"""
        layer = self.layer
        LD = layer.num_layers * (2 if layer.bidirectional else 1)
        x, h, c = (
            torch.randn(*shape).to(self.dtype) for shape in ((T, B, I), (LD, B, layer.proj_size or H), (LD, B, H))
        )
        return x, (h, c) if layer.mode == "LSTM" else h

    def ours(self, x: Any, hx: Any = None, call: Callable[..., Any] | None = None, **more: Any) -> Any:
        with torch.autocast("cpu", self.dtype, enabled=self.autocast):
            return (self.layer if call is None else call)(x, hx, **more)

    def float32(self, x: Any, hx: Any = None, call: Callable[..., Any] | None = None, **more: Any) -> Any:
        wide = (x.to(torch.float32), None if hx is None else rounded(hx, torch.float32))
        with self.precision():
            result = (self.wide if call is None else call)(*wide, **more)
        return [t.to(self.dtype) for t in tensors(result)]

    def precision(self) -> Any:
        return matmul_precision("medium" if self.dtype == torch.bfloat16 else "highest")

    def gradients(self, results: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """Of random products with the results, in 16 bits."""
        torch.manual_seed(3)
        with self.precision():
            found = torch.autograd.grad(results, at, [torch.randn(t.shape).to(t.dtype) for t in results])
        return [g.to(self.dtype) for g in found]

    def assert_same(self, given: Any, hx: Any = None, calls: Any = (None, None), **more: Any) -> None:
        """Outputs, and gradients of the weights."""
        torch.manual_seed(7)  # dropout
        got = tensors(self.ours(given, hx, calls[0], **more))
        torch.manual_seed(7)
        want = self.float32(given, hx, calls[1], **more)
        assert {t.dtype for t in got} == {self.dtype}
        assert_equal(got, want)
        pairs = zip((got, want), (self.layer, self.wide), strict=True)
        assert_equal(*(self.gradients(some, list(layer.parameters())) for some, layer in pairs))


@every_kind
@every_half
def test_autocast_rounds_results_alone(kind: str, dtype: torch.dtype) -> None:
    """Kernels round what they multiply; inputs, weights and their gradients keep their bits."""
    torch.manual_seed(0)
    layer = OURS[kind](I, H, num_layers=2)
    x, h, c = torch.randn(T, B, I), torch.randn(2, B, 4 if kind == "projected" else H), torch.randn(2, B, H)
    hx = (h, c) if layer.mode == "LSTM" else h
    for given in (x, pack_padded_sequence(x, torch.tensor([T, 4, 1]))):
        for states in (None, hx):
            with torch.autocast("cpu", dtype):
                got = tensors(layer(given, states))
            with matmul_precision("medium" if dtype == torch.bfloat16 else "highest"):
                want = tensors(layer(given, states))
                assert_equal(got, [b.to(a.dtype) for a, b in zip(got, want, strict=True)])
                dy = torch.randn(got[0].shape).to(got[0].dtype)
                grads = torch.autograd.grad(got[0], list(layer.parameters()), dy)
                others = torch.autograd.grad(want[0], list(layer.parameters()), dy.float())
            assert_equal(grads, others)


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(got), list(want), rtol=0, atol=0)


@every_kind
@every_half
@every_way
def test_every_option(kind: str, dtype: torch.dtype, way: str) -> None:
    for L, D, batch_first, dropout in ((1, 1, False, 0.0), (2, 2, False, 0.5), (3, 1, True, 0.5)):
        how = {"bidirectional": D == 2, "dropout": dropout, "batch_first": batch_first, "bias": L < 3}
        twins = Twins(kind, dtype, way, num_layers=L, **how)
        x, hx = twins.drawn()
        resets = torch.rand(T, B) < 0.3
        given, resets = (t.transpose(0, 1) if batch_first else t for t in (x, resets))
        for states in (None, hx):
            twins.assert_same(given, states)
            twins.assert_same(given, states, resets=resets)
        twins.assert_same(x[:, 0], of_sequence(hx, 0))
        for lengths in ([T, 4, 1], [2, T, 3]):
            packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
            twins.assert_same(packed, hx, resets=resets)
        for recompute in (3, "sqrt"):
            twins.layer.recompute = twins.wide.recompute = recompute
            twins.assert_same(given, hx)


def of_sequence(hx: Any, b: int) -> Any:
    """The states of one sequence."""
    return tuple(state[:, b] for state in hx) if isinstance(hx, tuple) else hx[:, b]


@every_kind
@every_way
@pytest.mark.parametrize("graph", [False, True])
def test_single_steps(kind: str, way: str, graph: bool) -> None:
    """Which may be left to torch's operators, whose numbers are not the kernels' to the last bit; not those that a
    transform looks at."""
    twins = Twins(kind, torch.bfloat16, way)
    x, hx = twins.drawn(T=2)
    with torch.set_grad_enabled(graph):
        got = tensors(twins.ours(x[:1], hx))
    with torch.no_grad():
        kernels = tensors(twins.float32(x[:1], hx))
    if way == "module" and kind in ("RNN", "GRU"):
        assert_equal(got, tensors(torchs_twin(twins.layer, kind)(x[:1], hx)))
    else:
        assert_equal(got, kernels)
    moved, _ = jvp(lambda x: tensors(twins.ours(x, hx))[0], (x[:1],), (x[:1],))
    assert_equal([moved], kernels[:1])


def torchs_twin(layer: nn.Module, kind: str) -> nn.Module:
    theirs = KINDS[kind](nn, dtype=layer.weight_hh_l0.dtype)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def test_a_recorded_elman_step_under_autocast() -> None:
    """Is torch's; one that nobody records is not."""
    layer, x = rnnfast.RNN(I, H), torch.randn(1, B, I)
    with torch.autocast("cpu"):
        assert_equal(tensors(layer(x)), tensors(torchs_twin(layer, "RNN")(x)))
        with torch.no_grad():
            kernels = tensors(layer(x))
    with matmul_precision("medium"), torch.no_grad():
        assert_equal(kernels, [t.bfloat16() for t in tensors(layer(x))])


@pytest.mark.units
@every_kind
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_inference_reads_weights_of_16_bits(kind: str, steps: int) -> None:
    """Where they lie, to the last bit as training widens them: few rows and many, of odd sizes."""
    torch.manual_seed(0)
    for L, D, bias in ((1, 1, True), (2, 2, False)):
        layer = OURS[kind](I, 33, num_layers=L, bidirectional=D == 2, bias=bias, dtype=torch.bfloat16)
        x = torch.randn(steps, B, I).bfloat16()
        resets = torch.rand(steps, B) < 0.3  # so that no single step is torch's
        for given in (x, pack_padded_sequence(x, torch.tensor([steps, 1, 1]))):
            trained, unrolled = layer(given, resets=resets), layer.unroll(given, resets=resets)
            with torch.no_grad():
                assert_equal(tensors(layer(given, resets=resets)), tensors(trained))
                assert_equal(tensors(layer.unroll(given, resets=resets)), tensors(unrolled))


@every_kind
@every_way
def test_unroll(kind: str, way: str) -> None:
    twins = Twins(kind, torch.bfloat16, way, num_layers=2, bidirectional=True)
    x, hx = twins.drawn()
    twins.assert_same(x, hx, (twins.layer.unroll, twins.wide.unroll))
    u = twins.ours(x, hx, twins.layer.unroll)
    assert torch.equal(torch.cat([u.h[2], u.h[3]], -1), u.output)


@every_way
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LeakyRNN"])
def test_compiled(kind: str, way: str) -> None:
    twins = Twins(kind, torch.bfloat16, way, num_layers=2)
    x, hx = twins.drawn()
    torch._dynamo.reset()
    call = torch.compile(twins.layer, fullgraph=True, dynamic=True, backend="aot_eager")
    twins.assert_same(x, hx, (call, None))
    unroll = torch.compile(lambda x, hx: list(twins.layer.unroll(x, hx)), fullgraph=True, backend="aot_eager")
    twins.assert_same(x, hx, (unroll, twins.wide.unroll))
    twins.layer.recompute = twins.wide.recompute = 3
    again = torch.compile(twins.layer, fullgraph=True, backend="aot_eager")
    twins.assert_same(x, hx, (again, None))


@every_way
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_step(kind: str, way: str) -> None:
    twins = Twins(kind, torch.bfloat16, way)
    x, hx = twins.drawn(T=1)
    torch._dynamo.reset()
    call = torch.compile(twins.layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_equal(tensors(twins.ours(x, hx, call)), twins.float32(x, hx))


@every_way
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_exported(kind: str, way: str) -> None:
    twins = Twins(kind, torch.bfloat16, way, num_layers=2)
    x, _ = twins.drawn()
    dims = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        exported = torch.export.export(twins.layer.eval(), (x,), dynamic_shapes=(dims, None, None)[:1])
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    other, _ = twins.drawn(11, 2)
    assert_equal(tensors(torch.export.load(file).module()(other)), twins.float32(other))


class Between(nn.Module):
    """A 16-bit layer between float32."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype))[0].float()


@every_half
@pytest.mark.parametrize("kind", ["LSTM", "projected", "RNN", "GRU"])
def test_onnx(kind: str, dtype: torch.dtype) -> None:
    """float32 operators between casts: numbers from wider products, and rounded alike."""
    twins = Twins(kind, dtype, num_layers=2, bidirectional=True)
    model, x = Between(twins.layer, dtype).eval(), twins.drawn()[0].float()
    program = torch.onnx.export(model, (x,), verbose=False)
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert ({"projected": "Scan"}.get(kind, kind)) in operators, operators
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=0, atol=2 * torch.finfo(dtype).eps)


@every_kind
@every_way
def test_forward_mode(kind: str, way: str) -> None:
    twins = Twins(kind, torch.bfloat16, way, num_layers=2)
    (x, _), (v, _) = twins.drawn(), twins.drawn()

    def pushed(call: Callable[..., Any]) -> list[Tensor]:
        return tensors(jvp(lambda x: tuple(tensors(call(x))), (x,), (v,)))

    assert_equal(pushed(twins.ours), pushed(twins.float32))
    weights = {name: p.detach() for name, p in twins.layer.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in weights.items()}

    def along_weights(call: Callable[..., Any], layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        def function(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return tuple(tensors(call(x, None, lambda x, hx: functional_call(layer, weights, (x, hx)))))

        at, v = ({name: t.to(dtype) for name, t in some.items()} for some in (weights, rounded_of(along)))
        return tensors(jvp(function, (at,), (v,)))

    assert_equal(
        along_weights(twins.ours, twins.layer, weights["weight_ih_l0"].dtype),
        along_weights(twins.float32, twins.wide, torch.float32),
    )


def rounded_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.bfloat16() for name, t in tensors.items()}


@every_way
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_samples(kind: str, way: str) -> None:
    """vmap over grad, beside each sample on its own."""
    twins = Twins(kind, torch.bfloat16, way)
    x, _ = twins.drawn(B=4)
    weights = {name: p.detach() for name, p in twins.layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        call = lambda x, hx: functional_call(twins.layer, weights, (x, hx))  # noqa: E731
        return twins.ours(x, None, call)[0].float().square().sum()

    got = vmap(grad(loss), in_dims=(None, 1))(weights, x.unsqueeze(2))
    for b in range(4):
        want = grad(loss)(weights, x[:, b : b + 1])
        for name, g in want.items():
            torch.testing.assert_close(got[name][b], g, rtol=HALF_ULP, atol=HALF_ULP * g.abs().max().item())


@every_way
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_second_derivatives(kind: str, way: str) -> None:
    """Errors are at most those of torch's operators in bfloat16, which round everything."""
    twins = Twins(kind, torch.bfloat16, way, num_layers=2)
    x, hx = twins.drawn(T=20, B=4)
    exact = copy.deepcopy(twins.layer).double()
    torchs = copy.deepcopy(twins.layer).bfloat16()

    def penalty(call: Callable[..., Any], layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        weights = list(layer.parameters())
        y = call(x.to(dtype), rounded(hx, dtype))[0]
        firsts = torch.autograd.grad(y.square().sum(), weights, create_graph=True)
        total = sum(g.square().sum() for g in firsts)
        return [g.double() for g in torch.autograd.grad(total, weights)]

    got = penalty(twins.ours, twins.layer, torch.bfloat16)
    truth = penalty(exact, exact, torch.float64)
    theirs = penalty(lambda x, hx: torchs._by_operators(x, hx, None), torchs, torch.bfloat16)
    errors = [
        sum(((a - b).norm() / b.norm()).square() for a, b in zip(some, truth, strict=True)) for some in (got, theirs)
    ]
    assert errors[0] <= errors[1]


def test_flops() -> None:
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = rnnfast.LSTM(I, H, 2, dtype=dtype), torch.randn(T, B, I, dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            layer(x)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------- what numbers may be


FLOATS = [(torch.float32, name) for name in NAMES] + [(torch.bfloat16, "highest"), (torch.float16, "medium")]
every_float = pytest.mark.parametrize(("dtype", "precision"), FLOATS, ids=str)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.units
@every_kind
@every_float
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_stays_alone(kind: str, dtype: torch.dtype, precision: str, bad: float) -> None:
    """Other sequences of the batch: their outputs and gradients to the last bit."""
    torch.manual_seed(0)
    layer, B = OURS[kind](I, 33, dtype=dtype), 19
    x, results = leaf(T, B, I, dtype=dtype), []
    dy = torch.randn(T, B, 4 if kind == "projected" else 33).to(dtype)
    others = [b for b in range(B) if b not in (2, 7)]
    with matmul_precision(precision):
        for value in (0.0, bad):
            given = x.detach().clone()
            given[3, 2, 1] = given[:, 7] = value
            given.requires_grad_()
            y = layer(given)[0]
            (dx,) = torch.autograd.grad(y, given, dy)
            results.append((y[:, others], dx[:, others]))
    assert all(t.isfinite().all() for t in results[0])
    assert_equal(results[1], results[0])


@pytest.mark.units
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "GRU"])
@every_float
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_go_where_torchs_go(kind: str, dtype: torch.dtype, precision: str, bad: float) -> None:
    """From an input, a state or a weight into outputs: NaN where torch has NaN in float64."""
    torch.manual_seed(0)
    layer = KINDS[kind](rnnfast, dtype=dtype)
    exact = KINDS[kind](nn, dtype=torch.float64)
    x, h = torch.randn(T, B, I).to(dtype), torch.randn(1, B, H).to(dtype)
    for place in ("x", "h0", *(name for name, _ in layer.named_parameters())):
        mine, given, state = copy.deepcopy(layer), x.clone(), h.clone()
        tensor = {"x": given, "h0": state}.get(place)
        with torch.no_grad():
            (dict(mine.named_parameters())[place] if tensor is None else tensor).view(-1)[1] = bad
        exact.load_state_dict(mine.state_dict())
        hx = (state, state) if kind == "LSTM" else state
        with matmul_precision(precision), torch.no_grad():
            got, want = mine(given, hx)[0], exact(given.double(), rounded(hx, torch.float64))[0]
        assert torch.equal(got.isnan(), want.isnan()), place


@pytest.mark.units
@every_kind
@pytest.mark.parametrize("precision", NAMES)
def test_denormals(kind: str, precision: str) -> None:
    """As good as 0, whatever units take them for: no more is lost than there is."""
    torch.manual_seed(0)
    layer, least = OURS[kind](I, 33, bias=False), torch.finfo(torch.float32).tiny
    x = torch.randn(T, B, I).clamp(-1, 1) * least
    with matmul_precision(precision):
        got, zeros = layer(x)[0], layer(torch.zeros_like(x))[0]
    assert (got - zeros).abs().max() <= T * (I + 33) * 2 * least
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(least)
    x = torch.randn(T, B, I, requires_grad=True)
    with matmul_precision(precision):
        y = layer(x)[0]
        grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert y.abs().max() <= T * (I + 33) * 8 * least and all(g.isfinite().all() for g in grads)


@pytest.mark.units
@pytest.mark.parametrize("factor", [1e30, 1e-30])
@pytest.mark.parametrize("precision", NAMES)
def test_large_and_small_numbers(factor: float, precision: str) -> None:
    """Factors whose product is an ordinary number."""
    torch.manual_seed(0)
    case = Case("RNN_TANH", T=3, B=5, I=33, H=17, bias=False)
    plain = make_inputs(case, torch.float32)
    weights = plain.weights | {"weight_ih_l0": plain.weights["weight_ih_l0"] / factor}
    inputs = replace(plain, x=plain.x * factor, weights=weights)
    truth = run_reference(case, inputs)
    with matmul_precision(precision):
        got = run_module(rnnfast, case, inputs)
    assert not failures(got, truth, bounds_of(case, inputs, truth, precision))


# ------------------------------------------------------------------------------------------- the modules themselves


@every_kind
@every_half
def test_copies(kind: str, dtype: torch.dtype) -> None:
    twins = Twins(kind, dtype, num_layers=2)
    x, hx = twins.drawn()
    expected = tensors(twins.layer(x, hx))
    for again in (copy.deepcopy(twins.layer), pickle.loads(pickle.dumps(twins.layer))):
        assert_equal(tensors(again(x, hx)), expected)


class Own(nn.GRU):
    """A user's."""


@every_half
def test_converted(dtype: torch.dtype, passes: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(I, H), nn.RNN(H, H), Own(H, H)]).to(dtype)
    x = torch.randn(T, B, I).to(dtype)

    def run() -> Tensor:
        y = x
        for layer in model:
            y = layer(y)[0]
        return y

    theirs = run()
    rnnfast.convert(model)
    ours = run()
    assert len(passes) == 3 and ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps)
    ours.sum().backward()
    assert len(passes) == 6 and all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@every_half
def test_gradient_flow(dtype: torch.dtype) -> None:
    """Finds the layer's node behind the casts."""
    twins = Twins("LSTM", dtype)
    x, _ = twins.drawn()
    flow = gradient_flow(twins.layer, lambda: twins.layer(x)[0].float().sum())
    with twins.precision():
        wide = gradient_flow(twins.wide, lambda: twins.wide(x.float())[0].sum())
    torch.testing.assert_close(flow.carried_h, wide.carried_h)


def test_learned_leak() -> None:
    """Its logit gets a gradient, too."""
    layer = rnnfast.LeakyRNN(I, H, leak=0.25, learn_leak=True, dtype=torch.bfloat16)
    y, _ = layer(torch.randn(T, B, I, dtype=torch.bfloat16))
    y.sum().backward()
    assert layer.leak_logit_l0.grad.dtype == torch.bfloat16 and layer.leak_logit_l0.grad.abs().max() > 0
