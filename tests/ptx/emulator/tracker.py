"""Who touched each place of a memory last, and races.

A race: one warp writes a place that another reads or writes, and no barrier of the CTA lies between. Between two
CTAs nothing does. Lanes of one warp between which there is program order alone are reported as "same-warp".
"""

import numba
import numpy as np

from tests.ptx.emulator.clock import Clock

GRANULE = 2  # bytes; PTX's narrowest access here. One of a byte counts for its neighbour as well
SEVERAL = -1
WRITER, WRITE_EPOCH, WRITE_TICK, READER, READING_WARP, READ_EPOCH, READ_TICK = range(7)  # threads and warps from 1 on
HAZARDS = "read after write", "write after write", "write after read"
KINDS = "race", "same-warp"


class Tracker:
    """The accesses of one CTA: a row for each granule. Zero is nobody; what nobody touches takes no memory."""

    def __init__(self, size: int):
        self.rows = np.zeros((-(-size // GRANULE), 7), np.int32)
        self.span = {"read": [self.rows.shape[0], -1], "write": [self.rows.shape[0], -1]}

    def note(self, at: np.ndarray, thread: np.ndarray, clock: Clock, writes: bool) -> bool:
        """Compare accesses with those before them, and note them. Return whether two of them write one granule.

        at: granules (n, of each thread). thread: (n,).
        """
        found = np.zeros((6, 4), np.int64)
        twice = _track(self.rows, at, thread, clock.epoch, clock.tick, writes, found)
        span = self.span["write" if writes else "read"]
        span[0], span[1] = min(span[0], int(at.min())), max(span[1], int(at.max()))
        for n in np.flatnonzero(found[:, 0]):
            _, granule, who, other = found[n]
            clock.report(KINDS[n % 2], f"{HAZARDS[n // 2]}: byte {GRANULE * granule}, thread {who} after {other}")
        return twice

    def conflict(self, at: np.ndarray, writes: bool) -> str:
        """Of these granules' earlier accesses the kind with which another CTA's of now would race, or nothing."""
        for kind, column in (("write", WRITER), ("read", READER))[: 1 + writes]:
            first, last = self.span[kind]
            if last >= at.min() and first <= at.max() and self.rows[at, column].any():
                return kind
        return ""


@numba.njit(cache=True)
def _note(found, n, granule, who, other):
    if not found[n, 0]:
        found[n, 1], found[n, 2], found[n, 3] = granule, who, other
    found[n, 0] += 1


@numba.njit(cache=True)
def _track(rows, at, thread, epoch, tick, writes, found):
    hazard = 2 if writes else 0
    for n in range(at.shape[0]):
        who = thread[n] + 1
        warp = thread[n] // 32 + 1
        for k in range(at.shape[1]):
            row = rows[at[n, k]]
            if row[WRITER] and row[WRITE_EPOCH] == epoch:
                if (row[WRITER] - 1) // 32 + 1 != warp:
                    _note(found, hazard, at[n, k], thread[n], row[WRITER] - 1)
                elif row[WRITER] != who and row[WRITE_TICK] == tick:
                    _note(found, hazard + 1, at[n, k], thread[n], row[WRITER] - 1)
            if writes:
                if row[READER] and row[READ_EPOCH] == epoch:
                    if row[READING_WARP] != warp:
                        _note(found, 4, at[n, k], thread[n], row[READER] - 1)
                    elif row[READ_TICK] == tick and row[READER] != who:
                        _note(found, 5, at[n, k], thread[n], row[READER] - 1)
            else:
                if row[READ_EPOCH] != epoch or row[READING_WARP] == 0:
                    row[READING_WARP] = warp
                elif row[READING_WARP] != warp:
                    row[READING_WARP] = SEVERAL
                if row[READ_TICK] != tick or row[READER] == 0:
                    row[READER] = who
                elif row[READER] != who:
                    row[READER] = SEVERAL
                row[READ_EPOCH], row[READ_TICK] = epoch, tick
    if not writes:
        return False
    for n in range(at.shape[0]):
        for k in range(at.shape[1]):
            row = rows[at[n, k]]
            row[WRITER], row[WRITE_EPOCH], row[WRITE_TICK] = thread[n] + 1, epoch, tick
    for n in range(at.shape[0]):
        for k in range(at.shape[1]):
            if rows[at[n, k], WRITER] != thread[n] + 1:
                return True
    return False


def granules(offset: np.ndarray, width: int) -> np.ndarray:
    """(n, of each access) of offsets (n,) of accesses of `width` bytes."""
    return offset[:, None] // GRANULE + np.arange(max(width // GRANULE, 1))
