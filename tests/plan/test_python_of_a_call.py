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


def loop_of(kind, warm_steps=0):
    """A function that takes so many steps of a cell and returns the last h. Some loops have been trained before."""
    cell = getattr(fastlstm, kind)(128, 128, backend="numba")
    x, h = torch.randn(8, 128), torch.randn(8, 128)

    def loop(steps):
        state = (h, torch.randn(8, 128)) if kind == "LSTMCell" else h
        for _ in range(steps):
            state = cell(x, state)
        return state[0] if kind == "LSTMCell" else state

    for _ in range(3 if warm_steps else 0):
        loop(warm_steps).sum().backward()
    return loop


def count_of_a_step(count_of_steps):
    """Without what a loop costs however long it is."""
    return (count_of_steps(12) - count_of_steps(2)) / 10


KINDS = pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "ElmanCell"])


@KINDS
def test_a_step_of_a_cell(set_threads, kind):
    set_threads(1)
    loop = loop_of(kind)
    with torch.no_grad():
        assert count_of_a_step(lambda steps: count(lambda: loop(steps))) <= 37 + FORWARD_OF_TORCH


@KINDS
def test_a_step_that_trains(set_threads, kind):
    set_threads(1)
    loop = loop_of(kind, 6)

    def backward(steps):
        losses = [loop(steps).sum() for _ in range(6)]
        return count(lambda: losses.pop().backward())

    assert count_of_a_step(backward) <= 48
    # last, since steps whose graphs go without a pass share no gradients in the next one
    assert count_of_a_step(lambda steps: count(lambda: loop(steps))) <= 46 + FORWARD_OF_TORCH


@KINDS
def test_a_lone_step_that_trains(set_threads, kind):
    """Each step has a backward pass of its own."""
    set_threads(1)
    loop = loop_of(kind, 1)
    assert count(lambda: loop(1).sum().backward()) <= 46 + FORWARD_OF_TORCH + 50 + BACKWARD_OF_TORCH


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
