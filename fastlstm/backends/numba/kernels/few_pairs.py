"""Weight gradients summed over few pairs, straight into the rows of the weights' own layout.

Accumulators have to be zeroed, added to and transposed: over few pairs that would be most of the work. The sums are
those of `vector_backward.add_weight_gradients`, in the same order.
"""

from fastlstm.backends.numba.constants import ONE_OFFSET
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    count_vector_groups,
    dpreact_address,
    first_h_preact,
    first_vector,
    gate_offset,
    gemm_of,
    head_begin,
    head_end,
    vectors_of,
)
from fastlstm.backends.numba.kernels.shared import VECTOR
from fastlstm.backends.numba.kernels.weight_gradients import write_vectors
from fastlstm.backends.numba.llvm.intrinsics import call


def write_columns(a, scratch, rows, dpre, dpre_row, packed, weight, column, width):
    """Write `rows` rows of one gate and panel of a weight's gradient (gates H, `width`) at `weight`, from dpreact of
    all pairs and from the packed columns of [x, h] from `column` on.
    """
    size, count, wide = a.size, a.T * a.B, 4 * a.lanes
    for k in range(column // wide * wide, column + width, wide):
        begin = max(k, column)
        out, out_row, valid = weight + (begin - column) * size, width * size, min(k + wide, column + width) - begin
        if valid < wide:  # whole vectors would reach into the next row
            out, out_row = scratch, 4 * VECTOR
        call(
            a.gemm4, rows, a.constants, 0, out, out_row, packed + k // wide * count * 4 * VECTOR,
            4 * VECTOR, dpre, size, dpre_row, count, 1, 0, 0, dpre, 0, 0,
        )  # fmt: skip
        if valid < wide:
            source, target = scratch + (begin - k) * size, weight + (begin - column) * size
            call(a.copy_rows, rows, valid, valid, source, 4 * VECTOR, target, width * size)


def write_weight_gradients(a, packed, scratch, p_first, p_last):
    """Write panels `p_first` to `p_last` of the wanted gradients of weights, biases and params."""
    L, size, I, H, D, count = a.lanes, a.size, a.I, a.H, a.head, a.T * a.B
    h_strips = packed + a.first_h_row * count * size
    for p in range(p_first, p_last):
        valid, dpreact, vectors = min(L, H - p * L), dpreact_address(a, p, 0, 0), vectors_of(a, p, a.preacts)
        dpre_row = vectors * VECTOR
        for gate in range(a.x_preacts if a.dweight_ih != 0 else 0):
            weight = a.dweight_ih + (block_ih(a, gate) * H + p * L) * I * size
            write_columns(a, scratch, valid, dpreact + gate_offset(a, p, gate), dpre_row, packed, weight, 0, I)
        for gate in range(a.h_preacts if a.dweight_hh != 0 else 0):
            row, unit, source = block_hh(a, gate) * H, p * L, dpreact + gate_offset(a, p, first_h_preact(a) + gate)
            while unit < p * L + valid:  # of one head
                end, weight = head_end(a, unit, p * L + valid), a.dweight_hh + (row + unit) * D * size
                dpre = source + (unit - p * L) * size
                write_columns(a, scratch, end - unit, dpre, dpre_row, h_strips, weight, head_begin(a, unit), D)
                unit = end
        if a.dbias_ih != 0 or a.dbias_hh != 0:
            for q in range(count_vector_groups(vectors)):
                v = first_vector(vectors, q)
                call(
                    gemm_of(a, first_vector(vectors, q + 1) - v), 1, a.constants, 0, scratch + v * VECTOR, 0,
                    dpreact + v * VECTOR, dpre_row, a.constants + ONE_OFFSET, 0, 0, count, 1, 0, 0, dpreact, 0, 0,
                )  # fmt: skip
        write_vectors(a, p, scratch)
