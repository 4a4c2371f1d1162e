"""What is prepared once, so that a call has only its own fields to write: kernels, frames, and packed weights."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from fastlstm.backends.numba.constants import LINE, ONE_OFFSET
from fastlstm.backends.numba.host.signature import Signature
from fastlstm.backends.numba.host.sizes import lanes_of
from fastlstm.backends.pool import PAGE, SCRATCH, SMALL, Pages, Scratch, scratch, take

_Flags = ctypes.c_int64 * 2  # created once: each new ctypes array type is a reference cycle


@cache
def constants(dtype: torch.dtype) -> torch.Tensor:
    """Return `ONE_OFFSET` bytes of zeros, then a one."""
    numbers = torch.zeros(ONE_OFFSET // dtype.itemsize + 1, dtype=dtype, device="cpu")
    numbers[-1] = 1.0
    return numbers


@lru_cache(64)
def zeros(count: int) -> Any:
    """Return `count` zero bytes, which kernels read in place of a state."""
    return ctypes.create_string_buffer(count)


class Kernel:
    """A task, the argument fields that all its calls share, its buffers' sizes, and the frames that calls run in.

    Attributes:
        kind, signature, threads, team_count: of the calls.
        buffer_bytes: of each buffer, the distance between those of threads or stacked layers.
        barrier_bytes: the bytes of the barriers, 0 for one thread.
        small_offsets: of the small buffers, after the barriers in one piece of memory of `small_bytes`.
        pool_buffers: names and bytes of the buffers that come from the pool.
        free_frames: the frames not in use.
    """

    kind: str  # "Forward" or "Backward"
    signature: Signature
    threads: int
    team_count: int

    def prepare_task(
        self, task: str, fields: dict[str, int], sizes: dict[str, int], buffer_sets: int, rare: Sequence[str]
    ) -> None:
        """Prepare a task.

        Args:
            fields: argument fields.
            sizes: elements of the buffers: a ``scratch`` for each thread, and `buffer_sets` of every other.
            rare: the kinds of `primitives.RARE` that the kernel needs.
        """
        from fastlstm.backends.numba.host import arguments, tasks

        s, self.task = self.signature, task
        self._lay_out(sizes, buffer_sets)
        struct, self.tails = arguments.struct_of(self.kind, s.counts)
        self.arguments = struct(
            **tasks.prepare_kernel(task, s.cell, s.dtype.itemsize, s.components, rare), size=s.dtype.itemsize,
            lanes=lanes_of(s.dtype), components=s.components, relax=tasks.relax(),
            constants=constants(s.dtype).data_ptr(), team_count=self.team_count,
            scratch_bytes=self.buffer_bytes["scratch"], **fields,
        )  # fmt: skip

    def _lay_out(self, sizes: dict[str, int], buffer_sets: int) -> None:
        """Assign each buffer, of `sizes` elements, an offset in the small memory, or to the pool."""
        size, self.buffer_bytes = self.signature.dtype.itemsize, dict[str, int]()
        self.small_offsets: list[tuple[str, int]] = []
        pool_buffers = []
        self.barrier_bytes = offset = LINE * (self.team_count + 2) if self.threads > 1 else 0
        for name, count in sizes.items():
            self.buffer_bytes[name] = -(-count * size // LINE) * LINE
            needed = self.buffer_bytes[name] * (self.threads if name == "scratch" else buffer_sets)
            if needed >= SMALL:
                pool_buffers.append((name, needed))
            elif needed:
                self.small_offsets.append((name, offset))
                offset += needed
        self.small_bytes = offset
        # largest first: what the pool has goes to the buffers that it fits
        self.pool_buffers = sorted(pool_buffers, key=lambda entry: -entry[1])
        self.free_frames: list[Frame] = []

    def borrow(self) -> Frame:
        """Return a frame for one run, with its buffers."""
        try:
            frame = self.free_frames.pop()  # atomic: Python threads may share the kernel
        except IndexError:
            frame = Frame(self)
        if self.small_bytes <= SCRATCH:
            try:
                memory = scratch.pop()
            except IndexError:
                memory = Scratch()
            frame.memory = memory
            if memory.address != frame.small_address:
                frame.set_addresses(self, memory.address)
        elif self.small_bytes < SMALL:
            self._allocate_small(frame)
        else:
            view, address = take(self.small_bytes)
            frame.views.append(view)
            frame.set_addresses(self, address)
        if self.barrier_bytes:
            frame.reset_barriers()
        if self.pool_buffers:
            self._take_from_pool(frame)
        return frame

    def own_frame(self) -> Frame:
        """Return a frame for many runs, with buffers of its own."""
        frame = Frame(self)
        self._allocate_small(frame)
        self._take_from_pool(frame)
        return frame

    def _allocate_small(self, frame: Frame) -> None:
        """Give a frame small memory that nothing else uses."""
        frame.memory = torch.empty(self.small_bytes, dtype=torch.uint8, device="cpu")
        frame.set_addresses(self, frame.memory.data_ptr())

    def _take_from_pool(self, frame: Frame) -> None:
        for name, count in self.pool_buffers:
            view, address = take(count)
            frame.views.append(view)
            setattr(frame.arguments, name, address)

    def take_back(self, frame: Frame) -> None:
        """Let go of a frame and of its buffers."""
        if self.small_bytes <= SCRATCH:
            scratch.append(frame.memory)
        frame.memory = frame.call = None
        frame.is_written = True
        if frame.views:
            frame.views.clear()
        self.free_frames.append(frame)


class Frame:
    """The arguments and buffers of one call at a time. It does not refer to its kernel: such a cycle would keep memory
    longer.

    Attributes:
        flags: an overflow flag, and the count of blocks of weights whose digests differ, which the kernel writes.
        mismatches: the address of the second.
        small_address: where the barriers and the small buffers begin, or -1.
        task, threads: what it runs, and on how many threads.
        is_written: whether the arguments are those of the call. They are not where packed weights are still missing.
        call: what the call that it is borrowed for needs when it has run, see `Pass.start`.
        beside: functions that run this frame and another one side by side, by the other.
    """

    __slots__ = (
        "arguments", "barriers", "beside", "call", "flags", "is_written", "memory", "mismatches", "run",
        "small_address", "task", "threads", "views",
    )  # fmt: skip

    def __init__(self, kernel: Kernel) -> None:
        from fastlstm.backends.numba.host import tasks

        self.arguments = type(kernel.arguments).from_buffer_copy(kernel.arguments)
        flags = _Flags()
        self.arguments.overflow_flag = ctypes.addressof(flags)
        for name, offset in kernel.tails.items():
            setattr(self.arguments, name, ctypes.addressof(self.arguments) + offset)
        self.mismatches = ctypes.addressof(flags) + 8
        self.flags = memoryview(flags).cast("B").cast("q")
        self.task, self.threads, self.beside = kernel.task, kernel.threads, dict[Frame, Any]()
        self.run = tasks.bind(kernel.task, self.arguments, kernel.threads)
        self.small_address, self.barriers, self.is_written = -1, memoryview(bytearray()), True
        self.memory: Any = None
        self.call: Any = None
        self.views: list[memoryview] = []

    def set_addresses(self, kernel: Kernel, address: int) -> None:
        """Set the addresses of the barriers and the small buffers, which lie one after the other from `address` on."""
        self.small_address = self.arguments.barrier = address
        for name, offset in kernel.small_offsets:
            setattr(self.arguments, name, address + offset)
        if kernel.barrier_bytes:
            self.barriers = memoryview((ctypes.c_char * kernel.barrier_bytes).from_address(address)).cast("B")

    def reset_barriers(self) -> None:
        """Set the barriers to zero, from which they count in each run."""
        self.barriers[:] = bytes(len(self.barriers))


class PackedWeights(NamedTuple):
    """The memory of packed weights, and the addresses of its parts and digests. Once cached it is never written to."""

    memory: Any
    addresses: tuple[int, ...]


class PackedCache:
    """Caches the packed weights of a layer and format, or None. A caller keeps its own reference to `packed`."""

    def __init__(self, *sizes: int) -> None:
        """`sizes`: bytes of each part, the last of which is the digests."""
        *self.offsets, self.size = (0, *itertools.accumulate(-(-size // LINE) * LINE for size in sizes))
        self.packed: PackedWeights | None = None

    def allocate(self) -> PackedWeights:
        """Empty the cache, and return memory for new packed weights. The caller sets `packed` after packing."""
        self.packed = None  # frees its memory before more is taken
        memory: Any
        if self.size >= PAGE:  # huge pages: weights of 13 MB are then read in 0.9 of the time
            memory = Pages(self.size)
            begin = memory.address
        else:
            memory = torch.empty(self.size, dtype=torch.uint8, device="cpu")
            begin = memory.data_ptr()
        return PackedWeights(memory, (*(begin + offset for offset in self.offsets),))


@cache
def digest_bytes(counts: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of all digests of weights. `counts`: the elements of each weight."""
    from fastlstm.backends.numba.kernels.digests import DIGEST
    from fastlstm.backends.numba.llvm.digest import DIGEST_BYTES

    return sum(-(-count * dtype.itemsize // (4 * DIGEST)) for count in counts) * DIGEST_BYTES
