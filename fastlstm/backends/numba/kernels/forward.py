"""The forward pass of a layer: every time step for this thread's rows and units."""

from typing import Any

from fastlstm.backends.numba.constants import LINE, ROW_BLOCK
from fastlstm.backends.numba.kernels import matrix_forward, mixed_forward, vector_forward
from fastlstm.backends.numba.kernels.ends import (
    any_held,
    any_reset,
    is_held,
    length_of,
    rows_to_last_active,
    zero_reset,
)
from fastlstm.backends.numba.kernels.in_place import preact_in_place
from fastlstm.backends.numba.kernels.layout import cell_forward_of, panel_saved, rows_forward_of, seen_from
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, inlined, is_zero, jit, write_rows
from fastlstm.backends.numba.kernels.states import (
    OTHER,
    begin_phase,
    enter_step,
    later_aside,
    panel_sums,
    redirect_to_scratch,
    row_at,
    row_of,
    scratch_slot,
    shared_aside,
)
from fastlstm.backends.numba.kernels.threads import share, team_rows, wait
from fastlstm.backends.numba.kernels.vector_forward import pack_hh, pack_ih
from fastlstm.backends.numba.kernels.weights import digest_weights, pack_biases
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@inlined
def cells(a, t, p, b, rows, sums, scratch, table, phase):
    """One phase of one panel's cells for `rows` rows from `b` on, from preact in `sums`."""
    L, H, panel_offset, states = a.lanes, a.H, p * VECTOR, 2 * a.others + 2
    valid, pointers, is_last = min(L, H - p * L), table, phase == a.phases - 1
    resets, holds = any_reset(a, t, b, rows), any_held(a, t, b, rows)
    if valid < L or resets or (holds and a.c_step == 0):  # cut off, reset or still wanted
        pointers = table + a.table_bytes
        redirect_to_scratch(a, table, pointers, p, t, b, rows, scratch, True, False)
    saved = panel_saved(a, a.B, t, p, b)
    if a.phases == 1:
        call(cell_forward_of(a), rows, b, panel_offset, sums, saved, pointers)
    else:
        call(
            cell_forward_of(a), rows, b, panel_offset, sums, saved, pointers, phase, later_aside(a, scratch, p),
            shared_aside(a, scratch), a.shared_values * VECTOR, valid,
        )  # fmt: skip
    if valid < L and is_last:  # whole vectors would reach into the next row
        for k in range(1, states, 2):
            call(
                a.copy_rows, rows, valid, valid, row_at(pointers, k, b, panel_offset), VECTOR,
                row_at(table, k, b, panel_offset), row_of(table, k),
            )  # fmt: skip
    if holds and is_last:
        for r in range(rows):
            if is_held(a, t, b + r):
                for k in range(0, states, 2):
                    old, new = row_at(pointers, k, b + r, panel_offset), row_at(table, k + 1, b + r, panel_offset)
                    call(a.copy_rows, 1, valid, valid, old, 0, new, 0)


@jit
def copy_held(a, t, p, b, rows, table):
    """Hand on one panel's states of `rows` held rows from `b` on. Their gates, which nobody reads, are zero: what an
    operator returns is to be the same at every run.
    """
    L, panel_offset = a.lanes, p * VECTOR
    width = min(L, a.H - p * L)
    for k in range(0, 2 * a.others + 2, 2):
        old, new = row_at(table, k, b, panel_offset), row_at(table, k + 1, b, panel_offset)
        call(a.copy_rows, rows, width, width, old, row_of(table, k), new, row_of(table, k + 1))
    if a.gates != 0:
        saved = panel_saved(a, a.B, t, p, b)
        call(a.copy_rows, rows, 0, a.saved * L, a.constants, 0, saved, a.saved * VECTOR)


@jit
def store_output(a, t, p, b, rows, h):
    """One panel's h of `rows` rows from `b` on to where it is wanted, with zeros at held steps."""
    width = min(a.lanes, a.H - p * a.lanes)
    to = a.h + t * a.out_step + b * a.out_row + p * a.lanes * element_bytes(a)
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
    pack_x_operand, pack_h_operand, multiply_inputs = (
        products.pack_x_operand,
        products.pack_h_operand,
        products.multiply_inputs,
    )
    preact_of_only_row = products.preact_of_only_row
    reads_states: bool = products.READS_H_UNPACKED
    reads_inputs: bool = products.READS_X_UNPACKED

    @jit
    def forward(a, thread, threads):
        """This thread's share.

        `team_count` teams split the batch rows and meet nobody; within a team units are split, one barrier a step.
        """
        L, S, H, B, T = a.lanes, a.size, a.H, a.B, a.T
        panels = a.panels
        team_count = min(threads, a.team_count)
        team_size = threads // team_count
        if thread >= team_count * team_size:
            return
        team_index, team_thread = thread // team_size, thread % team_size
        first, last = share(panels, thread, team_count * team_size), share(panels, thread + 1, team_count * team_size)
        table = a.scratch + thread * a.scratch_bytes
        scratch = table + 2 * a.table_bytes
        shared = scratch - team_thread * a.scratch_bytes if a.phases > 1 else scratch  # where a team's products meet
        # of all rows: who computes which must not decide
        begins_at_zero = a.of_h == 0 or is_zero(B, H * S, a.h_0, a.h_0_row)
        # an operand of the matrix unit may have columns of x and h side by side: then these are multiplied even if zero
        recurs = T != 1 or a.stale == 0 or not begins_at_zero or not reads_states
        packs_as_used = a.places < panels
        if a.digests != 0:  # if they differ, the result is thrown away; but a team still meets at its barriers
            digest_weights(a, thread, team_count * team_size, recurs)
            if team_count * team_size == 1 and a.stale != 0 and get_int64(a.stale) != 0:
                return
        if a.stale == 0:  # otherwise they are packed, and others may be reading them
            for p in range(first, last):
                pack_biases(a, p, a.biases + p * a.sums * VECTOR)
                if not packs_as_used:
                    pack_weights(a, p, p, scratch)
            if team_count > 1:  # otherwise everybody has packed what it will use
                wait(a.barrier, team_count * team_size, 0, a.relax)
        barrier, barriers_passed = a.barrier + (1 + team_index) * LINE, 0

        b_first, b_last = team_rows(a, team_index, team_count)
        p_first, p_last = share(panels, team_thread, team_size), share(panels, team_thread + 1, team_size)
        x_first = b_first + share(b_last - b_first, team_thread, team_size)
        x_last = b_first + share(b_last - b_first, team_thread + 1, team_size)
        h_reset = scratch_slot(a, scratch, a.slots)  # (rows, H)
        h_prev, h_prev_row = a.h_0, a.h_0_row
        may_be_one_row = (
            a.rows == 1 and a.reset == 0 and a.lengths == 0 and H % L == 0 and p_last - p_first <= ROW_BLOCK
        )
        may_be_one_row = may_be_one_row and (
            a.phases == 1 or panels <= ROW_BLOCK
        )  # with means one thread computes the cells of all panels
        is_one_row = reads_states and reads_inputs and may_be_one_row and not packs_as_used
        if not reads_inputs:  # but the matrix unit does
            call(a.configure, max((b_last - b_first) * max(a.input_steps, 1), 1))
        if not reads_inputs and T > 0:
            pack_x_operand(a, 0, team_index, b_first, b_last, x_first, x_last, scratch)
            if not reads_states:
                for p in range(p_first, p_last):
                    for b in range(b_first, b_last, ROW_BLOCK):
                        at = h_prev + b * h_prev_row + p * L * S
                        pack_h_operand(a, 0, p, b, min(ROW_BLOCK, b_last - b), at, h_prev_row, scratch)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)

        for s in range(T):
            t = T - 1 - s if a.reverse != 0 else s
            h, x = a.h + t * a.h_step, a.x + t * a.x_step
            if a.states != 0:
                h = a.states + s % 2 * a.h_step
            enter_step(a, table, s, t, h_prev, h_prev_row, h, a.h_row, OTHER, is_one_row)
            h_in, h_seen_row = h_prev, h_prev_row
            if reads_states and any_reset(a, t, b_first, b_last - b_first):
                h_in, h_seen_row = h_reset - b_first * H * S, H * S
                call(a.copy_rows, b_last - b_first, H, H, h_prev + b_first * h_prev_row, h_prev_row, h_reset, H * S)
                zero_reset(a, t, b_first, b_last - b_first, H, h_reset, H * S)
            if (s == 0 and begins_at_zero) or a.of_h == 0:
                h_in = 0
            if is_one_row:
                sums, q_first, q_last = scratch, p_first, p_last
                if a.phases > 1:
                    sums, q_first, q_last = shared + p_first * a.sums * VECTOR, 0, panels if team_thread == 0 else 0
                preact_of_only_row(a, s, p_first, p_last, sums, x, h_in)
                if a.phases > 1:
                    sums, barriers_passed = shared, wait(barrier, team_size, barriers_passed, a.relax)
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
            for c in range(b_last if is_one_row else b_first, b_last, a.rows_together):
                c_last = min(c + a.rows_together, b_last)
                # a cell that takes means needs the products of all units first, and sums over these in one order: a
                # team multiplies by units and computes cells by rows
                for phase in range(-1 if a.phases > 1 else 0, a.phases):
                    multiplies, computes = phase < 0 or a.phases == 1, phase >= 0
                    r_first, r_last, q_first, q_last = c, c_last, p_first, p_last
                    if not multiplies:
                        r_first, r_last = (
                            c + share(c_last - c, team_thread, team_size),
                            c + share(c_last - c, team_thread + 1, team_size),
                        )
                        q_first, q_last = 0, panels if r_first < r_last else 0
                    if computes and a.phases > 1:
                        active = rows_to_last_active(a, t, r_first, r_last - r_first)
                        begin_phase(a, rows_forward_of(a), phase, t, r_first, active, B, scratch, False)
                        if phase == 0 and a.gates != 0:  # those of held rows are zero, as `copy_held` leaves others
                            saved = panel_saved(a, B, t, panels, r_first + active)
                            rows, width = r_last - r_first - active if a.gate_panels > panels else 0, a.saved * L
                            call(a.copy_rows, rows, 0, width, saved, 0, saved, width * S)
                    # to and fro: the weights read last are still in the L2 cache
                    for j in range(q_first, q_last):
                        p = q_first + q_last - 1 - j if multiplies and (s + a.flip) % 2 != 0 else j
                        place, sums = p, panel_sums(a, shared, p) + (r_first - c) * a.sums * VECTOR
                        if multiplies and packs_as_used and a.places != 0:
                            place = thread
                            pack_ih(a, p, place)
                            if h_in != 0:
                                pack_hh(a, p, place)
                        if multiplies and c == b_first:
                            multiply_inputs(a, s, p, team_index, b_first, b_last)
                        h_of_heads = h_in + seen_from(a, p) * S if h_in != 0 else 0
                        for b in range(r_first, r_last, ROW_BLOCK):
                            rows = min(ROW_BLOCK, r_last - b)
                            active = rows_to_last_active(a, t, b, rows)
                            if multiplies:
                                if a.places == 0:  # of so few rows that all of them are here
                                    preact_in_place(a, p, active, sums, x, h_of_heads, h_seen_row)
                                else:
                                    preact(
                                        a,
                                        s,
                                        p,
                                        place,
                                        b,
                                        active,
                                        team_index,
                                        b_first,
                                        b_last,
                                        sums,
                                        x,
                                        h_of_heads,
                                        h_seen_row,
                                    )
                            if active < rows and phase == a.phases - 1:
                                copy_held(a, t, p, b + active, rows - active, table)
                            if computes:
                                cells(a, t, p, b, active, sums, scratch, table, phase)
                            if not reads_states:
                                if a.states != 0:
                                    store_output(a, t, p, b, rows, h)
                                if s + 1 < T:
                                    pack_h_operand(a, s + 1, p, b, rows, h + b * a.h_row + p * L * S, a.h_row, scratch)
                    if not computes:
                        barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
                if c_last < b_last:  # the next rows' products take the place of these
                    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            h_prev, h_prev_row = h, a.h_row
            if not reads_inputs and s + 1 < T:
                pack_x_operand(a, s + 1, team_index, b_first, b_last, x_first, x_last, scratch)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
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
