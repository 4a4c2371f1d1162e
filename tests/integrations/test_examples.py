"""The examples that need other libraries run, and show what they say."""

import os

import pytest

from tests.helpers import script

os.environ.setdefault("KERAS_BACKEND", "torch")
BOUND = 1e-5  # of the largest gradient: a sum of a few thousand terms in float32


def example(name, package):
    pytest.importorskip(package, reason=f"the example needs the package {package}: pip install .[integrations]")
    return script(f"examples/{name}.py")


def test_ppo_has_the_gradients_of_the_loop():
    _, error = example("cleanrl_ppo_lstm", "gymnasium").main(updates=10)
    assert error < BOUND


@pytest.mark.slow
def test_ppo_learns_what_needs_memory():
    length, _ = example("cleanrl_ppo_lstm", "gymnasium").main()
    assert length > 100  # of 500 steps; an agent without memory balances for some 50


def test_recurrent_ppo_has_the_same_episodes():
    theirs, ours = example("sb3_recurrent_ppo", "sb3_contrib").main(steps=1024)
    assert len(theirs) > 20
    assert ours == theirs


def test_a_model_of_keras_has_the_same_losses_and_predictions():
    loss, error = example("keras_row_lstm", "keras").main(images=512)
    assert loss < BOUND
    assert error < BOUND


def test_torchrl_has_the_same_gradients():
    pytest.importorskip("gymnasium", reason="the example needs the package gymnasium: pip install .[integrations]")
    assert example("torchrl_lstm", "torchrl").main(T=64, B=2, H=16, rounds=1) < BOUND


def test_an_xlstm_has_the_same_losses():
    theirs, ours = example("xlstm_parity", "xlstm").main(steps=20)
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < BOUND
