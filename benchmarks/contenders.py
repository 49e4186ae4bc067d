"""Who is measured: torch.nn, rnnfast and ONNX Runtime, with the same weights and the same input.

Each is called as its users call it: modules with tensors, ONNX Runtime by session.run with NumPy arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from benchmarks.grid import Job, Shape

LIBRARIES: dict[str, ModuleType] = {"torch": torch.nn, "rnnfast": rnnfast}
ONNX = "onnxruntime"
CHECKED_STEPS = 3  # of a streaming job

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """run: what is timed, once. results: what it computes, by name, from a fresh state. same_code: as torch's."""

    name: str
    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    same_code: bool = False


@dataclass(frozen=True)
class Data:
    """What all contenders of a job share, drawn from one seed.

    x: (T,B,I), or a PackedSequence of N rows. dy: (T,B,D*R) or (N,D*R). weights: torch's state_dict.
    """

    x: Tensor | PackedSequence
    dy: Tensor
    weights: dict[str, Tensor]


def make_data(shape: Shape, device: str) -> Data:
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    weights = make_module(torch.nn, shape).state_dict()
    x = torch.randn(shape.T, shape.B, shape.I, dtype=dtype, device=device)
    dy = torch.randn(shape.T, shape.B, shape.D * shape.R, dtype=dtype, device=device)
    if not shape.packed:
        return Data(x, dy, weights)
    return Data(pack_padded_sequence(x, shape.lengths), dy.flatten(0, 1)[: shape.N], weights)


def make_module(library: ModuleType, shape: Shape) -> torch.nn.Module:
    """`library`.LSTM, `library`.RNN or `library`.GRU of a shape."""
    options = {"num_layers": shape.L, "bidirectional": shape.D == 2, "dtype": getattr(torch, shape.dtype)}
    if shape.cell != "lstm":
        return getattr(library, shape.cell.upper())(shape.I, shape.H, **options)
    return library.LSTM(shape.I, shape.H, proj_size=shape.P, **options)


def make_contenders(job: Job, device: str, threads: int) -> list[Contender]:
    """All who can do the job, torch first."""
    data = make_data(job.shape, device)
    contenders = [module_contender(name, job, data, device) for name in LIBRARIES]
    if has_onnx() and onnx_can(job, device):
        contenders.append(onnx_contender(job, data, threads))
    return contenders


# ---------------------------------------------------------------------------------- torch.nn and rnnfast


def module_contender(name: str, job: Job, data: Data, device: str) -> Contender:
    module = load_module(LIBRARIES[name], job.shape, data, device).train(job.trains)
    return as_contender(name, module, job.kind, data)


def load_module(library: ModuleType, shape: Shape, data: Data, device: str) -> torch.nn.Module:
    module = make_module(library, shape)
    module.load_state_dict(data.weights)
    return module.to(device)


def as_contender(name: str, module: torch.nn.Module, kind: str, data: Data) -> Contender:
    """A module that does a job of one kind."""
    if kind == "step":
        return _stream(name, module, _rows(data.x))
    if kind in ("train", "memory"):
        return _train(name, module, data)
    return Contender(name, lambda: module(data.x), lambda: _outputs(*module(data.x)))


def _train(name: str, module: torch.nn.Module, data: Data) -> Contender:
    """Forward and backward from a given dL/dy; the gradients start as None, as after optimizer.zero_grad()."""

    def run() -> tuple[Tensor | PackedSequence, State]:
        module.zero_grad(set_to_none=True)
        y, state = module(data.x)
        torch.autograd.backward(_rows(y), data.dy)
        return y, state

    def results() -> dict[str, Tensor]:
        outputs = _outputs(*run())
        return outputs | {f"d_{key}": _gradient(w) for key, w in module.named_parameters()}

    return Contender(name, run, results)


def _stream(name: str, module: torch.nn.Module, x: Tensor) -> Contender:
    """One step at a time: each call takes the state that the last one returned."""
    state = None

    def run() -> tuple[Tensor, State]:
        nonlocal state
        y, state = module(x, state)
        return y, state

    def results() -> dict[str, Tensor]:
        nonlocal state
        state = None
        ys, states = zip(*(run() for _ in range(CHECKED_STEPS)), strict=True)
        return _outputs(torch.cat(ys), states[-1])

    return Contender(name, run, results)


def _rows(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def _outputs(y: Tensor | PackedSequence, state: State) -> dict[str, Tensor]:
    states = state if isinstance(state, tuple) else (state,)
    named = {"y": _rows(y)} | dict(zip(("h_n", "c_n"), states, strict=False))
    return {name: a.detach() for name, a in named.items()}


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise RuntimeError("a weight got no gradient")
    return weight.grad


# ----------------------------------------------------------------------------------------- ONNX Runtime


def has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", ONNX))


def onnx_can(job: Job, device: str) -> bool:
    """ONNX Runtime's kernels: inference, float32, no projection, on the CPU."""
    s = job.shape
    return not job.trains and s.dtype == "float32" and not s.P and not s.packed and device == "cpu"


def onnx_contender(job: Job, data: Data, threads: int) -> Contender:
    from benchmarks.onnx_model import build_model, state_names

    s, carry = job.shape, job.kind == "step"
    weights = {key: w.numpy() for key, w in data.weights.items()}
    session = onnx_session(build_model(s, weights, carry).SerializeToString(), threads)
    names = state_names(s)
    zeros = {"0_" + name: np.zeros((s.D, s.B, s.H), np.float32) for name in names} if carry else {}
    feeds = {"x": _rows(data.x).numpy()} | zeros

    def run() -> list[np.ndarray]:
        outputs = session.run(None, feeds)
        if carry:
            feeds.update(zip(zeros, outputs[1:], strict=True))
        return outputs

    def results() -> dict[str, Tensor]:
        feeds.update(zeros)
        steps = [run() for _ in range(CHECKED_STEPS if carry else 1)]
        y = np.concatenate([outputs[0] for outputs in steps])
        last = dict(zip(names, steps[-1][1:], strict=True))
        states = {
            f"{letter}_n": np.concatenate([last[name] for name in names if name[0] == letter])
            for letter in ("hc" if s.cell == "lstm" else "h")
        }
        return {name: torch.from_numpy(a) for name, a in ({"y": y} | states).items()}

    return Contender(ONNX, run, results)


def onnx_session(model: bytes, threads: int):
    """A session with `threads` threads. They stop to spin when a run ends: else they take a core from whoever comes
    next for some 80 ms."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
