"""What both kinds of kernels read and write: tuples of tiles, masks, and the states before a step."""

import triton
import triton.language as tl

LONGEST = tl.constexpr(2**31 - 1)  # more than any number of steps


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
def where_all(condition, values, others):
    """`values` where a condition holds, else those of `others`, or a number."""
    chosen = ()
    for k in tl.static_range(len(values)):
        chosen += (tl.where(condition, values[k], others[k]),)
    return chosen


@triton.jit
def zero_all(condition, values):
    """`values`, with zeros where a condition holds."""
    chosen = ()
    for k in tl.static_range(len(values)):
        chosen += (tl.where(condition, 0.0, values[k]),)
    return chosen


@triton.jit
def with_first(first, values):
    """`values` with another first one."""
    return (first,) + values[1:]  # noqa: RUF005, Triton compiles no *


@triton.jit
def zeros(shape, NUMBER: tl.constexpr):
    """NUMBER tiles."""
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
    """Of each pointer a tile, as it lies in memory: to convert it is to wait for it. None gives zeros. NUMBER says how
    many there are, since before version 3.9 Triton has no len() of a tuple with None.
    """
    tiles = ()
    for k in tl.static_range(NUMBER):
        tiles += (load_or_zeros(ptrs[k], start, offs, ok),)
    return tiles


@triton.jit
def load_blocks(address, step: tl.constexpr, ok, NUMBER: tl.constexpr):
    """NUMBER tiles that are `step` elements apart, the first of which is at the addresses `address`."""
    tiles = ()
    for k in tl.static_range(NUMBER):
        tiles += (tl.load(address + k * step if k > 0 else address, mask=ok, other=0.0),)
    return tiles


@triton.jit
def load_x(ptr, offs, ok, H: tl.constexpr, BLOCKS: tl.constexpr, FUSED: tl.constexpr):
    """x of a step, or its product with the weights: a tile for each sum of x."""
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
    """A column of the numbers at these addresses."""
    return tl.load(address, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_params(ptrs, start, unit, u_ok, BLOCK_B: tl.constexpr):
    """Vectors (H,), the same for all rows."""
    tiles = ()
    for k in tl.static_range(len(ptrs)):
        param = tl.load(ptrs[k] + start + unit, mask=u_ok, other=0.0).to(tl.float32)
        tiles += (tl.broadcast_to(param[:, None], (unit.shape[0], BLOCK_B)),)
    return tiles


@triton.jit
def add_biases(preact, bias, bias_hh):
    """`preact` with `bias` added to the first of them and `bias_hh` to the last. Either may be ()."""
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
    """The states that step t reads: after it; and before it, which are those after step `t_prev`, or the first ones if
    no step has `has_prev` earlier, which are zeros where `initial_ptrs` has None. Where steps may be held, h is not
    there at these.
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
    """The states before the step are zero where it resets them."""
    tiles = ()
    for k in tl.static_range(len(READ)):
        tiles += (tl.where(reset[None, :], 0.0, states_read[k]) if READ[k] % 2 == 1 else states_read[k],)
    return tiles
