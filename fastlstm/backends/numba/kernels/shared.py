"""What all kernels share: sizes, inlined functions, and rows read and written in one of two types."""

from typing import Any

from fastlstm.backends.numba.constants import WEIGHT_BLOCK_BYTES
from fastlstm.backends.numba.llvm.intrinsics import call, get_int32
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES

VECTOR = VECTOR_BYTES
# Rows of packed weights in a K block. A register tile of few rows needs long sums: with half of that, 3 rows took up to
# 1.2 times as long.
BLOCK_K = WEIGHT_BLOCK_BYTES // (4 * VECTOR)


def inlined(function: Any) -> Any:
    """Mark a function that is inlined where kernels call it: calls took 4 % of the time of a layer of two rows."""
    function.inlined = True
    return function


def element_bytes(a):
    """Return the bytes of an element of x, of h and of the weights."""
    return 2 if a.is_bfloat16 != 0 else a.size


def read_rows(a, narrow, rows, valid, width, source, source_row, target, target_row):
    """Copy `valid` elements of each row, which are bfloat16 if `narrow`, then zeros up to `width`."""
    if narrow != 0:
        call(a.widen, rows, valid, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, valid, width, source, source_row, target, target_row)


def write_rows(a, rows, width, source, source_row, target, target_row):
    """Copy `width` elements of each row, rounded if the layer is bfloat16."""
    if a.is_bfloat16 != 0:
        call(a.narrow, rows, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, width, width, source, source_row, target, target_row)


def is_zero(rows, width, source, source_row):
    """Return whether `width` bytes of each row are zero: a product of finite weights with them is left out."""
    for r in range(rows if source_row != 0 else min(rows, 1)):
        bits = 0
        for k in range(0, width, 4):
            bits |= get_int32(source + r * source_row + k)
        if bits != 0:
            return False
    return True
