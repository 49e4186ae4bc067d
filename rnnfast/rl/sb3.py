"""Policies for sb3-contrib's RecurrentPPO that go through a batch of episodes in one call of the LSTM.

    from sb3_contrib import RecurrentPPO
    RecurrentPPO(rnnfast.rl.sb3.MlpLstmPolicy, env)    # was RecurrentPPO("MlpLstmPolicy", env)

sb3-contrib's own policies call the LSTM once for each step as soon as one episode begins within the batch. All else is
theirs: arguments (`policy_kwargs`), parameters and their names, results, saved models. To go on with a model that was
saved with their policy:

    RecurrentPPO.load(path, custom_objects={"policy_class": rnnfast.rl.sb3.MlpLstmPolicy})

Faster still is to change the algorithm as well,

    rnnfast.rl.sb3.RecurrentPPO("MlpLstmPolicy", env)    # was sb3_contrib.RecurrentPPO("MlpLstmPolicy", env)

which learns the same from minibatches that are not padded: theirs fill every episode up to the length of the longest.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast._layer import Layer
from rnnfast.convert import convert

try:
    import sb3_contrib
    from gymnasium.spaces import Dict
    from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )
    from sb3_contrib.common.recurrent.type_aliases import (
        RecurrentDictRolloutBufferSamples,
        RecurrentRolloutBufferSamples,
        RNNStates,
    )
except ModuleNotFoundError as error:
    raise ImportError("rnnfast.rl.sb3 needs sb3-contrib: pip install 'rnnfast[rl]'") from error

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy", "RecurrentPPO"]


class _Packed(NamedTuple):
    """The states where B sequences begin, the longest first, and how N frames, sequence after sequence, are packed."""

    h: Tensor  # (L,B,H)
    c: Tensor  # (L,B,H)
    rows: Tensor  # (N): of the frames, in the order of a PackedSequence
    batch_sizes: Tensor  # (T)


class MlpLstmPolicy(RecurrentActorCriticPolicy):
    """Actor and critic with LSTMs, for vectors: sb3-contrib's policy of this name on `rnnfast.LSTM`.

    Args:
        all of sb3_contrib's `RecurrentActorCriticPolicy`, with the same defaults.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for lstm in (self.lstm_actor, self.lstm_critic):
            if lstm is not None:
                convert(lstm)  # the parameters stay those that the optimizer has

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: torch.nn.LSTM,
    ) -> tuple[Tensor, Any]:
        """Features (B*T,I), one sequence after the other, states (L,B,H) and episode_starts (B*T), 1 where an episode
        begins -> output (B*T,H), states."""
        if isinstance(lstm_states, _Packed):
            return _run_packed(features, lstm_states, episode_starts, lstm)
        if not isinstance(lstm, Layer):  # reverted
            return RecurrentActorCriticPolicy._process_sequence(features, lstm_states, episode_starts, lstm)
        B = lstm_states[0].size(1)
        x = features.reshape(B, -1, lstm.input_size).transpose(0, 1)  # (T,B,I)
        resets = episode_starts.reshape(B, -1).transpose(0, 1).bool()
        output, states = lstm(x, lstm_states, resets=resets)
        return output.transpose(0, 1).flatten(0, 1), states


class CnnLstmPolicy(MlpLstmPolicy, RecurrentActorCriticCnnPolicy):
    """The same for images, with sb3-contrib's convolutional network before the LSTMs.

    Args:
        all of sb3_contrib's `RecurrentActorCriticCnnPolicy`, with the same defaults.
    """


class MultiInputLstmPolicy(MlpLstmPolicy, RecurrentMultiInputActorCriticPolicy):
    """The same for dictionaries of observations.

    Args:
        all of sb3_contrib's `RecurrentMultiInputActorCriticPolicy`, with the same defaults.
    """


def _run_packed(features: Tensor, states: _Packed, episode_starts: Tensor, lstm: torch.nn.LSTM) -> tuple[Tensor, Any]:
    """Features (N,I), episode_starts (N), 1 at the first frames of some sequences and nowhere else -> output (N,H)."""
    h, c, rows, batch_sizes = states
    begins = episode_starts[rows[: h.size(1)]].bool().view(1, -1, 1)
    hx = h.masked_fill(begins, 0), c.masked_fill(begins, 0)
    output, last = lstm(PackedSequence(features[rows], batch_sizes), hx)
    return output.data[rows.argsort()], last


def _frames(buffer: Any, chosen: np.ndarray, env_change: np.ndarray, make: type) -> Any:
    """A minibatch of a buffer's frames, chosen (N), as sb3-contrib gives it, without padding."""
    begins = (buffer.episode_starts[chosen] + env_change[chosen]).flatten() > 0  # (N)
    begins[0] = True
    first = np.flatnonzero(begins)  # (B)
    lengths = np.diff(first, append=len(begins))
    first, lengths = (a[np.argsort(-lengths, kind="stable")] for a in (first, lengths))
    t = np.arange(lengths[0])[:, None]
    runs = t < lengths  # (T,B)
    rows, batch_sizes = buffer.to_torch((first + t)[runs]), torch.from_numpy(runs.sum(1))

    def states(h: np.ndarray, c: np.ndarray) -> _Packed:  # (N,L,H)
        h0, c0 = (buffer.to_torch(a[chosen[first]]).transpose(0, 1).contiguous() for a in (h, c))
        return _Packed(h0, c0, rows, batch_sizes)

    pi = states(buffer.hidden_states_pi, buffer.cell_states_pi)
    vf = states(buffer.hidden_states_vf, buffer.cell_states_vf)
    x, take = buffer.observations, lambda a: buffer.to_torch(a[chosen])
    observations = {key: take(a) for key, a in x.items()} if isinstance(x, dict) else take(x)
    values = (take(a).flatten() for a in (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns))
    starts = take(buffer.episode_starts).flatten()
    return make(observations, take(buffer.actions), *values, RNNStates(pi, vf), starts, torch.ones_like(starts))


class _RolloutBuffer(RecurrentRolloutBuffer):
    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env_change: np.ndarray, env: Any = None
    ) -> Any:
        return _frames(self, batch_inds, env_change, RecurrentRolloutBufferSamples)


class _DictRolloutBuffer(RecurrentDictRolloutBuffer):
    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env_change: np.ndarray, env: Any = None
    ) -> Any:
        return _frames(self, batch_inds, env_change, RecurrentDictRolloutBufferSamples)


class RecurrentPPO(sb3_contrib.RecurrentPPO):
    """sb3-contrib's RecurrentPPO with rnnfast's policies, on minibatches without padding: the same frames in the same
    order, hence the same losses and gradients but for rounding.

    Args:
        all of sb3_contrib's `RecurrentPPO`, with the same defaults; the policies' names mean those of this module. With
            other policies, or subclasses that evaluate batches in their own way, minibatches are padded as theirs.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }

    def _setup_model(self) -> None:
        super()._setup_model()
        own = ("_process_sequence", "evaluate_actions")  # they must know what comes without padding
        if all(getattr(self.policy_class, name) is getattr(MlpLstmPolicy, name) for name in own):
            buffer = _DictRolloutBuffer if isinstance(self.observation_space, Dict) else _RolloutBuffer
            self.rollout_buffer.__class__ = buffer  # a subclass of what it is, with no state of its own
