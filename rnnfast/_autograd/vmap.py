"""vmap for the recurrent nodes: one sweep over a larger batch instead of many small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rnnfast._autograd.levels import is_differentiable

Again: TypeAlias = Callable[[Any, Sequence[Any]], tuple[Tensor, Tensor]]


class Kind(Enum):
    """What a tensor is, and so where a mapped dimension K goes: beside its batch dimension, if it has one."""

    ROWS = auto()  # (T,B,...) or packed (N,...)
    STATE = auto()  # (L*D,B,...)
    DROPOUT = auto()  # (L-1,T,B,...) or packed (L-1,N,...)
    WEIGHT = auto()  # no batch
    BATCH_SIZES = auto()  # (T)
    RESERVE = auto()  # what a forward pass kept, in the kernels' own layout; belongs to the ROWS before it, y


def vmap_rule(
    node: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple,
    spec: Any,
    tensors: tuple[Tensor | None, ...],
    kinds: list[Kind],
    out_kinds: list[Kind],
    again: Again | None = None,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The rule of every node: the mapped dimension joins the batch where the weights are shared; else one by one.

    Sequence b of sample k becomes sequence b*K + k, so a packed batch stays sorted by length, and `groups` of a node
    that gives weight gradients grows K-fold. The reserve of a folded forward pass cannot be told apart by samples; it
    is passed on as if it were not mapped, and found again by y being mapped. Where it does not fit the tensors,
    again(spec, tensors) makes y and a reserve anew.
    """
    dims = in_dims[1:]
    mapped = {kind for kind, dim in zip(kinds, dims, strict=True) if dim is not None}
    if Kind.BATCH_SIZES in mapped:
        raise RuntimeError(
            "rnnfast: vmap over the lengths of packed sequences is not possible; the lengths must be shared"
        )
    grouped = Kind.WEIGHT in out_kinds
    if Kind.WEIGHT in mapped or (grouped and any(is_differentiable(t) for t in tensors)):
        return _one_by_one(node, info.batch_size, spec, tensors, dims, kinds, again)
    return _folded(node, info.batch_size, spec, tensors, dims, kinds, out_kinds, again)


def _reserve_at(kinds: list[Kind]) -> int | None:
    """Which tensor is a reserve; y is just before it."""
    return kinds.index(Kind.RESERVE) if Kind.RESERVE in kinds else None


def _one_by_one(node, K, spec, tensors, dims, kinds, again):
    reserve = _reserve_at(kinds)
    outs = []
    for k in range(K):
        sample = [t if dim is None else t.select(dim, k) for t, dim in zip(tensors, dims, strict=True)]
        if reserve is not None and dims[reserve] is None and dims[reserve - 1] is not None:
            sample[reserve - 1 : reserve + 1] = again(spec, sample)
        outs.append(node.apply(spec, *sample))
    return tuple(torch.stack(some) for some in zip(*outs, strict=True)), (0,) * len(outs[0])


def _folded(node, K, spec, tensors, dims, kinds, out_kinds, again):
    packed = tensors[kinds.index(Kind.BATCH_SIZES)] is not None
    folded = [_fold(t, dim, kind, K, packed) for t, dim, kind in zip(tensors, dims, kinds, strict=True)]
    reserve = _reserve_at(kinds)
    if reserve is not None and dims[reserve - 1] is None:
        folded[reserve - 1 : reserve + 1] = again(spec, folded)
    groups = 1
    if Kind.WEIGHT in out_kinds:
        groups = spec.groups
        spec = spec._replace(groups=groups * K)
    outs = node.apply(spec, *folded)
    pairs = [_unfold(t, kind, K, packed, groups) for t, kind in zip(outs, out_kinds, strict=True)]
    return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)


def _batch_end(kind: Kind, packed: bool) -> int:
    """The dimension just after the batch."""
    return {Kind.ROWS: 1 if packed else 2, Kind.STATE: 2, Kind.DROPOUT: 2 if packed else 3}[kind]


def _fold(tensor: Tensor | None, dim: int | None, kind: Kind, K: int, packed: bool) -> Tensor | None:
    if tensor is None or kind in (Kind.WEIGHT, Kind.RESERVE):
        return tensor
    if kind is Kind.BATCH_SIZES:
        return tensor * K
    end = _batch_end(kind, packed)
    if dim is None:
        tensor = tensor.unsqueeze(end).expand(*tensor.shape[:end], K, *tensor.shape[end:])
    else:
        tensor = tensor.movedim(dim, end)
    before, B, after = tensor.shape[: end - 1], tensor.shape[end - 1], tensor.shape[end + 1 :]
    return tensor.reshape(*before, B * K, *after)  # torch's older vmap knows no flatten


def _unfold(tensor: Tensor, kind: Kind, K: int, packed: bool, groups: int) -> tuple[Tensor, int | None]:
    """A result with its mapped dimension, and where that is."""
    if kind is Kind.RESERVE:
        return tensor, None
    if kind is Kind.WEIGHT:
        shape = tensor.shape if groups * K == 1 else tensor.shape[1:]
        return (tensor.reshape(K, *shape), 0) if groups == 1 else (tensor.reshape(groups, K, *shape), 1)
    end = _batch_end(kind, packed)
    before, BK, after = tensor.shape[: end - 1], tensor.shape[end - 1], tensor.shape[end:]
    return tensor.reshape(*before, BK // K, K, *after), end
