"""What lanes of a warp tell each other. PTX ISA, "shfl.sync"."""

from typing import Any

import numpy as np

from tests.ptx.emulator.operands import Active, Run, Unsupported, source
from tests.ptx.emulator.parse import Immediate, Instruction


def shfl(ins: Instruction, n: int) -> Run:
    """Lane j's value, or the thread's own where j lies outside of the segment that c describes."""
    target, value, b, c, *rest = ins.operands
    if len(rest) != 1 or not isinstance(c, Immediate):
        raise Unsupported(ins.text)
    clamp, segment = int(c.text, 0) & 31, int(c.text, 0) >> 8 & 31
    get, step, lane, mode = source(value, "b32", n), source(b, "b32", n), np.arange(n) % 32, ins.parts[2]
    first, last = lane & segment, (lane & segment) | (clamp & ~segment & 31)

    def run(m: Any, active: Active) -> None:
        m.whole_warps(active)
        by = step(m).astype(np.int64)
        j = {"bfly": lane ^ by, "idx": first | (by & ~segment & 31), "up": lane - by, "down": lane + by}[mode]
        inside = j >= last if mode == "up" else j <= last
        m.write(target.number, get(m)[np.where(inside, j, lane) + np.arange(n) // 32 * 32], active)

    return run
