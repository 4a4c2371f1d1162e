"""What the differential tests share: drawn calls, what came of them, and comparisons."""

import re
import warnings
from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.helpers.tolerances import close

RELU = {"nonlinearity": "relu"}
LAYERS = {"LSTM": (nn.LSTM, {}), "GRU": (nn.GRU, {}), "tanh": (nn.RNN, {}), "relu": (nn.RNN, RELU)}
CELLS = {"LSTM": (nn.LSTMCell, {}), "GRU": (nn.GRUCell, {}), "tanh": (nn.RNNCell, {}), "relu": (nn.RNNCell, RELU)}
sizes = st.sampled_from([1, 2, 3, 5])
modules = st.fixed_dictionaries(
    {"input_size": sizes, "hidden_size": st.sampled_from([2, 3, 7])},
    optional={
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.4, 1.0]),
        "bidirectional": st.booleans(),
        "proj_size": st.sampled_from([0, 1]),
    },
)

# of float64 to a float32 layer: torch.nn.LSTM's words, from torch 2.11 on and before
WRONG_DTYPE = (
    r"RNN input dtype \(torch.float64\) does not match weight dtype"
    "|input must have the type torch.float32, got type torch.float64"
)

OF_INTEGERS = re.compile(r", or convert model: model.to\(torch.int\d+\)")  # advice of torch's that does not help


# Named on purpose, and before what else is wrong
NO_TENSOR = re.compile(
    "input must be a tensor|hx must be a tuple of two tensors, h_0 and c_0, got a tuple of |"
    "hx must be a tensor, h_0, got "
)


def outcome(call):
    """What `call` did: its result or exception, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as given_warnings:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        try:
            result = call()
        except Exception as error:
            result = error
    return result, [(w.category, str(w.message)) for w in given_warnings]


def assert_same_outcome(theirs, ours):
    (result, expected_warnings), (got, got_warnings) = theirs, ours
    assert got_warnings == expected_warnings
    if isinstance(got, TypeError) and NO_TENSOR.match(str(got)):
        assert isinstance(result, Exception)  # torch's of a method that this has not, or of another argument
        return
    if isinstance(result, Exception):
        assert type(got) is type(result), f"expected {result!r}, got {got!r}"
        assert str(got) == OF_INTEGERS.sub("", str(result))
        return
    assert not isinstance(got, Exception), repr(got)
    assert_same(result, got)


def assert_same(expected, got):
    """Equal in structure, types, shapes, strides and, to the tolerance of sums, in values."""
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.device == expected.device
        assert got.shape == expected.shape
        assert got.stride() == expected.stride() or expected.numel() == 0
        assert got.requires_grad == expected.requires_grad
        if expected.device.type != "meta":
            close(got, expected, "sums")
    elif isinstance(expected, PackedSequence):
        assert type(got) is PackedSequence
        assert_same(expected.data, got.data)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            a, b = getattr(expected, name), getattr(got, name)
            assert (a is None and b is None) or torch.equal(a, b)
    else:
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for a, b in zip(expected, got, strict=True):
            assert_same(a, b)


@st.composite
def calls(draw):
    """A layer of torch, constructor's arguments, an input and states for it, a seed, and whether it trains.

    The states of an LSTM are a tuple or a list of two, those of others a tensor. Most layers are LSTMs.
    """
    torch_s, options = draw(st.sampled_from([*[LAYERS["LSTM"]] * 4, *LAYERS.values()]))
    arguments = draw(modules) | options
    if torch_s is not nn.LSTM:
        arguments.pop("proj_size", None)
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    form = draw(st.sampled_from(["unbatched", "batched", "batched", "packed", "packed unsorted", "packed equal"]))
    batch_first, I, H = arguments.get("batch_first", False), arguments["input_size"], arguments["hidden_size"]
    states = arguments.get("num_layers", 1) * (2 if arguments.get("bidirectional") else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    randn = partial(torch.randn, dtype=torch.float64, generator=generator)
    T, B = max(lengths), draw(st.sampled_from([0, 1, 2, 3])) if form == "batched" else len(lengths)
    if form == "unbatched":
        x, batch = randn(T, I), ()
    elif form == "batched":
        x, batch = randn(*((B, T) if batch_first else (T, B)), I), (B,)
        if draw(st.booleans()):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        lengths = [T] * B if form == "packed equal" else lengths if "un" in form else sorted(lengths, reverse=True)
        x = pack_padded_sequence(randn(T, B, I), torch.tensor(lengths), enforce_sorted="un" not in form)
        batch = (B,)
    hx = None
    if draw(st.booleans()):
        h_0 = randn(states, *batch, arguments.get("proj_size", 0) or H)
        c_0 = randn(states, *batch, H)
        if draw(st.booleans()):  # any strides
            h_0, c_0 = h_0.mT.contiguous().mT, torch.stack([c_0, c_0], -1)[..., 0]
        hx = draw(st.sampled_from([tuple, list]))((h_0, c_0)) if torch_s is nn.LSTM else h_0
    return torch_s, arguments, x, hx, draw(st.integers(0, 2**31)), draw(st.booleans())


def wrong(a, kind, I):
    """The tensor `a` with a fault."""
    return {
        "dims": lambda: a.unsqueeze(0),
        "no dims": lambda: a.reshape(-1)[:1].squeeze(0) if a.numel() else a.new_zeros(()),
        "features": lambda: a.new_zeros(*a.shape[:-1], a.shape[-1] + I),
        "rows": lambda: a.new_zeros(a.shape[0] + 1, *a.shape[1:]),
        "batch": lambda: torch.cat([a, a], -2) if a.dim() > 1 else a,
        "dtype": lambda: a.to(torch.float32),
        "integers": lambda: a.to(torch.long),
        "device": lambda: a.to("meta"),
        "none": lambda: None,
        "list": lambda: a.tolist(),
    }[kind]()
