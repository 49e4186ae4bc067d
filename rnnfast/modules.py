"""torch.nn's recurrent layers on rnnfast's kernels: same constructor, attributes, state_dict, results and errors.

A layer looks at its input once, cheaply. What has a kernel and fits goes to `_autograd.op.recurrent`; everything else
goes to the forward of the torch layer itself: it raises torch's own error for bad input, and computes with torch's
operators what has no kernel (after one warning).

`LSTMCell` and `RNNCell` are torch.nn's own classes. A kernel gains on a loop over time by what it does for all steps at
once; a single step has nothing of that to win, and torch's cells have every derivative, and are open to every compiler
and tracer. A layer's single step is torch's, too, where that is faster: see `_Layer._step_by_torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import LSTMCell, RNNCell
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from rnnfast._autograd import op
from rnnfast._backends import cuda_sweeps
from rnnfast._twins import Twin
from rnnfast.fallback import FallbackWarning, warn_once

__all__ = ["LSTM", "RNN", "FallbackWarning", "LSTMCell", "RNNCell"]


_Device: TypeAlias = torch.device | str | int | None

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}  # of an Elman network, by nonlinearity
_ELMAN: dict[str, Callable[..., Any]] = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}

_CPU_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_kernel(x: Tensor, weight: Tensor, to_torch: bool) -> bool:
    """Is there a kernel for this input as far as dtype, device and what is going on are concerned? If not, or if
    autocast is left to torch, says so."""
    if not to_torch and x.dtype == weight.dtype and not torch.jit.is_tracing():
        if x.is_cpu and weight.is_cpu and x.dtype in op.DTYPES:
            return True
        if x.is_cuda and x.device == weight.device and x.dtype in cuda_sweeps.DTYPES and cuda_sweeps.is_built():
            return True
    reason = _why_no_kernel(x, weight)
    if reason is not None:
        warn_once(reason)
    return False


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of float32 numbers on the device of x, if it is on and there are kernels; float64 it leaves
    alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not (x.is_cpu or (x.is_cuda and cuda_sweeps.is_built())):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floating-point numbers in another dtype, alone or as a list of what was a tuple or list of any type;
    everything else as it is."""
    if isinstance(value, (tuple, list)):
        return [_cast(one, dtype) for one in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _why_no_kernel(x: Tensor, weight: Tensor) -> str | None:
    """None where nobody needs to know: bad input, which torch refuses, and shapes without numbers."""
    device = x.device.type
    if x.is_meta or x.device != weight.device:
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return f"autocast to {torch.get_autocast_dtype(device)}"
    if device == "cuda" and not cuda_sweeps.is_built():
        return f"{x.dtype} on cuda in this installation (it was not built with RNNFAST_CUDA=on)"
    return f"{x.dtype} on {device}" if x.dtype == weight.dtype else None


def _state_fits(state: object, shape: tuple[int, ...], like: Tensor) -> bool:
    return (
        isinstance(state, Tensor) and state.shape == shape and state.dtype == like.dtype and state.device == like.device
    )


def _is_pair(hx: object) -> bool:
    return isinstance(hx, (tuple, list)) and len(hx) == 2


def _weights(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The tensors of these names, whatever put them there: parametrizations, pruning, data parallelism."""
    parameters: dict[str, Any] = module._parameters  # a fifth of the time of getattr on a Module
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


def _each(f: Callable[[Tensor], Tensor], h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return f(h), None if c is None else f(c)


class _Layer(Twin, RNNBase):
    """What LSTM and RNN have in common."""

    _torch_forward: ClassVar[Callable[..., Any]]

    def flatten_parameters(self) -> None:
        """As torch's layers do, for cuDNN, where that has to run: the kernels take the weights where they are."""
        if not torch.compiler.is_compiling():
            super().flatten_parameters()

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, Any]:
        if isinstance(input, Tensor):
            x, batch_sizes, order, back = input, None, None, None
        elif isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
        else:
            return self._forward_by_torch(input, hx)
        weights = _weights(self, self._flat_weights_names)
        dtype = _autocast_dtype(x)
        to_torch = dtype is not None and self._is_left_to_torch(x, dtype)
        states: Any = hx
        if dtype is not None and not to_torch:
            x, states, weights = self._autocast_inputs(x, hx, weights, dtype)
        if not self._fits(x, batch_sizes, states, weights[0], to_torch):
            return self._forward_by_torch(input, hx)
        h0, c0 = states if _is_pair(states) else (states, None)
        padded = batch_sizes is None
        single = padded and x.dim() == 2
        if single:
            x = x.unsqueeze(1)  # (T,I) -> (T,1,I)
        elif padded and self.batch_first:
            x = x.transpose(0, 1)  # (B,T,I) -> (T,B,I)
        if h0 is not None and single:
            h0, c0 = _each(lambda state: state.unsqueeze(1), h0, c0)
        elif h0 is not None and order is not None:
            h0, c0 = _each(lambda state: state.index_select(1, order), h0, c0)
        step = None if dtype is not None else self._step_by_torch(x, batch_sizes, h0, c0, weights)
        y, h_n, c_n = step or op.recurrent(
            self.mode,
            x,
            batch_sizes,
            h0,
            c0,
            weights,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self._dropout_masks(x),
        )
        if single:
            y = y.squeeze(1)
            h_n, c_n = _each(lambda state: state.squeeze(1), h_n, c_n)
        elif padded and self.batch_first:
            y = y.transpose(0, 1)
        elif back is not None:
            h_n, c_n = _each(lambda state: state.index_select(1, back), h_n, c_n)
        if dtype is not None and x.is_cpu:
            y, h_n = y.to(dtype), h_n.to(dtype)
            c_n = c_n.to(dtype) if c_n is not None and self._is_onednns(dtype) else c_n
        output = y if batch_sizes is None else PackedSequence(y, batch_sizes, order, back)
        return output, h_n if c_n is None else (h_n, c_n)

    def _is_onednns(self, dtype: torch.dtype) -> bool:
        """Would torch take oneDNN's LSTM under autocast on the CPU, if its CPU has instructions for it? It rounds the
        cells; torch's own operators leave them float32."""
        return self.mode == "LSTM" and not self.proj_size and dtype == torch.bfloat16

    def _is_left_to_torch(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Can oneDNN take this call? With 16 bits it is faster than the kernels with 32."""
        return x.is_cpu and self._is_onednns(dtype) and _CPU_HAS_BFLOAT16

    def _autocast_inputs(self, x: Tensor, hx: Any, weights: Any, dtype: torch.dtype) -> tuple[Tensor, Any, Any]:
        """Rounded as autocast does; on the CPU, whose kernels have no fewer bits, as float32 again."""
        if not x.is_cpu:
            return _cast(x, dtype), _cast(hx, dtype), _cast(weights, dtype)
        x, h, weights = (_cast(_cast(value, dtype), torch.float32) for value in (x, hx, weights))
        keeps_c = _is_pair(hx) and not self._is_onednns(dtype)
        return x, (h[0], _cast(hx[1], torch.float32)) if keeps_c else h, weights

    def _fits(self, x: Tensor, batch_sizes: Tensor | None, hx: Any, weight: Tensor, to_torch: bool) -> bool:
        """Is there a kernel for this call, and is everything of the right size?"""
        if not _has_kernel(x, weight, to_torch):
            return False
        dims = x.dim()
        if dims not in ((2, 3) if batch_sizes is None else (2,)) or x.size(-1) != self.input_size or x.numel() == 0:
            return False
        if batch_sizes is not None and batch_sizes.dtype != torch.int64:
            return False
        if hx is None:
            return True
        LD = self.num_layers * (2 if self.bidirectional else 1)
        batch: tuple[int, ...] = ()
        if batch_sizes is not None:
            batch = (int(batch_sizes[0]),)
        elif dims == 3:
            batch = (x.size(0 if self.batch_first else 1),)
        shape = (LD, *batch, self.proj_size or self.hidden_size)
        if self.mode != "LSTM":
            return _state_fits(hx, shape, x)
        return _is_pair(hx) and _state_fits(hx[0], shape, x) and _state_fits(hx[1], (LD, *batch, self.hidden_size), x)

    def _step_by_torch(
        self, x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Arguments and result as those of `op.recurrent`, if the call is a single step that torch's operators do
        faster: those that a compiler fuses with what is around them, where a kernel would be a stranger; and a recorded
        step of an Elman network, of which one layer in one direction takes less time than a node of ours. Measured in
        benchmarks/NOTES.md."""
        if (x.size(0) if batch_sizes is None else batch_sizes.numel()) != 1 or self.proj_size or not x.is_cpu:
            return None
        if torch.compiler.is_compiling():
            return self._step_by_cells(x, h0, c0, weights)
        run = _ELMAN.get(self.mode)
        if run is None or self.num_layers > 1 or self.bidirectional or not op.leaves_mere_graph((x, h0, *weights)):
            return None
        rows = x if batch_sizes is None else x.unsqueeze(0)
        h0 = rows.new_zeros((1, rows.size(1), self.hidden_size)) if h0 is None else h0
        y, h_n = run(rows, h0, weights, self.bias, 1, 0.0, False, False, False)
        return y if batch_sizes is None else y.squeeze(0), h_n, None

    def _step_by_cells(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layer by layer, x (1,B,I) or packed (B,I)."""
        D, each, masks = 2 if self.bidirectional else 1, 4 if self.bias else 2, self._dropout_masks(x)
        rows = x if x.dim() == 2 else x.squeeze(0)  # what goes into the layer at hand
        zeros = rows.new_zeros((rows.size(0), self.hidden_size))
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(self.num_layers):
            for i in range(layer * D, layer * D + D):
                h, own = zeros if h0 is None else h0[i], weights[i * each : (i + 1) * each]
                if self.mode == "LSTM":
                    h, c = torch.lstm_cell(rows, (h, zeros if c0 is None else c0[i]), *own)
                    c_n.append(c)
                else:
                    cell = torch.rnn_tanh_cell if self.mode == "RNN_TANH" else torch.rnn_relu_cell
                    h = cell(rows, h, *own)
                h_n.append(h)
            rows = torch.cat(h_n[-D:], 1)
            if masks is not None and layer < self.num_layers - 1:
                rows = rows * masks[layer].view_as(rows)
        return rows if x.dim() == 2 else rows.unsqueeze(0), torch.stack(h_n), torch.stack(c_n) if c_n else None

    def _forward_by_torch(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        """What has no kernel, what has no numbers, and what has no answer: torch computes the one, torch.fx traces the
        second, and torch says what is wrong with the third."""
        node = self._symbolic(input, hx)
        return self._torch_forward(input, hx) if node is None else node

    def _dropout_masks(self, x: Tensor) -> Tensor | None:
        """(L-1,T,B,D*R) or (L-1,N,D*R), drawn as torch draws them: the same seed drops the same units."""
        if not self.training or self.dropout == 0 or self.num_layers == 1:
            return None
        width = (2 if self.bidirectional else 1) * (self.proj_size or self.hidden_size)
        layers = self.num_layers - 1
        if self.dropout == 1:
            return x.new_zeros((layers, *x.shape[:-1], width))
        # Not of x: vmap, which decides whether its samples share a mask, draws for no tensor that it has mapped.
        like = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        masks = [torch.bernoulli(like, 1 - self.dropout) for _ in range(layers)]
        return torch.stack(masks).div_(1 - self.dropout)


class LSTM(_Layer, torch.nn.LSTM):
    """Long short-term memory, a drop-in for `torch.nn.LSTM`: same arguments, attributes, shapes and state_dict.

    For each layer and direction (* elementwise, s the logistic function; Hochreiter & Schmidhuber 1997, forget gate by
    Gers et al. 2000, projection by Sak et al. 2014):

        (i,f,g,o)_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = s(f) * c_{t-1} + s(i) * tanh(g)        h_t = s(o) * tanh(c_t)        (then W_hr h_t if proj_size)

    Args:
        input_size, hidden_size: I and H.
        num_layers: L, default 1.
        bias: has it b_ih and b_hh, default True.
        batch_first: is a padded input (B,T,I) instead of (T,B,I), default False.
        dropout: probability to drop a unit between layers in training, default 0.
        bidirectional: D = 2 instead of 1, default False.
        proj_size: P, size of h_t if not 0, default 0.
        device, dtype: of the parameters; kernels exist for float32 and float64 on the CPU, and in an installation with
            CUDA kernels for these, float16 and bfloat16 on NVIDIA GPUs.

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional (h_0, c_0), (L*D,B,P or H), (L*D,B,H).
    Outputs: output (T,B,D*P or D*H) like the input, (h_n, c_n) like (h_0, c_0).
    """

    _twin: ClassVar[type[torch.nn.Module]] = torch.nn.LSTM
    _torch_forward: ClassVar[Callable[..., Any]] = torch.nn.LSTM.forward

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: _Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    def _forward_by_torch(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        if isinstance(input, PackedSequence) and isinstance(hx, (tuple, list)) and len(hx) > 1:
            # There torch.nn.LSTM forgets to check, and reads beyond states of too few or too many layers.
            x, batch_sizes, order, _ = input
            states = self.permute_hidden((hx[0], hx[1]), order)
            sizes = self.get_expected_hidden_size(x, batch_sizes), self.get_expected_cell_size(x, batch_sizes)
            for i, size in enumerate(sizes):
                if isinstance(states[i], Tensor) and states[i].dim() > 2:
                    self.check_hidden_size(states[i], size, f"Expected hidden[{i}] size {{}}, got {{}}")
        return super()._forward_by_torch(input, hx)


class RNN(_Layer, torch.nn.RNN):
    """Elman's network (1990), a drop-in for `torch.nn.RNN`: same arguments, attributes, shapes and state_dict.

    For each layer and direction:  h_t = tanh or relu of  W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for `LSTM`.
        nonlinearity: 'tanh' (default) or 'relu'; as a positional argument the fourth.

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional h_0 (L*D,B,H).
    Outputs: output (T,B,D*H) like the input, h_n like h_0.

    Raises:
        ValueError: another nonlinearity, or a proj_size.
    """

    _twin: ClassVar[type[torch.nn.Module]] = torch.nn.RNN
    _torch_forward: ClassVar[Callable[..., Any]] = torch.nn.RNN.forward

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            *,
            device: _Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...
