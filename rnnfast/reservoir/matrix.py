"""The recurrent matrix as others see it.

Sparse connections come in runs: 16 neighbouring units hear, with weights of their own, 16 neighbours each time. That is
as good a random graph for the purpose, and the kernel loads a vector of sources at once where it would have to gather.

Dims: H reservoir units, F fan-in (recurrent connections into each unit).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rnnfast.reservoir.guard import untraced

Array = np.ndarray

RUN = 16  # neighbouring units that hear neighbouring units; csrc/unit.h


def sources(H: int, starts: Array) -> Array:
    """(H,F) where the connections into each unit come from. Run r of units, j = r RUN + l, hears the runs of units that
    begin at starts[r]: w[j,k] leads from unit (starts[r,k] + l) mod H to unit j."""
    run, place = np.divmod(np.arange(H), RUN)
    return (starts[run] + place[:, None]) % H


@untraced
def matrix(w: Array, starts: Array | None) -> Any:
    """The recurrent matrix (H,H): a scipy.sparse.csr_array, or `w` itself if it is dense."""
    if starts is None:
        return w
    from scipy.sparse import csr_array

    H, F = w.shape
    return csr_array((w.ravel(), sources(H, starts).ravel(), np.arange(0, H * F + 1, F)), shape=(H, H))
