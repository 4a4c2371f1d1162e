"""The messages of the functions: one layer in one direction. Modules have theirs in test_contract_* and test_mask_*."""

import re

import numpy as np
import pytest
import torch

import fastlstm
from fastlstm import lstm_cell

T, B, I, H, P = 4, 2, 3, 5, 2


def z(*size, **kwargs):
    return torch.zeros(size, **kwargs)


def layer(**replaced):
    """The arguments of a good call, without projection, with some replaced."""
    sizes = {"x": (T, B, I), "weight_ih": (4 * H, I), "weight_hh": (4 * H, H), "bias_ih": (4 * H,), "bias_hh": (4 * H,)}
    return {name: z(*size) for name, size in sizes.items()} | {"hx": (z(B, H), z(B, H))} | replaced


def projected(**replaced):
    return layer(hx=(z(B, P), z(B, H)), weight_hh=z(4 * H, P), weight_hr=z(P, H)) | replaced


@pytest.mark.parametrize(
    "arguments",
    [
        layer(),
        layer(hx=None, bias_ih=None, bias_hh=None),
        layer(x=z(0, 0, I), hx=None, lengths=z(0, dtype=torch.int64), reset=z(0, 0, dtype=torch.bool)),
        projected(),
        projected(hx=None),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_good_layers(arguments):
    output, _ = fastlstm.lstm(**arguments)
    assert not output.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (layer(x=z(B, I)), "x must have shape (T, B, I), got (2, 3)"),
        (layer(weight_ih=z(4 * H, 7)), "weight_ih must have shape (4H, I) with I = 3, got (20, 7)"),
        (layer(weight_ih=z(18, I)), "weight_ih must have shape (4H, I) with I = 3, got (18, 3)"),
        (layer(weight_ih=z(4 * H)), "weight_ih must have shape (4H, I) with I = 3, got (20,)"),
        (layer(weight_ih=z(0, I), weight_hh=z(0, 0)), "must have shape (4H, I) with H of 1 or more, got (0, 3)"),
        (layer(weight_hh=z(4 * H, 6)), "weight_hh must have shape (20, 5), got (20, 6)"),
        (layer(weight_hh=z(H, 4 * H)), "weight_hh must have shape (20, 5), got (5, 20)"),
        (layer(bias_ih=z(H)), "bias_ih must have shape (20,), got (5,)"),
        (layer(bias_hh=z(4 * H, 1)), "bias_hh must have shape (20,), got (20, 1)"),
        (layer(hx=(z(B, H + 1), z(B, H))), "h_0 must have shape (2, 5), got (2, 6)"),
        (layer(hx=(z(B, H), z(1, H))), "c_0 must have shape (2, 5), got (1, 5)"),
        (layer(bias_hh=z(4 * H).double()), "bias_hh must have the dtype of x, torch.float32, got torch.float64"),
        (layer(hx=(z(B, H), z(B, H, device="meta"))), "c_0 must be on the device of x, cpu, got meta"),
        (layer(x=z(T, B, I, device="meta")), "weight_ih must be on the device of x, meta, got cpu"),
        (projected(weight_hr=z(P, H + 1)), "weight_hr must have shape (P, H) with H = 5, got (2, 6)"),
        (projected(weight_hr=z(P)), "weight_hr must have shape (P, H) with H = 5, got (2,)"),
        (projected(weight_hr=z()), "weight_hr must have 2 dimensions, got none"),
        (projected(weight_hr=z(6, H)), "weight_hr must have shape (P, H) with H = 5 and P of at most H, got (6, 5)"),
        (projected(weight_hh=z(4 * H, H)), "weight_hh must have shape (20, 2), got (20, 5)"),
        (projected(hx=(z(B, H), z(B, H))), "h_0 must have shape (2, 2), got (2, 5)"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastlstm.lstm(**arguments)


@pytest.mark.parametrize(
    ("x", "hx", "error", "message"),
    [
        ([[1.0]], None, TypeError, "x must be a tensor, got list"),
        (z(2, I), z(2, H), TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got Tensor"),
        (z(2, I), (z(2, H),), RuntimeError, "lstm expects two hidden states"),
    ],
)
@pytest.mark.parametrize("function", [lambda x: x, lambda x: x if type(x) is list else x.unsqueeze(0)])
def test_what_a_function_is_given(x, hx, error, message, function):
    given, weights = function(x), (z(4 * H, I), z(4 * H, H))
    call = lstm_cell if given is x else fastlstm.lstm
    with pytest.raises(error, match=re.escape(message)):
        call(given, hx, *weights)


def test_a_cell_function_takes_rows():
    with pytest.raises(ValueError, match=re.escape("x must have shape (B, I), got (3,)")):
        lstm_cell(z(I), None, z(4 * H, I), z(4 * H, H))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (fastlstm.LSTM(I, H), "input must be a tensor or a PackedSequence, got"),
        (fastlstm.LSTM(I, H).step, "x_t must be a tensor, got"),
        (fastlstm.LSTMCell(I, H), "input must be a tensor, got"),
    ],
    ids=["forward", "step", "cell"],
)
@pytest.mark.parametrize(
    ("given", "name"), [(np.zeros((B, I), np.float32), "ndarray"), ([1.0], "list"), (None, "None")]
)
def test_what_is_no_tensor_is_named(call, message, given, name):
    state = z(1, B, H), z(1, B, H)
    for arguments in ((given,), (given, state)):
        with pytest.raises(TypeError, match=f"{message} {name}"), torch.no_grad():
            call(*arguments)


@pytest.mark.parametrize(
    ("call", "given", "name"),
    [
        (fastlstm.LSTM(I, H), z(T, B, I), "hx"),
        (fastlstm.LSTM(I, H).step, z(B, I), "state"),
        (fastlstm.LSTMCell(I, H), z(B, I), "hx"),
    ],
    ids=["forward", "step", "cell"],
)
def test_states_that_are_no_tensors_are_named(call, given, name):
    message = f"{name} must be a tuple of two tensors, h_0 and c_0, got a tuple of Tensor and ndarray"
    with pytest.raises(TypeError, match=message):
        call(given, (z(1, B, H), np.zeros((1, B, H), np.float32)))


@pytest.mark.parametrize("call", [fastlstm.lstm, fastlstm.lstm_cell])
def test_weights_that_are_no_tensors(call):
    x = torch.randn(*(2, 3, 5)[call is fastlstm.lstm_cell :])
    weights = torch.randn(16, 5), torch.randn(16, 4)
    with pytest.raises(TypeError, match="bias_ih must be a tensor, got list"):
        call(x, None, *weights, [0.0] * 16)
    for k, name in enumerate(("weight_ih", "weight_hh")):
        given = [*weights]
        given[k] = torch.tensor(1.0)
        with pytest.raises(ValueError, match=f"{name} must have 2 dimensions, got none"):
            call(x, None, *given)
    with pytest.raises(ValueError, match="weight_ih must be given"):
        call(x, None, None, weights[1])


def test_a_direction_that_is_no_bool():
    with pytest.raises(TypeError, match="reverse must be a bool, got str"):
        fastlstm.lstm(**layer(reverse="no"))
