"""Gradients of cells at sizes where two layouts of their sums could be taken for each other."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from tests.helpers.tolerances import close

pytestmark = pytest.mark.usefixtures("poisoned")


@fastlstm.cell(gates={"a": "x"}, states=("h", "c"), params=("u", "v"), inputs=("gap",))
def leaky(a, h, c, u, v, gap):
    c = cells.tanh(a + u * h) + v * c
    return cells.sigmoid(c) * gap, c


@pytest.mark.parametrize("size", [(24, 24), (48, 24), (24, 48), (7, 24)], ids=str)
@pytest.mark.parametrize("cell", [cells.peephole_lstm, cells.ind_rnn, leaky], ids=lambda cell: cell.name)
def test_params_beside_sizes_of_whole_strips(cell, size):
    I, H = size
    rnn, x = fastlstm.RNN(cell, I, H).double(), torch.randn(20, 20, I, dtype=torch.double)
    inputs, found = {name: torch.randn(20, 20, H, dtype=torch.double) for name in cell.inputs}, []
    for rnn.backend in ("numba", "reference"):
        output = rnn(x, inputs=inputs or None)[0]
        found.append(torch.autograd.grad(output.square().sum(), list(rnn.parameters())))
    close(*found, "sums")


@pytest.mark.parametrize("names", [["bias_hh"], ["bias_ih"], ["bias_ih", "bias_hh"]], ids=str)
@pytest.mark.parametrize("kind", [fastlstm.LSTMCell, fastlstm.GRUCell])
def test_a_bias_that_is_taken_away(kind, names):
    """Packed weights are those of the bias that was there."""
    cell, x = kind(8, 16, backend="numba"), torch.randn(2, 8)
    with torch.no_grad():
        cell(x), cell(x)
        for name in names:
            setattr(cell, name, None)
        got = cell(x)
        cell.backend = "reference"
        want = cell(x)
    as_tuple = isinstance(got, tuple)
    close(got if as_tuple else [got], want if as_tuple else [want], "sums")
