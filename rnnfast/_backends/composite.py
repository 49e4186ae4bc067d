"""A stack of recurrent layers in torch's own operators, and its derivatives: where no kernel is.

`forward` is plain torch that can be differentiated and transformed any number of times; `with_tangents` and `second`
are its derivatives by torch.func, in the form in which a Backend gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends.sweeps import Step, steps_of, undisturbed
from rnnfast._backends.types import Constants, Inputs, Outputs, SomeInputs, SomeOutputs, Stack


class Trace(NamedTuple):
    """What stays inside a forward pass."""

    z: Tensor  # (L,D,N,G,H) pre-activations
    c: Tensor | None  # (L,D,N,H)
    hidden: Tensor  # (L-1,N,D*R) outputs of the layers below the top, before dropout


def forward(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, Tensor]:
    """Outputs, and the pre-activations (L,D,N,G,H)."""
    outputs, trace = trace_of(stack, inputs, constants)
    return outputs, trace.z


def trace_of(stack: Stack, inputs: Inputs, constants: Constants) -> tuple[Outputs, Trace]:
    """Outputs, and what stays inside."""
    x = inputs.x.flatten(0, -2)  # (N,I)
    counts = _counts(inputs.x, constants.batch_sizes)
    resets = None if constants.resets is None else constants.resets.flatten()
    orders = [steps_of(counts, resets, d == 1) for d in range(stack.D)]
    done: list[_Done] = []
    layers: list[Tensor] = []
    for layer in range(stack.L):
        ways = [_Way(stack, inputs, layer, d, counts[0]).run(x, orders[d]) for d in range(stack.D)]
        done += ways
        layers.append(torch.cat([way.y for way in ways], 1))
        x = layers[-1]
        if constants.dropout is not None and layer < stack.L - 1:
            x = x * constants.dropout[layer].flatten(0, -2)

    def stacked(some: list[Tensor]) -> Tensor:
        return torch.stack(some).unflatten(0, (stack.L, stack.D))

    c_n, c = [way.c for way in done if way.c is not None], [way.cs for way in done if way.cs is not None]
    outputs = Outputs(
        x.reshape(*inputs.x.shape[:-1], x.size(-1)),
        torch.stack([way.h for way in done]),
        torch.stack(c_n) if c_n else None,
    )
    hidden = torch.stack(layers[:-1]) if stack.L > 1 else x.new_empty((0, *x.shape))
    return outputs, Trace(stacked([way.z for way in done]), stacked(c) if c else None, hidden)


class _Done(NamedTuple):
    """One layer and direction: all outputs and pre-activations, the last states."""

    y: Tensor  # (N,R)
    z: Tensor  # (N,G,H)
    h: Tensor  # (B,R)
    c: Tensor | None  # (B,H)
    cs: Tensor | None  # (N,H) all of them


class _Way:
    """One layer's way through time in one direction."""

    def __init__(self, stack: Stack, inputs: Inputs, layer: int, d: int, B: int) -> None:
        i, each, cell = layer * stack.D + d, stack.weights_each(inputs.weights), stack.cell
        w_ih, w_hh, *rest = inputs.weights[i * each : (i + 1) * each]
        self.cell = cell
        self.w_ih, self.w_hh = cell.to_slots(w_ih, cell.input), cell.to_slots(w_hh, cell.recurrent)  # (g,H,I), (g,H,R)
        self.b_ih: Tensor | None = rest[0] if stack.bias else None
        self.b_hh: Tensor | None = rest[1] if stack.bias else None
        self.H, R, P = stack.units(inputs.weights)
        self.w_hr = rest[-1] if P else None
        self.unit = rest[-1] if cell.unit_parameters else None
        new_zeros = inputs.x.new_zeros
        self.h0 = new_zeros((B, R)) if inputs.h0 is None else inputs.h0[i]
        self.c0: Tensor | None = None
        if cell.has_c:
            self.c0 = new_zeros((B, self.H)) if inputs.c0 is None else inputs.c0[i]

    def _product(self, x: Tensor, w: Tensor, b: Tensor | None, slots: slice) -> Tensor:
        """(n,g,H)"""
        z = (x @ w.flatten(0, 1).T).unflatten(1, w.shape[:2])
        return z if b is None else z + self.cell.to_slots(b, slots)

    def run(self, x: Tensor, steps: list[Step]) -> _Done:
        """x (N,I)"""
        cell = self.cell
        zx = self._product(x, self.w_ih, self.b_ih, cell.input)
        h, c = self.h0, self.c0
        y, zs, cs = _lists(3)
        for step in steps:
            h_prev = step.before(h, self.h0)
            zh = self._product(h_prev, self.w_hh, self.b_hh, cell.recurrent)
            z = cell.pre_activations(zx[step.rows], zh)
            gates = cell.activate(z)
            state = h_prev if cell.carries_h else None if c is None else step.before(c, self.c0)
            state = cell.carry(gates, state, self.unit)
            one = cell.output(gates, state)
            one = one if self.w_hr is None else one @ self.w_hr.T
            h = _put_first(one, h)
            if c is not None and state is not None:
                c = _put_first(state, c)
                cs.append(state)
            y.append(one)
            zs.append(z)
        order = -1 if steps[0].rows.start else 1
        return _Done(torch.cat(y[::order]), torch.cat(zs[::order]), h, c, torch.cat(cs[::order]) if cs else None)


def push_forward(
    function: Callable[..., tuple[Tensor, ...]], at: Sequence[Tensor], along: Iterable[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of the function, and their derivative along a direction: the transpose of the gradients, which are linear
    in the cotangents. (torch.func.jvp refuses to run within torch.autograd.forward_ad.)"""
    results, pull, *_ = torch.func.vjp(function, *at)
    _, push, *_ = torch.func.vjp(lambda *cotangents: pull(cotangents), *map(torch.zeros_like, results))
    return results, push(tuple(along))


def with_tangents(
    stack: Stack, inputs: Inputs, tangents: SomeInputs, constants: Constants
) -> tuple[Outputs, Outputs, Tensor]:
    """Outputs, their derivative along `tangents` (None: zeros), that of the pre-activations (L,D,N,G,H)."""
    flat, moved = inputs.flat(), [v is not None for v in tangents.flat()]

    def run(*some: Tensor) -> tuple[Tensor, ...]:
        here = Inputs.of(_placed(moved, some, flat))  # type: ignore[arg-type]
        outputs, z = forward(stack, here, constants)
        return *(t for t in outputs if t is not None), z

    at = [t for t, flag in zip(flat, moved, strict=True) if flag and t is not None]
    along = [v for v in tangents.flat() if v is not None]
    with undisturbed(inputs.x.device):
        (*outputs, _), (*outputs_dot, z_dot) = push_forward(run, at, along)
    return Outputs.of(outputs), Outputs.of(outputs_dot), z_dot


def second(
    stack: Stack,
    inputs: Inputs,
    tangents: SomeInputs,
    constants: Constants,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See Backend.second."""
    n, at = len(inputs.flat()), inputs.flat()
    triples = zip(tangents.flat(), at, wanted_first, strict=True)
    both = [torch.zeros_like(t) if v is None and want and t is not None else v for v, t, want in triples] + at
    chosen = [want and t is not None for want, t in zip((*wanted_first, *wanted_plain), both, strict=True)]

    def number(*some: Tensor) -> tuple[Tensor, list[Tensor]]:
        """<first, tangent outputs> + <plain, outputs>, and the tangent outputs themselves."""
        values = _placed(chosen, some, both)
        along, here = SomeInputs.of(values[:n]), Inputs.of(values[n:])  # type: ignore[arg-type]
        outputs, outputs_dot, _ = with_tangents(stack, here, along, constants)
        pairs = zip((*first, *plain), (*outputs_dot, *outputs), strict=True)
        products = [(d * o).sum() for d, o in pairs if d is not None and o is not None]
        return sum(products, inputs.x.new_zeros(())), [o for o in outputs_dot if o is not None]

    given = [t for t, flag in zip(both, chosen, strict=True) if flag]
    with undisturbed(inputs.x.device):
        S, pull, outputs_dot = torch.func.vjp(number, *given, has_aux=True)  # type: ignore[misc]  # aux is the third
        grads = _placed(chosen, pull(torch.ones_like(S)), [None] * len(both))
    return Outputs.of(outputs_dot), SomeInputs.of(grads[:n]), SomeInputs.of(grads[n:])


def _lists(count: int) -> list[list[Tensor]]:
    return [[] for _ in range(count)]


def _placed(flags: Sequence[bool], some: Iterable[Tensor], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`some` where a flag is set, `others` elsewhere."""
    given = iter(some)
    return [next(given) if flag else other for flag, other in zip(flags, others, strict=True)]


def _counts(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """Number of sequences at each step."""
    if batch_sizes is None:
        return [x.size(1)] * x.size(0)
    counts = batch_sizes.tolist()
    if any(isinstance(n, torch.SymInt) for n in counts):
        raise NotImplementedError(
            "rnnfast: torch.compile cannot trace third derivatives, or forward mode over forward mode, of packed "
            "sequences, whose lengths it does not know. Where the weights require gradients, it traces one derivative "
            "more than was asked for. Use padded sequences, or compile something smaller."
        )
    return counts


def _put_first(some: Tensor, states: Tensor) -> Tensor:
    return some if len(states) == len(some) else torch.cat([some, states[len(some) :]])
