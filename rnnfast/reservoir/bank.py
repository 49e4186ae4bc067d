"""Reservoirs in the compiled core: any number of the same size at once.

Dims: T steps, B sequences in each reservoir, I inputs of the kernel (all that drives it: x and fed back outputs),
H units, F fan-in, O outputs, S reservoirs = M recurrent matrices * Q reservoirs on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnfast import _C
from rnnfast.reservoir.guard import untraced
from rnnfast.reservoir.matrix import matrix

UNITS = {"tanh": 0, "relu": 1, "identity": 2}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_RESERVOIRS = {torch.float32: _C.ReservoirsFloat32, torch.float64: _C.ReservoirsFloat64}

# Share of connections that are there from which a dense matrix is faster; see benchmarks/NOTES.md.
DENSE_FROM = 0.5


class Matrix(NamedTuple):
    """A recurrent matrix as in weights.Drawn; float32 where it is sparse."""

    w: np.ndarray  # (H,F)
    starts: np.ndarray | None  # (H/RUN,F)


class Inputs(NamedTuple):
    """What reservoirs on one matrix differ in: h_t = (1-a) h_{t-1} + a f(W_in u_t + b + s W h_{t-1})."""

    w_in: np.ndarray  # (H,I)
    bias: np.ndarray  # (H,)
    leak: float  # a
    scale: float  # s


class Readouts(NamedTuple):
    """y = b + W_x x + W_h h of each reservoir."""

    bias: Tensor  # (S,O)
    w_x: Tensor  # (S,O,E)
    w_h: Tensor  # (S,O,H)


class Bank:
    """Reservoirs ready to run.

    Args:
        unit: 'tanh', 'relu' or 'identity'.
        dtype: torch.float32 or torch.float64.
        matrices: M of them, of the same sizes.
        inputs: M*Q, those of the first matrix first.
    """

    @untraced
    def __init__(self, unit: str, dtype: torch.dtype, matrices: Sequence[Matrix], inputs: Sequence[Inputs]) -> None:
        self.dtype = dtype
        self.H, self.F = matrices[0].w.shape
        self.I = inputs[0].w_in.shape[1]
        self.S = len(inputs)
        numbers = np.float32 if dtype == torch.float32 else np.float64
        dense = matrices[0].starts is None or self.F >= DENSE_FROM * self.H
        w = _stack([_dense(m) for m in matrices], numbers) if dense else None
        sparse = None if dense else _stack([m.w for m in matrices], np.float32)
        starts = None if dense else _stack([m.starts for m in matrices if m.starts is not None], np.int32)
        arrays = [w, sparse, starts, *[_stack(part, numbers) for part in zip(*inputs, strict=True)]]
        addresses = [0 if a is None else a.ctypes.data for a in arrays]  # the core copies from there
        M = len(matrices)
        self._core = _RESERVOIRS[dtype](
            UNITS[unit], M, self.S // M, self.I, self.H, self.H if dense else self.F, addresses
        )

    def is_serial(self, B: int) -> bool:
        """Does a run of B sequences leave all threads but one idle?"""
        threads = torch.get_num_threads()
        return threads > 1 and self._core.threads_for(B, threads) == 1

    @untraced
    def drive(
        self, u: Tensor, h: Tensor, states: Tensor, noise: Tensor | None = None, threads: int | None = None
    ) -> None:
        """Run with given inputs.

        Args:
            u: (S,B,T,I), or (B,T,I) for all reservoirs alike.
            h: (S,B,H) state before the first step; in place, that after the last one.
            states: (S,B,T,H), out: h_t. Rows may lie apart, as a part of the columns of a wider array.
            noise: (S,B,T,H), added to h_t.
            threads: as many as torch's unless it is said.
        """
        S, B, T, H = states.shape
        if states.numel() == 0:  # nothing to run, and no address
            return
        stride = states.stride(2)
        expected = (B * T * stride, T * stride, stride, 1)
        if any(n > 1 and a != b for n, a, b in zip(states.shape, states.stride(), expected, strict=True)):
            raise ValueError(f"states: expected rows at equal distances, got strides {states.stride()}")
        u = self._input("u", u, B, T, self.I)
        self._check("h", h, (S, B, H))
        self._check("states", states, (self.S, B, T, self.H), dense=False)
        if noise is not None:
            self._check("noise", noise, (S, B, T, H))
        arrays = [u.data_ptr(), 0 if noise is None else noise.data_ptr(), h.data_ptr(), states.data_ptr(), *[0] * 5]
        self._core.run(B, T, u.dim() == 3, stride, 0, 0, arrays, threads or torch.get_num_threads())

    @untraced
    def loop(self, x: Tensor, h: Tensor, y0: Tensor, readouts: Readouts) -> Tensor:
        """Run with the outputs fed back: u_t = [x_t, y_{t-1}], y_t = b + W_x u_t[:E] + W_h h_t.

        Args:
            x: (S,B,T,X), or (B,T,X) for all reservoirs alike, X = I - O, may be 0.
            h: (S,B,H) state before the first step; in place, that after the last one.
            y0: (S,B,O) y before the first step.
            readouts: one for each reservoir.

        Returns:
            y (S,B,T,O)
        """
        S, B, O = y0.shape  # noqa: E741
        T, E = x.shape[-2], readouts.w_x.shape[2]
        x = self._input("x", x, B, T, self.I - O)
        self._check("h", h, (self.S, B, self.H))
        self._check("y0", y0, (self.S, B, O))
        for name, shape in (("bias", (S, O)), ("w_x", (S, O, E)), ("w_h", (S, O, self.H))):
            self._check(f"readouts.{name}", getattr(readouts, name), shape)
        y = y0.new_empty(S, B, T, O)
        arrays = [x.data_ptr(), 0, h.data_ptr(), 0, *[a.data_ptr() for a in (*readouts, y0, y)]]
        self._core.run(B, T, x.dim() == 3, 0, O, E, arrays, torch.get_num_threads())
        return y

    def _input(self, name: str, u: Tensor, B: int, T: int, width: int) -> Tensor:
        u = u.resolve_neg().contiguous()
        self._check(name, u, (B, T, width) if u.dim() == 3 else (self.S, B, T, width))
        return u

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dense: bool = True) -> None:
        wrong = tensor.shape != shape or tensor.dtype != self.dtype or not tensor.is_cpu or tensor.is_neg()
        if wrong or (dense and not tensor.is_contiguous()):
            raise ValueError(
                f"{name}: expected a dense {self.dtype} {shape} on the CPU, got {tensor.dtype} {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}, on {tensor.device}"
            )


def products(m: Matrix) -> Any:
    """A sparse matrix as a scipy.sparse.linalg.LinearOperator on the kernel: linear units hold W h after one step."""
    from scipy.sparse.linalg import LinearOperator

    H = len(m.w)
    bank = Bank("identity", torch.float64, [m], [Inputs(np.zeros((H, 0)), np.zeros(H), 1.0, 1.0)])
    u = torch.empty(1, 1, 0, dtype=torch.float64, device="cpu")
    h, states = u.new_empty(1, 1, H), u.new_empty(1, 1, 1, H)

    def product(vector: np.ndarray) -> np.ndarray:
        h[0, 0] = torch.from_numpy(vector)
        bank.drive(u, h, states)
        return states.numpy().reshape(H)

    return LinearOperator((H, H), product, dtype=np.float64)


def _stack(arrays: Sequence[Any], dtype: type) -> np.ndarray:
    """(n,...), row after row in memory, whatever the order of what is stacked."""
    return np.ascontiguousarray(np.stack(arrays), dtype)


def _dense(m: Matrix) -> np.ndarray:
    """(H,H)"""
    W = matrix(m.w, m.starts)
    return W if isinstance(W, np.ndarray) else W.toarray()
