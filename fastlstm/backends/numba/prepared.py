"""A kernel's arguments made ready, all but what is a call's own.

They are kept by shape: a short call would spend longer on them than on its arithmetic.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends.memory import SCRATCH, SMALL, release_scratch, take, take_scratch, unpooled
from fastlstm.backends.numba import host


class Prepared(NamedTuple):
    kernel: str  # of `tasks`
    threads: int
    arguments: Any
    small: int  # bytes of the memory that small buffers share
    counters: int  # bytes of it that barriers count in, from its start on
    places: tuple[tuple[str, int], ...]  # where in it each of them lies, in bytes
    large: tuple[tuple[str, int], ...]  # bytes of the others: each is in memory that another call's buffer may leave
    steps: dict[str, int]  # bytes from one of a buffer to the next
    of_x: int  # pieces of a number in the products with the input, 0 without the matrix unit
    idle: list[Call]  # those made that nobody is in

    def start(self, like: Tensor) -> tuple[Any, list[Tensor]]:
        """The arguments with buffers, and the tensors that keep these alive."""
        held = [unpooled(like, count // like.itemsize) for count in (self.small, *(count for _, count in self.large))]
        small, *large = (memory.data_ptr() for memory in held)  # aligned to a line, as all of torch's memory
        a = type(self.arguments).from_buffer_copy(self.arguments)  # other threads may be calling
        self.place(a, small)
        for (name, _), at in zip(self.large, large):
            setattr(a, name, at)
        return a, held

    def place(self, a: Any, at: int) -> None:
        a.barrier = at
        for name, place in self.places:
            setattr(a, name, at + place)

    def call(self, like: Tensor) -> Call:
        """A call with buffers of its own, which `run` takes."""
        try:
            call = self.idle.pop()
        except IndexError:
            call = Call(self)
        if self.small < SMALL:
            kept = self.small <= SCRATCH
            call.memory = take_scratch() if kept else like.new_empty(self.small // like.itemsize)
            at = call.memory.data_ptr()
        else:
            view, at = take(self.small)
            call.views.append(view)
        if at != call.at:  # mostly it is what it was the last time
            self.place(call.arguments, at)
            call.at, call.fresh = at, bytes(call.arguments)
            if self.counters:
                call.counted = _bytes((ctypes.c_char * self.counters).from_address(at))
        if self.counters:
            call.counted[:] = bytes(self.counters)
        for name, count in self.large:
            view, address = take(count)
            call.views.append(view)
            setattr(call.arguments, name, address)
        return call

    def run(self, call: Call, stack: tuple[int, dict[str, int], dict[str, int]] | None = None) -> tuple[bool, bool]:
        """Run the kernel, or with `stack` (groups, by_group and by_lane of `tasks.run_stack`) one for each group.

        Returns:
            whether the matrix unit has met a number too large to be multiplied in pieces, or infinite, and whether
            packed weights were found to have changed.
        """
        if stack is None:
            call.kernel()
        else:
            from fastlstm.backends.numba import tasks

            tasks.run_stack(self.kernel, call.arguments, *stack, self.threads)
        large, stale = call.found[:]
        if large or stale:
            call.found[:] = [0, 0]
        if self.small <= SCRATCH and call.memory is not None:
            release_scratch(call.memory)
        call.memory = None
        call.views.clear()
        call.contents[:] = call.fresh  # the next call finds nothing of this one's
        self.idle.append(call)
        return large != 0, stale != 0


def _bytes(memory: Any) -> memoryview:
    """What lies in a ctypes object. Writing to it takes a tenth of the time of `ctypes.memmove`."""
    return memoryview(memory).cast("B")


class Call:
    """A kernel's arguments and how to run it, for one call after another. It does not know what it was prepared by: a
    cycle would outlive its layer.
    """

    def __init__(self, prepared: Prepared) -> None:
        from fastlstm.backends.numba import tasks

        self.arguments = type(prepared.arguments).from_buffer_copy(prepared.arguments)
        self.found = (ctypes.c_int64 * 2)()
        self.arguments.large = ctypes.addressof(self.found)
        self.stale = ctypes.addressof(self.found) + 8  # for the forward kernel, where weights are packed already
        self.contents, self.at, self.fresh = _bytes(self.arguments), -1, b""
        self.counted = memoryview(b"")
        self.memory: Tensor | None = None  # of the buffers, while it runs
        self.views: list[memoryview] = []
        self.kernel = tasks.ready(prepared.kernel, self.arguments, prepared.threads)


def prepare(
    kernel: str, arguments: Any, like: torch.dtype, threads: int, parts: int, sets: int = 1, of_x: int = 0, **sizes: int
) -> Prepared:
    """`arguments` for so many threads in so many parts, with buffers of `sizes` elements: `sets` of each, and `threads`
    of ``scratch``.
    """
    size, places, large, steps = like.itemsize, [], [], {}
    total = counters = host.LINE * (parts + 2) if threads > 1 else 0
    for name, count in sizes.items():
        steps[name] = -(-count * size // host.LINE) * host.LINE
        needed = steps[name] * (threads if name == "scratch" else sets)
        if needed >= SMALL:
            large.append((name, needed))
        elif needed:
            places.append((name, total))
            total += needed
    large.sort(key=lambda entry: -entry[1])  # what the pool has goes to those that it fits
    a = type(arguments).from_buffer_copy(arguments)
    a.parts, a.scratch_bytes = parts, steps["scratch"]
    return Prepared(kernel, threads, a, total, counters, tuple(places), tuple(large), steps, of_x, [])


_kept: dict[torch.dtype, Tensor] = {}


def _constants(dtype: torch.dtype) -> Tensor:
    """A kilobyte of zeros, then a one, for good."""
    found = _kept.get(dtype)
    if found is None:
        found = torch.zeros(1024 // dtype.itemsize + 1, dtype=dtype, device="cpu")
        found[-1] = 1.0
        found = _kept.setdefault(dtype, found)  # atomic: one for all threads, since its address is kept
    return found


def template(kind: str, dtype: torch.dtype, pieces: int, **fields: int) -> Any:
    """The arguments of a task with what all calls share, and `fields`. `pieces`: of a number on the matrix unit."""
    from fastlstm.backends.numba import arguments, tasks

    constants = _constants(dtype).data_ptr()
    shared = {**tasks.primitives(dtype.itemsize, pieces), "relax": tasks.relax(), "constants": constants}
    return getattr(arguments, kind)(**shared, **fields)


@lru_cache(1024)
def forward_call(
    T: int, B: int, groups: int, I: int, H: int, dtype: torch.dtype, pieces: int, unit: bool, masked: bool, team: int,
    narrow: bool = False,
) -> Prepared:  # fmt: skip
    """A forward pass that packs its weights. `groups`: layers in a stack; `team`: threads it may use; `narrow`: whether
    x, h and the weights are of bfloat16; the rest is as in `host.input_pieces`.
    """
    lanes = host.lanes_of(dtype)
    panels, of_x = host.panels_of(H, lanes), host.input_pieces(I, H, dtype, pieces, unit)
    threads, parts = host.split(team, T, B, I, H, panels, pieces)
    if groups > 1:
        threads, parts = host.split_stack(team, groups, B, H, I + H)
    fields, sizes = host.forward_sizes(T, B, I, H, dtype, pieces, of_x, parts, masked, narrow)
    # One step reads every panel once: a thread packs it into memory that stays in its cache, in a third of the time
    # where the weights are larger than the caches. Parts of the batch rows share the packed weights instead.
    fields["places"] = threads if T == 1 and parts == 1 and not (pieces or of_x) else panels
    fields["narrow_weights"] = narrow
    sizes |= {"packed": host.packed_size(I, H, lanes, pieces, of_x, fields["places"]), "biases": panels * 4 * lanes}
    arguments, sets = template("ForwardArguments", dtype, of_x, **fields), 1 if groups == 1 else threads
    return prepare(host.forward_task(pieces, of_x), arguments, dtype, threads, parts, sets, of_x, **sizes)


@lru_cache(1024)
def backward_call(
    T: int, B: int, groups: int, I: int, H: int, dtype: torch.dtype, pieces: int, unit: bool, masked: bool, team: int,
    sums: bool, to_x: bool, packs_ih: bool, packs_hh: bool, narrow: bool = False,
) -> Prepared:  # fmt: skip
    """A backward pass. `sums` and `to_x` are as in `host.backward_sizes`; `packs_ih` and `packs_hh`: whether it packs
    the transposed weights; `narrow`: whether x, h, dh, the weights and the gradients of x and these are of bfloat16.
    """
    lanes = host.lanes_of(dtype)
    panels = host.panels_of(H, lanes)
    threads, parts = host.split(team, T, B, I, H, panels, pieces, back=True)
    if groups > 1:
        threads, parts = host.split_stack(team, groups, B, H, I + H)
    fields, sizes, of_x, of_sums = host.backward_sizes(T, B, I, H, dtype, pieces, sums, to_x, masked, unit)
    transposed = host.transposed_sizes(I, H, panels, lanes, pieces, of_x)
    sizes |= {name: transposed[name] for name, packs in (("packed_ih", packs_ih), ("packed_hh", packs_hh)) if packs}
    fields |= {"packs": packs_ih or packs_hh, "narrow_rows": narrow, "narrow_weights": narrow}
    arguments = template("BackwardArguments", dtype, of_x or of_sums, **fields)
    kernel, sets = host.backward_task(pieces, of_x, of_sums), 1 if groups == 1 else threads
    return prepare(kernel, arguments, dtype, threads, parts, sets, of_x, **sizes)
