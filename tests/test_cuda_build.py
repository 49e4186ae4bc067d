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
import torch

from rnnfast._backends.cells import CELLS
from rnnfast._backends.cuda_sweeps import has_persistent

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("needs nvcc", allow_module_level=True)

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHS = os.environ.get("RNNFAST_TEST_CUDA_ARCHS", "90").split(";")
HASTY = ("float16", "bfloat16")
REGISTERS = 65536  # of a multiprocessor
# Known, in bytes: with four tiles of sequences a few numbers do not fit beside 128 registers of weights and 32 of sums,
# with two in a grid one or two on some cards.
KNOWN_SPILLS = {
    r"persistent_\w+ILNS0_6NumberE\dE\w+ELi4ELb[01]E": 128,
    r"persistent_\w+ILNS0_6NumberE\dE\w+ELi2ELb1E": 16,
}


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
    for name, few in (("persistent_forward", 3), ("persistent_backward", 2)):
        tiles = sum({1: 3, 4: few}[cell.gates] for cell in CELLS if has_persistent(cell))
        each = 3 * 2 * tiles * len(ARCHS)  # numbers, in a cluster or in a grid
        assert sum(name in usage.kernel for usage in report) == each, name
    projected = sum(cell.projects for cell in CELLS)
    by_steps = {"step_forward": len(CELLS), "step_backward": len(CELLS), "step_backward_projected": projected}
    for name, cells in (by_steps | {"step_project": 1}).items():
        each = 5 * cells * len(ARCHS)  # numbers
        assert sum(f"{len(name)}{name}I" in usage.kernel for usage in report) == each, name


def test_nothing_is_spilled(report: list[Usage]) -> None:
    for usage in report:
        if usage.haste:
            continue
        allowed = max((size for known, size in KNOWN_SPILLS.items() if re.search(known, usage.kernel)), default=0)
        assert usage.spilled <= allowed, usage


def test_a_block_fits_a_multiprocessor(report: list[Usage]) -> None:
    """All blocks have up to 256 threads; shared memory is all dynamic, counted by plan.cpp."""
    for usage in report:
        assert usage.registers * 256 <= REGISTERS, usage
        assert usage.shared == 0, usage


LAUNCHES = """
#include <cstdio>
#include "cuda/launch.h"
using namespace rnnfast::cuda;
__global__ void nothing(const int) {}
int main() {
    const Launch l{"nothing", 3, 2, 1, 64, 100, 1, false, nullptr};
    try {
        launch(&nothing, l, 0);
        std::printf("launched\\n");
    } catch (const std::runtime_error& error) {
        std::printf("%s\\n", error.what());
    }
    restore_device(5);  // must not throw
    try {
        check(cudaSuccess, "nothing");
        std::printf("no error\\n");
    } catch (const std::runtime_error& error) {
        std::printf("%s\\n", error.what());
    }
    check(cudaSuccess, "said once");
    std::printf("clusters: %d, code: %d\\n", clusters_at_a_time(&nothing, l), has_code(&nothing));
}
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and nothing fails")
def test_what_fails_says_what_it_was(tmp_path: Path) -> None:
    """Launches where there is no GPU; what may not throw is said by the next check, once."""
    (tmp_path / "launches.cu").write_text(LAUNCHES)
    program = tmp_path / "launches"
    flags = ["-std=c++17", f"-arch=sm_{ARCHS[0]}", "-cudart", "static", "-I", str(SOURCES.parent)]
    subprocess.run([str(NVCC), *flags, "-o", str(program), str(tmp_path / "launches.cu")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    failed, later, more = done.stdout.splitlines()
    assert failed.startswith(
        "rnnfast: kernel nothing (3,2,1) blocks of 64 threads and 100 bytes of shared memory, 1 together, "
        "on an unknown card: "
    )
    assert later.startswith("rnnfast: back to the device that was in use: ")
    assert more == "clusters: 0, code: 0" and done.returncode == 0
