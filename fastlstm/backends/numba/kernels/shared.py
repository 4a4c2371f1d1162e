"""What all kernels share: how they are compiled, sizes, and rows read and written in either of two types."""

from typing import Any

from fastlstm.backends.numba.llvm.intrinsics import call, get_int32
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES

VECTOR = VECTOR_BYTES
# Batch rows that pass a panel together, and rows of packed weights in a block: 16 KB of these whatever a vector's size
# and, at 32 bytes, 8 KB of sums, so that both stay in a 32 KB L1 cache while the rows' tiles are computed. A lower tile
# wants longer sums: 3 rows took up to 1.2 times as long in blocks of half of that.
CHUNK, BLOCK_K = 64, 4096 // VECTOR
BLOCK_STEPS = 2  # steps of k whose operands stay in a 48 KB L1 cache while all their tiles are multiplied: 24 + 12 KB
FOLD = 8  # chunks of steps that the matrix unit sums together
ONE = 1024  # where the constants' one lies, after the zeros


def jit(function: Any) -> Any:
    """For functions that kernels call: `llvm.emit` compiles them into each kernel that does."""
    return function


def inlined(function: Any) -> Any:
    """As `jit`, for what every panel of every step runs. Calls of these took 4 % of the time of a layer of two rows."""
    function.inlined = True
    return function


@jit
def operand_steps(I, H):
    """Steps of 32 columns that x and h make for the matrix unit, each padded to 16."""
    return ((I + 15) // 16 + (H + 15) // 16 + 1) // 2


@jit
def item(a):
    """Bytes of an element of x, of h and of the weights."""
    return 2 if a.is_narrow != 0 else a.size


@jit
def read_rows(a, narrow, rows, valid, width, source, source_row, target, target_row):
    """`valid` elements of each row, then zeros up to `width`."""
    if narrow != 0:
        call(a.widen, rows, valid, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, valid, width, source, source_row, target, target_row)


@jit
def write_rows(a, rows, width, source, source_row, target, target_row):
    """`width` elements of each row, rounded where they are of bfloat16."""
    if a.is_narrow != 0:
        call(a.narrow, rows, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, width, width, source, source_row, target, target_row)


@jit
def is_zero(rows, width, source, source_row):
    """Whether `width` bytes of each row are zero: then a product of finite weights with them is left out, and no sum
    differs.
    """
    for r in range(rows if source_row != 0 else min(rows, 1)):
        found = 0
        for k in range(0, width, 4):
            found |= get_int32(source + r * source_row + k)
        if found != 0:
            return False
    return True
