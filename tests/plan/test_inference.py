"""Weights that stay packed while no gradient is wanted: the same bits as without, and never stale."""

import gc
import os
from functools import partial

import pytest
import torch

import fastlstm
from tests.helpers import interpreter
from tests.helpers.layers import needs_native
from tests.helpers.memory import resident
from tests.helpers.modules import assert_same_bits, both, flat
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close, equal

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_does_not_suit_kept_weights_is_told_as_nn_lstm_tells_it(batch_first, calls):
    ours, theirs = fastlstm.LSTM(5, 6, batch_first=batch_first), torch.nn.LSTM(5, 6, batch_first=batch_first)
    x, h, c = torch.randn(*((3, 4) if batch_first else (4, 3)), 5), torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    bad = [
        (x[..., :4], None), (x.double(), None), (x[0, 0], None), (x.unsqueeze(0), None), (x, (h, c, c)),
        (x, (h, c[:, :2])), (x, (h[..., :5], c)), (x, (h.expand(2, 3, 6), c)), (x, (h[0], c[0])),
        (x, (h.to("meta"), c)), (x, (h, c.to("meta"))),
    ]  # fmt: skip
    with torch.no_grad():
        for _ in range(2):
            ours(x, (h, c))
        assert calls.count("pack") == 1
        for arguments in bad:
            with pytest.raises((RuntimeError, ValueError)) as expected:
                theirs(*arguments)
            with pytest.raises(expected.type) as got:
                ours(*arguments)
            assert str(got.value) == str(expected.value)
        with pytest.raises(RuntimeError, match="not the same dtype"):
            ours(x, (h, c.double()))
        for arguments in ((x, [h, c]), (x[0], (h[:, 0], c[:, 0])), (x[:0] if not batch_first else x[:, :0], (h, c))):
            equal(flat(ours(*arguments)), flat(both(ours, *arguments)[1]))


def test_weights_of_another_shape():
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
    with torch.no_grad():
        lstm(x)
        lstm.weight_hh_l0 = torch.nn.Parameter(torch.randn(28, 6))
        with pytest.raises(ValueError, match=r"weight_hh must have shape \(28, 7\), got \(28, 6\)"):
            lstm(x)


def test_a_layer_that_is_dropped_leaves_no_cycle():
    """Someone who trains with the collector off packs weights at every step of a cell's loop."""
    cell, x, hx = fastlstm.LSTMCell(5, 7), torch.randn(3, 5), (torch.randn(3, 7), torch.randn(3, 7))

    def step():
        cell.zero_grad()
        sum(state.sum() for state in cell(x, hx)).backward()
        with torch.no_grad():
            cell.bias_ih.add_(0.1)

    gc.disable()
    try:
        for _ in range(5):
            step()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(100):
            step()
        grown = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert grown < 100  # a cycle a step would leave many times that


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_16_bits_in_memory_used_again(dtype):
    """Made in inference mode or not, by whichever thread, for another number of rows in between."""
    cell = fastlstm.LSTMCell(5, 19, dtype=dtype)
    calls = []
    for B in (3, 1, 3, 0):
        x, hx = torch.randn(B, 5, dtype=dtype), (torch.randn(B, 19, dtype=dtype), torch.randn(B, 19, dtype=dtype))
        calls.append((x, hx, [a.detach() for a in cell(x, hx)]))
    kept = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for x, hx, want in calls:
            with mode():
                got = cell(x, hx)
            assert all(map(torch.equal, got, want))
            kept.append((got, want))
    for got, want in kept:  # nothing that is used again is handed out
        assert all(map(torch.equal, got, want))


def test_packed_weights_are_kept_from_call_to_call(calls, cpu_backend):
    lstm, x = fastlstm.LSTM(5, 7, num_layers=2), torch.randn(3, 2, 5)
    with torch.no_grad():
        for _ in range(2):
            lstm.flatten_parameters()
            lstm(x)
            assert calls.count("pack") == 2
    plans = 2 if cpu_backend == "native" else 1  # of each layer, or of the module
    assert calls.count("plan") == plans
    assert calls.count("forward") == 2 * plans
    lstm.release_memory()
    gc.collect()
    assert [kept() for kept in calls.packed] == [None, None]
    with torch.no_grad():
        lstm(x)
    assert calls.count("pack") == 4


@needs_native
def test_another_backend_packs_anew(calls):
    """And leaves alone what the first has packed."""
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
    for name, count in (("native", 1), ("numba", 2), ("native", 2)):
        with fastlstm.use_backend(name):
            assert_same_bits(lstm, x)
            assert_same_bits(lstm, x)  # by what the last call has packed
            assert calls.count("pack") == count


@needs_native
def test_weights_of_another_dtype_are_packed_beside(calls):
    lstm, x = fastlstm.LSTM(5, 7, backend="native"), torch.randn(3, 2, 5)
    exact = {name: torch.nn.Parameter(parameter.double()) for name, parameter in lstm.named_parameters()}
    with torch.no_grad():
        for _ in range(2):
            results = lstm(x)[0], torch.func.functional_call(lstm, exact, (x.double(),))[0]
    assert calls.count("pack") == 2
    close(*results, "sums")


def test_the_default_device_may_be_another_at_the_first_call(cpu_backend):
    code = """
import torch, fastlstm
lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
with torch.device("meta"):
    lstm(x)
lstm(x)[1][0].sum().backward()
assert lstm.weight_hh_l0.grad.isfinite().all()
"""
    environment = {**os.environ, "FASTLSTM_BACKEND": cpu_backend}
    interpreter.run(code, environment=environment, check=True)


@pytest.mark.parametrize("bad", ["list", "no state", "half a state", "float state", "width", "device", "dtype"])
def test_a_cell_that_ran_before_raises_as_one_that_did_not(bad):
    x, h, c = torch.randn(2, 5), torch.randn(2, 6), torch.randn(2, 6)
    calls = {
        "list": ([[0.0] * 5], (h, c)),
        "no state": (None, (h, c)),
        "half a state": (x, (h, None)),
        "float state": (x, (1.0, c)),
        "width": (x, (h, torch.randn(2, 7))),
        "device": (x, (h, c.to("meta"))),
        "dtype": (x, (h.double(), c)),
    }
    warm, cold = (fastlstm.LSTMCell(5, 6) for _ in range(2))
    errors = []
    with torch.no_grad():
        for cell in (warm, warm):
            cell(x, (h, c))
        for cell in (warm, cold):
            with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as error:
                cell(*calls[bad])
            errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


def test_many_threads_share_a_module():
    # little arithmetic and many biases: a write to what the calls share would show
    lstm, inputs = fastlstm.LSTM(1, 512), [torch.randn(2, 1, 1) for _ in range(4)]
    with torch.no_grad():
        want = [lstm(x)[0] for x in inputs]
    lstm.release_memory()
    wrong = []

    def loop(k):
        with torch.no_grad():
            wrong.extend(k for _ in range(1000) if not torch.equal(lstm(inputs[k])[0], want[k]))

    at_once(*(partial(loop, k) for k in range(4)))
    assert wrong == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("calls", [40_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_resident_memory_stays_flat(calls):
    lstm, x = fastlstm.LSTM(8, 16), torch.randn(1, 1, 8)

    def run(calls):
        with torch.no_grad():
            for _ in range(calls):
                lstm(x)
        for _ in range(calls // 20):
            lstm(x)[0].sum().backward()
        gc.collect()

    run(2_000)
    before = resident()
    run(calls)
    assert resident() - before < 4 << 20  # calls that keep 105 bytes each would show, or 42 where they are 100 000
