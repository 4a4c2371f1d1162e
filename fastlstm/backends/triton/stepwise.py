"""Large layers: one launch a step, in which every program computes some units of some batch rows, product and cell.

Every step reads the weights again, from the L2 cache where they fit. The units of a program are of one head. States in
float32 pass from launch to launch in place, since only one program reads and writes an element. Sizes and names are
those of `resident`.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.products import block_of, gate_rows, split_gates
from fastlstm.backends.triton.tile_access import (
    LONGEST,
    as_float32,
    load_all,
    load_blocks,
    load_lengths,
    load_or_zeros,
    load_params,
    load_reset,
    load_states_read,
    reset_states_read,
    store_all,
    store_blocks,
    where_all,
    zero_all,
    zeros,
)


@triton.jit
def head_of(unit, H: tl.constexpr, D: tl.constexpr):
    """Return the first unit of the head that `unit` belongs to. A head has D of H units."""
    if D < H:
        return unit // D * D
    else:
        return 0


@triton.jit
def locate(rows, H: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return this program's layer of the stack, first unit, batch rows and units, and which of the last two exist."""
    layer, first = block_of(rows, BLOCK_B)
    first_unit = tl.program_id(1) * UNITS
    b, unit = first + tl.arange(0, BLOCK_B), first_unit + tl.arange(0, UNITS)
    return layer, first_unit, layer * rows + b, unit, b < rows, unit < H


@triton.jit(do_not_specialize=["t", "t_prev", "B", "rows"])
def forward_kernel(
    preact_ptr, weight_ptr, bias_hh_ptr, param_ptrs, input_ptrs, h_0_ptr, lengths_ptr, reset_ptr, sequence_ptrs,
    saved_ptr, h_n_ptr, carried_ptrs, t, t_prev, B, rows, CELL: tl.constexpr, BLOCKS: tl.constexpr, S: tl.constexpr,
    Y: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run the step at time t.

    Args:
        preact: (T,B,X H), the product of x, with the bias.
        h_0, h_n: (B,H), h before and after the step if there are lengths, since h is not stored at held steps.
        lengths, reset: (B,) and (T,B), or None.
        carried: (B,H) in float32, the states, which the step replaces. The first is None if the cell reads no h_prev.
        t_prev: that of the step before, negative if h_prev is in h_0: with lengths, and for the first step.
    """
    X: tl.constexpr = len(BLOCKS)
    N: tl.constexpr = S // GATES
    t, t_prev = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64)
    layer, first_unit, b, unit, b_ok, u_ok = locate(rows, H, UNITS, BLOCK_B)
    row, row_unit = gate_rows(H, UNITS, GATES)
    row, row_ok, k = row + first_unit, row_unit + first_unit < H, tl.arange(0, BLOCK_K)
    if Y * H * D >= 2**31:
        row = row.to(tl.int64)
    h_prev_ptr = tl.where(t_prev < 0, h_0_ptr, sequence_ptrs[0] + t_prev * B * H)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    prev_ok = b_ok & ~load_reset(reset_ptr, t, B, b, length) if reset_ptr is not None else b_ok
    acc = zeros((GATES * UNITS, BLOCK_B), N)
    if Y > 0:
        weight_ptr += layer * Y * H * D
        h_prev_ptr += head_of(first_unit, H, D)
        for k_0 in range(0, D, BLOCK_K):
            k_ok = k_0 + k < D
            w_ptrs, h_ptrs = (
                weight_ptr + row[:, None] * D + (k_0 + k)[None, :],
                h_prev_ptr + b[None, :] * H + (k_0 + k)[:, None],
            )
            w = load_blocks(w_ptrs, GATES * H * D, row_ok[:, None] & k_ok[None, :], Y // GATES)
            h = tl.load(h_ptrs, mask=k_ok[:, None] & prev_ok[None, :], other=0.0)
            total = acc[: N - Y // GATES]
            for n in tl.static_range(Y // GATES):
                total += (tl.dot(w[n], h, acc[N - Y // GATES + n], input_precision=PRECISION),)
            acc = total
    ok, offs = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    gates = ()
    for n in tl.static_range(N):
        tile = acc[n]
        if n < X // GATES:
            offset = (t * B + b)[None, :] * (X * H) + BLOCKS[n * GATES] * H + row[:, None]
            tile += tl.load(preact_ptr + offset, mask=row_ok[:, None] & b_ok[None, :], other=0.0)
        elif bias_hh_ptr is not None:
            offset = (layer * Y + n - (S - Y)) * H + row
            tile += tl.load(bias_hh_ptr + offset, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        gates += split_gates(tile, UNITS, BLOCK_B, GATES)

    prev = load_all(carried_ptrs, STATES, 0, offs, u_ok[:, None] & prev_ok[None, :])
    inputs = as_float32(load_all(input_ptrs, len(input_ptrs), t * B * H, offs, ok))
    params = load_params(param_ptrs, layer * H, unit, u_ok, BLOCK_B)
    results = CELL(*(gates + prev + params + inputs))
    new, store_ok, SAVED = results[:STATES], ok, len(results) - STATES
    h = new[0].to(sequence_ptrs[0].dtype.element_ty)
    if lengths_ptr is not None:
        active = (t < length)[None, :]
        store_ok = ok & active
        new = where_all(active, new, prev)
        h = tl.where(active, h, tl.load(h_0_ptr + offs, mask=ok, other=0.0))
        tl.store(h_n_ptr + offs, h, mask=ok)
    tl.store(sequence_ptrs[0] + t * B * H + offs, h, mask=store_ok)
    store_all(carried_ptrs, 0, offs, new, ok)
    if saved_ptr is not None:
        store_all(sequence_ptrs[1:], t * B * H, offs, new[1:], ok)
        offset = (t * B + b)[None, :] * (SAVED * H) + unit[:, None]
        store_blocks(saved_ptr + offset, H, results[STATES:], ok)


@triton.jit(do_not_specialize=["t", "t_prev", "t_next", "B", "rows", "dh_step", "dh_row"])
def backward_kernel(
    dh_ptr, dsequence_ptrs, weight_ptr, param_ptrs, input_ptrs, initial_ptrs, lengths_ptr, reset_ptr, sequence_ptrs,
    saved_ptr, dpreact_ptr, dcarried_ptrs, dparam_ptrs, dinput_ptrs, t, t_prev, t_next, B, rows, dh_step: tl.int64,
    dh_row, CELL: tl.constexpr, READ: tl.constexpr, CARRIED: tl.constexpr, S: tl.constexpr, Y: tl.constexpr,
    SAVED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Differentiate the step at time t. It first multiplies weight_hh by dpreact of the step that ran after it.

    Args:
        dcarried: (B,H) in float32, the gradients of the states, which the step replaces: from those of the last states
            to those of the initial states. Between launches the first is the carried gradient of h, without the
            product, or if the cell carries none all of this step's, which is read only for rows that were held here.
        dparam: (B,H) in float32, to which each step adds.
        t: negative in the last launch, which has only the product left.
        t_prev, t_next: the times of the steps that ran before and after it, negative where there is none.
    """
    OTHERS: tl.constexpr = len(CARRIED) - 1
    t, t_prev, t_next = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64), tl.cast(t_next, tl.int64)
    layer, first_unit, b, unit, b_ok, u_ok = locate(rows, H, UNITS, BLOCK_B)
    k, ok, offs = tl.arange(0, BLOCK_K), u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    if S * H * D >= 2**31:
        k = k.to(tl.int64)
    acc = tl.zeros((UNITS, BLOCK_B), tl.float32)
    if Y > 0:
        head = head_of(first_unit, H, D)
        weight_ptr += layer * Y * H * D
        for k_0 in range(0, tl.where(t_next < 0, 0, Y * D), BLOCK_K):
            k_ok, row = k_0 + k < Y * D, k_0 + k
            if D < H:
                row = row // D * H + row % D + head
            w_ptrs = weight_ptr + row[None, :] * D + (unit - head)[:, None]
            d_ptrs = dpreact_ptr + (t_next * B + b)[None, :] * (S * H) + ((S - Y) * H + row)[:, None]
            w = tl.load(w_ptrs, mask=u_ok[:, None] & k_ok[None, :], other=0.0)
            dpreact = tl.load(d_ptrs, mask=k_ok[:, None] & b_ok[None, :], other=0.0)
            acc = tl.dot(w, dpreact, acc, input_precision=PRECISION)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    t_next = tl.where(t_next < 0, LONGEST, t_next)
    next_active = (t_next < length)[None, :]
    if lengths_ptr is not None:
        acc = tl.where(next_active, acc, 0.0)
    if reset_ptr is not None:
        acc = tl.where(load_reset(reset_ptr, t_next, B, b, length)[None, :], 0.0, acc)
    dcarried_h = acc + tl.load(dcarried_ptrs[0] + offs, mask=ok if CARRIED[0] >= 0 else ok & ~next_active, other=0.0)
    if t >= 0:
        offs_dh = b[None, :] * (dh_row * H) + unit[:, None]
        dh = load_or_zeros(dh_ptr, t * dh_step * H, offs_dh, u_ok[:, None] & (t < length)[None, :]).to(tl.float32)
        d = (dcarried_h + dh,)
        dcarried = load_all(dcarried_ptrs[1:], OTHERS, 0, offs, ok)
        dsequences = load_all(dsequence_ptrs, OTHERS, t * B * H, offs, ok)
        for n in tl.static_range(OTHERS):
            d += (dcarried[n] + dsequences[n].to(tl.float32),)
        offset = (t * B + b)[None, :] * (SAVED * H) + unit[:, None]
        saved = as_float32(load_blocks(saved_ptr + offset, H, ok, SAVED))
        states_read = load_states_read(
            initial_ptrs, sequence_ptrs, t, t_prev, t_prev >= 0, B, 0, offs, ok, length, READ, H,
            lengths_ptr is not None,
        )  # fmt: skip
        states_read = as_float32(states_read)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, b, length)
            states_read = reset_states_read(reset, states_read, READ)
        inputs = as_float32(load_all(input_ptrs, len(input_ptrs), t * B * H, offs, ok))
        results = CELL(*(d + saved + states_read + load_params(param_ptrs, layer * H, unit, u_ok, BLOCK_B) + inputs))
        held = (t >= length)[None, :]
        if lengths_ptr is not None:
            results = zero_all(held, results)
        offset = (t * B + b)[None, :] * (S * H) + unit[:, None]
        store_blocks(dpreact_ptr + offset, H, results[:S], ok)
        dcarried_h = d[0]
        for n in tl.static_range(len(CARRIED)):
            if n > 0 or CARRIED[n] >= 0:
                dprev = results[S + CARRIED[n]] if CARRIED[n] >= 0 else tl.zeros((UNITS, BLOCK_B), tl.float32)
                dprev = tl.where(reset[None, :], 0.0, dprev) if reset_ptr is not None else dprev
                dprev = tl.where(held, d[n], dprev) if lengths_ptr is not None else dprev
                if n == 0:
                    dcarried_h = dprev
                else:
                    tl.store(dcarried_ptrs[n] + offs, dprev, mask=ok)
        doperands = results[len(results) - len(param_ptrs) - len(input_ptrs) :]
        for n in tl.static_range(len(param_ptrs)):
            if dparam_ptrs[n] is not None:
                dparam = tl.load(dparam_ptrs[n] + offs, mask=ok, other=0.0)
                tl.store(dparam_ptrs[n] + offs, dparam + doperands[n], mask=ok)
        store_all(dinput_ptrs, t * B * H, offs, doperands[len(param_ptrs) :], ok)
    tl.store(dcarried_ptrs[0] + offs, dcarried_h, mask=ok)
