"""Products with dpreact: against the weights, for the step before and the input, and over all T B rows, for the weights."""

from fastlstm.backends.numba.intrinsics import call, get_int32
from fastlstm.backends.numba.shared import BLOCK_K, CHUNK, ONE, RESET, VECTOR, jit, share

STRIP = 24  # columns of [x, h, 1] packed side by side: 8 tiles of 3, or 4 of 6
BLOCK_ROWS = 128  # rows of dpreact and of a strip that stay in the L1 cache together: 16 + 12 KB at 8 lanes


@jit
def groups_of(vectors):  # type: ignore[no-untyped-def]
    """How many groups of at most 4 vectors a row of `vectors` makes."""
    return (vectors + 3) // 4


@jit
def group(vectors, q):  # type: ignore[no-untyped-def]
    """The first vector of group q. Groups are 4 or 3 wide wherever they can be: a lone vector would leave the tile idle."""
    return (vectors * q + groups_of(vectors) - 1) // groups_of(vectors)


@jit
def pack_transposed(a, weight, weight_row, N, packed, first, last):  # type: ignore[no-untyped-def]
    """Column groups `first` to `last` of (4H, N) weights to [group][k][3 or 4 vectors], k in the order of dpreact's panels."""
    L, S, H = a.lanes, a.size, a.H
    panels, vectors = (H + L - 1) // L, (N + L - 1) // L
    for q in range(first, last):
        column = group(vectors, q) * L
        wide = 4 if group(vectors, q + 1) - group(vectors, q) == 4 else 3
        valid = min(wide * L, N - column)
        for p in range(panels):
            for gate in range(4):
                units = min(L, H - p * L)
                to = packed + q * panels * 16 * L * VECTOR + (p * 4 + gate) * L * wide * VECTOR
                source = weight + (gate * H + p * L) * weight_row + column * S
                call(a.copy_rows, units, valid, wide * L, source, weight_row, to, wide * VECTOR)
                call(a.copy_rows, L - units, 0, wide * L, source, 0, to + units * wide * VECTOR, wide * VECTOR)


@jit
def back_product(a, rows, b, t, packed, vectors, q, scratch):  # type: ignore[no-untyped-def]
    """``scratch`` (rows, 4 vectors) = dpreact[t] times column group q of the transposed weights."""
    L, B = a.lanes, a.B
    panels = (a.H + L - 1) // L
    wide = 4 if group(vectors, q + 1) - group(vectors, q) == 4 else 3
    kernel = a.product4 if wide == 4 else a.product3
    blocks = (panels * 4 * L + BLOCK_K - 1) // BLOCK_K
    block = (panels + blocks - 1) // blocks  # panels
    init, init_row = a.constants, 0
    for p in range(0, panels, block):
        dpre = a.dpreact + ((t * panels + p) * B + b) * 4 * VECTOR
        w = packed + q * panels * 16 * L * VECTOR + p * 4 * L * wide * VECTOR
        call(
            kernel, rows, init, init_row, scratch, 4 * VECTOR, w, dpre, 4 * VECTOR, a.size, 4 * L,
            min(block, panels - p), B * 4 * VECTOR, 4 * L * wide * VECTOR, dpre, 0, 0,
        )  # fmt: skip
        init, init_row = scratch, 4 * VECTOR


@jit
def pack_strips(a, strips, t_first, t_last, b_first, b_last):  # type: ignore[no-untyped-def]
    """Rows (t, b) of [x, h_prev, 1] to [strip][row][column]; h_prev is what the step saw: zero after a reset."""
    S, I, H, B, T = a.size, a.I, a.H, a.B, a.T
    block = (t_last - t_first) * (b_last - b_first) * STRIP * S
    row = strips
    for t in range(t_first, t_last):
        t_prev = t + 1 if a.reverse != 0 else t - 1
        first = t == (T - 1 if a.reverse != 0 else 0)
        for b in range(b_first, b_last):
            x = a.x + t * a.x_step + b * a.x_row
            h = a.h_0 + b * a.h_0_row if first else a.h + (t_prev * B + b) * H * S
            reset = a.mask != 0 and get_int32(a.mask + (t * B + b) * 4) == RESET
            column = 0
            while column < I + H:
                run = min((I if column < I else I + H) - column, STRIP - column % STRIP)
                source = x + column * S if column < I else h + (column - I) * S
                to = row + column // STRIP * block + column % STRIP * S
                call(a.copy_rows, 1, 0 if reset and column >= I else run, run, source, 0, to, 0)
                column += run
            call(a.copy_rows, 1, 1, 1, a.constants + ONE, 0, row + column // STRIP * block + column % STRIP * S, 0)
            row += STRIP * S


@jit
def weight_gradients(a, scratch, p_first, p_last):  # type: ignore[no-untyped-def]
    """Panels `p_first` to `p_last` of dweight_ih, dweight_hh and dbias: every row in one order, whoever else works beside."""
    L, S, I, H, B, T = a.lanes, a.size, a.I, a.H, a.B, a.T
    panels, columns = (H + L - 1) // L, I + H + 1
    times, batch = max(1, BLOCK_ROWS // max(B, 1)), max(1, min(B, BLOCK_ROWS))
    sums = a.dweights + p_first * columns * 4 * VECTOR
    call(a.copy_rows, 1, 0, (p_last - p_first) * columns * 4 * L, sums, 0, sums, 0)
    for t in range(0, T, times):
        t_last = min(t + times, T)
        for b in range(0, B, batch):
            count = min(b + batch, B) - b
            block = (t_last - t) * count * STRIP * S
            pack_strips(a, scratch, t, t_last, b, b + count)
            for k in range(0, columns, STRIP):
                strip = scratch + k // STRIP * block
                for p in range(p_first, p_last):
                    dpre, out = a.dpreact + ((t * panels + p) * B + b) * 4 * VECTOR, a.dweights + (p * columns + k) * 4 * VECTOR
                    call(
                        a.product4, min(STRIP, columns - k), out, 4 * VECTOR, out, 4 * VECTOR, dpre, strip, S, STRIP * S,
                        count, t_last - t, count * STRIP * S, panels * B * 4 * VECTOR, strip, 0, 0,
                    )  # fmt: skip
    for p in range(p_first, p_last):
        for gate in range(4):
            row, valid = gate * H + p * L, min(L, H - p * L)
            at = a.dweights + p * columns * 4 * VECTOR + gate * VECTOR
            if a.dweight_ih != 0:
                for k in range(0, I, L):
                    call(a.transpose, min(L, I - k), valid, at + k * 4 * VECTOR, 4 * VECTOR, a.dweight_ih + (row * I + k) * S, I * S)
            at += I * 4 * VECTOR
            if a.dweight_hh != 0:
                for k in range(0, H, L):
                    call(a.transpose, min(L, H - k), valid, at + k * 4 * VECTOR, 4 * VECTOR, a.dweight_hh + (row * H + k) * S, H * S)
            if a.dbias != 0:
                call(a.copy_rows, 1, valid, valid, at + H * 4 * VECTOR, 0, a.dbias + row * S, 0)


@jit
def input_gradient(a, scratch, thread, threads):  # type: ignore[no-untyped-def]
    """dx = dpreact times weight_ih, for this thread's rows of every step."""
    L, S, I, B = a.lanes, a.size, a.I, a.B
    vectors = (I + L - 1) // L
    split_time = a.T >= threads  # a row's bits do not depend on the split: each sums over k alone
    t_first, t_last = (share(a.T, thread, threads), share(a.T, thread + 1, threads)) if split_time else (0, a.T)
    b_first, b_last = (0, B) if split_time else (share(B, thread, threads), share(B, thread + 1, threads))
    for t in range(t_first, t_last):
        for q in range(groups_of(vectors)):
            column = group(vectors, q) * L
            width = min((group(vectors, q + 1) - group(vectors, q)) * L, I - column)
            for b in range(b_first, b_last, CHUNK):
                rows = min(CHUNK, b_last - b)
                back_product(a, rows, b, t, a.packed_ih, vectors, q, scratch)
                call(a.copy_rows, rows, width, width, scratch, 4 * VECTOR, a.dx + ((t * B + b) * I + column) * S, I * S)
