"""A checked call on tensors of a GPU, and the parts of what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast._backends import cpu, cuda_sweeps, sweeps
from rnnfast._backends.cuda_sweeps import DTYPES
from rnnfast._backends.sizes import Arrays, shapes_of, sizes_of_call
from rnnfast._backends.sweeps import BackwardArrays, ForwardArrays, Sweep
from rnnfast._backends.types import Constants, Inputs, SomeOutputs, Stack


class Weights(NamedTuple):
    """Of one layer, its directions side by side, gates in the order of the cell's slots."""

    w_ih: Tensor  # (D*g*H,I)
    w_hh: Tensor  # (D,g*H,R)
    bias: Tensor | None  # (D*G*H) b_ih + b_hh, each in its slots
    w_hr: Tensor | None  # (D,P,H)
    unit: Tensor | None  # (D,U,H)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """(D,...); a view if there is only one direction"""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


class Call:
    """A checked call on dense tensors."""

    def __init__(self, stack: Stack, inputs: Inputs, constants: Constants) -> None:
        x = inputs.x
        batch_sizes, dropout, resets = constants
        if x.dtype not in DTYPES:
            raise RuntimeError(f"input: expected one of {DTYPES}, got {x.dtype}")
        self.stack, self.like = stack, x
        self.sizes = s = sizes_of_call(stack, inputs, batch_sizes)
        self.shapes = shapes_of(s, x.dtype)
        flat = self.dense_inputs("", inputs.flat())
        assert flat[0] is not None
        self.x, self.h0, self.c0 = flat[0].view(s.N, s.I), flat[1], flat[2]
        self.weights: list[Tensor] = flat[3:]  # type: ignore[assignment]
        self.dropout = None if dropout is None else self.dense("dropout_masks", dropout, self.shapes.dropout)
        if self.dropout is not None:
            self.dropout = self.dropout.view(stack.L - 1, s.N, stack.D * s.R)
        self.batch_sizes = self.offsets = None
        if batch_sizes is not None:
            self.batch_sizes = cpu.dense("batch_sizes", batch_sizes, (s.T,), torch.int64)
        address = 0 if self.batch_sizes is None else self.batch_sizes.data_ptr()
        rows = cpu.shape_of(s, address).rows  # checks them
        if rows != s.N:
            raise RuntimeError(f"input: expected {rows} rows, the sum of batch_sizes, got {s.N}")
        if self.batch_sizes is not None:
            first_rows = torch.tensor(list(accumulate(self.batch_sizes.tolist(), initial=0)), device="cpu")
            self.offsets = cuda_sweeps.to_device(first_rows, x.device)
        if resets is not None:
            resets = cpu.as_resets(resets, self.shapes.rows, x.device).flatten()
        self.sweep = Sweep(stack.cell_index, stack.D, s.H, s.P, s.T, s.B, self.batch_sizes, self.offsets, resets)

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

    def _all_dense(self, what: str, arrays: Arrays, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
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
        return self.like.new_empty(shape, dtype=sweeps.wide(self.like.dtype) if wide else None)

    def of_layer(self, tensor: Tensor | None, layer: int) -> Tensor | None:
        """(D,B,...) of states (L*D,B,...)"""
        D = self.stack.D
        return None if tensor is None else tensor[layer * D : (layer + 1) * D]

    def wide_state(self, tensor: Tensor | None, layer: int) -> Tensor | None:
        """(D,B,H) a copy to count on with, zeros for None; None of a cell without c"""
        s = self.sizes
        if not self.stack.has_c:
            return None
        state = self.empty(self.stack.D, s.B, s.H, wide=True)
        given = self.of_layer(tensor, layer)
        return state.zero_() if given is None else state.copy_(given)

    def weights_of(self, layer: int) -> Weights:
        D, cell, bias = self.stack.D, self.stack.cell, None
        per = self.stack.weights_each(self.weights)
        own = [self.weights[k * per : (k + 1) * per] for k in range(layer * D, (layer + 1) * D)]
        w_ih = _side_by_side([cell.to_slots(w[0], cell.input).flatten(0, 1) for w in own])
        w_hh = _side_by_side([cell.to_slots(w[1], cell.recurrent).flatten(0, 1) for w in own])
        if self.stack.bias:
            b_ih = _side_by_side([cell.to_slots(w[2], cell.input) for w in own])  # (D,g,H)
            b_hh = _side_by_side([cell.to_slots(w[3], cell.recurrent) for w in own])
            bias = cell.pre_activations(b_ih, b_hh).flatten()
        last = _side_by_side([w[-1] for w in own])
        w_hr, unit = (last if self.sizes.P else None), (last if cell.unit_parameters else None)
        return Weights(w_ih.flatten(0, 1), w_hh, bias, w_hr, unit)

    def torchs_w_ih(self, layer: int) -> Tensor:
        """(D*g*H,I) as torch orders the gates"""
        D, per = self.stack.D, self.stack.weights_each(self.weights)
        return _side_by_side([self.weights[k * per] for k in range(layer * D, (layer + 1) * D)]).flatten(0, 1)

    def start(self, below: Tensor, w: Weights, gates: Tensor) -> None:
        """gates (N,D,G,H) = W_ih x + biases"""
        cell, (N, D, G, H) = self.stack.cell, gates.shape
        with cuda_sweeps.products_as_cudnns(below):
            if cell.input == slice(0, G):
                flat = gates.view(N, D * G * H)
                if w.bias is None:
                    torch.mm(below, w.w_ih.T, out=flat)
                else:
                    torch.addmm(w.bias, below, w.w_ih.T, out=flat)
                return
            if w.bias is None:
                gates.zero_()
            else:
                gates.copy_(w.bias.view(D, G, H))
            gates[:, :, cell.input] += (below @ w.w_ih.T).view(N, D, -1, H)

    def run_forward(self, arrays: ForwardArrays) -> None:
        cuda_sweeps.sweeps_for(self.like).forward(self.sweep, arrays)

    def run_backward(self, arrays: BackwardArrays, add: bool) -> None:
        cuda_sweeps.sweeps_for(self.like).backward(self.sweep, arrays, add)


class Saved:
    """The parts of a reserve, layer by layer: as many numbers as on the CPU (csrc/cpu/stack/layout.h), in the order of
    rows, so that both directions are one product.

        gates (L,N,D,G,H), of a cell that saves them    c (L,N,D,H), of a cell with c
        m (L,N,D,H), projected: outputs before W_hr     hidden (L-1,N,D*R): outputs of the layers below the top

    Without a reserve, memory of their own for what a sweep writes anyway.
    """

    def __init__(self, call: Call, reserve: Tensor | None) -> None:
        self.call, self.reserve = call, reserve
        s, stack, cell = call.sizes, call.stack, call.stack.cell
        self.units = s.N * stack.D * s.H  # of a layer
        sizes = cell.gates * cell.saves_gates, cell.has_c, s.P > 0
        self.starts = list(accumulate((stack.L * self.units * size for size in sizes), initial=0))

    def _part(self, start: int, *shape: int) -> Tensor:
        if self.reserve is None:
            return self.call.empty(*shape)
        return self.reserve[start : start + prod(shape)].view(shape)

    def gates(self, layer: int) -> Tensor:
        """(N,D,G,H)"""
        s, stack = self.call.sizes, self.call.stack
        return self._part(layer * stack.gates * self.units, s.N, stack.D, stack.gates, s.H)

    def c(self, layer: int) -> Tensor | None:
        """(N,D,H)"""
        return self._states(1, layer) if self.call.stack.has_c else None

    def m(self, layer: int) -> Tensor | None:
        """(N,D,H)"""
        return self._states(2, layer) if self.call.sizes.P else None

    def _states(self, part: int, layer: int) -> Tensor:
        s = self.call.sizes
        return self._part(self.starts[part] + layer * self.units, s.N, self.call.stack.D, s.H)

    def hidden(self, layer: int) -> Tensor:
        """(N,D*R)"""
        s, D = self.call.sizes, self.call.stack.D
        return self._part(self.starts[3] + layer * s.N * D * s.R, s.N, D * s.R)
