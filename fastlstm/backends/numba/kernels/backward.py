"""The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the gradients
that sum over rows.

What a chunk leaves is used while it is in the cache, and never written out: dpreact of four chunks is all there is. A
thread turns a chunk into gradients once it has the next one's dpreact, and so waits only when a whole chunk ahead.
"""

from typing import Any

from fastlstm.backends.numba.constants import LINE, ROW_BLOCK
from fastlstm.backends.numba.kernels import matrix_backward, mixed_backward, vector_backward
from fastlstm.backends.numba.kernels.ends import any_held, any_reset, is_held, rows_to_last_active, zero_reset
from fastlstm.backends.numba.kernels.gradients import unpack_weight_gradients
from fastlstm.backends.numba.kernels.layout import count_vector_groups, first_vector, panel_saved, terms_of
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, inlined, jit, read_rows
from fastlstm.backends.numba.kernels.states import (
    OTHER_BACK,
    VALUE_BACK,
    begin_phase,
    dh_entry,
    dinputs_aside,
    enter_step,
    held_aside,
    later_aside,
    panel_sums,
    redirect_to_scratch,
    row_of,
    scratch_slot,
    set_entry,
    shared_aside,
)
from fastlstm.backends.numba.kernels.threads import arrive, share, team_rows, wait, wait_for
from fastlstm.backends.numba.kernels.weights import digest_weights
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@jit
def carried_address(a, k, p, b):
    """Where the gradient that is carried to the step before lies, of the k-th state but the first; or of the first,
    which comes after them if it is carried beside its product. Then follow those of dh that held rows hand on.
    """
    return a.carried + ((k * a.panels + p) * a.B + b) * VECTOR


@jit
def inner_field(a, k, n):
    """The n-th number that is told of the k-th state but the first, see `arguments`."""
    return get_int64(a.others_at + 8 * (OTHER_BACK * k + n))


@inlined
def cells(a, p, s, t, b, rows, scratch, table, dh, dpre, phase):
    """One phase of dpreact of one panel for `rows` rows from `b` on. `dh` is the gradient from the step after."""
    L, H, panel_offset, pointers = a.lanes, a.H, p * VECTOR, table
    panels, valid, is_last = a.panels, min(L, H - p * L), phase == a.phases - 1
    resets, holds, corrects = any_reset(a, t, b, rows), any_held(a, t, b, rows), a.reverse != 0 and a.lengths != 0
    for k in range(a.others):
        if inner_field(a, k, 3) != 0 and phase == 0:
            d = inner_field(a, k, 3) + t * inner_field(a, k, 4) + b * inner_field(a, k, 5) + panel_offset
            call(a.add_rows, rows, valid, d, inner_field(a, k, 5), carried_address(a, k, p, b), VECTOR)
    if valid < L or resets or a.is_narrow != 0 or (corrects and a.reads & 1 != 0):
        pointers, k = table + a.table_bytes, dh_entry(a)
        redirect_to_scratch(a, table, pointers, p, t, b, rows, scratch, False, corrects)
        dh_out = get_int64(table + 16 * k) + b * row_of(table, k) + p * L * element_bytes(a)
        read_rows(a, a.is_narrow, rows, valid, L, dh_out, row_of(table, k), scratch_slot(a, scratch, k), VECTOR)
        set_entry(pointers, k, scratch_slot(a, scratch, k) - b * VECTOR - panel_offset, VECTOR)
    # a held row hands on the states' gradients that it got: its dpreact is zero, and its own dh is ignored
    if holds and is_last:
        for k in range(a.others):
            call(a.copy_rows, rows, L, L, carried_address(a, k, p, b), VECTOR, held_aside(a, scratch, k), VECTOR)
        call(a.copy_rows, rows, valid, L, dh, 4 * VECTOR, carried_address(a, a.others + a.carries_h, p, b), VECTOR)
    saved = panel_saved(a, a.gate_rows, t, p, b)
    active, terms, dinputs = rows_to_last_active(a, t, b, rows), terms_of(a), dinputs_aside(a, scratch)
    carried, carried_state = carried_address(a, 0, p, b), panels * a.B * VECTOR
    if a.phases == 1:
        call(
            a.cell_backward,
            active,
            b,
            panel_offset,
            valid,
            dh,
            saved,
            dpre,
            dinputs,
            carried,
            carried_state,
            pointers,
        )
    else:
        call(
            a.cell_backward, active, b, panel_offset, valid, dh, saved, dpre, dinputs, carried, carried_state, pointers,
            phase, later_aside(a, scratch, p), shared_aside(a, scratch), a.shared_values * VECTOR,
        )  # fmt: skip
    if holds and is_last:
        for r in range(rows):
            if is_held(a, t, b + r):
                for k in range(a.others):
                    held = held_aside(a, scratch, k) + r * VECTOR
                    call(a.copy_rows, 1, L, L, held, 0, carried_address(a, k, p, b + r), 0)
                call(a.copy_rows, 1, 0, terms * L, a.constants, 0, dpre + r * terms * VECTOR, 0)
                call(a.copy_rows, 1, 0, a.inputs * L, a.constants, 0, dinputs + r * a.inputs * VECTOR, 0)
    for k in range(a.inputs if is_last else 0):
        to = get_int64(a.values_at + 8 * (VALUE_BACK * k + 3))
        if to != 0:
            at, row = ((t * a.rows + b) * H + p * L) * a.size, H * a.size
            call(a.copy_rows, rows, valid, valid, dinputs + k * VECTOR, a.inputs * VECTOR, to + at, row)


@jit
def barrier_address(a, number):
    """Where threads are counted at the meeting of this number: a thread can be at one while others are at the last."""
    return a.barrier + number % 2 * LINE


def backward_with(products: Any) -> Any:
    """The kernel that takes its products from a module: `vector_backward`, or one like it."""
    pack_transposed, pack_transposed_inputs = products.pack_transposed, products.pack_transposed_inputs
    dpreact_place, store_dpreact = products.dpreact_place, products.store_dpreact
    back_product, pack_activations, add_gradients = (
        products.back_product,
        products.pack_activations,
        products.add_gradients,
    )
    on_unit = products is matrix_backward

    @jit
    def arriving(a, s, t_next, b, rows, q, sums):
        """The gradients of the states after step s, in column group q, for `rows` rows from `b` on: of the first state
        in `sums` (rows, 4, lanes), of the others where they are carried.
        """
        L, S, H, T, panels = a.lanes, a.size, a.H, a.T, a.panels
        p_first, p_last = first_vector(panels, q), first_vector(panels, q + 1)
        column = p_first * L
        width = min((p_last - p_first) * L, H - column)
        if s < T - 1 and a.of_h != 0 and (s >= 0 or a.dh_0 != 0):
            back_product(a, rows_to_last_active(a, t_next, b, rows), b, s + 1, True, a.packed_hh, panels, q, sums)
        elif s == T - 1 and a.dh_n != 0:
            call(
                a.copy_rows, rows, width, 4 * L,
                a.dh_n + b * a.dh_n_row + column * S, a.dh_n_row, sums, 4 * VECTOR,
            )  # fmt: skip
        else:
            call(a.copy_rows, rows, 0, 4 * L, sums, 0, sums, 4 * VECTOR)
        resets = s < T - 1 and any_reset(a, t_next, b, rows)
        holds = s < T - 1 and any_held(a, t_next, b, rows)
        for p in range(p_first, p_last if s < T - 1 and a.carries_h != 0 else p_first):
            dh = sums + (p - p_first) * VECTOR
            call(a.add_rows, rows, L, carried_address(a, a.others, p, b), VECTOR, dh, 4 * VECTOR)
        if resets:
            zero_reset(a, t_next, b, rows, 4 * L, sums, 4 * VECTOR)
        for p in range(p_first, p_last):
            dh, valid = sums + (p - p_first) * VECTOR, min(L, H - p * L)
            for k in range(a.others):
                carried = carried_address(a, k, p, b)
                if s == T - 1:
                    d_n, row = inner_field(a, k, 6) + b * inner_field(a, k, 7) + p * VECTOR, inner_field(a, k, 7)
                    given = valid if inner_field(a, k, 6) != 0 else 0
                    call(a.copy_rows, rows, given, L, d_n, row, carried, VECTOR)
                if resets:
                    zero_reset(a, t_next, b, rows, L, carried, VECTOR)
            if holds:
                for r in range(rows):
                    if is_held(a, t_next, b + r):
                        held = carried_address(a, a.others + a.carries_h, p, b + r)
                        call(a.copy_rows, 1, L, L, held, 0, dh + r * 4 * VECTOR, 0)

    @jit
    def backward(a, thread, threads):
        """This thread's share: rows and units are split as in the forward pass, the sums over rows by panels."""
        L, S, I, H, T = a.lanes, a.size, a.I, a.H, a.T
        panels = a.panels
        groups, groups_x = count_vector_groups(panels), count_vector_groups((I + L - 1) // L)
        team_count = min(threads, a.team_count)
        team_size = threads // team_count
        thread_count = team_count * team_size
        if thread >= thread_count:
            return
        team_index, team_thread = thread // team_size, thread % team_size
        table = a.scratch + thread * a.scratch_bytes
        scratch = table + 2 * a.table_bytes
        shared = scratch - team_thread * a.scratch_bytes if a.phases > 1 else scratch  # where a team's products meet
        if a.digests != 0:  # if they differ, all is thrown away; but a team still meets at its barriers
            digest_weights(a, thread, thread_count, T > 1 or a.stale == 0 or a.dh_0 != 0)
            if thread_count == 1 and a.stale != 0 and get_int64(a.stale) != 0:
                return
        packs = a.packs != 0 and a.stale == 0
        if packs:
            if a.packed_hh != 0:
                pack_transposed(
                    a, a.weight_hh, a.weight_hh_row, H, True, a.packed_hh,
                    share(groups, thread, thread_count), share(groups, thread + 1, thread_count), scratch,
                )  # fmt: skip
            if a.packed_ih != 0:
                pack_transposed_inputs(
                    a, a.weight_ih, a.weight_ih_row, I, False, a.packed_ih,
                    share(groups_x, thread, thread_count), share(groups_x, thread + 1, thread_count), scratch,
                )  # fmt: skip
            wait(barrier_address(a, 0), thread_count, 0, a.relax)
        met = 1 if packs else 0
        barrier, barriers_passed = a.barrier + (2 + team_index) * LINE, 0

        b_first, b_last = team_rows(a, team_index, team_count)
        q_first, q_last = share(groups, team_thread, team_size), share(groups, team_thread + 1, team_size)

        if on_unit:
            call(a.configure, max(b_last - b_first, 1))
        wants_states = a.dh_0 != 0
        for k in range(a.others):
            wants_states |= inner_field(a, k, 8) != 0
        for s in range(T - 1, -2, -1):  # -1: what arrives at the initial states, and the gradients of the last chunk
            t, t_next = (T - 1 - s, T - 2 - s) if a.reverse != 0 else (s, s + 1)
            wanted = s >= 0 or wants_states
            if s >= 0:
                t_prev = t + 1 if a.reverse != 0 else t - 1
                h_prev, h_prev_row = a.h + t_prev * a.rows * H * S, H * S
                if s == 0:
                    h_prev, h_prev_row = a.h_0, a.h_0_row
                enter_step(a, table, s, t, h_prev, h_prev_row, a.h + t * a.rows * H * S, H * S, OTHER_BACK, False)
                set_entry(table, dh_entry(a), a.dh + t * a.dh_step, a.dh_row)
            for c in range(b_first, b_last if wanted else b_first, a.rows_together):
                c_last = min(c + a.rows_together, b_last)
                for phase in range(-1 if a.phases > 1 else 0, a.phases if s >= 0 else 1):
                    multiplies, computes = phase < 0 or a.phases == 1, phase >= 0
                    r_first, r_last, begin, end = c, c_last, q_first, q_last
                    if not multiplies:
                        r_first, r_last = (
                            c + share(c_last - c, team_thread, team_size),
                            c + share(c_last - c, team_thread + 1, team_size),
                        )
                        begin, end = 0, groups if r_first < r_last else 0
                    if a.phases > 1 and s >= 0 and computes:
                        active = rows_to_last_active(a, t, r_first, r_last - r_first)
                        begin_phase(a, a.rows_backward, phase, t, r_first, active, a.gate_rows, scratch, False)
                    for j in range(begin, end):  # to and fro, as in the forward pass
                        q = j if s % 2 == 0 else begin + end - 1 - j
                        p_first, p_last = first_vector(panels, q), first_vector(panels, q + 1)
                        sums = panel_sums(a, shared, q) + (r_first - c) * 4 * VECTOR
                        for b in range(r_first, r_last, ROW_BLOCK):
                            rows = min(ROW_BLOCK, r_last - b)
                            if multiplies:
                                arriving(a, s, t_next, b, rows, q, sums)
                            for p in range(p_first, p_last if computes else p_first):
                                dh, valid = sums + (p - p_first) * VECTOR, min(L, H - p * L)
                                if s >= 0:
                                    dpre = dpreact_place(a, p, s, b, scratch)
                                    cells(a, p, s, t, b, rows, scratch, table, dh, dpre, phase)
                                    if phase == a.phases - 1:
                                        store_dpreact(a, p, s, b, rows, dpre)
                                    continue
                                at = (b * H + p * L) * S
                                if a.dh_0 != 0:
                                    call(a.copy_rows, rows, valid, valid, dh, 4 * VECTOR, a.dh_0 + at, H * S)
                                for k in range(a.others):
                                    if inner_field(a, k, 8) != 0:
                                        to = inner_field(a, k, 8) + at
                                        call(
                                            a.copy_rows,
                                            rows,
                                            valid,
                                            valid,
                                            carried_address(a, k, p, b),
                                            VECTOR,
                                            to,
                                            H * S,
                                        )
                    if not computes:
                        barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
                if c_last < b_last:
                    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            if a.strips != 0 or a.dx != 0:
                due_chunk, number = 0 if s < 0 else T, met - 1
                if s >= 0 and s % a.chunk == 0:
                    chunk = s // a.chunk
                    pack_activations(a, chunk, thread, thread_count, scratch)
                    arrive(barrier_address(a, met), thread_count)
                    met += 1
                    # who came to the meeting before this one has read the chunk two before that: the next takes its
                    # place
                    due_chunk = chunk + 1
                if due_chunk * a.chunk < T:  # one call, since each is compiled into the kernel
                    wait_for(barrier_address(a, number), thread_count, number // 2 + 1, a.relax)
                    add_gradients(a, scratch, due_chunk, b_last - b_first, thread, thread_count)

        if on_unit:
            call(a.release)
        if a.dweights != 0:
            if a.halves == 2:  # another's half is added
                wait(barrier_address(a, met), thread_count, met // 2, a.relax)
            unpack_weight_gradients(
                a, scratch, share(panels, thread, thread_count), share(panels, thread + 1, thread_count)
            )

    return backward


backward, backward_matrix = backward_with(vector_backward), backward_with(matrix_backward)
backward_mixed = backward_with(mixed_backward)
