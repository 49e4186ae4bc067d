"""Recurrent policies of reinforcement learning libraries on rnnfast's layers.

A batch of rollouts holds many episodes, and the state must not run from one into the next. These adapters hand the
starts of episodes to the layer as `resets`: one call for all of them, instead of a loop over steps or padded copies.

    rnnfast.rl.sb3        policies for sb3-contrib's RecurrentPPO
    rnnfast.rl.torchrl    torchrl's LSTMModule and GRUModule

`pip install 'rnnfast[rl]'` brings both libraries; each adapter needs its own only.
"""

from __future__ import annotations

import importlib
from typing import Any

_ADAPTERS = ("sb3", "torchrl")  # imported when first asked for: each needs a package that need not be there

__all__ = ["sb3", "torchrl"]


def __getattr__(name: str) -> Any:
    if name in _ADAPTERS:
        return importlib.import_module(f"rnnfast.rl.{name}")
    raise AttributeError(f"module 'rnnfast.rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ADAPTERS})
