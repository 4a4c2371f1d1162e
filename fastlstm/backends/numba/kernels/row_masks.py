"""Which batch rows are held at a step, because they have ended, and which start from zeros."""

from fastlstm.backends.numba.llvm.intrinsics import call, get_byte, get_int64


def length_of(a, b):
    """Return how many of the T steps batch row b takes."""
    return min(max(get_int64(a.lengths + 8 * b), 0), a.T)


def is_held(a, t, b):
    return a.lengths != 0 and get_int64(a.lengths + 8 * b) <= t


def any_held(a, t, b, rows):
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                return True
    return False


def is_reset(a, t, b):
    """Return whether row b starts from zeros at step t. A held step is not reset."""
    return get_byte(a.reset + t * a.rows + b) != 0 and not is_held(a, t, b)


def any_reset(a, t, b, rows):
    if a.reset != 0:
        for r in range(rows):
            if is_reset(a, t, b + r):
                return True
    return False


def rows_to_last_active(a, t, b, rows):
    """Return how many of `rows` rows from `b` on are left without the held ones at their end."""
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
    """Turn h after the step before t into h_in of step t, for `width` units from `first_unit` on: zeros after a reset,
    and ``h_0`` where a reversed row that ends early begins.
    """
    if a.reverse != 0 and a.lengths != 0:
        for r in range(rows):
            if get_int64(a.lengths + 8 * (b + r)) == t + 1:
                initial = a.h_0 + (b + r) * a.h_0_row_stride + first_unit * a.size
                call(a.copy_rows, 1, width, width, initial, 0, target + r * target_row, 0)
    zero_reset(a, t, b, rows, width, target, target_row)


def active_range(a, s_first, first, pairs):
    """Return (steps, count): among `pairs` pairs from `first` on, all active ones lie in `count` consecutive rows of
    `steps` steps. With resets alone the sum also goes step by step, in the order that it has with lengths.
    """
    if a.lengths == 0 and a.reset == 0:
        return 1, pairs
    if first % a.B + pairs > a.B and (first % a.B != 0 or pairs % a.B != 0):
        return 1, pairs
    steps, row = max(1, pairs // a.B), first % a.B
    s = s_first + first // a.B
    earliest = a.T - s - steps if a.reverse != 0 else s
    return steps, max(1, rows_to_last_active(a, earliest, row, pairs // steps))  # one at least, which begins the sums
