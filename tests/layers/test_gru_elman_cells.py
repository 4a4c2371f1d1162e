"""The same calls, good and bad, to `torch.nn.GRUCell`, `torch.nn.RNNCell` and ours."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.contract import assert_same_outcome, outcome, wrong
from tests.helpers.modules import OURS, assert_same_gradients, pair, randn

CELLS = [(nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]
each_cell = pytest.mark.parametrize(("torch_s", "options"), CELLS, ids=["GRU", "tanh", "relu"])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(CELLS),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, "dims", "no dims", "features", "none"]),
    st.sampled_from([None, None, "features", "rows", "cube"]),
    st.integers(0, 2**31),
)
def test_cell(kind, batched, B, with_state, bias, x_fault, h_fault, seed):
    (torch_s, options), cells = kind, []
    for cls in (torch_s, OURS[torch_s]):
        torch.manual_seed(seed)
        cells.append(cls(3, 5, bias, dtype=torch.float64, **options))
    batch = (B,) if batched else ()
    x, h = (torch.randn(*batch, n, dtype=torch.float64) for n in (3, 5))
    x = wrong(x, x_fault, 1) if x_fault else x
    if h_fault == "cube":
        h = h[None, None]
    elif h_fault and not (h_fault == "rows" and not batched):
        h = wrong(h, h_fault, 1)
    theirs, ours = (outcome(lambda cell=cell: cell(x, h if with_state else None)) for cell in cells)
    if str(ours[0]).startswith("Expected 2D hidden"):  # torch before 2.15 takes rows for another batch
        assert isinstance(ours[0], RuntimeError)
    else:
        assert_same_outcome(theirs, ours)


@each_cell
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cell_gradients(torch_s, options, batched, bias):
    theirs, ours = pair(3, 5, bias, like=torch_s, **options)
    x, h = randn(*((4,) if batched else ()), 3), randn(*((4,) if batched else ()), 5)
    assert_same_gradients(ours, theirs, [ours(x, h)], [theirs(x, h)], [x, h])


@pytest.mark.parametrize("make", [fastlstm.GRUCell, fastlstm.ElmanCell])
@pytest.mark.parametrize(
    ("x", "h", "error", "message"),
    [
        (torch.zeros(2, 3).double(), None, RuntimeError, "found input tensor with torch.float64 and parameter tensor"),
        (torch.zeros(2, 3), torch.zeros(2, 5).double(), RuntimeError, "and hidden tensor with torch.float64"),
        (torch.zeros(2, 3), torch.zeros(2, 5, device="meta"), RuntimeError, "hidden tensor at meta"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),), TypeError, "hx must be a tensor, h_0, got tuple"),
        ([0.0], None, TypeError, "input must be a tensor, got list"),
        (torch.zeros(5, 3), torch.zeros(5), RuntimeError, "Expected 2D hidden0 (batch x hidden_size), but got 1D"),
    ],
)
def test_cell_messages(make, x, h, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(3, 5)(x, h)


@each_cell
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_no_units(torch_s, options):
    x = torch.randn(3, 4, requires_grad=True)
    for cls in (torch_s, OURS[torch_s]):
        h = cls(4, 0, **options)(x)
        h.sum().backward()
        assert (h.shape, h.dtype) == ((3, 0), torch.float32)
