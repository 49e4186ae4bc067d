"""What rnnfast's layers have in common: a look at the input, and the way to a kernel or to torch.

A layer looks at its input once, cheaply. What has a kernel and fits goes to `_autograd.op.recurrent`; everything else
goes to the forward of the torch layer itself: it raises torch's own error for bad input, and computes with torch's
operators what has no kernel (after one warning). A single step is torch's, too, where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _input, _step
from rnnfast._autograd import op
from rnnfast._backends import composite
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.precision import IN_FORCE
from rnnfast._backends.sizes import check_resets
from rnnfast._backends.types import Constants, Inputs, Stack
from rnnfast._twins import Twin


def _each(f: Callable[[Tensor], Tensor], h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return f(h), None if c is None else f(c)


class Unrolled(NamedTuple):
    """What `layer.unroll` gives, time first always; without B for one sequence, (L*D,N,...) for a packed input.

    output, state: as those of a call. h (L*D,T,B,R) and c (L*D,T,B,H): every state; c is None without c. gates
    (L*D,T,B,G,H): activated, in torch's order; None of a cell whose only gate is h.
    """

    output: Any
    state: Any
    h: Tensor
    c: Tensor | None
    gates: Tensor | None


class Call(NamedTuple):
    """A call as kernels take it: time first, batched, states in the order of the batch."""

    x: Tensor  # (T,B,I) or (N,I)
    batch_sizes: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    resets: Tensor | None  # (T,B) or (N)
    numbers: _input.Numbers | None  # where those are others than the kernels compute with
    precision: int  # of products, see `rnnfast._backends.precision`
    single: bool  # one sequence without a batch dimension
    input: Any  # as it was given


def _segment(recompute: int | str, call: Call) -> int:
    """Steps of a segment."""
    T = call.x.size(0) if call.batch_sizes is None else call.batch_sizes.numel()
    if recompute == "sqrt":
        return max(1, math.isqrt(max(T - 1, 0)) + 1)
    if not isinstance(recompute, int) or isinstance(recompute, bool) or recompute < 1:
        raise ValueError(f"recompute: expected None, a number of steps from 1 on, or 'sqrt', got {recompute!r}")
    return recompute


class Layer(Twin, RNNBase):
    """What all layers have in common."""

    _torch_forward: ClassVar[Callable[..., Any]]

    def flatten_parameters(self) -> None:
        """As torch's layers do, for cuDNN, where that has to run: the kernels take the weights where they are."""
        if not torch.compiler.is_compiling():
            super().flatten_parameters()

    recompute: int | str | None = None  # see `rnnfast.modules`

    def __init__(self, *args: Any, recompute: int | str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if recompute is not None:
            self.recompute = recompute

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        resets: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, Any]:
        call = self._read(input, hx, resets, steps_by_torch=resets is None)
        if call is None:
            return self._forward_by_torch(input, hx, resets)
        done = None if call.numbers is not None or call.resets is not None else self._step_by_torch(*call[:5])
        return self._written(call, *(self._by_kernel(call) if done is None else done))

    def _by_kernel(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, h_n, c_n"""
        if self.recompute is not None:
            return op.recompute(*self._arguments(call), _segment(self.recompute, call))
        return op.recurrent(
            self.mode,
            call.x,
            call.batch_sizes,
            call.h0,
            call.c0,
            call.weights,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self._dropout_masks(call.x),
            call.resets,
            call.precision,
        )

    def unroll(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        resets: Tensor | PackedSequence | None = None,
    ) -> Unrolled:
        """A call that also gives every state and every gate, differentiable at every step, at the cost of a call.

        Args:
            input, hx, resets: as of a call.

        Returns:
            Unrolled(output, state, h, c, gates), see there.

        Second derivatives, and a call under a transform of torch.func or in forward mode, are torch's operators', after
        one warning; so is a call on numbers that have no kernel.
        """
        call = self._read(input, hx, resets)
        if call is None:
            self._check(input, hx)
            call = self._dense_call(input, hx, resets, self._kernel_weights())
            outputs, states = op.unroll_by_operators(*self._arguments(call))
        else:
            outputs, states = op.unroll(*self._arguments(call))
        output, state = self._written(call, *outputs)
        L, D, cell = self.num_layers, 2 if self.bidirectional else 1, BY_MODE[self.mode]
        y = outputs.y.reshape(1, -1, outputs.y.size(-1))
        h = (y if L == 1 else torch.cat([states.hidden, y])).unflatten(2, (D, -1)).transpose(1, 2)  # (L,D,N,R)
        gates = None if states.gates is None else states.gates[:, :, :, cell.in_torch_order(cell.input)]

        numbers = call.numbers

        def arranged(part: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
            if part is None:
                return None
            part = part.flatten(0, 1)  # (L*D,N,...)
            part = part if dtype is None else part.to(dtype)
            if call.batch_sizes is not None:
                return part
            part = part.unflatten(1, call.x.shape[:2])
            return part.squeeze(2) if call.single else part

        dtypes = (None, None, None) if numbers is None else (numbers.h, numbers.c, numbers.rounded)
        every_h, every_c, every_gate = map(arranged, (h, states.c, gates), dtypes)
        assert every_h is not None
        return Unrolled(output, state, every_h, every_c, every_gate)

    def _arguments(self, call: Call) -> tuple[Stack, Inputs, Constants]:
        D, masks = 2 if self.bidirectional else 1, self._dropout_masks(call.x)
        return (
            Stack(BY_MODE[self.mode].index, self.num_layers, D, self.bias, call.precision),
            Inputs(call.x, call.h0, call.c0, call.weights),
            Constants(call.batch_sizes, masks, call.resets),
        )

    def _read(self, input: Any, hx: Any, resets: Any, steps_by_torch: bool = False) -> Call | None:
        """The call as kernels take it; None if there is none for it, or if it may be torch's and is faster so."""
        if isinstance(input, Tensor):
            x, batch_sizes = input, None
        elif isinstance(input, PackedSequence):
            x, batch_sizes = input.data, input.batch_sizes
        else:
            return None
        weights = self._kernel_weights()
        numbers, autocast = None, _input.autocast_dtype(x)
        if autocast is not None:
            numbers = self._autocast_numbers(x, batch_sizes, hx, autocast)
        elif x.dtype in _input.HALVES and x.is_cpu and _input.are_all(x.dtype, (hx, weights)):
            numbers = _input.Numbers(x.dtype, torch.float32, x.dtype, x.dtype)
        if numbers is not None:
            if steps_by_torch and _step.is_torchs_in_16_bits(self, input):
                return None
            are_matrices = BY_MODE[self.mode].are_matrices(self.bias, self.proj_size > 0)
            are_matrices *= len(weights) // len(are_matrices)
            (x, hx), weights = _input.hold((x, hx), weights, numbers.held, are_matrices)
            like = x if x.is_cpu and weights[0].dtype == torch.bfloat16 else weights[0]  # held as it is
        else:
            like = weights[0]
        if not self._fits(x, batch_sizes, hx, like):
            return None
        if batch_sizes is None:
            input = x
        elif numbers is not None:
            input = input._replace(data=x)
        return self._dense_call(input, hx, resets, weights, numbers)

    def _dense_call(
        self, input: Any, hx: Any, resets: Any, weights: list[Tensor], numbers: _input.Numbers | None = None
    ) -> Call:
        """Time first, batched, states in the order of the batch."""
        h0, c0 = (None, None) if hx is None else hx if _input.is_pair(hx) else (hx, None)
        single = False
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, _ = input
            if h0 is not None and order is not None:
                h0, c0 = _each(lambda state: state.index_select(1, order), h0, c0)
        else:
            x, batch_sizes = input, None
            single = x.dim() == 2
            if single:
                x = x.unsqueeze(1)  # (T,I) -> (T,1,I)
                if h0 is not None:
                    h0, c0 = _each(lambda state: state.unsqueeze(1), h0, c0)
            elif self.batch_first:
                x = x.transpose(0, 1)  # (B,T,I) -> (T,B,I)
        mask = None if resets is None else self._read_resets(resets, input)
        if mask is not None and batch_sizes is None and mask.size(0) == 1:  # a single step begins anew, or goes on
            begins, mask = mask.view(1, -1, 1), None
            h0, c0 = (None if state is None else state.masked_fill(begins, 0) for state in (h0, c0))
        precision = IN_FORCE if numbers is None else numbers.precision
        return Call(x, batch_sizes, h0, c0, weights, mask, numbers, precision, single, input)

    def _written(self, call: Call, y: Tensor, h_n: Tensor, c_n: Tensor | None) -> tuple[Any, Any]:
        """Output and state as the input was laid out."""
        output: Any = y
        if call.batch_sizes is not None:
            _, batch_sizes, order, back = call.input
            if back is not None:
                h_n, c_n = _each(lambda state: state.index_select(1, back), h_n, c_n)
        elif call.single:
            output = y.squeeze(1)
            h_n, c_n = _each(lambda state: state.squeeze(1), h_n, c_n)
        elif self.batch_first:
            output = y.transpose(0, 1)
        if call.numbers is not None:
            output, h_n = output.to(call.numbers.h), h_n.to(call.numbers.h)
            c_n = None if c_n is None else c_n.to(call.numbers.c)
        if call.batch_sizes is not None:
            output = PackedSequence(output, batch_sizes, order, back)
        return output, h_n if c_n is None else (h_n, c_n)

    def _kernel_weights(self) -> list[Tensor]:
        """In the order of `op.recurrent`."""
        return _input.weights_of(self, self._flat_weights_names)

    def _read_resets(self, resets: Tensor | PackedSequence, input: Tensor | PackedSequence) -> Tensor:
        """(T,B), or packed (N)"""
        if isinstance(input, PackedSequence):
            return _input.packed_resets(resets, input, self.batch_first)
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets: expected a Tensor like the input, got {type(resets).__name__}")
        check_resets(resets, tuple(input.shape[:-1]), input.device)
        if resets.dim() == 1:
            return resets.unsqueeze(1)
        return resets.transpose(0, 1) if self.batch_first else resets

    def _autocast_numbers(self, x: Tensor, batch_sizes: Tensor | None, hx: Any, dtype: torch.dtype) -> _input.Numbers:
        """On the CPU those of what torch takes there: oneDNN's LSTM, which rounds everything, or operators, of which
        autocast rounds the products alone, so that a state that is carried past them stays as it was given."""
        if not x.is_cpu:
            return _input.Numbers(dtype, dtype, dtype, dtype)
        cell = BY_MODE[self.mode]
        if cell.has_c and not self.proj_size and batch_sizes is None and x.dtype != torch.float16:
            return _input.Numbers(dtype, torch.float32, dtype, dtype)
        state = hx[1] if _input.is_pair(hx) else hx
        carried = torch.promote_types(dtype, state.dtype if isinstance(state, Tensor) else x.dtype)
        reaches_h = cell.carries_h or (cell.has_c and not self.proj_size)
        return _input.Numbers(dtype, torch.float32, carried if reaches_h else dtype, carried)

    def _fits(self, x: Tensor, batch_sizes: Tensor | None, hx: Any, weight: Tensor) -> bool:
        """Is there a kernel for this call, and is everything of the right size?"""
        if not _input.has_kernel(x, weight):
            return False
        dims = x.dim()
        if dims not in ((2, 3) if batch_sizes is None else (2,)) or x.size(-1) != self.input_size or x.numel() == 0:
            return False
        if batch_sizes is not None and batch_sizes.dtype != torch.int64:
            return False
        if hx is None:
            return True
        LD = self.num_layers * (2 if self.bidirectional else 1)
        batch: tuple[int, ...] = ()
        if batch_sizes is not None:
            batch = (int(batch_sizes[0]),)
        elif dims == 3:
            batch = (x.size(0 if self.batch_first else 1),)
        shape = (LD, *batch, self.proj_size or self.hidden_size)
        if not BY_MODE[self.mode].has_c:
            return _input.state_fits(hx, shape, x)
        if not (_input.is_pair(hx) and _input.state_fits(hx[0], shape, x)):
            return False
        return _input.state_fits(hx[1], (LD, *batch, self.hidden_size), x)

    def _step_by_torch(
        self, x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Arguments and result as those of `op.recurrent`, if the call is a single step that torch's operators do
        faster."""
        if (x.size(0) if batch_sizes is None else batch_sizes.numel()) != 1 or self.proj_size or not x.is_cpu:
            return None
        return _step.by_torch(self, x, h0, c0, weights)

    def _forward_by_torch(self, input: Any, hx: Any, resets: Any = None) -> Any:
        """What has no kernel, what has no numbers, and what has no answer: torch computes the one, torch.fx traces the
        second, and torch says what is wrong with the third."""
        node = self._symbolic(input, hx)
        if node is not None:
            return node
        return self._torch_forward(input, hx) if resets is None else self._by_operators(input, hx, resets)

    def _by_operators(self, input: Any, hx: Any, resets: Any) -> Any:
        """What torch's own layer has not, in torch's operators."""
        self._check(input, hx)
        call = self._dense_call(input, hx, resets, self._kernel_weights())
        outputs, _ = composite.forward(*self._arguments(call))
        return self._written(call, *outputs)

    def _check(self, input: Tensor | PackedSequence, hx: Any) -> None:
        """Raises as torch's layers do for input and states that do not fit."""
        packed = isinstance(input, PackedSequence)
        x: Tensor = input.data if packed else input  # type: ignore[assignment]
        if not packed and x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        batch_sizes = input.batch_sizes if packed else None  # type: ignore[union-attr]
        single = not packed and x.dim() == 2
        self.check_input(x.unsqueeze(0 if self.batch_first else 1) if single else x, batch_sizes)
        if hx is None:
            return
        has_c = BY_MODE[self.mode].has_c
        if has_c != _input.is_pair(hx):
            raise TypeError(f"hx: expected {'a pair (h_0, c_0)' if has_c else 'a tensor h_0'}, got {type(hx).__name__}")
        batch = 1 if single else int(batch_sizes[0]) if packed else x.size(0 if self.batch_first else 1)  # type: ignore
        LD = self.num_layers * (2 if self.bidirectional else 1)
        for name, state, size in zip(("h_0", "c_0"), hx if has_c else (hx,), self._state_sizes(), strict=False):
            expected = (LD, size) if single else (LD, batch, size)
            if not isinstance(state, Tensor) or tuple(state.shape) != expected:
                raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(getattr(state, 'shape', ()))}")

    def _state_sizes(self) -> tuple[int, int]:
        """R and H"""
        return self.proj_size or self.hidden_size, self.hidden_size

    def _dropout_masks(self, x: Tensor) -> Tensor | None:
        """(L-1,T,B,D*R) or (L-1,N,D*R), drawn as torch draws them: the same seed drops the same units."""
        if not self.training or self.dropout == 0 or self.num_layers == 1:
            return None
        width = (2 if self.bidirectional else 1) * (self.proj_size or self.hidden_size)
        layers = self.num_layers - 1
        if self.dropout == 1:
            return x.new_zeros((layers, *x.shape[:-1], width))
        # Not of x: vmap, which decides whether its samples share a mask, draws for no tensor that it has mapped.
        like = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        masks = [torch.bernoulli(like, 1 - self.dropout) for _ in range(layers)]
        return torch.stack(masks).div_(1 - self.dropout)
