"""The nodes of the autograd graph: what is saved, what is differentiable.

One call runs a whole stack of layers and directions, and is one node of the graph. In eager mode the node is
`Forward`; its derivatives are nodes of their own, each one call of `rnnfast._backends.cpu`:

    Forward   outputs(inputs)                               reverse: Backward   forward mode: Tangent
    Backward  gradients(inputs, cotangents), linear in the latter   both modes: Second; reverse also in two halves
    Tangent   tangent outputs(inputs, tangents), linear in the latter   reverse: Second, Backward
    Second    second derivatives; the last that has a kernel

Derivatives that have no kernel, those of Second and of Tangent along the inputs, are torch's own, of the same node
written in torch's operators (`composite.py`); so they can be differentiated and transformed any number of times.

Double backward goes through Backward and through Forward in any case, since cotangents come from outputs. So
Backward gives the gradients of its own arguments, of what Forward gave and kept among them, and one pass of Forward
carries all of it to the inputs. Where the second derivative is differentiated or transformed itself, and on a GPU,
Second gives gradients of the inputs at once.

Under vmap the mapped dimension joins the batch, and `groups` keeps the weight gradients of the samples apart; under
torch's older vmap, too, which runs these nodes for torch.autograd.grad(is_grads_batched=True) and for
torch.autograd.functional (vectorize=True). Dynamo (torch.compile) refuses a Function with a `jvp` of its own, so there
the whole call is one opaque function of its graph, and AOTAutograd traces the nodes; what they call are the
torch.library ops of `rnnfast._backends.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast._autograd.levels import Node, asked_for, is_recorded, is_transformed
from rnnfast._autograd.vmap import Kind, vmap_rule
from rnnfast._backends import composite, schema, sweeps
from rnnfast._backends.types import Constants, Inputs, Past, SomeInputs, SomeOutputs, Stack, present
from rnnfast.fallback import warn_once


class Spec(NamedTuple):
    """Constants of a derivative node: which gradients it gives, for how many groups of sequences, and (`Backward`)
    whether it keeps what it carried through time for its own derivative."""

    stack: Stack
    wanted_first: tuple[bool, ...] = ()
    wanted_plain: tuple[bool, ...] = ()
    groups: int = 1
    keep: bool = False

    @property
    def n(self) -> int:
        """How many inputs there are."""
        return len(self.wanted_plain)

    @property
    def input_kinds(self) -> list[Kind]:
        return _input_kinds(self.n)


def _input_kinds(n: int) -> list[Kind]:
    return [Kind.ROWS, Kind.STATE, Kind.STATE, *[Kind.WEIGHT] * (n - 3)]


def _output_kinds(stack: Stack) -> list[Kind]:
    return [Kind.ROWS, Kind.STATE, Kind.STATE] if stack.has_c else [Kind.ROWS, Kind.STATE]


_CONSTANT_KINDS = [Kind.BATCH_SIZES, Kind.DROPOUT, Kind.ROWS]
_PAST_KINDS = [*_CONSTANT_KINDS, Kind.ROWS, Kind.RESERVE]
_COTANGENT_KINDS = [Kind.ROWS, Kind.STATE, Kind.STATE]
_C = len(_CONSTANT_KINDS)  # batch_sizes, dropout, resets
_P = len(_PAST_KINDS)  # these, y and reserve
_NO_COTANGENTS = SomeOutputs(None, None, None)


def _past(stack: Stack, past: Sequence[Any], inputs: Iterable[Tensor]) -> Past:
    return Past(stack, Inputs.of(inputs), Constants(*past[:_C]), *past[_C:])


def _wanted(flags: Sequence[bool], some: Any) -> list[Any]:
    """Puts what was given for the wanted ones back in its places."""
    values = iter(some)
    return [next(values) if flag else None for flag in flags]


def _only(flags: Sequence[bool], values: Any) -> list[Any]:
    return [value for flag, value in zip(flags, values, strict=True) if flag]


def _where(flags: Sequence[bool], values: Any) -> list[Any]:
    """None where a flag is not set."""
    return [value if flag else None for flag, value in zip(flags, values, strict=True)]


def _chosen(wanted: Any, grads: Any) -> list[Any]:
    """Of each set of gradients the wanted ones."""
    return [g for flags, some in zip(wanted, grads, strict=True) for g in _only(flags, some.flat())]


def _all_none(values: Any) -> bool:
    return all(value is None for value in values)


def _save_all(ctx, inputs: tuple) -> None:
    """Saves every tensor argument, for both modes."""
    spec, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.spec = spec


class Forward(Node):
    """(stack, *constants, x, h0, c0, *weights) -> y, h_n, c_n if there is c, reserve."""

    @staticmethod
    def forward(stack, *args):
        outputs, reserve = schema.forward(stack, Inputs.of(args[_C:]), Constants(*args[:_C]), keep=True)
        return *present(outputs), reserve

    @staticmethod
    def setup_context(ctx, inputs, output):
        stack, *args = inputs
        y, *_, reserve = output
        if is_transformed():
            ctx.mark_non_differentiable(reserve)  # it has no tangent
        ctx.set_materialize_grads(False)
        saved = *args[:_C], y, reserve, *args[_C:]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.stack = stack

    @staticmethod
    def backward(ctx, *cotangents):
        *cotangents, d_reserve = cotangents
        wanted = ctx.needs_input_grad[1 + _C :]
        if _all_none((*cotangents, d_reserve)):
            return (None,) * len(ctx.needs_input_grad)
        cotangents, saved = SomeOutputs.of(cotangents), ctx.saved_tensors
        past, inputs = saved[:_P], saved[_P:]
        if is_recorded():
            y, reserve = past[_C:]
            keep = reserve.requires_grad and not is_transformed() and schema.is_fused(y)
            some = Backward.apply(Spec(ctx.stack, wanted_plain=wanted, keep=keep), *past, *cotangents, *inputs)
            grads = _wanted(wanted, some)
        elif d_reserve is None:
            grads = schema.backward(_past(ctx.stack, past, inputs), cotangents, wanted).flat()
        else:
            grads = schema.backward_saved(_past(ctx.stack, past, inputs), cotangents, d_reserve, wanted).flat()
        return *(None,) * (1 + _C), *grads

    @staticmethod
    def jvp(ctx, *tangents):
        saved = ctx.saved_tensors
        past, inputs = saved[:_P], saved[_P:]
        spec = Spec(ctx.stack, wanted_plain=(True,) * len(inputs))
        return *Tangent.apply(spec, *past, *tangents[1 + _C :], *inputs), None

    @staticmethod
    def vmap(info, in_dims, stack, *tensors):
        kinds = [*_CONSTANT_KINDS, *_input_kinds(len(tensors) - _C)]
        return vmap_rule(Forward, info, in_dims, stack, tensors, kinds, [*_output_kinds(stack), Kind.RESERVE])


def is_forward(node: Any) -> bool:
    """Is this node of the autograd graph a call of `op.recurrent`? `past_of` tells which."""
    return isinstance(node, Forward._backward_cls)  # type: ignore[attr-defined]


def past_of(node: Any) -> Past:
    """The finished call behind a node that `is_forward`."""
    saved = node.saved_tensors
    return _past(node.stack, saved[:_P], saved[_P:])


def _forward_again(spec: Spec, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """y and the reserve of the constants at the start of a node's tensors and the inputs at their end."""
    with torch.no_grad():
        y, *_, reserve = Forward.apply(spec.stack, *tensors[:_C], *tensors[-spec.n :])
    return y, reserve


class _Derivative(Node):
    """(spec, *constants, y, reserve, ...): what a derivative of `Forward` begins with."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_all(ctx, inputs)


class Backward(_Derivative):
    """(spec, *past, dy, dh_n, dc_n, x, h0, c0, *weights) -> the wanted gradients, and if spec.keep what the pass
    carried through time."""

    @staticmethod
    def forward(spec, *tensors):
        past, cotangents, inputs = tensors[:_P], tensors[_P : _P + 3], tensors[_P + 3 :]
        past, cotangents = _past(spec.stack, past, inputs), SomeOutputs(*cotangents)
        if spec.keep:
            grads, adjoints = schema.backward_adjoints(past, cotangents, spec.wanted_plain)
            return *_only(spec.wanted_plain, grads.flat()), adjoints
        grads = schema.backward(past, cotangents, spec.wanted_plain, spec.groups)
        return tuple(_only(spec.wanted_plain, grads.flat()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_all(ctx, inputs)
        if ctx.spec.keep:
            ctx.mark_non_differentiable(output[-1])
            ctx.save_for_backward(*inputs[1:], output[-1])

    @staticmethod
    def backward(ctx, *tangents):
        """Gradients of <gradients, tangents>: the tangent outputs for dy, second derivatives for the inputs."""
        spec, n = ctx.spec, ctx.spec.n
        if _all_none(tangents):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        past, cotangents, inputs = saved[:_P], saved[_P : _P + 3], saved[_P + 3 : _P + 3 + n]
        tangents = _wanted(spec.wanted_plain, tangents)
        needed = ctx.needs_input_grad[1 + _P :]
        wanted = needed[3:]
        if any(wanted) and spec.keep and not is_recorded():
            return Backward.backward_local(spec, saved, tangents, needed)
        if any(wanted):
            second = Spec(spec.stack, (False,) * n, wanted)
            some = Second.apply(second, *past, *cotangents, *_NO_COTANGENTS, *tangents, *inputs)
        else:
            some = Tangent.apply(Spec(spec.stack, wanted_plain=spec.wanted_plain), *past, *tangents, *inputs)
        m = len(_output_kinds(spec.stack))
        return *(None,) * (1 + _P), *_where(needed[:3], SomeOutputs.of(some[:m])), *_wanted(wanted, some[m:])

    @staticmethod
    def backward_local(spec, saved, tangents, needed):
        """The same in two halves, of which this is the first: what y and the reserve get here, `Forward` carries on to
        the inputs, in the one backward pass that it makes anyhow where the cotangents depend on y."""
        *rest, adjoints = saved
        past = _past(spec.stack, rest[:_P], rest[-spec.n :])
        outputs, grads, d_saved = schema.second_local(past, adjoints, SomeInputs.of(tangents), needed[3:])
        return *(None,) * (1 + _C), *d_saved, *_where(needed[:3], outputs), *grads.flat()

    @staticmethod
    def jvp(ctx, *tangents):
        spec, saved, tangents = ctx.spec, ctx.saved_tensors, tangents[1 + _P :]
        past, cotangents, inputs = saved[:_P], saved[_P : _P + 3], saved[_P + 3 :]
        cotangents_dot, inputs_dot = tangents[:3], tangents[3:]
        if _all_none(inputs_dot):
            return Backward.apply(spec, *past, *cotangents_dot, *inputs)
        second = Spec(spec.stack, (False,) * len(inputs), spec.wanted_plain)
        some = Second.apply(second, *past, *cotangents, *cotangents_dot, *inputs_dot, *inputs)
        return some[len(_output_kinds(spec.stack)) :]

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = [*_PAST_KINDS, *_COTANGENT_KINDS, *spec.input_kinds]
        kinds_out = _only(spec.wanted_plain, spec.input_kinds)
        return vmap_rule(Backward, info, in_dims, spec, tensors, kinds, kinds_out, _forward_again)


class Tangent(_Derivative):
    """(spec, *past, *tangents like inputs, x, h0, c0, *weights) -> tangent outputs."""

    @staticmethod
    def forward(spec, *tensors):
        past, tangents, inputs = tensors[:_P], tensors[_P : _P + spec.n], tensors[_P + spec.n :]
        return present(schema.tangent(_past(spec.stack, past, inputs), SomeInputs.of(tangents)))

    @staticmethod
    def backward(ctx, *cotangents):
        spec, n, saved = ctx.spec, ctx.spec.n, ctx.saved_tensors
        past, tangents, inputs = saved[:_P], saved[_P : _P + n], saved[_P + n :]
        needed = ctx.needs_input_grad[1 + _P :]
        wanted_first, wanted = needed[:n], needed[n:]
        if _all_none(cotangents):
            return (None,) * len(ctx.needs_input_grad)
        cotangents = SomeOutputs.of(cotangents)
        if any(wanted):
            second = Spec(spec.stack, wanted_first, wanted)
            some = Second.apply(second, *past, *cotangents, *_NO_COTANGENTS, *tangents, *inputs)
            grads = some[len(_output_kinds(spec.stack)) :]
        else:
            grads = Backward.apply(Spec(spec.stack, wanted_plain=wanted_first), *past, *cotangents, *inputs)
        return *(None,) * (1 + _P), *_wanted(needed, grads)

    @staticmethod
    def jvp(ctx, *tangents):
        spec, n, saved, tangents = ctx.spec, ctx.spec.n, ctx.saved_tensors, tangents[1 + _P :]
        if not _all_none(tangents[n:]):
            return _tangents_by_composite(Tangent, spec, saved, tangents)
        return Tangent.apply(spec, *saved[:_P], *tangents[:n], *saved[_P + n :])

    @staticmethod
    def composite(spec, constants, *both):
        inputs, tangents = Inputs.of(both[spec.n :]), SomeInputs.of(both[: spec.n])
        return present(composite.with_tangents(spec.stack, inputs, tangents, constants)[1])

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = [*_PAST_KINDS, *spec.input_kinds, *spec.input_kinds]
        return vmap_rule(Tangent, info, in_dims, spec, tensors, kinds, _output_kinds(spec.stack), _forward_again)


class Second(_Derivative):
    """(spec, *past, *first, *plain, *tangents, x, h0, c0, *weights), see Backend.second, -> tangent outputs, the wanted
    gradients with respect to the tangents, those with respect to the inputs."""

    @staticmethod
    def forward(spec, *tensors):
        past, rest, inputs = tensors[:_P], tensors[_P : -spec.n], tensors[-spec.n :]
        first, plain, tangents = SomeOutputs(*rest[:3]), SomeOutputs(*rest[3:6]), SomeInputs.of(rest[6:])
        wanted = spec.wanted_first, spec.wanted_plain
        past = _past(spec.stack, past, inputs)
        outputs, *grads = schema.second(past, tangents, first, plain, *wanted, spec.groups)
        return *present(outputs), *_chosen(wanted, grads)

    @staticmethod
    def backward(ctx, *cotangents):
        """By a kernel as far as it is linear: in `tangents` and `plain`, what Hessian-vector products ask for."""
        spec, n, saved = ctx.spec, ctx.spec.n, ctx.saved_tensors
        wanted = asked_for(ctx, saved)[_P:]
        if _all_none(cotangents) or not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        if any(wanted[:3]) or any(wanted[6 + n :]):
            return *(None,) * (1 + _P), *_gradients_by_composite(Second, spec, saved, cotangents, wanted)
        m = len(_output_kinds(spec.stack))
        past, first, inputs = saved[:_P], saved[_P : _P + 3], saved[_P + 6 + n :]
        along = _wanted(spec.wanted_plain, cotangents[m + sum(spec.wanted_first) :])
        second = Spec(spec.stack, (False,) * n, tuple(wanted[6 : 6 + n]))
        some = Second.apply(second, *past, *first, *SomeOutputs.of(cotangents[:m]), *along, *inputs)
        for_plain = _where(wanted[3:6], SomeOutputs.of(some[:m]))
        return *(None,) * (1 + _P + 3), *for_plain, *_wanted(second.wanted_plain, some[m:]), *(None,) * n

    @staticmethod
    def jvp(ctx, *tangents):
        return _tangents_by_composite(Second, ctx.spec, ctx.saved_tensors, tangents[1 + _P :])

    @staticmethod
    def composite(spec, constants, *rest):
        n, wanted = spec.n, (spec.wanted_first, spec.wanted_plain)
        first, plain, both = SomeOutputs(*rest[:3]), SomeOutputs(*rest[3:6]), rest[6:]
        inputs, tangents = Inputs.of(both[n:]), SomeInputs.of(both[:n])
        outputs, *grads = composite.second(spec.stack, inputs, tangents, constants, first, plain, *wanted)
        return *present(outputs), *_chosen(wanted, grads)

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = spec.input_kinds
        kinds_in = [*_PAST_KINDS, *_COTANGENT_KINDS, *_COTANGENT_KINDS, *kinds, *kinds]
        kinds_out = [*_output_kinds(spec.stack), *_only(spec.wanted_first, kinds), *_only(spec.wanted_plain, kinds)]
        return vmap_rule(Second, info, in_dims, spec, tensors, kinds_in, kinds_out, _forward_again)


# --- derivatives without a kernel -------------------------------------------------------------------------------------
#
# are torch's, of the node's `composite`: what it computes from its arguments after `past`, in torch's operators.


def _composite_at(node: Any, spec: Spec, saved: Any, chosen: Sequence[bool]) -> tuple[Callable, list[Tensor]]:
    """The composite as a function of the chosen arguments, and the values of these."""
    warn_once("forward mode over forward mode" if node is Tangent else "third derivatives")
    constants, given = Constants(*saved[:_C]), saved[_P:]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        values = iter(some)
        args = [next(values) if flag else arg for flag, arg in zip(chosen, given, strict=True)]
        return node.composite(spec, constants, *args)

    return function, _only(chosen, given)


def _gradients_by_composite(
    node: Any, spec: Spec, saved: Any, cotangents: Any, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of the arguments after `past` those that are wanted."""
    function, at = _composite_at(node, spec, saved, wanted)
    needed = [d is not None for d in cotangents]
    with sweeps.undisturbed(at[0].device):
        _, pull, *_ = torch.func.vjp(lambda *some: tuple(_only(needed, function(*some))), *at)
        return _wanted(wanted, pull(present(cotangents)))


def _tangents_by_composite(node: Any, spec: Spec, saved: Any, tangents: Any) -> tuple[Tensor, ...]:
    """Along the tangents of the arguments after `past`."""
    function, at = _composite_at(node, spec, saved, [v is not None for v in tangents])
    with sweeps.undisturbed(at[0].device):
        return composite.push_forward(function, at, present(tangents))[1]
