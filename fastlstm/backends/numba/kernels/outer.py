"""Weight gradients summed over few rows, straight into the rows of the weights' own layout.

A sum in the tile's layout has to be zeroed, added to and transposed: over few rows that is all there is to do. The sums
are those of `vector_backward.add_weight_gradients`, in the same order.
"""

from fastlstm.backends.numba.constants import ONE_OFFSET
from fastlstm.backends.numba.kernels.gradients import write_vectors
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    count_vector_groups,
    dpreact_of,
    first_h_preact,
    first_vector,
    gate_at,
    head_begin,
    head_end,
    product_of,
    terms_of,
    vectors_of,
)
from fastlstm.backends.numba.kernels.shared import VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def write_columns(a, scratch, rows, dpre, dpre_row, packed, weight, column, width):
    """One gate and panel's `rows` rows of the (gates H, `width`) gradient at `weight`, from dpreact of all steps and
    the packed columns from `column` on.
    """
    S, count, wide = a.size, a.T * a.B, 4 * a.lanes
    for k in range(column // wide * wide, column + width, wide):
        begin = max(k, column)
        out, out_row, valid = weight + (begin - column) * S, width * S, min(k + wide, column + width) - begin
        if valid < wide:  # whole vectors would reach into the next row
            out, out_row = scratch, 4 * VECTOR
        call(
            a.product4, rows, a.constants, 0, out, out_row, packed + k // wide * count * 4 * VECTOR,
            4 * VECTOR, dpre, S, dpre_row, count, 1, 0, 0, dpre, 0, 0,
        )  # fmt: skip
        if valid < wide:
            source, to = scratch + (begin - k) * S, weight + (begin - column) * S
            call(a.copy_rows, rows, valid, valid, source, 4 * VECTOR, to, width * S)


@jit
def write_weight_gradients(a, packed, scratch, p_first, p_last):
    """Panels `p_first` to `p_last` of the gradients of weights, biases and params, those that are wanted."""
    L, S, I, H, D, count = a.lanes, a.size, a.I, a.H, a.head, a.T * a.B
    of_h = packed + a.sums_of_h * count * S
    for p in range(p_first, p_last):
        valid, dpreact, vectors = min(L, H - p * L), dpreact_of(a, p, 0, 0), vectors_of(a, p, terms_of(a))
        wide = vectors * VECTOR
        for gate in range(a.of_x if a.dweight_ih != 0 else 0):
            weight = a.dweight_ih + (block_ih(a, gate) * H + p * L) * I * S
            write_columns(a, scratch, valid, dpreact + gate_at(a, p, gate), wide, packed, weight, 0, I)
        for gate in range(a.of_h if a.dweight_hh != 0 else 0):
            row, unit, source = block_hh(a, gate) * H, p * L, dpreact + gate_at(a, p, first_h_preact(a) + gate)
            while unit < p * L + valid:  # of one head
                end, weight = head_end(a, unit, p * L + valid), a.dweight_hh + (row + unit) * D * S
                dpre = source + (unit - p * L) * S
                write_columns(a, scratch, end - unit, dpre, wide, of_h, weight, head_begin(a, unit), D)
                unit = end
        if a.dbias_ih != 0 or a.dbias_hh != 0 or a.params != 0:
            for q in range(count_vector_groups(vectors)):
                v = first_vector(vectors, q)
                call(
                    product_of(a, first_vector(vectors, q + 1) - v), 1, a.constants, 0, scratch + v * VECTOR, 0,
                    dpreact + v * VECTOR, wide, a.constants + ONE_OFFSET, 0, 0, count, 1, 0, 0, dpreact, 0, 0,
                )  # fmt: skip
            write_vectors(a, p, scratch)
