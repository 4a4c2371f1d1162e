"""RecurrentPPO of sb3-contrib learns and acts the same with fastlstm."""

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.integrations import sb3
from tests.helpers.tolerances import close

sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs the package sb3-contrib: pip install .[integrations]")
gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium: pip install .[integrations]")

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
    assert type(ours.policy.lstm_actor) is fastlstm.LSTM
    assert [info["r"] for info in ours.ep_info_buffer] == [info["r"] for info in theirs.ep_info_buffer]
    assert len(theirs.ep_info_buffer) > 5
    close(ours.policy.parameters(), theirs.policy.parameters(), "models")


def test_sequences_and_gradients_are_the_same():
    policy = model().policy
    torch.manual_seed(0)
    features, states = torch.randn(5 * 9, 4), (torch.randn(1, 5, 24), torch.randn(1, 5, 24))
    starts = (torch.rand(5 * 9) < 0.2).float()
    weights = list(policy.lstm_actor.parameters())
    expected, last = policy._process_sequence(features, states, starts, policy.lstm_actor)
    gradients = torch.autograd.grad(expected.pow(2).sum() + last[1].sum(), weights)
    fastlstm.replace(policy)
    got, ends = sb3.process_sequence(features, states, starts, policy.lstm_actor)
    close([got, *ends], [expected, *last], "values")
    close(torch.autograd.grad(got.pow(2).sum() + ends[1].sum(), weights), gradients, "gradients")


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


def test_a_policy_without_its_model():
    policy = model().policy
    expected = actions(policy)
    assert type(sb3.accelerate(policy).lstm_actor) is fastlstm.LSTM
    assert np.array_equal(actions(policy), expected)
    assert type(sb3.restore(policy).lstm_actor) is nn.LSTM


def test_restored():
    ours, other = sb3.accelerate(sb3.accelerate(model())), model()
    assert ours.policy._process_sequence is not other.policy._process_sequence
    assert sb3.restore(ours) is ours
    assert type(ours.policy.lstm_actor) is type(ours.policy.lstm_critic) is nn.LSTM
    assert ours.policy._process_sequence is other.policy._process_sequence
    sb3.restore(other)  # which was never accelerated


def test_what_has_no_recurrent_policy_raises():
    from stable_baselines3 import PPO

    plain = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(TypeError, match=r"recurrent policy of sb3-contrib, got PPO with ActorCriticPolicy$"):
        sb3.accelerate(plain)
    with pytest.raises(TypeError, match=r"got str$"):
        sb3.accelerate("model")


def test_a_policy_with_a_loop_of_its_own_raises():
    class Policy(sb3_contrib.ppo_recurrent.MlpLstmPolicy):
        @staticmethod
        def _process_sequence(features, lstm_states, episode_starts, lstm):
            raise AssertionError("not called here")

    ours = sb3_contrib.RecurrentPPO(Policy, "CartPole-v1", device="cpu")
    with pytest.raises(TypeError, match="got Policy with a _process_sequence of its own"):
        sb3.accelerate(ours)
    assert type(ours.policy.lstm_actor) is nn.LSTM
