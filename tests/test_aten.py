"""The `aten` backend: what torch's own LSTM does not do by itself."""

import torch

import fastlstm


def test_the_states_of_a_cell_are_no_views():
    cell, state = fastlstm.LSTMCell(3, 4, backend="aten"), None
    for x in torch.randn(3, 2, 3):
        state = cell(x, state)
        for a in state:
            a.detach_()
    assert not any(a.requires_grad for a in state)
