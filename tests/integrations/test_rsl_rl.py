"""rsl_rl's recurrent models learn the same with fastlstm, and are exported."""

import copy

import pytest
import torch

import fastlstm
from fastlstm.integrations import rsl_rl as integration
from tests.helpers.libraries import check, gradients
from tests.helpers.tolerances import close

pytest.importorskip("rsl_rl", reason="needs the package rsl-rl-lib: pip install .[rsl-rl]")
from rsl_rl.models import RNNModel
from rsl_rl.modules import RNN
from rsl_rl.utils import split_and_pad_trajectories
from tensordict import TensorDict

T, ENVIRONMENTS, I, H = 9, 4, 5, 7
KINDS = {"LSTM": fastlstm.LSTM, "GRU": fastlstm.GRU}
kinds = pytest.mark.parametrize("kind", KINDS)


def module(kind, layers=1):
    torch.manual_seed(0)
    return RNN(I, H, layers, kind.lower())


def check_update(kind, theirs, **options):
    """The output of an update, and the gradients of the input, the states and the parameters."""
    torch.manual_seed(1)
    x = torch.randn(T, ENVIRONMENTS, I)
    padded, masks = split_and_pad_trajectories(x, (torch.rand(T, ENVIRONMENTS, 1) < 0.2).byte())
    padded.requires_grad_()
    shape = theirs.rnn.num_layers, padded.shape[1], H
    states = [torch.randn(shape, requires_grad=True) for _ in range(2 if kind == "LSTM" else 1)]

    def results(module):
        output = module(padded, masks, tuple(states) if kind == "LSTM" else states[0])
        return [output], gradients([output], [padded, *states, *module.parameters()])

    check(integration, theirs, results, **options)


@pytest.mark.parametrize("layers", [1, 2])
@kinds
def test_updates_are_the_same(kind, layers):
    check_update(kind, module(kind, layers), refused=[RNN])


@kinds
def test_another_layer_in_an_accelerated_module(kind):
    ours, theirs = integration.accelerate(module(kind)), module(kind)
    theirs.rnn = ours.rnn = getattr(torch.nn, kind)(I, H)
    check_update(kind, theirs, ours=ours)


@kinds
def test_steps_are_the_same(kind):
    theirs = module(kind)
    ours, x = integration.accelerate(copy.deepcopy(theirs)), torch.randn(T, ENVIRONMENTS, I)
    with torch.inference_mode():
        for step in x:
            close(ours(step), theirs(step), "values")
            dones = torch.rand(ENVIRONMENTS) < 0.3
            ours.reset(dones)
            theirs.reset(dones)
    with pytest.raises(ValueError, match="Hidden states not passed"):
        ours(x, torch.ones(T, ENVIRONMENTS, dtype=torch.bool))


@kinds
def test_a_model_is_exported(kind):
    observations = TensorDict({"seen": torch.randn(1, I)}, [1])
    model = RNNModel(observations, {"actor": ["seen"]}, "actor", 2, [8], rnn_type=kind.lower(), rnn_hidden_dim=H)
    expected = torch.jit.script(model.as_jit())(observations["seen"])
    integration.accelerate(model)
    assert isinstance(model.rnn.rnn, KINDS[kind])
    close(torch.jit.script(model.as_jit())(observations["seen"]), expected, "values")
    assert isinstance(model.rnn.rnn, KINDS[kind])
    derived = type("Derived", (type(model),), {})
    model.__class__ = derived
    close(torch.jit.script(model.as_jit())(observations["seen"]), expected, "values")
    model.__class__ = derived.__bases__[0]
    assert type(integration.restore(model)) is RNNModel
