"""Gradients of cells at sizes where two layouts of their sums could be taken for each other."""

import pytest
import torch
from torch.nn import Parameter

import fastlstm
from fastlstm import call, cells, plans
from fastlstm.backends.base import Layer
from tests.helpers.tolerances import close


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@fastlstm.cell(gates={"a": "x"}, states=("h", "c"), params=("u", "v"), inputs=("gap",))
def leaky(a, h, c, u, v, gap):
    c = cells.tanh(a + u * h) + v * c
    return cells.sigmoid(c) * gap, c


@fastlstm.cell(gates={"a": "xh"}, states=("h", "c", "n"))
def three(a, c, n):
    c = 0.5 * c + cells.tanh(a)
    n = 0.5 * n + cells.sigmoid(a)
    return c + n, c, n


@pytest.mark.parametrize("size", [(24, 24), (48, 24), (24, 48), (7, 24)], ids=str)
@pytest.mark.parametrize("cell", [cells.peephole_lstm, cells.ind_rnn, leaky], ids=lambda cell: cell.name)
def test_params_beside_sizes_of_whole_strips(cell, size):
    I, H = size
    rnn, x = fastlstm.RNN(cell, I, H).double(), torch.randn(20, 20, I, dtype=torch.double)
    inputs, found = {name: torch.randn(20, 20, H, dtype=torch.double) for name in cell.inputs}, []
    for backend in ("numba", "reference"):
        rnn.backend = backend
        output = rnn(x, inputs=inputs or None)[0]
        found.append(torch.autograd.grad(output.square().sum(), list(rnn.parameters())))
    close(*found, "sums")


def test_a_single_step_of_three_states():
    torch.use_deterministic_algorithms(False)
    weights = [Parameter(torch.randn(4, k, dtype=torch.double)) for k in (3, 4)]
    states, x = [torch.randn(2, 4, dtype=torch.double) for _ in range(3)], torch.randn(2, 3, dtype=torch.double)
    found = []
    for backend in ("numba", "reference"):
        layer = Layer(x, (*weights, None, None), tuple(states), None, None, False, three)
        last = call.run(layer, plans=plans.Plans(), backend=backend).last
        loss = sum((a * a).sum() for a in last)
        first = torch.autograd.grad(loss, weights, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(a.square().sum() for a in first), weights)])
    close(*found, "derivatives")


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
