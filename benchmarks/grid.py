"""What is measured: shapes, passes, the presets, and the FLOPs of each."""

# ruff: noqa: E741 (I is the legend's letter)
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

GATES = {"lstm": 4, "rnn": 1, "gru": 3}
MODES = {"lstm": "LSTM", "rnn": "RNN_TANH", "gru": "GRU"}
SHORTEST = 0.14  # of a packed batch, in units of T: lengths spread evenly from here to T fill 57 % of it


@dataclass(frozen=True)
class Shape:
    """One stack of recurrent layers and its input."""

    cell: str  # "lstm", "rnn" (Elman, tanh) or "gru"
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    P: int = 0
    dtype: str = "float32"
    packed: bool = False

    @property
    def G(self) -> int:
        return GATES[self.cell]

    @property
    def mode(self) -> str:
        """As torch's modules name the cell."""
        return MODES[self.cell]

    @property
    def R(self) -> int:
        return self.P or self.H

    @property
    def lengths(self) -> list[int]:
        """(B) how long each sequence is, longest first."""
        if not self.packed:
            return [self.T] * self.B
        step = (1 - SHORTEST) / max(self.B - 1, 1)
        return [max(1, round(self.T * (1 - b * step))) for b in range(self.B)]

    @property
    def N(self) -> int:
        return sum(self.lengths)

    @property
    def label(self) -> str:
        """'T100 B32 I64 H64', then what is out of the ordinary."""
        extras = [f"L{self.L}"] * (self.L > 1) + [f"D{self.D}"] * (self.D > 1) + [f"P{self.P}"] * (self.P > 0)
        extras += [self.dtype] * (self.dtype != "float32")
        extras += [f"packed {self.N / (self.T * self.B):.0%}"] * self.packed
        return " ".join([f"T{self.T} B{self.B} I{self.I} H{self.H}", *extras])


@dataclass(frozen=True)
class Job:
    """One row of a table: a pass over a shape.

    kind: "inference" (no_grad), "forward_train" (forward that records for the backward pass), "train" (forward and
    backward), "step" (T=1, no_grad, the state carried on), "memory" (peak of one training step), or one of DERIVATIVES
    or STEPS.
    name: the kind, or a name that starts with it, where a table of its own is due.
    """

    shape: Shape
    kind: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.shape.cell} {self.name} {self.shape.label}"

    @property
    def base(self) -> str:
        """The kind, of one of STEPS without what it is done to."""
        return STEPS.get(self.kind, self.kind)

    @property
    def trains(self) -> bool:
        return self.base not in ("inference", "step", "compiled_inference")

    @property
    def is_of_cell(self) -> bool:
        return self.kind in STEPS and "cell" in self.kind

    @property
    def is_compiled(self) -> bool:
        return self.kind.startswith("compile")

    @property
    def flops(self) -> int | None:
        """Of the matrix products; of derivatives they are not counted."""
        if self.kind in DERIVATIVES:
            return None
        return train_flops(self.shape) if self.base in ("train", "memory") else forward_flops(self.shape)


def _widths(s: Shape) -> list[int]:
    """(L) the input size of each layer."""
    return [s.I] + [s.D * s.R] * (s.L - 1)


def forward_flops(s: Shape) -> int:
    """FLOPs of the matrix products of a forward pass, two for each multiply-add.

    Σ over layers of  D * (2 N G H (I_l + R) + 2 N H P),  I_0 = I, I_l = D R.  The elementwise work is not counted, and
    the first step's product with a zero state is counted, on all sides alike.
    """
    return sum(s.D * (2 * s.N * s.G * s.H * (width + s.R) + 2 * s.N * s.H * s.P) for width in _widths(s))


def train_flops(s: Shape) -> int:
    """FLOPs of the matrix products of forward and backward.

    Each product of the forward pass has two in the backward pass, one for its weight and one for its input:
    3 * forward_flops. Here x needs no gradient, so that layer 0 leaves its product for dx out:  - D * 2 N G H I.
    """
    return 3 * forward_flops(s) - s.D * 2 * s.N * s.G * s.H * s.I


# ------------------------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class Preset:
    jobs: tuple[Job, ...]
    seconds: float  # what the timing aims to take


PASSES = ("inference", "forward_train", "train")
DERIVATIVES = (
    "jvp_input",  # a tangent of x
    "jvp_weights",  # tangents of all weights
    "hessian_vector",  # jvp of the gradient in the weights
    "compiled_inference",
    "compiled_train",
    "compiled_model",  # a training step of the layer with a head and a loss
    "compile",  # how long torch.compile takes
    "double_backward",
    "per_sample",  # each sample's gradient, by vmap
)

STEPS = {  # of cells, and of layers asked for a few steps: what is done to them
    "cell_inference": "inference",
    "cell_forward_train": "forward_train",
    "cell_train": "train",
    "layer_inference": "inference",
    "layer_forward_train": "forward_train",
    "layer_train": "train",
    "compiled_cell_inference": "inference",
    "compiled_cell_train": "train",
    "compiled_layer_inference": "inference",
    "compiled_layer_train": "train",
}

STUDENT = (20, 32, 64, 64, 2)  # (T,B,I,H,L) of a first forecasting script

QUICK = (
    STUDENT,
    (50, 32, 1, 64, 1),  # one measured variable
    (100, 1, 32, 32, 1),
    (100, 32, 64, 64, 1),
    (100, 64, 128, 128, 1),
    (1000, 1, 128, 128, 1),
    (100, 32, 256, 256, 1),
    (100, 1, 1024, 1024, 1),
    (50, 32, 512, 512, 1),
    (20, 32, 1024, 1024, 1),
)
QUICK_STEPS = ((1, 1, 64, 64, 1), (1, 1, 256, 256, 2), (1, 32, 64, 64, 2), (1, 1, 1024, 1024, 1))

FULL = (
    STUDENT,
    (100, 1, 32, 32, 1),
    (100, 32, 64, 64, 1),
    (100, 32, 128, 128, 1),
    (100, 64, 128, 128, 1),
    (100, 32, 256, 256, 1),
    (100, 64, 512, 512, 1),
    (256, 16, 512, 512, 1),
    (1000, 1, 128, 128, 1),
    (1000, 8, 128, 128, 1),
    (100, 1, 1024, 1024, 1),
    (100, 1, 128, 128, 4),
)
BASE = (100, 32, 128, 128)  # (T,B,I,H) that the options vary
MEMORY = ((100, 32, 256, 256, 1), (1000, 8, 128, 128, 1), (100, 64, 512, 512, 1), (100, 64, 256, 256, 2))
COMPILED_T = (16, 512)
LONGER = (100, 300, 1000, 3000, 10_000)
WIDER = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ODD = (*range(60, 71), *range(120, 137))


def _jobs(shapes: Iterable[Shape], kinds: Iterable[str] = PASSES, suffix: str = "") -> list[Job]:
    kinds = tuple(kinds)
    return [Job(shape, kind, kind + suffix) for shape in shapes for kind in kinds]


def _options(cell: str) -> list[Shape]:
    """BASE in float64, bidirectional, and projected where the cell can be."""
    base = Shape(cell, *BASE)
    shapes = [replace(base, dtype="float64"), replace(base, L=2, D=2)]
    return shapes + ([replace(base, P=64)] if cell == "lstm" else [])


def _quick(cell: str) -> list[Job]:
    return _jobs(Shape(cell, *s) for s in QUICK) + _jobs((Shape(cell, *s) for s in QUICK_STEPS), ["step"])


def _full(cell: str) -> list[Job]:
    base = Shape(cell, *BASE)
    return [
        *_jobs(Shape(cell, *s) for s in FULL),
        *_jobs(_options(cell)),
        *_jobs((Shape(cell, *s) for s in QUICK_STEPS), ["step"]),
        *_jobs([replace(base, packed=True)], ["inference", "train"], "_packed"),
        *_jobs((Shape(cell, T, 8, 64, 64) for T in LONGER), ["train"], "_over_T"),
        *_jobs((Shape(cell, 50, B, 128, 128) for B in WIDER), ["train"], "_over_B"),
        *_jobs((Shape(cell, 50, 32, H, H) for H in ODD), ["train"], "_odd_H"),
        *_jobs((Shape(cell, *s) for s in MEMORY), ["memory"]),
        *_derivatives(cell),
    ]


def _derivatives(cell: str) -> list[Job]:
    timed = [kind for kind in DERIVATIVES if kind != "compile"]
    return [
        *_jobs((Shape(cell, *BASE), Shape(cell, *STUDENT)), timed),
        *_jobs((Shape(cell, T, *BASE[1:]) for T in COMPILED_T), ["compile"]),
    ]


LOOP = 20  # steps of a decoder
FEW_T, FEW_B, FEW_H = (1, 2, 4, 8), (1, 8, 64, 256), (8, 64, 256, 1024)
DEEP = ({"L": 2}, {"L": 4}, {"D": 2}, {"L": 2, "D": 2})
MOST_FLOPS = 4e9  # of a forward pass, so that a run ends


def _cells(cell: str) -> list[Job]:
    loops = [Shape(cell, T, B, H, H) for H in (1, *FEW_H) for B in FEW_B for T in (1, LOOP)]
    layers = [Shape(cell, T, B, H, H) for H in FEW_H for B in FEW_B for T in FEW_T]
    layers += [Shape(cell, 1, B, 64, 64, **options) for options in DEEP for B in (1, 64)]
    layers += [Shape(cell, 1, B, 64, 64, packed=True) for B in (1, 64)]
    layers += [Shape(cell, 1, 8, 64, 64, dtype="float64")]
    loops, layers = ([s for s in some if forward_flops(s) <= MOST_FLOPS] for some in (loops, layers))
    some_loops = [Shape(cell, T, B, H, H) for B, H in ((1, 64), (32, 256)) for T in (1, LOOP)]
    some_layers = [Shape(cell, 1, B, H, H, L) for B, H, L in ((1, 64, 1), (32, 256, 1), (1, 64, 2))]
    return [
        *_jobs(loops, ["cell_inference", "cell_forward_train", "cell_train"]),
        *_jobs(layers, ["layer_inference", "layer_forward_train", "layer_train"]),
        *_jobs(some_loops, ["compiled_cell_inference", "compiled_cell_train"]),
        *_jobs(some_layers, ["compiled_layer_inference", "compiled_layer_train"]),
    ]


GPU_H, GPU_B, GPU_DTYPES = (256, 512, 768, 1024), (8, 16, 32, 64, 128), ("bfloat16", "float16", "float32")


def _gpu(cell: str) -> list[Job]:
    """Every size that the goals name, in all numbers that tensor cores multiply (float32 is TF32, torch's default in
    recurrent layers), and the options at one size."""
    sizes = [(H, B) for H in GPU_H for B in GPU_B]
    plain = [Shape(cell, 512, B, H, H, dtype=dtype) for dtype in GPU_DTYPES for H, B in sizes]
    base = Shape(cell, 512, 32, 512, 512, dtype="bfloat16")
    return [
        *_jobs(plain, ["inference", "train"]),
        *_jobs([replace(base, I=64, H=64), replace(base, L=2), replace(base, D=2)], ["inference", "train"]),
        *_jobs([replace(base, packed=True)], ["inference", "train"], "_packed"),
        *_jobs([base, replace(base, H=1024, I=1024), replace(base, dtype="float32")], ["memory"]),
    ]


def _tiny(cell: str) -> list[Job]:
    return [
        *_jobs([Shape(cell, 5, 3, 4, 8), Shape(cell, 3, 2, 4, 8, L=2, D=2, dtype="float64")]),
        *_jobs([Shape(cell, 1, 1, 4, 8, L=2)], ["step"]),
        *_jobs([Shape(cell, 7, 3, 4, 8, packed=True)], ["inference", "train"], "_packed"),
    ]


CELLS = tuple(GATES)
PRESETS = {
    "tiny": Preset(tuple(job for cell in CELLS for job in _tiny(cell)), seconds=2),
    "quick": Preset(tuple(job for cell in CELLS for job in _quick(cell)), seconds=130),
    "derivatives": Preset(tuple(job for cell in CELLS for job in _derivatives(cell)), seconds=100),
    "cells": Preset(tuple(job for cell in CELLS for job in _cells(cell)), seconds=180),
    "full": Preset(tuple(job for cell in CELLS for job in _full(cell)), seconds=1400),
    "gpu": Preset(tuple(job for cell in CELLS for job in _gpu(cell)), seconds=300),
}
