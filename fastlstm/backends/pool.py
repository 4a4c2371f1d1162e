"""A pool of memory for large buffers, which later calls use again. It has huge pages where the system has them.

It serves memory that no user sees: saved gates, the kernels' large buffers, copies in another type. A tensor holds a
view of its piece, and the piece a weak reference to that view, by which `take` sees whether the tensor still lives. A
finalizer would run at any moment in any thread, and could swallow an exception of a signal handler.
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
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastlstm.forks import waited_for
from fastlstm.torch_private import empty_on_cpu

# Buffers of this many bytes and more come from the pool. malloc usually keeps the memory of smaller ones. Buffers of
# nearly a megabyte it may give back to the system at every call: a training step of 2.7 ms then took 4.0.
SMALL = 1 << 19
LIMIT, MAX_PIECES = 256 << 20, 64  # the most bytes and pieces of the pool; memory beyond them is used once
SCRATCH = 1 << 17  # bytes for all small buffers of a call, which saves a short call its mallocs
PAGE = 2 << 20  # bytes of a huge page
MAPPED = 32 << 20  # bytes from which malloc always maps fresh memory
# Pieces below a huge page are multiples of this. If each were a huge page, it would serve buffers of all sizes in turn,
# and all of its memory would be in use after a while.
GRANULE = 1 << 16


def _rounded(used: int) -> int:
    granule = PAGE if used > PAGE else GRANULE
    return -(-used // granule) * granule


class Pages:
    """A piece of `size` bytes at `address`, in use while the view lives to which `holder` is a weak reference."""

    __slots__ = ("address", "holder", "memory", "size")

    def __init__(self, used: int) -> None:
        self.size = _rounded(used)
        # private, so that a forked child does not write into the parent's memory
        options = () if os.name == "nt" else (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,)
        try:
            self.memory: Any = mmap.mmap(-1, self.size, *options)
        except OSError:  # torch's memory, which may be elsewhere, or torch's error
            self.memory = torch.empty(self.size, dtype=torch.uint8, device="cpu").numpy()
        else:
            if used >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # not every kernel takes this advice
                    self.memory.madvise(mmap.MADV_HUGEPAGE, 0, used // PAGE * PAGE)  # the rest in small pages
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.holder: Callable[[], memoryview | None] = lambda: None


_pool: list[Pages] = []  # the newest piece is last
_lock = waited_for(threading.RLock())  # garbage collection inside may run a finalizer that takes the lock again


def take(used: int) -> tuple[memoryview, int]:
    """Return a view of memory for `used` bytes, the caller's while the view lives, and its address: the smallest and
    then newest free piece that fits, so that layers share buffers.
    """
    size = _rounded(used)
    with _lock:
        pages = _free(size)
        stays = pages is not None or _make_room(size)
        if pages is None:
            pages = Pages(used)
        view = memoryview(pages.memory)
        pages.holder = weakref.ref(view)
        if stays:
            _pool.append(pages)
    return view, pages.address


def _free(size: int) -> Pages | None:
    """Remove a free piece that fits from the pool and return it, so that no finalizer takes it too. Or return None."""
    while True:
        best = None
        for pages in reversed(list(_pool)):
            if size <= pages.size <= 2 * size and pages.holder() is None and (best is None or pages.size < best.size):
                best = pages
        if best is None:
            return None
        try:
            _pool.remove(best)
        except ValueError:  # a finalizer has taken it
            continue
        if best.holder() is None:
            return best
        _pool.append(best)


def _make_room(size: int) -> bool:
    """Return whether a new piece of this size fits into the pool. The oldest free pieces are dropped to make room."""
    pool = list(_pool)
    held, number = sum(pages.size for pages in pool), len(pool)
    for pages in pool:
        if held + size <= LIMIT and number < MAX_PIECES:
            break
        if pages.holder() is None:
            held, number = held - pages.size, number - 1
            with suppress(ValueError):
                _pool.remove(pages)
    return held + size <= LIMIT and number < MAX_PIECES


class Scratch:
    """Memory of SCRATCH bytes at `address`, for the small buffers of a call."""

    __slots__ = ("address", "memory")

    def __init__(self) -> None:
        self.memory = torch.empty(SCRATCH, dtype=torch.uint8, device="cpu")
        self.address = self.memory.data_ptr()


# Memory for the small buffers of a call, one piece for each of the calls that ran at the same time. A call takes the
# last one, mostly what the call before has left in a cache, and gives it back.
scratch: deque[Scratch] = deque(maxlen=MAX_PIECES)


def forget() -> None:
    """Give unused memory back to the system."""
    with _lock:
        _pool[:] = [pages for pages in _pool if pages.holder() is not None]
    scratch.clear()


def unpooled(like: Tensor, *shape: int) -> Tensor:
    """Return `like.new_empty(shape)` for a tensor that users get: torch's memory, whose storage can be resized, with
    huge pages from MAPPED bytes on. With them inference at T 784, B 128, H 128 takes 0.87 of the time.
    """
    tensor = like.new_empty(*shape)
    size = tensor.numel() * tensor.itemsize
    if size >= SMALL and like.is_cpu:
        _keep_freed_memory()
        if size >= MAPPED and (advise := _madvise()) is not None:
            first = -(-tensor.data_ptr() // PAGE) * PAGE
            advise(first, (tensor.data_ptr() + size - first) // PAGE * PAGE, mmap.MADV_HUGEPAGE)
    return tensor


@lru_cache(1024)  # plans of one module have the shapes of weights in common, and of most other tensors
def new_of(shape: tuple[int, ...], dtype: torch.dtype, large: Callable[..., Tensor] = unpooled) -> Callable[[], Tensor]:
    """Return a function that makes a tensor of this shape and type on the CPU: by `large`, or faster if it is small."""
    if math.prod(shape) * dtype.itemsize < SMALL:
        strides = torch.empty(shape, dtype=dtype, device="meta").stride()
        return partial(empty_on_cpu, shape, strides, dtype)
    return partial(large, torch.empty(0, dtype=dtype, device="cpu"), *shape)


@cache
def _keep_freed_memory() -> None:
    """Make glibc's malloc keep memory that training steps free: one of the row-LSTM's then takes 0.87 of the time.
    glibc gives memory back beyond twice the largest mapped array that was ever freed. The array here is freed without
    being touched, and so raises that limit.
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
    """Return `like.new_empty(shape)`, if large and on the CPU from the pool, which no user gets: it has one size."""
    count = math.prod(shape)
    size = count * like.itemsize
    if size < SMALL or not like.is_cpu:
        return like.new_empty(*shape)  # with the shape as a tuple it would take half as long again
    view, _ = take(size)
    # The storage keeps the view alive. A slice of a longer tensor would share that tensor's version counter.
    return torch.frombuffer(view, dtype=like.dtype, count=count).resize_(*shape)


def converted(a: Tensor, dtype: torch.dtype, new: Callable[..., Tensor] = pooled) -> Tensor:
    """Return a contiguous copy with the values of ``a.to(dtype)``. If it is large, `new` makes its memory."""
    if a.numel() * dtype.itemsize < SMALL:
        return a.to(dtype).contiguous()
    return new(a.new_empty(0, dtype=dtype), *a.shape).copy_(a)
