"""A large layer in one launch: programs hold slices of the recurrent weights, and meet after every step.

A program has some units of some batch rows. The weights of its units stay in registers for all time steps. After each
step the programs of the same batch rows wait for each other, since each needs h of all units: they write it where the
layer's output lies, in the L2 cache, and read it from there. No step's h is written twice, so that one meeting a step
suffices. All programs have to be on the device at once, or those that are would wait for ever: `tiles.across` counts.

The warps share the sum over all units, eight ways, as no other way leaves each weight in the registers of one thread
alone. What is said in `resident` of registers is true here. Sizes and names are those there. Layers with lengths are
not taken: h of a held step is no part of the output.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.memory import (
    as_float32,
    load_all,
    load_blocks,
    load_lengths,
    load_or_zeros,
    load_params,
    load_read,
    load_reset,
    reset_read,
    step_at,
    store_all,
    store_blocks,
    with_first,
    zero_all,
    zeros,
)
from fastlstm.backends.triton.products import block_of, gate_rows, pin, split_gates
from fastlstm.backends.triton.tiles import GRID_TERMS, GRID_WAYS

WAYS, TERMS = tl.constexpr(GRID_WAYS), tl.constexpr(GRID_TERMS)
SPAN = tl.constexpr(GRID_WAYS * GRID_TERMS)  # of a sum, the terms that all warps take at once


@triton.jit
def partial_sum(acc, w, v, PRECISION: tl.constexpr):
    """`acc` with the products of the first of `w` and all of `v`."""
    for i in tl.static_range(len(v)):
        acc = tl.dot(w[i], v[i], acc, input_precision=PRECISION)
    return acc


@triton.jit
def products(
    w, at, k, ok, LENGTH: tl.constexpr, NUMBER: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """NUMBER sums (M,BLOCK_B) of LENGTH terms each: `w` (WAYS,M,TERMS) times what is at the addresses
    `at` (WAYS,TERMS,BLOCK_B), which is asked for in AT_ONCE parts at once.
    """
    PARTS: tl.constexpr = len(w) // NUMBER
    M: tl.constexpr = w[0].shape[1]
    BLOCK_B: tl.constexpr = at.shape[2]
    acc = ()
    for _ in tl.static_range(NUMBER):
        acc += (tl.zeros((WAYS, M, BLOCK_B), tl.float32),)
    for n in tl.static_range(0, PARTS, AT_ONCE):
        v = ()
        for i in tl.static_range(min(AT_ONCE, PARTS - n)):
            v += (tl.load(at + (n + i) * SPAN, mask=ok & (k < LENGTH - (n + i) * SPAN), other=0.0),)
        total = ()
        for j in tl.static_range(NUMBER):
            total += (partial_sum(acc[j], w[j * PARTS + n :], v, PRECISION),)
        acc = total
    sums = ()
    for j in tl.static_range(NUMBER):  # to have all ways in one thread takes one pass through shared memory
        a, b = tl.split(tl.reshape(tl.permute(acc[j], (1, 2, 0)), (M, BLOCK_B, 2, 2, 2)))
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
        sums += (a + b,)
    return sums


@triton.jit
def arrive(met_ptr):
    """Say that what this program has written is there: what all its threads have, hence the barrier."""
    tl.debug_barrier()
    tl.atomic_add(met_ptr, 1, sem="release")


@triton.jit
def wait(met_ptr, number, more):
    """Until so many programs have arrived, or not at all unless `more`. One thread asks, and to tell all others takes a
    barrier. So all of them then see what those programs have written.
    """
    while more & (tl.atomic_add(met_ptr, 0, sem="acquire") < number):
        pass


@triton.jit
def load_preact(ptr, start, offs, ok, H: tl.constexpr, BLOCKS: tl.constexpr, GATES: tl.constexpr):
    """The input's part of each product, as it lies in memory."""
    found = ()
    for n in tl.static_range(len(BLOCKS) // GATES):
        found += (tl.load(ptr + start + BLOCKS[n * GATES] * H + offs, mask=ok, other=0.0),)
    return found


@triton.jit(do_not_specialize=["T", "B", "rows", "reverse"])
def forward_kernel(
    preact_ptr, weight_ptr, bias_hh_ptr, param_ptrs, input_ptrs, starts, reset_ptr, states, saved_ptr, ends, met_ptr,
    T, B, rows, reverse, CELL: tl.constexpr, BLOCKS: tl.constexpr, S: tl.constexpr, Y: tl.constexpr,
    GATES: tl.constexpr, H: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """preact (T,B,X H) is the input's product with the bias. weight (Y H,H), bias_hh (Y H,), reset (T,B) may be None.
    `states` (T,B,H), of which those beyond h are None where nothing is saved, and saved (T,B,K H). met (programs, 32),
    int32, are zeros: each group of batch rows counts in a line of its own how often its programs have arrived.
    """
    X: tl.constexpr = len(BLOCKS)
    N: tl.constexpr = S // GATES
    OF_H: tl.constexpr = Y // GATES
    STATES: tl.constexpr = len(starts)
    group, first = block_of(rows, BLOCK_B)
    first_unit = tl.program_id(1) * UNITS
    b, unit = tl.arange(0, BLOCK_B), first_unit + tl.arange(0, UNITS)
    b_ok, u_ok = first + b < rows, unit < H
    first = group * rows + first  # 64 bits for the scalars, 32 for the tiles
    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    row, row_unit = gate_rows(H, UNITS, GATES)
    row, row_ok = first_unit + row, first_unit + row_unit < H
    offs_x, x_ok = b[None, :] * (X * H) + row[:, None], row_ok[:, None] & b_ok[None, :]
    way, term = tl.arange(0, WAYS)[:, None, None] * TERMS, tl.arange(0, TERMS)
    k, k_w = way + term[None, :, None], way + term[None, None, :]
    offs_h, offs_w = b[None, None, :] * H + k, row[None, :, None] * H + k_w
    met_ptr += tl.program_id(0) * 32
    programs = tl.num_programs(1)

    w = ()
    for j in tl.static_range(OF_H):
        for n in tl.static_range((H + SPAN - 1) // SPAN):
            w_at = weight_ptr + (group * Y + j * GATES) * H * H + n * SPAN + offs_w
            w += (pin(tl.load(w_at, mask=row_ok[None, :, None] & (k_w < H - n * SPAN), other=0.0)),)
    bias_hh = ()
    for n in tl.static_range(X // GATES, N):
        if bias_hh_ptr is not None:
            bias = tl.load(bias_hh_ptr + (group * Y + n - (S - Y)) * H + row, mask=row_ok, other=0.0)
            bias_hh += (bias.to(tl.float32)[:, None],)
        else:
            bias_hh += (0.0,)
    param = load_params(param_ptrs, group * H, unit, u_ok, BLOCK_B)
    length = load_lengths(None, b, b_ok, T)
    old = as_float32(load_all(starts, STATES, first * H, state, ok))
    t, runs = step_at(0, T, reverse), b_ok
    if reset_ptr is not None:
        runs &= ~load_reset(reset_ptr, t, B, first + b, length)
        old = zero_all(~runs[None, :], old)
    x = load_preact(preact_ptr, (t * B + first) * (X * H), offs_x, x_ok, H, BLOCKS, GATES)
    given = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, state, ok)
    sums = products(w, starts[0] + first * H + offs_h, k, runs[None, None, :], H, OF_H, AT_ONCE, PRECISION)
    for s in range(T):
        t = step_at(s, T, reverse)
        r = t * B + first  # this program's first row in the step
        gates = ()
        for n in tl.static_range(N):
            tile = sums[n - (N - OF_H)] if n >= N - OF_H else tl.zeros((GATES * UNITS, BLOCK_B), tl.float32)
            tile += x[n].to(tl.float32) if n < X // GATES else bias_hh[n - X // GATES]
            gates += split_gates(tile, UNITS, BLOCK_B, GATES)
        results = CELL(*(gates + old + param + as_float32(given)))
        old, K = results[:STATES], len(results) - STATES
        store_all(states[:1], r * H, state, old[:1], ok)
        arrive(met_ptr)
        # The others need none of the following, which takes its time while they arrive
        if s == T - 1:
            store_all(ends, first * H, state, old, ok)
        if saved_ptr is not None:
            store_all(states[1:], r * H, state, old[1:], ok)
            at = saved_ptr + r * (K * H) + (b[None, :] * (K * H) + unit[:, None])
            store_blocks(at, H, results[STATES:], ok)
        more = s + 1 < T
        ahead = step_at(tl.minimum(s + 1, T - 1), T, reverse)
        x = load_preact(preact_ptr, (ahead * B + first) * (X * H), offs_x, x_ok, H, BLOCKS, GATES)
        given = load_all(input_ptrs, len(input_ptrs), (ahead * B + first) * H, state, ok)
        runs = b_ok & more
        if reset_ptr is not None:
            runs &= ~load_reset(reset_ptr, ahead, B, first + b, length)
        wait(met_ptr, (s + 1) * programs, more)
        if reset_ptr is not None:
            old = zero_all(~runs[None, :], old)
        sums = products(w, states[0] + r * H + offs_h, k, runs[None, None, :], H, OF_H, AT_ONCE, PRECISION)


@triton.jit(do_not_specialize=["T", "B", "rows", "dh_step", "dh_row", "reverse"])
def backward_kernel(
    dh_ptr, douts, dends, weight_ptr, param_ptrs, input_ptrs, starts, reset_ptr, states, saved_ptr, dsums_ptr, dstarts,
    dparams, dinputs, met_ptr, T, B, rows, dh_step: tl.int64, dh_row, reverse, CELL: tl.constexpr, READ: tl.constexpr,
    CARRIED: tl.constexpr, S: tl.constexpr, Y: tl.constexpr, K: tl.constexpr, H: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Arguments are those of `resident.backward_kernel`, and `met` that of the forward pass. The programs read each
    other's gradients of the sums, dsums (T,B,S H).
    """
    OTHERS: tl.constexpr = len(CARRIED) - 1
    group, first = block_of(rows, BLOCK_B)
    first_unit = tl.program_id(1) * UNITS
    b, unit = tl.arange(0, BLOCK_B), first_unit + tl.arange(0, UNITS)
    b_ok, u_ok = first + b < rows, unit < H
    first = group * rows + first
    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    way, term = tl.arange(0, WAYS)[:, None, None] * TERMS, tl.arange(0, TERMS)
    k, k_w = way + term[None, :, None], way + term[None, None, :]
    offs_d, offs_w = b[None, None, :] * (S * H) + ((S - Y) * H + k), k_w * H + unit[None, :, None]
    offs_saved, offs_dsums = b[None, :] * (K * H) + unit[:, None], b[None, :] * (S * H) + unit[:, None]
    offs_dh = b[None, :] * (dh_row * H) + unit[:, None]
    met_ptr += tl.program_id(0) * 32
    programs = tl.num_programs(1)

    w = ()
    for n in tl.static_range((Y * H + SPAN - 1) // SPAN):
        w_at = weight_ptr + group * Y * H * H + n * SPAN * H + offs_w  # W^T
        w += (pin(tl.load(w_at, mask=u_ok[None, :, None] & (k_w < Y * H - n * SPAN), other=0.0)),)
    param = load_params(param_ptrs, group * H, unit, u_ok, BLOCK_B)
    dparam = zeros((UNITS, BLOCK_B), len(param_ptrs))
    length = load_lengths(None, b, b_ok, T)
    d = as_float32(load_all(dends, len(CARRIED), first * H, state, ok))
    # A product of zeros, without which the compiler would sink w into the loop
    none = b_ok & (T < 0)
    d = with_first(d[0] + products(w, dsums_ptr + offs_d, k, none[None, None, :], Y * H, 1, AT_ONCE, PRECISION)[0], d)
    t, before = step_at(T - 1, T, reverse), step_at(tl.maximum(T - 2, 0), T, reverse)
    saved = load_blocks(saved_ptr + (t * B + first) * K * H + offs_saved, H, ok, K)
    read = load_read(starts, states, t, before, T > 1, B, first, state, ok, length, READ, H, False)
    given = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, state, ok)
    dh_out = load_or_zeros(dh_ptr, t * dh_step * H + first * dh_row * H, offs_dh, ok)
    douts_t = load_all(douts, OTHERS, (t * B + first) * H, state, ok)
    for n in range(T):
        r = t * B + first
        d_now = (d[0] + dh_out.to(tl.float32),)
        for j in tl.static_range(OTHERS):
            d_now += (d[j + 1] + douts_t[j].to(tl.float32),)
        read = as_float32(read)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, first + b, length)
            read = reset_read(reset, read, READ)
        results = CELL(*(d_now + as_float32(saved) + read + param + as_float32(given)))
        store_blocks(dsums_ptr + r * S * H + offs_dsums, H, results[:S], ok)
        arrive(met_ptr)
        d = ()
        for j in tl.static_range(len(CARRIED)):
            d += (results[S + CARRIED[j]] if CARRIED[j] >= 0 else tl.zeros((UNITS, BLOCK_B), tl.float32),)
        last = results[len(results) - len(param_ptrs) - len(input_ptrs) :]
        total = ()
        for j in tl.static_range(len(param_ptrs)):
            total += (dparam[j] + last[j] if dparams[j] is not None else dparam[j],)
        dparam = total
        store_all(dinputs, r * H, state, last[len(param_ptrs) :], ok)
        s = tl.maximum(T - 2 - n, 0)
        t, before = step_at(s, T, reverse), step_at(tl.maximum(s - 1, 0), T, reverse)
        saved = load_blocks(saved_ptr + (t * B + first) * K * H + offs_saved, H, ok, K)
        read = load_read(starts, states, t, before, s > 0, B, first, state, ok, length, READ, H, False)
        given = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, state, ok)
        dh_out = load_or_zeros(dh_ptr, t * dh_step * H + first * dh_row * H, offs_dh, ok)
        douts_t = load_all(douts, OTHERS, (t * B + first) * H, state, ok)
        wait(met_ptr, (n + 1) * programs, True)
        dsums = dsums_ptr + r * S * H + offs_d
        d = with_first(d[0] + products(w, dsums, k, b_ok[None, None, :], Y * H, 1, AT_ONCE, PRECISION)[0], d)
        if reset_ptr is not None:
            d = zero_all(reset[None, :], d)
    store_all(dstarts, first * H, state, d, ok)
    store_all(dparams, first * H, state, dparam, ok)
