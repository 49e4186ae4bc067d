"""Linear readouts by ridge regression, from sums over the data alone, and by recursive least squares.

Dims: n rows, Z features = 1 + I + H, O outputs, S regressions side by side, K values of the ridge.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnfast import _C


class Sums(NamedTuple):
    """All that ridge regression needs of the data, however long: X^T X and X^T Y in float64."""

    gram: Tensor  # (S,Z,Z), lower triangle; what is above is not to be used
    moment: Tensor  # (S,Z,O)
    rows: list[int]  # [1] how many

    @classmethod
    def cat(cls, parts: list[Sums]) -> Sums:
        return cls(torch.cat([p.gram for p in parts]), torch.cat([p.moment for p in parts]), [*parts[0].rows])

    def of(self, s: int) -> Sums:
        """Those of one regression, without a copy."""
        return Sums(self.gram[s : s + 1], self.moment[s : s + 1], self.rows)

    @classmethod
    def zeros(cls, S: int, Z: int, O: int) -> Sums:  # noqa: E741
        return cls(torch.zeros(S, Z, Z, dtype=torch.float64), torch.zeros(S, Z, O, dtype=torch.float64), [0])

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (S,n,Z), Y (n,O), float64."""
        S, n, Z = X.shape
        if X.stride()[1:] != (Z, 1):
            X = X.contiguous()
        _C.add_gram(S, n, Z, X.data_ptr(), X.stride(0), self.gram.data_ptr(), torch.get_num_threads())
        self.moment.baddbmm_(X.mT, Y.expand(len(X), -1, -1))
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
    return torch.cholesky_solve(sums.moment, factor).mT.contiguous()


class LeaveOneOut:
    """Squared errors of each row's prediction from a fit to all the other rows, for several ridges, without refitting:
    e_i / (1 - h_i) with h_i = x_i^T (X^T X + ridge I)^-1 x_i (Allen's PRESS).

    One eigendecomposition of the Gram matrix serves every ridge; then the data have to pass once more.
    """

    def __init__(self, sums: Sums, ridges: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(sums.gram)  # (S,Z), (S,Z,Z); eigh reads the lower triangle
        self.inverse = 1 / (values.clamp_min(0)[:, None] + ridges[:, None])  # (S,K,Z)
        self.inverse[~torch.isfinite(self.inverse)] = 0
        self.moment = self.vectors.mT @ sums.moment  # (S,Z,O)
        self.errors = torch.zeros(self.inverse.shape[:2], dtype=torch.float64)  # (S,K)

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
        self.errors = torch.zeros(S, len(ridges), dtype=torch.float64)  # (S,K)

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (S,n,Z), Y (n,O)."""
        for k, weights in enumerate(self.weights):
            self.errors[:, k] += (Y - X @ weights.mT).square().sum((1, 2))


class RecursiveLeastSquares:
    """Online ridge regression with forgetting: after rows 1..n it minimises
    sum_i f^(n-i) |y_i - W x_i|^2 + f^n ridge |W|^2, whatever the blocks in which the rows came.

    Source: the matrix inversion lemma applied to a block of rows (Haykin, Adaptive Filter Theory, recursive least
    squares, is the case of blocks of one row).

    Args:
        inverse: (Z,Z) P = (X^T X + ridge I)^-1 of what is known before.
        weights: (O,Z) W before.
        forgetting: f in (0, 1].
    """

    BLOCK = 64  # rows: a block costs one product with P instead of one for each row

    def __init__(self, inverse: Tensor, weights: Tensor, forgetting: float = 1.0) -> None:
        self.inverse, self.weights, self.forgetting = inverse, weights, forgetting

    def add(self, X: Tensor, Y: Tensor) -> None:
        """X (n,Z), Y (n,O)."""
        for x, y in zip(X.split(self.BLOCK), Y.split(self.BLOCK), strict=True):
            self._add(x, y)

    def _add(self, x: Tensor, y: Tensor) -> None:
        n, f = len(x), self.forgetting
        along = x @ self.inverse  # (n,Z)
        noise = torch.tensor([f ** (i + 1) for i in range(n)], dtype=torch.float64)  # f^n / f^(n-1-i)
        gain = torch.linalg.solve(along @ x.mT + torch.diag(noise), along).mT  # (Z,n)
        self.weights = self.weights + (y - x @ self.weights.mT).mT @ gain.mT
        inverse = (self.inverse - gain @ along) / f**n
        self.inverse = (inverse + inverse.mT) / 2  # round-off must not make it lopsided
