"""The Numba backend's kernels on bfloat16 as it lies in memory: the same bits as through float32 copies."""

import pytest
import torch

import fastlstm
from tests.helpers.calls import CPU, Calls
from tests.helpers.cases import CELLS
from tests.helpers.modules import flat
from tests.helpers.numba import needs_unit, primitive
from tests.helpers.tolerances import equal

# what is not written is found
pytestmark = [needs_unit, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 16, 17, 33, 47, 64])
def test_rows_are_widened_and_narrowed(width):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.3895e38, 1.0039, -1.0117])
    x = torch.cat([special, torch.randn(3 * 70 - 8)]).reshape(3, 70)
    wide, short = torch.full((3, 80), 7.0), torch.full((3, 70), 7.0, dtype=torch.bfloat16)
    primitive("narrow", 1)(3, width, x.data_ptr(), 280, short.data_ptr(), 140)
    expected = torch.full_like(short, 7.0)
    expected[:, :width] = x.bfloat16()[:, :width]
    torch.testing.assert_close(short, expected, rtol=0, atol=0, equal_nan=True)
    primitive("widen", 1)(3, width, width + 5, short.data_ptr(), 140, wide.data_ptr(), 320)
    assert torch.equal(wide[:, width + 5 :], torch.full((3, 75 - width), 7.0))
    assert torch.equal(wide[:, width : width + 5], torch.zeros(3, 5))
    torch.testing.assert_close(wide[:, :width], short[:, :width].float(), rtol=0, atol=0, equal_nan=True)


def test_no_float32_copy_of_the_weights_is_kept(monkeypatch):
    lstm, packed = fastlstm.LSTM(300, 200, dtype=torch.bfloat16), Calls(monkeypatch, *CPU).packed
    with torch.no_grad():
        lstm(torch.zeros(2, 3, 300, dtype=torch.bfloat16))
    assert packed
    assert sum(kept().nbytes for kept in packed) < 3 * 4 * 200 * (300 + 200)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "layer_norm_gru", "slstm", "peephole_lstm"])
def test_autocast_takes_bfloat16_as_it_is(name, both, ended):
    """float32 weights under autocast: what a module of bfloat16 computes, with gradients and without."""
    T, B, I, H = 6, 5, 12, 20
    rnn, narrow = (
        fastlstm.RNN(CELLS[name], I, H, num_layers=2, bidirectional=both, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    narrow.load_state_dict(rnn.state_dict())
    x, options = torch.randn(T, B, I), {"lengths": torch.randint(1, T + 1, (B,))} if ended else {}
    with torch.autocast("cpu", torch.bfloat16):
        got = flat(rnn(x, **options))
        with torch.no_grad():
            without = flat(rnn(x, **options))
    want = flat(narrow(x.bfloat16(), **options))
    equal(got, want)
    equal(without, want)
    ours, expected = (
        torch.autograd.grad(a[0].float().sum(), list(m.parameters())) for a, m in ((got, rnn), (want, narrow))
    )
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())
