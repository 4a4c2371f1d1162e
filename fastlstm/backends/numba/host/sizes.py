"""How a call is cut into vectors, panels and blocks, and how much memory its buffers take, in elements of the type that
a layer computes in. The bf16 unit is AMX or an instruction on vectors, see `llvm.matrix`, which describes its operands.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from fastlstm.backends.numba.constants import (
    CHUNKS_IN_SUBTOTAL,
    ROOM,
    ROW_BLOCK,
    STRIP,
    WEIGHT_BLOCK_BYTES,
    k_blocks_of,
)
from fastlstm.backends.numba.host.signature import Signature
from fastlstm.cells.spec import Cell


@cache
def max_components() -> int:
    """Return the most bfloat16 components of a number for which the bf16 unit is faster, 0 without a unit."""
    from fastlstm.backends.numba.llvm import matrix

    return matrix.max_components()


CHUNK_PAIRS = 128  # (step, row) pairs of a time chunk, whose dpreact becomes weight gradients at once
RING = 4  # time chunks that stay in memory: a thread may write one while another reads the chunk three before it
# Bytes of the accumulators of the weight gradients from which they no longer stay in the second-level caches: a time
# chunk then has four times as many pairs. The second limit is for products that are all on the bf16 unit.
SUM_BYTES, MATRIX_SUM_BYTES = 9 << 18, 1 << 22
# If the accumulators take at most these bytes, each half of the batch rows has its own set, so that a thread sums over
# rows that are in its cache. With few batch rows but many steps the limit is half of that. Only the shape decides, so
# that the results do not depend on the number of threads.
SPLIT_K_BYTES = 1 << 19
FEW_PAIRS = 128  # (step, row) pairs summed without accumulators, fewer where columns are padded

# Bytes of weights read by the first 8 steps, 10 MB for each of them. A cache that is shared with others would lose
# more weights between two steps. So with more weights up to ROW_BLOCK rows multiply a wide input for an input block,
# several steps, at once.
READ_IN_EIGHT_STEPS = 5 << 24
INPUT_BLOCK_PAIRS = 512  # (step, row) pairs of an input block at most
ROWS_TOGETHER = 48  # rows of a cell of several phases, whose products for all units stay in the second-level cache


@cache
def lanes_of(dtype: torch.dtype) -> int:
    """Return how many numbers of this type a vector has."""
    from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES

    return VECTOR_BYTES // dtype.itemsize


def panels_of(size: int, lanes: int) -> int:
    """Return how many vectors hold `size` numbers."""
    return (size + lanes - 1) // lanes


def saved_panels(cell: Cell, H: int, lanes: int) -> int:
    """Return how many panels the saved values have: one more for the values that a row's units share."""
    return panels_of(H, lanes) + (len(cell.layout.saved_rows) > 0)


def span_of(H: int, heads: int, lanes: int, columns: int) -> int:
    """Return the most `columns` of h, or of a value, that a panel multiplies: those of its units' heads."""
    if heads == 1:
        return columns
    D = H // heads
    return max((min(unit + lanes, H) - 1) // D - unit // D + 1 for unit in range(0, H, lanes)) * D


def reach_of(H: int, heads: int, lanes: int) -> int:
    """Return the most panels whose dpreact a vector group of columns of h multiplies: those of its columns' heads."""
    D, panels = H // heads, panels_of(H, lanes)
    groups = panels_of(panels, 4)
    ends = [panels_of(panels * q, groups) * lanes for q in range(groups)] + [H]
    return max(panels_of(((end - 1) // D + 1) * D, lanes) - begin // D * D // lanes for begin, end in pairwise(ends))


class AccumulatorLayout(NamedTuple):
    """Where a panel's accumulators begin: those of weight_hh, of the biases, and of the values that products multiply;
    and how many rows there are. With several heads, the first two count all columns of h, and `rows` those seen alone,
    or all if the bf16 unit sums.
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


def transposed_sizes(s: Signature, panels: int, lanes: int) -> dict[str, int]:
    """Return the elements of the transposed weights, in groups of four vectors of columns."""
    I, H, counts, wide = s.I, s.H, s.counts, 4 * lanes
    of_x, of_h = panels * lanes * wide, reach_of(H, s.heads, lanes) * lanes * wide  # for a gate and a group
    if s.components:  # a component of the 32 by 64 weights of 32 units takes 1024 float32
        of_x, of_h = (k_blocks_of(units) * s.components * 1024 for units in (H, H // s.heads))
    groups = panels_of(H, wide)
    return {
        "packed_ih": panels_of(I, wide) * counts.x_preacts * of_x, "packed_hh": groups * counts.h_preacts * of_h,
        "packed_products": groups * counts.products * of_h,
    }  # fmt: skip


def k_block_lengths(I: int, H: int, joint: bool) -> tuple[int, int]:
    """Return the columns of x in a K block, 0 if a narrow x shares the K blocks of h, and those of h. `joint`: whether
    all pre-activations have both products. Rows do not decide, since a row's bits would depend on their number.
    """
    most = WEIGHT_BLOCK_BYTES // (16 * lanes_of(torch.float32))  # a column of 4 vectors of float32

    def length(columns: int) -> int:
        return -(-columns // -(-columns // most)) if columns else 1

    return (length(I), length(H)) if 4 * I >= H or not joint else (0, length(I + H))


def has_compact_panel(s: Signature) -> bool:
    """Return whether a last panel that is not full has its gates side by side, without padding: if they then take fewer
    vectors, without the bf16 unit, several phases or heads, or pre-activations that lack a product or exceed four.
    """
    lanes, preacts, rest = lanes_of(s.dtype), s.counts.preacts, s.H % lanes_of(s.dtype)
    if s.components or s.counts.has_phases or s.heads > 1 or not s.counts.joint or preacts > 4:
        return False
    return 0 < -(-preacts * rest // lanes) < preacts


def forward_sizes(s: Signature) -> tuple[dict[str, int], dict[str, int]]:
    """Return fields of the forward kernel's arguments, and elements of its buffers without the packed weights."""
    T, B, I, H, dtype, components, preacts = s.T, s.B, s.I, s.H, s.dtype, s.components, s.counts.preacts
    lanes = lanes_of(dtype)
    fields, scratch = common_sizes(s, "Forward", preacts, panels_of(H, lanes))
    buffers = {"scratch": scratch + (B * H if s.has_resets and not components else 0)}
    if s.is_bfloat16:
        buffers["h_float32"] = 2 * B * H
    if components:
        fields["k_block_stride"] = (B + ROOM) * 64
        blocks = k_blocks_of(I) + k_blocks_of(H)
        buffers["row_operand"] = 2 * components * blocks * fields["k_block_stride"] // 4
    else:
        fields["x_k_block"], fields["k_block"] = k_block_lengths(I, fields["span"], s.counts.joint)
        fields["value_k_block"] = k_block_lengths(0, span_of(H, s.heads, lanes, H), joint=False)[1]
        is_wide = fields["x_k_block"] > 0
        is_large = H * s.multiply_adds_per_unit * dtype.itemsize * min(T, 8) > READ_IN_EIGHT_STEPS
        most = min(32, INPUT_BLOCK_PAIRS // max(B, 1))  # steps of an input block, which reads the weights once
        steps = -(-T // -(-T // most)) if T > 1 and most else 0  # the same in all blocks, as far as possible
        few = ROW_BLOCK if is_large else steps // max(B, 1)  # rows up to which a wide input has input blocks
        if steps and (B == 1 or (is_wide and 0 < B <= few)):
            fields["input_steps"] = steps
            buffers["input_preact"] = panels_of(H, lanes) * steps * (B if is_wide else 2) * preacts * lanes
    return fields, buffers


def packed_size(s: Signature, lanes: int, packed_panels: int) -> int:
    """Return the elements of `packed_panels` packed panels. The bf16 unit's K blocks take 256 float32 a component and
    pre-activation.
    """
    if s.components:
        of_h = k_blocks_of(s.H // s.heads) * (s.counts.h_preacts + s.counts.products)
        tiles = k_blocks_of(s.I) * s.counts.x_preacts + of_h
        return packed_panels * tiles * s.components * 256
    of_h, of_value = (span_of(s.H, s.heads, lanes, columns) for columns in (s.h_width, s.H))
    columns = s.I * s.counts.x_preacts + of_h * s.counts.h_preacts + of_value * s.counts.products
    return packed_panels * columns * lanes


def row_group(s: Signature) -> int:
    """Return how many batch rows share the sums of params' gradients, whatever the threads: bits must not change."""
    return max(k for k in (1, 2, 4, 8) if k == 1 or 8 * k <= s.B) if s.counts.params else 1


def common_sizes(s: Signature, kind: str, vectors: int, count: int) -> tuple[dict[str, int], int]:
    """Return fields of both kernels' arguments, and the elements of a thread's scratch, whose rows hold the products of
    one panel or vector group, or of all if the cell has several phases.

    Args:
        kind: "Forward" or "Backward".
        vectors: the vectors of the products of one panel (forward) or one vector group (backward).
        count: the number of panels or vector groups.
    """
    from fastlstm.backends.numba.host.arguments import cell_fields, count_copy_vectors

    of_cell, copy_slots = cell_fields(s.cell, kind), count_copy_vectors(s.cell, kind)
    lanes, size, has_phases = lanes_of(s.dtype), s.dtype.itemsize, s.counts.has_phases
    panels = panels_of(s.H, lanes)
    product_vectors = vectors * count if has_phases else vectors
    operand_slot = copy_slots + panels * of_cell["later_values"] + of_cell["shared_values"]
    groups = s.counts.product_groups
    of_values = panels * (groups + s.counts.products) + groups * s.components * k_blocks_of(s.H)
    slots = operand_slot + (of_values if kind == "Forward" else 4 * count * groups)
    fields = {
        "T": s.T, "B": s.B, "I": s.I, "H": s.H, "panels": panels, "inner_step_stride": s.rows * s.H * size,
        "has_compact": has_compact_panel(s), "group_rows": row_group(s), "heads": s.heads, "head": s.H // s.heads,
        "h_width": s.h_width, "span": span_of(s.H, s.heads, lanes, s.h_width),
        "saved": s.cell.layout.saved_vectors(lanes), "gate_panels": saved_panels(s.cell, s.H, lanes),
        "panel_bytes": ROW_BLOCK * vectors * lanes * size if has_phases else 0,
        "rows_together": ROWS_TOGETHER if has_phases else max(s.B, 1),
        "splits_rows": s.splits_rows and of_cell["phases"] > 1,  # the gradient may have one: means without gradients
        "later_slot": copy_slots, "product_vectors": product_vectors, "operand_slot": operand_slot, "slots": slots,
    }  # fmt: skip
    return of_cell | fields, 2 * of_cell["table_bytes"] // size + ROW_BLOCK * (product_vectors + slots) * lanes


def sums_few_pairs(s: Signature) -> bool:
    """Return whether the backward pass writes gradients of weights straight to their places, without accumulators."""
    wide = 4 * lanes_of(s.dtype)
    columns = (panels_of(s.I, wide) + panels_of(s.H, wide)) * wide  # of x and h, each padded to strips of four vectors
    return not (s.components or s.counts.products) and s.T * s.B * columns <= FEW_PAIRS * (s.I + s.H)


def backward_sizes(s: Signature, wants_weights: bool, wants_dx: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return fields of the backward kernel's arguments, and elements of its buffers without the transposed weights.
    `wants_weights`: whether gradients of weights, biases or params are wanted.
    """
    T, B, I, H, dtype, components = s.T, s.B, s.I, s.H, s.dtype, s.components
    lanes, size, counts = lanes_of(dtype), dtype.itemsize, s.counts
    panels, wide = panels_of(H, lanes), 4 * lanes
    columns = (panels_of(I, wide) + panels_of(H, wide)) * wide  # of x and h, each padded to strips of four vectors
    is_few = sums_few_pairs(s)
    first_h_row, ones_row, first_value_row, accumulator_rows = accumulator_layout(s)
    of_gates = counts.preacts if components else max(counts.x_preacts, counts.h_preacts, 1)
    widest, terms = max(of_gates, counts.group_size), counts.preacts + counts.products
    set_bytes = summed_bytes = panels * accumulator_rows * widest * lanes * size
    pairs = CHUNK_PAIRS
    if is_few:  # x || h in strips of four vectors: the biases need no ones
        first_h_row = panels_of(I, wide) * wide
        ones_row = first_h_row + H
    if components:  # less the rows of columns that a panel does not see
        unseen = (H - H // s.heads) * ((counts.h_preacts > 0) + counts.product_groups)
        summed_bytes = set_bytes // accumulator_rows * (accumulator_rows - unseen)
    if summed_bytes > (MATRIX_SUM_BYTES if components else SUM_BYTES):
        pairs = 4 * CHUNK_PAIRS
    chunk = -(-T // max(1, round(T * B / pairs)))
    ring = min(RING, -(-T // chunk))
    many_steps = B >= 4 and T * B >= 1024 and summed_bytes <= SPLIT_K_BYTES // 2
    split_k = 2 if many_steps or (B >= 128 and summed_bytes <= SPLIT_K_BYTES) else 1
    dpreact_steps = ring * chunk if (wants_weights or wants_dx) and not components else 2
    fields, scratch = common_sizes(s, "Backward", 4, panels_of(H, wide))
    fields |= {"reach": reach_of(s.H, s.heads, lanes), "chunk": chunk, "ring": ring, "split_k": split_k}
    group = panels * counts.params * lanes  # elements of a row group's sums
    fields |= {"dpreact_steps": dpreact_steps, "strip": wide if is_few else 16 if components else STRIP}
    fields["group_stride"] = group * size // fields["group_rows"]  # for one row: kernels multiply it by a group's first
    fields |= {"accumulator_rows": accumulator_rows, "first_h_row": first_h_row, "ones_row": ones_row}
    fields |= {"first_value_row": first_value_row, "accumulator_vectors": widest}
    carried = counts.inner_states + counts.carries_h + s.has_lengths  # gradients that go from step to step
    buffers = {"scratch": scratch, "carried": panels * B * lanes * carried}
    buffers["param_sums"] = panels_of(B, fields["group_rows"]) * group
    if not components or counts.has_phases:
        buffers["dpreact"] = panels * dpreact_steps * B * terms * lanes
    if components:
        steps = ring * chunk if wants_dx else 2
        fields |= {"dpreact_row_steps": steps, "k_block_stride": (steps * B + ROOM) * 64}
        buffers["dpreact_rows"] = components * terms * k_blocks_of(H) * fields["k_block_stride"] // size
        k_blocks = -(-chunk * (B + B % 2) // 32)  # of 32 (step, row) pairs, from an even number of rows
        fields["columns_bytes"] = panels * k_blocks * components * terms * 1024
        fields["strips_bytes"] = components * k_blocks * accumulator_rows * 64
        buffers["dpreact_columns"] = ring * fields["columns_bytes"] // size if wants_weights else 0
    else:
        last = accumulator_rows if counts.products else ones_row + 1
        columns = columns if is_few else panels_of(last, STRIP) * STRIP
        fields["strips_bytes"] = chunk * B * columns * size
    levels = 2 if components and -(-T // chunk) > CHUNKS_IN_SUBTOTAL else 1  # the total, and a subtotal
    buffers["dweights"] = levels * split_k * set_bytes // size if wants_weights and not is_few else 0
    buffers["strips"] = ring * fields["strips_bytes"] // size if wants_weights else 0
    return fields, buffers
