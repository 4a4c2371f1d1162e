"""Memory that is used again: whose it is, and how much of it stays."""

import gc
import weakref
from collections import deque
from functools import partial

import pytest
import torch

import fastlstm
from fastlstm.backends import pool
from fastlstm.backends.numba.host import frames
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.memory import resident
from tests.helpers.threads import at_once


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    gc.collect()  # what other tests have left would come back meanwhile
    monkeypatch.setattr(pool, "_pool", [])
    scratch = deque(maxlen=pool.scratch.maxlen)
    monkeypatch.setattr(pool, "scratch", scratch)
    monkeypatch.setattr(frames, "scratch", scratch)


def test_the_smallest_buffer_that_serves_is_lent():
    """Of at most twice the size asked for."""
    like, MB = torch.empty(0, dtype=torch.uint8), 1 << 20
    buffers = [pool.pooled(like, size * MB) for size in (6, 4, 24)]  # the newest is not what is wanted
    six, four, large = (buffer.data_ptr() for buffer in buffers)
    del buffers
    first, second, third = (pool.pooled(like, 3 * MB) for _ in range(3))
    assert first.data_ptr() == four
    assert second.data_ptr() == six
    assert third.data_ptr() != large
    assert pool.pooled(like, 23 * MB).data_ptr() == large


def test_small_buffers_of_other_sizes_touch_each_their_own_memory():
    """Pages that every size touched in its turn would all become as large as the largest."""
    like, KB = torch.empty(0, dtype=torch.uint8), 1 << 10
    buffers = [pool.pooled(like, size * KB) for size in (700, 1400)]
    small, large = (buffer.data_ptr() for buffer in buffers)
    del buffers
    assert pool.pooled(like, 1300 * KB).data_ptr() == large
    assert pool.pooled(like, 690 * KB).data_ptr() == small


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_is_saved_without_a_gradient(backend):
    model, x = fastlstm.LSTM(3, 64, backend=backend), torch.randn(500, 64, 3)
    with torch.no_grad():
        model(x[:2])  # compiled, and with its threads
        before = resident()
        output, _ = model(x)
    assert resident() - before < 2 * output.nbytes  # the gates alone would be 4 times the output


def test_a_finalizer_may_ask_for_memory_while_the_pool_is_looked_through():
    """It runs wherever the collector does, and must not be given what the call that it interrupts has chosen."""
    found = []

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            found.append(pool.pooled(torch.empty(0), pool.SMALL).fill_(len(found)))

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for k in range(40):
            Cycle()
            mine = pool.pooled(torch.empty(0), pool.SMALL).fill_(-1 - k)
            others = [other.unique().tolist() for other in found]
            assert mine.unique().tolist() == [-1 - k]
            assert others == [[n] for n in range(len(others))]
            if len(found) > 8:
                found.clear()
    finally:
        gc.set_threshold(*before)


def test_nothing_runs_when_a_buffer_dies():
    """A weak reference's callback would swallow what a signal handler raises in it."""
    buffer = pool.pooled(torch.empty(0), pool.SMALL)
    (pages,) = pool._pool
    view = pages.holder()
    assert weakref.getweakrefs(view) == [pages.holder]
    assert pages.holder.__callback__ is None
    del view
    assert pages.holder() is not None
    del buffer
    assert pages.holder() is None


@pytest.mark.parametrize("T", [3, 500, 2000])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_storages_of_what_users_get_can_be_resized(T, backend):
    """As torch's can: frameworks free memory that way."""
    module, x = fastlstm.LSTM(5, 40, bidirectional=True, backend=backend), torch.randn(T, 30, 5, requires_grad=True)
    output, states, cells = module(x, return_cells=True)
    (output.sum() + cells.sum()).backward()
    with torch.no_grad():
        inferred, lengths = module(x)[0], module(x, lengths=torch.full((30,), T - 1))[0]
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    for tensor in (output, *states, cells, inferred, lengths, *gradients):
        tensor.untyped_storage().resize_(0)


def test_large_buffers_take_each_others_memory():
    """A backward pass sums the weights' gradients where the forward pass had packed the weights."""

    def large():
        return [pages.address for pages in pool._pool if pages.size > 12 << 20]

    loss = fastlstm.LSTM(650, 650, backend="numba")(torch.randn(30, 8, 650))[0].sum()
    packed = large()
    loss.backward()
    assert len(packed) == 1
    assert large() == packed


def test_the_pool_has_no_more_than_so_many_pieces_and_bytes(monkeypatch):
    like = torch.empty(0, dtype=torch.uint8)
    buffers = [pool.pooled(like, pool.SMALL) for _ in range(pool.MAX_PIECES + 3)]
    assert len(pool._pool) == pool.MAX_PIECES
    assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)
    del buffers
    monkeypatch.setattr(pool, "LIMIT", 4 * pool.PAGE)
    held = pool.pooled(like, 3 * pool.PAGE)  # for which the oldest went
    assert sum(pages.size for pages in pool._pool) <= pool.LIMIT
    larger = pool.pooled(like, 2 * pool.PAGE)
    assert [pages.size for pages in pool._pool] == [3 * pool.PAGE]
    address = held.data_ptr()
    del held, larger
    assert pool.pooled(like, 3 * pool.PAGE).data_ptr() == address
    pool.forget()
    assert not pool._pool


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_kept_weights_leave_the_pool_to_others(backend):
    modules, x = [fastlstm.LSTM(256, 256, backend=backend) for _ in range(3)], torch.randn(2, 1, 256)
    with torch.no_grad():
        for module in modules:
            module(x)
    assert not any(pages.holder() for pages in pool._pool)


def test_calls_leave_their_scratch_to_the_next():
    lstm, x = fastlstm.LSTM(20, 60, backend="numba"), torch.randn(3, 2, 20)
    lstm(x), lstm(x)
    (kept,) = pool.scratch
    fastlstm.LSTM(20, 58, backend="numba")(x)
    assert list(pool.scratch) == [kept]
    lstm(x)[0].sum().backward()
    assert list(pool.scratch) == [kept]


def test_calls_at_once_have_scratch_of_their_own():
    lstms, x, found = [fastlstm.LSTM(9, 33) for _ in range(4)], torch.randn(30, 1, 9), []
    with torch.no_grad():
        want = [lstm(x)[0] for lstm in lstms]

    def calls(k):
        with torch.no_grad():
            found.extend(torch.equal(lstms[k](x)[0], want[k]) for _ in range(200))

    at_once(*(partial(calls, k) for k in range(4)))
    assert len(found) == 800
    assert all(found)
    assert len(pool.scratch) <= 5


def test_no_more_scratch_stays_than_pieces():
    pool.scratch.extend(pool.Scratch() for _ in range(pool.MAX_PIECES + 2))
    assert len(pool.scratch) == pool.MAX_PIECES
    pool.forget()
    assert not pool.scratch
