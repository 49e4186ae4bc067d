"""cuda.py on tensors of the CPU, where plain torch stands in for the extension: everything but the kernels.

One layer's sweeps are `composite.py`, the contract of the CUDA kernels; what is tested is how `cuda.py` cuts
a stack into layers, what it keeps, and every gradient, against the NumPy reference and the kernels of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cases import (
    CASES,
    GRID,
    LARGE,
    LONG,
    SIZES,
    Case,
    Inputs,
    error,
    float32_failures,
    float32_products,
    float64_failures,
    make_inputs,
    run_module,
    run_op,
    run_reference,
    run_torch,
    scale,
    sensitivity,
)
from test_derivatives import EXAMPLES, K, assert_equal, layer_loss, leaves_of
from torch.func import grad, jvp, vmap

import rnnfast
from rnnfast import _layer
from rnnfast._autograd import op
from rnnfast._backends import cpu, cuda, cuda_call, cuda_sweeps, cudnn, schema, types
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.types import Constants, Past, SomeInputs, SomeOutputs, Stack

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, on how it runs them

SOME = GRID[::3] + SIZES[::5] + LARGE  # every option, and sizes of each kind


@pytest.fixture(autouse=True)
def through_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU take the way of tensors on a GPU."""
    monkeypatch.setattr(schema, "backend_for", lambda x: cuda)
    monkeypatch.setattr(_layer.Layer, "_step_by_torch", lambda *args: None)  # of the CPU's alone
    calls = []
    check = cuda_call.Call.__init__
    monkeypatch.setattr(cuda_call.Call, "__init__", lambda *args: calls.append(1) or check(*args))
    yield
    assert calls, "the test never came to rnnfast._backends.cuda"


@pytest.mark.parametrize("case", CASES[::2] + LONG[3:], ids=lambda case: case.id)
def test_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    truth = run_reference(case, inputs)
    trained = run_module(rnnfast, case, inputs)
    assert trained.keys() == truth.keys()
    assert not float64_failures(trained, truth)
    assert not float64_failures(run_module(rnnfast, case, inputs, inference=True), truth)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_float32(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    truth, torchs = run_reference(case, inputs), run_torch(case, inputs)
    got = run_module(rnnfast, case, inputs)
    assert not float32_failures(got, torchs, truth, sensitivity(case, inputs, truth))


@pytest.mark.parametrize("case", [c for c in GRID if c.dropout and not c.batch_first], ids=lambda case: case.id)
def test_dropout_masks(case: Case) -> None:
    inputs = make_inputs(case)
    assert not float64_failures(run_op(case, inputs, dropout=True), run_reference(case, inputs, dropout=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.id)
def test_16_bit(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored numbers are rounded to 16 bit, sums are not: results stay within some roundings of the truth."""
    float32_products(monkeypatch)
    inputs = make_inputs(case, dtype)
    truth, got = run_reference(case, inputs), run_op(case, inputs)
    assert got.keys() == truth.keys()
    for name, a in got.items():
        assert error(a, truth[name]) <= 16 * torch.finfo(dtype).eps * scale(truth[name]), name


# --- the way of each function of cpu.py, beside the same on the CPU ---------------------------------------------------


def past_by(functions: ModuleType, case: Case, inputs: Inputs) -> Past:
    """A forward pass by rnnfast._backends.cpu or rnnfast._backends.cuda."""
    stack = Stack(BY_MODE[case.mode].index, case.L, case.D, case.bias)
    given = types.Inputs(inputs.x, inputs.h0, inputs.c0, list(inputs.weights.values()))
    batch_sizes = None if inputs.packed is None else inputs.packed.batch_sizes
    call = stack, given, Constants(batch_sizes, inputs.dropout_masks, inputs.resets)
    outputs, reserve = functions.forward(*call, True)
    return Past(*call, outputs.y, reserve)


def _like(some: types.Inputs, seed: int = 1) -> SomeInputs:
    torch.manual_seed(seed)
    return SomeInputs.of(None if t is None else torch.randn_like(t) for t in some.flat())


def assert_same(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


ALL_OPTIONS = [
    Case("LSTM", T=5, B=6, I=3, H=6, L=2, D=2, proj=4, dropout=0.5),
    Case("LSTM", T=5, B=6, I=3, H=6, L=3, D=2, lengths=(5, 5, 4, 4, 1, 1), dropout=0.5),
    Case("RNN_TANH", T=5, B=6, I=3, H=6, L=3, D=2),
    Case("RNN_RELU", T=1, B=2, I=3, H=6, L=2, D=2, lengths=(1, 1), hx=False),
]
all_options = pytest.mark.parametrize("case", ALL_OPTIONS, ids=lambda case: case.id)


@all_options
@pytest.mark.parametrize("groups", [1, 2])
def test_backward_and_second(case: Case, groups: int) -> None:
    inputs = make_inputs(case)
    pasts = past_by(cpu, case, inputs), past_by(cuda, case, inputs)
    cotangents = SomeOutputs(inputs.dy, inputs.dh_n, inputs.dc_n)
    other = SomeOutputs(inputs.dy.cos(), None, None)
    along, flat = _like(pasts[0].inputs), pasts[0].inputs.flat()
    wanted = [t is not None for t in flat]
    want, got = (f.backward(p, cotangents, wanted, groups) for f, p in zip((cpu, cuda), pasts, strict=True))
    assert_same(got.flat(), want.flat())
    want, got = (
        f.second(p, along, cotangents, other, wanted, wanted, groups) for f, p in zip((cpu, cuda), pasts, strict=True)
    )
    assert_same(got[0], want[0])
    assert_same(got[1].flat(), want[1].flat())
    assert_same(got[2].flat(), want[2].flat())


@all_options
def test_tangents_and_what_a_sweep_carries(case: Case) -> None:
    inputs = make_inputs(case)
    pasts = past_by(cpu, case, inputs), past_by(cuda, case, inputs)
    cotangents = SomeOutputs(inputs.dy, None, inputs.dc_n)
    along = _like(pasts[0].inputs)
    shape = case.L, case.D, pasts[0].y.flatten(0, -2).shape[0], case.G, case.H
    dz = torch.randn(shape, dtype=torch.float64)
    wanted = [t is not None for t in pasts[0].inputs.flat()]
    results = []
    for f, past in zip((cpu, cuda), pasts, strict=True):
        z = torch.empty(shape, dtype=torch.float64)
        tangents = f.tangent(past, along, z)
        results.append(
            [
                *tangents,
                z,
                f.activations(past),
                *f.sweep_back(past, cotangents),
                *f.backward(past, cotangents, wanted, inner=types.Inner(dz)).flat(),
                *f.backward(past, SomeOutputs(None, None, None), wanted, inner=types.Inner(dz)).flat(),
            ]
        )
    assert_same(results[1], results[0])


def test_only_what_is_wanted() -> None:
    case = ALL_OPTIONS[0]
    inputs = make_inputs(case)
    past = past_by(cuda, case, inputs)
    cotangents = SomeOutputs(inputs.dy, inputs.dh_n, inputs.dc_n)
    count = len(past.inputs.flat())
    everything = cuda.backward(past, cotangents, [True] * count).flat()
    for i in range(count):
        wanted = [k == i for k in range(count)]
        got = cuda.backward(past, cotangents, wanted).flat()
        assert [g is not None for g in got] == wanted
        torch.testing.assert_close(got[i], everything[i])


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.id)
def test_directional_derivatives(case: Case) -> None:
    values, loss, truth = leaves_of(case)
    every = tuple(range(len(values)))
    torch.manual_seed(0)
    direction = tuple(torch.randn_like(value) for value in values)
    at = [value.clone().requires_grad_() for value in values]
    gradients = torch.autograd.grad(truth(*at), at, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
    curved = torch.autograd.grad(slope, at)
    torch.testing.assert_close(jvp(loss, tuple(values), direction)[1], slope.detach(), rtol=1e-12, atol=1e-12)
    assert_equal(jvp(lambda *at: grad(loss, every)(*at), tuple(values), direction)[1], curved)
    at = [value.clone().requires_grad_() for value in values]
    gradients = torch.autograd.grad(loss(*at), at, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
    assert_equal(torch.autograd.grad(slope, at), curved)


def test_per_sample_gradients() -> None:
    weights = tuple(make_inputs(Case("LSTM", T=1, B=1, I=3, H=6, L=2, D=2)).weights.values())
    x = torch.randn(K, 7, 2, 3, dtype=torch.float64)
    got = vmap(grad(layer_loss), in_dims=(None, 0))(weights, x)
    for k in range(K):
        assert_equal(tuple(g[k] for g in got), grad(layer_loss)(weights, x[k]))


# --- cuDNN, by a stand-in with the schema of torch's own operators ----------------------------------------------------


class _CudnnOnCpu:
    """What torch's operators for cuDNN take and give, computed by the kernels of the CPU. The reserve is a number."""

    def __init__(self) -> None:
        self.pasts: list[Past] = []
        self.backward_calls = 0

    def flatten(self, weights, per, input_size, mode, hidden_size, proj_size, layers, batch_first, bidirectional):
        assert len(weights) == per * layers * (1 + bidirectional)
        flat = torch.cat([w.flatten() for w in weights])
        for w, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            w.set_(part.view_as(w))  # as torch's does: the tensors that were given are parts of it from here on
        return flat

    def forward(self, x, weights, per, flat, hx, cx, *options):
        assert flat.data_ptr() == weights[0].data_ptr()
        stack, batch_sizes = self._read(weights, per, *options)
        assert (cx is not None) == stack.has_c
        inputs, constants = types.Inputs(x, hx, cx, list(weights)), Constants(batch_sizes)
        outputs, reserve = cpu.forward(stack, inputs, constants, True)
        self.pasts.append(Past(stack, inputs, constants, outputs.y, reserve))
        c_n = x.new_empty(0) if outputs.c_n is None else outputs.c_n
        number = torch.tensor([len(self.pasts) - 1], dtype=torch.uint8)
        return outputs.y, outputs.h_n, c_n, number, flat

    def backward(self, x, weights, per, flat, hx, cx, y, dy, dh_n, dc_n, *rest):
        *options, reserve, mask = rest
        self.backward_calls += 1
        past = self.pasts[int(reserve)]
        assert self._read(weights, per, *options)[0] == past.stack and options[6]  # train
        torch.testing.assert_close(y, past.y, rtol=0, atol=0)
        wanted = [True, past.inputs.h0 is not None, past.inputs.c0 is not None, *[mask[3]] * len(weights)]
        dx, dh0, dc0, *dw = cpu.backward(past, SomeOutputs(dy, dh_n, dc_n), wanted).flat()
        return dx, dh0, x.new_empty(0) if dc0 is None else dc0, dw if mask[3] else []

    @staticmethod
    def _read(weights, per, mode, H, P, L, batch_first, dropout, train, bidirectional, batch_sizes, state):
        assert not batch_first and dropout == 0 and state is None and weights[0].size(0) == (4 if mode == 2 else 1) * H
        bias = per in (4, 5)
        assert per == 2 + 2 * bias + (P > 0)
        sizes = torch.tensor(list(batch_sizes)) if batch_sizes else None
        return Stack((1, 0, 2)[mode], L, 2 if bidirectional else 1, bias), sizes


@pytest.fixture
def on_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[_CudnnOnCpu]:
    stand_in = _CudnnOnCpu()
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("_cudnn_rnn_flatten_weight", stand_in.flatten, "CPU")
    operators.impl("_cudnn_rnn", stand_in.forward, "CPU")
    operators.impl("_cudnn_rnn_backward", stand_in.backward, "CPU")
    monkeypatch.setattr(cudnn, "is_cudnns", lambda call, keep: call.dropout is None)
    yield stand_in
    operators._destroy()


BY_CUDNN = [
    Case("LSTM", T=5, B=6, I=3, H=6, L=2, D=2, proj=4),
    Case("LSTM", T=5, B=6, I=3, H=6, L=2, D=2, lengths=(5, 5, 4, 4, 1, 1), bias=False),
    Case("LSTM", T=3, B=4, I=3, H=6, hx=False),
    Case("RNN_TANH", T=5, B=6, I=3, H=6, L=3, D=2),
    Case("RNN_RELU", T=2, B=2, I=3, H=6, lengths=(2, 1), hx=False),
]


@pytest.mark.parametrize("case", BY_CUDNN, ids=lambda case: case.id)
def test_cudnns_results_and_gradients(on_cudnn: _CudnnOnCpu, case: Case) -> None:
    inputs = make_inputs(case)
    places = [w.data_ptr() for w in inputs.weights.values()]
    assert not float64_failures(run_op(case, inputs), run_reference(case, inputs))
    assert len(on_cudnn.pasts) == on_cudnn.backward_calls == 1
    assert [w.data_ptr() for w in inputs.weights.values()] == places  # parameters stay where they are


@pytest.mark.parametrize("case", BY_CUDNN, ids=lambda case: case.id)
def test_all_else_after_cudnn(on_cudnn: _CudnnOnCpu, case: Case) -> None:
    """What cuDNN has not: each function of a past whose reserve is cuDNN's."""
    inputs = make_inputs(case)
    pasts = past_by(cpu, case, inputs), past_by(cuda, case, inputs)
    assert pasts[1].reserve.dtype == torch.uint8
    cotangents = SomeOutputs(inputs.dy, inputs.dh_n, None)
    dz = torch.randn(case.L, case.D, pasts[0].y.flatten(0, -2).shape[0], case.G, case.H, dtype=torch.float64)
    wanted = [t is not None for t in pasts[0].inputs.flat()]
    results = [
        [
            *f.tangent(past, _like(past.inputs)),
            f.activations(past),
            *f.sweep_back(past, cotangents),
            *f.backward(past, cotangents, wanted).flat(),
            *f.backward(past, cotangents, wanted, inner=types.Inner(dz)).flat(),
            *f.backward(past, SomeOutputs(None, None, None), wanted).flat(),
        ]
        for f, past in zip((cpu, cuda), pasts, strict=True)
    ]
    assert_same(results[1], results[0])


def test_double_backward_and_each_samples_gradient_after_cudnn(on_cudnn: _CudnnOnCpu) -> None:
    test_per_sample_gradients()
    test_directional_derivatives(EXAMPLES[0])
    assert on_cudnn.backward_calls


def test_compiled_calls_have_a_reserve_as_the_fake_says(on_cudnn: _CudnnOnCpu) -> None:
    case = BY_CUDNN[0]
    inputs = make_inputs(case)
    stack = Stack(BY_MODE[case.mode].index, case.L, case.D, case.bias)
    given = inputs.x, inputs.h0, inputs.c0, list(inputs.weights.values())
    outputs = torch.ops.rnnfast.forward(*stack, *given, *Constants(), True)
    assert outputs[-1].dtype == torch.float64 and not on_cudnn.pasts


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_says_what_was_expected() -> None:
    weights = list(make_inputs(Case("LSTM", T=1, B=1, I=3, H=6)).weights.values())
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(x=x, h0=None, c0=None, weights=weights, batch_sizes=None):
        return op.recurrent("LSTM", x, batch_sizes, h0, c0, weights, 1, False, True)

    with pytest.raises(RuntimeError, match=r"h0: expected shape \(1, 2, 6\), got \(2, 6\)"):
        run(h0=torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"c0: expected dtype torch.float64 like the input, got torch.float32"):
        run(c0=torch.randn(1, 2, 6))
    with pytest.raises(RuntimeError, match=r"weight: expected device cpu like the input, got meta"):
        run(weights=[weights[0].to("meta"), *weights[1:]])
    with pytest.raises(RuntimeError, match=r"input: expected one of .*, got torch.int64"):
        run(x=x.long())
    with pytest.raises(RuntimeError, match=r"expected 3 rows, the sum of batch_sizes, got 4"):
        run(x=x[:, 0], batch_sizes=torch.tensor([2, 1]))
    with pytest.raises(RuntimeError, match="do not increase"):
        run(x=x[:, 0], batch_sizes=torch.tensor([1, 2, 1]))


def test_without_extension_the_error_names_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.forward(
        Stack(0, 1, 1, False),
        types.Inputs(torch.zeros(1, 1, 1), None, None, [torch.zeros(1, 1)] * 2),
        Constants(),
        False,
    )
    monkeypatch.setattr(cuda_sweeps, "is_built", lambda: False)
    with pytest.raises(RuntimeError, match="RNNFAST_CUDA=on"):
        cuda_sweeps.load_extension()
