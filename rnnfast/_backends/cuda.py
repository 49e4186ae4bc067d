"""The functions of `rnnfast._backends.cpu` for tensors on a GPU, with the same arguments, shapes and results.

One layer after the other, both directions side by side. What is a product of all rows is one product by torch (W_ih x
before the time loop, weight gradients and dL/dx after it); the time loop is one call of a sweep, by the extension
`rnnfast._cuda` (csrc/cuda) or by `composite.py`, which also takes tensors on the CPU: so all of this file but
`_Extension` is tested without a GPU. Second derivatives and forward mode are composite. What cuDNN does faster than
sweeps (`_is_cudnns`) is one call of cuDNN for the whole stack; everything else works the same after it.

The reserve has as many numbers per row as on the CPU, in the order of rows, so that both directions are one product:

    LSTM:      gates (L,N,D,G,H) activated, cells (L,N,D,H), projected: outputs before W_hr (L,N,D,H)
    all cells: outputs of the layers below the top (L-1,N,D*R), before dropout

After a call of cuDNN the reserve is cuDNN's own, bytes (uint8) that nobody else reads.

16-bit numbers: the sums of all products, the states c and dL/dc, and the gates and dL/dz before they are stored are
float32; stored gates, cells, h and dL/dz are 16-bit, as are the operands of the products.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast import _C
from rnnfast._backends import composite, cpu
from rnnfast._backends.composite import BackwardArrays, ForwardArrays, Sweep
from rnnfast._backends.cpu import Inputs, Outputs, Past, SomeInputs, SomeOutputs, Stack

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_built() -> bool:
    """Does this installation have the CUDA extension?"""
    return importlib.util.find_spec("rnnfast._cuda") is not None


# --- what a call is ---------------------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Of one layer, its directions side by side."""

    w_ih: Tensor  # (D*G*H,I)
    w_hh: Tensor  # (D,G*H,R)
    bias: Tensor | None  # (D*G*H) b_ih + b_hh
    w_hr: Tensor | None  # (D,P,H)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """(D,...); a view if there is only one direction"""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


class _Call:
    """A checked call on dense tensors."""

    def __init__(self, stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None) -> None:
        x = inputs.x
        if x.dtype not in DTYPES:
            raise RuntimeError(f"input: expected one of {DTYPES}, got {x.dtype}")
        self.stack, self.like = stack, x
        self.sizes = s = cpu._sizes(stack, inputs, batch_sizes)
        self.shapes = cpu._shapes(s, x.dtype)
        flat = self.dense_inputs("", inputs.flat())
        assert flat[0] is not None
        self.x, self.h0, self.c0 = flat[0].view(s.N, s.I), flat[1], flat[2]
        self.weights: list[Tensor] = flat[3:]  # type: ignore[assignment]
        self.dropout = None if dropout is None else self.dense("dropout_masks", dropout, self.shapes.dropout)
        if self.dropout is not None:
            self.dropout = self.dropout.view(stack.L - 1, s.N, stack.D * s.R)
        self.batch_sizes = self.offsets = None
        if batch_sizes is not None:
            self.batch_sizes = cpu._dense("batch_sizes", batch_sizes, (s.T,), torch.int64)
        address = 0 if self.batch_sizes is None else self.batch_sizes.data_ptr()
        rows = _C.Shape(stack.cell, s.T, s.B, s.I, s.H, s.P, stack.L, stack.D, stack.bias, address).rows  # checks them
        if rows != s.N:
            raise RuntimeError(f"input: expected {rows} rows, the sum of batch_sizes, got {s.N}")
        if self.batch_sizes is not None:
            first_rows = torch.tensor(list(accumulate(self.batch_sizes.tolist(), initial=0)), device="cpu")
            self.offsets = _to_device(first_rows, x.device)
        self.sweep = Sweep(stack.cell, stack.D, s.H, s.P, s.T, s.B, self.batch_sizes, self.offsets)

    def dense(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same numbers in one block, after a check that they are what the kernels expect."""
        like = self.like
        if tensor.shape != shape:
            raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype is not like.dtype:
            raise RuntimeError(f"{name}: expected dtype {like.dtype} like the input, got {tensor.dtype}")
        if tensor.device != like.device:
            raise RuntimeError(f"{name}: expected device {like.device} like the input, got {tensor.device}")
        if tensor._is_zerotensor():
            return tensor.clone()
        return tensor.resolve_neg().contiguous()

    def _all_dense(self, what: str, arrays: cpu._Arrays, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        triples = zip(arrays.names, tensors, arrays.shapes, strict=True)
        return [None if t is None else self.dense(what + name, t, shape) for name, t, shape in triples]

    def dense_inputs(self, what: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """x, h0, c0, weights, or something as large as each of them."""
        arrays = self.shapes.inputs
        if len(tensors) != len(arrays.shapes):
            raise RuntimeError(f"{what}weights: expected {len(arrays.shapes) - 3} tensors, got {len(tensors) - 3}")
        return self._all_dense(what, arrays, tensors)

    def dense_outputs(self, what: str, outputs: SomeOutputs) -> list[Tensor | None]:
        """y, h_n, c_n, or something as large as each of them."""
        return self._all_dense(what, self.shapes.outputs, outputs)

    def empty(self, *shape: int, wide: bool = False) -> Tensor:
        return self.like.new_empty(shape, dtype=composite.wide(self.like.dtype) if wide else None)

    def of_layer(self, tensor: Tensor | None, layer: int) -> Tensor | None:
        """(D,B,...) of states (L*D,B,...)"""
        D = self.stack.D
        return None if tensor is None else tensor[layer * D : (layer + 1) * D]

    def wide_state(self, tensor: Tensor | None, layer: int) -> Tensor | None:
        """(D,B,H) a copy to count on with, zeros for None; None for an Elman network"""
        s = self.sizes
        if not self.stack.lstm:
            return None
        state = self.empty(self.stack.D, s.B, s.H, wide=True)
        given = self.of_layer(tensor, layer)
        return state.zero_() if given is None else state.copy_(given)

    def weights_of(self, layer: int) -> _Weights:
        D, per = self.stack.D, len(self.weights) // (self.stack.L * self.stack.D)
        own = [self.weights[k * per : (k + 1) * per] for k in range(layer * D, (layer + 1) * D)]
        w_ih, w_hh, *rest = (_side_by_side(some) for some in zip(*own, strict=True))
        bias = (rest[0] + rest[1]).flatten() if self.stack.bias else None
        return _Weights(w_ih.flatten(0, 1), w_hh, bias, rest[-1] if self.sizes.P else None)

    def run_forward(self, arrays: ForwardArrays) -> None:
        _sweeps_for(self.like).forward(self.sweep, arrays)

    def run_backward(self, arrays: BackwardArrays, add: bool) -> None:
        _sweeps_for(self.like).backward(self.sweep, arrays, add)


class _Kept:
    """The parts of a reserve, layer by layer. Without a reserve, memory of their own for what a sweep writes anyway."""

    def __init__(self, call: _Call, reserve: Tensor | None) -> None:
        self.call, self.reserve = call, reserve
        s, L, D = call.sizes, call.stack.L, call.stack.D
        self.lstm, self.projected = call.stack.lstm, s.P > 0
        self.units = s.N * D * s.H  # of a layer
        self.starts = list(accumulate((4 * L * self.lstm, L * self.lstm, L * self.projected), initial=0))

    def _part(self, start: int, size: int, *shape: int) -> Tensor:
        if self.reserve is None:
            return self.call.empty(*shape)
        return self.reserve[start : start + size].view(shape)

    def gates(self, layer: int) -> Tensor:
        """(N,D,4,H), LSTM"""
        s, D = self.call.sizes, self.call.stack.D
        return self._part(4 * layer * self.units, 4 * self.units, s.N, D, 4, s.H)

    def cells(self, layer: int) -> Tensor | None:
        """(N,D,H), LSTM"""
        return self._states(self.starts[1] + layer) if self.lstm else None

    def m(self, layer: int) -> Tensor | None:
        """(N,D,H), projected"""
        return self._states(self.starts[2] + layer) if self.projected else None

    def _states(self, index: int) -> Tensor:
        s, D = self.call.sizes, self.call.stack.D
        return self._part(index * self.units, self.units, s.N, D, s.H)

    def hidden(self, layer: int) -> Tensor:
        """(N,D*R)"""
        s, D = self.call.sizes, self.call.stack.D
        size = s.N * D * s.R
        return self._part(self.starts[3] * self.units + layer * size, size, s.N, D * s.R)


# --- who sweeps -------------------------------------------------------------------------------------------------------


class _Composite:
    """`rnnfast._backends.composite`, in place of the extension."""

    @staticmethod
    def forward(s: Sweep, arrays: ForwardArrays) -> None:
        composite.sweep_forward(s, arrays)

    @staticmethod
    def backward(s: Sweep, arrays: BackwardArrays, add: bool) -> None:
        composite.sweep_backward(s, arrays, add)


def _sweeps_for(x: Tensor) -> Any:
    if x.is_cpu or _forced() == "composite":
        return _Composite
    extension = _extension()
    return extension if extension.runs_on(x.device.index) else _Composite


def _forced() -> str:
    """The kernel that is forced, '' if none."""
    return os.environ.get("RNNFAST_CUDA_KERNEL", "")


class _Extension:
    """`rnnfast._cuda`: the kernel for each size is chosen by csrc/cuda/plan.cpp, RNNFAST_CUDA_KERNEL forces one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.make_plan = lru_cache(maxsize=512)(module.Plan)  # of the same sizes on the same card
        self.runs_on = lru_cache(maxsize=None)(self._runs_on)

    def _runs_on(self, device: int) -> bool:
        """Has this build code for the card? Warns if not."""
        if self.module.runs_on(device):
            return True
        card = self.module.Card.of(device)
        warnings.warn(
            f"rnnfast was built without kernels for {torch.cuda.get_device_name(device)} (sm_{card.sm}): cuDNN and "
            f"torch's operators run instead. RNNFAST_CUDA_ARCHS={card.sm} builds them, for sm_80 and later.",
            stacklevel=2,
        )
        return False

    def plan(self, s: Sweep, like: Tensor, backward: bool) -> Any:
        sizes = s.H, s.P, s.B, s.D
        return self.make_plan(self.place(like)[0], s.cell, _number(like.dtype), *sizes, backward, _forced())

    def forward(self, s: Sweep, arrays: ForwardArrays) -> None:
        self._run(self.module.forward, s, arrays, arrays.y, False)

    def backward(self, s: Sweep, arrays: BackwardArrays, add: bool) -> None:
        self._run(self.module.backward, s, arrays, arrays.dz, True, add)

    def _run(
        self, run: Any, s: Sweep, arrays: Sequence[Tensor | None], like: Tensor, backward: bool, *more: Any
    ) -> None:
        with _on_device_of(like):
            plan = self.plan(s, like, backward)
            workspace = like.new_zeros(plan.workspace_bytes, dtype=torch.uint8)
            steps = [0 if t is None else t.data_ptr() for t in (s.batch_sizes, s.offsets)]
            addresses = [0 if t is None else t.data_ptr() for t in (*arrays, workspace)]
            run(plan, self.place(like)[1], s.T, *steps, addresses, *more)

    def upload(self, host: Tensor, there: Tensor) -> None:
        with _on_device_of(there):
            self.module.upload(*self.place(there), host.data_ptr(), host.numel(), there.data_ptr())

    @staticmethod
    def place(x: Tensor) -> tuple[int, int]:
        """Index of the device, and its current stream."""
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, as torch and the CUDA runtime count."""
    return nullcontext() if x.is_cpu else torch.cuda.device(x.device)


_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 3, torch.bfloat16: 4}
_TF32 = 2


def _number(dtype: torch.dtype) -> int:
    """As the extension counts them. TF32 in the time loop where torch's own recurrent layers would take it."""
    return _TF32 if dtype == torch.float32 and _takes_tf32() else _NUMBERS[dtype]


def _takes_tf32() -> bool:
    """Would cuDNN's recurrent layers take TF32 for float32?"""
    rnn = getattr(torch.backends.cudnn, "rnn", None)  # since torch 2.9
    return torch.backends.cudnn.allow_tf32 if rnn is None else rnn.fp32_precision == "tf32"


_matmul_lock = threading.Lock()


@contextmanager
def _products_as_cudnns(x: Tensor) -> Iterator[None]:
    """The products of all rows in TF32 where cuDNN's are, whatever `torch.backends.cuda.matmul` says of others.

    torch has no such switch for one product: for as long as this one is launched it holds for the process.
    """
    if x.dtype != torch.float32 or not x.is_cuda or not _takes_tf32():
        yield
        return
    matmul = torch.backends.cuda.matmul
    name, tf32 = ("fp32_precision", "tf32") if hasattr(torch.backends.cudnn, "rnn") else ("allow_tf32", True)
    with _matmul_lock:
        before = getattr(matmul, name)
        setattr(matmul, name, tf32)
        try:
            yield
        finally:
            setattr(matmul, name, before)


@lru_cache(maxsize=1)
def _extension() -> _Extension:
    if not is_built():
        raise RuntimeError(
            "rnnfast: this installation has no CUDA kernels. Install it with nvcc and RNNFAST_CUDA=on in the "
            "environment (docs/cuda.md), or use rnnfast.revert(model) for torch's own layers."
        )
    return _Extension(importlib.import_module("rnnfast._cuda"))


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """A small int64 tensor, on the device; by the extension it comes with the launch, so that it needs no pinned memory
    and is part of a captured graph."""
    if device.type == "cpu":
        return host
    there = torch.empty_like(host, device=device)
    if _sweeps_for(there) is _Composite:
        return there.copy_(host)
    _extension().upload(host, there)
    return there


# --- cuDNN ------------------------------------------------------------------------------------------------------------

_SHORT = 8  # steps
_MANY_WAVES = 8


def _is_cudnns(call: _Call, keep: bool) -> bool:
    """Is a call faster by cuDNN than by sweeps? By reasoning; no card has been asked.

    Where W_hh stays on the chip, sweeps are: a step is 1 to 4 µs, cuDNN's 7 to 15. Where it does not (kernel `steps`:
    float64, float32 without TF32, projections, W_hh larger than the registers) a step of theirs reads all of W_hh by
    plain multiply-adds, up to 100 µs; a loop over torch's operators pays ten launches a step; cuDNN pays one product of
    the library and one launch. Where the groups of a large batch go by many turns, one product for all of them fills
    the card. A few steps do not pay for the copy of the weights that cuDNN wants.

    Dropout's masks are drawn before the call, which cuDNN does not take between its layers.
    """
    x = call.like
    if not x.is_cuda or _forced() or call.dropout is not None:
        return False
    if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        return False
    extension = _extension()
    if not extension.runs_on(x.device.index):
        return True
    with _on_device_of(x):
        plans = [extension.plan(call.sweep, x, backward) for backward in (False, True)[: 1 + keep]]
    slow = any(plan.kernel == "steps" or plan.waves > _MANY_WAVES for plan in plans)
    return slow and call.sizes.T > _SHORT


class _Cudnn:
    """A whole stack by torch's own operators for cuDNN."""

    def __init__(self, call: _Call) -> None:
        self.call, stack, s = call, call.stack, call.sizes
        mode = (1, 0, 2)[stack.cell]  # as cuDNN counts: relu, tanh, LSTM
        bidirectional = stack.D == 2
        weights = [w.data for w in call.weights]  # not the parameters: what follows points them into its copy
        per = len(weights) // (stack.L * stack.D)
        sizes = mode, s.H, s.P, stack.L, False
        flat = torch.ops.aten._cudnn_rnn_flatten_weight(weights, per, s.I, *sizes, bidirectional)
        self.weights = weights, per, flat
        self.states = self._state(call.h0, s.R), self._state(call.c0, s.H) if stack.lstm else None
        self.x = call.x.view(call.shapes.inputs.shapes[0])
        self.batch_sizes = [] if call.batch_sizes is None else call.batch_sizes.tolist()
        self.sizes, self.bidirectional = sizes, bidirectional

    def _options(self, train: bool) -> tuple[Any, ...]:
        """What follows the tensors; no dropout."""
        return *self.sizes, 0.0, train, self.bidirectional, self.batch_sizes, None

    def _state(self, state: Tensor | None, size: int) -> Tensor:
        stack = self.call.stack
        return self.call.empty(stack.L * stack.D, self.call.sizes.B, size).zero_() if state is None else state

    def forward(self, keep: bool) -> tuple[Outputs, Tensor | None]:
        y, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(self.x, *self.weights, *self.states, *self._options(keep))
        return Outputs(y, h_n, c_n if self.call.stack.lstm else None), reserve if keep else None

    def backward(self, past: Past, cotangents: SomeOutputs, wanted: Sequence[bool]) -> SomeInputs:
        outputs = self.call.dense_outputs("gradient of ", cotangents)
        mask = [*wanted[:3], any(wanted[3:])]
        x, h0, c0, weights = torch.ops.aten._cudnn_rnn_backward(
            self.x, *self.weights, *self.states, past.y, *outputs, *self._options(True), past.reserve, mask
        )
        given = x, h0, c0, *(weights if mask[3] else [None] * len(self.call.weights))
        inputs = self.call.x, self.call.h0, self.call.c0, *self.call.weights
        pairs = zip(given, inputs, wanted, strict=True)
        x, h0, c0, *weights = (g if want and i is not None else None for g, i, want in pairs)
        return SomeInputs(x, h0, c0, weights)


def _is_by_cudnn(past: Past) -> bool:
    return past.reserve.dtype == torch.uint8


def _by_sweeps(past: Past) -> Past:
    """The same with a reserve that sweeps have written."""
    if not _is_by_cudnn(past):
        return past
    _, reserve = forward_by_sweeps(*past[:4], keep=True)
    assert reserve is not None
    return past._replace(reserve=reserve)


# --- the functions ----------------------------------------------------------------------------------------------------


def forward(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """See cpu.forward; the reserve may be cuDNN's."""
    call = _Call(stack, inputs, batch_sizes, dropout)
    return _Cudnn(call).forward(keep) if _is_cudnns(call, keep) else _forward_by_sweeps(call, keep)


def forward_by_sweeps(
    stack: Stack, inputs: Inputs, batch_sizes: Tensor | None, dropout: Tensor | None, keep: bool
) -> tuple[Outputs, Tensor | None]:
    """See cpu.forward: the reserve is as large as on the CPU."""
    return _forward_by_sweeps(_Call(stack, inputs, batch_sizes, dropout), keep)


def _forward_by_sweeps(call: _Call, keep: bool) -> tuple[Outputs, Tensor | None]:
    stack = call.stack
    s, (_, L, D, _) = call.sizes, stack
    y, h_n, c_n = (call.empty(*shape) for shape in call.shapes.outputs.shapes)
    reserve = call.empty(s.N * cpu.reserve_per_row(stack, s.H, s.P)) if keep else None
    kept = _Kept(call, reserve)
    below = call.x  # (N,I) or (N,D*R)
    for layer in range(L):
        w = call.weights_of(layer)
        out = y.view(s.N, D * s.R) if layer == L - 1 else kept.hidden(layer)
        gates = kept.gates(layer) if stack.lstm else out
        gates = gates.view(s.N, D * stack.gates * s.H)
        with _products_as_cudnns(below):
            if w.bias is None:
                torch.mm(below, w.w_ih.T, out=gates)
            else:
                torch.addmm(w.bias, below, w.w_ih.T, out=gates)
        c = call.wide_state(call.c0, layer)
        arrays = ForwardArrays(
            gates.view(s.N, D, stack.gates, s.H),
            w.w_hh,
            w.w_hr,
            call.of_layer(call.h0, layer),
            c,
            kept.cells(layer) if keep else None,
            kept.m(layer),
            out.view(s.N, D, s.R),
            call.of_layer(h_n, layer),  # type: ignore[arg-type]
        )
        call.run_forward(arrays)
        if c is not None:
            call.of_layer(c_n, layer).copy_(c)  # type: ignore[union-attr]
        below = out
        if call.dropout is not None and layer < L - 1:
            below = below * call.dropout[layer]
    return Outputs(y, h_n, c_n if stack.lstm else None), reserve


def backward(
    past: Past,
    cotangents: SomeOutputs,
    wanted: Sequence[bool],
    groups: int = 1,
    z_cotangent: Tensor | None = None,
) -> SomeInputs:
    """See cpu.backward."""
    if _is_by_cudnn(past) and groups == 1 and z_cotangent is None and any(t is not None for t in cotangents):
        return _Cudnn(_Call(*past[:4])).backward(past, cotangents, wanted)
    sweep = _BackwardSweep(_by_sweeps(past), cotangents, z_cotangent)
    call = sweep.call
    grads = _Gradients(call, wanted, groups)
    for layer in reversed(range(call.stack.L)):
        grads.add_layer(layer, sweep.run(layer, wants_dx=layer > 0 or wanted[0]))
    return grads.some()


def sweep_back(past: Past, cotangents: SomeOutputs) -> tuple[Tensor, Tensor | None]:
    """See cpu.sweep_back."""
    sweep = _BackwardSweep(_by_sweeps(past), cotangents, None)
    call = sweep.call
    s, (_, L, D, _) = call.sizes, call.stack
    dz = call.empty(L, D, s.N, call.stack.gates * s.H)
    d_cells = call.empty(L, D, s.N, s.H) if call.stack.lstm else None
    for layer in reversed(range(L)):
        cells = call.empty(s.N, D, s.H) if d_cells is not None else None
        one = sweep.run(layer, wants_dx=layer > 0, d_cells=cells)
        dz[layer] = one.dz.flatten(2).transpose(0, 1)
        if d_cells is not None and cells is not None:
            d_cells[layer] = cells.transpose(0, 1)
    return dz, d_cells


def activations(past: Past) -> Tensor:
    """See cpu.activations."""
    past = _by_sweeps(past)
    call = _Call(past.stack, past.inputs, past.batch_sizes, past.dropout)
    s, (_, L, D, _), kept = call.sizes, past.stack, _Kept(call, past.reserve)
    if past.stack.lstm:
        layers = [kept.gates(layer) for layer in range(L)]
    else:
        layers = [*(kept.hidden(layer) for layer in range(L - 1)), past.y]
    return torch.stack([one.view(s.N, D, -1, s.H) for one in layers]).transpose(1, 2)


def tangent(past: Past, tangents: SomeInputs, z_tangent: Tensor | None = None) -> Outputs:
    """See cpu.tangent."""
    call = _Call(past.stack, past.inputs, past.batch_sizes, past.dropout)
    x, h0, c0, *weights = call.dense_inputs("tangent of ", tangents.flat())
    with torch.no_grad():
        _, outputs, z = composite.with_tangents(
            past.stack, past.inputs, SomeInputs(x, h0, c0, weights), past.batch_sizes, past.dropout
        )
    if z_tangent is not None:
        z_tangent.copy_(z)
    return outputs


def second(
    past: Past,
    tangents: SomeInputs,
    first: SomeOutputs,
    plain: SomeOutputs,
    wanted_first: Sequence[bool],
    wanted_plain: Sequence[bool],
    groups: int = 1,
) -> tuple[Outputs, SomeInputs, SomeInputs]:
    """See cpu.second."""
    if groups > 1:
        return _second_by_groups(past, tangents, first, plain, wanted_first, wanted_plain, groups)
    call = _Call(past.stack, past.inputs, past.batch_sizes, past.dropout)
    x, h0, c0, *weights = call.dense_inputs("tangent of ", tangents.flat())
    return composite.second(
        past.stack,
        past.inputs,
        SomeInputs(x, h0, c0, weights),
        past.batch_sizes,
        past.dropout,
        first,
        plain,
        wanted_first,
        wanted_plain,
    )


class _Part:
    """The sequences b with b % groups = g of a batch: where their rows and states are."""

    def __init__(self, g: int, groups: int, batch_sizes: Tensor | None, device: torch.device) -> None:
        self.states: Any = slice(g, None, groups)  # of the batch dimension
        self.batch_sizes: Tensor | None = None
        self.rows: Any = self.states
        if batch_sizes is not None:
            counts = batch_sizes.tolist()
            firsts = accumulate(counts, initial=0)
            rows = [row + b for row, n in zip(firsts, counts, strict=False) for b in range(g, n, groups)]
            self.rows = torch.tensor(rows, device=device)
            self.batch_sizes = torch.tensor([len(range(g, n, groups)) for n in counts if n > g], device="cpu")

    def at(self, k: int, packed: bool) -> Any:
        """Index of tensor k of (rows, states, states)"""
        return self.rows if k == 0 and packed else (slice(None), self.rows if k == 0 else self.states)

    def of(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """From tensors (T,B,...) or (N,...), (L*D,B,...), (L*D,B,...)"""
        packed = self.batch_sizes is not None
        return [None if t is None else t[self.at(k, packed)] for k, t in enumerate(tensors)]


def _second_by_groups(past, tangents, first, plain, wanted_first, wanted_plain, groups):
    """Group by group, as if each were a batch of its own."""
    stack, inputs, batch_sizes, dropout = past[:4]
    packed = batch_sizes is not None
    B = int(batch_sizes[0]) if packed else inputs.x.size(1)
    if B % groups:
        raise ValueError(f"groups: expected a divisor of the batch {B}, got {groups}")
    parts = [_Part(g, groups, batch_sizes, inputs.x.device) for g in range(groups)]
    results = []
    for part in parts:
        masks = None if dropout is None else torch.stack([part.of([mask])[0] for mask in dropout])  # type: ignore
        own = Past(stack, Inputs(*part.of(inputs[:3]), inputs.weights), part.batch_sizes, masks, past.y, past.reserve)
        along = SomeInputs(*part.of(tangents[:3]), tangents.weights)
        cotangents = (SomeOutputs(*part.of(some)) for some in (first, plain))
        results.append(second(own, along, *cotangents, wanted_first, wanted_plain))

    shapes = cpu._shapes(cpu._sizes(stack, inputs, batch_sizes), inputs.x.dtype)

    def joined(some: Sequence[Sequence[Tensor | None]], shapes: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
        whole = [None if t is None else t.new_empty(shape) for t, shape in zip(some[0], shapes, strict=True)]
        for part, tensors in zip(parts, some, strict=True):
            for k, (t, one) in enumerate(zip(whole, tensors, strict=True)):
                if t is not None and one is not None:
                    t[part.at(k, packed)] = one
        return whole

    grads = []
    for k in (1, 2):
        weights = [None if w[0] is None else torch.stack(w) for w in zip(*(r[k].weights for r in results), strict=True)]
        grads.append(SomeInputs(*joined([r[k][:3] for r in results], shapes.inputs.shapes[:3]), weights))
    return Outputs(*joined([r[0] for r in results], shapes.outputs.shapes)), *grads


# --- the way back -----------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """What is known of a layer once its backward sweep is done."""

    weights: _Weights
    below: Tensor  # (N,I) or (N,D*R) what entered it
    out: Tensor  # (N,D,R) what it gave
    m: Tensor | None  # (N,D,H) projected
    dz: Tensor  # (N,D,G,H)
    dh: Tensor | None  # (N,D,P) projected
    dx: Tensor | None  # (N,I) or (N,D*R)
    dh0: Tensor  # (D,B,R)
    dc: Tensor | None  # (D,B,H) wide, dL/dc_0


class _BackwardSweep:
    """From the top layer down."""

    def __init__(self, past: Past, cotangents: SomeOutputs, z_cotangent: Tensor | None) -> None:
        self.call = call = _Call(past.stack, past.inputs, past.batch_sizes, past.dropout)
        s, stack = call.sizes, past.stack
        self.y = call.dense("y", past.y, call.shapes.outputs.shapes[0]).view(s.N, stack.D * s.R)
        size = s.N * cpu.reserve_per_row(stack, s.H, s.P)
        self.kept = _Kept(call, call.dense("reserve", past.reserve, (size,)))
        dy, self.dh_n, self.dc_n = call.dense_outputs("gradient of ", cotangents)
        self.d_out = None if dy is None else dy.view(s.N, stack.D * s.R)  # of the layer that is next
        self.dz = z_cotangent
        if z_cotangent is not None:
            self.dz = call.dense("gradient of z", z_cotangent, (stack.L, stack.D, s.N, stack.gates, s.H))

    def out(self, layer: int) -> Tensor:
        """(N,D*R)"""
        return self.y if layer == self.call.stack.L - 1 else self.kept.hidden(layer)

    def below(self, layer: int) -> Tensor:
        """(N,I) or (N,D*R)"""
        if layer == 0:
            return self.call.x
        masks = self.call.dropout
        return self.out(layer - 1) if masks is None else self.out(layer - 1) * masks[layer - 1]

    def run(self, layer: int, wants_dx: bool, d_cells: Tensor | None = None) -> _Layer:
        call, kept = self.call, self.kept
        s, D, G = call.sizes, call.stack.D, call.stack.gates
        w, out = call.weights_of(layer), self.out(layer).view(s.N, D, s.R)
        dc, dh0 = call.wide_state(self.dc_n, layer), call.empty(D, s.B, s.R)
        dz, dh = call.empty(s.N, D, G, s.H), call.empty(s.N, D, s.P) if s.P else None
        if self.dz is not None:
            dz.copy_(self.dz[layer].transpose(0, 1))
        m = kept.m(layer)
        arrays = BackwardArrays(
            kept.gates(layer) if call.stack.lstm else out.unsqueeze(2),
            kept.cells(layer),
            w.w_hh,
            w.w_hr,
            call.of_layer(call.c0, layer),
            None if self.d_out is None else self.d_out.view(s.N, D, s.R),
            call.of_layer(self.dh_n, layer),
            dc,
            dz,
            dh,
            dh0,
            d_cells,
        )
        call.run_backward(arrays, self.dz is not None)
        with _products_as_cudnns(dz):
            dx = dz.view(s.N, D * G * s.H) @ w.w_ih if wants_dx else None
        self.d_out = dx
        if layer > 0 and call.dropout is not None and dx is not None:
            self.d_out = dx * call.dropout[layer - 1]
        return _Layer(w, self.below(layer), out, m, dz, dh, dx, dh0, dc)


class _Gradients:
    """Those that are wanted, in the order of the inputs; of the weights (groups,...) if there are several groups."""

    def __init__(self, call: _Call, wanted: Sequence[bool], groups: int) -> None:
        s = call.sizes
        counts = [s.B] if call.batch_sizes is None else call.batch_sizes.tolist()
        if any(n % groups for n in counts):
            raise RuntimeError(f"groups: expected a divisor of the sequences at every step, got {groups} for {counts}")
        self.call, self.groups = call, groups
        self.wanted = [
            want and t is not None for want, t in zip(wanted, (call.x, call.h0, call.c0, *call.weights), strict=True)
        ]
        self.states: tuple[list[Tensor], list[Tensor | None]] = [], []
        self.x: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * len(call.weights)

    def add_layer(self, layer: int, one: _Layer) -> None:
        """Layers come from the top down."""
        self.states[0].insert(0, one.dh0)
        self.states[1].insert(0, one.dc)
        if layer == 0 and one.dx is not None:
            self.x = one.dx.view(self.call.shapes.inputs.shapes[0])
        D, per = self.call.stack.D, len(self.weights) // (self.call.stack.L * self.call.stack.D)
        for d in range(D):
            first = (layer * D + d) * per
            wanted = self.wanted[3 + first : 3 + first + per]
            if any(wanted):
                own = self._weights(one, d, wanted, layer)
                self.weights[first : first + per] = own

    def _weights(self, one: _Layer, d: int, wanted: Sequence[bool], layer: int) -> list[Tensor | None]:
        """Of one direction, in torch's order."""
        stack = self.call.stack
        dz = one.dz[:, d].flatten(1)  # (N,G*H)
        some = [
            self._product(dz, one.below) if wanted[0] else None,
            self._recurrent(dz, one, d, layer) if wanted[1] else None,
        ]
        if stack.bias:
            total = self._rows(dz).sum(0) if any(wanted[2:4]) else None
            total = total if total is None or self.groups > 1 else total[0]
            some += [total if wanted[2] else None, total.clone() if wanted[3] and total is not None else None]
        if one.dh is not None and one.m is not None:
            some.append(self._product(one.dh[:, d], one.m[:, d]) if wanted[-1] else None)
        return some

    def _rows(self, a: Tensor) -> Tensor:
        """(n,groups,...) of rows (n*groups,...): sequence b is of group b % groups at every step"""
        return a.unflatten(0, (-1, self.groups))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b of rows a (n,j), b (n,k), for each group on its own if there are several"""
        with _products_as_cudnns(a):
            if self.groups == 1:
                return a.T @ b
            return torch.bmm(self._rows(a).permute(1, 2, 0), self._rows(b).transpose(0, 1))

    def _recurrent(self, dz: Tensor, one: _Layer, d: int, layer: int) -> Tensor:
        """Of W_hh (G*H,R): dz^T h of the step before, which at the first step is h_0"""
        call, h = self.call, one.out[:, d]
        h0 = None if call.h0 is None else call.h0[layer * call.stack.D + d]  # (B,R)
        B, N = call.sizes.B, call.sizes.N
        if call.offsets is not None:
            first = h.new_zeros((B, call.sizes.R)) if h0 is None else h0
            return self._product(dz, torch.cat([h, first])[_rows_before(call.offsets, N, reverse=d == 1)])
        later, before, first_dz = (dz[B:], h[:-B], dz[:B]) if d == 0 else (dz[:-B], h[B:], dz[-B:])
        if h0 is None:
            return self._product(later, before)
        total = self._product(first_dz, h0)
        return total if N == B else total.add_(self._product(later, before))

    def some(self) -> SomeInputs:
        x, h0, c0, *_ = self.wanted
        dh0, dc0 = ([d for d in layers if d is not None] for layers in self.states)
        return SomeInputs(
            self.x if x else None,
            torch.cat(dh0) if h0 else None,
            torch.cat(dc0).to(self.call.like.dtype) if c0 else None,
            self.weights,
        )


def _rows_before(offsets: Tensor, N: int, reverse: bool) -> Tensor:
    """(N) the row of the same sequence one step before, in the order of a direction; N + b where sequence b begins."""
    row = torch.arange(N, device=offsets.device)
    step = torch.searchsorted(offsets, row, right=True) - 1
    b = row - offsets[step]
    if not reverse:
        return torch.where(step > 0, offsets[(step - 1).clamp(min=0)], N) + b
    before = offsets[step + 1] + b
    return torch.where(before < offsets[(step + 2).clamp(max=len(offsets) - 1)], before, N + b)
