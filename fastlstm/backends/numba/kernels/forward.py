"""The forward pass of a layer: every time step for this thread's rows and units."""

from typing import Any

from fastlstm.backends.numba.host.sizes import LINE
from fastlstm.backends.numba.kernels import matrix_forward, mixed_forward, vector_forward
from fastlstm.backends.numba.kernels.ends import any_held, any_reset, is_held, length_of, rows_alive, zero_reset
from fastlstm.backends.numba.kernels.in_place import preact_in_place
from fastlstm.backends.numba.kernels.layout import cell_forward_of, panel_saved, rows_forward_of, seen_from
from fastlstm.backends.numba.kernels.shared import CHUNK, VECTOR, inlined, is_zero, item, jit, write_rows
from fastlstm.backends.numba.kernels.states import (
    OTHER,
    begin_phase,
    enter_step,
    later_aside,
    panel_sums,
    row_at,
    row_of,
    set_aside,
    shared_aside,
    slot,
)
from fastlstm.backends.numba.kernels.threads import share, share_rows_alive, wait
from fastlstm.backends.numba.kernels.vector_forward import pack_inputs, pack_states
from fastlstm.backends.numba.kernels.weights import digest_weights, pack_biases
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@inlined
def cells(a, t, p, b, rows, sums, scratch, table, phase):
    """One phase of one panel's cells for `rows` rows from `b` on, from preact in `sums`."""
    L, H, unit, states = a.lanes, a.H, p * VECTOR, 2 * a.others + 2
    valid, used, is_last = min(L, H - p * L), table, phase == a.phases - 1
    resets, holds = any_reset(a, t, b, rows), any_held(a, t, b, rows)
    if valid < L or resets or (holds and a.c_step == 0):  # cut off, reset or still wanted
        used = table + a.table_bytes
        set_aside(a, table, used, p, t, b, rows, scratch, True, False)
    saved = panel_saved(a, a.B, t, p, b)
    if a.phases == 1:
        call(cell_forward_of(a), rows, b, unit, sums, saved, used)
    else:
        call(
            cell_forward_of(a), rows, b, unit, sums, saved, used, phase, later_aside(a, scratch, p),
            shared_aside(a, scratch), a.shared_values * VECTOR, valid,
        )  # fmt: skip
    if valid < L and is_last:  # whole vectors would reach into the next row
        for k in range(1, states, 2):
            call(
                a.copy_rows, rows, valid, valid, row_at(used, k, b, unit), VECTOR, row_at(table, k, b, unit),
                row_of(table, k),
            )  # fmt: skip
    if holds and is_last:
        for r in range(rows):
            if is_held(a, t, b + r):
                for k in range(0, states, 2):
                    old, new = row_at(used, k, b + r, unit), row_at(table, k + 1, b + r, unit)
                    call(a.copy_rows, 1, valid, valid, old, 0, new, 0)


@jit
def carry(a, t, p, b, rows, table):
    """Hand on one panel's states of `rows` held rows from `b` on. Their gates, which nobody reads, are zero: what an
    operator returns is to be the same at every run.
    """
    L, unit = a.lanes, p * VECTOR
    width = min(L, a.H - p * L)
    for k in range(0, 2 * a.others + 2, 2):
        old, new = row_at(table, k, b, unit), row_at(table, k + 1, b, unit)
        call(a.copy_rows, rows, width, width, old, row_of(table, k), new, row_of(table, k + 1))
    if a.gates != 0:
        saved = panel_saved(a, a.B, t, p, b)
        call(a.copy_rows, rows, 0, a.saved * L, a.constants, 0, saved, a.saved * VECTOR)


@jit
def leave(a, t, p, b, rows, h):
    """One panel's h of `rows` rows from `b` on to where it is wanted, with zeros at held steps."""
    width = min(a.lanes, a.H - p * a.lanes)
    to = a.h + t * a.out_step + b * a.out_row + p * a.lanes * item(a)
    write_rows(a, rows, width, h + b * a.h_row + p * VECTOR, a.h_row, to, a.out_row)
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                write_rows(a, 1, width, a.constants, 0, to + r * a.out_row, 0)


@jit
def zero_held_outputs(a, b_first, b_last, unit, width):
    """Zero h of held steps, which states were carried through, of these rows and of `width` units from `unit` on."""
    for b in range(b_first, b_last if a.lengths != 0 else b_first):
        length = length_of(a, b)
        h = a.h + length * a.h_step + b * a.h_row + unit * a.size
        call(a.copy_rows, a.T - length, 0, width, h, 0, h, a.h_step)


def forward_with(products: Any) -> Any:
    """The kernel that takes its products from a module: `vector_forward`, or one like it."""
    pack_weights, preact = products.pack_weights, products.preact
    feed_inputs, feed_states, multiply_inputs = products.feed_inputs, products.feed_states, products.multiply_inputs
    preact_of_lone = products.preact_of_lone
    reads_states: bool = products.READS_STATES
    reads_inputs: bool = products.READS_INPUTS

    @jit
    def forward(a, thread, threads):
        """This thread's share.

        `parts` teams split the batch rows and meet nobody; within a team units are split, one barrier a step.
        """
        L, S, H, B, T = a.lanes, a.size, a.H, a.B, a.T
        panels = a.panels
        parts = min(threads, a.parts)
        team = threads // parts
        if thread >= parts * team:
            return
        part, member = thread // team, thread % team
        first, last = share(panels, thread, parts * team), share(panels, thread + 1, parts * team)
        table = a.scratch + thread * a.scratch_bytes
        scratch = table + 2 * a.table_bytes
        shared = scratch - member * a.scratch_bytes if a.phases > 1 else scratch  # where a team's products meet
        # of all rows: who computes which must not decide
        begins_at_zero = a.of_h == 0 or is_zero(B, H * S, a.h_0, a.h_0_row)
        # an operand of the matrix unit may have columns of x and h side by side: then these are multiplied even if zero
        recurs = T != 1 or a.stale == 0 or not begins_at_zero or not reads_states
        packs_as_used = a.places < panels
        if a.digests != 0:  # if they differ, the result is thrown away; but a team still meets at its barriers
            digest_weights(a, thread, parts * team, recurs)
            if parts * team == 1 and a.stale != 0 and get_int64(a.stale) != 0:
                return
        if a.stale == 0:  # otherwise they are packed, and others may be reading them
            for p in range(first, last):
                pack_biases(a, p, a.biases + p * a.sums * VECTOR)
                if not packs_as_used:
                    pack_weights(a, p, p, scratch)
            if parts > 1:  # otherwise everybody has packed what it will use
                wait(a.barrier, parts * team, 0, a.relax)
        barrier, passed = a.barrier + (1 + part) * LINE, 0

        b_first, b_last = share_rows_alive(a, part, parts)
        p_first, p_last = share(panels, member, team), share(panels, member + 1, team)
        x_first = b_first + share(b_last - b_first, member, team)
        x_last = b_first + share(b_last - b_first, member + 1, team)
        h_reset = slot(a, scratch, a.slots)  # (rows, H)
        h_prev, h_prev_row = a.h_0, a.h_0_row
        alone = a.rows == 1 and a.reset == 0 and a.lengths == 0 and H % L == 0 and p_last - p_first <= CHUNK
        alone = alone and (a.phases == 1 or panels <= CHUNK)  # with means one thread computes the cells of all panels
        lone = reads_states and reads_inputs and alone and not packs_as_used
        if not reads_inputs:  # but the matrix unit does
            call(a.configure, max((b_last - b_first) * max(a.feed, 1), 1))
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
            h, x = a.h + t * a.h_step, a.x + t * a.x_step
            if a.states != 0:
                h = a.states + s % 2 * a.h_step
            enter_step(a, table, s, t, h_prev, h_prev_row, h, a.h_row, OTHER, lone)
            h_seen, h_seen_row = h_prev, h_prev_row
            if reads_states and any_reset(a, t, b_first, b_last - b_first):
                h_seen, h_seen_row = h_reset - b_first * H * S, H * S
                call(a.copy_rows, b_last - b_first, H, H, h_prev + b_first * h_prev_row, h_prev_row, h_reset, H * S)
                zero_reset(a, t, b_first, b_last - b_first, H, h_reset, H * S)
            if (s == 0 and begins_at_zero) or a.of_h == 0:
                h_seen = 0
            if lone:
                sums, q_first, q_last = scratch, p_first, p_last
                if a.phases > 1:
                    sums, q_first, q_last = shared + p_first * a.sums * VECTOR, 0, panels if member == 0 else 0
                preact_of_lone(a, s, p_first, p_last, sums, x, h_seen)
                if a.phases > 1:
                    sums, passed = shared, wait(barrier, team, passed, a.relax)
                saved = panel_saved(a, 1, t, q_first, 0)  # panels are rows
                if a.phases == 1:
                    call(cell_forward_of(a), q_last - q_first, q_first, 0, sums, saved, table)
                else:
                    for phase in range(a.phases if q_first < q_last else 0):
                        begin_phase(a, rows_forward_of(a), phase, t, 0, 1, 1, scratch, True)
                        call(
                            cell_forward_of(a), q_last - q_first, q_first, 0, sums, saved, table, phase,
                            later_aside(a, scratch, 0), shared_aside(a, scratch), 0, L,
                        )  # fmt: skip
            for c in range(b_last if lone else b_first, b_last, a.rows_together):
                c_last = min(c + a.rows_together, b_last)
                # a cell that takes means needs the products of all units first, and sums over these in one order: a
                # team multiplies by units and computes cells by rows
                for phase in range(-1 if a.phases > 1 else 0, a.phases):
                    multiplies, computes = phase < 0 or a.phases == 1, phase >= 0
                    r_first, r_last, q_first, q_last = c, c_last, p_first, p_last
                    if not multiplies:
                        r_first, r_last = c + share(c_last - c, member, team), c + share(c_last - c, member + 1, team)
                        q_first, q_last = 0, panels if r_first < r_last else 0
                    if computes and a.phases > 1:
                        alive = rows_alive(a, t, r_first, r_last - r_first)
                        begin_phase(a, rows_forward_of(a), phase, t, r_first, alive, B, scratch, False)
                        if phase == 0 and a.gates != 0:  # those of held rows are zero, as `carry` leaves others
                            saved = panel_saved(a, B, t, panels, r_first + alive)
                            rows, width = r_last - r_first - alive if a.gate_panels > panels else 0, a.saved * L
                            call(a.copy_rows, rows, 0, width, saved, 0, saved, width * S)
                    # to and fro: the weights read last are still in the L2 cache
                    for j in range(q_first, q_last):
                        p = q_first + q_last - 1 - j if multiplies and (s + a.flip) % 2 != 0 else j
                        place, sums = p, panel_sums(a, shared, p) + (r_first - c) * a.sums * VECTOR
                        if multiplies and packs_as_used and a.places != 0:
                            place = thread
                            pack_inputs(a, p, place)
                            if h_seen != 0:
                                pack_states(a, p, place)
                        if multiplies and c == b_first:
                            multiply_inputs(a, s, p, part, b_first, b_last)
                        h_of_heads = h_seen + seen_from(a, p) * S if h_seen != 0 else 0
                        for b in range(r_first, r_last, CHUNK):
                            rows = min(CHUNK, r_last - b)
                            alive = rows_alive(a, t, b, rows)
                            if multiplies:
                                if a.places == 0:  # of so few rows that all of them are here
                                    preact_in_place(a, p, alive, sums, x, h_of_heads, h_seen_row)
                                else:
                                    preact(
                                        a, s, p, place, b, alive, part, b_first, b_last, sums, x, h_of_heads, h_seen_row
                                    )
                            if alive < rows and phase == a.phases - 1:
                                carry(a, t, p, b + alive, rows - alive, table)
                            if computes:
                                cells(a, t, p, b, alive, sums, scratch, table, phase)
                            if not reads_states:
                                if a.states != 0:
                                    leave(a, t, p, b, rows, h)
                                if s + 1 < T:
                                    feed_states(a, s + 1, p, b, rows, h + b * a.h_row + p * L * S, a.h_row, scratch)
                    if not computes:
                        passed = wait(barrier, team, passed, a.relax)
                if c_last < b_last:  # the next rows' products take the place of these
                    passed = wait(barrier, team, passed, a.relax)
            h_prev, h_prev_row = h, a.h_row
            if not reads_inputs and s + 1 < T:
                feed_inputs(a, s + 1, part, b_first, b_last, x_first, x_last, scratch)
            passed = wait(barrier, team, passed, a.relax)
        if not reads_inputs:
            call(a.release)

        rows, width = b_last - b_first, min(p_last * L, H) - p_first * L  # its own, which nobody else writes
        at = b_first * H * S + p_first * L * S
        h_last = h_prev + b_first * h_prev_row + p_first * L * S
        call(a.copy_rows, rows, width, width, h_last, h_prev_row, a.h_n + at, H * S)
        for k in range(a.others if a.c_step != 0 and T > 0 else 0):
            last = get_int64(a.others_at + 8 * (OTHER * k + 3)) + at
            call(a.copy_rows, rows, width, width, row_at(table, 2 * k + 3, 0, at), H * S, last, H * S)
        if a.states == 0:
            zero_held_outputs(a, b_first, b_last, p_first * L, width)

    return forward


forward, forward_matrix = forward_with(vector_forward), forward_with(matrix_forward)
forward_mixed = forward_with(mixed_forward)
