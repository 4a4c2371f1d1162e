"""Loads and stores of both kinds of kernels: tuples of tiles, masks, and the states that a step reads. A tile is
(units, batch rows). `offs` are a tile's offsets, `start` is added to all of them, and `ok` says which exist.
"""

import triton
import triton.language as tl

LONGEST = tl.constexpr(2**31 - 1)  # more than any number of steps


@triton.jit
def step_at(s, T, reverse):
    """Return the time t of step s, which counts in the order in which the steps run."""
    return tl.cast(s + reverse * (T - 1 - 2 * s), tl.int64)


@triton.jit
def load_lengths(ptr, b, b_ok, T):
    """Return how many of T steps each row has: all without lengths, and none where a row does not exist."""
    length = tl.where(b_ok, T, 0)
    if ptr is not None:
        length = tl.minimum(tl.load(ptr + b, mask=b_ok, other=0), T)
    return tl.maximum(length, 0).to(tl.int32)


@triton.jit
def load_reset(ptr, t, B, b, length):
    """Return which rows step t resets. A held row is not reset."""
    return tl.load(ptr + t * B + b, mask=t.to(tl.int32) < length, other=0).to(tl.int1)


@triton.jit
def where_all(condition, values, others):
    """Return `values` where a condition holds, and `others` elsewhere, tile by tile."""
    chosen = ()
    for k in tl.static_range(len(values)):
        chosen += (tl.where(condition, values[k], others[k]),)
    return chosen


@triton.jit
def zero_all(condition, values):
    """Return `values`, with zeros where a condition holds."""
    chosen = ()
    for k in tl.static_range(len(values)):
        chosen += (tl.where(condition, 0.0, values[k]),)
    return chosen


@triton.jit
def with_first(first, values):
    """Return `values` with another first tile."""
    return (first,) + values[1:]  # noqa: RUF005, Triton compiles no *


@triton.jit
def zeros(shape, NUMBER: tl.constexpr):
    """Return NUMBER tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(NUMBER):
        tiles += (tl.zeros(shape, tl.float32),)
    return tiles


@triton.jit
def as_float32(values):
    tiles = ()
    for k in tl.static_range(len(values)):
        tiles += (values[k].to(tl.float32),)
    return tiles


@triton.jit
def load_or_zeros(ptr, start, offs, ok):
    if ptr is None:
        return tl.zeros(ok.shape, tl.float32)
    else:
        return tl.load(ptr + start + offs, mask=ok, other=0.0)


@triton.jit
def load_all(ptrs, NUMBER: tl.constexpr, start, offs, ok):
    """Load a tile from each pointer in its own type, without a wait to convert it; zeros for None. NUMBER counts the
    pointers, since before version 3.9 Triton has no len() of a tuple with None.
    """
    tiles = ()
    for k in tl.static_range(NUMBER):
        tiles += (load_or_zeros(ptrs[k], start, offs, ok),)
    return tiles


@triton.jit
def load_blocks(address, step: tl.constexpr, ok, NUMBER: tl.constexpr):
    """Load NUMBER tiles that are `step` elements apart. `address` has the addresses of the first."""
    tiles = ()
    for k in tl.static_range(NUMBER):
        tiles += (tl.load(address + k * step if k > 0 else address, mask=ok, other=0.0),)
    return tiles


@triton.jit
def load_x(ptr, offs, ok, H: tl.constexpr, BLOCKS: tl.constexpr, FUSED: tl.constexpr):
    """Load x of a step. Unless FUSED it is the product of x, and has a tile for each pre-activation that x fills."""
    if FUSED:
        return (tl.load(ptr + offs, mask=ok, other=0.0),)
    else:
        tiles = ()
        for k in tl.static_range(len(BLOCKS)):
            tiles += (tl.load(ptr + BLOCKS[k] * H + offs, mask=ok, other=0.0),)
        return tiles


@triton.jit
def store_all(ptrs, start, offs, values, ok):
    for k in tl.static_range(len(values)):
        if ptrs[k] is not None:
            tl.store(ptrs[k] + start + offs, values[k].to(ptrs[k].dtype.element_ty), mask=ok)


@triton.jit
def store_blocks(address, step: tl.constexpr, values, ok):
    for k in tl.static_range(len(values)):
        tl.store(address + k * step if k > 0 else address, values[k].to(address.dtype.scalar.element_ty), mask=ok)


@triton.jit
def load_bias(address, ok):
    """Load a vector of units as a column."""
    return tl.load(address, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_params(ptrs, start, unit, u_ok, BLOCK_B: tl.constexpr):
    """Load vectors (H,) as tiles, with the same values in all rows."""
    tiles = ()
    for k in tl.static_range(len(ptrs)):
        param = tl.load(ptrs[k] + start + unit, mask=u_ok, other=0.0).to(tl.float32)
        tiles += (tl.broadcast_to(param[:, None], (unit.shape[0], BLOCK_B)),)
    return tiles


@triton.jit
def add_biases(preact, bias, bias_hh):
    """Add `bias` to the first tiles of `preact` and `bias_hh` to the last. Either may be ()."""
    tiles = ()
    for k in tl.static_range(len(preact)):
        acc = preact[k]
        if k < len(bias):
            acc += bias[k]
        if k >= len(preact) - len(bias_hh):
            acc += bias_hh[k - (len(preact) - len(bias_hh))]
        tiles += (acc,)
    return tiles


@triton.jit
def load_states_read(
    initial_ptrs, sequence_ptrs, t, t_prev, has_prev, B, first, offs, ok, length, READ: tl.constexpr, H: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Load the states that the backward function reads at step t. READ has 2 k for state k after step t, and 2 k + 1
    for state k before it: the state after step t_prev, or without `has_prev` the initial state, zero where
    `initial_ptrs` has None. With HELD, h is not stored at held steps: a row that is held at t_prev takes the initial
    state.
    """
    tiles = ()
    for k in tl.static_range(len(READ)):
        start_ptr, ptr = initial_ptrs[READ[k] // 2], sequence_ptrs[READ[k] // 2]
        if READ[k] % 2 == 0:
            tiles += (tl.load(ptr + (t * B + first) * H + offs, mask=ok, other=0.0),)
        elif READ[k] == 1 and HELD:
            in_sequence = (tl.where(has_prev, t_prev.to(tl.int32), LONGEST) < length)[None, :]
            value = tl.load(ptr + (t_prev * B + first) * H + offs, mask=ok & in_sequence, other=0.0)
            start = load_or_zeros(start_ptr, first * H, offs, ok & ~in_sequence)
            tiles += (tl.where(in_sequence, value, start),)
        elif start_ptr is None:
            tiles += (tl.load(ptr + (t_prev * B + first) * H + offs, mask=tl.where(has_prev, ok, False), other=0.0),)
        else:
            address = tl.where(has_prev, ptr + t_prev * B * H, start_ptr)
            tiles += (tl.load(address + first * H + offs, mask=ok, other=0.0),)
    return tiles


@triton.jit
def reset_states_read(reset, states_read, READ: tl.constexpr):
    """Set the states before the step to zero in the rows that it resets."""
    tiles = ()
    for k in tl.static_range(len(READ)):
        tiles += (tl.where(reset[None, :], 0.0, states_read[k]) if READ[k] % 2 == 1 else states_read[k],)
    return tiles
