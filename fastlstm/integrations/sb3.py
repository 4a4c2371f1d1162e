"""Stable-Baselines3: the recurrent policies of sb3-contrib run their LSTMs by one call with resets.

A policy with a `_process_sequence` of its own stays as it is. `accelerate` and `restore` also take a
`sb3_contrib.RecurrentPPO`, or another model with such a policy. Calls on a GPU run fastlstm, too.
"""

from typing import Any

from torch import Tensor

from fastlstm.integrations.calls import run_with_resets, takes
from fastlstm.integrations.places import Place, Places
from fastlstm.layers.recurrent import Recurrent


def _run(policy: Any, features: Tensor, lstm_states: Any, episode_starts: Tensor, lstm: Any) -> Any:
    """Do what `_process_sequence` of a policy does: return the output (B * T, H), and the last states. `features` is
    (B * T, I), one sequence after the other, and `episode_starts` is (B * T,).
    """
    if not isinstance(lstm, Recurrent) or (features.is_cpu and not takes(features, *lstm_states)):
        return None
    B = lstm_states[0].shape[1]
    x = features.reshape(B, -1, lstm.input_size).transpose(0, 1)
    output, states = run_with_resets(lstm, x, lstm_states, episode_starts.reshape(B, -1).transpose(0, 1))
    return output.transpose(0, 1).flatten(0, 1), states


def _unlike(policy: Any) -> str:
    """Return what keeps a policy as it is."""
    is_theirs = type(policy)._process_sequence.__module__ == _POLICIES
    return "" if is_theirs else "it has a _process_sequence of its own"


_POLICIES = "sb3_contrib.common.recurrent.policies"
_names = "RecurrentActorCriticPolicy", "RecurrentActorCriticCnnPolicy", "RecurrentMultiInputActorCriticPolicy"
_kinds = [
    Place(_POLICIES, name, "sb3-contrib", "2.3", _run, _unlike, method="_process_sequence", derived=True)
    for name in _names
]
_places = Places(__name__, *_kinds, within=lambda model: getattr(model, "policy", model))
accelerate, restore = _places.accelerate, _places.restore
