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

SMALL = 1 << 20  # below this malloc keeps the memory anyway
LIMIT = 256 << 20  # bytes the pool may hold while nobody uses them
PAGE = 2 << 20

_free: deque[mmap.mmap] = deque()  # append and pop are atomic, and finalizers run anywhere


def _release(pages: mmap.mmap) -> None:
    _free.append(pages)
    held = sum(len(p) for p in list(_free))
    while held > LIMIT and _free:
        held -= len(_free.popleft())


def forget() -> None:
    """Give back to the system what nobody uses."""
    _free.clear()


def _take(used: int) -> mmap.mmap:
    size = -(-used // PAGE) * PAGE
    # the smallest that serves: a layer's buffers are another's, but a large one is not spent on a small need
    for limit in sorted({len(pages) for pages in list(_free) if size <= len(pages) <= 2 * size}):
        for _ in range(len(_free)):
            try:
                pages = _free.pop()
            except IndexError:
                break
            if len(pages) == limit:
                return pages
            _free.appendleft(pages)
    if os.name == "nt":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared, a forked child would write into them
    if used >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # advice, which not every kernel takes
            pages.madvise(mmap.MADV_HUGEPAGE, 0, used // PAGE * PAGE)  # the rest in small pages, as it is used
    return pages


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, on the CPU from the pool where it is large."""
    size = math.prod(shape) * like.element_size()
    if size < SMALL or not like.is_cpu:
        return like.new_empty(shape)
    pages = _take(size)
    owner = (ctypes.c_char * size).from_buffer(pages)
    weakref.finalize(owner, _release, pages).atexit = False
    flat = torch.frombuffer(owner, dtype=like.dtype)
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    # not a view, so that a user may change cell states in place
    return like.new_empty(0).set_(flat.untyped_storage(), 0, shape, strides)


def converted(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, in memory that is used again where it is large. Its values are those of ``a.to(dtype)``."""
    if a.numel() * dtype.itemsize < SMALL:
        return a.to(dtype).contiguous()
    return empty(a.new_empty(0, dtype=dtype), *a.shape).copy_(a)
