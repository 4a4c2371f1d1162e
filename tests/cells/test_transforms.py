"""Derivatives beyond the first, transforms and stacks of a layer of every cell, against autograd through its rows."""

import pytest
import torch

from fastlstm.backends import reference
from fastlstm.backends.base import Layer
from tests.cells.functions import check
from tests.cells.layers import directions, every_cell, gru_decay, masks
from tests.helpers.layers import Case, flat


@pytest.mark.sampled(5)
@masks
@directions
@every_cell
def test_all_derivatives(cell, reverse, masked):
    """Those that are derived, and derivatives of these, against autograd's own."""
    check(Case(cell, T=4, reverse=reverse, masked=masked))


def test_a_compiler_sees_through_it():
    """dynamo finds each function that the derived source calls."""
    case = Case(gru_decay, T=2, masked=True)

    def function(*tensors):
        return flat(reference.forward(Layer.of(gru_decay, tensors, False), True))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*case.layer.tensors), function(*case.layer.tensors)))
