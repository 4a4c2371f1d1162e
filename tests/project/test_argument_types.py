"""Booleans where numbers belong, and strings where booleans do, raise before any work."""

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm import cells

LSTM, X = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
FLAGS = {
    "replace": ("keep_type", lambda value: fastlstm.replace(nn.Sequential(nn.LSTM(3, 4)), keep_type=value)),
    "replace_lstm": ("keep_type", lambda value: fastlstm.replace_lstm(nn.Sequential(nn.LSTM(3, 4)), keep_type=value)),
    "batch_invariant": ("enabled", fastlstm.batch_invariant),
    "LSTM": ("return_cells", lambda value: LSTM(X, return_cells=value)),
    "RNN": ("return_states", lambda value: fastlstm.RNN(cells.mgu, 3, 4)(X, return_states=value)),
    "lstm": ("reverse", lambda value: fastlstm.lstm(X, None, *LSTM.parameters(), reverse=value)),
    "lstm_returns": ("return_cells", lambda value: fastlstm.lstm(X, None, *LSTM.parameters(), return_cells=value)),
}


@pytest.mark.parametrize("value", ["x", "False", 1, None], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_bools(name, value):
    argument, call = FLAGS[name]
    with pytest.raises(TypeError, match=rf"^{argument} must be a bool, got {type(value).__name__}$"):
        call(value)
    assert type(nn.LSTM(3, 4)) is nn.LSTM  # nothing is patched


def declared(function=lambda i: i, params=()):
    @cells.cell(gates={"i": "xh"}, states=("h",), params=params)
    def cell(i, h):
        return function(i)


NUMBERS = {
    "weight of layer_norm": lambda x: cells.layer_norm(x, weight=True),
    "bias of layer_norm": lambda x: cells.layer_norm(x, bias=False),
    "weights of layer_norm": lambda x: cells.layer_norm(x, x, weight=(True, 1.0))[0],
    "eps of layer_norm": lambda x: cells.layer_norm(x, eps=True),
    "weight of rms_norm": lambda x: cells.rms_norm(x, weight=True),
    "clamp": lambda x: cells.clamp(x, True),
    "maximum": lambda x: cells.maximum(True, x),
    "minimum": lambda x: cells.minimum(x, False),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_bool_is_no_number(name):
    function = NUMBERS[name]
    for call in (lambda: declared(function), lambda: function(torch.ones(2, 3)), lambda: function(1.5)):
        with pytest.raises(TypeError, match=r" takes (values and numbers|a value or a number), got bool"):
            call()


def test_a_bool_is_no_start_of_a_param():
    with pytest.raises(TypeError, match=r"^cell cell: param u must start from a finite number or None, got True$"):
        declared(params={"u": True})


def test_a_bool_is_no_probability():
    with pytest.raises(TypeError, match=r"^recurrent_dropout must be a number from 0 to 1, got bool$"):
        fastlstm.GRU(3, 5, recurrent_dropout=True)


def test_a_comparison_of_numbers_is_a_bool():
    assert cells.where(2.0 > 1.0, 3.0, 4.0) == 3.0
