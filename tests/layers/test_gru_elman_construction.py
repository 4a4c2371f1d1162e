"""`torch.nn.GRU`, `torch.nn.RNN`, their cells and ours built by the same calls, good and bad; their attributes."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.contract import assert_same, bad_sizes, outcome, sizes
from tests.helpers.layers import TORCH
from tests.helpers.modules import OURS, pair, torch_s_repr
from tests.layers.test_contract_construction import assert_same_module, constructor, faults

layers = st.sampled_from([nn.GRU, nn.RNN])
each_layer = pytest.mark.parametrize("torch_s", [nn.GRU, nn.RNN])
each_cell = pytest.mark.parametrize("torch_s", [nn.GRUCell, nn.RNNCell])
nonlinearities = st.sampled_from(["tanh", "relu", "relu", "sigmoid", None])


def build(cls, seed, arguments):
    torch.manual_seed(seed)
    return cls(**arguments)


def assert_same_construction(torch_s, seed, arguments):
    """The same exception, or return both modules."""
    theirs, ours = (outcome(partial(build, cls, seed, arguments)) for cls in (torch_s, OURS[torch_s]))
    assert theirs[1] == ours[1]
    (theirs, _), (ours, _) = theirs, ours
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return None
    assert not isinstance(ours, Exception), repr(ours)
    return theirs, ours


@settings(max_examples=100, deadline=None)
@given(layers, constructor, faults, nonlinearities, st.integers(0, 2**31))
def test_construction(torch_s, arguments, faults, nonlinearity, seed):
    arguments = {**arguments, **faults}
    if arguments.get("proj_size", 0) is None or not arguments.get("proj_size", 0):
        arguments.pop("proj_size", None)  # where torch raises for None and for 0, ours takes None
    if torch_s is nn.RNN:
        arguments["nonlinearity"] = nonlinearity
    built = assert_same_construction(torch_s, seed, arguments)
    if built is not None:
        assert_same_module(*built)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([nn.GRUCell, nn.RNNCell]),
    st.fixed_dictionaries(
        {"input_size": sizes | bad_sizes, "hidden_size": sizes | bad_sizes},
        optional={"bias": st.sampled_from([True, False, 0, "x"]), "dtype": st.sampled_from([None, torch.float64, 3])},
    ),
    nonlinearities,
    st.integers(0, 2**31),
)
def test_cell_construction(torch_s, arguments, nonlinearity, seed):
    if torch_s is nn.RNNCell:
        arguments = {**arguments, "nonlinearity": nonlinearity}
    built = assert_same_construction(torch_s, seed, arguments)
    if built is not None:
        theirs, ours = built
        assert torch_s_repr(ours) == repr(theirs)
        assert list(ours._parameters) == list(theirs._parameters)
        assert ours.__constants__ == theirs.__constants__
        for name, parameter in theirs._parameters.items():
            other = ours._parameters[name]
            assert (parameter is None and other is None) or torch.equal(other, parameter)


@each_layer
@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 3.0},
        {"hidden_size": "4"},
        {"bias": 1},
        {"batch_first": None},
        {"input_size": 0},
        {"hidden_size": -1},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"dropout": True},
        {"proj_size": 2},
    ],
)
def test_errors_of_construction(torch_s, arguments):
    made = assert_same_construction(torch_s, 0, {"input_size": 3, "hidden_size": 4, **arguments})
    assert made is None or TORCH < (2, 13)  # older versions of torch check less


@pytest.mark.parametrize("nonlinearity", ["sigmoid", None, "RELU"])
def test_unknown_nonlinearities(nonlinearity):
    with pytest.raises(ValueError, match=f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."):
        fastlstm.Elman(3, 4, nonlinearity=nonlinearity)
    cell = fastlstm.ElmanCell(3, 4, nonlinearity=nonlinearity)  # torch's cell raises in forward, too
    with pytest.raises(RuntimeError, match=f"Unknown nonlinearity: {nonlinearity}"):
        cell(torch.zeros(2, 3))


@each_layer
def test_dropout_of_one_layer_warns(torch_s):
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        OURS[torch_s](3, 4, dropout=0.5)


def test_positional_order():
    options = False, True, 0.5, True
    assert_same_module(
        nn.GRU(3, 4, 2, *options), fastlstm.GRU(3, 4, 2, *options, "cpu", torch.float32), same_seed=False
    )
    ours = fastlstm.Elman(3, 4, 2, "relu", *options, "cpu", torch.float32)
    assert_same_module(nn.RNN(3, 4, 2, "relu", *options), ours, same_seed=False)
    cell = fastlstm.ElmanCell(3, 4, False, "relu", "meta", torch.float64)
    assert torch_s_repr(cell) == repr(nn.RNNCell(3, 4, False, "relu", "meta", torch.float64))
    assert (cell.weight_ih.device.type, cell.weight_ih.dtype) == ("meta", torch.float64)
    assert torch_s_repr(fastlstm.GRUCell(3, 4, False, "meta")) == repr(nn.GRUCell(3, 4, False, "meta"))


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_methods(torch_s, batch_first):
    theirs, ours = pair(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first, like=torch_s)
    x, batch_sizes, order = torch.zeros(5, 2, 3, dtype=torch.float64), torch.tensor([2, 1]), torch.tensor([1, 0])
    hidden = torch.randn(4, 5 if batch_first else 2, 4, dtype=torch.float64)
    for call in (
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_hidden_size(x[0], batch_sizes),
        lambda m: m.check_input(x, None),
        lambda m: m.check_input(x, batch_sizes),
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_hidden_size(hidden, (4, 1, 5)),
        lambda m: m.check_forward_args(x, hidden, None),
        lambda m: m.check_forward_args(x, hidden[..., :3], None),
        lambda m: [m.permute_hidden(hidden, None)],
        lambda m: [m.permute_hidden(hidden[:, :2], order)],
        lambda m: m.flatten_parameters(),
        lambda m: [(torch.manual_seed(5), m.reset_parameters(), list(m.parameters()))[2]],
    ):
        (expected, _), (got, _) = outcome(partial(call, theirs)), outcome(partial(call, ours))
        if isinstance(expected, Exception):
            assert (type(got), str(got)) == (type(expected), str(expected))
        elif isinstance(expected, list):
            for a, b in zip(expected, got, strict=True):
                assert_same(a, b)
        else:
            assert got == expected


@each_cell
def test_base_classes(torch_s):
    ours = OURS[torch_s]
    assert issubclass(ours, nn.RNNCellBase)
    assert not issubclass(ours, torch_s)
    assert issubclass(fastlstm.GRU, nn.RNNBase)
    assert not issubclass(fastlstm.GRU, nn.GRU)  # dynamo refuses those


@pytest.mark.parametrize("make", [fastlstm.GRU, fastlstm.Elman, fastlstm.GRUCell, fastlstm.ElmanCell])
def test_backend_of_the_module(make):
    assert "backend=reference" in repr(make(3, 5, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of"):
        make(3, 5, backend="cudnn")
