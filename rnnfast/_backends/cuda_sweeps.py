"""Who runs one layer's way through time on a GPU: the extension `rnnfast._cuda` (csrc/cuda) or `sweeps.py`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rnnfast._backends import sweeps
from rnnfast._backends.cells import Cell
from rnnfast._backends.sweeps import BackwardArrays, ForwardArrays, Sweep

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_built() -> bool:
    """Does this installation have the CUDA extension?"""
    return importlib.util.find_spec("rnnfast._cuda") is not None


class Composite:
    """`sweeps.py`, in place of the extension."""

    @staticmethod
    def forward(s: Sweep, arrays: ForwardArrays) -> None:
        sweeps.sweep_forward(s, arrays)

    @staticmethod
    def backward(s: Sweep, arrays: BackwardArrays, add: bool) -> None:
        sweeps.sweep_backward(s, arrays, add)


def has_persistent(cell: Cell) -> bool:
    """Is there a kernel for it that keeps W_hh on the chip? Those know one product for all gates and no state but c."""
    return cell.input == cell.recurrent and not cell.carries_h


def sweeps_for(x: Tensor) -> Any:
    if x.is_cpu or forced() == "composite":
        return Composite
    extension = load_extension()
    return extension if extension.runs_on(x.device.index) else Composite


def forced() -> str:
    """The kernel that is forced, '' if none."""
    return os.environ.get("RNNFAST_CUDA_KERNEL", "")


class Extension:
    """`rnnfast._cuda`: the kernel for each size is chosen by csrc/cuda/plan.cpp, RNNFAST_CUDA_KERNEL forces one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.make_plan = lru_cache(maxsize=512)(module.Plan)  # of the same sizes on the same card
        self.runs_on = lru_cache(maxsize=None)(self._runs_on)

    def _runs_on(self, device: int) -> bool:
        """Has this build code for the card? Warns if not."""
        if self.module.runs_on(device):
            return True
        card = self.module.Card.of(device)
        warnings.warn(
            f"rnnfast was built without kernels for {torch.cuda.get_device_name(device)} (sm_{card.sm}): cuDNN and "
            f"torch's operators run instead. RNNFAST_CUDA_ARCHS={card.sm} builds them, for sm_80 and later.",
            stacklevel=2,
        )
        return False

    def plan(self, s: Sweep, like: Tensor, backward: bool, inside: bool = False) -> Any:
        """inside: is dL/dm wanted, or more of dL/dc_t given?"""
        sizes, by_steps = (s.H, s.P, s.B, s.D), inside or s.resets is not None
        device, number = self.place(like)[0], number_of(like.dtype)
        return self.make_plan(device, s.cell_index, number, *sizes, backward, by_steps, forced())

    def forward(self, s: Sweep, arrays: ForwardArrays) -> None:
        c_0 = arrays.c  # each state takes its place as it is read, but with resets c_0 may be read later
        if s.resets is not None and c_0 is not None:
            c_0 = c_0.clone()
        self._run(self.module.forward, s, (*arrays, c_0), arrays.y, False, False)

    def backward(self, s: Sweep, arrays: BackwardArrays, add: bool) -> None:
        dc_0 = arrays.dc
        if s.resets is not None:
            arrays.dh0.zero_()
            if dc_0 is not None:
                arrays = arrays._replace(dc=dc_0.clone())
                dc_0.zero_()
        if s.cell.carries_h:  # passes dL/dh on beside W_hh
            passed_on = arrays.dz.new_empty((s.D, s.B, s.H), dtype=sweeps.wide(arrays.dz.dtype))
            arrays = arrays._replace(dc=passed_on)
        inside = arrays.dm is not None or arrays.dc_more is not None
        self._run(self.module.backward, s, (*arrays, dc_0), arrays.dz, True, inside, add)

    def _run(
        self,
        run: Any,
        s: Sweep,
        arrays: Sequence[Tensor | None],
        like: Tensor,
        backward: bool,
        inside: bool,
        *more: Any,
    ) -> None:
        with on_device_of(like):
            plan = self.plan(s, like, backward, inside)
            workspace = like.new_zeros(plan.workspace_bytes, dtype=torch.uint8)
            of_rows = s.batch_sizes, s.offsets, s.resets, None if s.resets is None else s.first_reset()
            addresses = [[0 if t is None else t.data_ptr() for t in some] for some in (of_rows, (*arrays, workspace))]
            run(plan, self.place(like)[1], s.T, *addresses, *more)

    def upload(self, host: Tensor, there: Tensor) -> None:
        with on_device_of(there):
            self.module.upload(*self.place(there), host.data_ptr(), host.numel(), there.data_ptr())

    @staticmethod
    def place(x: Tensor) -> tuple[int, int]:
        """Index of the device, and its current stream."""
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, as torch and the CUDA runtime count."""
    return nullcontext() if x.is_cpu else torch.cuda.device(x.device)


NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 3, torch.bfloat16: 4}
TF32 = 2


def number_of(dtype: torch.dtype) -> int:
    """As the extension counts them. TF32 in the time loop where torch's own recurrent layers would take it."""
    return TF32 if dtype == torch.float32 and takes_tf32() else NUMBERS[dtype]


def takes_tf32() -> bool:
    """Would cuDNN's recurrent layers take TF32 for float32?"""
    rnn = getattr(torch.backends.cudnn, "rnn", None)  # since torch 2.9
    return torch.backends.cudnn.allow_tf32 if rnn is None else rnn.fp32_precision == "tf32"


_matmul_lock = threading.Lock()


@contextmanager
def products_as_cudnns(x: Tensor) -> Iterator[None]:
    """The products of all rows in TF32 where cuDNN's are, whatever `torch.backends.cuda.matmul` says of others.

    torch has no such switch for one product: for as long as this one is launched it holds for the process.
    """
    if x.dtype != torch.float32 or not x.is_cuda or not takes_tf32():
        yield
        return
    matmul = torch.backends.cuda.matmul
    name, tf32 = ("fp32_precision", "tf32") if hasattr(torch.backends.cudnn, "rnn") else ("allow_tf32", True)
    with _matmul_lock:
        before = getattr(matmul, name)
        setattr(matmul, name, tf32)
        try:
            yield
        finally:
            setattr(matmul, name, before)


@lru_cache(maxsize=1)
def load_extension() -> Extension:
    if not is_built():
        raise RuntimeError(
            "rnnfast: this installation has no CUDA kernels. Install it with nvcc and RNNFAST_CUDA=on in the "
            "environment (docs/cuda.md), or use rnnfast.revert(model) for torch's own layers."
        )
    return Extension(importlib.import_module("rnnfast._cuda"))


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A small int64 tensor, on the device; by the extension it comes with the launch, so that it needs no pinned memory
    and is part of a captured graph."""
    if device.type == "cpu":
        return host
    there = torch.empty_like(host, device=device)
    if not is_built() or forced() == "composite":
        return there.copy_(host)
    load_extension().upload(host, there)
    return there
