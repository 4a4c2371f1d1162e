"""torch's layers and cells and ours built by the same calls, good and bad; attributes and methods."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.contract import CELLS, LAYERS, assert_same, outcome, sizes
from tests.helpers.modules import OURS, pair, torch_s_repr

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each_layer = pytest.mark.parametrize("torch_s", [nn.LSTM, nn.GRU, nn.RNN])
nonlinearities = st.sampled_from(["tanh", "relu", "relu", "sigmoid", None])

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


def assert_same_construction(torch_s, seed, arguments):
    """The same exception, or return both modules."""

    def build(cls):
        torch.manual_seed(seed)
        return cls(**arguments)

    theirs, ours = (outcome(partial(build, cls)) for cls in (torch_s, OURS[torch_s]))
    assert theirs[1] == ours[1]
    (theirs, _), (ours, _) = theirs, ours
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return None
    assert not isinstance(ours, Exception), repr(ours)
    return theirs, ours


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([nn.LSTM, nn.LSTM, nn.LSTM, nn.GRU, nn.RNN]), constructor, faults, nonlinearities,
    st.integers(0, 2**31),
)  # fmt: skip
def test_construction(torch_s, arguments, faults, nonlinearity, seed):
    arguments = {**arguments, **faults}
    if torch_s is not nn.LSTM and not arguments.get("proj_size"):
        arguments.pop("proj_size", None)  # where torch raises for None and for 0, ours takes None
    if torch_s is nn.RNN:
        arguments["nonlinearity"] = nonlinearity
    built = assert_same_construction(torch_s, seed, arguments)
    if built is not None:
        assert_same_module(*built)


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


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([nn.LSTMCell, nn.LSTMCell, nn.GRUCell, nn.RNNCell]),
    st.fixed_dictionaries(
        dict.fromkeys(("input_size", "hidden_size"), sizes | st.sampled_from([0, -1, 2.0, "a", None])),
        optional={
            "bias": st.sampled_from([True, False, 0, "x"]),
            "dtype": st.sampled_from([None, torch.float64, 3]),
            "device": st.sampled_from([None, "meta"]),
        },
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
            if parameter is None or parameter.is_meta:
                assert repr(other) == repr(parameter)
            else:
                assert torch.equal(other, parameter)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", None, "RELU"])
def test_unknown_nonlinearities(nonlinearity):
    with pytest.raises(ValueError, match=f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."):
        fastlstm.Elman(3, 4, nonlinearity=nonlinearity)
    cell = fastlstm.ElmanCell(3, 4, nonlinearity=nonlinearity)  # torch's cell raises in forward, too
    with pytest.raises(RuntimeError, match=f"Unknown nonlinearity: {nonlinearity}"):
        cell(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("torch_s", "arguments"),
    [
        (nn.LSTM, (3, 4, 2, False, True, 0.5, True, 2, "meta", torch.float64)),
        (nn.GRU, (3, 4, 2, False, True, 0.5, True)),
        (nn.RNN, (3, 4, 2, "relu", False, True, 0.5, True)),
    ],
)
def test_positional_order_of_layers(torch_s, arguments):
    after = () if torch_s is nn.LSTM else ("cpu", torch.float32)  # of which torch's have keywords alone
    assert_same_module(torch_s(*arguments), OURS[torch_s](*arguments, *after), same_seed=False)


@pytest.mark.parametrize(("torch_s", "options"), CELLS.values(), ids=CELLS)
def test_positional_order_of_cells(torch_s, options):
    arguments = 3, 4, False, *options.values(), *["tanh"] * (torch_s is nn.RNNCell and not options), "meta", torch.half
    theirs, ours = torch_s(*arguments), OURS[torch_s](*arguments)
    assert torch_s_repr(ours) == repr(theirs)
    assert (ours.weight_ih.device.type, ours.weight_ih.dtype) == ("meta", torch.half)


@pytest.mark.parametrize("arguments", [(), (3,), (3, 4, 1, True, False, 0.0, False, 0, None, None, None)])
def test_wrong_number_of_arguments(arguments):
    theirs, ours = outcome(lambda: nn.LSTM(*arguments)), outcome(lambda: fastlstm.LSTM(*arguments))
    assert type(ours[0]) is type(theirs[0]) is TypeError  # the words differ: ours name the class that was called


def test_unknown_argument():
    with pytest.raises(TypeError, match=r"LSTM.__init__\(\) got an unexpected keyword argument 'foo'"):
        fastlstm.LSTM(3, 4, foo=1)


@pytest.mark.parametrize(("torch_s", "proj_size"), [(nn.LSTM, 0), (nn.LSTM, 2), (nn.GRU, 0), (nn.RNN, 0)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_methods(torch_s, batch_first, proj_size):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    is_lstm = torch_s is nn.LSTM
    theirs, ours = pair(3, 4, like=torch_s, **options, **{"proj_size": proj_size} if is_lstm else {})
    x, batch_sizes, order = torch.zeros(5, 2, 3, dtype=torch.float64), torch.tensor([2, 1]), torch.tensor([1, 0])
    B = 5 if batch_first else 2
    h, c = (torch.randn(4, B, n, dtype=torch.float64) for n in (proj_size or 4, 4))
    states = (lambda *of: of) if is_lstm else (lambda h, c: h)
    for call in (
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_cell_size(x, None) if is_lstm else None,
        lambda m: m.get_expected_hidden_size(x[0], batch_sizes),
        lambda m: m.get_expected_cell_size(x[0], batch_sizes) if is_lstm else None,
        lambda m: m.check_input(x, None),
        lambda m: m.check_input(x, batch_sizes),
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_input(x.float(), None),
        lambda m: m.check_hidden_size(c, (4, B, 4)),
        lambda m: m.check_hidden_size(c, (4, B, 5)),
        lambda m: m.check_forward_args(x, states(h, c), None),
        lambda m: m.check_forward_args(x, states(h[..., :3] if proj_size == 0 else h, c[..., :3]), None),
        lambda m: [m.permute_hidden(states(h, c), None)],
        lambda m: [m.permute_hidden(states(h[:, :2], c[:, :2]), order)],
        lambda m: m.flatten_parameters(),
        lambda m: [(torch.manual_seed(5), m.reset_parameters(), list(m.parameters()))[2]],
    ):
        (expected, _), (got, _) = outcome(partial(call, theirs)), outcome(partial(call, ours))
        if isinstance(expected, Exception):
            assert (type(got), str(got)) == (type(expected), str(expected))
        elif isinstance(expected, list):
            assert_same(expected, got)
        else:
            assert got == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_base_classes(kind):
    """Dynamo refuses subclasses of torch's own."""
    for (torch_s, _), base in ((LAYERS[kind], nn.RNNBase), (CELLS[kind], nn.RNNCellBase)):
        assert issubclass(OURS[torch_s], base)
        assert not issubclass(OURS[torch_s], torch_s)


@pytest.mark.parametrize("make", OURS.values(), ids=lambda make: make.__name__)
def test_backend_of_the_module(make):
    assert "backend=reference" in repr(make(3, 5, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of"):
        make(3, 5, backend="cudnn")
