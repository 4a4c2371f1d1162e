"""What the tests of `fastlstm.LSTM` share: a pair of modules of the same weights, float64, and comparisons."""

import pytest
import torch
from torch import nn

import fastlstm
from tests.helpers.layers import BACKENDS

TOLERANCE = 1e-12  # float64, a few hundred terms below 10 each

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def pair(*args, **kwargs):
    """A `torch.nn.LSTM` and a `fastlstm.LSTM` of the same weights, float64."""
    backend = kwargs.pop("backend", None)
    theirs = nn.LSTM(*args, dtype=torch.float64, **kwargs)
    ours = fastlstm.LSTM(*args, dtype=torch.float64, backend=backend, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randn(*size, grad=True):
    return torch.randn(*size, dtype=torch.float64, requires_grad=grad)


def assert_close(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def assert_same_gradients(ours, theirs, got, expected, inputs):
    """`got` and `expected` are lists of outputs; their gradients by the same random directions are compared."""
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    directions = [torch.randn_like(a) for a in got]
    gradients = torch.autograd.grad(got, [*inputs, *ours.parameters()], directions, allow_unused=True)
    references = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], directions, allow_unused=True)
    for a, b, x in zip(gradients, references, [*inputs, *ours.parameters()], strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        assert_close(a, b, 10 * TOLERANCE)
