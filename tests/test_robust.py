"""Odd numbers, odd memory, threads, forks, interrupts: what must not change a result, and what autograd promises."""

from __future__ import annotations

import gc
import os
import sys
import textwrap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    LARGE,
    MODES,
    Case,
    Inputs,
    Results,
    float32_failures,
    float64_failures,
    make_inputs,
    make_module,
    run_module,
    run_op,
    run_reference,
    run_torch,
    sensitivity,
)
from torch.utils.data import DataLoader, Dataset

import rnnfast
from rnnfast import _C
from rnnfast._autograd import op
from rnnfast._backends import cpu, sizes

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, on how it runs them
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Every kind of cell and everything it can have, at sizes that leave remainders.
FULL_CASES = (
    Case("LSTM", T=4, B=3, I=5, H=7, L=2, D=2),
    Case("LSTM", T=4, B=3, I=5, H=7, L=2, D=2, proj=3),
    Case("LSTM", T=4, B=3, I=5, H=7, L=2, lengths=(2, 4, 1)),
    Case("RNN_TANH", T=4, B=3, I=5, H=7, L=2, D=2),
    Case("RNN_RELU", T=4, B=3, I=5, H=7, L=2, D=2),
)
every_cell = pytest.mark.parametrize("case", FULL_CASES, ids=lambda case: case.id)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def assert_same(got: Results, expected: Results) -> None:
    """Equal to the last bit."""
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


# ------------------------------------------------------------------------------------------- odd memory


# What a kernel may not read as it lies, though shape and dtype are right or its numbers are all there.
NOT_LAID_OUT = {
    "transposed": lambda: torch.ones(3, 2).t(),
    "every second": lambda: torch.ones(2, 6)[:, ::2],
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "negated": lambda: torch._neg_view(torch.ones(2, 3)),
    "zeros not written": lambda: torch._efficientzerotensor((2, 3)),
    "unaligned": lambda: unaligned(torch.ones(2, 3)),
    "float64": lambda: torch.ones(2, 3).double(),
    "int32": lambda: torch.ones(2, 3, dtype=torch.int32),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "another shape": lambda: torch.ones(3, 2),
    "fewer dimensions": lambda: torch.ones(6),
    "more dimensions": lambda: torch.ones(1, 2, 3),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "no tensor": lambda: np.ones((2, 3), np.float32),
}


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch cannot be asked from C")
class TestLayout:
    layout = _C.Layout(torch.Tensor, [(2, 3), (2, 3)], 4)

    def test_addresses(self) -> None:
        a, b = torch.ones(2, 3), torch.nn.Parameter(torch.ones(4, 3))[2:]
        assert self.layout.addresses([a, b]) == [a.data_ptr(), b.data_ptr()]
        assert self.layout.addresses((None, b)) == [0, b.data_ptr()]

    def test_dimensions_of_one_have_any_stride(self) -> None:
        a = torch.ones(5, 7)[2:3, :4].unsqueeze(0)  # (1,1,4)
        assert _C.Layout(torch.Tensor, [(1, 1, 4)], 4).addresses([a]) == [a.data_ptr()]

    @pytest.mark.parametrize("kind", NOT_LAID_OUT)
    def test_what_is_not_laid_out_so(self, kind: str) -> None:
        assert self.layout.addresses([torch.ones(2, 3), NOT_LAID_OUT[kind]()]) is None

    def test_no_numbers(self) -> None:
        assert _C.Layout(torch.Tensor, [(0, 3)], 4).addresses([torch.ones(0, 3)]) is None

    def test_another_count(self) -> None:
        assert self.layout.addresses([torch.ones(2, 3)]) is None

    def test_a_torch_that_cannot_be_asked(self) -> None:
        assert _C.Layout(object, [(2, 3)], 4).addresses([torch.ones(2, 3)]) is None


@every_cell
def test_without_the_exchange_api(case: Case, monkeypatch) -> None:
    """Older versions of torch: tensor by tensor, to the same bits."""
    inputs = make_inputs(case, torch.float32)
    expected = run_module(rnnfast, case, inputs)

    class Blind:
        def addresses(self, tensors) -> None:
            return None

    with monkeypatch.context() as patched:
        patched.setattr(cpu._C, "Layout", lambda *_: Blind())
        for cached in (sizes.shapes_of, sizes.saved_arrays):
            patched.setattr(cpu, cached.__name__, cached.__wrapped__)
        got = run_module(rnnfast, case, inputs)
    assert_same(got, expected)


# ------------------------------------------------------------------------------------------ odd numbers


@pytest.mark.isa
@every_cell
@both_dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite(case: Case, dtype: torch.dtype, value: float) -> None:
    """One NaN or infinity anywhere reaches in torch's layers what it reaches here, and nothing else."""
    places = ("x", "h0", "c0", "dy", "dh_n", "dc_n", *make_inputs(case).weights)
    for place in places:
        inputs = make_inputs(case, dtype)
        tensor = inputs.weights[place] if place in inputs.weights else getattr(inputs, place)
        if tensor is None:  # Elman has no c
            continue
        tensor.view(-1)[tensor.numel() // 2] = value
        expected, got = run_torch(case, inputs), run_module(rnnfast, case, inputs)
        for name in expected:
            where = f"{name} with {value} in {place}"
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(kind(got[name]), kind(expected[name]), err_msg=where)
            finite = np.isfinite(expected[name])
            if dtype == torch.float64 and finite.any():
                assert not float64_failures({where: got[name][finite]}, {where: expected[name][finite]})


@pytest.mark.isa
@every_cell
@both_dtypes
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_inputs(case: Case, dtype: torch.dtype, size: float) -> None:
    inputs = make_inputs(case, dtype)
    inputs = replace(inputs, x=inputs.x * size)
    truth, torchs, got = (
        run_reference(case, inputs),
        run_torch(case, inputs),
        run_module(rnnfast, case, inputs),
    )
    if dtype == torch.float64:
        assert not float64_failures(got, truth)
    else:
        assert not float32_failures(got, torchs, truth, sensitivity(case, inputs, truth))


# ------------------------------------------------------------------------------------------- odd memory


def unaligned(a: torch.Tensor) -> torch.Tensor:
    """One byte away from where a number may begin."""
    buffer = np.zeros(a.numel() * a.element_size() + 1, dtype=np.uint8)
    copy = torch.from_numpy(buffer[1:].view(a.numpy().dtype)).view(a.shape)
    return copy.copy_(a)


def surrounded(a: torch.Tensor) -> torch.Tensor:
    """The middle of a larger tensor of NaN, which shows in the result if anything beside it is read."""
    larger = a.new_full([n + 2 for n in a.shape], np.nan)
    middle = larger[tuple(slice(1, 1 + n) for n in a.shape)]
    return middle.copy_(a)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    "every_second": lambda a: torch.stack([a, torch.full_like(a, np.nan)], dim=-1)[..., 0],
    "offset_by_one": lambda a: torch.cat([a.new_full([1], np.nan), a.flatten()])[1:].view(a.shape),
    "unaligned": unaligned,
    "surrounded": surrounded,
    "expanded": lambda a: a[:1].expand(a.shape),
    "zero_stride": lambda a: a.flatten()[0].expand(a.shape),
}


def laid_out(inputs: Inputs, layout: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    names = ("x", "h0", "c0", "dy", "dh_n", "dc_n")
    tensors = {name: getattr(inputs, name) for name in names}
    tensors = {name: a if a is None else layout(a) for name, a in tensors.items()}
    return replace(inputs, **tensors, weights={name: layout(w) for name, w in inputs.weights.items()})


@every_cell
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(case: Case, layout: str) -> None:
    inputs = laid_out(make_inputs(case), LAYOUTS[layout])
    assert not float64_failures(run_op(case, inputs), run_reference(case, inputs))


@every_cell
def test_module_with_odd_memory(case: Case) -> None:
    """Parameters that are views into a larger tensor, as tied or flattened weights are, and an expanded input."""
    inputs = make_inputs(case)
    inputs = replace(inputs, x=inputs.x[..., :1].expand(inputs.x.shape))
    module = make_module(rnnfast, case, inputs)
    for parameter in module.parameters():
        parameter.data = LAYOUTS["transposed"](surrounded(parameter.data))
    y, _ = module(inputs.x if inputs.packed is None else inputs.packed._replace(data=inputs.x))
    expected = run_reference(replace(case, hx=False), replace(inputs, h0=None, c0=None))
    y = y if inputs.packed is None else y.data
    assert not float64_failures({"y": y.detach().numpy()}, expected)


# ----------------------------------------------------------------------------- threads and processes

# Batches that are split by rows and by hidden units, ones too small to split, more than one layer and direction.
THREAD_CASES = (
    *LARGE,
    Case("LSTM", T=5, B=1, I=20, H=200),
    Case("LSTM", T=5, B=3, I=20, H=150, L=2, D=2, proj=40),
    Case("RNN_TANH", T=5, B=2, I=20, H=300, D=2),
    Case("LSTM", T=30, B=70, I=3, H=20),
    Case("LSTM", T=2, B=1, I=1, H=1),
)


@pytest.mark.isa
@pytest.mark.parametrize("case", THREAD_CASES, ids=lambda case: case.id)
def test_thread_count_changes_nothing(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    torch.set_num_threads(1)
    expected = run_module(rnnfast, case, inputs)
    for threads in (2, 3, 5, 2, 1):
        torch.set_num_threads(threads)
        assert_same(run_module(rnnfast, case, inputs), expected)


def test_python_threads_at_once() -> None:
    cases = [*THREAD_CASES, *FULL_CASES]
    inputs = [make_inputs(case, torch.float32) for case in cases]
    expected = [run_module(rnnfast, *pair) for pair in zip(cases, inputs, strict=True)]

    def run(k: int) -> Results:
        return run_module(rnnfast, cases[k], inputs[k])

    jobs = list(range(len(cases))) * 8
    with ThreadPoolExecutor(max_workers=4) as pool:
        for k, got in zip(jobs, pool.map(run, jobs), strict=True):
            assert_same(got, expected[k])


# What the scripts below share: a training step on several threads, as bytes to compare. No operator of torch in it
# is parallel, since those hang in a forked child.
STEP = """
    import os, signal, sys, threading
    import torch
    import rnnfast

    torch.manual_seed(0)
    torch.set_num_threads(2)
    module = rnnfast.LSTM(32, 64, num_layers=2)
    x, dy = torch.randn(50, 32, 32), torch.randn(50, 32, 64)

    def step():
        y, _ = module(x)
        gradients = torch.autograd.grad(y, list(module.parameters()), dy)
        return [a.detach().numpy().tobytes() for a in (y, *gradients)]

    expected = step()
"""


def script(code: str) -> str:
    return textwrap.dedent(STEP) + textwrap.dedent(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork(run_python) -> None:
    """The parent's thread pool does not exist in the child, which must neither hang nor compute something else."""
    code = """
        child = os.fork()
        if child == 0:
            os._exit(0 if step() == step() == expected else 3)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"the child ended with {code}"
        assert step() == expected
        print("done")
    """
    result = run_python("-c", script(code))
    assert (result.stdout, result.returncode) == ("done\n", 0), result.stderr


class Encoded(Dataset):
    """Sequences that are run through a layer where they are loaded, in a worker process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module, self.x = rnnfast.LSTM(8, 40), torch.randn(8, 30, 16, 8)  # x (samples,T,B,I)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> np.ndarray:
        with torch.no_grad():
            return self.module(self.x[k])[0].numpy()  # (T,B,H)


def test_dataloader_workers() -> None:
    data = Encoded()
    torch.set_num_threads(2)
    expected = [data[k] for k in range(len(data))]
    got = list(DataLoader(data, batch_size=None, num_workers=2, timeout=300))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no SIGINT to itself")
def test_interrupt_leaves_the_process_usable(run_python) -> None:
    code = """
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process inherits "ignore"
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                step()
        except KeyboardInterrupt:
            print("interrupted")
        assert step() == expected
        print("done")
    """
    result = run_python("-c", script(code))
    assert (result.stdout, result.returncode) == ("interrupted\ndone\n", 0), result.stderr


@linux
def test_one_openmp_runtime(run_python) -> None:
    code = """
        maps = open("/proc/self/maps").read().splitlines()
        files = {line.split()[-1] for line in maps if "/" in line}
        print(sum("omp" in os.path.basename(f) and ".so" in f for f in files), sorted(files))
    """
    result = run_python("-c", script(code))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 "), result.stdout


# ----------------------------------------------------------------------------- what autograd promises


@every_cell
@pytest.mark.parametrize("output", ["y", "h_n", "c_n"])
def test_gradient_through_one_output(case: Case, output: str) -> None:
    """The loss sees one output only: the others' gradients do not come as zeros, they do not come at all."""
    if output == "c_n" and case.mode != "LSTM":
        pytest.skip("Elman has no c_n")
    inputs = make_inputs(case)
    zeros = {
        name: torch.zeros_like(getattr(inputs, name))
        for name, of in (("dy", "y"), ("dh_n", "h_n"), ("dc_n", "c_n"))
        if of != output and getattr(inputs, name) is not None
    }
    truth = run_reference(case, replace(inputs, **zeros))

    module = make_module(rnnfast, case, inputs)
    x = inputs.x.clone().requires_grad_()
    hx = (inputs.h0, inputs.c0) if case.mode == "LSTM" else inputs.h0
    y, state = module(x if inputs.packed is None else inputs.packed._replace(data=x), hx)
    h_n, c_n = state if case.mode == "LSTM" else (state, None)
    seen, incoming = {
        "y": (y if inputs.packed is None else y.data, inputs.dy),
        "h_n": (h_n, inputs.dh_n),
        "c_n": (c_n, inputs.dc_n),
    }[output]
    seen.backward(incoming)
    got = {"d_x": x.grad} | {f"d_{name}": p.grad for name, p in module.named_parameters()}
    assert not float64_failures({name: a.numpy() for name, a in got.items()}, truth)


@every_cell
def test_backward_twice(case: Case) -> None:
    inputs = make_inputs(case)
    module = make_module(rnnfast, case, inputs)
    y, _ = module(inputs.x if inputs.packed is None else inputs.packed)
    y = y if inputs.packed is None else y.data
    parameters = list(module.parameters())
    first = torch.autograd.grad(y, parameters, inputs.dy, retain_graph=True)
    second = torch.autograd.grad(y, parameters, inputs.dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, parameters, inputs.dy)


@pytest.mark.parametrize("library", [torch.nn, rnnfast], ids=["torch", "rnnfast"])
@pytest.mark.parametrize("saved", ["x", "h0", "weight_ih_l0", "weight_hh_l1_reverse"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_input_modified_in_place(library, mode: str, saved: str) -> None:
    case = Case(mode, T=4, B=3, I=5, H=7, L=2, D=2)
    inputs = make_inputs(case)
    inputs.x.requires_grad_()  # else torch has no use for weight_ih_l0
    module = make_module(library, case, inputs)
    y, _ = module(inputs.x, (inputs.h0, inputs.c0) if mode == "LSTM" else inputs.h0)
    with torch.no_grad():
        tensor = module.get_parameter(saved) if "weight" in saved else getattr(inputs, saved)
        tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@both_dtypes
@pytest.mark.parametrize("mode", MODES)
def test_output_modified_in_place(mode: str, dtype: torch.dtype) -> None:
    """As by an activation with inplace=True: the right gradient or an error, never a wrong gradient."""
    case = Case(mode, T=4, B=3, I=5, H=7, L=2, D=2)
    inputs = make_inputs(case, dtype)

    def gradient(double: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        module = make_module(rnnfast, case, inputs)
        double(module(inputs.x)[0]).sum().backward()
        return module.weight_hh_l0.grad

    try:
        got = gradient(lambda y: y.mul_(2))
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
    else:
        torch.testing.assert_close(got, gradient(lambda y: y * 2))


@every_cell
def test_saved_tensors_are_freed(case: Case) -> None:
    """By backward, while the output lives on; and with the output, if backward never comes; no help from gc."""
    inputs = make_inputs(case)
    module = make_module(rnnfast, case, inputs)

    def run() -> tuple[torch.Tensor, weakref.ref]:
        x = inputs.x.clone()
        y, _ = module(x if inputs.packed is None else inputs.packed._replace(data=x))
        return y if inputs.packed is None else y.data, weakref.ref(x)

    gc.disable()
    try:
        y, x = run()
        assert x() is not None  # the graph needs it
        y.sum().backward()
        assert x() is None

        y, x = run()
        assert x() is not None
        del y
        assert x() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("B", [2, 100])  # small and large in memory
@pytest.mark.parametrize("cell", ["LSTM", "RNN"])
def test_nothing_waits_for_the_garbage_collector(cell: str, B: int) -> None:
    module = getattr(rnnfast, cell)(8, 64)
    x = torch.randn(30, B, 8)

    def run() -> None:
        with torch.no_grad():
            module(x)
        grads = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(module.parameters()))

    run()
    gc.collect()
    gc.freeze()  # what other tests have left
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        left = [value for value in gc.garbage if isinstance(value, torch.Tensor) or "rnnfast" in str(type(value))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
    assert not left


@linux
def test_memory_does_not_grow() -> None:
    """50 training steps whose saved gates are 5 MB each: forgetting any of them would show."""
    module, x = rnnfast.LSTM(8, 64), torch.randn(100, 32, 8)

    def resident(steps: int) -> int:
        for _ in range(steps):
            module(x)[0].sum().backward()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident(steps=10)
    assert resident(steps=50) - before < 50e6


# ------------------------------------------------------------------------------- the op protects its memory


@pytest.mark.parametrize(
    ("x", "batch_sizes", "message"),
    [
        ((0, 2, 3), None, "Expected sequence length to be larger than 0"),
        ((3, 3), [1, 2], "batch_sizes: expected positive numbers that do not increase, got 2 at step 1"),
        ((2, 3), [2, 0], "batch_sizes: expected positive numbers that do not increase, got 0 at step 1"),
        ((3, 3), [2, 2], "input: expected 4 rows, the sum of batch_sizes, got 3"),
        ((5, 2, 4), None, "weight: expected shape"),
    ],
)
def test_bad_sizes(x: tuple[int, ...], batch_sizes: list[int] | None, message: str) -> None:
    sizes = None if batch_sizes is None else torch.tensor(batch_sizes, dtype=torch.int64)
    weights = [torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), torch.randn(16)]
    with pytest.raises(RuntimeError, match=message):
        op.recurrent("LSTM", torch.randn(x), sizes, None, None, weights, 1, False, True)


def test_empty_batch() -> None:
    weights = [torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), torch.randn(16)]
    y, h_n, c_n = op.recurrent("LSTM", torch.randn(5, 0, 3), None, None, None, weights, 1, False, True)
    assert (y.shape, h_n.shape, c_n.shape) == ((5, 0, 4), (1, 0, 4), (1, 0, 4))
