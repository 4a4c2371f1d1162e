"""Which steps of which batch rows are held, because the row has ended, and which start from zeros."""

from fastlstm.backends.numba.kernels.shared import jit
from fastlstm.backends.numba.llvm.intrinsics import call, get_byte, get_int64


@jit
def length_of(a, b):
    """How many of the T steps batch row b takes."""
    return min(max(get_int64(a.lengths + 8 * b), 0), a.T)


@jit
def is_held(a, t, b):
    return a.lengths != 0 and get_int64(a.lengths + 8 * b) <= t


@jit
def any_held(a, t, b, rows):
    """Whether one of `rows` rows from `b` on is held at step t."""
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                return True
    return False


@jit
def is_reset(a, t, b):
    """Whether row b starts from zeros at step t: a held step is not reset."""
    return get_byte(a.reset + t * a.rows + b) != 0 and not is_held(a, t, b)


@jit
def any_reset(a, t, b, rows):
    """Whether one of `rows` rows from `b` on starts from zeros at step t."""
    if a.reset != 0:
        for r in range(rows):
            if is_reset(a, t, b + r):
                return True
    return False


@jit
def rows_to_last_active(a, t, b, rows):
    """How many of `rows` rows from `b` on there are up to the last that is not held at step t. Sorted by length, the
    longest first, these are all that go on.
    """
    if a.lengths != 0:
        while rows > 0 and is_held(a, t, b + rows - 1):
            rows -= 1
    return rows


@jit
def zero_held(a, t, b, rows, width, target, target_row):
    """Zero what belongs to rows that are held at step t, of `rows` rows from `b` on."""
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                call(a.copy_rows, 1, 0, width, target, 0, target + r * target_row, 0)


@jit
def zero_reset(a, t, b, rows, width, target, target_row):
    """Zero what belongs to rows that start from zeros at step t, of `rows` rows from `b` on."""
    if a.reset != 0:
        for r in range(rows):
            if is_reset(a, t, b + r):
                call(a.copy_rows, 1, 0, width, target, 0, target + r * target_row, 0)


@jit
def correct_states(a, t, b, rows, unit, width, target, target_row):
    """Turn rows of ``h`` after the step before t, `width` units from `unit` on, into what step t started from.

    Backwards a row that ends early begins in the middle, from ``h_0``. A row that is reset starts from zeros.
    """
    if a.reverse != 0 and a.lengths != 0:
        for r in range(rows):
            if get_int64(a.lengths + 8 * (b + r)) == t + 1:
                start = a.h_0 + (b + r) * a.h_0_row + unit * a.size
                call(a.copy_rows, 1, width, width, start, 0, target + r * target_row, 0)
    zero_reset(a, t, b, rows, width, target, target_row)
