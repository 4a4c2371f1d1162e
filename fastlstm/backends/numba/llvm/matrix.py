"""Products of bfloat16, as LLVM functions like those of `primitives`: on Intel's AMX (`amx`), or by an instruction on
vectors that has twice the rate of float32's (`bf16_dot`).

Sums are float32. A float32 is exactly the sum of three bfloat16 components, and six of the nine products of components
reach float32's accuracy. Two components and three products keep 16 bits of each factor, one component keeps 8. Numbers
below about 1e-31 lose bits, as components below the smallest normal number count as zero.

Operands lie in tiles of 1 KB, as AMX loads them:
    row operand      [component][K block of 32][row][32 k]: the left factor, 64 bytes for each row and K block
    column operand   [K block of 32][component][tiles][pair of k][16 columns][2]: the right factor, 16 columns a tile
"""

from functools import cache
from types import ModuleType
from typing import Any

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm import amx, bf16_dot
from fastlstm.backends.numba.llvm.loops import Builder, Builders, for_loop, tables
from fastlstm.backends.numba.llvm.rows import copy_rows, spans, transposed
from fastlstm.backends.numba.llvm.simd import (
    I32,
    I64,
    VECTOR_BYTES,
    VectorType,
    instruction,
    load,
    machine_features,
    store,
)

FLOATS, INTS, SHORTS = VectorType(types.float32), ir.VectorType(I32, 16), ir.VectorType(ir.IntType(16), 16)


def bf16_module() -> ModuleType | None:
    """Return the module of the instructions that the processor has which numba compiles for, or None."""
    features = set(machine_features().split(","))
    if VECTOR_BYTES != 64:
        return None
    if {"+amx-tile", "+amx-bf16"} <= features:
        return amx
    # AMD's from Zen 4 on, which alone has sse4a; on Intel's vdpbf16ps runs at half of float32's rate
    return bf16_dot if {"+avx512bf16", "+sse4a"} <= features else None


@cache
def max_components() -> int:
    """Return the most components for which products of bfloat16 are faster than float32's, 0 if none are."""
    module = bf16_module()
    return module.max_components() if module else 0


def _constant(value: int) -> ir.Constant:
    return ir.Constant(INTS, [ir.Constant(I32, value)] * 16)


def _split(b: ir.IRBuilder, x: ir.Value, components: int, overflow: ir.Value | None) -> tuple[list[ir.Value], Any]:
    """Return the components of 16 numbers, each in the upper half of its 32 bits, and the mask `overflow` with the
    lanes of numbers from 2^63 on: their products may overflow both ways, and infinity's second component would be NaN.
    """
    if components == 1 and "+avx512bf16" in machine_features().split(","):  # what has AMX has this
        rounded = instruction(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", SHORTS, x)  # integers, for LLVM's bfloat
        return [b.shl(b.zext(rounded, INTS), _constant(16))], overflow
    bits, upper = b.bitcast(x, INTS), _constant(0xFFFF0000)
    half: ir.Value = _constant(0x8000)
    if components == 1:  # to even: what PyTorch rounds by
        half = b.add(b.and_(b.lshr(bits, _constant(16)), _constant(1)), _constant(0x7FFF))
    nan = b.fcmp_unordered("uno", x, x)  # rounding may carry out of a NaN
    parts = [b.select(nan, _constant(0x7FC00000), b.add(bits, half))]
    for n in range(1, components):
        x = b.fsub(x, b.bitcast(b.and_(parts[-1], upper), FLOATS.type))  # exact
        bits = b.bitcast(x, INTS)
        parts.append(bits if n == 2 else b.add(bits, half))  # the third is exactly the rest
    if overflow is not None:
        size = b.and_(parts[0], _constant(0x7FFF0000))
        above, is_nan = (b.icmp_signed(">", size, _constant(bits)) for bits in (0x5EFFFFFF, 0x7F800000))
        overflow = b.or_(overflow, b.and_(above, b.not_(is_nan)))
    return parts, overflow


def _upper(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return the upper halves of 32-bit lanes."""
    return b.trunc(b.lshr(bits, _constant(16)), SHORTS)


def _no_overflow(components: int) -> list[ir.Value]:
    """Return an empty mask of lanes that overflow, or no mask for one component, which cannot."""
    return [ir.Constant(ir.VectorType(ir.IntType(1), 16), [0] * 16)] if components > 1 else []


def _set_flag(b: ir.IRBuilder, overflow: list[ir.Value], flag: ir.Value) -> None:
    """Store a one at `flag` if a lane is set in the mask `overflow`, a list of one mask or none."""
    if overflow:
        some = b.icmp_signed("!=", b.bitcast(overflow[0], ir.IntType(16)), ir.IntType(16)(0))
        with b.if_then(some):
            store(b, I64(1), flag)


def to_row_operand(components: int) -> Builder:
    """Return the builder that writes each row's 16 numbers to half a row of a row operand; rows are 64 bytes apart."""

    def build(b, rows, source, source_row, target, component_stride, flag):
        def row(source, target, *overflow):
            parts, more = _split(b, FLOATS.load(b, source), components, overflow[0] if overflow else None)
            for n, bits in enumerate(parts):
                store(b, _upper(b, bits), b.add(target, b.mul(component_stride, I64(n))), 2)
            return [b.add(source, source_row), b.add(target, I64(64)), *([more] if overflow else [])]

        _set_flag(b, for_loop(b, rows, [source, target, *_no_overflow(components)], row)[2:], flag)

    return build


def interleave(components: int) -> Builder:
    """Return the builder that writes each row's 16 numbers of the first source, each before the second source's."""

    def build(b, rows, first, first_row, second, second_row, target, component_stride, flag):
        def row(first, second, target, *overflow):
            more = overflow[0] if overflow else None
            low, more = _split(b, FLOATS.load(b, first), components, more)
            high, more = _split(b, FLOATS.load(b, second), components, more)
            for n in range(components):
                pair = b.or_(b.lshr(low[n], _constant(16)), b.and_(high[n], _constant(0xFFFF0000)))
                store(b, pair, b.add(target, b.mul(component_stride, I64(n))), 4)
            moved = b.add(first, first_row), b.add(second, second_row), b.add(target, I64(64))
            return [*moved, *([more] if overflow else [])]

        _set_flag(b, for_loop(b, rows, [first, second, target, *_no_overflow(components)], row)[3:], flag)

    return build


def transpose(b, count, source, source_step, target, target_step):
    """Transpose `count` tiles of 16 by 16 pairs."""

    def tile(source, target):
        rows = [load(b, INTS, b.add(source, I64(64 * n)), 4) for n in range(16)]
        for n, value in enumerate(transposed(b, FLOATS, rows)):
            store(b, value, b.add(target, I64(64 * n)), 4)
        return [b.add(source, source_step), b.add(target, target_step)]

    for_loop(b, count, [source, target], tile)


def widened(b: ir.IRBuilder, n: int, source: ir.Value) -> ir.Value:
    """Load n bfloat16 as float32."""
    short, bits = load(b, ir.VectorType(ir.IntType(16), n), source, 2), ir.VectorType(I32, n)
    upper = b.shl(b.zext(short, bits), ir.Constant(bits, [16] * n))
    return b.bitcast(upper, ir.VectorType(FLOATS.scalar, n))


def narrow(b, rows, width, source, source_row, target, target_row):
    """Copy `width` elements of each row from float32 to bfloat16."""

    def copy(n, target, source):
        value = load(b, ir.VectorType(FLOATS.scalar, n), source, 4)
        value = b.shuffle_vector(value, value, ir.Constant(INTS, [k % n for k in range(16)]))
        short = _upper(b, _split(b, value, 1, None)[0][0])
        store(b, b.shuffle_vector(short, short, ir.Constant(ir.VectorType(I32, n), list(range(n)))), target, 2)

    spans(b, 16, rows, width, [target, source], [target_row, source_row], [2, 4], copy)


def builders(components: int) -> Builders:
    """Return the builders of the bf16 unit's primitives for numbers of `components`."""
    instructions = bf16_module() or amx  # without a unit they never run
    return {
        "matrix_product": (13, instructions.product(components)),
        "to_row_operand": (6, to_row_operand(components)),
        "interleave": (8, interleave(components)),
        "transpose_tiles": (5, transpose),
        "widen": (7, copy_rows(FLOATS, 2, widened)),
        "narrow": (6, narrow),
        "configure": (1, instructions.configure),
        "release": (0, instructions.release),
    }


tables.update({f"matrix{components}": builders(components) for components in amx.PRODUCTS})
NAMES = tuple(tables["matrix1"])
