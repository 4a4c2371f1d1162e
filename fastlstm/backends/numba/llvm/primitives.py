"""The arithmetic as LLVM functions: tiles of a matrix product, transposes, copies.

They are built once for an element type, as one module, and called by address: the kernels that drive them are then free
of types, small, and quick to compile. All arguments are 64-bit integers: addresses, strides in bytes, counts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm.digest import digest
from fastlstm.backends.numba.llvm.loops import Builder, Builders, at_most, counted, function, offsets, tables, tile_sums
from fastlstm.backends.numba.llvm.rows import add_rows, copy_rows, transpose, transposed
from fastlstm.backends.numba.llvm.simd import I64, TILE_ROWS, Lanes


def accumulated(
    b: ir.IRBuilder, lanes: Lanes, rows: int, vecs: int, a: Any, a_row: Any, a_step: Any, w: Any, w_row: Any,
    count: Any, acc: Any,
) -> list[ir.Value]:  # fmt: skip
    """a and w after `count` of their steps, and the `rows` x `vecs` sums `acc` with the products of these."""
    at, vector = offsets(b, a_row, rows), lanes.size * lanes.count

    def body(a_k, w_k, *acc):
        def scalar(m):
            return lanes.broadcast(b, b.add(a_k, at[m]))

        def weight(n):
            return lanes.load(b, b.add(w_k, I64(n * vector)))

        def add(total, one, other):
            return lanes.fma(b, one, other, total)

        return [b.add(a_k, a_step), b.add(w_k, w_row), *tile_sums(rows, vecs, scalar, weight, add, acc)]

    return counted(b, count, [a, w, *acc], body)


def tile(lanes: Lanes, rows: int, vecs: int) -> Builder:
    """`product` for `rows` rows: `rows` x `vecs` accumulators stay in registers over the whole sum."""
    vector = lanes.size * lanes.count

    def build(
        b, init, init_row, out, out_row, w, w_row, a, a_row, a_step, count, outer, a_outer, w_outer, a2, a2_row, count2
    ):
        def block(a, w, *acc):
            new = accumulated(b, lanes, rows, vecs, a, a_row, a_step, w, w_row, count, acc)[2:]
            return [b.add(a, a_outer), b.add(w, w_outer), *new]

        _, w, *acc = counted(b, outer, [a, w, *[lanes.splat(0.0)] * (rows * vecs)], block)
        acc = accumulated(b, lanes, rows, vecs, a2, a2_row, I64(lanes.size), w, w_row, count2, acc)[2:]
        for m, (at_init, at_out) in enumerate(zip(offsets(b, init_row, rows), offsets(b, out_row, rows))):
            for n in range(vecs):
                start = lanes.load(b, b.add(b.add(init, at_init), I64(n * vector)))
                lanes.store(b, b.fadd(start, acc[m * vecs + n]), b.add(b.add(out, at_out), I64(n * vector)))

    return build


def cover(rows: int, height: int) -> tuple[int, ...]:
    """Tiles for a remainder of up to `height` + 2 rows, as even as can be: none of them 1 high unless `rows` is 1."""
    number = -(-rows // min(height, 4))
    return tuple(rows // number + (k < rows % number) for k in range(number))


def in_tiles(b: ir.IRBuilder, rows: ir.Value, height: int, carried: list[ir.Value], body: Any) -> list[ir.Value]:
    """``carried = body(size, *carried)`` for tiles of `height` rows, and of fewer for the rest, that cover `rows`.

    A single row left over would run at half of the speed, and two at 0.85, so the last tiles share the rows.
    """
    high, full, left = I64(height), b.udiv(rows, I64(height)), b.urem(rows, I64(height))
    one_or_two = b.icmp_unsigned("<", b.sub(left, I64(1)), I64(2))
    split = b.and_(one_or_two, b.icmp_signed(">", rows, high))
    full, left = b.sub(full, b.zext(split, I64)), b.add(left, b.select(split, high, I64(0)))
    covers = {rest: cover(rest, height) for rest in range(1, height + 3) if rest != height}
    for size in sorted({height, *(h for c in covers.values() for h in c)}, reverse=True):
        number = full if size == height else I64(0)
        for rest, heights in covers.items():
            if size in heights:
                more = b.add(number, I64(heights.count(size)))
                number = b.select(b.icmp_signed("==", left, I64(rest)), more, number)
        carried = counted(b, number, carried, partial(body, size))
    return carried


def tiled(name: str, height: int, tile: Callable[[int], Builder], places: tuple[int, ...]) -> Builder:
    """What ``tile(size)`` builds for `size` rows, for any number of rows, in tiles of up to `height`.

    `places`: which arguments are the addresses of a row. Each is followed by the bytes to the next row.
    """

    def build(b, rows, *args):
        def body(size, *at):
            now = [at[places.index(k)] if k in places else value for k, value in enumerate(args)]
            b.call(function(b.module, f"{name}{size}", len(args), tile(size)), now)
            return [b.add(place, b.mul(args[k + 1], I64(size))) for k, place in zip(places, at)]

        with b.if_else(b.icmp_signed("==", rows, I64(1))) as (one, more):
            with one:  # a call for a single row is so short that the choice of its tile would show
                body(1, *[args[k] for k in places])
            with more:
                in_tiles(b, rows, height, [args[k] for k in places], body)

    return build


def tile_rows(vecs: int) -> int:
    """Rows of a tile of so many vectors. 12 chains of sums keep the units busy; a chunk of 64 rows would leave 16 over
    from tiles of 24, in small ones.
    """
    return min(TILE_ROWS * 4 // vecs, 12)


def product(lanes: Lanes, vecs: int) -> Builder:
    """``out[m, n] = init[m, n] + sum of a[m, k] * w[k, n]`` for `rows` values of m and `vecs` vectors of n,
    rows of w `w_row` apart.

    k runs over `outer` blocks of `count`, `w_outer` apart in w, then over the `count2` columns of a second matrix. The
    sum has one order whatever tile a row falls into, and meets `init` last: the error of a long sum that comes in
    blocks grows with the block.
    """
    return tiled(f"tile{vecs}x", tile_rows(vecs), lambda rows: tile(lanes, rows, vecs), (0, 2, 6, 13))


def masked_tile(lanes: Lanes, rows: int) -> Builder:
    """`masked` for `rows` rows."""

    def build(b, out, out_row, w, w_row, a, a_row, count, outer, a_outer, w_outer, first, last):
        def block(a, w, *acc):
            new = accumulated(b, lanes, rows, 1, a, a_row, I64(lanes.size), w, w_row, count, acc)[2:]
            return [b.add(a, a_outer), b.add(w, w_outer), *new]

        sums = counted(b, outer, [a, w, *[lanes.splat(0.0)] * rows], block)[2:]
        wanted = b.and_(b.not_(lanes.first(b, first)), lanes.first(b, last))
        for at, total in zip(offsets(b, out_row, rows), sums):
            place = b.add(out, at)
            found = lanes.load(b, place)
            lanes.store(b, b.select(wanted, b.fadd(found, total), found), place)

    return build


def masked(lanes: Lanes) -> Builder:
    """Add to the lanes `first` to `last` of ``out[m]`` the sum of ``a[m, k] * w[k]``, as `product` has it of one vector
    and one matrix. The other lanes stay as they are, whatever `a` is.
    """
    return tiled("masked", tile_rows(1), lambda rows: masked_tile(lanes, rows), (0, 4))


def lone(lanes: Lanes, vecs: int) -> Builder:
    """`product` of one row with `panels` panels: `count` columns at a with w, then `count2` at a2 with w2, in blocks,
    one of `first` columns, whose sum starts from `part`, then of `block`. The next panel's out is `out_step` further,
    and so on. A call a block cost a lone row a tenth of its time.
    """
    vector = lanes.size * lanes.count

    def build(
        b, panels, init, init_step, out, out_step, a, w, w_step, count, a2, w2, w2_step, count2, first, block, part,
        part_step,
    ):  # fmt: skip
        def vectors(at):
            return [lanes.load(b, b.add(at, I64(n * vector))) for n in range(vecs)]

        def column(a, w, *acc):
            held = lanes.broadcast(b, a)
            new = [lanes.fma(b, weight, held, one) for weight, one in zip(vectors(w), acc)]
            return [b.add(a, I64(lanes.size)), b.add(w, I64(vecs * vector)), *new]

        def sums(length, left, left2, a, w, a2, w2, *carried):
            total, acc = carried[:vecs], carried[vecs:]
            of_a = at_most(b, left, length)
            of_a2 = at_most(b, left2, b.sub(length, of_a))
            a, w, *acc = counted(b, of_a, [a, w, *acc], column)
            a2, w2, *acc = counted(b, of_a2, [a2, w2, *acc], column)
            new = [b.fadd(one, other) for one, other in zip(total, acc)]
            return [block, b.sub(left, of_a), b.sub(left2, of_a2), a, w, a2, w2, *new, *[lanes.splat(0.0)] * vecs]

        rest = b.sub(b.add(count, count2), first)
        rest = b.select(b.icmp_signed(">", rest, I64(0)), rest, I64(0))
        blocks = b.add(I64(1), b.sdiv(b.add(rest, b.sub(block, I64(1))), block))

        def panel(init, out, w, w2, part):
            carried = [first, count, count2, a, w, a2, w2, *vectors(init), *vectors(part)]
            for n, value in enumerate(counted(b, blocks, carried, sums)[7 : 7 + vecs]):
                lanes.store(b, value, b.add(out, I64(n * vector)))
            steps = (init_step, out_step, w_step, w2_step, part_step)
            return [b.add(at, step) for at, step in zip((init, out, w, w2, part), steps)]

        counted(b, panels, [init, out, w, w2, part], panel)

    return build


def in_place_tile(lanes: Lanes, rows: int) -> Builder:
    """`in_place` for `rows` rows."""
    length, size, vector = I64(lanes.count), I64(lanes.size), I64(lanes.size * lanes.count)

    def build(b, init, init_row, out, out_row, a, a_row, w, w_row, count, last, a2, a2_row, w2, w2_row, count2, last2):
        aside = b.ptrtoint(b.alloca(ir.ArrayType(lanes.type, lanes.count)), I64)

        def accumulate(a, a_row, w, w_row, count, last, sums):
            weight_rows, places = offsets(b, w_row, lanes.count), offsets(b, a_row, rows)

            def columns(k):
                at = b.add(w, b.mul(k, size))
                return transposed(b, lanes, [lanes.load(b, b.add(at, row)) for row in weight_rows])

            def add(weights, at, sums):
                return [lanes.fma(b, weights, lanes.broadcast(b, b.add(at, m)), one) for m, one in zip(places, sums)]

            def square(k, *sums):
                for m, weights in enumerate(columns(k)):
                    sums = add(weights, b.add(a, b.mul(b.add(k, I64(m)), size)), sums)
                return [b.add(k, length), *sums]

            def ragged(k, *sums):
                first = at_most(b, k, last)  # some of these columns may not be wanted, or be in the sum already
                for m, weights in enumerate(columns(first)):
                    lanes.store(b, weights, b.add(aside, I64(m * lanes.size * lanes.count)))

                def column(at, a_k, *sums):
                    return [b.add(at, vector), b.add(a_k, size), *add(lanes.load(b, at), a_k, sums)]

                at = b.add(aside, b.mul(b.sub(k, first), vector))
                some = at_most(b, b.sub(count, k), length)
                return [b.add(k, length), *counted(b, some, [at, b.add(a, b.mul(k, size)), *sums], column)[2:]]

            whole = at_most(b, b.sdiv(count, length), b.sdiv(b.add(last, length), length))
            k, *sums = counted(b, whole, [I64(0), *sums], square)
            rest = b.sdiv(b.sub(b.add(count, b.sub(length, I64(1))), k), length)
            return counted(b, rest, [k, *sums], ragged)[1:]

        sums = accumulate(a, a_row, w, w_row, count, last, [lanes.splat(0.0)] * rows)
        sums = accumulate(a2, a2_row, w2, w2_row, count2, last2, sums)
        for start, to, total in zip(offsets(b, init_row, rows), offsets(b, out_row, rows), sums):
            lanes.store(b, b.fadd(lanes.load(b, b.add(init, start)), total), b.add(out, to))

    return build


def in_place(lanes: Lanes) -> Builder:
    """`product` with one vector of weights that lie as a layer has them, one unit's columns side by side: they are
    transposed in registers. `count` columns at w meet a, then `count2` at w2 meet a2. `last`, counted from w, is the
    last column at which a whole vector still lies within the row. It is negative if fewer than a vector's columns
    follow w: then the load begins before w.
    """
    return tiled("in_place", 4, lambda rows: in_place_tile(lanes, rows), (0, 2, 4, 10))


def chain_tile(lanes: Lanes, rows: int, vecs: int) -> Builder:
    """`chain` for `rows` rows."""

    def build(b, a, a_row, w, w_row, count, out, out_row):
        vectors = [I64(n * lanes.size * lanes.count) for n in range(vecs)]
        places = [b.add(b.add(out, at), n) for at in offsets(b, out_row, rows) for n in vectors]
        sums = [lanes.load(b, place) for place in places]
        sums = accumulated(b, lanes, rows, vecs, a, a_row, I64(lanes.size), w, w_row, count, sums)[2:]
        for place, value in zip(places, sums):
            lanes.store(b, value, place)

    return build


def chain(lanes: Lanes, vecs: int) -> Builder:
    """``out[m, n] += sum of a[m, k] * w[k, n]`` for `rows` values of m, `vecs` vectors of n and `count` rows of w. The
    sum starts from what is in `out`: calls for one piece of w after the other make one sum.
    """
    return tiled(f"chain{vecs}x", tile_rows(vecs), lambda rows: chain_tile(lanes, rows, vecs), (0, 5))


def builders(lanes: Lanes) -> Builders:
    return {
        "product4": (17, product(lanes, 4)),
        "product3": (17, product(lanes, 3)),
        "product2": (17, product(lanes, 2)),
        "product1": (17, product(lanes, 1)),
        "lone4": (17, lone(lanes, 4)),
        "lone3": (17, lone(lanes, 3)),
        "lone2": (17, lone(lanes, 2)),
        "lone1": (17, lone(lanes, 1)),
        "masked": (13, masked(lanes)),
        "in_place": (17, in_place(lanes)),
        "chain4": (8, chain(lanes, 4)),
        "chain3": (8, chain(lanes, 3)),
        "chain2": (8, chain(lanes, 2)),
        "chain1": (8, chain(lanes, 1)),
        "transpose": (6, transpose(lanes)),
        "add_rows": (6, add_rows(lanes)),
        "copy_rows": (7, copy_rows(lanes)),
        "digest": (4, digest(lanes)),
    }


# What few calls need: to read weights as they lie in either pass, and to multiply vectors that have units of several
# heads. Half of the time of compiling all would be theirs.
RARE = {
    "in_place.Forward": ("in_place",),
    "in_place.Backward": ("chain4", "chain3", "chain2", "chain1"),
    "heads": ("masked",),
}
for _scalar in types.float32, types.float64:
    _size, _all = _scalar.bitwidth // 8, builders(Lanes(_scalar))
    NAMES = tuple(_all)
    for _kind, _names in RARE.items():
        tables[f"{_kind}.{_size}"] = {name: _all.pop(name) for name in _names}
    tables[f"primitives{_size}"] = _all
