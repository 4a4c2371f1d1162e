"""The forward pass's products on the processor's own vectors: x and h are read where they lie.

Where x is wide, it has a sum of its own; a narrow x and h share one, if both are multiplied for all sums of the cell.
Few rows multiply an x with its own sum, and a lone row any x, for several steps at once.
"""

from fastlstm.backends.numba.kernels.ends import rows_to_last_active
from fastlstm.backends.numba.kernels.heads import add_heads
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    count_vector_groups,
    expand,
    first_h_preact,
    first_vector,
    gate_at,
    head_begin,
    head_end,
    is_compact,
    lone_of,
    product_of,
    seen_alike,
    seen_by,
    seen_from,
    spans_heads,
    vectors_of,
)
from fastlstm.backends.numba.kernels.shared import VECTOR, inlined, jit
from fastlstm.backends.numba.kernels.states import scratch_slot
from fastlstm.backends.numba.llvm.intrinsics import call

READS_H_UNPACKED, READS_X_UNPACKED = True, True  # preact reads h where the step before left it, and x where it lies


@jit
def states_at(a, place):
    """Where the panel of weight_hh lies that is packed at a place: a panel's own number, unless panels take turns."""
    return a.packed + place * a.span * a.of_h * VECTOR


@jit
def inputs_at(a, place):
    """Where the panel of weight_ih lies: behind all panels of weight_hh, so that steps which read these alone read one
    stream. With gaps between panels a lone row of 256 units took 1.15 times as long.
    """
    return states_at(a, a.places) + place * a.I * a.of_x * VECTOR


@jit
def biases_at(a, p):
    """Where the biases of panel p lie, one for each sum."""
    return a.biases + p * a.sums * VECTOR


@jit
def pack_panel(a, p, weight, weight_row, columns, of_h, panel):
    """Pack panel p of a weight as [group of vectors][k][gate][lane]. A compact panel is [k], with its gates side by
    side and then zeros. Units of several heads have zeros where one does not see what another sees.
    """
    L, S, H, gates = a.lanes, a.size, a.H, a.of_h if of_h else a.of_x
    valid, vectors = min(L, H - p * L), vectors_of(a, p, gates)
    width, begin = (a.head, seen_from(a, p)) if of_h else (columns, 0)
    if valid < L or width < columns:
        call(a.copy_rows, 1, 0, columns * vectors * L, panel, 0, panel, 0)
    for q in range(count_vector_groups(vectors)):
        first, last = first_vector(vectors, q), first_vector(vectors, q + 1)
        to, wide = panel + first * columns * VECTOR, (last - first) * VECTOR
        for gate in range(first, gates if last == vectors else last):
            row = (block_hh(a, gate) if of_h else block_ih(a, gate)) * H
            at, unit = to + gate_at(a, p, gate) - first * VECTOR, p * L
            while unit < p * L + valid:
                column = head_begin(a, unit) if of_h else 0
                end = head_end(a, unit, p * L + valid) if of_h else p * L + valid
                place = at + (unit - p * L) * S + (column - begin) * wide
                call(a.transpose, end - unit, width, weight + (row + unit) * weight_row, weight_row, place, wide)
                unit = end


@jit
def pack_hh(a, p, place):
    pack_panel(a, p, a.weight_hh, a.weight_hh_row, seen_by(a, p), True, states_at(a, place))


@jit
def pack_ih(a, p, place):
    pack_panel(a, p, a.weight_ih, a.weight_ih_row, a.I, False, inputs_at(a, place))


@jit
def pack_weights(a, p, place, scratch):
    pack_hh(a, p, place)
    pack_ih(a, p, place)


@jit
def input_preact_at(a, p, s, row):
    """Where what x makes of panel p's sums of step s lies, if there is memory for it: each batch row's sum where x has
    its own; otherwise the lone row's over whole blocks, then over the part of a block in which h follows.
    """
    return (
        a.input_preact
        + ((p * a.input_steps + s % a.input_steps) * (a.B if a.block_x != 0 else 2) + row) * a.sums * VECTOR
    )


@jit
def add_product(a, vectors, w, columns, first, last, block, rows, init, init_row, out, out_row, x, x_row):
    """``out = init +`` columns `first` to `last` of `rows` rows of x times a panel of so many vectors, in blocks. Of no
    columns it is a copy.
    """
    for q in range(count_vector_groups(vectors)):
        v, wide, k = first_vector(vectors, q), (first_vector(vectors, q + 1) - first_vector(vectors, q)) * VECTOR, first
        kernel, begin, begin_row, to = product_of(a, wide // VECTOR), init + v * VECTOR, init_row, out + v * VECTOR
        while True:
            w_k, x_k, count = w + v * columns * VECTOR + k * wide, x + k * a.size, min(block, last - k)
            call(kernel, rows, begin, begin_row, to, out_row, w_k, wide, x_k, x_row, a.size, count, 1, 0, 0, x, 0, 0)
            begin, begin_row, k = to, out_row, k + block
            if k >= last:
                break


@jit
def copy_sums(a, first, last, rows, source, source_row, target, target_row):
    """Sums that a product leaves out, of rows that it goes over."""
    if first < last:
        at, width = first * VECTOR, (last - first) * a.lanes
        call(a.copy_rows, rows, width, width, source + at, source_row, target + at, target_row)


@jit
def multiply_inputs(a, s, p, team_index, b_first, b_last):
    """If a block of `input_steps` steps begins at s, compute the products of x with panel p for all of them. A row then
    reads the weights once for these steps.
    """
    if a.input_steps != 0 and s % a.input_steps == 0:
        t, x_step = (a.T - 1 - s, -a.x_step) if a.reverse != 0 else (s, a.x_step)
        rows, x, biases, I = min(a.input_steps, a.T - s), a.x + t * a.x_step, biases_at(a, p), a.I
        vectors, w, wide = vectors_of(a, p, a.of_x), inputs_at(a, p), a.sums * VECTOR
        if a.block_x != 0:
            active = rows_to_last_active(
                a, t - rows + 1 if a.reverse != 0 else s, b_first, b_last - b_first
            )  # in any of them
            for b in range(b_first, b_first + active):
                x_b, out, out_row = x + b * a.x_row, input_preact_at(a, p, s, b), a.B * wide
                add_product(a, vectors, w, I, 0, I, a.block_x, rows, biases, 0, out, out_row, x_b, x_step)
                copy_sums(a, a.of_x, a.sums, rows, biases, 0, out, out_row)
        else:
            whole, out = I // a.block * a.block, input_preact_at(a, p, s, 0)
            if whole > 0:
                add_product(a, vectors, w, I, 0, whole, a.block, rows, biases, 0, out, 2 * wide, x, x_step)
            if whole < I:
                out += wide
                add_product(a, vectors, w, I, whole, I, a.block, rows, a.constants, 0, out, 2 * wide, x, x_step)


@inlined
def preact_of_row(a, s, p, place, panels, step, b, out, x, h_in):
    """preact of row b for `panels` panels from p on, `step` 1 or -1: the same sums, all blocks in one call. All see the
    same columns of h.
    """
    I, columns, wide = a.I, seen_by(a, p), step * a.sums * VECTOR
    of_h = columns if h_in != 0 else 0
    w_x, w_h = inputs_at(a, place), states_at(a, place)
    x_step, h_step = step * a.of_x * a.I * VECTOR, step * a.of_h * a.span * VECTOR
    init, init_step, part, part_step, first = biases_at(a, p), wide, a.constants, 0, a.block
    if a.input_steps != 0:
        rest, preact_step = (
            I % a.block if a.block_x == 0 else 0,
            input_preact_at(a, step, 0, 0) - input_preact_at(a, 0, 0, 0),
        )
        if rest != I or a.block_x != 0:  # whole blocks; an x of no columns has none, and feeds nothing
            init, init_step = input_preact_at(a, p, s, b), preact_step
        if rest != 0:
            part, part_step, first = input_preact_at(a, p, s, 1), preact_step, a.block - rest
        I = 0
        copy_sums(a, 0, first_h_preact(a), panels, init, init_step, out, wide)
    elif a.block_x != 0:
        vectors = vectors_of(a, p, a.of_x)
        for q in range(count_vector_groups(vectors)):
            v = first_vector(vectors, q)
            call(
                lone_of(a, first_vector(vectors, q + 1) - v), panels, init + v * VECTOR, init_step, out + v * VECTOR,
                wide, x, w_x + v * I * VECTOR, x_step, I, x, w_x, 0, 0, a.block_x, a.block_x, part, 0,
            )  # fmt: skip
        copy_sums(a, a.of_x, a.sums, panels, init, init_step, out, wide)
        init, init_step, I = out, wide, 0
    vectors, begin = vectors_of(a, p, a.of_h), first_h_preact(a) * VECTOR
    for q in range(count_vector_groups(vectors)):
        v = first_vector(vectors, q)
        call(
            lone_of(a, first_vector(vectors, q + 1) - v), panels, init + begin + v * VECTOR, init_step,
            out + begin + v * VECTOR, wide, x, w_x + v * a.I * VECTOR, x_step, I, h_in, w_h + v * columns * VECTOR,
            h_step, of_h, first, a.block, part + (v * VECTOR if part_step != 0 else 0), part_step,
        )  # fmt: skip


@inlined
def preact_of_only_row(a, s, p_first, p_last, scratch, x, h_in):
    """preact of the only row for panels `p_first` to `p_last`, none of them cut off, side by side in scratch. To and
    fro, as other rows.
    """
    if a.input_steps != 0 and s % a.input_steps == 0:
        for p in range(p_first, p_last):
            multiply_inputs(a, s, p, 0, 0, 1)
    begin = p_first
    while begin < p_last:
        end, h, p, step = seen_alike(a, begin, p_last), h_in, begin, 1
        if h_in != 0:
            h += seen_from(a, begin) * a.size
        if (s + a.flip) % 2 != 0:
            p, step = end - 1, -1
        out = scratch + (p - p_first) * a.sums * VECTOR
        crosses = spans_heads(a, begin)
        preact_of_row(a, s, p, p, end - begin, step, 0, out, x, 0 if crosses else h)
        if crosses and h_in != 0:  # no two panels of several heads see the same columns
            add_heads(a, p, 1, out, states_at(a, p), h, 0)
        begin = end


@inlined
def shared_sums(a, p, place, b, rows, init, out, wide, x, h_in, h_seen_row):
    """preact of panel p where x and h share their sums."""
    S, I, vectors, w_x, w_h = a.size, a.I, wide // VECTOR, inputs_at(a, place), states_at(a, place)
    columns = seen_by(a, p)
    used = I + columns if h_in != 0 else I
    for q in range(count_vector_groups(vectors)):
        v, k, w_row = first_vector(vectors, q), 0, (first_vector(vectors, q + 1) - first_vector(vectors, q)) * VECTOR
        kernel, begin, begin_row, to = product_of(a, w_row // VECTOR), init + v * VECTOR, 0, out + v * VECTOR
        while True:
            k_last = min(k + a.block, used)
            of_x, of_h = max(0, min(k_last, I) - k), max(0, k - I)  # columns of x, and of h before them
            x_k, h_k = x + b * a.x_row + k * S, h_in + b * h_seen_row + of_h * S
            w, w_2 = w_x + v * I * VECTOR + k * w_row, w_h + v * columns * VECTOR + of_h * w_row
            call(
                kernel, rows, begin, begin_row, to, wide, w, w_row, x_k, a.x_row, S, of_x, 1, 0, w_2 - w, h_k,
                h_seen_row, k_last - k - of_x,
            )  # fmt: skip
            begin, begin_row, k = to, wide, k_last
            if k >= used:
                break


@inlined
def preact(a, s, p, place, b, rows, part, b_first, b_last, scratch, x, h_in, h_seen_row):
    """preact of panel p, packed at `place`, for `rows` rows from `b` on, to scratch (rows, S, lanes). h_seen: the
    columns that the panel sees; if it is absent they are zero.
    """
    out, wide, dense = scratch, vectors_of(a, p, a.sums) * VECTOR, is_compact(a, p)
    if dense:
        out = scratch_slot(a, scratch, 0)
    init, init_row = biases_at(a, p), 0
    h_of_heads, crosses = h_in, spans_heads(a, p)
    if crosses:
        h_in = 0
    if rows == 1:
        preact_of_row(a, s, p, place, 1, 1, b, out, x + b * a.x_row, h_in + b * h_seen_row if h_in != 0 else 0)
    elif a.block_x == 0:
        shared_sums(a, p, place, b, rows, init, out, wide, x, h_in, h_seen_row)
    else:
        if a.input_steps != 0:
            init, init_row = input_preact_at(a, p, s, b), a.sums * VECTOR
            copy_sums(a, 0, first_h_preact(a), rows, init, init_row, out, wide)
        else:
            vectors, w, I = vectors_of(a, p, a.of_x), inputs_at(a, place), a.I
            add_product(a, vectors, w, I, 0, I, a.block_x, rows, init, 0, out, wide, x + b * a.x_row, a.x_row)
            copy_sums(a, a.of_x, a.sums, rows, init, 0, out, wide)
            init, init_row = out, wide
        seen, begin = seen_by(a, p), first_h_preact(a) * VECTOR
        columns = seen if h_in != 0 else 0
        if columns != 0 or a.input_steps != 0:
            add_product(
                a, vectors_of(a, p, a.of_h), states_at(a, place), seen, 0, columns, a.block, rows, init + begin,
                init_row, out + begin, wide, h_in + b * h_seen_row, h_seen_row,
            )  # fmt: skip
    if crosses and h_of_heads != 0:
        add_heads(a, p, rows, out, states_at(a, place), h_of_heads + b * h_seen_row, h_seen_row)
    if dense:
        expand(a, p, rows, out, scratch)


@jit
def pack_x_operand(a, s, part, b_first, b_last, x_first, x_last, scratch):
    pass


@jit
def pack_h_operand(a, s, p, b, rows, h, h_row, scratch):
    pass
