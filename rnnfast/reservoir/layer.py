"""A reservoir with its readout as a torch module that autograd goes through.

Dims: T steps, B sequences, I inputs, H reservoir units, O outputs, Z features = 1 + I + H.

What runs through time are two torch.library ops, `rnnfast::reservoir` forward and `rnnfast::reservoir_back` backward:
what traces (torch.compile, torch.export, fake tensors) sees these with tensors alone, no addresses. Dynamo leaves the
autograd node as one function in its graph, and AOTAutograd traces that. Plain tensors go straight to the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.utils import unwrap_dead_wrappers

from rnnfast._backends import schema
from rnnfast.reservoir.bank import DTYPES, Bank, Inputs, Matrix
from rnnfast.reservoir.guard import fork_safe, plain
from rnnfast.reservoir.network import Network


class EchoStateLayer(nn.Module):
    """y_t = W_out [1, x_t, h_t] with h_t = (1-a) h_{t-1} + a f(W_in x_t + W h_{t-1} + b), differentiable in x, h_0 and
    all weights. Made by `EchoState.module`. On the CPU, in float32 or float64; what comes in has the weights' dtype.

    The forward pass is the fused one. The backward pass walks back through time in torch, one product with W (H,H) a
    step; weight gradients are one product each over all steps. Differentiable any number of times in reverse mode;
    forward mode is an error. torch.compile and torch.export take the layer whole, torch.func.vmap adds the mapped
    dimension to the batch. In a forked child it runs on one thread; the backward pass also has operators of torch's
    own, which hang there unless `torch.set_num_threads(1)` comes first.

    Parameters: `w_in` (H,I), `w` (H,H), `bias` (H), which do not require a gradient until told to
    (`layer.requires_grad_()`), and `w_out` (O,Z), which does. A sparse W becomes dense, zeros included: mask its
    gradient if they have to stay.
    """

    w_in: nn.Parameter
    w: nn.Parameter
    bias: nn.Parameter

    def __init__(self, network: Network) -> None:
        super().__init__()
        dtype = DTYPES[network.dtype]
        W = network.W_ if not hasattr(network.W_, "toarray") else network.W_.toarray()
        self.leak, self.unit = float(network.leak), network.unit
        for name, value in (("w_in", network.W_in_), ("w", W), ("bias", network.bias_)):
            weight = torch.tensor(value, dtype=dtype, device="cpu")
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
        self.w_out = nn.Parameter(torch.tensor(network.W_out_, dtype=dtype, device="cpu"))

    def extra_repr(self) -> str:
        H, I = self.w_in.shape  # noqa: E741
        return f"{I}, {H}, {self.w_out.shape[0]}, leak={self.leak}, unit={self.unit!r}"

    def states(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        """h (B,T,H) or (T,H) for x (B,T,I) or (T,I), from h0 (B,H) or (H), default 0.

        Raises:
            ValueError: shapes that do not fit.
            RuntimeError: no step, another dtype or device than the weights', or one that there are no kernels for.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        weights = self.w_in, self.w, self.bias
        H, I = weights[0].shape  # noqa: E741
        if x.dim() not in (2, 3) or x.shape[-1] != I:
            raise ValueError(f"x: expected shape (T,{I}) or (B,T,{I}), got {tuple(x.shape)}")
        if x.shape[-2] == 0:
            raise RuntimeError(f"x: expected at least one step, got shape {tuple(x.shape)}")
        shape = (*x.shape[:-2], H)
        h0 = weights[1].new_zeros(shape) if h0 is None else h0
        if h0.shape != shape:
            raise ValueError(f"h0: expected shape {shape}, got {tuple(h0.shape)}")
        if torch.is_autocast_enabled("cpu"):  # the reservoir keeps its precision, as states of other layers do
            x, h0 = (t.to(weights[1].dtype) if t.is_floating_point() else t for t in (x, h0))
        _check(x, h0, *weights)
        run = _states_in_graph if torch.compiler.is_dynamo_compiling() else _States.apply
        if x.dim() == 2:
            return run(x[None], h0[None], *weights, self.leak, self.unit)[0]
        return run(x, h0, *weights, self.leak, self.unit)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B,T,O) or (T,O), and h after the last step (B,H) or (H), for x and h0 as in `states`."""
        with nullcontext() if torch.compiler.is_compiling() else fork_safe():
            h = self.states(x, h0)
            y = nn.functional.linear(torch.cat([x.to(h.dtype), h], -1), self.w_out[:, 1:], self.w_out[:, 0])
            return y, h.select(-2, -1)


def _check(x: Tensor, h0: Tensor, w_in: Tensor, w: Tensor, bias: Tensor) -> None:
    dtype, device = w.dtype, w.device
    for name, tensor in (("x", x), ("h0", h0), ("w_in", w_in), ("bias", bias)):
        if tensor.dtype != dtype or tensor.device != device:
            raise RuntimeError(
                f"{name}: expected a tensor like w, {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
            )
    if dtype not in DTYPES.values() or device.type not in ("cpu", "meta"):
        raise RuntimeError(f"EchoStateLayer: expected float32 or float64 on the CPU, got {dtype} on {device}")


class _States(torch.autograd.Function):
    """h (B,T,H) from x (B,T,I), h0 (B,H), w_in (H,I), w (H,H), bias (H)."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without torch's search for default arguments, as long as a short call, where no transform needs it."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        run = _run if x.is_cpu and not schema.is_traced(x) else torch.ops.rnnfast.reservoir
        return run(x, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, h0, w_in, w, _, ctx.leak, ctx.unit = inputs
        ctx.save_for_backward(x, h0, w_in, w, output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, h0, w_in, w, h = ctx.saved_tensors
        a = ctx.leak
        recorded = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        plainly = recorded or (dh.is_cpu and not schema.is_traced(dh))  # the op has no derivative
        walk_back = _walk_back if plainly else torch.ops.rnnfast.reservoir_back
        with plain():
            before = torch.cat([h0[:, None], h[:, :-1]], 1)  # (B,T,H) h_{t-1}
            gate = a * _slope(ctx.unit, (h - (1 - a) * before) / a)  # (B,T,H) dh_t / dz_t
            dz, dh0 = walk_back(dh, gate, w, a)
            needs = ctx.needs_input_grad
            rows = dz.flatten(0, 1)  # (B*T,H)
            return (
                dz @ w_in if needs[0] else None,
                dh0 if needs[1] else None,
                rows.mT @ x.flatten(0, 1) if needs[2] else None,
                rows.mT @ before.flatten(0, 1) if needs[3] else None,
                rows.sum(0) if needs[4] else None,
                None,
                None,
            )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        """The mapped dimension joins the batch where the weights are shared; else one by one."""
        K, tensors, rest = info.batch_size, args[:5], args[5:]
        pairs = list(zip(tensors, in_dims[:5], strict=True))
        if any(dim is not None for dim in in_dims[2:5]):
            each = ([t if dim is None else t.select(dim, k) for t, dim in pairs] for k in range(K))
            return torch.stack([_States.apply(*some, *rest) for some in each]), 0
        x, h0 = (t.expand(K, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs[:2])
        h = _States.apply(x.flatten(0, 1), h0.flatten(0, 1), *tensors[2:], *rest)
        return h.unflatten(0, x.shape[:2]), 0


@torch.compiler.allow_in_graph
def _states_in_graph(*args):
    return _States.apply(*args)


def _walk_back(dh: Tensor, gate: Tensor, w: Tensor, leak: float) -> tuple[Tensor, Tensor]:
    """dL/dz_t (B,T,H) and dL/dh_0 (B,H) from dh (B,T,H), what h_t gets from outside, and gate (B,T,H)."""
    dz, carried = [], torch.zeros_like(gate[:, 0])  # dL/dh_t through the steps after t
    for t in reversed(range(gate.shape[1])):
        total = dh[:, t] + carried
        dz.append(gate[:, t] * total)
        carried = torch.addmm(total, dz[-1], w, beta=1 - leak)
    return torch.stack(dz[::-1], 1), carried


def _slope(unit: str, f: Tensor) -> Tensor:
    """df/dz from f(z)."""
    if unit == "tanh":
        return 1 - f * f
    return (f > 0).to(f.dtype) if unit == "relu" else torch.ones_like(f)


# --- ops --------------------------------------------------------------------------------------------------------------


def _run(x: Tensor, h0: Tensor, w_in: Tensor, w: Tensor, bias: Tensor, leak: float, unit: str) -> Tensor:
    with plain():
        W, W_in, b = (weight.detach().resolve_neg().numpy() for weight in (w, w_in, bias))
        bank = Bank(unit, x.dtype, [Matrix(W, None)], [Inputs(W_in, b, leak, 1.0)])
        h = x.new_empty(1, *x.shape[:2], len(w))
        bank.drive(x, h0[None].clone(memory_format=torch.contiguous_format), h)
        return h[0]


def _run_fake(x: Tensor, h0: Tensor, w_in: Tensor, w: Tensor, bias: Tensor, leak: float, unit: str) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[0])


def _run_back(dh: Tensor, gate: Tensor, w: Tensor, leak: float) -> tuple[Tensor, Tensor]:
    with plain():
        return _walk_back(dh, gate, w, leak)


def _run_back_fake(dh: Tensor, gate: Tensor, w: Tensor, leak: float) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], gate.shape[2])


_library = torch.library.Library("rnnfast", "FRAGMENT")
_WEIGHTS = "Tensor w_in, Tensor w, Tensor bias"
_OPS: dict[str, tuple[str, Callable, Callable]] = {
    "reservoir": (f"(Tensor x, Tensor h0, {_WEIGHTS}, float leak, str unit) -> Tensor", _run, _run_fake),
    "reservoir_back": (
        "(Tensor dh, Tensor gate, Tensor w, float leak) -> (Tensor, Tensor)",
        _run_back,
        _run_back_fake,
    ),
}
for _name, (_schema, _kernel, _fake) in _OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"rnnfast::{_name}", _fake, lib=_library)
