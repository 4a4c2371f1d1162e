"""A single step that reads the original weights, in the K blocks and the order of the packed product, so with its bits:
packed weights pay if they are read more than once. The forward pass transposes a panel's columns in registers, once for
each register tile of rows. The backward pass multiplies rows of weights as they are.
"""

from fastlstm.backends.numba.constants import FEW_IN_PLACE
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    dpreact_address,
    first_h_preact,
    first_vector,
)
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR
from fastlstm.backends.numba.kernels.vector_forward import biases_address, copy_preacts
from fastlstm.backends.numba.llvm.intrinsics import call


def products_in_place(a, p, of_x, rows, x, x_row, init, init_row, out):
    """Store ``out = init +`` the products of x, or, unless `of_x`, of h, for panel p. If h is 0, it is a copy."""
    size, H, stride, L, weight, w_row = a.size, a.H, a.preacts * VECTOR, a.lanes, a.weight_ih, a.ih_row_stride
    gates, first_gate, columns, block = a.x_preacts, 0, a.I, a.x_k_block
    if not of_x:
        weight, w_row, gates, first_gate = a.weight_hh, a.hh_row_stride, a.h_preacts, first_h_preact(a)
        columns, block = a.span if x != 0 else 0, a.k_block
    for gate in range(gates):
        unit = (block_ih(a, gate) if of_x else block_hh(a, gate)) * H + p * L
        target, k = out + (first_gate + gate) * VECTOR, 0
        begin, begin_row = init + (first_gate + gate) * VECTOR, init_row
        while True:
            w, x_k = weight + unit * w_row + k * size, x + k * size
            count, last = min(block, columns - k), columns - L - k
            call(
                a.in_place, rows, begin, begin_row, target, stride, x_k, x_row, w, w_row, count, last,
                x, x_row, w, w_row, 0, 0,
            )  # fmt: skip
            begin, begin_row, k = target, stride, k + block
            if k >= columns:
                break


def preact_in_place(a, p, rows, out, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p for all rows, as `vector_forward.preact`."""
    size, L, I, H = a.size, a.lanes, a.I, a.H
    init, stride, x_row, ih_row, hh_row = (
        biases_address(a, p), a.preacts * VECTOR, a.x_row_stride, a.ih_row_stride, a.hh_row_stride,
    )  # fmt: skip
    if a.x_k_block != 0:
        products_in_place(a, p, True, rows, x, x_row, init, 0, out)
        copy_preacts(a, a.x_preacts, a.preacts, rows, init, 0, out, stride)
        products_in_place(a, p, False, rows, h_in, h_in_stride, out, stride, out)
        return
    used = I + a.span if h_in != 0 else I
    for gate in range(a.preacts):
        w = a.weight_ih + (block_ih(a, gate) * H + p * L) * ih_row
        w_2 = a.weight_hh + (block_hh(a, gate) * H + p * L) * hh_row
        begin, begin_row, target, k = init + gate * VECTOR, 0, out + gate * VECTOR, 0
        while True:
            k_last = min(k + a.k_block, used)
            x_columns, h_before = max(0, min(k_last, I) - k), max(0, k - I)  # columns of h in the K blocks before
            call(
                a.in_place, rows, begin, begin_row, target, stride, x + k * size, x_row, w + k * size, ih_row,
                x_columns, I - L - k, h_in + h_before * size, h_in_stride, w_2 + h_before * size, hh_row,
                k_last - k - x_columns, a.span - L - h_before,
            )  # fmt: skip
            begin, begin_row, k = target, stride, k_last
            if k >= used:
                break


def back_product_in_place(a, rows, b, s, of_h, vectors, q, scratch):
    """Store the product of dpreact with the original weights, as `vector_backward.back_product`, in the same order."""
    L, H, size, gates, panels, stride = a.lanes, a.H, a.size, a.h_preacts if of_h else a.x_preacts, a.panels, 4 * VECTOR
    first, block_sums = first_h_preact(a) if of_h else 0, scratch + FEW_IN_PLACE * 4 * VECTOR
    weight, w_row = (a.weight_hh, a.hh_row_stride) if of_h else (a.weight_ih, a.ih_row_stride)
    n, dpre_row = first_vector(vectors, q + 1) - first_vector(vectors, q), a.terms * VECTOR
    kernel = a.accumulate4 if n == 4 else a.accumulate3 if n == 3 else a.accumulate2 if n == 2 else a.accumulate1
    blocks = (panels * gates * L + BLOCK_K - 1) // BLOCK_K
    block = (panels + blocks - 1) // blocks
    call(a.copy_rows, rows, 0, 4 * L, scratch, 0, scratch, stride)
    for p in range(panels):
        if p % block == 0:
            call(a.copy_rows, rows, 0, 4 * L, block_sums, 0, block_sums, stride)
        for gate in range(gates):
            unit = (block_hh(a, gate) if of_h else block_ih(a, gate)) * H + p * L
            w, dpre = weight + unit * w_row + first_vector(vectors, q) * L * size, dpreact_address(a, p, s, b)
            call(kernel, rows, dpre + (first + gate) * VECTOR, dpre_row, w, w_row, L, block_sums, stride)
        if p % block == block - 1 or p == panels - 1:
            call(a.add_rows, rows, 4 * L, block_sums, stride, scratch, stride)
