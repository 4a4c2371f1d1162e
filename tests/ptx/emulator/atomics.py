"""Atomics and fences. PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red, fence, membar"."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.emulator.access import SCOPES, WIDE, addresses, observe, publish
from tests.ptx.emulator.arithmetic import larger, smaller
from tests.ptx.emulator.operands import BITS, TYPES, Active, Run, Unsupported, source
from tests.ptx.emulator.parse import Instruction

OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "min": smaller, "max": larger, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new, "cas": lambda old, compared, new: np.where(old == compared, new, old),
}  # fmt: skip
ORDERS = {"relaxed", "acquire", "release", "acq_rel"}


def build(ins: Instruction, n: int) -> Run:
    """Each thread reads, computes and writes as one, in the order of their numbers. Scope is .gpu unless given."""
    base, *parts, operation, kind = ins.parts
    rest = set(parts) - ORDERS - SCOPES
    if operation not in OPERATIONS or rest != {"global"} or (set(parts) & SCOPES) - WIDE:
        raise Unsupported(ins.text)
    target = ins.operands[0] if base == "atom" else None
    address, *values = ins.operands[1:] if base == "atom" else ins.operands
    dtype, where = TYPES[kind], addresses(address, n)
    width, gets = np.dtype(dtype).itemsize, [source(value, dtype, n) for value in values]
    acquires, releases = bool({"acquire", "acq_rel"} & set(parts)), bool({"release", "acq_rel"} & set(parts))

    def run(m: Any, active: Active) -> None:
        chosen = np.arange(n) if active is None else np.flatnonzero(active)
        at, thread, given = where(m)[chosen], m.threads[chosen], [get(m)[chosen] for get in gets]
        observe(m, at, thread, acquires)
        publish(m, at, thread, releases, adds=True)

        def replaced(k: int, found: np.ndarray) -> np.ndarray:
            old = found.view(dtype)
            return np.asarray(OPERATIONS[operation](old, *(v[k : k + 1] for v in given)), dtype).view(np.uint8)

        old = m.memory.change(at, width, thread, m.knowledge, replaced)
        if target is not None:
            whole = np.zeros(n, BITS[8 * width])
            whole[chosen] = np.ascontiguousarray(old).view(BITS[8 * width])[:, 0]
            m.write(target.number, whole.astype(BITS[target.width]), active)

    return run


def fence(ins: Instruction, n: int) -> Run:
    """Of a fence that ends within the CTA the emulator sees nothing: there barriers alone are counted."""
    if ins.opcode.startswith("fence.proxy.async"):

        def between_proxies(m: Any, active: Active) -> None:
            m.clock.proxy_fences += 1

        return between_proxies
    wide = ins.opcode in ("membar.gl", "membar.sys") or (ins.parts[1] in ("acq_rel", "sc") and ins.parts[-1] in WIDE)
    if not wide and not (ins.parts[-1] in ("cta", "cluster") and ins.parts[1] in ("acq_rel", "sc", "cta")):
        raise Unsupported(ins.text)

    def run(m: Any, active: Active) -> None:
        for thread in (m.threads if active is None else m.threads[active]).tolist() if wide else ():
            m.knowledge.fence(thread)

    return run
