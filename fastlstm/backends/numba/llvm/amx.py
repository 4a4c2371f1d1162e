"""Products of bfloat16 on Intel's AMX, whose tiles are of 16 rows and 64 bytes. See `matrix` for the operands."""

import ctypes
import platform
import sys

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, at_most, for_loop
from fastlstm.backends.numba.llvm.simd import I8, I64, instruction, store

ROWS, TILE = 16, 1024  # of a tile, and its bytes
# Pairs of components whose product counts, the smallest first; the others are below the last bit of the components.
PRODUCTS = {1: ((0, 0),), 2: ((0, 1), (1, 0), (0, 0)), 3: ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))}
ROW = I64(64)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def max_components() -> int:
    """Return three, or 0 if the system does not let this process use AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return 0
    return 3 if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0 else 0


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    instruction(b, f"llvm.x86.{name}", ir.VoidType(), *args)


def _load(b: ir.IRBuilder, tile: int, address: ir.Value, row: ir.Value = ROW) -> None:
    _call(b, "tileloadd64", I8(tile), b.inttoptr(address, I8.as_pointer()), row)


def product(components: int) -> Builder:
    """Return the builder of ``out[m, n] = init[m, n] + sum of a[m, k] * w[k, n]`` for `rows` values of m, 32 times
    `tile_pairs` values of n, and 32 times `steps` values of k.

    a is a row operand, `a_step` from K block to K block and `a_component` from component to component; w is a column
    operand. Two tiles of rows by two of columns stay in registers. A sum's order is the same for every row. Whole tiles
    are written: out has room for 16 rows, for 32 if there are more than 16.
    """
    products, w_step = PRODUCTS[components], components * 4 * TILE

    def build(b, rows, init, init_row, out, out_row, a, a_step, a_component, w, steps, tile_pairs, block_steps):
        def sums(steps, init, init_row, out, a, w, high, step):
            """Compute the sums of four tiles, `high` by 4 / high."""

            def addresses(base, row):
                across = 4 // high
                return [
                    b.add(base, b.add(b.mul(row, I64(tile // across * 16)), I64(tile % across * 64)))
                    for tile in range(4)
                ]

            for tile, address in enumerate(addresses(init, init_row)):
                _load(b, tile, address, init_row)
            for_loop(b, steps, [a, w], step)
            for tile, address in enumerate(addresses(out, out_row)):
                _call(b, "tilestored64", I8(tile), b.inttoptr(address, I8.as_pointer()), out_row)

        def by_two(a, w):
            """Emit a K block of two tiles of rows by two of columns."""
            last = (-1, -1)
            for left, right in products:  # each tile loaded where it is first wanted, behind a product: 10 % faster
                a_left, w_right = b.add(a, b.mul(a_component, I64(left))), b.add(w, I64(right * 4 * TILE))
                for tile in range(4):
                    row, column = 4 + tile // 2, 6 + tile % 2
                    if left != last[0] and tile % 2 == 0:
                        _load(b, row, b.add(a_left, I64(TILE * (row - 4))))
                    if right != last[1] and tile < 2:
                        _load(b, column, b.add(w_right, I64(TILE * (column - 6))))
                    _call(b, "tdpbf16ps", I8(tile), I8(row), I8(column))
                last = (left, right)
            return [b.add(a, a_step), b.add(w, I64(w_step))]

        def by_four(a, w):
            """Emit a K block of one tile of rows by four of columns."""
            for component in range(components):
                _load(b, 4 + component, b.add(a, b.mul(a_component, I64(component))))
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

            def columns(init, target, w):
                def tiles(init, target, a):
                    sums(count, init, init_row, target, a, w, 2, by_two)
                    moves = b.mul(I64(32), init_row), b.mul(I64(32), out_row), I64(2 * TILE)
                    return [b.add(address, move) for address, move in zip((init, target, a), moves)]

                for_loop(b, two, [init, target, a], tiles)
                return [b.add(init, I64(128)), b.add(target, I64(128)), b.add(w, I64(2 * TILE))]

            for_loop(b, b.select(b.icmp_signed(">", two, I64(0)), tile_pairs, I64(0)), [init, out, w], columns)
            with b.if_then(b.icmp_signed("<", done, rows)):
                init_left, out_left = b.add(init, b.mul(done, init_row)), b.add(out, b.mul(done, out_row))
                sums(count, init_left, init_row, out_left, b.add(a, b.mul(done, I64(64))), w, 1, by_four)
            return [after, end, b.add(a, b.mul(a_step, count)), b.add(w, b.mul(I64(w_step), count)), out, out_row]

        for_loop(b, blocks, [I64(0), I64(0), a, w, init, init_row], block)

    return build


def configure(b, rows):
    """Configure AMX until `release`, for products of row operands of `rows` rows; more than 16 count as 16."""
    memory = b.alloca(ir.ArrayType(I8, 64))
    memory.align = 64
    config = b.ptrtoint(memory, I64)
    for k in range(0, 64, 8):
        store(b, I64(1 if k == 0 else 0), b.add(config, I64(k)))
    few = b.trunc(at_most(b, rows, I64(16)), I8)
    for tile in range(8):  # few rows take `by_four`, whose sums and left sides are the tiles up to 6
        store(b, ir.IntType(16)(64), b.add(config, I64(16 + 2 * tile)))
        store(b, few if tile < 7 else I8(16), b.add(config, I64(48 + tile)))
    _call(b, "ldtilecfg", b.bitcast(memory, I8.as_pointer()))


def release(b):
    _call(b, "tilerelease")
