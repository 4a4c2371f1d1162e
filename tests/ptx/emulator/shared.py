"""Shared memory of one CTA, which checks every access."""

import numpy as np

from tests.ptx.emulator.clock import Clock
from tests.ptx.emulator.tracker import GRANULE, WRITE_EPOCH, WRITER, Tracker, granules

BASE = 1024  # the address of dynamic shared memory: the system keeps the first KB


class Shared:
    """Bytes, and of each granule what the async operations do with it.

    Attributes:
        data: (size,) uint8, NaN at first.
        copying: whether a cp.async that nobody has waited for writes there.
        streaming: how many wgmma that nobody has waited for read there.
        fences: the number of proxy fences at the time of the last write.
    """

    def __init__(self, size: int, clock: Clock):
        self.data, self.clock, self.tracker = np.full(size, 0xFF, np.uint8), clock, Tracker(size)
        n = -(-size // GRANULE)
        self.copying, self.streaming = np.zeros(n, bool), np.zeros(n, np.int16)
        self.fences = np.full(n, -1, np.int32)

    def read(self, address: np.ndarray, width: int, thread: np.ndarray) -> np.ndarray:
        """(n, width) bytes for addresses (n,) of threads (n,)."""
        offset = self._checked(address, width, "read")
        at = granules(offset, width)
        nobody = self.tracker.rows[at, WRITER] == 0
        if nobody.any():
            self.clock.report("uninitialised", f"shared byte {GRANULE * at[nobody][0]}")
        if self.copying[at].any():
            self.clock.report("async race", "read of what cp.async still writes")
        self.tracker.note(at, thread, self.clock, writes=False)
        return self.data[offset[:, None] + np.arange(width)]

    def write(self, address: np.ndarray, data: np.ndarray, thread: np.ndarray) -> None:
        """data: (n, width) uint8."""
        offset = self._checked(address, data.shape[1], "write")
        at = granules(offset, data.shape[1])
        self._before_write(at)
        self._write(offset, at, data, thread)

    def start_copy(self, address: np.ndarray, data: np.ndarray, thread: np.ndarray) -> tuple:
        """cp.async: until `finish_copy` nobody may touch the target."""
        offset = self._checked(address, data.shape[1], "cp.async")
        at = granules(offset, data.shape[1])
        self._before_write(at)
        self.tracker.note(at, thread, self.clock, writes=True)
        self.copying[at] = True
        return offset, at, data, thread

    def finish_copy(self, copy: tuple) -> None:
        offset, at, data, thread = copy
        self.copying[at] = False
        self._write(offset, at, data, thread)

    def start_stream(self, offset: np.ndarray, width: int, thread: np.ndarray) -> np.ndarray:
        """wgmma reads `width` bytes at each offset, through the async proxy, on behalf of its threads."""
        at = granules(offset, width).ravel()
        writer = self.tracker.rows[at, WRITER]
        if (writer == 0).any():
            self.clock.report("uninitialised", f"wgmma reads shared byte {GRANULE * at[writer == 0][0]}")
        if (self.fences[at] == self.clock.proxy_fences).any():
            self.clock.report("proxy race", "wgmma reads what was written without fence.proxy.async since")
        if self.copying[at].any():
            self.clock.report("async race", "wgmma reads what cp.async still writes")
        now = (self.tracker.rows[at, WRITE_EPOCH] == self.clock.epoch) & ((writer - 1) // 32 != thread[0] // 32)
        if now.any():
            self.clock.report("race", f"wgmma reads byte {GRANULE * at[now][0]}, written in this epoch")
        self.streaming[at] += 1
        return at

    def finish_stream(self, at: np.ndarray, thread: np.ndarray) -> None:
        """The reads of all four warps end no earlier than here."""
        self.streaming[at] -= 1
        for first in range(0, len(thread), 32):
            self.tracker.note(at[:, None], np.full(at.size, thread[first]), self.clock, writes=False)

    def _checked(self, address: np.ndarray, width: int, what: str) -> np.ndarray:
        """Offsets. Those out of bounds are reported and become zero."""
        offset = address.astype(np.int64) - BASE
        if (offset % width).any():
            self.clock.report("misaligned", f"shared {what} of {width} bytes at {offset[offset % width != 0][0]}")
        bad = (offset < 0) | (offset + width > self.data.size)
        if bad.any():
            detail = f"shared {what} of {width} bytes at {offset[bad][0]} of {self.data.size}"
            self.clock.report("out of bounds", detail)
            offset = np.where(bad, 0, offset)
        return offset

    def _before_write(self, at: np.ndarray) -> None:
        if self.copying[at].any():
            self.clock.report("async race", "write of what cp.async still writes")
        if self.streaming[at].any():
            self.clock.report("async race", "write of what wgmma still reads")

    def _write(self, offset: np.ndarray, at: np.ndarray, data: np.ndarray, thread: np.ndarray) -> None:
        twice = self.tracker.note(at, thread, self.clock, writes=True)
        self.fences[at] = self.clock.proxy_fences
        where = offset[:, None] + np.arange(data.shape[1])
        self.data[where] = data
        if twice:
            same = (self.data[where] == data).all()
            self.clock.report("written twice" if same else "race", "two threads write one shared address at once")
