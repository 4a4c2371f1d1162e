"""What all integrations have in common that change the classes of a library's modules."""

import copy
import importlib.metadata
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.integrations import benchmarl, ncps, rl_games, rsl_rl, sb3, spiking, torchrecurrent, torchrl, xlstm
from tests.helpers import ROOT
from tests.helpers.libraries import library


def of_ncps():
    return library("ncps.torch", "ncps").CfC(5, 8, backbone_layers=0), (torch.randn(3, 9, 5),)


def of_torchrecurrent():
    return library("torchrecurrent").JANET(5, 8), (torch.randn(3, 9, 5),)


def of_xlstm():
    package = library("xlstm.blocks.slstm.cell", "xlstm")
    config = package.sLSTMCellConfig(hidden_size=48, num_heads=4, backend="vanilla", recurrent_weight_init="standard")
    return package.sLSTMCell(config, skip_backend_init=True), (torch.randn(3, 9, 4 * 48), None)


def of_tirex():
    package = library("tirex.models.slstm.cell", "tirex-ts")
    cell = package.sLSTMCell(package.sLSTMBlockConfig(embedding_dim=48, num_heads=4), "torch")
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.3)
    return cell, (torch.randn(3, 9, 4 * 48), None)


def of_benchmarl():
    module = library("benchmarl.models.lstm", "benchmarl", "benchmarl").LSTM(
        5, 8, device="cpu", n_layers=1, dropout=0.0, bias=True
    )
    return module, (torch.randn(3, 9, 5), torch.rand(3, 9, 1) < 0.3, torch.zeros(3, 1, 8), torch.zeros(3, 1, 8))


def of_rl_games():
    package = library("rl_games.common.layers.recurrent", "rl_games", "rl-games")
    dones = (torch.rand(9, 3, 1) < 0.3).float()
    return package.GRUWithDones(input_size=5, hidden_size=8), (torch.randn(9, 3, 5), torch.zeros(1, 3, 8), dones)


def of_rsl_rl():
    masks = torch.arange(9).unsqueeze(1) < torch.tensor([9, 4, 5])
    module = library("rsl_rl.modules", "rsl-rl-lib", "rsl-rl").RNN(5, 8, 1, "gru")
    return module, (torch.randn(9, 3, 5), masks, torch.zeros(1, 3, 8))


def of_torchrl():
    keys = {"in_keys": ["seen", "h"], "out_keys": ["out", ("next", "h")], "default_recurrent_mode": True}
    pytest.importorskip("torchrl", "0.14", "needs torchrl 0.14: pip install .[integrations]")
    module = library("torchrl.modules", "torchrl").GRUModule(5, 8, **keys)
    seen = {"seen": torch.randn(3, 9, 5), "is_init": torch.rand(3, 9, 1) < 0.3}
    return module, (library("tensordict").TensorDict(seen, (3, 9)),)


def of_sb3():
    spaces, package = library("gymnasium").spaces, library("sb3_contrib.ppo_recurrent", "sb3-contrib")
    boxes = spaces.Box(-1, 1, (5,)), spaces.Box(-1, 1, (2,))
    policy = package.MlpLstmPolicy(*boxes, float, lstm_hidden_size=8)
    states = library("sb3_contrib.common.recurrent.type_aliases", "sb3-contrib").RNNStates(
        *[[torch.zeros(1, 3, 8)] * 2] * 2
    )
    return policy, (torch.randn(27, 5), states, (torch.rand(27) < 0.3).float(), True)


def of_norse():
    return library("norse.torch", "norse").LIF(), (torch.rand(9, 3, 5),)


def of_spikingjelly():
    package = library("spikingjelly.activation_based.neuron", "spikingjelly")
    return package.LIFNode(step_mode="m"), (torch.rand(9, 3, 5),)


CASES = {
    "ncps": (ncps, of_ncps),
    "norse": (spiking, of_norse),
    "spikingjelly": (spiking, of_spikingjelly),
    "xlstm": (xlstm, of_xlstm),
    "tirex-ts": (xlstm, of_tirex),
    "torchrecurrent": (torchrecurrent, of_torchrecurrent),
    "benchmarl": (benchmarl, of_benchmarl),
    "rl_games": (rl_games, of_rl_games),
    "rsl-rl-lib": (rsl_rl, of_rsl_rl),
    "sb3-contrib": (sb3, of_sb3),
    "torchrl": (torchrl, of_torchrl),
}
cases = pytest.mark.parametrize("package", CASES)


def accelerated(package):
    integration, make = CASES[package]
    torch.manual_seed(0)
    module, x = make()
    return integration.accelerate(module), x


def output(module, x):
    if hasattr(module, "reset"):  # spikingjelly's neurons go on where the last call ended
        module.reset()
    with torch.no_grad():  # sb3-contrib cannot copy a policy that holds a graph
        y = module(*x)
    return y if isinstance(y, torch.Tensor) else y["out"] if hasattr(y, "keys") else y[0]


def replica(module):
    """What DataParallel makes of a module for another device: its parameters are tensors."""
    copies = {each: each._replicate_for_data_parallel() for each in module.modules()}
    for each, of in copies.items():
        for name, child in each._modules.items():
            setattr(of, name, copies[child])
        for name, parameter in each.named_parameters(recurse=False):
            setattr(of, name, parameter.clone())
    return copies[module]


COPIES = {
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "replica": replica,
}


PICKLED = [
    package for package in CASES if package not in ("norse", "xlstm")
]  # those cannot be, with or without fastlstm
WAYS = [(package, way) for package in CASES for way in COPIES if way != "pickled" or package in PICKLED]


@pytest.mark.parametrize(("package", "way"), WAYS)
def test_a_copy(package, way):
    module, x = accelerated(package)
    expected = output(module, x)
    other = COPIES[way](module)
    assert type(other) is type(module)
    assert torch.equal(output(other, x), expected)
    if way in ("deep", "pickled") and list(other.parameters()):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(output(other, x), expected)
    elif package in ("xlstm", "tirex-ts"):  # whose cells have the weights themselves
        own = dict(module.named_parameters(recurse=False))
        other._parameters = dict(other._parameters)  # a shallow copy shares them until it has a dict of its own
        for name, parameter in own.items():
            setattr(other, name, type(getattr(other, name))(torch.zeros_like(parameter)))
        assert not torch.equal(output(other, x), expected)
    assert torch.equal(output(module, x), expected)


@pytest.mark.parametrize("package", PICKLED)
def test_a_pickle_loads_in_a_new_process(package, tmp_path):
    module, x = accelerated(package)
    torch.save((module, x, output(module, x)), tmp_path / "module.pt")
    load = "import sys, torch; module, x, y = torch.load(sys.argv[1], weights_only=False)"
    code = f"{load}; from tests.integrations.test_places import output; assert torch.equal(output(module, x), y)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "module.pt")], check=True, timeout=300, cwd=ROOT)


@cases
def test_restored(package):
    integration, make = CASES[package]
    module, x = make()
    theirs, model = type(module), nn.Sequential(module, nn.Identity())
    expected, weights = output(module, x), list(module.parameters())
    assert integration.accelerate(model) is model
    assert integration.accelerate(model) is model
    assert type(module) is not theirs
    assert isinstance(module, theirs)
    assert type(module).__name__ == theirs.__name__
    assert integration.restore(model) is model
    assert type(module) is theirs
    assert torch.equal(output(module, x), expected)
    assert all(a is b for a, b in zip(module.parameters(), weights, strict=True))


@cases
def test_under_a_compiler(package):
    module, x = accelerated(package)
    torch.testing.assert_close(output(torch.compile(module, backend="eager"), x), output(module, x))


@pytest.mark.parametrize("package", [package for package in CASES if package != "sb3-contrib"])
def test_a_derived_class_stays(package):
    """Its own methods may compute something else."""
    integration, make = CASES[package]
    module, _ = make()
    module.__class__ = derived = type("Derived", (type(module),), {})
    with pytest.warns(UserWarning, match=r"^Derived stays as it is: it is of a derived class$"):
        integration.accelerate(module)
    assert type(module) is derived


@cases
def test_a_release_that_is_too_old(package, monkeypatch):
    integration, make = CASES[package]
    module, _ = make()
    theirs = type(module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    with pytest.raises(ImportError, match=rf"^fastlstm.integrations needs {package} [\d.]+ or newer, got 0.0.9$"):
        integration.accelerate(module)
    assert type(module) is theirs


@pytest.mark.parametrize("model", [nn.Sequential(fastlstm.LSTM(3, 4)), "model"])
@cases
def test_a_model_without_such_modules(package, model):
    wanted = rf"^model must have modules of \w+.*, got {type(model).__name__} without any$"
    with pytest.raises(TypeError, match=wanted):
        CASES[package][0].accelerate(model)
    with pytest.raises(TypeError, match=wanted):
        CASES[package][0].restore(model)
