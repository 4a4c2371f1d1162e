"""The order of the accumulators: the sums, in memory, of the weight gradients over the time chunks of a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastlstm.backends.numba.constants import STRIP
from fastlstm.backends.numba.host.panels import lanes_of, panels_of, span_of

if TYPE_CHECKING:
    from fastlstm.backends.numba.host.signature import Signature


class AccumulatorLayout(NamedTuple):
    """Where a panel's accumulators begin: those of weight_hh, of the biases, and of the values that products multiply;
    and how many rows there are. With several heads, the first two count all columns of h, and `rows` those seen alone.
    """

    first_h_row: int
    ones_row: int
    first_value_row: int
    rows: int


def accumulator_layout(s: Signature) -> AccumulatorLayout:
    """Return the order of a panel's accumulators of the weight gradients, a row for each column of [x, h, 1] that it
    sees.

    Where | begins a new row and || a new strip of columns, it is one of these, then the values that products multiply,
    each in strips of STRIP.

    * ``x | ones || h || values`` in strips of 16 rows, if the bf16 unit sums.
    * ``x | h | ones`` if every pre-activation has a product of x and one of h.
    * ``x || h || ones`` otherwise, in strips of STRIP. A row has room for the pre-activations of x or those of h,
      whichever are more, so the ones, which all pre-activations have, may take several rows.
    """
    counts, I, H = s.counts, s.I, s.h_width if s.counts.h_preacts else 0
    if s.components:
        first_h_row = -(-(I + 1) // 16) * 16
        first_value_row = first_h_row + panels_of(H, 16) * 16
        rows = first_value_row + counts.product_groups * panels_of(s.H, 16) * 16
        return AccumulatorLayout(first_h_row, I, first_value_row, rows)
    unseen = H - span_of(s.H, s.heads, lanes_of(s.dtype), H) if H else 0
    first_h_row = I if counts.joint else panels_of(I, STRIP) * STRIP
    ones_row = I + H if counts.joint else first_h_row + panels_of(H, STRIP) * STRIP
    rows_of_ones = panels_of(counts.preacts, max(counts.x_preacts, counts.h_preacts, counts.group_size, 1))
    rows = ones_row - unseen + (1 if counts.joint else rows_of_ones)
    if not counts.products:
        return AccumulatorLayout(first_h_row, ones_row, rows, rows)
    first_value_row = panels_of(ones_row + max(rows_of_ones, 1), STRIP) * STRIP  # a column of the strips too
    rows = first_value_row + counts.product_groups * panels_of(s.H, STRIP) * STRIP
    return AccumulatorLayout(first_h_row, ones_row, first_value_row, rows)
