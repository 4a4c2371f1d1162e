"""The life of modules other than the LSTM: copies, weights of any origin, autocast, transforms, tracing."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastlstm
from fastlstm import cells
from tests.helpers.modules import OURS, assert_same_gradients, pair, randn
from tests.helpers.tolerances import close

each_layer = pytest.mark.parametrize("torch_s", [nn.GRU, nn.RNN])


@pytest.mark.parametrize("kind", [fastlstm.GRU, fastlstm.Elman, fastlstm.GRUCell, fastlstm.ElmanCell])
def test_copies(kind):
    module, buffer, x = kind(3, 5), io.BytesIO(), torch.randn(4, 3)
    with torch.no_grad():
        expected = module(x)
        module(x)  # may find the weights packed
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([kind]):
        loaded = torch.load(buffer, weights_only=True)
    for other in (loaded, copy.deepcopy(module)):
        assert type(other) is kind
        close(other(x), expected, "sums")


@each_layer
def test_weights_of_any_origin(torch_s):
    theirs, ours = pair(3, 5, 2, like=torch_s)
    x = randn(4, 2, 3)
    values = {name: randn(*p.shape) for name, p in ours.named_parameters()}
    got, expected = (torch.func.functional_call(module, values, (x,)) for module in (ours, theirs))
    close(got, expected, "sums")
    for module in (ours, theirs):
        prune.l1_unstructured(module, "weight_hh_l1", amount=0.5)
    assert_same_gradients(ours, theirs, [ours(x)[0]], [theirs(x)[0]], [x])
    _, other = pair(3, 5, like=torch_s)
    before = other(x)
    parametrizations.weight_norm(other, "weight_hh_l0")  # the norms start as the weights' own
    close(other(x), before, "sums")
    _, other = pair(3, 5, like=torch_s)
    replica = other._replicate_for_data_parallel()
    for name, parameter in other._parameters.items():
        setattr(replica, name, parameter * 1)  # a replica's weights are plain tensors, as nn.DataParallel makes them
    close(replica(x), other(x), "sums")


@each_layer
def test_frozen_weights_checkpoints_and_truncated_backpropagation(torch_s):
    theirs, ours = pair(3, 5, 2, like=torch_s)
    x = randn(8, 2, 3)
    expected = torch.autograd.grad(theirs(x)[0].cos().sum(), [x, *theirs.parameters()])
    got = checkpoint(ours, x, use_reentrant=False)[0].cos().sum()
    close(torch.autograd.grad(got, [x, *ours.parameters()]), expected, "gradients")
    gradients = []
    for module in (ours, theirs):
        state = None
        for chunk in x.split(4):
            output, state = module(chunk, state)
            output.cos().sum().backward()
            state = state.detach()
        gradients.append([p.grad for p in module.parameters()])
    close(*gradients, "gradients")
    frozen = [module.requires_grad_(False).eval() for module in (ours, theirs)]
    close(*[torch.autograd.grad(module(x)[0].cos().sum(), x)[0] for module in frozen], "sums")


@pytest.mark.parametrize("make", [fastlstm.GRU, fastlstm.Elman, lambda *a, **k: fastlstm.RNN(cells.cifg, *a, **k)])
def test_vmap(make):
    modules = [make(3, 5, dtype=torch.float64) for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(modules)
    x = randn(4, 2, 3, grad=False)

    def run(weights):
        return torch.func.functional_call(modules[0], (weights, buffers), (x,))[0]

    for got, module in zip(torch.vmap(run)(weights), modules, strict=True):
        close(got, module(x)[0], "sums")


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(torch_s, dtype):
    torch.manual_seed(0)
    ours = OURS[torch_s](3, 5, 2, bidirectional=True)
    x, hx = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, 5)
    expected, _ = ours(x, hx)
    for inputs in (x, x.to(dtype), pack_padded_sequence(x, torch.tensor([4, 4]))):
        with torch.autocast("cpu", dtype):
            output = ours(inputs, hx)[0]
        output = output if isinstance(output, torch.Tensor) else output.data.view_as(expected)
        close(output, expected.double(), "cast")
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    close(ours.to(dtype)(x.to(dtype), hx.to(dtype))[0], expected.double(), "cast")


def test_autocast_of_regularizers_and_cells():
    torch.manual_seed(0)
    gru, x = fastlstm.GRU(3, 5, recurrent_dropout=0.5, zoneout=0.3), torch.randn(4, 2, 3)
    results = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(gru(x, torch.ones(1, 2, 5))[0])
    assert results[0].dtype == torch.bfloat16
    close(results[0], results[1].double(), "cast")
    cell = fastlstm.GRUCell(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        h = cell(x[0].bfloat16(), cell(x[0]))
    assert h.dtype == torch.float32  # as torch's cells on a CPU
    close(h.bfloat16(), cell(x[0], cell(x[0])).double(), "cast")


def traced():
    """Modules, and what else they are called with."""
    reset = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]) > 0
    yield "gru", fastlstm.GRU(3, 5), {"reset": reset}
    yield "elman", fastlstm.Elman(3, 5, 2, bidirectional=True, batch_first=True), {}
    yield "slstm", fastlstm.RNN(cells.slstm, 3, 5), {"return_states": True}
    yield "indrnn", fastlstm.RNN(cells.ind_rnn, 3, 5, 2), {"lengths": torch.tensor([0, 3])}
    yield "zoneout", fastlstm.GRU(3, 5, zoneout=0.2).eval(), {}
    yield "both", fastlstm.LSTM(3, 5, zoneout=0.2, recurrent_dropout=0.1).eval(), {"return_cells": True}
    yield "dropped", fastlstm.GRU(3, 5, recurrent_dropout=1.0), {"lengths": torch.tensor([0, 3])}


@pytest.mark.parametrize(("module", "call"), [pytest.param(m, call, id=name) for name, m, call in traced()])
def test_traced_whole(module, call):
    """dynamo takes forward and backward without a break."""
    x = torch.randn(2, 4, 3) if module.batch_first else torch.randn(4, 2, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, got = module(x, **call), compiled(x, **call)
    close(got, expected, "values")
    weights = list(module.parameters())
    gradients = [torch.autograd.grad(result[0].cos().sum(), weights) for result in (got, expected)]
    close(*gradients, "sums")


def test_traced_steps_and_cells():
    gru, cell, elman = fastlstm.GRU(3, 5), fastlstm.GRUCell(3, 5), fastlstm.ElmanCell(3, 5, nonlinearity="relu")

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, state):
        h, state = gru.step(x, state)
        return h, state, cell(x, state[0]), elman(x)

    x, state = torch.randn(2, 3), torch.randn(1, 2, 5)
    h, new = gru.step(x, state)
    close(run(x, state), (h, new, cell(x, new[0]), elman(x)), "values")
