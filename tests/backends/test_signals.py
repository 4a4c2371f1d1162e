"""What a signal handler raises, a timeout or Ctrl-C, arrives in the user's code, and no memory stays behind."""

import gc
import random
import signal
import time

import pytest
import torch

import fastlstm
from fastlstm.backends import pool
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.memory import resident

if not hasattr(signal, "setitimer"):
    pytest.skip("the system has no timer that sends a signal", allow_module_level=True)


class Timeout(Exception):
    pass


@pytest.fixture
def timeouts():
    def raise_timeout(*_):
        raise Timeout

    before = signal.signal(signal.SIGALRM, raise_timeout)
    # Python drops what is raised within a callback of its garbage collector, and hypothesis leaves such a callback
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    gc.callbacks[:] = callbacks


def arrives(delay, work):
    """Whether a timeout after `delay` seconds ends work that is done again and again."""
    end = time.monotonic() + 20
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while time.monotonic() < end:
            work()
    except Timeout:
        torch.set_grad_enabled(True)  # the timeout may have come while `no_grad` was being left
        return True
    return False


def works(backend):
    """Inference whose outputs, large ones, die in torch's own code, a step of one row, and training."""
    module, w = fastlstm.LSTM(28, 128, backend=backend), torch.randn(128, 1024)
    x, row = torch.randn(28, 128, 28), torch.randn(1, 28)

    def infer():
        with torch.no_grad():
            return module(x)[0] @ w

    def step():
        with torch.no_grad():
            return module.step(row)

    def train():
        (module(x)[0] @ w).sum().backward()
        module.zero_grad()

    return infer, step, train


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_timeouts_at_random_moments(timeouts, backend, count):
    randoms, arrived, sizes = random.Random(), [], []
    for work in works(backend):
        work()  # what is compiled at a first call takes seconds
        for k in range(count):
            arrived.append(arrives(randoms.uniform(1e-4, 8e-3), work))
            if k == count // 4:
                sizes.append(resident())
        assert resident() - sizes[-1] < 48 << 20
    assert all(arrived)


def test_memory_is_used_again_after_timeouts(timeouts):
    """In whatever line of the package they arrive."""
    like, randoms = torch.empty(0), random.Random()
    for _ in range(300):
        assert arrives(randoms.uniform(1e-5, 2e-4), lambda: pool.pooled(like, pool.SMALL))
    addresses = {pool.pooled(like, pool.SMALL).data_ptr() for _ in range(10)}
    assert len(addresses) == 1


def test_results_after_a_timeout_are_right(timeouts):
    """A call that was cut off leaves nothing behind that the next one would take for its own."""
    module, x, randoms = fastlstm.LSTM(9, 33), torch.randn(30, 5, 9), random.Random()

    def call():
        with torch.no_grad():
            return module(x)[0]

    want = call()
    for _ in range(100):
        assert arrives(randoms.uniform(1e-4, 2e-3), call)
        assert torch.equal(call(), want)
