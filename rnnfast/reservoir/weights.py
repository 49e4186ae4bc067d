"""The random weights of a reservoir: drawn, and scaled by their spectral radius.

Dims: I inputs, H reservoir units, O outputs, F fan-in (recurrent connections into each unit).

Every unit has the same number of sources, all different, and every unit is as likely as any other to be one; matrix.py
says how connections lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rnnfast.init import radius_of_products, spectral_radius
from rnnfast.reservoir.bank import Matrix, products
from rnnfast.reservoir.guard import untraced
from rnnfast.reservoir.matrix import RUN, matrix

Array = np.ndarray

RADIUS_DIGITS = 10
OWN_PRODUCTS_FROM = 80_000  # connections; of fewer scipy's product costs less than a call of the kernel from Python
NOISE_STREAM = 5  # of a seed; those before are the weights'


class Drawn(NamedTuple):
    """Weights before scaling, uniform on [-1, 1)."""

    w: Array  # (H,F) recurrent, into each unit; float32: sparse reservoirs in float64 read half as many bytes a step
    radius: float  # spectral radius of w
    starts: Array | None  # (H/RUN,F) int32, where connections come from, see matrix.sources(); None: F = H, every unit
    w_in: Array  # (H,I)
    bias: Array  # (H,)
    w_fb: Array  # (H,O)


TOPOLOGIES = ("random", "cycle")


@untraced
def draw(seed: int, I: int, H: int, O: int, fan_in: int, topology: str) -> Drawn:  # noqa: E741
    """Draw a reservoir: "random" with `fan_in` sources of each unit, or a "cycle", in which unit j hears unit j - 1
    alone and all weights are 1 or -1.

    Every part has a PCG64 stream of its own, spawned from `seed`, so that the recurrent matrix does not change with the
    number of inputs. Only uniform numbers are used: they are the generator's bits times 2^-53, the recurrent ones
    rounded to 24 bits, the same on every machine, which numbers through log or exp need not be.
    """
    w_stream, start_stream, in_stream, bias_stream, fb_stream = (
        np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(5)
    )
    starts: Array | None
    if topology == "cycle":
        starts = ((np.arange(0, H, RUN) - 1) % H).astype(np.int32)[:, None]
        w = np.sign(_uniform(w_stream, (H, 1))).astype(np.float32)
        radius = 1.0  # the H-th power of W is 1 or -1: so all eigenvalues have modulus 1
    else:
        starts = None if fan_in == H else _choose_starts(start_stream, H, fan_in)
        w = _uniform(w_stream, (H, fan_in)).astype(np.float32)
        radius = _rounded(_radius(w, starts))
    others = _uniform(in_stream, (H, I)), _uniform(bias_stream, (H,)), _uniform(fb_stream, (H, O))
    return Drawn(w, radius, starts, *others)


def noise_generator(seed: int) -> np.random.Generator:
    """Of the noise on the states, a stream of its own."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(NOISE_STREAM,))))


def _uniform(stream: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 2 * stream.random(shape) - 1


def _choose_starts(stream: np.random.Generator, H: int, fan_in: int) -> Array:
    """For each run of units `fan_in` different starts out of H: those with the smallest of H random keys."""
    runs = -(-H // RUN)
    keys = stream.random((runs, H))
    return np.sort(np.argpartition(keys, fan_in, axis=1)[:, :fan_in], axis=1).astype(np.int32)


def _radius(w: Array, starts: Array | None) -> float:
    """The spectral radius; of large sparse matrices by the reservoir's own products."""
    found = None
    if starts is not None and w.size >= OWN_PRODUCTS_FROM:
        found = radius_of_products(products(Matrix(w, starts)))
    return spectral_radius(matrix(w.astype(np.float64), starts)) if found is None else found


def _rounded(radius: float) -> float:
    """Without the last digits: they depend on the BLAS of the machine, and the weights shall not."""
    if radius == 0:
        raise ValueError("the recurrent matrix has the spectral radius 0: it cannot be scaled to another one")
    return float(f"{radius:.{RADIUS_DIGITS - 1}e}")
