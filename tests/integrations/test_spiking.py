"""Spiking networks of norse, spikingjelly and snnTorch compute the same with fastlstm."""

import copy

import pytest
import torch
from torch import nn

from fastlstm.integrations import spiking
from tests.helpers.tolerances import close, equal

NEEDED = "needs the package {}: pip install .[integrations]"
T, B = 25, 16


def norse(**options):
    library = pytest.importorskip("norse.torch", reason=NEEDED.format("norse"))
    return library.LIF(library.LIFParameters(**options))


def spikingjelly(surrogate="Sigmoid", **options):
    needed = {"reason": NEEDED.format("spikingjelly")}
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", **needed)
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate", **needed)
    return neuron.LIFNode(step_mode="m", surrogate_function=getattr(surrogates, surrogate)(), **options)


def leaky(surrogate="atan", **options):
    library = pytest.importorskip("snntorch", reason=NEEDED.format("snntorch"))
    return library.Leaky(**{"beta": 0.9, "spike_grad": getattr(library.surrogate, surrogate)(), **options})


def loop(neuron, currents, v):
    spikes, membranes = [], []
    for current in currents:
        spike, v = neuron(current, v)
        spikes.append(spike)
        membranes.append(v)
    return torch.stack(spikes), torch.stack(membranes)


def drawn(*shape, scale=2.0):
    return (scale * torch.rand(T, B, *shape)).requires_grad_()


def check(got, expected, wanted):
    """Spikes bit for bit, and potentials. `wanted` are what has gradients, in pairs of ours and the library's."""
    assert 0.02 < expected[0].mean() < 0.98  # spikes and pauses
    equal(got[0], expected[0])
    close(got[1:], expected[1:], "values")
    weights = [torch.randn_like(a) for a in expected]
    for ours, theirs in wanted:
        a, b = (
            torch.autograd.grad(got, ours, weights, retain_graph=True),
            torch.autograd.grad(expected, theirs, weights, retain_graph=True),
        )
        close(a, b, "long")


def results_of(module, currents):
    output = module(currents)
    return [output[0], output[1].v, output[1].i] if isinstance(output, tuple) else [output, module.v]


NEURONS = {
    "norse": norse,
    "norse, other constants": lambda: norse(
        v_th=torch.tensor(0.7), v_leak=torch.tensor(0.1), v_reset=torch.tensor(-0.2)
    ),
    "spikingjelly": spikingjelly,
    "spikingjelly, ATan": lambda: spikingjelly("ATan", tau=3.0),
    "spikingjelly, no decay of inputs": lambda: spikingjelly(decay_input=False, tau=5.0),
    "spikingjelly, soft reset": lambda: spikingjelly(v_reset=None, v_threshold=0.8),
    "spikingjelly, detached reset": lambda: spikingjelly(detach_reset=True, v_reset=-0.1),
}


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("shape", [(33,), (3, 4, 5)], ids=str)
def test_neurons(name, shape):
    torch.manual_seed(0)
    theirs, currents = NEURONS[name](), drawn(*shape)
    ours = spiking.accelerate(copy.deepcopy(theirs))
    expected, got = results_of(theirs, currents), results_of(ours, currents)
    check(got, expected, [(currents, currents)])


@pytest.mark.parametrize("surrogate", ["atan", "fast_sigmoid", "sigmoid"])
@pytest.mark.parametrize("options", [{}, {"learn_beta": True, "learn_threshold": True}], ids=str)
def test_leaky(options, surrogate):
    torch.manual_seed(0)
    theirs, currents, v = leaky(surrogate, **options), drawn(33, scale=0.5), torch.rand(B, 33).requires_grad_()
    wanted = [(currents, currents), (v, v), *((p, p) for p in theirs.parameters())]
    check(spiking.over_time(theirs, currents, v), loop(theirs, currents, v), wanted)
    got, expected = spiking.over_time(theirs, currents), loop(theirs, currents, torch.zeros(B, 33))
    check(got, expected, [])


def test_a_state_goes_on():
    torch.manual_seed(0)
    currents = drawn(9)
    for theirs in (norse(), spikingjelly()):
        ours = spiking.accelerate(copy.deepcopy(theirs))
        for each in (theirs, ours):
            results_of(each, currents)
        if theirs.__class__.__name__ == "LIF":
            _, state = theirs(currents)
            equal(ours(currents, state)[0], theirs(currents, state)[0])
        else:
            equal(ours(currents), theirs(currents))
            ours.reset()
            theirs.reset()
            equal(ours(currents), theirs(currents))


@pytest.mark.parametrize("case", ["one row", "autocast"])
@pytest.mark.parametrize("make", [norse, spikingjelly])
def test_what_runs_the_code_of_the_library(make, case, monkeypatch):
    theirs, currents = make(), drawn(9).detach()
    currents = currents[:, 0] if case == "one row" else currents
    with torch.autocast("cpu", enabled=case == "autocast"):
        expected = results_of(theirs, currents)[0]
        ours = spiking.accelerate(make())
        monkeypatch.setattr(spiking, "run_cell", None)  # which would be called
        equal(results_of(ours, currents)[0], expected)


def test_what_stays():
    for module in (norse(method="tanh"), spikingjelly("PiecewiseQuadratic")):
        with pytest.warns(UserWarning, match=r"^LIF(Node)? stays as it is: its surrogate is none that fastlstm has$"):
            spiking.accelerate(module)
        assert type(module).__module__ != spiking.__name__


@pytest.mark.parametrize(
    "options",
    [{"surrogate": "spike_rate_escape"}, {"reset_mechanism": "zero"}, {"init_hidden": True}, {"inhibition": True}],
    ids=str,
)
def test_a_leaky_that_is_not_taken(options):
    with pytest.raises(
        TypeError, match=r"^neuron must be a Leaky of snnTorch with options that fastlstm takes, got Lea"
    ):
        spiking.over_time(leaky(**options), drawn(3))


def test_not_a_neuron():
    with pytest.raises(TypeError, match=r"^neuron must be a Leaky"):
        spiking.over_time(nn.ReLU(), drawn(3))


class Tutorial(nn.Module):
    """The network of snnTorch's tutorial 5, with its loop or layer after layer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(20, 40), leaky(), nn.Linear(40, 4), leaky()

    def forward(self, x, by_layers):
        if by_layers:
            spikes, _ = spiking.over_time(self.lif1, self.fc1(x))
            return spiking.over_time(self.lif2, self.fc2(spikes))
        v1, v2, outputs = torch.zeros(B, 40), torch.zeros(B, 4), []
        for x_t in x:
            spike, v1 = self.lif1(self.fc1(x_t), v1)
            spike, v2 = self.lif2(self.fc2(spike), v2)
            outputs.append((spike, v2))
        return [torch.stack(each) for each in zip(*outputs)]


def test_training():
    torch.manual_seed(0)
    x, labels = torch.rand(T, B, 20), torch.randint(4, (B,))
    curves = []
    for by_layers in (False, True):
        torch.manual_seed(1)
        model = Tutorial()
        optimizer, curve = torch.optim.Adam(model.parameters(), 5e-3), []
        for _ in range(10):
            optimizer.zero_grad()
            _, membranes = model(x, by_layers)
            loss = sum(nn.functional.cross_entropy(v, labels) for v in membranes) / T
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    close(curves[1], curves[0], "models")
    assert curves[1][-1] < 0.95 * curves[1][0]
