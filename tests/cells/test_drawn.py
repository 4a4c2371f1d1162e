"""Cells that nobody has thought of: everything derived against autograd through what was drawn, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlstm.backends import reference
from tests.cells.cuts import brute_force
from tests.cells.drawn import QUIET, declared, sources
from tests.cells.functions import check
from tests.helpers.layers import Case

options = st.fixed_dictionaries({
    "masked": st.booleans(), "reverse": st.booleans(), "zeros": st.booleans(), "seed": st.integers(0, 99)
})  # fmt: skip


@given(sources(), options)
@settings(max_examples=30, **QUIET)
def test_drawn_cells(source, options):
    check(Case(declared(source), 3, 3, 2, 3, **options))


@pytest.mark.slow
@given(sources(), options)
@settings(max_examples=500, **QUIET)
def test_many_drawn_cells(source, options):
    check(Case(declared(source), 3, 3, 2, 3, **options))


@given(sources())
@settings(max_examples=30, **QUIET)
def test_what_is_saved_is_the_cheapest(source):
    with brute_force(largest=9):
        declared(source)._derived  # noqa: B018


@given(sources(), options)
@settings(max_examples=15, **QUIET)
def test_the_plain_layer(source, options):
    """What `reference.forward` returns without saving is the same."""
    cell = declared(source)
    case = Case(cell, 3, 2, 2, 3, **options)
    made, saving = (reference.forward(case.layer, save) for save in (False, True))
    assert torch.equal(made.h, saving.h)
    assert all(map(torch.equal, made.last, saving.last))
    assert made.saved == ()
