"""Derived functions in phases, run one after the other on tensors, against the whole function."""

import pytest
import torch
from hypothesis import given, settings

from fastlstm import cells
from fastlstm.cells import CELLS
from fastlstm.cells.graph import HEADS
from fastlstm.cells.on_tensors import mean_of_head
from fastlstm.cells.phases import in_phases
from tests.cells.drawn import QUIET, declared, sources
from tests.cells.layers import MEANS, error, of_both, one
from tests.helpers.rnn import of_heads

B, H, K = 3, 6, 2


def in_turn(phases, arguments, rows):
    """All that the phases give. A row's numbers are (B, 1), and a sum is known from the next phase on."""
    shared = {name: arguments[name][:, :1] for name in rows if name in arguments}
    units, results = {name: a for name, a in arguments.items() if name not in rows}, {}
    for phase in phases.phases:
        for name in (phases.kept[n] for n in phase.of_heads):
            units[name] = mean_of_head(units[name], K)
        numbers = phase.rows(shared)
        assert all(a.shape == (B, 1) for a in numbers.values())
        assert {*phase.units.arguments}.isdisjoint(rows)
        values = phase.units(units | shared | numbers)
        shared |= numbers | {name: values[name].mean(-1, keepdim=True) for name in phases.sums if name in values}
        units |= values
        results |= numbers | values
    return results


def check(cell):
    derived, layout = cell.derived(), cell.layout
    generator = torch.Generator().manual_seed(3)
    given = {
        name: torch.rand(B, H, generator=generator, dtype=torch.double)
        for function in (derived.forward, derived.backward)
        for name in function.arguments
    } | {HEADS: K}
    given |= derived.forward(given)
    preacts, params = [f"d{gate}_pre" for gate in layout.preacts], [f"d{name}" for name in layout.params]
    for function, rows, early, unread in (
        (derived.forward, layout.saved_rows, layout.saved_units, ()),
        (derived.backward, layout.saved_rows, preacts, params),
    ):
        phases = in_phases(function, function.results, rows, early, unread)
        found = in_turn(phases, {name: given[name] for name in function.arguments}, rows)
        for name, want in function(given).items():
            assert error(found[name].expand(B, H), want) < 1e-12, name
        taken = {name for phase in phases.phases for name in phase.units.arguments}
        assert {*phases.kept} <= taken  # nothing is kept for nothing


ELEMENTWISE = [cell for cell in CELLS if not cell.products]


@pytest.mark.parametrize("cell", [*ELEMENTWISE, of_heads, of_both, *(one(expression) for expression in MEANS.values())])
def test_phases_are_the_whole_function(cell):
    check(cell)


def test_what_is_computed_from_a_saved_value_reads_no_other():
    """The backward pass reads `v`, and not `a`. It takes the mean of -v, which is no m - a there."""

    @cells.cell(gates={"a": "xh"}, states=("h",))
    def spread(a):
        m = cells.mean(a)
        v = a - m
        return cells.tanh(cells.mean(v * v) * cells.exp(m))

    assert "a_pre" not in spread.derived().backward.arguments
    check(spread)


@given(sources(most_products=0))  # tensors of one shape stand for all arguments
@settings(max_examples=60, **QUIET)
def test_phases_of_drawn_cells(source):
    check(declared(source))


def test_a_plain_cell_has_one_phase():
    for cell in ELEMENTWISE:
        if not cell.derived().means:
            phases = in_phases(cell.derived().forward, cell.states)
            assert (len(phases.phases), phases.of_rows, phases.sums, phases.kept) == (1, (), (), ())


@pytest.mark.parametrize(("name", "forward", "backward"), [("layer_norm_lstm", 5, 3), ("dreamer_gru", 3, 2)])
def test_how_many_phases_there_are(name, forward, backward):
    cell = next(cell for cell in CELLS if cell.name == name)
    derived = cell.derived()
    assert len(in_phases(derived.forward, cell.states).phases) == forward
    assert len(in_phases(derived.backward, derived.backward.results, derived.saved_rows).phases) == backward
