"""Products of bfloat16, as LLVM functions of integers like those of `primitives`: on a matrix unit (`amx`), or by an
instruction of the vectors that has twice the rate of float32's (`dots`).

Sums are float32. A float32 is the sum of three bfloat16 pieces, exactly, and six of the nine products of pieces reach
float32's accuracy; two pieces and three products keep 16 bits of each factor, one piece 8. Pieces below the smallest
normal number are taken for zero: numbers below about 1e-31 lose bits.

Operands lie in tiles of 1 KB, as AMX loads them:
  rows     [piece][step of 32 k][row][32 k]: what stands left of a product, 64 bytes a row and step
  columns  [step of 32 k][piece][4][pair of k][16 columns][2]: what stands right of it, 64 columns wide
"""

from functools import cache
from types import ModuleType
from typing import Any

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm import amx, dots
from fastlstm.backends.numba.llvm.loops import Builder, Builders, counted, tables
from fastlstm.backends.numba.llvm.rows import spans, transposed
from fastlstm.backends.numba.llvm.simd import I32, I64, VECTOR_BYTES, Lanes, instruction, load, machine_features, store

FLOATS, INTS, SHORTS = Lanes(types.float32), ir.VectorType(I32, 16), ir.VectorType(ir.IntType(16), 16)


def unit() -> ModuleType | None:
    """The module of the instructions that the processor numba compiles for has, if any."""
    features = set(machine_features().split(","))
    if VECTOR_BYTES != 64:
        return None
    if {"+amx-tile", "+amx-bf16"} <= features:
        return amx
    # AMD's (sse4a is nobody else's), from Zen 4 on; on Intel's it runs at half of float32's rate
    return dots if {"+avx512bf16", "+sse4a"} <= features else None


@cache
def most_pieces() -> int:
    """Of a number, for products of bfloat16 that are faster than float32's: 0 where none are."""
    found = unit()
    return found.most_pieces() if found else 0


def _constant(value: int) -> ir.Constant:
    return ir.Constant(INTS, [ir.Constant(I32, value)] * 16)


def _pieces(b: ir.IRBuilder, x: ir.Value, pieces: int, large: ir.Value | None) -> tuple[list[ir.Value], Any]:
    """The pieces of 16 numbers, each in the upper half of its 32 bits (the lower halves hold anything), and the lanes
    of numbers from 2^63 on, together with `large`: their products may overflow one way and then the other, where the
    product of the whole numbers is finite; and an infinite number's second piece would be a NaN.
    """
    if pieces == 1 and "+avx512bf16" in machine_features().split(","):  # what has AMX has this
        rounded = instruction(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", SHORTS, x)  # integers, for LLVM's bfloat
        return [b.shl(b.zext(rounded, INTS), _constant(16))], large
    bits, upper = b.bitcast(x, INTS), _constant(0xFFFF0000)
    half: ir.Value = _constant(0x8000)
    if pieces == 1:  # to even: what PyTorch rounds by
        half = b.add(b.and_(b.lshr(bits, _constant(16)), _constant(1)), _constant(0x7FFF))
    nan = b.fcmp_unordered("uno", x, x)  # rounding may carry out of a NaN
    found = [b.select(nan, _constant(0x7FC00000), b.add(bits, half))]
    for n in range(1, pieces):
        x = b.fsub(x, b.bitcast(b.and_(found[-1], upper), FLOATS.type))  # exact
        bits = b.bitcast(x, INTS)
        found.append(bits if n == 2 else b.add(bits, half))  # the third is what is left
    if large is not None:
        size = b.and_(found[0], _constant(0x7FFF0000))
        above, is_nan = (b.icmp_signed(">", size, _constant(bits)) for bits in (0x5EFFFFFF, 0x7F800000))
        large = b.or_(large, b.and_(above, b.not_(is_nan)))
    return found, large


def _upper(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return b.trunc(b.lshr(bits, _constant(16)), SHORTS)


def _no_lanes(pieces: int) -> list[ir.Value]:
    return [ir.Constant(ir.VectorType(ir.IntType(1), 16), [0] * 16)] if pieces > 1 else []


def _tell(b: ir.IRBuilder, large: list[ir.Value], flag: ir.Value) -> None:
    """Store a one at `flag` where a lane was large."""
    if large:
        some = b.icmp_signed("!=", b.bitcast(large[0], ir.IntType(16)), ir.IntType(16)(0))
        with b.if_then(some):
            store(b, I64(1), flag)


def split(pieces: int) -> Builder:
    """Each row's 16 numbers to the half of a row of an operand, 64 bytes from one row to the next."""

    def build(b, rows, source, source_row, target, piece, flag):
        def row(source, target, *large):
            found, more = _pieces(b, FLOATS.load(b, source), pieces, large[0] if large else None)
            for n, bits in enumerate(found):
                store(b, _upper(b, bits), b.add(target, b.mul(piece, I64(n))), 2)
            return [b.add(source, source_row), b.add(target, I64(64)), *([more] if large else [])]

        _tell(b, counted(b, rows, [source, target, *_no_lanes(pieces)], row)[2:], flag)

    return build


def pairs(pieces: int) -> Builder:
    """The 16 numbers of a row of the first source, each beside the second source's: 64 bytes a row."""

    def build(b, rows, first, first_row, second, second_row, target, piece, flag):
        def row(first, second, target, *large):
            more = large[0] if large else None
            low, more = _pieces(b, FLOATS.load(b, first), pieces, more)
            high, more = _pieces(b, FLOATS.load(b, second), pieces, more)
            for n in range(pieces):
                beside = b.or_(b.lshr(low[n], _constant(16)), b.and_(high[n], _constant(0xFFFF0000)))
                store(b, beside, b.add(target, b.mul(piece, I64(n))), 4)
            moved = b.add(first, first_row), b.add(second, second_row), b.add(target, I64(64))
            return [*moved, *([more] if large else [])]

        _tell(b, counted(b, rows, [first, second, target, *_no_lanes(pieces)], row)[3:], flag)

    return build


def transpose(b, count, source, source_step, target, target_step):
    """`count` tiles of 16 by 16 pairs, transposed."""

    def tile(source, target):
        rows = [load(b, INTS, b.add(source, I64(64 * n)), 4) for n in range(16)]
        for n, value in enumerate(transposed(b, FLOATS, rows)):
            store(b, value, b.add(target, I64(64 * n)), 4)
        return [b.add(source, source_step), b.add(target, target_step)]

    counted(b, count, [source, target], tile)


def widen(b, rows, valid, width, source, source_row, target, target_row):
    """`copy_rows` from bfloat16 to float32."""

    def copy(n, target, source):
        short, bits = load(b, ir.VectorType(ir.IntType(16), n), source, 2), ir.VectorType(I32, n)
        upper = b.shl(b.zext(short, bits), ir.Constant(bits, [16] * n))
        store(b, b.bitcast(upper, ir.VectorType(FLOATS.scalar, n)), target, 4)

    def clear(n, target):
        store(b, ir.Constant(ir.VectorType(FLOATS.scalar, n), [0.0] * n), target, 4)

    spans(b, 16, rows, valid, [target, source], [target_row, source_row], [4, 2], copy)
    rest = b.add(target, b.mul(valid, I64(4)))
    spans(b, 16, rows, b.sub(width, valid), [rest], [target_row], [4], clear)


def narrow(b, rows, width, source, source_row, target, target_row):
    """Copy `width` elements of each row from float32 to bfloat16."""

    def copy(n, target, source):
        value = load(b, ir.VectorType(FLOATS.scalar, n), source, 4)
        value = b.shuffle_vector(value, value, ir.Constant(INTS, [k % n for k in range(16)]))
        short = _upper(b, _pieces(b, value, 1, None)[0][0])
        store(b, b.shuffle_vector(short, short, ir.Constant(ir.VectorType(I32, n), list(range(n)))), target, 2)

    spans(b, 16, rows, width, [target, source], [target_row, source_row], [2, 4], copy)


def builders(pieces: int) -> Builders:
    instructions = unit() or amx  # which nothing will run
    return {
        "matrix_product": (12, instructions.product(pieces)),
        "split": (6, split(pieces)),
        "pairs": (8, pairs(pieces)),
        "transpose_tiles": (5, transpose),
        "widen": (7, widen),
        "narrow": (6, narrow),
        "configure": (1, instructions.configure),
        "release": (0, instructions.release),
    }


tables.update({f"matrix{pieces}": builders(pieces) for pieces in amx.PRODUCTS})
NAMES = tuple(tables["matrix1"])
