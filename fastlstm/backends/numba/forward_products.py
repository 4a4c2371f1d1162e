"""The forward pass's products on the processor's own vectors: x and h are read where they lie.

Where x is wide, it has a sum of its own, for few rows one of several steps at once; a narrow x and h share one.
"""

from fastlstm.backends.numba.intrinsics import call
from fastlstm.backends.numba.shared import (
    CHUNK,
    VECTOR,
    gate_at,
    jit,
    product_of,
    spread,
    vectors_of,
)

READS_STATES, READS_INPUTS = True, True  # preact reads h where the step before left it, and x where it lies


@jit
def pack_states(a, p, panel, before):
    """Panel p of weight_hh to [k][gate][lane], or [k] and its gates side by side (see `vectors_of`), then zeros;
    `before` rows of k are somebody else's.
    """
    L, H = a.lanes, a.H
    valid, wide = min(L, H - p * L), vectors_of(a, p) * VECTOR
    if valid < L:
        call(a.copy_rows, 1, 0, (before + H) * wide // a.size, panel, 0, panel, 0)
    for gate in range(4):
        row, to = gate * H + p * L, panel + before * wide + gate_at(a, p, gate)
        call(a.transpose, valid, H, a.weight_hh + row * a.weight_hh_row, a.weight_hh_row, to, wide)


@jit
def pack_weights(a, p, scratch):
    """Panel p of the weights: rows of weight_ih, then of weight_hh."""
    L, I, H = a.lanes, a.I, a.H
    panel = a.packed + p * (I + H) * 4 * VECTOR
    pack_states(a, p, panel, I)
    for gate in range(4):
        row = gate * H + p * L
        weight, to = a.weight_ih + row * a.weight_ih_row, panel + gate_at(a, p, gate)
        call(a.transpose, min(L, H - p * L), I, weight, a.weight_ih_row, to, vectors_of(a, p) * VECTOR)


@jit
def fed(a, p, s, b):
    """Where what preact of panel p, step s and row b starts from lies, where there is memory for it."""
    return a.fed + ((p * a.feed + s % a.feed) * a.B + b) * 4 * VECTOR


@jit
def input_product(a, p, rows, x, x_row, out, out_row):
    """The biases and `rows` rows of x times panel p of weight_ih, in blocks."""
    I, vectors = a.I, vectors_of(a, p)
    kernel, w = product_of(a, vectors), a.packed + p * (I + a.H) * 4 * VECTOR
    init, init_row = a.biases + p * 4 * VECTOR, 0
    for k in range(0, I, a.block_x):
        x_k, w_k, count = x + k * a.size, w + k * vectors * VECTOR, min(a.block_x, I - k)
        call(kernel, rows, init, init_row, out, out_row, w_k, x_k, x_row, a.size, count, 1, 0, 0, x, 0, 0)
        init, init_row = out, out_row


@jit
def multiply_inputs(a, s, p, part, b_first, b_last):
    """What panel p's sums of `feed` steps from s on start from, where these begin: a row reads the weights once for all
    of them.
    """
    if a.feed != 0 and s % a.feed == 0:
        t, x_step = (a.T - 1 - s, -a.x_step) if a.reverse != 0 else (s, a.x_step)
        for b in range(b_first, b_last):
            x = a.x + t * a.x_step + b * a.x_row
            input_product(a, p, min(a.feed, a.T - s), x, x_step, fed(a, p, s, b), a.B * 4 * VECTOR)


@jit
def preact(a, s, p, b, rows, part, b_first, b_last, scratch, x, h_seen, h_seen_row):
    """preact of panel p for `rows` rows from `b` on, to scratch (rows, 4, lanes). No h_seen: it is zero."""
    S, I, K, vectors = a.size, a.I, a.I + a.H, vectors_of(a, p)
    kernel, wide, w = product_of(a, vectors), vectors * VECTOR, a.packed + p * K * 4 * VECTOR
    out = scratch if vectors == 4 else scratch + CHUNK * 4 * VECTOR
    init, init_row, k = a.biases + p * 4 * VECTOR, 0, 0
    if a.feed != 0:
        init, init_row, k = fed(a, p, s, b), 4 * VECTOR, I
    used = K if h_seen != 0 else I
    while True:
        alone = k < I and a.block_x != 0
        k_last = min(k + a.block_x, I) if alone else min(k + a.block, used)
        of_x = max(0, min(k_last, I) - k)
        x_k, h_k = x + b * a.x_row + k * S, h_seen + b * h_seen_row + max(0, k - I) * S
        call(
            kernel, rows, init, init_row, out, wide, w + k * wide,
            x_k, a.x_row, S, of_x, 1, 0, of_x * wide, h_k, h_seen_row, k_last - k - of_x,
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
