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
    found = ()
    for _ in tl.static_range(NUMBER):
        found += (tl.zeros(shape, tl.float32),)
    return found


@triton.jit
def as_float32(values):
    found = ()
    for k in tl.static_range(len(values)):
        found += (values[k].to(tl.float32),)
    return found


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
    found = ()
    for k in tl.static_range(NUMBER):
        found += (load_or_zeros(ptrs[k], start, offs, ok),)
    return found


@triton.jit
def load_blocks(at, step: tl.constexpr, ok, NUMBER: tl.constexpr):
    """NUMBER tiles that are `step` elements apart, the first of which is at the addresses `at`."""
    found = ()
    for k in tl.static_range(NUMBER):
        found += (tl.load(at + k * step if k > 0 else at, mask=ok, other=0.0),)
    return found


@triton.jit
def load_x(ptr, offs, ok, H: tl.constexpr, BLOCKS: tl.constexpr, FUSED: tl.constexpr):
    """x of a step, or its product with the weights: a tile for each sum of x."""
    if FUSED:
        return (tl.load(ptr + offs, mask=ok, other=0.0),)
    else:
        found = ()
        for k in tl.static_range(len(BLOCKS)):
            found += (tl.load(ptr + BLOCKS[k] * H + offs, mask=ok, other=0.0),)
        return found


@triton.jit
def store_all(ptrs, start, offs, values, ok):
    for k in tl.static_range(len(values)):
        if ptrs[k] is not None:
            tl.store(ptrs[k] + start + offs, values[k].to(ptrs[k].dtype.element_ty), mask=ok)


@triton.jit
def store_blocks(at, step: tl.constexpr, values, ok):
    for k in tl.static_range(len(values)):
        tl.store(at + k * step if k > 0 else at, values[k].to(at.dtype.scalar.element_ty), mask=ok)


@triton.jit
def load_bias(at, ok):
    """A column of the numbers at these addresses."""
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_params(ptrs, start, unit, u_ok, BLOCK_B: tl.constexpr):
    """Vectors (H,), the same for all rows."""
    found = ()
    for k in tl.static_range(len(ptrs)):
        param = tl.load(ptrs[k] + start + unit, mask=u_ok, other=0.0).to(tl.float32)
        found += (tl.broadcast_to(param[:, None], (unit.shape[0], BLOCK_B)),)
    return found


@triton.jit
def add_biases(sums, bias, bias_hh):
    """`sums` with `bias` added to the first of them and `bias_hh` to the last. Either may be ()."""
    found = ()
    for k in tl.static_range(len(sums)):
        acc = sums[k]
        if k < len(bias):
            acc += bias[k]
        if k >= len(sums) - len(bias_hh):
            acc += bias_hh[k - (len(sums) - len(bias_hh))]
        found += (acc,)
    return found


@triton.jit
def load_read(
    starts, states, t, before, begun, B, first, state, ok, length, READ: tl.constexpr, H: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """The states that step t reads: after it; and before it, which are those after step `before`, or the first ones if
    no step has `begun` earlier, which are zeros where `starts` has None. Where steps may be held, h is not there at
    these.
    """
    found = ()
    for k in tl.static_range(len(READ)):
        start_ptr, ptr = starts[READ[k] // 2], states[READ[k] // 2]
        if READ[k] % 2 == 0:
            found += (tl.load(ptr + (t * B + first) * H + state, mask=ok, other=0.0),)
        elif READ[k] == 1 and HELD:
            there = (tl.where(begun, before.to(tl.int32), LONGEST) < length)[None, :]
            value = tl.load(ptr + (before * B + first) * H + state, mask=ok & there, other=0.0)
            start = load_or_zeros(start_ptr, first * H, state, ok & ~there)
            found += (tl.where(there, value, start),)
        elif start_ptr is None:
            found += (tl.load(ptr + (before * B + first) * H + state, mask=tl.where(begun, ok, False), other=0.0),)
        else:
            at = tl.where(begun, ptr + before * B * H, start_ptr)
            found += (tl.load(at + first * H + state, mask=ok, other=0.0),)
    return found


@triton.jit
def reset_read(reset, read, READ: tl.constexpr):
    """The states before the step are zero where it resets them."""
    found = ()
    for k in tl.static_range(len(READ)):
        found += (tl.where(reset[None, :], 0.0, read[k]) if READ[k] % 2 == 1 else read[k],)
    return found
