"""Products with recurrent weights that stay in registers, and the order of rows that makes gates fall into place.

Everything is transposed: gates^T (S H, B) = W (S H, H) h^T (H, B) for S sums. The gates, always many, are the matrix
unit's M, and 8 batch rows its N. P is H padded to a power of two. A product computes GATES gates: all four of the LSTM,
or one of a cell with three.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton.device import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def opaque_copy(w, PACK: tl.constexpr):
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=True, pack=PACK)


@triton.jit
def pin(w):
    """`w` in registers: behind a copy that the compiler cannot see through, it is not read from shared memory again."""
    if INTERPRETED:
        return w
    else:
        return opaque_copy(w, 32 // w.dtype.primitive_bitwidth)


@triton.jit
def block_of(lines, BLOCK: tl.constexpr):
    """The group of program_id(0), in 64 bits, and the first of the BLOCK lines that it takes there. Groups have no axis
    of their own: only the first goes beyond 65535.
    """
    blocks = tl.cdiv(lines, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK


@triton.jit
def in_head(unit, H: tl.constexpr, D: tl.constexpr):
    """Units, or rows of weights, of the head program_id(1), from those of the first head. A head has D of H units."""
    if D < H:
        return unit + tl.program_id(1) * D
    else:
        return unit


@triton.jit
def gate_rows(H: tl.constexpr, P: tl.constexpr, GATES: tl.constexpr):
    """For each row of a product of GATES gates, 1, 2 or 4, its row of (GATES H, ...), and its unit.

    Bit 3 and the top bit of a row's number lie in registers in the matrix unit's accumulator. They count the gates, so
    a thread holds all gates of its units and `split_gates` moves nothing.
    """
    row = tl.arange(0, GATES * P)
    if GATES == 4:
        gate, unit = row // (2 * P) * 2 + row // 8 % 2, row % (2 * P) // 16 * 8 + row % 8
    elif GATES == 2:
        gate, unit = row // 8 % 2, row // 16 * 8 + row % 8
    else:
        gate, unit = row // P, row
    return gate * H + unit, unit


@triton.jit
def split_gates(acc, P: tl.constexpr, BLOCK_B: tl.constexpr, GATES: tl.constexpr):
    """The gates (P, BLOCK_B) of (GATES P, BLOCK_B) in the order of `gate_rows`."""
    if GATES == 4:
        acc = tl.permute(tl.reshape(acc, (2, P // 8, 2, 8, BLOCK_B)), (1, 3, 4, 2, 0))
        lower, upper = tl.split(tl.reshape(acc, (P, BLOCK_B, 2, 2)))
        first, second = tl.split(lower)
        third, fourth = tl.split(upper)
        return first, second, third, fourth
    elif GATES == 2:
        acc = tl.permute(tl.reshape(acc, (P // 8, 2, 8, BLOCK_B)), (0, 2, 3, 1))
        first, second = tl.split(tl.reshape(acc, (P, BLOCK_B, 2)))
        return first, second
    else:
        return (acc,)


@triton.jit
def join_gates(gates, P: tl.constexpr, BLOCK_B: tl.constexpr, GATES: tl.constexpr):
    """(GATES P, BLOCK_B) of the gates (P, BLOCK_B): row gate * P + unit."""
    if GATES == 4:  # (P, BLOCK_B, bit 0 of the gate's number, bit 1)
        joined = tl.join(tl.join(gates[0], gates[1]), tl.join(gates[2], gates[3]))
        return tl.reshape(tl.permute(joined, (3, 2, 0, 1)), (4 * P, BLOCK_B))
    elif GATES == 2:
        return tl.reshape(tl.permute(tl.join(gates[0], gates[1]), (2, 0, 1)), (2 * P, BLOCK_B))
    else:
        return gates[0]


@triton.jit
def power_of_two(largest):
    """The power of two below a float32, and its inverse: to scale by it rounds nothing."""
    top = largest.to(tl.int32, bitcast=True) & 0x7F800000
    top = tl.minimum(tl.maximum(top, 1 << 23), 253 << 23)
    return top.to(tl.float32, bitcast=True), ((254 << 23) - top).to(tl.float32, bitcast=True)


@triton.jit
def high_low(v):
    """float32 as fp16 numbers: ``v = high + low / 2048``, to 22 bits where |v| is about one. Infinity is all high."""
    high = v.to(tl.float16)
    rest = (v - high.to(tl.float32)) * 2048.0
    return high, tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.float16)


@triton.jit
def pack_kernel(
    w_ptr, high_ptr, low_ptr, scale_ptr, rows, columns, H, BY_ROW: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """A float32 matrix as fp16 high and low parts, times a power of two for each row (or column of a head). The heads
    share each H rows, and each head has as many of them as there are columns.

    tf32 rounds to 11 bits and so does fp16, in half the room: with a scale the high part alone is tf32's precision.
    With the low part it is float32's, for three products instead of one.
    """
    lines = rows if BY_ROW else H
    layer, line = block_of(lines, BLOCK)
    line, k = line + tl.arange(0, BLOCK), tl.arange(0, PAD)
    if BY_ROW:
        offs, ok = line[:, None] * columns + k[None, :], (line < rows)[:, None] & (k < columns)[None, :]
    else:
        head, row = line // columns * columns, k // columns * H + k % columns
        offs = (row[None, :] + head[:, None]) * columns + (line - head)[:, None]
        ok = (line < H)[:, None] & (row < rows)[None, :]
    offs += layer * rows * columns
    w = tl.load(w_ptr + offs, mask=ok, other=0.0)
    scale, inverse = power_of_two(tl.max(tl.abs(w), 1))
    high, low = high_low(w * inverse[:, None])
    tl.store(high_ptr + offs, high, mask=ok)
    tl.store(low_ptr + offs, low, mask=ok)
    tl.store(scale_ptr + layer * lines + line, scale, mask=line < lines)


@triton.jit
def product(w, w_low, scale, v, PRECISION: tl.constexpr, UNBOUNDED: tl.constexpr):
    """w (M, K) times v (K, BLOCK_B), in float32. Packed weights take v in [-1, 1], or of any size where `UNBOUNDED`."""
    if PRECISION == "native":
        acc = tl.dot(w, v.to(w.dtype))
    else:
        if UNBOUNDED:
            column, inverse = power_of_two(tl.max(tl.abs(v), 0))
            v *= inverse[None, :]
            scale *= column[None, :]
        if PRECISION == "ieee":
            high, low = high_low(v)
            finite = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), high, 0.0)  # not infinity less infinity
            acc = tl.dot(w_low, finite.to(tl.float16), tl.dot(w, low)) * (1.0 / 2048.0) + tl.dot(w, high)
        else:
            acc = tl.dot(w, v.to(tl.float16))
        acc *= scale
    return acc
