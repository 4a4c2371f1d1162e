"""The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the gradients
that sum over rows.

What a chunk leaves is used while it is in the cache, and never written out: dpreact of four chunks is all there is. A
thread turns a chunk into gradients once it has the next one's dpreact, and so waits only when a whole chunk ahead.
"""

from fastlstm.backends.numba.gradients import (
    add_weight_gradients,
    back_product,
    dpreact_of,
    group,
    groups_of,
    input_gradient,
    pack_strips,
    pack_transposed,
    unpack_weight_gradients,
)
from fastlstm.backends.numba.host import LINE
from fastlstm.backends.numba.intrinsics import call, get_int32
from fastlstm.backends.numba.outer import pack_rows, write_weight_gradients
from fastlstm.backends.numba.shared import (
    CHUNK,
    HOLD,
    RESET,
    VECTOR,
    any_row,
    arrive,
    jit,
    share,
    wait,
    wait_for,
    zero_rows,
)


@jit
def cells(a, p, s, t, b, rows, scratch, dh, mask, dh_held):
    """dpreact of one panel for `rows` rows from `b` on. `dh` is the gradient from the step after."""
    L, S, H, B, R = a.lanes, a.size, a.H, a.B, a.rows
    panels, valid, unit = (H + L - 1) // L, min(L, H - p * L), p * L * S
    c_old, dh_old, dc_held = scratch + CHUNK * 4 * VECTOR, scratch + CHUNK * 5 * VECTOR, scratch + CHUNK * 6 * VECTOR
    resets, holds = any_row(mask, rows, RESET), any_row(mask, rows, HOLD)
    carried = a.dc_carried + (p * B + b) * VECTOR
    if a.dc != 0:
        call(a.add_rows, rows, valid, a.dc + t * a.dc_step + b * a.dc_row + unit, a.dc_row, carried, VECTOR)
    t_prev = t + 1 if a.reverse != 0 else t - 1
    old, old_row = a.c + (t_prev * R + b) * H * S + unit, H * S
    if s == 0:
        old, old_row = a.c_0 + b * a.c_0_row + unit, a.c_0_row
    dh_out, dh_out_row = a.constants, 0
    if a.dh != 0:
        dh_out, dh_out_row = a.dh + t * a.dh_step + b * a.dh_row + unit, a.dh_row
    if valid < L or resets:
        call(a.copy_rows, rows, valid, L, old, old_row, c_old, VECTOR)
        if resets:
            zero_rows(a, rows, L, mask, RESET, c_old, VECTOR)
        old, old_row = c_old, VECTOR
        if a.dh != 0:
            call(a.copy_rows, rows, valid, L, dh_out, dh_out_row, dh_old, VECTOR)
            dh_out, dh_out_row = dh_old, VECTOR
    if holds:  # a held row hands on what it got: dh and dc pass, dpreact is zero
        call(a.copy_rows, rows, L, L, carried, VECTOR, dc_held, VECTOR)
        held = dh_held + (p * B + b) * VECTOR
        call(a.copy_rows, rows, valid, L, dh, 4 * VECTOR, held, VECTOR)
        call(a.add_rows, rows, valid, dh_out, dh_out_row, held, VECTOR)
    gates, dpre = a.gates + ((t * panels + p) * R + b) * 4 * VECTOR, dpreact_of(a, p, s, b)
    call(a.cell_backward, rows, valid, dh, 4 * VECTOR, dh_out, dh_out_row, carried, gates, old, old_row, dpre)
    if holds:
        for r in range(rows):
            if get_int32(mask + 4 * r) == HOLD:
                call(a.copy_rows, 1, L, L, dc_held + r * VECTOR, 0, carried + r * VECTOR, 0)
                call(a.copy_rows, 1, 0, 4 * L, dc_held, 0, dpre + r * 4 * VECTOR, 0)


@jit
def meeting(a, number):
    """Where threads are counted at the meeting of this number: a thread can be at one while others are at the last."""
    return a.barrier + number % 2 * LINE


@jit
def pack_inputs(a, chunk, b_first, b_last):
    """What the weight gradients of a chunk of steps are sums over, batch rows `b_first` to `b_last` of it."""
    strips, s = a.strips + chunk % a.ring * a.strips_bytes, chunk * a.chunk
    if a.dweights != 0:
        pack_strips(a, strips, s, min(s + a.chunk, a.T), b_first, b_last)
    elif a.strips != 0:
        pack_rows(a, strips, b_first, b_last)


@jit
def add_gradients(a, scratch, chunk, thread, threads):
    """This thread's part of the gradients of the weights and of x, for a chunk of steps that all have been through."""
    panels = (a.H + a.lanes - 1) // a.lanes
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


@jit
def backward(a, thread, threads):
    """This thread's share: rows and units are split as in the forward pass, the sums over rows by panels."""
    L, S, I, H, B, T, R = a.lanes, a.size, a.I, a.H, a.B, a.T, a.rows
    panels = (H + L - 1) // L
    groups, groups_x = groups_of(panels), groups_of((I + L - 1) // L)
    parts = min(threads, a.parts)
    team = threads // parts
    everyone = parts * team
    if thread >= everyone:
        return
    part, member = thread // team, thread % team
    if a.packs != 0:
        if a.packed_hh != 0:
            pack_transposed(
                a, a.weight_hh, a.weight_hh_row, H, a.packed_hh,
                share(groups, thread, everyone), share(groups, thread + 1, everyone),
            )  # fmt: skip
        if a.packed_ih != 0:
            pack_transposed(
                a, a.weight_ih, a.weight_ih_row, I, a.packed_ih,
                share(groups_x, thread, everyone), share(groups_x, thread + 1, everyone),
            )  # fmt: skip
        wait(meeting(a, 0), everyone, 0, a.relax)
    met = 1 if a.packs != 0 else 0
    barrier, passed = a.barrier + (2 + part) * LINE, 0

    b_first, b_last = share(B, part, parts), share(B, part + 1, parts)
    q_first, q_last = share(groups, member, team), share(groups, member + 1, team)
    scratch = a.scratch + thread * a.scratch_bytes
    dh_held = a.dc_carried + panels * B * VECTOR  # (panels, B, lanes): what a held step hands to the one before

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
                mask = a.mask + (t * R + b) * 4 if a.mask != 0 and s >= 0 else 0
                mask_next = a.mask + (t_next * R + b) * 4 if a.mask != 0 and s < T - 1 else 0
                if s < T - 1 and (s >= 0 or a.dh_0 != 0):
                    back_product(a, rows, b, s + 1, a.packed_hh, panels, q, scratch)
                elif s == T - 1 and a.dh_n != 0:
                    call(
                        a.copy_rows, rows, width, 4 * L,
                        a.dh_n + b * a.dh_n_row + column * S, a.dh_n_row, scratch, 4 * VECTOR,
                    )  # fmt: skip
                else:
                    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, 4 * VECTOR)
                resets, holds = any_row(mask_next, rows, RESET), any_row(mask_next, rows, HOLD)
                if resets:
                    zero_rows(a, rows, 4 * L, mask_next, RESET, scratch, 4 * VECTOR)
                for p in range(p_first, p_last):
                    dh, carried = scratch + (p - p_first) * VECTOR, a.dc_carried + (p * B + b) * VECTOR
                    valid = min(L, H - p * L)
                    if s == T - 1:
                        dc_n, given = a.dc_n + b * a.dc_n_row + p * L * S, valid if a.dc_n != 0 else 0
                        call(a.copy_rows, rows, given, L, dc_n, a.dc_n_row, carried, VECTOR)
                    if resets:
                        zero_rows(a, rows, L, mask_next, RESET, carried, VECTOR)
                    if holds:
                        for r in range(rows):
                            if get_int32(mask_next + 4 * r) == HOLD:
                                held = dh_held + (p * B + b + r) * VECTOR
                                call(a.copy_rows, 1, L, L, held, 0, dh + r * 4 * VECTOR, 0)
                    if s >= 0:
                        cells(a, p, s, t, b, rows, scratch, dh, mask, dh_held)
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
                pack_inputs(a, chunk, share(B, thread, everyone), share(B, thread + 1, everyone))
                arrive(meeting(a, met), everyone)
                met += 1
                # Who came to the meeting before this one has read the chunk two before that: the next takes its place
                due = chunk + 1
            if due * a.chunk < T:  # one call, since each is compiled into the kernel
                wait_for(meeting(a, number), everyone, number // 2 + 1, a.relax)
                add_gradients(a, scratch, due, thread, everyone)

    if a.dweights != 0:
        if a.halves == 2:  # another's half is added
            wait(meeting(a, met), everyone, met // 2, a.relax)
        unpack_weight_gradients(a, share(panels, thread, everyone), share(panels, thread + 1, everyone))
