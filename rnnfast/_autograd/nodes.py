"""The recurrent op: what autograd sees of the kernels, what is saved, what is differentiable.

One call runs a whole stack of layers and directions, and is one node of the graph. In eager mode the node is
`_Forward`; its derivatives are nodes of their own, each one call of `rnnfast._backends.cpu`:

    _Forward   outputs(inputs)                               reverse: _Backward   forward mode: _Tangent
    _Backward  gradients(inputs, cotangents), linear in the latter   both modes: _Second; reverse also in two halves
    _Tangent   tangent outputs(inputs, tangents), linear in the latter   reverse: _Second, _Backward
    _Second    second derivatives; the last that has a kernel

Derivatives that have no kernel, those of _Second and of _Tangent along the inputs, are torch's own, of the same node
written in torch's operators (`composite.py`); so they can be differentiated and transformed any number of times.

Double backward goes through _Backward and through _Forward in any case, since cotangents come from outputs. So
_Backward gives the gradients of its own arguments, of what _Forward gave and kept among them, and one pass of _Forward
carries all of it to the inputs. Where the second derivative is differentiated or transformed itself, and on a GPU,
_Second gives gradients of the inputs at once.

Under vmap the mapped dimension joins the batch, and `groups` keeps the weight gradients of the samples apart; under
torch's older vmap, too, which runs these nodes for torch.autograd.grad(is_grads_batched=True) and for
torch.autograd.functional (vectorize=True). Dynamo (torch.compile) refuses a Function with a `jvp` of its own, so there
the whole call is one opaque function of its graph, and AOTAutograd traces the nodes; what they call are the
torch.library ops of `rnnfast._backends.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, _make_dual, _unpack_dual
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    is_legacy_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.autograd_function import VmapInfo, enable_single_level_autograd_function
from torch._functorch.pyfunctorch import (
    FunctionalizeInterpreter,
    GradInterpreter,
    JvpInterpreter,
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
)
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from rnnfast._autograd import recorded
from rnnfast._autograd.vmap import Kind, vmap_rule
from rnnfast._backends import composite, schema
from rnnfast._backends.cpu import DTYPES, Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack
from rnnfast.fallback import warn_once

__all__ = ["CELLS", "DTYPES", "recurrent"]

CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "LSTM": 2}
_observed: ContextVar[bool] = ContextVar("observed", default=False)


def recurrent(
    mode: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    has_bias: bool,
    dropout_masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of recurrent layers over a sequence.

    Args:
        mode: 'RNN_TANH', 'RNN_RELU' or 'LSTM'.
        x: (T,B,I) padded, or (N,I) packed with `batch_sizes`; float32 or float64 on the CPU, any
            strides; on a GPU also float16 and bfloat16 (`rnnfast._backends.cuda`).
        batch_sizes: (T) int64 on the CPU, not increasing, as `PackedSequence.batch_sizes`; None: padded.
        h0: (L*D,B,R), R = P if projected else H; None: zeros.
        c0: (L*D,B,H), LSTM only; None: zeros.
        weights: for each layer and direction w_ih (G*H,I), w_hh (G*H,R), b_ih (G*H), b_hh (G*H) if `has_bias`,
            w_hr (P,H) if projected, in one flat list.
        dropout_masks: (L-1,T,B,D*R) or (L-1,N,D*R), factors on the output of each layer below the top; None: ones.
            Constants: not differentiable.

    Returns:
        y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None for Elman), differentiable in x, h0, c0, weights:
        by kernels twice in reverse mode, once in forward mode, and once each in either order; beyond that by torch's
        operators, after one warning.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than the rest asks for.
    """
    stack = Stack(CELLS[mode], num_layers, 2 if bidirectional else 1, has_bias)
    run = _recurrent_in_graph if torch.compiler.is_dynamo_compiling() else _recurrent
    return run(stack, x, batch_sizes, h0, c0, weights, dropout_masks)


def _recurrent(stack: Stack, x, batch_sizes, h0, c0, weights, dropout) -> tuple[Tensor, Tensor, Tensor | None]:
    inputs, transformed = Inputs(x, h0, c0, weights), _is_transformed()
    if recorded.is_recording() and not transformed and _any_requires_grad(inputs.flat()):
        return recorded.record(stack, inputs, batch_sizes, dropout)
    if transformed and (dual := _in_forward_mode_alone(stack, inputs, batch_sizes, dropout)):
        return dual
    if transformed or _any_requires_grad(inputs.flat()):
        y, h_n, *c_n, _ = _Forward.apply(stack, batch_sizes, dropout, *inputs.flat())
        return y, h_n, c_n[0] if c_n else None
    outputs, _ = schema.forward(stack, inputs, batch_sizes, dropout, keep=False)
    return outputs.y, outputs.h_n, outputs.c_n


@torch.compiler.allow_in_graph
def _recurrent_in_graph(stack, *args):
    """What Dynamo leaves as one call in its graph; the nodes below it are traced by what comes after Dynamo."""
    return _recurrent(Stack(*stack), *args)


def _any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def leaves_mere_graph(tensors: Iterable[Tensor | None]) -> bool:
    """Will a call with these tensors be recorded by autograd, and by nobody else?"""
    return not (_is_transformed() or recorded.is_recording() or _observed.get()) and _any_requires_grad(tensors)


@contextmanager
def observed() -> Iterator[None]:
    """Calls of layers within are nodes that `is_forward_node` knows, wherever there is a kernel."""
    token = _observed.set(True)
    try:
        yield
    finally:
        _observed.reset(token)


def _is_recorded() -> bool:
    """Will the derivative that is taken now be differentiated itself?"""
    return torch.is_grad_enabled() or _is_transformed()


def _is_transformed() -> bool:
    """Is a torch.func transform, a forward-mode level or torch's older vmap active?"""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_tls_included(_OLD_VMAP_MODE)
    )


def _in_forward_mode_alone(stack: Stack, inputs: Inputs, batch_sizes, dropout) -> Outputs | None:
    """The call, if forward mode is all that is asked of it: no nodes. None if there is more to it, or less."""
    args, interpreter = [*inputs.flat(), batch_sizes, dropout], peek_interpreter_stack()
    both = None
    if interpreter is None:
        if forward_ad._current_level >= 0 and not _is_tls_included(_OLD_VMAP_MODE):
            both = _dual(stack, [_as_dual(arg) for arg in args])
    elif interpreter.key() == TransformType.Jvp:
        pairs = _on_level_below(args, interpreter.level())
        with JvpInterpreter(interpreter).lower():
            if peek_interpreter_stack() is None:
                both = _dual(stack, pairs)
    if both is None:
        return None
    y, h_n, *c_n = _make_duals(*map(_present, both))
    return Outputs(y, h_n, c_n[0] if c_n else None)


def _dual(stack: Stack, pairs: list[tuple[Any, Tensor | None]]) -> tuple[Outputs, Outputs] | None:
    """Outputs and their tangents of (*inputs, batch_sizes, dropout) and their tangents, where nobody wants a graph."""
    *flat, batch_sizes, dropout = (value for value, _ in pairs)
    inputs, tangents = _inputs(flat), _some_inputs(tangent for _, tangent in pairs[:-2])
    moved = _present(tangents.flat())
    if not moved or not schema.has_variants(inputs.x) or _any_requires_grad((*inputs.flat(), *moved)):
        return None
    if _all_none(tangents.weights):
        return schema.forward_dual(stack, inputs, batch_sizes, dropout, tangents)
    outputs, reserve = schema.forward(stack, inputs, batch_sizes, dropout, keep=True)
    assert reserve is not None
    return outputs, schema.tangent(Past(stack, inputs, batch_sizes, dropout, outputs.y, reserve), tangents)


class _Spec(NamedTuple):
    """Constants of a derivative node: which gradients it gives, for how many groups of sequences, and (`_Backward`)
    whether it keeps what it carried through time for its own derivative."""

    stack: Stack
    wanted_first: tuple[bool, ...] = ()
    wanted_plain: tuple[bool, ...] = ()
    groups: int = 1
    keep: bool = False

    @property
    def weights(self) -> int:
        return len(self.wanted_plain) - 3


def _input_kinds(weights: int) -> list[Kind]:
    return [Kind.ROWS, Kind.STATE, Kind.STATE, *[Kind.WEIGHT] * weights]


def _output_kinds(stack: Stack) -> list[Kind]:
    return [Kind.ROWS, Kind.STATE, Kind.STATE] if stack.lstm else [Kind.ROWS, Kind.STATE]


_PAST_KINDS = [Kind.BATCH_SIZES, Kind.DROPOUT, Kind.ROWS, Kind.RESERVE]
_COTANGENT_KINDS = [Kind.ROWS, Kind.STATE, Kind.STATE]


def _inputs(flat: Any) -> Inputs:
    x, h0, c0, *weights = flat
    return Inputs(x, h0, c0, weights)


def _past(stack: Stack, batch_sizes, dropout, y, reserve, inputs: Any) -> Past:
    return Past(stack, _inputs(inputs), batch_sizes, dropout, y, reserve)


def _some_inputs(flat: Any) -> SomeInputs:
    x, h0, c0, *weights = flat
    return SomeInputs(x, h0, c0, weights)


def _some_outputs(stack: Stack, some: Any) -> SomeOutputs:
    y, h_n, *c_n = some
    return SomeOutputs(y, h_n, c_n[0] if stack.lstm else None)


def _present(tensors: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t is not None)


def _wanted(flags: Sequence[bool], some: Any) -> list[Any]:
    """Puts what was given for the wanted ones back in its places."""
    values = iter(some)
    return [next(values) if flag else None for flag in flags]


def _only(flags: Sequence[bool], values: Any) -> list[Any]:
    return [value for flag, value in zip(flags, values, strict=True) if flag]


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


class _Node(torch.autograd.Function):
    """A Function whose `apply` does what torch.autograd.Function's does, without two detours of its own: in eager mode
    without a search for default arguments, which reads the signature of `forward` again at every call, for 25 µs, as
    much as a short call takes; on a level of torch.func without a new class and walks through trees of arguments, for
    450 µs."""

    @classmethod
    def apply(cls, *args):
        args = unwrap_dead_wrappers(args)
        interpreter = peek_interpreter_stack()
        if interpreter is None:
            if _is_tls_included(_OLD_VMAP_MODE) and (level := max(map(_old_vmap_level, args))):
                return _apply_old_vmap(cls, level, args)
            return super(torch.autograd.Function, cls).apply(*args)
        if interpreter.key() == TransformType.Jvp:
            return _apply_forward_mode(cls, JvpInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Grad:
            return _apply_reverse_mode(cls, GradInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Vmap:
            return _apply_vmap(cls, VmapInterpreter(interpreter), args)
        if interpreter.key() == TransformType.Functionalize:
            return _apply_functionalized(cls, FunctionalizeInterpreter(interpreter), args)
        return super().apply(*args)


def _apply_reverse_mode(node: type[_Node], interpreter: GradInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node in the graph of a level of torch.func's reverse mode, which must see no tensors but its own."""
    lift = interpreter._cptr.lift
    with enable_single_level_autograd_function():
        args = tuple(lift(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return _on_level(node).apply(*args)  # type: ignore[attr-defined]  # torch's class is not annotated


@cache
def _on_level(node: type[_Node]) -> type[_SingleLevelFunction]:
    """The Function of a node on any level: goes to the level below, and comes back."""

    def forward(*args):
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        args = [_unwrap_for_grad(arg, level) if isinstance(arg, Tensor) else arg for arg in args]
        # A Function's forward runs with both modes off; lower() restores what was asked for.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            outputs = node.apply(*args)
        return tuple(_wrap_for_grad(output, level) for output in outputs)

    functions = {"forward": forward, "setup_context": node.setup_context, "backward": node.backward}
    members = {name: staticmethod(function) for name, function in functions.items()}
    return type(node.__name__, (_SingleLevelFunction,), members)


def _apply_vmap(node: type[_Node], interpreter: VmapInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node's own rule, on the level below; what it says is mapped has a hidden dimension again."""
    level = interpreter.level()
    pairs = [_unwrap_batched(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    values, dims = tuple(value for value, _ in pairs), tuple(dim for _, dim in pairs)
    with interpreter.lower():
        if _all_none(dims):
            return node.apply(*values)
        info = VmapInfo(interpreter.batch_size(), interpreter.randomness())
        outputs, out_dims = node.vmap(info, dims, *values)
    both = zip(outputs, out_dims, strict=True)
    return tuple(output if dim is None else _add_batch_dim(output, dim, level) for output, dim in both)


def _apply_functionalized(node: type[_Node], interpreter: FunctionalizeInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node on the level below: it changes nothing in place."""
    level = FunctorchFunctionalizeAPI(interpreter)
    values: Any = level.unwrap_tensors(args)
    with level.redispatch_to_next():
        outputs = node.apply(*values)
    return level.wrap_tensors(outputs)


# torch's older vmap (torch._vmap_internals), with levels and tensors of its own, runs many cotangents or tangents at
# once for torch.autograd.grad(is_grads_batched=True), torch.autograd.functional and torch.autograd.gradcheck. It is no
# interpreter of torch.func's; a key of the dispatcher says that it is active, which the threads of the backward pass
# inherit. The nodes of the graph are below it.

_OLD_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
_is_tls_included = torch._C._dispatch_tls_is_dispatch_key_included


def _old_vmap_level(arg: Any) -> int:
    """The innermost level at which an argument is mapped; 0 if at none."""
    level = 0
    while isinstance(arg, Tensor) and is_legacy_batchedtensor(arg):
        level += 1
        arg = torch._remove_batch_dim(arg, level, 1, 0)  # does no more than add a dimension where it is not mapped
    return level


def _apply_old_vmap(node: type[_Node], level: int, args: tuple) -> tuple[Tensor, ...]:
    """The node's own rule, on the level below, as `_apply_vmap` does."""
    dims = tuple(0 if _old_vmap_level(arg) == level else None for arg in args)
    pairs = zip(args, dims, strict=True)
    values = [arg if dim is None else torch._remove_batch_dim(arg, level, 1, dim) for arg, dim in pairs]
    size = next(value.size(0) for value, dim in zip(values, dims, strict=True) if dim == 0)
    outputs, out_dims = node.vmap(VmapInfo(size, "error"), dims, *values)
    # Forward mode cannot keep a tangent whose strides, without that dimension, are not those of its value.
    both = zip(outputs, out_dims, strict=True)
    return tuple(
        output if dim is None else torch._add_batch_dim(output.movedim(dim, 0).contiguous(), 0, level)
        for output, dim in both
    )


_DUAL = 0  # the level of dual numbers, torch's only one, which Dynamo's graphs enter without forward_ad's knowledge


class _Context:
    """Of a call in torch.func's forward mode: what `setup_context` leaves for `jvp`."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Reverse mode makes contexts of its own, on the levels below."""

    mark_non_differentiable = set_materialize_grads = save_for_backward


def _as_dual(arg: Any) -> tuple[Any, Tensor | None]:
    """Value and tangent; arguments that are no tensors have none."""
    return _unpack_dual(arg, level=_DUAL) if isinstance(arg, Tensor) else (arg, None)


def _make_duals(outputs: tuple, outputs_dot: tuple) -> tuple[Tensor, ...]:
    both = zip(outputs, outputs_dot, strict=True)
    return tuple(a if a_dot is None else _make_dual(a, a_dot, level=_DUAL) for a, a_dot in both)


def _apply_forward_mode(node: type[_Node], interpreter: JvpInterpreter, args: tuple) -> tuple[Tensor, ...]:
    """The node and its tangent node, on the level below that of the transform; what has a tangent is a dual again."""
    primals, tangents = zip(*_on_level_below(args, interpreter.level()), strict=True)
    with interpreter.lower():
        outputs = node.apply(*primals)
        if _all_none(tangents):
            return outputs
        context = _Context()
        node.setup_context(context, primals, outputs)
        outputs_dot = node.jvp(context, *tangents)
    return _make_duals(outputs, outputs_dot)


def _on_level_below(args: Iterable[Any], level: int) -> list[tuple[Any, Tensor | None]]:
    """Value and tangent of what is a dual on a level of torch.func; nothing else has a tangent there."""
    return [
        (arg, None) if not isinstance(arg, Tensor) or maybe_get_level(arg) != level else _unwrapped_dual(arg, level)
        for arg in args
    ]


def _unwrapped_dual(arg: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
    value, tangent = _as_dual(arg)
    return _unwrap_for_grad(value, level), None if tangent is None else _unwrap_for_grad(tangent, level)


def _asked_for(ctx: Any, saved: Any) -> list[bool]:
    """Of each tensor that the node was given, all of them saved: does the backward pass that runs go on to it? It may
    have been asked for fewer gradients than those of what requires one, which is all that needs_input_grad says."""
    edges = iter(ctx.next_functions)  # one for each tensor
    return [arg is not None and _is_run(next(edges)[0]) for arg in saved]


def _is_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for, or nobody knows
        return True


# --- derivatives without a kernel -------------------------------------------------------------------------------------
#
# are torch's, of the node's `composite`: what it computes from its arguments after the constants, in torch's operators.

_CONSTANTS = 1 + len(_PAST_KINDS)  # spec, batch_sizes, dropout; y and reserve, which the composite finds again


def _composite_at(node: Any, spec: _Spec, saved: Any, chosen: Sequence[bool]) -> tuple[Callable, list[Tensor]]:
    """The composite as a function of the chosen arguments, and the values of these."""
    warn_once("forward mode over forward mode" if node is _Tangent else "third derivatives")
    batch_sizes, dropout, _, _, *given = saved

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        values = iter(some)
        args = [next(values) if flag else arg for flag, arg in zip(chosen, given, strict=True)]
        return node.composite(spec, batch_sizes, dropout, *args)

    return function, _only(chosen, given)


def _gradients_by_composite(
    node: Any, spec: _Spec, saved: Any, cotangents: Any, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of the arguments after the constants those that are wanted."""
    function, at = _composite_at(node, spec, saved, wanted)
    needed = [d is not None for d in cotangents]
    with composite.undisturbed(at[0].device):
        _, pull, *_ = torch.func.vjp(lambda *some: tuple(_only(needed, function(*some))), *at)
        return _wanted(wanted, pull(_present(cotangents)))


def _tangents_by_composite(node: Any, spec: _Spec, saved: Any, tangents: Any) -> tuple[Tensor, ...]:
    """Along the tangents of the arguments after the constants: the transpose of the gradients, which are linear in the
    cotangents. (torch.func.jvp refuses to run within torch.autograd.forward_ad.)"""
    function, at = _composite_at(node, spec, saved, [v is not None for v in tangents])
    with composite.undisturbed(at[0].device):
        outputs, pull, *_ = torch.func.vjp(function, *at)
        _, push, *_ = torch.func.vjp(lambda *cotangents: pull(cotangents), *map(torch.zeros_like, outputs))
        return push(_present(tangents))


class _Forward(_Node):
    @staticmethod
    def forward(stack, batch_sizes, dropout, *inputs):
        outputs, reserve = schema.forward(stack, _inputs(inputs), batch_sizes, dropout, keep=True)
        return *_present(outputs), reserve

    @staticmethod
    def setup_context(ctx, inputs, output):
        stack, batch_sizes, dropout, *inputs = inputs
        y, *_, reserve = output
        if _is_transformed():
            ctx.mark_non_differentiable(reserve)  # it has no tangent
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, dropout, y, reserve, *inputs)
        ctx.save_for_forward(batch_sizes, dropout, y, reserve, *inputs)
        ctx.stack = stack

    @staticmethod
    def backward(ctx, *cotangents):
        *cotangents, d_reserve = cotangents
        wanted = ctx.needs_input_grad[3:]
        if _all_none((*cotangents, d_reserve)):
            return (None,) * (3 + len(wanted))
        cotangents = _some_outputs(ctx.stack, cotangents)
        batch_sizes, dropout, y, reserve, *inputs = ctx.saved_tensors
        if _is_recorded():
            keep = reserve.requires_grad and not _is_transformed() and schema.has_variants(y)
            spec = _Spec(ctx.stack, wanted_plain=wanted, keep=keep)
            some = _Backward.apply(spec, batch_sizes, dropout, y, reserve, *cotangents, *inputs)
            return None, None, None, *_wanted(wanted, some)
        past = _past(ctx.stack, batch_sizes, dropout, y, reserve, inputs)
        if d_reserve is None:
            return None, None, None, *schema.backward(past, cotangents, wanted).flat()
        return None, None, None, *schema.backward_bent(past, cotangents, d_reserve, wanted).flat()

    @staticmethod
    def jvp(ctx, *tangents):
        batch_sizes, dropout, y, reserve, *inputs = ctx.saved_tensors
        spec = _Spec(ctx.stack, wanted_plain=(True,) * len(inputs))
        return *_Tangent.apply(spec, batch_sizes, dropout, y, reserve, *tangents[3:], *inputs), None

    @staticmethod
    def vmap(info, in_dims, stack, *tensors):
        kinds = [*_PAST_KINDS[:2], *_input_kinds(len(tensors) - 5)]
        return vmap_rule(_Forward, info, in_dims, stack, tensors, kinds, [*_output_kinds(stack), Kind.RESERVE])


def is_forward_node(node: Any) -> bool:
    """Is this node of the autograd graph a call of `recurrent`? Its `saved_tensors` and `stack` are `_Forward`'s."""
    return isinstance(node, _Forward._backward_cls)  # type: ignore[attr-defined]


class _Backward(_Node):
    """(spec, batch_sizes, dropout, y, reserve, dy, dh_n, dc_n, x, h0, c0, *weights) -> the wanted gradients, and if
    spec.keep what the pass carried through time."""

    @staticmethod
    def forward(spec, batch_sizes, dropout, y, reserve, dy, dh_n, dc_n, *inputs):
        past = _past(spec.stack, batch_sizes, dropout, y, reserve, inputs)
        cotangents = SomeOutputs(dy, dh_n, dc_n)
        if spec.keep:
            grads, swept = schema.backward_kept(past, cotangents, spec.wanted_plain)
            return *_only(spec.wanted_plain, grads.flat()), swept
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
        spec, n = ctx.spec, len(ctx.spec.wanted_plain)
        if _all_none(tangents):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        past, cotangents, inputs = saved[:4], saved[4:7], saved[7 : 7 + n]
        tangents = _wanted(spec.wanted_plain, tangents)
        wanted = ctx.needs_input_grad[8:]
        if any(wanted) and spec.keep and not _is_recorded():
            return _Backward.backward_local(ctx, saved, tangents)
        if any(wanted):
            second = _Spec(spec.stack, (False,) * len(wanted), wanted)
            some = _Second.apply(second, *past, *cotangents, None, None, None, *tangents, *inputs)
        else:
            some = _Tangent.apply(_Spec(spec.stack, wanted_plain=spec.wanted_plain), *past, *tangents, *inputs)
        for_cotangents = _some_outputs(spec.stack, some[: len(_output_kinds(spec.stack))])
        for_cotangents = (
            g if want else None for g, want in zip(for_cotangents, ctx.needs_input_grad[5:8], strict=True)
        )
        return *(None,) * 5, *for_cotangents, *_wanted(wanted, some[len(_output_kinds(spec.stack)) :])

    @staticmethod
    def backward_local(ctx, saved, tangents):
        """The same in two halves, of which this is the first: what y and the reserve get here, `_Forward` carries on to
        the inputs, in the one backward pass that it makes anyhow where the cotangents depend on y."""
        spec, n = ctx.spec, len(tangents)
        *rest, swept = saved
        past = _past(spec.stack, *rest[:4], rest[-n:])
        outputs, grads, bend = schema.second_local(past, swept, _some_inputs(tangents), ctx.needs_input_grad[8:])
        pairs = zip(outputs, ctx.needs_input_grad[5:8], strict=True)
        return None, None, None, *bend, *(g if want else None for g, want in pairs), *grads.flat()

    @staticmethod
    def jvp(ctx, *tangents):
        spec = ctx.spec
        saved = ctx.saved_tensors
        past, cotangents, inputs = saved[:4], saved[4:7], saved[7:]
        cotangents_dot, inputs_dot = tangents[5:8], tangents[8:]
        if _all_none(inputs_dot):
            return _Backward.apply(spec, *past, *cotangents_dot, *inputs)
        second = _Spec(spec.stack, (False,) * len(inputs), spec.wanted_plain)
        some = _Second.apply(second, *past, *cotangents, *cotangents_dot, *inputs_dot, *inputs)
        return some[len(_output_kinds(spec.stack)) :]

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = [*_PAST_KINDS, *_COTANGENT_KINDS, *_input_kinds(spec.weights)]
        return vmap_rule(
            _Backward, info, in_dims, spec, tensors, kinds, _only(spec.wanted_plain, _input_kinds(spec.weights))
        )


class _Tangent(_Node):
    """(spec, batch_sizes, dropout, y, reserve, *tangents like inputs, x, h0, c0, *weights) -> tangent outputs."""

    @staticmethod
    def forward(spec, batch_sizes, dropout, y, reserve, *both):
        n = len(spec.wanted_plain)
        past = _past(spec.stack, batch_sizes, dropout, y, reserve, both[n:])
        return _present(schema.tangent(past, _some_inputs(both[:n])))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_all(ctx, inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        spec, n = ctx.spec, len(ctx.spec.wanted_plain)
        saved = ctx.saved_tensors
        past, tangents, inputs = saved[:4], saved[4 : 4 + n], saved[4 + n :]
        wanted_first, wanted = ctx.needs_input_grad[5 : 5 + n], ctx.needs_input_grad[5 + n :]
        if _all_none(cotangents):
            return (None,) * len(ctx.needs_input_grad)
        cotangents = _some_outputs(spec.stack, cotangents)
        if any(wanted):
            second = _Spec(spec.stack, wanted_first, wanted)
            some = _Second.apply(second, *past, *cotangents, None, None, None, *tangents, *inputs)
            grads = some[len(_output_kinds(spec.stack)) :]
        else:
            grads = _Backward.apply(_Spec(spec.stack, wanted_plain=wanted_first), *past, *cotangents, *inputs)
        return *(None,) * 5, *_wanted((*wanted_first, *wanted), grads)

    @staticmethod
    def jvp(ctx, *tangents):
        spec, n, saved = ctx.spec, len(ctx.spec.wanted_plain), ctx.saved_tensors
        if not _all_none(tangents[5 + n :]):
            return _tangents_by_composite(_Tangent, spec, saved, tangents[_CONSTANTS:])
        return _Tangent.apply(spec, *saved[:4], *tangents[5 : 5 + n], *saved[4 + n :])

    @staticmethod
    def composite(spec, batch_sizes, dropout, *both):
        n = len(spec.wanted_plain)
        tangents, inputs = _some_inputs(both[:n]), _inputs(both[n:])
        return _present(composite.with_tangents(spec.stack, inputs, tangents, batch_sizes, dropout)[1])

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = [*_PAST_KINDS, *_input_kinds(spec.weights), *_input_kinds(spec.weights)]
        return vmap_rule(_Tangent, info, in_dims, spec, tensors, kinds, _output_kinds(spec.stack))


class _Second(_Node):
    """(spec, batch_sizes, dropout, y, reserve, *first, *plain, *tangents, x, h0, c0, *weights), see kernels.second,
    -> tangent outputs, the wanted gradients with respect to the tangents, those with respect to the inputs."""

    @staticmethod
    def forward(spec, batch_sizes, dropout, y, reserve, *rest):
        first, plain, both = SomeOutputs(*rest[:3]), SomeOutputs(*rest[3:6]), rest[6:]
        n = len(spec.wanted_plain)
        past = _past(spec.stack, batch_sizes, dropout, y, reserve, both[n:])
        wanted = spec.wanted_first, spec.wanted_plain
        outputs, *grads = schema.second(past, _some_inputs(both[:n]), first, plain, *wanted, spec.groups)
        return *_present(outputs), *_chosen(wanted, grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_all(ctx, inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        """By a kernel as far as it is linear: in `tangents` and `plain`, what Hessian-vector products ask for."""
        spec, n, saved = ctx.spec, len(ctx.spec.wanted_plain), ctx.saved_tensors
        wanted = _asked_for(ctx, saved)[_CONSTANTS - 1 :]
        if _all_none(cotangents) or not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        if any(wanted[:3]) or any(wanted[6 + n :]):
            return *(None,) * _CONSTANTS, *_gradients_by_composite(_Second, spec, saved, cotangents, wanted)
        m = len(_output_kinds(spec.stack))
        past, first, inputs = saved[:4], saved[4:7], saved[10 + n :]
        along = _wanted(spec.wanted_plain, cotangents[m + sum(spec.wanted_first) :])
        second = _Spec(spec.stack, (False,) * n, tuple(wanted[6 : 6 + n]))
        some = _Second.apply(second, *past, *first, *_some_outputs(spec.stack, cotangents[:m]), *along, *inputs)
        for_plain = [
            g if want else None for g, want in zip(_some_outputs(spec.stack, some[:m]), wanted[3:6], strict=True)
        ]
        return *(None,) * (_CONSTANTS + 3), *for_plain, *_wanted(second.wanted_plain, some[m:]), *(None,) * n

    @staticmethod
    def jvp(ctx, *tangents):
        return _tangents_by_composite(_Second, ctx.spec, ctx.saved_tensors, tangents[_CONSTANTS:])

    @staticmethod
    def composite(spec, batch_sizes, dropout, *rest):
        first, plain, both = SomeOutputs(*rest[:3]), SomeOutputs(*rest[3:6]), rest[6:]
        n, wanted = len(spec.wanted_plain), (spec.wanted_first, spec.wanted_plain)
        tangents, inputs = _some_inputs(both[:n]), _inputs(both[n:])
        outputs, *grads = composite.second(spec.stack, inputs, tangents, batch_sizes, dropout, first, plain, *wanted)
        return *_present(outputs), *_chosen(wanted, grads)

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        kinds = _input_kinds(spec.weights)
        kinds_in = [*_PAST_KINDS, *_COTANGENT_KINDS, *_COTANGENT_KINDS, *kinds, *kinds]
        kinds_out = [*_output_kinds(spec.stack), *_only(spec.wanted_first, kinds), *_only(spec.wanted_plain, kinds)]
        return vmap_rule(_Second, info, in_dims, spec, tensors, kinds_in, kinds_out)
