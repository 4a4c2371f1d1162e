"""The forward pass's products on the processor's own vectors: x and h are read where they lie.

Where x is wide, it has a sum of its own; a narrow x and h share one. Few rows multiply a wide x, and a lone row a
narrow one too, for several steps at once.
"""

from fastlstm.backends.numba.kernels.ends import rows_alive
from fastlstm.backends.numba.kernels.layout import gate_at, lone_of, product_of, spread, vectors_of
from fastlstm.backends.numba.kernels.shared import CHUNK, VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call

READS_STATES, READS_INPUTS = True, True  # preact reads h where the step before left it, and x where it lies


@jit
def states_at(a, place):
    """Where the panel of weight_hh lies that is packed at a place: a panel's own number, unless panels take turns."""
    return a.packed + place * a.H * 4 * VECTOR


@jit
def inputs_at(a, place):
    """Where the panel of weight_ih lies: behind all panels of weight_hh, so that steps which read these alone read one
    stream. With gaps between panels a lone row of 256 units took 1.15 times as long.
    """
    return states_at(a, a.places) + place * a.I * 4 * VECTOR


@jit
def pack_panel(a, p, weight, weight_row, columns, panel):
    """Panel p of a weight to [k][gate][lane], or [k] and its gates side by side (see `vectors_of`), then zeros."""
    L, H, S = a.lanes, a.H, a.size
    valid, wide = min(L, H - p * L), vectors_of(a, p) * VECTOR
    if valid < L:
        call(a.copy_rows, 1, 0, columns * wide // S, panel, 0, panel, 0)
    for gate in range(4):
        row = gate * H + p * L
        call(a.transpose, valid, columns, weight + row * weight_row, weight_row, panel + gate_at(a, p, gate), wide)


@jit
def pack_states(a, p, place):
    pack_panel(a, p, a.weight_hh, a.weight_hh_row, a.H, states_at(a, place))


@jit
def pack_weights(a, p, place, scratch):
    pack_states(a, p, place)
    pack_panel(a, p, a.weight_ih, a.weight_ih_row, a.I, inputs_at(a, place))


@jit
def fed(a, p, s, row):
    """Where what x makes of panel p's sums of step s lies, if there is memory for it: each batch row's sum where x has
    its own; otherwise the lone row's over whole blocks, then over the part of a block in which h follows.
    """
    return a.fed + ((p * a.feed + s % a.feed) * (a.B if a.block_x != 0 else 2) + row) * 4 * VECTOR


@jit
def input_product(a, p, first, last, block, init, rows, x, x_row, out, out_row):
    """Columns `first` to `last` of `rows` rows of x times panel p of weight_ih, in blocks."""
    vectors, init_row = vectors_of(a, p), 0
    for k in range(first, last, block):
        x_k, w_k, count = x + k * a.size, inputs_at(a, p) + k * vectors * VECTOR, min(block, last - k)
        kernel = product_of(a, vectors)
        call(kernel, rows, init, init_row, out, out_row, w_k, x_k, x_row, a.size, count, 1, 0, 0, x, 0, 0)
        init, init_row = out, out_row


@jit
def most_alive(a, s, steps, b_first, b_last):
    """How many of the batch rows from `b_first` on go on in one of these steps, and those before them."""
    return rows_alive(a, a.T - s - steps if a.reverse != 0 else s, b_first, b_last - b_first)


@jit
def multiply_inputs(a, s, p, part, b_first, b_last):
    """What panel p's sums of `feed` steps from s on start from, where these begin: a row reads the weights once for all
    of them.
    """
    if a.feed != 0 and s % a.feed == 0:
        t, x_step = (a.T - 1 - s, -a.x_step) if a.reverse != 0 else (s, a.x_step)
        rows, x, biases = min(a.feed, a.T - s), a.x + t * a.x_step, a.biases + p * 4 * VECTOR
        if a.block_x != 0:
            for b in range(b_first, b_first + most_alive(a, s, rows, b_first, b_last)):
                x_b, out = x + b * a.x_row, fed(a, p, s, b)
                input_product(a, p, 0, a.I, a.block_x, biases, rows, x_b, x_step, out, a.B * 4 * VECTOR)
        else:
            whole, out = a.I // a.block * a.block, fed(a, p, s, 0)
            input_product(a, p, 0, whole, a.block, biases, rows, x, x_step, out, 8 * VECTOR)
            input_product(a, p, whole, a.I, a.block, a.constants, rows, x, x_step, out + 4 * VECTOR, 8 * VECTOR)


@jit
def preact_of_one(a, s, p, place, panels, step, b, out, x, h_seen):
    """preact of row b for `panels` panels from p on, `step` 1 or -1: the same sums, all blocks in one call."""
    vectors, I, of_h = vectors_of(a, p), a.I, a.H if h_seen != 0 else 0
    wide = step * 4 * VECTOR
    kernel, w_x, w_h = lone_of(a, vectors), inputs_at(a, place), states_at(a, place)
    init, init_step, part, part_step, first = a.biases + p * 4 * VECTOR, wide, a.constants, 0, a.block
    if a.feed != 0:
        rest, fed_step = I % a.block if a.block_x == 0 else 0, fed(a, step, 0, 0) - fed(a, 0, 0, 0)
        if rest != I:  # whole blocks; an x of no columns has none, and feeds nothing
            init, init_step = fed(a, p, s, b), fed_step
        if rest != 0:
            part, part_step, first = fed(a, p, s, 1), fed_step, a.block - rest
        I = 0
    elif a.block_x != 0:
        call(
            kernel, panels, init, init_step, out, wide, x, w_x, wide * I, I, x, w_x, 0, 0, a.block_x, a.block_x, part, 0
        )  # fmt: skip
        init, init_step, I = out, wide, 0
    call(
        kernel, panels, init, init_step, out, wide, x, w_x, wide * a.I, I, h_seen, w_h, wide * a.H, of_h, first,
        a.block, part, part_step,
    )  # fmt: skip


@jit
def preact_of_lone(a, s, p_first, p_last, scratch, x, h_seen):
    """preact of the only row for panels `p_first` to `p_last`, none of them cut off, side by side in scratch. To and
    fro, as other rows.
    """
    if a.feed != 0 and s % a.feed == 0:
        for p in range(p_first, p_last):
            multiply_inputs(a, s, p, 0, 0, 1)
    if (s + a.flip) % 2 == 0:
        preact_of_one(a, s, p_first, p_first, p_last - p_first, 1, 0, scratch, x, h_seen)
    else:
        p = p_last - 1
        preact_of_one(a, s, p, p, p_last - p_first, -1, 0, scratch + (p - p_first) * 4 * VECTOR, x, h_seen)


@jit
def preact(a, s, p, place, b, rows, part, b_first, b_last, scratch, x, h_seen, h_seen_row):
    """preact of panel p, packed at `place`, for `rows` rows from `b` on, to scratch (rows, 4, lanes). No h_seen: it is
    zero.
    """
    S, I, vectors = a.size, a.I, vectors_of(a, p)
    kernel, wide, w_x, w_h = product_of(a, vectors), vectors * VECTOR, inputs_at(a, place), states_at(a, place)
    out = scratch if vectors == 4 else scratch + CHUNK * 4 * VECTOR
    if rows == 1:
        preact_of_one(a, s, p, place, 1, 1, b, out, x + b * a.x_row, h_seen + b * h_seen_row if h_seen != 0 else 0)
    else:
        init, init_row, k = a.biases + p * 4 * VECTOR, 0, 0
        if a.feed != 0:
            init, init_row, k = fed(a, p, s, b), 4 * VECTOR, I
        used = I + a.H if h_seen != 0 else I
        while True:
            alone = k < I and a.block_x != 0
            k_last = min(k + a.block_x, I) if alone else min(k + a.block, used)
            of_x, of_h = max(0, min(k_last, I) - k), max(0, k - I)  # columns of x, and of h before them
            w, x_k, h_k = w_x + k * wide, x + b * a.x_row + k * S, h_seen + b * h_seen_row + of_h * S
            call(
                kernel, rows, init, init_row, out, wide, w, x_k, a.x_row, S, of_x, 1, 0, w_h + of_h * wide - w,
                h_k, h_seen_row, k_last - k - of_x,
            )  # fmt: skip
            init, init_row, k = out, wide, k_last
            if k >= used:  # at the end: without a product what was fed is still copied
                break
    if vectors < 4:
        spread(a, p, rows, out, scratch)


@jit
def begin(a, rows):
    pass


@jit
def end(a):
    pass


@jit
def feed_inputs(a, s, part, b_first, b_last, x_first, x_last, scratch):
    pass


@jit
def feed_states(a, s, p, b, rows, h, h_row, scratch):
    pass
