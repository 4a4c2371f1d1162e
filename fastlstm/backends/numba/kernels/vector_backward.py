"""The backward pass's products on the processor's own vectors, and the weight gradients' sums over pairs."""

from fastlstm.backends.numba.constants import ONE_OFFSET, STRIP
from fastlstm.backends.numba.kernels.heads import back_product_of_heads
from fastlstm.backends.numba.kernels.in_place import back_product_in_place
from fastlstm.backends.numba.kernels.layout import (
    block,
    columns_of_h,
    compact,
    count_vector_groups,
    dpreact_address,
    first_h_preact,
    first_vector,
    gate_offset,
    gemm_of,
    head_begin,
    head_end,
    is_compact,
    multiply_blocks,
    panels_of_h,
    reach_begin,
    reach_count,
    seen_alike,
    seen_begin,
    seen_count,
    seen_of_value,
    vectors_of,
)
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.row_masks import active_range, correct_states, zero_held
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR
from fastlstm.backends.numba.kernels.states import dpreact_slot
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.kernels.values import (
    first_value_column,
    pack_values,
    record_count,
    record_first,
)
from fastlstm.backends.numba.kernels.weight_gradients import (
    accumulator_address,
    accumulator_row_bytes,
    strips_address,
)
from fastlstm.backends.numba.llvm.intrinsics import call

BLOCK_ROWS = 128  # rows of dpreact and of a strip that stay in the L1 cache together: 16 + 12 KB at 8 lanes


def pack_transposed(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Pack vector groups `first` to `last` of weight_ih or weight_hh: see `pack_transposed_gates`."""
    gates, first_block = (a.h_preacts, a.x_preacts) if of_h else (a.x_preacts, 0)
    columns = a.h_width if of_h else N
    pack_transposed_gates(a, weight, weight_row, a.H, N, columns, gates, first_block, of_h, packed, first, last)


def pack_transposed_gates(
    a, weight, weight_row, rows, N, columns, gates, first_block, has_heads, packed, first, last
):  # fmt: skip
    """Pack vector groups `first` to `last` of N columns of (gates rows, columns) weights as [vector group][k][3 or 4
    vectors], k in the order of dpreact's panels, with heads of those whose units see a column. `columns`: N, or fewer:
    what lies beyond is not written. `first_block`: as in `vector_forward.pack_panel`.
    """
    L, size = a.lanes, a.size
    panels, vectors = a.panels, (N + L - 1) // L
    own, reach = (a.head if a.heads > 1 else columns, a.reach) if has_heads else (N, panels)
    for p in range((rows + L - 1) // L):
        units = min(L, rows - p * L)
        for gate in range(gates):
            row = gate_offset(a, p, gate) // size
            row_last = gate_offset(a, p, gate + 1) // size if gate + 1 < gates else vectors_of(a, p, gates) * L
            source = weight + block(a, first_block + gate) * rows * weight_row
            for q in range(first, last):  # innermost: whole rows of weights are read one after the other
                column, panel = first_vector(vectors, q) * L, p - reach_begin(a, q) if has_heads else p
                if panel < 0 or (has_heads and panel >= reach_count(a, q)):
                    continue
                n = 4 if first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 else 3
                to_row = n * VECTOR
                target = packed + (q * reach * 4 * VECTOR + panel * to_row) * gates * L + row * to_row
                if has_heads and a.heads > 1:
                    call(a.copy_rows, units, 0, n * L, source, 0, target, to_row)
                unit, unit_last = p * L, p * L + units
                while unit < unit_last:  # of one head
                    head = head_begin(a, unit) if has_heads else 0
                    end = head_end(a, unit, unit_last) if has_heads else unit_last
                    begin, stop = max(column, head), min(min(column + n * L, N), head + own)
                    if begin < stop:
                        call(
                            a.copy_rows, end - unit, stop - begin, n * L - (begin - column),
                            source + unit * weight_row + (begin - head) * size, weight_row,
                            target + (unit - p * L) * to_row + (begin - column) * size, to_row,
                        )  # fmt: skip
                    unit = end
                target += units * to_row
                call(a.copy_rows, row_last - row - units, 0, n * L, source, 0, target, to_row)


def dpreact_target(a, p, s, b, scratch):
    """Return where the cell stores dpreact (rows, S, lanes)."""
    return dpreact_slot(a, scratch) if is_compact(a, p) else dpreact_address(a, p, s, b)


def store_dpreact(a, p, s, b, rows, dpre, phase):
    """Copy dpreact of a compact panel, which only cells of one phase have, to the layout that products read."""
    if is_compact(a, p):
        compact(a, p, rows, dpre, dpreact_address(a, p, s, b))


def back_product(a, rows, b, s, of_h, packed, vectors, q, scratch):
    """Store the product of dpreact of step s with vector group q of the transposed weights, (rows, 4 L), in scratch."""
    if packed == 0:
        back_product_in_place(a, rows, b, s, of_h, vectors, q, scratch)
        return
    if of_h and a.heads > 1:
        back_product_of_heads(a, rows, b, s, first_h_preact(a), a.h_preacts, packed, vectors, q, scratch)
        return
    L, gates, first_gate = a.lanes, a.h_preacts if of_h else a.x_preacts, first_h_preact(a) if of_h else 0
    panels, terms = (a.H + L - 1) // L, a.terms
    n = 4 if first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 else 3
    kernel, w_row = gemm_of(a, n), n * VECTOR
    blocks = (panels * gates * L + BLOCK_K - 1) // BLOCK_K
    block = (panels + blocks - 1) // blocks  # panels
    init, init_row = a.constants, 0
    # a compact panel has rows of another length
    last, compact_panels = dpreact_address(a, panels - 1, s, b), 1 if is_compact(a, panels - 1) else 0
    last_row, last_columns = vectors_of(a, panels - 1, terms) * VECTOR, gates * (a.H - (panels - 1) * L)
    for p in range(0, panels, block):
        dpre = dpreact_address(a, p, s, b) + first_gate * VECTOR
        w = packed + (q * panels * 4 * VECTOR + p * w_row) * gates * L
        at_end = compact_panels if p + block >= panels else 0
        call(
            kernel, rows, init, init_row, scratch, 4 * VECTOR, w, w_row, dpre, terms * VECTOR, a.size,
            gates * L, min(block, panels - p) - at_end, a.dpreact_steps * a.B * terms * VECTOR, gates * L * w_row,
            last, last_row, at_end * last_columns,
        )  # fmt: skip
        init, init_row = scratch, 4 * VECTOR


def pack_strips(a, strips, s_first, s_last, b_first, b_last):
    """Pack [x, h_in, 1] of the steps and batch rows given as [strip][pair][column], h from `first_h_row` and ones, with
    `dweights`, from `ones_row` on. h_in is zero after a reset, and so is a strip's rest, which few pairs multiply.
    """
    size, I, B, T, row = a.size, a.I, a.B, a.T, a.strip * a.size
    first_h, last_h = a.first_h_row, a.first_h_row + columns_of_h(a)
    last = a.ones_row + 1 if a.dweights != 0 else (last_h + a.strip - 1) // a.strip * a.strip
    next_strip, count = (s_last - s_first) * B * row - row, b_last - b_first
    for s in range(s_first, s_last):
        t, t_prev = (T - 1 - s, T - s) if a.reverse != 0 else (s, s - 1)
        x = a.x + t * a.x_step_stride + b_first * a.x_row_stride
        h, h_row = a.h + t_prev * a.h_step_stride + b_first * a.h_row_stride, a.h_row_stride
        if s == 0:
            h, h_row = a.h_0 + b_first * a.h_0_row_stride, a.h_0_row_stride
        target, room, column = strips + ((s - s_first) * B + b_first) * row, a.strip, 0
        while column < last:
            run = room
            if column < I:
                run = min(I - column, room)
                call(a.copy_rows, count, run, run, x + column * size, a.x_row_stride, target, row)
            elif first_h <= column < last_h:
                run = min(last_h - column, room)
                call(a.copy_rows, count, run, run, h + (column - first_h) * size, h_row, target, row)
                correct_states(a, t, b_first, count, column - first_h, run, target, row)
            elif column == a.ones_row:
                run = 1
                call(a.copy_rows, count, 1, 1, a.constants + ONE_OFFSET, 0, target, row)
            else:
                call(a.copy_rows, count, 0, run, target, 0, target, row)
            if column != a.ones_row:  # a held row adds nothing, but its padding may be NaN
                zero_held(a, t, b_first, count, run, target, row)
            column, room, target = column + run, room - run, target + run * size
            if room == 0:
                room, target = a.strip, target + next_strip


def add_products(a, strips, s_first, s_last, k_set, p_first, p_last, column, column_last, missing, gate, gates):
    """Add a time chunk to the accumulators of columns `column` to `column_last` of [x, h, 1], for `gates` terms of
    dpreact from `gate` on. The first chunk begins the sums, whatever the threads. A panel lacks `missing` rows.
    """
    pairs = (s_last - s_first) * a.B
    first = share(pairs, k_set, a.split_k)
    steps, rows = active_range(a, s_first, first, share(pairs, k_set + 1, a.split_k) - share(pairs, k_set, a.split_k))
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    block = rows if steps > 1 else (rows + blocks - 1) // max(blocks, 1)
    begin, end = column // STRIP, (column_last + STRIP - 1) // STRIP if column < column_last else 0
    for j in range(begin, end):  # in serpentine order: the sums touched last are still in the L2 cache
        n = j if s_first // a.chunk % 2 == 0 else begin + end - 1 - j
        k, width = max(column, n * STRIP), min(column_last, (n + 1) * STRIP) - max(column, n * STRIP)
        strip = strips + ((n * pairs + first) * STRIP + k - n * STRIP) * a.size
        for p in range(p_first, p_last):
            out = accumulator_address(a, k_set, p) + (k - missing) * accumulator_row_bytes(a)
            dpre = dpreact_address(a, p, s_first, first) + gate_offset(a, p, gate)
            vectors, dpre_row = vectors_of(a, p, gates), vectors_of(a, p, a.terms) * VECTOR
            for q in range(count_vector_groups(vectors)):
                v = first_vector(vectors, q)
                kernel, target = gemm_of(a, first_vector(vectors, q + 1) - v), out + v * VECTOR
                init, init_row = (a.constants, 0) if s_last == a.T else (target, accumulator_row_bytes(a))
                for r in range(0, rows, block):
                    multiply_blocks(
                        a, kernel, width, init=init, init_row=init_row, out=target, out_row=accumulator_row_bytes(a),
                        w=dpre + v * VECTOR + r * dpre_row, w_row=dpre_row, x=strip + r * STRIP * a.size, x_row=a.size,
                        x_column=STRIP * a.size, columns=min(block, rows - r), blocks=steps,
                        x_block=a.B * STRIP * a.size, w_block=a.B * dpre_row,
                    )  # fmt: skip
                    init, init_row = target, accumulator_row_bytes(a)


def add_weight_gradients(a, chunk, k_set, p_first, p_last):
    """Add a time chunk to the accumulators: all at once if `host.sizes.accumulator_layout` has one run."""
    strips, s_first, s_last = strips_address(a, chunk), chunk * a.chunk, min((chunk + 1) * a.chunk, a.T)
    h_row, ones_row, columns = a.first_h_row, a.ones_row, columns_of_h(a)
    for group in range(a.product_groups):
        gate, gates = a.preacts + record_first(a, group), record_count(a, group)
        p, p_end = p_first, min(p_last, panels_of_h(a))
        while p < p_end:
            end, column = seen_alike(a, p, p_end), first_value_column(a, group) + seen_begin(a, p)
            last = column + seen_of_value(a, p)
            add_products(a, strips, s_first, s_last, k_set, p, end, column, last, 0, gate, gates)
            p = end
    if a.joint != 0 and a.heads == 1:
        add_products(a, strips, s_first, s_last, k_set, p_first, p_last, 0, ones_row + 1, 0, 0, a.preacts)
        return
    add_products(a, strips, s_first, s_last, k_set, p_first, p_last, 0, a.I, 0, 0, a.x_preacts)
    p, first, unseen = p_first, first_h_preact(a), columns - min(a.span, columns)
    while p < (p_last if columns != 0 else p_first):
        end, seen = seen_alike(a, p, p_last), seen_begin(a, p)
        h, h_last = h_row + seen, h_row + seen + seen_count(a, p)
        add_products(a, strips, s_first, s_last, k_set, p, end, h, h_last, seen, first, a.h_preacts)
        p = end
    add_products(a, strips, s_first, s_last, k_set, p_first, p_last, ones_row, ones_row + 1, unseen, 0, a.preacts)


def pack_activations(a, chunk, thread, threads, scratch):
    """Pack this thread's batch rows of x, h and ones of a time chunk."""
    strips, s = strips_address(a, chunk), chunk * a.chunk
    b_first, b_last = share(a.B, thread, threads), share(a.B, thread + 1, threads)
    if a.strips != 0:
        pack_strips(a, strips, s, min(s + a.chunk, a.T), b_first, b_last)
        pack_values(a, strips, s, min(s + a.chunk, a.T), b_first, b_last)


PRODUCTS = BackwardProducts(
    False, pack_transposed, dpreact_target, store_dpreact, back_product, pack_activations, add_weight_gradients
)
