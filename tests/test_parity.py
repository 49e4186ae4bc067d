"""Every output and every gradient of rnnfast against the NumPy reference, over the whole table of cases.

What "close" means, and why, stands in cases.py. The cases marked `isa` run once more for each instruction
set that this CPU has.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    GRID,
    ISA_CASES,
    Case,
    float32_failures,
    float64_failures,
    make_inputs,
    run_module,
    run_op,
    run_reference,
    run_torch,
    sensitivity,
)

import rnnfast

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, on how it runs them

every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=[pytest.mark.isa] if c in ISA_CASES else []) for c in CASES]
)


@every_case
def test_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    truth = run_reference(case, inputs)
    trained = run_module(rnnfast, case, inputs)
    assert trained.keys() == truth.keys()
    assert not float64_failures(trained, truth)
    assert not float64_failures(run_module(rnnfast, case, inputs, inference=True), truth)


@every_case
def test_float32(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    truth, torchs = run_reference(case, inputs), run_torch(case, inputs)
    moved = sensitivity(case, inputs, truth)
    trained = run_module(rnnfast, case, inputs)
    assert trained.keys() == truth.keys()
    assert not float32_failures(trained, torchs, truth, moved)
    assert not float32_failures(run_module(rnnfast, case, inputs, inference=True), torchs, truth, moved)


@pytest.mark.parametrize("case", [c for c in GRID if c.dropout and not c.batch_first], ids=lambda case: case.id)
def test_dropout_masks(case: Case) -> None:
    """The op with given masks; the module draws them, so this is dropout as it trains."""
    inputs = make_inputs(case)
    truth, got = run_reference(case, inputs, dropout=True), run_op(case, inputs, dropout=True)
    assert got.keys() == truth.keys()
    assert not float64_failures(got, truth)


@pytest.mark.parametrize("isa", rnnfast.info()["isas"])
def test_instruction_set(isa: str, run_python) -> None:
    used = run_python("-c", "import rnnfast; print(rnnfast.info()['isa'])", RNNFAST_ISA=isa)
    assert (used.stdout.strip(), used.returncode) == (isa, 0), used.stderr
    files = ("test_parity.py", "test_robust.py")
    tests = run_python("-m", "pytest", "-m", "isa", "-p", "no:cacheprovider", *files, RNNFAST_ISA=isa)
    assert tests.returncode == 0, tests.stdout[-10000:] + tests.stderr


@pytest.mark.parametrize("isa", ["no-such-thing", *({"avx2", "avx512"} - set(rnnfast.info()["isas"]))])
def test_impossible_instruction_set(isa: str, run_python) -> None:
    failed = run_python("-c", "import rnnfast", RNNFAST_ISA=isa)
    assert failed.returncode == 1
    last_line = failed.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ValueError") and isa in last_line
