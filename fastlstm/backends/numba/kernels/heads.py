"""Products of vectors that have units of several heads, so that no head meets the numbers of another one.

A weight of zero would not do: its product with infinity or NaN is NaN. So each head is multiplied on its own, and added
to its own lanes alone.
"""

from fastlstm.backends.numba.kernels.layout import (
    dpreact_of,
    first_of_h,
    group,
    groups_of,
    product_of,
    seen_by,
    seen_from,
    summed_from,
    terms_of,
)
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def spans_heads(a, p):
    """Whether panel p has units of several heads."""
    return a.head != a.H and p * a.lanes // a.head != (min((p + 1) * a.lanes, a.H) - 1) // a.head


@jit
def add_heads(a, p, packed, rows, out, h, h_row):
    """Add the product of h to preact of panel p, which has units of several heads: each head's columns to its own units
    alone. `packed`: the panel's weights; h: the columns that it sees.
    """
    L, D, sums, wide, columns = a.lanes, a.head, out + first_of_h(a) * VECTOR, a.sums * VECTOR, seen_by(a, p)
    unit, last = p * L, min((p + 1) * L, a.H)
    while unit < last:
        begin = unit // D * D - seen_from(a, p)
        end = min(unit // D * D + D, last)
        for q in range(groups_of(a.of_h)):
            v_first, v_last = group(a.of_h, q), group(a.of_h, q + 1)
            w, w_row = packed + v_first * columns * VECTOR, (v_last - v_first) * VECTOR
            for k in range(begin, begin + D, a.block):
                for v in range(v_first, v_last):
                    call(
                        a.masked, rows, sums + v * VECTOR, wide, w + k * w_row + (v - v_first) * VECTOR, w_row,
                        h + k * a.size, h_row, min(a.block, begin + D - k), 1, 0, 0, unit - p * L, end - p * L,
                    )  # fmt: skip
        unit = end


@jit
def add_head(a, rows, b, s, unit, last, w, wide, vectors, q, kernel, out, lane, lane_last):
    """Add the product of one head's dpreact, of its units `unit` to `last`, to `out`: columns of h of group q, as whole
    vectors, or with `masked` as the lanes `lane` to `lane_last` of one. `w`: where the group's packed weights of these
    columns begin, whose rows have `wide` bytes.
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
        dpre, dpre_row = dpreact_of(a, p, s, b) + first_of_h(a) * VECTOR + at * a.size, terms_of(a) * VECTOR
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
    """`back_product` of a layer of heads: each head's columns have the dpreact of its own units alone."""
    L, H, D, first, v, last = a.lanes, a.H, a.head, group(vectors, q), group(vectors, q), group(vectors, q + 1)
    wide = (4 if last - first == 4 else 3) * VECTOR
    packed += q * a.reach * 4 * VECTOR * a.of_h * L
    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, 4 * VECTOR)
    while v < last:
        column, end, after = v * L, min((v + 1) * L, H), v + 1
        unit, w, out = column // D * D, packed + (v - first) * VECTOR, scratch + (v - first) * VECTOR
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
