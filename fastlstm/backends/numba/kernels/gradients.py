"""What the backward pass's products have in common: sums of weight gradients and where they go."""

from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    columns_of_h,
    first_h_preact,
    gate_at,
    head_begin,
    head_end,
    seen_from,
)
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, jit
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@jit
def accumulator_bytes(a):
    """Bytes of a row of the sums over rows and steps: a vector for each sum of x, or of h. The row of ones, the last,
    goes on with the others and with the params' terms.
    """
    return max(a.of_x, a.of_h, 1) * VECTOR


@jit
def accumulator_address(a, half, p):
    """Where the sum of panel p over half of the batch rows lies."""
    return a.dweights + (half * a.panels + p) * a.sum_rows * accumulator_bytes(a)


@jit
def unpack_weight(a, scratch, of_sums, width, units, weight):
    """Sums (width, gates, lanes) of one gate to its rows of a weight's gradient."""
    L, row = a.lanes, accumulator_bytes(a)
    for k in range(0, width, L):
        columns, source = min(L, width - k), of_sums + k * row
        if a.is_narrow != 0:
            call(a.transpose, columns, units, source, row, scratch, VECTOR)
            call(a.narrow, units, columns, scratch, VECTOR, weight + k * 2, width * 2)
        else:
            call(a.transpose, columns, units, source, row, weight + k * a.size, width * a.size)


@jit
def write_vectors(a, p, ones):
    """Panel p of the gradients of the biases and params, those that are wanted, from the sums of all terms."""
    S, unit = a.size, p * a.lanes
    valid = min(a.lanes, a.H - unit)
    for k in range(a.of_x if a.dbias_ih != 0 else 0):
        to = a.dbias_ih + (block_ih(a, k) * a.H + unit) * S
        call(a.copy_rows, 1, valid, valid, ones + gate_at(a, p, k), 0, to, 0)
    for k in range(a.of_h if a.dbias_hh != 0 else 0):
        to = a.dbias_hh + (block_hh(a, k) * a.H + unit) * S
        call(a.copy_rows, 1, valid, valid, ones + gate_at(a, p, first_h_preact(a) + k), 0, to, 0)
    for k in range(a.params):
        dparam = get_int64(a.dparams_at + 8 * k)
        if dparam != 0:
            call(a.copy_rows, 1, valid, valid, ones + gate_at(a, p, a.sums + k), 0, dparam + unit * S, 0)


@jit
def unpack_weight_gradients(a, scratch, p_first, p_last):
    """Panels of dweights to the gradients of weights, biases and params, those that are wanted."""
    L, I, H, D, columns = a.lanes, a.I, a.H, a.head, columns_of_h(a)
    wide, row_of = element_bytes(a), accumulator_bytes(a)
    for p in range(p_first, p_last):
        sums, valid = accumulator_address(a, 0, p), min(L, H - p * L)
        if a.halves == 2:  # with what narrower rows leave unused
            call(a.add_rows, 1, a.sum_rows * accumulator_bytes(a) // a.size, accumulator_address(a, 1, p), 0, sums, 0)
        for gate in range(a.of_x if a.dweight_ih != 0 else 0):
            row = block_ih(a, gate) * H + p * L
            unpack_weight(a, scratch, sums + gate_at(a, p, gate), I, valid, a.dweight_ih + row * I * wide)
        of_h = sums + a.sums_of_h * accumulator_bytes(a)
        for gate in range(a.of_h if a.dweight_hh != 0 else 0):
            row, unit, source = block_hh(a, gate) * H, p * L, of_h + gate_at(a, p, gate)
            while unit < p * L + valid:  # of one head
                end = head_end(a, unit, p * L + valid)
                at = source + (unit - p * L) * a.size + (head_begin(a, unit) - seen_from(a, p)) * row_of
                unpack_weight(a, scratch, at, D, end - unit, a.dweight_hh + (row + unit) * D * wide)
                unit = end
        write_vectors(a, p, sums + (a.sum_of_one - columns + min(a.span, columns)) * row_of)
