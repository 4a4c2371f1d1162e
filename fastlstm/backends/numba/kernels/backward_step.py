"""One step of the backward pass: the cell, for a panel of units and some rows."""

from fastlstm.backends.numba.constants import ROW_BLOCK
from fastlstm.backends.numba.fields import BACKWARD_OPERAND, BACKWARD_STATE, names
from fastlstm.backends.numba.kernels.layout import count_vector_groups, lanes_inside, param_sums_address, saved_address
from fastlstm.backends.numba.kernels.row_masks import any_held, any_reset, is_held, rows_to_last_active
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, inlined, read_rows
from fastlstm.backends.numba.kernels.states import (
    INNER_FIELDS_BACKWARD,
    OPERAND_FIELDS_BACKWARD,
    dh_entry,
    dinputs_address,
    entry_stride,
    later_address,
    redirect_to_scratch,
    scratch_slot,
    set_entry,
    shared_address,
)
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64

# places of fields in the record of an inner state, and in that of an input
D_SEQUENCE, D_STEP_STRIDE, D_ROW_STRIDE, D_LAST, D_LAST_ROW_STRIDE, D_INITIAL = (
    names(BACKWARD_STATE).index(f"d_{of}")
    for of in ("sequence", "sequence_step_stride", "sequence_row_stride", "last", "last_row_stride", "initial")
)
D_OPERAND = names(BACKWARD_OPERAND).index("d_operand")


def carried_address(a, k, p, b):
    """Return the address of the carried gradient of inner state k, then of h if carried, then of dh of held rows."""
    return a.carried + ((k * a.panels + p) * a.B + b) * VECTOR


def inner_field(a, k, n):
    return get_int64(a.inner_records + 8 * (INNER_FIELDS_BACKWARD * k + n))


@inlined
def run_cell(a, p, t, b, rows, scratch, table, dh, dpre, phase, transposed):
    """Run a phase of the backward cell. `dh`: from the step after; `dpre`: dpreact; `transposed`: products."""
    L, H, panel_offset, pointers, panels = a.lanes, a.H, p * VECTOR, table, a.panels
    valid, is_last, corrects = min(L, H - p * L), phase == a.phases - 1, a.reverse != 0 and a.lengths != 0
    has_reset, has_held, is_full = any_reset(a, t, b, rows), any_held(a, t, b, rows), (p + 1) * L <= min(H, a.h_width)
    for k in range(a.inner_states):
        if inner_field(a, k, D_SEQUENCE) != 0 and phase == 0:
            d_row = inner_field(a, k, D_ROW_STRIDE)
            d = inner_field(a, k, D_SEQUENCE) + t * inner_field(a, k, D_STEP_STRIDE) + b * d_row + panel_offset
            call(a.add_rows, rows, valid, d, d_row, carried_address(a, k, p, b), VECTOR)
    if not is_full or has_reset or a.is_bfloat16 != 0 or (corrects and a.read_bits & 1 != 0):
        pointers, k = table + a.table_bytes, dh_entry(a)
        is_first = t == (a.T - 1 if a.reverse != 0 else 0)  # h_0 is never bfloat16
        narrow_from = 2 if a.is_bfloat16 == 0 else 1 if is_first else 0
        redirect_to_scratch(
            a, table, pointers, p, t, b, rows, scratch, writes=False, corrects=corrects, narrow_from=narrow_from
        )
        dh_row, dh_copy = entry_stride(table, k), scratch_slot(a, scratch, k)
        dh_out = get_int64(table + 16 * k) + b * dh_row + p * L * element_bytes(a)
        read_rows(a, a.is_bfloat16, rows, lanes_inside(a, p, a.h_width), L, dh_out, dh_row, dh_copy, VECTOR)
        set_entry(pointers, k, dh_copy - b * VECTOR - panel_offset, VECTOR)
    # a held row passes the gradients of its states on unchanged: its dpreact is zero, and its own dh is ignored
    if has_held and is_last:
        held_dh = carried_address(a, a.inner_states + a.carries_h, p, b)
        call(a.copy_rows, rows, valid, L, dh, 4 * VECTOR, held_dh, VECTOR)
    dinputs, state_bytes, gates = dinputs_address(a, scratch), panels * a.B * VECTOR, a.terms
    active = rows_to_last_active(a, t, b, rows)
    # one by one, if there is a held row among them: its padding may be NaN, and must add nothing
    together = 1 if any_held(a, t, b, active) else max(active, 1)
    for r in range(0, active, together):
        if together == 1 and is_held(a, t, b + r):
            continue
        saved, carried = saved_address(a, a.gate_rows, t, p, b + r), carried_address(a, 0, p, b + r)
        if a.phases == 1:
            call(
                a.cell_backward, together, b + r, panel_offset, valid, dh + r * 4 * VECTOR, saved,
                dpre + r * gates * VECTOR, param_sums_address(a, p, b + r), -a.group_rows, a.group_stride,
                dinputs + r * a.inputs * VECTOR, carried, state_bytes, pointers,
            )  # fmt: skip
        else:
            later, shared_row = later_address(a, scratch, p) + r * a.later_values * VECTOR, a.shared_values * VECTOR
            shared, saved_panel = shared_address(a, scratch) + r * shared_row, a.gate_rows * a.saved * VECTOR
            call(
                a.cell_backward, together, b + r, panel_offset, valid, dh + r * 4 * VECTOR, saved,
                dpre + r * gates * VECTOR, param_sums_address(a, p, b + r), -a.group_rows, a.group_stride,
                dinputs + r * a.inputs * VECTOR, carried, state_bytes, pointers, phase,
                later, shared, shared_row, saved_panel, transposed + r * 4 * VECTOR,
                ROW_BLOCK * count_vector_groups(panels) * 4 * VECTOR,
            )  # fmt: skip
    if has_held:
        for r in range(rows):
            if is_held(a, t, b + r):
                call(a.copy_rows, 1, 0, gates * L, a.constants, 0, dpre + r * gates * VECTOR, 0)
                call(a.copy_rows, 1, 0, a.inputs * L, a.constants, 0, dinputs + r * a.inputs * VECTOR, 0)
    for k in range(a.inputs if is_last else 0):
        target = get_int64(a.operand_records + 8 * (OPERAND_FIELDS_BACKWARD * k + D_OPERAND))
        if target != 0:
            target += ((t * a.rows + b) * H + p * L) * a.size
            call(a.copy_rows, rows, valid, valid, dinputs + k * VECTOR, a.inputs * VECTOR, target, H * a.size)
