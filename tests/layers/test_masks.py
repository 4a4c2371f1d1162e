"""Lengths equal packed sequences, in outputs and gradients, and padding may be written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm.cells import lstm as LSTM
from tests.helpers.contract import LAYERS
from tests.helpers.layers import needs_native
from tests.helpers.modules import assert_same_gradients, both_backends, pair, randn
from tests.helpers.threads import on_any_split, splits
from tests.helpers.tolerances import close, equal

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def with_tuples(module):
    """The module as a function of x and a tuple of states, which returns the output and a tuple of the last states."""

    def call(x, states, **masks):
        output, last = module(x, states if len(states) > 1 else states[0], **masks)
        return output, last if isinstance(last, tuple) else (last,)

    return call


each_kind = pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "numba") for kind in LAYERS),
        ("LSTM", "reference"),
        *(pytest.param(kind, "native", marks=needs_native) for kind in ("LSTM", "GRU")),
    ],
)


@both_backends
@pytest.mark.parametrize("called", ["module", "bidirectional module", "function", "RNN"])
def test_padding_of_results_may_be_written(backend, called):
    """The backward pass reads the output and the cell states, so those that a caller gets are copies."""
    options, lengths = {"bidirectional": called == "bidirectional module", "backend": backend}, torch.tensor([5, 2])
    module = fastlstm.RNN(LSTM, 3, 4, **options) if called == "RNN" else fastlstm.LSTM(3, 4, **options)
    x, gradients = torch.randn(5, 2, 3), []
    for fill in (None, 7.0):
        if called == "function":
            of_function = {"lengths": lengths, "return_cells": True, "backend": backend}
            output, _, cells = fastlstm.lstm(x, None, *module.parameters(), **of_function)
        elif called == "RNN":
            output, _, (_, cells) = module(x, lengths=lengths, return_states=True)
        else:
            output, _, cells = module(x, lengths=lengths, return_cells=True)
        loss = (output[:2] + 2 * cells[:2]).sum()
        if fill is not None:
            output[2:, 1], cells[2:, 1] = fill, fill
        gradients.append(torch.autograd.grad(loss, module.parameters()))
    equal(*gradients)


INTEGER_TYPES = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@each_kind
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3), st.booleans(), st.booleans(),
    st.booleans(), st.sampled_from(INTEGER_TYPES), st.integers(0, 2**31), splits,
)  # fmt: skip
@on_any_split
def test_lengths_equal_packed(kind, backend, lengths, layers, bidirectional, batch_first, with_states, dtype, seed):
    torch.manual_seed(seed)
    torch_s, options = LAYERS[kind]
    theirs, ours = pair(3, 5, layers, bidirectional=bidirectional, like=torch_s, backend=backend, **options)
    T, B, D = 6, len(lengths), 2 if bidirectional else 1
    x, states = randn(T, B, 3), [randn(layers * D, B, 5) for _ in range(2 if kind == "LSTM" else 1)]
    states = states if with_states else [torch.zeros_like(a, requires_grad=True) for a in states]
    expected, ends = x.sum() * x.new_zeros(T, B, 5 * D), [a.clone() for a in states]
    rows = [b for b in range(B) if lengths[b]]  # torch takes no empty row: its output is zero, its state what it was
    if rows:
        packed = pack_padded_sequence(x[:, rows], torch.tensor([lengths[b] for b in rows]), enforce_sorted=False)
        output, last = with_tuples(theirs)(packed, tuple(a[:, rows] for a in states))
        output, _ = pad_packed_sequence(output, total_length=T)
        expected = expected.index_copy(1, torch.tensor(rows), output)
        ends = [a.index_copy(1, torch.tensor(rows), b) for a, b in zip(ends, last, strict=True)]
    ours.batch_first = batch_first
    given = tuple(states) if with_states else (None,)
    got, last = with_tuples(ours)(
        x.transpose(0, 1) if batch_first else x, given, lengths=torch.tensor(lengths, dtype=dtype)
    )
    got = got.transpose(0, 1) if batch_first else got
    for b in range(B):
        assert not got[lengths[b] :, b].any()
    assert_same_gradients(ours, theirs, [got, *last], [expected, *ends], [x, *states] if with_states else [x])


def test_unbatched_reset_and_lengths():
    _, ours = pair(3, 5, batch_first=True)
    x, reset = randn(6, 3), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    expected, (h_n, c_n), cells = ours(
        x.unsqueeze(0), reset=reset.unsqueeze(0), lengths=torch.tensor([5]), return_cells=True
    )
    got = ours(x, reset=reset, lengths=torch.tensor(5), return_cells=True)
    close([got[0], *got[1], got[2]], [expected[0], h_n[:, 0], c_n[:, 0], cells[0]], "sums")


def test_masks_wait_for_no_device():
    """Fake tensors have no values: reading one, or a shape that depends on one, raises there."""
    with FakeTensorMode():
        lstm = fastlstm.LSTM(3, 5, 2)
        x = torch.empty(6, 4, 3)
        output, (h_n, _) = lstm(x, lengths=torch.empty(4, dtype=torch.int64), reset=torch.empty(6, 4, dtype=torch.bool))
        assert output.shape == (6, 4, 5)
        assert h_n.shape == (2, 4, 5)
