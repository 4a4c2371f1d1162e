"""`torch.nn.LSTM`, `torch.nn.LSTMCell` and ours built by the same calls, good and bad; attributes and methods."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.contract import assert_same, bad_sizes, outcome, sizes
from tests.helpers.modules import pair, torch_s_repr

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


constructor = st.fixed_dictionaries(
    {"input_size": sizes, "hidden_size": sizes},
    optional={
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0, 0.25, 1]),
        "bidirectional": st.booleans(),
        "proj_size": st.integers(0, 2),
        "dtype": st.sampled_from([None, torch.float64, torch.bfloat16]),
        "device": st.sampled_from([None, "cpu", "meta"]),
    },
)
faults = st.dictionaries(
    st.sampled_from(
        ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "proj_size", "dtype"]
    ),
    st.sampled_from([0, -1, 1, 2, 2.5, "x", None, True, float("nan"), 1j, torch.long, []]),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(constructor, faults, st.integers(0, 2**31))
def test_construction(arguments, faults, seed):
    arguments = {**arguments, **faults}

    def build(cls):
        torch.manual_seed(seed)
        return cls(**arguments)

    theirs, ours = outcome(partial(build, nn.LSTM)), outcome(partial(build, fastlstm.LSTM))
    assert theirs[1] == ours[1]
    (theirs, _), (ours, _) = theirs, ours
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    assert not isinstance(ours, Exception), repr(ours)
    assert_same_module(theirs, ours)


def assert_same_module(theirs, ours, same_seed=True):
    assert torch_s_repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        other = getattr(ours, name)
        assert type(other) is nn.Parameter
        assert (other.dtype, other.device, other.shape) == (parameter.dtype, parameter.device, parameter.shape)
        assert parameter.device.type == "meta" or not same_seed or torch.equal(other, parameter)
    for name in (*type(theirs).__constants__, "_flat_weights_names", "training"):
        assert repr(getattr(ours, name)) == repr(getattr(theirs, name))  # which may be NaN, in torch up to 2.10
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    assert type(ours).__constants__ == type(theirs).__constants__
    layers = zip(theirs.all_weights, ours.all_weights, strict=True)
    assert all(len(a) == len(b) for a, b in layers)
    assert all(a is getattr(ours, name) for a, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    assert [ref() is a for ref, a in zip(ours._flat_weight_refs, ours._flat_weights, strict=True)] == [True] * len(
        theirs._flat_weight_refs
    )


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {"input_size": sizes | bad_sizes, "hidden_size": sizes | bad_sizes},
        optional={"bias": st.sampled_from([True, False, 0, "x"]), "dtype": st.sampled_from([None, torch.float64, 3])},
    ),
    st.integers(0, 2**31),
)
def test_cell_construction(arguments, seed):
    def build(cls):
        torch.manual_seed(seed)
        return cls(**arguments)

    (theirs, _), (ours, _) = outcome(partial(build, nn.LSTMCell)), outcome(partial(build, fastlstm.LSTMCell))
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    assert torch_s_repr(ours) == repr(theirs)
    assert list(ours._parameters) == list(theirs._parameters)
    for name, parameter in theirs._parameters.items():
        other = ours._parameters[name]
        assert (parameter is None and other is None) or torch.equal(other, parameter)


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
        {"dropout": -0.1},
        {"dropout": True},
        {"proj_size": -1},
        {"proj_size": 4},
    ],
)
def test_errors_of_construction(arguments):
    given = {"input_size": 3, "hidden_size": 4, **arguments}
    theirs, ours = (outcome(partial(cls, **given)) for cls in (nn.LSTM, fastlstm.LSTM))
    assert (repr(ours[0]), ours[1]) == (repr(theirs[0]), theirs[1])
    if not torch.__version__.startswith(("2.9.", "2.10.")):  # which take some of these
        assert isinstance(ours[0], TypeError | ValueError)


@pytest.mark.parametrize("cls", [nn.LSTM, fastlstm.LSTM])
def test_dropout_of_one_layer_warns(cls):
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        cls(3, 4, dropout=0.5)


def test_a_cell_without_biases_registers_none():
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        assert cls(3, 4, bias=False)._parameters.keys() == {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
        assert cls(3, 4, bias=False).bias_ih is None


def test_positional_order():
    arguments = (3, 4, 2, False, True, 0.5, True, 2, "meta", torch.float64)
    assert_same_module(nn.LSTM(*arguments), fastlstm.LSTM(*arguments))
    cell = fastlstm.LSTMCell(3, 4, False, "meta", torch.float64)
    assert torch_s_repr(cell) == repr(nn.LSTMCell(3, 4, False, "meta", torch.float64))
    assert cell.weight_ih.device.type == "meta"
    assert cell.weight_ih.dtype == torch.float64


@pytest.mark.parametrize("arguments", [(), (3,), (3, 4, 1, True, False, 0.0, False, 0, None, None, None)])
def test_wrong_number_of_arguments(arguments):
    theirs, ours = outcome(lambda: nn.LSTM(*arguments)), outcome(lambda: fastlstm.LSTM(*arguments))
    assert type(ours[0]) is type(theirs[0]) is TypeError  # the words differ: ours name the class that was called


def test_unknown_argument():
    with pytest.raises(TypeError, match=r"LSTM.__init__\(\) got an unexpected keyword argument 'foo'"):
        fastlstm.LSTM(3, 4, foo=1)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_methods(batch_first, proj_size):
    arguments = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "proj_size": proj_size}
    theirs, ours = pair(input_size=3, hidden_size=4, **arguments)
    x, batch_sizes, order = torch.zeros(5, 2, 3, dtype=torch.float64), torch.tensor([2, 1]), torch.tensor([1, 0])
    B = 5 if batch_first else 2
    good = [torch.randn(4, B, n, dtype=torch.float64) for n in (proj_size or 4, 4)]
    bad = [good[0], good[1][..., :3]]
    for call in (
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_cell_size(x, None),
        lambda m: m.get_expected_hidden_size(x[0], batch_sizes),
        lambda m: m.get_expected_cell_size(x[0], batch_sizes),
        lambda m: m.check_input(x, None),
        lambda m: m.check_input(x, batch_sizes),
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_input(x.float(), None),
        lambda m: m.check_hidden_size(good[1], (4, B, 4)),
        lambda m: m.check_hidden_size(good[1], (4, B, 5)),
        lambda m: m.check_forward_args(x, good, None),
        lambda m: m.check_forward_args(x, bad, None),
        lambda m: m.permute_hidden(tuple(good), None),
        lambda m: m.permute_hidden(tuple(a[:, :2] for a in good), order),
        lambda m: m.flatten_parameters(),
        lambda m: [(torch.manual_seed(5), m.reset_parameters(), list(m.parameters()))[2]],
    ):
        (expected, _), (got, _) = outcome(partial(call, theirs)), outcome(partial(call, ours))
        if isinstance(expected, Exception):
            assert (type(got), str(got)) == (type(expected), str(expected))
        elif isinstance(expected, tuple | list) and not isinstance(expected[0], int):
            for a, b in zip(expected, got, strict=True):
                assert_same(a, b)
        else:
            assert got == expected
