"""The Numba backend's kernels on bfloat16 as it lies in memory: the same bits as through float32 copies."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from tests.helpers.calls import CPU, Calls
from tests.helpers.modules import called, inputs_of, results, same
from tests.helpers.numba import needs_unit, primitive
from tests.helpers.threads import on_any_split, splits
from tests.helpers.tolerances import equal

# what is not written is found
pytestmark = [needs_unit, pytest.mark.usefixtures("poisoned")]
SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 100])


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


@settings(max_examples=120, deadline=None)  # the first call compiles
@given(
    T=st.sampled_from([1, 2, 5, 33]), B=SIZES, I=SIZES, H=SIZES, both=st.booleans(), masked=st.booleans(),
    states=st.booleans(), transposed=st.booleans(), threads=splits,
)  # fmt: skip
@on_any_split
def test_the_kernels_take_bfloat16_as_it_is(T, B, I, H, both, masked, states, transposed):
    module = fastlstm.LSTM(I, H, bidirectional=both, dtype=torch.bfloat16, backend="numba-bf16")
    inputs, masks = inputs_of(module, T, B, states), {}
    directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
    if transposed:
        inputs[0], directions[0] = (a.transpose(0, 1).contiguous().transpose(0, 1) for a in (inputs[0], directions[0]))
    if masked:
        masks["lengths"] = torch.randint(0, T + 1, (B,))
        masks |= {} if both else {"reset": torch.rand(T, B) < 0.3}
    want = results(copy.deepcopy(module).float(), inputs, directions, **masks)
    got = results(module, inputs, directions, **masks)
    assert {a.dtype for a in got} == {torch.bfloat16}
    if both:  # the gradient of x is a sum of two that are rounded
        del got[len(directions)], want[len(directions)]
    assert same(got, [a.bfloat16() for a in want])


@settings(max_examples=60, deadline=None)
@given(T=st.sampled_from([1, 2, 5]), B=SIZES, I=SIZES, H=SIZES, both=st.booleans(), ended=st.booleans(), threads=splits)
@on_any_split
def test_packed_weights_take_bfloat16_as_it_is(T, B, I, H, both, ended):
    """A module's inference, its outputs side by side and zero past the end, is what its training gives."""
    lstm = fastlstm.LSTM(I, H, bidirectional=both, dtype=torch.bfloat16)
    x, options = torch.randn(T, B, I, dtype=torch.bfloat16), {}
    if ended:
        options["lengths"] = torch.randint(1, T + 1, (B,))
    trained, last = lstm(x, **options)
    with torch.no_grad():
        for _ in range(2):  # packed by the first
            output, states = lstm(x, **options)
            equal([output, *states], [trained, *last])


def test_no_float32_copy_of_the_weights_is_kept(monkeypatch):
    lstm, packed = fastlstm.LSTM(300, 200, dtype=torch.bfloat16), Calls(monkeypatch, *CPU).packed
    with torch.no_grad():
        lstm(torch.zeros(2, 3, 300, dtype=torch.bfloat16))
    assert packed
    assert sum(kept().nbytes for kept in packed) < 3 * 4 * 200 * (300 + 200)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_autocast_takes_bfloat16_as_it_is(both, ended):
    """float32 weights under autocast: what a module of bfloat16 computes, with gradients and without."""
    T, B, I, H = 6, 5, 12, 20
    lstm = fastlstm.LSTM(I, H, num_layers=2, bidirectional=both)
    narrow = fastlstm.LSTM(I, H, num_layers=2, bidirectional=both, dtype=torch.bfloat16)
    narrow.load_state_dict(lstm.state_dict())
    x, options = torch.randn(T, B, I), {"lengths": torch.randint(1, T + 1, (B,))} if ended else {}
    with torch.autocast("cpu", torch.bfloat16):
        got, states = lstm(x, **options)
        with torch.no_grad():
            without, ends = lstm(x, **options)
    want, expected = narrow(x.bfloat16(), **options)
    equal([got, *states], [want, *expected])
    equal([without, *ends], [want, *expected])
    ours = torch.autograd.grad(got.float().sum(), list(lstm.parameters()))
    for a, b in zip(ours, torch.autograd.grad(want.float().sum(), list(narrow.parameters()))):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())
