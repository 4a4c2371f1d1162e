"""Products on the processor's matrix unit (Intel AMX), as LLVM functions of integers like those of `primitives`.

The unit multiplies bfloat16 and sums in float32. A float32 is the sum of three bfloat16 pieces, exactly, and six of
the nine products of pieces reach float32's accuracy; two pieces and three products keep 16 bits of each factor, one
piece 8. The unit takes pieces below the smallest normal number for zero: numbers below about 1e-31 lose bits.

Operands lie in tiles of 1 KB, as the unit loads them:
  rows     [piece][step of 32 k][row][32 k]: what stands left of a product, 64 bytes a row and step
  columns  [step of 32 k][piece][4][pair of k][16 columns][2]: what stands right of it, 64 columns wide
"""

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastlstm.backends.numba.primitives import counted, function, transposed
from fastlstm.backends.numba.simd import I32, I64, VECTOR_BYTES, Lanes, machine_features

Builder = Callable[..., None]
TILE = 1024  # bytes

# Pairs of pieces whose product counts, the smallest first; the others are below the last bit that the pieces keep.
PRODUCTS = {1: ((0, 0),), 2: ((0, 1), (1, 0), (0, 0)), 3: ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))}
I8, ROW = ir.IntType(8), I64(64)
FLOATS, INTS, SHORTS = Lanes(types.float32), ir.VectorType(I32, 16), ir.VectorType(ir.IntType(16), 16)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def available() -> bool:
    """Whether the processor has the unit, and the system lets this process use it."""
    features = machine_features().split(",")
    if VECTOR_BYTES != 64 or not {"+amx-tile", "+amx-bf16"} <= set(features):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    signature = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    b.call(cgutils.get_or_insert_function(b.module, signature, f"llvm.x86.{name}"), args)


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


def _constant(value: int) -> ir.Constant:
    return ir.Constant(INTS, [ir.Constant(I32, value)] * 16)


def _pieces(b: ir.IRBuilder, x: ir.Value, pieces: int, large: ir.Value | None) -> tuple[list[ir.Value], Any]:
    """The pieces of 16 numbers, each in the upper half of its 32 bits (the lower halves hold anything), and the lanes
    of numbers from 2^63 on, together with `large`: their products may overflow one way and then the other, where the
    product of the whole numbers is finite; and an infinite number's second piece would be a NaN.
    """
    bits, upper = b.bitcast(x, INTS), _constant(0xFFFF0000)
    half: ir.Value = _constant(0x8000)
    if pieces == 1:  # to even: what PyTorch rounds by
        half = b.add(b.and_(b.lshr(bits, _constant(16)), _constant(1)), _constant(0x7FFF))
    nan = b.fcmp_unordered("uno", x, x)  # rounding may carry out of a NaN
    found = [b.select(nan, _constant(0x7FC00000), b.add(bits, half))]
    for n in range(1, pieces):
        x = b.fsub(x, b.bitcast(b.and_(found[-1], upper), FLOATS.type))  # exact
        bits = b.bitcast(x, INTS)
        found.append(bits if n == 2 else b.add(bits, half))  # the third is what is left
    if large is not None:
        size = b.and_(found[0], _constant(0x7FFF0000))
        above, is_nan = (b.icmp_signed(">", size, _constant(bits)) for bits in (0x5EFFFFFF, 0x7F800000))
        large = b.or_(large, b.and_(above, b.not_(is_nan)))
    return found, large


def _no_lanes(pieces: int) -> list[ir.Value]:
    return [ir.Constant(ir.VectorType(ir.IntType(1), 16), [0] * 16)] if pieces > 1 else []


def _tell(b: ir.IRBuilder, large: list[ir.Value], flag: ir.Value) -> None:
    """Store a one at `flag` where a lane was large."""
    if large:
        some = b.icmp_signed("!=", b.bitcast(large[0], ir.IntType(16)), ir.IntType(16)(0))
        with b.if_then(some):
            b.store(I64(1), b.inttoptr(flag, I64.as_pointer()))


def split(pieces: int) -> Builder:
    """Each row's 16 numbers to the half of a row of an operand, 64 bytes from one row to the next."""

    def build(b, rows, source, source_row, target, piece, flag):
        def row(source, target, *large):
            found, more = _pieces(b, FLOATS.load(b, source), pieces, large[0] if large else None)
            for n, bits in enumerate(found):
                short = b.trunc(b.lshr(bits, _constant(16)), SHORTS)
                at = b.inttoptr(b.add(target, b.mul(piece, I64(n))), SHORTS.as_pointer())
                b.store(short, at).align = 2
            return [b.add(source, source_row), b.add(target, I64(64)), *([more] if large else [])]

        _tell(b, counted(b, rows, [source, target, *_no_lanes(pieces)], row)[2:], flag)

    return build


def _interleaved(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    return b.or_(b.lshr(low, _constant(16)), b.and_(high, _constant(0xFFFF0000)))


def pairs(pieces: int) -> Builder:
    """The 16 numbers of a row of the first source, each beside the second source's: 64 bytes a row."""

    def build(b, rows, first, first_row, second, second_row, target, piece, flag):
        def row(first, second, target, *large):
            more = large[0] if large else None
            low, more = _pieces(b, FLOATS.load(b, first), pieces, more)
            high, more = _pieces(b, FLOATS.load(b, second), pieces, more)
            for n in range(pieces):
                at = b.inttoptr(b.add(target, b.mul(piece, I64(n))), INTS.as_pointer())
                b.store(_interleaved(b, low[n], high[n]), at).align = 4
                target_next = b.add(target, I64(64))
            return [b.add(first, first_row), b.add(second, second_row), target_next, *([more] if large else [])]

        _tell(b, counted(b, rows, [first, second, target, *_no_lanes(pieces)], row)[3:], flag)

    return build


def transpose(b, count, source, source_step, target, target_step):
    """`count` tiles of 16 by 16 pairs, transposed."""

    def tile(source, target):
        rows = []
        for n in range(16):
            value = b.load(b.inttoptr(b.add(source, I64(64 * n)), INTS.as_pointer()))
            value.align = 4
            rows.append(value)
        for n, value in enumerate(transposed(b, FLOATS, rows)):
            b.store(value, b.inttoptr(b.add(target, I64(64 * n)), INTS.as_pointer())).align = 4
        return [b.add(source, source_step), b.add(target, target_step)]

    counted(b, count, [source, target], tile)


def configure(b, rows):
    """Ready the unit for products of operands of `rows` rows, 16 and more being 16. It holds until `release`."""
    memory = b.alloca(ir.ArrayType(I8, 64))
    memory.align = 64
    at = b.ptrtoint(memory, I64)
    for k in range(0, 64, 8):
        b.store(I64(1 if k == 0 else 0), b.inttoptr(b.add(at, I64(k)), I64.as_pointer()))
    few = b.trunc(b.select(b.icmp_signed("<", rows, I64(16)), rows, I64(16)), I8)
    small = b.icmp_signed("<", rows, I64(16))
    for tile in range(8):  # few rows take `by_four`, whose sums and left sides are the tiles up to 6
        b.store(ir.IntType(16)(64), b.inttoptr(b.add(at, I64(16 + 2 * tile)), ir.IntType(16).as_pointer()))
        height = few if tile < 7 else I8(16)
        b.store(b.select(small, height, I8(16)), b.inttoptr(b.add(at, I64(48 + tile)), I8.as_pointer()))
    _call(b, "ldtilecfg", b.bitcast(memory, I8.as_pointer()))


def release(b):
    _call(b, "tilerelease")


def builders(pieces: int) -> dict[str, tuple[int, Builder]]:
    return {
        "matrix_product": (12, product(pieces)),
        "split": (6, split(pieces)),
        "pairs": (8, pairs(pieces)),
        "transpose_tiles": (5, transpose),
        "configure": (1, configure),
        "release": (0, release),
    }


NAMES = tuple(builders(1))


@intrinsic(prefer_literal=True)
def store_addresses(typingctx, pieces, target):
    """Write the addresses of the primitives for numbers of so many pieces, a constant, to an array of int64."""
    if not isinstance(pieces, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        for k, (name, (arguments, builder)) in enumerate(builders(pieces.literal_value).items()):
            found = function(b.module, f"fastlstm.{name}{pieces.literal_value}", arguments, builder)
            b.store(b.ptrtoint(found, I64), b.inttoptr(b.add(args[1], I64(8 * k)), I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(pieces, types.intp), codegen
