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
from collections.abc import Callable, Sequence
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
_scratch: deque[Tensor] = deque()  # one for each call that has been under way at once
_lock = threading.RLock()  # garbage may be collected inside, and what it finalizes may end in here again


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have had it, which does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def take(used: int) -> tuple[memoryview, int]:
    """A view of memory for `used` bytes, and its address. The memory is the caller's until nothing holds the view.

    It is the pool's where that has some free that serves: the smallest, and of these the newest. A layer's buffers are
    another's, but a large one is not spent on a small need.
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
    """Pages that serve and that nobody has, out of the pool: what a finalizer asks for meanwhile is not these."""
    while True:
        best = None
        for pages in reversed(list(_pool)):
            if size <= pages.size <= 2 * size and pages.holder() is None and (best is None or pages.size < best.size):
                best = pages
        if best is None:
            return None
        try:
            _pool.remove(best)
        except ValueError:  # a finalizer has had them since
            continue
        if best.holder() is None:
            return best
        _pool.append(best)


def _make_room(size: int) -> bool:
    """Whether new pages of this size fit into the pool, out of which the oldest that nobody has may have to go."""
    pool = list(_pool)
    held, number = sum(pages.size for pages in pool), len(pool)
    for pages in pool:
        if held + size <= LIMIT and number < MOST:
            break
        if pages.holder() is None:
            held, number = held - pages.size, number - 1
            with suppress(ValueError):
                _pool.remove(pages)
    return held + size <= LIMIT and number < MOST


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


def new_of(like: Tensor, shape: Sequence[int]) -> Callable[..., Tensor]:
    """What makes tensors of this shape: `unpooled`, or where they are small what it would call."""
    return unpooled if math.prod(shape) * like.itemsize >= SMALL else Tensor.new_empty


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
