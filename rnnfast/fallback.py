"""The word that is said, once, where torch's operators run in place of a kernel."""

from __future__ import annotations

import warnings

import torch

__all__ = ["FallbackWarning", "warn_once"]


class FallbackWarning(UserWarning):
    """Given once for each reason why torch's operators run instead of rnnfast's kernels."""


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    if reason in _warned or torch.compiler.is_compiling():
        return
    _warned.add(reason)
    # The frames between here and the user's call are _has_kernel, _fits, forward, and two of torch.nn.Module.
    warnings.warn(
        f"rnnfast has no kernel for {reason}; torch's own operators run instead", FallbackWarning, stacklevel=7
    )
