"""What the functions of this package run under, whatever they are called from: a graph that is being traced, autocast,
or a process that was forked."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def fork_safe() -> AbstractContextManager[None]:
    """In a forked child on a single thread.

    The threads of the parent's OpenMP pool do not exist in the child, where torch's parallel operators wait for them
    forever; so torch's own DataLoader sets one thread in its workers. Here the number is put back.
    """
    return _one_thread() if _forked else _NOTHING


def plain() -> AbstractContextManager[None]:
    """`fork_safe`, and in the dtypes of the tensors at hand, not in autocast's."""
    return _plain() if _forked or torch.is_autocast_enabled("cpu") else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _plain() -> Iterator[None]:
    with fork_safe(), torch.autocast("cpu", enabled=False):
        yield


def untraced(function: Function) -> Function:
    """A function that runs as it is written, also where Dynamo makes a graph of its caller: one that hands addresses to
    the compiled core. In two graphs an array could be freed between the reading of its address and the use."""
    return torch.compiler.disable(function)


def public(function: Function) -> Function:
    """A function of numbers, for users: `plain` and `untraced`, followed by no transform of torch.func, and outside of
    inference mode, since the tensors that a network keeps may be used without it later."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        transformed, inference = torch._C._are_functorch_transforms_active(), torch.is_inference_mode_enabled()
        with (
            plain(),
            torch._C._DisableFuncTorch() if transformed else _NOTHING,
            torch.inference_mode(False) if inference else _NOTHING,
        ):
            return function(*args, **kwargs)

    return untraced(run)  # type: ignore[return-value]
