"""rnnfast's compiled core. Sizes and addresses (tensor.data_ptr(), 0: absent) only; see csrc/rnnfast.h."""

from collections.abc import Sequence

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
        batch_sizes: int,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def reserve_per_row(self) -> int: ...
    @property
    def swept(self) -> Swept: ...

class Swept:
    """Offsets in what a backward pass leaves."""

    dz_stride: int
    dz: int
    dc: int
    size: int

class Layout:
    """How the kernels read some tensors: floating-point numbers of `bytes` bytes on the CPU, dense, of these shapes."""

    def __init__(self, tensor_type: type, shapes: list[tuple[int, ...]], bytes: int) -> None: ...
    def addresses(self, tensors: Sequence[object]) -> Addresses | None:
        """0 for None. None: not all are laid out so, or torch is too old to tell (before 2.10)."""

class Memory:
    """Uninitialised; has the buffer protocol."""

    def __init__(self, bytes: int) -> None: ...

LARGE_MEMORY: int  # bytes from which on Memory is kept for the next call

Addresses = list[int]

def forward_float32(shape: Shape, threads: int, parameters: Addresses, arrays: Addresses) -> None: ...
def forward_float64(shape: Shape, threads: int, parameters: Addresses, arrays: Addresses) -> None: ...
def forward_dual_float32(
    shape: Shape, threads: int, parameters: Addresses, arrays: Addresses, dot: Addresses
) -> None: ...
def forward_dual_float64(
    shape: Shape, threads: int, parameters: Addresses, arrays: Addresses, dot: Addresses
) -> None: ...
def backward_float32(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    adjoint: Addresses,
    gradients: Addresses,
    groups: int,
) -> None: ...
def backward_float64(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    adjoint: Addresses,
    gradients: Addresses,
    groups: int,
) -> None: ...
def tangent_float32(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    dot: Addresses,
    parameters_dot: Addresses,
    z: int,
) -> None: ...
def tangent_float64(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    dot: Addresses,
    parameters_dot: Addresses,
    z: int,
) -> None: ...
def second_float32(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    swept: int,
    dot: Addresses,
    parameters_dot: Addresses,
    direct: Addresses,
    direct_gradients: Addresses,
    groups: int,
    bend: Addresses,
) -> None: ...
def second_float64(
    shape: Shape,
    threads: int,
    parameters: Addresses,
    past: Addresses,
    swept: int,
    dot: Addresses,
    parameters_dot: Addresses,
    direct: Addresses,
    direct_gradients: Addresses,
    groups: int,
    bend: Addresses,
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

def add_gram(S: int, n: int, Z: int, x: int, x_stride: int, gram: int, threads: int) -> None: ...
def isa() -> str: ...
def usable_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def fma_peak_gflops(bytes: int, threads: int) -> float: ...
