"""Products of units of several heads in one vector: each head's columns are multiplied for its own units alone.

Weights of zero for the other units would give the same sums of finite numbers. But infinity or NaN in one head would
then reach the others. Only vectors that the border of two heads crosses come here.
"""

from fastlstm.backends.numba.kernels.layout import (
    count_vector_groups,
    dpreact_of,
    first_h_preact,
    first_vector,
    head_begin,
    head_end,
    product_of,
    seen_by,
    seen_from,
    summed_from,
    terms_of,
)
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def add_heads(a, p, rows, out, w_hh, h, h_row):
    """Add the product of h to preact of panel p, which has units of several heads. w_hh: the panel's packed weights; h:
    the columns that the panel sees.
    """
    L, D, sums, wide, columns = a.lanes, a.head, out + first_h_preact(a) * VECTOR, a.sums * VECTOR, seen_by(a, p)
    unit, last = p * L, min((p + 1) * L, a.H)
    while unit < last:
        begin, end = head_begin(a, unit) - seen_from(a, p), head_end(a, unit, last)
        for q in range(count_vector_groups(a.of_h)):
            v_first, v_last = first_vector(a.of_h, q), first_vector(a.of_h, q + 1)
            w, w_row = w_hh + v_first * columns * VECTOR, (v_last - v_first) * VECTOR
            for k in range(begin, begin + D, a.block):
                for v in range(v_first, v_last):
                    call(
                        a.masked, rows, sums + v * VECTOR, wide, w + k * w_row + (v - v_first) * VECTOR, w_row,
                        h + k * a.size, h_row, min(a.block, begin + D - k), 1, 0, 0, unit - p * L, end - p * L,
                    )  # fmt: skip
        unit = end


@jit
def add_head(a, rows, b, s, unit, last, w, wide, vectors, q, kernel, out, lane, lane_last):
    """Add to dh the product of the dpreact of one head, units `unit` to `last`, with its transposed weights.

    `out` is dh (rows, 4 vectors) from a vector of column group q on. The kernel `masked` adds to the lanes `lane` to
    `lane_last` of this vector, and a product to whole vectors. `w` is where the group's packed weights begin for these
    vectors; their rows have `wide` bytes.
    """
    L, gates, row = a.lanes, a.of_h, 4 * VECTOR
    block = max(1, BLOCK_K // (gates * L))  # panels
    while unit < last:
        p, at = unit // L, unit % L
        panels = min((last - unit) // L, block) if at == 0 else 0
        # all units of whole panels, or of one panel those of the head
        count, outer, dpre_outer, w_outer = gates * L, panels, a.kept * a.B * terms_of(a) * VECTOR, gates * L * wide
        end = unit + panels * L
        if panels == 0:
            end = min(unit - at + L, last)
            count, outer, dpre_outer, w_outer = end - unit, gates, VECTOR, L * wide
        dpre, dpre_row = dpreact_of(a, p, s, b) + first_h_preact(a) * VECTOR + at * a.size, terms_of(a) * VECTOR
        of_panel = w + ((p - summed_from(a, q)) * gates * L + at) * wide
        if kernel == a.masked:
            call(
                kernel, rows, out, row, of_panel, wide, dpre, dpre_row, count, outer, dpre_outer, w_outer, lane,
                lane_last,
            )  # fmt: skip
        else:
            call(
                kernel, rows, out, row, out, row, of_panel, wide, dpre, dpre_row, a.size, count, outer, dpre_outer,
                w_outer, dpre, 0, 0,
            )  # fmt: skip
        unit = end


@jit
def back_product_of_heads(a, rows, b, s, packed, vectors, q, scratch):
    """`vector_backward.back_product` of a layer of heads."""
    L, H, D, first, v, last = (
        a.lanes,
        a.H,
        a.head,
        first_vector(vectors, q),
        first_vector(vectors, q),
        first_vector(vectors, q + 1),
    )
    wide = (4 if last - first == 4 else 3) * VECTOR
    packed += q * a.reach * 4 * VECTOR * a.of_h * L
    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, 4 * VECTOR)
    while v < last:
        column, end, after = v * L, min((v + 1) * L, H), v + 1
        unit, w, out = head_begin(a, column), packed + (v - first) * VECTOR, scratch + (v - first) * VECTOR
        if end <= unit + D:  # of one head, as the next vectors may be
            while after < last and min((after + 1) * L, H) <= unit + D:
                after += 1
            kernel = product_of(a, after - v)
            add_head(a, rows, b, s, unit, unit + D, w, wide, vectors, q, kernel, out, 0, L)
        else:
            while unit < end:
                lane, lane_last = max(unit, column) - column, min(unit + D, end) - column
                add_head(a, rows, b, s, unit, unit + D, w, wide, vectors, q, a.masked, out, lane, lane_last)
                unit += D
        v = after
