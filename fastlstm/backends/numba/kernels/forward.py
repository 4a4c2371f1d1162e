"""The forward pass of a layer: every time step for this thread's rows and units."""

from typing import Any

from fastlstm.backends.numba.constants import LINE, ROW_BLOCK
from fastlstm.backends.numba.kernels import matrix_forward, vector_forward
from fastlstm.backends.numba.kernels.digests import digest_weights, pack_biases
from fastlstm.backends.numba.kernels.in_place import preact_in_place
from fastlstm.backends.numba.kernels.layout import (
    cell_forward_of,
    lanes_inside,
    panels_of_h,
    rows_forward_of,
    saved_address,
    seen_begin,
)
from fastlstm.backends.numba.kernels.products import ForwardProducts
from fastlstm.backends.numba.kernels.row_masks import (
    any_held,
    any_reset,
    is_held,
    rows_to_last_active,
    zero_reset,
)
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, inlined, is_zero, write_rows
from fastlstm.backends.numba.kernels.states import (
    INNER_FIELDS,
    begin_phase,
    copy_held,
    enter_step,
    entry_address,
    entry_stride,
    later_address,
    panel_products,
    redirect_to_scratch,
    scratch_slot,
    shared_address,
    width_of,
    zero_held_outputs,
)
from fastlstm.backends.numba.kernels.threads import share, team_rows, wait
from fastlstm.backends.numba.kernels.values import (
    multiply_values,
    multiply_values_of_only_row,
    operand_address,
    pack_products,
    results_address,
    store_row_operands,
)
from fastlstm.backends.numba.kernels.vector_forward import multiply_inputs, pack_hh, pack_ih, preact_of_only_row
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@inlined
def run_cell(a, t, p, b, rows, preacts, scratch, table, phase, team_scratch, team_row):
    """Run a phase of the cell on the pre-activations at `preacts`. `team_row`: where the rows begin for products."""
    L, panel_offset, states = a.lanes, p * VECTOR, 2 * a.inner_states + 2
    valid, pointers, is_last = lanes_inside(a, p, a.H), table, phase == a.phases - 1
    has_reset, has_held = any_reset(a, t, b, rows), any_held(a, t, b, rows)
    # The cell works on copies if the panel is not full, a row is reset, or a held row needs an overwritten state.
    is_full = (p + 1) * L <= min(a.H, a.h_width)
    if not is_full or has_reset or (has_held and a.inner_step_stride == 0):
        pointers = table + a.table_bytes
        redirect_to_scratch(a, table, pointers, p, t, b, rows, scratch, writes=True, corrects=False, narrow_from=2)
    saved = saved_address(a, a.B, t, p, b)
    if a.phases == 1:
        call(cell_forward_of(a), rows, b, panel_offset, preacts, saved, pointers)
    else:
        call(
            cell_forward_of(a), rows, b, panel_offset, preacts, saved, pointers, phase, later_address(a, scratch, p),
            shared_address(a, scratch), a.shared_values * VECTOR, valid,
            operand_address(a, team_scratch, 0) + (team_row * a.panels + p) * VECTOR, ROW_BLOCK * a.panels * VECTOR,
            a.panels * VECTOR, results_address(a, team_scratch, p) + team_row * a.products * VECTOR,
        )  # fmt: skip
    if not is_full and is_last:  # whole vectors would reach into the next row
        for k in range(1, states, 2):
            width = lanes_inside(a, p, width_of(a, k))
            if width < L:
                call(
                    a.copy_rows, rows, width, width, entry_address(pointers, k, b, panel_offset), VECTOR,
                    entry_address(table, k, b, panel_offset), entry_stride(table, k),
                )  # fmt: skip
    if has_held and is_last:
        for r in range(rows):
            if is_held(a, t, b + r):
                for k in range(0, states, 2):
                    old, width = entry_address(pointers, k, b + r, panel_offset), lanes_inside(a, p, width_of(a, k))
                    call(a.copy_rows, 1, width, width, old, 0, entry_address(table, k + 1, b + r, panel_offset), 0)


def store_output(a, t, p, b, rows, h):
    """Store one panel's h of `rows` rows from `b` on in the output, rounded to its type, with zeros for held rows."""
    width, h_row, out_row = min(a.lanes, a.H - p * a.lanes), a.H * a.size, a.h_row_stride
    target = a.h + t * a.h_step_stride + b * out_row + p * a.lanes * element_bytes(a)
    write_rows(a, rows, width, h + b * h_row + p * VECTOR, h_row, target, out_row)
    if a.lengths != 0:
        for r in range(rows):
            if is_held(a, t, b + r):
                write_rows(a, 1, width, a.constants, 0, target + r * out_row, 0)


def forward_with(products: ForwardProducts) -> Any:
    pack_weights, preact, pack_x_operand, pack_h_operand = products
    is_on_bf16_unit = pack_x_operand is not None

    def forward(a, thread, threads):
        """Run this thread's share, waiting after each step for its team, which splits the units."""
        L, size, H, B, T, panels, h_0_row = a.lanes, a.size, a.H, a.B, a.T, a.panels, a.h_width * a.size
        team_count = min(threads, a.team_count)
        team_size = threads // team_count
        if thread >= team_count * team_size:
            return
        team_index, team_thread = thread // team_size, thread % team_size
        first, last = share(panels, thread, team_count * team_size), share(panels, thread + 1, team_count * team_size)
        table = a.scratch + thread * a.scratch_bytes
        scratch = table + 2 * a.table_bytes
        team_scratch = scratch - team_thread * a.scratch_bytes if a.phases > 1 else scratch  # a team's products
        # Tested for all batch rows, so that the result does not depend on which thread computes which rows.
        begins_at_zero = a.h_preacts == 0 or is_zero(B, h_0_row, a.h_0, a.h_0_row_stride)
        # A K block of the row operand may have columns of both x and h: then h is multiplied even if it is zero.
        recurs = T != 1 or a.mismatches == 0 or not begins_at_zero or is_on_bf16_unit
        packs_as_used = a.packed_panels < panels
        if a.digests != 0:  # if they differ, the result is discarded; but a team still waits at its barriers
            digest_weights(a, thread, team_count * team_size, recurs)
            if team_count * team_size == 1 and a.mismatches != 0 and get_int64(a.mismatches) != 0:
                return
        if a.mismatches == 0:  # otherwise the weights are packed, and other calls may be reading them
            for p in range(first, last):
                pack_biases(a, p, a.biases + p * a.preacts * VECTOR)
                if not packs_as_used:
                    pack_weights(a, p, p, scratch)
                    pack_products(a, p, scratch)
        if team_count > 1 and (a.mismatches == 0 or a.h_n == a.h_0):  # one team packs for itself; a stream writes h_0
            wait(a.barrier, team_count * team_size, 0, a.relax)
        barrier, barriers_passed = a.barrier + (1 + team_index) * LINE, 0

        b_first, b_last = team_rows(a, team_index, team_count)
        p_first, p_last = share(panels, team_thread, team_size), share(panels, team_thread + 1, team_size)
        team_b = b_last - b_first
        x_first = b_first + share(team_b, team_thread, team_size)
        x_last = b_first + share(team_b, team_thread + 1, team_size)
        h_reset = scratch_slot(a, scratch, a.slots)  # (rows, columns of h), after all slots
        h_prev, h_prev_row = a.h_0, a.h_0_row_stride
        h_row = a.h_row_stride if a.h_float32 == 0 else H * size
        is_plain = a.rows == 1 and team_b == 1 and a.reset == 0 and a.lengths == 0 and H % L == 0 and a.h_width == H
        # with means one thread computes the cells of all panels
        is_plain = is_plain and (p_last - p_first if a.splits_rows == 0 else panels) <= ROW_BLOCK
        is_one_row = not is_on_bf16_unit and is_plain and not packs_as_used
        if is_on_bf16_unit:
            call(a.configure, max(team_b, 1))
        if is_on_bf16_unit and T > 0:
            pack_x_operand(a, 0, x_first, x_last, scratch)
            for p in range(p_first, p_last):
                for b in range(b_first, b_last, ROW_BLOCK):
                    h = h_prev + b * h_prev_row + p * L * size
                    pack_h_operand(a, 0, p, b, min(ROW_BLOCK, b_last - b), h, h_prev_row, scratch)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)

        for s in range(T):
            t = T - 1 - s if a.reverse != 0 else s
            h, x = a.h + t * a.h_step_stride, a.x + t * a.x_step_stride
            if a.h_float32 != 0:
                h = a.h_float32 + s % 2 * B * h_row
            enter_step(a, table, s, t, h_prev, h_prev_row, h, h_row, count=INNER_FIELDS, is_one_row=is_one_row)
            h_in, h_in_stride = h_prev, h_prev_row
            if not is_on_bf16_unit and any_reset(a, t, b_first, team_b):
                h_in, h_in_stride, width = h_reset - b_first * h_0_row, h_0_row, a.h_width
                call(a.copy_rows, team_b, width, width, h_prev + b_first * h_prev_row, h_prev_row, h_reset, h_0_row)
                zero_reset(a, t, b_first, team_b, width, h_reset, h_0_row)
            if (s == 0 and begins_at_zero) or a.h_preacts == 0:
                h_in = 0
            if not is_on_bf16_unit and is_one_row:  # the first, a constant, leaves this out of other kernels
                preacts, q_first, q_last = scratch, p_first, p_last
                if a.splits_rows != 0:
                    preacts, q_first = team_scratch + p_first * a.preacts * VECTOR, 0
                    q_last = panels if team_thread == 0 else 0
                preact_of_only_row(a, s, p_first, p_last, preacts, x, h_in)
                if a.splits_rows != 0:
                    preacts, barriers_passed = team_scratch, wait(barrier, team_size, barriers_passed, a.relax)
                saved = saved_address(a, 1, t, q_first, 0)  # the panels stand as rows
                if a.phases == 1:
                    call(cell_forward_of(a), q_last - q_first, q_first, 0, preacts, saved, table)
                else:
                    for phase in range(a.phases):
                        barriers_passed = multiply_values_of_only_row(
                            a, team_scratch, phase, p_first, p_last, barrier, team_size, barriers_passed
                        )
                        if q_first < q_last:
                            begin_phase(
                                a, rows_forward_of(a), phase, t, b=0, rows=1, gate_rows=1, scratch=scratch,
                                is_one_row=True,
                            )  # fmt: skip
                            call(
                                cell_forward_of(a), q_last - q_first, q_first, 0, preacts, saved, table, phase,
                                later_address(a, scratch, 0), shared_address(a, scratch), 0, L,
                                operand_address(a, team_scratch, 0) + q_first * VECTOR, ROW_BLOCK * panels * VECTOR,
                                VECTOR, results_address(a, team_scratch, 0) + q_first * a.products * VECTOR,
                            )  # fmt: skip
            for g_first in range(b_last if is_one_row else b_first, b_last, a.rows_together):
                g_last = min(g_first + a.rows_together, b_last)
                # A cell that takes means needs the products of all units first, and sums over these in one order: so
                # the threads of a team split the units for products, and the rows for cells.
                for phase in range(-1 if a.splits_rows != 0 else 0, a.phases):
                    multiplies, computes = phase < 0 or (phase == 0 and a.splits_rows == 0), phase >= 0
                    r_first, r_last, q_first, q_last = g_first, g_last, p_first, p_last
                    if a.phases > 1 and phase > 0:
                        active = rows_to_last_active(a, t, g_first, g_last - g_first)
                        barriers_passed = multiply_values(
                            a, team_scratch, phase, share(panels_of_h(a), team_thread, team_size),
                            share(panels_of_h(a), team_thread + 1, team_size), active, barrier, team_size,
                            barriers_passed,
                        )  # fmt: skip
                    if not multiplies and a.splits_rows != 0:
                        r_first = g_first + share(g_last - g_first, team_thread, team_size)
                        r_last = g_first + share(g_last - g_first, team_thread + 1, team_size)
                        q_first, q_last = 0, panels if r_first < r_last else 0
                    if computes and a.phases > 1:
                        active = rows_to_last_active(a, t, r_first, r_last - r_first)
                        begin_phase(
                            a, rows_forward_of(a), phase, t, r_first, active, gate_rows=B, scratch=scratch,
                            is_one_row=False,
                        )  # fmt: skip
                        if phase == 0 and a.gates != 0:  # zero for held rows, as `copy_held` zeroes the other panels
                            saved = saved_address(a, B, t, panels, r_first + active)
                            rows, width = r_last - r_first - active if a.gate_panels > panels else 0, a.saved * L
                            call(a.copy_rows, rows, 0, width, saved, 0, saved, width * size)
                    # in serpentine order: the weights read last are still in the L2 cache
                    for j in range(q_first, q_last):
                        p = q_first + q_last - 1 - j if multiplies and (s + a.flip) % 2 != 0 else j
                        preacts = panel_products(a, team_scratch, p) + (r_first - g_first) * a.preacts * VECTOR
                        packed_index = p
                        if multiplies and packs_as_used and p >= a.in_place_panels:
                            packed_index = min(thread, a.packed_panels - 1)
                            pack_ih(a, p, packed_index)
                            if h_in != 0:
                                pack_hh(a, p, packed_index)
                        if not is_on_bf16_unit and multiplies and g_first == b_first:
                            multiply_inputs(a, s, p, b_first, b_last)
                        h_seen = h_in + seen_begin(a, p) * size if h_in != 0 else 0
                        for b in range(r_first, r_last, ROW_BLOCK):
                            rows = min(ROW_BLOCK, r_last - b)
                            active = rows_to_last_active(a, t, b, rows)
                            if multiplies:
                                if p < a.in_place_panels:  # then there are few rows, all of them in this block
                                    preact_in_place(a, p, active, preacts, x, h_seen, h_in_stride)
                                else:
                                    preact(a, s, p, packed_index, b, active, preacts, x, h_seen, h_in_stride)
                            if active < rows and phase == a.phases - 1:
                                copy_held(a, t, p, b + active, rows - active, table)
                            if computes:
                                run_cell(a, t, p, b, active, preacts, scratch, table, phase, team_scratch, b - g_first)
                                if is_on_bf16_unit:
                                    store_row_operands(a, t, p, b, active, scratch, phase, team_scratch, b - g_first)
                            if is_on_bf16_unit and phase == a.phases - 1:
                                if a.h_float32 != 0:
                                    store_output(a, t, p, b, rows, h)
                                if s + 1 < T:
                                    pack_h_operand(a, s + 1, p, b, rows, h + b * h_row + p * VECTOR, h_row, scratch)
                    if not computes:
                        barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
                if g_last < b_last:  # the products of the next rows overwrite these
                    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
            h_prev, h_prev_row = h, h_row
            if is_on_bf16_unit and s + 1 < T:
                pack_x_operand(a, s + 1, x_first, x_last, scratch)
            barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
        if is_on_bf16_unit:
            call(a.release)

        # only this thread writes them
        begin, width = b_first * h_0_row + p_first * L * size, max(0, min(p_last * L, a.h_width) - p_first * L)
        h_last = h_prev + b_first * h_prev_row + p_first * L * size
        call(a.copy_rows, team_b, width, width, h_last, h_prev_row, a.h_n + begin, h_0_row)
        if a.h_float32 == 0:
            zero_held_outputs(a, b_first, b_last, p_first * L, width)
        offset, width = (b_first * H + p_first * L) * size, min(p_last * L, H) - p_first * L
        for k in range(a.inner_states if a.inner_step_stride != 0 and T > 0 else 0):
            last = get_int64(a.inner_records + 8 * (INNER_FIELDS * k + 3)) + offset
            source = entry_address(table, 2 * k + 3, 0, offset)
            call(a.copy_rows, team_b, width, width, source, H * size, last, H * size)

    return forward


forward, forward_matrix = forward_with(vector_forward.PRODUCTS), forward_with(matrix_forward.PRODUCTS)
