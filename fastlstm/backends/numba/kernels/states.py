"""Where the cell finds the states, its inputs and its params at a step, see `llvm.cells` for the order: a table of
addresses and row strides, and a second one in which some entries point to copies in scratch.
"""

from fastlstm.backends.numba.constants import ROW_BLOCK
from fastlstm.backends.numba.fields import BACKWARD_OPERAND, BACKWARD_STATE, FORWARD_OPERAND, FORWARD_STATE, names
from fastlstm.backends.numba.kernels.layout import lanes_inside, saved_address
from fastlstm.backends.numba.kernels.row_masks import correct_states, length_of, zero_reset
from fastlstm.backends.numba.kernels.shared import VECTOR, inlined, read_rows
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64, set_int64

# how many fields the record of an inner state has, and that of an input or param
INNER_FIELDS, INNER_FIELDS_BACKWARD = len(names(FORWARD_STATE)), len(names(BACKWARD_STATE))
OPERAND_FIELDS, OPERAND_FIELDS_BACKWARD = len(names(FORWARD_OPERAND)), len(names(BACKWARD_OPERAND))


def set_entry(table, k, address, row):
    set_int64(table + 16 * k, address)
    set_int64(table + 16 * k + 8, row)


def width_of(a, k):
    """Return the number of units in a row of entry k of a pointer table. The first two are h."""
    return a.h_width if k < 2 else a.H


def entry_address(table, k, b, panel_offset):
    """Return the address of row b of entry k, from byte `panel_offset` of the row on."""
    return get_int64(table + 16 * k) + b * get_int64(table + 16 * k + 8) + panel_offset


def entry_stride(table, k):
    return get_int64(table + 16 * k + 8)


@inlined
def enter_step(a, table, s, t, h_prev, h_prev_row, h, h_row, count, is_one_row):
    """Fill the pointer table of step s, t in x: states before and after it, then inputs and params. A state's record
    has `count` fields. If there `is_one_row` alone, its vectors of units stand as rows.
    """
    t_prev, row_stride = t + 1 if a.reverse != 0 else t - 1, a.H * a.size
    set_entry(table, 0, h_prev, VECTOR if is_one_row else h_prev_row)
    set_entry(table, 1, h, VECTOR if is_one_row else h_row)
    for k in range(a.inner_states):
        record = a.inner_records + 8 * count * k
        sequence = get_int64(record + 16)
        before, before_stride = sequence + t_prev * a.inner_step_stride, row_stride
        if s == 0:
            before, before_stride = get_int64(record), get_int64(record + 8)
        set_entry(table, 2 * k + 2, before, VECTOR if is_one_row else before_stride)
        set_entry(table, 2 * k + 3, sequence + t * a.inner_step_stride, VECTOR if is_one_row else row_stride)
    operand_count = OPERAND_FIELDS_BACKWARD if count == INNER_FIELDS_BACKWARD else OPERAND_FIELDS
    for k in range(a.operands):
        record = a.operand_records + 8 * operand_count * k
        value, value_row = get_int64(record) + t * get_int64(record + 8), get_int64(record + 16)
        set_entry(table, 2 * a.inner_states + 2 + k, value, VECTOR if is_one_row else value_row)


def dh_entry(a):
    """Return the entry of dh from outside, in the backward pass alone: the last one."""
    return 2 * a.inner_states + 2 + a.operands


def scratch_slot(a, scratch, n):
    """Return the address of scratch slot n, (ROW_BLOCK, lanes): first those of a table's entries, then others."""
    return scratch + ROW_BLOCK * (a.product_vectors + n) * VECTOR


def panel_products(a, scratch, p):
    """Return the address of the products of panel or vector group p, which all panels share with one phase."""
    return scratch + p * a.panel_bytes


def later_address(a, scratch, p):
    """Return the address of the values of panel p that later phases of the cell read."""
    return scratch_slot(a, scratch, a.later_slot + p * a.later_values)


def shared_address(a, scratch):
    """Return the address of the values that a row's units share, and of the sums of means, after all panels' values."""
    return later_address(a, scratch, a.panels)


def begin_phase(a, kernel, phase, t, b, rows, gate_rows, scratch, is_one_row):
    """Compute what all units of a row or of a head share in a phase, from the phase before; nothing without means."""
    row_stride, panel_bytes = (0, 0) if is_one_row else (a.shared_values * VECTOR, ROW_BLOCK * a.later_values * VECTOR)
    if a.splits_rows != 0:
        call(
            kernel, rows, phase, a.H, shared_address(a, scratch), row_stride,
            saved_address(a, gate_rows, t, a.panels, b), later_address(a, scratch, 0), panel_bytes, a.head,
        )  # fmt: skip


def dinputs_address(a, scratch):
    """Return the address where the cell stores the gradients of the inputs (rows, Q, lanes)."""
    return scratch_slot(a, scratch, dh_entry(a) + 1)


def dpreact_slot(a, scratch):
    """Return the address where the cell stores dpreact, if it is copied to another layout."""
    return scratch_slot(a, scratch, dh_entry(a) + 1 + a.inputs)


def redirect_to_scratch(a, table, pointers, p, t, b, rows, scratch, writes, corrects, narrow_from):
    """Fill the second pointer table for panel p: what the cell reads is copied to whole vectors, zero after a reset. If
    it `writes`, new states of a panel that is not full go there too. `corrects`: see `correct_states`. `narrow_from`:
    the first of the two entries of h that is bfloat16.
    """
    L, panel_offset, states = a.lanes, p * VECTOR, 2 * a.inner_states + 2
    for k in range(states + a.operands):
        valid = lanes_inside(a, p, width_of(a, k))
        is_old, is_read, slot = k < states and k % 2 == 0, (a.read_bits >> k) & 1 != 0, scratch_slot(a, scratch, k)
        narrow = narrow_from <= k < 2
        if is_read and (is_old or valid < L or narrow):
            offset = p * L * 2 if narrow else panel_offset
            source, source_row = entry_address(table, k, b, offset), entry_stride(table, k)
            read_rows(a, narrow, rows, valid, L, source, source_row, slot, VECTOR)
            if k == 0 and corrects:
                correct_states(a, t, b, rows, p * L, valid, slot, VECTOR)
            elif is_old:
                zero_reset(a, t, b, rows, L, slot, VECTOR)
        if (is_read and (is_old or narrow)) or (valid < L and (is_read or (writes and not is_old))):
            set_entry(pointers, k, slot - b * VECTOR - panel_offset, VECTOR)
        else:
            set_entry(pointers, k, get_int64(table + 16 * k), entry_stride(table, k))


def copy_held(a, t, p, b, rows, table):
    """Copy one panel's states of held rows to the next step, and zero their saved gates, which a run returns."""
    L, panel_offset = a.lanes, p * VECTOR
    for k in range(0, 2 * a.inner_states + 2, 2):
        width = lanes_inside(a, p, width_of(a, k))
        old, new = entry_address(table, k, b, panel_offset), entry_address(table, k + 1, b, panel_offset)
        call(a.copy_rows, rows, width, width, old, entry_stride(table, k), new, entry_stride(table, k + 1))
    if a.gates != 0:
        saved = saved_address(a, a.B, t, p, b)
        call(a.copy_rows, rows, 0, a.saved * L, a.constants, 0, saved, a.saved * VECTOR)


def zero_held_outputs(a, b_first, b_last, unit, width):
    """Zero h of the held steps of these rows, to which states were copied, for `width` units from `unit` on."""
    for b in range(b_first, b_last if a.lengths != 0 else b_first):
        length = length_of(a, b)
        h = a.h + length * a.h_step_stride + b * a.h_row_stride + unit * a.size
        call(a.copy_rows, a.T - length, 0, width, h, 0, h, a.h_step_stride)
