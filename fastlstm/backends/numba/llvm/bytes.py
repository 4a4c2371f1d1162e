"""Products of int8 numbers, four columns at a time: what each vector unit has for them.

A lane of a *group* holds four columns of one weight row, a byte each. `add` adds their products with four numbers of
an operand, which are the same for all lanes, to the int32 sum of each lane. Sums of int32 are exact, so every unit
gives the same ones.
"""

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm.simd import I8, I32, VECTOR_BYTES, Lanes, instruction, load, machine_features, store

WORDS = Lanes(types.float32)
LANES = WORDS.count
SUMS, BYTES, SHORTS = (ir.VectorType(ir.IntType(bits), VECTOR_BYTES * 8 // bits) for bits in (32, 8, 16))


def _unit() -> str:
    """The instructions that this processor has."""
    features = set(machine_features().split(","))
    if VECTOR_BYTES == 64:
        return "vnni" if "+avx512vnni" in features else "avx512bw" if "+avx512bw" in features else "plain"
    if VECTOR_BYTES == 32:
        return "vnni" if features >= {"+avx512vnni", "+avx512vl"} else "avxvnni" if "+avxvnni" in features else "avx2"
    return "dotprod" if features >= {"+neon", "+dotprod"} else "plain"


UNIT = _unit()
# vpdpbusd multiplies unsigned numbers of the operand: they have this added, and sums start at minus so much times the
# sum of a weight row.
OFFSET = 128 if UNIT in ("vnni", "avxvnni") else 0
# Batch rows of a tile: their sums for 4 vectors stay in registers, with room for operands.
TILE_ROWS = {"vnni": 6 if VECTOR_BYTES == 64 else 3, "avxvnni": 3, "avx512bw": 4, "dotprod": 6}.get(UNIT, 2)


def tile_rows(pieces: int) -> int:
    """Batch rows of a tile whose numbers are of so many bytes: each byte has sums of its own."""
    return max(1, TILE_ROWS // pieces)


def wide(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The four bytes at an address in every lane."""
    return WORDS.wide(b, load(b, I32, address, 1))


def prepared(b: ir.IRBuilder, numbers: ir.Value) -> tuple[ir.Value, ...]:
    """What `add` takes for four numbers in every lane, so that it is computed once for all weights."""
    if UNIT not in ("avx2", "avx512bw"):
        return (numbers,)
    x, zeros = b.bitcast(numbers, BYTES), ir.Constant(BYTES, [0] * VECTOR_BYTES)
    negative = b.icmp_signed("<", x, zeros)
    return b.select(negative, b.sub(zeros, x), x), x if UNIT == "avx2" else negative


def add(b: ir.IRBuilder, total: ir.Value, weights: ir.Value, operand: tuple[ir.Value, ...]) -> ir.Value:
    """`total` and the products of weights with what `prepared` gave."""
    if UNIT in ("vnni", "avxvnni"):
        return instruction(b, f"llvm.x86.avx512.vpdpbusd.{VECTOR_BYTES * 8}", SUMS, total, operand[0], weights)
    if UNIT == "dotprod":
        w, x = b.bitcast(weights, BYTES), b.bitcast(operand[0], BYTES)
        return instruction(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", SUMS, total, x, w)
    w = b.bitcast(weights, BYTES)
    if UNIT == "plain":
        x = b.bitcast(operand[0], BYTES)
        for k in range(4):
            order = ir.Constant(SUMS, [4 * lane + k for lane in range(LANES)])
            left, right = (b.sext(b.shuffle_vector(a, a, order), SUMS) for a in (x, w))
            total = b.add(total, b.mul(left, right))
        return total
    # The first factor is unsigned, so it is the operand's magnitude, and the weight gets the operand's sign. A weight
    # is at least -127, so no sign is lost, and two products make at most 32512, which is not saturated.
    ones = ir.Constant(SHORTS, [1] * (VECTOR_BYTES // 2))
    magnitude, sign = operand
    if UNIT == "avx2":
        signed = instruction(b, "llvm.x86.avx2.psign.b", BYTES, w, sign)
        pairs = instruction(b, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, magnitude, signed)
        return b.add(total, instruction(b, "llvm.x86.avx2.pmadd.wd", SUMS, pairs, ones))
    signed = b.select(sign, b.sub(ir.Constant(BYTES, [0] * VECTOR_BYTES), w), w)
    pairs = instruction(b, "llvm.x86.avx512.pmaddubs.w.512", SHORTS, magnitude, signed)
    return b.add(total, instruction(b, "llvm.x86.avx512.pmaddw.d.512", SUMS, pairs, ones))


def store_low(b: ir.IRBuilder, integers: ir.Value, address: ir.Value) -> None:
    """The lowest byte of each lane."""
    store(b, b.trunc(integers, ir.VectorType(I8, integers.type.count)), address, 1)
