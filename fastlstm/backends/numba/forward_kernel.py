"""The forward pass of a layer: every time step for this thread's rows and units."""

from typing import Any

from fastlstm.backends.numba import forward_products, matrix_forward, mixed_forward
from fastlstm.backends.numba.host import LINE
from fastlstm.backends.numba.intrinsics import call, get_int32
from fastlstm.backends.numba.shared import (
    CHUNK,
    HOLD,
    RESET,
    VECTOR,
    any_row,
    cell_forward_of,
    is_zero,
    item,
    jit,
    named_for,
    rows_alive,
    share,
    share_rows_alive,
    wait,
    write_rows,
    zero_rows,
)
from fastlstm.backends.numba.weights import digest_weights, pack_biases


@jit
def cells(a, t, p, b, rows, scratch, h, h_prev, h_prev_row, c_prev, c_prev_row):
    """One panel's cells for `rows` rows from `b` on, from preact in scratch."""
    L, S, H, B, R = a.lanes, a.size, a.H, a.B, a.rows
    valid, panels = min(L, H - p * L), (H + L - 1) // L
    c, mask = a.c + t * a.c_step, a.mask + (t * R + b) * 4 if a.mask != 0 else 0
    c_old, c_new, h_new = scratch + CHUNK * 4 * VECTOR, scratch + CHUNK * 5 * VECTOR, scratch + CHUNK * 6 * VECTOR
    at, resets, holds = b * H * S + p * L * S, any_row(mask, rows, RESET), any_row(mask, rows, HOLD)
    old, old_row, new, new_row = c_prev + b * c_prev_row + p * L * S, c_prev_row, c + at, H * S
    h_at = h + b * a.h_row + p * L * S
    out, out_row, gates = h_at, a.h_row, a.gates + ((t * panels + p) * B + b) * 4 * VECTOR
    if valid < L or resets or (holds and a.c_step == 0):  # read aside: cut off, reset or still wanted
        call(a.copy_rows, rows, valid, L, old, old_row, c_old, VECTOR)
        if resets:
            zero_rows(a, rows, L, mask, RESET, c_old, VECTOR)
        old, old_row = c_old, VECTOR
    if valid < L:  # write aside: whole vectors would reach into the next row
        new, new_row, out, out_row = c_new, VECTOR, h_new, VECTOR
    call(cell_forward_of(a), rows, scratch, old, old_row, new, new_row, out, out_row, gates)
    if valid < L:
        call(a.copy_rows, rows, valid, valid, h_new, VECTOR, h_at, a.h_row)
        call(a.copy_rows, rows, valid, valid, c_new, VECTOR, c + at, H * S)
    if holds:
        for r in range(rows):
            if get_int32(mask + 4 * r) == HOLD:
                h_held = h_prev + (b + r) * h_prev_row + p * L * S
                call(a.copy_rows, 1, valid, valid, h_held, 0, h_at + r * a.h_row, 0)
                call(a.copy_rows, 1, valid, valid, old + r * old_row, 0, c + at + r * H * S, 0)


@jit
def cells_of_one(a, t, p, count, scratch, h, c_prev):
    """Cells of a lone row for `count` whole panels from p on, as if each were a row: none waits for another."""
    at, panels = p * VECTOR, a.H // a.lanes
    c, gates = a.c + t * a.c_step + at, a.gates + (t * panels + p) * 4 * VECTOR
    call(cell_forward_of(a), count, scratch, c_prev + at, VECTOR, c, VECTOR, h + at, VECTOR, gates)


@jit
def carry(a, t, p, b, rows, h, h_prev, h_prev_row, c_prev, c_prev_row):
    """Hand on one panel's states of `rows` held rows from `b` on. Their gates, which nobody reads, are zero: what an
    operator returns is to be the same at every run.
    """
    L, S, H = a.lanes, a.size, a.H
    at, width, panels = p * L * S, min(L, H - p * L), (H + L - 1) // L
    c = a.c + t * a.c_step + b * H * S + at
    call(a.copy_rows, rows, width, width, h_prev + b * h_prev_row + at, h_prev_row, h + b * a.h_row + at, a.h_row)
    call(a.copy_rows, rows, width, width, c_prev + b * c_prev_row + at, c_prev_row, c, H * S)
    if a.gates != 0:
        gates = a.gates + ((t * panels + p) * a.B + b) * 4 * VECTOR
        call(a.copy_rows, rows, 0, 4 * L, a.constants, 0, gates, 4 * VECTOR)


@jit
def leave(a, p, b, rows, h, mask, to, to_row, hides):
    """One panel's h of `rows` rows from `b` on to where it is wanted, with zeros at held steps if `hides`."""
    width = min(a.lanes, a.H - p * a.lanes)
    to += b * to_row + p * a.lanes * item(a, a.narrow_rows)
    write_rows(a, a.narrow_rows, rows, width, h + b * a.h_row + p * VECTOR, a.h_row, to, to_row)
    if hides != 0 and mask != 0:
        for r in range(rows):
            if get_int32(mask + (b + r) * 4) == HOLD:
                write_rows(a, a.narrow_rows, 1, width, a.constants, 0, to + r * to_row, 0)


def forward_with(products: Any) -> Any:
    """The kernel that takes its products from a module: `forward_products`, or one like it."""
    pack_weights, preact, begin, end = products.pack_weights, products.preact, products.begin, products.end
    feed_inputs, feed_states, multiply_inputs = products.feed_inputs, products.feed_states, products.multiply_inputs
    preact_of_lone = products.preact_of_lone
    reads_states: bool = products.READS_STATES
    reads_inputs: bool = products.READS_INPUTS

    @jit
    @named_for(products.__name__)
    def forward(a, thread, threads):
        """This thread's share.

        `parts` teams split the batch rows and meet nobody; within a team units are split, one barrier a step.
        """
        L, S, H, B, T, R = a.lanes, a.size, a.H, a.B, a.T, a.rows
        panels = (H + L - 1) // L
        parts = min(threads, a.parts)
        team = threads // parts
        if thread >= parts * team:
            return
        part, member = thread // team, thread % team
        first, last = share(panels, thread, parts * team), share(panels, thread + 1, parts * team)
        scratch = a.scratch + thread * a.scratch_bytes
        begins_at_zero = is_zero(B, H * S, a.h_0, a.h_0_row)  # all rows: who computes which must not decide
        # an operand of the matrix unit may have columns of x and h side by side: then these are multiplied even if zero
        recurs = T != 1 or a.recurs != 0 or not begins_at_zero or not reads_states
        packs_as_used, met = a.places < panels, 0
        if a.digests != 0:  # if they differ, the result is thrown away; but the team still meets at its barriers
            digest_weights(a, thread, parts * team, recurs)
        if a.stale == 0:  # otherwise they are packed, and others may be reading them
            if a.digests != 0:  # what is written to the weights from now on makes their digests differ
                met = wait(a.barrier, parts * team, met, a.relax)
            for p in range(first, last):
                pack_biases(a, p, a.biases + p * 4 * VECTOR)
                if not packs_as_used:
                    pack_weights(a, p, p, scratch)
            if parts > 1:  # otherwise everybody has packed what it will use
                wait(a.barrier, parts * team, met, a.relax)
        barrier, passed = a.barrier + (1 + part) * LINE, 0

        b_first, b_last = share_rows_alive(a, part, parts)
        p_first, p_last = share(panels, member, team), share(panels, member + 1, team)
        x_first = b_first + share(b_last - b_first, member, team)
        x_last = b_first + share(b_last - b_first, member + 1, team)
        h_reset = scratch + CHUNK * 7 * VECTOR  # (rows, H)
        h_prev, h_prev_row, c_prev, c_prev_row = a.h_0, a.h_0_row, a.c_0, a.c_0_row
        lone = reads_states and reads_inputs and R == 1 and a.mask == 0 and H % L == 0 and p_last - p_first <= CHUNK
        lone = lone and not packs_as_used
        begin(a, max(b_last - b_first, 1))
        if not reads_inputs and T > 0:
            feed_inputs(a, 0, part, b_first, b_last, x_first, x_last, scratch)
            if not reads_states:
                for p in range(p_first, p_last):
                    for b in range(b_first, b_last, CHUNK):
                        at = h_prev + b * h_prev_row + p * L * S
                        feed_states(a, 0, p, b, min(CHUNK, b_last - b), at, h_prev_row, scratch)
            passed = wait(barrier, team, passed, a.relax)

        for s in range(T):
            t = T - 1 - s if a.reverse != 0 else s
            h, c, x = a.h + (s % 2 if a.out != 0 else t) * a.h_step, a.c + t * a.c_step, a.x + t * a.x_step
            mask = a.mask + t * R * 4 if a.mask != 0 else 0
            h_seen, h_seen_row = h_prev, h_prev_row
            if reads_states and any_row(mask + b_first * 4 if mask != 0 else 0, b_last - b_first, RESET):
                h_seen, h_seen_row = h_reset - b_first * H * S, H * S
                call(a.copy_rows, b_last - b_first, H, H, h_prev + b_first * h_prev_row, h_prev_row, h_reset, H * S)
                zero_rows(a, b_last - b_first, H, mask + b_first * 4, RESET, h_reset, H * S)
            if s == 0 and begins_at_zero:
                h_seen = 0
            if lone:
                preact_of_lone(a, s, p_first, p_last, scratch, x, h_seen)
                cells_of_one(a, t, p_first, p_last - p_first, scratch, h, c_prev)
            # to and fro: the weights read last are still in the L2 cache
            for j in range(p_last if lone else p_first, p_last):
                p = j if (s + a.flip) % 2 == 0 else p_first + p_last - 1 - j
                place = p
                if packs_as_used:
                    place = thread
                    pack_weights(a, p, place, scratch)
                multiply_inputs(a, s, p, part, b_first, b_last)
                for b in range(b_first, b_last, CHUNK):
                    rows = min(CHUNK, b_last - b)
                    alive = rows_alive(mask + b * 4 if mask != 0 else 0, rows)
                    if alive < rows:
                        carry(a, t, p, b + alive, rows - alive, h, h_prev, h_prev_row, c_prev, c_prev_row)
                    preact(a, s, p, place, b, alive, part, b_first, b_last, scratch, x, h_seen, h_seen_row)
                    cells(a, t, p, b, alive, scratch, h, h_prev, h_prev_row, c_prev, c_prev_row)
                    if a.shown != 0:
                        wide = H * item(a, a.narrow_rows)
                        leave(a, p, b, rows, h, mask, a.shown + t * R * wide, wide, 1)
                    if not reads_states:
                        if a.out != 0:
                            leave(a, p, b, rows, h, mask, a.out + t * a.out_step, a.out_row, a.hides)
                        if s + 1 < T:
                            feed_states(a, s + 1, p, b, rows, h + b * a.h_row + p * L * S, a.h_row, scratch)
            h_prev, h_prev_row, c_prev, c_prev_row = h, a.h_row, c, H * S
            if not reads_inputs and s + 1 < T:
                feed_inputs(a, s + 1, part, b_first, b_last, x_first, x_last, scratch)
            passed = wait(barrier, team, passed, a.relax)
        end(a)

        rows, width = b_last - b_first, min(p_last * L, H) - p_first * L  # its own, which nobody else writes
        at = b_first * H * S + p_first * L * S
        h_last = h_prev + b_first * h_prev_row + p_first * L * S
        call(a.copy_rows, rows, width, width, h_last, h_prev_row, a.h_n + at, H * S)
        if a.c_step != 0:
            call(a.copy_rows, rows, width, width, c_prev + at, H * S, a.c_n + at, H * S)
        if a.hides != 0 and a.out == 0:
            for t in range(T):
                h = a.h + t * a.h_step + b_first * a.h_row + p_first * L * S
                zero_rows(a, rows, width, a.mask + (t * R + b_first) * 4, HOLD, h, a.h_row)

    return forward


forward, forward_matrix = forward_with(forward_products), forward_with(matrix_forward)
forward_mixed = forward_with(mixed_forward)
