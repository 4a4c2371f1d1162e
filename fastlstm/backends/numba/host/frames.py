"""A kernel ready to run, but for what is a call's own: a short call would spend longer on it than on its arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

from fastlstm.backends.memory import SCRATCH, SMALL, release_scratch, take, take_scratch
from fastlstm.backends.numba.constants import LINE
from fastlstm.backends.numba.host.cells import counts
from fastlstm.cells.spec import Cell

_Found = ctypes.c_int64 * 2  # one type: each that is made is a cycle


@cache
def constants(dtype: torch.dtype) -> torch.Tensor:
    """A kilobyte of zeros, then a one."""
    made = torch.zeros(1024 // dtype.itemsize + 1, dtype=dtype, device="cpu")
    made[-1] = 1.0
    return made


@lru_cache(64)
def zeros(count: int) -> Any:
    """So many bytes of zero, which kernels read in the place of a state."""
    return ctypes.create_string_buffer(count)


class Kernel:
    """A task, the arguments that all its calls share, the sizes of its buffers, and the frames that calls run in.

    Attributes:
        steps: bytes from one of a buffer to the next, where lanes of a stack have their own.
    """

    def __init__(
        self, task: str, kind: str, cell: Cell, dtype: torch.dtype, pieces: int, threads: int, team_count: int,
        fields: dict[str, int], sizes: dict[str, int], lanes: int = 1, rare: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`kind`: Forward or Backward, of a `cell`; `pieces`: of a number on the matrix unit; `fields` of the
        arguments; `sizes` of the buffers, in elements: each thread has a ``scratch`` of its own, and each of `lanes`
        one of the others; `rare`: the kinds of `primitives.RARE` that it needs.
        """
        from fastlstm.backends.numba.host import arguments, tasks

        tasks.prepare_kernel(task, cell, dtype.itemsize, pieces, rare)
        self.lay_out(threads, team_count, sizes, dtype.itemsize, lanes)
        self.task, found = task, counts(cell)
        made, self.tails = arguments.struct_of(kind, found.others, found.values, found.params)
        self.arguments = made(
            **tasks.primitives(dtype.itemsize, pieces), **tasks.cell_primitives(cell, dtype.itemsize),
            **{name: at for each in rare for name, at in tasks.rare(dtype.itemsize, each).items()},
            relax=tasks.relax(), constants=constants(dtype).data_ptr(), team_count=team_count,
            scratch_bytes=self.steps["scratch"], **fields,
        )  # fmt: skip

    def lay_out(self, threads: int, team_count: int, sizes: dict[str, int], size: int, lanes: int) -> None:
        """Give each buffer its place, in memory that a frame borrows for a run.

        Args:
            sizes: of the buffers, in elements of `size` bytes.
        """
        places, large, self.steps = [], [], {}
        self.counters = total = LINE * (team_count + 2) if threads > 1 else 0
        for name, count in sizes.items():
            self.steps[name] = -(-count * size // LINE) * LINE
            needed = self.steps[name] * (threads if name == "scratch" else lanes)
            if needed >= SMALL:
                large.append((name, needed))
            elif needed:
                places.append((name, total))
                total += needed
        self.small, self.places = total, places  # one piece of memory for all of these
        self.large = sorted(large, key=lambda entry: -entry[1])  # what the pool has goes to those that it fits
        self.threads = threads
        self.idle: list[Frame] = []

    def borrow(self) -> Frame:
        """A frame for one run, with its buffers."""
        try:
            frame = self.idle.pop()  # atomic: Python threads may share the kernel
        except IndexError:
            frame = Frame(self)
        if self.small <= SCRATCH:
            frame.memory = memory = take_scratch()  # mostly what the last call of any kernel has left in a cache
            if memory.address != frame.at:
                frame.place(self, memory.address)
        elif self.small < SMALL:
            self._place_alone(frame)
        else:
            view, at = take(self.small)
            frame.views.append(view)
            frame.place(self, at)
        if self.counters:
            frame.count_anew()
        if self.large:
            self._take_large(frame)
        return frame

    def keep(self) -> Frame:
        """A frame for many runs, with buffers of its own."""
        frame = Frame(self)
        self._place_alone(frame)
        self._take_large(frame)
        return frame

    def _place_alone(self, frame: Frame) -> None:
        """Have the small buffers lie in memory that nothing else uses."""
        frame.memory = torch.empty(self.small, dtype=torch.uint8, device="cpu")
        frame.place(self, frame.memory.data_ptr())

    def _take_large(self, frame: Frame) -> None:
        for name, count in self.large:
            view, address = take(count)
            frame.views.append(view)
            setattr(frame.arguments, name, address)

    def take_back(self, frame: Frame) -> None:
        """Let go of a frame and of its buffers."""
        if self.small <= SCRATCH:
            release_scratch(frame.memory)
        frame.memory = None
        if frame.views:
            frame.views.clear()
        self.idle.append(frame)

    def run_stack(self, frame: Frame, groups: int, by_group: dict[str, int]) -> None:
        """Run the kernel for each group of a stack, whose fields lie so many bytes apart."""
        from fastlstm.backends.numba.host import tasks

        tasks.run_stack(self.task, frame.arguments, groups, by_group, self.steps, self.threads)


class Frame:
    """The arguments and buffers of one call at a time. It does not know its kernel: a cycle would outlive a layer."""

    __slots__ = ("arguments", "at", "counted", "found", "memory", "run", "stale", "views")

    def __init__(self, kernel: Kernel) -> None:
        from fastlstm.backends.numba.host import tasks

        self.arguments = type(kernel.arguments).from_buffer_copy(kernel.arguments)
        found = _Found()
        self.arguments.large = ctypes.addressof(found)
        for name, place in kernel.tails.items():
            setattr(self.arguments, name, ctypes.addressof(self.arguments) + place)
        self.stale = ctypes.addressof(found) + 8
        self.found = memoryview(found).cast("B").cast("q")  # a number too large for the unit; blocks of other weights
        self.run = tasks.ready(kernel.task, self.arguments, kernel.threads)
        self.at, self.counted = -1, memoryview(bytearray())
        self.memory: Any = None
        self.views: list[memoryview] = []

    def place(self, kernel: Kernel, at: int) -> None:
        """Have the small buffers lie from an address on."""
        self.at = self.arguments.barrier = at
        for name, place in kernel.places:
            setattr(self.arguments, name, at + place)
        if kernel.counters:
            self.counted = memoryview((ctypes.c_char * kernel.counters).from_address(at)).cast("B")

    def count_anew(self) -> None:
        """Have the barriers count from zero, as they do in each run."""
        self.counted[:] = bytes(len(self.counted))

    def look(self) -> tuple[int, int]:
        """What the kernel has found: a number that the matrix unit cannot take; weights that are not those packed."""
        large, stale = self.found
        if large or stale:
            self.found[0] = self.found[1] = 0
        return large, stale
