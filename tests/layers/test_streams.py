"""`Module.stream`: steps on packed weights, beside the module's own `step`, and beside float64."""

import copy
import os
import pickle
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.backends import numba
from fastlstm.cells import library
from tests.helpers.layers import needs_native
from tests.helpers.memory import resident
from tests.helpers.modules import flat, pair
from tests.helpers.rnn import gru_before, of_heads
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close, equal

LAYERS = [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman]
CELLS = [fastlstm.LSTMCell, fastlstm.GRUCell, fastlstm.ElmanCell]


def next_step(module, rows, state):
    """Draw x and the cell's inputs of one step. Return them, and h and the state by the module's own step."""
    like = next(a for a in [*module.parameters(), *module.buffers()] if a.is_floating_point())
    x = torch.randn(rows, module.input_size, dtype=like.dtype) if module.input_size else None
    inputs = {name: torch.rand(rows, module.hidden_size, dtype=like.dtype) for name in module._cell.inputs}
    options = {"inputs": inputs} if inputs else {}
    if not hasattr(module, "step"):  # a cell
        state = module(x, state)
        return x, options, flat(state)[0], state
    return x, options, *module.step(x, state, **options)


def run_beside(module, stream, B, steps=6):
    """Run the module's own steps beside the stream. Return the largest difference of outputs and states."""
    state, largest = None, 0.0
    with torch.no_grad():
        for _ in range(steps):
            x, options, expected, state = next_step(module, B, state)
            got = stream(x, **options)
            assert got.shape == expected.shape
            pairs = [(got, expected), *zip(flat(stream.state), flat(state), strict=True)]
            for a, b in pairs:
                largest = max(largest, (a - b).abs().max().item())
    return largest


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 100), (2, 40, 128), (33, 5, 20)])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "numba") for kind in (*LAYERS, *CELLS)), *((kind, "native") for kind in (*LAYERS[:2], *CELLS[:2]))],
)
def test_a_stream_has_the_bits_of_step(kind, backend, sizes, threads, poisoned, set_threads):
    B, I, H = sizes
    set_threads(threads)
    module = kind(I, H, backend=backend)
    assert run_beside(module, module.stream(B), B) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["numba", "native", "reference", "aten"])
def test_every_backend_and_dtype_has_streams(backend, dtype):
    module = fastlstm.LSTM(7, 20, num_layers=2, backend=backend).to(dtype)
    assert run_beside(module, module.stream(3), 3) == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("kind", [*LAYERS[:2], *CELLS[:2]])
def test_int8_streams_have_the_bits_of_step(kind, activations, backend):
    module = fastlstm.quantize(nn.ModuleList([kind(13, 36, backend=backend)]), activations=activations)[0]
    assert run_beside(module, module.stream(4), 4) == 0


@pytest.mark.parametrize(
    ("cell", "H", "heads"),
    [*((cell, 9, 1) for cell in (*library.CELLS, gru_before)), (of_heads, 64, 4), (gru_before, 64, 4)],
    ids=str,
)
def test_a_stream_of_any_cell(cell, H, heads):
    sizes = {"input_size": 5, "num_layers": 2} if cell.gates_of_x else {"input_size": 0}
    module = fastlstm.RNN(cell, hidden_size=H, **sizes, heads=heads, backend="numba")
    assert run_beside(module, module.stream(2), 2) == 0


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own layer says so
def test_projections_zoneout_and_dropout_run_as_in_eval_mode():
    for module in (
        fastlstm.LSTM(5, 8, proj_size=3),
        fastlstm.LSTM(5, 8, zoneout=0.3),
        fastlstm.GRU(5, 8, recurrent_dropout=0.5),
        fastlstm.LSTM(5, 8, num_layers=2, dropout=0.5),
    ):
        stream = module.stream(2)  # made in training mode
        assert run_beside(copy.deepcopy(module).eval(), stream, 2) == 0
        assert module.training


def test_cells_with_inputs_take_them_at_each_step():
    @fastlstm.cell(gates={"a": "xh"}, states=("h",), inputs=("drop",))
    def dropped(a, h, drop):
        return fastlstm.cells.tanh(a) * drop

    module, x, drop = fastlstm.RNN(dropped, 3, 4), torch.randn(2, 3), torch.rand(2, 4)
    stream = module.stream(2)
    expected, state = module.step(x, None, {"drop": drop})
    torch.testing.assert_close(stream(x, {"drop": drop}), expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(stream.state[0], state[0].detach(), rtol=0, atol=0)
    mask = drop < 0.5
    expected, _ = module.step(x, None, {"drop": mask})
    torch.testing.assert_close(module.stream(2)(x, {"drop": mask}), expected.detach(), rtol=0, atol=0)


def test_a_stream_keeps_the_weights_that_it_was_made_with():
    module, x = fastlstm.LSTM(4, 6), torch.randn(1, 4)
    stream = module.stream()
    expected = stream(x)
    stream.reset()
    with torch.no_grad():
        for a in module.parameters():
            a.zero_()
    assert torch.equal(stream(x), expected)


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


def test_strided_inputs_and_nan():
    module = fastlstm.GRU(4, 6)
    stream, wide = module.stream(2), torch.randn(4, 2)
    expected = module.step(wide.t())[0].detach()
    assert torch.equal(stream(wide.t()), expected)
    assert stream(torch.full((2, 4), float("nan"))).isnan().all()


def test_threads_of_python_share_a_stream_and_torchs_threads_may_change(set_threads):
    module, x = fastlstm.LSTM(4, 128, backend="numba"), torch.randn(8, 4)
    stream, alone = module.stream(8), module.stream(8)
    at_once(*[lambda: [stream(x) for _ in range(50)]] * 3)
    set_threads(3 - min(torch.get_num_threads(), 2))
    for _ in range(150):
        alone(x)
    equal(stream.state, alone.state)


def test_a_compiled_function_may_call_a_stream():
    module, x = fastlstm.LSTM(4, 6), torch.randn(1, 4)
    stream, eager = module.stream(), module.stream()
    compiled = torch.compile(lambda x: stream(x * 2) + 1, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), eager(x * 2) + 1)


class Scaled(fastlstm.LSTM):
    def step(self, x_t, state=None):
        return super().step(x_t * 10, state)


class Doubled(fastlstm.GRUCell):
    def forward(self, input, hx=None):  # noqa: A002
        return super().forward(input * 2, hx)


@pytest.mark.parametrize("backend", ["numba", "native"])
def test_code_of_a_subclass_runs(backend):
    for module in (Scaled(4, 6, backend=backend), Doubled(4, 6, backend=backend)):
        assert run_beside(module, module.stream(2), 2) == 0


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


def test_arguments_that_do_not_fit_a_stream():
    cell, x = fastlstm.LSTMCell(4, 6), torch.randn(2, 4)
    with pytest.raises(ValueError, match="inputs must be None, since the cell lstm has none"):
        cell.stream(2)(x, {"nonsense": x})
    with pytest.raises(ValueError, match="on the device meta"):
        fastlstm.LSTM(4, 6, device="meta").stream()
    stream = cell.stream(2)
    h, c = stream.state
    with pytest.raises(ValueError, match=r"state must be of torch\.float32 on cpu, got torch\.float64 on cpu"):
        stream.state = (h + 1, c.double())
    assert torch.equal(stream.state[0], h)
    negated = torch.complex(x, x).conj().imag
    assert torch.equal(stream(negated), cell(-x)[0].detach())


def step_beside(module, stream, rows, steps=4):
    """Run `stream.step` from states of its caller beside the module's own steps. Return the largest difference."""
    state = own = None
    largest, before = 0.0, stream.state
    with torch.no_grad():
        for _ in range(steps):
            x, options, expected, state = next_step(module, rows, state)
            given = [] if own is None else [a.clone() for a in flat(own)]
            got, after = stream.step(x, own, **options)
            equal(given, [] if own is None else flat(own))  # which the step has only read
            assert type(after) is type(state)
            own = after
            for a, b in [(got, expected), *zip(flat(own), flat(state), strict=True)]:
                assert a.shape == b.shape
                largest = max(largest, (a - b).abs().max().item())
    equal(stream.state, before)
    return largest


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 100), (2, 40, 128), (33, 5, 20)])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "numba") for kind in (*LAYERS, *CELLS)), *((kind, "native") for kind in (*LAYERS[:2], *CELLS[:2]))],
)
def test_a_step_from_states_of_ones_own(kind, backend, sizes, threads, dtype, poisoned, set_threads):
    """It has the bits of the module's own step, for any number of rows."""
    B, I, H = sizes
    set_threads(threads)
    module = kind(I, H, backend=backend).to(dtype)
    stream = module.stream(2)
    stream(torch.randn(2, I, dtype=dtype))
    for rows in (B, B + 1, B):
        assert step_beside(module, stream, rows) == 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_step_beside_torch(kind):
    theirs, ours = pair(7, 20, 3, like=kind)
    stream, expected, found = ours.stream(), None, None
    for x in torch.randn(5, 3, 7, dtype=torch.float64):
        output, expected = theirs(x[None], expected)
        h, found = stream.step(x, found)
        close([h, *flat(found)], [output[0], *flat(expected)], "sums")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["numba", "native", "reference", "aten"])
def test_every_backend_and_dtype_has_steps(backend, dtype):
    module = fastlstm.LSTM(7, 20, num_layers=3, backend=backend).to(dtype)
    assert step_beside(module, module.stream(), 3) == 0


@pytest.mark.parametrize("cell", [*library.CELLS, gru_before], ids=str)
def test_a_step_of_any_cell(cell):
    sizes = {"input_size": 5, "num_layers": 2} if cell.gates_of_x else {"input_size": 0}
    module = fastlstm.RNN(cell, hidden_size=9, **sizes, backend="numba")
    assert step_beside(module, module.stream(2), 3) == 0


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own layer says so
def test_steps_of_modules_that_do_more_than_their_cell():
    int8 = fastlstm.quantize(nn.ModuleList([fastlstm.LSTM(13, 36), fastlstm.GRUCell(13, 36)]))
    for module in (fastlstm.LSTM(5, 8, proj_size=3), fastlstm.LSTM(5, 8, zoneout=0.3), Scaled(4, 6), *int8):
        assert step_beside(module.eval(), module.stream(2), 3) == 0


def test_states_of_every_layout_and_of_inference_mode():
    module, x = fastlstm.LSTM(4, 6, 2), torch.randn(3, 4)
    stream, wide = module.stream(), torch.randn(2, 2, 6, 3)
    states = tuple(a.transpose(1, 2) for a in wide)
    with torch.no_grad():
        expected = flat(module.step(x, states))
    negated = tuple(torch.complex(-a, -a).conj().imag for a in wide.transpose(2, 3).contiguous())
    for state in (states, [*states], tuple(a.contiguous() for a in states), negated, states):
        equal(flat(stream.step(x, state)), expected)
        with torch.inference_mode():
            equal(flat(stream.step(x + 0, tuple(a + 0 for a in state))), expected)


def test_the_results_of_a_step_share_no_memory():
    stream, x = fastlstm.GRU(4, 6, 2).stream(), torch.randn(3, 4)
    h, state = stream.step(x)
    kept = state.clone()
    h.zero_()
    assert torch.equal(state, kept)
    assert stream.step(x, state)[1].data_ptr() != state.data_ptr()
    assert torch.equal(stream.step(x)[1], kept)  # zeros stay zeros


def test_many_numbers_of_rows():
    """A stream keeps what it has prepared for some of them."""
    module = fastlstm.GRUCell(3, 5)
    stream = module.stream()
    for rows in [*range(1, 80), 1, 2]:
        x = torch.randn(rows, 3)
        assert torch.equal(stream.step(x)[0], module(x).detach())


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_many_numbers_of_rows_keep_few_packed_weights():
    """With the backend `native` the steps of each number of rows pack the weights for themselves, in 8 MB here."""
    stream, x = fastlstm.LSTM(512, 512, backend="native").stream(), torch.zeros(40, 512)
    before = resident()
    for rows in range(1, 40):
        stream.step(x[:rows])
    assert resident() - before < 100 << 20  # all would take 320 MB


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
    assert step_beside(module, stream, 8) == 0
