"""Loops over register tiles: some batch rows by up to four vectors, which stay in registers over a whole sum."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, for_loop, function_named, offsets, update_tile
from fastlstm.backends.numba.llvm.simd import I64, IS_NEON, TILE_ROWS, VectorType, opaque


def accumulated(
    b: ir.IRBuilder, vtype: VectorType, rows: int, vecs: int, a: Any, a_row: Any, a_step: Any, w: Any, w_row: Any,
    count: Any, acc: Any,
) -> list[ir.Value]:  # fmt: skip
    """Return `a` and `w` moved on by `count` steps, and the `rows` x `vecs` sums `acc` with the products added.

    On NEON a row's address is the sum of the first row's and an offset: LLVM would add stride after stride, and choose
    loads that also use a multiply-adder. There a load of one vector brings several columns of a row.
    """
    row_offsets, vector = offsets(b, a_row, rows), vtype.size * vtype.count
    if IS_NEON:
        row_offsets = [opaque(b, offset) for offset in row_offsets[: 5 if rows > 12 else rows]]

    def address_of(a_k):
        if rows == len(row_offsets):
            return lambda m: b.add(a_k, row_offsets[m])
        starts = [a_k]  # of four rows each: there are no registers for the offsets of all
        while len(starts) < rows / 4:
            starts.append(b.add(starts[-1], row_offsets[4]))
        return lambda m: b.add(starts[m // 4], row_offsets[m % 4])

    def body(a_k, w_k, *acc):
        address = address_of(a_k)

        def scalar(m):
            return vtype.broadcast(b, address(m))

        def weight(n):
            return vtype.load(b, b.add(w_k, I64(n * vector)))

        def add(total, one, other):
            return vtype.fma(b, one, other, total)

        return [b.add(a_k, a_step), b.add(w_k, w_row), *update_tile(rows, vecs, scalar, weight, add, acc)]

    def columns_of_a_vector(a_k, w_k, *acc):
        address, weights, sums = address_of(a_k), [], []
        for _ in range(vtype.count):
            weights.append(vtype.load(b, w_k))
            w_k = b.add(w_k, w_row)
        for m, total in enumerate(acc):
            values = vtype.load(b, address(m))
            for k, each in enumerate(weights):
                total = vtype.fma(b, vtype.lane(b, values, k), each, total)
            sums.append(total)
        return [b.add(a_k, I64(vector)), w_k, *sums]

    carried = [a, w, *acc]
    if IS_NEON and vecs == 1:
        vectors = b.select(b.icmp_signed("==", a_step, I64(vtype.size)), b.udiv(count, I64(vtype.count)), I64(0))
        carried = for_loop(b, vectors, carried, columns_of_a_vector)
        count = b.sub(count, b.mul(vectors, I64(vtype.count)))
    return for_loop(b, count, carried, body)


def remainder_heights(rows: int, height: int) -> tuple[int, ...]:
    """Return the heights of the last tiles, as even as can be: none is 1 unless `rows` is 1."""
    number = -(-rows // min(height, 8 if height > 12 else 4))
    return tuple(rows // number + (k < rows % number) for k in range(number))


def emit_row_tiles(b: ir.IRBuilder, rows: ir.Value, height: int, carried: list[ir.Value], body: Any) -> list[ir.Value]:
    """Emit ``carried = body(size, *carried)`` for tiles of `height` rows that cover `rows`. The last tiles share the
    rows: a single row left over would run at half of the speed, and two at 0.85.
    """
    high, full, left = I64(height), b.udiv(rows, I64(height)), b.urem(rows, I64(height))
    one_or_two = b.icmp_unsigned("<", b.sub(left, I64(1)), I64(2))
    split = b.and_(one_or_two, b.icmp_signed(">", rows, high))
    full, left = b.sub(full, b.zext(split, I64)), b.add(left, b.select(split, high, I64(0)))
    covers = {rest: remainder_heights(rest, height) for rest in range(1, height + 3) if rest != height}
    for size in sorted({height, *(h for c in covers.values() for h in c)}, reverse=True):
        number = full if size == height else I64(0)
        for rest, heights in covers.items():
            if size in heights:
                more = b.add(number, I64(heights.count(size)))
                number = b.select(b.icmp_signed("==", left, I64(rest)), more, number)
        carried = for_loop(b, number, carried, partial(body, size))
    return carried


def for_row_tiles(name: str, height: int, tile: Callable[[int], Builder], row_arguments: tuple[int, ...]) -> Builder:
    """Return a builder for any number of rows, which calls the functions that ``tile(size)`` builds for up to `height`.
    `row_arguments`: the indices of addresses of a row, each followed by its stride.
    """

    def build(b, rows, *args):
        def body(size, *addresses):
            own = dict(zip(row_arguments, addresses))
            function = function_named(b.module, f"{name}{size}", len(args), tile(size))
            b.call(function, [own.get(k, value) for k, value in enumerate(args)])
            return [b.add(address, b.mul(args[k + 1], I64(size))) for k, address in own.items()]

        with b.if_else(b.icmp_signed("==", rows, I64(1))) as (one, more):
            with one:  # a call for a single row is so short that the choice of its tile would show
                body(1, *[args[k] for k in row_arguments])
            with more:
                emit_row_tiles(b, rows, height, [args[k] for k in row_arguments], body)

    return build


def tile_rows(vecs: int) -> int:
    """Return the rows of a register tile with `vecs` vectors a row. 12 chains of sums keep the units busy, and 16 the
    four of some NEON processors. A tile of one vector has 16 rows: a batch of 16 rows then needs one tile and not two,
    and reads the weights once. With 24 rows, a row block of 64 would leave 16 over.
    """
    return min(TILE_ROWS * 4 // vecs, 16 if IS_NEON or vecs == 1 else 12)


def panels_at_once(vecs: int) -> int:
    """Return how many panels of `vecs` vectors a single row takes at once: NEON needs more chains of sums."""
    return (4 if vecs > 2 else 8) if IS_NEON else 1
