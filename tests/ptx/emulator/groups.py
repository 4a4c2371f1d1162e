"""Work that ends when it is waited for: copies by cp.async, products by wgmma."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.ptx.emulator.clock import Clock
from tests.ptx.emulator.operands import Active, Unsupported
from tests.ptx.emulator.parse import Register


class Groups:
    """PTX ISA, "cp.async.commit_group" and "cp.async.wait_group"; wgmma's are alike."""

    def __init__(self) -> None:
        self.open: list[Any] = []
        self.closed: list[list[Any]] = []

    def add(self, work: Any) -> None:
        self.open.append(work)

    def commit(self, active: Active) -> None:
        if active is not None:
            raise Unsupported("a group that some of the threads commit")
        self.closed.append(self.open)
        self.open = []

    def wait(self, left: int, active: Active, finish: Callable[[Any], None]) -> None:
        if active is not None:
            raise Unsupported("a group that some of the threads wait for")
        ending = max(0, len(self.closed) - left)
        done, self.closed = self.closed[:ending], self.closed[ending:]
        for work in (w for group in done for w in group):
            finish(work)

    @property
    def under_way(self) -> bool:
        return bool(self.open or any(self.closed))


class Products(Groups):
    """wgmma's. Until they are waited for, their accumulators may not be touched, nor fragments of A overwritten.

    Registers that other instructions wrote need wgmma.fence before a product takes them: PTX ISA, "wgmma.fence".
    """

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock
        self.touched: set[int] = set()
        self.accumulating: Counter[int] = Counter()
        self.reading: Counter[int] = Counter()

    def fence(self) -> None:
        self.touched.clear()

    def started(self, D: list[Register], A: list[Register], zeros: bool) -> None:
        """zeros: the accumulator holds nothing else."""
        d, a = {r.number for r in D}, {r.number for r in A}
        if self.touched & (d | a):
            kind = "zeros after fence" if zeros and not self.touched & a else "register race"
            self.clock.report(kind, "no wgmma.fence since a register of this product was written")
            self.touched -= d | a  # once: the next product on this accumulator follows this one
        self.accumulating.update(d)
        self.reading.update(a)
        self.add((d, a))

    def finished(self, d: set[int], a: set[int]) -> None:
        self.accumulating.subtract(d)
        self.reading.subtract(a)

    def check(self, reads: set[int], writes: set[int]) -> None:
        """An ordinary instruction while products are under way."""
        if any(self.accumulating[k] for k in reads | writes):
            self.clock.report("register race", "an accumulator of a product that is under way")
        if any(self.reading[k] for k in writes):
            self.clock.report("register race", "overwrites a fragment that a product under way reads")
