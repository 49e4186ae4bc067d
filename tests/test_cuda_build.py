"""What nvcc makes of the CUDA kernels: no warnings, and registers, spills and shared memory as ptxas reports them.

Skipped without nvcc. RNNFAST_TEST_CUDA_ARCHS=80;90;100;120 compiles for more than sm_90; each takes about a minute. The
16-bit kernels are those of TF32 with other numbers, which needs the most registers: without --long they are compiled in
haste, which is enough for errors and warnings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("needs nvcc", allow_module_level=True)

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHS = os.environ.get("RNNFAST_TEST_CUDA_ARCHS", "90").split(";")
HASTY = ("float16", "bfloat16")
REGISTERS = 65536  # of a multiprocessor
# Known: the Elman network's backward kernel in TF32 spills where it loads its weights, before the time loop.
KNOWN_SPILLS = re.compile(r"persistent_backwardILNS0_6NumberE2ELb0E")
KNOWN_SPILL_BYTES = 128


class Usage(NamedTuple):
    kernel: str
    haste: bool
    spilled: int  # bytes stored
    registers: int
    shared: int  # bytes, static


def _report(source: Path, arch: str, folder: Path, haste: bool) -> list[Usage]:
    target = f"arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Werror", "all-warnings", "-Xptxas", "-v"]
    flags += ["-Xcompiler=-Wall,-Wextra,-Werror", "-c", str(source), "-o", str(folder / f"{source.stem}_{arch}.o")]
    flags += ["--Ofast-compile=max"] if haste else []
    done = subprocess.run([str(NVCC), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        name, spilled, registers = (
            re.search(pattern, part) for pattern in (r"'(\w+)'", r"(\d+) bytes spill stores", r"Used (\d+) registers")
        )
        assert name and spilled and registers, part
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = int(spilled[1]), int(registers[1]), int(shared[1]) if shared else 0
        usages.append(Usage(name[1], haste, *numbers))
    return usages


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, built_once) -> list[Usage]:
    def build(folder: Path) -> None:
        pairs = [(source, arch) for arch in ARCHS for source in sorted(SOURCES.glob("*.cu"))]
        with ThreadPoolExecutor(2) as pool:
            hasty = [source.stem in HASTY and not request.config.option.long for source, _ in pairs]
            some = pool.map(_report, *zip(*pairs, strict=True), [folder] * len(pairs), hasty)
            usages = [usage for each in some for usage in each]
        (folder / "report.json").write_text(json.dumps(usages))

    return [Usage(*one) for one in json.loads((built_once("cuda_build", build) / "report.json").read_text())]


def test_all_kernels_are_there(report: list[Usage]) -> None:
    each = 3 * 2 * 2 * len(ARCHS)  # numbers, cells, tiles
    for name in ("persistent_forward", "persistent_backward"):
        assert sum(name in usage.kernel for usage in report) == each, name
    for name in ("step_forward", "step_project", "step_backward", "step_backward_projected"):
        assert any(f"{len(name)}{name}I" in usage.kernel for usage in report), name


def test_nothing_is_spilled(report: list[Usage]) -> None:
    for usage in report:
        if usage.haste:
            continue
        assert usage.spilled <= (KNOWN_SPILL_BYTES if KNOWN_SPILLS.search(usage.kernel) else 0), usage


def test_a_block_fits_a_multiprocessor(report: list[Usage]) -> None:
    """All blocks have up to 256 threads; shared memory is all dynamic, counted by plan.cpp."""
    for usage in report:
        assert usage.registers * 256 <= REGISTERS, usage
        assert usage.shared == 0, usage
