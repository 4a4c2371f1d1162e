"""The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the gradients
that sum over rows.

What a chunk leaves is used while it is in the cache, and never written out: dpreact of four chunks is all there is. A
thread turns a chunk into gradients once it has the next one's dpreact, and so waits only when a whole chunk ahead.
"""

from typing import Any

from fastlstm.backends.numba.host.sizes import LINE
from fastlstm.backends.numba.kernels import matrix_backward, mixed_backward, vector_backward
from fastlstm.backends.numba.kernels.ends import any_held, any_reset, is_held, rows_alive, zero_reset
from fastlstm.backends.numba.kernels.gradients import group, groups_of, unpack_weight_gradients
from fastlstm.backends.numba.kernels.shared import CHUNK, VECTOR, item, jit, named_for, read_rows
from fastlstm.backends.numba.kernels.threads import arrive, share, share_rows_alive, wait, wait_for
from fastlstm.backends.numba.kernels.weights import digest_weights
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


@jit
def cells(a, p, s, t, b, rows, scratch, dh, dh_held, dpre):
    """dpreact of one panel for `rows` rows from `b` on. `dh` is the gradient from the step after."""
    L, S, H, B, R = a.lanes, a.size, a.H, a.B, a.rows
    panels, valid, unit = (H + L - 1) // L, min(L, H - p * L), p * L * S
    c_old, dh_old, dc_held = scratch + CHUNK * 4 * VECTOR, scratch + CHUNK * 5 * VECTOR, scratch + CHUNK * 6 * VECTOR
    resets, holds = any_reset(a, t, b, rows), any_held(a, t, b, rows)
    carried = a.dc_carried + (p * B + b) * VECTOR
    if a.dc != 0:
        call(a.add_rows, rows, valid, a.dc + t * a.dc_step + b * a.dc_row + unit, a.dc_row, carried, VECTOR)
    t_prev = t + 1 if a.reverse != 0 else t - 1
    old, old_row = a.c + (t_prev * R + b) * H * S + unit, H * S
    if s == 0:
        old, old_row = a.c_0 + b * a.c_0_row + unit, a.c_0_row
    dh_out, dh_out_row = a.constants, 0
    if a.dh != 0:
        dh_out, dh_out_row = a.dh + t * a.dh_step + b * a.dh_row + p * L * item(a, a.narrow_rows), a.dh_row
    if valid < L or resets:
        call(a.copy_rows, rows, valid, L, old, old_row, c_old, VECTOR)
        if resets:
            zero_reset(a, t, b, rows, L, c_old, VECTOR)
        old, old_row = c_old, VECTOR
    if a.dh != 0 and (valid < L or resets or a.narrow_rows != 0):
        read_rows(a, a.narrow_rows, rows, valid, L, dh_out, dh_out_row, dh_old, VECTOR)
        dh_out, dh_out_row = dh_old, VECTOR
    if holds:  # a held row hands on the states' gradients that it got: its dpreact is zero, and its own dh is ignored
        call(a.copy_rows, rows, L, L, carried, VECTOR, dc_held, VECTOR)
        call(a.copy_rows, rows, valid, L, dh, 4 * VECTOR, dh_held + (p * B + b) * VECTOR, VECTOR)
    gates = a.gates + ((t * panels + p) * a.gate_rows + b) * 4 * VECTOR
    alive = rows_alive(a, t, b, rows)
    call(a.cell_backward, alive, valid, dh, 4 * VECTOR, dh_out, dh_out_row, carried, gates, old, old_row, dpre)
    if holds:
        for r in range(rows):
            if is_held(a, t, b + r):
                call(a.copy_rows, 1, L, L, dc_held + r * VECTOR, 0, carried + r * VECTOR, 0)
                call(a.copy_rows, 1, 0, 4 * L, dc_held, 0, dpre + r * 4 * VECTOR, 0)


@jit
def meeting(a, number):
    """Where threads are counted at the meeting of this number: a thread can be at one while others are at the last."""
    return a.barrier + number % 2 * LINE


def backward_with(products: Any) -> Any:
    """The kernel that takes its products from a module: `vector_backward`, or one like it."""
    pack_transposed, pack_transposed_inputs = products.pack_transposed, products.pack_transposed_inputs
    dpreact_place, keep = products.dpreact_place, products.keep
    back_product, pack_inputs, add_gradients = products.back_product, products.pack_inputs, products.add_gradients
    begin, end = products.begin, products.end

    @jit
    @named_for(products.__name__)
    def backward(a, thread, threads):
        """This thread's share: rows and units are split as in the forward pass, the sums over rows by panels."""
        L, S, I, H, B, T = a.lanes, a.size, a.I, a.H, a.B, a.T
        panels = (H + L - 1) // L
        groups, groups_x = groups_of(panels), groups_of((I + L - 1) // L)
        parts = min(threads, a.parts)
        team = threads // parts
        everyone = parts * team
        if thread >= everyone:
            return
        part, member = thread // team, thread % team
        scratch = a.scratch + thread * a.scratch_bytes
        if a.digests != 0:  # if they differ, all is thrown away; but a team still meets at its barriers
            digest_weights(a, thread, everyone, T > 1 or a.stale == 0 or a.dh_0 != 0)
            if everyone == 1 and a.stale != 0 and get_int64(a.stale) != 0:
                return
        packs = a.packs != 0 and a.stale == 0
        if packs:
            if a.packed_hh != 0:
                pack_transposed(
                    a, a.weight_hh, a.weight_hh_row, H, a.packed_hh,
                    share(groups, thread, everyone), share(groups, thread + 1, everyone), scratch,
                )  # fmt: skip
            if a.packed_ih != 0:
                pack_transposed_inputs(
                    a, a.weight_ih, a.weight_ih_row, I, a.packed_ih,
                    share(groups_x, thread, everyone), share(groups_x, thread + 1, everyone), scratch,
                )  # fmt: skip
            wait(meeting(a, 0), everyone, 0, a.relax)
        met = 1 if packs else 0
        barrier, passed = a.barrier + (2 + part) * LINE, 0

        b_first, b_last = share_rows_alive(a, part, parts)
        q_first, q_last = share(groups, member, team), share(groups, member + 1, team)
        dh_held = a.dc_carried + panels * B * VECTOR  # (panels, B, lanes): what a held step hands to the one before

        begin(a, max(b_last - b_first, 1))
        for s in range(T - 1, -2, -1):  # -1: what arrives at h_0 and c_0, and the gradients of the last chunk
            t, t_next = (T - 1 - s, T - 2 - s) if a.reverse != 0 else (s, s + 1)
            wanted = s >= 0 or a.dh_0 != 0 or a.dc_0 != 0
            for j in range(q_first, q_last if wanted else q_first):  # to and fro, as in the forward pass
                q = j if s % 2 == 0 else q_first + q_last - 1 - j
                p_first, p_last = group(panels, q), group(panels, q + 1)
                column = p_first * L
                width = min((p_last - p_first) * L, H - column)
                for b in range(b_first, b_last, CHUNK):
                    rows = min(CHUNK, b_last - b)
                    if s < T - 1 and (s >= 0 or a.dh_0 != 0):
                        back_product(a, rows_alive(a, t_next, b, rows), b, s + 1, a.packed_hh, panels, q, scratch)
                    elif s == T - 1 and a.dh_n != 0:
                        call(
                            a.copy_rows, rows, width, 4 * L,
                            a.dh_n + b * a.dh_n_row + column * S, a.dh_n_row, scratch, 4 * VECTOR,
                        )  # fmt: skip
                    else:
                        call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, 4 * VECTOR)
                    resets = s < T - 1 and any_reset(a, t_next, b, rows)
                    holds = s < T - 1 and any_held(a, t_next, b, rows)
                    if resets:
                        zero_reset(a, t_next, b, rows, 4 * L, scratch, 4 * VECTOR)
                    for p in range(p_first, p_last):
                        dh, carried = scratch + (p - p_first) * VECTOR, a.dc_carried + (p * B + b) * VECTOR
                        valid = min(L, H - p * L)
                        if s == T - 1:
                            dc_n, given = a.dc_n + b * a.dc_n_row + p * L * S, valid if a.dc_n != 0 else 0
                            call(a.copy_rows, rows, given, L, dc_n, a.dc_n_row, carried, VECTOR)
                        if resets:
                            zero_reset(a, t_next, b, rows, L, carried, VECTOR)
                        if holds:
                            for r in range(rows):
                                if is_held(a, t_next, b + r):
                                    held = dh_held + (p * B + b + r) * VECTOR
                                    call(a.copy_rows, 1, L, L, held, 0, dh + r * 4 * VECTOR, 0)
                        if s >= 0:
                            dpre = dpreact_place(a, p, s, b, scratch)
                            cells(a, p, s, t, b, rows, scratch, dh, dh_held, dpre)
                            keep(a, p, s, b, rows, dpre)
                            continue
                        at = (b * H + p * L) * S
                        if a.dh_0 != 0:
                            call(a.copy_rows, rows, valid, valid, dh, 4 * VECTOR, a.dh_0 + at, H * S)
                        if a.dc_0 != 0:
                            call(a.copy_rows, rows, valid, valid, carried, VECTOR, a.dc_0 + at, H * S)
            passed = wait(barrier, team, passed, a.relax)
            if a.strips != 0 or a.dx != 0:
                due, number = 0 if s < 0 else T, met - 1
                if s >= 0 and s % a.chunk == 0:
                    chunk = s // a.chunk
                    pack_inputs(a, chunk, thread, everyone, scratch)
                    arrive(meeting(a, met), everyone)
                    met += 1
                    # who came to the meeting before this one has read the chunk two before that: the next takes its
                    # place
                    due = chunk + 1
                if due * a.chunk < T:  # one call, since each is compiled into the kernel
                    wait_for(meeting(a, number), everyone, number // 2 + 1, a.relax)
                    add_gradients(a, scratch, due, b_last - b_first, thread, everyone)

        end(a)
        if a.dweights != 0:
            if a.halves == 2:  # another's half is added
                wait(meeting(a, met), everyone, met // 2, a.relax)
            unpack_weight_gradients(a, scratch, share(panels, thread, everyone), share(panels, thread + 1, everyone))

    return backward


backward, backward_matrix = backward_with(vector_backward), backward_with(matrix_backward)
backward_mixed = backward_with(mixed_backward)
