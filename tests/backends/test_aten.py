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


KINDS = {"LSTM": (fastlstm.LSTMCell, torch.nn.LSTMCell), "GRU": (fastlstm.GRUCell, torch.nn.GRUCell)}
KINDS["Elman"] = fastlstm.ElmanCell, torch.nn.RNNCell


@pytest.mark.parametrize(
    ("kind", "rows", "units", "trains", "is_torchs"),
    [
        ("LSTM", 2, 64, True, True),
        ("LSTM", 2, 64, False, False),
        ("LSTM", 8, 128, True, False),
        ("LSTM", 4, 160, True, False),
        ("LSTM", 4, 150, True, True),  # rows of weights that end inside a vector
        ("GRU", 2, 64, True, True),
        ("GRU", 8, 128, True, False),
        ("Elman", 70, 20, True, True),
        ("Elman", 8, 20, False, True),
        ("Elman", 9, 20, False, False),
    ],
)
def test_steps_that_take_torchs_operator(kind, rows, units, trains, is_torchs):
    """They have its bits, but for those that are asked to have a kernel's, and under autocast."""
    x, h = torch.randn(2, rows, units)
    ours, theirs = KINDS[kind]
    cells = ours(units, units), ours(units, units, backend="numba"), theirs(units, units)
    hx = (h, h.cos()) if kind == "LSTM" else h

    def results(cell):
        cell.load_state_dict(cells[2].state_dict())
        with torch.set_grad_enabled(trains):
            state = cell(x, cell(x, hx))
        states = state if isinstance(state, tuple) else (state,)
        return *states, *(torch.autograd.grad(states[0].sum(), list(cell.parameters())) if trains else ())

    mine, kernels, torchs = map(results, cells)
    assert not same(kernels, torchs)
    assert same(mine, torchs if is_torchs else kernels)
    with fastlstm.batch_invariant():
        assert same(results(cells[0]), kernels)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(results(cells[0]), results(cells[1]))


def test_a_row_keeps_its_bits_where_they_are_asked_for():
    """A step of one row has the bits that it has in a batch, although torch's operator may be faster."""
    cell, rows = fastlstm.LSTMCell(650, 650), torch.randn(4, 650)
    with fastlstm.batch_invariant():
        h, _ = cell(rows)
        alone, _ = cell(rows[:1])
    assert torch.equal(alone[0], h[0])
