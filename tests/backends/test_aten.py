"""The `aten` backend: what torch's own LSTM does not do by itself."""

import pytest
import torch

import fastlstm


def test_the_states_of_a_cell_are_no_views():
    cell, state = fastlstm.LSTMCell(3, 4, backend="aten"), None
    for x in torch.randn(3, 2, 3):
        state = cell(x, state)
        for a in state:
            a.detach_()
    assert not any(a.requires_grad for a in state)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("which", ["bias_ih", "bias_hh"])
def test_one_bias_alone(which, projected):
    weights = torch.randn(16, 3), torch.randn(16, 2 if projected else 4)
    options = {which: torch.randn(16), "weight_hr": torch.randn(2, 4) if projected else None}
    x = torch.randn(5, 2, 3)
    got, want = (fastlstm.lstm(x, None, *weights, **options, backend=name)[0] for name in ("aten", "reference"))
    torch.testing.assert_close(got, want)
