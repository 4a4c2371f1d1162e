"""Cells of the library, and cells as authors write them, against the packages that published them.

The packages are not in the extra `integrations`: ``pip install snntorch norse spikingjelly ncps torchrecurrent``.
"""

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.cells import cell, sigmoid, surrogate
from tests.helpers.tolerances import close, equal

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
    snntorch = pytest.importorskip("snntorch", reason="compares with the package snntorch")
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


@cell(gates={}, states=("spike", "v", "i"), inputs=("current",))
def norse_lif(v, i, current):
    """With norse's default time constants, and a gradient through the reset."""
    i = i + current
    v = v + 0.1 * (i - v)
    spike = surrogate(v - 1.0, 1 / cells.square(1 + cells.abs(v - 1.0)))
    return spike, (1 - spike) * v, i - 0.2 * i


def test_norse(currents):
    norse = pytest.importorskip("norse.torch", reason="compares with the package norse")
    rnn = fastlstm.RNN(norse_lif, 0, H)
    assert_same_spikes(rnn(currents)[0], norse.LIF()(currents)[0], [(currents, currents)])


@cell(gates={}, states=("spike", "v"), inputs=("current",))
def spikingjelly_lif(v, current):
    """A neuron that spikes at its threshold, too, and of which a spike sets v to 0."""
    v = v + (current - v) * 0.5
    slope = sigmoid(4 * (v - 1.0))
    spike = 1 - surrogate(1.0 - v, 4 * slope * (1 - slope))
    return spike, (1 - spike) * v


def test_spikingjelly(currents):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="compares with spikingjelly")
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate", reason="compares with spikingjelly")
    lif = neuron.LIFNode(step_mode="m", surrogate_function=surrogates.Sigmoid())
    rnn = fastlstm.RNN(spikingjelly_lif, 0, H)
    assert_same_spikes(rnn(currents)[0], lif(currents), [(currents, currents)])


def assert_same_layer(rnn, weights, theirs, x, expected, inputs=None):
    """Outputs and all gradients. `weights`: ours by name, tensors that are made of the parameters of `theirs`."""
    values = {f"{name}_l0": a for name, a in weights.items()}
    assert values.keys() == dict(rnn.named_parameters()).keys()
    output, _ = torch.func.functional_call(rnn, values, (x, None, inputs))
    close(output, expected, "values")
    wanted = [x, *(a for a in theirs.parameters() if a.requires_grad)]
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(a, wanted, weight, retain_graph=True) for a in (output, expected))
    close(*gradients, "gradients")


def test_ncps():
    ncps = pytest.importorskip("ncps.torch", reason="compares with the package ncps")
    torch.manual_seed(0)
    theirs, x = ncps.CfC(5, H, batch_first=False, backbone_layers=0, backbone_units=0), torch.randn(T, B, 5)
    gaps, parts = torch.rand(T, B, H), [getattr(theirs.rnn_cell, name) for name in ("ff1", "ff2", "time_a", "time_b")]
    both, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    weights = {"weight_ih": both[:, :5], "weight_hh": both[:, 5:], "bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
    expected, _ = theirs(x.requires_grad_(), timespans=gaps)
    rnn = fastlstm.RNN(cells.cfc, 5, H)
    assert_same_layer(rnn, weights, theirs, x, expected, {"gap": gaps})


@pytest.mark.parametrize("name", ["MultiplicativeLSTM", "coRNN"])
def test_torchrecurrent(name):
    torchrecurrent = pytest.importorskip("torchrecurrent", reason="compares with the package torchrecurrent")
    torch.manual_seed(0)
    theirs, x = getattr(torchrecurrent, name)(5, H), torch.randn(T, B, 5)
    own = theirs.cells[0]
    weights = {"weight_ih": own.weight_ih, "weight_hh": own.weight_hh, "bias_hh": own.bias_hh}
    if name == "coRNN":
        ours = cells.cornn
        weights |= {"bias_ih": own.bias_ih + own.bias_ch, "weight_a_z": own.weight_ch}
        weights |= {param: torch.full((H,), float(getattr(own, param))) for param in ours.params}
    else:
        ours = cells.multiplicative_lstm
        weights["bias_ih"] = own.bias_ih + torch.cat([torch.zeros(H), own.bias_mh])
        weights |= {f"weight_{product}": a for product, a in zip(ours.products, own.weight_mh.chunk(4))}
    expected = theirs(x.requires_grad_())[0]
    assert_same_layer(fastlstm.RNN(ours, 5, H), weights, theirs, x, expected)
