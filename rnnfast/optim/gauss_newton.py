"""Products with the Gauss-Newton matrix of a model, without the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from rnnfast._autograd import recorded

__all__ = ["GaussNewton"]

Forward = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]


class GaussNewton:
    """The loss of a model, its gradient and its curvature at the present weights w.

        G = J^T H J        J = d outputs / dw, H = d^2 loss / d outputs^2        (Schraudolph 2002)

    is the Hessian without what the curvature of the outputs themselves adds, and positive semi-definite for a loss that
    is convex in the outputs. It is never formed: `product` costs a sweep for J v and one for J^T (H J v), on one
    forward pass that is kept for all products. J v is the derivative in u of the gradient J^T u; for rnnfast's layers
    that is one forward-mode sweep. All is exact, and holds for whatever else is in the model, as long as torch can
    differentiate it twice.

    `structural` adds to G a multiple of the curvature by which structural damping holds the hidden states where they
    are (Martens & Sutskever 2011, section 3.2), and which no output needs to show:

        S = sum over layers and steps of J_z^T diag(a'(z)) J_z, mean over the sequences        J_z = dz/dw

    z are the pre-activations of all units of rnnfast's layers, a(z) = tanh(z): the Gauss-Newton matrix of the matching
    loss between new and old hidden states, which is half the squared distance of arcsin(h_t). For relu a' is 0 or 1.
    For an LSTM, where the paper says nothing, the four gates are taken for what they are, units with nonlinearities of
    their own, and each is charged for by its own slope.

    Args:
        forward: () -> outputs, a tensor; called once.
        loss: outputs -> scalar.
        parameters: those of w that matter, leaves that require gradients.

    Attributes:
        loss: scalar, detached.

    Raises:
        TypeError: forward gives no tensor, or loss no scalar.
        RuntimeError: the outputs do not depend on any parameter.
    """

    def __init__(self, forward: Forward, loss: Loss, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        with torch.enable_grad():
            with recorded.recording() as calls:
                outputs = forward()
            if not isinstance(outputs, Tensor):
                raise TypeError(f"forward() should return a tensor, got {type(outputs).__name__}")
            if not outputs.requires_grad:
                raise RuntimeError("forward() should return outputs that depend on the parameters, got constants")
            self._outputs = outputs.detach().requires_grad_()
            value = loss(self._outputs)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"loss(outputs) should return a scalar tensor, got {got}")
            (self._slope,) = torch.autograd.grad(
                value, self._outputs, create_graph=True, allow_unused=True, materialize_grads=True
            )
            self._ends = [outputs, *(s for s, _ in calls)]  # and of each call s (L,D,N,G,H)
            self._sequences = [B for _, B in calls]
        self.loss = value.detach()

    @cached_property
    def _u(self) -> list[Tensor]:
        return [torch.zeros_like(end).requires_grad_() for end in self._ends]

    @cached_property
    def _pulled(self) -> list[tuple[int, Tensor]]:
        """J^T u as a function of u, with the number of the parameter."""
        with torch.enable_grad():
            pulled = self._pull(self._u, create_graph=True)
        return [(k, p) for k, p in enumerate(pulled) if p.requires_grad]

    def gradient(self) -> list[Tensor]:
        """d loss / dw, like the parameters."""
        return self.pull(self._slope.detach())

    @property
    def slope(self) -> Tensor:
        """d loss / d outputs."""
        return self._slope.detach()

    def pull(self, cotangent: Tensor) -> list[Tensor]:
        """J^T u of a cotangent of the outputs, like the parameters."""
        return self._pull([cotangent], ends=1)

    def product(self, v: Sequence[Tensor], structural: float = 0.0) -> list[Tensor]:
        """(G + structural S) v, v and the result like the parameters."""
        push = torch.autograd.grad(
            [pulled for _, pulled in self._pulled],
            self._u if structural else self._u[:1],
            [v[k] for k, _ in self._pulled],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        cotangents = [self._curve(push[0])]
        for tangent, B in zip(push[1:], self._sequences, strict=bool(structural)):
            cotangents.append(tangent.mul_(structural / B))
        return self._pull(cotangents, ends=len(push))

    def _curve(self, tangent: Tensor) -> Tensor:
        """H times a tangent of the outputs."""
        if not self._slope.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(tangent)
        (product,) = torch.autograd.grad(self._slope, self._outputs, tangent, retain_graph=True, materialize_grads=True)
        return product

    def _pull(self, u: Sequence[Tensor], create_graph: bool = False, ends: int | None = None) -> list[Tensor]:
        """The sum of J^T u of the outputs and, if their u are given, of the hidden states."""
        pulled = torch.autograd.grad(
            self._ends[:ends],
            self._parameters,
            u,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(pulled)
