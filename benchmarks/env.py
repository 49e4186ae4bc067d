"""The machine and the versions that a run belongs to."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import rnnfast
from rnnfast._backends.precision import HIGHEST, MEDIUM

Env = dict[str, Any]

PACKAGES = ("numpy", "onnxruntime", "onnx")
FLAGS = (
    *("sse4_2", "avx", "f16c", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "bf16"),
)
READ_S = 0.3  # how long a bandwidth is measured


def describe(device: str, threads: int) -> Env:
    cpu = cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", cpu.get("Features", "")).split()],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "device": device,
        "threads": threads,
        "rnnfast": rnnfast.info(),
        "versions": versions(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
    }


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def versions() -> dict[str, str]:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    own = {"python": platform.python_version(), "torch": torch.__version__, "rnnfast": rnnfast.__version__}
    return own | {name: importlib.metadata.version(name) for name in installed}


def limits(threads: int, read_sizes: Iterable[int]) -> dict[str, dict[str, float]]:
    """What the CPU can do at most: GFLOP/s of nothing but multiply-adds in registers, by dtype (bfloat16 where it has
    units for that), and GB/s at which all threads together read an array over and over, by its size in bytes."""
    ways = {"float32": (4, HIGHEST), "float64": (8, HIGHEST)}
    if rnnfast._C.has_products(MEDIUM):
        ways["bfloat16"] = 4, MEDIUM
    return {
        "fma_peak_gflops": {
            dtype: rnnfast._C.fma_peak_gflops(size, threads, bits) for dtype, (size, bits) in ways.items()
        },
        "read_gbs": {str(size): size / _fastest_sum(torch.ones(size // 4)) * 1e-9 for size in sorted(read_sizes)},
    }


def higher(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The larger of two measurements of `limits`, number by number: whatever disturbs one lowers it."""
    return {name: {key: max(value, b[name][key]) for key, value in values.items()} for name, values in a.items()}


def _fastest_sum(a: torch.Tensor) -> float:
    fastest, end = float("inf"), time.perf_counter() + READ_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        a.sum()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
