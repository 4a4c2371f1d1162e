"""Rows moved from one layout to another: transposes, sums, copies."""

from llvmlite import ir

from fastlstm.backends.numba.loops import Builder, counted, offsets
from fastlstm.backends.numba.simd import I32, I64, Lanes


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
    pointer, size, count = lanes.scalar.as_pointer(), I64(lanes.size), I64(lanes.count)

    def build(b, rows, columns, source, source_row, target, target_row):
        full = b.and_(b.icmp_signed("==", rows, count), b.icmp_signed(">=", columns, count))

        def square(k):
            k = b.select(b.icmp_signed("<", k, b.sub(columns, count)), k, b.sub(columns, count))  # the last may overlap
            at = b.add(source, b.mul(k, size))
            vectors = [lanes.load(b, b.add(at, offset)) for offset in offsets(b, source_row, lanes.count)]
            at = b.add(target, b.mul(k, target_row))
            for value, offset in zip(transposed(b, lanes, vectors), offsets(b, target_row, lanes.count)):
                lanes.store(b, value, b.add(at, offset))
            return [b.add(k, count)]

        def ragged(source, target):
            def element(source, target):
                b.store(b.load(b.inttoptr(source, pointer)), b.inttoptr(target, pointer))
                return [b.add(source, size), b.add(target, target_row)]

            counted(b, columns, [source, target], element)
            return [b.add(source, source_row), b.add(target, size)]

        blocks = b.sdiv(b.add(columns, b.sub(count, I64(1))), count)
        counted(b, b.select(full, blocks, I64(0)), [I64(0)], square)
        counted(b, b.select(full, I64(0), rows), [source, target], ragged)

    return build


def add_rows(lanes: Lanes) -> Builder:
    """Add `width` elements of each row of the source to the target's."""
    pointer, size, vector = lanes.scalar.as_pointer(), I64(lanes.size), I64(lanes.size * lanes.count)

    def build(b, rows, width, source, source_row, target, target_row):
        def whole(source, target):
            lanes.store(b, b.fadd(lanes.load(b, target), lanes.load(b, source)), target)
            return [b.add(source, vector), b.add(target, vector)]

        def one(source, target):
            at = b.inttoptr(target, pointer)
            b.store(b.fadd(b.load(at), b.load(b.inttoptr(source, pointer))), at)
            return [b.add(source, size), b.add(target, size)]

        vectors, rest = b.udiv(width, I64(lanes.count)), b.urem(width, I64(lanes.count))

        def row(source, target):
            counted(b, rest, counted(b, vectors, [source, target], whole), one)
            return [b.add(source, source_row), b.add(target, target_row)]

        counted(b, rows, [source, target], row)

    return build


def copy_rows(lanes: Lanes) -> Builder:
    """Copy `valid` elements of each row, then zeros up to `width`.

    Rows are short: a call of memmove would cost more than the copy, and so would one element after another.
    """
    vector, size = lanes.count, I64(lanes.size)

    def spans(b, rows, count, places, steps, body):
        """``body(lanes, *places)`` for vectors that cover `count` elements of each row: of the most lanes that fit, the
        last of them over the end of those before.
        """
        lanes_each = [vector >> k for k in range(vector.bit_length())]
        for n in lanes_each:
            fits = b.icmp_signed(">=", count, I64(n))
            if n < vector:
                fits = b.and_(fits, b.icmp_signed("<", count, I64(2 * n)))
            last = b.mul(b.sub(count, I64(n)), size)

            def row(*places, n=n, last=last):
                def whole(*places):
                    body(n, *places)
                    return [b.add(place, I64(n * lanes.size)) for place in places]

                counted(b, b.udiv(b.sub(count, I64(1)), I64(n)), list(places), whole)
                body(n, *(b.add(place, last) for place in places))
                return [b.add(place, step) for place, step in zip(places, steps)]

            counted(b, b.select(fits, rows, I64(0)), places, row)

    def build(b, rows, valid, width, source, source_row, target, target_row):
        def pointer(n, place):
            return b.inttoptr(place, ir.VectorType(lanes.scalar, n).as_pointer())

        def copy(n, target, source):
            value = b.load(pointer(n, source))
            value.align = lanes.size
            b.store(value, pointer(n, target)).align = lanes.size

        def clear(n, target):
            zeros = ir.Constant(ir.VectorType(lanes.scalar, n), [0.0] * n)
            b.store(zeros, pointer(n, target)).align = lanes.size

        spans(b, rows, valid, [target, source], [target_row, source_row], copy)
        rest = b.add(target, b.mul(valid, size))
        spans(b, rows, b.sub(width, valid), [rest], [target_row], clear)

    return build
