"""The backward pass's products on the processor's own vectors: dpreact against the weights, for the step before and
the input, and over all T B rows, for the weights.
"""

from fastlstm.backends.numba.constants import ONE_OFFSET, ROW_BLOCK, STRIP
from fastlstm.backends.numba.kernels.ends import correct_states, rows_to_last_active, zero_held
from fastlstm.backends.numba.kernels.gradients import accumulator_address, accumulator_bytes
from fastlstm.backends.numba.kernels.heads import back_product_of_heads
from fastlstm.backends.numba.kernels.in_place import back_product_in_place
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    columns_of_h,
    count_vector_groups,
    dpreact_of,
    first_h_preact,
    first_vector,
    gate_at,
    gather,
    head_begin,
    head_end,
    is_compact,
    product_of,
    seen_alike,
    seen_by,
    seen_from,
    summed_by,
    summed_from,
    terms_of,
    vectors_of,
)
from fastlstm.backends.numba.kernels.outer import write_weight_gradients
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR, jit
from fastlstm.backends.numba.kernels.states import terms_aside
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.llvm.intrinsics import call

BLOCK_ROWS = 128  # rows of dpreact and of a strip that stay in the L1 cache together: 16 + 12 KB at 8 lanes


@jit
def pack_transposed(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Column groups `first` to `last` of (gates H, N) weights to [group][k][3 or 4 vectors],
    k in the order of dpreact's panels. Of weight_hh a group has the panels whose units see any of its columns.
    """
    L, S, H, gates = a.lanes, a.size, a.H, a.of_h if of_h else a.of_x
    panels, vectors = a.panels, (N + L - 1) // L
    own, reach = (a.head, a.reach) if of_h else (N, panels)
    for p in range(panels):
        units = min(L, H - p * L)
        for gate in range(gates):
            row = gate_at(a, p, gate) // S
            row_last = gate_at(a, p, gate + 1) // S if gate + 1 < gates else vectors_of(a, p, gates) * L
            source = weight + (block_hh(a, gate) if of_h else block_ih(a, gate)) * H * weight_row
            for q in range(first, last):  # innermost: whole rows of weights are read one after the other
                column, before = first_vector(vectors, q) * L, p - summed_from(a, q) if of_h else p
                if before < 0 or (of_h and before >= summed_by(a, q)):
                    continue
                wide = 4 if first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 else 3
                to = packed + (q * reach * 4 * VECTOR + before * wide * VECTOR) * gates * L + row * wide * VECTOR
                if of_h and a.heads > 1:
                    call(a.copy_rows, units, 0, wide * L, source, 0, to, wide * VECTOR)
                unit, unit_last = p * L, p * L + units
                while unit < unit_last:  # of one head
                    head = head_begin(a, unit) if of_h else 0
                    end = head_end(a, unit, unit_last) if of_h else unit_last
                    begin, stop = max(column, head), min(min(column + wide * L, N), head + own)
                    if begin < stop:
                        call(
                            a.copy_rows, end - unit, stop - begin, wide * L - (begin - column),
                            source + unit * weight_row + (begin - head) * S, weight_row,
                            to + (unit - p * L) * wide * VECTOR + (begin - column) * S, wide * VECTOR,
                        )  # fmt: skip
                    unit = end
                to += units * wide * VECTOR
                call(a.copy_rows, row_last - row - units, 0, wide * L, source, 0, to, wide * VECTOR)


pack_transposed_inputs = pack_transposed


@jit
def dpreact_place(a, p, s, b, scratch):
    """Where the cells' backward pass leaves dpreact (rows, S + P, lanes)."""
    return terms_aside(a, scratch) if is_compact(a, p) else dpreact_of(a, p, s, b)


@jit
def store_dpreact(a, p, s, b, rows, dpre):
    """Lay out dpreact for the products with it."""
    if is_compact(a, p):
        gather(a, p, rows, dpre, dpreact_of(a, p, s, b))


@jit
def back_product(a, rows, b, s, of_h, packed, vectors, q, scratch):
    """``scratch`` (rows, 4 vectors) = dpreact of step s times column group q of the transposed weights."""
    if packed == 0:
        back_product_in_place(a, rows, b, s, of_h, vectors, q, scratch)
        return
    if of_h and a.heads > 1:
        back_product_of_heads(a, rows, b, s, packed, vectors, q, scratch)
        return
    L, gates, shift = a.lanes, a.of_h if of_h else a.of_x, first_h_preact(a) * VECTOR if of_h else 0
    panels, terms = (a.H + L - 1) // L, terms_of(a)
    wide = 4 if first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 else 3
    kernel = a.product4 if wide == 4 else a.product3
    blocks = (panels * gates * L + BLOCK_K - 1) // BLOCK_K
    block = (panels + blocks - 1) // blocks  # panels
    init, init_row = a.constants, 0
    # a last panel of its own width
    last, narrow = dpreact_of(a, panels - 1, s, b), 1 if is_compact(a, panels - 1) else 0
    last_row, last_columns = vectors_of(a, panels - 1, terms) * VECTOR, gates * (a.H - (panels - 1) * L)
    for p in range(0, panels, block):
        dpre = dpreact_of(a, p, s, b) + shift
        w = packed + (q * panels * 4 * VECTOR + p * wide * VECTOR) * gates * L
        at_end = narrow if p + block >= panels else 0
        call(
            kernel, rows, init, init_row, scratch, 4 * VECTOR, w, wide * VECTOR, dpre, terms * VECTOR, a.size,
            gates * L, min(block, panels - p) - at_end, a.kept * a.B * terms * VECTOR, gates * L * wide * VECTOR,
            last, last_row, at_end * last_columns,
        )  # fmt: skip
        init, init_row = scratch, 4 * VECTOR


@jit
def input_gradient(a, scratch, s_first, s_last, thread, threads):
    """dx = dpreact times weight_ih for a chunk of steps, this thread's rows of it."""
    L, S, I, B, T = a.lanes, a.size, a.I, a.B, a.T
    vectors = (I + L - 1) // L
    rows = (s_last - s_first) * B
    first, last = share(rows, thread, threads), share(rows, thread + 1, threads)
    q_first, q_last = 0, count_vector_groups(vectors)
    if rows == 1:  # threads share its columns instead
        first, last, q_first, q_last = 0, 1, share(q_last, thread, threads), share(q_last, thread + 1, threads)
    while first < last:
        s, b = s_first + first // B, first % B
        count = min(min(ROW_BLOCK, B - b), last - first)
        t = T - 1 - s if a.reverse != 0 else s
        active = rows_to_last_active(a, t, b, count)
        for q in range(q_first, q_last):
            column = first_vector(vectors, q) * L
            width = min((first_vector(vectors, q + 1) - first_vector(vectors, q)) * L, I - column)
            back_product(a, active, b, s, False, a.packed_ih, vectors, q, scratch)
            to = a.dx + ((t * a.rows + b) * I + column) * S
            call(a.copy_rows, active, width, width, scratch, 4 * VECTOR, to, I * S)
            call(a.copy_rows, count - active, 0, width, scratch, 0, to + active * I * S, I * S)
        first += count


@jit
def pack_strips(a, strips, s_first, s_last, b_first, b_last):
    """Rows (s, b) of [x, h_prev, 1], of batch rows `b_first` to `b_last`, to [strip][row][column], where `sums_of_h`
    and `sum_of_one` say; h_prev is what the step saw: zero after a reset. Without `dweights` there are no ones. What is
    left of a strip is zero: few rows multiply it, and old memory may hold denormals, which are slow.
    """
    S, I, H, B, T, R, wide = a.size, a.I, a.H, a.B, a.T, a.rows, a.strip * a.size
    first_h, last_h = a.sums_of_h, a.sums_of_h + columns_of_h(a)
    last = a.sum_of_one + 1 if a.dweights != 0 else (last_h + a.strip - 1) // a.strip * a.strip
    next_strip, count = (s_last - s_first) * B * wide - wide, b_last - b_first
    for s in range(s_first, s_last):
        t, t_prev = (T - 1 - s, T - s) if a.reverse != 0 else (s, s - 1)
        x, h, h_row = a.x + t * a.x_step + b_first * a.x_row, a.h + (t_prev * R + b_first) * H * S, H * S
        if s == 0:
            h, h_row = a.h_0 + b_first * a.h_0_row, a.h_0_row
        to, room, column = strips + ((s - s_first) * B + b_first) * wide, a.strip, 0
        while column < last:
            run = room
            if column < I:
                run = min(I - column, room)
                call(a.copy_rows, count, run, run, x + column * S, a.x_row, to, wide)
            elif first_h <= column < last_h:
                run = min(last_h - column, room)
                call(a.copy_rows, count, run, run, h + (column - first_h) * S, h_row, to, wide)
                correct_states(a, t, b_first, count, column - first_h, run, to, wide)
            elif column == a.sum_of_one:
                run = 1
                call(a.copy_rows, count, 1, 1, a.constants + ONE_OFFSET, 0, to, wide)
            else:
                call(a.copy_rows, count, 0, run, to, 0, to, wide)
            if column != a.sum_of_one:  # a held row has no part: its padding may be NaN
                zero_held(a, t, b_first, count, run, to, wide)
            column, room, to = column + run, room - run, to + run * S
            if room == 0:
                room, to = a.strip, to + next_strip


@jit
def active_range(a, s_first, first, rows):
    """Steps, and rows of each from `first` on, that all which is not held lies in, of `rows` rows (step, row). Rows
    that are reset are summed in the order of those that end, a step at a time.
    """
    if a.lengths == 0 and a.reset == 0:
        return 1, rows
    if first % a.B + rows > a.B and (first % a.B != 0 or rows % a.B != 0):
        return 1, rows
    steps, row = max(1, rows // a.B), first % a.B
    s = s_first + first // a.B
    earliest = a.T - s - steps if a.reverse != 0 else s
    return steps, max(1, rows_to_last_active(a, earliest, row, rows // steps))  # a row at least: the sums begin with it


@jit
def add_products(a, strips, s_first, s_last, half, p_first, p_last, column, column_last, shift, gate, gates):
    """Add a chunk of steps to what `columns` have in panels `p_first` to `p_last` of dweights, over half of the batch
    rows, or over all where `halves` is one: their sums with terms of dpreact, `gates` from `gate` on. The sums start as
    those of the last steps: every row in one order, whoever else works beside. A column's sum lies `shift` rows before
    the row of its number.
    """
    all_rows = (s_last - s_first) * a.B
    first, rows = share(all_rows, half, a.halves), share(all_rows, half + 1, a.halves) - share(all_rows, half, a.halves)
    steps, rows = active_range(a, s_first, first, rows)
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    block = rows if steps > 1 else (rows + blocks - 1) // max(blocks, 1)
    begin, end = column // STRIP, (column_last + STRIP - 1) // STRIP if column < column_last else 0
    for j in range(begin, end):  # to and fro: the sums touched last are still in the L2 cache
        n = j if s_first // a.chunk % 2 == 0 else begin + end - 1 - j
        k, width = max(column, n * STRIP), min(column_last, (n + 1) * STRIP) - max(column, n * STRIP)
        strip = strips + ((n * all_rows + first) * STRIP + k - n * STRIP) * a.size
        for p in range(p_first, p_last):
            out = accumulator_address(a, half, p) + (k - shift) * accumulator_bytes(a)
            dpre = dpreact_of(a, p, s_first, first) + gate_at(a, p, gate)
            vectors, dpre_row = vectors_of(a, p, gates), vectors_of(a, p, terms_of(a)) * VECTOR
            for q in range(count_vector_groups(vectors)):
                v = first_vector(vectors, q)
                kernel, to = product_of(a, first_vector(vectors, q + 1) - v), out + v * VECTOR
                init, init_row = (a.constants, 0) if s_last == a.T else (to, accumulator_bytes(a))
                for r in range(0, rows, block):
                    call(
                        kernel, width, init, init_row, to, accumulator_bytes(a),
                        dpre + v * VECTOR + r * dpre_row, dpre_row, strip + r * STRIP * a.size, a.size, STRIP * a.size,
                        min(block, rows - r), steps, a.B * STRIP * a.size, a.B * dpre_row, strip, 0, 0,
                    )  # fmt: skip
                    init, init_row = to, accumulator_bytes(a)


@jit
def add_weight_gradients(a, strips, s_first, s_last, half, p_first, p_last):
    """Add a chunk of steps to what x, h and ones are multiplied with: if all have the same terms at once, see
    `sizes.sum_places`.
    """
    of_h, of_one, columns = a.sums_of_h, a.sum_of_one, columns_of_h(a)
    if a.joint != 0 and a.params == 0 and a.heads == 1:
        add_products(a, strips, s_first, s_last, half, p_first, p_last, 0, of_one + 1, 0, 0, a.sums)
        return
    add_products(a, strips, s_first, s_last, half, p_first, p_last, 0, a.I, 0, 0, a.of_x)
    p, first, unseen = p_first, first_h_preact(a), columns - min(a.span, columns)
    while p < (p_last if columns != 0 else p_first):
        end, seen = seen_alike(a, p, p_last), seen_from(a, p)
        begin = of_h + seen
        add_products(a, strips, s_first, s_last, half, p, end, begin, begin + seen_by(a, p), seen, first, a.of_h)
        p = end
    add_products(a, strips, s_first, s_last, half, p_first, p_last, of_one, of_one + 1, unseen, 0, terms_of(a))


@jit
def pack_activations(a, chunk, thread, threads, scratch):
    """What the weight gradients of a chunk of steps are sums over, this thread's batch rows of it."""
    strips, s = a.strips + chunk % a.ring * a.strips_bytes, chunk * a.chunk
    b_first, b_last = share(a.B, thread, threads), share(a.B, thread + 1, threads)
    if a.strips != 0:
        pack_strips(a, strips, s, min(s + a.chunk, a.T), b_first, b_last)


@jit
def add_gradients(a, scratch, chunk, rows, thread, threads):
    """This thread's part of the gradients of the weights and of x, for a chunk of steps that all have been through."""
    panels = a.panels
    first, last = share(panels, thread, threads), share(panels, thread + 1, threads)
    strips, s, s_last = a.strips + chunk % a.ring * a.strips_bytes, chunk * a.chunk, min((chunk + 1) * a.chunk, a.T)
    if a.dweights != 0:
        for half in range(a.halves):  # each thread the sums over rows that it has seen itself, so far as that goes
            begin = max(share(a.halves * panels, thread, threads) - half * panels, 0)
            end = min(share(a.halves * panels, thread + 1, threads) - half * panels, panels)
            add_weight_gradients(a, strips, s, s_last, half, begin, end)
    elif a.strips != 0:
        write_weight_gradients(a, strips, scratch, first, last)
    if a.dx != 0:
        input_gradient(a, scratch, s, s_last, thread, threads)
