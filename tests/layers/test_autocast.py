"""The types of results under a CPU's autocast, beside those of torch's modules."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from tests.helpers.modules import OURS, flat, pair
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch says so where oneDNN is turned off

F32 = torch.float32
CASTS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def both(theirs, ours, dtype, *arguments):
    """The tensors that either module returns under autocast. oneDNN has no LSTM of 16 bits for every processor."""
    with torch.autocast("cpu", dtype), torch.backends.mkldnn.flags(enabled=False):
        return flat(theirs(*arguments)), flat(ours(*arguments))


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        a = a if a.dtype.itemsize == 2 else a.bfloat16()  # torch's products are rounded, whatever the result's type
        close(a, b.double(), "cast")


@CASTS
@pytest.mark.parametrize("sizes", [(4,), ()], ids=["rows", "one-row"])
@pytest.mark.parametrize("torch_s", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_have_the_types_of_torchs_cells(torch_s, sizes, dtype):
    """For inputs and states of either type, and for an LSTM's states of two types."""
    for weights in (F32, dtype):
        theirs, ours = pair(3, 5, like=torch_s, exact=weights, dtype=weights)
        for kind, *kinds in itertools.product((F32, dtype), (None, F32, dtype), (F32, dtype)):
            x, h, c = (torch.randn(*sizes, size) for size in (3, 5, 5))
            of_lstm = torch_s is nn.LSTMCell
            hx = None if kinds[0] is None else (h.to(kinds[0]), c.to(kinds[1])) if of_lstm else h.to(kinds[0])
            want, got = both(theirs, ours, dtype, x.to(kind), hx)
            assert [a.dtype for a in got] == [a.dtype for a in want], (weights, kind, kinds)
            assert_close(got, want)


def test_a_cell_in_float64_stays_in_it():
    for torch_s in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        theirs, ours = pair(3, 5, like=torch_s)
        want, got = both(theirs, ours, torch.bfloat16, torch.randn(4, 3, dtype=torch.float64))
        close(got, want, "values")


@pytest.mark.parametrize("torch_s", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_compiled_cell_has_these_types_too(torch_s):
    cell, x = OURS[torch_s](3, 5), torch.randn(4, 3)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return cell(x)

    got, want = flat(torch.compile(run, backend="aot_eager", fullgraph=True)(x)), flat(run(x))
    assert [a.dtype for a in got] == [a.dtype for a in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


FORMS = {
    "batch": lambda x: x,
    "one-sequence": lambda x: x[:, 0],
    "packed": lambda x: pack_padded_sequence(x, torch.tensor([6, 4, 3, 1])),
    "packed-of-one-length": lambda x: pack_padded_sequence(x, torch.tensor([6, 6, 6, 6])),
}

STACKED = {"num_layers": 2, "bidirectional": True}
LAYERS = [(kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in ({}, STACKED)]
LAYERS.append((nn.LSTM, {"proj_size": 2}))


@CASTS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("torch_s", "options"), LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_layers_have_the_type_of_autocast(torch_s, options, form, dtype):
    """In every form of input. Those of torch have it on a GPU, but on a CPU partly that of the states."""
    theirs, ours = pair(3, 5, like=torch_s, exact=F32, dtype=F32, **options)
    count = theirs.num_layers * (2 if theirs.bidirectional else 1)
    for kind, of_states in itertools.product((F32, dtype), (None, F32, dtype)):
        x, hx = FORMS[form](torch.randn(6, 4, 3).to(kind)), None
        if of_states is not None:
            rows = () if form == "one-sequence" else (4,)
            h, c = (torch.randn(count, *rows, size).to(of_states) for size in (theirs.proj_size or 5, 5))
            hx = (h, c) if torch_s is nn.LSTM else h
        want, got = both(theirs, ours, dtype, x, hx)
        assert {a.dtype for a in got} == {dtype}
        assert {a.dtype for a in want} <= {dtype, of_states or kind}
        assert_close(got, want)


def test_other_layers_have_the_type_of_autocast():
    x = torch.randn(6, 4, 3)
    made = (
        fastlstm.RNN(fastlstm.cells.slstm, 3, 5),
        fastlstm.LSTM(3, 5, recurrent_dropout=0.5),
        fastlstm.GRU(3, 5, zoneout=0.3),
        fastlstm.quantize(fastlstm.GRU(3, 5)),
    )
    for module in made:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert {a.dtype for a in flat(module(x))} == {torch.bfloat16}
