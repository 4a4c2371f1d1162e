"""`torch.nn.LSTMCell` and `fastlstm.LSTMCell` by the same calls, good and bad."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.contract import assert_same_outcome, outcome, wrong
from tests.helpers.layers import TORCH
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, "dims", "no dims", "features", "none"]),
    st.sampled_from([None, None, "features", "rows", "cube", "none"]),
    st.sampled_from([None, None, "features", "rows", "cube", "none"]),
    st.integers(0, 2**31),
)
def test_cell(batched, B, with_states, bias, x_fault, h_fault, c_fault, seed):
    cells = []
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        torch.manual_seed(seed)
        cells.append(cls(3, 5, bias, dtype=torch.float64))
    batch = (B,) if batched else ()
    x, h_0, c_0 = (torch.randn(*batch, n, dtype=torch.float64) for n in (3, 5, 5))

    def faulty(a, fault):
        if fault == "cube":
            return a[None, None]
        if fault == "rows" and a is not None and a.dim() == 1:
            return a
        return wrong(a, fault, 1) if fault else a

    x, h_0, c_0 = faulty(x, x_fault), faulty(h_0, h_fault), faulty(c_0, c_fault)
    hx = (h_0, c_0) if with_states else None
    theirs, ours = (outcome(lambda cell=cell: cell(x, hx)) for cell in cells)
    if TORCH < (2, 15) and str(ours[0]).startswith("Expected 2D hidden"):  # before, torch took rows for another batch
        assert isinstance(ours[0], RuntimeError)
        assert re.match("Input batch size|Dimension out of range", str(theirs[0]))
    else:
        assert_same_outcome(theirs, ours)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cell_gradients(batched, bias):
    x, h_0, c_0 = (torch.randn(*((4,) if batched else ()), n, dtype=torch.float64) for n in (3, 5, 5))
    gradients = []
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        torch.manual_seed(0)
        cell = cls(3, 5, bias, dtype=torch.float64)
        inputs = [a.clone().requires_grad_() for a in (x, h_0, c_0)]
        h, c = cell(inputs[0], tuple(inputs[1:]))
        gradients.append(torch.autograd.grad((h.sin() + 2 * c.cos()).sum(), [*inputs, *cell.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        close(ours, theirs, "sums")


@pytest.mark.parametrize(
    ("x", "hx", "error", "message"),
    [
        (torch.zeros(2, 3).double(), None, RuntimeError, "found input tensor with torch.float64 and parameter tensor"),
        (torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(2, 5).double()), RuntimeError, "and hidden tensor with"),
        (torch.zeros(2, 3), (torch.zeros(2, 5, device="meta"),) * 2, RuntimeError, "hidden tensor at meta"),
        (
            torch.zeros(2, 3, device="meta"),
            None,
            RuntimeError,
            "found input tensor at meta and parameter tensor at cpu",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 2, 5), TypeError, "hx must be a tuple of two tensors"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),), RuntimeError, "lstm_cell expects two hidden states"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),) * 3, RuntimeError, "lstm_cell expects two hidden states"),
        (
            torch.zeros(5, 3),
            (torch.zeros(5), torch.zeros(5)),
            RuntimeError,
            "Expected 2D hidden0 (batch x hidden_size), but got 1D tensor",
        ),
        (
            torch.zeros(3),
            (torch.zeros(5, 5), torch.zeros(5, 5)),
            RuntimeError,
            "Expected 1D hidden0 (hidden_size), but got 2D tensor",
        ),
        (
            torch.zeros(3),
            (torch.zeros(5), torch.zeros(1)),
            RuntimeError,
            "hidden1 has inconsistent hidden_size: got 1, expected 5",
        ),
    ],
)
def test_cell_messages(x, hx, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTMCell(3, 5)(x, hx)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_no_units():
    x, shapes = torch.randn(3, 4, requires_grad=True), []
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        h, c = cls(4, 0)(x)
        (h.sum() + c.sum()).backward()
        shapes.append((h.shape, c.shape, h.dtype, h.data_ptr() == c.data_ptr() != 0))
    assert shapes[0] == shapes[1] == ((3, 0), (3, 0), torch.float32, False)
