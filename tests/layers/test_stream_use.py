"""What a stream takes, keeps and gives: rows, states, errors, threads and processes."""

import copy
import os
import pickle
import re
import signal
import threading
import traceback
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.backends import numba
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.modules import flat
from tests.helpers.streams import check_bits
from tests.helpers.threads import at_once
from tests.helpers.tolerances import equal


def test_outputs_are_the_callers_own():
    module, x = fastlstm.LSTM(4, 6), torch.randn(1, 4)
    stream, other = module.stream(), module.stream()
    first = stream(x)
    kept = first.clone()
    first.zero_()  # neither the next step nor the state may see this
    other(x)
    assert torch.equal(stream(x), other(x))
    assert not torch.equal(kept, first)
    state = stream.state
    state[0].zero_()
    assert stream.state[0].abs().sum() > 0


def test_the_results_of_a_step_share_no_memory():
    stream, x = fastlstm.GRU(4, 6, 2).stream(), torch.randn(3, 4)
    h, state = stream.step(x)
    kept = state.clone()
    h.zero_()
    assert torch.equal(state, kept)
    assert stream.step(x, state)[1].data_ptr() != state.data_ptr()
    assert torch.equal(stream.step(x)[1], kept)  # zeros stay zeros


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRUCell])
def test_rows_are_reset_and_states_are_set(kind):
    module, B = kind(4, 6), 3
    stream, x = module.stream(B), torch.randn(B, 4)
    fresh = stream(x)
    stream(x)
    stream.reset([0, 2])
    again = stream(x)
    assert torch.equal(again[[0, 2]], fresh[[0, 2]])
    assert not torch.equal(again[1], fresh[1])
    stream.reset(torch.tensor([True, False, False]))
    assert flat(stream.state)[0].select(-2, 0).abs().sum() == 0
    stream.reset()
    assert torch.equal(stream(x), fresh)
    kept = stream.state
    following = stream(x)
    stream.state = kept
    assert torch.equal(stream(x), following)


ROWS = "rows must be an int, a slice, ints from -3 to 2, or booleans of shape (B,) = (3,), got "


@pytest.mark.parametrize(
    ("rows", "error", "got"),
    [
        (torch.tensor([True, False]), ValueError, "booleans of shape (2,)"),
        ([True, False], ValueError, "booleans of shape (2,)"),
        (np.ones((3, 1), bool), ValueError, "booleans of shape (3, 1)"),
        (torch.ones(5, 3) > 0, ValueError, "booleans of shape (5, 3)"),
        (True, ValueError, "booleans of shape ()"),
        (3, ValueError, "3"),
        (-4, ValueError, "-4"),
        ([0, 7], ValueError, "7"),
        (1.5, TypeError, "torch.float64"),
        (torch.zeros(3), TypeError, "torch.float32"),
        ("start", TypeError, "str"),
        ([[0], [1, 2]], TypeError, "list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRUCell])
def test_rows_that_a_stream_has_not(kind, rows, error, got):
    stream = kind(4, 6).stream(3)
    stream(torch.randn(3, 4))
    before = stream.state
    with pytest.raises(error, match=f"^{re.escape(ROWS + got)}$"):
        stream.reset(rows)
    torch.testing.assert_close(stream.state, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "indices"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ((0, 1), [0, 1]),
        (range(2), [0, 1]),
        ([], []),
        (np.array([2, 0], np.uint8), [0, 2]),
        (np.array([True, False, True]), [0, 2]),
        (torch.tensor([-1], dtype=torch.int16), [2]),
        (torch.tensor(1), [1]),
        ([False, True, False], [1]),
    ],
    ids=str,
)
def test_rows_of_every_kind(rows, indices):
    stream = fastlstm.GRU(4, 6).stream(3)
    stream(torch.randn(3, 4))
    stream.reset(rows)
    is_zero = (stream.state == 0).all(-1)[0]
    assert is_zero.nonzero().flatten().tolist() == indices


def test_bad_arguments_raise_and_change_nothing():
    module = fastlstm.LSTM(4, 6, backend="numba")
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got"):
            module.stream(bad)
    with pytest.raises(ValueError, match="bidirectional"):
        fastlstm.LSTM(4, 6, bidirectional=True).stream()
    stream = module.stream(2)
    stream(torch.randn(2, 4))
    before = stream.state
    cases = [
        (TypeError, [1.0], "x_t must be a tensor, got list"),
        (TypeError, None, "x_t must be a tensor, got NoneType"),
        (ValueError, torch.randn(3, 4), r"= \(2, 4\), got \(3, 4\): make it with stream\(batch_size=3\)"),
        (ValueError, torch.randn(2, 5), r"x_t must be \(B, I\) = \(2, 4\), got \(2, 5\)$"),
        (ValueError, torch.randn(4), r"x_t must be \(B, I\) = \(2, 4\), got \(4,\)$"),
        (ValueError, torch.randn(0, 4), r"x_t must be \(B, I\) = \(2, 4\), got \(0, 4\)$"),
        (ValueError, torch.randn(2, 4).double(), "x_t must have the dtype torch.float32, got torch.float64"),
        (ValueError, torch.randn(2, 4, device="meta"), "x_t must have the device cpu, got meta"),
        (RuntimeError, torch.randn(2, 4, requires_grad=True), "a stream has no gradients"),
    ]
    for error, x, message in cases:
        with pytest.raises(error, match=message):
            stream(x)
    with pytest.raises(RuntimeError, match="transforms"):
        torch.func.vmap(stream)(torch.randn(5, 2, 4))
    with pytest.raises(TypeError, match="state must be of the form"):
        stream.state = 3
    with pytest.raises(ValueError, match="state must have the shapes"):
        stream.state = (before[0], before[1][:, :1])
    equal(before, stream.state)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(stream)
    with torch.no_grad():
        stream(torch.randn(2, 4, requires_grad=True))


def test_bad_arguments_of_a_step():
    stream, x, state = fastlstm.LSTM(4, 6).stream(2), torch.randn(3, 4), tuple(torch.randn(2, 1, 3, 6))
    stream.step(x, state)
    h, c = state
    cases = [
        (TypeError, [1.0], state, "x_t must be a tensor, got list"),
        (ValueError, torch.randn(4), None, r"x_t must be \(R, I\) with I = 4 and at least one row, got \(4,\)"),
        (ValueError, torch.randn(0, 4), None, r"with I = 4 and at least one row, got \(0, 4\)"),
        (ValueError, torch.randn(3, 5), None, r"with I = 4 and at least one row, got \(3, 5\)"),
        (ValueError, x.double(), state, "x_t must have the dtype torch.float32, got torch.float64"),
        (TypeError, x, 3, "state must be of the form of stream.state, got int"),
        (ValueError, x, h, r"state must have the shapes \[\(1, 3, 6\), \(1, 3, 6\)\], got \[\(1, 3, 6\)\]"),
        (ValueError, x, (h, c[:, :2]), r"got \[\(1, 3, 6\), \(1, 2, 6\)\]"),
        (ValueError, x, (h, c.double()), r"state must be of torch\.float32 on cpu, got torch\.float64 on cpu"),
        (RuntimeError, x, (h, c.clone().requires_grad_()), r"a stream has no gradients: pass state\.detach\(\)"),
    ]
    for error, x_t, given, message in cases:
        for _ in range(2):
            with pytest.raises(error, match=message):
                stream.step(x_t, given)
    with pytest.raises(ValueError, match="inputs must be None, since the cell lstm has none"):
        stream.step(x, state, {"nonsense": x})
    with pytest.raises(RuntimeError, match="transforms"):
        torch.func.vmap(stream.step)(torch.randn(5, 3, 4))
    h.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="state must have memory for its 18 numbers"):
        stream.step(x, state)
    with torch.no_grad():
        stream.step(x.requires_grad_(), None)
    with pytest.raises(RuntimeError, match="a stream has no gradients: pass x_t"):
        stream.step(x, None)


def test_arguments_that_do_not_fit_a_stream():
    cell, x = fastlstm.LSTMCell(4, 6), torch.randn(2, 4)
    with pytest.raises(ValueError, match="on the device meta"):
        fastlstm.LSTM(4, 6, device="meta").stream()
    stream = cell.stream(2)
    h, c = stream.state
    with pytest.raises(ValueError, match=r"state must be of torch\.float32 on cpu, got torch\.float64 on cpu"):
        stream.state = (h + 1, c.double())
    assert torch.equal(stream.state[0], h)
    negated = torch.complex(x, x).conj().imag
    with torch.no_grad():
        assert torch.equal(stream(negated), cell(-x)[0])


def test_threads_of_python_share_a_stream_and_torchs_threads_may_change(set_threads):
    module, x = fastlstm.LSTM(4, 128, backend="numba"), torch.randn(8, 4)
    stream, alone = module.stream(8), module.stream(8)
    at_once(*[lambda: [stream(x) for _ in range(50)]] * 3)
    set_threads(3 - min(torch.get_num_threads(), 2))
    for _ in range(150):
        alone(x)
    equal(stream.state, alone.state)


def test_threads_of_python_share_the_steps_of_a_stream(set_threads):
    module = fastlstm.LSTM(4, 128, 2, backend="numba")
    stream, xs = module.stream(), torch.randn(3, 30, 8, 4)
    states, expected = [None] * 3, [None] * 3
    with torch.no_grad():
        for k in range(3):
            for x in xs[k]:
                _, expected[k] = module.step(x, expected[k])

    def serve(k):
        for x in xs[k]:
            _, states[k] = stream.step(x, states[k])

    at_once(*[partial(serve, k) for k in range(3)])
    equal(states, expected)
    set_threads(3 - min(torch.get_num_threads(), 2))
    check_bits(module, 8, stream)


def test_a_compiled_function_may_call_a_stream():
    module, x = fastlstm.LSTM(4, 6), torch.randn(1, 4)
    stream, eager = module.stream(), module.stream()
    compiled = torch.compile(lambda x: stream(x * 2) + 1, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), eager(x * 2) + 1)


def test_a_stream_ignores_autocast_and_later_defaults(set_threads):
    for backend in ("numba", "reference", "aten"):
        module, x = fastlstm.LSTM(4, 6, backend=backend), torch.randn(2, 4)
        stream, expected = module.stream(2), module.step(x)[0].detach()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(stream(x), expected)
    module, x, outputs = fastlstm.LSTM(4, 128), torch.randn(2, 4), []
    with fastlstm.use_backend("reference"):
        stream, expected = module.stream(2), module.step(x)[0].detach()
    assert torch.equal(stream(x), expected)
    assert not torch.equal(module.step(x)[0], expected)  # other kernels round otherwise
    for threads in (1, 2):
        set_threads(threads)
        stream.reset()
        outputs.append(stream(x))
    assert torch.equal(*outputs)


def test_an_interrupted_change_of_threads_leaves_a_stream_right(monkeypatch, set_threads):
    module, x = fastlstm.LSTM(6, 6, num_layers=2, backend="numba"), torch.randn(2, 6)
    stream, alone, prepare, calls = module.stream(2), module.stream(2), numba.steps, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepare(*args)

    set_threads(3 - min(torch.get_num_threads(), 2))
    with monkeypatch.context() as patch:
        patch.setattr(numba, "steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream(x)
    assert torch.equal(stream(x), alone(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize(("backend", "quantized"), [("numba", False), ("native", False), ("native", True)])
def test_a_stream_goes_on_in_a_forked_child(backend, quantized, two_threads):
    module, x = fastlstm.LSTM(4, 128, backend=backend), torch.randn(8, 4)
    if quantized:
        module = fastlstm.quantize(nn.ModuleList([module]))[0]
    stream = module.stream(8)
    stream(x)
    expected, state = stream(x), stream.state
    stream.reset()
    stream(x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # the default action ends a child that hangs
        os.write(writer, b"1" if torch.equal(stream(x), expected) else b"0")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer == b"1"
    assert torch.equal(stream(x), expected)
    assert all(map(torch.equal, stream.state, state))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_stream_that_a_thread_steps_during_a_fork(backend, two_threads):
    """A child finds it between two steps. They take so long that hardly a fork begins there."""
    module, x = fastlstm.LSTM(64, 256, 2, backend=backend), torch.randn(64, 64)
    stream, fresh, is_over, count, codes = module.stream(64), module.stream(64), threading.Event(), 0, []

    def steps():
        nonlocal count
        while not is_over.is_set():
            stream(x * count)
            count += 1

    def check_in_child():
        state = stream.state
        for k in range(count):
            fresh(x * k)
        if not torch.equal(fresh.state[0], state[0]):  # the thread may not have counted the last step
            fresh(x * count)
        assert all(map(torch.equal, fresh.state, state))
        equal(stream(x), fresh(x))

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                exit_code = 1
                try:
                    signal.alarm(60)  # the default action ends a child that hangs
                    check_in_child()
                    exit_code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(exit_code)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        is_over.set()
        thread.join()
    assert codes == [0] * 3
