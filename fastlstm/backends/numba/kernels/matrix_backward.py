"""The backward pass's products on the matrix unit.

dpreact is laid out twice: as rows, for the products with the weights, a step of 32 being a panel's units of two gates
beside each other; and as columns, for the sums over all T B rows, where batch rows stand in pairs. These are summed
against the transposed [x, 1, h] of as many batch rows.
"""

from fastlstm.backends.numba.constants import BLOCK_STEPS, FOLD, ONE_OFFSET, ROW_BLOCK
from fastlstm.backends.numba.kernels.ends import correct_states, zero_held
from fastlstm.backends.numba.kernels.gradients import accumulator_address
from fastlstm.backends.numba.kernels.layout import count_vector_groups, first_vector
from fastlstm.backends.numba.kernels.matrix_forward import TILES, square_of
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, jit, read_rows, write_rows
from fastlstm.backends.numba.kernels.states import terms_aside
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def even(rows):
    """Batch rows stand in pairs: an odd one gets zeros beside it."""
    return rows + rows % 2


@jit
def blocks_of(a, steps):
    """Blocks of 32 (step, row) pairs."""
    return (steps * even(a.B) + 31) // 32


@jit
def pack_transposed(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Column groups `first` to `last` of (4H, N) weights to columns."""
    L, H = a.lanes, a.H
    panels, vectors = a.panels, (N + L - 1) // L
    aside, beside = scratch, scratch + 16 * VECTOR
    for p in range(panels):
        units = min(L, H - p * L)
        for pair in range(2):
            for q in range(first, last):  # inside: the rows of weights are read from end to end
                for n in range(first_vector(vectors, q + 1) - first_vector(vectors, q)):
                    column = (first_vector(vectors, q) + n) * L
                    low = weight + (2 * pair * H + p * L) * weight_row + column * element_bytes(a)
                    high, low_row = low + H * weight_row, weight_row
                    if units < L or N - column < L or a.is_narrow != 0:
                        square_of(a, units, min(L, N - column), low, weight_row, aside)
                        square_of(a, units, min(L, N - column), high, weight_row, beside)
                        low, high, low_row = aside, beside, VECTOR
                    to = packed + ((q * panels + p) * 2 + pair) * a.pieces * TILES + n * 1024
                    call(a.pairs, L, low, low_row, high, low_row, to, TILES, a.large)


pack_transposed_inputs = pack_transposed


@jit
def dpreact_place(a, p, s, b, scratch):
    """Where the cells' backward pass leaves dpreact: `store_dpreact` lays it out."""
    return terms_aside(a, scratch)


@jit
def rows_at(a, s, b):
    """Row (s, b) of dpreact as rows, of which `rows_kept` steps are kept."""
    return a.dpreact_rows + (s % a.rows_kept * a.B + b) * 64


@jit
def store_dpreact_columns(a, p, s, b, rows, dpre):
    """Lay out dpreact as `store_dpreact` is told of, for the sums over rows: as columns."""
    if a.dweights == 0:
        return
    wide = 4 * VECTOR
    columns, blocks = a.columns + s // a.chunk % a.ring * a.columns_bytes, blocks_of(a, a.chunk)
    piece, first, count, done = a.pieces * TILES, (s % a.chunk * even(a.B) + b) // 2, rows // 2, 0
    while done < count:
        block, row = (first + done) // 16, (first + done) % 16
        number = min(16 - row, count - done)
        for gate in range(4):
            low = dpre + 2 * done * wide + gate * VECTOR
            to = columns + (p * blocks + block) * piece + gate * 1024 + row * 64
            call(a.pairs, number, low, 2 * wide, low + wide, 2 * wide, to, TILES, a.large)
        done += number
    if rows % 2 != 0:  # beside the last row stand zeros
        block, row = (first + count) // 16, (first + count) % 16
        for gate in range(4):
            low, to = dpre + (rows - 1) * wide + gate * VECTOR, columns + (p * blocks + block) * piece + gate * 1024
            call(a.pairs, 1, low, 0, a.constants, 0, to + row * 64, TILES, a.large)


@jit
def store_dpreact_rows(a, p, s, b, rows, dpre):
    """Lay out dpreact as `store_dpreact` is told of, for products with the weights: as rows."""
    panels, wide = a.panels, 4 * VECTOR
    piece = 2 * panels * a.pitch
    for pair in range(2):
        low, to = dpre + 2 * pair * VECTOR, rows_at(a, s, b) + (2 * p + pair) * a.pitch
        call(a.pairs, rows, low, wide, low + VECTOR, wide, to, piece, a.large)


@jit
def store_dpreact(a, p, s, b, rows, dpre):
    """Lay out dpreact (rows, 4, lanes) of panel p, step s and rows from `b` on."""
    store_dpreact_rows(a, p, s, b, rows, dpre)
    store_dpreact_columns(a, p, s, b, rows, dpre)


@jit
def back_product(a, rows, b, s, of_h, packed, vectors, q, scratch):
    """``scratch`` (rows, 4 vectors) = dpreact of step s times column group q of the transposed weights."""
    panels = a.panels
    call(
        a.matrix_product, rows, a.constants, 0, scratch, 4 * VECTOR, rows_at(a, s, b), a.pitch, 2 * panels * a.pitch,
        packed + q * 2 * panels * a.pieces * TILES, 2 * panels,
        (first_vector(vectors, q + 1) - first_vector(vectors, q) + 1) // 2, BLOCK_STEPS,
    )  # fmt: skip


@jit
def input_gradient(a, scratch, s_first, s_last, thread, threads):
    """dx = dpreact times weight_ih for a chunk of steps, this thread's columns of it, or rows where columns are few."""
    L, S, I, B, T = a.lanes, element_bytes(a), a.I, a.B, a.T
    vectors, rows = (I + L - 1) // L, (s_last - s_first) * B
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    units = count_vector_groups(vectors) * blocks
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        q, first = unit // blocks, unit % blocks * ROW_BLOCK
        column, count, done = first_vector(vectors, q) * L, min(ROW_BLOCK, rows - first), 0
        width = min((first_vector(vectors, q + 1) - first_vector(vectors, q)) * L, I - column)
        back_product(a, count, first % B, s_first + first // B, False, a.packed_ih, vectors, q, scratch)
        while done < count:
            s, b = s_first + (first + done) // B, (first + done) % B
            t, run = T - 1 - s if a.reverse != 0 else s, min(B - b, count - done)
            to = a.dx + ((t * a.rows + b) * I + column) * S
            write_rows(a, run, width, scratch + done * 4 * VECTOR, 4 * VECTOR, to, I * S)
            done += run


@jit
def gather(a, j, s_first, s_last, block, to):
    """Rows (s, b) of one block, 16 columns of [x, 1, padding, h_prev] from 16 j on: to (32, 16), zeros past the last.
    h_prev is what the step saw: zero after a reset. A held row has no part: its padding may be NaN.
    """
    L, S, I, H, B, T, R = a.lanes, a.size, a.I, a.H, a.B, a.T, a.rows
    row, last, of_x, wide = block * 32, (s_last - s_first) * even(B), a.sums_of_h // L, element_bytes(a)
    done = 0
    while done < 32:
        b, s = (row + done) % even(B), s_first + (row + done) // even(B)
        at = to + done * VECTOR
        if row + done >= last or b == B:
            run = min(even(B) - b if row + done < last else 32, 32 - done)
            call(a.copy_rows, run, 0, L, at, 0, at, VECTOR)
            done += run
            continue
        run = min(B - b, 32 - done)
        t, t_prev = (T - 1 - s, T - s) if a.reverse != 0 else (s, s - 1)
        source, source_row, narrow = a.x + t * a.x_step + b * a.x_row + j * L * wide, a.x_row, a.is_narrow
        valid = max(0, min(L, I - j * L))
        if j >= of_x:
            unit = (j - of_x) * L
            source, source_row, valid = a.h + ((t_prev * R + b) * H + unit) * wide, H * wide, min(L, H - unit)
            if s == 0:
                source, source_row, narrow = a.h_0 + b * a.h_0_row + unit * S, a.h_0_row, 0
        read_rows(a, narrow, run, valid, L, source, source_row, at, VECTOR)
        if j == I // L:
            call(a.copy_rows, run, 1, 1, a.constants + ONE_OFFSET, 0, at + I % L * S, VECTOR)
        zero_held(a, t, b, run, L, at, VECTOR)
        if j >= of_x:
            correct_states(a, t, b, run, (j - of_x) * L, valid, at, VECTOR)
        done += run


@jit
def pack_activations(a, chunk, thread, threads, scratch):
    """This thread's share of what the weight gradients of a chunk of steps are sums over."""
    if a.dweights == 0:
        return
    panels, groups = a.panels, a.sum_rows // 16
    strips, columns = a.strips + chunk % a.ring * a.strips_bytes, a.columns + chunk % a.ring * a.columns_bytes
    s, blocks = chunk * a.chunk, blocks_of(a, a.chunk)
    s_last = min(s + a.chunk, a.T)
    used, filled = blocks_of(a, s_last - s), (s_last - s) * even(a.B)
    tile, piece = scratch + 32 * VECTOR, blocks * a.sum_rows * 64
    for unit in range(share(used * groups, thread, threads), share(used * groups, thread + 1, threads)):
        block, j = unit // groups, unit % groups
        gather(a, j, s, s_last, block, scratch)
        call(a.pairs, 16, scratch, 2 * VECTOR, scratch + VECTOR, 2 * VECTOR, tile, 1024, a.large)
        call(a.transpose_tiles, a.pieces, tile, 1024, strips + (block * a.sum_rows + j * 16) * 64, piece)
    first = filled // 2 % 16  # pairs beyond the last row
    if first != 0:
        for p in range(share(panels, thread, threads), share(panels, thread + 1, threads)):
            for n in range(4 * a.pieces):
                at = columns + (p * blocks + used - 1) * a.pieces * TILES + n * 1024 + first * 64
                call(a.copy_rows, 16 - first, 0, 16, at, 0, at, 64)


@jit
def add_weight_gradients(a, chunk, half, p_first, p_last):
    """Add a chunk of steps to panels `p_first` to `p_last` of dweights over half of the batch rows, or over all where
    `halves` is one. Sums of many chunks are sums of sums over FOLD: the error of one long sum would grow with it.
    """
    blocks, s = blocks_of(a, a.chunk), chunk * a.chunk
    used = blocks_of(a, min(a.chunk, a.T - s))
    first, last = share(used, half, a.halves), share(used, half + 1, a.halves)
    strips, columns = a.strips + chunk % a.ring * a.strips_bytes, a.columns + chunk % a.ring * a.columns_bytes
    chunks = (a.T + a.chunk - 1) // a.chunk
    folds = chunks > FOLD
    for p in range(p_first, p_last):
        out = accumulator_address(a, a.halves + half if folds else half, p)
        begins = chunk == chunks - 1 or chunk % FOLD == FOLD - 1
        init, init_row = (a.constants, 0) if begins else (out, 4 * VECTOR)
        if begins and first == last:  # a lone block is the other half's, and no product starts this one's sums
            call(a.copy_rows, 1, 0, a.sum_rows * 4 * a.lanes, out, 0, out, 0)
        call(
            a.matrix_product, a.sum_rows, init, init_row, out, 4 * VECTOR, strips + first * a.sum_rows * 64,
            a.sum_rows * 64, blocks * a.sum_rows * 64, columns + (p * blocks + first) * a.pieces * TILES,
            last - first, 2, max(last - first, 1),
        )  # fmt: skip
        if folds and chunk % FOLD == 0:
            total, width = accumulator_address(a, half, p), a.sum_rows * 4 * a.lanes
            if chunk + FOLD >= chunks:
                call(a.copy_rows, 1, width, width, out, 0, total, 0)
            else:
                call(a.add_rows, 1, width, out, 0, total, 0)


@jit
def add_sums(a, chunk, thread, threads):
    """This thread's part of the weights' gradients, for a chunk of steps that all have been through."""
    panels = a.panels
    if a.dweights != 0:
        for half in range(a.halves):  # each thread the sums over rows that it has seen itself, so far as that goes
            first = max(share(a.halves * panels, thread, threads) - half * panels, 0)
            last = min(share(a.halves * panels, thread + 1, threads) - half * panels, panels)
            add_weight_gradients(a, chunk, half, first, last)


@jit
def add_gradients(a, scratch, chunk, rows, thread, threads):
    """This thread's part of the gradients of the weights and of x, for a chunk of steps that all have been through."""
    s = chunk * a.chunk
    call(a.configure, 16)
    add_sums(a, chunk, thread, threads)
    if a.dx != 0:
        input_gradient(a, scratch, s, min(s + a.chunk, a.T), thread, threads)
    call(a.configure, max(rows, 1))
