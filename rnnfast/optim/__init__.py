"""Optimisation that recurrent networks need and torch.optim lacks."""

from __future__ import annotations

from rnnfast.optim.gauss_newton import GaussNewton
from rnnfast.optim.hessian_free import HessianFree, Report
from rnnfast.optim.momentum import MomentumSchedule

__all__ = ["GaussNewton", "HessianFree", "MomentumSchedule", "Report"]
