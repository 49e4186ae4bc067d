"""python -m benchmarks.precision in small: who is measured, that errors are what they are called, that goals can be
missed, and what is written. What a contender's time is, no test asserts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("statsmodels")
pytest.importorskip("sklearn")

import torch

import rnnfast
from benchmarks import formats, precision, precision_curves, precision_errors, precision_speed
from benchmarks.formats import FORMATS
from benchmarks.grid import Job, Shape
from benchmarks.results import Row

FLOAT32 = {"torch float32", "highest"}
BFLOAT16 = {"torch autocast", "torch bfloat16", "autocast", "bfloat16"}
TENSORS = ["y", "h_n", "c_n", "d_x", "d_h0", "d_c0", "d_W_ih", "d_W_hh", "d_b_ih", "d_b_hh"]
SEEDS = precision.PRESETS["tiny"].error_seeds


@pytest.fixture(scope="module")
def done(built_once: Any) -> Path:
    """A folder with what the command writes, everything asked for."""

    def build(folder: Path) -> None:
        before = torch.get_float32_matmul_precision()
        files = [f"--{kind}={folder / name}" for kind, name in FILES.items()]
        status = precision.main(["--preset=tiny", "--threads=1", "--speed", "--errors", "--curves", *files])
        assert status == 0
        assert torch.get_float32_matmul_precision() == before

    return built_once("precision", build)


FILES = {"json": "p.json", "markdown": "p.md", "plot": "p.png", "csv": "p.csv"}


@pytest.fixture(scope="module")
def rows(done: Path) -> list[Row]:
    return json.loads((done / "p.json").read_text())["results"]


def refused() -> set[str]:
    return {name for name, f in FORMATS.items() if formats.refusal(f, "lstm")}


# ------------------------------------------------------------------------------------------------- a run


def test_machine(done: Path) -> None:
    machine = json.loads((done / "p.json").read_text())["env"]
    assert machine["threads"] == 1 and machine["rnnfast"]["version"] == rnnfast.__version__
    assert machine["fma_peak_gflops"]["float32"] > 1
    assert "benchmarks.precision" in machine["command"] and "--preset=tiny" in machine["command"]


def test_every_format_is_timed(rows: list[Row]) -> None:
    speed = precision.of_part(rows, "speed")
    assert [(r["pass"], r["impl"]) for r in speed] == [(kind, f) for kind in ("inference", "train") for f in FORMATS]
    for row in speed:
        assert (row["cell"], row["T"], row["B"], row["I"], row["H"]) == ("lstm", 100, 8, 64, 64)
        if row["impl"] not in refused():
            assert row["check"] == "ok" and row["samples"] >= 3 and row["iqr_s"] >= 0
            assert 0 < row["median_s"] < 10
            flops = 2 * 800 * 256 * 128 * (3 if row["pass"] == "train" else 1)
            flops -= 2 * 800 * 256 * 64 * (row["pass"] == "train")
            assert row["gflops"] == pytest.approx(flops / row["median_s"] * 1e-9)


def test_errors_are_those_of_the_format(rows: list[Row]) -> None:
    errors = precision.of_part(rows, "errors")
    expected = {(f, t, seed) for f in FORMATS if f not in refused() for t in TENSORS for seed in range(SEEDS)}
    assert {(r["impl"], r["tensor"], r["seed"]) for r in errors} == expected and len(errors) == len(expected)
    for row in errors:
        for measure in precision_errors.MEASURES:
            if row["impl"] in FLOAT32:
                assert 1e-8 < row[measure] < 1e-5, row
            elif row["impl"] in BFLOAT16:
                assert 1e-4 < row[measure] < 1e-1, row
            else:  # "high" and "medium", which are float32 where the CPU gains nothing by less
                assert 1e-8 < row[measure] < (1e-4 if row["impl"] == "high" else 1e-1), row


def test_curves(rows: list[Row], done: Path) -> None:
    curves = precision.of_part(rows, "curves")
    runs = {(r["example"], r["impl"], r["seed"]): r["losses"] for r in curves}
    names = precision_curves.COMPARED
    assert set(runs) == {(e, f, seed) for e in ("sunspots", "digits") for f in names for seed in (0, 1)}
    for (example, _, seed), losses in runs.items():
        exact = runs[example, "highest", seed]
        assert len(losses) == 2 and losses[1] < losses[0]  # it learns ...
        assert losses == pytest.approx(exact, rel=2e-2)  # ... alike, from the same weights and batches
    for example in ("sunspots", "digits"):
        assert runs[example, "highest", 0] != pytest.approx(runs[example, "highest", 1], rel=1e-4)  # seeds differ
        assert runs[example, "autocast", 0] != runs[example, "highest", 0]  # so do formats
    with (done / "p.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(runs)
    for line in lines:
        losses = runs[line["example"], line["format"], int(line["seed"])]
        assert float(line["loss"]) == losses[int(line["epoch"]) - 1]


def test_plot(done: Path) -> None:
    import matplotlib.image

    image = matplotlib.image.imread(done / "p.png")
    assert image.shape[1] > 1000 and image[..., :3].std() > 0.02  # something is drawn


def test_markdown(done: Path, rows: list[Row]) -> None:
    text = (done / "p.md").read_text()
    assert text.startswith("# 16 bits on the CPU\n")
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert titles[:5] == [
        "Goals",
        "LSTM, inference",
        "LSTM, inference: times as fast",
        "LSTM, forward and backward",
        "LSTM, forward and backward: times as fast",
    ]
    tables = dict(zip(titles, text.split("### ")[1:], strict=True))
    errors = precision_errors.over_seeds(precision.of_part(rows, "errors"), "rms_error")
    table = tables["LSTM, errors: root of the mean square"]
    for tensor in TENSORS:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| 64 | {tensor} |")]
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        found = errors["lstm", 64, tensor]
        assert cells[2:10] == [f"{found[f]:.1e}" if f in found else "refused" for f in FORMATS]
        assert cells[10] == f"{found['highest'] / found['torch float32']:.2f}"
    (line,) = [line for line in tables["LSTM, inference"].splitlines() if line.startswith("| T100 B8 I64 H64 ")]
    assert line.count("s (") + line.count("refused") == len(FORMATS) and "wrong" not in line
    assert "| error of high | ≤ 1e-04 |" in tables["Goals"]


# ----------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_the_precision_holds_during_the_call_alone(name: str) -> None:
    before = torch.get_float32_matmul_precision()
    seen = formats.matmul_precision(name)(torch.get_float32_matmul_precision)()
    assert seen == name and torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_contender_computes_in_its_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layer is called with: the dtype of its weights and input, whether under autocast, at which precision."""
    f, seen = FORMATS[name], []
    layer = torch.nn.LSTM if f.library == "torch" else rnnfast.LSTM
    plain = layer.forward

    def forward(self: Any, x: torch.Tensor, *rest: Any) -> Any:
        precision = torch.get_float32_matmul_precision()
        seen.append((self.weight_hh_l0.dtype, x.dtype, torch.is_autocast_enabled("cpu"), precision))
        return plain(self, x, *rest)

    if formats.refusal(f, "lstm"):
        pytest.skip("torch has no such layer on this CPU")
    monkeypatch.setattr(layer, "forward", forward)
    job = Job(Shape("lstm", 3, 2, 4, 4), "train", "train")
    contender = precision_speed.contender(f, job, precision_speed.make_data(job.shape, "cpu"))
    seen.clear()
    contender.run()
    assert seen == [(f.dtype, f.dtype, f.autocast, f.precision)]


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rnnfast.LSTM.forward

    def doubled(self: Any, *inputs: Any, **options: Any) -> Any:
        y, state = plain(self, *inputs, **options)
        return (2 * y if self.weight_hh_l0.dtype == torch.bfloat16 else y), state

    monkeypatch.setattr(rnnfast.LSTM, "forward", doubled)
    job = Job(Shape("lstm", 5, 2, 4, 4), "inference", "inference")
    rows = precision_speed.measure(job, 0.01)
    by = {row["impl"]: row for row in rows}
    assert by["bfloat16"]["check"].startswith("y: off by") and by["bfloat16"]["median_s"] is None
    assert by["highest"]["check"] == by["medium"]["check"] == "ok"
    table, _ = precision_speed.tables(rows, {"fma_peak_gflops": {"float32": 1.0}})
    assert table.lines[0][-1] == "wrong"
    assert precision.report_wrong(rows) == 1


def test_what_torch_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(f: formats.Format, cell: str) -> str:
        return "no bfloat16 here" if f.name.startswith("torch ") and f.bits == 16 else ""

    monkeypatch.setattr(precision_speed, "refusal", refusal)
    monkeypatch.setattr(precision_errors, "refusal", refusal)
    monkeypatch.setattr(precision_errors, "T", 5)
    speed = precision_speed.measure(Job(Shape("lstm", 5, 2, 4, 4), "train", "train"), 0.01)
    errors = precision_errors.measure("lstm", 4, 0)
    assert precision.report_wrong(speed) == 0
    times, ratios = precision_speed.tables(speed, {"fma_peak_gflops": {"float32": 1.0}})
    assert times.lines[0][2:4] == ["refused", "refused"] and ratios.lines[0][1:3] == ["", ""]
    assert isinstance(ratios.lines[0][3], float)
    table = precision_errors.tables(errors)[0]
    assert table.lines[0][3:5] == ["refused", "refused"] and table.lines[0][-1] == ""
    goals = [line[0] for line in precision_speed.goals(speed) + precision_errors.goals(errors)]
    assert "high / highest, forward and backward" in goals and "error of high / torch float32" in goals
    assert not any("torch autocast" in str(goal) for goal in goals)


def test_a_refusal_is_torchs_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        raise RuntimeError("no bfloat16 here\nand more")

    monkeypatch.setattr(torch.nn.LSTM, "forward", forward)
    asked = formats.refusal.__wrapped__  # nothing remembered
    assert asked(FORMATS["torch autocast"], "lstm") == "no bfloat16 here"
    assert asked(FORMATS["torch autocast"], "gru") == asked(FORMATS["autocast"], "lstm") == ""


def test_errors_by_hand() -> None:
    truth, got = torch.tensor([3.0, -4.0]).double(), torch.tensor([3.0, -3.0]).double()
    row = precision_errors._row(Shape("gru", 1, 1, 2, 2), 7, "high", "y", got, truth)
    assert row["max_error"] == 0.25 and row["rms_error"] == pytest.approx(0.2)
    other = row | {"seed": 8, "max_error": 0.5, "rms_error": 0.1}
    key = ("gru", 2, "y")
    assert precision_errors.over_seeds([row, other], "max_error") == {key: {"high": 0.5}}
    joined = precision_errors.over_seeds([row, other], "rms_error")[key]["high"]
    assert joined == pytest.approx(((0.04 + 0.01) / 2) ** 0.5)


def test_truth_has_the_rounded_weights_of_a_bfloat16_module() -> None:
    """A module that computed exactly with them would have no error."""
    s = Shape("lstm", 4, 2, 3, 3)
    case = precision_errors.draw(s, 0)
    exact = precision_errors.results(precision_errors.TRUTH, s, case)
    of_rounded = precision_errors.results(precision_errors.TRUTH, s, case.map(precision_errors.rounded))
    assert set(exact) == set(TENSORS)
    assert 1e-4 < (exact["y"] - of_rounded["y"]).abs().max() < 1e-1
    for d, same in zip(case.cotangents, case.map(precision_errors.rounded).cotangents, strict=True):
        assert torch.equal(d, same)


def error_row(impl: str, error: float, tensor: str = "y") -> Row:
    return {"cell": "lstm", "H": 64, "tensor": tensor, "impl": impl, "rms_error": error, "max_error": error}


@pytest.mark.parametrize(
    "high, autocast, met",
    [(2e-6, 4e-3, "yes yes yes"), (4e-6, 4e-3, "no yes yes"), (2e-6, 5e-3, "yes no yes"), (2e-4, 4e-3, "no yes no")],
)
def test_goals_of_errors(high: float, autocast: float, met: str) -> None:
    found = {"torch float32": 1.5e-7, "torch autocast": 4e-3, "high": high, "autocast": autocast}
    lines = {line[0]: line for line in precision_errors.goals([error_row(f, e) for f, e in found.items()])}
    works = ["error of high / torch float32", "error of autocast / torch autocast", "error of high"]
    assert " ".join(str(lines[work][3]) for work in works) == met
    assert list(lines) == works  # what was not measured is not there


def speed_rows(B: int, H: int, **times: float) -> list[Row]:
    base: Row = {"cell": "lstm", "pass": "train", "shape": f"B{B} H{H}", "B": B, "H": H}
    return [base | {"impl": name, "median_s": times.get(name.replace(" ", "_"))} for name in FORMATS]


def test_goals_of_speed() -> None:
    small = speed_rows(1, 64, torch_autocast=1.0, highest=1.0, autocast=1.0, bfloat16=1.0)
    large = speed_rows(32, 256, torch_autocast=4.0, highest=6.0, autocast=2.0, bfloat16=3.5)
    lines = {str(line[0]): line for line in precision_speed.goals(small + large)}
    theirs = lines["autocast / torch autocast, forward and backward"]
    assert theirs[2] == "lowest 1.00× (LSTM B1 H64), geomean 1.41×" and theirs[3] == "no"
    ours = lines["bfloat16 / highest, forward and backward, B ≥ 32, H 128 to 512"]
    assert ours[2] == "lowest 1.71× (LSTM B32 H256), geomean 1.71×" and ours[3] == "no"
    assert lines["autocast / highest, the same"][3] == "yes"
    assert "highest / torch float32, forward and backward" not in lines


@pytest.mark.parametrize(
    "flags, word", [([], "no 16-bit products"), (["avx512_bf16"], "out of reach"), (["avx512_bf16", "amx_bf16"], "AMX")]
)
def test_what_the_cpu_can_give(flags: list[str], word: str) -> None:
    assert word in precision_speed.peak_note(flags)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cells=lstm,mlp"], "--cells: expected some of"),
        (["--threads=0"], "--threads: expected at least 1"),
        (["--plot=x.png"], "ask for --curves"),
        (["--json=nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precision.parse(arguments)
    assert message in capsys.readouterr().err


def test_parts() -> None:
    assert precision.parse([]).parts == ["speed", "errors"]
    assert precision.parse(["--curves"]).parts == ["curves"]
    full = precision.PRESETS["full"]
    jobs = precision_speed.jobs_of(["lstm"], full.hidden, full.batches)
    assert len(jobs) == 7 * 4 * 2
    assert {(j.shape.H, j.shape.T) for j in jobs} >= {(320, 100), (512, 50), (1024, 20)}


def test_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is given has rows of its own kind: c is the LSTM's alone."""
    monkeypatch.setattr(precision_errors, "T", 4)
    for cell in ("gru", "rnn"):
        errors = precision_errors.measure(cell, 8, 0)
        assert {row["tensor"] for row in errors} == set(TENSORS) - {"c_n", "d_c0"}
        speed = precision_speed.measure(Job(Shape(cell, 4, 2, 8, 8), "train", "train"), 0.01)
        assert {row["check"] for row in speed if not row["impl"].startswith("torch")} == {"ok"}
