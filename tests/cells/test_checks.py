"""Tensors that make no layer of a cell."""

import re

import pytest
import torch

from fastlstm import cells
from fastlstm.backends.layer_checks import check_layer
from fastlstm.int8 import definition
from tests.cells.layers import gru_decay
from tests.helpers.layers import Case


def changed(cell, **fields):
    """A layer of `cell` in which tensors are others, by the places in their tuples."""
    layer = Case(cell, T=5, B=3, I=4, H=5, masked=True).layer
    for name, places in fields.items():
        if isinstance(places, dict):
            entries = list(getattr(layer, name))
            for k, a in places.items():
                entries[k] = a
            places = tuple(entries)
        layer = layer._replace(**{name: places})
    return layer


WRONG = [
    (cells.gru, {"x": torch.zeros(5, 3)}, "x must have shape (T, B, I), got (5, 3)"),
    (cells.gru, {"weights": {0: torch.zeros(16, 4)}}, "weight_ih must have shape (3H, I) with I = 4, got (16, 4)"),
    (cells.gru, {"weights": {0: torch.zeros(0, 4)}}, "(3H, I) with H of 1 or more, got (0, 4)"),
    (cells.gru, {"weights": {1: torch.zeros(20, 5)}}, "weight_hh must have shape (15, 5), got (20, 5)"),
    (cells.gru, {"weights": {3: torch.zeros(20)}}, "bias_hh must have shape (15,), got (20,)"),
    (cells.gru, {"weights": {1: None}}, "weight_hh must be given: 3 gates of cell gru sum h"),
    (cells.ind_rnn, {"weights": {1: torch.zeros(5, 5)}}, "weight_hh must be None: cell ind_rnn has no gate for it"),
    (cells.ind_rnn, {"weights": {4: torch.zeros(4)}}, "u must have shape (5,), got (4,)"),
    (cells.ind_rnn, {"weights": {4: None}}, "params must be u, got 0 tensors"),
    (cells.elman_tanh, {"weights": {0: torch.zeros(4, 3)}}, "weight_ih must have shape (H, I) with I = 4, got (4, 3)"),
    (gru_decay, {"inputs": ()}, "inputs must be gap, got 0 tensors"),
    (gru_decay, {"inputs": {0: torch.zeros(5, 3, 4)}}, "gap must have shape (5, 3, 5), got (5, 3, 4)"),
    (cells.slstm, {"states": {2: None}}, "states must be h, c, n, m, or all None, got 3 tensors"),
    (cells.lstm, {"states": {1: torch.zeros(3, 4)}}, "c_0 must have shape (3, 5), got (3, 4)"),
    (cells.lstm, {"states": {1: torch.zeros(3, 5)}}, "c_0 must have the dtype of x, torch.float64, got torch.float32"),
    (cells.lstm, {"lengths": torch.zeros(3)}, "lengths must have the dtype torch.int64, got torch.float32"),
    (cells.lstm, {"reset": torch.zeros(3, 5).bool()}, "reset must have shape (5, 3), got (3, 5)"),
]


@pytest.mark.parametrize(("cell", "fields", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_wrong(cell, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layer(changed(cell, **fields))


def test_int8_layers_have_no_means():
    layer = Case(cells.dreamer_gru).layer
    with pytest.raises(ValueError, match="must be of a cell without means over units, got dreamer_gru"):
        definition.check(layer._replace(activations=8))
