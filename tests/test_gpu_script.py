"""tools/gpu.sh where there is no GPU: every stage ends, says why it was not run, and the exit status tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STAGES = (
    ["build", "probe", *(f"smoke-{kernel}" for kernel in ("steps", "block", "cluster", "grid"))]
    + [f"test-{what}" for what in ("composite", "steps", "block", "cluster", "grid", "rest")]
    + ["memcheck", "racecheck", "synccheck"]
    + [f"bench-{what}" for what in ("lstm512", "lstm-half", "lstm-bfloat16", "lstm-tf32", "elman", "options")]
    + ["profile"]
)


def _run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would begin its minutes of work")
def test_without_a_gpu_every_stage_says_that_it_was_skipped(tmp_path: Path) -> None:
    done = _run(tmp_path, "120", "--built")
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert sorted(line.split(":")[0].removeprefix("SKIPPED ") for line in lines[1:]) == sorted(STAGES)
    assert lines[0] == "torch finds no GPU"
    assert all(line.endswith(("torch finds no GPU", "--built was given")) for line in lines)
    assert done.returncode == 3 and done.stdout.endswith("\n".join(lines) + "\n")


def test_a_stage_that_fails_or_hangs_stops_nothing(tmp_path: Path) -> None:
    """The script's own `stage`, alone."""
    script = (ROOT / "tools" / "gpu.sh").read_text()
    functions = script[script.index("say() {") : script.index("build() {")]
    stages = """
stage bad 5 bash -c 'echo first; echo reason; exit 7'
stage slow 1 sleep 30
stage good 5 echo fine
seconds=$((SECONDS + 3)); stage late 5 true
"""
    setup = f"set -u; OUT={tmp_path}; seconds=60; summary=$OUT/summary.txt; : >$summary\n"
    subprocess.run(["bash", "-c", setup + functions + stages], check=False, capture_output=True, timeout=60)
    bad, slow, good, late = (tmp_path / "summary.txt").read_text().splitlines()
    assert bad.startswith("FAILED bad, ") and bad.endswith(": reason")
    assert slow.startswith("FAILED (cut off after 1 s) slow, ")
    assert good.startswith("ok good, ") and good.endswith(": fine")
    assert late == "SKIPPED late: no time left"


def test_wrong_arguments_get_the_usage(tmp_path: Path) -> None:
    done = _run(tmp_path, "--fast")
    assert done.returncode == 2 and "bash tools/gpu.sh [SECONDS] [--built]" in done.stdout
