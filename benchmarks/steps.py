"""Single steps: cells beside torch.nn's, one call or a loop of them, and layers of few steps;
eager, and both sides compiled.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.contenders import LIBRARIES, Contender, Data, State, as_contender, load_module
from benchmarks.grid import Job, Shape


class Loop(torch.nn.Module):
    """A cell through the steps of x (T,B,I) -> its h (T,B,H), and the last h, or h and c, (B,H)."""

    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        state, hs = None, []
        for x_t in x.unbind():
            state = self.cell(x_t, state)
            hs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(hs), state


@functools.cache
def has_compiler() -> bool:
    """Is there a C++ compiler, without which torch.compile has nothing to compile with?"""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def make_contenders(job: Job, data: Data, device: str) -> list[Contender]:
    """torch's and rnnfast's. Where a job says so both are compiled, as users do it: without `fullgraph`, for a layer of
    torch's is not taken into a graph."""
    modules = {name: _make(name, job, data, device).train(job.trains) for name in LIBRARIES}
    same = type(_layer(modules["rnnfast"])) is type(_layer(modules["torch"]))
    if job.is_compiled:
        torch._dynamo.reset()  # else another shape than the last compiled one is compiled for any shape
        for module in modules.values():
            module.compile()
    contenders = [as_contender(name, module, job.base, data) for name, module in modules.items()]
    return [replace(c, same_code=same and c.name == "rnnfast") for c in contenders]


def _make(name: str, job: Job, data: Data, device: str) -> torch.nn.Module:
    if not job.is_of_cell:
        return load_module(LIBRARIES[name], job.shape, data, device)
    module = Loop(make_cell(LIBRARIES[name], job.shape))
    module.load_state_dict({f"cell.{key.removesuffix('_l0')}": weight for key, weight in data.weights.items()})
    return module.to(device)


def make_cell(library: ModuleType, shape: Shape) -> torch.nn.Module:
    """`library`.LSTMCell, RNNCell or GRUCell; `rnnfast.convert` gives the same as rnnfast's."""
    kind = getattr(library, f"{shape.cell.upper()}Cell")
    return kind(shape.I, shape.H, dtype=getattr(torch, shape.dtype))


def _layer(module: torch.nn.Module) -> torch.nn.Module:
    return module.cell if isinstance(module, Loop) else module
