"""A launch, whose CTAs run one after the other. Of each: registers, shared memory, and the loop over instructions.

All threads run the same instruction at once while they agree on where they are. Where they part, those furthest behind
go first until they meet. `bar.sync` holds the threads that reach it until all have.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tests.ptx.emulator.clock import Clock
from tests.ptx.emulator.findings import Findings
from tests.ptx.emulator.global_memory import Global
from tests.ptx.emulator.groups import Groups, Products
from tests.ptx.emulator.operands import BITS, Active, Unsupported
from tests.ptx.emulator.parse import Immediate, Kernel, Register
from tests.ptx.emulator.program import Operation
from tests.ptx.emulator.shared import BASE, Shared

GARBAGE = {1: True, 16: 0x7FC1, 32: 0x7FC0DEAD, 64: 0x7FF8DEAD7FC0DEAD}  # of registers that nothing has written


@dataclass(frozen=True)
class Chip:
    """What a tensor core adds at once, and the bits that it keeps below float32's: see `numerics`."""

    name: str
    products: dict[str, int]
    extra: int

    def sums(self, kind: str) -> tuple[int, int]:
        return self.products[kind], self.extra


# What a tensor core adds at once is that of Fasi et al. for the A100. Later measurements give an H100 longer blocks and
# one bit more.
CHIPS = {
    80: Chip("sm_80", {"f16": 8, "bf16": 8, "tf32": 4}, 1),
    86: Chip("sm_86", {"f16": 8, "bf16": 8, "tf32": 4}, 1),
    90: Chip("sm_90", {"f16": 16, "bf16": 16, "tf32": 8}, 2),
    100: Chip("sm_100", {"f16": 16, "bf16": 16, "tf32": 8}, 2),
    120: Chip("sm_120", {"f16": 16, "bf16": 16, "tf32": 8}, 2),
}


@dataclass
class Launch:
    """What all CTAs of a launch share.

    Attributes:
        counts: how many warps ran each instruction.
        traffic: sectors and wavefronts.
    """

    kernel: Kernel
    code: list[Operation]
    shared_bytes: int
    memory: Global
    parameters: dict[str, int]
    grid: tuple[int, int, int]
    chip: Chip
    findings: Findings
    counts: np.ndarray
    traffic: Counter[str]


class Machine:
    def __init__(self, launch: Launch, number: int):
        self.code, self.n, self.chip = launch.code, launch.kernel.threads, launch.chip
        self.memory, self.parameters, self.counts = launch.memory, launch.parameters, launch.counts
        x, y, _ = self.grid = launch.grid
        self.cta = number % x, number // x % y, number // (x * y)
        self.clock = Clock(launch.findings, number, launch.traffic)
        self.shared = Shared(launch.shared_bytes, self.clock)
        self.copies, self.products = Groups(), Products(self.clock)
        self.registers = list(launch.kernel.registers.values())
        garbage = {width: np.full(self.n, value, BITS[width]) for width, value in GARBAGE.items()}
        self.values = [garbage[r.width] for r in self.registers]  # a write puts another array in its place
        self.valid: list[bool | np.ndarray] = [False] * len(self.registers)  # of which threads a value was written
        self.bytes: dict[int, np.ndarray] = {}  # of a register of which a part was written: a bit for each byte
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
        self.bytes.pop(k, None)
        if active is None:
            self.values[k], self.valid[k] = value, True
        else:
            self.values[k] = np.where(active, value, self.values[k])
            if self.valid[k] is not True:
                self.valid[k] = active | self.valid[k]

    def inherit(self, k: int, a: int | None, b: int | None, p: int | None, active: Active) -> None:
        """Register k is a copy of a, or of b where not p. A copy of what nothing has written is not written either."""
        valid_a, valid_b = (True if x is None else self.valid[x] for x in (a, b))
        if valid_a is True and valid_b is True:
            return
        if p is None and a in self.bytes and active is None:
            self.bytes[k] = self.bytes[a]
        valid = np.where(self.values[p], valid_a, valid_b) if p is not None else np.broadcast_to(valid_a, self.n)
        self.valid[k] = valid if active is None else np.where(active, valid, self.valid[k])

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
        self.counts[pc] += self.n // 32
        self.clock.instruction, active = op.ins, None
        if op.guard >= 0:
            active = self._guard(op, None)
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
            self.counts[pc] += here.reshape(-1, 32).any(1).sum()
            active = here if op.guard < 0 else here & self._guard(op, here)
            if op.control == "bar.sync":
                waiting |= here
                continue
            self.at[here] = pc + 1
            if op.control:
                self.at[active] = op.target
            elif active.any():
                self._execute(op, active)

    def _guard(self, op: Operation, here: Active) -> np.ndarray:
        self.check_valid(op.guard, here)
        return self.values[op.guard] ^ op.ins.negated

    def check_valid(self, k: int, active: Active) -> None:
        valid = self.valid[k]
        if valid is not True and not np.all(valid if active is None else valid | ~active):
            self.clock.report("uninitialised", f"register {self.registers[k].name}")

    def _execute(self, op: Operation, active: Active) -> None:
        """What nothing has written is found where it is stored, multiplied or branched on, not where it is added."""
        doubtful = [] if op.moves else [k for k in op.reads if self.valid[k] is not True]
        if doubtful and not op.scalar:
            for k in doubtful:
                self.check_valid(k, active)
        if not op.is_product:
            if self.products.under_way:
                self.products.check(op.reads, op.writes)
            self.products.touched |= op.writes
        passed_on = None
        if doubtful and op.scalar:
            passed_on = np.logical_and.reduce([np.broadcast_to(self.valid[k], self.n) for k in doubtful])
        permuted = self._permuted(op) if doubtful and active is None and op.ins.parts[0] == "prmt" else None
        op.run(self, active)
        if permuted is not None:
            (k,) = op.writes
            self.bytes[k], self.valid[k] = permuted, permuted == 15
        elif passed_on is not None:
            for k in op.writes:
                self.valid[k] = passed_on if active is None else np.where(active, passed_on, self.valid[k])

    def _permuted(self, op: Operation) -> np.ndarray | None:
        """Which bytes of prmt's result were written: LLVM packs bytes beside others that it leaves undefined."""
        *sources, selector = op.ins.operands[1:]
        if not isinstance(selector, Immediate):
            return None
        known, chosen = np.zeros(self.n, np.int64), int(selector.text.rstrip("U"), 0)
        for n, source in enumerate(sources):
            k = source.number if isinstance(source, Register) else None
            valid = True if k is None else self.valid[k]
            known |= (self.bytes[k] if k in self.bytes else np.where(valid, 15, 0)) << 4 * n
        result = np.zeros(self.n, np.int64)
        for n in range(4):
            result |= (known >> (chosen >> 4 * n & 7) & 1) << n
        return result


def run(
    kernel: Kernel, code: list[Operation], shared_bytes: int, memory: Global, parameters: dict[str, int],
    grid: tuple[int, int, int], chip: int, findings: Findings,
) -> Launch:  # fmt: skip
    """Run all CTAs."""
    counts: np.ndarray = np.zeros(len(code), np.int64)
    launch = Launch(kernel, code, shared_bytes, memory, parameters, grid, CHIPS[chip], findings, counts, Counter())
    findings.kernel = kernel.name
    with np.errstate(all="ignore"):
        for cta in range(grid[0] * grid[1] * grid[2]):
            Machine(launch, cta).run()
    return launch
