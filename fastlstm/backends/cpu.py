"""Helpers of the CPU backends: the number of threads and their pool, addresses, and copies of weights."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Bytes of weights above which they and their packed form do not both stay in a second-level cache: a single step then
# packs in the call, see docs/design.md.
LARGE = 1 << 20
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's threads do not exist here, and libgomp would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_now() -> int:
    """Return how many threads a call may use: torch's number, or one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


@cache
def openmp() -> Any:
    """Return GOMP_parallel and the addresses of omp_get_thread_num and omp_get_num_threads, or None without libgomp.

    They are of the libgomp that torch itself loaded, since two pools of threads would fight for the cores.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library.GOMP_parallel, address_of(library.omp_get_thread_num), address_of(library.omp_get_num_threads)
    except (OSError, AttributeError):
        return None


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def rows_contiguous(a: Tensor) -> Tensor:
    """Return `a` with contiguous rows. If one number stands for all rows, as in the gradient of a sum, one row does."""
    strides = a.stride()
    if strides[-1] == 1 or a.shape[-1] == 1:
        return a
    if strides[-1] != 0 or a.numel() < 1 << 16:  # copying so few is faster than the calls below
        return a.contiguous()
    sizes = [1 if stride == 0 else size for size, stride in zip(a.shape, strides)]
    return a.as_strided(sizes, strides).expand(*sizes[:-1], a.shape[-1]).contiguous().expand(a.shape)


def snapshot_of(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return copies of weights that nobody writes to. The packed form and the digest are both made from the copies, so
    they agree even if other threads write to the weights meanwhile. One thread copies, since torch's copies hang in a
    forked child.
    """
    return [None if a is None else _copy_of(a.detach().contiguous()) for a in weights]


def _copy_of(a: Tensor) -> Tensor:
    copy = torch.empty_like(a)
    ctypes.memmove(copy.data_ptr(), a.data_ptr(), a.nbytes)
    return copy
