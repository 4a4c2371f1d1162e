"""What the tests of `fastlstm.RNN` share: cells, modules in float64 and what they are called with."""

from functools import partial

import torch

import fastlstm
from fastlstm import cells
from tests.helpers.modules import randn


@cells.cell(gates={"a": "xh", "b": "x"}, states=("h", "v"), params=("p", "q"), inputs=("m", "d"))
def gadget(a, b, h, v, p, q, m, d):
    """Two products of different widths, two states, two params and two inputs."""
    v = p * v + cells.sigmoid(b) * d
    return m * h + cells.tanh(a + q * v), v


@cells.cell(gates={"a": "x"}, states=("h",))
def no_product(a, h):
    return cells.tanh(a) + 0.5 * h


RNN = partial(fastlstm.RNN, dtype=torch.float64)


def given(rnn, T=6, B=4):
    D = 2 if rnn.bidirectional else 1
    states = tuple(randn(rnn.num_layers * D, B, rnn.hidden_size) for _ in rnn.cell.states)
    if rnn.cell is cells.slstm:  # whose n is a sum of positive numbers
        states = tuple(torch.zeros_like(a, requires_grad=True) for a in states)
    return randn(T, B, rnn.input_size), states, {name: randn(T, B, rnn.hidden_size) for name in rnn.cell.inputs}
