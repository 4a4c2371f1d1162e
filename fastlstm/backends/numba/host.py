"""What every call needs before its kernel runs: sizes, threads, memory, and the fields of its argument struct."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.cpu import threads_now
from fastlstm.backends.memory import empty


@cache
def lanes_of(dtype: torch.dtype) -> int:
    from fastlstm.backends.numba.simd import VECTOR_BYTES

    return VECTOR_BYTES // dtype.itemsize


def panels_of(size: int, lanes: int) -> int:
    return (size + lanes - 1) // lanes


def split(B: int, H: int, K: int, panels: int, pieces: int) -> tuple[int, int]:
    """Threads, and into how many parts they split the batch rows; threads within a part split the units.

    Parts meet nobody, but each reads all weights; a split of units halves what a thread reads, for a barrier of a
    microsecond a step. So a part is given the rows that fill a pass over a panel, and all other threads go to units.
    """
    if SERIAL * (8 if pieces == 1 else 1) > B * 4 * H * K:  # the matrix unit is so much faster where few rows use it
        return 1, 1
    threads = threads_now()
    return threads, min(threads, max(1, B // 64, panels_of(threads, panels)))


CHUNK_ROWS = 128  # (step, row) pairs whose dpreact is turned into gradients together
# Up to this size of the sums over (step, row) pairs, each half of the batch rows has its own: a thread's are then over
# what it has in its cache. It depends on nothing but the shape, so that the bits do not on the threads.
HALF_BYTES = 1 << 19
FEW_ROWS = 128  # (step, row) pairs whose weight gradients are written row by row, less for padding, see `outer`
SERIAL = 75_000  # multiply-adds of a step, below which a barrier costs what the second thread saves
LINE = 64  # bytes of a cache line: the counters of two barriers lie so far apart


@cache
def _constants(dtype: torch.dtype) -> Tensor:
    """A kilobyte of zeros, then a one."""
    memory = torch.zeros(1024 // dtype.itemsize + 1, dtype=dtype, device="cpu")
    memory[-1] = 1.0
    return memory


@cache
def _template(kind: str, dtype: torch.dtype, pieces: int) -> Any:
    """The arguments of a task with what all calls share."""
    from fastlstm.backends.numba import arguments, tasks

    constants = _constants(dtype).data_ptr()
    shared = {**tasks.primitives(dtype.itemsize, pieces), "relax": tasks.relax(), "constants": constants}
    return getattr(arguments, kind)(**shared)


def begin(
    kind: str, like: Tensor, threads: int, parts: int, sets: int = 1, pieces: int = 0, **buffers: int
) -> tuple[Any, Tensor, dict[str, int]]:
    """Arguments of a task with the fields that every task has, and with buffers.

    Args:
        buffers: elements of each buffer, of which there are `sets`; of ``scratch``, `threads`.

    Returns:
        the arguments, the tensor that keeps the buffers alive, and bytes from one of each buffer to the next.
    """
    return refresh(_template(kind, like.dtype, pieces), like, threads, parts, sets, **buffers)


def refresh(
    arguments: Any, like: Tensor, threads: int, parts: int, sets: int = 1, **buffers: int
) -> tuple[Any, Tensor, dict[str, int]]:
    """As `begin`, with all other fields those of `arguments`."""
    size, places, steps = like.element_size(), {}, {}
    total = counters = LINE * (parts + 2) if threads > 1 else 0
    for name, count in buffers.items():
        places[name], steps[name] = total, -(-count * size // LINE) * LINE
        total += steps[name] * (threads if name == "scratch" else sets)
    memory = empty(like, total // size)  # aligned to a line, as all of torch's memory
    at = memory.data_ptr()
    a = type(arguments).from_buffer_copy(arguments)  # other threads may be calling
    a.parts, a.barrier, a.scratch_bytes = parts, at, steps["scratch"]
    if counters:
        ctypes.memset(at, 0, counters)
    for name, place in places.items():
        if steps[name]:
            setattr(a, name, at + place)
    return a, memory, steps


def transposed_sizes(I: int, H: int, panels: int, lanes: int, pieces: int) -> dict[str, int]:
    """Elements of the transposed weights packed for products with dpreact: of each group of four vectors."""
    group = panels * 2 * pieces * 1024 if pieces else panels * 4 * lanes * 4 * lanes
    return {"packed_ih": panels_of(I, 4 * lanes) * group, "packed_hh": panels_of(H, 4 * lanes) * group}


def operand(I: int, H: int, B: int, pieces: int) -> tuple[int, int]:
    """Bytes from one step of 32 columns to the next in the matrix unit's operand, whose last tile may be cut off; and
    float32 elements of two such operands.
    """
    from fastlstm.backends.numba.shared import operand_steps

    pitch = (B + 32) * 64
    return pitch, 2 * pieces * operand_steps.py_func(I, H) * pitch // 4


def packed_size(I: int, H: int, lanes: int, pieces: int) -> int:
    """Elements of the packed weights."""
    from fastlstm.backends.numba.shared import operand_steps

    return panels_of(H, lanes) * (operand_steps.py_func(I, H) * pieces * 1024 if pieces else (I + H) * 4 * lanes)


def run(
    name: str,
    arguments: Any,
    threads: int,
    pieces: int,
    stack: tuple[int, dict[str, int], dict[str, int]] | None = None,
) -> bool:
    """Run a kernel, or with `stack` (groups, by_group and by_lane of `tasks.run_stack`) one for each group. False where
    the matrix unit has met a number too large to be multiplied in pieces, or infinite.
    """
    from fastlstm.backends.numba import tasks

    if pieces:
        large = ctypes.c_int64()
        arguments.large, name = ctypes.addressof(large), f"{name}_matrix"
    if stack is None:
        tasks.run(name, arguments, threads)
    else:
        tasks.run_stack(name, arguments, *stack, threads)
    return not (pieces and large.value)


@lru_cache(1024)
def backward_sizes(
    T: int, B: int, I: int, H: int, dtype: torch.dtype, pieces: int, sums: bool, to_x: bool, masked: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Fields of the backward kernel's arguments and elements of its buffers, but for transposed weights. `sums`:
    whether a gradient of the weights or the bias is wanted; `to_x`: whether one of x is.
    """
    lanes, size = lanes_of(dtype), dtype.itemsize
    panels, wide = panels_of(H, lanes), 4 * lanes
    chunk = -(-T // max(1, round(T * B / CHUNK_ROWS)))
    ring = min(4, -(-T // chunk))
    of_x = -(-(I + 1) // 16) * 16 if pieces else I  # rows of the sums before those of h
    sum_rows = of_x + (panels * 16 if pieces else H + 1)
    halves = 2 if B >= 128 and panels * sum_rows * wide * size <= HALF_BYTES else 1
    fields = {"T": T, "B": B, "I": I, "H": H, "chunk": chunk, "ring": ring, "halves": halves}
    fields |= {"sum_rows": sum_rows, "sums_of_h": of_x, "sum_of_one": I if pieces else I + H}
    buffers = {"scratch": 64 * 7 * lanes, "dc_carried": panels * B * lanes * (2 if masked else 1)}
    if pieces:
        few, kept = False, ring * chunk if to_x else 2
        pitch, blocks = (kept * B + 32) * 64, -(-chunk * (B + B % 2) // 32)
        fields |= {"kept": kept, "pitch": pitch, "columns_bytes": panels * blocks * pieces * 4096}
        fields["strips_bytes"] = pieces * blocks * sum_rows * 64
        buffers["scratch"] += 66 * wide
        buffers["dpreact"] = pieces * 2 * panels * pitch // size
        buffers["columns"] = ring * fields["columns_bytes"] // size if sums else 0
    else:
        columns = (panels_of(I, wide) + panels_of(H, wide)) * wide
        few = T * B * columns <= FEW_ROWS * (I + H)
        columns = columns if few else panels_of(I + H + 1, 24) * 24
        fields["strips_bytes"] = chunk * B * columns * size
        buffers["dpreact"] = panels * ring * chunk * B * wide
    from fastlstm.backends.numba.shared import FOLD

    both = 2 if pieces and -(-T // chunk) > FOLD else 1  # the sums, and those of the last chunks
    buffers["dweights"] = both * halves * panels * sum_rows * wide if sums and not few else 0
    buffers["strips"] = ring * fields["strips_bytes"] // size if sums else 0
    return fields, buffers


def row(a: Tensor) -> tuple[int, int]:
    """The address of (..., rows, columns) and the bytes from one row to the next."""
    return a.data_ptr(), a.stride(-2) * a.element_size()


def step_row(a: Tensor) -> tuple[int, int, int]:
    """The address of (steps, rows, columns) and the bytes from one step and one row to the next."""
    size, (step, row, _) = a.element_size(), a.stride()
    return a.data_ptr(), step * size, row * size


def groups_of(weight: Tensor) -> int:
    """How many layers these weights are: 3 dimensions are a stack, each with its group of batch rows."""
    return weight.shape[0] if weight.dim() == 3 else 1


def split_stack(groups: int, B: int, H: int, K: int) -> tuple[int, int]:
    """As `split`, for groups of B rows: each runs on one thread, and needs no barrier."""
    return (1 if groups * B * 4 * H * K < SERIAL else min(threads_now(), groups)), 1


def row_steps(B: int, **tensors: Tensor | None) -> dict[str, int]:
    """Bytes from one group's B rows to the next one's."""
    return {k: B * a.stride(-2) * a.element_size() for k, a in tensors.items() if a is not None and a.dim() > 1}


def first_steps(**tensors: Tensor | None) -> dict[str, int]:
    return {k: a.stride(0) * a.element_size() for k, a in tensors.items() if a is not None}
