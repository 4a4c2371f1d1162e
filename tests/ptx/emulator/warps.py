"""What lanes of a warp tell each other. PTX ISA, "shfl.sync" and "redux.sync"."""

from typing import Any

import numpy as np

from tests.ptx.emulator.operands import Active, Run, Unsupported, source
from tests.ptx.emulator.parse import Immediate, Instruction, Register


def shfl(ins: Instruction, n: int) -> Run:
    """Lane j's value, or the thread's own where j lies outside of the segment that c describes."""
    target, value, b, c, *rest = ins.operands
    if len(rest) != 1 or not isinstance(c, Immediate):
        raise Unsupported(ins.text)
    clamp, segment = int(c.text, 0) & 31, int(c.text, 0) >> 8 & 31
    get, step, lane, mode = source(value, np.uint32, n), source(b, np.uint32, n), np.arange(n) % 32, ins.parts[2]
    first, last = lane & segment, (lane & segment) | (clamp & ~segment & 31)

    def run(m: Any, active: Active) -> None:
        m.whole_warps(active)
        by = step(m).astype(np.int64)
        j = {"bfly": lane ^ by, "idx": first | (by & ~segment & 31), "up": lane - by, "down": lane + by}[mode]
        inside = j >= last if mode == "up" else j <= last
        origin = np.where(inside, j, lane) + np.arange(n) // 32 * 32
        valid = m.valid[value.number] if isinstance(value, Register) else True
        m.write(target.number, get(m)[origin], active)
        if valid is not True:
            m.valid[target.number] = np.broadcast_to(valid, n)[origin] & (True if active is None else active)

    return run


def redux(ins: Instruction, n: int) -> Run:
    """The largest or smallest of a warp; NaN is passed over."""
    _, _, what, *absolute, kind = ins.parts
    if what not in ("min", "max") or absolute not in ([], ["abs"]) or kind != "f32":
        raise Unsupported(ins.text)
    target, get = ins.operands[0], source(ins.operands[1], np.float32, n)
    reduce, first = np.fmax.reduce if what == "max" else np.fmin.reduce, np.abs if absolute else np.positive

    def run(m: Any, active: Active) -> None:
        m.whole_warps(active)
        m.write(target.number, reduce(first(get(m)).reshape(-1, 32), axis=1).repeat(32).view(np.uint32), active)

    return run
