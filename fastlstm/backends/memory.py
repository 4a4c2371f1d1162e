"""Large buffers that are used again. A fresh one costs more in page faults than the layer's arithmetic saves.

The gates of a forward pass and the dpreact of a backward pass are tens of megabytes that live for one training step.
malloc maps them anew every time; here their pages stay in a small pool, in huge pages where the system has them.

Nothing of this package runs when such a tensor dies: the pool finds out at the next request which pages are free.
A finalizer would run at a moment of its own, in any thread, and would swallow what a signal handler raises meanwhile.
"""

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

# Below this malloc keeps the memory, as a rule. What is nearly a megabyte it may give back to the system at every call:
# a training step of 2.7 ms then took 4.0.
SMALL = 1 << 19
LIMIT, MOST = 256 << 20, 64  # bytes, and pieces, that the pool may have; larger needs get memory that is not used again
SCRATCH = 1 << 17  # bytes for the small buffers of a call, which spare a call of microseconds its malloc
PAGE = 2 << 20  # a huge one
MAPPED = 32 << 20  # bytes from which malloc never takes memory that it has had before
# Of memory below a page: what nobody touches is not there, but buffers of other sizes would touch it in their turn
GRANULE = 1 << 16


def _rounded(used: int) -> int:
    granule = PAGE if used > PAGE else GRANULE
    return -(-used // granule) * granule


def _nobody() -> None:
    return None


class Pages:
    """Memory of its own, of `size` bytes at `address`, which is whoever's holds the view in `holder`."""

    __slots__ = ("address", "holder", "memory", "size")

    def __init__(self, used: int) -> None:
        self.size = _rounded(used)
        if os.name == "nt":
            self.memory = mmap.mmap(-1, self.size)
        else:  # shared, a forked child would write into them
            self.memory = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if used >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # advice, which not every kernel takes
                    self.memory.madvise(mmap.MADV_HUGEPAGE, 0, used // PAGE * PAGE)  # the rest as it is used
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.holder: Callable[[], memoryview | None] = _nobody


_pool: list[Pages] = []  # the newest last
_lock = threading.Lock()
_scratch: deque[Tensor] = deque()  # one for each call that has been under way at once


def take(used: int) -> tuple[memoryview, int]:
    """A view of memory for `used` bytes, and its address. The memory is the caller's until nothing holds the view.

    It is the pool's where that has some free that serves: the smallest, and of these the newest. A layer's buffers are
    another's, but a large one is not spent on a small need. Who finds the pool in use, by another thread or by a call
    that a finalizer has interrupted, does not wait for it.
    """
    if not _lock.acquire(blocking=False):
        pages = Pages(used)
        return memoryview(pages.memory), pages.address
    try:
        pages, stays = _chosen(used)
        view = memoryview(pages.memory)
        pages.holder = weakref.ref(view)
        if stays:
            _pool.append(pages)
    finally:
        _lock.release()
    return view, pages.address


def _chosen(used: int) -> tuple[Pages, bool]:
    """Pages, out of the pool or new, and whether they are to be the pool's from now on."""
    size = _rounded(used)
    free = [pages for pages in reversed(_pool) if pages.holder() is None]
    best = min((p for p in free if size <= p.size <= 2 * size), key=lambda p: p.size, default=None)
    if best is not None:
        _pool.remove(best)
        return best, True
    held = sum(pages.size for pages in _pool)
    while free and (held + size > LIMIT or len(_pool) >= MOST):
        oldest = free.pop()
        held -= oldest.size
        _pool.remove(oldest)
    return Pages(used), held + size <= LIMIT and len(_pool) < MOST


def take_scratch() -> Tensor:
    """SCRATCH bytes, mostly those that the last call has left in a cache."""
    try:
        return _scratch.pop()
    except IndexError:
        return torch.empty(SCRATCH, dtype=torch.uint8, device="cpu")


def release_scratch(memory: Tensor) -> None:
    """Give back what `take_scratch` gave."""
    if len(_scratch) < MOST:
        _scratch.append(memory)


def forget() -> None:
    """Give back to the system what nobody uses."""
    with _lock:
        _pool[:] = [pages for pages in _pool if pages.holder() is not None]
    _scratch.clear()


def unpooled(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)` for what users get: memory of torch's own, whose storage can be resized.

    malloc maps every array of MAPPED bytes and more for itself, so that huge pages can be asked for. With these,
    inference at T 784, B 128, H 128 takes 0.87 of the time.
    """
    made = like.new_empty(*shape)
    size = made.numel() * made.itemsize
    if size >= SMALL and like.is_cpu:
        _keep_freed_memory()
        if size >= MAPPED and (advise := _madvise()) is not None:
            first = -(-made.data_ptr() // PAGE) * PAGE
            advise(first, (made.data_ptr() + size - first) // PAGE * PAGE, mmap.MADV_HUGEPAGE)
    return made


@cache
def _keep_freed_memory() -> None:
    """Have glibc's malloc keep what training steps free. It gives memory back to the system from twice the size of the
    largest mapped array that was ever freed, which is this one from now on. Nothing touches it. A training step of the
    row-LSTM takes 0.87 of the time; other allocators take no notice.
    """
    torch.empty(MAPPED - PAGE, dtype=torch.uint8, device="cpu")


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def pooled(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, on the CPU from the pool where it is large: for what no user sees, since such a storage
    cannot be resized.
    """
    count = math.prod(shape)
    size = count * like.itemsize
    if size < SMALL or not like.is_cpu:
        return like.new_empty(*shape)  # a tuple takes half as long again
    view, _ = take(size)
    # Not a view of a longer tensor: its version counter is its own. The storage holds the memory's view while it lives.
    return torch.frombuffer(view, dtype=like.dtype, count=count).resize_(*shape)


def converted(a: Tensor, dtype: torch.dtype, new: Callable[..., Tensor] = pooled) -> Tensor:
    """A contiguous copy, in memory that `new` makes where it is large. Its values are those of ``a.to(dtype)``."""
    if a.numel() * dtype.itemsize < SMALL:
        return a.to(dtype).contiguous()
    return new(a.new_empty(0, dtype=dtype), *a.shape).copy_(a)
