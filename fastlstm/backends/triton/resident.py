"""Small layers: one launch, in which a program holds the recurrent weights and takes its batch rows through all steps.

Two things keep the weights in registers, and both are needed. One is `pin`. The other is a second product before the
loop, because the compiler sinks an operand with a single use into the loop. What a step reads from memory is asked for
in the step before.

There are T steps, and G groups of `rows` batch rows each, B in all, with one matrix of weights a group. Arrays are
contiguous but for those with strides of their own (`x_step`, `x_row`). Any offset may pass 2^31.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.cells import cell_backward, cell_forward
from fastlstm.backends.triton.products import block_of, gate_rows, join_gates, pin, product, split_gates


@triton.jit
def step_at(s, T, reverse):
    """The time step that is run as number s."""
    return tl.cast(s + reverse * (T - 1 - 2 * s), tl.int64)


@triton.jit
def load_lengths(ptr, b, b_ok, T):
    """How many of T steps each row has: all, unless there are lengths; none, if there is no such row."""
    length = tl.where(b_ok, T, 0)
    if ptr is not None:
        length = tl.minimum(tl.load(ptr + b, mask=b_ok, other=0), T)
    return tl.maximum(length, 0).to(tl.int32)


@triton.jit
def load_reset(ptr, t, B, b, length):
    """Which rows step t resets. A step that is held resets nothing."""
    return tl.load(ptr + t * B + b, mask=t.to(tl.int32) < length, other=0).to(tl.int1)


@triton.jit
def store_gates(ptr, i, f, g, o, H: tl.constexpr, ok):
    dtype: tl.constexpr = ptr.dtype.scalar.element_ty
    tl.store(ptr, i.to(dtype), mask=ok)
    tl.store(ptr + H, f.to(dtype), mask=ok)
    tl.store(ptr + 2 * H, g.to(dtype), mask=ok)
    tl.store(ptr + 3 * H, o.to(dtype), mask=ok)


@triton.jit(do_not_specialize=["T", "B", "rows", "x_step", "x_row", "reverse"])
def forward_kernel(
    x_ptr, weight_ih_ptr, bias_ptr, weight_ptr, weight_low_ptr, scale_ptr, h_0_ptr, c_0_ptr, lengths_ptr,
    reset_ptr, h_ptr, c_ptr, gates_ptr, h_n_ptr, c_n_ptr, T, B, rows, x_step: tl.int64, x_row, reverse,
    H: tl.constexpr, P: tl.constexpr, I: tl.constexpr, PI: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (T,B,I), weight_ih (4H,I) and bias (4H,) or None where the input's product is done here (PI: I padded); else x
    (T,B,4H) is that product with the bias, contiguous, and PI 0. weight (4H,H). lengths (B,) and reset (T,B) may be
    None. h (T,B,H) is not written at held steps. c (T,B,H) and gates (T,B,4H) are None where nothing is saved.
    """
    group, first = block_of(rows, BLOCK_B)
    b, unit = tl.arange(0, BLOCK_B), tl.arange(0, P)
    b_ok, u_ok = first + b < rows, unit < H
    first = group * rows + first  # 64 bits for the scalars, 32 for the tiles
    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    row, row_unit = gate_rows(H, P)
    row_ok = row_unit < H

    offs_w, w_ok = group * 4 * H * H + row[:, None] * H + unit[None, :], row_ok[:, None] & u_ok[None, :]
    w = pin(tl.load(weight_ptr + offs_w, mask=w_ok, other=0.0))
    w_low, scale = w, 1.0
    if PRECISION == "ieee":
        w_low = tl.load(weight_low_ptr + offs_w, mask=w_ok, other=0.0)  # not pinned: it stays in shared memory
    if PRECISION != "native":
        scale = tl.load(scale_ptr + group * 4 * H + row, mask=row_ok, other=0.0)[:, None]
    if PI > 0:
        k = tl.arange(0, PI)
        x_offs, x_ok = b[None, :] * x_row + k[:, None], (k < I)[:, None] & b_ok[None, :]
        offs_w, w_ok = group * 4 * H * I + row[:, None] * I + k[None, :], row_ok[:, None] & (k < I)[None, :]
        w_ih = pin(tl.load(weight_ih_ptr + offs_w, mask=w_ok, other=0.0))
        bias = tl.zeros((4 * P, 1), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + group * 4 * H + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    else:  # strides known to be multiples of H: at P 128 that saves 30 registers
        x_step, x_row = tl.cast(B, tl.int64) * (4 * H), 4 * H
        x_offs, x_ok = b[None, :] * x_row + row[:, None], row_ok[:, None] & b_ok[None, :]

    x_ptr += first * x_row
    h = tl.load(h_0_ptr + first * H + state, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(c_0_ptr + first * H + state, mask=ok, other=0.0).to(tl.float32)
    t = step_at(0, T, reverse)
    x = tl.load(x_ptr + t * x_step + x_offs, mask=x_ok, other=0.0)
    length = load_lengths(lengths_ptr, first + b, b_ok, T)
    if reset_ptr is not None:
        reset = load_reset(reset_ptr, t, B, first + b, length)
        h, c = tl.where(reset[None, :], 0.0, h), tl.where(reset[None, :], 0.0, c)
    acc = product(w, w_low, scale, h, PRECISION, True)
    acc += tl.dot(w_ih, x) if PI > 0 else x
    x = tl.load(x_ptr + step_at(tl.minimum(1, T - 1), T, reverse) * x_step + x_offs, mask=x_ok, other=0.0)
    for s in range(T):
        t = step_at(s, T, reverse)
        r = t * B + first  # this program's first row in the step
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, step_at(tl.minimum(s + 1, T - 1), T, reverse), B, first + b, length)
        i, f, g, o = split_gates(acc + bias if PI > 0 else acc, P, BLOCK_B)
        h_new, c_new, i, f, g, o = cell_forward(i, f, g, o, c, PRECISION)
        live = ok
        if lengths_ptr is not None:
            live = ok & (t.to(tl.int32) < length)[None, :]
            h_new, c_new = tl.where(live, h_new, h), tl.where(live, c_new, c)
        h, c = h_new, c_new
        tl.store(h_ptr + r * H + state, h.to(h_ptr.dtype.element_ty), mask=live)
        if gates_ptr is not None:
            tl.store(c_ptr + r * H + state, c.to(c_ptr.dtype.element_ty), mask=ok)
            store_gates(gates_ptr + r * 4 * H + b[None, :] * (4 * H) + unit[:, None], i, f, g, o, H, ok)
        if s == T - 1:
            tl.store(h_n_ptr + first * H + state, h.to(h_n_ptr.dtype.element_ty), mask=ok)
            tl.store(c_n_ptr + first * H + state, c.to(c_n_ptr.dtype.element_ty), mask=ok)
        if reset_ptr is not None:
            h, c = tl.where(reset[None, :], 0.0, h), tl.where(reset[None, :], 0.0, c)
        if P > H:
            h = tl.where(u_ok[:, None], h, 0.0)  # padding may be NaN: no weight times infinity
        wide: tl.constexpr = lengths_ptr is not None  # a held row may still carry h_0, of any size
        acc = product(w, w_low, scale, h, PRECISION, wide)
        acc += tl.dot(w_ih, x) if PI > 0 else x
        x = tl.load(x_ptr + step_at(tl.minimum(s + 2, T - 1), T, reverse) * x_step + x_offs, mask=x_ok, other=0.0)


@triton.jit
def load_or_zeros(ptr, start, offs, ok):
    if ptr is None:
        return tl.zeros(ok.shape, tl.float32)
    else:
        return tl.load(ptr + start + offs, mask=ok, other=0.0)


@triton.jit
def load_gates(ptr, H: tl.constexpr, ok):
    """i, f, g, o of a step, as they lie in memory: to convert them is to wait for them."""
    i, f = tl.load(ptr, mask=ok, other=0.0), tl.load(ptr + H, mask=ok, other=0.0)
    g, o = tl.load(ptr + 2 * H, mask=ok, other=0.0), tl.load(ptr + 3 * H, mask=ok, other=0.0)
    return i, f, g, o


@triton.jit
def load_c_prev(c_ptr, c_0_ptr, s, T, reverse, B, first, H: tl.constexpr, state, ok):
    """The cell states that step number s saw."""
    before = step_at(tl.maximum(s - 1, 0), T, reverse)
    return tl.load(tl.where(s > 0, c_ptr + before * B * H, c_0_ptr) + first * H + state, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["T", "B", "rows", "dh_step", "dh_row", "dc_step", "dc_row", "reverse"])
def backward_kernel(
    dh_ptr, dc_ptr, dh_n_ptr, dc_n_ptr, weight_ptr, weight_low_ptr, scale_ptr, c_0_ptr, lengths_ptr, reset_ptr, c_ptr,
    gates_ptr, dpreact_ptr, dh_0_ptr, dc_0_ptr, T, B, rows, dh_step: tl.int64, dh_row, dc_step: tl.int64,
    dc_row, reverse, H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh, dc (T,B,H), dh_n, dc_n (B,H), lengths (B,), reset (T,B): each may be None. weight (4H,H). gates, dpreact
    (T,B,4H).
    """
    MASKED: tl.constexpr = lengths_ptr is not None or reset_ptr is not None
    group, first = block_of(rows, BLOCK_B)
    b, unit, k = tl.arange(0, BLOCK_B), tl.arange(0, P), tl.arange(0, 4 * P)
    b_ok, u_ok = first + b < rows, unit < H
    first = group * rows + first
    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    gate, offs_dh = b[None, :] * (4 * H) + unit[:, None], b[None, :] * dh_row + unit[:, None]
    offs_dc = b[None, :] * dc_row + unit[:, None]
    row, row_ok = k // P * H + k % P, k % P < H
    offs_dpreact, dpreact_ok = b[None, :] * (4 * H) + row[:, None], row_ok[:, None] & b_ok[None, :]

    offs_w, w_ok = group * 4 * H * H + row[None, :] * H + unit[:, None], u_ok[:, None] & row_ok[None, :]
    w = pin(tl.load(weight_ptr + offs_w, mask=w_ok, other=0.0))  # W^T (P, 4P)
    w_low, scale = w, 1.0
    if PRECISION == "ieee":
        w_low = tl.load(weight_low_ptr + offs_w, mask=w_ok, other=0.0)
    if PRECISION != "native":
        scale = tl.load(scale_ptr + group * H + unit, mask=u_ok, other=0.0)[:, None]

    # This product is never chosen. It is the second use of w, without which the compiler would sink w into the loop.
    unused = product(w, w_low, scale, tl.zeros((4 * P, BLOCK_B), tl.float32), PRECISION, False)
    dh = tl.where(T > 0, load_or_zeros(dh_n_ptr, first * H, state, ok).to(tl.float32), unused)
    dc = load_or_zeros(dc_n_ptr, first * H, state, ok).to(tl.float32)
    length = load_lengths(lengths_ptr, first + b, b_ok, T)
    t = step_at(T - 1, T, reverse)
    live = ok & (t.to(tl.int32) < length)[None, :] if lengths_ptr is not None else ok
    i, f, g, o = load_gates(gates_ptr + (t * B + first) * 4 * H + gate, H, live)
    c_prev = load_c_prev(c_ptr, c_0_ptr, T - 1, T, reverse, B, first, H, state, live)
    dh_out = load_or_zeros(dh_ptr, t * dh_step + first * dh_row, offs_dh, live)
    dc_out = load_or_zeros(dc_ptr, t * dc_step + first * dc_row, offs_dc, ok)
    if reset_ptr is not None:
        reset = load_reset(reset_ptr, t, B, first + b, length)
    for n in range(T):
        r = t * B + first  # this program's first row in the step
        dh += dh_out.to(tl.float32)
        dc += dc_out.to(tl.float32)
        c_prev = c_prev.to(tl.float32)
        goes_on, dh_held, dc_held = live, 0.0, 0.0  # into the step; past it
        if lengths_ptr is not None:
            dh_held, dc_held = tl.where(live, 0.0, dh), tl.where(live, 0.0, dc)
            dh, dc = tl.where(live, dh, 0.0), tl.where(live, dc, 0.0)
        if reset_ptr is not None:
            c_prev = tl.where(reset[None, :], 0.0, c_prev)
            goes_on = live & ~reset[None, :]
        i, f, g, o, dc_prev = cell_backward(
            dh, dc, i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c_prev, PRECISION
        )
        dpreact = join_gates(i, f, g, o, P, BLOCK_B)
        dc = tl.where(goes_on, dc_prev, dc_held) if MASKED else dc_prev
        dpreact = dpreact.to(w.dtype if PRECISION == "native" else tl.float32)
        tl.store(dpreact_ptr + r * 4 * H + offs_dpreact, dpreact, mask=dpreact_ok)
        if P > H and not MASKED:  # padding may be NaN, by which no weight is to be multiplied; `goes_on` zeroes it too
            dpreact = tl.where(dpreact_ok, dpreact, 0.0).to(dpreact.dtype)

        s = tl.maximum(T - 2 - n, 0)  # asked for here, the next step's values arrive while the product is done
        t = step_at(s, T, reverse)
        live = ok & (t.to(tl.int32) < length)[None, :] if lengths_ptr is not None else ok
        i, f, g, o = load_gates(gates_ptr + (t * B + first) * 4 * H + gate, H, live)
        c_prev = load_c_prev(c_ptr, c_0_ptr, s, T, reverse, B, first, H, state, live)
        dh_out = load_or_zeros(dh_ptr, t * dh_step + first * dh_row, offs_dh, live)
        dc_out = load_or_zeros(dc_ptr, t * dc_step + first * dc_row, offs_dc, ok)
        dh_prev = product(w, w_low, scale, dpreact, PRECISION, True)
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, first + b, length)
        if PRECISION == "ieee" and lengths_ptr is not None and reset_ptr is None:
            dh = dh_prev + dh_held  # a held row's product is zero, and to choose takes registers that are not there
        else:
            dh = tl.where(goes_on, dh_prev, dh_held) if MASKED else dh_prev
    tl.store(dh_0_ptr + first * H + state, dh.to(dh_0_ptr.dtype.element_ty), mask=ok)
    tl.store(dc_0_ptr + first * H + state, dc.to(dc_0_ptr.dtype.element_ty), mask=ok)
