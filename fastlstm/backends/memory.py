"""Large buffers that are used again. A fresh one costs more in page faults than the layer's arithmetic saves.

The gates of a forward pass and the dpreact of a backward pass are tens of megabytes that live for one training step.
malloc maps them anew every time; here their pages go back to a small pool when the tensor dies, in huge pages where the
system has them.
"""

import ctypes
import math
import mmap
import os
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

# Below this malloc keeps the memory, as a rule. What is nearly a megabyte it may give back to the system at every call:
# a training step of 2.7 ms then took 4.0.
SMALL = 1 << 19
LIMIT, MOST = 256 << 20, 64  # bytes, and pieces, that the pool may hold while nobody uses them
SCRATCH = 1 << 17  # bytes for the small buffers of a call, which spare a call of microseconds its malloc
PAGE = 2 << 20  # a huge one
# Of memory below a page: what nobody touches is not there, but buffers of other sizes would touch it in their turn
GRANULE = 1 << 16


def _rounded(used: int) -> int:
    granule = PAGE if used > PAGE else GRANULE
    return -(-used // granule) * granule


class Pages:
    """Memory of its own, of `size` bytes at `address`."""

    __slots__ = ("address", "memory", "size")

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


class _Loan(weakref.ref):
    __slots__ = ("pages",)
    pages: Pages


_free: deque[Pages] = deque()  # append and remove are atomic, and finalizers run anywhere
_scratch: deque[Tensor] = deque()  # one for each call that has been under way at once
_lent: dict[int, _Loan] = {}


def take(used: int) -> Pages:
    """Memory for `used` bytes, of the pool where it has some that serves: the smallest, and of these the newest. A
    layer's buffers are another's, but a large one is not spent on a small need.
    """
    size = _rounded(used)
    while True:
        best = None
        for pages in reversed(list(_free)):  # tuple() may collect garbage on its way, and a finalizer change the deque
            if size <= pages.size <= 2 * size and (best is None or pages.size < best.size):
                best = pages
        if best is None:
            return Pages(used)
        try:
            _free.remove(best)
        except ValueError:  # another thread's by now
            continue
        return best


def release(pages: Pages) -> None:
    """Give back to the pool what `take` gave."""
    _free.append(pages)
    held = 0
    for other in list(_free):
        held += other.size
    try:
        while held > LIMIT or len(_free) > MOST:
            held -= _free.popleft().size
    except IndexError:  # other threads empty it too
        pass


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
    _free.clear()
    _scratch.clear()


def _returned(loan: _Loan) -> None:
    del _lent[id(loan)]
    release(loan.pages)


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, on the CPU from the pool where it is large."""
    count = math.prod(shape)
    size = count * like.itemsize
    if size < SMALL or not like.is_cpu:
        return like.new_empty(*shape)  # a tuple takes half as long again
    pages = take(size)
    owner = memoryview(pages.memory)  # the tensor's alone
    loan = _Loan(owner, _returned)
    loan.pages = pages
    _lent[id(loan)] = loan
    # not a view, so that a user may change cell states in place
    return torch.frombuffer(owner, dtype=like.dtype, count=count).resize_(*shape)


def converted(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, in memory that is used again where it is large. Its values are those of ``a.to(dtype)``."""
    if a.numel() * dtype.itemsize < SMALL:
        return a.to(dtype).contiguous()
    return empty(a.new_empty(0, dtype=dtype), *a.shape).copy_(a)
