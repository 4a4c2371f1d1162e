"""The backward pass's products on the bf16 unit, for which dpreact is stored in two layouts.

The product with the weights gives the gradients of the step before: its row operand's K blocks of 32 hold a panel's
units of two gates, in turns. The product with [x, 1, h], a sum over all steps and batch rows, gives the gradients of
the weights: its column operand holds two batch rows side by side.
"""

from fastlstm.backends.numba.constants import CHUNKS_IN_SUBTOTAL, K_BLOCKS_TOGETHER, ONE_OFFSET, ROW_BLOCK
from fastlstm.backends.numba.kernels.layout import count_vector_groups, first_vector
from fastlstm.backends.numba.kernels.matrix_forward import TILES, copy_square
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.row_masks import correct_states, zero_held
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, read_rows, write_rows
from fastlstm.backends.numba.kernels.states import dpreact_slot
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.kernels.weight_gradients import accumulator_address
from fastlstm.backends.numba.llvm.intrinsics import call


def even(rows):
    """Return the next even number: two batch rows stand side by side, the last of an odd number beside zeros."""
    return rows + rows % 2


def count_k_blocks(a, steps):
    """Return the number of K blocks of 32 (step, row) pairs."""
    return (steps * even(a.B) + 31) // 32


def pack_transposed(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Pack vector groups `first` to `last` of (4 H, N) weights as a column operand."""
    L, H = a.lanes, a.H
    panels, vectors = a.panels, (N + L - 1) // L
    low_copy, high_copy = scratch, scratch + 16 * VECTOR
    for p in range(panels):
        units = min(L, H - p * L)
        for pair in range(2):
            for q in range(first, last):  # inside: the rows of weights are read from end to end
                for n in range(first_vector(vectors, q + 1) - first_vector(vectors, q)):
                    column = (first_vector(vectors, q) + n) * L
                    low = weight + (2 * pair * H + p * L) * weight_row + column * element_bytes(a)
                    high, low_row = low + H * weight_row, weight_row
                    if units < L or N - column < L or a.is_bfloat16 != 0:
                        copy_square(a, units, min(L, N - column), low, weight_row, low_copy)
                        copy_square(a, units, min(L, N - column), high, weight_row, high_copy)
                        low, high, low_row = low_copy, high_copy, VECTOR
                    target = packed + ((q * panels + p) * 2 + pair) * a.components * TILES + n * 1024
                    call(a.interleave, L, low, low_row, high, low_row, target, TILES, a.overflow_flag)


def dpreact_target(a, p, s, b, scratch):
    """Return where the cell stores dpreact, from where `store_dpreact` copies it."""
    return dpreact_slot(a, scratch)


def dpreact_row_address(a, s, b):
    """Return the address of row (s, b) of dpreact as a row operand, which has room for `dpreact_row_steps` steps."""
    return a.dpreact_rows + (s % a.dpreact_row_steps * a.B + b) * 64


def store_dpreact_columns(a, p, s, b, rows, dpre):
    """Store dpreact as the column operand of the weight gradients. The arguments are those of `store_dpreact`."""
    if a.dweights == 0:
        return
    row, flag = 4 * VECTOR, a.overflow_flag
    columns, blocks = a.dpreact_columns + s // a.chunk % a.ring * a.columns_bytes, count_k_blocks(a, a.chunk)
    block_bytes, first, count, done = a.components * TILES, (s % a.chunk * even(a.B) + b) // 2, rows // 2, 0
    while done < count:
        block, pair = (first + done) // 16, (first + done) % 16
        pairs = min(16 - pair, count - done)
        for gate in range(4):
            low = dpre + 2 * done * row + gate * VECTOR
            target = columns + (p * blocks + block) * block_bytes + gate * 1024 + pair * 64
            call(a.interleave, pairs, low, 2 * row, low + row, 2 * row, target, TILES, flag)
        done += pairs
    if rows % 2 != 0:  # the last row is paired with zeros
        block, pair = (first + count) // 16, (first + count) % 16
        for gate in range(4):
            low = dpre + (rows - 1) * row + gate * VECTOR
            target = columns + (p * blocks + block) * block_bytes + gate * 1024
            call(a.interleave, 1, low, 0, a.constants, 0, target + pair * 64, TILES, flag)


def store_dpreact_rows(a, p, s, b, rows, dpre):
    """Store dpreact as the row operand of the products with weights. The arguments are those of `store_dpreact`."""
    row, component_stride = 4 * VECTOR, 2 * a.panels * a.k_block_stride
    for pair in range(2):
        low, target = dpre + 2 * pair * VECTOR, dpreact_row_address(a, s, b) + (2 * p + pair) * a.k_block_stride
        call(a.interleave, rows, low, row, low + VECTOR, row, target, component_stride, a.overflow_flag)


def store_dpreact(a, p, s, b, rows, dpre):
    """Store dpreact (rows, 4, lanes) of panel p, step s and rows from `b` on in both layouts."""
    store_dpreact_rows(a, p, s, b, rows, dpre)
    store_dpreact_columns(a, p, s, b, rows, dpre)


def back_product(a, rows, b, s, of_h, packed, vectors, q, scratch):
    """Store the product of dpreact of step s with vector group q of the transposed weights in scratch."""
    panels = a.panels
    call(
        a.matrix_product, rows, a.constants, 0, scratch, 4 * VECTOR, dpreact_row_address(a, s, b), a.k_block_stride,
        2 * panels * a.k_block_stride, packed + q * 2 * panels * a.components * TILES, 2 * panels,
        (first_vector(vectors, q + 1) - first_vector(vectors, q) + 1) // 2, K_BLOCKS_TOGETHER,
    )  # fmt: skip


def input_gradient(a, scratch, s_first, s_last, thread, threads):
    """Compute dx for a time chunk: this thread's share of its vector groups and row blocks."""
    L, element, I, B, T = a.lanes, element_bytes(a), a.I, a.B, a.T
    vectors, rows = (I + L - 1) // L, (s_last - s_first) * B
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    items = count_vector_groups(vectors) * blocks
    for item in range(share(items, thread, threads), share(items, thread + 1, threads)):
        q, first = item // blocks, item % blocks * ROW_BLOCK
        column, count, done = first_vector(vectors, q) * L, min(ROW_BLOCK, rows - first), 0
        width = min((first_vector(vectors, q + 1) - first_vector(vectors, q)) * L, I - column)
        back_product(a, count, first % B, s_first + first // B, False, a.packed_ih, vectors, q, scratch)
        while done < count:
            s, b = s_first + (first + done) // B, (first + done) % B
            t, run = T - 1 - s if a.reverse != 0 else s, min(B - b, count - done)
            target = a.dx + ((t * a.rows + b) * I + column) * element
            write_rows(a, run, width, scratch + done * 4 * VECTOR, 4 * VECTOR, target, I * element)
            done += run


def gather(a, j, s_first, s_last, block, target):
    """Copy 16 columns of [x, 1, padding, h_in], from 16 j on, of the pairs of one K block to (32, 16), and zeros for
    pairs past the last, for h_in after a reset, and for held rows, whose padding may be NaN.
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
        if j >= x_groups:
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
        if j >= x_groups:
            correct_states(a, t, b, run, (j - x_groups) * L, valid, row, VECTOR)
        done += run


def pack_activations(a, chunk, thread, threads, scratch):
    """Pack this thread's share of [x, 1, h_in] of a time chunk, transposed, as a row operand."""
    if a.dweights == 0:
        return
    panels, groups, operand_rows = a.panels, a.accumulator_rows // 16, a.accumulator_rows
    strips, columns = a.strips + chunk % a.ring * a.strips_bytes, a.dpreact_columns + chunk % a.ring * a.columns_bytes
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
            for n in range(4 * a.components):
                column = columns + (p * blocks + used - 1) * a.components * TILES + n * 1024 + first * 64
                call(a.copy_rows, 16 - first, 0, 16, column, 0, column, 64)


def add_weight_gradients(a, chunk, k_set, p_first, p_last):
    """Add a time chunk to panels `p_first` to `p_last` of dweights, in one split-K set. Since the error of a long sum
    grows with its length, CHUNKS_IN_SUBTOTAL chunks are summed to a subtotal, and these to the total.
    """
    blocks, s = count_k_blocks(a, a.chunk), chunk * a.chunk
    used, rows = count_k_blocks(a, min(a.chunk, a.T - s)), a.accumulator_rows
    first, last = share(used, k_set, a.split_k), share(used, k_set + 1, a.split_k)
    strips, columns = a.strips + chunk % a.ring * a.strips_bytes, a.dpreact_columns + chunk % a.ring * a.columns_bytes
    chunks = (a.T + a.chunk - 1) // a.chunk
    has_subtotals = chunks > CHUNKS_IN_SUBTOTAL
    for p in range(p_first, p_last):
        out = accumulator_address(a, a.split_k + k_set if has_subtotals else k_set, p)
        begins = chunk == chunks - 1 or chunk % CHUNKS_IN_SUBTOTAL == CHUNKS_IN_SUBTOTAL - 1
        init, init_row = (a.constants, 0) if begins else (out, 4 * VECTOR)
        if begins and first == last:  # this set has no K block, so that no product sets its sums to a first value
            call(a.copy_rows, 1, 0, rows * 4 * a.lanes, out, 0, out, 0)
        call(
            a.matrix_product, rows, init, init_row, out, 4 * VECTOR, strips + first * rows * 64, rows * 64,
            blocks * rows * 64, columns + (p * blocks + first) * a.components * TILES, last - first, 2,
            max(last - first, 1),
        )  # fmt: skip
        if has_subtotals and chunk % CHUNKS_IN_SUBTOTAL == 0:
            total, width = accumulator_address(a, k_set, p), rows * 4 * a.lanes
            if chunk + CHUNKS_IN_SUBTOTAL >= chunks:
                call(a.copy_rows, 1, width, width, out, 0, total, 0)
            else:
                call(a.add_rows, 1, width, out, 0, total, 0)


def add_accumulators(a, chunk, thread, threads):
    """Add this thread's share of a time chunk to dweights, once all threads have passed the chunk."""
    panels = a.panels
    if a.dweights != 0:
        for k_set in range(a.split_k):  # a thread gets, as far as possible, sums over rows that it has computed
            first = max(share(a.split_k * panels, thread, threads) - k_set * panels, 0)
            last = min(share(a.split_k * panels, thread + 1, threads) - k_set * panels, panels)
            add_weight_gradients(a, chunk, k_set, first, last)


def add_gradients(a, scratch, chunk, rows, thread, threads):
    """Add this thread's share of a time chunk to the weight gradients, and compute that of dx."""
    s = chunk * a.chunk
    call(a.configure, 16)
    add_accumulators(a, chunk, thread, threads)
    if a.dx != 0:
        input_gradient(a, scratch, s, min(s + a.chunk, a.T), thread, threads)
    call(a.configure, max(rows, 1))


PRODUCTS = BackwardProducts(
    True, pack_transposed, pack_transposed, dpreact_target, store_dpreact, back_product,
    pack_activations, add_gradients,
)  # fmt: skip
