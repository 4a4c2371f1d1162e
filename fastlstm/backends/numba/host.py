"""What every call needs before its kernel runs: sizes, threads, memory, and the fields of its argument struct."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.cpu import threads_now


@cache
def lanes_of(dtype: torch.dtype) -> int:
    from fastlstm.backends.numba.simd import VECTOR_BYTES

    return VECTOR_BYTES // dtype.itemsize


def panels_of(size: int, lanes: int) -> int:
    return (size + lanes - 1) // lanes


def split(B: int, H: int, K: int, panels: int) -> tuple[int, int]:
    """Threads, and into how many parts they split the batch rows; threads within a part split the units.

    Parts meet nobody, but each reads all weights; a split of units halves what a thread reads, for a barrier of a
    microsecond a step. So a part is given the rows that fill a pass over a panel, and all other threads go to units.
    """
    if B * 4 * H * K < SERIAL:
        return 1, 1
    threads = threads_now()
    return threads, min(threads, max(1, B // 64, panels_of(threads, panels)))


SERIAL = 75_000  # multiply-adds of a step, below which a barrier costs what the second thread saves
BARRIERS = 64  # bytes between the counters of two barriers: a cache line


@cache
def _constants(dtype: torch.dtype) -> Tensor:
    """A kilobyte of zeros, then a one."""
    memory = torch.zeros(1024 // dtype.itemsize + 1, dtype=dtype, device="cpu")
    memory[-1] = 1.0
    return memory


def scratch(like: Tensor, threads: int, parts: int, floats: int) -> tuple[Any, int, int, int]:
    """Each thread's scratch: what keeps it alive, its address, bytes from one to the next; and where barriers count."""
    size = like.element_size()
    each = (floats * size + 63) // 64 * 64
    memory = like.new_empty(threads * each // size)
    if threads == 1:
        return memory, memory.data_ptr(), each, 0
    counters = (ctypes.c_char * (BARRIERS * (parts + 2)))()  # zeros
    return (memory, counters), memory.data_ptr(), each, -(-ctypes.addressof(counters) // BARRIERS) * BARRIERS


def workspace(like: Tensor, threads: int, parts: int, floats: int) -> tuple[Any, dict[str, int]]:
    """What keeps `scratch` alive, and the fields that every task has."""
    from fastlstm.backends.numba import tasks

    memory, address, each, barrier = scratch(like, threads, parts, floats)
    return memory, {
        **tasks.primitives(like.element_size()),
        "parts": parts,
        "barrier": barrier,
        "relax": tasks.relax(),
        "constants": _constants(like.dtype).data_ptr(),
        "scratch": address,
        "scratch_bytes": each,
    }


def strides(name: str, a: Tensor | None, *suffixes: str) -> dict[str, int]:
    """The address of `a` and its leading strides in bytes, as fields of an argument struct."""
    if a is None:
        return {}
    size = a.element_size()
    return {name: a.data_ptr(), **{f"{name}_{s}": stride * size for s, stride in zip(suffixes, a.stride())}}


def groups_of(weight: Tensor) -> int:
    """How many layers these weights are: 3 dimensions are a stack, each with its group of batch rows."""
    return weight.shape[0] if weight.dim() == 3 else 1


def split_stack(groups: int, B: int, H: int, K: int) -> tuple[int, int]:
    """As `split`, for groups of B rows: each runs on one thread, and needs no barrier."""
    return (1 if groups * B * 4 * H * K < SERIAL else min(threads_now(), groups)), 1


def weight_fields(name: str, a: Tensor) -> dict[str, int]:
    return strides(name, a if a.dim() == 2 else a[0], "row")


def row_steps(B: int, **tensors: Tensor | None) -> dict[str, int]:
    """Bytes from one group's B rows to the next one's."""
    return {k: B * a.stride(-2) * a.element_size() for k, a in tensors.items() if a is not None and a.dim() > 1}


def first_steps(**tensors: Tensor | None) -> dict[str, int]:
    return {k: a.stride(0) * a.element_size() for k, a in tensors.items() if a is not None}
