"""Loads, stores and copies. PTX ISA, "Data Movement and Conversion Instructions: ld, st, cp.async"."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.emulator.operands import BITS, Active, Run, Unsupported, listed, source
from tests.ptx.emulator.parse import Address, Instruction
from tests.ptx.emulator.shared import BASE

HINTS = {"L1", "L2", "evict_first", "evict_last", "no_allocate", "weak", "cg", "ca"}


def addresses(operand: Address, n: int) -> Callable[[Any], np.ndarray]:
    """A function of the machine that gives each thread's address."""
    if operand.base == "global_smem":
        fixed = np.full(n, BASE + operand.offset, np.uint64)
        return lambda m: fixed
    if isinstance(operand.base, str):
        raise Unsupported(f"the variable {operand.base}")
    number, offset = operand.base.number, np.int64(operand.offset)
    if operand.base.width == 32:
        return lambda m: m.values[number].astype(np.int64) + offset
    return lambda m: (m.values[number].view(np.int64) + offset).view(np.uint64)


def build(ins: Instruction, n: int) -> Run:
    base, space = ins.parts[0], space_of(ins)
    if base == "cp":
        return _copy(ins, n)
    if space == "param" and base == "ld":
        return _load_parameter(ins, n)
    if space not in ("shared", "global"):
        raise Unsupported(ins.text)
    return (_load if base == "ld" else _store)(ins, n, space == "shared")


def space_of(ins: Instruction) -> str:
    spaces = (re.fullmatch(r"(param|shared|global)(::\w+)?", part) for part in ins.parts)
    return next((found[1] for found in spaces if found), "")


def _shape(ins: Instruction) -> tuple[list, int]:
    """The registers or immediates of a load or store, and the bytes of each."""
    known = r"v[248]|\w+::\w+|shared|global"
    if any(not re.fullmatch(known, part) and part not in HINTS for part in ins.parts[1:-1]):
        raise Unsupported(ins.text)
    value = ins.operands[0] if ins.parts[0] == "ld" else ins.operands[1]
    return listed(value), int(re.search(r"\d+", ins.parts[-1])[0]) // 8


def _load_parameter(ins: Instruction, n: int) -> Run:
    target, address = ins.operands

    def run(m: Any, active: Active) -> None:
        value = m.parameters[address.base] & (2**target.width - 1)
        m.write(target.number, np.full(n, value, BITS[target.width]), active)

    return run


def _load(ins: Instruction, n: int, shared: bool) -> Run:
    """A register wider than what is loaded gets zeros above it: "Operand Size Exceeding Instruction-Type Size"."""
    registers, width = _shape(ins)
    where, total, dtype = addresses(ins.operands[1], n), width * len(registers), BITS[8 * max(width, 2)]
    widths = {r.width for r in registers}
    if min(widths) < 8 * width or (ins.parts[-1][0] == "s" and max(widths) > 8 * width):
        raise Unsupported(ins.text)

    def run(m: Any, active: Active) -> None:
        address, thread = where(m), m.threads
        if active is not None:
            address, thread = address[active], thread[active]
        data = m.shared.read(address, total, thread) if shared else m.memory.read(address, total, thread, m.clock)
        columns = np.ascontiguousarray(data).view(np.uint8 if width == 1 else dtype)
        for k, register in enumerate(registers):
            column = columns[:, k].astype(BITS[register.width])
            if active is not None:
                whole = np.zeros(n, column.dtype)
                whole[active] = column
                column = whole
            m.write(register.number, column, active)

    return run


def _store(ins: Instruction, n: int, shared: bool) -> Run:
    values, width = _shape(ins)
    where = addresses(ins.operands[0], n)
    gets = [source(value, f"b{8 * max(width, 2)}", n) for value in values]

    def run(m: Any, active: Active) -> None:
        address, thread = where(m), m.threads
        columns = np.stack([get(m) for get in gets], 1)
        data = np.ascontiguousarray(columns.astype(np.uint8) if width == 1 else columns).view(np.uint8).reshape(n, -1)
        if active is not None:
            address, thread, data = address[active], thread[active], data[active]
        if shared:
            m.shared.write(address, data, thread)
        else:
            m.memory.write(address, data, thread, m.clock)

    return run


def _copy(ins: Instruction, n: int) -> Run:
    """cp.async: what is read now arrives when its group is waited for. Until then nobody may touch the target."""
    if ins.opcode == "cp.async.commit_group":
        return lambda m, active: m.copies.commit(active)
    if ins.opcode == "cp.async.wait_group":
        left = int(ins.operands[0].text)
        return lambda m, active: m.copies.wait(left, active, m.shared.finish_copy)
    if ins.parts[1] != "async" or ins.parts[-2:] != ["shared", "global"]:
        raise Unsupported(ins.text)
    to, origin, size, *given = ins.operands
    width, to, origin = int(size.text, 0), addresses(to, n), addresses(origin, n)
    used = source(given[0], "u32", n) if given else (lambda m: np.full(n, width, np.uint32))

    def run(m: Any, active: Active) -> None:
        chosen = np.arange(n) if active is None else np.flatnonzero(active)
        data, count = np.zeros((chosen.size, width), np.uint8), used(m)[chosen]
        if ((count != 0) & (count != width)).any():
            raise Unsupported(f"{ins.text} of a part")
        full, thread = count != 0, m.threads[chosen]
        if full.any():
            data[full] = m.memory.read(origin(m)[chosen][full], width, thread[full], m.clock)
        m.copies.add(m.shared.start_copy(to(m)[chosen], data, thread))

    return run
