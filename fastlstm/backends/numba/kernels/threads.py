"""The share of each thread, and barriers."""

from fastlstm.backends.numba.kernels.row_masks import length_of
from fastlstm.backends.numba.llvm.intrinsics import add_atomic, call_int, load_atomic


def share(count, k, n):
    """Return the first of `count` things that belongs to share k of n."""
    return count * k // n


def share_rows(count, unit, k, n):
    """Return the first of `count` rows of share k of n. No group of `unit` rows is split."""
    return min(count, unit * share((count + unit - 1) // unit, k, n))


def team_begin_by_length(a, total, team_index, team_count):
    """Return a team's first batch row: rows before it have the share of the `total` steps of the teams before."""
    if team_index == team_count:
        return a.B
    steps, b, unit = 0, 0, max(2, a.group_rows)
    while b < a.B and (b % unit != 0 or steps * team_count < total * team_index):
        steps += length_of(a, b)
        b += 1
    return b


def team_rows(a, team_index, team_count):
    """Return the first rows of a team and of the next: of equal active steps if sorted by length, else equal rows."""
    unit = max(2, a.group_rows)
    first, last = share_rows(a.B, unit, team_index, team_count), share_rows(a.B, unit, team_index + 1, team_count)
    if a.lengths == 0 or team_count == 1:
        return first, last
    total = 0
    for b in range(a.B):
        if b > 0 and length_of(a, b) > length_of(a, b - 1):
            return first, last
        total += length_of(a, b)
    if total == a.T * a.B:
        return first, last
    first = team_begin_by_length(a, total, team_index, team_count)
    return first, team_begin_by_length(a, total, team_index + 1, team_count)


def arrive(barrier, threads):
    if threads > 1:
        add_atomic(barrier, 1)


def wait_for(barrier, threads, times, relax):
    """Return when `threads` threads have arrived `times` times. A thread that waits long calls `relax`."""
    if threads > 1:
        spins = 0
        while load_atomic(barrier) < threads * times:
            spins += 1
            if spins > 2000 and relax != 0:
                call_int(relax)


def wait(barrier, threads, barriers_passed, relax):
    """Return when `threads` threads have called this for the (`barriers_passed` + 1)th time."""
    arrive(barrier, threads)
    wait_for(barrier, threads, barriers_passed + 1, relax)
    return barriers_passed + 1
