"""Where a CTA is in time, and what it knows of the others: PTX ISA, "Memory Consistency Model"."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.emulator.findings import Findings


@dataclass
class Clock:
    """A CTA's time in two units: epochs end at CTA-wide barriers, ticks also at warp-wide ones and at releases.

    Attributes:
        proxy_fences: how many fences between the generic and the async proxy there were.
        instruction: the one that runs, for findings.
        traffic: counts of what memory has to do.
    """

    findings: Findings
    cta: int
    traffic: Counter[str] = field(default_factory=Counter)
    epoch: int = 1
    tick: int = 1
    proxy_fences: int = 0
    instruction: Any = None

    def report(self, kind: str, detail: str) -> None:
        self.findings.report(kind, self.instruction, detail)


class Knowledge:
    """What happened before, to the threads of a CTA: of each thread of the grid the last tick that is over.

    Only releases and acquires tell one CTA of another. `bar.sync` shares what one thread knows with its CTA, and
    `bar.warp.sync` with its warp. A fence makes a release of the thread's next strong write, and an acquire of its last
    strong reads.
    """

    def __init__(self, ctas: int, threads: int, clock: Clock):
        self.clock = clock
        self.common = np.zeros((ctas, threads), np.int32)
        self.apart: dict[int, np.ndarray] = {}  # of threads that know more than their CTA
        self.warp_tick = np.zeros(threads // 32, np.int32)  # when a warp's lanes met last
        self.fenced: dict[int, np.ndarray] = {}  # what a thread knew at its last fence
        self.seen: dict[int, np.ndarray] = {}  # what a thread has read without acquiring it

    def of(self, thread: int) -> np.ndarray:
        return self.apart.get(thread, self.common)

    def barrier(self) -> None:
        for known in self.apart.values():
            np.maximum(self.common, known, out=self.common)
        self.apart.clear()
        self.common[self.clock.cta] = self.clock.tick
        self.clock.epoch += 1
        self.clock.tick += 1

    def warp_barrier(self, warps: np.ndarray) -> None:
        for warp in warps:
            told = [known for thread, known in self.apart.items() if thread // 32 == warp]
            if told:
                together = np.maximum.reduce([self.common, *told])
                self.apart.update(dict.fromkeys(range(32 * warp, 32 * warp + 32), together))
            self.warp_tick[warp] = self.clock.tick
        self.clock.tick += 1

    def message(self, thread: int) -> np.ndarray:
        """What whoever acquires from a release by this thread then knows."""
        known, warp = self.of(thread).copy(), thread // 32
        lanes = known[self.clock.cta, 32 * warp : 32 * warp + 32]
        np.maximum(lanes, self.warp_tick[warp], out=lanes)
        known[self.clock.cta, thread] = self.clock.tick
        self.clock.tick += 1
        return known

    def acquire(self, thread: int, message: np.ndarray | None) -> None:
        if message is not None:
            self.apart[thread] = np.maximum(self.of(thread), message)

    def see(self, thread: int, message: np.ndarray | None) -> None:
        """A relaxed read, which a later fence turns into an acquire."""
        if message is not None:
            self.seen[thread] = np.maximum(self.seen.get(thread, 0), message)

    def fence(self, thread: int) -> None:
        self.acquire(thread, self.seen.pop(thread, None))
        self.fenced[thread] = self.message(thread)
