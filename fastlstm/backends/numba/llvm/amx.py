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


def _operations(high: int, wide: int, components: int) -> list[tuple[int, list[int], list[tuple[int, int, int, int]]]]:
    """Return what a K block of `high` by `wide` tiles does, in order: for each product the tile of its sum, those of
    its two factors, and the loads that go before it, of (tile, side, component, number of the tile along its side).

    The sums have the first tiles, and the right sides the last, to which `configure` always gives 16 rows. A factor is
    loaded where it is first wanted, behind a product, which is 10 % faster. It takes the place of the one that is next
    wanted last.
    """
    order = [(m, n) for n in range(wide) for m in (range(high) if n % 2 == 0 else reversed(range(high)))]
    products = [(m * wide + n, ((left, m), (right, n))) for left, right in PRODUCTS[components] for m, n in order]
    rights = 2 if high == wide == 2 else 1
    places = range(high * wide, 8 - rights), range(8 - rights, 8)
    held: dict[int, tuple[int, int]] = {}  # the factor of a tile
    operations = []
    for k, (total, factors) in enumerate(products):
        tiles, loads = [], []
        for side, factor in enumerate(factors):
            wanted = [later[side] for _, later in products[k:]]
            distances = {
                tile: wanted.index(held[tile]) if held.get(tile) in wanted else len(wanted) for tile in places[side]
            }
            tile = next(
                (tile for tile in places[side] if held.get(tile) == factor), max(distances, key=distances.__getitem__)
            )
            if held.get(tile) != factor:
                held[tile] = factor
                loads.append((tile, side, *factor))
            tiles.append(tile)
        operations.append((total, tiles, loads))
    return operations


def product(components: int) -> Builder:
    """Return the builder of ``out[m, n] = init[m, n] + sum of a[m, k] * w[k, n]`` for `rows` values of m, 16 times
    `tiles` values of n, and 32 times `steps` values of k.

    a is a row operand, `a_step` from K block to K block and `a_component` from component to component; w is a column
    operand, with `w_component` from component to component. Up to two tiles of rows by three of columns stay in
    registers. A sum's order is the same for every row. Whole tiles are written: out has room for 16 rows, for 32 if
    there are more than 16.
    """

    def build(b, rows, init, init_row, out, out_row, a, a_step, a_component, w, w_component, steps, tiles, block_steps):
        w_step = b.mul(w_component, I64(components))

        def sums(high, wide, steps, init, init_row, out, a, w):
            """Compute the sums of `high` by `wide` tiles."""

            def addresses(base, row):
                places = [(m, n) for m in range(high) for n in range(wide)]
                return [b.add(base, b.add(b.mul(row, I64(16 * m)), I64(64 * n))) for m, n in places]

            def step(a, w):
                for total, factors, loads in _operations(high, wide, components):
                    for tile, side, component, number in loads:
                        base, stride = ((a, a_component), (w, w_component))[side]
                        _load(b, tile, b.add(b.add(base, b.mul(stride, I64(component))), I64(TILE * number)))
                    _call(b, "tdpbf16ps", I8(total), *map(I8, factors))
                return [b.add(a, a_step), b.add(w, w_step)]

            for tile, address in enumerate(addresses(init, init_row)):
                _load(b, tile, address, init_row)
            for_loop(b, steps, [a, w], step)
            for tile, address in enumerate(addresses(out, out_row)):
                _call(b, "tilestored64", I8(tile), b.inttoptr(address, I8.as_pointer()), out_row)

        two = b.udiv(b.add(rows, I64(15)), I64(32))
        done = b.mul(two, I64(32))
        # a tile of weights that is loaded once gains nothing from the L1 cache
        block_steps = b.select(b.icmp_signed(">", rows, I64(32)), block_steps, b.add(steps, I64(1)))
        some = b.select(b.icmp_signed(">", steps, I64(0)), steps, I64(1))  # without steps a block stores `init`
        blocks = b.udiv(b.add(some, b.sub(block_steps, I64(1))), block_steps)
        # how many groups of columns there are of each width, for two tiles of rows and for one
        is_one, rest = b.zext(b.icmp_signed("==", tiles, I64(1)), I64), b.and_(tiles, I64(3))
        threes = b.sub(b.and_(tiles, I64(1)), is_one)
        twos = b.udiv(b.sub(b.sub(tiles, b.mul(threes, I64(3))), is_one), I64(2))
        rests = {wide: b.zext(b.icmp_signed("==", rest, I64(wide)), I64) for wide in (3, 2, 1)}
        groups = {2: {3: threes, 2: twos, 1: is_one}, 1: {4: b.udiv(tiles, I64(4)), **rests}}

        def block(n, begin, a, w, init, init_row):
            after = b.add(n, I64(1))
            end = b.udiv(b.mul(steps, after), blocks)
            count = b.sub(end, begin)

            def columns(high, times, init, target, a, w):
                """Compute all columns of `times` times `high` tiles of rows."""
                moved = [init, target, w]
                for wide, groups_of_width in groups[high].items():

                    def group(init, target, w, wide=wide):
                        def row_tiles(init, target, a):
                            sums(high, wide, count, init, init_row, target, a, w)
                            moves = b.mul(I64(32), init_row), b.mul(I64(32), out_row), I64(2 * TILE)
                            return [b.add(address, move) for address, move in zip((init, target, a), moves)]

                        for_loop(b, times, [init, target, a], row_tiles)
                        return [b.add(each, I64(n * wide)) for each, n in ((init, 64), (target, 64), (w, TILE))]

                    moved = for_loop(b, groups_of_width, moved, group)

            with b.if_then(b.icmp_signed(">", two, I64(0))):
                columns(2, two, init, out, a, w)
            with b.if_then(b.icmp_signed("<", done, rows)):
                init_left, out_left = b.add(init, b.mul(done, init_row)), b.add(out, b.mul(done, out_row))
                columns(1, I64(1), init_left, out_left, b.add(a, b.mul(done, I64(64))), w)
            return [after, end, b.add(a, b.mul(a_step, count)), b.add(w, b.mul(w_step, count)), out, out_row]

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
    for tile in range(8):  # few rows are one tile high: their sums and left sides are the tiles up to 6
        store(b, ir.IntType(16)(64), b.add(config, I64(16 + 2 * tile)))
        store(b, few if tile < 7 else I8(16), b.add(config, I64(48 + tile)))
    _call(b, "ldtilecfg", b.bitcast(memory, I8.as_pointer()))


def release(b):
    _call(b, "tilerelease")
