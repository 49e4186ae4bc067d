"""How far outputs and gradients of a layer are from float64, in each format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contenders import LIBRARIES, make_module
from benchmarks.formats import FORMATS, Format, matmul_precision, prepare, refusal
from benchmarks.grid import Shape
from benchmarks.report import CELLS, Cell, Table
from benchmarks.results import Row, geomean

T, B = 100, 32
TRUTH = Format("truth", "torch", 64, dtype=torch.float64)
MEASURES = {"rms_error": "root of the mean square", "max_error": "largest, in units of the largest |truth|"}
RATIOS = (  # (whose error, in units of whose)
    ("highest", "torch float32"),
    ("high", "torch float32"),
    ("medium", "torch autocast"),
    ("autocast", "torch autocast"),
    ("bfloat16", "torch bfloat16"),
)
HIGH_TIMES, HIGH_LIMIT = 20.0, 1e-4  # of "high": times torch's float32 error, and relative


@dataclass(frozen=True)
class Case:
    """What a layer gets: weights by name; x (T,B,I) and the states (1,B,H); the gradients dL/dy (T,B,H) and of the last
    states (1,B,H) that go back through it."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]  # x, h0, and c0 where there is c
    cotangents: list[Tensor]  # of y, h_n, c_n

    def map(self, f: Callable[[Tensor], Tensor]) -> Case:
        weights, inputs = ({name: f(a) for name, a in some.items()} for some in (self.weights, self.inputs))
        return Case(weights, inputs, [f(a) for a in self.cotangents])


def rounded(a: Tensor) -> Tensor:
    return a.bfloat16().float()


def draw(s: Shape, seed: int) -> Case:
    torch.manual_seed(seed)
    weights = make_module(torch.nn, s).state_dict()
    states = ("h0", "c0") if s.cell == "lstm" else ("h0",)
    inputs = {"x": torch.randn(s.T, s.B, s.I)} | {name: torch.randn(1, s.B, s.H) for name in states}
    # bfloat16 numbers: outputs of 16 bits take gradients of 16 bits, and what is given is not to count as an error
    cotangents = [rounded(torch.randn(s.T, s.B, s.H)), *(rounded(torch.randn(1, s.B, s.H)) for _ in states)]
    return Case(weights, inputs, cotangents)


def results(f: Format, s: Shape, case: Case) -> dict[str, Tensor]:
    """Outputs and the gradient of everything, by name, in float64."""
    module = make_module(LIBRARIES[f.library], s)
    module.load_state_dict(case.weights)
    prepare(module, f)
    inputs = {name: a.to(f.dtype).requires_grad_() for name, a in case.inputs.items()}
    x, *hx = inputs.values()
    with matmul_precision(f.precision):
        y, state = module(x, tuple(hx) if len(hx) > 1 else hx[0])
        outputs = [y, *(state if isinstance(state, tuple) else (state,))]
        leaves = inputs | dict(module.named_parameters())
        cotangents = [d.to(o.dtype) for d, o in zip(case.cotangents, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    named = dict(zip(("y", "h_n", "c_n"), outputs, strict=False))
    named |= {_gradient_name(leaf): a for leaf, a in zip(leaves, gradients, strict=True)}
    return {name: a.detach().double() for name, a in named.items()}


def _gradient_name(leaf: str) -> str:
    """d_W_ih for weight_ih_l0"""
    return "d_" + leaf.removesuffix("_l0").replace("weight", "W").replace("bias", "b")


def measure(cell: str, H: int, seed: int) -> list[Row]:
    """A row for each format and tensor. The truth is that of the numbers that a format is given: a bfloat16 module has
    rounded weights and reads a rounded x, while autocast and "medium" do the rounding themselves."""
    s = Shape(cell, T, B, H, H)
    case = draw(s, seed)
    cases = {torch.float32: case, torch.bfloat16: case.map(rounded)}
    truths = {dtype: results(TRUTH, s, c) for dtype, c in cases.items()}
    rows = []
    for f in FORMATS.values():
        if not refusal(f, cell):
            found = results(f, s, cases[f.dtype])
            rows += [_row(s, seed, f.name, name, a, truths[f.dtype][name]) for name, a in found.items()]
    return rows


def _row(s: Shape, seed: int, impl: str, tensor: str, got: Tensor, truth: Tensor) -> Row:
    difference = got - truth
    row: Row = {"part": "errors", "cell": s.cell, "T": s.T, "B": s.B, "I": s.I, "H": s.H, "seed": seed, "impl": impl}
    return row | {
        "tensor": tensor,
        "max_error": (difference.abs().max() / truth.abs().max()).item(),
        "rms_error": (difference.square().mean() / truth.square().mean()).sqrt().item(),
    }


# ------------------------------------------------------------------------------------------------- tables

Errors = dict[str, float]
"""Of one tensor, by format, from all seeds."""


def over_seeds(rows: Iterable[Row], measure: str) -> dict[tuple[str, int, str], Errors]:
    """By cell, H and tensor: the largest of the seeds' largest errors, the root of the mean of their mean squares."""
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for row in rows:
        by_format = found.setdefault((row["cell"], row["H"], row["tensor"]), {})
        by_format.setdefault(row["impl"], []).append(row[measure])
    join = max if measure == "max_error" else _root_mean_square
    return {key: {name: join(errors) for name, errors in by.items()} for key, by in found.items()}


def _root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def ratio(errors: Errors, ours: str, other: str) -> float | None:
    """None if one of them was refused."""
    return errors[ours] / errors[other] if ours in errors and other in errors else None


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each cell and measure a line for each H and tensor: the errors, and ours in units of torch's."""
    made = []
    for cell, title in CELLS.items():
        some = [row for row in rows if row["cell"] == cell]
        if some:
            made += [_table(f"{title}, errors: {words}", over_seeds(some, key)) for key, words in MEASURES.items()]
    return made


def _table(title: str, errors: dict[tuple[str, int, str], Errors]) -> Table:
    header = ["H", "of", *FORMATS, *(f"{ours} / {other}" for ours, other in RATIOS)]
    lines: list[list[Cell]] = []
    for (_, H, tensor), by_format in errors.items():
        values = [f"{by_format[name]:.1e}" if name in by_format else "refused" for name in FORMATS]
        found = [ratio(by_format, *pair) for pair in RATIOS]
        lines.append([str(H), tensor, *values, *("" if value is None else f"{value:.2f}" for value in found)])
    return Table(title, header, lines)


# -------------------------------------------------------------------------------------------------- goals


def goals(rows: Sequence[Row]) -> list[list[Cell]]:
    """work, goal, measured, met: of the root mean square over all seeds, which one unlucky number does not decide."""
    errors = over_seeds(rows, "rms_error")
    made = [_ratio_goal(*pair, errors, HIGH_TIMES if pair[0] == "high" else 1.0) for pair in RATIOS[1:]]
    largest, where = max((by["high"], key) for key, by in errors.items())
    measured = f"highest {largest:.1e} ({_where(where)})"
    made.append(["error of high", f"≤ {HIGH_LIMIT:.0e}", measured, "yes" if largest <= HIGH_LIMIT else "no"])
    return [line for line in made if line]


def _ratio_goal(ours: str, other: str, errors: dict[tuple[str, int, str], Errors], goal: float) -> list[Cell]:
    found = [(value, key) for key, by in errors.items() if (value := ratio(by, ours, other)) is not None]
    if not found:
        return []
    highest, where = max(found)
    measured = f"highest {highest:.2f} ({_where(where)}), geomean {geomean(value for value, _ in found):.2f}"
    met = round(highest, 2) <= goal  # equal but for the last digits is equal
    return [f"error of {ours} / {other}", f"≤ {goal}", measured, "yes" if met else "no"]


def _where(key: tuple[str, int, str]) -> str:
    cell, H, tensor = key
    return f"{CELLS[cell]} H{H} {tensor}"
