"""Weights rounded to int8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlstm import quantize_weight


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 1 << 30))
def test_the_numbers_stand_for_the_weight(rows, columns, exponent, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    numbers, scale = quantize_weight(weight)
    assert (numbers.dtype, numbers.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (rows,))
    assert numbers.abs().amax(1).eq(127).all()
    # half of a step, and a rounding each of the scale and of the quotient
    step = scale.double().unsqueeze(1)
    assert ((numbers * step - weight.double()).abs() <= 0.5001 * step).all()


def test_halves_go_to_even_numbers():
    numbers, scale = quantize_weight(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert numbers.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("row", [[0.0, 0.0, -0.0], [1e-45, 0.0, -1e-45]])
def test_rows_of_next_to_nothing(row):
    numbers, scale = quantize_weight(torch.tensor([row, [1.0, 2.0, -3.0]]))
    assert scale[0] > 0
    assert (numbers[0] * scale[0] - torch.tensor(row)).abs().max() < 1e-37
    assert numbers[1].tolist() == [42, 85, -127]


def test_a_weight_without_columns():
    numbers, scale = quantize_weight(torch.empty(3, 0))
    assert numbers.shape == (3, 0)
    assert scale.tolist() == [1.0] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(value):
    with pytest.raises(ValueError, match=r"encoder\.weight must be finite to be rounded to int8"):
        quantize_weight(torch.tensor([[1.0, value]]), "encoder.weight")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1, 65537)])
def test_other_shapes(shape):
    with pytest.raises(ValueError, match=r"weight must have shape \(rows, columns\) with columns <= 65536, got"):
        quantize_weight(torch.empty(shape))


def test_meta():
    with pytest.raises(
        ValueError, match=r"encoder\.weight must be on a device that holds numbers .* got the device meta"
    ):
        quantize_weight(torch.empty(3, 4, device="meta"), "encoder.weight")
