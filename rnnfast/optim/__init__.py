"""Optimisation that recurrent networks need and torch.optim lacks."""

from __future__ import annotations

from rnnfast.optim.momentum import MomentumSchedule

__all__ = ["MomentumSchedule"]
