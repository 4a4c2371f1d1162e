"""Rows moved from one layout to another: transposes, sums, copies."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, at_most, for_loop, offsets
from fastlstm.backends.numba.llvm.simd import I32, I64, VectorType, load, store


def transposed(b: ir.IRBuilder, vtype: VectorType, rows: list[ir.Value]) -> list[ir.Value]:
    """Return as many vectors as lanes transposed, by swapping off-diagonal blocks of growing size."""
    half = 1
    while half < vtype.count:
        low = [k + (vtype.count - half) * (k // half % 2) for k in range(vtype.count)]
        new = list(rows)
        for r in range(vtype.count):
            if r // half % 2 == 0:
                for target, order in ((r, low), (r + half, [k + half for k in low])):
                    mask = ir.Constant(ir.VectorType(I32, vtype.count), order)
                    new[target] = b.shuffle_vector(rows[r], rows[r + half], mask)
        rows, half = new, half * 2
    return rows


def transpose(vtype: VectorType) -> Builder:
    """Return the builder of ``target[k, r] = source[r, k]`` for `rows` <= lanes and any number of `columns`."""
    size, count = I64(vtype.size), I64(vtype.count)

    def build(b, rows, columns, source, source_row, target, target_row):
        full = b.and_(b.icmp_signed("==", rows, count), b.icmp_signed(">=", columns, count))

        def square(k):
            k = at_most(b, k, b.sub(columns, count))  # the last may overlap
            begin = b.add(source, b.mul(k, size))
            vectors = [vtype.load(b, b.add(begin, offset)) for offset in offsets(b, source_row, vtype.count)]
            begin = b.add(target, b.mul(k, target_row))
            for value, offset in zip(transposed(b, vtype, vectors), offsets(b, target_row, vtype.count)):
                vtype.store(b, value, b.add(begin, offset))
            return [b.add(k, count)]

        def ragged(source, target):
            def element(source, target):
                store(b, load(b, vtype.scalar, source), target)
                return [b.add(source, size), b.add(target, target_row)]

            for_loop(b, columns, [source, target], element)
            return [b.add(source, source_row), b.add(target, size)]

        blocks = b.sdiv(b.add(columns, b.sub(count, I64(1))), count)
        for_loop(b, b.select(full, blocks, I64(0)), [I64(0)], square)
        for_loop(b, b.select(full, I64(0), rows), [source, target], ragged)

    return build


def add_rows(vtype: VectorType) -> Builder:
    """Return the builder that adds `width` elements of each row of the source to the target's."""
    size, vector = I64(vtype.size), I64(vtype.size * vtype.count)

    def build(b, rows, width, source, source_row, target, target_row):
        def whole(source, target):
            vtype.store(b, b.fadd(vtype.load(b, target), vtype.load(b, source)), target)
            return [b.add(source, vector), b.add(target, vector)]

        def one(source, target):
            store(b, b.fadd(load(b, vtype.scalar, target), load(b, vtype.scalar, source)), target)
            return [b.add(source, size), b.add(target, size)]

        vectors, rest = b.udiv(width, I64(vtype.count)), b.urem(width, I64(vtype.count))

        def row(source, target):
            for_loop(b, rest, for_loop(b, vectors, [source, target], whole), one)
            return [b.add(source, source_row), b.add(target, target_row)]

        for_loop(b, rows, [source, target], row)

    return build


def spans(
    b: ir.IRBuilder, most: int, rows: ir.Value, count: ir.Value, addresses: list[ir.Value], strides: list[ir.Value],
    sizes: list[int], body: Any,
) -> None:  # fmt: skip
    """Emit ``body(lanes, *addresses)`` for vectors that cover `count` elements of each row, of the most lanes that fit.
    The last overlaps those before it. `strides`, `sizes`: of rows and elements at the addresses, in bytes.
    """
    for lanes in (most >> k for k in range(most.bit_length())):
        fits = b.icmp_signed(">=", count, I64(lanes))
        if lanes < most:
            fits = b.and_(fits, b.icmp_signed("<", count, I64(2 * lanes)))
        last = b.sub(count, I64(lanes))

        def row(*addresses, lanes=lanes, last=last):
            def whole(*addresses):
                body(lanes, *addresses)
                return [b.add(address, I64(lanes * size)) for address, size in zip(addresses, sizes)]

            for_loop(b, b.udiv(b.sub(count, I64(1)), I64(lanes)), list(addresses), whole)
            body(lanes, *(b.add(address, b.mul(last, I64(size))) for address, size in zip(addresses, sizes)))
            return [b.add(address, stride) for address, stride in zip(addresses, strides)]

        for_loop(b, b.select(fits, rows, I64(0)), addresses, row)


def copy_rows(vtype: VectorType, source_size: int, read: Callable[..., ir.Value]) -> Builder:
    """Return the builder that copies `valid` elements of `source_size` bytes of each row, and then writes zeros up to
    `width`. ``read(b, n, address)`` emits the load of n. Rows are too short for memmove.
    """
    size = vtype.size

    def build(b, rows, valid, width, source, source_row, target, target_row):
        def copy(n, target, source):
            store(b, read(b, n, source), target, size)

        def clear(n, target):
            store(b, ir.Constant(ir.VectorType(vtype.scalar, n), [0.0] * n), target, size)

        spans(b, vtype.count, rows, valid, [target, source], [target_row, source_row], [size, source_size], copy)
        rest = b.add(target, b.mul(valid, I64(size)))
        spans(b, vtype.count, rows, b.sub(width, valid), [rest], [target_row], [size], clear)

    return build
