"""How many bits of their factors the products of the CPU's kernels take, as torch says it for products of its own."""

from __future__ import annotations

from functools import partial

import torch

# As csrc/precision.h counts them: float32, the sum of two bfloat16, bfloat16. Sums are float32 always.
HIGHEST, HIGH, MEDIUM = range(3)
IN_FORCE = -1  # what torch says when a pass runs

NAMES = ("highest", "high", "medium")  # of torch.set_float32_matmul_precision
# Those of torch.backends.mkldnn.matmul.fp32_precision, too, which the function above sets, and users by themselves.
_PRECISION = dict(zip(NAMES, (HIGHEST, HIGH, MEDIUM), strict=True))
_PRECISION |= {"none": HIGHEST, "ieee": HIGHEST, "tf32": HIGH, "bf16": MEDIUM}

# torch's own word for both, an attribute of a module, takes a step's time to read; torch.get_float32_matmul_precision
# raises where somebody has set the attribute.
_newer = getattr(torch._C, "_get_fp32_precision_getter", None)
_said = torch.get_float32_matmul_precision if _newer is None else partial(_newer, "mkldnn", "matmul")


def in_force() -> int:
    """HIGHEST, HIGH or MEDIUM, of float32 numbers."""
    return _PRECISION[_said()]
