"""Where `fastlstm.LSTM` differs from `torch.nn.LSTM` on purpose."""

import re

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from tests.helpers.contract import WRONG_DTYPE
from tests.helpers.modules import pair

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def test_packed_input_is_checked():
    ours = fastlstm.LSTM(3, 4)
    x = torch.randn(5, 2, 4)
    equal, unequal = (pack_padded_sequence(x, torch.tensor(lengths)) for lengths in ([5, 5], [5, 3]))
    for packed in (equal, unequal):  # torch returns numbers where the lengths are equal
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
            ours(packed)
    with pytest.raises(ValueError, match=WRONG_DTYPE):
        ours(pack_padded_sequence(x[..., :3].double(), torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 1"):
        ours(pack_padded_sequence(x[..., 0], torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="found input tensor at meta and parameter tensor at cpu"):
        ours(PackedSequence(torch.zeros(8, 3, device="meta"), torch.tensor([2, 2, 2, 1, 1])))


@pytest.mark.parametrize(
    ("sizes", "rows"), [([3, 1, 2], 6), ([2, 3, 1], 6), ([3, 1, 3], 9), ([3, 2, 1], 9), ([3, 2, -1], 4), ([], 0)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_batch_sizes_of_packed_input_are_checked(sizes, rows, dtype):
    packed = PackedSequence(torch.randn(rows, 3), torch.tensor(sizes, dtype=dtype))
    with pytest.raises(RuntimeError, match=rf"must sum up to the rows of its data, {rows}, got {dtype} \["):
        fastlstm.LSTM(3, 4)(packed)


def test_batch_sizes_are_int64():
    packed = PackedSequence(torch.randn(6, 3), torch.tensor([3, 2, 1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="must be int64"):
        fastlstm.LSTM(3, 4)(packed)


@pytest.mark.parametrize(
    ("h_size", "c_size", "message"),
    [
        ((1, 3, 4), (1, 2, 4), "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        ((1, 2, 5), (1, 2, 5), "Expected hidden[0] size (1, 2, 4), got [1, 2, 5]"),
        ((2, 2, 4), (2, 2, 4), "Expected hidden[0] size (1, 2, 4), got [2, 2, 4]"),
        ((1, 2, 4), (1, 2, 5), "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
        ((2, 4), (2, 4), "hx and cx should also be 3-D but got (2-D, 2-D) tensors"),
    ],
)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3], [3, 5]])
def test_states_of_packed_input_are_checked(h_size, c_size, message, lengths):
    _, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    hx = (torch.zeros(h_size, dtype=torch.float64), torch.zeros(c_size, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ours(packed, hx)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("size", [(0, 2, 3), (0, 3), (0, 0, 3)])
def test_no_time_steps(size, proj_size, bidirectional):
    _, ours = pair(input_size=3, hidden_size=4, num_layers=2, proj_size=proj_size, bidirectional=bidirectional)
    x = torch.zeros(size, dtype=torch.float64)  # torch: "Expected sequence length to be larger than 0 in RNN"
    D, H_out, batch = 2 if bidirectional else 1, proj_size or 4, size[1:-1]
    output, (h_n, c_n) = ours(x)
    assert output.shape == (0, *batch, D * H_out)
    assert h_n.shape == (2 * D, *batch, H_out)
    assert not h_n.any()
    assert not c_n.any()
    h_0, c_0 = (torch.randn(2 * D, *batch, n, dtype=torch.float64) for n in (H_out, 4))
    output, (h_n, c_n), cells = ours(x, (h_0, c_0), return_cells=True)
    assert torch.equal(h_n, h_0)
    assert torch.equal(c_n, c_0)
    assert cells.shape == (0, *batch, D * 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [  # torch raises in other words, and promotes the last
        (lambda h: torch.stack([h, h]), TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got Tensor"),
        (lambda h: h, TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got Tensor"),
        (lambda h: {0: h, 1: h}, TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got dict"),
        (lambda h: (h,), RuntimeError, "lstm expects two hidden states"),
        (lambda h: (h, h, h), RuntimeError, "lstm expects two hidden states"),
        (lambda h: (h.float(), h), RuntimeError, "found input tensor with torch.float64 and hidden tensor with"),
        (lambda h: (h, h.float()), RuntimeError, "found input tensor with torch.float64 and hidden tensor with"),
    ],
)
def test_unsuitable_states(make, error, message):
    _, ours = pair(input_size=3, hidden_size=4)
    x, hx = torch.randn(5, 2, 3, dtype=torch.float64), make(torch.zeros(1, 2, 4, dtype=torch.float64))
    with pytest.raises(error, match=message):
        ours(x, hx)
