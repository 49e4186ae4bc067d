"""Momentum schedules for torch.optim.SGD, as in Sutskever, Martens, Dahl & Hinton (2013)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["MomentumSchedule"]

SCHEDULES = ("constant", "increasing")
LOW = 0.9  # momentum of the beginning of the one schedule and of the end of the other
LOW_UPDATES = 1000  # how many updates it lasts
PERIOD = 250  # updates between two steps of Eq. 5


class MomentumSchedule(LRScheduler):
    """Drives the momentum of `torch.optim.SGD(nesterov=True)`; used like any scheduler of torch.

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        schedule = rnnfast.optim.MomentumSchedule(optimizer, 0.995)
        ...
        optimizer.step()
        schedule.step()  # after every update, not every epoch

    Schedules of mu_t, the momentum of update t = 0, 1, ... (Sutskever, Martens, Dahl & Hinton 2013, On the importance
    of initialization and momentum in deep learning):

        'constant'    0.9 for the first 1000 updates, then mu (section 4.2, recurrent networks; mu in 0, .9, .98, .995)
        'increasing'  min(1 - 2^(-1 - log2(floor(t/250) + 1)), mu) (Eq. 5, autoencoders; mu in 0, .9, .99, .995, .999)

    Both fall to 0.9, or mu where that is less, in the last 1000 of `updates`, if these are given (section 3, there for
    autoencoders): a velocity that lives for 200 updates explores, one that lives for 10 settles. With mu = 0.995 the
    fall divides the rate lr / (1 - mu) at which the weights follow a steady gradient by 20.

    **What torch computes and what the paper computes.** Nesterov's accelerated gradient in the paper, with parameters
    theta and velocity v:

        v_{t+1} = mu_t v_t - lr_t grad(theta_t + mu_t v_t)              theta_{t+1} = theta_t + v_{t+1}

    torch keeps w = theta + mu v, the place where the gradient is taken, and a buffer b instead of v:

        b_{t+1} = m b_t + grad(w_t)                                     w_{t+1} = w_t - lr (grad(w_t) + m b_{t+1})

    These are the same, with v = -lr b and m = mu, as long as neither mu nor lr changes. Where they change, two numbers
    stand for torch's one m: mu_t, by which the old velocity decays, and mu_{t+1}, by which w_{t+1} looks ahead; and a
    change of lr would change the velocity already reached. So this schedule sets m = mu_{t+1} and multiplies the
    buffers by (mu_t / mu_{t+1}) (lr_{t-1} / lr_t): the paper's update, exactly, for any mu_t and lr_t. The model's
    parameters are theta + mu v then; `at_theta` shows theta. Step a scheduler of the learning rate *before* this one,
    so that it sees the new lr. (An update with lr = 0 is torch's: nothing moves, and the velocity starts from 0 after
    it.)

    **mu = 0.** SGD(nesterov=True) refuses momentum=0 when it is made. Give it any other number: it is overwritten
    before the first update, and torch's step then takes m = 0 for plain gradient descent.

    Args:
        optimizer: a torch.optim.SGD, nesterov=True in every parameter group.
        mu: the momentum reached, mu_0 or mu_max in the paper, 0 <= mu < 1.
        schedule: 'constant' (default) or 'increasing'.
        updates: how many there will be in all, for the fall to 0.9 at their end; None (default): no fall.

    `state_dict()` holds plain numbers. Save it with the optimizer's, load both in either order: what follows is the
    same to the last bit as without the interruption.

    Raises:
        TypeError: the optimizer is no torch.optim.SGD.
        ValueError: nesterov=False in a group, mu outside [0,1), an unknown schedule, or `updates` below 1.
    """

    def __init__(self, optimizer: Optimizer, mu: float, schedule: str = "constant", updates: int | None = None) -> None:
        if not isinstance(optimizer, SGD):
            raise TypeError(f"optimizer should be a torch.optim.SGD, got {type(optimizer).__name__}")
        if not all(group["nesterov"] for group in optimizer.param_groups):
            raise ValueError("optimizer should be SGD(nesterov=True) in every parameter group")
        if not 0 <= mu < 1:
            raise ValueError(f"mu should be in [0,1), got {mu}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule should be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if updates is not None and updates < 1:
            raise ValueError(f"updates should be a positive number, got {updates}")
        self.mu, self.schedule, self.updates = float(mu), schedule, updates
        self.velocity_lrs: list[float] = []  # by group: the lr in v = -lr b for the buffers as they are
        self._is_at_theta = False
        super().__init__(optimizer)

    def momentum_at(self, t: int) -> float:
        """mu_t, t = 0 for the first update."""
        if self.updates is not None and t >= self.updates - LOW_UPDATES:
            return min(LOW, self.mu)
        if self.schedule == "constant":
            return LOW if t < LOW_UPDATES else self.mu
        return min(1 - 2.0 ** (-1 - math.log2(t // PERIOD + 1)), self.mu)

    @contextmanager
    def at_theta(self) -> Iterator[None]:
        """In this context the model's parameters are theta, not theta + mu v: to test, or to save, what was learned.

            with schedule.at_theta():
                error = test(model)

        Afterwards they are what they were, to the last bit. Enter it after `step`. Within itself it changes nothing.

        Raises:
            RuntimeError: `step` within it.
        """
        if self._is_at_theta:
            yield
            return
        places = []  # parameters, and theta + mu v
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                # Where the next update has no momentum, the buffers still hold the velocity as the last one left it.
                mu = group["momentum"] or self.momentum_at(self.last_epoch)
                for parameter, buffer in self._velocities(group):
                    places.append((parameter, parameter.clone()))
                    parameter.add_(buffer, alpha=mu * float(group["lr"]))
        self._is_at_theta = True
        try:
            yield
        finally:
            self._is_at_theta = False
            with torch.no_grad():
                for parameter, place in places:
                    parameter.copy_(place)

    def step(self, epoch: int | None = None) -> None:
        """Prepare the next update; call it after each of the optimizer's steps."""
        if self._is_at_theta:
            raise RuntimeError("step of a MomentumSchedule within its at_theta(): the update would be lost")
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Called by `step`: sets the momentum of the update to come and leaves the learning rates as they are."""
        t, groups = self.last_epoch, self.optimizer.param_groups
        decay, ahead = self.momentum_at(t), self.momentum_at(t + 1)
        lrs = [float(group["lr"]) for group in groups]
        if t > 0:
            for group, lr, before in zip(groups, lrs, self.velocity_lrs, strict=True):
                # Where the divisor is 0 the buffers play no part in the step to come.
                factor = (decay / ahead if ahead else 1.0) * (before / lr if lr else 1.0)
                if factor != 1:
                    self._scale_velocities(group, factor)
        self.velocity_lrs = lrs
        self._set_momentum()
        return [group["lr"] for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        return {name: value for name, value in super().state_dict().items() if name != "_is_at_theta"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the optimizer's momentum follows."""
        super().load_state_dict(state_dict)
        self._set_momentum()

    def _set_momentum(self) -> None:
        for group in self.optimizer.param_groups:
            group["momentum"] = self.momentum_at(self.last_epoch + 1)

    def _scale_velocities(self, group: dict[str, Any], factor: float) -> None:
        for _, buffer in self._velocities(group):
            buffer.mul_(factor)

    def _velocities(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters that have moved, and their buffers."""
        for parameter in group["params"]:
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                yield parameter, buffer
