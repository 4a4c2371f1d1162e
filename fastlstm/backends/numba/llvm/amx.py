"""Products of bfloat16 on Intel's AMX, whose tiles are of 16 rows and 64 bytes. See `matrix` for the operands."""

import ctypes
import platform
import sys

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, at_most, counted
from fastlstm.backends.numba.llvm.simd import I8, I64, instruction, store

ROWS, TILE = 16, 1024  # of a tile, and its bytes
# Pairs of pieces whose product counts, the smallest first; the others are below the last bit that the pieces keep.
PRODUCTS = {1: ((0, 0),), 2: ((0, 1), (1, 0), (0, 0)), 3: ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))}
ROW = I64(64)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def most_pieces() -> int:
    """Three, or 0 where the system does not let this process use the unit."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return 0
    return 3 if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0 else 0


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    instruction(b, f"llvm.x86.{name}", ir.VoidType(), *args)


def _load(b: ir.IRBuilder, tile: int, address: ir.Value, row: ir.Value = ROW) -> None:
    _call(b, "tileloadd64", I8(tile), b.inttoptr(address, I8.as_pointer()), row)


def _store(b: ir.IRBuilder, tile: int, address: ir.Value, row: ir.Value) -> None:
    _call(b, "tilestored64", I8(tile), b.inttoptr(address, I8.as_pointer()), row)


def product(pieces: int) -> Builder:
    """``out[m, n] = init[m, n] + sum of a[m, k] * w[k, n]`` for `rows` values of m, 32 `pairs` of n, 32 `steps` of k.

    `a` are rows, `a_step` and `a_piece` bytes apart; w are columns. Two tiles of rows by two of columns stay in
    registers: fewer chains would wait for each other's sums. The order of a sum is the same for every row. Whole tiles
    are written: out has room for 16 rows, for 32 if there are more than 16.
    """
    products, w_step = PRODUCTS[pieces], pieces * 4 * TILE

    def build(b, rows, init, init_row, out, out_row, a, a_step, a_piece, w, steps, pairs, block_steps):
        def sums(steps, init, init_row, out, a, w, high, step):
            """The four sums of tiles, `high` by 4 / high."""

            def places(base, row):
                across = 4 // high
                return [
                    b.add(base, b.add(b.mul(row, I64(tile // across * 16)), I64(tile % across * 64)))
                    for tile in range(4)
                ]

            for tile, place in enumerate(places(init, init_row)):
                _load(b, tile, place, init_row)
            counted(b, steps, [a, w], step)
            for tile, place in enumerate(places(out, out_row)):
                _store(b, tile, place, out_row)

        def by_two(a, w):
            """A step of two tiles of rows, two of columns."""
            last = (-1, -1)
            for left, right in products:  # each tile loaded where it is first wanted, behind a product: 10 % faster
                at, beside = b.add(a, b.mul(a_piece, I64(left))), b.add(w, I64(right * 4 * TILE))
                for tile in range(4):
                    row, column = 4 + tile // 2, 6 + tile % 2
                    if left != last[0] and tile % 2 == 0:
                        _load(b, row, b.add(at, I64(TILE * (row - 4))))
                    if right != last[1] and tile < 2:
                        _load(b, column, b.add(beside, I64(TILE * (column - 6))))
                    _call(b, "tdpbf16ps", I8(tile), I8(row), I8(column))
                last = (left, right)
            return [b.add(a, a_step), b.add(w, I64(w_step))]

        def by_four(a, w):
            """A step of one tile of rows, four of columns."""
            for piece in range(pieces):
                _load(b, 4 + piece, b.add(a, b.mul(a_piece, I64(piece))))
            for tile in range(4):
                last = -1
                for left, right in products:
                    if right != last:
                        _load(b, 7, b.add(w, I64(right * 4 * TILE + tile * TILE)))
                    _call(b, "tdpbf16ps", I8(tile), I8(4 + left), I8(7))
                    last = right
            return [b.add(a, a_step), b.add(w, I64(w_step))]

        two = b.udiv(b.add(rows, I64(15)), I64(32))
        done = b.mul(two, I64(32))
        blocks = b.udiv(b.add(steps, b.sub(block_steps, I64(1))), block_steps)

        def block(n, begin, a, w, init, init_row):
            after = b.add(n, I64(1))
            end = b.udiv(b.mul(steps, after), blocks)
            count = b.sub(end, begin)

            def columns(init, to, w):
                def tiles(init, to, a):
                    sums(count, init, init_row, to, a, w, 2, by_two)
                    moves = b.mul(I64(32), init_row), b.mul(I64(32), out_row), I64(2 * TILE)
                    return [b.add(place, move) for place, move in zip((init, to, a), moves)]

                counted(b, two, [init, to, a], tiles)
                return [b.add(init, I64(128)), b.add(to, I64(128)), b.add(w, I64(2 * TILE))]

            counted(b, b.select(b.icmp_signed(">", two, I64(0)), pairs, I64(0)), [init, out, w], columns)
            with b.if_then(b.icmp_signed("<", done, rows)):
                init_at, out_at = b.add(init, b.mul(done, init_row)), b.add(out, b.mul(done, out_row))
                sums(count, init_at, init_row, out_at, b.add(a, b.mul(done, I64(64))), w, 1, by_four)
            return [after, end, b.add(a, b.mul(a_step, count)), b.add(w, b.mul(I64(w_step), count)), out, out_row]

        counted(b, blocks, [I64(0), I64(0), a, w, init, init_row], block)

    return build


def configure(b, rows):
    """Ready the unit for products of operands of `rows` rows, 16 and more being 16. It holds until `release`."""
    memory = b.alloca(ir.ArrayType(I8, 64))
    memory.align = 64
    at = b.ptrtoint(memory, I64)
    for k in range(0, 64, 8):
        store(b, I64(1 if k == 0 else 0), b.add(at, I64(k)))
    few = b.trunc(at_most(b, rows, I64(16)), I8)
    for tile in range(8):  # few rows take `by_four`, whose sums and left sides are the tiles up to 6
        store(b, ir.IntType(16)(64), b.add(at, I64(16 + 2 * tile)))
        store(b, few if tile < 7 else I8(16), b.add(at, I64(48 + tile)))
    _call(b, "ldtilecfg", b.bitcast(memory, I8.as_pointer()))


def release(b):
    _call(b, "tilerelease")
