"""Stable-Baselines3: the recurrent policies of sb3-contrib, with resets in place of their loop over time.

Where an episode begins inside a sequence, the policy of `RecurrentPPO` runs its LSTMs one step at a time, and zeroes
their states in between. With `accelerate` one call with `reset` runs all steps.
"""

from typing import Any, TypeVar

from torch import Tensor

from fastlstm import convert
from fastlstm.integrations import import_library
from fastlstm.integrations.places import run_with_resets

Model = TypeVar("Model")
States = tuple[Tensor, Tensor]


def accelerate(model: Model) -> Model:
    """Make the recurrent policy of a model run fastlstm, for `learn` as well as for `predict`.

    The LSTMs of the policy become fastlstm's, as `fastlstm.replace` makes them. Parameters, optimizer, rollouts and
    saved files stay as they are, and the same seed gives the same results up to rounding. Only this model changes: one
    that `load` returns is plain again.

    Args:
        model: a `sb3_contrib.RecurrentPPO`, another model with a recurrent policy of sb3-contrib, or the policy itself.

    Returns:
        `model`, changed.

    Raises:
        ImportError: without sb3-contrib 2.3 or newer.
        TypeError: for a model whose policy is not recurrent, and for a policy that runs its sequences in its own way.
    """
    policy = _policy_of(model)
    convert.replace(policy)
    policy._process_sequence = process_sequence
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the policy has torch's modules and its own loop again. Return `model`.

    Raises what `accelerate` raises.
    """
    policy = _policy_of(model)
    vars(policy).pop("_process_sequence", None)
    convert.restore(policy)
    return model


def process_sequence(features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: Any) -> tuple[Tensor, States]:
    """Run an LSTM over sequences in which episodes begin.

    Args:
        features: (B * T, I), one sequence after the other.
        lstm_states: h and c, (L, B, H).
        episode_starts: (B * T,), 1 where a step is the first of an episode and 0 elsewhere.
        lstm: a `fastlstm.LSTM`.

    Returns:
        the output (B * T, H), and the last states.
    """
    B = lstm_states[0].shape[1]
    x = features.reshape(B, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(B, -1).transpose(0, 1)
    output, states = run_with_resets(lstm, x, lstm_states, starts)
    return output.transpose(0, 1).flatten(0, 1), states


def _policy_of(model: Any) -> Any:
    library = import_library("sb3_contrib.common.recurrent.policies", "sb3-contrib", "2.3")
    policy, plain = getattr(model, "policy", model), library.RecurrentActorCriticPolicy
    if not isinstance(policy, plain):
        names = dict.fromkeys(type(each).__name__ for each in (model, policy))
        raise TypeError(f"model must have or be a recurrent policy of sb3-contrib, got {' with '.join(names)}")
    if type(policy)._process_sequence is not plain._process_sequence:
        name = f"{type(policy).__name__} with a _process_sequence of its own"
        raise TypeError(f"model must run its sequences as sb3-contrib does, got {name}")
    return policy
