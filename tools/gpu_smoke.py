"""One kernel on a GPU against torch's operators, in seconds: before the tests, under a sanitizer, under a profiler.

python tools/gpu_smoke.py steps|block|cluster|grid|all [--tiny]     results, and the same bits every time
python tools/gpu_smoke.py profile                                   a training step of the size that goals name
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

import rnnfast
from rnnfast._backends import cuda_sweeps

SIZES = {  # H, B, T: what fits the kernel, the first two small
    "steps": [(20, 3, 5), (64, 17, 9)],
    "block": [(8, 3, 5), (64, 17, 9), (64, 40, 64)],
    "cluster": [(64, 3, 5), (256, 17, 9), (512, 16, 64), (512, 128, 16)],
    "grid": [(64, 3, 5), (256, 17, 9), (512, 16, 64), (1024, 40, 16)],
}
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3}  # of the norm of the difference
REPEATS = 20


def run(layer: torch.nn.Module, x, state, dy, kernel: str) -> list[torch.Tensor]:
    """Outputs and gradients by a kernel."""
    os.environ["RNNFAST_CUDA_KERNEL"] = kernel
    layer.zero_grad(set_to_none=True)
    y, last = layer(x, state)
    (y * dy).sum().backward()
    states = last if isinstance(last, tuple) else (last,)
    return [t.detach().double() for t in (y, *states, *(w.grad for w in layer.parameters()))]


def check(kernel: str, name: str, size: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> bool:
    """Prints a line; is it right?"""
    H, B, T = size
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    layer = getattr(rnnfast, name)(16, H, bidirectional=True, **options)
    x, h, dy = (torch.randn(shape, **options) for shape in ((T, B, 16), (2, B, H), (T, B, 2 * H)))
    state = (h, h.sin()) if name == "LSTM" else h
    what = f"{kernel} {name} H{H} B{B} T{T} {str(dtype)[6:]}"
    try:
        got = run(layer, x, state, dy, kernel)
    except ValueError as refused:
        print("no room", what, refused)
        return True
    torch.cuda.synchronize()
    start = time.perf_counter()
    again = [run(layer, x, state, dy, kernel) for _ in range(repeats)]
    torch.cuda.synchronize()
    took = (time.perf_counter() - start) / repeats
    want = run(layer, x, state, dy, "composite")
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
    same = all(torch.equal(a, b) for other in again for a, b in zip(got, other, strict=True))
    right = error <= LIMITS[dtype] and same  # NaN is not
    bits = "same bits" if same else "BITS DIFFER"
    print("ok " if right else "BAD", what, f"error {error:.1e}", bits, f"{took * 1e3:.2f} ms", flush=True)
    return right


def smoke(kernels: list[str], tiny: bool) -> int:
    """How many are wrong."""
    dtypes = (torch.bfloat16,) if tiny else tuple(LIMITS)
    repeats = 1 if tiny else REPEATS
    jobs = [
        (kernel, name, size, dtype)
        for kernel in kernels
        for size in SIZES[kernel][: 2 if tiny else None]
        for name in ("LSTM", "RNN")
        for dtype in dtypes
    ]
    wrong = sum(not check(*job, repeats) for job in jobs)
    print(f"{' '.join(kernels)}: {wrong} of {len(jobs)} wrong")
    return wrong


def profile() -> None:
    layer = rnnfast.LSTM(512, 512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 16, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        layer(x)[0].float().sum().backward()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*SIZES, "all", "profile"))
    parser.add_argument("--tiny", action="store_true", help="the small sizes in bfloat16, twice")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not cuda_sweeps.is_built():
        print(f"GPU: {torch.cuda.is_available()}, kernels: {cuda_sweeps.is_built()}; both are needed")
        return 2
    if options.what == "profile":
        profile()
        return 0
    return min(smoke(list(SIZES) if options.what == "all" else [options.what], options.tiny), 1)


if __name__ == "__main__":
    sys.exit(main())
