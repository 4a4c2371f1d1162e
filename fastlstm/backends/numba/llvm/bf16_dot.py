"""Products of bfloat16 on vectors: vdpbf16ps adds two products to each lane's sum. See `matrix` for the operands."""

from functools import partial

from llvmlite import ir
from numba.core import types

from fastlstm.backends.numba.llvm.amx import TILE
from fastlstm.backends.numba.llvm.loops import Builder, for_loop, function_named, offsets, update_tile
from fastlstm.backends.numba.llvm.register_tiles import emit_row_tiles
from fastlstm.backends.numba.llvm.simd import I32, I64, TILE_ROWS, VectorType, instruction, load

FLOATS = VectorType(types.float32)
PAIRS = ir.VectorType(I32, 16)  # of bfloat16


def max_components() -> int:
    """Return one: three products of two components would take longer than one of float32."""
    return 1


def tile(rows: int, vecs: int) -> Builder:
    """Return the builder of `product` for `rows` rows and `vecs` vectors: their sums stay in registers."""

    def build(b, init, init_row, out, out_row, a, a_step, w, w_step, steps):
        def pair(a, w, *acc):
            def number(m):
                return FLOATS.broadcast_value(b, load(b, I32, b.add(a, I64(64 * m))))

            def weight(n):
                return load(b, PAIRS, b.add(w, I64(n * TILE)), 4)

            def add(total, left, right):
                return instruction(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS.type, total, left, right)

            return [b.add(a, I64(4)), b.add(w, I64(64)), *update_tile(rows, vecs, number, weight, add, acc)]

        def step(a, w, *acc):
            acc = for_loop(b, I64(16), [a, w, *acc], pair)[2:]
            return [b.add(a, a_step), b.add(w, w_step), *acc]

        addresses = [b.add(row, I64(64 * n)) for row in _rows(b, init, init_row, rows) for n in range(vecs)]
        acc = for_loop(b, steps, [a, w, *(FLOATS.load(b, address) for address in addresses)], step)[2:]
        addresses = [b.add(row, I64(64 * n)) for row in _rows(b, out, out_row, rows) for n in range(vecs)]
        for value, address in zip(acc, addresses):
            FLOATS.store(b, value, address)

    return build


def _rows(b: ir.IRBuilder, first: ir.Value, row: ir.Value, count: int) -> list[ir.Value]:
    return [b.add(first, offset) for offset in offsets(b, row, count)]


def product(components: int) -> Builder:
    """Return the builder of `amx.product` for one component, but `out` needs no room for more than `rows` rows."""

    def build(b, rows, init, init_row, out, out_row, a, a_step, a_component, w, w_component, steps, tiles, block_steps):
        def columns(vecs, init, out, w):
            def body(size, init, out, a):
                args = [init, init_row, out, out_row, a, a_step, w, w_component, steps]
                b.call(function_named(b.module, f"dots{size}x{vecs}", len(args), tile(size, vecs)), args)
                moves = b.mul(init_row, I64(size)), b.mul(out_row, I64(size)), I64(64 * size)
                return [b.add(address, move) for address, move in zip((init, out, a), moves)]

            emit_row_tiles(b, rows, TILE_ROWS * 4 // vecs, [init, out, a], body)
            return [b.add(init, I64(64 * vecs)), b.add(out, I64(64 * vecs)), b.add(w, I64(TILE * vecs))]

        moved = for_loop(b, b.udiv(tiles, I64(4)), [init, out, w], partial(columns, 4))
        for vecs in (3, 2, 1):
            times = b.zext(b.icmp_signed("==", b.and_(tiles, I64(3)), I64(vecs)), I64)
            moved = for_loop(b, times, moved, partial(columns, vecs))

    return build


def configure(b, rows):
    pass


def release(b):
    pass
