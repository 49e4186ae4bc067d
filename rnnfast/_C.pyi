"""rnnfast's compiled core. Sizes and addresses (tensor.data_ptr(), 0: absent) only; see csrc/rnnfast.h."""

from collections.abc import Sequence
from typing import Literal, overload

class Shape:
    def __init__(
        self,
        cell: int,
        T: int,
        B: int,
        I: int,
        H: int,
        P: int,
        L: int,
        D: int,
        bias: bool,
        batch_sizes: int,  # (T) int64
        resets: int = 0,  # (N) bool: this row begins an episode
        precision: int = 0,  # of products of float32: 0 highest, 1 high, 2 medium
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def reserve(self) -> ReserveLayout: ...
    @property
    def adjoints(self) -> AdjointLayout: ...

class Cell:
    """What is known of a cell of csrc/cells/list.h."""

    name: str
    index: int
    gates: int  # G slots of pre-activations
    input_gates: tuple[int, int]  # first slot and number of those that W_ih fills
    recurrent_gates: tuple[int, int]  # of those that W_hh fills
    torch_gates: list[int]  # which of the gates of torch's W_ih and W_hh each slot is
    state: Literal["none", "own", "output"]  # own: c beside h; output: h itself, also past W_hh
    saves_gates: bool
    projects: bool
    unit_parameters: int  # U

def cells() -> list[Cell]: ...

class ReserveLayout:
    """Offsets in what a training forward pass saves."""

    gates: int
    c: int
    m: int
    hidden: int
    size: int

class AdjointLayout:
    """Offsets in what a backward pass leaves."""

    dz_stride: int
    dz: int
    dm: int
    dc: int
    size: int

class Layout:
    """How the kernels read some tensors: floating-point numbers of `bytes` bytes on the CPU, dense, of these shapes."""

    def __init__(self, tensor_type: type, shapes: list[tuple[int, ...]], bytes: int) -> None: ...
    def addresses(self, tensors: Sequence[object]) -> Addresses | None:
        """0 for None. None: not all are laid out so, or torch is too old to tell (before 2.10)."""

Addresses = list[int]

# inputs: x, h0, c0, then the weights as in torch, and after those of each layer and direction the unit parameters (U,H)
# if there are any; outputs: y, h_n, c_n. Tangents, cotangents and gradients alike.
def forward_float32(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    outputs: Addresses,
    reserve: int,
    bfloat16_weights: bool,
) -> None: ...
def forward_float64(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    outputs: Addresses,
    reserve: int,
    bfloat16_weights: bool,
) -> None: ...
def forward_dual_float32(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    outputs: Addresses,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
) -> None: ...
def forward_dual_float64(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    outputs: Addresses,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
) -> None: ...
def backward_float32(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    cotangents: Addresses,
    inner: Addresses,  # of pre-activations, c, outputs of the lower layers
    d_reserve: int,
    gradients: Addresses,
    groups: int,
    adjoints: int,
) -> None: ...
def backward_float64(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    cotangents: Addresses,
    inner: Addresses,  # of pre-activations, c, outputs of the lower layers
    d_reserve: int,
    gradients: Addresses,
    groups: int,
    adjoints: int,
) -> None: ...
def tangent_float32(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
    z_dot: int,
) -> None: ...
def tangent_float64(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
    z_dot: int,
) -> None: ...
def second_float32(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    adjoints: int,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
    direct: Addresses,
    groups: int,
    d_y: int,
    d_reserve: int,
) -> None: ...
def second_float64(
    shape: Shape,
    threads: int,
    inputs: Addresses,
    dropout: int,
    y: int,
    reserve: int,
    adjoints: int,
    inputs_dot: Addresses,
    outputs_dot: Addresses,
    direct: Addresses,
    groups: int,
    d_y: int,
    d_reserve: int,
) -> None: ...

class _Reservoirs:
    def __init__(self, unit: int, M: int, Q: int, I: int, H: int, F: int, weights: Addresses) -> None: ...
    def threads_for(self, B: int, threads: int) -> int: ...
    def run(
        self,
        B: int,
        steps: int,
        shared_x: bool,
        state_stride: int,
        O: int,
        E: int,
        arrays: Addresses,
        threads: int,
    ) -> None: ...

class ReservoirsFloat32(_Reservoirs): ...
class ReservoirsFloat64(_Reservoirs): ...

class Stream:
    """Base of rnnfast.Stream, which answers calls; addresses are those of dense numbers, 0: absent."""

    @overload
    def __init__(
        self,
        cell: str,
        I: int,
        H: int,
        P: int,
        L: int,
        bias: bool,
        O: int,
        readout_bias: bool,
        bytes: int,
        B: int,
        array_type: type,
        tensor_type: type,
    ) -> None: ...
    @overload
    def __init__(self, file: bytes, B: int, array_type: type, tensor_type: type) -> None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def input_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def proj_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    @property
    def _bytes(self) -> int: ...
    @property
    def _cell(self) -> Cell: ...
    def _run(self, steps: int, x: int, y: int) -> None: ...
    def _set_parameters(self, arrays: Addresses) -> None: ...
    def _reset(self, mask: int) -> None: ...
    def _get_state(self, h: int, c: int) -> None: ...
    def _set_state(self, h: int, c: int) -> None: ...
    def _to_bytes(self) -> bytes: ...

class GramSum:
    def __init__(self, S: int, n: int, Z: int, O: int, x_stride: int, arrays: Addresses) -> None: ...
    def work(self, threads: int) -> None: ...

def isa() -> str: ...
def usable_isas() -> list[str]: ...
def isas_by_name() -> list[str]: ...
def select_isa(name: str) -> None: ...
def machine() -> dict[str, str | int | float | None]: ...
def has_products(precision: int) -> bool: ...
def fma_peak_gflops(bytes: int, threads: int, precision: int = ...) -> float: ...
