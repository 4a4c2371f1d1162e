"""Weights that stay packed as autocast casts them, and weights that do not stay packed."""

import gc

import pytest
import torch

import fastlstm
from tests.helpers.modules import assert_same_bits

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_calls_under_autocast_are_those_with_gradients(options, given):
    """Weights are kept as each dtype casts them, beside those of calls without autocast."""
    lstm, x, D = fastlstm.LSTM(5, 7, **options), torch.randn(3, 3, 5), 1 + options.get("bidirectional", False)
    hx = (torch.randn(D, 3, 7), torch.randn(D, 3, 7)) if given else None
    with torch.no_grad():
        plain = lstm(x, hx)[0]
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                first, short, of_cast = lstm(x, hx), lstm(x, hx), lstm(x.to(dtype), hx)
                with torch.enable_grad():
                    long = lstm(x, hx)
                for want, *others in zip(*([y, *states] for y, states in (long, first, short, of_cast)), strict=True):
                    assert want.dtype == dtype
                    for got in others:
                        assert got.dtype == dtype
                        assert torch.equal(got, want)
                assert lstm(x.double(), None)[0].dtype == torch.float64  # which autocast leaves alone
                with pytest.raises(RuntimeError, match="5"):
                    lstm(torch.randn(3, 3, 4), hx)
                with pytest.raises(RuntimeError, match=r"hidden\[0\]"):
                    lstm(x, (torch.randn(D, 2, 7), torch.randn(D, 2, 7)))
        assert torch.equal(lstm(x, hx)[0], plain)


@pytest.mark.parametrize("narrow", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_parameters_of_two_dtypes_under_autocast(narrow):
    """They are cast at every call: what looks for changes reads all of them as one dtype."""
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
    parameter = getattr(lstm, narrow)
    parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        want = lstm(x)[0]
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(lstm(x)[0], want)


def test_a_change_of_float64_weights_under_autocast_is_seen():
    """Of which the kernel compares no more than half."""
    lstm, x = fastlstm.LSTM(5, 7).double(), torch.randn(3, 2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lstm.weight_ih_l0.fill_(0.5)
        before = lstm(x)[0]
        assert torch.equal(lstm(x)[0], before)
        lstm.weight_ih_l0.data.fill_(0.25)
        assert not torch.equal(lstm(x)[0], before)


def test_a_cell_under_autocast_takes_what_its_weights_do():
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        cell = fastlstm.LSTMCell(5, 7, dtype=dtype)
        x, hx = torch.randn(2, 5, dtype=dtype), (torch.randn(2, 7, dtype=dtype), torch.randn(2, 7, dtype=dtype))
        with torch.no_grad():
            want, _ = cell(x, hx), cell(x, hx)
            with torch.autocast("cpu", torch.bfloat16):
                for given in (x, x.to(other)):
                    found = cell(given, hx)
                    assert found[0].dtype == dtype
                    same = given is x or dtype == torch.bfloat16
                    assert torch.equal(found[0], want[0] if same else cell(given.float(), hx)[0])


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_weights_that_are_not_contiguous_are_not_packed(name, calls):
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
    strided = torch.randn(7, 28).mT if name == "weight_hh_l0" else torch.randn(56)[::2]
    setattr(lstm, name, torch.nn.Parameter(strided))
    with torch.no_grad():
        lstm(x)
    getattr(lstm, name).data.mul_(3)
    assert_same_bits(lstm, x)
    assert calls.count("pack") == 0


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_a_move_drops_the_packed_weights(kind, calls):
    module = kind(5, 7)
    with torch.no_grad():
        module(torch.randn(3, 5))
    (kept,) = calls.packed
    assert kept() is not None
    module.to("meta")
    gc.collect()
    assert kept() is None
