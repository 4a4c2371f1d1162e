"""A module's life: copies, weights of any origin, parallel replicas, autocast, tracing."""

import io
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import cells
from tests.helpers.modules import OURS, Double, assert_same_gradients, copies_of, flat, pair, randn
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each_layer = pytest.mark.parametrize("torch_s", [nn.LSTM, nn.GRU, nn.RNN])
STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"backend": "numba"}) for kind in OURS.values()),
        (fastlstm.LSTM, {"backend": "numba", **STACKED}),
        (fastlstm.LSTM, {"backend": "reference", "proj_size": 2, "bias": False}),
    ],
)
def test_copies(kind, options):
    """Of a module that keeps packed weights. A pickle names no class but the module's."""
    module, file, x = kind(3, 5, **options), io.BytesIO(), torch.randn(4, 3)
    with torch.no_grad():
        expected = module(x), module(x)
    torch.save(module, file)
    file.seek(0)
    with torch.serialization.safe_globals([kind]):
        copies = [*copies_of(module), torch.load(file)]
    for copy in copies:
        assert type(copy) is kind
        assert copy.backend == options["backend"]
        assert all(a is not b for a, b in zip(copy.parameters(), module.parameters(), strict=True))
        if isinstance(copy, nn.RNNBase):
            assert all(a is b for a, b in zip(copy._flat_weights, copy.parameters(), strict=True))
        close(flat(copy(x)), flat(expected[1]), "values")
    with torch.no_grad():
        next(copies[0].parameters()).zero_()
    assert next(module.parameters()).any()


@pytest.mark.parametrize("arguments", [{}, STACKED, {"proj_size": 2, "bias": False}])
def test_a_state_that_is_assigned(arguments):
    theirs = nn.LSTM(3, 5, **arguments)
    with torch.device("meta"):
        ours = fastlstm.LSTM(3, 5, **arguments)
    assert all(a.is_meta for a in ours.parameters())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(4, 3, 3)
    close(flat(ours(x)), flat(theirs(x)), "values")


def test_share_memory_and_to():
    lstm, x = fastlstm.LSTM(3, 5, 2), torch.randn(4, 2, 3)
    parameters = list(lstm.parameters())
    lstm.share_memory()
    assert all(p.is_shared() for p in lstm.parameters())
    lstm.flatten_parameters()
    assert all(map(torch.equal, flat(lstm(x)), flat(deepcopy(lstm)(x))))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert lstm.to(dtype)(x.to(dtype))[0].dtype == dtype
    assert all(a is b for a, b in zip(lstm.parameters(), parameters, strict=True))


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


@each_layer
def test_functional_call(torch_s):
    theirs, ours = pair(3, 5, 2, bidirectional=True, like=torch_s)
    weights, x = {name: randn(*p.shape) for name, p in ours.named_parameters()}, randn(4, 2, 3)
    before = ours(x)[0]
    results = [torch.func.functional_call(module, weights, (x,)) for module in (ours, theirs)]
    close(*map(flat, results), "sums")
    close(*(torch.autograd.grad(a.cos().sum(), [x, *weights.values()]) for a, _ in results), "gradients")
    assert torch.equal(ours(x)[0], before)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_ih_l0"])
def test_parametrized(name):
    theirs, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    doubled = {**dict(theirs.named_parameters()), name: 2 * getattr(theirs, name)}
    expected = torch.func.functional_call(theirs, doubled, (x,))
    parametrize.register_parametrization(ours, name, Double())
    for module in (ours, deepcopy(ours)):
        close([module(x)[0], *module(x)[1]], [expected[0], *expected[1]], "sums")
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
@each_layer
def test_weight_norm(torch_s, weight_norm):
    theirs, ours = pair(3, 5, like=torch_s)
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


@each_layer
def test_pruned(torch_s):
    """torch.nn.utils.prune replaces a weight by a plain tensor before every call."""
    theirs, ours = pair(3, 5, 2, like=torch_s)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l1", amount=0.5)
    x = randn(4, 2, 3)
    assert_same_gradients(ours, theirs, [ours(x)[0]], [theirs(x)[0]], [x])
    for module in (theirs, ours):
        assert sum(isinstance(w, nn.Parameter) for w in module._flat_weights) == 7
        prune.remove(module, "weight_hh_l1")
        assert all(isinstance(w, nn.Parameter) for w in module._flat_weights)
    close(ours(x)[0], theirs(x)[0], "sums")


@pytest.mark.parametrize("size", [(70_001, 1, 2), (2, 70_001, 2)])
def test_more_steps_or_rows_than_16_bits_count(size):
    theirs, ours = pair(2, 3)
    x = randn(*size)
    (output, states), (expected, ends) = ours(x), theirs(x)
    close([output, *states], [expected, *ends], "sums")


@each_layer
def test_data_parallel_replica(torch_s):
    _, ours = pair(3, 5, 2, like=torch_s)
    replica, x = ours._replicate_for_data_parallel(), randn(4, 2, 3)
    for name, parameter in ours._parameters.items():
        setattr(replica, name, parameter * 1)  # a replica's weights are plain tensors, as nn.DataParallel makes them
    close(replica(x)[0], ours(x)[0], "sums")
    (gradient,) = torch.autograd.grad(replica(x)[0].sum(), ours.weight_hh_l1)
    assert gradient.any()
    close(nn.DataParallel(ours)(x)[0], ours(x)[0], "sums")


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(torch_s, dtype):
    """Gradients stay in float32. Types and values under autocast are in test_autocast."""
    torch.manual_seed(0)
    ours, x = OURS[torch_s](3, 5, 2, bidirectional=True), torch.randn(4, 2, 3, requires_grad=True)
    expected, _ = ours(x)
    with torch.autocast("cpu", dtype):
        output = ours(x)[0]
        packed, mixed = (
            ours(pack_padded_sequence(x, torch.tensor([4, 4])))[0].data.view_as(output),
            ours(x.to(dtype))[0],
        )
    for got in (output, packed, mixed):
        close(got, expected.double(), "cast")
    output.float().sum().backward()
    assert {a.grad.dtype for a in (x, *ours.parameters())} == {torch.float32}
    close(ours.to(dtype)(x.to(dtype))[0], expected.double(), "cast")


RESET = {"reset": torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]) > 0}
LENGTHS = {"lengths": torch.tensor([0, 3])}
TRACED = {
    "lstm": (fastlstm.LSTM(3, 5), {}),
    "stacked": (fastlstm.LSTM(3, 5, **STACKED), {}),
    "lstm, all states": (fastlstm.LSTM(3, 5), {**RESET, "return_cells": True}),
    "lstm, lengths": (fastlstm.LSTM(3, 5, bidirectional=True), LENGTHS),
    "projection": (fastlstm.LSTM(3, 5, proj_size=2), RESET),
    "gru": (fastlstm.GRU(3, 5), RESET),
    "elman": (fastlstm.Elman(3, 5, **STACKED), {}),
    "slstm": (fastlstm.RNN(cells.slstm, 3, 5), {"return_states": True}),
    "indrnn": (fastlstm.RNN(cells.ind_rnn, 3, 5, 2), LENGTHS),
    "zoneout": (fastlstm.GRU(3, 5, zoneout=0.2).eval(), {}),
    "both": (fastlstm.LSTM(3, 5, zoneout=0.2, recurrent_dropout=0.1).eval(), {"return_cells": True}),
    "dropped": (fastlstm.GRU(3, 5, recurrent_dropout=1.0), LENGTHS),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "size"), [*((name, (4, 2, 3)) for name in TRACED), ("lstm", (4, 3))])
def test_traced_whole(name, size):
    """dynamo takes forward and backward without a break."""
    module, call = TRACED[name]
    x = torch.randn(size).transpose(0, -2) if module.batch_first else torch.randn(size)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, got = module(x, **call), compiled(x, **call)
    close(got, expected, "values")
    weights = list(module.parameters())
    close(*(torch.autograd.grad(result[0].cos().sum(), weights) for result in (got, expected)), "sums")


@pytest.mark.parametrize(("torch_s", "cell"), [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_traced_steps_and_cells(torch_s, cell):
    layer, cell = OURS[torch_s](3, 5), OURS[cell](3, 5)

    def run(x, state):
        h, state = layer.step(x, state)
        return h, state, cell(x, tuple(a[0] for a in state) if torch_s is nn.LSTM else state[0])

    x, (h, c) = torch.randn(2, 3), torch.randn(2, 1, 2, 5)
    state = (h, c) if torch_s is nn.LSTM else h
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with fastlstm.batch_invariant():  # else an eager step of a cell may take torch's operator, with other bits
        assert all(map(torch.equal, flat(compiled(x, state)), flat(run(x, state))))
