"""A whole stack by one call of cuDNN, where that is faster than sweeps; everything else works the same after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnfast._backends import cuda_sweeps
from rnnfast._backends.cuda_call import Call
from rnnfast._backends.types import Outputs, Past, SomeInputs, SomeOutputs

_MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}  # that cuDNN has, as it counts them
_SHORT = 8  # steps
_MANY_WAVES = 8


def is_cudnns(call: Call, keep: bool) -> bool:
    """Is a call faster by cuDNN than by sweeps? By reasoning; no card has been asked.

    Where W_hh stays on the chip, sweeps are: a step is 1 to 4 µs, cuDNN's 7 to 15. Where it does not (kernel `steps`:
    float64, float32 without TF32, projections, W_hh larger than the registers) a step of theirs reads all of W_hh by
    plain multiply-adds, up to 100 µs; a loop over torch's operators pays ten launches a step; cuDNN pays one product of
    the library and one launch. Where the groups of a large batch go by many turns, one product for all of them fills
    the card. A few steps do not pay for the copy of the weights that cuDNN wants.

    Dropout's masks are drawn before the call, which cuDNN does not take between its layers; it knows no resets. What
    has no persistent kernel (GRU) is cuDNN's at any length.
    """
    x, sweep = call.like, call.sweep
    if not x.is_cuda or cuda_sweeps.forced() or call.dropout is not None or sweep.resets is not None:
        return False
    if call.stack.cell.mode not in _MODES:
        return False
    if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        return False
    extension = cuda_sweeps.load_extension()
    if not extension.runs_on(x.device.index) or not cuda_sweeps.has_persistent(call.stack.cell):
        return True
    with cuda_sweeps.on_device_of(x):
        plans = [extension.plan(sweep, x, backward) for backward in (False, True)[: 1 + keep]]
    slow = any(plan.kernel == "steps" or plan.waves > _MANY_WAVES for plan in plans)
    return slow and call.sizes.T > _SHORT


class Cudnn:
    """A whole stack by torch's own operators for cuDNN."""

    def __init__(self, call: Call) -> None:
        self.call, stack, s = call, call.stack, call.sizes
        mode = _MODES[stack.cell.mode]
        bidirectional = stack.D == 2
        weights = [w.data for w in call.weights]  # not the parameters: what follows points them into its copy
        per = stack.weights_each(weights)
        sizes = mode, s.H, s.P, stack.L, False
        flat = torch.ops.aten._cudnn_rnn_flatten_weight(weights, per, s.I, *sizes, bidirectional)
        self.weights = weights, per, flat
        self.states = self._state(call.h0, s.R), self._state(call.c0, s.H) if stack.has_c else None
        self.x = call.x.view(call.shapes.inputs.shapes[0])
        self.batch_sizes = [] if call.batch_sizes is None else call.batch_sizes.tolist()
        self.sizes, self.bidirectional = sizes, bidirectional

    def _options(self, train: bool) -> tuple[Any, ...]:
        """What follows the tensors; no dropout."""
        return *self.sizes, 0.0, train, self.bidirectional, self.batch_sizes, None

    def _state(self, state: Tensor | None, size: int) -> Tensor:
        stack = self.call.stack
        return self.call.empty(stack.L * stack.D, self.call.sizes.B, size).zero_() if state is None else state

    def forward(self, keep: bool) -> tuple[Outputs, Tensor | None]:
        y, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(self.x, *self.weights, *self.states, *self._options(keep))
        return Outputs(y, h_n, c_n if self.call.stack.has_c else None), reserve if keep else None

    def backward(self, past: Past, cotangents: SomeOutputs, wanted: Sequence[bool]) -> SomeInputs:
        outputs = self.call.dense_outputs("gradient of ", cotangents)
        mask = [*wanted[:3], any(wanted[3:])]
        x, h0, c0, weights = torch.ops.aten._cudnn_rnn_backward(
            self.x, *self.weights, *self.states, past.y, *outputs, *self._options(True), past.reserve, mask
        )
        given = x, h0, c0, *(weights if mask[3] else [None] * len(self.call.weights))
        inputs = self.call.x, self.call.h0, self.call.c0, *self.call.weights
        pairs = zip(given, inputs, wanted, strict=True)
        return SomeInputs.of(g if want and i is not None else None for g, i, want in pairs)


def is_by_cudnn(past: Past) -> bool:
    """Is the reserve cuDNN's own, bytes that nobody else reads?"""
    return past.reserve.dtype == torch.uint8
