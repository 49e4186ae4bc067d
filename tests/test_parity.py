"""Every output and every gradient of rnnfast against the NumPy reference, over the whole table of cases.

What "close" means, and why, stands in cases.py. Some of them run with each instruction set that this CPU has.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    GRID,
    ISA_CASES,
    ISAS,
    Case,
    Inputs,
    Results,
    float32_failures,
    float64_failures,
    instruction_set,
    make_inputs,
    run_module,
    run_op,
    run_reference,
    run_torch,
    sensitivity,
)

import rnnfast

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, on how it runs them

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def runs(case: Case, inputs: Inputs) -> dict[str, Results]:
    """Training and inference, for some cases with each instruction set."""
    torch.set_num_threads(2)
    results = {}
    for isa in ISAS if case in ISA_CASES else ISAS[-1:]:
        with instruction_set(isa):
            results[f"training with {isa}"] = run_module(rnnfast, case, inputs)
            results[f"inference with {isa}"] = run_module(rnnfast, case, inputs, inference=True)
    return results


def names(truth: Results, which: str) -> set[str]:
    return {name for name in truth if which.startswith("training") or not name.startswith("d_")}


@every_case
def test_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    truth = run_reference(case, inputs)
    for which, got in runs(case, inputs).items():
        assert got.keys() == names(truth, which), which
        assert not float64_failures(got, truth), which


@every_case
def test_float32(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    truth, torchs = run_reference(case, inputs), run_torch(case, inputs)
    moved = sensitivity(case, inputs, truth)
    for which, got in runs(case, inputs).items():
        assert got.keys() == names(truth, which), which
        assert not float32_failures(got, torchs, truth, moved), which


@pytest.mark.parametrize("case", [c for c in GRID if c.dropout and not c.batch_first], ids=lambda case: case.id)
def test_dropout_masks(case: Case) -> None:
    """The op with given masks; the module draws them, so this is dropout as it trains."""
    inputs = make_inputs(case)
    truth, got = run_reference(case, inputs, dropout=True), run_op(case, inputs, dropout=True)
    assert got.keys() == truth.keys()
    assert not float64_failures(got, truth)


@pytest.mark.parametrize("isa", [rnnfast.info()["isas"][0]])
def test_instruction_set(isa: str, run_python) -> None:
    """Any but the fastest shows that it is chosen."""
    used = run_python("-c", "import rnnfast; print(rnnfast.info()['isa'])", RNNFAST_ISA=isa)
    assert (used.stdout.strip(), used.returncode) == (isa, 0), used.stderr


@pytest.mark.parametrize("isa", ["no-such-thing", *sorted({"avx2", "avx512"} - set(rnnfast.info()["isas"]))])
def test_impossible_instruction_set(isa: str, run_python) -> None:
    failed = run_python("-c", "import rnnfast", RNNFAST_ISA=isa)
    assert failed.returncode == 1
    last_line = failed.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ValueError") and isa in last_line
