"""The forward pass of an int8 layer: every time step for this thread's rows and units.

Bytes of h are written by the step before, for whichever threads read them: there are two buffers of them, in turns. Of
the scales of their rows there are three: one is read, one is written to where h is NaN, and one is made ready.
"""

from fastlstm.backends.numba.host.sizes import LINE
from fastlstm.backends.numba.kernels.ends import is_held, is_reset, length_of
from fastlstm.backends.numba.kernels.shared import CHUNK, VECTOR, jit
from fastlstm.backends.numba.kernels.threads import share, share_rows_alive, wait
from fastlstm.backends.numba.kernels.weights import digest_words
from fastlstm.backends.numba.llvm.intrinsics import call, get_int32, get_int64
from fastlstm.backends.numba.llvm.quantized import CONSTANTS

ONE = 0x3F800000  # the bits of 1.0, the least magnitude that a row of h is scaled by
HELD, RESETS = 1, 2  # what a row does: stays as it is at this step, is zero before the next


@jit
def digest_weights(a, thread, threads):
    """`digest_words` of all weights, scales and biases. The last word of weights that are not of whole words overlaps
    the one before.
    """
    of_ih, of_hh = a.of_x * a.H, a.of_h * a.H
    ih, hh = of_ih * a.I, of_hh * a.H
    n = digest_words(a, a.ih, ih // 4, 0, thread, threads)
    n = digest_words(a, a.hh, hh // 4, n, thread, threads)
    n = digest_words(a, a.scale_ih, of_ih, n, thread, threads)
    n = digest_words(a, a.scale_hh, of_hh, n, thread, threads)
    n = digest_words(a, a.bias_ih, of_ih if a.bias_ih != 0 else 0, n, thread, threads)
    n = digest_words(a, a.bias_hh, of_hh if a.bias_hh != 0 else 0, n, thread, threads)
    n = digest_words(a, a.ih + ih - 4, 1 if ih % 4 != 0 else 0, n, thread, threads)
    digest_words(a, a.hh + hh - 4, 1 if hh % 4 != 0 else 0, n, thread, threads)


@jit
def time_of(a, s):
    """The place in x of the s-th step."""
    return a.T - 1 - s if a.reverse != 0 else s


@jit
def kind_of(a, s, b):
    """What row b does at the s-th step, see `HELD` and `RESETS`."""
    held = HELD if is_held(a, time_of(a, s), b) else 0
    return held + (RESETS if a.reset != 0 and s + 1 < a.T and is_reset(a, time_of(a, s + 1), b) else 0)


@jit
def alike(a, s, b, b_last):
    """How many rows from b on, up to a chunk, do what row b does."""
    rows = min(CHUNK, b_last - b)
    if a.lengths != 0 or a.reset != 0:
        kind = kind_of(a, s, b)
        for r in range(1, rows):
            if kind_of(a, s, b + r) != kind:
                return r
    return rows


@jit
def round_inputs(a, block, b_first, rows, member, team):
    """This thread's share of the rows of x, of a part's batch rows and of a block of steps, to bytes."""
    if block * a.feed >= a.T:
        return
    total = min(a.feed, a.T - block * a.feed) * rows
    k, last = share(total, member, team), share(total, member + 1, team)
    base = (block % 2 * a.B + b_first) * a.feed
    while k < last:
        step, row = k // rows, k % rows
        count = min(rows - row, last - k)
        x = a.x + time_of(a, block * a.feed + step) * a.x_step + (b_first + row) * a.x_row
        to = a.x_bytes + (base + k) * a.x_pitch
        call(a.quantize, count, a.I, x, a.x_row, to, a.x_pitch, a.x_piece, a.x_scales + 4 * (base + k), 0)
        k += count


@jit
def multiply_inputs(a, s, b_first, row, rows, p, panels, fed):
    """What x makes of the sums of some panels, for `rows` rows from `row` on of the part's and the block's."""
    of_x, at = a.of_x * VECTOR, (s // a.feed % 2 * a.B + b_first) * a.feed + row
    call(
        a.inputs, panels, rows, a.unit_rows, a.packed_ih + p * a.panel_ih, a.panel_ih,
        a.constants_ih + p * CONSTANTS * of_x, CONSTANTS * of_x, a.groups_ih, a.x_bytes + at * a.x_pitch, a.x_pitch,
        a.x_piece, a.x_scales + 4 * at, fed, a.feed * a.B * of_x, of_x,
    )  # fmt: skip


@jit
def run_panels(a, s, p, panels, sign, b, rows, fed, out, out_row, to_scales, to_scales_step):
    """The s-th step of `panels` panels from p on, or back, for rows that are not held."""
    of_h, lanes = a.of_h * VECTOR, a.lanes
    seen, to = a.h_bytes + s % 2 * a.B * a.h_pitch, a.h_bytes + (s + 1) % 2 * a.B * a.h_pitch
    call(
        a.step, panels, rows, a.unit_rows, a.packed_hh + p * a.panel_hh, sign * a.panel_hh,
        a.constants_hh + p * CONSTANTS * of_h, sign * CONSTANTS * of_h, a.groups_hh, seen + b * a.h_pitch, a.h_pitch,
        a.h_piece, a.h_scales + 4 * (s % 3 * a.B + b), fed, sign * a.feed * a.B * a.of_x * VECTOR, a.of_x * VECTOR,
        a.carried + (p * a.B + b) * VECTOR, sign * a.B * VECTOR, out, sign * VECTOR, out_row,
        to + b * a.h_pitch + p * lanes, sign * lanes, a.h_pitch, a.h_piece, to_scales, to_scales_step,
    )  # fmt: skip


@jit
def run_rows(a, s, b_first, b, rows, b_rows, p_first, p_last, scratch, resets):
    """The s-th step of rows that are not held: those that do not reset, or those that do, before the next step."""
    L, H, cut = a.lanes, a.H, p_last * a.lanes > a.H
    whole, backwards, of_x = p_last - 1 if cut else p_last, (s + a.flip) % 2, a.of_x * VECTOR
    tail, fed_here = scratch + LINE, scratch + LINE + CHUNK * VECTOR
    out = a.h + time_of(a, s) * a.h_step + b * H * 4
    to_scales, to_scales_step = a.h_scales + 4 * ((s + 1) % 3 * a.B + b), 4
    if resets:  # what h is does not matter to the next step
        to_scales, to_scales_step = scratch, 0
    row = s % a.feed * b_rows + b - b_first
    if a.feed > 1:
        count = whole - p_first
        p, sign = (whole - 1, -1) if backwards != 0 else (p_first, 1)
        fed = a.fed + ((p * a.B + b_first) * a.feed + row) * of_x
        run_panels(a, s, p, count, sign, b, rows, fed, out + p * VECTOR, H * 4, to_scales, to_scales_step)
    else:
        for k in range(p_first, whole):
            p = whole - 1 - (k - p_first) if backwards != 0 else k
            multiply_inputs(a, s, b_first, row, rows, p, 1, fed_here)
            run_panels(a, s, p, 1, 1, b, rows, fed_here, out + p * VECTOR, H * 4, to_scales, to_scales_step)
    if cut:
        if a.feed > 1:
            fed = a.fed + ((whole * a.B + b_first) * a.feed + row) * of_x
        else:
            fed = fed_here
            multiply_inputs(a, s, b_first, row, rows, whole, 1, fed)
        run_panels(a, s, whole, 1, 1, b, rows, fed, tail, VECTOR, to_scales, to_scales_step)
        valid = H - whole * L
        call(a.copy_rows, rows, valid, valid, tail, VECTOR, out + whole * VECTOR, H * 4)


@jit
def hold_rows(a, s, b, rows, p_first, p_last, member):
    """The s-th step of rows that are held: bytes of h stay as they are."""
    first, width = p_first * a.lanes, (p_last - p_first) * a.lanes // 4
    seen = a.h_bytes + (s % 2 * a.B + b) * a.h_pitch + first
    to = a.h_bytes + ((s + 1) % 2 * a.B + b) * a.h_pitch + first
    for piece in range(a.pieces):
        call(a.copy_rows, rows, width, width, seen + piece * a.h_piece, a.h_pitch, to + piece * a.h_piece, a.h_pitch)
    if member == 0:
        scales = a.h_scales + 4 * b
        call(a.copy_rows, rows, 1, 1, scales + s % 3 * a.B * 4, 4, scales + (s + 1) % 3 * a.B * 4, 4)
    units = min(p_last * a.lanes, a.H) - first
    call(a.copy_rows, rows, 0, units, 0, 0, a.h + time_of(a, s) * a.h_step + (b * a.H + first) * 4, a.H * 4)


@jit
def reset_rows(a, s, b, rows, p_first, p_last, member):
    """Zero the states that the s-th step of some rows starts from."""
    first, width = p_first * a.lanes, (p_last - p_first) * a.lanes // 4
    to = a.h_bytes + (s % 2 * a.B + b) * a.h_pitch + first
    for piece in range(a.pieces):
        call(a.copy_rows, rows, width, width, a.zeros + first, 0, to + piece * a.h_piece, a.h_pitch)
    if member == 0:
        call(a.copy_rows, rows, 1, 1, a.clean, 0, a.h_scales + 4 * (s % 3 * a.B + b), 4)
    for p in range(p_first, p_last):
        call(a.copy_rows, rows, 0, a.lanes, 0, 0, a.carried + (p * a.B + b) * VECTOR, VECTOR)


@jit
def begin(a, b_first, b_last, x_first, x_last, p_first, p_last):
    """The states that the first step starts from: of h this thread's rows, of what is carried its units."""
    rows, t = x_last - x_first, time_of(a, 0)
    h_0, to = a.h_0 + x_first * a.h_0_row, a.h_bytes + x_first * a.h_pitch
    call(a.quantize, rows, a.H, h_0, a.h_0_row, to, a.h_pitch, a.h_piece, a.h_scales + 4 * x_first, ONE)
    call(a.copy_rows, rows, 1, 1, a.clean, 0, a.h_scales + 4 * (a.B + x_first), 4)
    for p in range(p_first, p_last):
        valid, start = min(a.lanes, a.H - p * a.lanes), a.start + b_first * a.start_row + p * VECTOR
        to = a.carried + (p * a.B + b_first) * VECTOR
        call(a.copy_rows, b_last - b_first, valid, a.lanes, start, a.start_row, to, VECTOR)
    if a.reset != 0:
        for b in range(b_first, b_last):
            if is_reset(a, t, b):
                if x_first <= b < x_last:
                    reset_rows(a, 0, b, 1, 0, a.panels, 0)
                reset_rows(a, 0, b, 1, p_first, p_last, 1)


@jit
def is_large(a, b_first, b_last):
    """Whether one of these rows of h_0 has numbers beyond 1, or NaN."""
    found = False
    for b in range(b_first, b_last):
        found |= get_int32(a.h_scales + 4 * b) != get_int32(a.clean)
    return found


@jit
def round_states(a, s, b, b_last):
    """h of rows as the step before the s-th left it to bytes, with scales of their own."""
    t = time_of(a, s - 1)
    while b < b_last:
        if kind_of(a, s - 1, b) == 0:
            at = (s % 2 * a.B + b) * a.h_pitch
            h, scales = a.h + t * a.h_step + b * a.H * 4, a.h_scales + 4 * (s % 3 * a.B + b)
            call(a.quantize, 1, a.H, h, 0, a.h_bytes + at, a.h_pitch, a.h_piece, scales, ONE)
        b += 1


@jit
def finish(a, b_first, b_last, p_first, p_last):
    """The last states of this thread's rows and units."""
    first, rows = p_first * a.lanes, b_last - b_first
    units, row = min(p_last * a.lanes, a.H) - first, a.H * 4
    for p in range(p_first, p_last):
        valid, at = min(a.lanes, a.H - p * a.lanes), (b_first * a.H + p * a.lanes) * 4
        call(a.copy_rows, rows, valid, valid, a.carried + (p * a.B + b_first) * VECTOR, VECTOR, a.last + at, row)
    if a.h_n == a.last:
        return
    to, at = a.h_n + (b_first * a.H + first) * 4, (b_first * a.H + first) * 4
    if a.lengths == 0:
        call(a.copy_rows, rows, units, units, a.h + time_of(a, a.T - 1) * a.h_step + at, row, to, row)
        return
    for r in range(rows):
        b = b_first + r
        length = length_of(a, b)
        source = a.h_0 + b * a.h_0_row + first * 4
        if length > 0:
            source = a.h + (0 if a.reverse != 0 else length - 1) * a.h_step + (b * a.H + first) * 4
        call(a.copy_rows, 1, units, units, source, 0, to + r * row, 0)


@jit
def quantized(a, thread, threads):
    """This thread's share.

    `parts` teams split the batch rows and meet nobody; within a team units are split, one barrier a step.
    """
    parts = min(threads, a.parts)
    team = threads // parts
    if thread >= parts * team:
        return
    part, member = thread // team, thread % team
    if a.digests != 0:  # if they differ, the result is thrown away; but a team still meets at its barriers
        digest_weights(a, thread, parts * team)
        if parts * team == 1 and a.stale != 0 and get_int64(a.stale) != 0:
            return
    barrier, passed, scratch = a.barrier + (1 + part) * LINE, 0, a.scratch + thread * a.scratch_bytes
    b_first, b_last = share_rows_alive(a, part, parts)
    p_first, p_last = share(a.panels, member, team), share(a.panels, member + 1, team)
    rows = b_last - b_first
    x_first, x_last = b_first + share(rows, member, team), b_first + share(rows, member + 1, team)
    on_unit = a.feed * rows >= a.unit_rows
    if on_unit:
        call(a.configure, 16)
    begin(a, b_first, b_last, x_first, x_last, p_first, p_last)
    round_inputs(a, 0, b_first, rows, member, team)
    passed = wait(barrier, team, passed, a.relax)
    rounds = a.h_n == a.last and is_large(a, b_first, b_last)
    for s in range(a.T):
        if rounds and s > 0:
            round_states(a, s, x_first, x_last)
            passed = wait(barrier, team, passed, a.relax)
        call(a.copy_rows, x_last - x_first, 1, 1, a.clean, 0, a.h_scales + 4 * ((s + 2) % 3 * a.B + x_first), 4)
        if a.feed > 1 and s % a.feed == 0:
            count = min(a.feed, a.T - s) * rows
            fed = a.fed + (p_first * a.B + b_first) * a.feed * a.of_x * VECTOR
            multiply_inputs(a, s, b_first, 0, count, p_first, p_last - p_first, fed)
        b = b_first
        while b < b_last:
            count = alike(a, s, b, b_last)
            kind = kind_of(a, s, b) if a.lengths != 0 or a.reset != 0 else 0
            if kind & HELD != 0:
                hold_rows(a, s, b, count, p_first, p_last, member)
            else:
                run_rows(a, s, b_first, b, count, rows, p_first, p_last, scratch, kind & RESETS != 0)
            if kind & RESETS != 0:
                reset_rows(a, s + 1, b, count, p_first, p_last, member)
            b += count
        if (s + 1) % a.feed == 0:
            round_inputs(a, (s + 1) // a.feed, b_first, rows, member, team)
        passed = wait(barrier, team, passed, a.relax)
    if on_unit:
        call(a.release)
    finish(a, b_first, b_last, p_first, p_last)
