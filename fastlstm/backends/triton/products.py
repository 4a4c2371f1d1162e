"""Products with recurrent weights that stay in registers, and the order of rows that makes gates fall into place.

Everything is transposed: gates^T (S H, B) = W (S H, H) h^T (H, B) for S pre-activations. The gates, always many, are
the matrix unit's M, and 8 batch rows its N. P is H padded to a power of two. A product computes GATES gates: all four
of the LSTM, or one of a cell with three.
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
    """Return `w` in registers. The compiler cannot see through the copy, so it reads w from shared memory once."""
    if INTERPRETED:
        return w
    else:
        return opaque_copy(w, 32 // w.dtype.primitive_bitwidth)


@triton.jit
def block_of(lines, BLOCK: tl.constexpr):
    """Return program_id(0)'s layer, in 64 bits, and first of its BLOCK lines: other axes of a grid are short."""
    blocks = tl.cdiv(lines, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK


@triton.jit
def in_head(unit, H: tl.constexpr, D: tl.constexpr):
    """Return units, or weight rows, of the head program_id(1), from those of the first head. A head has D units."""
    if D < H:
        return unit + tl.program_id(1) * D
    else:
        return unit


@triton.jit
def gate_rows(H: tl.constexpr, P: tl.constexpr, GATES: tl.constexpr):
    """Return, for each row of a product of 1, 2 or 4 GATES, its row in a weight (GATES H, ...), and its unit.

    Rows of the matrix unit's result whose numbers differ by 8, or by half of all rows, lie in the same thread. A unit's
    gates get such rows, so `split_gates` moves nothing between threads.
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
    """Split (GATES P, BLOCK_B), in the order of `gate_rows`, into a tile (P, BLOCK_B) for each gate."""
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
    """Join tiles (P, BLOCK_B) of gates to (GATES P, BLOCK_B). Row gate * P + unit has a gate's value for a unit."""
    if GATES == 4:  # (P, BLOCK_B, bit 0 of the gate's number, bit 1)
        joined = tl.join(tl.join(gates[0], gates[1]), tl.join(gates[2], gates[3]))
        return tl.reshape(tl.permute(joined, (3, 2, 0, 1)), (4 * P, BLOCK_B))
    elif GATES == 2:
        return tl.reshape(tl.permute(tl.join(gates[0], gates[1]), (2, 0, 1)), (2 * P, BLOCK_B))
    else:
        return gates[0]


@triton.jit
def power_of_two(largest):
    """Return the power of two at or below a float32, and its inverse. To scale by them rounds nothing."""
    top = largest.to(tl.int32, bitcast=True) & 0x7F800000
    top = tl.minimum(tl.maximum(top, 1 << 23), 253 << 23)
    return top.to(tl.float32, bitcast=True), ((254 << 23) - top).to(tl.float32, bitcast=True)


@triton.jit
def high_low(v):
    """Split float32 into fp16: ``v = high + low / 2048``, to 22 bits where |v| is about one. `low` is finite."""
    high = v.to(tl.float16)
    rest = (v - high.to(tl.float32)) * 2048.0
    return high, tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.float16)


@triton.jit
def pack_kernel(
    w_ptr, high_ptr, low_ptr, scale_ptr, rows, columns, H, BY_ROW: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Write a float32 matrix (rows, columns) as high and low parts in fp16 and a scale, a power of two: for each row in
    the forward pass, for each column of a head in the backward pass. Of each gate's H rows a head has H / K, its
    columns.

    The high part has tf32's 11 bits in half the room; the low part adds float32's precision, for three products.
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
    """Multiply w (M, K) by v (K, BLOCK_B), in float32. For packed weights v is in [-1, 1] unless it is UNBOUNDED."""
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


@triton.jit
def load_weights(ptrs, start, unit, column, ok, D: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """Return each weight (H,D) of a product inside of a step, with its low part and its scale, from `ptrs` to all of
    these unless native. `start`: the layer's first row. `unit`, `column`: the head's units that are `ok`, and their
    numbers.
    """
    offs = unit[None, :] * D + column[:, None] if TRANSPOSED else unit[:, None] * D + column[None, :]
    PARTS: tl.constexpr = 1 if PRECISION == "native" else 3
    weights = ()
    for k in tl.static_range(0, len(ptrs), PARTS):
        w = pin(tl.load(ptrs[k] + start * D + offs, mask=ok[:, None] & ok[None, :], other=0.0))
        w_low, scale = w, 1.0
        if PRECISION == "ieee":  # not pinned: it stays in shared memory
            w_low = tl.load(ptrs[k + 1] + start * D + offs, mask=ok[:, None] & ok[None, :], other=0.0)
        if PRECISION != "native":
            scale = tl.load(ptrs[k + 2] + start + unit, mask=ok, other=0.0)[:, None]
        weights += ((w, w_low, scale),)
    return weights


@triton.jit
def use_weights(d, weights, T, PRECISION: tl.constexpr):
    """Return `d`. A product that is never chosen uses each weight twice: a single use would sink into the loop."""
    for k in tl.static_range(len(weights)):
        unused = product(weights[k][0], weights[k][1], weights[k][2], tl.zeros(d.shape, tl.float32), PRECISION, False)
        d = tl.where(T > 0, d, unused)
    return d


@triton.jit
def pre_activations(
    w, w_low, scale, h, w_ih, x, X: tl.constexpr, S: tl.constexpr, GATES: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, PRECISION: tl.constexpr, UNBOUNDED: tl.constexpr,
):  # fmt: skip
    """Return the S pre-activations without biases, from h and x: x times `w_ih`, or if empty a product's X tiles."""
    N: tl.constexpr = S // GATES - len(w)  # products of x alone
    preact = ()
    for k in tl.static_range(N):
        preact += (tl.dot(w_ih[k], x[0]) if len(w_ih) > 0 else x[k].to(tl.float32),)
    for k in tl.static_range(len(w)):
        acc = product(w[k], w_low[k], scale[k], h, PRECISION, UNBOUNDED)
        if N + k < len(w_ih):
            acc += tl.dot(w_ih[N + k], x[0])
        preact += split_gates(acc, P, BLOCK_B, GATES)
    if len(w_ih) > 0:
        return preact
    else:
        total = preact[:N]
        for k in tl.static_range(N, S):
            total += (preact[k] + x[k] if k < X else preact[k],)
        return total


@triton.jit
def recurrent_dh(w, w_low, scale, tiles, PRECISION: tl.constexpr, UNBOUNDED: tl.constexpr):
    """Return the gradient of h through its product: weight_hh transposed times the last of the `tiles` of dpreact."""
    total = product(w[0], w_low[0], scale, tiles[len(tiles) - len(w)], PRECISION, UNBOUNDED)
    for k in tl.static_range(1, len(w)):
        total += product(w[k], w_low[k], scale, tiles[len(tiles) - len(w) + k], PRECISION, UNBOUNDED)
    return total
