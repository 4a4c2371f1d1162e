"""A call that has been made before touches few functions of Python. The counts are those of the interpreter's profiler,
which no other work on the machine changes. Between other layers each of these functions is three times as dear as in a
loop of its own.
"""

import gc
import sys

import pytest
import torch

import fastlstm

FORWARD_OF_TORCH = 3  # functions of `Module.__call__`
BACKWARD_OF_TORCH = 33  # functions of `sum` and `Tensor.backward`


def count(function, warm_calls=5):
    """The functions that a warm call enters, of Python and of C."""
    for _ in range(warm_calls):
        function()
    entered = 0

    def profile(frame, event, argument):
        nonlocal entered
        entered += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return entered - 2  # without `function` and `setprofile`


def cell_and_call(kind):
    cell = getattr(fastlstm, kind)(128, 128, backend="numba")
    x, h = torch.randn(8, 128), torch.randn(8, 128)
    state = (h, torch.randn(8, 128)) if kind == "LSTMCell" else h
    return lambda: cell(x, state)


def first_of(results):
    return results[0] if isinstance(results, tuple) else results


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "ElmanCell"])
def test_a_step_of_a_cell(set_threads, kind):
    set_threads(1)
    step = cell_and_call(kind)
    with torch.no_grad():
        assert count(step) <= 37 + FORWARD_OF_TORCH
    assert count(step) <= 47 + FORWARD_OF_TORCH
    results = [first_of(step()) for _ in range(6)]
    assert count(lambda: results.pop().sum().backward()) <= 50 + BACKWARD_OF_TORCH


def test_a_sequence(set_threads):
    set_threads(1)
    lstm, x = fastlstm.LSTM(40, 128, backend="numba"), torch.randn(20, 1, 40)
    with torch.no_grad():
        assert count(lambda: lstm(x)) <= 42 + FORWARD_OF_TORCH


def test_two_layers_in_both_directions(set_threads):
    set_threads(1)
    lstm, x = fastlstm.LSTM(40, 128, 2, bidirectional=True, backend="numba"), torch.randn(20, 1, 40)
    with torch.no_grad():
        assert count(lambda: lstm(x)) <= 97 + FORWARD_OF_TORCH
