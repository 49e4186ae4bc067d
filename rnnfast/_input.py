"""What a layer asks of its input: is there a kernel for such numbers, which does the call take and give, resets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast._autograd import op
from rnnfast._backends import cuda_sweeps, schema
from rnnfast._backends.precision import HIGHEST, MEDIUM
from rnnfast._backends.sizes import check_resets
from rnnfast.fallback import warn_once

HALVES = torch.bfloat16, torch.float16


class Numbers(NamedTuple):
    """The dtypes of a call that computes with others than it is given: autocast's, and 16-bit numbers on the CPU, whose
    kernels hold them as float32 and round what they multiply, where they have units for it."""

    rounded: torch.dtype  # of the factors of products
    held: torch.dtype  # of the arrays of the kernels
    h: torch.dtype  # of y and h_n
    c: torch.dtype  # of c_n

    @property
    def precision(self) -> int:
        """Of the products on the CPU: no fewer bits than the numbers have."""
        return MEDIUM if self.rounded == torch.bfloat16 else HIGHEST


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Is there a kernel for this input as far as dtype, device and what is going on are concerned? If not, says so."""
    if x.dtype == weight.dtype and not torch.jit.is_tracing():
        if x.is_cpu and weight.is_cpu and x.dtype in op.DTYPES:
            return True
        if x.is_cuda and x.device == weight.device and x.dtype in cuda_sweeps.DTYPES and cuda_sweeps.is_built():
            return True
    reason = _why_no_kernel(x, weight)
    if reason is not None:
        warn_once(reason)
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of float32 numbers on the device of x, if it is on and there are kernels; of float64 it makes
    nothing else."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if x.dtype == torch.float64 or not (x.is_cpu or (x.is_cuda and cuda_sweeps.is_built())):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floating-point numbers but float64, which autocast leaves alone, in another dtype, alone or as a list
    of what was a tuple or list of any type; everything else as it is."""
    if isinstance(value, (tuple, list)):
        return [cast(one, dtype) for one in value]
    is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value


def hold(value: Any, weights: list[Tensor], dtype: torch.dtype, are_matrices: list[bool]) -> tuple[Any, list[Tensor]]:
    """x and states, and weights, in the dtype that kernels hold. Where nobody records it, matrices of bfloat16 stay so:
    the kernels read them, too."""
    mere = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and op.is_mere_call()
    if not mere or weights[0].dtype != torch.bfloat16 or not all(map(_is_read, (*weights, value[0]))):
        return cast(value, dtype), cast(weights, dtype)
    held = [w if is_matrix else w.to(dtype) for w, is_matrix in zip(weights, are_matrices, strict=True)]
    return cast(value, dtype), held


def _is_read(tensor: Tensor) -> bool:
    """Do kernels read it themselves?"""
    return tensor.is_cpu and not schema.is_traced(tensor)


def are_all(dtype: torch.dtype, value: Any) -> bool:
    """Is this the dtype of every tensor, alone or in a tuple or list of any type?"""
    if isinstance(value, (tuple, list)):
        return all(are_all(dtype, one) for one in value)
    return not isinstance(value, Tensor) or value.dtype == dtype


def _why_no_kernel(x: Tensor, weight: Tensor) -> str | None:
    """None where nobody needs to know: bad input, which torch refuses, and shapes without numbers."""
    device = x.device.type
    if x.is_meta or x.device != weight.device:
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if x.is_cpu and x.dtype in HALVES:
        return None
    if device == "cuda" and not cuda_sweeps.is_built():
        return f"{x.dtype} on cuda in this installation (it was not built with RNNFAST_CUDA=on)"
    return f"{x.dtype} on {device}" if x.dtype == weight.dtype else None


def state_fits(state: object, shape: tuple[int, ...], like: Tensor) -> bool:
    return (
        isinstance(state, Tensor) and state.shape == shape and state.dtype == like.dtype and state.device == like.device
    )


def is_pair(hx: object) -> bool:
    return isinstance(hx, (tuple, list)) and len(hx) == 2


def weights_of(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The tensors of these names, whatever put them there: parametrizations, pruning, data parallelism."""
    parameters: dict[str, Any] = module._parameters  # a fifth of the time of getattr on a Module
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


def packed_resets(resets: Any, input: PackedSequence, batch_first: bool) -> Tensor:
    """(N): of a PackedSequence in the same order, or of a padded mask (T,B) in the order before packing."""
    x, batch_sizes, order, _ = input
    if isinstance(resets, PackedSequence):
        same = torch.equal(resets.batch_sizes, batch_sizes) and (
            order is resets.sorted_indices
            or (order is not None and resets.sorted_indices is not None and torch.equal(order, resets.sorted_indices))
        )
        if not same:
            raise RuntimeError(
                "resets: expected a PackedSequence of the same lengths in the same order as the input, got batch_sizes "
                f"{resets.batch_sizes.tolist()} and sorted_indices {resets.sorted_indices} for {batch_sizes.tolist()} "
                f"and {order}"
            )
        check_resets(resets.data, (x.size(0),), x.device)
        return resets.data
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a Tensor or PackedSequence, got {type(resets).__name__}")
    T, B = batch_sizes.numel(), int(batch_sizes[0])
    check_resets(resets, (B, T) if batch_first else (T, B), x.device)
    mask = resets.transpose(0, 1) if batch_first else resets
    mask = mask if order is None else mask.index_select(1, order)
    runs = torch.arange(B, device=x.device) < batch_sizes.to(x.device).unsqueeze(1)  # (T,B)
    return mask[runs]
