"""Who does which part, and waiting for each other."""

from fastlstm.backends.numba.kernels.ends import length_of
from fastlstm.backends.numba.kernels.shared import jit
from fastlstm.backends.numba.llvm.intrinsics import add_atomic, call_int, load_atomic


@jit
def share(count, part, parts):
    """The first of `count` things that belongs to `part` of `parts`."""
    return count * part // parts


@jit
def share_rows(count, part, parts):
    """As `share`, in pairs, so that no pair of rows is split."""
    return min(count, 2 * share((count + 1) // 2, part, parts))


@jit
def team_begin_by_length(a, total, part, parts):
    """The first batch row of a part, an even one: before it lies the part's share of all steps. One part's end is the
    next one's begin, and rows without a step are the last part's.
    """
    if part == parts:
        return a.B
    steps, b = 0, 0
    while b < a.B and steps * parts < total * part:
        steps += length_of(a, b)
        if b + 1 < a.B:
            steps += length_of(a, b + 1)
        b += 2
    return min(b, a.B)


@jit
def team_rows(a, part, parts):
    """The first batch row of a part and of the next. Where sequences are sorted by length, as packed ones are, parts
    have as many steps of theirs, not as many rows.
    """
    first, last = share_rows(a.B, part, parts), share_rows(a.B, part + 1, parts)
    if a.lengths == 0 or parts == 1:
        return first, last
    total = 0
    for b in range(a.B):
        if b > 0 and length_of(a, b) > length_of(a, b - 1):
            return first, last
        total += length_of(a, b)
    if total == a.T * a.B:
        return first, last
    return team_begin_by_length(a, total, part, parts), team_begin_by_length(a, total, part + 1, parts)


@jit
def arrive(barrier, threads):
    """Tell `wait_for` that this thread is there."""
    if threads > 1:
        add_atomic(barrier, 1)


@jit
def wait_for(barrier, threads, times, relax):
    """Return when `threads` threads have arrived `times` times. The counter only grows; a spin yields."""
    if threads > 1:
        spins = 0
        while load_atomic(barrier) < threads * times:
            spins += 1
            if spins > 2000 and relax != 0:
                call_int(relax)


@jit
def wait(barrier, threads, barriers_passed, relax):
    """Return when `threads` threads have called this for the (`barriers_passed` + 1)th time."""
    arrive(barrier, threads)
    wait_for(barrier, threads, barriers_passed + 1, relax)
    return barriers_passed + 1
