"""Small layers: one launch, in which a program holds the recurrent weights and takes its batch rows through all steps.

`pin` and a second product before the loop keep the weights in registers: the compiler sinks an operand with a single
use into the loop. A step's values are loaded during the step before it.

There are T steps and B batch rows: `rows` for each layer of a stack, which has weights of its own. The cell has S
pre-activations. x is multiplied for the first X of them and h for the last Y. A program has the D units of one head,
which may be all H units. A saved row has SAVED values of H units. P and PI are D and I padded to powers of two. Arrays
are contiguous but for those with strides (`x_step`, `x_row`). Any offset may pass 2^31. Other arguments in capitals are
attributes of `cells.CellFunctions` or of the tile. A name on `_ptrs` is a tuple of pointers.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.products import (
    block_of,
    gate_rows,
    in_head,
    join_gates,
    load_weights,
    pin,
    pre_activations,
    recurrent_dh,
    use_weights,
)
from fastlstm.backends.triton.tile_access import (
    add_biases,
    as_float32,
    load_all,
    load_bias,
    load_blocks,
    load_lengths,
    load_or_zeros,
    load_params,
    load_reset,
    load_states_read,
    load_x,
    reset_states_read,
    step_at,
    store_all,
    store_blocks,
    where_all,
    with_first,
    zero_all,
    zeros,
)


@triton.jit(do_not_specialize=["T", "B", "rows", "x_step", "x_row", "reverse"])
def forward_kernel(
    x_ptr, weight_ih_ptr, bias_ptr, weight_ptr, weight_low_ptr, scale_ptr, product_ptrs, bias_hh_ptr, param_ptrs,
    input_ptrs, initial_ptrs, lengths_ptr, reset_ptr, sequence_ptrs, saved_ptr, last_ptrs, T, B, rows, x_step: tl.int64,
    x_row, reverse, CELL: tl.constexpr, BLOCKS: tl.constexpr, S: tl.constexpr, Y: tl.constexpr, GATES: tl.constexpr,
    STATES: tl.constexpr, UNBOUNDED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, I: tl.constexpr,
    PI: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps of this program's rows. Any tensor but the outputs may be None where the layer has none.

    Args:
        x: (T,B,I), which is multiplied here. With PI 0 it is the product (T,B,X H), contiguous and with the bias.
        weight_ih, bias: (X H,I) and (X H,), or None with PI 0.
        weight, weight_low, scale: weight_hh (Y H,D), or its parts and scale as `pack_kernel` writes them.
        products: likewise of (H,D), one after the other, for products of values of the step.
        bias_hh: (Y H,), of which only the pre-activations without x are read.
        params, inputs: (H,) and (T,B,H).
        initial: (B,H), or None for zeros.
        lengths, reset: (B,) and (T,B).
        sequences: (T,B,H), of which h is not written at held steps. The others are None where nothing is saved.
        saved: (T,B,SAVED H), or None.
        last: (B,H).
    """
    X: tl.constexpr = len(BLOCKS)
    layer, first = block_of(rows, BLOCK_B)
    b, column = tl.arange(0, BLOCK_B), tl.arange(0, P)
    unit = in_head(column, H, D)
    b_ok, u_ok = first + b < rows, column < D
    first = layer * rows + first  # 64 bits for the scalars, 32 for the tiles
    ok, offs = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    row, row_unit = gate_rows(H, P, GATES)
    row, row_ok = in_head(row, H, D), row_unit < D

    w, w_low, scale = (), (), ()
    for k in tl.static_range(Y // GATES):
        offset = layer * Y * H + k * GATES * H
        offs_w, w_ok = offset * D + row[:, None] * D + column[None, :], row_ok[:, None] & u_ok[None, :]
        w += (pin(tl.load(weight_ptr + offs_w, mask=w_ok, other=0.0)),)
        if PRECISION == "ieee":
            w_low += (tl.load(weight_low_ptr + offs_w, mask=w_ok, other=0.0),)  # not pinned: it stays in shared memory
        else:
            w_low += (w[k],)
        if PRECISION != "native":
            scale += (tl.load(scale_ptr + offset + row, mask=row_ok, other=0.0)[:, None],)
        else:
            scale += (1.0,)
    w_ih, bias, bias_hh = (), (), ()
    if bias_hh_ptr is not None:
        for k in tl.static_range(S - X):
            bias_hh += (load_bias(bias_hh_ptr + (layer * Y + Y - (S - X) + k) * H + unit, u_ok),)
    if PI > 0:
        entry = tl.arange(0, PI)
        x_offs, x_ok = b[None, :] * x_row + entry[:, None], (entry < I)[:, None] & b_ok[None, :]
        for k in tl.static_range(X // GATES):
            offset = layer * X * H + BLOCKS[k * GATES] * H
            offs_w, w_ok = offset * I + row[:, None] * I + entry[None, :], row_ok[:, None] & (entry < I)[None, :]
            w_ih += (pin(tl.load(weight_ih_ptr + offs_w, mask=w_ok, other=0.0)),)
        if bias_ptr is not None:
            for k in tl.static_range(X):
                bias += (load_bias(bias_ptr + (layer * X + BLOCKS[k]) * H + unit, u_ok),)
    else:  # strides known to be multiples of H: at P 128 that saves 30 registers
        x_step, x_row = tl.cast(B, tl.int64) * (X * H), X * H
        x_offs, x_ok = b[None, :] * x_row + unit[:, None], ok

    if x_ptr is not None:
        x_ptr += first * x_row
    prev = as_float32(load_all(initial_ptrs, STATES, first * H, offs, ok))
    params = load_params(param_ptrs, layer * H, unit, u_ok, BLOCK_B)
    weights = load_weights(product_ptrs, layer * H, unit, column, u_ok, D, False, PRECISION)
    if len(weights) > 0:
        prev = with_first(use_weights(prev[0], weights, T, PRECISION), prev)
    t = step_at(0, T, reverse)
    x = load_x(x_ptr + t * x_step, x_offs, x_ok, H, BLOCKS, PI > 0) if X > 0 else ()
    inputs = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, offs, ok)
    length = load_lengths(lengths_ptr, first + b, b_ok, T)
    if reset_ptr is not None:
        reset = load_reset(reset_ptr, t, B, first + b, length)
        prev = zero_all(reset[None, :], prev)
    preact = pre_activations(w, w_low, scale, prev[0], w_ih, x, X, S, GATES, P, BLOCK_B, PRECISION, True)
    if X > 0:
        t_ahead = step_at(tl.minimum(1, T - 1), T, reverse)
        x = load_x(x_ptr + t_ahead * x_step, x_offs, x_ok, H, BLOCKS, PI > 0)
    for s in range(T):
        t = step_at(s, T, reverse)
        r = t * B + first  # this program's first row in the step
        t_ahead = step_at(tl.minimum(s + 1, T - 1), T, reverse)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t_ahead, B, first + b, length)
        results = CELL(*(add_biases(preact, bias, bias_hh) + prev + params + as_float32(inputs) + weights))
        inputs = load_all(input_ptrs, len(input_ptrs), (t_ahead * B + first) * H, offs, ok)
        new, active = results[: len(prev)], ok
        if lengths_ptr is not None:
            active = ok & (t.to(tl.int32) < length)[None, :]
            new = where_all(active, new, prev)
        store_all(sequence_ptrs, r * H, offs, new[:1], active)
        if saved_ptr is not None:
            SAVED: tl.constexpr = len(results) - len(prev)
            store_all(sequence_ptrs[1:], r * H, offs, new[1:], ok)
            offs_saved = b[None, :] * (SAVED * H) + unit[:, None]
            store_blocks(saved_ptr + r * SAVED * H + offs_saved, H, results[len(prev) :], ok)
        if s == T - 1:
            store_all(last_ptrs, first * H, offs, new, ok)
        if reset_ptr is not None:
            new = zero_all(reset[None, :], new)
        if P > D:  # padding may be NaN: no weight times infinity
            new = with_first(tl.where(u_ok[:, None], new[0], 0.0), new)
        prev = new
        unbounded: tl.constexpr = UNBOUNDED or lengths_ptr is not None  # a held row may still carry h_0, of any size
        preact = pre_activations(w, w_low, scale, prev[0], w_ih, x, X, S, GATES, P, BLOCK_B, PRECISION, unbounded)
        if X > 0:
            t_ahead = step_at(tl.minimum(s + 2, T - 1), T, reverse)
            x = load_x(x_ptr + t_ahead * x_step, x_offs, x_ok, H, BLOCKS, PI > 0)


@triton.jit(do_not_specialize=["T", "B", "rows", "dh_step", "dh_row", "reverse"])
def backward_kernel(
    dh_ptr, dsequence_ptrs, dlast_ptrs, weight_ptr, weight_low_ptr, scale_ptr, product_ptrs, param_ptrs, input_ptrs,
    initial_ptrs, lengths_ptr, reset_ptr, sequence_ptrs, saved_ptr, dpreact_ptr, dinitial_ptrs, dparam_ptrs,
    dinput_ptrs, T, B, rows, dh_step: tl.int64, dh_row, reverse, CELL: tl.constexpr, READ: tl.constexpr,
    CARRIED: tl.constexpr, S: tl.constexpr, Y: tl.constexpr, GATES: tl.constexpr, DIVIDES: tl.constexpr,
    SAVED: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Differentiate all steps of this program's rows. Incoming gradients that are zero are None, as are results that
    are not wanted.

    Args:
        dh: (T,B,H), with the strides dh_step and dh_row, which count in H.
        dsequences: (T,B,H), of the states but the first.
        dlast, dinitial: (B,H), for all states.
        sequences, initial: as in `forward_kernel`; None for the states that are not in READ.
        saved, dpreact: (T,B,SAVED H) and (T,B,S H).
        dparams: (B,H) in float32. Their sum over rows is the gradient: a row may hold the sum of several rows.
        dinputs: (T,B,H), and after them the gradients of products.
    """
    dh_row *= H  # so that the compiler knows it for a multiple, and loads are wide
    HELD: tl.constexpr = lengths_ptr is not None
    MASKED: tl.constexpr = HELD or reset_ptr is not None
    layer, first = block_of(rows, BLOCK_B)
    b, column, row = tl.arange(0, BLOCK_B), tl.arange(0, P), tl.arange(0, GATES * P)
    unit = in_head(column, H, D)
    b_ok, u_ok = first + b < rows, column < D
    first = layer * rows + first
    ok, offs = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    offs_saved, offs_dh = b[None, :] * (SAVED * H) + unit[:, None], b[None, :] * dh_row + unit[:, None]
    row, row_ok = in_head(row // P * H + row % P, H, D), row % P < D
    offs_dpreact, dpreact_ok = b[None, :] * (S * H) + row[:, None], row_ok[:, None] & b_ok[None, :]

    w, w_low, scale = (), (), 1.0
    for n in tl.static_range(Y // GATES):
        offs_w, w_ok = row[None, :] * D + column[:, None], u_ok[:, None] & row_ok[None, :]
        offs_w = layer * Y * H * D + n * GATES * H * D + offs_w
        w += (pin(tl.load(weight_ptr + offs_w, mask=w_ok, other=0.0)),)  # W^T (P, GATES P)
        w_low += (tl.load(weight_low_ptr + offs_w, mask=w_ok, other=0.0) if PRECISION == "ieee" else w[n],)
    if PRECISION != "native" and Y > 0:
        scale = tl.load(scale_ptr + layer * H + unit, mask=u_ok, other=0.0)[:, None]

    d = as_float32(load_all(dlast_ptrs, len(CARRIED), first * H, offs, ok))
    if Y > 0:
        # This product is never chosen. It is the second use of w, without which the compiler would sink w into the loop
        unused = recurrent_dh(w, w_low, scale, zeros((GATES * P, BLOCK_B), Y // GATES), PRECISION, False)
        d = with_first(tl.where(T > 0, d[0], unused), d)
    weights = load_weights(product_ptrs, layer * H, unit, column, u_ok, D, True, PRECISION)
    if len(weights) > 0:
        d = with_first(use_weights(d[0], weights, T, PRECISION), d)
    ROWS: tl.constexpr = 2 if Y > 0 else 1  # rows of a product that a thread has: their sum takes half the registers
    dparams = zeros((P, BLOCK_B // ROWS), len(param_ptrs))
    params = load_params(param_ptrs, layer * H, unit, u_ok, BLOCK_B)
    length = load_lengths(lengths_ptr, first + b, b_ok, T)
    # The loads of the last step. The loop repeats these lines for the steps before it: with a function for both some
    # kernels take more registers.
    t = step_at(T - 1, T, reverse)
    active = ok & (t.to(tl.int32) < length)[None, :] if HELD else ok
    saved = load_blocks(saved_ptr + (t * B + first) * SAVED * H + offs_saved, H, active, SAVED)
    t_prev = step_at(tl.maximum(T - 2, 0), T, reverse)
    states_read = load_states_read(
        initial_ptrs, sequence_ptrs, t, t_prev, T > 1, B, first, offs, active, length, READ, H, HELD
    )
    inputs = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, offs, active)
    dh_out = load_or_zeros(dh_ptr, t * dh_step * H + first * dh_row, offs_dh, active)
    dsequences = load_all(dsequence_ptrs, len(CARRIED) - 1, (t * B + first) * H, offs, ok)
    if reset_ptr is not None:
        reset = load_reset(reset_ptr, t, B, first + b, length)
    for n in range(T):
        r = t * B + first  # this program's first row in the step
        d_now = (d[0] + dh_out.to(tl.float32),)
        for j in tl.static_range(len(CARRIED) - 1):
            d_now += (d[j + 1] + dsequences[j].to(tl.float32),)
        states_read = as_float32(states_read)
        passes_back, held = active, d_now  # what goes through the step, and the gradients that pass a held row by
        if HELD:
            held, d_now = zero_all(active, d_now), zero_all(~active, d_now)
        if reset_ptr is not None:
            states_read = reset_states_read(reset, states_read, READ)
            passes_back = active & ~reset[None, :]
        results = CELL(*(d_now + as_float32(saved) + states_read + params + as_float32(inputs) + weights))
        if DIVIDES:  # where nothing is loaded it divides zero by zero
            results = zero_all(~active, results)
        tiles = ()
        for j in tl.static_range(S // GATES):
            tile = join_gates(results[j * GATES : (j + 1) * GATES], P, BLOCK_B, GATES).to(dpreact_ptr.dtype.element_ty)
            tl.store(dpreact_ptr + r * S * H + j * GATES * H + offs_dpreact, tile, mask=dpreact_ok)
            if P > D and not MASKED and not DIVIDES:
                # padding may be NaN, and must not meet weights; `passes_back` zeroes it too
                tile = tl.where(dpreact_ok, tile, 0.0).to(tile.dtype)
            tiles += (tile,)
        d = ()
        for j in tl.static_range(len(CARRIED)):
            dprev = results[S + CARRIED[j]] if CARRIED[j] >= 0 else tl.zeros((P, BLOCK_B), tl.float32)
            if MASKED and (j > 0 or Y == 0):
                dprev = tl.where(passes_back, dprev, held[j] if HELD else 0.0)
            d += (dprev,)
        doperands = results[len(results) - len(param_ptrs) - len(input_ptrs) - len(weights) :]
        total = ()
        for j in tl.static_range(len(param_ptrs)):
            row_sums = tl.sum(tl.reshape(doperands[j], (P, BLOCK_B // ROWS, ROWS)), 2)
            total += (dparams[j] + row_sums if dparam_ptrs[j] is not None else dparams[j],)
        dparams = total
        store_all(dinput_ptrs, r * H, offs, doperands[len(param_ptrs) :], ok)

        s = tl.maximum(T - 2 - n, 0)  # the next step's values arrive while the product is computed
        t = step_at(s, T, reverse)
        active = ok & (t.to(tl.int32) < length)[None, :] if HELD else ok
        saved = load_blocks(saved_ptr + (t * B + first) * SAVED * H + offs_saved, H, active, SAVED)
        t_prev = step_at(tl.maximum(s - 1, 0), T, reverse)
        states_read = load_states_read(
            initial_ptrs, sequence_ptrs, t, t_prev, s > 0, B, first, offs, active, length, READ, H, HELD
        )
        inputs = load_all(input_ptrs, len(input_ptrs), (t * B + first) * H, offs, active)
        dh_out = load_or_zeros(dh_ptr, t * dh_step * H + first * dh_row, offs_dh, active)
        dsequences = load_all(dsequence_ptrs, len(CARRIED) - 1, (t * B + first) * H, offs, ok)
        if Y > 0:
            dh = recurrent_dh(w, w_low, scale, tiles, PRECISION, True)
            dh = dh + d[0] if CARRIED[0] >= 0 else dh
            if MASKED and PRECISION == "native":
                dh = tl.where(passes_back, dh, held[0] if HELD else 0.0)
            else:
                dh = tl.where(reset[None, :], 0.0, dh) if reset_ptr is not None else dh
                if HELD:
                    dh += held[0]  # a held row's product is zero, and to choose takes registers that are not there
            d = with_first(dh, d)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, first + b, length)
    store_all(dinitial_ptrs, first * H, offs, d, ok)
    b = tl.arange(0, BLOCK_B // ROWS) * ROWS
    ok = u_ok[:, None] & (first + b < (layer + 1) * rows)[None, :]
    store_all(dparam_ptrs, first * H, b[None, :] * H + unit[:, None], dparams, ok)
