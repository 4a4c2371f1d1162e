"""The forward pass's products on the processor's own vectors: x and h are read where they lie, and share one sum."""

from fastlstm.backends.numba.intrinsics import call
from fastlstm.backends.numba.shared import BLOCK_K, CHUNK, VECTOR, gate_at, jit, product_of, spread, vectors_of

READS_STATES, READS_INPUTS = True, True  # preact reads h where the step before left it, and x where it lies


@jit
def pack_states(a, p, panel, before):
    """Panel p of weight_hh to [k][gate][lane], units past H zero; `before` rows of k are somebody else's."""
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
def preact(a, s, p, b, rows, part, b_first, b_last, scratch, x, h_seen, h_seen_row):
    """preact of panel p for `rows` rows from `b` on, to scratch (rows, 4, lanes). No h_seen: it is zero."""
    S, I, K = a.size, a.I, a.I + a.H
    block = (K + BLOCK_K - 1) // BLOCK_K
    block = (K + block - 1) // block
    w, init, init_row = a.packed + p * K * 4 * VECTOR, a.biases + p * 4 * VECTOR, 0
    vectors = vectors_of(a, p)
    wide, kernel = vectors * VECTOR, product_of(a, vectors)
    out = scratch if vectors == 4 else scratch + CHUNK * 4 * VECTOR
    used = K if h_seen != 0 else I
    for k in range(0, used, block):
        k_last = min(k + block, used)
        of_x = max(0, min(k_last, I) - k)
        x_k, h_k = x + b * a.x_row + k * S, h_seen + b * h_seen_row + max(0, k - I) * S
        call(
            kernel, rows, init, init_row, out, wide, w + k * wide,
            x_k, a.x_row, S, of_x, 1, 0, of_x * wide, h_k, h_seen_row, k_last - k - of_x,
        )  # fmt: skip
        init, init_row = out, wide
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
def multiply_inputs(a, s, p, part, b_first, b_last):
    pass


@jit
def feed_states(a, s, p, b, rows, h, h_row, scratch):
    pass
