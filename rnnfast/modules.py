"""torch.nn's recurrent layers on rnnfast's kernels: same constructor, attributes, state_dict, results and errors.

All of them take `resets` beside torch's arguments:

    layer(input, hx, resets=mask)    resets bool (T,B), (B,T) with batch_first, (T) for one sequence; a PackedSequence
                                     of bool, or (T,B), for a packed input

where resets[t,b] says that sequence b begins anew at step t, as if each episode were a sequence of its own, in both
directions; hx enters the episode that begins at step 0 without a reset, and no other. They are constants.

    layer.unroll(input, hx, resets=...)    every state and gate as an output, see `Unrolled`

    layer.recompute = None | k | "sqrt"    also a keyword of the constructor. A training pass keeps the states of every
                                           k-th step alone, and the backward pass runs each segment again: memory of
                                           T/k + k steps in place of T, least for k = sqrt(T), in a tenth to two thirds
                                           more time.
                                           Gradients of second order are right, and keep every step.

Modules of bfloat16 and float16, and autocast to these, run on the CPU's kernels of float32, too: x, states and weights
are widened, which loses nothing (autocast rounds them first), and outputs are rounded, to the dtypes of torch's layers.
Products take bfloat16 factors where the numbers are bfloat16, and of float32 as torch.set_float32_matmul_precision
says when a pass runs; sums and states stay float32. Where a CPU has no units for that, float32 kernels run on the
rounded numbers, and on float32 whatever the precision.

`LSTMCell`, `RNNCell` and `GRUCell` are torch.nn's own classes. A kernel gains on a loop over time by what it does for
all steps at once; a single step has nothing of that to win, and torch's cells have every derivative, and are open to
every compiler and tracer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import GRUCell, LSTMCell, RNNCell
from torch.nn.utils.rnn import PackedSequence

from rnnfast._layer import Layer, Unrolled
from rnnfast.fallback import FallbackWarning
from rnnfast.leaky import LeakyRNN

__all__ = ["GRU", "LSTM", "RNN", "FallbackWarning", "GRUCell", "LSTMCell", "LeakyRNN", "RNNCell", "Unrolled"]

_Device: TypeAlias = torch.device | str | int | None


class LSTM(Layer, torch.nn.LSTM):
    """Long short-term memory, a drop-in for `torch.nn.LSTM`: same arguments, attributes, shapes and state_dict.

    For each layer and direction (* elementwise, s the logistic function; Hochreiter & Schmidhuber 1997, forget gate by
    Gers et al. 2000, projection by Sak et al. 2014):

        (i,f,g,o)_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = s(f) * c_{t-1} + s(i) * tanh(g)        h_t = s(o) * tanh(c_t)        (then W_hr h_t if proj_size)

    Args:
        input_size, hidden_size: I and H.
        num_layers: L, default 1.
        bias: use biases b_ih and b_hh, default True.
        batch_first: a padded input is (B,T,I) instead of (T,B,I), default False.
        dropout: probability to drop a unit between layers in training, default 0.
        bidirectional: D = 2 instead of 1, default False.
        proj_size: P, size of h_t if not 0, default 0.
        recompute: train in less memory, see above; default None.
        device, dtype: of the parameters; kernels exist for float32, float64, float16 and bfloat16, on the CPU and, in
            an installation with CUDA kernels, on NVIDIA GPUs.

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional (h_0, c_0), (L*D,B,P or H), (L*D,B,H);
        resets, see above.
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
            *,
            recompute: int | str | None = None,
            device: _Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    def _forward_by_torch(self, input: Tensor | PackedSequence, hx: Any, resets: Any = None) -> Any:
        if isinstance(input, PackedSequence) and isinstance(hx, (tuple, list)) and len(hx) > 1:
            # There torch.nn.LSTM forgets to check, and reads beyond states of too few or too many layers.
            x, batch_sizes, order, _ = input
            states = self.permute_hidden((hx[0], hx[1]), order)
            sizes = self.get_expected_hidden_size(x, batch_sizes), self.get_expected_cell_size(x, batch_sizes)
            for i, size in enumerate(sizes):
                if isinstance(states[i], Tensor) and states[i].dim() > 2:
                    self.check_hidden_size(states[i], size, f"Expected hidden[{i}] size {{}}, got {{}}")
        return super()._forward_by_torch(input, hx, resets)


class RNN(Layer, torch.nn.RNN):
    """Elman's network (1990), a drop-in for `torch.nn.RNN`: same arguments, attributes, shapes and state_dict.

    For each layer and direction:  h_t = tanh or relu of  W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for `LSTM`.
        nonlinearity: 'tanh' (default) or 'relu'; as a positional argument the fourth.

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional h_0 (L*D,B,H); resets, see above.
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
            recompute: int | str | None = None,
            device: _Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...


class GRU(Layer, torch.nn.GRU):
    """Gated recurrent unit, a drop-in for `torch.nn.GRU`: same arguments, attributes, shapes and state_dict.

    For each layer and direction (* elementwise, s the logistic function; Cho et al. 2014, in torch's form, where r
    acts on what W_hh has made of h_{t-1}):

        r = s(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)        z = s(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))        h_t = (1 - z) * n + z * h_{t-1}

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for `LSTM`.

    Inputs: input (T,B,I), (T,I) for one sequence, or a PackedSequence; optional h_0 (L*D,B,H); resets, see above.
    Outputs: output (T,B,D*H) like the input, h_n like h_0.

    Raises:
        ValueError: a proj_size.
    """

    _twin: ClassVar[type[torch.nn.Module]] = torch.nn.GRU
    _torch_forward: ClassVar[Callable[..., Any]] = torch.nn.GRU.forward

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
            *,
            recompute: int | str | None = None,
            device: _Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...
