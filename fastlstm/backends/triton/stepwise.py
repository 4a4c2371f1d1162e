"""Large layers: one launch a step, in which every program computes some units of some batch rows, product and cell.

The weights are read again in every step, from the L2 cache where they fit. What is carried from launch to launch in
float32 changes in place, since one program alone reads and writes an element. Sizes and names are those of `resident`.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.cells import cell_backward, cell_forward
from fastlstm.backends.triton.products import block_of, gate_rows, split_gates
from fastlstm.backends.triton.resident import load_gates, load_lengths, load_or_zeros, load_reset, store_gates

LONGEST = tl.constexpr(2**31 - 1)  # more than any number of steps


@triton.jit
def place(B, rows, H: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's group and first unit; its batch rows and units, and which of them exist."""
    group, first = block_of(rows, BLOCK_B)
    first_unit = tl.program_id(1) * UNITS
    b, unit = first + tl.arange(0, BLOCK_B), first_unit + tl.arange(0, UNITS)
    return group, first_unit, group * rows + b, unit, b < rows, unit < H


@triton.jit(do_not_specialize=["t", "t_prev", "B", "rows"])
def forward_kernel(
    preact_ptr, weight_ptr, h_0_ptr, lengths_ptr, reset_ptr, h_ptr, c_ptr, gates_ptr, h_n_ptr, c_carried_ptr,
    t, t_prev, B, rows, H: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step t, after t_prev, which is negative where t is the first. preact (T,B,4H) is the input's product with the
    bias. c_carried (B,H) is float32. lengths (B,) and reset (T,B) may be None. Where there are lengths, h is not
    written at held steps. Every step then starts from h_0 (B,H) and leaves its states in h_n, and t_prev is negative.
    """
    t, t_prev = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64)
    group, first_unit, b, unit, b_ok, u_ok = place(B, rows, H, UNITS, BLOCK_B)
    row, row_unit = gate_rows(H, UNITS)
    row, row_ok, k = row + first_unit, row_unit + first_unit < H, tl.arange(0, BLOCK_K)
    if 4 * H * H >= 2**31:
        row = row.to(tl.int64)
    h_prev_ptr = tl.where(t_prev < 0, h_0_ptr, h_ptr + t_prev * B * H)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    run_ok = b_ok & ~load_reset(reset_ptr, t, B, b, length) if reset_ptr is not None else b_ok
    weight_ptr += group * 4 * H * H
    acc = tl.zeros((4 * UNITS, BLOCK_B), tl.float32)
    for k_0 in range(0, H, BLOCK_K):
        k_ok = k_0 + k < H
        w_at, h_at = (
            weight_ptr + row[:, None] * H + (k_0 + k)[None, :],
            h_prev_ptr + b[None, :] * H + (k_0 + k)[:, None],
        )
        w = tl.load(w_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        h = tl.load(h_at, mask=k_ok[:, None] & run_ok[None, :], other=0.0)
        acc = tl.dot(w, h, acc, input_precision=PRECISION)
    acc += tl.load(
        preact_ptr + (t * B + b)[None, :] * (4 * H) + row[:, None], mask=row_ok[:, None] & b_ok[None, :], other=0.0
    )

    ok, state = u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    i, f, g, o = split_gates(acc, UNITS, BLOCK_B)
    c_prev = tl.load(c_carried_ptr + state, mask=u_ok[:, None] & run_ok[None, :], other=0.0)
    h, c, i, f, g, o = cell_forward(i, f, g, o, c_prev, "ieee" if PRECISION == "tf32x3" else "fast")
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    h = h.to(dtype)
    shown = ok
    if lengths_ptr is not None:
        live = (t < length)[None, :]
        shown = ok & live
        h, c = tl.where(live, h, tl.load(h_0_ptr + state, mask=ok, other=0.0)), tl.where(live, c, c_prev)
        tl.store(h_n_ptr + state, h, mask=ok)
    tl.store(h_ptr + t * B * H + state, h, mask=shown)
    tl.store(c_carried_ptr + state, c, mask=ok)
    if gates_ptr is not None:
        tl.store(c_ptr + t * B * H + state, c.to(dtype), mask=ok)
        store_gates(gates_ptr + (t * B + b)[None, :] * (4 * H) + unit[:, None], i, f, g, o, H, ok)


@triton.jit(do_not_specialize=["t", "t_prev", "t_next", "B", "rows", "dh_step", "dh_row", "dc_step", "dc_row"])
def backward_kernel(
    dh_ptr, dc_ptr, weight_ptr, c_0_ptr, lengths_ptr, reset_ptr, c_ptr, gates_ptr, dpreact_ptr, dh_carried_ptr,
    dc_carried_ptr, t, t_prev, t_next, B, rows, dh_step: tl.int64, dh_row, dc_step: tl.int64, dc_row,
    H: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of step t, whose neighbours are t_prev and t_next, negative where there is none.

    The product with dpreact[t_next] comes first. Where t is negative nothing else is left, and dh_carried ends as dh_0.
    dh_carried (B,H), float32, is dh_n before the last step, and then the gradient of every step's h. It goes on as it
    is where that h was held. dc_carried (B,H) is float32.
    """
    t, t_prev, t_next = tl.cast(t, tl.int64), tl.cast(t_prev, tl.int64), tl.cast(t_next, tl.int64)
    group, _, b, unit, b_ok, u_ok = place(B, rows, H, UNITS, BLOCK_B)
    k, ok, state = tl.arange(0, BLOCK_K), u_ok[:, None] & b_ok[None, :], b[None, :] * H + unit[:, None]
    if 4 * H * H >= 2**31:
        k = k.to(tl.int64)
    weight_ptr += group * 4 * H * H
    acc = tl.zeros((UNITS, BLOCK_B), tl.float32)
    for k_0 in range(0, tl.where(t_next < 0, 0, 4 * H), BLOCK_K):
        k_ok = k_0 + k < 4 * H
        w_at = weight_ptr + (k_0 + k)[None, :] * H + unit[:, None]
        d_at = dpreact_ptr + (t_next * B + b)[None, :] * (4 * H) + (k_0 + k)[:, None]
        w = tl.load(w_at, mask=u_ok[:, None] & k_ok[None, :], other=0.0)
        dpreact = tl.load(d_at, mask=k_ok[:, None] & b_ok[None, :], other=0.0)
        acc = tl.dot(w, dpreact, acc, input_precision=PRECISION)
    length = load_lengths(lengths_ptr, b, b_ok, LONGEST)
    t_next = tl.where(t_next < 0, LONGEST, t_next)
    went_on = (t_next < length)[None, :]
    if lengths_ptr is not None:
        acc = tl.where(went_on, acc, 0.0)
    if reset_ptr is not None:
        acc = tl.where(load_reset(reset_ptr, t_next, B, b, length)[None, :], 0.0, acc)
    dh = acc + tl.load(dh_carried_ptr + state, mask=ok & ~went_on, other=0.0)
    if t >= 0:
        dh_at = b[None, :] * dh_row + unit[:, None]
        dh += load_or_zeros(dh_ptr, t * dh_step, dh_at, u_ok[:, None] & (t < length)[None, :]).to(tl.float32)
        dc = tl.load(dc_carried_ptr + state, mask=ok, other=0.0)
        dc += load_or_zeros(dc_ptr, t * dc_step, b[None, :] * dc_row + unit[:, None], ok).to(tl.float32)
        at = (t * B + b)[None, :] * (4 * H) + unit[:, None]
        held = (t >= length)[None, :]
        if reset_ptr is not None:
            reset = load_reset(reset_ptr, t, B, b, length)[None, :]
        i, f, g, o = load_gates(gates_ptr + at, H, ok)
        c_prev_ptr = tl.where(t_prev < 0, c_0_ptr, c_ptr + t_prev * B * H)
        c_prev = tl.load(c_prev_ptr + state, mask=ok, other=0.0).to(tl.float32)
        c_prev = tl.where(reset, 0.0, c_prev) if reset_ptr is not None else c_prev
        i, f, g, o, dc_prev = cell_backward(
            dh, dc, i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c_prev,
            "ieee" if PRECISION == "tf32x3" else "fast",
        )  # fmt: skip
        if lengths_ptr is not None:
            i, f, g, o = tl.where(held, 0.0, i), tl.where(held, 0.0, f), tl.where(held, 0.0, g), tl.where(held, 0.0, o)
        dc_prev = tl.where(reset, 0.0, dc_prev) if reset_ptr is not None else dc_prev
        if lengths_ptr is not None:
            dc_prev = tl.where(held, dc, dc_prev)
        store_gates(dpreact_ptr + at, i, f, g, o, H, ok)
        tl.store(dc_carried_ptr + state, dc_prev, mask=ok)
    tl.store(dh_carried_ptr + state, dh, mask=ok)
