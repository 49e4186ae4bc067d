"""The word that is said, once, where torch's operators run in place of a kernel."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch

__all__ = ["FallbackWarning", "warn_once"]


class FallbackWarning(UserWarning):
    """Given once for each reason why torch's operators run instead of rnnfast's kernels."""


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    if reason in _warned or torch.compiler.is_compiling():
        return
    _warned.add(reason)
    message = f"rnnfast has no kernel for {reason}; torch's own operators run instead"
    warnings.warn(message, FallbackWarning, stacklevel=_frames_to_user())


def _frames_to_user() -> int:
    """From `warn_once` on: ours, and those of torch.nn.Module's call."""
    frame: FrameType | None = sys._getframe(1)
    count = 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("rnnfast.", "torch.nn.modules.module")):
        frame, count = frame.f_back, count + 1
    return count
