"""What forward keeps: the minimum cut against every choice there is."""

from unittest import mock

import pytest
import torch

from fastlstm import cells
from fastlstm.cells import saving
from fastlstm.cells.saving import Costs
from tests.cells.cuts import brute_force

NORMS = ("layer_norm_lstm", "layer_norm_gru", "dreamer_gru")
LARGEST = (
    "peephole_lstm", "slstm", *NORMS, "multiplicative_lstm", "lem", "rhn_2", "lif", "synaptic", "alif",
)  # fmt: skip
LARGE = (*LARGEST, "lstm", "cifg", "gru_reset_before", "cornn", "cfc")
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
    assert compared or cell.name in LARGEST


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
    """They hide no function that the backward pass calls, whatever the author's names are."""
    of_tanh = cells.tanh

    @cells.cell(gates=cells.lstm.gates, states=("h", "c"))
    def hides(i, f, g, o, c):
        tanh, mean, rsqrt, o = cells.sigmoid(i), cells.sigmoid(f), of_tanh(g), cells.sigmoid(o)
        c = mean * c + tanh * rsqrt
        return o * of_tanh(c), c

    derived = hides.derived()
    assert derived.saved == ("tanh_1", "mean_1", "rsqrt_1", "o")
    assert derived.backward.operations()["tanh"] == 1
    given = dict(zip(("i_pre", "f_pre", "g_pre", "o_pre", "c_prev", "dh", "dc"), torch.randn(7, 9)))
    got, want = (cell.derived().backward({**given, **cell.derived().forward(given)}) for cell in (hides, cells.lstm))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_states_double_no_work():
    """Of 13 states, about as many as an operator of torch takes arguments for, there are 4096 choices of sequences."""
    names = [f"s{k}" for k in range(13)]
    steps = {"tanh": cells.tanh}
    exec(f"def step(a, {', '.join(names)}): return {', '.join(f'tanh(a * {name})' for name in names)}", steps)
    many = cells.cell(gates={"a": "xh"}, states=names)(steps["step"])
    with mock.patch.object(saving, "cut", wraps=saving.cut) as cut:
        derived = many.derived(Costs(save=30.0))  # not the default, of which the declaration has derived it
    assert derived.saved == ("a_pre",)
    assert cut.call_count == len(names)


def test_names_are_short():
    @cells.cell(gates={"a": "xh", "b": "xh"}, states=("h",))
    def long(a, b, h):
        return (
            (a * b * h + a + b) * (a * b * h - a - b) * (a / (1.0 + h * h)) * cells.rms_norm(cells.layer_norm(a, b)[0])
        )

    saved = long.derived(Costs(save=1.0)).saved
    assert len({*saved}) == len(saved) > 3
    assert all(len(name) <= 20 for name in saved)


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
