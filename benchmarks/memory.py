"""Peak memory of a training step, each contender in a fresh process."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.contenders import make_data, module_contender
from benchmarks.grid import Job


def peak_bytes(job: Job, name: str, device: str, threads: int) -> int:
    """How far one training step (forward and backward) raises the memory in use above weights, input and dL/dy.

    CPU: resident memory of the process, so that buffers count whoever allocates them. CUDA: torch's allocator.

    Raises:
        RuntimeError: the step needs less than what importing the libraries had needed for a while.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, job, name, device, threads).result()


def _peak_here(job: Job, name: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    small = replace(job, shape=replace(job.shape, T=2, B=1, I=4, H=4))
    module_contender(name, small, make_data(small.shape, device), device).run()  # loads what is loaded once
    contender = module_contender(name, job, make_data(job.shape, device), device)
    gc.collect()
    return _cuda_peak(contender.run) if device == "cuda" else resident_peak(contender.run)


def _cuda_peak(run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(run) -> int:
    highest, before = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    run()
    peak = _status_bytes("VmHWM")
    if peak <= highest:
        raise RuntimeError(f"the step's peak is hidden below an earlier one of {highest} bytes: take a larger shape")
    return peak - before


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status, which counts in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {key}")
