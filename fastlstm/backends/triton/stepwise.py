"""Large layers: one launch a step, in which every program computes some units of some batch rows, product and cell.

The weights are read again in every step, from the L2 cache where they fit. The units of a program are of one head. What
is carried from launch to launch in float32 changes in place, since one program alone reads and writes an element. Sizes
and names are those of `resident`.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.memory import (
    LONGEST,
    as_float32,
    load_all,
    load_blocks,
    load_lengths,
    load_or_zeros,
    load_params,
    load_read,
    load_reset,
    reset_read,
    store_all,
    store_blocks,
    where_all,
    zero_all,
    zeros,
)
from fastlstm.backends.triton.products import block_of, gate_rows, split_gates


@triton.jit
def head_of(unit, H: tl.constexpr, D: tl.constexpr):
    """The first unit of the head that has a unit. A head has D of H units."""
    if D < H:
        return unit // D * D
    else:
        return 0


@triton.jit
def place(rows, H: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's group and first unit; its batch rows and units, and which of them exist."""
    group, first = block_of(rows, BLOCK_B)
    first_unit = tl.program_id(1) * UNITS
    b, unit = first + tl.arange(0, BLOCK_B), first_unit + tl.arange(0, UNITS)
    return group, first_unit, group * rows + b, unit, b < rows, unit < H


@triton.jit(do_not_specialize=["t", "t_prev", "B", "rows"])
def forward_kernel(
    preact_ptr, weight_ptr, bias_hh_ptr, param_ptrs, input_ptrs, h_0_ptr, lengths_ptr, reset_ptr, states, saved_ptr,
    h_n_ptr, carried, t, t_prev, B, rows, CELL: tl.constexpr, BLOCKS: tl.constexpr, S: tl.constexpr, Y: tl.constexpr,
    GATES: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step t, after t_prev, which is negative where t is the first. preact (T,B,X H) is the input's product with the
    bias. carried (B,H) are the states in float32. That of h is None if only its product is taken. lengths (B,) and
    reset (T,B) may be None. Where there are lengths, h is not written at held steps. Every step then starts from h_0
    (B,H) and leaves its states in h_n, and t_prev is negative.
    """
    X: tl.constexpr = len(BLOCKS)
    N: tl.constexpr = S // GATES
    t, t_prev = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64)
    group, first_unit, b, unit, b_ok, u_ok = place(rows, H, UNITS, BLOCK_B)
    row, row_unit = gate_rows(H, UNITS, GATES)
    row, row_ok, k = row + first_unit, row_unit + first_unit < H, tl.arange(0, BLOCK_K)
    if Y * H * D >= 2**31:
        row = row.to(tl.int64)
    h_prev_ptr = tl.where(t_prev < 0, h_0_ptr, states[0] + t_prev * B * H)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    run_ok = b_ok & ~load_reset(reset_ptr, t, B, b, length) if reset_ptr is not None else b_ok
    acc = zeros((GATES * UNITS, BLOCK_B), N)
    if Y > 0:
        weight_ptr += group * Y * H * D
        h_prev_ptr += head_of(first_unit, H, D)
        for k_0 in range(0, D, BLOCK_K):
            k_ok = k_0 + k < D
            w_at, h_at = (
                weight_ptr + row[:, None] * D + (k_0 + k)[None, :],
                h_prev_ptr + b[None, :] * H + (k_0 + k)[:, None],
            )
            w = load_blocks(w_at, GATES * H * D, row_ok[:, None] & k_ok[None, :], Y // GATES)
            h = tl.load(h_at, mask=k_ok[:, None] & run_ok[None, :], other=0.0)
            total = acc[: N - Y // GATES]
            for n in tl.static_range(Y // GATES):
                total += (tl.dot(w[n], h, acc[N - Y // GATES + n], input_precision=PRECISION),)
            acc = total
    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    gates = ()
    for n in tl.static_range(N):
        tile = acc[n]
        if n < X // GATES:
            at = (t * B + b)[None, :] * (X * H) + BLOCKS[n * GATES] * H + row[:, None]
            tile += tl.load(preact_ptr + at, mask=row_ok[:, None] & b_ok[None, :], other=0.0)
        elif bias_hh_ptr is not None:
            at = (group * Y + n - (S - Y)) * H + row
            tile += tl.load(bias_hh_ptr + at, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        gates += split_gates(tile, UNITS, BLOCK_B, GATES)

    old = load_all(carried, STATES, 0, state, u_ok[:, None] & run_ok[None, :])
    given = as_float32(load_all(input_ptrs, len(input_ptrs), t * B * H, state, ok))
    param = load_params(param_ptrs, group * H, unit, u_ok, BLOCK_B)
    results = CELL(*(gates + old + param + given))
    new, shown, K = results[:STATES], ok, len(results) - STATES
    h = new[0].to(states[0].dtype.element_ty)
    if lengths_ptr is not None:
        live = (t < length)[None, :]
        shown = ok & live
        new = where_all(live, new, old)
        h = tl.where(live, h, tl.load(h_0_ptr + state, mask=ok, other=0.0))
        tl.store(h_n_ptr + state, h, mask=ok)
    tl.store(states[0] + t * B * H + state, h, mask=shown)
    store_all(carried, 0, state, new, ok)
    if saved_ptr is not None:
        store_all(states[1:], t * B * H, state, new[1:], ok)
        at = (t * B + b)[None, :] * (K * H) + unit[:, None]
        store_blocks(saved_ptr + at, H, results[STATES:], ok)


@triton.jit(do_not_specialize=["t", "t_prev", "t_next", "B", "rows", "dh_step", "dh_row"])
def backward_kernel(
    dh_ptr, douts, weight_ptr, param_ptrs, input_ptrs, starts, lengths_ptr, reset_ptr, states, saved_ptr, dsums_ptr,
    dcarried, dparams, dinputs, t, t_prev, t_next, B, rows, dh_step: tl.int64, dh_row,
    CELL: tl.constexpr, READ: tl.constexpr, CARRIED: tl.constexpr, S: tl.constexpr, Y: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of step t, whose neighbours are t_prev and t_next, negative where there is none.

    The product with dsums[t_next] comes first. Where t is negative nothing else is left. dcarried (B,H), float32, are
    the gradients of the last states before the last step, and in the end those of the first. That of h, in between, is
    what goes to the step before apart from the product. If the cell sends nothing there it is the gradient of every
    step's h, which goes on where that h was held. To dparams (B,H), float32, each step adds.
    """
    OTHERS: tl.constexpr = len(CARRIED) - 1
    t, t_prev, t_next = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64), tl.cast(t_next, tl.int64)
    group, first_unit, b, unit, b_ok, u_ok = place(rows, H, UNITS, BLOCK_B)
    k, ok, state = tl.arange(0, BLOCK_K), u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    if S * H * D >= 2**31:
        k = k.to(tl.int64)
    acc = tl.zeros((UNITS, BLOCK_B), tl.float32)
    if Y > 0:
        head = head_of(first_unit, H, D)
        weight_ptr += group * Y * H * D
        for k_0 in range(0, tl.where(t_next < 0, 0, Y * D), BLOCK_K):
            k_ok, row = k_0 + k < Y * D, k_0 + k
            if D < H:
                row = row // D * H + row % D + head
            w_at = weight_ptr + row[None, :] * D + (unit - head)[:, None]
            d_at = dsums_ptr + (t_next * B + b)[None, :] * (S * H) + ((S - Y) * H + row)[:, None]
            w = tl.load(w_at, mask=u_ok[:, None] & k_ok[None, :], other=0.0)
            dsums = tl.load(d_at, mask=k_ok[:, None] & b_ok[None, :], other=0.0)
            acc = tl.dot(w, dsums, acc, input_precision=PRECISION)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    t_next = tl.where(t_next < 0, LONGEST, t_next)
    went_on = (t_next < length)[None, :]
    if lengths_ptr is not None:
        acc = tl.where(went_on, acc, 0.0)
    if reset_ptr is not None:
        acc = tl.where(load_reset(reset_ptr, t_next, B, b, length)[None, :], 0.0, acc)
    passed = acc + tl.load(dcarried[0] + state, mask=ok if CARRIED[0] >= 0 else ok & ~went_on, other=0.0)
    if t >= 0:
        dh_at = b[None, :] * (dh_row * H) + unit[:, None]
        dh = load_or_zeros(dh_ptr, t * dh_step * H, dh_at, u_ok[:, None] & (t < length)[None, :]).to(tl.float32)
        d = (passed + dh,)
        of_states, douts_t = load_all(dcarried[1:], OTHERS, 0, state, ok), load_all(douts, OTHERS, t * B * H, state, ok)
        for n in tl.static_range(OTHERS):
            d += (of_states[n] + douts_t[n].to(tl.float32),)
        at = (t * B + b)[None, :] * (K * H) + unit[:, None]
        saved = as_float32(load_blocks(saved_ptr + at, H, ok, K))
        read = load_read(
            starts, states, t, t_prev, t_prev >= 0, B, 0, state, ok, length, READ, H, lengths_ptr is not None
        )
        read = as_float32(read)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, b, length)
            read = reset_read(reset, read, READ)
        given = as_float32(load_all(input_ptrs, len(input_ptrs), t * B * H, state, ok))
        results = CELL(*(d + saved + read + load_params(param_ptrs, group * H, unit, u_ok, BLOCK_B) + given))
        held = (t >= length)[None, :]
        if lengths_ptr is not None:
            results = zero_all(held, results)
        at = (t * B + b)[None, :] * (S * H) + unit[:, None]
        store_blocks(dsums_ptr + at, H, results[:S], ok)
        passed = d[0]
        for n in tl.static_range(len(CARRIED)):
            if n > 0 or CARRIED[n] >= 0:
                of_prev = results[S + CARRIED[n]] if CARRIED[n] >= 0 else tl.zeros((UNITS, BLOCK_B), tl.float32)
                of_prev = tl.where(reset[None, :], 0.0, of_prev) if reset_ptr is not None else of_prev
                of_prev = tl.where(held, d[n], of_prev) if lengths_ptr is not None else of_prev
                if n == 0:
                    passed = of_prev
                else:
                    tl.store(dcarried[n] + state, of_prev, mask=ok)
        ends = results[len(results) - len(param_ptrs) - len(input_ptrs) :]
        for n in tl.static_range(len(param_ptrs)):
            if dparams[n] is not None:
                tl.store(dparams[n] + state, tl.load(dparams[n] + state, mask=ok, other=0.0) + ends[n], mask=ok)
        store_all(dinputs, t * B * H, state, ends[len(param_ptrs) :], ok)
    tl.store(dcarried[0] + state, passed, mask=ok)
