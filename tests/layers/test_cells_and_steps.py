"""Every cell state, and one step at a time."""

import gc
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from tests.helpers.contract import LAYERS
from tests.helpers.modules import assert_same_gradients, both_backends, pair, randn
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
LSTM, GRU = partial(fastlstm.LSTM, 3, 5), partial(fastlstm.GRU, 3, 5)


def test_cells_of_packed_input():
    _, ours = pair(3, 5, bidirectional=True)
    x, lengths = randn(6, 3, 3), torch.tensor([2, 6, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    cells, _ = pad_packed_sequence(ours(packed, return_cells=True)[2])
    expected = ours(x, lengths=lengths, return_cells=True)[2]
    for b, n in enumerate(lengths):
        close(cells[:n, b], expected[:n, b], "sums")


@both_backends
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("torch_s", "arguments"),
    [
        *((nn.LSTM, arguments) for arguments in ({}, {"num_layers": 3}, {"proj_size": 2}, {"bias": False})),
        *((torch_s, {"num_layers": 2} | options) for torch_s, options in LAYERS.values()),
    ],
)
def test_steps_equal_forward(backend, torch_s, arguments, batched):
    if ("proj_size" in arguments or torch_s is nn.RNN) and backend == "native":
        backend = "reference"  # native has neither projections nor this cell
    theirs, ours = pair(3, 5, backend=backend, like=torch_s, **arguments)
    x, outputs, state = randn(6, *(4,) * batched, 3), [], None
    expected, ends = theirs(x)
    for x_t in x:
        h_t, state = ours.step(x_t, state)
        outputs.append(h_t)
    states, ends = (a if torch_s is nn.LSTM else [a] for a in (state, ends))
    assert_same_gradients(ours, theirs, [torch.stack(outputs), *states], [expected, *ends], [x])


def test_step_drops_as_forward():
    _, ours = pair(3, 5, 3, dropout=0.5)
    x = randn(4, 3)
    torch.manual_seed(1)
    expected, ends = ours(x.unsqueeze(0))
    torch.manual_seed(1)
    output, state = ours.step(x)
    close(output, expected[0], "sums")
    close(state, ends, "sums")


@pytest.mark.parametrize(
    ("module", "x_t", "state", "error", "message"),
    [
        (LSTM(bidirectional=True), (2, 3), None, ValueError, "step needs a module of one direction"),
        (LSTM(), (1, 2, 3), None, ValueError, "Expected x_t to be 1D or 2D, got 3D instead"),
        (LSTM(), (2, 4), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        (LSTM(), (4,), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        (LSTM(), (2, 3), ((1, 2, 5),), RuntimeError, "lstm expects two hidden states"),
        (LSTM(), (2, 3), ((2, 5), (2, 5)), RuntimeError, "Expected state[0] size (1, 2, 5), got [2, 5]"),
        (LSTM(), (2, 3), ((1, 2, 5), (1, 3, 5)), RuntimeError, "Expected state[1] size (1, 2, 5), got [1, 3, 5]"),
        (LSTM(), (3,), ((1, 1, 5), (1, 1, 5)), RuntimeError, "Expected state[0] size (1, 5), got [1, 1, 5]"),
        (LSTM(dtype=torch.float64), (2, 3), None, ValueError, "torch.float32"),
        (LSTM(device="meta"), (2, 3), None, RuntimeError, "found input tensor at cpu and parameter tensor at meta"),
        (GRU(bidirectional=True), (2, 3), None, ValueError, "step needs a module of one direction"),
        (GRU(), (1, 2, 3), None, ValueError, "GRU.step: Expected x_t to be 1D or 2D, got 3D instead"),
        (GRU(), (2, 4), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        (GRU(), (2, 3), (2, 5), RuntimeError, "Expected state size (1, 2, 5), got [2, 5]"),
        (GRU(), (3,), (1, 1, 5), RuntimeError, "Expected state size (1, 5), got [1, 1, 5]"),
    ],
)
def test_bad_steps(module, x_t, state, error, message):
    if state is not None:
        state = torch.zeros(state) if isinstance(state[0], int) else tuple(map(torch.zeros, state))
    with pytest.raises(error, match=re.escape(message)):
        module.step(torch.zeros(x_t), state)


def test_step_gives_an_output_of_its_own():
    lstm = fastlstm.LSTM(3, 4)
    with torch.no_grad():
        h, (h_n, _) = lstm.step(torch.randn(2, 3))
        before = h_n.clone()
        h.zero_()
    assert torch.equal(h_n, before)


def test_16_bit_steps_keep_no_large_buffers():
    """What a step of many rows is computed in goes with it."""

    def large():
        return {id(a) for a in gc.get_objects() if type(a) is torch.Tensor and a.nbytes > 200_000}

    cell = fastlstm.LSTMCell(64, 64, dtype=torch.bfloat16)
    gc.collect()
    before = large()
    with torch.no_grad():
        for B in (1, 2000, 1, 2001, 2000):
            x, h, c = (torch.zeros(B, 64, dtype=torch.bfloat16) for _ in range(3))
            for _ in range(2):  # the second finds the weights packed
                cell(x, (h, c))
    assert large() > before
    del x, h, c
    gc.collect()
    assert large() <= before
