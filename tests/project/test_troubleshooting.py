"""What the page on troubleshooting quotes is what users see."""

import pickle
import re

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm import cells
from fastlstm.int8 import modules
from tests.helpers.layers import TORCH

X, STARTS = torch.zeros(2, 1, 2), torch.zeros(2, 1, dtype=torch.bool)


class HasBackend(torch.nn.LSTM):
    backend = "its own"


def changed_in_place():
    output, _ = (lstm := fastlstm.LSTM(2, 3))(X)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    output.sum().backward()


def local_cell():
    @fastlstm.cell(gates={"a": "xh"}, states=("h",))
    def local(a):
        return cells.tanh(a)

    pickle.dumps(fastlstm.RNN(local, 2, 3))


def differentiated_in_int8():
    fastlstm.quantize(torch.nn.LSTM(2, 3))(X.clone().requires_grad_())[0].sum().backward()


RAISED = {
    "one of the variables needed for gradient computation has been modified by an inplace operation": changed_in_place,
    "Input and parameter tensors are not the same dtype": lambda: fastlstm.LSTMCell(2, 3)(X[0].double()),
    "RNN input dtype ... does not match weight dtype": lambda: fastlstm.LSTM(2, 3)(X.double()),
    "replace cannot replace a ... that has a 'backend' of its own": lambda: fastlstm.replace(HasBackend(2, 3)),
    "the native backend has no projections (proj_size)": lambda: fastlstm.LSTM(2, 3, proj_size=1, backend="native")(X),
    "reset must be booleans of shape (T, B)": lambda: fastlstm.LSTM(2, 3)(X, reset=STARTS.int()),
    "reset needs a module of one direction": lambda: fastlstm.LSTM(2, 3, bidirectional=True)(X, reset=STARTS),
    "lengths must be None for a PackedSequence": lambda: fastlstm.LSTM(2, 3)(pack_sequence([X[:, 0]]), lengths=[2]),
    "a stream has no gradients": lambda: fastlstm.LSTM(2, 3).stream()(X[0].clone().requires_grad_()),
    "'LSTM' object has no attribute 'stream'": lambda: torch.nn.LSTM(2, 3).stream(),
    "optimizer got an empty parameter list": lambda: torch.optim.SGD(
        fastlstm.quantize(torch.nn.LSTM(2, 3)).parameters()
    ),
    "int8 weights are for inference and have no gradient": differentiated_in_int8,
}
LOCAL = "Can't pickle local object", "Can't get local object"  # in the words of older and of newer Pythons
WARNED = {
    "replace found no torch.nn.LSTM, ...": lambda: fastlstm.replace(torch.nn.Linear(2, 2)),
    "a QuantizedLSTM is for inference: it has no parameters and stays in eval mode": lambda: fastlstm.quantize(
        torch.nn.LSTM(2, 3)
    ).train(),
}


def pattern(quote: str) -> str:
    """A regular expression for a message that the page quotes, with dots in the place of words that vary."""
    return ".*".join(re.escape(part.strip()) for part in quote.split("..."))


@pytest.mark.parametrize("quote", RAISED)
def test_errors(quote):
    if quote.startswith("RNN input dtype") and TORCH < (2, 13):
        pytest.skip("the error is torch's own, and torch 2.9 has other words for it")
    with pytest.raises(Exception, match=pattern(quote)):
        RAISED[quote]()


def test_the_error_of_pickling_a_local_cell():
    with pytest.raises(Exception, match="|".join(LOCAL)):
        local_cell()


@pytest.mark.parametrize("quote", WARNED)
def test_warnings(quote, monkeypatch):
    monkeypatch.setattr(modules, "_warned", False)
    with pytest.warns(UserWarning, match=pattern(quote)):
        WARNED[quote]()
