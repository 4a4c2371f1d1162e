"""The backward pass's products on the bf16 unit, for which dpreact is stored in two layouts.

The product with the weights gives the gradients of the step before: its row operand's K blocks hold 32 units of a
gate, gate after gate. The product with [x, 1, h], a sum over all steps and batch rows, gives the gradients of the
weights: its column operand holds two batch rows side by side.
"""

from fastlstm.backends.numba.constants import (
    CHUNKS_IN_SUBTOTAL,
    ONE_OFFSET,
    k_blocks_of,
)
from fastlstm.backends.numba.kernels.layout import (
    block,
    dpreact_address,
    dpreact_row_address,
    first_h_preact,
    first_unit,
    first_vector,
    saved_address,
    seen_begin,
)
from fastlstm.backends.numba.kernels.matrix_forward import TILE, copy_square, write_units
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.row_masks import correct_states, zero_held
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, read_rows
from fastlstm.backends.numba.kernels.states import dpreact_slot
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.kernels.values import (
    back_product_on_unit,
    first_value_column,
    record_count,
    record_first,
    record_phase,
    record_saved,
)
from fastlstm.backends.numba.kernels.weight_gradients import accumulator_address, accumulator_row_bytes, strips_address
from fastlstm.backends.numba.llvm.intrinsics import call


def even(rows):
    """Return the next even number: two batch rows stand side by side, the last of an odd number beside zeros."""
    return rows + rows % 2


def count_k_blocks(a, steps):
    """Return the number of K blocks of 32 (step, row) pairs."""
    return (steps * even(a.B) + 31) // 32


def pack_column_operand(a, weight, weight_row, N, gates, first_block, units, packed, first, last, scratch):
    """Pack vector groups `first` to `last` of N columns of a weight's `gates`, see `pack_panel`, as a column operand of
    32 units of a gate. `units`: how many multiply a column: all, or those of its head. Then a row of the weight has the
    columns of its head.
    """
    L, H, blocks, vectors = a.lanes, a.H, k_blocks_of(units), (N + a.lanes - 1) // a.lanes
    for k in range(gates * blocks):
        unit = k % blocks * 32
        row = weight + (block(a, first_block + k // blocks) * H + unit) * weight_row
        for q in range(first, last):  # inside: the rows of weights are read from end to end
            begin = first_unit(a, vectors, q, units)
            for n in range(first_vector(vectors, q + 1) - first_vector(vectors, q)):
                column = (first_vector(vectors, q) + n) * L
                low, low_row = row + begin * weight_row + (column - begin) * element_bytes(a), weight_row
                if units - unit < 32 or N - column < L or a.is_bfloat16 != 0:
                    copy_square(a, 32, min(32, units - unit), min(L, N - column), low, low_row, scratch)
                    low, low_row = scratch, VECTOR
                target = packed + ((q * gates * blocks + k) * a.components * 4 + n) * TILE
                call(a.interleave, L, low, 2 * low_row, low + low_row, 2 * low_row, target, 4 * TILE, a.overflow_flag)


def pack_transposed(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Pack vector groups `first` to `last` of weight_ih or weight_hh."""
    gates, first_block, units = (a.h_preacts, a.x_preacts, a.head) if of_h else (a.x_preacts, 0, a.H)
    pack_column_operand(a, weight, weight_row, N, gates, first_block, units, packed, first, last, scratch)


def dpreact_target(a, p, s, b, scratch):
    """Return where the cell stores dpreact, from where `store_dpreact` copies it: later phases read that of earlier."""
    return dpreact_slot(a, scratch) if a.phases == 1 else dpreact_address(a, p, s, b)


def store_dpreact_columns(a, p, s, b, rows, dpre):
    """Store dpreact as the column operand of the weight gradients. The arguments are those of `store_dpreact`."""
    if a.dweights == 0:
        return
    row, flag, next_component = a.terms * VECTOR, a.overflow_flag, a.terms * TILE
    columns, blocks = a.dpreact_columns + s // a.chunk % a.ring * a.columns_bytes, count_k_blocks(a, a.chunk)
    first, count, done = (s % a.chunk * even(a.B) + b) // 2, rows // 2, 0
    while done < count:
        block, pair = (first + done) // 16, (first + done) % 16
        pairs = min(16 - pair, count - done)
        for gate in range(a.terms):
            low = dpre + 2 * done * row + gate * VECTOR
            target = columns + (p * blocks + block) * a.components * next_component + gate * TILE + pair * 64
            call(a.interleave, pairs, low, 2 * row, low + row, 2 * row, target, next_component, flag)
        done += pairs
    if rows % 2 != 0:  # the last row is paired with zeros
        block, pair = (first + count) // 16, (first + count) % 16
        for gate in range(a.terms):
            low = dpre + (rows - 1) * row + gate * VECTOR
            target = columns + (p * blocks + block) * a.components * next_component + gate * TILE
            call(a.interleave, 1, low, 0, a.constants, 0, target + pair * 64, next_component, flag)


def store_dpreact_rows(a, p, s, b, rows, dpre, gate, gates):
    """Store `gates` terms of dpreact, from `gate` on, as the row operand of the products with weights. The other
    arguments are those of `store_dpreact`.
    """
    next_component = a.terms * k_blocks_of(a.H) * a.k_block_stride
    for k in range(gate, gate + gates):
        target = dpreact_row_address(a, s, b, k) + p // 2 * a.k_block_stride + p % 2 * 32
        write_units(a, p, rows, dpre + k * VECTOR, a.terms * VECTOR, target, next_component)


def store_dpreact(a, p, s, b, rows, dpre, phase):
    """Store what is known of dpreact (rows, terms, lanes) after a phase, of panel p, step s and rows from `b` on: the
    gradients of products before their own are due, and in the last phase the others and the column operand.
    """
    for group in range(a.product_groups):
        if record_phase(a, group) == phase + 1:
            gate, count = a.preacts + record_first(a, group), record_count(a, group)
            store_dpreact_rows(a, p, s, b, rows, dpre, gate, count)
    if phase == a.phases - 1:
        store_dpreact_rows(a, p, s, b, rows, dpre, 0, a.preacts)
        store_dpreact_columns(a, p, s, b, rows, dpre)


def back_product(a, rows, b, s, of_h, packed, vectors, q, scratch):
    """Store the product of dpreact of step s with vector group q of the transposed weights in scratch."""
    gates, first, units = (a.h_preacts, first_h_preact(a), a.head) if of_h else (a.x_preacts, 0, a.H)
    back_product_on_unit(a, rows, b, s, first, gates, units, packed, vectors, q, scratch)


def gather(a, j, s_first, s_last, block, target):
    """Copy 16 columns of [x, 1, padding, h_in, values], from 16 j on, of the pairs of one K block to (32, 16), and
    zeros for pairs past the last, for h_in after a reset, and for held rows, whose padding may be NaN.
    """
    L, size, I, H, B, T = a.lanes, a.size, a.I, a.H, a.B, a.T
    pair, last, x_groups, element = block * 32, (s_last - s_first) * even(B), a.first_h_row // L, element_bytes(a)
    done = 0
    while done < 32:
        b, s = (pair + done) % even(B), s_first + (pair + done) // even(B)
        row = target + done * VECTOR
        if pair + done >= last or b == B:
            run = min(even(B) - b if pair + done < last else 32, 32 - done)
            call(a.copy_rows, run, 0, L, row, 0, row, VECTOR)
            done += run
            continue
        run = min(B - b, 32 - done)
        t, t_prev = (T - 1 - s, T - s) if a.reverse != 0 else (s, s - 1)
        source, source_row = a.x + t * a.x_step_stride + b * a.x_row_stride + j * L * element, a.x_row_stride
        valid, is_bfloat16 = max(0, min(L, I - j * L)), a.is_bfloat16
        if j >= a.first_value_row // L:
            group, panel = (j - a.first_value_row // L) // a.panels, (j - a.first_value_row // L) % a.panels
            source = saved_address(a, a.gate_rows, t, panel, b) + record_saved(a, group) * VECTOR
            source_row, valid, is_bfloat16 = a.saved * VECTOR, min(L, H - panel * L), 0
        elif j >= x_groups:
            unit = (j - x_groups) * L
            source_row = a.h_row_stride
            source = a.h + t_prev * a.h_step_stride + b * source_row + unit * element
            valid = min(L, H - unit)
            if s == 0:
                source, source_row, is_bfloat16 = a.h_0 + b * a.h_0_row_stride + unit * size, a.h_0_row_stride, 0
        read_rows(a, is_bfloat16, run, valid, L, source, source_row, row, VECTOR)
        if j == I // L:
            call(a.copy_rows, run, 1, 1, a.constants + ONE_OFFSET, 0, row + I % L * size, VECTOR)
        zero_held(a, t, b, run, L, row, VECTOR)
        if x_groups <= j < a.first_value_row // L:
            correct_states(a, t, b, run, (j - x_groups) * L, valid, row, VECTOR)
        done += run


def pack_activations(a, chunk, thread, threads, scratch):
    """Pack this thread's share of [x, 1, h_in] of a time chunk, transposed, as a row operand."""
    if a.dweights == 0:
        return
    panels, groups, operand_rows = a.panels, a.accumulator_rows // 16, a.accumulator_rows
    strips, columns = strips_address(a, chunk), a.dpreact_columns + chunk % a.ring * a.columns_bytes
    s, blocks = chunk * a.chunk, count_k_blocks(a, a.chunk)
    s_last = min(s + a.chunk, a.T)
    used, filled = count_k_blocks(a, s_last - s), (s_last - s) * even(a.B)
    tile, component_stride = scratch + 32 * VECTOR, blocks * operand_rows * 64
    for item in range(share(used * groups, thread, threads), share(used * groups, thread + 1, threads)):
        block, j = item // groups, item % groups
        gather(a, j, s, s_last, block, scratch)
        call(a.interleave, 16, scratch, 2 * VECTOR, scratch + VECTOR, 2 * VECTOR, tile, 1024, a.overflow_flag)
        target = strips + (block * operand_rows + j * 16) * 64
        call(a.transpose_tiles, a.components, tile, 1024, target, component_stride)
    first = filled // 2 % 16  # the pairs after the last row of the column operand become zero
    if first != 0:
        for p in range(share(panels, thread, threads), share(panels, thread + 1, threads)):
            for n in range(a.terms * a.components):
                column = columns + ((p * blocks + used - 1) * a.components * a.terms + n) * TILE + first * 64
                call(a.copy_rows, 16 - first, 0, 16, column, 0, column, 64)


def add_product_of_seen(a, chunk, k_set, p, out, begins, row, gate, gates):
    """Do as `add_product` for the rows of the columns of h, or of a value, that panel p sees. `row`: of the first."""
    begin = row + seen_begin(a, p)
    end = begin + (16 * a.panels if a.heads == 1 else a.head)
    add_product(a, chunk, k_set, p, out, begins, begin, end, gate, gates)


def add_product(a, chunk, k_set, p, out, begins, row, row_last, gate, gates):
    """Add a time chunk to rows `row` to `row_last` of the accumulators at `out`, for `gates` terms from `gate` on."""
    blocks, rows, stride = count_k_blocks(a, a.chunk), a.accumulator_rows, accumulator_row_bytes(a)
    used = count_k_blocks(a, min(a.chunk, a.T - chunk * a.chunk))
    first, last = share(used, k_set, a.split_k), share(used, k_set + 1, a.split_k)
    strips, columns = strips_address(a, chunk), a.dpreact_columns + chunk % a.ring * a.columns_bytes
    target = out + row * stride
    init, init_row = (a.constants, 0) if begins else (target, stride)
    call(
        a.matrix_product, row_last - row, init, init_row, target, stride, strips + (first * rows + row) * 64, rows * 64,
        blocks * rows * 64, columns + ((p * blocks + first) * a.components * a.terms + gate) * TILE,
        a.terms * TILE, last - first, gates, max(last - first, 1),
    )  # fmt: skip


def add_weight_gradients(a, chunk, k_set, p_first, p_last):
    """Add a time chunk to panels `p_first` to `p_last` of dweights, in one split-K set. Since the error of a long sum
    grows with its length, CHUNKS_IN_SUBTOTAL chunks are summed to a subtotal, and these to the total.
    """
    used, rows = count_k_blocks(a, min(a.chunk, a.T - chunk * a.chunk)), a.accumulator_rows
    chunks, width = (a.T + a.chunk - 1) // a.chunk, rows * accumulator_row_bytes(a) // a.size
    has_subtotals, h_row = chunks > CHUNKS_IN_SUBTOTAL, a.first_h_row
    for p in range(p_first, p_last):
        out = accumulator_address(a, a.split_k + k_set if has_subtotals else k_set, p)
        begins = chunk == chunks - 1 or chunk % CHUNKS_IN_SUBTOTAL == CHUNKS_IN_SUBTOTAL - 1
        if begins and share(used, k_set, a.split_k) == share(used, k_set + 1, a.split_k):
            # this set has no K block, so that no product sets its sums to a first value
            call(a.copy_rows, 1, 0, width, out, 0, out, 0)
        else:
            if a.joint != 0 and a.heads == 1:
                add_product(a, chunk, k_set, p, out, begins, 0, a.first_value_row, 0, a.preacts)
            else:  # the tile with the ones, whose sums are the gradients of all biases, has all gates
                add_product(a, chunk, k_set, p, out, begins, 0, h_row - 16, 0, a.x_preacts)
                add_product(a, chunk, k_set, p, out, begins, h_row - 16, h_row, 0, a.preacts)
                if a.h_preacts != 0:
                    add_product_of_seen(a, chunk, k_set, p, out, begins, h_row, first_h_preact(a), a.h_preacts)
            for group in range(a.product_groups):
                row, gate = first_value_column(a, group), a.preacts + record_first(a, group)
                add_product_of_seen(a, chunk, k_set, p, out, begins, row, gate, record_count(a, group))
        if has_subtotals and chunk % CHUNKS_IN_SUBTOTAL == 0:
            total = accumulator_address(a, k_set, p)
            if chunk + CHUNKS_IN_SUBTOTAL >= chunks:
                call(a.copy_rows, 1, width, width, out, 0, total, 0)
            else:
                call(a.add_rows, 1, width, out, 0, total, 0)


PRODUCTS = BackwardProducts(
    True, pack_transposed, dpreact_target, store_dpreact, back_product, pack_activations, add_weight_gradients
)
