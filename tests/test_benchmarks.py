"""The benchmark suite counts, compares and reports correctly. What a contender's time is, no test asserts."""

from __future__ import annotations

import gc
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partialmethod
from types import SimpleNamespace

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from benchmarks import __main__ as command
from benchmarks import bars, contenders, derivatives, env, gpu_goals, memory, report, results, run, steps, timing
from benchmarks.contenders import Contender
from benchmarks.grid import CELLS, DERIVATIVES, PRESETS, STEPS, Job, Preset, Shape, forward_flops, train_flops
from benchmarks.timing import Timing

KEYS = ["cell", "pass", "impl", "T", "B", "I", "H", "L", "D", "dtype", "device", "median_s", "iqr_s", "gflops"]
KEYS += ["ratio_vs_torch"]

# --------------------------------------------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    lstm = Shape("lstm", T=2, B=3, I=5, H=7)
    assert forward_flops(lstm) == 4032  # 2 * 6 rows * 28 gate units * (5 + 7)
    assert train_flops(lstm) == 10416  # thrice that, without dx: 2 * 6 * 28 * 5
    deep = Shape("lstm", T=1, B=1, I=3, H=4, L=2, D=2, P=2)
    # a direction: layer 0 2*16*(3 + 2) + projection 2*4*2, layer 1 2*16*(4 + 2) + projection 2*4*2
    assert forward_flops(deep) == 2 * (160 + 16 + 192 + 16)
    assert train_flops(deep) == 3 * 768 - 2 * 96
    assert forward_flops(Shape("rnn", T=2, B=3, I=5, H=7)) == 4032 // 4
    assert forward_flops(Shape("rnn", T=4, B=3, I=5, H=7, packed=True)) == 2 * (4 + 2 + 1) * 7 * 12


def _products(s: Shape) -> None:
    """The matrix products of a stack, forward and backward, as autograd does them; every gate is a sum."""

    def weight(*size: int) -> torch.Tensor:
        return torch.ones(*size, requires_grad=True)

    below = torch.ones(s.T, s.B, s.I)
    for _ in range(s.L):
        directions = []
        for _ in range(s.D):
            w_ih, w_hh = weight(below.size(2), s.G * s.H), weight(s.R, s.G * s.H)
            w_hr, h = weight(s.H, s.R), weight(s.B, s.R)
            hs = []
            for x in below:
                m = (x @ w_ih + h @ w_hh).view(s.B, s.G, s.H).sum(1)
                h = m @ w_hr if s.P else m
                hs.append(h)
            directions.append(torch.stack(hs))
        below = torch.cat(directions, 2)
    below.sum().backward()


@pytest.mark.parametrize(
    "shape",
    [
        Shape("lstm", 3, 2, 5, 7),
        Shape("rnn", 3, 2, 5, 7, L=3),
        Shape("lstm", 2, 3, 4, 6, L=2, D=2, P=3),
        Shape("rnn", 1, 1, 1, 1, D=2),
    ],
)
def test_flops_are_those_that_autograd_does(shape):
    with FlopCounterMode(display=False) as counter:
        _products(shape)
    assert counter.get_total_flops() == train_flops(shape)


# ---------------------------------------------------------------------------------------------------- grid


def test_a_packed_batch_holds_57_percent():
    shape = Shape("lstm", 100, 32, 128, 128, packed=True)
    assert shape.lengths[0] == 100
    assert shape.lengths == sorted(shape.lengths, reverse=True)
    assert abs(shape.N / 3200 - 0.57) < 0.005
    assert Shape("lstm", 100, 32, 128, 128).N == 3200


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_of_a_preset_has_its_own_name(preset):
    labels = [job.label for job in PRESETS[preset].jobs]
    assert len(set(labels)) == len(labels)
    assert all(job.name in report.TITLES for job in PRESETS[preset].jobs)


def test_select():
    jobs = PRESETS["quick"].jobs
    chosen = command.select(jobs, ["rnn"], re.compile(r"train T20 B32 I64 H64 L2"))
    assert [job.label for job in chosen] == [
        "rnn forward_train T20 B32 I64 H64 L2",
        "rnn train T20 B32 I64 H64 L2",
    ]


# -------------------------------------------------------------------------------------------------- timing


class Clock:
    """Time that passes only when a fake contender runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def contender(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            self.now += next(seconds)
            self.calls.append(name)

        return call

    def timer(self, run: Callable[[], object], calls: int) -> float:
        start = self.now
        for _ in range(calls):
            run()
        return (self.now - start) / calls


def test_contenders_take_turns_and_loops_fill_a_sample():
    clock = Clock()
    runs = {name: clock.contender(name, itertools.repeat(s)) for name, s in (("a", 1.0), ("b", 2e-3), ("c", 7e-3))}
    timings = timing.time_in_turns(runs, clock.timer, budget_s=6.5)
    turns = [name for name, _ in itertools.groupby(clock.calls[5:])]
    assert turns == ["a", "b", "c"] * 7  # the seventh round passes the budget
    assert [timings[name].calls for name in "abc"] == [1, 3, 1]
    assert [timings[name].median_s for name in "abc"] == pytest.approx([1.0, 2e-3, 7e-3])


@pytest.mark.parametrize(("budget", "rounds"), [(-1.0, timing.MIN_ROUNDS), (1e9, timing.MAX_ROUNDS)])
def test_rounds_have_limits(budget, rounds):
    clock = Clock()
    timings = timing.time_in_turns({"a": clock.contender("a", itertools.repeat(1.0))}, clock.timer, budget)
    assert timings["a"].samples == rounds


def test_the_collector_sleeps_during_samples_only():
    seen = []

    def failing() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.time_in_turns({"a": failing}, lambda run, calls: run() or 1.0, budget_s=1.0)
    assert seen == [True, False, False]
    assert gc.isenabled()


def test_median_and_spread():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0], calls=7) == Timing(3.0, 2.0, samples=5, calls=7)


def test_cpu_timer_counts_calls_after_one_that_wakes_the_threads_up(monkeypatch):
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: 0.0, sleep=lambda _: None)
    monkeypatch.setattr(timing, "time", fake)
    call = clock.contender("a", iter([100.0, 1.0, 2.0, 3.0]))
    assert timing.cpu_timer(call, 3) == 2.0


def test_a_first_call_is_the_first_call(monkeypatch):
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: 0.0, sleep=lambda _: None)
    monkeypatch.setattr(timing, "time", fake)
    assert timing.first_call(clock.contender("a", iter([100.0, 1.0]))) == 100.0


def test_waiting_ends_when_the_process_is_quiet_or_never_will_be(monkeypatch):
    used, slept = itertools.accumulate([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]), []
    fake = SimpleNamespace(process_time=lambda: next(used), sleep=slept.append)
    monkeypatch.setattr(timing, "time", fake)
    timing.wait_until_quiet()
    assert len(slept) == 3
    fake.process_time = itertools.count().__next__
    timing.wait_until_quiet()
    assert len(slept) == 3 + timing.QUIET_TRIES


def test_cuda_timer_reads_events_in_milliseconds(monkeypatch):
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, stop: Event) -> float:
            return (stop.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.cuda_timer(clock.contender("a", iter([100.0, 1.0, 2.0])), 2) == pytest.approx(1.5)


# -------------------------------------------------------------------------------------------- from job to rows

LSTM_JOB = Job(Shape("lstm", 3, 2, 4, 5), "inference", "inference")


def _result(value: float) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"y": torch.full((3, 2, 5), value)}


def _run_fakes(monkeypatch, fakes: list[Contender], clock: Clock) -> dict[str, results.Row]:
    monkeypatch.setattr(run, "make_contenders", lambda *_: fakes)
    monkeypatch.setattr(run, "timer_of", lambda device: clock.timer)
    return {row["impl"]: row for row in run.run_job(LSTM_JOB, "cpu", 1, budget_s=1e9)}


def test_ratio_is_that_of_medians_of_samples_taken_in_turns(monkeypatch):
    """The machine gets three times as slow in the middle of the run: the ratio does not see it."""
    clock = Clock()

    def slowing(seconds: float) -> Iterator[float]:
        return itertools.chain(itertools.repeat(seconds, 10), itertools.repeat(3 * seconds))

    fakes = [
        Contender(name, clock.contender(name, slowing(seconds)), _result(1.0))
        for name, seconds in (("torch", 8.0), ("rnnfast", 2.0), ("onnxruntime", 1.0))
    ]
    rows = _run_fakes(monkeypatch, fakes, clock)
    assert {name: row["ratio_vs_torch"] for name, row in rows.items()} == {
        "torch": 1.0,
        "rnnfast": 4.0,
        "onnxruntime": 8.0,
    }
    assert rows["rnnfast"]["ratio_vs_onnxruntime"] == 0.5
    assert rows["rnnfast"]["gflops"] == pytest.approx(2 * 6 * 20 * 9 / 6.0 * 1e-9)
    assert rows["rnnfast"]["iqr_s"] == 4.0


@pytest.mark.parametrize("wrong", [_result(1.001), _result(float("nan")), lambda: {"y": torch.ones(3, 2, 6)}])
def test_a_wrong_contender_is_not_timed(monkeypatch, wrong):
    clock = Clock()
    fakes = [
        Contender("torch", clock.contender("torch", itertools.repeat(1.0)), _result(1.0)),
        Contender("rnnfast", clock.contender("rnnfast", itertools.repeat(1.0)), wrong),
    ]
    rows = _run_fakes(monkeypatch, fakes, clock)
    assert "rnnfast" not in clock.calls
    assert rows["torch"]["check"] == "ok"
    assert rows["rnnfast"]["check"].startswith("y: ")
    assert rows["rnnfast"]["median_s"] is None
    assert rows["rnnfast"]["ratio_vs_torch"] is None


# ------------------------------------------------------------------------------------------------ contenders


@pytest.mark.parametrize("kind", ["inference", "forward_train", "train", "step"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape("lstm", 4, 3, 5, 6, L=2, D=2, P=2),
        Shape("lstm", 4, 3, 5, 6, dtype="float64"),
        Shape("lstm", 6, 3, 5, 6, packed=True),
        Shape("rnn", 4, 3, 5, 6, L=2, D=2),
        Shape("rnn", 6, 3, 5, 6, packed=True),
    ],
)
def test_modules_agree(shape, kind):
    if kind == "step" and shape.packed:
        pytest.skip("streaming is padded")
    found = contenders.make_contenders(Job(shape, kind, kind), "cpu", threads=1)
    assert [c.name for c in found][:2] == ["torch", "rnnfast"]
    tolerance = run.TOLERANCES[shape.dtype, "cpu"]
    assert run.find_failures(found, tolerance) == dict.fromkeys((c.name for c in found), "")
    names = found[1].results().keys()
    assert ("d_weight_hh_l0" in names) == (kind == "train")
    assert ("c_n" in names) == (shape.cell == "lstm")


@pytest.mark.parametrize("kind", ["inference", "step"])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_onnx_runtime_agrees(cell, L, D, kind):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    job = Job(Shape(cell, 1 if kind == "step" else 5, 3, 4, 7, L, D), kind, kind)
    with torch.no_grad():
        torchs, _, onnx = contenders.make_contenders(job, "cpu", threads=1)
        torchs.run(), onnx.run()  # a state must not leak into the results
        assert onnx.name == "onnxruntime"
        expected, got = torchs.results(), onnx.results()
    assert got.keys() == expected.keys()
    for name, a in got.items():
        torch.testing.assert_close(a, expected[name], rtol=0, atol=2e-6)


def test_a_step_goes_on_from_the_last_state():
    with torch.no_grad():
        for c in contenders.make_contenders(Job(Shape("lstm", 1, 2, 3, 4), "step", "step"), "cpu", threads=1):
            steps = c.results()["y"]
            assert not torch.allclose(steps[0], steps[1]), c.name


def test_training_starts_without_gradients():
    shape = Shape("lstm", 3, 2, 4, 5)
    trained = contenders.module_contender(
        "torch", Job(shape, "train", "train"), contenders.make_data(shape, "cpu"), "cpu"
    )
    once = {name: a.clone() for name, a in trained.results().items()}
    twice = trained.results()
    torch.testing.assert_close(twice, once)


# ----------------------------------------------------------------------------------------------- derivatives

UNCOMPILED = [kind for kind in DERIVATIVES if not kind.startswith("compile")]


def test_full_has_the_derivatives():
    jobs = PRESETS["derivatives"].jobs
    assert set(jobs) <= set(PRESETS["full"].jobs)
    assert {(job.shape.cell, job.kind) for job in jobs} == set(itertools.product(CELLS, DERIVATIVES))
    assert all(job.flops is None for job in jobs)


@pytest.mark.parametrize("kind", UNCOMPILED)
@pytest.mark.parametrize("shape", [Shape("lstm", 4, 3, 5, 6, L=2), Shape("rnn", 4, 3, 5, 6)])
def test_derivatives_agree(shape, kind):
    job = Job(shape, kind, kind)
    found = derivatives.make_contenders(job, "cpu")
    names = [c.name for c in found]
    assert "rnnfast" in names
    assert ("torch" in names) == derivatives.torch_can(job)
    assert ("plain" in names) == (kind != "double_backward")
    assert run.find_failures(found, run.TOLERANCES["float32", "cpu"]) == dict.fromkeys(names, "")
    ours = found[names.index("rnnfast")].results()
    assert all(a.dtype == torch.float32 and a.isfinite().all() and a.any() for a in ours.values())


@pytest.mark.parametrize(("cell", "kind"), [("rnn", "per_sample"), ("lstm", "jvp_input"), ("lstm", "hessian_vector")])
def test_torch_is_left_out_only_where_it_fails(cell, kind, monkeypatch):
    job = Job(Shape(cell, 4, 3, 5, 6), kind, kind)
    assert not derivatives.torch_can(job)
    monkeypatch.setattr(derivatives, "torch_can", lambda job: True)
    torchs = next(c for c in derivatives.make_contenders(job, "cpu") if c.name == "torch")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward AD|broadcast shape"):
        torchs.run()


@pytest.mark.parametrize("kind", UNCOMPILED)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_derivatives_are_found(cell, kind, monkeypatch):
    """Of a layer that computes another function."""

    class Wrong(getattr(rnnfast, cell.upper())):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return 1.01 * y, state

    job = Job(Shape(cell, 4, 3, 5, 6), kind, kind)
    monkeypatch.setitem(contenders.LIBRARIES, "rnnfast", SimpleNamespace(LSTM=Wrong, RNN=Wrong, GRU=Wrong))
    failures = run.find_failures(derivatives.make_contenders(job, "cpu"), run.TOLERANCES["float32", "cpu"])
    assert ": off by" in failures["rnnfast"]


def test_central_difference():
    at, direction = {"a": torch.tensor([2.0, 3.0])}, {"a": torch.tensor([1.0, 10.0])}
    slopes = derivatives._difference(lambda point: {"cube": point["a"] ** 3}, at, direction)
    torch.testing.assert_close(slopes["cube"], torch.tensor([12.0, 270.0], dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["compiled_inference", "compiled_train", "compiled_model"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_model_agrees_with_the_eager_one(kind, backend, monkeypatch):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile, backend=backend))
    job = Job(Shape("rnn", 4, 3, 5, 6), kind, kind)
    rows = run.run_job(job, "cpu", 1, budget_s=0.0)
    assert [(row["impl"], row["check"]) for row in rows] == [("plain", "ok"), ("rnnfast", "ok")]
    assert rows[1]["ratio_vs_torch"] is None
    assert rows[1]["ratio_vs_plain"] == rows[0]["median_s"] / rows[1]["median_s"]


def test_compilation_is_timed_once_without_a_cache():
    for _ in range(2):
        counters.clear()
        (row,) = run.run_job(Job(Shape("rnn", 7, 3, 5, 6), "compile", "compile"), "cpu", 1, budget_s=0.0)
        assert (row["impl"], row["check"], row["samples"]) == ("rnnfast", "ok", 1)
        assert counters["inductor"]["fxgraph_cache_miss"] == 4  # forward and backward of the small and of this shape
        assert counters["inductor"]["fxgraph_cache_hit"] == 0


# ---------------------------------------------------------------------------------------------- single steps

EAGER_STEPS = [kind for kind in STEPS if not kind.startswith("compiled")]
needs_compiler = pytest.mark.skipif(not steps.has_compiler(), reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("kind", EAGER_STEPS)
@pytest.mark.parametrize("shape", [Shape("lstm", 1, 3, 5, 6), Shape("rnn", 20, 3, 5, 6), Shape("rnn", 1, 3, 5, 6)])
def test_steps_agree(shape, kind):
    job = Job(shape, kind, kind)
    assert job.trains == ("inference" not in kind) and job.flops == Job(shape, STEPS[kind], "").flops
    torchs, ours = steps.make_contenders(job, contenders.make_data(shape, "cpu"), "cpu")
    assert (torchs.name, ours.name) == ("torch", "rnnfast")
    assert (torchs.same_code, ours.same_code) == (False, kind.startswith("cell"))
    with torch.set_grad_enabled(job.trains):
        assert run.find_failures([torchs, ours], run.TOLERANCES["float32", "cpu"]) == {"torch": "", "rnnfast": ""}
        results = ours.results()
    assert results["y"].shape == (shape.T, 3, 6)
    assert any(name.startswith("d_") for name in results) == (STEPS[kind] == "train")


def test_wrong_steps_are_found(monkeypatch):
    class Wrong(torch.nn.LSTMCell):
        def forward(self, x, hx=None):
            h, c = super().forward(x, hx)
            return 1.01 * h, c

    monkeypatch.setitem(contenders.LIBRARIES, "rnnfast", SimpleNamespace(LSTMCell=Wrong))
    shape = Shape("lstm", 3, 2, 5, 6)
    found = steps.make_contenders(Job(shape, "cell_inference", ""), contenders.make_data(shape, "cpu"), "cpu")
    assert not found[1].same_code
    with torch.no_grad():
        assert run.find_failures(found, 1e-4)["rnnfast"].startswith("y: off by")


def test_zeros_are_compared():
    """Of a step from zeros dL/dW_hh is zero; another zero agrees with it, and nothing else."""
    zeros, some = ({"d": torch.full((2, 2), value)} for value in (0.0, 1e-3))
    assert run._difference(zeros, zeros, 1e-4) == ""
    assert run._difference(some, zeros, 1e-4).startswith("d: off by")


@needs_compiler
@pytest.mark.parametrize("kind", ["compiled_cell_train", "compiled_layer_inference"])
def test_both_sides_are_compiled(kind):
    counters.clear()
    rows = run.run_job(Job(Shape("rnn", 1, 3, 5, 6), kind, kind), "cpu", 1, budget_s=0.0)
    assert [(row["impl"], row["check"]) for row in rows] == [("torch", "ok"), ("rnnfast", "ok")]
    assert [row["same_code"] for row in rows] == [False, "cell" in kind]
    assert counters["stats"]["unique_graphs"] == 1  # cells share it; a layer of torch is not taken into one


# ---------------------------------------------------------------------------------------------------- memory


def test_peak_memory_grows_with_the_sequence():
    short, long = (Job(Shape("lstm", T, 64, 64, 128), "memory", "memory") for T in (200, 400))
    rows = run.run_job(short, "cpu", 1, budget_s=0.0)
    assert [row["impl"] for row in rows] == ["torch", "rnnfast"]
    peak = rows[0]["peak_bytes"]
    assert rows[1]["ratio_vs_torch"] == peak / rows[1]["peak_bytes"]
    y_bytes = 4 * 200 * 64 * 128
    assert y_bytes < peak < 20 * y_bytes
    assert memory.peak_bytes(long, "torch", "cpu", 1) > peak + y_bytes


def test_a_peak_that_cannot_be_seen_is_an_error():
    torch.ones(1 << 24)  # 64 MiB, given back at once: little beside them raises no peak
    with pytest.raises(RuntimeError, match="take a larger shape"):
        memory.resident_peak(lambda: torch.ones(1000))


# --------------------------------------------------------------------------------------------------- reports


def _rows(job: Job, ours: float, **others: float) -> list[results.Row]:
    timings = {name: Timing(s, s / 10, 5, 1) for name, s in ({"rnnfast": ours} | others).items()}
    return [run._time_row(job, "cpu", name, timings, "") for name in timings]


ENV = {
    "cpu": "a CPU", "cores": 2, "gpu": None, "threads": 2, "rnnfast": {"isa": "avx2"}, "versions": {"torch": "2"},
    "date": "2020-01-01", "command": "python -m benchmarks", "fma_peak_gflops": {"float32": 100.0, "float64": 50.0},
    "read_gbs": {str(4 * 4 * 1024 * 1024): 50.0},
}  # fmt: skip


def test_geomean():
    assert results.geomean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


def test_tables_show_losing_rows_and_their_mean():
    rows = _rows(Job(Shape("lstm", 5, 1, 2, 3), "train", "train"), ours=2e-3, torch=1e-3)
    rows += _rows(Job(Shape("lstm", 9, 1, 2, 3), "train", "train"), ours=1e-6, torch=8e-6)
    summary, table = report.tables(rows, ENV)
    assert summary.lines == [["LSTM", "Forward and backward", "2", 0.5, pytest.approx(2.0)]]
    assert table.lines[0][:4] == ["LSTM", "T5 B1 I2 H3", "1.00 ms (10%)", "2.00 ms (10%)"]
    assert [line[-1] for line in table.lines] == [0.5, pytest.approx(8.0), pytest.approx(2.0)]
    assert "| 0.50× |" in report.to_markdown([table], ENV)


def test_ratios_of_the_same_code_are_marked():
    rows = _rows(Job(Shape("lstm", 1, 1, 2, 3), "cell_train", "cell_train"), ours=2e-3, torch=2e-3)
    rows[0]["same_code"] = True
    rows += _rows(Job(Shape("lstm", 20, 1, 2, 3), "cell_train", "cell_train"), ours=1e-3, torch=2e-3)
    _, table = report.tables(rows, ENV)
    assert table.header[-2:] == ["vs torch", "same code"]
    assert [line[-2:] for line in table.lines] == [[1.0, "yes"], [2.0, ""], [pytest.approx(2**0.5), ""]]


def test_share_of_the_peak():
    job = Job(Shape("lstm", 100, 1, 8, 8, dtype="float64"), "inference", "inference")
    row = _rows(job, ours=job.flops / 25e9, torch=1.0)[0]
    assert report.fma_share(row, ENV) == pytest.approx(0.5)
    assert report.fma_share(row | {"device": "cuda"}, ENV) is None


def test_the_higher_of_two_measurements():
    assert env.higher({"a": {"x": 1.0, "y": 4.0}}, {"a": {"x": 2.0, "y": 3.0}}) == {"a": {"x": 2.0, "y": 4.0}}


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.50 s"), (0.25, "250 ms"), (9.996e-4, "1.00 ms"), (17.25e-6, "17.2 µs"), (3.2e-8, "0.0320 µs")],
)
def test_seconds(value, text):
    assert report.seconds(value) == text


def test_goals():
    padded, packed = Shape("lstm", 100, 32, 128, 128), Shape("lstm", 100, 32, 128, 128, packed=True)
    streamed = Job(Shape("lstm", 100, 1, 1024, 1024), "inference", "inference")
    rows = _rows(Job(padded, "train", "train"), ours=1.0, torch=1.3)
    rows += _rows(Job(packed, "train", "train_packed"), ours=0.8, torch=1.6)
    # to read 16 MiB a hundred times takes 33.6 ms, the input's products take 8.4 ms
    rows += _rows(streamed, ours=50e-3, torch=100e-3, onnxruntime=60e-3)
    (table,) = bars.tables(rows, ENV)
    lines = {work: (measured, met) for work, _, measured, met in table.lines}
    assert lines["LSTM forward + backward vs torch"] == (
        "lowest 1.30× (LSTM train T100 B32 I128 H128), geomean 1.30×",
        "no",
    )
    assert lines["inference vs ONNX Runtime"][1] == "yes"
    assert lines["LSTM train_packed"] == ("80% of padded, 57% of the tokens; 2.00× torch's packed", "no")
    measured, met = lines["LSTM T100 B1 I1024 H1024, share of the limit of streaming W_hh"]
    assert measured.startswith("84% ") and met == "yes"
    assert bars.streamed_sizes([streamed]) == {16 * 2**20}


def test_goals_of_derivatives():
    base = Shape("lstm", 100, 32, 128, 128)
    rows = _rows(Job(base, "double_backward", "double_backward"), ours=1.0, torch=4.5)
    rows += _rows(Job(base, "per_sample", "per_sample"), ours=1.5, torch=27.0, plain=1.0)
    rows += _rows(Job(base, "jvp_input", "jvp_input"), ours=1.0, plain=0.8)
    rows += _rows(Job(base, "jvp_weights", "jvp_weights"), ours=1.0, plain=0.4)
    rows += _rows(Job(base, "hessian_vector", "hessian_vector"), ours=1.0, plain=0.25)
    rows += _rows(Job(base, "compiled_train", "compiled_train"), ours=1.0, plain=1.1)
    rows += _rows(Job(base, "compiled_model", "compiled_model"), ours=1.0, plain=0.9)
    rows += _rows(Job(base, "compile", "compile"), ours=2.0)
    (table,) = bars.tables(rows, ENV)
    where = "(LSTM {} T100 B32 I128 H128)"
    assert [(work, measured, met) for work, _, measured, met in table.lines] == [
        ("double backward vs torch", f"lowest 4.50× {where.format('double_backward')}, geomean 4.50×", "yes"),
        ("vmap(grad) vs torch", f"lowest 18.00× {where.format('per_sample')}, geomean 18.00×", "no"),
        ("vmap(grad) / forward + backward", f"highest 1.50 {where.format('per_sample')}", "yes"),
        ("jvp of x / forward", f"highest 1.25 {where.format('jvp_input')}", "yes"),
        ("jvp of the weights / forward", f"highest 2.50 {where.format('jvp_weights')}", "no"),
        ("jvp of grad / forward + backward", f"highest 4.00 {where.format('hessian_vector')}", ""),
        ("a model compiled vs eager", f"lowest 0.90× {where.format('compiled_model')}, geomean 0.90×", "no"),
        ("a lone layer compiled vs eager", f"lowest 1.10× {where.format('compiled_train')}, geomean 1.10×", "yes"),
        ("torch.compile and one run, as T grows", "2.00 s (LSTM T 100)", ""),
    ]


def test_tables_of_a_pass_without_torch():
    rows = _rows(Job(Shape("lstm", 5, 1, 2, 3), "jvp_input", "jvp_input"), ours=2e-3, plain=1e-3)
    summary, table = report.tables(rows, ENV)
    assert summary.header == ["", "pass", "rows", "at most / plain"]
    assert summary.lines[0][2:] == ["1", "2.00"]
    assert table.header == ["", "shape", "plain", "rnnfast", "rnnfast / plain"]
    assert table.lines == [["LSTM", "T5 B1 I2 H3", "1.00 ms (10%)", "2.00 ms (10%)", "2.00"]]


# ----------------------------------------------------------------------------------------------- command line


def test_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"tiny.{name}" for name in ("json", "markdown", "plot")}
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert command.main(["--preset", "tiny", "--threads", "1", *arguments]) == 0

    data = json.loads(files["json"].read_text())
    assert data["env"]["threads"] == torch.get_num_threads() == 1
    assert data["env"]["cpu"] and data["env"]["rnnfast"]["isa"] and data["env"]["fma_peak_gflops"]["float32"] > 0
    rows = data["results"]
    assert all(list(row)[:3] == KEYS[:3] and set(KEYS) <= set(row) for row in rows)
    for job in PRESETS["tiny"].jobs:
        mine = {
            r["impl"]: r
            for r in rows
            if (r["cell"], r["pass"], r["shape"]) == (job.shape.cell, job.name, job.shape.label)
        }
        assert {"torch", "rnnfast"} <= set(mine)
        assert ("onnxruntime" in mine) == (contenders.has_onnx() and contenders.onnx_can(job, "cpu"))
        for row in mine.values():
            assert row["check"] == "ok"
            assert row["ratio_vs_torch"] == pytest.approx(mine["torch"]["median_s"] / row["median_s"])
            assert row["gflops"] == pytest.approx(job.flops / row["median_s"] * 1e-9)

    assert "### Forward and backward, packed" in files["markdown"].read_text()
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert "One streaming step" in capsys.readouterr().out


def test_derivatives_end_to_end(tmp_path, capsys, monkeypatch):
    jobs = tuple(Job(Shape(cell, 4, 3, 5, 6), kind, kind) for cell in CELLS for kind in UNCOMPILED)
    monkeypatch.setitem(PRESETS, "derivatives", Preset(jobs, seconds=0))
    files = {name: tmp_path / f"derivatives.{name}" for name in ("json", "markdown")}
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert command.main(["--preset", "derivatives", "--threads", "1", *arguments]) == 0
    rows = json.loads(files["json"].read_text())["results"]
    assert len(results.group(rows)) == len(jobs)
    for row in rows:
        assert set(KEYS) <= set(row)
        assert row["check"] == "ok" and row["median_s"] > 0 and row["gflops"] is None
    text = files["markdown"].read_text()
    assert all(f"### {report.TITLES[kind]}\n" in text for kind in UNCOMPILED)
    assert "### Goals, derivatives and torch.compile" in text
    assert "jvp of x / forward" in capsys.readouterr().out


def test_cells_end_to_end(tmp_path, capsys, monkeypatch):
    jobs = tuple(Job(Shape(cell, 2, 3, 5, 6), kind, kind) for cell in CELLS for kind in STEPS)
    monkeypatch.setitem(PRESETS, "cells", Preset(jobs, seconds=0))
    monkeypatch.setattr(command, "has_compiler", lambda: False)
    path = tmp_path / "cells.json"
    assert command.main(["--preset", "cells", "--threads", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert {row["pass"] for row in rows} == set(EAGER_STEPS)
    assert all(set(KEYS) <= set(row) and row["check"] == "ok" and row["gflops"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert "There is no C++ compiler" in out and "same code" in out


def test_a_wrong_result_ends_with_status_1(tmp_path, capsys, monkeypatch):
    class Wrong(torch.nn.RNN):
        def forward(self, x, hx=None):
            y, h_n = super().forward(x, hx)
            return 1.01 * y, h_n

    monkeypatch.setitem(contenders.LIBRARIES, "rnnfast", SimpleNamespace(RNN=Wrong))
    path = tmp_path / "wrong.json"
    arguments = ["--cells", "rnn", "--filter", "inference T5", "--threads", "1", "--json", str(path)]
    assert command.main(["--preset", "tiny", *arguments]) == 1
    checks = {row["impl"]: row["check"] for row in json.loads(path.read_text())["results"]}
    assert checks["torch"] == "ok" and checks["rnnfast"].startswith("y: off by")
    assert "WRONG rnn inference T5 B3 I4 H8 rnnfast" in capsys.readouterr().out


def test_without_onnx_runtime_its_rows_are_left_out(capsys, monkeypatch):
    for module in (contenders, command):
        monkeypatch.setattr(module, "has_onnx", lambda: False)
    assert command.main(["--preset", "tiny", "--filter", "rnn inference T5", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "ONNX Runtime is not installed" in out
    assert "vs ONNX Runtime" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "no usable CUDA device"),
        (["--preset", "gpu"], "with --device cuda only"),
        (["--threads", "0"], "expected at least 1, got 0"),
        (["--filter", "nothing"], "leave nothing to measure"),
        (["--cells", "peephole"], "leave nothing to measure"),
        (["--filter", "("], "invalid"),
        (["--json", "no/such/folder.json"], "no folder no/such"),
        (["--preset", "derivatives", "--plot", "derivatives.png"], "there is no plot"),
        (["--preset", "cells", "--plot", "cells.png"], "there is no plot"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ goals on a GPU


def _gpu_rows(ratio: float, step_us: float = 1.0) -> list[results.Row]:
    """The whole preset, rnnfast `ratio` times as fast as cuDNN."""
    rows = []
    for job in PRESETS["gpu"].jobs:
        if job.kind == "memory":
            peaks = {"torch": 100.0 * ratio, "rnnfast": 100.0}
            for name, peak in peaks.items():
                more = {"check": "ok", "peak_bytes": peak, "ratio_vs_torch": peaks["torch"] / peak}
                rows.append(run._row(job, "cuda", name) | more)
            continue
        ours = step_us * 1e-6 * job.shape.T
        timings = {name: Timing(s, 0.0, 5, 1) for name, s in (("torch", ours * ratio), ("rnnfast", ours))}
        rows += [run._time_row(job, "cuda", name, timings, "") for name in timings]
    return rows


def _goals(rows: list[results.Row]) -> dict[str, list[report.Cell]]:
    (table,) = gpu_goals.tables(rows)
    return {str(line[0]): line[1:] for line in table.lines}


def test_gpu_goals_that_are_met():
    goals = _goals(_gpu_rows(2.6))
    assert len(goals) == 8 and {line[-1] for line in goals.values()} == {"met"}
    assert str(goals["LSTM bfloat16"][1]).endswith("geomean 2.60×, 42 cells")  # 4 H, 5 B, 2 passes; H64


def test_gpu_goals_say_what_they_fall_short_of():
    rows = _gpu_rows(2.0, step_us=1.8)
    slow = [r for r in rows if (r["cell"], r["dtype"], r["H"], r["B"]) == ("lstm", "bfloat16", 768, 64)]
    for row in slow:
        row["ratio_vs_torch"] = 0.65 if row["impl"] == "rnnfast" else 1.0
    goals = _goals(rows)
    assert goals["LSTM bfloat16"][-1] == "50% short, geomean 24% short of its aim"
    assert "lowest 0.65× (LSTM inference T512 B64 I768 H768 bfloat16)" in str(goals["LSTM bfloat16"][1])
    assert goals["LSTM bfloat16 H512 B16, a step forward"][1:] == ["1.80 µs", "20% too long"]
    assert goals["LSTM float16 H768 B16, a step forward"][-1] == "met"
    assert goals["Elman"][-1] == "met"


def test_gpu_goals_without_a_result_or_with_a_wrong_one():
    assert {line[-1] for line in _goals([]).values()} == {"not measured"}
    rows = _gpu_rows(3.0)
    for row in rows:
        if row["cell"] == "rnn" and row["impl"] == "rnnfast" and row["pass"] == "train":
            row |= {"check": "y: off", "median_s": None}
    goals = _goals(rows)
    assert goals["Elman"][-1] == "not met" and str(goals["Elman"][1]).startswith("wrong: Elman train")
    assert goals["LSTM bfloat16"][-1] == "met"
    table = gpu_goals.step_table(rows)
    assert ["Elman", "train T512 B8 I256 H256 bfloat16", "3.00", "wrong"] in [line[:4] for line in table.lines]


def test_gpu_goals_of_files(tmp_path, capsys):
    rows, files = _gpu_rows(2.6), [tmp_path / "a.json", tmp_path / "b.json"]
    for path, some in zip(files, (rows[::2], rows[1::2]), strict=True):
        command.write_json(path, {}, some)
    gpu_goals.main([*map(str, files), str(tmp_path / "missing.json")])
    printed = capsys.readouterr().out
    assert "LSTM float16, cuDNN's persistent range" in printed and "not measured" not in printed


def test_a_run_that_is_cut_off_keeps_its_rows(monkeypatch, tmp_path):
    path, count = tmp_path / "cut.json", 0

    def run_some(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run.run_job(*arguments)

    monkeypatch.setattr(command, "run_job", run_some)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--preset", "tiny", "--cells", "rnn", "--json", str(path)])
    kept = json.loads(path.read_text())
    assert len({(row["pass"], row["shape"]) for row in kept["results"]}) == 2 and kept["env"]["cpu"]
