"""Spiking networks of norse, spikingjelly and snnTorch compute the same with fastlstm."""

import copy
import functools

import pytest
import torch
from torch import nn

from fastlstm.integrations import spiking
from tests.helpers.libraries import check_stays, check_their_code, check_training, library
from tests.helpers.tolerances import close, equal

T, B = 25, 16


def norse(**options):
    package = library("norse.torch", "norse")
    return package.LIF(package.LIFParameters(**options))


def spikingjelly(surrogate="Sigmoid", **options):
    package = library("spikingjelly.activation_based.neuron", "spikingjelly")
    surrogates = library("spikingjelly.activation_based.surrogate", "spikingjelly")
    return package.LIFNode(step_mode="m", surrogate_function=getattr(surrogates, surrogate)(), **options)


def leaky(surrogate="atan", **options):
    package = library("snntorch")
    return package.Leaky(**{"beta": 0.9, "spike_grad": getattr(package.surrogate, surrogate)(), **options})


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
    """Spikes bit for bit, potentials, and the gradients of `wanted`."""
    assert 0.02 < expected[0].mean() < 0.98  # spikes and pauses
    equal(got[0], expected[0])
    close(got[1:], expected[1:], "values")
    weights = [torch.randn_like(a) for a in expected]
    if wanted:
        close(*(torch.autograd.grad(values, wanted, weights) for values in (got, expected)), "long")


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
    check(got, expected, [currents])


@pytest.mark.parametrize("surrogate", ["atan", "fast_sigmoid", "sigmoid"])
@pytest.mark.parametrize("options", [{}, {"learn_beta": True, "learn_threshold": True}], ids=str)
def test_leaky(options, surrogate):
    torch.manual_seed(0)
    theirs, currents, v = leaky(surrogate, **options), drawn(33, scale=0.5), torch.rand(B, 33).requires_grad_()
    wanted = [currents, v, *theirs.parameters()]
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
        if hasattr(theirs, "reset"):
            equal(ours(currents), theirs(currents))
            ours.reset()
            theirs.reset()
            equal(ours(currents), theirs(currents))
        else:
            _, state = theirs(currents)
            equal(ours(currents, state)[0], theirs(currents, state)[0])


@pytest.mark.parametrize("make", [norse, spikingjelly])
def test_training_goes_on_from_a_state_of_inference_mode(make):
    gradients = []
    for module in (make(), spiking.accelerate(make())):
        torch.manual_seed(0)
        currents = drawn(9)
        with torch.inference_mode():
            last = module(currents)[1]
        output = module(currents, last)[0] if make is norse else module(currents)
        gradients.append(torch.autograd.grad(output.sum(), currents))
    close(gradients[1], gradients[0], "long")


def test_options_that_change_later():
    surrogates = library("spikingjelly.activation_based.surrogate", "spikingjelly")
    for name, value in (("surrogate_function", surrogates.Sigmoid(spiking=False)), ("store_v_seq", True)):
        theirs, currents = spikingjelly(), drawn(9)
        ours = spiking.accelerate(copy.deepcopy(theirs))
        setattr(theirs, name, value)
        setattr(ours, name, value)
        equal(results_of(ours, currents), results_of(theirs, currents))
    ours = spiking.accelerate(spikingjelly())
    ours._neuron_precision = torch.bfloat16, "fp32", "fp32"
    with pytest.raises(RuntimeError, match=r"^the requested neuron precision requires CUDA\.$"):
        ours(drawn(9))
    theirs = norse()
    ours = spiking.accelerate(copy.deepcopy(theirs))
    ours.p = theirs.p = norse(method="tanh").p
    currents = drawn(9)
    got, expected = [torch.autograd.grad(results_of(each, currents)[0].sum(), currents) for each in (ours, theirs)]
    equal(got, expected)


def test_arguments_that_the_library_alone_takes(monkeypatch):
    theirs, currents = spikingjelly(), drawn(9)
    ours = spiking.accelerate(copy.deepcopy(theirs))
    equal(ours(currents, 1), theirs(currents, 1))
    monkeypatch.setattr(spiking, "run_cell", None)  # an error inside a call is not about its arguments
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        ours(currents)


@pytest.mark.parametrize("case", ["one row", "autocast"])
@pytest.mark.parametrize("make", [norse, spikingjelly])
def test_what_runs_the_code_of_the_library(make, case, monkeypatch):
    currents = drawn(9).detach()
    currents = currents[:, 0] if case == "one row" else currents
    with torch.autocast("cpu", enabled=case == "autocast"):
        check_their_code(spiking, make(), lambda neuron: results_of(copy.deepcopy(neuron), currents), monkeypatch)


def test_what_stays():
    for module in (norse(method="tanh"), spikingjelly("PiecewiseQuadratic")):
        check_stays(spiking, module, "its surrogate is none that fastlstm has$")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leaky_under_autocast(dtype):
    torch.manual_seed(0)
    neuron, currents = leaky(), drawn(33, scale=0.5).detach().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = spiking.over_time(neuron, currents), loop(neuron, currents, torch.zeros(B, 33))
    assert got[0].dtype == got[1].dtype == torch.float32
    equal(got[0], expected[0])
    close(got[1], expected[1], "values")


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "spike_rate_escape"},
        {"reset_mechanism": "zero"},
        {"init_hidden": True},
        {"inhibition": True},
        {"graded_spikes_factor": torch.full((3,), 2.0)},
        {"learn_graded_spikes_factor": True},
        {"spike_grad": functools.partial(torch.heaviside, values=torch.zeros(1))},
    ],
    ids=", ".join,
)
def test_a_leaky_that_is_not_taken(options):
    with pytest.raises(
        TypeError, match=r"^neuron must be a Leaky of snnTorch with options that fastlstm takes, got Lea"
    ):
        spiking.over_time(leaky(**options), drawn(3))


def test_a_factor_of_one_for_each_unit():
    torch.manual_seed(0)
    currents = drawn(33).detach()
    got, expected = [spiking.over_time(leaky(graded_spikes_factor=a), currents) for a in (torch.ones(33), 1.0)]
    equal(got, expected)


@pytest.mark.parametrize("kind", ["ReLU", "Synaptic", "RLeaky", "RSynaptic", "Derived"])
def test_another_neuron(kind):
    package, rest = library("snntorch"), {"linear_features": 3}
    neuron = {
        "ReLU": nn.ReLU,
        "Synaptic": lambda: package.Synaptic(0.8, 0.9),
        "RLeaky": lambda: package.RLeaky(0.9, **rest),
        "RSynaptic": lambda: package.RSynaptic(0.8, 0.9, **rest),
        "Derived": lambda: type("Derived", (package.Leaky,), {})(0.9),
    }[kind]()
    with pytest.raises(TypeError, match=rf"^neuron must be a Leaky of snnTorch .*, got {kind}"):
        spiking.over_time(neuron, drawn(3))


@pytest.mark.parametrize("shape", [(7, 3), (0, 3, 5), (7, 0, 5)], ids=str)
def test_currents_of_a_leaky_that_are_not_taken(shape):
    with pytest.raises(ValueError, match=r"^currents must be \(T, B, \.\.\.\) with steps, rows and units, got \("):
        spiking.over_time(leaky(), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^membrane must be \(B, \.\.\.\) as in currents, \(16, 3\), got \(1, 3\)$"):
        spiking.over_time(leaky(), drawn(3), torch.zeros(1, 3))


class Tutorial(nn.Module):
    """The network of snnTorch's tutorial 5, with its loop or layer after layer."""

    by_layers = False

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(20, 40), leaky(), nn.Linear(40, 4), leaky()

    def forward(self, x):
        if self.by_layers:
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
    x, labels, theirs = torch.rand(T, B, 20), torch.randint(4, (B,)), Tutorial()
    ours = copy.deepcopy(theirs)
    ours.by_layers = True

    def loss(model):
        _, membranes = model(x)
        return sum(nn.functional.cross_entropy(v, labels) for v in membranes) / T

    check_training(theirs, ours, loss, 5e-3, 10)
