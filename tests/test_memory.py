"""Memory that is used again: whose it is, and how much of it stays."""

import gc
import threading
from collections import deque

import pytest
import torch

import fastlstm
from fastlstm.backends import memory, numba


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    gc.collect()  # what other tests have left would come back meanwhile
    monkeypatch.setattr(memory, "_free", deque())
    monkeypatch.setattr(memory, "_scratch", deque())


def test_the_smallest_buffer_that_serves_is_lent():
    """Of at most twice the size asked for."""
    like, MB = torch.empty(0, dtype=torch.uint8), 1 << 20
    buffers = [memory.empty(like, size * MB) for size in (6, 4, 24)]  # the newest is not what is wanted
    six, four, large = (buffer.data_ptr() for buffer in buffers)
    del buffers
    first, second, third = (memory.empty(like, 3 * MB) for _ in range(3))
    assert first.data_ptr() == four
    assert second.data_ptr() == six
    assert third.data_ptr() != large
    assert memory.empty(like, 23 * MB).data_ptr() == large


def test_small_buffers_of_other_sizes_touch_each_their_own_memory():
    """Pages that every size touched in its turn would all become as large as the largest."""
    like, KB = torch.empty(0, dtype=torch.uint8), 1 << 10
    buffers = [memory.empty(like, size * KB) for size in (700, 1400)]
    small, large = (buffer.data_ptr() for buffer in buffers)
    del buffers
    assert memory.empty(like, 1300 * KB).data_ptr() == large
    assert memory.empty(like, 690 * KB).data_ptr() == small
    assert memory.take(300 * KB).size < 400 * KB


def test_garbage_is_collected_while_the_pool_is_looked_through(monkeypatch):
    """A finalizer that gives memory back runs wherever the collector does."""
    monkeypatch.setattr(memory, "_free", deque(memory.Pages(1) for _ in range(40)))
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            cycle = [memory.empty(torch.empty(0), memory.SMALL)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*before)


def test_large_buffers_take_each_others_memory():
    """A backward pass sums the weights' gradients where the forward pass had packed the weights."""
    x, shape = torch.empty(0), (70, 8, 1, 650, 650, torch.float32, 0, False, False, 1)
    forward = numba.forward_call(*shape).call(x)
    packed = forward.arguments.packed
    while forward.pages:
        memory.release(forward.pages.pop())
    backward = numba.backward_call(*shape, True, False, False, True).call(x)
    assert backward.arguments.dweights == packed


def test_the_pool_keeps_so_many_pieces_and_bytes(monkeypatch):
    for pages in [memory.Pages(memory.GRANULE) for _ in range(memory.MOST + 3)]:
        memory.release(pages)
    assert len(memory._free) == memory.MOST
    monkeypatch.setattr(memory, "LIMIT", 10 * memory.GRANULE)
    newest = memory.Pages(memory.GRANULE)
    memory.release(newest)
    assert len(memory._free) == 10
    assert memory._free[-1] is newest
    memory.forget()
    assert not memory._free


def test_calls_leave_their_scratch_to_the_next():
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(3, 2, 5)
    with torch.no_grad():
        lstm(x), lstm(x)
        (kept,) = memory._scratch
        fastlstm.LSTM(5, 9)(x)
    assert [a.data_ptr() for a in memory._scratch] == [kept.data_ptr()]
    lstm(x)[0].sum().backward()
    assert [a.data_ptr() for a in memory._scratch] == [kept.data_ptr()]


def test_calls_at_once_have_scratch_of_their_own():
    first, second = memory.take_scratch(), memory.take_scratch()
    assert first.data_ptr() != second.data_ptr()
    memory.release_scratch(first)
    memory.release_scratch(second)
    assert memory.take_scratch() is second
    lstms, x, found = [fastlstm.LSTM(9, 33) for _ in range(4)], torch.randn(30, 1, 9), []
    with torch.no_grad():
        want = [lstm(x)[0] for lstm in lstms]

    def calls(k):
        with torch.no_grad():
            found.extend(torch.equal(lstms[k](x)[0], want[k]) for _ in range(200))

    threads = [threading.Thread(target=calls, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800
    assert all(found)
    assert len(memory._scratch) <= 5


def test_no_more_scratch_stays_than_pieces():
    lent = [memory.take_scratch() for _ in range(memory.MOST + 2)]
    for scratch in lent:
        memory.release_scratch(scratch)
    assert len(memory._scratch) == memory.MOST
    memory.forget()
    assert not memory._scratch
