"""Linear readouts by ridge regression, from sums over the data alone, and by recursive least squares.

Dims: n rows, Z features = 1 + I + H, O outputs, S regressions side by side, K values of the ridge.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnfast import _C
from rnnfast.reservoir.guard import untraced

try:
    from scipy.linalg.lapack import dtpqrt  # a triangle and rows below it, made triangular again
except ImportError:  # then from all rows at once, at far greater cost
    dtpqrt = None


class Sums(NamedTuple):
    """All that ridge regression needs of the data, however long: X^T X and Y^T X in float64."""

    gram: Tensor  # (S,Z,Z), lower triangle; what is above is not to be used
    moment: Tensor  # (S,O,Z)
    rows: list[int]  # [1] how many

    @classmethod
    def cat(cls, parts: list[Sums]) -> Sums:
        return cls(torch.cat([p.gram for p in parts]), torch.cat([p.moment for p in parts]), [*parts[0].rows])

    def of(self, s: int) -> Sums:
        """Those of one regression, without a copy."""
        return Sums(self.gram[s : s + 1], self.moment[s : s + 1], self.rows)

    @classmethod
    def zeros(cls, S: int, Z: int, O: int) -> Sums:  # noqa: E741
        gram = torch.zeros(S, Z, Z, dtype=torch.float64, device="cpu")
        return cls(gram, gram.new_zeros(S, O, Z), [0])

    @untraced
    def add(self, X: Tensor, Y: Tensor, helper: Executor | None = None) -> None:
        """X (S,n,Z), Y (n,O), float64. A thread of `helper` counts as one of torch's, and joins in once it is free."""
        S, n, Z = X.shape
        if X.stride()[1:] != (Z, 1):
            X = X.contiguous()
        Y = Y.contiguous()
        arrays = [array.data_ptr() for array in (X, Y, self.gram, self.moment)]
        gram = _C.GramSum(S, n, Z, Y.shape[1], X.stride(0), arrays)
        if helper:
            helper.submit(gram.work, 1)
        gram.work(max(1, torch.get_num_threads() - (helper is not None)))
        self.rows[0] += len(Y)


def solve(sums: Sums, ridges: Tensor) -> Tensor:
    """W (S,O,Z) with (X^T X + ridge I) W^T = X^T Y, by Cholesky; one ridge (S) for each.

    Raises:
        numpy.linalg.LinAlgError: the matrix is singular to float64.
    """
    regular = sums.gram.clone()
    regular.diagonal(dim1=1, dim2=2).add_(ridges[:, None])
    largest = regular.diagonal(dim1=1, dim2=2).amax(1)  # (S)
    factor, info = torch.linalg.cholesky_ex(regular)
    pivots = factor.diagonal(dim1=1, dim2=2).amin(1) ** 2
    Z = regular.shape[1]
    # without a ridge nothing but round-off keeps the pivots of dependent features above 0
    singular = (info != 0) | ((ridges == 0) & (pivots <= Z * torch.finfo(torch.float64).eps * largest))
    if singular.any():
        ridge = float(ridges[singular][0])
        raise np.linalg.LinAlgError(
            f"the Gram matrix of {Z} features from {sums.rows[0]} rows is singular with ridge={ridge:g}: "
            "give more data or a larger ridge"
        )
    return torch.cholesky_solve(sums.moment.mT, factor).mT.contiguous()


class LeaveOneOut:
    """Squared errors of each row's prediction from a fit to all the other rows, for several ridges, without refitting:
    e_i / (1 - h_i) with h_i = x_i^T (X^T X + ridge I)^-1 x_i (Allen's PRESS).

    One eigendecomposition of the Gram matrix serves every ridge; then the data have to pass once more.
    """

    def __init__(self, sums: Sums, ridges: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(sums.gram)  # (S,Z), (S,Z,Z); eigh reads the lower triangle
        self.inverse = 1 / (values.clamp_min(0)[:, None] + ridges[:, None])  # (S,K,Z)
        self.inverse[~torch.isfinite(self.inverse)] = 0
        self.moment = self.vectors.mT @ sums.moment.mT  # (S,Z,O)
        self.errors = self.inverse.new_zeros(self.inverse.shape[:2])  # (S,K)

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (S,n,Z), Y (n,O)."""
        along = X @ self.vectors  # (S,n,Z)
        left = (1 - along.square() @ self.inverse.mT).clamp_min(torch.finfo(torch.float64).eps)  # (S,n,K): 1 - h
        for k in range(self.inverse.shape[1]):
            error = Y - along @ (self.inverse[:, k, :, None] * self.moment)  # (S,n,O)
            self.errors[:, k] += (error / left[:, :, k, None]).square().sum((1, 2))


class Validation:
    """Squared errors of fits with several ridges on other data."""

    def __init__(self, sums: Sums, ridges: Tensor) -> None:
        S = len(sums.gram)
        self.weights = torch.stack([solve(sums, ridge.expand(S)) for ridge in ridges])  # (K,S,O,Z)
        self.errors = self.weights.new_zeros(S, len(ridges))  # (S,K)

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (S,n,Z), Y (n,O)."""
        for k, weights in enumerate(self.weights):
            self.errors[:, k] += (Y - X @ weights.mT).square().sum((1, 2))


class RecursiveLeastSquares:
    """Online ridge regression with forgetting: after rows 1..n it minimises
    sum_i f^(n-i) |y_i - W x_i|^2 + r |W|^2, whatever the blocks in which the rows came.

    r is f^n ridge, the share of the ridge that is not forgotten yet, as long as the rows excite all directions. Where
    they do not (a sine, a constant), r would fall until round-off alone said what W is there. Therefore it is looked,
    once in a period of P rows, which part of A = sum_i f^(n-i) x_i x_i^T + r I is older than that: f^P A_{n-P}, and
    what was put back since. If that is nearly all in some direction, the rows of the period have said nothing about it,
    and up to the next look r is held between `HELD` and ten times `HELD` of the ridge.

    What is kept is not A but a root of it, R with R^T R = A, and z with R^T z = sum_i f^(n-i) x_i y_i^T, so that
    R W^T = z. New rows are brought in by reflections. The condition number of R is the square root of A's, and nothing
    is ever divided by f.

    Sources: square-root information filter, G. J. Bierman, Factorization Methods for Discrete Sequential Estimation
    (1977), and QR-RLS, S. Haykin, Adaptive Filter Theory.

    Args:
        root: (Z+O,Z+O) [[R, z], [0, e]], upper triangular, column after column in memory; e^T e are the squared errors.
        ridge: r in it.
        forgetting: f in (0, 1].
    """

    BLOCK = 64  # rows that are brought in at once
    HELD = 1e-4  # of the ridge, at least, where it is held; weight of a row that leaves the period, at most
    VANISHED = 1e-12  # weight of a row that leaves the period, at least
    OLD = 0.9  # share of A in one direction that is older than the period, from which on the ridge is held
    NOISE = 1e-24  # of A, relative to its largest pivot: what is smaller is not told from round-off
    SMALLEST = 1e-20  # that is held, likewise

    def __init__(self, root: Tensor, Z: int, ridge: float, forgetting: float = 1.0) -> None:
        self.root, self.Z, self.ridge, self.forgetting = root, Z, ridge, forgetting
        self.left, self.held = ridge, False  # r, and whether it must not fall further
        self._start_period()

    @classmethod
    def start(cls, Z: int, O: int, ridge: float) -> RecursiveLeastSquares:  # noqa: E741
        """Before any row: W = 0."""
        root = torch.zeros(Z + O, Z + O, dtype=torch.float64, device="cpu").mT
        root.diagonal()[:Z] = math.sqrt(ridge)
        return cls(root, Z, ridge)

    @classmethod
    def resume(cls, gram: Tensor, weights: Tensor, ridge: float) -> RecursiveLeastSquares:
        """After ridge regression: gram (Z,Z), lower triangle; weights (O,Z)."""
        O, Z = weights.shape  # noqa: E741
        regular = gram.clone()
        regular.diagonal().add_(ridge)
        R = torch.linalg.cholesky(regular).mT
        root = R.new_zeros(Z + O, Z + O).mT
        root[:Z, :Z], root[:Z, Z:] = R, R @ weights.mT
        return cls(root, Z, ridge)

    @property
    def weights(self) -> Tensor:
        """W (O,Z)"""
        R, z = self.root[: self.Z, : self.Z], self.root[: self.Z, self.Z :]
        return torch.linalg.solve_triangular(R, z, upper=True).mT.contiguous()

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (n,Z), Y (n,O), float64.

        Raises:
            RuntimeError: numbers that are not finite.
        """
        rows = torch.cat([X, Y], 1).numpy()
        if not np.isfinite(rows).all():
            raise RuntimeError("the states of the reservoir have left the finite numbers")
        period, tenth = self._rows_to(self.HELD, at_least=2 * self.Z), self._rows_to(0.1)
        while len(rows):
            n = min(len(rows), self.BLOCK, max(1, period - self.rows), tenth - self.rows % tenth)
            weight = self.forgetting**n
            self.root *= math.sqrt(weight)
            self.left *= weight
            self.old *= weight
            self.back *= weight
            ages = np.arange(n - 1, -1, -1)
            self._bring_in(rows[:n] * self.forgetting ** (ages[:, None] / 2))
            self.rows += n
            if self.rows >= period:
                self.held = self._is_left_out()
                self._start_period()
            if self.held and self.rows % tenth == 0:
                self._hold()
            rows = rows[n:]

    def _rows_to(self, weight: float, at_least: int = 1) -> int:
        """How many make an old one weigh so little, or as many as asked for, unless that makes it vanish."""
        if self.forgetting == 1:
            return sys.maxsize
        faded, vanished = (math.log(share) / math.log(self.forgetting) for share in (weight, self.VANISHED))
        return max(1, int(min(max(at_least, faded), vanished)))

    def _start_period(self) -> None:
        self.before = self.root[: self.Z, : self.Z].clone()
        self.rows, self.old, self.back = 0, 1.0, 0.0  # since then; of `before` in A; of what was put back in r

    def _is_left_out(self) -> bool:
        """Is a direction left out by the rows of this period?"""
        R, eye = self.root[: self.Z, : self.Z], torch.eye(self.Z, dtype=self.root.dtype, device="cpu")
        inverse = torch.linalg.solve_triangular(R, eye, upper=True)
        if not float(inverse.square().sum()) * self.NOISE * self._largest_pivot() < 1:  # nor if that is no number
            return True
        older = torch.cat([math.sqrt(self.old) * self.before @ inverse, math.sqrt(self.back) * inverse])
        share_of_all = float(older.square().sum())  # cheaper, and not less than that of one direction
        return share_of_all > self.OLD and float(torch.linalg.matrix_norm(older, 2)) ** 2 > self.OLD

    def _hold(self) -> None:
        """r is ten times what it must not fall below, or more."""
        least = max(self.HELD * self.ridge, self.SMALLEST * self._largest_pivot())
        missing = max(0.0, 10 * least - self.left)
        rows = math.sqrt(missing) * torch.eye(*self.root.shape, dtype=self.root.dtype, device="cpu")[: self.Z]
        self._bring_in(rows.numpy(), triangular=True)
        self.left, self.back = self.left + missing, self.back + missing

    def _largest_pivot(self) -> float:
        return float(self.root.diagonal()[: self.Z].square().max())

    def _bring_in(self, rows: np.ndarray, triangular: bool = False) -> None:
        """Rows [x, y] (n,Z+O): R^T R grows by x^T x, R^T z by x^T y."""
        before = self.root.numpy()
        if dtpqrt is None:
            root = np.asfortranarray(np.linalg.qr(np.concatenate([rows, before]), mode="r"))  # the heaviest rows first
        else:
            columns = min(16, len(before))  # that are reflected at once
            root, *_ = dtpqrt(len(rows) if triangular else 0, columns, before, rows, overwrite_a=1)
        self.root = torch.from_numpy(root)
