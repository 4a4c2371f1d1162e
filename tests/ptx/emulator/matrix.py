"""Matrix instructions of one warp: mma.sync, ldmatrix, stmatrix.

PTX ISA, "Matrix multiply-accumulate operation using mma instruction", with groupID and threadID_in_group as there.
"""

import re
from functools import cache
from typing import Any

import numpy as np

from tests.ptx.emulator.access import addresses
from tests.ptx.emulator.operands import Active, Run, Unsupported, decode, listed
from tests.ptx.emulator.parse import Instruction

LANE = np.arange(32)
groupID, threadID_in_group = LANE // 4, LANE % 4
Places = tuple[np.ndarray, np.ndarray]  # rows and columns of the elements (registers, 32 lanes, elements of a register)


@cache
def a_places(registers: int, parts: int) -> Places:
    """A (16, K), from "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k8".

    Registers go on from rows 0-7 to rows 8-15, then to the next 4 * parts columns. parts: elements of a register.
    """
    r, part = np.arange(registers)[:, None, None], np.arange(parts)
    row = groupID[:, None] + 8 * (r % 2) + 0 * part
    return row, parts * threadID_in_group[:, None] + part + 4 * parts * (r // 2)


@cache
def b_places(registers: int, parts: int) -> Places:
    """B (K, 8), from the same sections: a lane has one column, and 4 * parts rows lie between its registers."""
    r, part = np.arange(registers)[:, None, None], np.arange(parts)
    return parts * threadID_in_group[:, None] + part + 4 * parts * r, groupID[:, None] + 0 * (part + r)


@cache
def c_places(registers: int) -> Places:
    """C and D (16, 2 * registers), from the same sections, and from "Register Fragments for wgmma.mma_async.m64nNk16":
    two columns, the same two of the rows 8-15, then the next 8 columns.
    """
    r = np.arange(registers)[:, None]
    return groupID + 8 * (r // 2 % 2), 2 * threadID_in_group + r % 2 + 8 * (r // 4)


def elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """(..., parts) float32 of registers: two of 16 bits, or one tf32, whose last 13 bits are ignored."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    return decode(np.ascontiguousarray(bits)[..., None].view(np.uint16), kind).astype(np.float32)


def fragment(m: Any, registers: list, kind: str) -> np.ndarray:
    """(warps, registers, 32, parts)"""
    return elements(np.stack([m.values[r.number].reshape(-1, 32) for r in registers], 1), kind)


def accumulator(m: Any, registers: list) -> np.ndarray:
    """(warps, 16, N)"""
    row, column = c_places(len(registers))
    result = np.empty((m.n // 32, 16, 2 * len(registers)), np.float32)
    result[:, row, column] = np.stack([m.values[r.number].view(np.float32).reshape(-1, 32) for r in registers], 1)
    return result


def put_accumulator(m: Any, registers: list, result: np.ndarray) -> None:
    row, column = c_places(len(registers))
    for register, values in zip(registers, np.moveaxis(result[:, row, column], 1, 0)):
        m.write(register.number, np.ascontiguousarray(values).reshape(-1).view(np.uint32), None)


def mma(ins: Instruction, n: int) -> Run:
    found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", ins.opcode)
    if not found:
        raise Unsupported(ins.text)
    K, kind = int(found[1]), found[2]
    D, A, B, C = map(listed, ins.operands)
    parts = 1 if kind == "tf32" else 2
    a_row, a_column = a_places(len(A), parts)
    b_row, b_column = b_places(len(B), parts)

    def run(m: Any, active: Active) -> None:
        m.whole_cta(active)
        a, b = np.empty((n // 32, 16, K), np.float32), np.empty((n // 32, K, 8), np.float32)
        a[:, a_row, a_column] = fragment(m, A, kind)
        b[:, b_row, b_column] = fragment(m, B, kind)
        put_accumulator(m, D, accumulator(m, C) + a @ b)

    return run


def _matrices(ins: Instruction) -> tuple[int, bool]:
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise Unsupported(ins.text)
    return int(next(p for p in ins.parts if re.fullmatch(r"x[124]", p))[1:]), "trans" in ins.parts


def ldmatrix(ins: Instruction, n: int) -> Run:
    """PTX ISA, "Warp-level matrix load instruction: ldmatrix".

    Lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i. Of that a lane gets two elements of row lane / 4.
    """
    count, transposed = _matrices(ins)
    registers, where = listed(ins.operands[0]), addresses(ins.operands[1], n)
    givers = np.flatnonzero(np.arange(n) % 32 < 8 * count)

    def run(m: Any, active: Active) -> None:
        m.whole_cta(active)
        rows = m.shared.read(where(m)[givers], 16, m.threads[givers])
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(n // 32, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(n // 32, count, 32)
        for k, register in enumerate(registers):
            m.write(register.number, np.ascontiguousarray(pairs[:, k]).reshape(-1), None)

    return run


def stmatrix(ins: Instruction, n: int) -> Run:
    """PTX ISA, "Warp-level matrix store instruction: stmatrix": ldmatrix the other way."""
    count, transposed = _matrices(ins)
    where, registers = addresses(ins.operands[0], n), listed(ins.operands[1])
    givers = np.flatnonzero(np.arange(n) % 32 < 8 * count)

    def run(m: Any, active: Active) -> None:
        m.whole_cta(active)
        pairs = np.stack([m.values[r.number].reshape(-1, 32) for r in registers], 1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(n // 32, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        m.shared.write(where(m)[givers], rows, m.threads[givers])

    return run
