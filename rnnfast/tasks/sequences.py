"""Sequences whose targets depend on inputs many steps before, after Hochreiter & Schmidhuber (1997).

The lengths, places and alphabets are those of Martens & Sutskever (2011), Learning recurrent neural networks with
Hessian-free optimization, as in the code that its authors released (`opt/d/seq/pathological.py` of HF-RNN), where they
are given for T = 100 and grow in proportion. Places count from 0; a range a..b includes both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

SOLVED = 0.01  # a task is solved if a smaller share of test sequences is wrong
TOLERANCE = 0.04  # a real-valued output further from its target is wrong

Places = tuple[int, int]  # first and last


class Batch(NamedTuple):
    """Sequences, side by side. T' is the number of steps of the longest that the task can draw."""

    x: Tensor  # (T',B,I), zero after the end of a shorter sequence
    y: Tensor  # (T',B,O) real values, or (T',B) int64 classes; zero where there is no target
    mask: Tensor  # (T',B) bool, where there is a target


@dataclass(frozen=True)
class Task:
    """A problem to draw sequences of: `make(name, T)`, or the function of its name.

    Attributes:
        name: as in `TASKS`.
        T: its length in steps, as each task defines it.
        input_size, output_size: I and O.
        loss: (outputs (N,O), targets y[mask]) -> mean over the N targets; the matching loss of linear outputs: squared
            error, logistic, or softmax cross-entropy.
    """

    name: str
    T: int
    input_size: int
    output_size: int
    loss: Callable[[Tensor, Tensor], Tensor]
    _is_wrong: Callable[[Tensor, Tensor], Tensor]  # outputs (N,O), targets y[mask] -> (N) bool
    _draw: Callable[[int, Generator | None], Batch]
    _last_only: bool = False  # are the targets before the last step in the loss, but no part of the criterion?

    def sample(self, batch: int, generator: Generator | None = None, dtype: torch.dtype = torch.float32) -> Batch:
        """Draw `batch` sequences, on the CPU whatever torch's default device is. A seed gives the same ones in every
        dtype, up to rounding.

        Raises:
            ValueError: batch below 1.
        """
        if batch < 1:
            raise ValueError(f"batch should be at least 1, got {batch}")
        x, y, mask = self._draw(batch, generator)
        return Batch(x.to(dtype), y.to(dtype) if y.is_floating_point() else y, mask)

    def wrong(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """How many outputs of each sequence are wrong: outputs (N,O) for the N places of mask (T',B) -> (B) int64.

        Real outputs are wrong if more than 0.04 off, logits if on the wrong side of 0, classes if another has the
        largest output; NaN is wrong. Only what belongs to the task's criterion is counted.
        """
        wrong = self._is_wrong(outputs, y[mask])  # (N)
        step, sequence = mask.nonzero(as_tuple=True)  # (N) each
        if self._last_only:
            wrong = wrong & (step == mask.size(0) - 1)
        return torch.zeros(mask.size(1), dtype=torch.int64, device=mask.device).index_add_(0, sequence, wrong.long())

    def error(self, outputs: Tensor, y: Tensor, mask: Tensor) -> float:
        """The share of sequences with a wrong output; the task is solved below `SOLVED`, 0.01. Arguments as `wrong`."""
        return (self.wrong(outputs, y, mask) > 0).double().mean().item()


# ------------------------------------------------------------------------------------------ two marked numbers


def addition(T: int, cue: int = 0) -> Task:
    """Add two marked numbers among many (Hochreiter & Schmidhuber 1997, experiment 4).

    Input: a number from U(0,1), and a mark: 1 at two places, -1 at the first step and `cue` steps before the last, else
    0. Target, at the last step: the sum of the marked numbers. The length is drawn from T..1.1 T for each sequence; the
    marks are in 0.01 T..0.1 T and 0.1 T..0.5 T (the upper end of each left out, never the first step), so the lag is
    T/2 or more.

    Wrong: |output - sum| > 0.04. T >= 20; the papers' is 100 and 200 (2011), 80 (Sutskever et al. 2013).

    Args:
        T: length.
        cue: steps from the second -1 to the target, default 0: at the last step, as in 1997. The code of 2011 has 3:
            the network gets three steps to answer in.

    Raises:
        ValueError: T too short, or a cue that is negative or not after both marked numbers.
    """
    places = [(max(1, T // 100), T // 10 - 1), (T // 10, T // 2 - 1)]
    return _two_marked("addition", T, 20, cue, places, torch.add, F.mse_loss, _is_off)


def multiplication(T: int, cue: int = 0) -> Task:
    """Multiply two marked numbers among many (Hochreiter & Schmidhuber 1997, experiment 5).

    As `addition`, with the product for the sum. Wrong: |output - product| > 0.04. T >= 20.
    """
    places = [(max(1, T // 100), T // 10 - 1), (T // 10, T // 2 - 1)]
    return _two_marked("multiplication", T, 20, cue, places, torch.mul, F.mse_loss, _is_off)


def xor(T: int, cue: int = 0) -> Task:
    """Exclusive or of two marked bits among many (Martens & Sutskever 2011). Rarely solved even by its authors.

    As `addition` with bits 0 and 1 for the numbers, the marks in 0.02 T..0.2 T and 0.3 T..0.5 T, and one logit for an
    output. What makes it hard: one of the two bits alone says nothing about the target. T >= 10 is the length in
    steps; what the authors call T = 100 is T = 50 here.
    """
    places = [(max(1, T // 50), T // 5 - 1), (3 * T // 10, T // 2 - 1)]

    def combine(a: Tensor, b: Tensor) -> Tensor:
        return (a != b).double()

    return _two_marked(
        "xor", T, 10, cue, places, combine, F.binary_cross_entropy_with_logits, _is_other_side, bits=True
    )


def _two_marked(
    name: str,
    T: int,
    least: int,
    cue: int,
    places: list[Places],
    combine: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    is_wrong: Callable[[Tensor, Tensor], Tensor],
    bits: bool = False,
) -> Task:
    _check_length(name, T, least, "its marks lie in ranges of T/100 to T/2 steps")
    latest = T - 1 - places[-1][1] - 1  # so that it comes after the second number in the shortest sequence
    if not 0 <= cue <= latest:
        raise ValueError(f"cue should be 0 to {latest} steps before the end for {name} with T={T}, got {cue}")

    def draw(B: int, generator: Generator | None) -> Batch:
        last, all_b = _last_steps(T, B, generator), torch.arange(B, device="cpu")  # (B)
        steps = T + T // 10
        numbers = torch.rand(steps, B, dtype=torch.float64, device="cpu", generator=generator)
        if bits:
            numbers = numbers.round()
        first, second = (_randint(low, high, (B,), generator) for low, high in places)  # (B)
        marks = torch.zeros(steps, B, dtype=torch.float64, device="cpu")
        marks[0] = marks[last - cue, all_b] = -1
        marks[first, all_b] = marks[second, all_b] = 1
        x = torch.stack([numbers, marks], dim=-1) * _until(last, steps)
        y = torch.zeros(steps, B, 1, dtype=torch.float64, device="cpu")
        y[last, all_b, 0] = combine(numbers[first, all_b], numbers[second, all_b])
        return Batch(x, y, _only(last, steps))

    return Task(name, T, 2, 1, loss, is_wrong, draw)


# ------------------------------------------------------------------------------------------ temporal order


def temporal_order(T: int) -> Task:
    """In which order came the two special symbols? (Hochreiter & Schmidhuber 1997, experiment 6a)

    Input: one of 8 symbols, as a vector of one 1: a start symbol at first, a cue at the last step, X or Y at a place in
    0.01 T..0.1 T and again in 0.4 T..0.5 T, and one of four others, at random, elsewhere. Target, at the last step: XX,
    YX, XY or YY, as class 0 to 3. The length is drawn from T..1.1 T for each sequence.

    Wrong: another class has the largest output. T >= 10; the papers' is 100 and 200.
    """
    return _temporal_order("temporal_order", T, [(max(1, T // 100), T // 10), (2 * T // 5, T // 2)])


def temporal_order_3bit(T: int) -> Task:
    """In which order came the three special symbols? (Hochreiter & Schmidhuber 1997, experiment 6b)

    As `temporal_order` with places in 0.01 T..0.1 T, 0.3 T..0.4 T and 0.5 T..0.6 T, and eight classes. T >= 10.
    """
    places = [(max(1, T // 100), T // 10), (3 * T // 10, 2 * T // 5), (T // 2, 3 * T // 5)]
    return _temporal_order("temporal_order_3bit", T, places)


def _temporal_order(name: str, T: int, places: list[Places]) -> Task:
    _check_length(name, T, 10, "its symbols lie in ranges of T/100 to 6 T/10 steps")
    special, cue, start, symbols = 4, 6, 7, 8  # others: 0 to 3

    def draw(B: int, generator: Generator | None) -> Batch:
        last, all_b = _last_steps(T, B, generator), torch.arange(B, device="cpu")  # (B)
        steps = T + T // 10
        ids = _randint(0, special - 1, (steps, B), generator)
        ids[0], ids[last, all_b] = start, cue
        y = torch.zeros(steps, B, dtype=torch.int64, device="cpu")
        for k, (low, high) in enumerate(places):
            bit = _randint(0, 1, (B,), generator)
            ids[_randint(low, high, (B,), generator), all_b] = special + bit
            y[last, all_b] += bit << k
        return Batch(F.one_hot(ids, symbols).double() * _until(last, steps), y, _only(last, steps))

    return Task(name, T, symbols, 2 ** len(places), F.cross_entropy, _is_other_class, draw)


# ------------------------------------------------------------------------------------------ memory


def permutation(T: int) -> Task:
    """Recall the first of many symbols after all the others (Martens & Sutskever 2011, "random permutation").

    Input: one of 100 symbols, as a vector of one 1: at the first step 0 or 1, then T - 1 symbols drawn from the other
    98 (as in the released code: independently, not a permutation). Target at every step: the next symbol, which nobody
    can know, and at the last step the first symbol.

    Wrong: the output of the last step (the others are in the loss only). T >= 2; lag T - 1.
    """
    _check_length("permutation", T, 2, "the first symbol is asked for at the last step")
    symbols = 100

    def draw(B: int, generator: Generator | None) -> Batch:
        ids = _randint(2, symbols - 1, (T, B), generator)
        ids[0] = _randint(0, 1, (B,), generator)
        return Batch(
            F.one_hot(ids, symbols).double(), ids.roll(-1, dims=0), torch.ones(T, B, dtype=torch.bool, device="cpu")
        )

    return Task("permutation", T, symbols, symbols, F.cross_entropy, _is_other_class, draw, _last_only=True)


def memorisation_5bit(T: int, recall_only: bool = False) -> Task:
    """Repeat five bits after a long pause (Martens & Sutskever 2011, "noiseless memorization").

    Input: 5 symbols out of 2, a distractor again and again, one cue, and the distractor for the last 5 steps. Target:
    "nothing" (class 2) at all steps but the last 5, which repeat the symbols. T steps in all, lag T - 5; T >= 11.

    Wrong: any output of the sequence. Table 5 of Sutskever et al. (2013) appears to count wrong symbols per sequence:
    the mean of `Task.wrong`.

    Args:
        T: length.
        recall_only: are the last 5 steps the only ones with a target? Default False. The code of 2011 has both, as
            `raw_mem5` and `raw_mem5_only_last_bits`; the loss, a mean over targets, then is that of the recall.

    Raises:
        ValueError: T too short.
    """
    return _memorisation("memorisation_5bit", T, recall_only, count=5, symbols=2)


def memorisation_20bit(T: int, recall_only: bool = False) -> Task:
    """Repeat ten symbols out of five, some 23 bits, after a long pause: as `memorisation_5bit`. Lag T - 10; T >= 21."""
    return _memorisation("memorisation_20bit", T, recall_only, count=10, symbols=5)


def _memorisation(name: str, T: int, recall_only: bool, count: int, symbols: int) -> Task:
    _check_length(name, T, 2 * count + 1, f"{count} symbols are shown, then a cue, then {count} are repeated")
    distractor = nothing = symbols
    cue = symbols + 1

    def draw(B: int, generator: Generator | None) -> Batch:
        shown = _randint(0, symbols - 1, (count, B), generator)
        ids = torch.full((T, B), distractor, device="cpu")
        ids[:count], ids[-count - 1] = shown, cue
        y = torch.full((T, B), nothing, device="cpu")
        y[-count:] = shown
        mask = torch.ones(T, B, dtype=torch.bool, device="cpu")
        if recall_only:
            y[:-count] = mask[:-count] = 0
        return Batch(F.one_hot(ids, symbols + 2).double(), y, mask)

    return Task(name, T, symbols + 2, symbols + 1, F.cross_entropy, _is_other_class, draw)


# ------------------------------------------------------------------------------------------ what they share

TASKS: dict[str, Callable[..., Task]] = {
    task.__name__: task
    for task in (
        addition,
        multiplication,
        xor,
        temporal_order,
        temporal_order_3bit,
        permutation,
        memorisation_5bit,
        memorisation_20bit,
    )
}


def make(name: str, T: int, **options: int) -> Task:
    """The task of this name (one of `TASKS`) and length; options are those of the function of this name.

    Raises:
        ValueError: no such task, or T too short for its lag.
        TypeError: an option that the task does not have.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name](T, **options)


def _check_length(name: str, T: int, least: int, why: str) -> None:
    if least > T:
        raise ValueError(f"T={T} is too short for {name}, which needs T >= {least}: {why}")


def _randint(low: int, high: int, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Integers from low..high, both included."""
    return torch.randint(low, high + 1, shape, device="cpu", generator=generator)


def _last_steps(T: int, B: int, generator: Generator | None) -> Tensor:
    """The last step of each sequence, its length being drawn from T..1.1 T; (B)"""
    return _randint(T, T + T // 10, (B,), generator) - 1


def _until(last: Tensor, steps: int) -> Tensor:
    """1 up to each sequence's last step, 0 after; (steps,B,1)"""
    return (torch.arange(steps, device="cpu")[:, None] <= last).unsqueeze(-1)


def _only(last: Tensor, steps: int) -> Tensor:
    """True at each sequence's last step; (steps,B)"""
    return torch.arange(steps, device="cpu")[:, None] == last


def _is_off(outputs: Tensor, targets: Tensor) -> Tensor:
    return ~((outputs - targets).abs() <= TOLERANCE).all(dim=-1)  # so that NaN is off


def _is_other_side(outputs: Tensor, targets: Tensor) -> Tensor:
    return (((outputs > 0) != (targets > 0.5)) | outputs.isnan()).any(dim=-1)


def _is_other_class(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(dim=-1) != targets) | outputs.isnan().any(dim=-1)
