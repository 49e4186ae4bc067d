"""Memory of large tensors, kept for the next call: to clear the pages of fresh memory took up to a fifth of a pass.

What is kept are storages of torch's own, from its own allocator. So the tensors are like any other at every size, to be
resized, shared, pickled or exported; and a storage is handed out again once nobody else refers to it.
"""

from __future__ import annotations

import os
import sys
import weakref
from math import prod
from threading import Lock

import torch
from torch import Tensor, UntypedStorage

LARGE = 2**18  # bytes: less is kept by the heap
MOST, MOST_BYTES = 32, 2**28  # storages that are kept, and their bytes


class _Kept:
    """Storages that were handed out, in use or not, the last one last."""

    def __init__(self) -> None:
        self.storages: list[UntypedStorage] = []
        self.lock = Lock()

    def storage(self, size: int, most: int) -> UntypedStorage | None:
        """Of `size` to `most` bytes. None for who comes while another thread is here, or by a finalizer in the middle
        of it: nobody waits."""
        if not LARGE <= size <= MOST_BYTES or not self.lock.acquire(blocking=False):
            return None
        try:
            return self.unused(size, most) or self.added(size)
        finally:
            self.lock.release()

    def unused(self, size: int, most: int) -> UntypedStorage | None:
        """The smallest that nobody uses; of those the newest, whose memory is the most likely to be in the cache."""
        storages = self.storages
        fitting = [i for i in reversed(range(len(storages))) if size <= storages[i].nbytes() <= most]
        for i in sorted(fitting, key=lambda i: storages[i].nbytes()):
            if _is_unused(storages, i) and _is_private(storages[i]):
                storages.append(storages.pop(i))
                return storages[-1]
        return None

    def added(self, size: int) -> UntypedStorage:
        """A new one; the oldest ones go if there are too many."""
        self.storages = [storage for storage in self.storages if storage.nbytes() and _is_private(storage)]
        room = MOST_BYTES - size - sum(storage.nbytes() for storage in self.storages)
        while self.storages and (len(self.storages) >= MOST or room < 0):
            room += self.storages.pop(0).nbytes()
        self.storages.append(UntypedStorage(size, device="cpu"))
        return self.storages[-1]


def _references(storages: list[UntypedStorage], i: int) -> int:
    return sys.getrefcount(storages[i])


_ALONE = _references([UntypedStorage(0, device="cpu")], 0)


def _is_unused(storages: list[UntypedStorage], i: int) -> bool:
    """Does only the list know this storage: no tensor, and in Python nobody who holds, watches or has marked it?"""
    if _references(storages, i) != _ALONE:
        return False
    storage = storages[i]
    alone = torch._C._storage_Use_Count(storage._cdata) == 1  # type: ignore[attr-defined]
    return alone and not weakref.getweakrefcount(storage) and not vars(storage)


def _is_private(storage: UntypedStorage) -> bool:
    """Is its memory as torch's allocator gives it, and was not moved to where other processes see it?"""
    return storage.resizable() and not storage.is_shared()


_kept = _Kept()


def _start_anew() -> None:
    """In the child of a fork, where the lock may be that of a thread that is no more."""
    global _kept
    _kept = _Kept()


os.register_at_fork(after_in_child=_start_anew)


def empty(dtype: torch.dtype, *shape: int, slack: float = 0.0) -> Tensor:
    """Uninitialised, contiguous, on the CPU. Its storage may be larger by `slack`: what users do not get as a result of
    theirs needs no new memory where the number of steps changes a little."""
    size = prod(shape) * dtype.itemsize
    storage = _kept.storage(size, most=int(size * (1 + slack)))
    if storage is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]  # no view
    return tensor.data  # of version 0, as a new one
