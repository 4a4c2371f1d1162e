"""Rows of floats rounded to bytes, as the operands of int8 layers are.

A number has one byte, or two: then it is 256 times the first plus the second, which are a *piece* apart. `bytes.OFFSET`
is added to each byte.
"""

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm import bytes as dots
from fastlstm.backends.numba.llvm.bytes import OFFSET, SUMS
from fastlstm.backends.numba.llvm.loops import Builder, counted
from fastlstm.backends.numba.llvm.simd import I32, I64, Lanes, load, store

TOP = {1: 127, 2: 127 * 256}  # the largest number, by how many bytes it has
_SMALLEST, _INFINITE = 0x0D800000, 0x7F800000  # bits of 2**-100, below which a row counts as zeros, and of infinity
_ROUNDS = 1.5 * 2**23  # what is added to it is rounded to an integer, half to even, whose bits are then the last


class Fused(Lanes):
    """Vectors whose products are fused into sums even where that takes a call of a library."""

    multiply_add = "fma"


FLOATS = Fused(types.float32)


def store_bytes(b: ir.IRBuilder, values: ir.Value, inverse: ir.Value, at: ir.Value, piece: ir.Value, pieces: int):
    """Round values times `inverse` to bytes: to nearest, half to even."""
    count = values.type.count

    def constant(value: float) -> ir.Constant:
        return ir.Constant(values.type, [value] * count)

    integers = ir.VectorType(I32, count)
    scaled = b.fmul(values, inverse)
    if pieces == 1:
        dots.store_low(b, b.bitcast(b.fadd(scaled, constant(_ROUNDS + OFFSET)), integers), at)
        return
    bits = b.bitcast(b.fadd(scaled, constant(_ROUNDS + 128 + 256 * OFFSET)), integers)
    dots.store_low(b, b.ashr(bits, ir.Constant(integers, [8] * count)), at)
    low = bits if OFFSET else b.xor(bits, ir.Constant(integers, [128] * count))
    dots.store_low(b, low, b.add(at, piece))


def _largest(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """The largest lane of a vector of integers."""
    count = values.type.count
    while count > 1:
        count //= 2
        halves = [
            b.shuffle_vector(values, values, ir.Constant(ir.VectorType(I32, count), list(range(k, k + count))))
            for k in (0, count)
        ]
        values = b.select(b.icmp_signed(">", *halves), *halves)
    return b.extract_element(values, I32(0))


def quantize(pieces: int) -> Builder:
    """Rows of floats to rows of bytes, each with a scale of its own, which goes to `scales`: the largest magnitude, or
    the number whose bits are `least` if that is more, divided by `TOP`.

    A row with infinity or NaN has NaN for a scale, and a row of next to nothing has 0.
    """
    lanes = FLOATS.count

    def build(b, rows, columns, source, source_row, target, target_row, piece, scales, least):
        whole = b.udiv(columns, I64(lanes))
        has_whole = b.icmp_signed(">", whole, I64(0))
        is_cut = b.icmp_signed(">", b.urem(columns, I64(lanes)), I64(0))
        over_end = b.zext(b.and_(has_whole, is_cut), I64)  # a last vector, which ends where the row does
        single, last = b.select(has_whole, I64(0), columns), b.sub(columns, I64(lanes))

        def each(count, at_source, at_target, carried, body):
            """``carried = body(values, at_target, *carried)`` for `count` columns at a time."""

            def step(at_source, at_target, *carried):
                values = load(b, ir.VectorType(FLOATS.scalar, count), at_source, 4)
                return [
                    b.add(at_source, I64(4 * count)),
                    b.add(at_target, I64(count)),
                    *body(values, at_target, *carried),
                ]

            return step, [at_source, at_target, *carried]

        def columns_of(source, target, carried, body):
            """`body` for all columns of a row."""
            of_last = b.add(source, b.mul(last, I64(4))), b.add(target, last)
            for number, count, places in (
                (whole, lanes, (source, target)), (over_end, lanes, of_last), (single, 1, (source, target))
            ):  # fmt: skip
                step, start = each(count, *places, carried, body)
                carried = counted(b, number, start, step)[2:]
            return carried

        def magnitude(values, _, wide):
            if values.type.count == 1:
                values = FLOATS.wide(b, b.extract_element(values, I32(0)))
            bits = b.and_(b.bitcast(values, SUMS), ir.Constant(SUMS, [0x7FFFFFFF] * lanes))
            return [b.select(b.icmp_signed(">", bits, wide), bits, wide)]

        def row(source, target, scales):
            (wide,) = columns_of(source, target, [FLOATS.wide(b, b.trunc(least, I32))], magnitude)
            bits = _largest(b, wide)
            value, top, zero = b.bitcast(bits, FLOATS.scalar), FLOATS.scalar(float(TOP[pieces])), FLOATS.scalar(0.0)
            finite, small = b.icmp_signed("<", bits, I32(_INFINITE)), b.icmp_signed("<", bits, I32(_SMALLEST))
            scale = b.select(finite, b.select(small, zero, b.fdiv(value, top)), FLOATS.scalar(float("nan")))
            store(b, scale, scales, 4)
            inverse = b.select(b.or_(small, b.not_(finite)), zero, b.fdiv(top, value))
            splat = FLOATS.wide(b, inverse)

            def round_(values, at):
                one = ir.Constant(ir.VectorType(I32, values.type.count), [0] * values.type.count)
                store_bytes(b, values, b.shuffle_vector(splat, splat, one), at, piece, pieces)
                return []

            columns_of(source, target, [], round_)
            return [b.add(source, source_row), b.add(target, target_row), b.add(scales, I64(4))]

        counted(b, rows, [source, target, scales], row)

    return build
