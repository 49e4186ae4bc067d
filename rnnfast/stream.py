"""A recurrent layer that answers step by step, in microseconds.

A layer packs its weights in every call, since a cache of them could go stale, and a single step costs more around the
kernel than in it. A `Stream` is a snapshot: weights packed once, the state kept inside, one call of C++ a step.
docs/stream.md has its file's format, and how C programs read it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rnnfast import _C
from rnnfast._backends.cells import BY_MODE
from rnnfast._layer import Layer

__all__ = ["Stream"]

_BYTES = {torch.float32: 4, torch.float64: 8}
_DTYPES = {size: dtype for dtype, size in _BYTES.items()}
_RENEW_WEIGHTS = (BasePruningMethod, SpectralNorm, WeightNorm)  # hooks that make weights from others before a call

_Batch = TypeVar("_Batch", "np.ndarray[Any, Any]", Tensor)


class Stream(_C.Stream):
    """A snapshot of a recurrent layer that keeps its state from call to call; for inference on the CPU.

        stream = rnnfast.Stream(lstm)
        y = stream(x)  # one step, x (B,I) -> y (B,R), or a chunk of them, (T,B,I) -> (T,B,R)

    A chunk gives the same bits as its steps one by one. Time comes first whatever `batch_first` says, and dropout is
    left out. Weights that change afterwards do not reach the stream before `refresh`. No gradients are recorded. One
    thread at a time may use a stream.

    Args:
        layer: `rnnfast.LSTM`, `GRU`, `RNN` or `LeakyRNN`, or torch.nn's, with any number of layers, projected or not,
            on any device; float32 or float64; not bidirectional.
        batch_size: B, how many sequences run side by side.
        head: a `torch.nn.Linear` (R,O) on top of the layer, of the same dtype: y (B,O) then.

    Calls: stream(x, *, out=None). x is a NumPy array or a tensor on the CPU of the layer's dtype, (B,I), (T,B,I) or, if
    B = 1, (I); y is of the same kind and has as many dimensions. `out`: where to write y instead, returned. Such a
    call takes no way through Python, whatever the strides of x.

    Raises:
        TypeError: a layer that has no kernel, or that computes something else than its class; x of another kind.
        ValueError: a bidirectional layer; hooks; dtypes other than those; a batch size below 1.
        RuntimeError: x, `out` or a state of another shape than expected; a stream that another thread is using.
    """

    layer: RNNBase | None
    """What `refresh` reads; None if the stream was loaded from a file."""
    head: torch.nn.Linear | None

    def __init__(self, layer: RNNBase, batch_size: int = 1, *, head: torch.nn.Linear | None = None) -> None:
        _check_layer(layer)
        _check_head(head, layer)
        super().__init__(
            cell=BY_MODE[layer.mode].name,
            I=layer.input_size,
            H=layer.hidden_size,
            P=layer.proj_size,
            L=layer.num_layers,
            bias=layer.bias,
            O=0 if head is None else head.out_features,
            readout_bias=head is not None and head.bias is not None,
            bytes=_BYTES[_dtype_of(layer)],
            B=_as_size(batch_size),
            array_type=np.ndarray,
            tensor_type=Tensor,
        )
        self.layer, self.head = layer, head
        self.refresh()

    if TYPE_CHECKING:

        def __call__(self, x: _Batch, *, out: _Batch | None = None) -> _Batch: ...

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self._bytes]

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """As the layer's hx: h (L,B,R), of an LSTM h and c (L,B,H); copies. Set it to tensors or arrays of these
        shapes, or without B if that is 1."""
        h, c = self._empty_state()
        self._get_state(h.data_ptr(), 0 if c is None else c.data_ptr())
        return h if c is None else (h, c)

    @state.setter
    def state(self, hx: Any) -> None:
        h, c = self._empty_state()
        if c is None:
            _copy_state("state", hx, h)
        elif isinstance(hx, (tuple, list)) and len(hx) == 2:
            _copy_state("state h", hx[0], h)
            _copy_state("state c", hx[1], c)
        else:
            raise RuntimeError(f"state: expected a pair (h, c), got {_describe(hx)}")
        self._set_state(h.data_ptr(), 0 if c is None else c.data_ptr())

    def reset(self, mask: Tensor | np.ndarray[Any, Any] | Sequence[bool] | None = None) -> None:
        """Set the state to zero, of all sequences or of those where `mask` (B), booleans, is true."""
        if mask is None:
            return self._reset(0)
        flags = np.ascontiguousarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
        if flags.dtype != np.bool_:
            raise TypeError(f"mask: expected booleans, got {flags.dtype}")
        if flags.shape != (self.batch_size,):
            raise RuntimeError(f"mask: expected shape ({self.batch_size},), got {flags.shape}")
        self._reset(flags.ctypes.data)

    def refresh(self) -> None:
        """Take the weights that the layer and the head have now; the state stays.

        Raises:
            RuntimeError: the stream was loaded from a file, or the layer's sizes have changed.
        """
        if self.layer is None:
            raise RuntimeError("a stream that was loaded from a file has no layer to read")
        _check_layer(self.layer)
        _check_head(self.head, self.layer)
        weights = [_array_of(weight, self.dtype) for weight in _weights_of(self.layer, self.head)]
        shapes, expected = [tuple(weight.shape) for weight in weights], self._weight_shapes()
        if shapes != expected:
            raise RuntimeError(f"weights: expected shapes {expected}, got {shapes}")
        self._set_parameters([weight.data_ptr() for weight in weights])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights, not the state, to a file for `load`, and for C programs: csrc/stream.h."""
        Path(path).write_bytes(self._to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], batch_size: int = 1) -> Stream:
        """A stream from a file that `save` has written, its state zero.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, of another version, cut off, or has bits that have changed.
        """
        return cls._from_bytes(Path(path).read_bytes(), batch_size)

    @classmethod
    def _from_bytes(cls, file: bytes, batch_size: int, state: Any = None) -> Stream:
        stream = cls.__new__(cls)
        _C.Stream.__init__(stream, file, _as_size(batch_size), np.ndarray, Tensor)
        stream.layer = stream.head = None
        if state is not None:
            stream.state = state
        return stream

    def __reduce__(self) -> Any:
        """Weights and state, without the layer."""
        return type(self)._from_bytes, (self._to_bytes(), self.batch_size, self.state)

    def __repr__(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        sizes += f", proj_size={self.proj_size}" if self.proj_size else ""
        sizes += f", output_size={self.output_size}, batch_size={self.batch_size}"
        return f"{type(self).__name__}({self._cell.name}, {sizes}, dtype={self.dtype})"

    def _call_by_hand(self, x: Any, out: Any) -> Any:
        """What the call in C++ leaves: other kinds of arrays, other strides of `out`, errors."""
        source = _read("x", x, self.dtype)
        steps = self._steps_of(source.shape)
        y = np.empty((*source.shape[:-1], self.output_size), _numpys(self.dtype))
        if out is not None:
            target = _read("out", out, self.dtype)
            if target.shape != y.shape:
                raise RuntimeError(f"out: expected shape {y.shape}, got {target.shape}")
            if isinstance(out, np.ndarray) and not out.flags.writeable:
                raise RuntimeError("out: expected an array that can be written, got a read-only one")
        source = np.ascontiguousarray(source, y.dtype)
        self._run(steps, source.ctypes.data, y.ctypes.data)
        if isinstance(out, Tensor):
            out.detach().copy_(torch.from_numpy(y))
        elif out is not None:
            out[...] = y
        else:
            return torch.from_numpy(y) if isinstance(x, Tensor) else y
        return out

    def _steps_of(self, shape: tuple[int, ...]) -> int:
        """Of an x of this shape."""
        B, I = self.batch_size, self.input_size  # noqa: E741
        if len(shape) not in ((1, 2, 3) if B == 1 else (2, 3)):
            raise RuntimeError(f"x: expected shape ({B},{I}) or (T,{B},{I}), got {shape}")
        if shape[-1] != I:
            raise RuntimeError(f"x.shape[-1] must be equal to input_size. Expected {I}, got {shape[-1]} in {shape}")
        if len(shape) > 1 and shape[-2] != B:
            raise RuntimeError(f"x: expected a batch of {B}, got {shape[-2]} in {shape}")
        if shape[0] == 0 and len(shape) == 3:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return shape[0] if len(shape) == 3 else 1

    def _empty_state(self) -> tuple[Tensor, Tensor | None]:
        L, B, H = self.num_layers, self.batch_size, self.hidden_size
        h, c = (torch.empty((L, B, size), dtype=self.dtype, device="cpu") for size in (self.proj_size or H, H))
        return h, c if self._cell.state == "own" else None

    def _weight_shapes(self) -> list[tuple[int, ...]]:
        assert self.layer is not None
        H, R, cell = self.hidden_size, self.proj_size or self.hidden_size, BY_MODE[self.layer.mode]
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.num_layers):
            width = R if layer else self.input_size
            shapes += cell.weight_shapes(H, width, self.proj_size, self.layer.bias)
        if self.head is not None:
            shapes += [(self.output_size, R)]
            shapes += [(self.output_size,)] if self.head.bias is not None else []
        return shapes


def _check_layer(layer: object) -> None:
    if not isinstance(layer, RNNBase) or layer.mode not in BY_MODE:
        raise TypeError(f"layer: expected one of LSTM, GRU, RNN, LeakyRNN, got {type(layer).__name__}")
    forwards = {base.forward for base in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN, Layer)}
    if type(layer).forward not in forwards or "forward" in vars(layer):
        raise TypeError(f"layer: {type(layer).__name__} has a forward of its own, which a stream would not run")
    if layer.bidirectional:
        raise ValueError("layer: a bidirectional layer needs the whole sequence; expected one direction")
    hooks: list[Any] = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if foreign := [hook for hook in hooks if not isinstance(hook, _RENEW_WEIGHTS)]:
        raise ValueError(f"layer: expected no hooks, which a stream would not run, got {foreign}")
    if _dtype_of(layer) not in _BYTES:
        raise ValueError(f"layer: expected torch.float32 or torch.float64, got {_dtype_of(layer)}")


def _check_head(head: object, layer: RNNBase) -> None:
    if head is None:
        return
    if type(head) is not torch.nn.Linear:
        raise TypeError(f"head: expected torch.nn.Linear, got {type(head).__name__}")
    if head._forward_pre_hooks or head._forward_hooks or "forward" in vars(head):
        raise ValueError("head: expected no hooks and no forward of its own, which a stream would not run")
    R = layer.proj_size or layer.hidden_size
    if head.in_features != R:
        raise RuntimeError(f"head: expected in_features {R}, got {head.in_features}")
    if head.weight.dtype != _dtype_of(layer):
        raise ValueError(f"head: expected {_dtype_of(layer)} as of the layer, got {head.weight.dtype}")


def _dtype_of(layer: RNNBase) -> torch.dtype:
    dtype: torch.dtype = getattr(layer, layer._flat_weights_names[0]).dtype
    return dtype


def _weights_of(layer: RNNBase, head: torch.nn.Linear | None) -> list[Tensor]:
    """What the layer would compute with now."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    if isinstance(layer, Layer):
        weights = layer._kernel_weights()
    else:
        weights = [getattr(layer, name) for name in layer._flat_weights_names]
    if head is not None:
        weights += [head.weight] if head.bias is None else [head.weight, head.bias]
    return weights


def _array_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.is_meta:
        raise ValueError("layer: expected weights, got tensors on the device meta, which have no numbers")
    if weight.dtype != dtype:
        raise ValueError(f"weights: expected {dtype}, got {weight.dtype}")
    return weight.detach().cpu().resolve_neg().contiguous()


def _as_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    return batch_size


def _describe(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _read(name: str, value: object, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """The numbers of an array or a tensor, shared wherever that can be."""
    if isinstance(value, Tensor):
        if value.dtype != dtype:
            raise ValueError(f"{name}: dtype ({value.dtype}) does not match that of the stream ({dtype})")
        if value.device.type != "cpu":
            raise RuntimeError(f"{name}: expected a tensor on cpu, where streams run, got one on {value.device}")
        return value.detach().resolve_neg().numpy()
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):  # whose mask would be ignored
        raise TypeError(f"{name}: expected a NumPy array or a torch.Tensor, got {_describe(value)}")
    if value.dtype.newbyteorder("=") != _numpys(dtype):
        raise ValueError(f"{name}: dtype ({value.dtype}) does not match that of the stream ({dtype})")
    return value


def _numpys(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def _copy_state(name: str, value: object, to: Tensor) -> None:
    """Into `to` (L,B,size); of one sequence also from (L,size)."""
    numbers, shape = _read(name, value, to.dtype), tuple(to.shape)
    if numbers.shape != shape and not (shape[1] == 1 and numbers.shape == (shape[0], shape[2])):
        raise RuntimeError(f"{name}: expected shape {shape}, got {numbers.shape}")
    to.numpy()[...] = numbers.reshape(shape)
