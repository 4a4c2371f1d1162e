"""RecurrentPPO of sb3-contrib learns and acts the same with fastlstm."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.integrations import sb3
from tests.helpers.libraries import check, check_stays, gradients, library
from tests.helpers.tolerances import close

sb3_contrib, gymnasium = library("sb3_contrib", "sb3-contrib"), library("gymnasium")

POLICIES = {
    "two LSTMs": {},
    "one LSTM": {"enable_critic_lstm": False},
    "a shared LSTM": {"enable_critic_lstm": False, "shared_lstm": True},
    "two layers": {"n_lstm_layers": 2},
}


def model(**options):
    """Episodes of CartPole last for some twenty steps at first, so that sequences of 32 have several."""
    from stable_baselines3.common.env_util import make_vec_env

    sizes = {"lstm_hidden_size": 24, "net_arch": [16]}
    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", make_vec_env("CartPole-v1", n_envs=3, seed=1), n_steps=32, batch_size=48, n_epochs=2, seed=1,
        device="cpu", policy_kwargs={**sizes, **options},
    )  # fmt: skip


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_learning_is_the_same(options):
    theirs = model(**options).learn(3 * 3 * 32)  # its constructor seeds all generators
    ours = sb3.accelerate(model(**options)).learn(3 * 3 * 32)
    assert isinstance(ours.policy.lstm_actor, fastlstm.LSTM)
    assert [info["r"] for info in ours.ep_info_buffer] == [info["r"] for info in theirs.ep_info_buffer]
    assert len(theirs.ep_info_buffer) > 5
    close(ours.policy.parameters(), theirs.policy.parameters(), "models")


def test_sequences_and_gradients_are_the_same():
    torch.manual_seed(0)
    features, states = torch.randn(5 * 9, 4), (torch.randn(1, 5, 24), torch.randn(1, 5, 24))
    starts = (torch.rand(5 * 9) < 0.2).float()

    def results(policy):
        output, last = policy._process_sequence(features, states, starts, policy.lstm_actor)
        values = [output, *last]
        return values, gradients(values, list(policy.lstm_actor.parameters()))

    check(sb3, model().policy, results)


@pytest.mark.parametrize("case", ["autocast", "layers of torch"])
def test_what_runs_the_code_of_sb3_contrib(case, monkeypatch):
    policy = sb3.accelerate(model().policy)
    if case == "layers of torch":
        fastlstm.restore(policy)
    monkeypatch.setattr(sb3, "run_with_resets", None)  # which would be called
    features, states = torch.randn(5 * 9, 4), (torch.randn(1, 5, 24), torch.randn(1, 5, 24))
    arguments = features, states, (torch.rand(5 * 9) < 0.2).float(), policy.lstm_actor
    with torch.autocast("cpu", enabled=case == "autocast"):
        output, last = policy._process_sequence(*arguments)
        expected, expected_last = sb3_contrib.ppo_recurrent.MlpLstmPolicy._process_sequence(*arguments)
    assert all(torch.equal(a, b) for a, b in zip((output, *last), (expected, *expected_last), strict=True))


def actions(model):
    """The actions of a few steps, at some of which an episode begins."""
    state, chosen = None, []
    rng = np.random.default_rng(0)
    for _ in range(20):
        observation, starts = rng.normal(size=(4, 4)).astype(np.float32), rng.random(4) < 0.2
        action, state = model.predict(observation, state, starts, deterministic=True)
        chosen.append(action)
    return np.stack(chosen)


def test_predictions_and_files_are_the_same(tmp_path):
    ours = model()
    expected = actions(ours)
    assert np.array_equal(actions(sb3.accelerate(ours)), expected)
    ours.save(tmp_path / "model")
    loaded = sb3_contrib.RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert type(loaded.policy.lstm_actor) is nn.LSTM
    assert np.array_equal(actions(loaded), expected)
    assert np.array_equal(actions(sb3.accelerate(loaded)), expected)


@pytest.mark.parametrize("change", [sb3.accelerate, sb3.restore])
def test_what_has_no_recurrent_policy_raises(change):
    from stable_baselines3 import PPO

    with pytest.raises(
        TypeError, match=r"^model must have modules of RecurrentActorCriticPolicy, .* got PPO without any$"
    ):
        change(PPO("MlpPolicy", "CartPole-v1", device="cpu"))


class Policy(sb3_contrib.ppo_recurrent.MlpLstmPolicy):
    pass


def test_policies_of_derived_classes():
    """They run fastlstm, unless they run sequences in a way of their own."""

    class Own(Policy):
        @staticmethod
        def _process_sequence(features, lstm_states, episode_starts, lstm):
            raise AssertionError("not called here")

    ours, own = [sb3_contrib.RecurrentPPO(cls, "CartPole-v1", device="cpu").policy for cls in (Policy, Own)]
    assert isinstance(sb3.accelerate(ours).lstm_actor, fastlstm.LSTM)
    assert isinstance(ours, Policy)
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded) is type(ours)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))
    assert type(sb3.restore(ours)) is Policy
    check_stays(sb3, own, "it has a _process_sequence of its own$")
