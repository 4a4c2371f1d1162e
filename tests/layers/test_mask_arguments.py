"""What callers may pass as `lengths` and `reset`: tensors, arrays and lists. Other values raise.

Lengths outside the input raise where they can be read, and count as its ends elsewhere.
"""

import re
import warnings

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from tests.helpers.modules import assert_same_gradients, both_backends, pair, randn


@both_backends
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_lengths_outside_the_input_count_as_its_ends_under_vmap(backend, dtype):
    """Their values are not looked at there."""
    _, ours = pair(3, 5, 2, bidirectional=True, backend=backend)
    x, lengths = randn(1, 4, 6, 3), torch.tensor([[9, -1, 5, 4, 0, torch.iinfo(dtype).min]], dtype=dtype)
    mapped = torch.func.vmap(lambda x, lengths: ours(x, lengths=lengths))
    got, expected = mapped(x, lengths), mapped(x, lengths.clamp(0, 4))
    assert_same_gradients(ours, ours, [got[0], *got[1]], [expected[0], *expected[1]], [x])


def of_a_compiled_module(lstm, x, lengths):
    return torch.compile(lstm, backend="eager", fullgraph=True)(x, lengths=lengths)[0]


def of_an_exported_module(lstm, x, lengths):
    return torch.export.export(lstm, (x,), {"lengths": lengths}).module()(x, lengths=lengths)[0]


def of_a_trace(lstm, x, lengths):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths):
            return self.lstm(x, lengths=lengths)[0]

    return torch.jit.trace(Padded(), (x, lengths), check_trace=False)(x, lengths)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("run", [of_a_compiled_module, of_an_exported_module, of_a_trace])
def test_lengths_outside_the_input_where_they_cannot_be_read(run):
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 4, 3)
    got = run(lstm, x, torch.tensor([9, -1, 5, 2]))
    torch.testing.assert_close(got, lstm(x, lengths=torch.tensor([4, 0, 4, 2]))[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint64, torch.int64])
@pytest.mark.parametrize("bad", [7, -1, 100])
def test_lengths_outside_the_input(bad, dtype, batch_first):
    if bad < 0 and dtype == torch.uint64:
        bad = 2**64 - 1
    lengths = torch.tensor([6, bad, 0], dtype=dtype)
    lstm = fastlstm.LSTM(3, 5, backend="aten", batch_first=batch_first)  # which would refuse any lengths
    x = torch.zeros(6, 3, 3)
    with pytest.raises(ValueError, match=re.escape(f"lengths must be from 0 to T = 6, got {bad}")):
        lstm(x.transpose(0, 1) if batch_first else x, lengths=lengths)


def test_a_length_outside_one_sequence_alone():
    for bad in (torch.tensor(7), 7):
        with pytest.raises(ValueError, match="lengths must be from 0 to T = 6, got 7"):
            fastlstm.LSTM(3, 5)(torch.zeros(6, 3), lengths=bad)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "lengths",
    [
        [4, 0, 3],
        (4, 0, 3),
        [np.int64(4), np.int64(0), np.int64(3)],
        np.array([4, 0, 3]),
        np.array([4, 0, 3], dtype=np.uint16),
        np.array([3, 0, 4])[::-1],
        read_only(np.array([4, 0, 3])),
    ],
    ids=["list", "tuple", "list of numpy's", "int64", "uint16", "from the end", "read-only"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_lengths_that_are_no_tensor(lengths, compiled):
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 3, 3)
    call = torch.compile(lstm, backend="eager") if compiled else lstm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = call(x, lengths=lengths)[0]
    torch.testing.assert_close(got, lstm(x, lengths=torch.tensor([4, 0, 3]))[0])


@pytest.mark.parametrize(
    "form",
    [
        torch.Tensor.tolist,
        lambda a: tuple(map(tuple, a.tolist())),
        torch.Tensor.numpy,
        lambda a: a.flip(0).numpy()[::-1],
        lambda a: read_only(a.clone().numpy()),
        lambda a: list(a.numpy()),
        lambda a: list(a),
    ],
    ids=["list", "tuple", "array", "from the end", "read-only", "list of arrays", "list of tensors"],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_that_are_no_tensor(form, batch_first):
    lstm, x = fastlstm.LSTM(3, 5, batch_first=batch_first), torch.randn(4, 3, 3)
    reset = torch.rand(4, 3) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = lstm(x, reset=form(reset))[0]
    assert torch.equal(got, lstm(x, reset=reset)[0])


def test_resets_elsewhere_that_are_no_tensor():
    """In a compiled call, of one sequence alone, of no rows, and in the other functions and modules that take them."""
    lstm, x, reset = fastlstm.LSTM(3, 5), torch.randn(4, 3, 3), torch.rand(4, 3) < 0.5
    want = lstm(x, reset=reset)
    for values in (reset.tolist(), reset.numpy()):
        assert torch.equal(torch.compile(lstm, backend="eager")(x, reset=values)[0], want[0])
        assert torch.equal(fastlstm.lstm(x, None, *lstm.parameters(), reset=values)[0], want[0])
    of_one = lstm(x[:, 0], reset=reset[:, 0].tolist())[0]
    assert torch.equal(of_one, lstm(x[:, 0], reset=reset[:, 0])[0])
    assert lstm(torch.zeros(4, 0, 3), reset=[[]] * 4)[0].shape == (4, 0, 5)
    for module in (fastlstm.GRU(3, 5), fastlstm.Elman(3, 5), fastlstm.RNN(fastlstm.cells.mgu, 3, 5)):
        assert torch.equal(module(x, reset=reset.tolist())[0], module(x, reset=reset)[0])


def test_lengths_of_no_rows_and_of_one_sequence_alone():
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 3)
    assert lstm(torch.zeros(4, 0, 3), lengths=[])[0].shape == (4, 0, 5)
    expected = lstm(x, lengths=torch.tensor(2))[0]
    for lengths in (2, np.int32(2), np.array(2)):
        assert torch.equal(lstm(x, lengths=lengths)[0], expected)


BOOLEANS = "reset must be booleans of shape (T, B), as a tensor, an array or a list"
INTEGERS = "lengths must be integers of shape (B,), as a tensor, an array or a list"
Z = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "message"),
    [
        ({}, {"reset": [True]}, ValueError, "reset must have shape (T, B) = (5, 2), got (1,)"),
        ({}, {"reset": [[True], [True, False]]}, TypeError, f"{BOOLEANS}, got list"),
        ({}, {"reset": "start"}, TypeError, f"{BOOLEANS}, got str"),
        ({}, {"reset": [[0, 1]] * 5}, TypeError, f"{BOOLEANS}, got torch.int64"),
        ({}, {"reset": np.zeros((5, 2))}, TypeError, f"{BOOLEANS}, got torch.float64"),
        ({}, {"reset": Z}, TypeError, f"{BOOLEANS}, got torch.float32: a tensor's reset.bool() has them"),
        ({}, {"reset": torch.zeros(2, 5) > 0}, ValueError, "reset must have shape (T, B) = (5, 2), got (2, 5)"),
        ({"batch_first": True}, {"reset": Z.T > 0}, ValueError, "reset must have shape (B, T) = (5, 2), got (2, 5)"),
        ({"bidirectional": True}, {"reset": Z > 0}, ValueError, "needs a module of one direction, and this one is bi"),
        ({}, {"reset": torch.zeros(5, 2).int()}, TypeError, f"{BOOLEANS}, got torch.int32"),
        ({}, {"lengths": ["1", "2"]}, TypeError, f"{INTEGERS}, got list"),
        ({}, {"lengths": [[1], [1, 2]]}, TypeError, f"{INTEGERS}, got list"),
        ({}, {"lengths": {1, 2}}, TypeError, f"{INTEGERS}, got set"),
        ({}, {"lengths": [1.0, 2.0]}, TypeError, f"{INTEGERS}, got torch.float64"),
        ({}, {"lengths": np.ones(2) > 0}, TypeError, f"{INTEGERS}, got torch.bool"),
        ({}, {"lengths": torch.ones(2)}, TypeError, f"{INTEGERS}, got torch.float32"),
        ({}, {"lengths": torch.ones(2) > 0}, TypeError, f"{INTEGERS}, got torch.bool"),
        ({}, {"lengths": [1, 2, 3]}, ValueError, "lengths must have shape (B,) = (2,), got (3,)"),
        ({}, {"lengths": torch.ones(5).long()}, ValueError, "lengths must have shape (B,) = (2,), got (5,)"),
    ],
)
def test_bad_masks(arguments, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTM(3, 5, **arguments)(torch.zeros(5, 2, 3), **call)


@pytest.mark.parametrize("name", ["reset", "lengths"])
def test_packed_input_takes_no_masks(name):
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 3]))
    value = torch.zeros(5, 2, dtype=torch.bool) if name == "reset" else torch.tensor([5, 3])
    with pytest.raises(ValueError, match=f"{name} must be None for a PackedSequence"):
        fastlstm.LSTM(3, 5)(packed, **{name: value})
