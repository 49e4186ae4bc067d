"""Policies for sb3-contrib's RecurrentPPO that go through a batch of episodes in one call of the LSTM.

    from sb3_contrib import RecurrentPPO
    RecurrentPPO(rnnfast.rl.sb3.MlpLstmPolicy, env)    # was RecurrentPPO("MlpLstmPolicy", env)

sb3-contrib's own policies call the LSTM once for each step as soon as one episode begins within the batch. All else is
theirs: arguments (`policy_kwargs`), parameters and their names, results, saved models. To go on with a model that was
saved with their policy:

    RecurrentPPO.load(path, custom_objects={"policy_class": rnnfast.rl.sb3.MlpLstmPolicy})
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast._layer import Layer
from rnnfast.convert import convert

try:
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )
except ModuleNotFoundError as error:
    raise ImportError("rnnfast.rl.sb3 needs sb3-contrib: pip install 'rnnfast[rl]'") from error

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy"]


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
