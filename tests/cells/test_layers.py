"""A layer of every cell in plain PyTorch, where numbers are none or are not there."""

import math

import pytest
import torch

from fastlstm.backends import reference
from tests.cells.functions import run
from tests.cells.layers import EVERY, differentiated, every_cell, truth
from tests.helpers.layers import Case, flat


@every_cell
def test_nan_travels(cell):
    """From one row's value to that row's outputs from there on, to no other row, and to the weights' gradients."""
    case = Case(cell)
    for a in (case.layer.x, *case.layer.inputs):
        a[2, 1] = math.nan
    operands, wanted = case.with_gradients()
    want, made = truth(case.on(operands)), reference.forward(case.layer, True)
    for a, b in zip(flat(made), want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert made.h[2:, 1].isnan().all()
    assert not made.h[:, [0, 2]].isnan().any()
    assert not made.h[:2].isnan().any()
    expected = differentiated(want, wanted, flat(case.grads))
    found = reference.backward(case.grads, case.layer, made, case.needs).flat
    for a, b in zip((a for a in found if a is not None), expected, strict=True):
        assert a.isnan()[b.isnan()].all()


@pytest.mark.parametrize(("B", "I"), [(0, 4), (2, 0)], ids=["no rows", "no inputs"])
@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: cell.name)
def test_empty(cell, B, I):
    case = Case(cell, 3, B, I, 5)
    operands, wanted = case.with_gradients()
    made = run(case.on(operands))
    assert [a.shape for a in made] == [a.shape for a in flat(case.grads)]
    first = differentiated(made, wanted, flat(case.grads))
    assert [a.shape for a in first] == [a.shape for a in wanted]
    assert all(a.isfinite().all() for a in first)
