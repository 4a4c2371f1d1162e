"""Layers of torchrecurrent compute the same with fastlstm."""

import copy

import pytest
import torch
from torch import nn

from fastlstm.integrations import torchrecurrent as integration
from tests.helpers.libraries import check, check_stays, check_their_code, check_training, gradients, library

package = library("torchrecurrent")
T, B, I, H = 9, 4, 5, 7
kinds = pytest.mark.parametrize("kind", integration.KINDS)


def layer(kind, **options):
    torch.manual_seed(0)
    module = getattr(package, kind)(I, H, **options).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def check_call(module, x, states=()):
    def results(module):
        output, last = module(x, states if len(states) > 1 else states[0] if states else None)
        values = [output, *last] if isinstance(last, tuple) else [output, last]
        return values, gradients(values, [x, *states, *module.parameters()])

    check(integration, module, results, ("sums", "gradients"), refused={type(cell) for cell in module.cells})


@kinds
def test_one_layer(kind):
    check_call(layer(kind), drawn(T, B, I))


@kinds
def test_two_layers_with_states(kind):
    states = tuple(drawn(2, B, H) for _ in integration.KINDS[kind][0].states)
    check_call(layer(kind, num_layers=2, batch_first=True), drawn(B, T, I), states)


@kinds
def test_without_biases(kind):
    check_call(layer(kind, bias=False, recurrent_bias=False), drawn(T, B, I))


def test_dropout():
    """Without training it does nothing, and in training it leaves the expected share."""
    module = layer("STAR", num_layers=2, dropout=0.5)
    check_call(module.eval(), drawn(T, B, I))
    ours, x = integration.accelerate(module.train()), drawn(T, B, I)
    assert not torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize("kind", ["LiGRU", "MGU", "PeepholeLSTM"])
def test_other_activations_stay(kind):
    module = layer(kind, nonlinearity="sigmoid")
    check_stays(integration, module, "it has other activations than its class by default$")


@pytest.mark.parametrize("case", ["autocast", "one sequence", "states of one row"])
def test_what_runs_the_code_of_torchrecurrent(case, monkeypatch):
    module, x, state = layer("STAR").float(), torch.randn(T, B, I), None
    if case == "states of one row":
        state = torch.randn(1, 1, H)

    def call(module):
        if case != "one sequence":
            return module(x, state)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            module(x[:, 0])
        return ()

    with torch.autocast("cpu", enabled=case == "autocast"):
        check_their_code(integration, module, call, monkeypatch)


def test_no_random_numbers_are_drawn():
    module = layer("PeepholeLSTM")
    before = torch.random.get_rng_state()
    integration.accelerate(module)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training():
    torch.manual_seed(1)
    x, model = torch.randn(12, 16, I).double(), nn.ModuleList([layer("JANET"), nn.Linear(H, 1).double()])
    y, ours = x.cumsum(0)[..., :1].sin(), integration.accelerate(copy.deepcopy(model))
    check_training(model, ours, lambda model: (model[1](model[0](x)[0]) - y).square().mean(), 1e-2, 20)
