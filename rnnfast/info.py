"""What this installation of rnnfast is and what it runs on."""

from __future__ import annotations

import platform

import torch

from rnnfast import _C
from rnnfast._backends import cuda_sweeps, precision
from rnnfast._version import __version__


def info() -> dict[str, object]:
    """Describe the installation.

    Returns:
        version, python and torch versions, platform; isa: the instruction set in use (RNNFAST_ISA forces one); isas:
        all that this CPU can run, slowest first; threads: how many a call uses (`torch.set_num_threads`);
        matmul_precision: the one in force on the CPU (`torch.set_float32_matmul_precision`); machine: what the sharing
        of a layer among threads is planned for, the caches of a core, and the multiply-adds of vectors and the bytes
        from beyond its second-level cache that it does in a cycle, which are measured when a large call needs them and
        None until then; cuda: whether the CUDA kernels are built in.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "isa": _C.isa(),
        "isas": _C.usable_isas(),
        "threads": torch.get_num_threads(),
        "matmul_precision": precision.NAMES[precision.in_force()],
        "machine": _C.machine(),
        "cuda": cuda_sweeps.is_built(),
    }
