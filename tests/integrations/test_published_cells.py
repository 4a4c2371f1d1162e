"""Cells of the library against the packages that published them. Those that integrations run are compared there."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from tests.helpers.libraries import library
from tests.helpers.tolerances import equal

GRADIENTS = 1e-6  # of the largest: both sides are float32, and a gradient passes through up to 30 steps
SUMS = 1e-5  # the same for a number that all units share: its gradient is a sum of 4800 terms of both signs
T, B, H = 30, 8, 20


@pytest.fixture
def currents():
    torch.manual_seed(0)
    return (2 * torch.rand(T, B, H)).requires_grad_()


def assert_same_spikes(spikes, expected, wanted):
    """`wanted`: what has gradients, in pairs of ours and theirs."""
    equal(spikes, expected)
    assert 0.05 < expected.mean() < 0.95  # spikes and pauses
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad(spikes, [a for a, _ in wanted], weights)
    theirs = torch.autograd.grad(expected, [b for _, b in wanted], weights)
    for a, b in zip(ours, theirs, strict=True):
        bound = SUMS if b.dim() == 0 else GRADIENTS
        a = a.sum() if b.dim() == 0 else a  # a param of ours has a value for each unit
        assert (a - b).abs().max() <= bound * b.abs().max()


def steps_of(neuron, currents, states):
    spikes = []
    for current in currents:
        spike, *states = neuron(current, *states)
        spikes.append(spike)
    return torch.stack(spikes)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("learned", [False, True])
def test_snntorch(currents, learned, backend):
    snntorch = library("snntorch")
    leaky = snntorch.Leaky(beta=0.9, learn_beta=learned, learn_threshold=learned)
    synaptic = snntorch.Synaptic(alpha=0.8, beta=0.9, learn_alpha=learned, learn_beta=learned, learn_threshold=learned)
    for ours, theirs, names in ((cells.lif, leaky, ""), (cells.synaptic, synaptic, "alpha ")):
        rnn = fastlstm.RNN(ours, 0, H, backend=backend)
        names = f"{names}beta threshold".split() * learned
        scale = 1.0 if ours is cells.lif else 0.3  # a synapse sums currents up before the membrane does
        given = (scale * currents).detach().requires_grad_()
        wanted = [(getattr(rnn, f"{name}_l0"), getattr(theirs, name)) for name in names] + [(given, given)]
        states = [torch.zeros(B, H)] * (len(ours.states) - 1)
        assert_same_spikes(rnn(given)[0], steps_of(theirs, given, states), wanted)
