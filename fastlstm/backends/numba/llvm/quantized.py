"""The arithmetic of int8 layers as LLVM functions: products of bytes with weights, and cells.

Products are fused into the sums they stand in, on every processor, so that all of them give the same bits.
"""

from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import amx, matrix
from fastlstm.backends.numba.llvm import bytes as dots
from fastlstm.backends.numba.llvm import dots as bfloats
from fastlstm.backends.numba.llvm.bytes import OFFSET, SUMS, tile_rows
from fastlstm.backends.numba.llvm.cells import Functions, on_vectors
from fastlstm.backends.numba.llvm.digest import digest
from fastlstm.backends.numba.llvm.loops import Builder, Builders, at_most, counted, function, tile_sums
from fastlstm.backends.numba.llvm.primitives import in_tiles
from fastlstm.backends.numba.llvm.rounding import FLOATS, TOP, quantize, store_bytes
from fastlstm.backends.numba.llvm.rows import copy_rows
from fastlstm.backends.numba.llvm.simd import I64, VECTOR_BYTES, Vector, load, machine_features, store

CONSTANTS = 3  # of a panel: scales, biases, and what sums start from, a vector for each gate
ON_UNIT = dots.UNIT == "vnni" and matrix.unit() is amx and "+amx-int8" in machine_features().split(",")


def _products(
    b, rows: int, vecs: int, pieces: int, w, init, init_row, init_piece, groups, a, a_row, a_piece
) -> list[list[Any]]:  # fmt: skip
    """For each row the products with `vecs` vectors of a panel, as floats. Sums stay in registers. They start from what
    lies at `init`, `init_row` further for each row and `init_piece` for each piece: the matrix unit's sums, or with
    strides of 0 the same start for all.
    """
    height, at_once = rows * pieces, 2 if rows * pieces == 1 else 1  # two chains of sums where there are few
    places = [b.add(b.mul(a_row, I64(m)), b.mul(a_piece, I64(k))) for k in range(pieces) for m in range(rows)]
    zeros = ir.Constant(SUMS, [0] * dots.LANES)
    if ON_UNIT:
        begins = [b.add(b.mul(init_row, I64(m)), b.mul(init_piece, I64(k))) for k in range(pieces) for m in range(rows)]
        starts = [load(b, SUMS, b.add(init, b.add(at, I64(n * VECTOR_BYTES))), 4) for at in begins for n in range(vecs)]
    else:
        at_start = [b.add(init, I64(n * VECTOR_BYTES)) for n in range(vecs)]
        starts = [load(b, SUMS, at, 4) if OFFSET else zeros for at in at_start] * height

    def add(total, operand, weight):
        return dots.add(b, total, weight, operand)

    def body(number, a, w, *acc):
        new = list(acc)
        for u in range(number):

            def operand(m, u=u):
                return dots.prepared(b, dots.wide(b, b.add(a, b.add(places[m], I64(4 * u)))))

            def weight(n, u=u):
                return load(b, SUMS, b.add(w, I64((u * vecs + n) * VECTOR_BYTES)), 4)

            of_group = slice(u * height * vecs, (u + 1) * height * vecs)
            new[of_group] = tile_sums(height, vecs, operand, weight, add, new[of_group])
        return [b.add(a, I64(4 * number)), b.add(w, I64(number * vecs * VECTOR_BYTES)), *new]

    acc = starts + [zeros] * ((at_once - 1) * height * vecs)
    if at_once == 2:
        a, w, *acc = counted(b, b.lshr(groups, I64(1)), [a, w, *acc], partial(body, 2))
        half = height * vecs
        acc = [b.add(x, y) for x, y in zip(acc[:half], acc[half:])]
        groups = b.and_(groups, I64(1))
    acc = counted(b, groups, [a, w, *acc], partial(body, 1))[2:]
    found = [[b.sitofp(acc[m * vecs + n], FLOATS.type) for n in range(vecs)] for m in range(height)]
    if pieces == 1:
        return found
    byte = FLOATS.splat(256.0)
    return [[FLOATS.fma(b, x, byte, y) for x, y in zip(*pair)] for pair in zip(found[:rows], found[rows:])]


def _constant(b, constants, kind: int, vecs: int, n: int):
    """Where a panel's scale (0), bias (1), or start of a sum (2) of vector n lies."""
    return b.add(constants, I64((kind * vecs + n) * VECTOR_BYTES))


def _in_tiles(b, name: str, vecs: int, pieces: int, rows, unit_rows, w, init, groups, a, a_row, a_piece, carried, body):
    """``carried = body(size, sums, *carried)`` for tiles of `size` rows that cover `rows`: `sums` are the arguments of
    `_products` from w to a_piece.

    From `unit_rows` rows on, blocks of `amx.ROWS` of them first get the sums over whole tiles of columns from the
    matrix unit. A last block of fewer rows is multiplied together with rows before it, and only its own sums are used.
    """

    def tiles(size, w, init, init_row, init_piece, groups, a, carried):
        def tile(size, init, a, *carried):
            new = body(size, [w, init, init_row, init_piece, groups, a, a_row, a_piece], *carried)
            return [b.add(init, b.mul(init_row, I64(size))), b.add(a, b.mul(a_row, I64(size))), *new]

        return in_tiles(b, size, tile_rows(pieces), [init, a, *carried], tile)[2:]

    if not ON_UNIT:
        tiles(rows, w, init, I64(0), I64(0), groups, a, carried)
        return
    row, columns = vecs * VECTOR_BYTES, 16  # groups in a tile
    with b.goto_entry_block():
        memory = b.alloca(ir.ArrayType(ir.IntType(8), pieces * amx.ROWS * row))
        memory.align = VECTOR_BYTES
    sums = b.ptrtoint(memory, I64)
    on_unit = b.and_(b.icmp_signed(">=", rows, unit_rows), b.icmp_signed(">=", groups, I64(columns)))
    with b.if_else(on_unit) as (many, few):
        with few:
            tiles(rows, w, init, I64(0), I64(0), groups, a, carried)
        with many:
            steps = b.udiv(groups, I64(columns))
            rest, w_rest = b.urem(groups, I64(columns)), b.add(w, b.mul(steps, I64(columns * row)))
            made = function(b.module, f"{name}.unit{vecs}", 7, amx.byte_sums(vecs, pieces))

            def block(left, a, *carried):
                size = at_most(b, left, I64(amx.ROWS))
                before = b.sub(I64(amx.ROWS), size)
                b.call(made, [init, b.sub(a, b.mul(a_row, before)), a_row, a_piece, w, steps, sums])
                start, a_rest = b.add(sums, b.mul(before, I64(row))), b.add(a, b.mul(steps, I64(4 * columns)))
                new = tiles(size, w_rest, start, I64(row), I64(amx.ROWS * row), rest, a_rest, carried)
                return [b.sub(left, size), b.add(a, b.mul(a_row, size)), *new]

            counted(b, b.udiv(b.add(rows, I64(amx.ROWS - 1)), I64(amx.ROWS)), [rows, a, *carried], block)


def input_tile(rows: int, vecs: int, pieces: int) -> Builder:
    """`inputs` for one panel and `rows` rows."""

    def build(b, w, init, init_row, init_piece, groups, a, a_row, a_piece, constants, scales, out, out_row):
        found = _products(b, rows, vecs, pieces, w, init, init_row, init_piece, groups, a, a_row, a_piece)
        for m, of_row in enumerate(found):
            scale = FLOATS.broadcast(b, b.add(scales, I64(4 * m)))
            for n, value in enumerate(of_row):
                factor = b.fmul(FLOATS.load(b, _constant(b, constants, 0, vecs, n)), scale)
                value = FLOATS.fma(b, value, factor, FLOATS.load(b, _constant(b, constants, 1, vecs, n)))
                FLOATS.store(b, value, b.add(b.add(out, b.mul(out_row, I64(m))), I64(n * VECTOR_BYTES)))

    return build


def inputs(name: str, vecs: int, pieces: int) -> Builder:
    """What x makes of the sums of some panels: (panels, rows, vecs, lanes) from `out` on."""

    def build(
        b, panels, rows, unit_rows, w, w_panel, constants, constants_panel, groups, a, a_row, a_piece, scales, out,
        out_panel, out_row,
    ):  # fmt: skip
        def panel(w, constants, out):
            def body(size, sums, scales, out):
                args = [*sums, constants, scales, out, out_row]
                made = input_tile(size, vecs, pieces)
                b.call(function(b.module, f"{name}.inputs{size}", len(args), made), args)
                return [b.add(scales, I64(4 * size)), b.add(out, b.mul(out_row, I64(size)))]

            init = _constant(b, constants, 2, vecs, 0)
            _in_tiles(
                b, name, vecs, pieces, rows, unit_rows, w, init, groups, a, a_row, a_piece, [scales, out], body
            )  # fmt: skip
            return [b.add(w, w_panel), b.add(constants, constants_panel), b.add(out, out_panel)]

        counted(b, panels, [w, constants, out], panel)

    return build


def step_tile(rows: int, cell: Functions, pieces: int) -> Builder:
    """`step` for one panel and `rows` rows."""
    layout, takes, run = cell.layout, cell.takes[0], on_vectors(cell.forward.phases[0].units)
    of_x, of_h, (first, *_, carried) = layout.of_x, layout.of_h, (*layout.states[:1], *layout.states)
    vecs = len(of_h)

    def build(
        b, w, init, init_row, init_piece, groups, a, a_row, a_piece, constants, scales, fed, fed_row, state, out,
        out_row, to, to_row, to_piece, to_scales, to_scales_step,
    ):  # fmt: skip
        found = _products(b, rows, vecs, pieces, w, init, init_row, init_piece, groups, a, a_row, a_piece)
        top, nan = FLOATS.splat(float(TOP[pieces])), FLOATS.scalar(float("nan"))
        for m, of_row in enumerate(found):
            scale = FLOATS.broadcast(b, b.add(scales, I64(4 * m)))
            row, given = b.add(fed, b.mul(fed_row, I64(m))), {}
            for k, gate in enumerate(layout.sums):
                n = k - of_h.start
                at = b.add(row, I64(k * VECTOR_BYTES)) if k in of_x else _constant(b, constants, 1, vecs, n)
                value = FLOATS.load(b, at)
                if k in of_h:
                    factor = b.fmul(FLOATS.load(b, _constant(b, constants, 0, vecs, n)), scale)
                    value = FLOATS.fma(b, of_row[n], factor, value)
                given[f"{gate}_pre"] = Vector(b, FLOATS, value)
            at_state = b.add(state, I64(m * VECTOR_BYTES))
            given[f"{carried}_prev"] = Vector(b, FLOATS, FLOATS.load(b, at_state))
            new = run({name: value for name, value in given.items() if name in takes})
            h = new[first].value
            FLOATS.store(b, new[carried].value, at_state)
            FLOATS.store(b, h, b.add(out, b.mul(out_row, I64(m))))
            store_bytes(b, h, top, b.add(to, b.mul(to_row, I64(m))), to_piece, pieces)
            lanes_nan = b.bitcast(b.fcmp_unordered("uno", h, h), ir.IntType(FLOATS.count))
            with b.if_then(b.icmp_signed("!=", lanes_nan, lanes_nan.type(0)), likely=False):
                store(b, nan, b.add(to_scales, b.mul(to_scales_step, I64(m))), 4)

    return build


def step(name: str, cell: Functions, pieces: int) -> Builder:
    """One time step of some rows and panels: products of h, then the cells. `fed` has what x makes of the sums.

    The last of the cell's states is carried in `state` (panels, rows, lanes), whole vectors of h go to `out`, and its
    bytes to `to`. Where a row's h is NaN, so is then its scale at `to_scales`.
    """

    def build(
        b, panels, rows, unit_rows, w, w_panel, constants, constants_panel, groups, a, a_row, a_piece, scales, fed,
        fed_panel, fed_row, state, state_panel, out, out_panel, out_row, to, to_panel, to_row, to_piece, to_scales,
        to_scales_step,
    ):  # fmt: skip
        vecs = len(cell.layout.of_h)

        def panel(w, constants, fed, state, out, to):
            def body(size, sums, scales, fed, state, out, to, to_scales):
                args = [
                    *sums, constants, scales, fed, fed_row, state, out, out_row, to, to_row, to_piece, to_scales,
                    to_scales_step,
                ]  # fmt: skip
                made = step_tile(size, cell, pieces)
                b.call(function(b.module, f"{name}.step{size}", len(args), made), args)
                rows = [b.mul(row, I64(size)) for row in (fed_row, out_row, to_row, to_scales_step)]
                steps = I64(4 * size), rows[0], I64(VECTOR_BYTES * size), *rows[1:]
                places = scales, fed, state, out, to, to_scales
                return [b.add(place, step) for place, step in zip(places, steps)]

            init = _constant(b, constants, 2, vecs, 0)
            # a call a panel would cost a lone row a twentieth of its time
            with b.if_else(b.icmp_signed("==", rows, I64(1))) as (one, many):
                with one:
                    step_tile(1, cell, pieces)(
                        b, w, init, I64(0), I64(0), groups, a, a_row, a_piece, constants, scales, fed, fed_row, state,
                        out, out_row, to, to_row, to_piece, to_scales, to_scales_step,
                    )  # fmt: skip
                with many:
                    _in_tiles(
                        b, name, vecs, pieces, rows, unit_rows, w, init, groups, a, a_row, a_piece,
                        [scales, fed, state, out, to, to_scales], body,
                    )  # fmt: skip
            moves = w_panel, constants_panel, fed_panel, state_panel, out_panel, to_panel
            return [b.add(place, move) for place, move in zip((w, constants, fed, state, out, to), moves)]

        counted(b, panels, [w, constants, fed, state, out, to], panel)

    return build


def builders(name: str, cell: Functions, pieces: int) -> Builders:
    """`name` is what the functions that they call begin with."""
    of_unit = amx if ON_UNIT else bfloats  # vectors have nothing to ready or to release
    return {
        "quantize": (9, quantize(pieces)),
        "inputs": (15, inputs(name, len(cell.layout.of_x), pieces)),
        "step": (26, step(name, cell, pieces)),
        "copy_rows": (7, copy_rows(FLOATS)),
        "digest": (4, digest(FLOATS)),
        "configure": (1, of_unit.configure),
        "release": (0, of_unit.release),
    }


NAMES = "quantize", "inputs", "step", "copy_rows", "digest", "configure", "release"
