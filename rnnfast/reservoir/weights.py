"""The random weights of a reservoir: drawn, and scaled by their spectral radius.

Dims: I inputs, H reservoir units, O outputs, F fan-in (recurrent connections into each unit).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray

DENSE_EIGENVALUES_UP_TO = 200  # units: LAPACK for all eigenvalues costs less than ARPACK for the largest ones
RADIUS_DIGITS = 10
KEYS_AT_ONCE = 1 << 22  # random numbers held while sources are chosen


class Drawn(NamedTuple):
    """Weights before scaling: w has the spectral radius 1, all others are uniform on [-1, 1)."""

    w: Array  # (H,F) recurrent: w[j,k] leads from unit sources[j,k] to unit j
    sources: Array | None  # (H,F) int32, ascending in each row; None: F = H, every unit
    w_in: Array  # (H,I)
    bias: Array  # (H,)
    w_fb: Array  # (H,O)


def draw(seed: int, I: int, H: int, O: int, fan_in: int) -> Drawn:  # noqa: E741
    """Draw a reservoir.

    Every part has a PCG64 stream of its own, spawned from `seed`, so that the recurrent matrix does not change with the
    number of inputs. Only uniform numbers are used: they are the generator's bits times 2^-53, the same on every
    machine, which numbers through log or exp need not be.
    """
    w_stream, source_stream, in_stream, bias_stream, fb_stream = (
        np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(5)
    )
    sources = None if fan_in == H else _choose_sources(source_stream, H, fan_in)
    w = _uniform(w_stream, (H, fan_in))
    w /= _rounded(spectral_radius(w, sources))
    return Drawn(w, sources, _uniform(in_stream, (H, I)), _uniform(bias_stream, (H,)), _uniform(fb_stream, (H, O)))


def _uniform(stream: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 2 * stream.random(shape) - 1


def _choose_sources(stream: np.random.Generator, H: int, fan_in: int) -> Array:
    """For each unit `fan_in` different ones out of H: those with the smallest of H random keys."""
    rows = max(1, KEYS_AT_ONCE // H)
    parts = [
        np.argpartition(stream.random((min(rows, H - start), H)), fan_in, axis=1)[:, :fan_in]
        for start in range(0, H, rows)
    ]
    return np.sort(np.concatenate(parts), axis=1).astype(np.int32)


def matrix(w: Array, sources: Array | None):
    """The recurrent matrix (H,H): a scipy.sparse.csr_array, or `w` itself if it is dense."""
    if sources is None:
        return w
    from scipy.sparse import csr_array

    H, F = w.shape
    return csr_array((w.ravel(), sources.ravel(), np.arange(0, H * F + 1, F)), shape=(H, H))


def spectral_radius(w: Array, sources: Array | None = None, leak: float = 1.0) -> float:
    """The largest modulus of an eigenvalue of (1 - leak) I + leak W.

    By LAPACK for small matrices, else by ARPACK (scipy's sparse eigensolver) from a fixed start vector.

    Args:
        w: (H,F) weights into each unit, or all of W (H,H).
        sources: (H,F) where they come from; None: w is W.
        leak: a; the default 1 leaves W itself.

    Raises:
        ValueError: W has numbers that are not finite.
    """
    if not np.isfinite(w).all():
        raise ValueError("spectral_radius: the matrix has numbers that are not finite")
    H = len(w)
    W = matrix(w, sources)
    if H <= DENSE_EIGENVALUES_UP_TO:
        W = W if sources is None else W.toarray()
        return float(np.abs(np.linalg.eigvals((1 - leak) * np.eye(H) + leak * W)).max())
    from scipy.sparse.linalg import LinearOperator, eigs

    leaky = LinearOperator((H, H), matvec=lambda v: (1 - leak) * v + leak * (W @ v), dtype=w.dtype)
    start = np.random.Generator(np.random.PCG64(0)).random(H) - 0.5
    # The eigenvalues of a random matrix crowd on a circle: a few more than one, and room for them, converge sooner.
    values = eigs(leaky, k=4, ncv=min(H, 60), v0=start, return_eigenvectors=False, maxiter=100 * H)
    return float(np.abs(values).max())


def _rounded(radius: float) -> float:
    """Without the last digits: they depend on the BLAS of the machine, and the weights shall not."""
    if radius == 0:
        raise ValueError("the recurrent matrix has the spectral radius 0: it cannot be scaled to another one")
    return float(f"{radius:.{RADIUS_DIGITS - 1}e}")
