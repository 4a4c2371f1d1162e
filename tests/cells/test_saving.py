"""What forward keeps: the minimum cut against every choice there is."""

import contextlib
from itertools import combinations
from unittest import mock

import pytest
import torch

from fastlstm import cells
from fastlstm.cells import saving
from fastlstm.cells.emit import RESERVED
from fastlstm.cells.saving import Costs
from tests.cells.layers import error


def cost_of(some, nodes, needed, load, compute):
    """What it costs to have `needed` where `some` are loaded and all else is computed."""
    total, there, todo = sum(load[n] for n in some), set(some), list(needed)
    while todo:
        node = todo.pop()
        if node not in there:
            there.add(node)
            total += compute[node]
            todo += [a for a in node.args if not a.is_constant()]
    return total


@contextlib.contextmanager
def brute_force(largest):
    """Compare each cut of at most `largest` values with all choices. Yields the numbers of values compared."""
    cut, compared = saving.cut, []

    def checked(nodes, needed, load, compute):
        cost, loaded = cut(nodes, needed, load, compute)
        assert cost == pytest.approx(cost_of(loaded, nodes, needed, load, compute), rel=1e-12)
        if len(nodes) <= largest:
            choices = (some for count in range(len(nodes) + 1) for some in combinations(nodes, count))
            best = min(cost_of(some, nodes, needed, load, compute) for some in choices)
            assert cost == pytest.approx(best, rel=1e-12)
            compared.append(len(nodes))
        return cost, loaded

    with mock.patch.object(saving, "cut", checked):
        yield compared


NORMS = ("layer_norm_lstm", "layer_norm_gru", "dreamer_gru")
LARGE = ("peephole_lstm", "slstm", *NORMS, "lstm", "cifg")
COSTS = (Costs(), Costs(save=10.0, keep=2.0, load=1.0), Costs(save=1.0, keep=50.0), Costs(save=400.0, keep=400.0))


@pytest.mark.parametrize("costs", COSTS, ids=["default", "cheap", "saving", "computing"])
@pytest.mark.parametrize("cell", cells.CELLS, ids=lambda cell: cell.name)
def test_the_cheapest_of_all_choices(cell, costs):
    with brute_force(largest=15) as compared:  # of larger cells only that the cut costs what it says
        cell.derived(costs)
    assert compared or cell.name in LARGE


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells.CELLS, ids=lambda cell: cell.name)
def test_the_cheapest_of_all_choices_of_large_cells(cell):
    with brute_force(largest=20) as compared:
        cell.derived(Costs())  # anew, where what the cell keeps may have been derived before
    assert compared or cell.name in LARGE[:5]


@pytest.mark.parametrize(
    ("name", "saved", "read"),
    [
        ("lstm", "i f g o", "c_prev"),  # tanh(c) is computed again
        ("gru", "n_h_pre r z n", "h_prev"),
        ("elman_tanh", "", "h"),
        ("elman_relu", "", "h"),
        ("li_gru", "z n", "h_prev"),
        ("ind_rnn", "", "h_prev h"),
        ("dreamer_gru", "deviation deviation_1 deviation_2 scale", "h_prev"),
    ],
)
def test_what_the_library_saves(name, saved, read):
    derived = getattr(cells, name).derived()
    assert derived.saved == tuple(saved.split())
    assert derived.states_read == tuple(read.split())


def test_numbers_of_rows_are_saved_rather_than_values_of_units():
    """A mean is never taken again, and what all units of a row share is never read as a state of each unit."""

    @cells.cell(gates={"a": "xh"}, states=("h", "m"), params=("p",))
    def shares(a, h, m, p):
        m = cells.mean(a) + cells.stop_gradient(cells.mean(p))
        return cells.tanh(p * m) * cells.rsqrt(1.0 + m * m), m

    derived = shares.derived()
    assert derived.saved_rows
    assert not {"m", "m_prev"} & {*derived.states_read}
    assert derived.backward.operations()["mean"] == 1  # of the gradient


def test_names_of_what_is_saved():
    """They are short, differ, and hide no function that the backward pass calls, whatever the author's names are."""
    sigmoid, of_tanh = cells.sigmoid, cells.tanh

    @cells.cell(gates={"a": "xh", "b": "xh"}, states=("h",))
    def hides(a, b, h):
        tanh = sigmoid(a) * b
        mean = of_tanh(tanh * a + b)
        rsqrt, scale = cells.layer_norm(of_tanh(tanh * h + b) * mean, mean)
        return of_tanh(rsqrt * scale * tanh) * mean

    derived = hides.derived()
    assert len({*derived.saved}) == len(derived.saved)
    assert all(len(name) < 24 and name not in RESERVED for name in derived.saved)
    a, b, h = torch.randn(3, 2, 5, dtype=torch.double, requires_grad=True)
    found = derived.forward({"a_pre": a, "b_pre": b, "h_prev": h})
    want = torch.autograd.grad(hides(a, b, h).sum(), (a, b, h))
    got = derived.backward({**found, "a_pre": a, "b_pre": b, "h_prev": h, "dh": torch.ones_like(h)})
    assert max(map(error, (got["da_pre"], got["db_pre"], got["dh_prev"]), want)) < 1e-12


def test_dear_memory_saves_less():
    assert len(cells.lstm.derived(Costs(save=400.0, keep=30.0)).saved) < 5
    assert len(cells.gru.derived(Costs(save=1.0, load=1.0)).saved) >= 4


def test_a_comparison_is_not_saved():
    """It has no number, though it would be cheaper than what it compares."""

    @cells.cell(gates={"a": "xh", "b": "xh"}, states=("h",))
    def chosen(a, b):
        return cells.where(a > b, a, b) * 0.5

    saved = chosen.derived(Costs(save=1.0)).saved
    assert set(saved) == {"a_pre", "b_pre"}
