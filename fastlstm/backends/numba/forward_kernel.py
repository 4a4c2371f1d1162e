"""The forward pass of a layer: every time step for this thread's rows and units."""

from fastlstm.backends.numba.host import LINE
from fastlstm.backends.numba.intrinsics import add_atomic, call, get_int32
from fastlstm.backends.numba.shared import (
    BLOCK_K,
    CHUNK,
    HOLD,
    RESET,
    VECTOR,
    any_row,
    jit,
    share,
    wait,
    zero_rows,
)

DIGEST = 1 << 14  # words of a block of weights that has one digest: 64 KB


@jit
def same(a, x, y):
    """True where the elements at two addresses have the same bits."""
    return get_int32(x) == get_int32(y) and (a.size == 4 or get_int32(x + 4) == get_int32(y + 4))


@jit
def is_stale(a, p, scratch):
    """True where panel p differs from the weights in a bias or in one element of each of their rows, from a column that
    moves on with the row so that every column is met. What changes a whole row, a whole column or everything is found.
    """
    L, S, I, H = a.lanes, a.size, a.I, a.H
    panels, K = (H + L - 1) // L, I + H
    panel, bias = a.packed + p * K * 4 * VECTOR, a.packed + (panels * K + p) * 4 * VECTOR
    pack_biases(a, p, scratch)
    for gate in range(4):
        for lane in range(min(L, H - p * L)):
            row, at = gate * H + p * L + lane, gate * VECTOR + lane * S
            if not same(a, scratch + at, bias + at):
                return True
            of_h = a.weight_hh + row * a.weight_hh_row + row % H * S
            if not same(a, of_h, panel + (I + row % H) * 4 * VECTOR + at):
                return True
            for k in range(row % min(I, 4 * H), I, 4 * H):
                if not same(a, a.weight_ih + row * a.weight_ih_row + k * S, panel + k * 4 * VECTOR + at):
                    return True
    return False


@jit
def digest_weights(a, thread, threads):
    """This thread's blocks of the weights, digested to their vectors at `digests`, or compared to them."""
    of_ih, of_hh = a.H * a.I * a.size, a.H * a.H * a.size  # words
    blocks_ih = (of_ih + DIGEST - 1) // DIGEST
    blocks = blocks_ih + (of_hh + DIGEST - 1) // DIGEST
    for n in range(share(blocks, thread, threads), share(blocks, thread + 1, threads)):
        source, words, k = (a.weight_ih, of_ih, n) if n < blocks_ih else (a.weight_hh, of_hh, n - blocks_ih)
        k *= DIGEST
        call(a.digest, min(DIGEST, words - k), source + k * 4, a.digests + n * VECTOR, a.stale)


@jit
def pack_biases(a, p, to):
    """The sum of the biases of panel p to [gate][lane], units past H zero."""
    L, S, H = a.lanes, a.size, a.H
    valid = min(L, H - p * L)
    call(a.copy_rows, 1, 0, 4 * L, to, 0, to, 0)
    for gate in range(4):
        unit = (gate * H + p * L) * S
        if a.bias != 0:
            call(a.copy_rows, 1, valid, valid, a.bias + unit, 0, to + gate * VECTOR, 0)
        if a.bias_hh != 0:
            call(a.add_rows, 1, valid, a.bias_hh + unit, 0, to + gate * VECTOR, 0)


@jit
def pack_weights(a, first, last):
    """Panels `first` to `last`: rows of weight_ih and weight_hh to [k][gate][lane], units past H zero;
    and the biases.
    """
    L, I, H = a.lanes, a.I, a.H
    panels, K = (H + L - 1) // L, I + H
    for p in range(first, last):
        panel, valid = a.packed + p * K * 4 * VECTOR, min(L, H - p * L)
        pack_biases(a, p, a.packed + (panels * K + p) * 4 * VECTOR)
        if valid < L:
            call(a.copy_rows, K, 0, 4 * L, panel, 0, panel, 4 * VECTOR)
        for gate in range(4):
            row, to = gate * H + p * L, panel + gate * VECTOR
            call(a.transpose, valid, I, a.weight_ih + row * a.weight_ih_row, a.weight_ih_row, to, 4 * VECTOR)
            to += I * 4 * VECTOR
            call(a.transpose, valid, H, a.weight_hh + row * a.weight_hh_row, a.weight_hh_row, to, 4 * VECTOR)


@jit
def forward(a, thread, threads):
    """This thread's share.

    `parts` teams split the batch rows and meet nobody; within a team units are split, one barrier a step.
    """
    L, S, I, H, B, T, R = a.lanes, a.size, a.I, a.H, a.B, a.T, a.rows
    panels, K = (H + L - 1) // L, I + H
    parts = min(threads, a.parts)
    team = threads // parts
    if thread >= parts * team:
        return
    part, member = thread // team, thread % team
    first, last = share(panels, thread, parts * team), share(panels, thread + 1, parts * team)
    if a.digests != 0:
        digest_weights(a, thread, parts * team)
    if a.stale != 0:  # packed before, and others may be reading it: nothing is written here
        for p in range(first, last):
            if is_stale(a, p, a.scratch + thread * a.scratch_bytes):
                add_atomic(a.stale, 1)  # the result is thrown away; but the team still meets at its barriers
    else:
        pack_weights(a, first, last)
        if parts > 1:  # otherwise everybody has packed what it will use
            wait(a.barrier, parts * team, 0, a.relax)
    barrier, passed = a.barrier + (1 + part) * LINE, 0

    b_first, b_last = share(B, part, parts), share(B, part + 1, parts)
    p_first, p_last = share(panels, member, team), share(panels, member + 1, team)
    block = (K + BLOCK_K - 1) // BLOCK_K
    block = (K + block - 1) // block
    biases, scratch = a.packed + panels * K * 4 * VECTOR, a.scratch + thread * a.scratch_bytes
    c_old, c_new, h_new = scratch + CHUNK * 4 * VECTOR, scratch + CHUNK * 5 * VECTOR, scratch + CHUNK * 6 * VECTOR
    h_reset = scratch + CHUNK * 7 * VECTOR  # (rows, H)
    kernel = a.cell_forward_saving if a.gates != 0 else a.cell_forward
    h_prev, h_prev_row, c_prev, c_prev_row = a.h_0, a.h_0_row, a.c_0, a.c_0_row

    for s in range(T):
        t = T - 1 - s if a.reverse != 0 else s
        h, c, x = a.h + t * R * H * S, a.c + t * a.c_step, a.x + t * a.x_step
        mask = a.mask + t * R * 4 if a.mask != 0 else 0
        h_seen, h_seen_row = h_prev, h_prev_row
        if any_row(mask + b_first * 4 if mask != 0 else 0, b_last - b_first, RESET):
            h_seen, h_seen_row = h_reset - b_first * H * S, H * S
            call(a.copy_rows, b_last - b_first, H, H, h_prev + b_first * h_prev_row, h_prev_row, h_reset, H * S)
            zero_rows(a, b_last - b_first, H, mask + b_first * 4, RESET, h_reset, H * S)
        for j in range(p_first, p_last):  # to and fro: the weights read last are still in the L2 cache
            p = j if (s + a.flip) % 2 == 0 else p_first + p_last - 1 - j
            w, valid = a.packed + p * K * 4 * VECTOR, min(L, H - p * L)
            for b in range(b_first, b_last, CHUNK):
                rows = min(CHUNK, b_last - b)
                init, init_row = biases + p * 4 * VECTOR, 0
                for k in range(0, K, block):
                    k_last = min(k + block, K)
                    of_x = max(0, min(k_last, I) - k)
                    x_k, h_k = x + b * a.x_row + k * S, h_seen + b * h_seen_row + max(0, k - I) * S
                    call(
                        a.product4, rows, init, init_row, scratch, 4 * VECTOR, w + k * 4 * VECTOR,
                        x_k, a.x_row, S, of_x, 1, 0, of_x * 4 * VECTOR, h_k, h_seen_row, k_last - k - of_x,
                    )  # fmt: skip
                    init, init_row = scratch, 4 * VECTOR

                at, mask_b = b * H * S + p * L * S, mask + b * 4 if mask != 0 else 0
                resets, holds = any_row(mask_b, rows, RESET), any_row(mask_b, rows, HOLD)
                old, old_row, new, new_row = c_prev + b * c_prev_row + p * L * S, c_prev_row, c + at, H * S
                out, out_row, gates = h + at, H * S, a.gates + ((t * panels + p) * R + b) * 4 * VECTOR
                if valid < L or resets or (holds and a.c_step == 0):  # read aside: cut off, reset or still wanted
                    call(a.copy_rows, rows, valid, L, old, old_row, c_old, VECTOR)
                    if resets:
                        zero_rows(a, rows, L, mask_b, RESET, c_old, VECTOR)
                    old, old_row = c_old, VECTOR
                if valid < L:  # write aside: whole vectors would reach into the next row
                    new, new_row, out, out_row = c_new, VECTOR, h_new, VECTOR
                call(kernel, rows, scratch, old, old_row, new, new_row, out, out_row, gates)
                if valid < L:
                    call(a.copy_rows, rows, valid, valid, h_new, VECTOR, h + at, H * S)
                    call(a.copy_rows, rows, valid, valid, c_new, VECTOR, c + at, H * S)
                if holds:
                    for r in range(rows):
                        if get_int32(mask_b + 4 * r) == HOLD:
                            h_held, row = h_prev + (b + r) * h_prev_row + p * L * S, at + r * H * S
                            call(a.copy_rows, 1, valid, valid, h_held, 0, h + row, 0)
                            call(a.copy_rows, 1, valid, valid, old + r * old_row, 0, c + row, 0)
        h_prev, h_prev_row, c_prev, c_prev_row = h, H * S, c, H * S
        passed = wait(barrier, team, passed, a.relax)

    if member == 0:
        at, rows = b_first * H * S, b_last - b_first
        call(a.copy_rows, rows, H, H, h_prev + at, H * S, a.h_n + at, H * S)
        if a.c_step != 0:
            call(a.copy_rows, rows, H, H, c_prev + at, H * S, a.c_n + at, H * S)
