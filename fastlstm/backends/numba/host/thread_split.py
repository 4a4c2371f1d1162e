"""How threads share a call: the teams, and the members of each, for which the call is predicted to be shortest.

Teams split the batch rows, and each reads all weights. The members of a team split the hidden units and read a share of
the weights, but they meet at a barrier after each step. Times are in multiply-adds, of which a thread does about 40 in
a nanosecond where rows are few. `Split` in csrc/call.h predicts the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from fastlstm.backends.numba.host.signature import Signature
from fastlstm.backends.numba.host.sizes import ROWS_TOGETHER, lanes_of, max_components, panels_of, row_group

# Two threads take 5 us to start and to join, if they have not gone to sleep, and two members 1 us to meet at a barrier.
# What each further member adds to that lies between 60 and 200 ns on one socket.
WAKE, WAKE_PER_THREAD = 190_000, 15_000
BARRIER, BARRIER_PER_MEMBER = 30_000, 5_000
PREPARED = 3  # a weight that a call packs, or compares with what it has packed
PREACT = 32  # what the cell takes for each pre-activation, and twice that if it has several phases
RECEIVED = 32  # what it takes to read an element of h that another member has written
WEIGHT_BYTES_PER_ROW = 1 << 15  # bytes of float32 weights for which a team gets one more row
ONE_TEAM = 8  # how many times as fast weights are read if no other team reads them too


def split_threads(
    available: int, s: Signature, panels: int, backward: bool = False, saves: bool = False
) -> tuple[int, int]:
    """Return how many of the `available` threads work, and how many teams of equal size they form: one for a stack,
    whose layers they split. `saves`: whether a forward pass saves what the backward pass reads.
    """
    time = predicted_time(s, panels, backward, saves)
    alone, layers = time(1, 1), s.stack_size or 1
    if layers > 1:
        counts = fewest(lambda n: -(-layers // n), min(available, layers))
        return min((-(-layers // n) * alone + wake_time(n), n, 1) for n in counts)[1:]
    if available == 1 or s.B == 0 or alone <= wake_time(2):
        return 1, 1
    row_groups, groups = panels_of(s.B, unsplit_rows(s)), panels_of(panels, 4) if backward else panels
    team_counts = fewest(rows_of_largest_team(s), min(available, row_groups))
    team_sizes = fewest(lambda n: -(-groups // n), min(available, groups))
    splits = [(n, members) for n in team_counts for members in team_sizes if n * members <= available]
    if backward:  # threads that shorten no step still take their share of the sums over rows
        splits += [(n, min(available // n, groups)) for n in team_counts]
        splits += [(min(available // members, row_groups), members) for members in team_sizes]
    return min((time(n, members), n * members, n) for n, members in splits)[1:]


def runs_side_by_side(available: int, s: Signature, panels: int) -> bool:
    """Return whether two such layers take less time side by side, each on half of the threads."""
    time, half = predicted_time(s, panels, False), available // 2

    def shortest(threads: int) -> tuple[float, int]:
        count, team_count = split_threads(threads, s, panels)
        return time(team_count, count // team_count), count

    if half == 0:
        return False
    of_half, count = shortest(half)
    return of_half - wake_time(count) + wake_time(2 * count) < 2 * shortest(available)[0]


def fewest(largest_share: Callable[[int], int], most: int) -> list[int]:
    """Return the numbers of shares, up to `most`, whose largest share is smaller than with one share less."""
    shares = [largest_share(n) for n in range(1, most + 1)]
    return [1] + [n + 2 for n, (before, share) in enumerate(pairwise(shares)) if share < before]


def unsplit_rows(s: Signature) -> int:
    """Return how many neighbouring rows no two teams split: those of a row group, or a pair."""
    return max(2, row_group(s))


def rows_of_largest_team(s: Signature) -> Callable[[int], int]:
    """Return a function of the number of teams: the rows of the largest, as in `kernels.threads.team_rows`."""
    B, unit = s.B, unsplit_rows(s)
    row_groups = panels_of(B, unit)

    def rows(team_count: int) -> int:
        most = -(-row_groups // team_count)
        of_others = unit * (most - (row_groups % team_count == 1))
        return min(B, max(of_others, B - unit * (row_groups - most)))

    return rows


def wake_time(threads: int) -> int:
    """Return how long it takes to start and to join so many threads."""
    return WAKE + WAKE_PER_THREAD * threads if threads > 1 else 0


def predicted_time(s: Signature, panels: int, backward: bool, saves: bool = False) -> Callable[[int, int], float]:
    """Return a function of the number of teams and of each team's members, which returns the time of the slowest
    thread. Of the `backward` pass, only the product with weight_hh is part of each step.
    """
    counts, lanes, B, H, products = s.counts, lanes_of(s.dtype), s.B, s.H, s.multiply_adds_per_unit
    read = counts.h_preacts * s.h_width // s.heads if backward else products  # weights a step, for each unit
    rows_of = rows_of_largest_team(s)
    groups, preact = panels_of(panels, 4) if backward else panels, PREACT * max(1, counts.preacts)
    # From so many rows on, products last longer than reading the weights: a register tile where members split the rows,
    # else at most a row block, and at least a pair, or what fills AMX tiles.
    least, most = (6, 6) if s.splits_rows else (2 if s.components < 2 else 32, 64)
    # In a training step of one time step threads also fetch what others have saved, which takes as long again.
    wakes = 2 if s.T == 1 and (backward or saves) else 1
    part = row_group(s) if backward else 1  # rows that no two members split in a cell that takes means
    # how much faster products of bfloat16 are where few rows use them: on AMX, or on vectors
    speedup = 1 if s.components != 1 else 8 if max_components() > 1 else 2

    def units_of(threads: int) -> int:  # where all threads split the panels
        return min(H, -(-panels // threads) * lanes)

    def time(team_count: int, members: int) -> float:
        rows, threads = rows_of(team_count), team_count * members
        own_panels = -(-panels * -(-groups // members) // groups)  # in the groups of a member, at most
        barriers = (1 + counts.product_groups) * (-(-rows // ROWS_TOGETHER) if counts.has_phases else 1)
        units = min(H, own_panels * lanes)
        enough = min(most, max(least, 4 * units * read // WEIGHT_BYTES_PER_ROW)) // (1 if team_count > 1 else ONE_TEAM)
        sums = B * (products - read) * units_of(threads)
        cells = preact * rows * own_panels * lanes * (2 if counts.has_phases else 1)
        if s.splits_rows:  # members wait before and after each product
            cells = 2 * preact * part * -(-rows // (part * members)) * panels * lanes
            barriers = 2 * barriers
        step = (max(rows, enough) * read * units + sums) / speedup + cells
        if members > 1:
            step += barriers * (BARRIER + BARRIER_PER_MEMBER * members) + RECEIVED * rows * (H - units)
        return s.T * step + PREPARED * products * units_of(threads) + wakes * wake_time(threads)

    return time
