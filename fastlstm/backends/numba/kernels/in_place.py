"""A single step whose weights are read as they lie, in the blocks and the order of the packed product: the bits are the
same.

Packed weights pay where they are read more than once. A step that is alone reads each weight once. The forward pass
transposes a panel's columns in registers, once for each tile of rows. The backward pass multiplies rows of weights as
they are.
"""

from fastlstm.backends.numba.constants import FEW_IN_PLACE
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    dpreact_of,
    first_h_preact,
    first_vector,
    terms_of,
)
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR, jit
from fastlstm.backends.numba.kernels.vector_forward import biases_at, copy_sums
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def sums_in_place(a, p, sums, first_sum, columns, block, rows, x, x_row, of_inputs, init, init_row, out):
    """``out = init +`` products of x alone, or of h, for the sums from `first_sum` on. Without columns it is a copy."""
    S, H, wide = a.size, a.H, a.sums * VECTOR
    weight, row = (a.weight_ih, a.weight_ih_row) if of_inputs else (a.weight_hh, a.weight_hh_row)
    for gate in range(sums):
        unit = (block_ih(a, gate) if of_inputs else block_hh(a, gate)) * H + p * a.lanes
        to, k = out + (first_sum + gate) * VECTOR, 0
        begin, begin_row = init + (first_sum + gate) * VECTOR, init_row
        while True:
            w, x_k, count, last = weight + unit * row + k * S, x + k * S, min(block, columns - k), columns - a.lanes - k
            call(
                a.in_place, rows, begin, begin_row, to, wide, x_k, x_row, w, row, count, last, x, x_row, w, row, 0, 0
            )  # fmt: skip
            begin, begin_row, k = to, wide, k + block
            if k >= columns:
                break


@jit
def preact_in_place(a, p, rows, out, x, h_in, h_seen_row):
    """`vector_forward.preact` of all rows. No h_seen: it is zero."""
    S, L, I, H, init, wide, x_row = a.size, a.lanes, a.I, a.H, biases_at(a, p), a.sums * VECTOR, a.x_row
    if a.block_x != 0:
        sums_in_place(a, p, a.of_x, 0, I, a.block_x, rows, x, x_row, True, init, 0, out)
        copy_sums(a, a.of_x, a.sums, rows, init, 0, out, wide)
        columns = a.span if h_in != 0 else 0
        sums_in_place(a, p, a.of_h, first_h_preact(a), columns, a.block, rows, h_in, h_seen_row, False, out, wide, out)
        return
    used = I + a.span if h_in != 0 else I
    for gate in range(a.sums):
        w = a.weight_ih + (block_ih(a, gate) * H + p * L) * a.weight_ih_row
        w_2 = a.weight_hh + (block_hh(a, gate) * H + p * L) * a.weight_hh_row
        begin, begin_row, to, k = init + gate * VECTOR, 0, out + gate * VECTOR, 0
        while True:
            k_last = min(k + a.block, used)
            of_x, of_h = max(0, min(k_last, I) - k), max(0, k - I)  # columns of x, and of h before them
            call(
                a.in_place, rows, begin, begin_row, to, wide, x + k * S, x_row, w + k * S, a.weight_ih_row, of_x,
                I - L - k, h_in + of_h * S, h_seen_row, w_2 + of_h * S, a.weight_hh_row, k_last - k - of_x,
                a.span - L - of_h,
            )  # fmt: skip
            begin, begin_row, k = to, wide, k_last
            if k >= used:
                break


@jit
def back_product_in_place(a, rows, b, s, of_h, vectors, q, scratch):
    """`vector_backward.back_product` with the weights as they lie, in the same order."""
    L, H, S, gates = a.lanes, a.H, a.size, a.of_h if of_h else a.of_x
    panels, first, part, row = (
        a.panels,
        first_h_preact(a) if of_h else 0,
        scratch + FEW_IN_PLACE * 4 * VECTOR,
        4 * VECTOR,
    )
    weight, weight_row = (a.weight_hh, a.weight_hh_row) if of_h else (a.weight_ih, a.weight_ih_row)
    wide, dpre_row = first_vector(vectors, q + 1) - first_vector(vectors, q), terms_of(a) * VECTOR
    kernel = a.chain4 if wide == 4 else a.chain3 if wide == 3 else a.chain2 if wide == 2 else a.chain1
    blocks = (panels * gates * L + BLOCK_K - 1) // BLOCK_K
    block = (panels + blocks - 1) // blocks
    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, row)
    for p in range(panels):
        if p % block == 0:
            call(a.copy_rows, rows, 0, 4 * L, part, 0, part, row)
        for gate in range(gates):
            unit = (block_hh(a, gate) if of_h else block_ih(a, gate)) * H + p * L
            at, dpre = weight + unit * weight_row + first_vector(vectors, q) * L * S, dpreact_of(a, p, s, b)
            call(kernel, rows, dpre + (first + gate) * VECTOR, dpre_row, at, weight_row, L, part, row)
        if p % block == block - 1 or p == panels - 1:
            call(a.add_rows, rows, 4 * L, part, row, scratch, row)
