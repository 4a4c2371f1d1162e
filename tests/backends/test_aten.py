"""The `aten` backend: what torch's own LSTM does not do by itself."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends.base import Layer
from fastlstm.call import run
from tests.cells.layers import Case
from tests.helpers.tolerances import close


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


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.elman_tanh], ids=lambda cell: cell.key)
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_are_packed(cell, reverse):
    """Empty rows keep their states, and what the padding holds reaches nothing."""
    case = Case(cell, T=5, B=4, I=3, H=6, reverse=reverse)
    lengths, results = torch.tensor([3, 0, 5, 1]), []
    x = case.layer.x.masked_fill((torch.arange(5).unsqueeze(1) >= lengths).unsqueeze(2), float("nan"))
    for name in ("aten", "reference"):
        tensors = [a if a is None else a.detach().clone().requires_grad_() for a in (x, *case.layer.tensors[1:-2])]
        layer = Layer.of(cell, (*tensors, lengths, None), reverse)
        found = run(layer, plans=None, backend=name)
        loss = sum((a * d).sum() for a, d in zip((found.h, *found.last), (case.grads.h, *case.grads.last)))
        results.append([found.h, *found.last, *torch.autograd.grad(loss, [a for a in tensors if a is not None])])
    close(*results, "derivatives")
