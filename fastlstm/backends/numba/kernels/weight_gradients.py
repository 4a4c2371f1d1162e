"""The accumulators of the weight gradients, and how they become gradients."""

from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    columns_of_h,
    count_row_groups,
    first_h_preact,
    gate_offset,
    head_begin,
    head_end,
    param_sums_address,
    seen_begin,
)
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


def accumulator_row_bytes(a):
    """Return the bytes of an accumulator row: one vector for each term of x, of h or of a value, whichever are more.
    The sums of the ones have terms for all pre-activations, and may take several rows.
    """
    return max(a.x_preacts, a.h_preacts, a.group_size, 1) * VECTOR


def accumulator_address(a, k_set, p):
    """Return the address of the accumulators of panel p in one split-K set."""
    return a.dweights + (k_set * a.panels + p) * a.accumulator_rows * accumulator_row_bytes(a)


def unpack_weight(a, scratch, accumulators, width, units, weight):
    """Transpose accumulators (width, gates, lanes) of one gate into its rows of a weight's gradient."""
    L, row_stride = a.lanes, accumulator_row_bytes(a)
    for k in range(0, width, L):
        column_count, source = min(L, width - k), accumulators + k * row_stride
        if a.is_bfloat16 != 0:
            call(a.transpose, column_count, units, source, row_stride, scratch, VECTOR)
            call(a.narrow, units, column_count, scratch, VECTOR, weight + k * 2, width * 2)
        else:
            call(a.transpose, column_count, units, source, row_stride, weight + k * a.size, width * a.size)


def unpack_weight_of_heads(a, scratch, p, accumulators, first_column, units, D, weight):
    """Transpose accumulators (columns, gates, lanes) of one gate and panel p into rows of a weight's gradient, of
    `units` in all, which have the D columns of their own head. The accumulators begin at column `first_column`.
    """
    unit, last = p * a.lanes, min((p + 1) * a.lanes, units)
    while unit < last:  # of one head
        end, row = head_end(a, unit, last), head_begin(a, unit) - first_column
        source = accumulators + (unit - p * a.lanes) * a.size + row * accumulator_row_bytes(a)
        unpack_weight(a, scratch, source, D, end - unit, weight + unit * D * element_bytes(a))
        unit = end


def write_vectors(a, p, ones):
    """Write panel p of the wanted gradients of biases and params: biases from `ones`, the accumulators of the ones."""
    size, unit = a.size, p * a.lanes
    valid = min(a.lanes, a.H - unit)
    for k in range(a.x_preacts if a.dbias_ih != 0 else 0):
        target = a.dbias_ih + (block_ih(a, k) * a.H + unit) * size
        call(a.copy_rows, 1, valid, valid, ones + gate_offset(a, p, k), 0, target, 0)
    for k in range(a.h_preacts if a.dbias_hh != 0 else 0):
        target = a.dbias_hh + (block_hh(a, k) * a.H + unit) * size
        call(a.copy_rows, 1, valid, valid, ones + gate_offset(a, p, first_h_preact(a) + k), 0, target, 0)
    total, stride = param_sums_address(a, p, 0), a.panels * a.params * VECTOR
    if a.params != 0:
        call(a.add_rows, count_row_groups(a) - 1, a.params * a.lanes, total + stride, stride, total, 0)
    for k in range(a.params):
        dparam = get_int64(a.dparam_addresses + 8 * k)
        if dparam != 0:
            call(a.copy_rows, 1, valid, valid, total + k * VECTOR, 0, dparam + unit * size, 0)


def unpack_weight_gradients(a, scratch, p_first, p_last):
    """Write the wanted gradients of weights, biases and params of panels `p_first` to `p_last` from accumulators."""
    L, I, H, h_columns = a.lanes, a.I, a.H, columns_of_h(a)
    D = h_columns if a.heads == 1 else a.head  # the number of columns of weight_hh
    element, row_stride = element_bytes(a), accumulator_row_bytes(a)
    for p in range(p_first, p_last):
        accumulators, valid = accumulator_address(a, 0, p), min(L, H - p * L)
        if a.split_k == 2:  # the unused ends of narrower rows are added too
            width = a.accumulator_rows * accumulator_row_bytes(a) // a.size
            call(a.add_rows, 1, width, accumulator_address(a, 1, p), 0, accumulators, 0)
        for gate in range(a.x_preacts if a.dweight_ih != 0 else 0):
            source, row = accumulators + gate_offset(a, p, gate), block_ih(a, gate) * H + p * L
            unpack_weight(a, scratch, source, I, valid, a.dweight_ih + row * I * element)
        h_accumulators = accumulators + a.first_h_row * accumulator_row_bytes(a)
        for gate in range(a.h_preacts if a.dweight_hh != 0 else 0):
            source, target = (
                h_accumulators + gate_offset(a, p, gate),
                a.dweight_hh + block_hh(a, gate) * H * D * element,
            )
            unpack_weight_of_heads(a, scratch, p, source, seen_begin(a, p), H, D, target)
        write_vectors(a, p, accumulators + (a.ones_row - h_columns + min(a.span, h_columns)) * row_stride)
