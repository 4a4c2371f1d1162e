"""Layers of heads: `fastlstm.RNN` with ``heads=K``, and weight_hh of H / K columns in the functions.

`tests/backends/test_properties.py` compares them with a loop of one product a head and step. Sizes are such that a head
is a part of a vector, one, several, or several and a part.
"""

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends import dispatch
from fastlstm.cells import gru_reset_before
from tests.helpers.layers import needs_native
from tests.helpers.modules import randn
from tests.helpers.numba import needs_unit
from tests.helpers.rnn import RNN, gadget, of_heads
from tests.helpers.tolerances import F32, F64, close


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, dtype) for backend in ("numba", "reference") for dtype in (F32, F64)),
        pytest.param("numba-bf16", F32, marks=needs_unit),
    ],
)
@pytest.mark.parametrize(("H", "K"), [(128, 4), (128, 2), (192, 3), (60, 4), (48, 2), (100, 5), (12, 12)])
@pytest.mark.parametrize(
    ("cell", "B", "I"),
    [
        *((cells.lstm, *size) for size in ((1, 3), (3, 200), (3, 3))),
        *((cell, B, 3) for cell in (of_heads, gru_reset_before) for B in (1, 3)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_is_not_finite_stays_within_its_head(cell, B, I, H, K, dtype, backend):
    """Neither an initial state nor the gradient of a last one changes a bit of another head."""
    rnn, D, k = fastlstm.RNN(cell, I, H, heads=K, dtype=dtype, backend=backend), H // K, K // 2
    x, h_0 = torch.randn(4, B, I, dtype=dtype), torch.randn(1, B, H, dtype=dtype)
    others = torch.ones(H, dtype=torch.bool)
    others[k * D : (k + 1) * D] = False
    results = []
    for of_h, of_dh in ((0.0, 0.0), (torch.inf, 0.0), (torch.nan, 0.0), (0.0, torch.inf), (0.0, torch.nan)):
        start, dh_n = h_0.clone(), torch.ones_like(h_0)
        start[0, 0, k * D + D // 2] += of_h
        dh_n[0, 0, k * D + D // 2] += of_dh
        start.requires_grad_()
        states = start, *(torch.zeros_like(start) for _ in cell.states[1:])
        with torch.no_grad():
            alone, _ = rnn(x, states)
        output, (h_n, *_) = rnn(x, states)
        of_products = (getattr(rnn, f"weight_{name}_l0") for name in cell.products)
        weights = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_hh_l0, *of_products
        dh_0, *dweights = torch.autograd.grad([output, h_n], [start, *weights], [torch.ones_like(output), dh_n])
        of_units = [a.view(len(a) // H, H, -1)[:, others] for a in dweights]
        results.append([alone[..., others], output[..., others], dh_0[..., others], *of_units])
    assert all(a.isfinite().all() for a in results[0])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_parameters():
    torch.manual_seed(0)
    rnn = fastlstm.RNN(gadget, 3, 12, 2, heads=3, bidirectional=True)
    assert repr(rnn) == "fastlstm.RNN(gadget, 3, 12, num_layers=2, bidirectional=True, heads=3)"
    assert "heads" not in repr(fastlstm.RNN(gadget, 3, 12, heads=1))
    for name, a in rnn.named_parameters():
        is_hh = name.startswith("weight_hh")
        assert not is_hh or a.shape == (12, 4)
        assert (12**-0.5 if is_hh else 0) < a.abs().max() <= (4**-0.5 if is_hh else 12**-0.5)
    before = rnn.weight_hh_l1.clone()
    rnn.reset_parameters()
    assert not torch.equal(rnn.weight_hh_l1, before)


def test_functions_read_the_heads_from_weight_hh():
    rnn, x = RNN(cells.lstm, 3, 12, heads=3), randn(4, 2, 3)
    output, last = rnn(x)
    got, got_last = fastlstm.lstm(x, None, *rnn.parameters())
    h, _ = fastlstm.lstm_cell(x[0], None, *rnn.parameters())
    close([got, *got_last, h], [output, *[a[0] for a in last], output[0]], "values")
    for shape in ((48, 5), (48, 0), (48,), (48, 24)):
        with pytest.raises(ValueError, match=r"weight_hh must have shape \(48, 12\), got"):
            fastlstm.lstm(x, None, rnn.weight_ih_l0, randn(*shape))


@pytest.mark.parametrize("backend", ["aten", pytest.param("native", marks=needs_native)])
def test_backends_say_why_they_cannot(backend):
    rnn, x = fastlstm.RNN(cells.lstm, 3, 12, heads=3, backend=backend), torch.randn(4, 2, 3)
    message = f"the {backend} backend runs layers of one head, got heads=3"
    for call in (lambda: rnn(x), lambda: rnn.step(x[0]), lambda: rnn.stream(2)(x[0]), lambda: rnn(x, lengths=[4, 1])):
        with pytest.raises(RuntimeError, match=message):
            call()


@needs_native
def test_without_numba_a_warning_says_what_runs(monkeypatch):
    """Even where native runs the cell."""
    monkeypatch.setattr(dispatch.module("numba"), "_INSTALLED", False)
    monkeypatch.setattr(dispatch, "_warned", set())
    rnn, x = RNN(cells.lstm, 3, 12, heads=3), randn(4, 2, 3)
    text = (
        r"auto runs layers of several heads of the cell lstm in plain PyTorch, since .*: the numba backend needs numba"
    )
    with pytest.warns(RuntimeWarning, match=text):
        output, _ = rnn(x)
    rnn.backend = "reference"
    assert torch.equal(output, rnn(x)[0])
