"""One table of cases for every check of correctness, and the helpers that run a case.

A `Case` is one choice of cell, sizes and options. `make_inputs` draws its tensors from a seed; `run_module`
and `run_torch` run it through a module, `run_op` through `op.recurrent`, `run_reference` through the NumPy
truth. Each returns the same dictionary from name to float64 array:

    y (T,B,D*R), (B,T,D*R) or packed (N,D*R)    h_n (L*D,B,R)    c_n (L*D,B,H), LSTM only

and, unless it ran in inference mode, the gradients of  sum(y*dy) + sum(h_n*dh_n) + sum(c_n*dc_n):

    d_x    d_h0, d_c0 where the case has them    d_<name> for every weight, say d_weight_hh_l1_reverse

Dims: T steps, B batch, I input size, H hidden size, G gates, P proj_size, R size of h_t (P if projected, else
H), L layers, D directions, N rows of a packed batch.
"""

# ruff: noqa: E741 (I is the legend's letter)
from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import _C, reference
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.precision import MEDIUM

MODES = ("LSTM", "RNN_TANH", "RNN_RELU", "GRU")  # of torch.nn
LEAKY = ("LEAKY_TANH", "LEAKY_RELU")  # of rnnfast alone


@dataclass(frozen=True)
class Case:
    mode: str  # one of MODES or LEAKY
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    proj: int = 0  # 0: no projection; LSTM only
    bias: bool = True
    batch_first: bool = False  # of a padded input
    lengths: tuple[int, ...] | None = None  # (B,) in any order, the largest is T; None: padded, not packed
    hx: bool = True  # are initial states given?
    dropout: float = 0.0  # between layers
    resets: float = 0.0  # share of the steps that begin an episode

    @property
    def G(self) -> int:
        return BY_MODE[self.mode].gates

    @property
    def R(self) -> int:
        return self.proj or self.H

    @property
    def id(self) -> str:
        parts = [f"{self.mode}-T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.L}-D{self.D}"]
        parts += [f"P{self.proj}"] if self.proj else []
        parts += [] if self.bias else ["nobias"]
        parts += ["batchfirst"] if self.batch_first else []
        parts += [] if self.lengths is None else ["len" + ".".join(map(str, self.lengths))]
        parts += [] if self.hx else ["nohx"]
        parts += [f"dropout{self.dropout}"] if self.dropout else []
        parts += [f"resets{self.resets}"] if self.resets else []
        return "-".join(parts)


# ------------------------------------------------------------------------------------------ the table

# (T,B,I,H), cycled through the option grid: eleven of them share no factor with the grid's periods, so that
# every option meets every size. Ones, and sizes that are no multiple of a vector's width, are ordinary.
GRID_SIZES = (
    *((5, 3, 4, 7), (1, 1, 1, 1), (6, 2, 3, 13), (3, 5, 9, 17), (4, 4, 2, 31), (2, 1, 33, 33)),
    *((7, 3, 5, 3), (5, 6, 1, 8), (3, 2, 16, 50), (4, 7, 8, 2), (9, 2, 7, 65)),
)
LAYOUTS = ("padded", "batch_first", "sorted", "unsorted", "equal")


def _lengths(layout: str, T: int, B: int) -> tuple[int, ...] | None:
    """Lengths of a packed batch: from T down to 1 by twos, the same rotated, or all equal to T."""
    if layout == "equal":
        return (T,) * B
    falling = tuple(max(1, T - 2 * b) for b in range(B))
    return {"sorted": falling, "unsorted": falling[1:] + falling[:1]}.get(layout)


def option_grid(sizes: Sequence[tuple[int, int, int, int]]) -> Iterator[Case]:
    """Every combination of torch's options, each at the next (T,B,I,H) of `sizes`."""
    options = itertools.product(
        MODES, (1, 2, 3), (1, 2), (False, True), (True, False), LAYOUTS, (True, False), (0.0, 0.5)
    )
    size = itertools.cycle(sizes)
    for mode, L, D, projected, bias, layout, hx, dropout in options:
        if (projected and mode != "LSTM") or (dropout and L == 1):
            continue
        T, B, I, H = next(size)
        yield Case(
            mode=mode,
            T=T,
            B=B,
            I=I,
            H=max(2, H) if projected else H,  # a projection is narrower than H
            L=L,
            D=D,
            proj=(H + 1) // 2 if projected else 0,
            bias=bias,
            batch_first=layout == "batch_first",
            lengths=_lengths(layout, T, B),
            hx=hx,
            dropout=dropout,
        )


GRID = tuple(option_grid(GRID_SIZES))

# What torch has not: leaky units with every option at some size, and episodes that end inside a sequence.
OURS = tuple(replace(case, mode=LEAKY[k % 2]) for k, case in enumerate(c for c in GRID if c.mode == "GRU"))[::3]
RESETS = tuple(replace(case, resets=0.3) for case in (*GRID[::7], *OURS[::5]) if not case.batch_first)

# Remainders of every vector width and of every tile of batch rows; wide and flat shapes, which threads split
# in different ways.
SIZES = (
    *(
        Case(mode, T=4, B=B, I=I, H=H)
        for mode in MODES
        for H, I in zip((1, 3, 7, 13, 17, 31, 33, 50, 65), (5, 1, 9, 2, 16, 3, 33, 7, 64), strict=True)
        for B in (1, 4, 11)
    ),
    *(Case("LSTM", T=3, B=5, I=6, H=H, proj=P) for H in (7, 17, 33, 65) for P in (1, 6, H - 1)),
    *(
        Case(mode, T=3, B=B, I=I, H=H, D=D)
        for mode in ("LSTM", "RNN_TANH", "GRU")
        for B, I, H, D in ((1, 40, 256, 1), (2, 130, 130, 2), (129, 1, 9, 1), (70, 3, 20, 2))
    ),
)

LONG = (
    *(Case(mode, T=1000, B=2, I=3, H=5, D=2) for mode in MODES),
    Case("LSTM", T=1000, B=3, I=2, H=9, L=2, proj=4, lengths=(617, 1000, 1)),
    Case("RNN_TANH", T=1000, B=3, I=2, H=9, L=2, lengths=(617, 1000, 1), bias=False),
)

LARGE = (
    *(Case(mode, T=20, B=32, I=64, H=64, L=2) for mode in MODES),
    *(Case(mode, T=8, B=32, I=100, H=256) for mode in ("LSTM", "RNN_TANH", "GRU", "LEAKY_TANH")),
    *(Case(mode, T=9, B=32, I=20, H=100, D=2, resets=0.1) for mode in ("LSTM", "GRU")),
    Case("LSTM", T=8, B=32, I=64, H=256, proj=100, D=2, lengths=tuple(range(1, 9)) * 4),
    Case("RNN_RELU", T=12, B=16, I=20, H=100, L=2, D=2, lengths=tuple(range(12, 0, -1)) + (1,) * 4),
)

CASES = tuple(dict.fromkeys(GRID + OURS + RESETS + SIZES + LONG + LARGE))  # each once

# What is checked again for each instruction set: every size, and the options at a stride that meets them all.
ISA_CASES = frozenset(SIZES + LONG[:1] + LARGE[3:] + GRID[::13] + OURS[::7] + RESETS[::5])

# Small enough for finite differences over every input. The op knows no batch_first. relu has no derivative at
# 0, which is where a layer without bias and state sits if the one below is dead.
GRADCHECK_CASES = tuple(
    case
    for case in option_grid(((3, 2, 2, 2), (2, 3, 1, 3), (1, 1, 2, 1)))
    if not case.batch_first and case.L < 3 and (case.mode != "RNN_RELU" or case.bias or case.hx)
)
GRADCHECK_CASES += tuple(replace(case, mode="LEAKY_TANH") for case in GRADCHECK_CASES if case.mode == "GRU")[::3]
GRADCHECK_CASES += tuple(replace(case, resets=0.5) for case in GRADCHECK_CASES[::5])


# ---------------------------------------------------------------------------------- instruction sets


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Kernels of another instruction set, in this process."""
    before = _C.isa()
    _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)


def _has_units(name: str) -> bool:
    with instruction_set(name):
        return _C.has_products(MEDIUM)


_FORCED = (os.environ["RNNFAST_ISA"],) if os.environ.get("RNNFAST_ISA") else ()
# Those to check: what the CPU has, slowest first, or the one that is forced. Those that have units for 16-bit numbers,
# and else are like the one before, are checked where products have fewer bits: beside units in plain C++, and none.
ISAS = _FORCED or tuple(name for name in _C.usable_isas() if not _has_units(name))
UNITS = _FORCED or (ISAS[-1], *(name for name in _C.usable_isas() if _has_units(name)), *_C.isas_by_name())


# ----------------------------------------------------------------------------------------- the inputs


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case, as a user of the module holds them (h0, c0 in the order of the user's batch)."""

    x: torch.Tensor  # (T,B,I), (B,T,I) if batch_first, or the data (N,I) of a PackedSequence
    packed: PackedSequence | None  # x with its batch_sizes and indices
    h0: torch.Tensor | None  # (L*D,B,R)
    c0: torch.Tensor | None  # (L*D,B,H), LSTM only
    weights: dict[str, torch.Tensor]  # by torch's names, in torch's order
    dropout_masks: torch.Tensor | None  # (L-1,T,B|N,D*R), divided by 1-p; for run_op and run_reference
    dy: torch.Tensor  # like y
    dh_n: torch.Tensor  # (L*D,B,R)
    dc_n: torch.Tensor | None  # (L*D,B,H), LSTM only
    resets: torch.Tensor | None = None  # like the rows of x, bool


def weight_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights in torch's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if case.bias else [])]
    names += ["weight_hr"] if case.proj else ["leak"] if case.mode in LEAKY else []
    for layer, direction in itertools.product(range(case.L), range(case.D)):
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        width = case.D * case.R if layer else case.I
        of_cell = BY_MODE[case.mode].weight_shapes(case.H, width, case.proj, case.bias)
        shapes |= {name + suffix: shape for name, shape in zip(names, of_cell, strict=True)}
    return shapes


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Draw a case's tensors: weights as torch initialises them, U(-1/√H, 1/√H), everything else N(0,1)."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape)).to(dtype)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.uniform(-1, 1, shape) / np.sqrt(case.H)).to(dtype)

    T, B, LD, DR = case.T, case.B, case.L * case.D, case.D * case.R
    lstm = case.mode == "LSTM"
    packed = None
    rows: tuple[int, ...] = (B, T) if case.batch_first else (T, B)
    x = normal(*rows, case.I)
    if case.lengths is not None:
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        x, rows = packed.data, (sum(case.lengths),)
    mask_rows = (T, B) if packed is None else rows
    keep = random.uniform(size=(case.L - 1, *mask_rows, DR)) >= case.dropout
    return Inputs(
        x=x,
        packed=packed,
        h0=normal(LD, B, case.R) if case.hx else None,
        c0=normal(LD, B, case.H) if case.hx and lstm else None,
        weights={
            name: normal(*shape).sigmoid() if name.startswith("leak") else uniform(*shape)
            for name, shape in weight_shapes(case).items()
        },
        dropout_masks=torch.from_numpy(keep / (1 - case.dropout)).to(dtype) if case.dropout else None,
        dy=normal(*rows, DR),
        dh_n=normal(LD, B, case.R),
        dc_n=normal(LD, B, case.H) if lstm else None,
        resets=torch.from_numpy(random.uniform(size=rows) < case.resets) if case.resets else None,
    )


# ---------------------------------------------------------------------------- products of 16-bit matrices


def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on torch multiplies 16-bit matrices as a GPU does: sums in float32, rounded once, each row of its own.
    What oneDNN does depends on the CPU: with AMX a NaN gets from one row into the next."""

    def wrap(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def multiply(*matrices: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
            dtype = matrices[0].dtype
            if dtype not in (torch.float16, torch.bfloat16):
                return product(*matrices, **out)
            rounded = product(*(a.float() for a in matrices)).to(dtype)
            return out["out"].copy_(rounded) if out else rounded

        return multiply

    for owner, name in ((torch.Tensor, "__matmul__"), *((torch, n) for n in ("mm", "addmm", "bmm", "baddbmm"))):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


# ---------------------------------------------------------------------------------------- running a case

Results = dict[str, np.ndarray]


def make_module(library: ModuleType, case: Case, inputs: Inputs) -> torch.nn.Module:
    """`library`'s layer with the case's options and weights, in evaluation mode; leaks are parameters."""
    options = {
        "num_layers": case.L,
        "bias": case.bias,
        "batch_first": case.batch_first,
        "dropout": case.dropout,
        "bidirectional": case.D == 2,
        "dtype": inputs.x.dtype,
    }
    if case.mode == "LSTM":
        module = library.LSTM(case.I, case.H, proj_size=case.proj, **options)
    elif case.mode == "GRU":
        module = library.GRU(case.I, case.H, **options)
    elif case.mode in LEAKY:
        nonlinearity = case.mode.removeprefix("LEAKY_").lower()
        module = rnnfast.LeakyRNN(case.I, case.H, nonlinearity=nonlinearity, leak=torch.ones(case.H), **options)
        for name, a in inputs.weights.items():
            if name.startswith("leak"):  # itself, not its logit: what is tested is the kernel
                delattr(module, name)
                setattr(module, name, torch.nn.Parameter(a.squeeze(0)))
        weights = {name: a.squeeze(0) if name.startswith("leak") else a for name, a in inputs.weights.items()}
        module.load_state_dict(weights)
        return module.eval()
    else:
        nonlinearity = case.mode.removeprefix("RNN_").lower()
        module = library.RNN(case.I, case.H, nonlinearity=nonlinearity, **options)
    module.load_state_dict(inputs.weights)
    return module.eval()


def run_module(
    library: ModuleType,
    case: Case,
    inputs: Inputs,
    inference: bool = False,
    run: Callable[[torch.nn.Module], Callable[..., Any]] = lambda module: module,
) -> Results:
    """Run the module of torch.nn or rnnfast, without dropout; `inference`: outputs only, under no_grad. run(module) is
    what is called."""
    module = make_module(library, case, inputs)
    leaves = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0}
    leaves = {name: a.detach().requires_grad_() for name, a in leaves.items() if a is not None}
    x = leaves["x"] if inputs.packed is None else inputs.packed._replace(data=leaves["x"])
    hx = None
    if case.hx:
        hx = (leaves["h0"], leaves["c0"]) if case.mode == "LSTM" else leaves["h0"]

    more = {}
    if inputs.resets is not None:
        more["resets"] = inputs.resets if inputs.packed is None else inputs.packed._replace(data=inputs.resets)
    with torch.set_grad_enabled(not inference):
        y, state = run(module)(x, hx, **more)
    h_n, c_n = state if case.mode == "LSTM" else (state, None)
    outputs = {"y": y if inputs.packed is None else y.data, "h_n": h_n}
    outputs |= {} if c_n is None else {"c_n": c_n}
    return _results(outputs, {} if inference else leaves | dict(module.named_parameters()), inputs)


def run_torch(case: Case, inputs: Inputs) -> Results:
    """Run torch.nn's module, on one thread: its thread pool stalls for seconds if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if case.mode in LEAKY or case.resets:  # torch has no such layer, but all of its operators
            return run_module(rnnfast, case, inputs, run=_by_operators)
        return run_module(torch.nn, case, inputs)
    finally:
        torch.set_num_threads(threads)


def _by_operators(module: torch.nn.Module) -> Callable[..., Any]:
    return lambda x, hx, resets=None: module._by_operators(x, hx, resets)


def run_op(case: Case, inputs: Inputs, dropout: bool = False) -> Results:
    """Run rnnfast._autograd.op.recurrent, with the case's dropout masks if `dropout`. Not for batch_first."""
    from rnnfast._autograd import op

    leaves = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0} | inputs.weights
    leaves = {name: a.detach().requires_grad_() for name, a in leaves.items() if a is not None}
    sort, unsort = _batch_order(inputs)
    states = (leaves[name][:, sort] if name in leaves else None for name in ("h0", "c0"))
    y, h_n, c_n = op.recurrent(
        case.mode,
        leaves["x"],
        None if inputs.packed is None else inputs.packed.batch_sizes,
        *states,
        [leaves[name] for name in inputs.weights],
        case.L,
        case.D == 2,
        case.bias,
        inputs.dropout_masks if dropout else None,
        inputs.resets,
    )
    outputs = {"y": y, "h_n": h_n[:, unsort]} | ({} if c_n is None else {"c_n": c_n[:, unsort]})
    return _results(outputs, leaves, inputs)


def run_reference(case: Case, inputs: Inputs, dropout: bool = False) -> Results:
    """Run the NumPy reference in float64, with the case's dropout masks if `dropout`."""
    sort, unsort = _batch_order(inputs)

    def array(a: torch.Tensor | None) -> np.ndarray | None:
        return None if a is None else a.double().numpy()

    def states(a: torch.Tensor | None) -> np.ndarray | None:
        return None if a is None else array(a)[:, sort]

    def rows(a: np.ndarray) -> np.ndarray:  # between (B,T,:) and (T,B,:)
        return a.swapaxes(0, 1) if case.batch_first else a

    y, h_n, c_n, tape = reference.forward(
        case.mode,
        rows(array(inputs.x)),
        None if inputs.packed is None else inputs.packed.batch_sizes.numpy(),
        states(inputs.h0),
        states(inputs.c0),
        [array(w) for w in inputs.weights.values()],
        case.L,
        case.D == 2,
        case.bias,
        array(inputs.dropout_masks) if dropout else None,
        None if inputs.resets is None else rows(inputs.resets.numpy()),
    )
    d = reference.backward(tape, rows(array(inputs.dy)), states(inputs.dh_n), states(inputs.dc_n))
    results = {"y": rows(y), "h_n": h_n[:, unsort]} | ({} if c_n is None else {"c_n": c_n[:, unsort]})
    results["d_x"] = rows(d.x)
    if inputs.h0 is not None:
        results["d_h0"] = d.h0[:, unsort]
    if inputs.c0 is not None:
        results["d_c0"] = d.c0[:, unsort]
    return results | {f"d_{name}": dw for name, dw in zip(inputs.weights, d.weights, strict=True)}


def _batch_order(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Indices that sort the user's batch by falling length as a PackedSequence holds it, and that undo it."""
    if inputs.packed is None:
        same = np.arange(inputs.dh_n.shape[1])
        return same, same
    return inputs.packed.sorted_indices.numpy(), inputs.packed.unsorted_indices.numpy()


def _results(outputs: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor], inputs: Inputs) -> Results:
    """Outputs, and their gradients with respect to the leaves, as float64 arrays by name."""
    results = {name: a.detach().double().numpy() for name, a in outputs.items()}
    if leaves:
        incoming = {"y": inputs.dy, "h_n": inputs.dh_n, "c_n": inputs.dc_n}
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), [incoming[name] for name in outputs]
        )
        for name, a in zip(leaves, gradients, strict=True):  # a module's leaks are (H), the op's (1,H)
            results[f"d_{name}"] = a.double().numpy().reshape(getattr(inputs.weights.get(name), "shape", a.shape))
    return results


# ------------------------------------------------------------------------------------------- comparing
#
# float64   |got - truth| <= 1e-10 (1 + max |truth|), tensor by tensor.
#
# float32   No further from the truth than twice torch's own float32 error on the same inputs, plus a floor,
#           since torch's error can be small by luck. The floor is what float32 can promise at all. A stored
#           operand is known to half an ulp, and the arithmetic on it costs at least as much again, so it is
#           how far the truth moves when every input, and every activation that BPTT stores, moves by one ulp
#           up or down (the largest of a few random draws: this weighs each operand by its condition number,
#           and so allows for cancellation, be it in a sum or in 1 - h²), plus one ulp of the tensor's largest
#           element for storing the result.

FLOAT64_TOLERANCE = 1e-10
ULP32 = float(np.finfo(np.float32).eps)


def scale(truth: np.ndarray) -> float:
    """Largest magnitude of a tensor: the size that rounding errors in it are measured against."""
    return float(np.abs(truth).max())


def error(got: np.ndarray, truth: np.ndarray) -> float:
    """Largest absolute error of a tensor; infinite if the shapes differ or something is not finite."""
    if got.shape != truth.shape or not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - truth).max())


def float64_failures(got: Results, truth: Results) -> list[str]:
    """A line for each tensor of a float64 run that is too far from the truth."""
    bounds = {name: FLOAT64_TOLERANCE * (1 + scale(truth[name])) for name in got}
    return _failures(got, truth, bounds)


def float32_failures(got: Results, torchs: Results, truth: Results, moved: dict[str, float]) -> list[str]:
    """A line for each tensor of a float32 run that is too far from the truth; `moved` is by `sensitivity`."""
    bounds = {name: 2 * error(torchs[name], truth[name]) + moved[name] + ULP32 * scale(truth[name]) for name in got}
    return _failures(got, truth, bounds)


def sensitivity(case: Case, inputs: Inputs, truth: Results, draws: int = 4) -> dict[str, float]:
    """How far each tensor of the truth moves when inputs and activations move by one float32 ulp up or down."""
    random = np.random.default_rng(0)

    def move(a: np.ndarray) -> np.ndarray:
        return a * (1 + ULP32 * random.choice((-1.0, 1.0), a.shape))

    def move_input(a: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None else torch.from_numpy(move(a.double().numpy()))

    exact = {name: getattr(reference, name) for name in ("tanh", "sigmoid", "linear")}
    activations = {name: lambda z, f=f: move(f(z)) for name, f in exact.items()}
    moved = dict.fromkeys(truth, 0.0)
    for _ in range(draws):
        near = replace(
            inputs,
            **{name: move_input(getattr(inputs, name)) for name in ("x", "h0", "c0", "dy", "dh_n", "dc_n")},
            weights={name: move_input(w) for name, w in inputs.weights.items()},
        )
        with mock.patch.multiple(reference, **activations):
            results = run_reference(case, near)
        moved = {name: max(moved[name], error(results[name], truth[name])) for name in truth}
    return moved


def _failures(got: Results, truth: Results, bounds: dict[str, float]) -> list[str]:
    errors = {name: error(got[name], truth[name]) for name in got}
    return [
        f"{name}: error {errors[name]:.2e} > {bounds[name]:.2e}, largest element {scale(truth[name]):.2e}"
        for name in got
        if not errors[name] <= bounds[name]
    ]
