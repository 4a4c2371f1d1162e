"""A layer of every cell in plain PyTorch, against each row by itself, in float64."""

import math

import pytest
import torch

from fastlstm.backends import reference
from tests.cells.functions import run
from tests.cells.layers import EVERY, GRADIENTS, OUTPUTS, differentiated, error, every_cell, truth
from tests.helpers.layers import Case, flat
from tests.helpers.tolerances import equal

ODD = [dict(zip("TBIH", size)) for size in ((1, 1, 1, 1), (1, 2, 3, 7), (7, 1, 2, 1), (3, 5, 1, 13))]
LARGE = {"T": 13, "B": 7, "I": 9, "H": 33, "masked": True}


@pytest.mark.parametrize(
    "options",
    [
        {"zeros": True, "masked": True},
        {"bias": False},
        *({**sizes, "masked": sizes["B"] > 1} for sizes in ODD),
        *(pytest.param({**LARGE, "reverse": reverse}, marks=pytest.mark.slow) for reverse in (False, True)),
    ],
    ids=str,
)
@every_cell
def test_outputs_and_gradients(cell, options):
    """The derived gradients are autograd's."""
    case = Case(cell, **options)
    operands, wanted = case.with_gradients()
    want = truth(case.on(operands))
    made = reference.forward(case.layer, True)
    assert max(map(error, flat(made), want)) < OUTPUTS
    gradients = [a for a in reference.backward(case.grads, case.layer, made, case.needs).flat if a is not None]
    expected = differentiated(want, wanted, flat(case.grads))
    assert len(gradients) == len(expected)
    assert max(map(error, gradients, expected)) < GRADIENTS


@every_cell
def test_padding_may_be_nan(cell):
    case = Case(cell, masked=True)
    made = reference.forward(case.layer, True)
    held = torch.arange(case.T).unsqueeze(1) >= case.layer.lengths
    spoiled = [a.masked_fill(held.unsqueeze(-1), math.nan) for a in (case.layer.x, *case.layer.inputs)]
    layer = case.layer._replace(x=spoiled[0], inputs=tuple(spoiled[1:]))
    again = reference.forward(layer, True)
    equal(flat(made), flat(again))
    for a, b in zip(*(reference.backward(case.grads, of, made, case.needs).flat for of in (case.layer, layer))):
        assert a is None or torch.equal(a, b)


@every_cell
def test_states_of_a_row_without_steps_may_be_nan(cell):
    case = Case(cell, masked=True)
    assert case.layer.lengths[0] == 0
    states = tuple(a.index_fill(0, torch.tensor([0]), math.nan) for a in case.layer.states)
    both = case.layer, case.layer._replace(states=states)
    runs = [reference.forward(layer, True) for layer in both]
    for a, b in zip(*([made.h, *(a[1:] for a in made.last)] for made in runs)):
        assert torch.equal(a, b)
    for a, b in zip(*(reference.backward(case.grads, of, made, case.needs).flat for of, made in zip(both, runs))):
        assert a is None or torch.equal(a, b)


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
