"""Global memory: the tensors of a launch, each in bounds of its own, which check every access."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.ptx.emulator import traffic
from tests.ptx.emulator.clock import Clock, Knowledge
from tests.ptx.emulator.tracker import GRANULE, Tracker, granules, unordered

GAP = 3 << 33


@dataclass
class Segment:
    """Tensors that share memory.

    Attributes:
        trackers: of each CTA its ordinary accesses ("weak") and its atomic ones and the like ("strong").
        messages: at each offset what the last strong write released.
    """

    name: str
    base: int
    data: np.ndarray
    trackers: dict[tuple[int, str], Tracker] = field(default_factory=dict)
    messages: dict[int, np.ndarray] = field(default_factory=dict)

    def tracker(self, cta: int, strength: str) -> Tracker:
        if (cta, strength) not in self.trackers:
            self.trackers[cta, strength] = Tracker(self.data.size)
        return self.trackers[cta, strength]


class Global:
    """Addresses lie above 2^32, with gaps, and keep the tensors' alignment to 256 bytes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.segments: list[Segment] = []
        self.addresses = dict.fromkeys(tensors, 0)
        self.changes = 0  # how often a write changed anything, for whoever waits
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in tensors.items() if t.numel())
        merged: list[tuple[int, int, list[str]]] = []
        for start, end, name in spans:
            if merged and start < merged[-1][1]:
                first, last, names = merged.pop()
                merged.append((first, max(last, end), [*names, name]))
            else:
                merged.append((start, end, [name]))
        for number, (start, end, names) in enumerate(merged, 1):
            base = number * GAP + (1 << 40) + 0xFFF00 + start % 256
            data = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
            self.segments.append(Segment("+".join(names), base, data))
            self.addresses |= {name: base + tensors[name].data_ptr() - start for name in names}
        self.bases = np.array([s.base for s in self.segments], np.uint64)

    def read(
        self, address: np.ndarray, width: int, thread: np.ndarray, knowledge: Knowledge, strength: str = "weak"
    ) -> np.ndarray:
        """(n, width) bytes for addresses (n,) of threads (n,)."""
        self._count("ld.global", address, width, thread, knowledge.clock)
        result = np.full((address.size, width), 0xFF, np.uint8)
        for segment, chosen, offset in self._located(address, width, "read", knowledge.clock):
            at = granules(offset, width)
            self._track(segment, at, thread[chosen], knowledge, strength, writes=False)
            result[chosen] = segment.data[offset[:, None] + np.arange(width)]
        return result

    def write(
        self, address: np.ndarray, data: np.ndarray, thread: np.ndarray, knowledge: Knowledge, strength: str = "weak"
    ) -> None:
        """data: (n, width) uint8."""
        width, clock = data.shape[1], knowledge.clock
        self._count("st.global", address, width, thread, clock)
        for segment, chosen, offset in self._located(address, width, "write", clock):
            twice = self._track(segment, granules(offset, width), thread[chosen], knowledge, strength, writes=True)
            where = offset[:, None] + np.arange(width)
            self.changes += bool((segment.data[where] != data[chosen]).any())
            segment.data[where] = data[chosen]
            if twice:
                same = (segment.data[where] == data[chosen]).all()
                kind = "written twice" if same else "race"
                clock.report(kind, f"two threads write one address of {segment.name} at once")

    def change(
        self, address: np.ndarray, width: int, thread: np.ndarray, knowledge: Knowledge,
        function: Callable[[int, np.ndarray], np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """Atomics: for one thread after the other, replace the bytes at its address by function(n, bytes). Return the
        bytes (n, width) that each found.
        """
        self._count("atom.global", address, width, thread, knowledge.clock)
        result = np.full((address.size, width), 0xFF, np.uint8)
        for segment, chosen, offset in self._located(address, width, "atomic", knowledge.clock):
            self._track(segment, granules(offset, width), thread[chosen], knowledge, "strong", writes=True)
            for n, start in zip(chosen, offset):
                found = segment.data[start : start + width]
                result[n] = found
                new = function(n, result[n])
                self.changes += bool((found != new).any())
                found[:] = new
        return result

    def place(self, address: int) -> tuple[dict[int, np.ndarray], int]:
        """The messages of an address's segment, and the offset there."""
        number = int(np.searchsorted(self.bases, np.uint64(address), side="right")) - 1
        if number < 0:
            return {}, 0
        return self.segments[number].messages, address - self.segments[number].base

    def _track(
        self, segment: Segment, at: np.ndarray, thread: np.ndarray, knowledge: Knowledge, strength: str, writes: bool
    ) -> bool:
        clock = knowledge.clock
        for (cta, other), tracker in segment.trackers.items():
            if cta == clock.cta or strength == other == "strong":
                continue
            if not (tracker.touches("write", at) or (writes and tracker.touches("read", at))):
                continue
            who, which = np.unique(thread, return_inverse=True) if knowledge.apart else (thread[:1], None)
            known = np.stack([knowledge.of(int(t))[cta] for t in who])
            which = np.zeros(thread.size, np.int64) if which is None else which.reshape(-1)
            found = unordered(tracker.rows, at, which, known, writes)
            if found >= 0:
                what = ("read" if not writes else "write") + " after " + ("read" if found % 2 else "write")
                detail = f"{what}: {segment.name}, byte {GRANULE * at[found // 2, 0]}, CTA {clock.cta} after {cta}"
                clock.report("cta-race", detail)
        return segment.tracker(clock.cta, strength).note(at, thread, clock, writes, races=strength == "weak")

    def _located(self, address: np.ndarray, width: int, what: str, clock: Clock) -> Iterator[tuple]:
        """(segment, which of the addresses, their offsets) of all that are in bounds."""
        odd = address % np.uint64(width) != 0
        if odd.any():
            clock.report("misaligned", f"global {what} of {width} bytes at {address[odd][0]:#x}")
        number = np.searchsorted(self.bases, address, side="right").astype(np.int64) - 1
        for k in np.unique(number):
            chosen = np.flatnonzero(number == k)
            if k < 0:
                clock.report("out of bounds", f"global {what} at {address[chosen][0]:#x}, below all tensors")
                continue
            segment = self.segments[k]
            offset = (address[chosen] - np.uint64(segment.base)).astype(np.int64)
            bad = offset + width > segment.data.size
            if bad.any():
                detail = f"global {what} of {width} bytes at {offset[bad][0]} of {segment.name}'s {segment.data.size}"
                clock.report("out of bounds", detail)
                chosen, offset = chosen[~bad], offset[~bad]
            if chosen.size:
                yield segment, chosen, offset

    def _count(self, what: str, address: np.ndarray, width: int, thread: np.ndarray, clock: Clock) -> None:
        if address.size:
            touched, fewest = traffic.sectors(address, width, thread)
            clock.traffic[f"{what} sectors"] += touched
            clock.traffic[f"{what} sectors at best"] += fewest


def _extent(t: torch.Tensor) -> int:
    return (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) + 1) * t.element_size()
