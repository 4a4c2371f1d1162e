"""Global memory: the tensors of a launch, each in bounds of its own, which check every access."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.ptx.emulator.clock import Clock
from tests.ptx.emulator.tracker import Tracker, granules

GAP = 3 << 33


@dataclass
class Segment:
    """Tensors that share memory.

    Attributes:
        trackers: of each CTA its accesses.
    """

    name: str
    base: int
    data: np.ndarray
    trackers: dict[int, Tracker] = field(default_factory=dict)


class Global:
    """Addresses lie above 2^32, with gaps, and keep the tensors' alignment to 256 bytes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.segments: list[Segment] = []
        self.addresses = dict.fromkeys(tensors, 0)
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

    def read(self, address: np.ndarray, width: int, thread: np.ndarray, clock: Clock) -> np.ndarray:
        """(n, width) bytes for addresses (n,) of threads (n,)."""
        result = np.full((address.size, width), 0xFF, np.uint8)
        for segment, chosen, offset in self._located(address, width, "read", clock):
            _track(segment, granules(offset, width), thread[chosen], clock, writes=False)
            result[chosen] = segment.data[offset[:, None] + np.arange(width)]
        return result

    def write(self, address: np.ndarray, data: np.ndarray, thread: np.ndarray, clock: Clock) -> None:
        """data: (n, width) uint8."""
        width = data.shape[1]
        for segment, chosen, offset in self._located(address, width, "write", clock):
            twice = _track(segment, granules(offset, width), thread[chosen], clock, writes=True)
            where = offset[:, None] + np.arange(width)
            segment.data[where] = data[chosen]
            if twice:
                same = (segment.data[where] == data[chosen]).all()
                kind = "written twice" if same else "race"
                clock.report(kind, f"two threads write one address of {segment.name} at once")

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


def _track(segment: Segment, at: np.ndarray, thread: np.ndarray, clock: Clock, writes: bool) -> bool:
    for cta, tracker in segment.trackers.items():
        if cta != clock.cta and (earlier := tracker.conflict(at, writes)):
            detail = f"{'write' if writes else 'read'} after {earlier}: {segment.name}, CTA {clock.cta} after {cta}"
            clock.report("cta-race", detail)
    if clock.cta not in segment.trackers:
        segment.trackers[clock.cta] = Tracker(segment.data.size)
    return segment.trackers[clock.cta].note(at, thread, clock, writes)


def _extent(t: torch.Tensor) -> int:
    return (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) + 1) * t.element_size()
