"""Where a step's cells find the states, the cell's inputs and its params: see `llvm.cells` for the tables.

A table has an address and a row's bytes for each value. Beside it is room for another, of which some values lie aside.
"""

from fastlstm.backends.numba.constants import ROW_BLOCK
from fastlstm.backends.numba.kernels.ends import correct_states, zero_reset
from fastlstm.backends.numba.kernels.layout import panel_saved
from fastlstm.backends.numba.kernels.shared import VECTOR, inlined, jit
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64, set_int64

OTHER, OTHER_BACK = 4, 9  # numbers that are told of each state but the first, see `arguments`
VALUE, VALUE_BACK = 3, 4  # and of each input and param


@jit
def set_entry(table, k, address, row):
    """Entry k of a table."""
    set_int64(table + 16 * k, address)
    set_int64(table + 16 * k + 8, row)


@jit
def row_at(table, k, b, panel_offset):
    """Where row b of entry k lies, from bytes `panel_offset` of a row on."""
    return get_int64(table + 16 * k) + b * get_int64(table + 16 * k + 8) + panel_offset


@jit
def row_of(table, k):
    return get_int64(table + 16 * k + 8)


@inlined
def enter_step(a, table, s, t, h_prev, h_prev_row, h, h_row, count, is_one_row):
    """The values of step s, which is that of x at t: states before and after it, then inputs and params. `count`: the
    numbers that are told of a state. A `is_one_row` row has its vectors of units as rows.
    """
    t_prev, row = t + 1 if a.reverse != 0 else t - 1, a.H * a.size
    set_entry(table, 0, h_prev, VECTOR if is_one_row else h_prev_row)
    set_entry(table, 1, h, VECTOR if is_one_row else h_row)
    for k in range(a.others):
        at = a.others_at + 8 * count * k
        steps = get_int64(at + 16)
        old, old_row = steps + t_prev * a.c_step, row
        if s == 0:
            old, old_row = get_int64(at), get_int64(at + 8)
        set_entry(table, 2 * k + 2, old, VECTOR if is_one_row else old_row)
        set_entry(table, 2 * k + 3, steps + t * a.c_step, VECTOR if is_one_row else row)
    inner_field = VALUE_BACK if count == OTHER_BACK else VALUE
    for k in range(a.values):
        at = a.values_at + 8 * inner_field * k
        value, value_row = get_int64(at) + t * get_int64(at + 8), get_int64(at + 16)
        set_entry(table, 2 * a.others + 2 + k, value, VECTOR if is_one_row else value_row)


@jit
def dh_entry(a):
    """The entry, of the backward pass alone, that dh from outside has: behind all others."""
    return 2 * a.others + 2 + a.values


@jit
def scratch_slot(a, scratch, n):
    """Where values lie aside, (CHUNK, lanes) for each n: the entries of a table, then what else a kernel wants."""
    return scratch + ROW_BLOCK * (a.wide + n) * VECTOR


@jit
def panel_sums(a, scratch, p):
    """Where the sums of panel p lie, or the gradients of group p: of all panels, where a cell takes means."""
    return scratch + p * a.panel_bytes


@jit
def later_aside(a, scratch, p):
    """Where the values of panel p lie that a phase of the cell keeps for later ones."""
    return scratch_slot(a, scratch, a.later_slot + p * a.later_values)


@jit
def shared_aside(a, scratch):
    """Where what is the same for all units of a row lies, and the sums that means are made of."""
    return scratch_slot(a, scratch, a.shared_slot)


@jit
def begin_phase(a, kernel, phase, t, b, rows, rows_of_gates, scratch, is_one_row):
    """Compute what all units of a row or of a head share in a phase, from what the phase before has left, for `rows`
    rows from `b` on. A `is_one_row` row has its vectors of units as rows.
    """
    row_stride, panel_bytes = (0, 0) if is_one_row else (a.shared_values * VECTOR, ROW_BLOCK * a.later_values * VECTOR)
    call(
        kernel, rows, phase, a.H, shared_aside(a, scratch), row_stride, panel_saved(a, rows_of_gates, t, a.panels, b),
        later_aside(a, scratch, 0), panel_bytes, a.head,
    )  # fmt: skip


@jit
def held_aside(a, scratch, k):
    """Where the gradients of the k-th state but the first lie that held rows hand on."""
    return scratch_slot(a, scratch, dh_entry(a) + 1 + k)


@jit
def dinputs_aside(a, scratch):
    """Where the cells' backward pass leaves the gradients of the inputs (rows, Q, lanes)."""
    return held_aside(a, scratch, a.others)


@jit
def terms_aside(a, scratch):
    """Where it leaves dpreact, if it is to be laid out."""
    return held_aside(a, scratch, a.others + a.inputs)


@jit
def redirect_to_scratch(a, table, pointers, p, t, b, rows, scratch, writes, corrects):
    """As `table`, but with memory for whole vectors, for `rows` rows from `b` on of panel p: what the cells read is
    copied there, and states before the step are zero where it resets. Where it `writes`, new states go there if the
    panel is not full. `corrects`: the first state is not what the step saw, see `correct_states`.
    """
    L, panel_offset, states = a.lanes, p * VECTOR, 2 * a.others + 2
    valid = min(L, a.H - p * L)
    for k in range(states + a.values):
        is_old, is_read, aside = k < states and k % 2 == 0, (a.reads >> k) & 1 != 0, scratch_slot(a, scratch, k)
        if is_read and (is_old or valid < L):
            call(a.copy_rows, rows, valid, L, row_at(table, k, b, panel_offset), row_of(table, k), aside, VECTOR)
            if k == 0 and corrects:
                correct_states(a, t, b, rows, p * L, valid, aside, VECTOR)
            elif is_old:
                zero_reset(a, t, b, rows, L, aside, VECTOR)
        if (is_read and is_old) or (valid < L and (is_read or (writes and not is_old))):
            set_entry(pointers, k, aside - b * VECTOR - panel_offset, VECTOR)
        else:
            set_entry(pointers, k, get_int64(table + 16 * k), row_of(table, k))
