"""Batches sorted by length, as packed ones are: rows past their end are left out of products, and of nothing else."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm.backends import dispatch
from fastlstm.backends.numba.kernels.threads import team_rows
from fastlstm.layers import packing
from tests.helpers.layers import Layer
from tests.helpers.numba import compiled, needs_unit

# Of the largest value: float64's roundings of a few hundred terms, and of float32's, in sums over up to 1000 rows
# T, B, I, H: rows split between threads or units; chunks of one step, of several, of half a step's rows, and few rows
SIZES = [(9, 70, 5, 40), (6, 64, 33, 20), (11, 16, 20, 37), (3, 130, 4, 16), (5, 200, 3, 7), (4, 6, 40, 150)]
SIZES += [(3, 3, 2, 5)]


def sorted_layer(size, reverse=False, resets=False):
    layer = Layer(*size, reverse=reverse)
    T, B = size[:2]
    layer.lengths = torch.randint(0, T + 1, (B,)).sort(descending=True).values
    if resets:
        layer.reset = torch.rand(T, B) < 0.2
    return layer


@pytest.mark.parametrize("backend", ["numba", pytest.param("numba-bf16", marks=needs_unit)])
@pytest.mark.parametrize("size", SIZES)
def test_rows_past_their_end_are_not_computed(size, backend, poisoned):
    """Their gates are zero, which no sigmoid is."""
    layer = sorted_layer(size)
    record = layer.record(layer.to(torch.float32, requires_grad=False))
    run = dispatch.module(backend).forward(record._replace(weights=(*record.weights[:2], None, None)), True)
    h, (c, gates) = run.h, run.saved
    rows = (gates == 0).all(-1).all(1)  # (T,B)
    assert not any(a.isnan().any() for a in (h, c, gates))
    assert torch.equal(rows, torch.arange(len(h)).unsqueeze(1) >= layer.lengths)


def test_what_is_not_put_in_order(monkeypatch):
    assert packing.longest_first(torch.tensor([1, 4, 2]), 4, 500, 500) is None  # three rows of four steps
    monkeypatch.setattr(packing, "MIN_SORT_WORK", 0)
    lengths = torch.tensor([1, 4, 2])
    assert packing.longest_first(lengths, 4, 500, 9) is None  # narrow
    monkeypatch.setattr(packing, "MIN_SORT_UNITS", 1)
    assert packing.longest_first(lengths, 4, 5, 9).tolist() == [1, 2, 0]
    assert packing.longest_first(torch.tensor([4, 2, 1]), 4, 5, 9) is None  # it is in order
    assert packing.longest_first(torch.tensor([4, 3, 4]), 4, 5, 9) is None  # little to leave out
    assert packing.longest_first(lengths.to("meta"), 4, 5, 9) is None
    lstm, x = fastlstm.LSTM(5, 9), torch.randn(4, 3, 5)
    want = lstm(x, lengths=lengths)[0]
    x_each, lengths_each = x.unsqueeze(0).repeat(2, 1, 1, 1), torch.stack((lengths, lengths))
    torch.testing.assert_close(torch.func.vmap(lambda x, n: lstm(x, lengths=n)[0])(x_each, lengths_each)[1], want)


def test_every_row_belongs_to_one_part():
    """Parts of sorted lengths, however many, follow each other and have like shares of the steps."""
    for _ in range(50):
        T, B, parts = (int(torch.randint(1, n, ())) for n in (9, 40, 12))
        unit = int(2 ** torch.randint(0, 4, ()))
        lengths = torch.randint(0, T + 1, (B,)).sort(descending=True).values
        rows_of_part = compiled(team_rows, B=B, T=T, lengths=lengths.data_ptr(), group_rows=unit)
        bounds = [rows_of_part(part, parts) for part in range(parts)]
        assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
        assert bounds[-1][1] == B
        for first, last in bounds:
            assert first <= last
            assert first % max(2, unit) == 0 or first == B
            if int((lengths < T).sum()):
                assert int(lengths[first:last].sum()) <= int(lengths.sum()) / parts + max(2, unit) * T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_input_of_16_bits_under_autocast(dtype):
    lstm, lengths = fastlstm.LSTM(5, 7, num_layers=2), torch.tensor([6, 4, 2])
    data = pack_padded_sequence(torch.randn(6, 3, 5).to(dtype), lengths)
    with torch.autocast("cpu", torch.bfloat16):
        output = lstm(data)[0].data
        assert torch.equal(output, lstm(data._replace(data=data.data.bfloat16()))[0].data)


def test_packed_input_whatever_the_default_device_is():
    lstm, data = fastlstm.LSTM(3, 4), pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    want = lstm(data)[0].data
    with torch.device("meta"):
        assert torch.equal(lstm(data)[0].data, want)
