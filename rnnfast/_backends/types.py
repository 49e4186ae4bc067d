"""What a call of a recurrent stack is made of, and what a backend does with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from rnnfast._backends.cells import CELLS, Cell
from rnnfast._backends.precision import IN_FORCE

_T = TypeVar("_T")


def present(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Those that are not None, in order."""
    return tuple(t for t in tensors if t is not None)


class Stack(NamedTuple):
    """What no tensor tells of a stack: cell (its index in CELLS), L layers, D directions, has it biases; and of a call,
    forward and back: the precision of its products on the CPU, see `precision.py`."""

    cell_index: int
    L: int
    D: int
    bias: bool
    precision: int = IN_FORCE

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_index]

    @property
    def gates(self) -> int:
        return CELLS[self.cell_index].gates

    @property
    def has_c(self) -> bool:
        """Is there a state c beside h?"""
        return CELLS[self.cell_index].has_c

    def weights_each(self, weights: Sequence[object]) -> int:
        """Weights of one layer and direction."""
        return len(weights) // (self.L * self.D)

    def sizes_of_units(self, rows: int, R: int, weights: int) -> tuple[int, int, int]:
        """H, R, and P, which is 0 without projection: from the rows of a w_ih, the columns of a w_hh and the number of
        weights."""
        cell = self.cell
        H, R = int(rows) // (cell.input.stop - cell.input.start), int(R)
        projected = cell.projects and weights == self.L * self.D * cell.weights_each(self.bias, True)
        return H, R, R if projected else 0

    def units(self, weights: Sequence[Tensor]) -> tuple[int, int, int]:
        """H, R, P"""
        return self.sizes_of_units(weights[0].size(0), weights[1].size(1), len(weights))


class Constants(NamedTuple):
    """What a call takes beside its inputs, and nobody differentiates; None of all is the rule."""

    batch_sizes: Tensor | None = None  # (T) int64 on the CPU, not increasing: a packed batch
    dropout: Tensor | None = None  # (L-1,T,B,D*R) or (L-1,N,D*R), factors on the outputs of the layers below the top
    resets: Tensor | None = None  # (T,B) or (N) bool: sequence b begins anew at step t


class Inputs(NamedTuple):
    """What a derivative is taken in: x (T,B,I) or (N,I), h0 (L*D,B,R), c0 (L*D,B,H), weights as torch orders them."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]

    def flat(self) -> list[Tensor | None]:
        return [self.x, self.h0, self.c0, *self.weights]

    @staticmethod
    def of(flat: Iterable[Tensor]) -> Inputs:
        x, h0, c0, *weights = flat
        return Inputs(x, h0, c0, weights)


class SomeInputs(NamedTuple):
    """Tangents or gradients, one for each of the inputs that has one."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [self.x, self.h0, self.c0, *self.weights]

    @staticmethod
    def of(flat: Iterable[Tensor | None]) -> SomeInputs:
        x, h0, c0, *weights = flat
        return SomeInputs(x, h0, c0, weights)


class Outputs(NamedTuple):
    """y (T,B,D*R) or (N,D*R), h_n (L*D,B,R), c_n (L*D,B,H) (None without c)."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None

    @staticmethod
    def of(some: Iterable[Tensor]) -> Outputs:
        y, h_n, *c_n = some
        return Outputs(y, h_n, c_n[0] if c_n else None)


class SomeOutputs(NamedTuple):
    """Gradients, one for each of the outputs that has one."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None

    @staticmethod
    def of(some: Iterable[Tensor | None]) -> SomeOutputs:
        y, h_n, *c_n = some
        return SomeOutputs(y, h_n, c_n[0] if c_n else None)


class Inner(NamedTuple):
    """Gradients with respect to what stays inside a forward pass."""

    z: Tensor | None = None  # (L,D,N,G,H), of the pre-activations
    c: Tensor | None = None  # (L,D,N,H), on top of what comes through time
    hidden: Tensor | None = None  # (L-1,N,D*R), of the outputs of the layers below the top, before dropout


NOTHING = Inner()


class Past(NamedTuple):
    """A finished forward pass: what it got, gave (y) and kept (reserve, in the backend's own layout)."""

    stack: Stack
    inputs: Inputs
    constants: Constants
    y: Tensor
    reserve: Tensor


class SavedGradients(NamedTuple):
    """Gradients with respect to what a forward pass gave and kept: y, and the reserve, in place of whose gates are
    their pre-activations."""

    y: Tensor
    reserve: Tensor


class Adjoints(NamedTuple):
    """What a backward pass carries through time."""

    z: Tensor  # (L,D,N,G,H) dL/d pre-activations
    m: Tensor  # (L,D,N,H) dL/d output of the cell, which without projection is all of dL/dh_t
    c: Tensor | None  # (L,D,N,H) all of dL/dc_t; None without c


class Backend(Protocol):
    """The kernels of one kind of device. Nothing here knows autograd; `rnnfast._autograd` builds derivatives from it.

    Tangents and gradients have the shapes of what they belong to; None: zeros, or not wanted. `wanted` has a flag for
    each of Inputs.flat().
    """

    def forward(self, stack: Stack, inputs: Inputs, constants: Constants, keep: bool) -> tuple[Outputs, Tensor | None]:
        """The outputs, and if `keep` the reserve that the derivatives need."""

    def backward(
        self,
        past: Past,
        cotangents: SomeOutputs,
        wanted: Sequence[bool],
        groups: int = 1,
        inner: Inner = NOTHING,
    ) -> SomeInputs:
        """Gradients of <cotangents, outputs> + <inner, what stays inside>; of the weights (groups,...) for each group
        of sequences (b % groups) on its own if there are several."""

    def sweep_back(self, past: Past, cotangents: SomeOutputs) -> Adjoints:
        """What a backward pass carries through time. Gradients of inputs and weights are not computed."""

    def tangent(self, past: Past, tangents: SomeInputs, z_tangent: Tensor | None = None) -> Outputs:
        """The derivative of the outputs along `tangents`; if given, z_tangent (L,D,N,G,H) becomes that of the
        pre-activations."""

    def second(
        self,
        past: Past,
        tangents: SomeInputs,
        first: SomeOutputs,
        plain: SomeOutputs,
        wanted_first: Sequence[bool],
        wanted_plain: Sequence[bool],
        groups: int = 1,
    ) -> tuple[Outputs, SomeInputs, SomeInputs]:
        """Second derivatives: of S = <first, tangent outputs> + <plain, outputs>. The tangent outputs, the gradients of
        S with respect to the tangents, and with respect to the inputs."""

    def activations(self, past: Past) -> Tensor:
        """What the nonlinearities made of the pre-activations, (L,D,N,G,H)."""

    def hidden(self, past: Past) -> Tensor:
        """The outputs of the layers below the top, before dropout, (L-1,N,D*R)."""

    def states(self, past: Past) -> Tensor | None:
        """c of all layers and steps, (L,D,N,H); None without c."""


class FusedBackend(Backend, Protocol):
    """A backend that has some pairs of passes in one."""

    def forward_dual(
        self, stack: Stack, inputs: Inputs, constants: Constants, tangents: SomeInputs
    ) -> tuple[Outputs, Outputs]:
        """The outputs, and their derivative along `tangents` of x, h0 and c0; nothing is kept, the weights have no
        tangents."""

    def backward_adjoints(
        self, past: Past, cotangents: SomeOutputs, wanted: Sequence[bool]
    ) -> tuple[SomeInputs, Tensor]:
        """As `backward`, and what the pass carried through time, for `second_local`."""

    def second_local(
        self, past: Past, adjoints: Tensor, tangents: SomeInputs, wanted: Sequence[bool]
    ) -> tuple[Outputs, SomeInputs, SavedGradients]:
        """The derivative of a backward pass, one node of the graph on its own: of S = <its gradients, tangents>. The
        gradients of S with respect to its cotangents, which are the tangent outputs; to the inputs, as far as they
        enter the backward pass themselves; and to what it had from the forward pass."""

    def backward_saved(
        self, past: Past, cotangents: SomeOutputs, d_reserve: Tensor, wanted: Sequence[bool]
    ) -> SomeInputs:
        """As `backward`, with a gradient of the reserve on top, as `second_local` gives it."""
