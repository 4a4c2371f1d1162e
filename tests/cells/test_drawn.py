"""Cells that nobody has thought of: everything derived against autograd through what was drawn, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import jvp

from fastlstm.backends import reference
from tests.cells.drawn import declared, sources
from tests.cells.functions import run
from tests.cells.layers import GRADIENTS, ONE, OUTPUTS, Case, curved, differentiated, error, flat, truth
from tests.cells.test_saving import brute_force

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
options = st.fixed_dictionaries({
    "masked": st.booleans(), "reverse": st.booleans(), "zeros": st.booleans(), "seed": st.integers(0, 99)
})  # fmt: skip


def check(source, options):
    cell = declared(source)
    case = Case(cell, 3, 3, 2, 3, **options)
    results, second = [], []
    for layers in (truth, run):
        operands, wanted = case.with_gradients()
        grads = [g.clone().requires_grad_() for g in flat(case.grads)]
        got = layers(case.on(operands))
        first = differentiated(got, wanted, grads, create_graph=True)
        results.append((got, first))
        second.append(differentiated((curved(first),), [*wanted, *grads], ONE))
    assert max(map(error, results[1][0], results[0][0])) < OUTPUTS
    assert max(map(error, results[1][1], results[0][1])) < GRADIENTS
    assert max(map(error, second[1], second[0])) < GRADIENTS
    check_forward_mode(case)


def check_forward_mode(case):
    places = [k for k, a in enumerate(case.operands) if a is not None]
    primals = tuple(case.operands[k] for k in places)

    def of(layers):
        def function(*tensors):
            given = list(case.operands)
            for k, a in zip(places, tensors):
                given[k] = a
            return tuple(layers(case.on(given)))

        return jvp(function, primals, tuple(map(torch.cos, primals)))[1]

    assert max(map(error, of(run), of(truth))) < GRADIENTS


@given(sources(), options)
@settings(max_examples=30, **QUIET)
def test_drawn_cells(source, options):
    check(source, options)


@pytest.mark.slow
@given(sources(), options)
@settings(max_examples=500, **QUIET)
def test_many_drawn_cells(source, options):
    check(source, options)


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
