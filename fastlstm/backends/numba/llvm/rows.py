"""Rows moved from one layout to another: transposes, sums, copies."""

from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, at_most, counted, offsets
from fastlstm.backends.numba.llvm.simd import I32, I64, Lanes, load, store


def transposed(b: ir.IRBuilder, lanes: Lanes, rows: list[ir.Value]) -> list[ir.Value]:
    """As many vectors as lanes, transposed in log2(lanes) rounds:
    each swaps the off-diagonal blocks of twice the size.
    """
    half = 1
    while half < lanes.count:
        low = [k + (lanes.count - half) * (k // half % 2) for k in range(lanes.count)]
        new = list(rows)
        for r in range(lanes.count):
            if r // half % 2 == 0:
                for target, order in ((r, low), (r + half, [k + half for k in low])):
                    mask = ir.Constant(ir.VectorType(I32, lanes.count), order)
                    new[target] = b.shuffle_vector(rows[r], rows[r + half], mask)
        rows, half = new, half * 2
    return rows


def transpose(lanes: Lanes) -> Builder:
    """``target[k, r] = source[r, k]`` for `rows` <= lanes and any number of `columns`."""
    size, count = I64(lanes.size), I64(lanes.count)

    def build(b, rows, columns, source, source_row, target, target_row):
        full = b.and_(b.icmp_signed("==", rows, count), b.icmp_signed(">=", columns, count))

        def square(k):
            k = at_most(b, k, b.sub(columns, count))  # the last may overlap
            at = b.add(source, b.mul(k, size))
            vectors = [lanes.load(b, b.add(at, offset)) for offset in offsets(b, source_row, lanes.count)]
            at = b.add(target, b.mul(k, target_row))
            for value, offset in zip(transposed(b, lanes, vectors), offsets(b, target_row, lanes.count)):
                lanes.store(b, value, b.add(at, offset))
            return [b.add(k, count)]

        def ragged(source, target):
            def element(source, target):
                store(b, load(b, lanes.scalar, source), target)
                return [b.add(source, size), b.add(target, target_row)]

            counted(b, columns, [source, target], element)
            return [b.add(source, source_row), b.add(target, size)]

        blocks = b.sdiv(b.add(columns, b.sub(count, I64(1))), count)
        counted(b, b.select(full, blocks, I64(0)), [I64(0)], square)
        counted(b, b.select(full, I64(0), rows), [source, target], ragged)

    return build


def add_rows(lanes: Lanes) -> Builder:
    """Add `width` elements of each row of the source to the target's."""
    size, vector = I64(lanes.size), I64(lanes.size * lanes.count)

    def build(b, rows, width, source, source_row, target, target_row):
        def whole(source, target):
            lanes.store(b, b.fadd(lanes.load(b, target), lanes.load(b, source)), target)
            return [b.add(source, vector), b.add(target, vector)]

        def one(source, target):
            store(b, b.fadd(load(b, lanes.scalar, target), load(b, lanes.scalar, source)), target)
            return [b.add(source, size), b.add(target, size)]

        vectors, rest = b.udiv(width, I64(lanes.count)), b.urem(width, I64(lanes.count))

        def row(source, target):
            counted(b, rest, counted(b, vectors, [source, target], whole), one)
            return [b.add(source, source_row), b.add(target, target_row)]

        counted(b, rows, [source, target], row)

    return build


def spans(
    b: ir.IRBuilder,
    most: int,
    rows: ir.Value,
    count: ir.Value,
    places: list[ir.Value],
    steps: list[ir.Value],
    sizes: list[int],
    body: Any,
) -> None:
    """``body(lanes, *places)`` for vectors that cover `count` elements of each row: of the most lanes that fit, the
    last of them over the end of those before. `steps` and `sizes`: bytes from a place's row, and element, to the next.
    """
    for lanes in (most >> k for k in range(most.bit_length())):
        fits = b.icmp_signed(">=", count, I64(lanes))
        if lanes < most:
            fits = b.and_(fits, b.icmp_signed("<", count, I64(2 * lanes)))
        last = b.sub(count, I64(lanes))

        def row(*places, lanes=lanes, last=last):
            def whole(*places):
                body(lanes, *places)
                return [b.add(place, I64(lanes * size)) for place, size in zip(places, sizes)]

            counted(b, b.udiv(b.sub(count, I64(1)), I64(lanes)), list(places), whole)
            body(lanes, *(b.add(place, b.mul(last, I64(size))) for place, size in zip(places, sizes)))
            return [b.add(place, step) for place, step in zip(places, steps)]

        counted(b, b.select(fits, rows, I64(0)), places, row)


def copy_rows(lanes: Lanes) -> Builder:
    """Copy `valid` elements of each row, then zeros up to `width`.

    Rows are short: a call of memmove would cost more than the copy, and so would one element after another.
    """
    size = lanes.size

    def build(b, rows, valid, width, source, source_row, target, target_row):
        def copy(n, target, source):
            store(b, load(b, ir.VectorType(lanes.scalar, n), source, size), target, size)

        def clear(n, target):
            store(b, ir.Constant(ir.VectorType(lanes.scalar, n), [0.0] * n), target, size)

        spans(b, lanes.count, rows, valid, [target, source], [target_row, source_row], [size, size], copy)
        rest = b.add(target, b.mul(valid, I64(size)))
        spans(b, lanes.count, rows, b.sub(width, valid), [rest], [target_row], [size], clear)

    return build
