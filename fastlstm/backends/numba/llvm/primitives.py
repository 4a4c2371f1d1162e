"""Micro-kernels of matrix products, transposes and copies as LLVM functions: for an element type one module, called by
address, so that kernels depend on no type. All arguments are 64-bit integers: addresses, strides in bytes, counts.
"""

from functools import partial

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm.digest import digest
from fastlstm.backends.numba.llvm.loops import Builder, Builders, at_most, for_loop, offsets, tables
from fastlstm.backends.numba.llvm.register_tiles import accumulated, for_row_tiles, panels_at_once, tile_rows
from fastlstm.backends.numba.llvm.rows import add_rows, copy_rows, transpose, transposed
from fastlstm.backends.numba.llvm.simd import I64, IS_NEON, VectorType


def tile(vtype: VectorType, rows: int, vecs: int) -> Builder:
    """Return the builder of `gemm` for `rows` rows: `rows` x `vecs` accumulators stay in registers over the sum."""
    vector = vtype.size * vtype.count

    def build(
        b, init, init_row, out, out_row, w, w_row, a, a_row, a_step, count, outer, a_outer, w_outer, a2, a2_row, count2
    ):
        def block(a, w, *acc):
            new = accumulated(b, vtype, rows, vecs, a, a_row, a_step, w, w_row, count, acc)[2:]
            return [b.add(a, a_outer), b.add(w, w_outer), *new]

        _, w, *acc = for_loop(b, outer, [a, w, *[vtype.splat(0.0)] * (rows * vecs)], block)
        acc = accumulated(b, vtype, rows, vecs, a2, a2_row, I64(vtype.size), w, w_row, count2, acc)[2:]
        for m, (init_offset, out_offset) in enumerate(zip(offsets(b, init_row, rows), offsets(b, out_row, rows))):
            for n in range(vecs):
                start = vtype.load(b, b.add(b.add(init, init_offset), I64(n * vector)))
                vtype.store(b, b.fadd(start, acc[m * vecs + n]), b.add(b.add(out, out_offset), I64(n * vector)))

    return build


def gemm(vtype: VectorType, vecs: int) -> Builder:
    """Return the builder of ``out[m, n] = init[m, n] + sum of a[m, k] * w[k, n]`` for `rows` values of m and `vecs`
    vectors of n. Rows of w lie `w_row` apart. k runs over `outer` blocks of `count`, `w_outer` apart in w, then over
    the `count2` columns of a second matrix. The sum has one order in every register tile, and `init` is added last: the
    error of a long sum that comes in K blocks then grows with the block alone.
    """
    return for_row_tiles(f"tile{vecs}x", tile_rows(vecs), lambda rows: tile(vtype, rows, vecs), (0, 2, 6, 13))


def masked_tile(vtype: VectorType, rows: int) -> Builder:

    def build(b, out, out_row, w, w_row, a, a_row, count, outer, a_outer, w_outer, first, last):
        def block(a, w, *acc):
            new = accumulated(b, vtype, rows, 1, a, a_row, I64(vtype.size), w, w_row, count, acc)[2:]
            return [b.add(a, a_outer), b.add(w, w_outer), *new]

        sums = for_loop(b, outer, [a, w, *[vtype.splat(0.0)] * rows], block)[2:]
        wanted = b.and_(b.not_(vtype.first_lanes(b, first)), vtype.first_lanes(b, last))
        for offset, total in zip(offsets(b, out_row, rows), sums):
            address = b.add(out, offset)
            old = vtype.load(b, address)
            vtype.store(b, b.select(wanted, b.fadd(old, total), old), address)

    return build


def masked(vtype: VectorType) -> Builder:
    """Return the builder of ``out[m] += sum of a[m, k] * w[k]`` in the lanes `first` to `last`, in the order of `gemm`
    with one vector and one matrix. The others stay, whatever `a` is.
    """
    return for_row_tiles("masked", tile_rows(1), lambda rows: masked_tile(vtype, rows), (0, 4))


def gemv(vtype: VectorType, vecs: int) -> Builder:
    """Return the builder of `gemm` for one row and `panels` panels, with all K blocks in one call, which saves a tenth.
    The columns are `count` of a with w, then `count2` of a2 with w2. The first K block has `first`, its sum starting
    from `part`; the others have `block`. Addresses of the next panel are `out_step` further, and so on.
    """
    vector, most = vtype.size * vtype.count, panels_at_once(vecs)

    def build(
        b, panels, init, init_step, out, out_step, a, w, w_step, count, a2, w2, w2_step, count2, first, block, part,
        part_step,
    ):  # fmt: skip
        rest = b.sub(b.add(count, count2), first)
        rest = b.select(b.icmp_signed(">", rest, I64(0)), rest, I64(0))
        blocks = b.add(I64(1), b.sdiv(b.add(rest, b.sub(block, I64(1))), block))
        steps = (init_step, out_step, w_step, w2_step, part_step)

        def vectors(addresses):
            return [vtype.load(b, b.add(address, I64(n * vector))) for address in addresses for n in range(vecs)]

        def products(number, columns, a, *carried):
            """Return `a` and the addresses of the weights of `number` panels, after `columns`, and the sums."""

            def column(a, *carried):
                weights, value = carried[:number], vtype.broadcast(b, a)
                new = [vtype.fma(b, w, value, one) for w, one in zip(vectors(weights), carried[number:])]
                return [b.add(a, I64(vtype.size)), *(b.add(w, I64(vecs * vector)) for w in weights), *new]

            def columns_of_a_vector(a, *carried):
                weights, sums, values = carried[:number], carried[number:], vtype.load(b, a)
                for k in range(vtype.count):
                    value, at_k = vtype.lane(b, values, k), [b.add(w, I64(k * vector)) for w in weights]
                    sums = [vtype.fma(b, w, value, one) for w, one in zip(vectors(at_k), sums)]
                return [b.add(a, I64(vector)), *(b.add(w, I64(vtype.count * vector)) for w in weights), *sums]

            carried = [a, *carried]
            if IS_NEON and vecs == 1:  # the address of a panel moves on once for several columns
                carried = for_loop(b, b.udiv(columns, I64(vtype.count)), carried, columns_of_a_vector)
                columns = b.urem(columns, I64(vtype.count))
            results = for_loop(b, columns, carried, column)
            return results[: 1 + number], results[1 + number :]

        def together(number, *starts):
            inits, outs, ws, w2s, parts = (
                [b.add(start, offset) for offset in offsets(b, step, number)] for start, step in zip(starts, steps)
            )
            each = 1 + number  # addresses of columns: of a, and of the weights of each panel

            def k_block(length, left, left2, *carried):
                of_a = at_most(b, left, length)
                of_a2 = at_most(b, left2, b.sub(length, of_a))
                at, at2, values = carried[:each], carried[each : 2 * each], carried[2 * each :]
                totals, sums = values[: number * vecs], values[number * vecs :]
                at, sums = products(number, of_a, *at, *sums)
                at2, sums = products(number, of_a2, *at2, *sums)
                totals = [b.fadd(total, one) for total, one in zip(totals, sums)]
                zeros = [vtype.splat(0.0)] * len(sums)
                return [block, b.sub(left, of_a), b.sub(left2, of_a2), *at, *at2, *totals, *zeros]

            carried = [first, count, count2, a, *ws, a2, *w2s, *vectors(inits), *vectors(parts)]
            totals = for_loop(b, blocks, carried, k_block)[3 + 2 * each :]
            for k, out in enumerate(outs):
                for n in range(vecs):
                    vtype.store(b, totals[k * vecs + n], b.add(out, I64(n * vector)))
            return [b.add(start, b.mul(step, I64(number))) for start, step in zip(starts, steps)]

        starts = [init, out, w, w2, part]
        if most > 1:
            starts = for_loop(b, b.udiv(panels, I64(most)), starts, partial(together, most))
            panels = b.urem(panels, I64(most))
        for_loop(b, panels, starts, partial(together, 1))

    return build


def in_place_tile(vtype: VectorType, rows: int) -> Builder:
    length, size, vector = I64(vtype.count), I64(vtype.size), I64(vtype.size * vtype.count)

    def build(b, init, init_row, out, out_row, a, a_row, w, w_row, count, last, a2, a2_row, w2, w2_row, count2, last2):
        copy = b.ptrtoint(b.alloca(ir.ArrayType(vtype.type, vtype.count)), I64)

        def accumulate(a, a_row, w, w_row, count, last, sums):
            weight_rows, row_offsets = offsets(b, w_row, vtype.count), offsets(b, a_row, rows)

            def columns(k):
                column = b.add(w, b.mul(k, size))
                return transposed(b, vtype, [vtype.load(b, b.add(column, row)) for row in weight_rows])

            def add(weights, a_k, sums):
                values = (vtype.broadcast(b, b.add(a_k, offset)) for offset in row_offsets)
                return [vtype.fma(b, weights, value, one) for value, one in zip(values, sums)]

            def square(k, *sums):
                for m, weights in enumerate(columns(k)):
                    sums = add(weights, b.add(a, b.mul(b.add(k, I64(m)), size)), sums)
                return [b.add(k, length), *sums]

            def ragged(k, *sums):
                first = at_most(b, k, last)  # some of these columns may be in the sum already, or past its end
                for m, weights in enumerate(columns(first)):
                    vtype.store(b, weights, b.add(copy, I64(m * vtype.size * vtype.count)))

                def column(weights, a_k, *sums):
                    return [b.add(weights, vector), b.add(a_k, size), *add(vtype.load(b, weights), a_k, sums)]

                begin = b.add(copy, b.mul(b.sub(k, first), vector))
                some = at_most(b, b.sub(count, k), length)
                return [b.add(k, length), *for_loop(b, some, [begin, b.add(a, b.mul(k, size)), *sums], column)[2:]]

            whole = at_most(b, b.sdiv(count, length), b.sdiv(b.add(last, length), length))
            k, *sums = for_loop(b, whole, [I64(0), *sums], square)
            rest = b.sdiv(b.sub(b.add(count, b.sub(length, I64(1))), k), length)
            return for_loop(b, rest, [k, *sums], ragged)[1:]

        sums = accumulate(a, a_row, w, w_row, count, last, [vtype.splat(0.0)] * rows)
        sums = accumulate(a2, a2_row, w2, w2_row, count2, last2, sums)
        for start, target, total in zip(offsets(b, init_row, rows), offsets(b, out_row, rows), sums):
            vtype.store(b, b.fadd(vtype.load(b, b.add(init, start)), total), b.add(out, target))

    return build


def in_place(vtype: VectorType) -> Builder:
    """Return the builder of `gemm` with one vector of original weights, transposed in registers: `count` columns at w
    are multiplied with a, then `count2` at w2 with a2. `last`, counted from w, is the last column at which a whole
    vector lies within the row; if negative, the load begins before w.
    """
    return for_row_tiles("in_place", 4, lambda rows: in_place_tile(vtype, rows), (0, 2, 4, 10))


def accumulate_tile(vtype: VectorType, rows: int, vecs: int) -> Builder:

    def build(b, a, a_row, w, w_row, count, out, out_row):
        vectors = [I64(n * vtype.size * vtype.count) for n in range(vecs)]
        addresses = [b.add(b.add(out, offset), n) for offset in offsets(b, out_row, rows) for n in vectors]
        sums = [vtype.load(b, address) for address in addresses]
        sums = accumulated(b, vtype, rows, vecs, a, a_row, I64(vtype.size), w, w_row, count, sums)[2:]
        for address, value in zip(addresses, sums):
            vtype.store(b, value, address)

    return build


def accumulate(vtype: VectorType, vecs: int) -> Builder:
    """Return the builder of ``out[m, n] += sum of a[m, k] * w[k, n]`` for `rows` values of m, `vecs` vectors of n and
    `count` rows of w. The sum starts from `out`, so several calls make one.
    """
    return for_row_tiles(f"accumulate{vecs}x", tile_rows(vecs), lambda rows: accumulate_tile(vtype, rows, vecs), (0, 5))


def builders(vtype: VectorType) -> Builders:
    """Return the builders of all primitives for an element type."""
    return {
        **{f"gemm{vecs}": (17, gemm(vtype, vecs)) for vecs in (4, 3, 2, 1)},
        **{f"gemv{vecs}": (17, gemv(vtype, vecs)) for vecs in (4, 3, 2, 1)},
        "masked": (13, masked(vtype)),
        "in_place": (17, in_place(vtype)),
        **{f"accumulate{vecs}": (8, accumulate(vtype, vecs)) for vecs in (4, 3, 2, 1)},
        "transpose": (6, transpose(vtype)),
        "add_rows": (6, add_rows(vtype)),
        "copy_rows": (7, copy_rows(vtype, vtype.size, vtype.load_some)),
        "digest": (4, digest(vtype)),
    }


# Primitives that few calls need: for original weights in either pass, and for vectors with units of several heads.
# They would take half of the time of compiling all.
RARE = {
    "in_place.Forward": ("in_place",),
    "in_place.Backward": ("accumulate4", "accumulate3", "accumulate2", "accumulate1"),
    "heads": ("masked",),
}
for _scalar in types.float32, types.float64:
    _size, _all = _scalar.bitwidth // 8, builders(VectorType(_scalar))
    NAMES = tuple(_all)
    for _kind, _names in RARE.items():
        tables[f"{_kind}.{_size}"] = {name: _all.pop(name) for name in _names}
    tables[f"primitives{_size}"] = _all
