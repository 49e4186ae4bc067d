"""rnnfast on a GPU: what the tests of the CPU ask for, kernel by kernel. Skipped where there is none.

The order is that in which to look for an error: cuda.py with composite sweeps, then `steps`, which is plain, then
the persistent kernels against the same cases.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    GRID,
    LARGE,
    MODES,
    OURS,
    RESETS,
    SIZES,
    Case,
    Inputs,
    Results,
    error,
    float32_failures,
    float64_failures,
    make_inputs,
    make_module,
    run_reference,
    scale,
    sensitivity,
)

import rnnfast
from rnnfast._backends import cuda_sweeps, cudnn
from rnnfast._backends.cells import BY_MODE

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not cuda_sweeps.is_built(), reason="needs a build with RNNFAST_CUDA=on"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("error::rnnfast.fallback.FallbackWarning"),
]

KERNELS = ("composite", "steps", "block", "cluster", "grid")
SOME = GRID[::11] + SIZES[::7] + LARGE
OF_TORCH = tuple(case for case in SOME if case.mode in MODES and not case.resets)
WIDE = (
    *(Case("LSTM", T=20, B=B, I=32, H=H) for H, B in ((64, 40), (128, 8), (256, 33), (512, 16), (1024, 16), (1100, 3))),
    Case("LSTM", T=20, B=20, I=32, H=512, D=2, lengths=tuple(range(1, 21))),
    Case("RNN_TANH", T=20, B=20, I=32, H=1024, lengths=tuple(range(1, 21))),
)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch):
    return lambda kernel: monkeypatch.setenv("RNNFAST_CUDA_KERNEL", kernel)


def _to(value, device="cuda"):
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    return None if value is None else value.to(device)


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(**{name: _to(value) for name, value in vars(inputs).items()})


def run(library, case: Case, inputs: Inputs) -> Results:
    """As cases.run_module, on the GPU."""
    gpu = on_gpu(inputs)
    module = make_module(library, case, inputs).to("cuda").train()  # cuDNN has no backward pass in evaluation mode
    module.dropout = 0.0
    leaves = {"x": gpu.x, "h0": gpu.h0, "c0": gpu.c0}
    leaves = {name: a.detach().requires_grad_() for name, a in leaves.items() if a is not None}
    x = leaves["x"] if gpu.packed is None else gpu.packed._replace(data=leaves["x"])
    hx = None
    if case.hx:
        hx = (leaves["h0"], leaves["c0"]) if case.mode == "LSTM" else leaves["h0"]
    more = {}
    if gpu.resets is not None:
        more["resets"] = gpu.resets if gpu.packed is None else gpu.packed._replace(data=gpu.resets)
    y, state = module(x, hx, **more)
    h_n, c_n = state if case.mode == "LSTM" else (state, None)
    outputs = {"y": y if gpu.packed is None else y.data, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})
    leaves |= dict(module.named_parameters())
    incoming = {"y": gpu.dy, "h_n": gpu.dh_n, "c_n": gpu.dc_n}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [incoming[name] for name in outputs])
    results = outputs | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: a.detach().double().cpu().numpy() for name, a in results.items()}


def takes(kernel: str, dtype: torch.dtype, case: Case) -> None:
    """Skips what a forced kernel has no room for: plan.cpp says so itself."""
    if kernel in ("composite", "steps"):
        return
    try:
        plans = cuda_sweeps.load_extension().make_plan
        for backward in (False, True):
            sizes = case.H, case.proj, case.B, case.D
            plans(0, BY_MODE[case.mode].index, cuda_sweeps.number_of(dtype), *sizes, backward, False, kernel)
    except ValueError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("kernel", ["composite", "steps"])
@pytest.mark.parametrize("case", SOME + OURS[::40] + RESETS[::10], ids=lambda case: case.id)
def test_float64(force, kernel: str, case: Case) -> None:
    force(kernel)
    inputs = make_inputs(case)
    assert not float64_failures(run(rnnfast, case, inputs), run_reference(case, inputs))


@pytest.mark.parametrize("case", OF_TORCH, ids=lambda case: case.id)
def test_float32_without_tf32(force, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    force("steps")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = make_inputs(case, torch.float32)
    truth = run_reference(case, inputs)
    torchs = run(torch.nn, case, inputs)
    assert not float32_failures(run(rnnfast, case, inputs), torchs, truth, sensitivity(case, inputs, truth))


CUDNNS = (
    Case("LSTM", T=20, B=5, I=6, H=12, L=2, D=2),
    Case("LSTM", T=20, B=5, I=6, H=12, proj=4, hx=False),
    Case("LSTM", T=20, B=4, I=6, H=12, D=2, lengths=(20, 20, 9, 1), bias=False),
    Case("RNN_RELU", T=20, B=5, I=6, H=12, D=2),
    Case("RNN_TANH", T=20, B=3, I=6, H=12, lengths=(20, 12, 3)),
)


@pytest.mark.parametrize("case", CUDNNS, ids=lambda case: case.id)
def test_what_cudnn_does_in_place_of_sweeps(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """float64, as nobody forces a kernel; what cuDNN has not is computed all the same."""
    calls = []
    start = cudnn.Cudnn.__init__
    monkeypatch.setattr(cudnn.Cudnn, "__init__", lambda *args: calls.append(1) or start(*args))
    inputs = make_inputs(case)
    assert not float64_failures(run(rnnfast, case, inputs), run_reference(case, inputs))
    assert len(calls) == 2  # forward, backward
    gpu = on_gpu(inputs)
    layer = make_module(rnnfast, case, inputs).to("cuda")
    x = gpu.x if gpu.packed is None else gpu.packed
    y = layer(x)[0]
    y = y if gpu.packed is None else y.data
    weights = list(layer.parameters())
    gradients = torch.autograd.grad(y.sin().sum(), weights, create_graph=True)
    curvature = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    assert all(torch.isfinite(g).all() for g in curvature)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", OF_TORCH[::3] + WIDE, ids=lambda case: case.id)
def test_tensor_cores(force, case: Case, dtype: torch.dtype, kernel: str) -> None:
    """At most twice cuDNN's own error, plus two roundings of the largest number."""
    takes(kernel, dtype, case)
    force(kernel)
    inputs = make_inputs(case, dtype)
    truth, torchs, got = run_reference(case, inputs), run(torch.nn, case, inputs), run(rnnfast, case, inputs)
    eps = 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, a in got.items():
        assert error(a, truth[name]) <= 2 * error(torchs[name], truth[name]) + 2 * eps * scale(truth[name]), name


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_long_sequences_give_the_same_bits(force, kernel: str) -> None:
    case = Case("LSTM", T=4096, B=16, I=8, H=64)
    takes(kernel, torch.bfloat16, case)
    force(kernel)
    inputs = make_inputs(case, torch.bfloat16)
    first, again = run(rnnfast, case, inputs), run(rnnfast, case, inputs)
    assert all((first[name] == again[name]).all() for name in first)
    truth = run_reference(case, inputs)
    assert error(first["y"], truth["y"]) <= 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_two_streams(force, kernel: str) -> None:
    case = Case("LSTM", T=200, B=16, I=8, H=256)
    takes(kernel, torch.bfloat16, case)
    force(kernel)
    layer = rnnfast.LSTM(case.I, case.H, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, case.T, case.B, case.I, device="cuda", dtype=torch.bfloat16)
    want = [layer(one)[0].detach() for one in x]
    streams = [torch.cuda.Stream() for _ in x]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = []
    for _ in range(3):
        for stream, one in zip(streams, x, strict=True):
            with torch.cuda.stream(stream):
                got.append(layer(one)[0].detach())
    torch.cuda.synchronize()
    for i, y in enumerate(got):
        assert torch.equal(y, want[i % 2])


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_graph_capture(force, kernel: str, packed: bool) -> None:
    case = Case("LSTM", T=6, B=16, I=8, H=256)
    takes(kernel, torch.float16, case)
    force(kernel)
    layer = rnnfast.LSTM(case.I, case.H, device="cuda", dtype=torch.float16)
    x = torch.randn(case.T, case.B, case.I, device="cuda", dtype=torch.float16)
    given = x
    if packed:
        given = torch.nn.utils.rnn.pack_padded_sequence(x, [case.T] * 8 + [2] * 8)
        x = given.data

    def step() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        y = layer(given)[0]
        y = y.data if packed else y
        y.float().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    captured, gradient = y.clone(), layer.weight_hh_l0.grad.clone()
    assert torch.equal(captured, step())
    assert torch.equal(gradient, layer.weight_hh_l0.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, torchs = rnnfast.LSTM(8, 64, device="cuda"), torch.nn.LSTM(8, 64, device="cuda")
    torchs.load_state_dict(layer.state_dict())
    x = torch.randn(20, 4, 8, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        results = [module(x) for module in (layer, torchs)]
    (y, (h, c)), (want_y, (want_h, want_c)) = results
    assert (y.dtype, h.dtype, c.dtype) == (want_y.dtype, want_h.dtype, want_c.dtype)
    torch.testing.assert_close(y, want_y, rtol=0, atol=8 * torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


def test_derivatives() -> None:
    """Double backward, forward mode and per-sample gradients beside those of the CPU."""
    from torch.func import functional_call, grad, jvp, vmap

    layer = rnnfast.LSTM(3, 10, 2, bidirectional=True, dtype=torch.float64)
    gpu = rnnfast.LSTM(3, 10, 2, bidirectional=True, dtype=torch.float64, device="cuda")
    gpu.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, 1, 3, dtype=torch.float64)
    results = []
    for module, at in ((layer, x), (gpu, x.cuda())):
        weights = {name: w.detach() for name, w in module.named_parameters()}

        def loss(weights, x, module=module):
            return functional_call(module, weights, (x,))[0].sin().sum()

        each = vmap(grad(loss), in_dims=(None, 0))(weights, at)
        hessian_times = jvp(lambda x, w=weights: grad(loss, 1)(w, x), (at[0],), (at[1],))[1]
        results.append([hessian_times, *each.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-9)


def test_bad_input() -> None:
    layer = rnnfast.LSTM(3, 10, device="cuda")
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 4, 3))  # on the CPU
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 4, 5, device="cuda"))
    y, _ = layer(torch.randn(2, 4, 3, device="cuda"))  # no error is left behind
    assert torch.isfinite(y).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    layer = rnnfast.LSTM(3, 64, device="cuda:1", dtype=torch.bfloat16)
    first = rnnfast.LSTM(3, 64, device="cuda:0", dtype=torch.bfloat16)
    first.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, 3, dtype=torch.bfloat16)
    assert torch.equal(layer(x.to("cuda:1"))[0].cpu(), first(x.to("cuda:0"))[0].cpu())
