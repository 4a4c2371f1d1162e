"""The `aten` backend: what torch's own LSTM does not do by itself."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends.base import Layer
from fastlstm.call import run
from tests.helpers.layers import Case
from tests.helpers.modules import same
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


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "ElmanCell"])
@pytest.mark.parametrize("hidden_size", [650, 1000])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_step_of_one_row_and_large_weights(kind, hidden_size, has_state, trains):
    """`auto` may take torch's operator of the cell for it: the results and gradients are those of float64."""
    torch.manual_seed(0)
    cell = getattr(fastlstm, kind)(hidden_size, hidden_size)
    exact = getattr(fastlstm, kind)(hidden_size, hidden_size, dtype=torch.float64, backend="reference")
    exact.load_state_dict(cell.state_dict())
    example, h, c = torch.randn(3, 1, hidden_size)
    results = []
    for each in (cell, exact):
        to = each.weight_ih.dtype
        x = example.to(to).requires_grad_()
        hx = None if not has_state else (h.to(to), c.to(to)) if kind == "LSTMCell" else h.to(to)
        with torch.set_grad_enabled(trains):
            state = each(x, hx)
            state = each(x, state)  # again, from states that need gradients
        states = state if isinstance(state, tuple) else (state,)
        found = [*states]
        if trains:
            loss = sum((a * (k + 1)).sum() for k, a in enumerate(states))
            found += torch.autograd.grad(loss, [x, *each.parameters()])
        results.append(found)
    for got, want in zip(*results, strict=True):
        # sums of 1000 products, and gradients of two steps: a rounding of float32 for each term
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_step_of_a_plain_rnn_that_trains(nonlinearity):
    """`auto` takes torch's operator, so that results and gradients have its bits, unless others are asked for."""
    x, h = torch.randn(2, 7, 20)
    options = {"input_size": 20, "hidden_size": 20, "nonlinearity": nonlinearity}

    def results(cell):
        cell.load_state_dict(theirs.state_dict())
        state = cell(x, cell(x, h))
        return state, *torch.autograd.grad(state.sum(), list(cell.parameters()))

    theirs = torch.nn.RNNCell(**options)
    ours, kernel = fastlstm.ElmanCell(**options), fastlstm.ElmanCell(**options, backend="numba")
    assert not same(results(kernel), results(theirs))
    assert same(results(ours), results(theirs))
    with fastlstm.batch_invariant():
        assert same(results(ours), results(kernel))


def test_a_row_keeps_its_bits_where_they_are_asked_for():
    """A step of one row has the bits that it has in a batch, although torch's operator may be faster."""
    cell, rows = fastlstm.LSTMCell(650, 650), torch.randn(4, 650)
    with fastlstm.batch_invariant():
        h, _ = cell(rows)
        alone, _ = cell(rows[:1])
    assert torch.equal(alone[0], h[0])
