"""Products for vectors that the border of two heads crosses: each head's columns are multiplied for its own units. With
weights of zero for the other units, infinity or NaN in one head would reach the others.
"""

from fastlstm.backends.numba.kernels.layout import (
    count_vector_groups,
    dpreact_address,
    first_vector,
    gemm_of,
    head_begin,
    head_end,
    multiply_blocks,
    reach_begin,
    seen_begin,
    seen_count,
)
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR
from fastlstm.backends.numba.llvm.intrinsics import call


def add_product_of_heads(a, p, rows, out, out_row, gates, packed, h, h_row):
    """Add the product of h, or of a value of the step, to vectors of panel p, which has units of several heads: `out`
    (rows, gates, L), `out_row` bytes a row. `h`: the units that the panel sees, `h_row` bytes a row.
    """
    L, D, columns = a.lanes, a.head, seen_count(a, p)
    unit, last = p * L, min((p + 1) * L, a.H)
    while unit < last:
        # units `unit` to `end` are of one head, whose columns begin at column `begin` of those that the panel sees
        begin, end = head_begin(a, unit) - seen_begin(a, p), head_end(a, unit, last)
        for q in range(count_vector_groups(gates)):
            v_first, v_last = first_vector(gates, q), first_vector(gates, q + 1)
            w, w_row = packed + v_first * columns * VECTOR, (v_last - v_first) * VECTOR
            for k in range(begin, begin + D, a.k_block):
                for v in range(v_first, v_last):
                    # one K block of the head's columns, added to the lanes of the head's units
                    call(
                        a.masked, rows, out + v * VECTOR, out_row, w + k * w_row + (v - v_first) * VECTOR, w_row,
                        h + k * a.size, h_row, min(a.k_block, begin + D - k), 1, 0, 0, unit - p * L, end - p * L,
                    )  # fmt: skip
        unit = end


def add_dh_of_head(a, rows, b, s, first_gate, gates, unit, last, w, w_stride, q, kernel, out, lane, lane_last):
    """Add to dh the product of the dpreact of one head, units `unit` to `last`, with its transposed weights.

    Args:
        b, s: the first batch row, and the step.
        first_gate, gates: which terms of dpreact are multiplied.
        q, w: the vector group of columns of h, and its packed weights for these vectors, in rows of `w_stride` bytes.
        kernel: `masked`, which adds to the lanes `lane` to `lane_last` of one vector, or a product for whole vectors.
        out: dh (rows, 4 L) from a vector of vector group q on.
    """
    L, row = a.lanes, 4 * VECTOR
    block = max(1, BLOCK_K // (gates * L))  # panels
    while unit < last:
        p, first_lane = unit // L, unit % L
        panels = min((last - unit) // L, block) if first_lane == 0 else 0
        # The sum runs over all gates and units of `panels` whole panels, whose weights and dpreact follow each other.
        count, outer = gates * L, panels
        dpre_outer, w_outer = a.dpreact_steps * a.B * a.terms * VECTOR, gates * L * w_stride
        end = unit + panels * L
        if panels == 0:  # or over the head's units of one panel, gate by gate
            end = min(unit - first_lane + L, last)
            count, outer, dpre_outer, w_outer = end - unit, gates, VECTOR, L * w_stride
        dpre = dpreact_address(a, p, s, b) + first_gate * VECTOR + first_lane * a.size
        dpre_row = a.terms * VECTOR
        w_panel = w + ((p - reach_begin(a, q)) * gates * L + first_lane) * w_stride
        if kernel == a.masked:
            call(
                kernel, rows, out, row, w_panel, w_stride, dpre, dpre_row, count, outer, dpre_outer, w_outer, lane,
                lane_last,
            )  # fmt: skip
        else:
            multiply_blocks(
                a, kernel, rows, init=out, init_row=row, out=out, out_row=row, w=w_panel, w_row=w_stride, x=dpre,
                x_row=dpre_row, x_column=a.size, columns=count, blocks=outer, x_block=dpre_outer, w_block=w_outer,
            )  # fmt: skip
        unit = end


def back_product_of_heads(a, rows, b, s, first_gate, gates, packed, vectors, q, scratch):
    """Do what `vector_backward.back_product` does, for weights of several heads."""
    L, H, D = a.lanes, a.H, a.head
    first, last = first_vector(vectors, q), first_vector(vectors, q + 1)
    v = first
    w_stride = (4 if last - first == 4 else 3) * VECTOR  # `pack_transposed` gives all smaller groups rows of 3 vectors
    packed += q * a.reach * 4 * VECTOR * gates * L
    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, 4 * VECTOR)
    while v < last:
        column, end, after = v * L, min((v + 1) * L, H), v + 1
        unit, w, out = head_begin(a, column), packed + (v - first) * VECTOR, scratch + (v - first) * VECTOR
        if end <= unit + D:  # all columns are of one head, and those of the next vectors may be too
            while after < last and min((after + 1) * L, H) <= unit + D:
                after += 1
            kernel = gemm_of(a, after - v)
            add_dh_of_head(a, rows, b, s, first_gate, gates, unit, unit + D, w, w_stride, q, kernel, out, 0, L)
        else:
            while unit < end:  # head by head, each in its own lanes
                lane, lane_last = max(unit, column) - column, min(unit + D, end) - column
                add_dh_of_head(
                    a, rows, b, s, first_gate, gates, unit, unit + D, w, w_stride, q, a.masked, out, lane, lane_last
                )
                unit += D
        v = after
