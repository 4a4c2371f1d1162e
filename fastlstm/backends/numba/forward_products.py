"""The forward pass's products on the processor's own vectors: x and h are read where they lie, and share one sum."""

from fastlstm.backends.numba.intrinsics import call
from fastlstm.backends.numba.shared import BLOCK_K, VECTOR, jit

READS_STATES = True  # preact reads h where the step before left it


@jit
def pack_weights(a, p, scratch):
    """Panel p: rows of weight_ih and weight_hh to [k][gate][lane], units past H zero."""
    L, I, H = a.lanes, a.I, a.H
    K = I + H
    panel, valid = a.packed + p * K * 4 * VECTOR, min(L, H - p * L)
    if valid < L:
        call(a.copy_rows, K, 0, 4 * L, panel, 0, panel, 4 * VECTOR)
    for gate in range(4):
        row, to = gate * H + p * L, panel + gate * VECTOR
        call(a.transpose, valid, I, a.weight_ih + row * a.weight_ih_row, a.weight_ih_row, to, 4 * VECTOR)
        to += I * 4 * VECTOR
        call(a.transpose, valid, H, a.weight_hh + row * a.weight_hh_row, a.weight_hh_row, to, 4 * VECTOR)


@jit
def preact(a, s, p, b, rows, scratch, x, h_seen, h_seen_row):
    """preact of panel p for `rows` rows from `b` on, to scratch (rows, 4, lanes)."""
    S, I, K = a.size, a.I, a.I + a.H
    block = (K + BLOCK_K - 1) // BLOCK_K
    block = (K + block - 1) // block
    w, init, init_row = a.packed + p * K * 4 * VECTOR, a.biases + p * 4 * VECTOR, 0
    for k in range(0, K, block):
        k_last = min(k + block, K)
        of_x = max(0, min(k_last, I) - k)
        x_k, h_k = x + b * a.x_row + k * S, h_seen + b * h_seen_row + max(0, k - I) * S
        call(
            a.product4, rows, init, init_row, scratch, 4 * VECTOR, w + k * 4 * VECTOR,
            x_k, a.x_row, S, of_x, 1, 0, of_x * 4 * VECTOR, h_k, h_seen_row, k_last - k - of_x,
        )  # fmt: skip
        init, init_row = scratch, 4 * VECTOR


@jit
def begin(a, rows):
    pass


@jit
def end(a):
    pass


@jit
def feed_inputs(a, s, b_first, b_last, scratch):
    pass


@jit
def feed_states(a, s, p, b, rows, h, h_row, scratch):
    pass
