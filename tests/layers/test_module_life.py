"""A module's life: copies, weights of any origin, parallel replicas, autocast, tracing."""

import io
import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastlstm
from tests.helpers import ROOT
from tests.helpers.modules import assert_same_gradients, pair, randn
from tests.helpers.tolerances import close
from tests.helpers.transforms import exporting

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


CONFIGURATIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2, "bias": False}]
each_configuration = pytest.mark.parametrize("arguments", CONFIGURATIONS)


def same_results(a, b):
    x = torch.randn(4, 3, 3, dtype=a.weight_ih_l0.dtype)
    (output, states), (other, other_states) = a(x), b(x)
    assert torch.equal(output, other)
    assert all(torch.equal(s, t) for s, t in zip(states, other_states, strict=True))


@each_configuration
def test_copies(arguments):
    lstm = fastlstm.LSTM(3, 5, backend="reference", **arguments)
    buffer = io.BytesIO()
    torch.save(lstm, buffer)
    buffer.seek(0)
    copies = [deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), torch.load(buffer, weights_only=False)]
    for copy in copies:
        assert type(copy) is fastlstm.LSTM
        assert copy.backend == "reference"
        assert all(a is not b for a, b in zip(copy.parameters(), lstm.parameters(), strict=True))
        assert all(a is b for a, b in zip(copy._flat_weights, copy.parameters(), strict=True))
        same_results(lstm, copy)
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
    assert lstm.weight_hh_l0.any()


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_a_pickle_names_no_class_but_the_modules(kind):
    module, buffer = kind(3, 5), io.BytesIO()
    with torch.no_grad():
        expected = module(torch.ones(2, 3))
        module(torch.ones(2, 3))  # finds the weights packed
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([kind]), torch.no_grad():
        assert torch.equal(torch.load(buffer, weights_only=True)(torch.ones(2, 3))[0], expected[0])


@each_configuration
def test_state_dicts_both_ways(arguments):
    theirs, ours = nn.LSTM(3, 5, **arguments), fastlstm.LSTM(3, 5, **arguments)
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = nn.LSTM(3, 5, **arguments)
    other.load_state_dict(ours.state_dict())
    with torch.device("meta"):
        empty = fastlstm.LSTM(3, 5, **arguments)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    same_results(empty, ours)


def test_share_memory_and_to():
    lstm = fastlstm.LSTM(3, 5, 2)
    lstm.share_memory()
    assert all(p.is_shared() for p in lstm.parameters())
    lstm.flatten_parameters()
    same_results(lstm, deepcopy(lstm))
    lstm.to(torch.float64)
    assert lstm(torch.zeros(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert lstm.half()(torch.zeros(4, 2, 3, dtype=torch.float16))[0].dtype == torch.float16
    assert lstm.bfloat16()(torch.zeros(4, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_weights_are_read_at_every_call():
    theirs, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    weight = nn.Parameter(torch.randn_like(ours.weight_hh_l1))
    theirs.weight_hh_l1 = ours.weight_hh_l1 = weight
    close(ours(x)[0], theirs(x)[0], "sums")
    assert ours._flat_weights[5] is weight
    del ours.weight_hh_l1  # a plain tensor in its place, as weight dropping does
    ours.weight_hh_l1 = 2 * weight
    with torch.no_grad():
        theirs.weight_hh_l1.mul_(1)
    doubled = {**dict(theirs.named_parameters()), "weight_hh_l1": 2 * weight}
    close(ours(x)[0], torch.func.functional_call(theirs, doubled, (x,))[0], "sums")
    (gradient,) = torch.autograd.grad(ours(x)[0].sum(), weight)
    assert gradient.any()


def test_functional_call():
    theirs, ours = pair(3, 5, 2, bidirectional=True)
    weights = {name: randn(*p.shape) for name, p in ours.named_parameters()}
    x = randn(4, 2, 3)
    before = ours(x)[0]
    got, expected = (torch.func.functional_call(module, weights, (x,)) for module in (ours, theirs))
    values = list(weights.values())
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        close(a, b, "sums")
    gradients = [torch.autograd.grad(result[0].cos().sum(), [x, *values]) for result in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, "gradients")
    assert torch.equal(ours(x)[0], before)


def test_ensemble_by_vmap():
    lstms = [fastlstm.LSTM(3, 5, dtype=torch.float64) for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(lstms)
    x = randn(4, 2, 3, grad=False)

    def run(weights):
        return torch.func.functional_call(lstms[0], (weights, buffers), (x,))[0]

    for got, lstm in zip(torch.vmap(run)(weights), lstms, strict=True):
        close(got, lstm(x)[0], "sums")


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_ih_l0"])
def test_parametrized(name):
    theirs, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    doubled = {**dict(theirs.named_parameters()), name: 2 * getattr(theirs, name)}
    expected = torch.func.functional_call(theirs, doubled, (x,))
    parametrize.register_parametrization(ours, name, Double())
    for module in (ours, deepcopy(ours)):
        for a, b in zip([module(x)[0], *module(x)[1]], [expected[0], *expected[1]], strict=True):
            close(a, b, "sums")
    original = ours.parametrizations[name].original
    (gradient,) = torch.autograd.grad(ours(x)[0].sum(), original)
    (reference,) = torch.autograd.grad(expected[0].sum(), getattr(theirs, name))
    close(gradient, reference, "gradients")
    with torch.no_grad():
        original.zero_()  # the next call sees it
    assert not torch.equal(ours(x)[0], expected[0])
    parametrize.remove_parametrizations(ours, name)
    assert type(ours) is fastlstm.LSTM
    assert getattr(ours, name) in set(ours.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("weight_norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm(weight_norm):
    theirs, ours = pair(3, 5)
    x = randn(4, 2, 3)
    expected = theirs(x)[0]  # the norms start as the weights' own
    weight_norm(ours, "weight_hh_l0")
    assert sum(isinstance(w, nn.Parameter) for w in ours._flat_weights) == 3  # as torch's own test counts them
    close(ours(x)[0], expected, "sums")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(x)[0].sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in ours.parameters())
    assert not torch.allclose(ours(x)[0], expected)


def test_pruned():
    """torch.nn.utils.prune replaces a weight by a plain tensor before every call."""
    modules = pair(3, 5)
    for module in modules:
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    ours, theirs = reversed(modules)
    x = randn(4, 2, 3)
    assert_same_gradients(ours, theirs, [ours(x)[0]], [theirs(x)[0]], [x])
    for module in modules:
        assert sum(isinstance(w, nn.Parameter) for w in module._flat_weights) == 3
        prune.remove(module, "weight_hh_l0")
        assert all(isinstance(w, nn.Parameter) for w in module._flat_weights)
    close(ours(x)[0], theirs(x)[0], "sums")


def test_truncated_backpropagation():
    theirs, ours = pair(3, 5, 2)
    x, gradients = randn(12, 2, 3), []
    for module in (ours, theirs):
        state = None
        for chunk in x.split(4):
            output, state = module(chunk, state)
            output.cos().sum().backward()
            state = tuple(a.detach() for a in state)
        gradients.append([p.grad for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b, "gradients")


@pytest.mark.parametrize("size", [(70_001, 1, 2), (2, 70_001, 2)])
def test_more_steps_or_rows_than_16_bits_count(size):
    theirs, ours = pair(2, 3)
    x = randn(*size)
    (output, states), (expected, ends) = ours(x), theirs(x)
    for a, b in zip([output, *states], [expected, *ends], strict=True):
        close(a, b, "sums")


@pytest.mark.parametrize("training", [True, False])
def test_frozen_weights_with_an_input_gradient(training):
    theirs, ours = (module.requires_grad_(False).train(training) for module in pair(3, 5, 2, dropout=0.0))
    x = randn(4, 2, 3)
    gradients = [torch.autograd.grad(module(x)[0].cos().sum(), x)[0] for module in (ours, theirs)]
    close(*gradients, "sums")


def test_one_trained_weight():
    theirs, ours = pair(3, 5, 2)
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == "weight_hh_l0")
    x = randn(4, 2, 3, grad=False)
    gradients = [torch.autograd.grad(m(x)[1][0].cos().sum(), m.weight_hh_l0)[0] for m in (ours, theirs)]
    close(*gradients, "sums")


def test_checkpoint():
    _, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    wanted = [x, *ours.parameters()]
    expected = torch.autograd.grad(ours(x)[0].cos().sum(), wanted)
    got = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False)[0].cos().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        close(a, b, "sums")


def test_data_parallel_replica():
    _, ours = pair(3, 5, 2)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours._parameters.items():
        setattr(replica, name, parameter * 1)  # a replica's weights are plain tensors, as nn.DataParallel makes them
    x = randn(4, 2, 3)
    close(replica(x)[0], ours(x)[0], "sums")
    (gradient,) = torch.autograd.grad(replica(x)[0].sum(), ours.weight_hh_l1)
    assert gradient.any()
    close(nn.DataParallel(ours)(x)[0], ours(x)[0], "sums")


DISTRIBUTED = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from tests.helpers.modules import pair, randn
from tests.helpers.tolerances import close

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
_, ours = pair(3, 5, 2)
x = randn(4, 2, 3)
expected = torch.autograd.grad(ours(x)[0].cos().sum(), ours.parameters())
parallel = nn.parallel.DistributedDataParallel(ours)
parallel(x)[0].cos().sum().backward()
for parameter, gradient in zip(ours.parameters(), expected, strict=True):
    close(parameter.grad, gradient, "sums")
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    """In a process that ends at once: the end of a process group may wait for threads that wait for Python."""
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.stdout.split()[-1:] == ["done"], found.stderr  # Gloo may say something first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(dtype, packed):
    """16-bit weights and inputs cost half a unit of 2**-8 or 2**-11 each; outputs are below 1."""
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 5, 2, dropout=0.0, bidirectional=True)
    x, hx = torch.randn(4, 2, 3, requires_grad=True), (torch.randn(4, 2, 5), torch.randn(4, 2, 5))
    expected, _ = lstm(x, hx)
    inputs = pack_padded_sequence(x, torch.tensor([4, 4])) if packed else x
    with torch.autocast("cpu", dtype):
        output, (h_n, _) = lstm(inputs, hx)
        mixed, _ = lstm(x.to(dtype), hx)  # a dtype that outside autocast is refused
    output = output.data.view_as(expected) if packed else output
    for got in (output, mixed):
        close(got, expected.double(), "cast")
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())
    assert h_n.dtype == output.dtype
    with pytest.raises(ValueError, match=r"(?i)input .*type"):
        lstm(x.to(dtype), hx)


def test_cell_autocast():
    cell, x = fastlstm.LSTMCell(3, 5), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = cell(x)
        h, c = cell(x.bfloat16(), (h, c.float()))
    expected = cell(x, cell(x))
    for got, reference in zip((h, c), expected, strict=True):
        close(got.bfloat16(), reference.double(), "cast")


@pytest.mark.parametrize(
    ("arguments", "size", "call"),
    [
        ({}, (4, 2, 3), {}),
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, (4, 2, 3), {}),
        ({}, (4, 3), {}),
        ({}, (4, 2, 3), {"reset": torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]) > 0, "return_cells": True}),
        ({"bidirectional": True}, (4, 2, 3), {"lengths": torch.tensor([0, 3])}),
    ],
)
def test_traced_whole(arguments, size, call):
    """dynamo takes forward and backward without a break."""
    lstm = fastlstm.LSTM(3, 5, **arguments)
    x = torch.randn(size)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    expected, got = lstm(x, **call), compiled(x, **call)
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        close(a, b, "values")
    gradients = [torch.autograd.grad(result[0].cos().sum(), lstm.weight_hh_l0)[0] for result in (got, expected)]
    close(*gradients, "sums")


def test_exported_with_a_dynamic_length():
    """One node for the layer, whatever the number of steps."""
    lstm = fastlstm.LSTM(3, 5).eval()
    with exporting():
        program = torch.export.export(lstm, (torch.randn(4, 2, 3),), dynamic_shapes=({0: torch.export.Dim("T")},))
    assert [str(node.target) for node in program.graph.nodes].count("fastlstm.forward.default") == 1
    x = torch.randn(9, 2, 3)
    with torch.no_grad():
        assert torch.equal(program.module()(x)[0], lstm(x)[0])


def test_traced_step_and_cell():
    lstm, cell = fastlstm.LSTM(3, 5), fastlstm.LSTMCell(3, 5)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, state):
        h, state = lstm.step(x, state)
        return h, state, cell(x, (state[0][0], state[1][0]))

    x, state = torch.randn(2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    h, new = lstm.step(x, state)
    got = run(x, state)
    assert torch.equal(got[0], h)
    for a, b in zip(got[2], cell(x, (new[0][0], new[1][0])), strict=True):
        assert torch.equal(a, b)


def test_base_classes():
    assert issubclass(fastlstm.LSTM, nn.RNNBase)
    assert issubclass(fastlstm.LSTMCell, nn.RNNCellBase)
    assert not issubclass(fastlstm.LSTM, nn.LSTM)  # dynamo refuses those


def test_subclass_may_wrap_the_constructor():
    class Stacked(fastlstm.LSTM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, num_layers=2, **kwargs)

        def forward(self, input, hx=None):  # noqa: A002
            return super().forward(input, hx)[0]

    assert Stacked(3, 5)(torch.zeros(4, 2, 3)).shape == (4, 2, 5)
