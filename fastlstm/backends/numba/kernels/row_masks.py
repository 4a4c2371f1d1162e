"""Which batch rows are held at a step, because they have ended, and which start from zeros."""

from fastlstm.backends.numba.llvm.intrinsics import call, get_byte, get_int64


def length_of(a, b):
    """Return how many of the T steps batch row b takes."""
    return min(max(get_int64(a.lengths + 8 * b), 0), a.T)


def is_held(a, t, b):
    """Return whether row b is held at step t."""
    return a.lengths != 0 and get_int64(a.lengths + 8 * b) <= t


def any_held(a, t, b, rows):
    """Return whether one of `rows` rows from `b` on is held at step t."""
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                return True
    return False


def is_reset(a, t, b):
    """Return whether row b starts from zeros at step t. A held step is not reset."""
    return get_byte(a.reset + t * a.rows + b) != 0 and not is_held(a, t, b)


def any_reset(a, t, b, rows):
    """Return whether one of `rows` rows from `b` on starts from zeros at step t."""
    if a.reset != 0:
        for r in range(rows):
            if is_reset(a, t, b + r):
                return True
    return False


def rows_to_last_active(a, t, b, rows):
    """Return how many of `rows` rows from `b` on are left without the held ones at their end. If the rows are sorted
    longest first, these are exactly the active ones.
    """
    if a.lengths != 0:
        while rows > 0 and is_held(a, t, b + rows - 1):
            rows -= 1
    return rows


def zero_held(a, t, b, rows, width, target, target_row):
    """Zero the held ones of `rows` rows from `b` on at step t."""
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                call(a.copy_rows, 1, 0, width, target, 0, target + r * target_row, 0)


def zero_reset(a, t, b, rows, width, target, target_row):
    """Zero those of `rows` rows from `b` on that start from zeros at step t."""
    if a.reset != 0:
        for r in range(rows):
            if is_reset(a, t, b + r):
                call(a.copy_rows, 1, 0, width, target, 0, target + r * target_row, 0)


def correct_states(a, t, b, rows, first_unit, width, target, target_row):
    """Turn h after the step before t into h_in of step t, for `width` units from `first_unit` on of each row.

    If the layer is reversed, a row that ends early begins in the middle, from ``h_0``. A row that is reset starts from
    zeros.
    """
    if a.reverse != 0 and a.lengths != 0:
        for r in range(rows):
            if get_int64(a.lengths + 8 * (b + r)) == t + 1:
                initial = a.h_0 + (b + r) * a.h_0_row_stride + first_unit * a.size
                call(a.copy_rows, 1, width, width, initial, 0, target + r * target_row, 0)
    zero_reset(a, t, b, rows, width, target, target_row)
