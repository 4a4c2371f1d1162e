"""A kernel's instructions as functions, with what the machine has to know of each."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from tests.ptx.emulator import access, arithmetic, matrix, warps, wgmma
from tests.ptx.emulator.operands import Active, Run, Unsupported, registers_of
from tests.ptx.emulator.parse import Instruction, Kernel

MAKERS = {
    "ld": access.build, "st": access.build, "cp": access.build, "fence": wgmma.fence, "shfl": warps.shfl,
    "mma": matrix.mma, "ldmatrix": matrix.ldmatrix, "stmatrix": matrix.stmatrix,
    "wgmma": wgmma.build,
}  # fmt: skip
NOTHING_WRITTEN = {"st", "stmatrix", "bar", "barrier", "bra", "cp", "fence", "ret"}


@dataclass
class Operation:
    """An instruction.

    Attributes:
        control: "bra", "ret", "bar.sync" or, for what `run` does, "".
        guard: the predicate's number, or -1.
        reads, writes: numbers of registers.
    """

    ins: Instruction
    run: Run | None
    control: str
    target: int
    guard: int
    reads: set[int]
    writes: set[int]
    is_product: bool


def prepare(kernel: Kernel) -> list[Operation]:
    return [_operation(ins, kernel) for ins in kernel.instructions]


def without(code: list[Operation], lines: Collection[int]) -> list[Operation]:
    """The instructions, of which those on these lines do nothing."""
    idle = {"run": lambda m, active: None, "control": "", "guard": -1, "reads": set(), "writes": set()}
    return [replace(op, **idle, is_product=False) if op.ins.line in lines else op for op in code]


def _operation(ins: Instruction, kernel: Kernel) -> Operation:
    base, control, run, target = ins.parts[0], "", None, 0
    if base in ("bra", "ret"):
        control, target = base, kernel.labels[ins.operands[0]] if base == "bra" else len(kernel.instructions)
    elif ins.opcode in ("bar.sync", "barrier.sync"):
        if len(ins.operands) != 1:
            raise Unsupported(ins.text)
        control = "bar.sync"
    elif ins.opcode == "bar.warp.sync":
        run = _warp_sync
    elif base in MAKERS:
        run = MAKERS[base](ins, kernel.threads)
    else:
        run = arithmetic.build(ins, kernel.threads)
    named = [{r.number for r in registers_of(operand)} for operand in ins.operands]
    silent = base in NOTHING_WRITTEN or not named
    targets = 2 if ins.opcode.startswith("setp.") and ins.parts[-1].endswith("16x2") else 1  # p|q
    reads = set().union(*(named if silent else named[targets:]))
    return Operation(
        ins, run, control, target,
        guard=ins.guard.number if ins.guard else -1,
        reads=reads,
        writes=set() if silent else set().union(*named[:targets]),
        is_product=ins.opcode.startswith("wgmma.mma_async"),
    )  # fmt: skip


def _warp_sync(m: Any, active: Active) -> None:
    m.whole_warps(active)
    m.clock.tick += 1
