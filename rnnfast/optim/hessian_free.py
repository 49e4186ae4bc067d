"""Hessian-free optimisation: Newton's method truncated, damped, and never far from where its model holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rnnfast.optim.gauss_newton import Forward, GaussNewton, Loss

__all__ = ["HessianFree", "Report"]

# Martens (2010) and the code that was released with Martens & Sutskever (2011).
PROGRESS = 5e-4  # CG ends when its last k steps have gained less than this each, of all that was gained
LEAST_WINDOW, WINDOW = 10, 0.1  # k: so many steps, or this part of all
GRID = 1.3  # CG's results after 1, 1.3, 1.3^2, ... steps are kept to go back to
SHORTER = 0.8  # factor on the step, until the loss falls
SHORTEST = 60  # how often
SUFFICIENT = 0.01  # of the fall that the slope promises
GOOD, POOR = 0.75, 0.25  # ratios of reduction above and below which the damping changes
EASE = 2 / 3  # factor on the damping when it does, or one over it
EXPONENT = 0.75  # of the preconditioner
SIGNS = 8  # random signs that its diagonal is estimated with


@dataclass(frozen=True)
class Report:
    """What a step did.

    Attributes:
        loss: before the step, weight decay included.
        new_loss: after it, on the same sequences; `loss` if it was rejected.
        rho: how much the loss fell at CG's result, over how much the quadratic model said; NaN if there is no result.
        damping: lambda, with which the step was made.
        cg_steps: steps of CG, a product each.
        rate: part of CG's result that was taken, 0.8^i; 0 if none.
        rejected: why none was taken, or ''.
    """

    loss: float
    new_loss: float
    rho: float
    damping: float
    cg_steps: int
    rate: float
    rejected: str = ""


class HessianFree(Optimizer):
    """Truncated Newton steps with Gauss-Newton curvature, for losses with long flat valleys.

        optimizer = rnnfast.optim.HessianFree(model.parameters())
        for x, y in batches:  # large ones
            report = optimizer.step(lambda: model(x), lambda outputs: F.mse_loss(outputs, y))

    A step minimises a quadratic model of the loss at the weights w,

        q(d) = g^T d + d^T (G + lambda mu S + lambda I) d / 2

    by conjugate gradients (CG): g is the gradient, G the Gauss-Newton matrix, S the curvature by which structural
    damping holds the hidden states of rnnfast's layers where they are (see `GaussNewton`; other layers have none).
    CG starts from `decay` times the last step's result and ends when its progress does. Of the results that it passed,
    the loss chooses (going back from the last as long as it falls), and then a line search shortens the step until the
    loss falls by 1 % of what its slope promises. lambda follows the ratio rho of the fall of the loss to that of q
    without its damping (Levenberg-Marquardt): 3/2 times larger below 1/4, smaller above 3/4.

    A step that fails, because the curvature is not finite or no part of it makes the loss fall, is rejected: w stays,
    lambda grows, and the report says why. Whatever is raised, w is never left between two steps.

    Sources: Martens (2010), Deep learning via Hessian-free optimization, section 4; Martens & Sutskever (2011),
    Learning recurrent neural networks with Hessian-free optimization, section 3.

    Args:
        params: parameters, in one group; those that require no gradient are left alone.
        damping: lambda at the beginning, default 0.1.
        mu: weight of structural damping, in units of lambda, default 1/30; 0: none.
        cg_steps: the most there are in a step, default 300.
        decay: default 0.95; 0: CG starts from 0.
        weight_decay: adds weight_decay |w|^2 / 2 to the loss, default 0.
        precondition: CG on a better scaled problem, default False: divided by (D + lambda)^0.75, D the mean over the N
            targets of their squared gradients (Martens 2010, section 4.7), estimated by 8 gradients with random signs.
        process_group: of torch.distributed: each process has its part of the data, and the mean over all of loss,
            gradient and products is used. All end with the same weights if they began so. Default None: this one alone.

    `state_dict()` has lambda and the last result of CG: loaded, the next step is that of the saved optimizer, exactly.
    Gradients in `.grad` are neither used nor changed.

    Raises:
        ValueError: an argument out of its range, or more than one parameter group.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        damping: float = 0.1,
        mu: float = 1 / 30,
        cg_steps: int = 300,
        decay: float = 0.95,
        weight_decay: float = 0.0,
        precondition: bool = False,
        process_group: Any = None,
    ) -> None:
        _check("damping", damping, damping > 0, "positive")
        _check("mu", mu, mu >= 0, ">= 0")
        _check("cg_steps", cg_steps, cg_steps >= 1, "at least 1")
        _check("decay", decay, 0 <= decay <= 1, "in [0,1]")
        _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        self.process_group = process_group
        defaults = {"damping": damping, "mu": mu, "cg_steps": cg_steps, "decay": decay}
        super().__init__(params, defaults | {"weight_decay": weight_decay, "precondition": precondition})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("HessianFree takes one parameter group: a quadratic model couples all weights")
        super().add_param_group(param_group)

    def step(  # type: ignore[override]
        self, forward: Forward, loss: Loss, curvature: tuple[Forward, Loss] | None = None
    ) -> Report:
        """Take a step.

        Args:
            forward: () -> the model's outputs, a tensor.
            loss: outputs -> scalar, convex in them, a mean over the batch: mse_loss, cross_entropy,
                binary_cross_entropy_with_logits, ... Both are called many times and must give the same for the same w.
            curvature: forward and loss of other, usually fewer, sequences to take G and S from. Default: the same.

        Raises:
            RuntimeError: the loss is another when computed again, or not finite to begin with.
            ValueError: the loss is not convex in the outputs.
        """
        return _Step(self, forward, loss, curvature).run()


class _Result(NamedTuple):
    """What became of CG."""

    path: list[Tensor]  # where it passed, the last one last, (W) each
    steps: int
    failure: str


class _Step:
    """One step. Vectors are flat, (W), and float64 whatever the parameters are."""

    def __init__(
        self, optimizer: HessianFree, forward: Forward, loss: Loss, curvature: tuple[Forward, Loss] | None
    ) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.forward, self.loss = forward, loss
        self.parameters: list[Tensor] = [p for p in self.group["params"] if p.requires_grad]
        if not self.parameters:
            raise ValueError("params should hold some that require gradients, got none")
        self.w = _flat([p.detach() for p in self.parameters])
        model = GaussNewton(forward, loss, self.parameters)
        self.value = self.with_decay(model.loss, self.w)
        if not math.isfinite(self.value):
            raise RuntimeError(f"the loss should be finite at the start of a step, got {self.value}")
        self.gradient = self.mean(_flat(model.gradient())) + self.group["weight_decay"] * self.w
        self.check_deterministic()
        self.model = model if curvature is None else GaussNewton(*curvature, self.parameters)

    def run(self) -> Report:
        if not self.gradient.isfinite().all():
            return self.reject("the gradient is not finite", 0)
        cg = self.conjugate_gradients(self.first_guess())
        if cg.failure:
            return self.reject(cg.failure, cg.steps)
        d, value = self.best(cg.path)
        promised = self.promised(d)
        rho = (value - self.value) / promised if promised < 0 else math.nan
        rate, value = self.line_search(d, value)
        if rate == 0:
            return self.reject("the loss does not fall along the direction found", cg.steps, rho)
        report = Report(self.value, value, rho, self.group["damping"], cg.steps, rate)
        if rho > GOOD:
            self.group["damping"] *= EASE
        elif not rho >= POOR:  # or NaN
            self.group["damping"] /= EASE
        self.keep(cg.path[-1])
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.split(self.w + rate * d))
        return report

    def reject(self, why: str, cg_steps: int, rho: float = math.nan) -> Report:
        report = Report(self.value, self.value, rho, self.group["damping"], cg_steps, 0.0, why)
        self.group["damping"] /= EASE
        self.keep(torch.zeros_like(self.w))
        return report

    # ------------------------------------------------------------------------------------------ loss and curvature

    def mean(self, x: Tensor) -> Tensor:
        """Over the processes."""
        group = self.optimizer.process_group
        if group is not None:
            torch.distributed.all_reduce(x, group=group)
            x /= torch.distributed.get_world_size(group)
        return x

    def with_decay(self, loss: Tensor, w: Tensor) -> float:
        return float(self.mean(loss.double().clone())) + 0.5 * self.group["weight_decay"] * float(w @ w)

    def loss_at(self, w: Tensor) -> float:
        """The parameters get other storage for as long as the loss is computed, so nothing is ever overwritten."""
        storages = [p.data for p in self.parameters]
        try:
            for p, values in zip(self.parameters, self.split(w), strict=True):
                p.data = values
            with torch.no_grad():
                return self.with_decay(self.loss(self.forward()), w)
        finally:
            for p, storage in zip(self.parameters, storages, strict=True):
                p.data = storage

    def check_deterministic(self) -> None:
        again = self.loss_at(self.w)
        tolerance = math.sqrt(torch.finfo(self.parameters[0].dtype).eps)
        if not abs(again - self.value) <= tolerance * abs(self.value):
            raise RuntimeError(
                f"forward() and loss() should give the same whenever the weights are the same, got a loss of "
                f"{self.value} and then {again}: is there dropout, or another batch in each call?"
            )

    def product(self, v: Tensor, damping: float) -> Tensor:
        """(G + damping mu S + (damping + weight_decay) I) v"""
        products = self.model.product(self.split(v), damping * self.group["mu"])
        return self.mean(_flat(products)) + (damping + self.group["weight_decay"]) * v

    def promised(self, d: Tensor) -> float:
        """What the loss would change by along d if it were quadratic."""
        return float(self.gradient @ d + 0.5 * d @ self.product(d, damping=0.0))

    # ------------------------------------------------------------------------------------------ the direction

    def first_guess(self) -> Tensor:
        """Part of the last result of CG."""
        state = self.optimizer.state
        last = [state[p].get("direction", torch.zeros_like(p)) for p in self.parameters]
        return self.group["decay"] * _flat(last)

    def conjugate_gradients(self, d: Tensor) -> _Result:
        """Minimise q from d on."""
        A = self.group["damping"]
        inverse = self.preconditioner()
        r = self.gradient + (self.product(d, A) if d.any() else 0)  # dq/dd
        y = inverse * r
        p, ry = -y, float(r @ y)
        q = [0.5 * float(d @ (r + self.gradient))]
        path, keep_at = [d], 1.0
        for i in range(1, self.group["cg_steps"] + 1):
            Ap = self.product(p, A)
            curvature = float(p @ Ap)
            if not math.isfinite(curvature):
                return _Result(path, i, "the curvature is not finite")
            if curvature <= 0:
                self.check_convex(curvature, p, Ap)
                return _Result(path if path[-1] is d else [*path, d], i, "")  # nothing is left but rounding
            alpha = ry / curvature
            d, r = d + alpha * p, r + alpha * Ap
            q.append(0.5 * float(d @ (r + self.gradient)))
            if has_stalled(q) or i == self.group["cg_steps"]:
                break
            if i >= keep_at:
                path.append(d)
                keep_at = max(i + 1, keep_at * GRID)
            y = inverse * r
            ry, before = float(r @ y), ry
            if ry == 0:
                break  # solved, but for what underflows
            p = ry / before * p - y
        return _Result([*path, d], i, "")

    def check_convex(self, curvature: float, p: Tensor, Ap: Tensor) -> None:
        rounding = math.sqrt(torch.finfo(self.parameters[0].dtype).eps)
        if curvature < -rounding * float(p.norm() * Ap.norm()):
            relative = curvature / float(p @ p)
            raise ValueError(
                f"loss should be convex in the outputs, got a curvature of {relative:.3g} in some direction"
            )

    def preconditioner(self) -> Tensor:
        """What CG's residuals are multiplied with, (W) or ()."""
        if not self.group["precondition"]:
            return torch.ones((), dtype=self.w.dtype, device=self.w.device)
        slope = self.model.slope
        targets = max(1, slope.numel() // slope.size(-1)) if slope.dim() else 1
        generator = torch.Generator(device="cpu").manual_seed(0)  # the same at every step, and after a resume
        squares = torch.zeros_like(self.w)
        for _ in range(SIGNS):
            signs = torch.randint(2, slope.shape, device="cpu", generator=generator).to(slope) * 2 - 1
            squares += _flat(self.model.pull(signs * slope)).square() * (targets / SIGNS)
        return (self.mean(squares) + self.group["damping"] + self.group["weight_decay"]) ** -EXPONENT

    # ------------------------------------------------------------------------------------------ the step

    def best(self, path: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Back along CG's path as long as the loss falls. -> where it ended, the loss there"""
        d, value = path[-1], self.loss_at(self.w + path[-1])
        for earlier in reversed(path[:-1]):
            other = self.loss_at(self.w + earlier)
            if other >= value:
                break
            d, value = earlier, other
        return d, value

    def line_search(self, d: Tensor, value: float) -> tuple[float, float]:
        """-> the part of d to take, 0 if there is none; the loss there."""
        slope = min(0.0, float(self.gradient @ d))
        for i in range(SHORTEST):
            rate = SHORTER**i
            if i:
                value = self.loss_at(self.w + rate * d)
            if value < self.value and value <= self.value + SUFFICIENT * rate * slope:
                return rate, value
        return 0.0, self.value

    def keep(self, direction: Tensor) -> None:
        for p, part in zip(self.parameters, self.split(direction), strict=True):
            self.optimizer.state[p]["direction"] = part

    def split(self, v: Tensor) -> list[Tensor]:
        """Copies of the parts of v, like the parameters."""
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p).to(p.dtype, copy=True) for part, p in zip(parts, self.parameters, strict=True)]


def has_stalled(q: Sequence[float]) -> bool:
    """Of CG, from the values of q so far: the relative progress of its last k steps (Martens 2010, section 4.4)."""
    i = len(q) - 1
    k = max(LEAST_WINDOW, int(WINDOW * i))
    return i > k and q[i] < 0 and (q[i] - q[i - k]) / q[i] < k * PROGRESS


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} should be {expected}, got {value}")
