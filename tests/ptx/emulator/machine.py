"""A launch, whose CTAs run one after the other. Of each: registers, shared memory, and the loop over instructions.

All threads run the same instruction at once while they agree on where they are. Where they part, those furthest behind
go first until they meet. `bar.sync` holds the threads that reach it until all have.
"""

import numpy as np

from tests.ptx.emulator.clock import Clock
from tests.ptx.emulator.findings import Findings
from tests.ptx.emulator.global_memory import Global
from tests.ptx.emulator.groups import Groups, Products
from tests.ptx.emulator.operands import BITS, Active, Unsupported
from tests.ptx.emulator.parse import Kernel
from tests.ptx.emulator.program import Operation
from tests.ptx.emulator.shared import BASE, Shared


class Machine:
    """One CTA of a launch, whose threads all start at the first instruction."""

    def __init__(
        self, kernel: Kernel, code: list[Operation], shared_bytes: int, memory: Global, parameters: dict[str, int],
        grid: tuple[int, int, int], findings: Findings, number: int,
    ):  # fmt: skip
        self.code, self.n, self.memory, self.parameters, self.grid = code, kernel.threads, memory, parameters, grid
        x, y, _ = grid
        self.cta = number % x, number // x % y, number // (x * y)
        self.clock = Clock(findings, number)
        self.shared = Shared(shared_bytes, self.clock)
        self.copies, self.products = Groups(), Products(self.clock)
        # NaN of every type at first. A write puts another array in its place
        self.values = [~np.zeros(self.n, BITS[r.width]) for r in kernel.registers.values()]
        self.threads = np.arange(self.n)
        self.at = np.zeros(self.n, np.int64)  # where each thread is, while they are apart

    # What instructions use

    def special(self, name: str) -> np.ndarray:
        """PTX ISA, "Special Registers"."""
        if name == "global_smem":
            return np.full(self.n, BASE, np.uint32)
        base, _, axis = name.partition(".")
        if base in ("%ctaid", "%nctaid"):
            return np.full(self.n, (self.cta if base == "%ctaid" else self.grid)["xyz".index(axis)], np.uint32)
        if name in ("%tid.x", "%laneid"):
            return (self.threads % (32 if name == "%laneid" else 1024)).astype(np.uint32)
        if name == "%ntid.x":
            return np.full(self.n, self.n, np.uint32)
        raise Unsupported(name)

    def write(self, k: int, value: np.ndarray, active: Active) -> None:
        self.values[k] = value if active is None else np.where(active, value, self.values[k])

    def whole_warps(self, active: Active) -> None:
        if active is not None and (active.reshape(-1, 32).any(1) != active.reshape(-1, 32).all(1)).any():
            self.clock.report("divergence", "a warp-wide instruction that a part of a warp runs")

    def whole_cta(self, active: Active) -> None:
        self.whole_warps(active)
        if active is not None:
            raise Unsupported("a matrix instruction that some of the warps run")

    def finish_product(self, work: tuple) -> None:
        first, second = work
        if isinstance(first, set):
            self.products.finished(first, second)
        else:
            self.shared.finish_stream(first, second)

    # The loop

    def run(self) -> None:
        pc: int | None = 0
        while pc is not None and pc < len(self.code):
            pc = self._step(pc)
            if pc is None:
                pc = self._apart()
        if self.copies.under_way:
            self.clock.report("async race", "the kernel ends before its copies")

    def _step(self, pc: int) -> int | None:
        """The next instruction of all threads, or None where they part, and `at` has the place of each."""
        op = self.code[pc]
        self.clock.instruction, active = op.ins, None
        if op.guard >= 0:
            active = self._guard(op)
            if not active.any():
                return pc + 1
            if active.all():
                active = None
        if not op.control:
            self._execute(op, active)
            return pc + 1
        if op.control == "bar.sync":
            if active is not None:
                self.clock.report("divergence", "a barrier that not all threads reach")
            self.clock.barrier()
            return pc + 1
        if active is None:
            return op.target
        self.at = np.where(active, op.target, pc + 1)
        return None

    def _apart(self) -> int:
        """Until all threads meet; returns their common next instruction."""
        waiting, end = np.zeros(self.n, bool), len(self.code)
        while True:
            alive = self.at < end
            if (self.at == self.at[0]).all() and not waiting.any():
                return int(self.at[0])
            ready = alive & ~waiting
            if not ready.any():
                if not alive.all():
                    self.clock.report("divergence", "a barrier that not all threads reach")
                self.clock.barrier()
                self.at[waiting] += 1
                waiting[:] = False
                continue
            pc = int(self.at[ready].min())
            op, here = self.code[pc], ready & (self.at == pc)
            self.clock.instruction = op.ins
            active = here if op.guard < 0 else here & self._guard(op)
            if op.control == "bar.sync":
                waiting |= here
                continue
            self.at[here] = pc + 1
            if op.control:
                self.at[active] = op.target
            elif active.any():
                self._execute(op, active)

    def _guard(self, op: Operation) -> np.ndarray:
        return self.values[op.guard] ^ op.ins.negated

    def _execute(self, op: Operation, active: Active) -> None:
        if not op.is_product:
            if self.products.under_way:
                self.products.check(op.reads, op.writes)
            self.products.touched |= op.writes
        op.run(self, active)
