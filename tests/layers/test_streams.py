"""`Module.stream`: steps on its own states and on those of a caller have the bits of the module's own `step`."""

import copy
import os

import pytest
import torch
from torch import nn

import fastlstm
from tests.helpers.layers import needs_native
from tests.helpers.memory import resident
from tests.helpers.modules import flat
from tests.helpers.streams import check_bits
from tests.helpers.tolerances import equal

LAYERS = [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman]
CELLS = [fastlstm.LSTMCell, fastlstm.GRUCell, fastlstm.ElmanCell]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("kind", [*LAYERS[:2], *CELLS[:2]])
def test_int8(kind, activations, backend):
    check_bits(fastlstm.quantize(nn.ModuleList([kind(13, 36, backend=backend)]), activations=activations)[0], 4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own layer says so
def test_projections_zoneout_and_dropout_run_as_in_eval_mode():
    for module in (
        fastlstm.LSTM(5, 8, proj_size=3),
        fastlstm.LSTM(5, 8, zoneout=0.3),
        fastlstm.GRU(5, 8, recurrent_dropout=0.5),
        fastlstm.LSTM(5, 8, num_layers=2, dropout=0.5),
    ):
        stream = module.stream(2)  # made in training mode
        check_bits(copy.deepcopy(module).eval(), 2, stream)
        assert module.training


def test_states_of_every_layout_and_of_inference_mode():
    module, x = fastlstm.LSTM(4, 6, 2), torch.randn(3, 4)
    stream, wide = module.stream(), torch.randn(2, 2, 6, 3)
    states = tuple(a.transpose(1, 2) for a in wide)
    with torch.no_grad():
        expected = flat(module.step(x, states))
    negated = tuple(torch.complex(-a, -a).conj().imag for a in wide.transpose(2, 3).contiguous())
    for state in (states, [*states], tuple(a.contiguous() for a in states), negated, states):
        equal(flat(stream.step(x, state)), expected)
        with torch.inference_mode():
            equal(flat(stream.step(x + 0, tuple(a + 0 for a in state))), expected)


def test_strided_inputs_and_nan():
    module = fastlstm.GRU(4, 6)
    stream, wide = module.stream(2), torch.randn(4, 2)
    expected = module.step(wide.t())[0].detach()
    assert torch.equal(stream(wide.t()), expected)
    assert stream(torch.full((2, 4), float("nan"))).isnan().all()


class Scaled(fastlstm.LSTM):
    def step(self, x_t, state=None):
        return super().step(x_t * 10, state)


class Doubled(fastlstm.GRUCell):
    def forward(self, input, hx=None):  # noqa: A002
        return super().forward(input * 2, hx)


@pytest.mark.parametrize("backend", ["numba", "native"])
def test_code_of_a_subclass_runs(backend):
    for module in (Scaled(4, 6, backend=backend), Doubled(4, 6, backend=backend)):
        check_bits(module, 2)


def test_many_numbers_of_rows():
    """A stream keeps what it has prepared for some of them."""
    module = fastlstm.GRUCell(3, 5)
    stream = module.stream()
    for rows in [*range(1, 80), 1, 2]:
        x = torch.randn(rows, 3)
        with torch.no_grad():
            assert torch.equal(stream.step(x)[0], module(x))


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_many_numbers_of_rows_keep_few_packed_weights():
    """With the backend `native` the steps of each number of rows pack the weights for themselves, in 8 MB here."""
    stream, x = fastlstm.LSTM(512, 512, backend="native").stream(), torch.zeros(40, 512)
    before = resident()
    for rows in range(1, 40):
        stream.step(x[:rows])
    assert resident() - before < 100 << 20  # all would take 320 MB
