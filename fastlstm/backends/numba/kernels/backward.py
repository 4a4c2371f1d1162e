"""The backward pass of a layer: dpreact step by step, and after each time chunk its share of the sums over rows.

A chunk's dpreact is used while it is in the cache: there is room for four. A thread turns a chunk into gradients once
it has the dpreact of the next one, and so waits only for threads a whole chunk behind.
"""

from typing import Any

from fastlstm.backends.numba.constants import LINE, ROW_BLOCK
from fastlstm.backends.numba.kernels import matrix_backward, vector_backward
from fastlstm.backends.numba.kernels.backward_step import (
    D_INITIAL,
    D_LAST,
    D_LAST_ROW_STRIDE,
    carried_address,
    inner_field,
    run_cell,
)
from fastlstm.backends.numba.kernels.digests import digest_weights
from fastlstm.backends.numba.kernels.layout import count_vector_groups, first_vector, lanes_inside, param_sums_address
from fastlstm.backends.numba.kernels.matrix_backward import pack_column_operand
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.row_masks import any_held, any_reset, is_held, rows_to_last_active, zero_reset
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes
from fastlstm.backends.numba.kernels.states import (
    INNER_FIELDS_BACKWARD,
    begin_phase,
    dh_entry,
    enter_step,
    panel_products,
    scratch_slot,
    set_entry,
)
from fastlstm.backends.numba.kernels.threads import arrive, share, share_rows, team_rows, wait, wait_for
from fastlstm.backends.numba.kernels.values import (
    back_results_address,
    multiply_back,
    packed_back_address,
    record_count,
    record_first,
    unpack_product_gradients,
)
from fastlstm.backends.numba.kernels.vector_backward import pack_transposed_gates
from fastlstm.backends.numba.kernels.weight_gradients import add_gradients_with, unpack_weight_gradients
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


def pack_back_products(a, first, last, scratch):
    """Pack vector groups `first` to `last` of the transposed weights of all products."""
    for group in range(a.product_groups):
        first_block, packed = a.x_preacts + a.h_preacts + record_first(a, group), packed_back_address(a, group)
        row, count = a.head * element_bytes(a), record_count(a, group)
        if a.components != 0:
            pack_column_operand(
                a, a.weight_products, row, a.H, count, first_block, a.head, packed, first, last, scratch
            )  # fmt: skip
            continue
        pack_transposed_gates(
            a, a.weight_products, row, a.h_width, a.H, a.H, count, first_block, True, packed, first, last
        )


def barrier_address(a, number):
    """Return the address of the counter of a barrier: two take turns, since threads may still wait at the last."""
    return a.barrier + number % 2 * LINE


def backward_with(products: BackwardProducts) -> Any:
    is_on_bf16_unit, pack_transposed, dpreact_target, store_dpreact, back_product, *_ = products
    pack_activations, add_gradients = products.pack_activations, add_gradients_with(products)

    def receive_gradients(a, s, t_next, b, rows, q, dh_group):
        """Store what step s gets from the step after in vector group q: dh (rows, 4, lanes), and the carried."""
        L, size, H, T, panels = a.lanes, a.size, a.H, a.T, a.panels
        p_first, p_last = first_vector(panels, q), first_vector(panels, q + 1)
        column = p_first * L
        width = max(0, min((p_last - p_first) * L, a.h_width - column))
        if s < T - 1 and a.h_preacts != 0 and (s >= 0 or a.dh_0 != 0) and width > 0:
            active = rows_to_last_active(a, t_next, b, rows)
            back_product(a, active, b, s + 1, of_h=True, packed=a.packed_hh, vectors=panels, q=q, scratch=dh_group)
            if width < (p_last - p_first) * L and a.h_width < H:  # zero times an infinity would be NaN
                call(a.copy_rows, rows, 0, 4 * L - width, dh_group, 0, dh_group + width * size, 4 * VECTOR)
        elif s == T - 1 and a.dh_n != 0:
            dh_n = a.dh_n + b * a.dh_n_row_stride + column * size
            call(a.copy_rows, rows, width, 4 * L, dh_n, a.dh_n_row_stride, dh_group, 4 * VECTOR)
        else:
            call(a.copy_rows, rows, 0, 4 * L, dh_group, 0, dh_group, 4 * VECTOR)
        has_reset = s < T - 1 and any_reset(a, t_next, b, rows)
        has_held = s < T - 1 and any_held(a, t_next, b, rows)
        for p in range(p_first, p_last if s < T - 1 and a.carries_h != 0 else p_first):
            dh = dh_group + (p - p_first) * VECTOR
            call(a.add_rows, rows, L, carried_address(a, a.inner_states, p, b), VECTOR, dh, 4 * VECTOR)
        if has_reset:
            zero_reset(a, t_next, b, rows, 4 * L, dh_group, 4 * VECTOR)
        for p in range(p_first, p_last):
            dh, valid = dh_group + (p - p_first) * VECTOR, min(L, H - p * L)
            for r in range(0, rows if s == T - 1 else 0, a.group_rows):
                sums = param_sums_address(a, p, b + r)
                call(a.copy_rows, 1, 0, a.params * L, sums, 0, sums, 0)
            for k in range(a.inner_states):
                carried = carried_address(a, k, p, b)
                if s == T - 1:
                    d_last, d_row = inner_field(a, k, D_LAST), inner_field(a, k, D_LAST_ROW_STRIDE)
                    count = valid if d_last != 0 else 0
                    call(a.copy_rows, rows, count, L, d_last + b * d_row + p * VECTOR, d_row, carried, VECTOR)
                if has_reset:
                    zero_reset(a, t_next, b, rows, L, carried, VECTOR)
            if has_held:
                for r in range(rows):
                    if is_held(a, t_next, b + r):
                        held = carried_address(a, a.inner_states + a.carries_h, p, b + r)
                        call(a.copy_rows, 1, L, L, held, 0, dh + r * 4 * VECTOR, 0)

    def backward(a, thread, threads):
        """Run this thread's share: rows and units are split as in the forward pass, the sums over rows by panels."""
        L, size, I, H, T, panels, h_0_row = a.lanes, a.size, a.I, a.H, a.T, a.panels, a.h_width * a.size
        groups, x_groups = count_vector_groups(panels), count_vector_groups((I + L - 1) // L)
        team_count = min(threads, a.team_count)
        team_size = threads // team_count
        thread_count = team_count * team_size
        if thread >= thread_count:
            return
        team_index, team_thread = thread // team_size, thread % team_size
        table = a.scratch + thread * a.scratch_bytes
        scratch = table + 2 * a.table_bytes
        team_scratch = scratch - team_thread * a.scratch_bytes if a.phases > 1 else scratch  # a team's products
        if a.digests != 0:  # if they differ, the results are discarded; but a team still waits at its barriers
            digest_weights(a, thread, thread_count, T > 1 or a.mismatches == 0 or a.dh_0 != 0)
            if thread_count == 1 and a.mismatches != 0 and get_int64(a.mismatches) != 0:
                return
        packs = (a.packed_hh != 0 or a.packed_ih != 0 or a.products != 0) and a.mismatches == 0
        if packs:
            first, last = share(groups, thread, thread_count), share(groups, thread + 1, thread_count)
            if a.packed_hh != 0:
                pack_transposed(a, a.weight_hh, a.hh_row_stride, H, True, a.packed_hh, first, last, scratch)
            if a.packed_ih != 0:
                pack_transposed(
                    a, a.weight_ih, a.ih_row_stride, N=I, of_h=False, packed=a.packed_ih,
                    first=share(x_groups, thread, thread_count), last=share(x_groups, thread + 1, thread_count),
                    scratch=scratch,
                )  # fmt: skip
            pack_back_products(a, first, last, scratch)
            wait(barrier_address(a, 0), thread_count, 0, a.relax)
        next_barrier = 1 if packs else 0  # of those at which all threads wait
        barrier, barriers_passed = a.barrier + (2 + team_index) * LINE, 0

        b_first, b_last = team_rows(a, team_index, team_count)
        q_first, q_last = share(groups, team_thread, team_size), share(groups, team_thread + 1, team_size)

        if is_on_bf16_unit:
            call(a.configure, max(b_last - b_first, 1))
        wants_states = a.dh_0 != 0
        for k in range(a.inner_states):
            wants_states |= inner_field(a, k, D_INITIAL) != 0
        for s in range(T - 1, -2, -1):  # -1: the gradients of the initial states, and those of the last time chunk
            t, t_next = (T - 1 - s, T - 2 - s) if a.reverse != 0 else (s, s + 1)
            wanted = s >= 0 or wants_states
            if s >= 0:
                t_prev = t + 1 if a.reverse != 0 else t - 1
                h_prev, h_prev_row = a.h + t_prev * a.h_step_stride, a.h_row_stride
                if s == 0:
                    h_prev, h_prev_row = a.h_0, a.h_0_row_stride
                enter_step(
                    a, table, s, t, h_prev, h_prev_row, a.h + t * a.h_step_stride, a.h_row_stride,
                    count=INNER_FIELDS_BACKWARD, is_one_row=False,
                )  # fmt: skip
                set_entry(table, dh_entry(a), a.dh + t * a.dh_step_stride, a.dh_row_stride)
            for g_first in range(b_first, b_last if wanted else b_first, a.rows_together):
                g_last = min(g_first + a.rows_together, b_last)
                # where members split the rows for cells, phase -1 has the products alone, of all units
                for phase in range(-1 if a.splits_rows != 0 else 0, a.phases if s >= 0 else 1):
                    multiplies, computes = phase < 0 or (phase == 0 and a.splits_rows == 0), phase >= 0
                    r_first, r_last, begin, end = g_first, g_last, q_first, q_last
                    if a.phases > 1 and phase > 0:
                        active = rows_to_last_active(a, t, g_first, g_last - g_first)
                        barriers_passed = multiply_back(
                            a, team_scratch, phase, s, g_first, active, q_first, q_last, barrier, team_size,
                            barriers_passed,
                        )  # fmt: skip
                    if not multiplies and a.splits_rows != 0:
                        unit = max(2, a.group_rows)  # operands of the bf16 unit have rows in pairs
                        r_first = g_first + share_rows(g_last - g_first, unit, team_thread, team_size)
                        r_last = g_first + share_rows(g_last - g_first, unit, team_thread + 1, team_size)
                        begin, end = 0, groups if r_first < r_last else 0
                    if a.phases > 1 and s >= 0 and computes:
                        active = rows_to_last_active(a, t, r_first, r_last - r_first)
                        begin_phase(
                            a, a.rows_backward, phase, t, r_first, active, a.gate_rows, scratch, is_one_row=False
                        )
                    # in serpentine order, as in the forward pass; a phase fetches the next panel's saved values ahead
                    for j in range(begin, end):
                        q = j if s % 2 == 0 or not multiplies else begin + end - 1 - j
                        p_first, p_last = first_vector(panels, q), first_vector(panels, q + 1)
                        dh_group = panel_products(a, team_scratch, q) + (r_first - g_first) * 4 * VECTOR
                        for b in range(r_first, r_last, ROW_BLOCK):
                            rows = min(ROW_BLOCK, r_last - b)
                            if multiplies:
                                receive_gradients(a, s, t_next, b, rows, q, dh_group)
                            for p in range(p_first, p_last if computes else p_first):
                                dh, valid = dh_group + (p - p_first) * VECTOR, min(L, H - p * L)
                                if s >= 0:
                                    dpre = dpreact_target(a, p, s, b, scratch)
                                    transposed = back_results_address(a, team_scratch, 0, q)
                                    transposed += ((b - g_first) * 4 + p - p_first) * VECTOR
                                    run_cell(a, p, t, b, rows, scratch, table, dh, dpre, phase, transposed)
                                    store_dpreact(a, p, s, b, rows, dpre, phase)
                                    continue
                                offset, row = (b * H + p * L) * size, H * size
                                if a.dh_0 != 0:
                                    width, target = lanes_inside(a, p, a.h_width), a.dh_0 + b * h_0_row + p * VECTOR
                                    call(a.copy_rows, rows, width, width, dh, 4 * VECTOR, target, h_0_row)
                                for k in range(a.inner_states):
                                    if inner_field(a, k, D_INITIAL) != 0:
                                        d, target = carried_address(a, k, p, b), inner_field(a, k, D_INITIAL) + offset
                                        call(a.copy_rows, rows, valid, valid, d, VECTOR, target, row)
                    if not computes:
                        barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
                if g_last < b_last:
                    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            if a.strips != 0 or a.dx != 0:
                due_chunk, due_barrier = 0 if s < 0 else T, next_barrier - 1
                # not where the team's products are: other threads may have begun the next step
                own_scratch = scratch_slot(a, scratch, 0) if a.phases > 1 else scratch
                if s >= 0 and s % a.chunk == 0:
                    chunk = s // a.chunk
                    pack_activations(a, chunk, thread, thread_count, own_scratch)
                    arrive(barrier_address(a, next_barrier), thread_count)
                    next_barrier += 1
                    # Every thread that has arrived at the barrier of chunk + 1 has read chunk + 3. So the next chunk,
                    # which is chunk - 1, may overwrite it in the ring of four.
                    due_chunk = chunk + 1
                if due_chunk * a.chunk < T:  # one call, since each is compiled into the kernel
                    wait_for(barrier_address(a, due_barrier), thread_count, due_barrier // 2 + 1, a.relax)
                    add_gradients(a, own_scratch, due_chunk, b_last - b_first, thread, thread_count)

        if is_on_bf16_unit:
            call(a.release)
        if a.dweights != 0:
            if a.split_k == 2:  # the other set, which other threads have written, is added
                wait(barrier_address(a, next_barrier), thread_count, next_barrier // 2, a.relax)
            first, last = share(panels, thread, thread_count), share(panels, thread + 1, thread_count)
            unpack_weight_gradients(a, scratch, first, last)
            unpack_product_gradients(a, scratch, first, last)

    return backward


backward, backward_matrix = backward_with(vector_backward.PRODUCTS), backward_with(matrix_backward.PRODUCTS)
