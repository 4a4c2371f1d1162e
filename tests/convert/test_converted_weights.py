"""Weights from TensorFlow and Keras."""

import re

import numpy as np
import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.convert import keras_gru_weights, keras_weights, tensorflow_weights
from tests.helpers.tolerances import close


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def basic_lstm_cell(x, h, c, kernel, bias, forget_bias):
    """TensorFlow 1's BasicLSTMCell, as its documentation and code state it."""
    i, j, f, o = np.split(np.concatenate([x, h], 1) @ kernel + bias, 4, 1)
    c = c * sigmoid(f + forget_bias) + sigmoid(i) * np.tanh(j)
    return np.tanh(c) * sigmoid(o), c


def keras_cell(x, h, c, kernel, recurrent_kernel, bias):
    """keras.layers.LSTM's step."""
    i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, 1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def keras_gru_cell(x, h, kernel, recurrent_kernel, bias):
    """keras.layers.GRU's step with reset_after=True."""
    z_x, r_x, h_x = np.split(x @ kernel + bias[0], 3, 1)
    z_h, r_h, h_h = np.split(h @ recurrent_kernel + bias[1], 3, 1)
    z, r = sigmoid(z_x + z_h), sigmoid(r_x + r_h)
    return z * h + (1 - z) * np.tanh(h_x + r * h_h)


def keras_gru_cell_with_reset_before(x, h, kernel, recurrent_kernel, bias):
    """keras.layers.GRU's step with reset_after=False."""
    z_x, r_x, h_x = np.split(x @ kernel + bias, 3, 1)
    of_z, of_r, of_h = np.split(recurrent_kernel, 3, 1)
    z, r = sigmoid(z_x + h @ of_z), sigmoid(r_x + h @ of_r)
    return z * h + (1 - z) * np.tanh(h_x + (r * h) @ of_h)


def run(cell, x, size):
    h, c, outputs = np.zeros((x.shape[1], size)), np.zeros((x.shape[1], size)), []
    for x_t in x:
        h, c = cell(x_t, h, c)
        outputs.append(h)
    return np.stack(outputs), h, c


@pytest.mark.parametrize("forget_bias", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_tensorflow_weights(forget_bias, as_tensor):
    rng = np.random.default_rng()
    x, sizes = rng.standard_normal((6, 2, 3)), [(3, 5), (5, 5)]
    weights = [(rng.standard_normal((i + h, 4 * h)), rng.standard_normal(4 * h)) for i, h in sizes]
    expected, state = x, {}
    for layer, (kernel, bias) in enumerate(weights):
        expected, h, c = run(lambda *a, k=kernel, b=bias: basic_lstm_cell(*a, k, b, forget_bias), expected, 5)
        given = (torch.from_numpy(kernel), torch.from_numpy(bias)) if as_tensor else (kernel, bias)
        state |= tensorflow_weights(*given, forget_bias=forget_bias, suffix=f"_l{layer}")
    lstm = fastlstm.LSTM(3, 5, 2, dtype=torch.float64)
    lstm.load_state_dict(state)
    output, (h_n, c_n) = lstm(torch.from_numpy(x))
    for got, reference in ((output, expected), (h_n[1], h), (c_n[1], c)):
        close(got.detach(), torch.from_numpy(reference), "sums")
    cell = fastlstm.LSTMCell(3, 5, dtype=torch.float64)
    cell.load_state_dict(tensorflow_weights(*weights[0], forget_bias=forget_bias, suffix=""))
    h, c = basic_lstm_cell(x[0], np.zeros((2, 5)), np.zeros((2, 5)), *weights[0], forget_bias)
    for got, reference in zip(cell(torch.from_numpy(x[0])), (h, c), strict=True):
        close(got.detach(), torch.from_numpy(reference), "sums")


def of_lstm(x, states, *weights):
    return keras_cell(x, *states, *weights)


def of_gru(cell):
    return lambda x, states, *weights: (cell(x, states[0], *weights),)


KERAS = {  # our cell, its weights from Keras's and their shapes, and Keras's step, which returns states
    "LSTM": (cells.lstm, keras_weights, ((3, 20), (5, 20), 20), of_lstm),
    "GRU": (cells.gru, keras_gru_weights, ((3, 15), (5, 15), (2, 15)), of_gru(keras_gru_cell)),
    "GRU with its reset before": (
        cells.gru_reset_before,
        keras_gru_weights,
        ((3, 15), (5, 15), 15),
        of_gru(keras_gru_cell_with_reset_before),
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", KERAS)
def test_keras_weights(name, as_tensor):
    """Of the two halves of Bidirectional."""
    (cell, converted, shapes, step), rng, state, outputs = KERAS[name], np.random.default_rng(), {}, []
    x = rng.standard_normal((6, 2, 3))
    for suffix in ("_l0", "_l0_reverse"):
        weights = [rng.standard_normal(shape) for shape in shapes]
        state |= converted(*(torch.from_numpy(a) if as_tensor else a for a in weights), suffix=suffix)
        states, steps = [np.zeros((2, 5))] * len(cell.states), []
        for x_t in x if suffix == "_l0" else x[::-1]:
            states = step(x_t, states, *weights)
            steps.append(states[0])
        outputs.append(np.stack(steps if suffix == "_l0" else steps[::-1]))
    rnn = fastlstm.RNN(cell, 3, 5, bidirectional=True, dtype=torch.float64)
    rnn.load_state_dict(state)
    close(rnn(torch.from_numpy(x))[0].detach(), torch.from_numpy(np.concatenate(outputs, -1)), "sums")
    of_a_cell = converted(*weights, suffix="")
    assert [f"{name}_l0" for name in of_a_cell] == [name for name in state if not name.endswith("_reverse")]
    assert all(torch.equal(a, state[f"{name}_l0_reverse"]) for name, a in of_a_cell.items())


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (tensorflow_weights, [(8, 20), (5, 4)], "bias must have shape (4H,), got (5, 4)"),
        (tensorflow_weights, [(8, 20), (18,)], "bias must have shape (4H,), got (18,)"),
        (tensorflow_weights, [(8, 16), (20,)], "kernel must have shape (I + H, 4H) with H = 5, got (8, 16)"),
        (tensorflow_weights, [(5, 20), (20,)], "kernel must have shape (I + H, 4H) with H = 5, got (5, 20)"),
        (keras_weights, [(3, 16), (5, 20), (20,)], "kernel must have shape (I, 4H) with H = 5, got (3, 16)"),
        (keras_weights, [(3, 20), (4, 20), (20,)], "recurrent_kernel must have shape (5, 20), got (4, 20)"),
        (keras_gru_weights, [(3, 15), (5, 15), (3, 15)], "or (3H,) with reset_after=False, got (3, 15)"),
        (keras_gru_weights, [(3, 15), (5, 15), ()], "bias must have shape (2, 3H), or (3H,) with reset_after=False"),
        (keras_gru_weights, [(3, 20), (5, 15), (2, 15)], "kernel must have shape (I, 3H) with H = 5, got (3, 20)"),
        (keras_gru_weights, [(3, 15), (5, 20), (2, 15)], "recurrent_kernel must have shape (5, 15), got (5, 20)"),
    ],
)
def test_weights_that_do_not_go_together(function, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*(torch.zeros(shape) for shape in shapes))


def test_what_is_converted_is_a_copy():
    arrays = np.ones((3, 8), np.float32), np.ones((2, 8), np.float32), np.ones(8, np.float32)
    tensors = [torch.ones(3, 8), torch.ones(2, 8), torch.ones(8)]
    for given in (arrays, tensors):
        for a in keras_weights(*given).values():
            a.zero_()
        assert all(a.all() for a in given)
