"""The CUDA kernels' own source, run on the CPU: csrc/tests/emulated_device.h makes each thread of a GPU a thread of
the CPU, tensor cores follow the tables of the PTX ISA. Bindings, plans and rnnfast._backends.cuda are those of a GPU.

Compiled with g++ when the tests begin. What this cannot show: what nvcc makes of the source (test_cuda_build.py), and
what a GPU makes of that (test_cuda.py).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import (
    LEAKY,
    MODES,
    Case,
    Results,
    error,
    float32_failures,
    float32_products,
    float64_failures,
    make_inputs,
    run_op,
    run_reference,
    run_torch,
    scale,
    sensitivity,
)
from test_cuda_by_composite import assert_same, past_by

from rnnfast._backends import cpu, cuda, cuda_sweeps, schema
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.cuda_backward import BackwardSweep
from rnnfast._backends.types import Inner, SomeOutputs

pybind11 = pytest.importorskip("pybind11", reason="building the emulated module needs pybind11")
if shutil.which("g++") is None:
    pytest.skip("building the emulated module needs g++", allow_module_level=True)

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
MODULE = "_emulated" + sysconfig.get_config_var("EXT_SUFFIX")
KERNELS = ("steps", "block", "cluster", "grid")


def _build(folder: Path) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DRNNFAST_CUDA_MODULE=_emulated", "-I" + pybind11.get_include()]
    flags += ["-I" + sysconfig.get_paths()["include"]]

    def compile(source: Path) -> str:
        built = str(folder / (source.stem + ".o"))
        subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", built], check=True)
        return built

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])))
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", str(folder / MODULE)], check=True)


@pytest.fixture(scope="session")
def emulated(built_once) -> ModuleType:
    """rnnfast._cuda for the emulated card: a Hopper with 4 multiprocessors."""
    spec = importlib.util.spec_from_file_location("_emulated", built_once("emulated", _build) / MODULE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class _Emulated(cuda_sweeps.Extension):
    used: list[str]

    def _run(self, run, s, arrays, like, backward, *more):
        super()._run(run, s, arrays, like, backward, *more)
        self.used.append("backward" if backward else "forward")

    @staticmethod
    def place(x: torch.Tensor) -> tuple[int, int]:
        return 0, 0


@pytest.fixture
def on_emulated(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Emulated]:
    """Tensors of the CPU go to the emulated card, to a kernel by its name."""
    extension = _Emulated(emulated)
    extension.used = []
    monkeypatch.setattr(schema, "backend_for", lambda x: cuda)
    monkeypatch.setattr(cuda_sweeps, "sweeps_for", lambda x: extension)
    monkeypatch.setattr(cuda_sweeps, "number_of", lambda dtype: cuda_sweeps.NUMBERS[dtype])
    float32_products(monkeypatch)

    def force(kernel: str, tf32: bool = False) -> _Emulated:
        monkeypatch.setenv("RNNFAST_CUDA_KERNEL", kernel)
        if tf32:
            monkeypatch.setattr(cuda_sweeps, "number_of", lambda dtype: cuda_sweeps.TF32)
        return extension

    return force


# Remainders of 8 and 16 units and of 8 and 16 sequences; lengths that leave whole groups idle; blocks, splits of K, and
# groups that do not fit the card at a time.
SIZES = (
    Case("LSTM", T=4, B=3, I=5, H=7, L=2, D=2),
    Case("LSTM", T=4, B=4, I=5, H=20, D=2, lengths=(2, 4, 1, 2), bias=False),
    Case("LSTM", T=3, B=17, I=3, H=17, hx=False),
    Case("LSTM", T=3, B=37, I=3, H=9, D=2, lengths=(3,) * 7 + (2,) * 20 + (1,) * 10),
    Case("RNN_TANH", T=3, B=17, I=3, H=40, D=2, lengths=(3,) * 5 + (2,) * 7 + (1,) * 5),
    Case("RNN_RELU", T=1, B=9, I=5, H=20, L=2),
    Case("RNN_TANH", T=2, B=9, I=3, H=20, D=2, hx=False),
    Case("LSTM", T=2, B=3, I=3, H=100, hx=False),
    Case("RNN_TANH", T=2, B=3, I=3, H=150),
)
PROJECTED = Case("LSTM", T=3, B=4, I=5, H=20, L=2, D=2, proj=3, lengths=(2, 3, 1, 2))
# Every cell, padded and packed, with and without episodes that end inside, two layers of two directions; several blocks
# of units and of sequences, everything begun anew, nothing given.
CELLS = tuple(
    Case(mode, T=5, B=3, I=3, H=5, L=2, D=2, lengths=lengths, resets=resets)
    for mode in (*MODES, *LEAKY)
    for lengths in (None, (2, 5, 3))
    for resets in (0.0, 0.4)
    if resets or mode == "GRU" or mode in LEAKY
)
CELLS += (
    *(Case(mode, T=3, B=18, I=3, H=20, resets=0.3, hx=mode != "GRU") for mode in ("LSTM", "GRU", "LEAKY_TANH")),
    *(Case(mode, T=3, B=2, I=3, H=5, D=2, resets=1.0) for mode in ("LSTM", "GRU")),
    Case("LSTM", T=4, B=3, I=3, H=9, L=2, D=2, proj=4, lengths=(2, 4, 3), resets=0.4),
    Case("GRU", T=2, B=5, I=3, H=33, bias=False),
)
EPISODES = Case("LSTM", T=5, B=3, I=3, H=5, L=2, D=2, resets=0.4)
TF32_EPS = 2.0**-10  # of its 10 bits of mantissa


def _run(extension: _Emulated, case: Case, inputs) -> dict:
    try:
        got = run_op(case, inputs)
    except ValueError as refused:  # a forced kernel that has no room for the sizes
        assert "this kernel cannot take" in str(refused)
        pytest.skip(str(refused))
    assert {"forward", "backward"} <= set(extension.used)
    return got


@pytest.mark.parametrize("case", [*SIZES, PROJECTED, *CELLS], ids=lambda case: case.id)
def test_steps_float64(on_emulated, case: Case) -> None:
    inputs = make_inputs(case)
    assert not float64_failures(_run(on_emulated("steps"), case, inputs), run_reference(case, inputs))


@pytest.mark.parametrize("case", [SIZES[1], PROJECTED, *CELLS[::5]], ids=lambda case: case.id)
def test_steps_float32(on_emulated, case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    truth = run_reference(case, inputs)
    got = _run(on_emulated("steps"), case, inputs)
    assert not float32_failures(got, run_torch(case, inputs), truth, sensitivity(case, inputs, truth))


# Sizes are the same to both 16-bit numbers.
NUMBERS = [(number, case) for number in ("bfloat16", "tf32", "float16") for case in SIZES]
NUMBERS = [*NUMBERS[:-5], *(pytest.param(*one, marks=pytest.mark.long) for one in NUMBERS[-5:])]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("number", "case"), NUMBERS, ids=lambda value: getattr(value, "id", value))
def test_tensor_cores(on_emulated, case: Case, number: str, kernel: str) -> None:
    """Every kernel: as far from the truth as the roundings of its numbers, and as each other to the last few bits."""
    dtype = torch.float32 if number == "tf32" else getattr(torch, number)
    inputs = make_inputs(case, dtype)
    truth, got = run_reference(case, inputs), _run(on_emulated(kernel, number == "tf32"), case, inputs)
    _assert_rounded(got, truth, TF32_EPS if number == "tf32" else torch.finfo(dtype).eps)


def _assert_rounded(got: Results, truth: Results, eps: float) -> None:
    assert got.keys() == truth.keys()
    for name, a in got.items():
        assert error(a, truth[name]) <= 4 * eps * scale(truth[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CELLS[1::5], ids=lambda case: case.id)
def test_steps_16_bit(on_emulated, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    _assert_rounded(_run(on_emulated("steps"), case, inputs), run_reference(case, inputs), torch.finfo(dtype).eps)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_does_not_exist_is_not_read(on_emulated, kernel: str) -> None:
    """One sequence full of NaN and infinity leaves the others what they are."""
    case = SIZES[2]
    inputs = make_inputs(case, torch.bfloat16)
    extension = on_emulated(kernel)
    clean = _run(extension, case, inputs)
    inputs.x[:, 3] = float("nan")
    inputs.x[:, 5] = float("inf")
    dirty = _run(extension, case, inputs)
    others = [b for b in range(case.B) if b not in (3, 5)]
    for name in ("y", "h_n", "c_n", "d_x"):
        assert (clean[name][:, others] == dirty[name][:, others]).all(), name


@pytest.mark.parametrize("case", [SIZES[1], PROJECTED, *CELLS[::3]], ids=lambda case: case.id)
def test_gradients_inside(on_emulated, case: Case) -> None:
    """The optional arrays: dL/dm_t and dL/dc_t out, dL/dz and dL/dc_t in."""
    on_emulated("steps")
    inputs = make_inputs(case)
    pasts = past_by(cpu, case, inputs), past_by(cuda, case, inputs)
    cotangents = SomeOutputs(inputs.dy, None, inputs.dc_n)
    wanted = [t is not None for t in pasts[0].inputs.flat()]
    rows = case.L, case.D, inputs.x.shape[:-1].numel()
    dz = torch.randn(*rows, case.G, case.H, dtype=torch.float64)
    dc = torch.randn(*rows, case.H, dtype=torch.float64) if case.mode == "LSTM" else None
    want, got = (
        [*f.sweep_back(past, cotangents), *f.backward(past, cotangents, wanted, inner=Inner(dz, dc)).flat()]
        for f, past in zip((cpu, cuda), pasts, strict=True)
    )
    assert_same(got, want)


@pytest.mark.parametrize("case", [SIZES[1], EPISODES], ids=lambda case: case.id)
def test_what_only_steps_know_goes_by_steps(on_emulated, case: Case) -> None:
    """Sizes that fit a persistent kernel, with resets and with gradients inside."""
    inputs = make_inputs(case, torch.float16)
    cotangents = SomeOutputs(inputs.dy, inputs.dh_n, inputs.dc_n)
    results = []
    for kernel in ("steps", ""):
        on_emulated(kernel)
        past = past_by(cuda, case, make_inputs(case, torch.float16))
        results.append([past.y, *cuda.sweep_back(past, cotangents)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kernel", ["block", "cluster", "grid"])
def test_optional_arrays_of_persistent_kernels(on_emulated, kernel: str) -> None:
    """As `steps`, which the test above checks."""
    case = SIZES[1]
    inputs = make_inputs(case, torch.float16)
    dz = torch.randn(case.L, case.D, len(inputs.x), case.G, case.H).half()
    results = []
    for name in ("steps", kernel):
        on_emulated(name)
        past = past_by(cuda, case, inputs)
        cotangents = SomeOutputs(inputs.dy, inputs.dh_n, inputs.dc_n)
        wanted = [t is not None for t in past.inputs.flat()]
        back = cuda.backward(past, cotangents, wanted, inner=Inner(dz))
        d_cells = torch.empty(len(inputs.x), case.D, case.H, dtype=torch.float16)
        swept = BackwardSweep(past, cotangents, Inner()).run(0, wants_dx=False, d_cells=d_cells)
        results.append([swept.dz, d_cells, *(g for g in back.flat() if g is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


def test_every_geometry_is_run(emulated, on_emulated) -> None:
    """The cases above leave no instantiation of the persistent kernels out."""
    seen = set()
    for case in SIZES:
        for backward in (False, True):
            for kernel in KERNELS[1:]:
                cell = LSTM if case.mode == "LSTM" else ELMAN
                try:
                    plan = emulated.Plan(0, cell, BFLOAT16, case.H, 0, case.B, case.D, backward, False, kernel)
                except ValueError:
                    continue
                seen.add((cell, backward, kernel != "grid", plan.geometry["tiles"]))
    wanted = {
        (cell, backward, cluster, tiles)
        for cell in (LSTM, ELMAN)
        for backward in (False, True)
        for cluster in (False, True)
        for tiles in ((1, 2) if cell == LSTM and backward else (1, 2, 4))
    }
    assert seen == wanted, wanted - seen


def test_same_bits_again(on_emulated) -> None:
    case = SIZES[3]
    inputs = make_inputs(case, torch.bfloat16)
    extension = on_emulated("cluster")
    first, second = (_run(extension, case, inputs) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


# --- plans ------------------------------------------------------------------------------------------------------------

H200 = (90, 132, 227 * 1024)
LSTM, ELMAN = 2, 0
BFLOAT16, FLOAT32, FLOAT64, TF32 = 4, 1, 0, 2


def _plan(
    emulated, card=H200, cell=LSTM, number=BFLOAT16, H=512, P=0, B=16, D=1, backward=False, by_steps=False, forced=""
):
    return emulated.Plan.on(emulated.Card(*card), cell, number, H, P, B, D, backward, by_steps, forced)


@pytest.mark.parametrize(
    ("asked", "kernel"),
    [
        ({"H": 64}, "block"),
        ({"H": 128}, "cluster"),
        ({"H": 512}, "cluster"),
        ({"H": 1024}, "grid"),
        ({"H": 4096}, "steps"),
        ({"H": 512, "P": 100}, "steps"),
        ({"number": FLOAT32, "H": 64}, "steps"),
        ({"number": FLOAT64, "H": 64}, "steps"),
        ({"number": TF32, "H": 256}, "cluster"),
        ({"card": (80, 108, 163 * 1024), "H": 256}, "grid"),
        ({"card": (75, 40, 64 * 1024), "H": 64}, "steps"),
        ({"H": 64, "by_steps": True}, "steps"),
        *(({"H": 64, "cell": BY_MODE[mode].index}, "steps") for mode in ("GRU", *LEAKY)),
    ],
)
def test_choice_of_kernel(emulated, asked, kernel: str) -> None:
    assert _plan(emulated, **asked).kernel == kernel


def test_geometry_covers_everything_and_fits(emulated) -> None:
    cards = [H200, (80, 108, 163 * 1024), (120, 170, 99 * 1024), (100, 148, 227 * 1024)]
    seen = set()
    for card in cards:
        for cell in (LSTM, ELMAN):
            for number in (BFLOAT16, TF32):
                for H in (1, 8, 9, 63, 64, 65, 100, 128, 200, 256, 300, 512, 700, 1024, 1500, 3000):
                    for B in (1, 8, 9, 64, 1000):
                        for backward in (False, True):
                            plan = _plan(emulated, card, cell, number, H, 0, B, 2, backward)
                            seen.add(plan.kernel)
                            if plan.kernel == "steps":
                                continue
                            g = plan.geometry
                            assert g["C"] * g["U"] >= H > (g["C"] - 1) * g["U"]
                            assert g["slices"] * g["tiles"] * 8 >= B > (g["slices"] - 1) * g["tiles"] * 8
                            assert g["threads"] <= 256 and g["shared"] <= card[2]
                            owned = g["tiles"] if cell == ELMAN else 2 if g["tiles"] == 4 else 1
                            finishers = g["tiles"] * (1 if cell == LSTM and not backward else 2) // owned
                            assert g["splits"] >= finishers
                            assert g["splits"] * g["k_steps"] * (8 if number == TF32 else 16) >= g["C"] * g["U"]
                            assert g["at_a_time"] >= 1 and plan.waves == -(-2 * g["slices"] // g["at_a_time"])
                            assert (plan.kernel == "block") == (g["C"] == 1)
                            assert plan.kernel != "cluster" or g["C"] <= (8 if card[0] == 120 else 16)
                            assert plan.kernel != "grid" or g["C"] <= card[1]
                            assert (plan.workspace_bytes > 0) == (plan.kernel == "grid")
    assert seen == set(KERNELS)


@pytest.mark.parametrize(
    ("of_16", "asked", "kernel", "waves"),
    [
        (7, {"H": 512, "B": 32, "backward": True}, "cluster", 1),
        (7, {"H": 512, "B": 128}, "cluster", 1),  # by groups of 32 sequences
        (7, {"H": 512, "B": 128, "backward": True}, "grid", 1),  # two rounds of clusters would take longer
        (8, {"H": 512, "B": 128, "backward": True}, "cluster", 1),
        (0, {"H": 512}, "grid", 1),  # a card that runs no cluster of 16
    ],
)
def test_clusters_that_the_card_runs_at_a_time(emulated, of_16: int, asked, kernel: str, waves: int) -> None:
    sizes = {"H": 512, "P": 0, "B": 16, "D": 1, "backward": False, "by_steps": False, "forced": ""} | asked
    plan = emulated.Plan.on(emulated.Card(*H200), LSTM, BFLOAT16, clusters={16: of_16}, **sizes)
    assert (plan.kernel, plan.waves) == (kernel, waves)


def test_forced_kernels(emulated) -> None:
    for kernel, H in (("steps", 8), ("block", 8), ("cluster", 64), ("grid", 64)):
        assert _plan(emulated, H=H, forced=kernel).kernel == kernel
    with pytest.raises(ValueError, match="expected composite, steps, block, cluster or grid, got fast"):
        _plan(emulated, forced="fast")
    with pytest.raises(ValueError, match="RNNFAST_CUDA_KERNEL=block: this kernel cannot take H=512 P=0 B=16 D=1"):
        _plan(emulated, forced="block")
    with pytest.raises(ValueError, match="float32 without TF32"):
        _plan(emulated, number=FLOAT32, H=8, forced="cluster")
    for asked in ({"by_steps": True}, {"cell": BY_MODE["GRU"].index}):
        with pytest.raises(ValueError, match=r"cannot take H=8.*: a cell, resets or gradients that only steps know"):
            _plan(emulated, H=8, forced="block", **asked)
