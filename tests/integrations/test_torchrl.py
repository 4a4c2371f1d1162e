"""TorchRL's LSTMModule and GRUModule compute the same with fastlstm."""

import copy

import pytest
import torch

from fastlstm.integrations import torchrl as integration
from tests.helpers.libraries import check, check_stays, gradients
from tests.helpers.tolerances import close

pytest.importorskip("torchrl", "0.14", "needs torchrl 0.14: pip install .[integrations]")
from tensordict import TensorDict
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

T, I, H = 9, 3, 7
KINDS = {"LSTM": (LSTMModule, ["h", "c"]), "GRU": (GRUModule, ["h"])}
kinds = pytest.mark.parametrize("kind", KINDS)
NO_SCAN = "TorchRL's backend scan needs the package hoptorch: pip install hoptorch"


def module(kind, **options):
    torch.manual_seed(0)
    cls, states = KINDS[kind]
    in_keys, out_keys = ["seen", *states], ["out", *(("next", key) for key in states)]
    return cls(input_size=I, hidden_size=H, in_keys=in_keys, out_keys=out_keys, **options)


def rollout(kind, shape, layers=1, begins=0.3, given=True, states_at_resets=False):
    """A rollout whose states are zero where episodes begin, but for first steps, as an environment gives them."""
    torch.manual_seed(1)
    is_init = torch.rand(*shape, 1) < begins
    data = TensorDict({"seen": torch.randn(*shape, I), "is_init": is_init}, shape)
    if given:
        for key in KINDS[kind][1]:
            states = torch.randn(*shape, layers, H)
            if not states_at_resets:
                states[..., 1:, :, :].masked_fill_(is_init[..., 1:, :, None], 0)
            data[key] = states
    return data


def check_rollout(theirs, data, **options):
    """All that a module writes, and the gradients of its parameters."""

    def results(module):
        written = data.clone()
        with set_recurrent_mode(True):
            module(written)
        values = [written[key] for key in module.out_keys]
        return values, gradients(values, list(module.parameters()))

    check(integration, theirs, results, **options)


@pytest.mark.parametrize("given", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("shape", [(4, T), (2, 3, T), (T,)], ids=str)
@kinds
def test_rollouts_with_resets(kind, shape, given):
    data = rollout(kind, shape, given=given)
    assert data["is_init"][..., 1:, :].any()
    check_rollout(module(kind), data, refused=[LSTMModule, GRUModule])


@pytest.mark.parametrize(
    ("of_module", "of_rollout"),
    [({}, {"begins": 0}), ({"num_layers": 2}, {"layers": 2}), ({}, {"states_at_resets": True}), ({"bias": False}, {})],
    ids=["no resets", "two layers", "states at resets", "no biases"],
)
@kinds
def test_other_rollouts(kind, of_module, of_rollout):
    check_rollout(module(kind, **of_module), rollout(kind, (4, T), **of_rollout))


@kinds
def test_the_results_are_those_of_the_backend_scan(kind):
    pytest.importorskip("hoptorch", reason=NO_SCAN)
    scan = module(kind, recurrent_backend="scan")
    check_rollout(scan, rollout(kind, (4, T)), ours=integration.accelerate(module(kind)))


@kinds
def test_an_ensemble_by_vmap(kind):
    ours, data = integration.accelerate(module(kind)), rollout(kind, (4, T))
    parameters = TensorDict.from_module(ours)
    members = [parameters.data * scale for scale in (1.0, 0.5)]

    def output(member):
        with member.to_module(ours), set_recurrent_mode(True):
            return ours(data.clone())["out"]

    expected = torch.stack([output(member) for member in members])
    close(torch.vmap(output)(torch.stack(members).contiguous()), expected, "values")


@kinds
def test_single_steps(kind):
    theirs = module(kind)
    ours, data = integration.accelerate(copy.deepcopy(theirs)), rollout(kind, (4,))
    written = []
    for each in (theirs, ours):
        step = each(data.clone())
        written.append([step[key] for key in each.out_keys])
    close(written[1], written[0], "values")


@kinds
def test_tensors_in_place_of_a_tensordict(kind):
    theirs, data = module(kind), rollout(kind, (4,))
    ours = integration.accelerate(copy.deepcopy(theirs))
    arguments = {key: data[key] for key in theirs.in_keys}
    expected = list(theirs(**arguments))
    close(list(ours(**arguments)), expected, "values")
    close(list(ours(*arguments.values())), expected, "values")
    with set_recurrent_mode(True), pytest.raises(Exception) as raised:
        theirs(data["seen"])
    with set_recurrent_mode(True), pytest.raises(raised.type):
        ours(data["seen"])


@kinds
def test_another_layer_in_an_accelerated_module(kind):
    theirs, data = module(kind), rollout(kind, (4, T))
    ours = integration.accelerate(copy.deepcopy(theirs))
    check_rollout(theirs, data, ours=ours.make_python_based())
    check_rollout(theirs, data, ours=ours.make_cudnn_based())


@kinds
def test_a_module_in_python_stays(kind):
    check_stays(integration, module(kind, python_based=True), "it has python_based=True$")


def test_a_compiled_module_is_torchrls_matter():
    pytest.importorskip("hoptorch", reason=NO_SCAN)
    theirs = module("LSTM", recurrent_backend="scan")
    ours = integration.accelerate(copy.deepcopy(theirs))
    data, expected = rollout("LSTM", (4, T)), rollout("LSTM", (4, T))
    with set_recurrent_mode(True):
        torch.compile(ours, backend="eager")(data)
        theirs(expected)
    close(data["out"], expected["out"], "values")
