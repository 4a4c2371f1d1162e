"""The forward pass's products of x on the bf16 unit, for several steps at once, and those of h on the processor's own
vectors. x of an input block is written to one of two row operands, and the steps' pre-activations start from its
product. A batch row has its own part of both, so its bits do not depend on the others.
"""

from fastlstm.backends.numba.constants import ROOM, ROW_BLOCK, k_blocks_of, k_blocks_together
from fastlstm.backends.numba.kernels.matrix_forward import TILE, pack_columns, split_inputs
from fastlstm.backends.numba.kernels.products import ForwardProducts
from fastlstm.backends.numba.kernels.shared import VECTOR
from fastlstm.backends.numba.kernels.vector_forward import add_product, pack_hh, packed_hh_address
from fastlstm.backends.numba.llvm.intrinsics import call


def columns_at(a, p):
    """Return the address of panel p of weight_ih as a column operand: these follow all panels of weight_hh."""
    return a.packed + a.panels * a.H * 4 * VECTOR + p * k_blocks_of(a.I) * a.components * 4 * TILE


def operand_row(a, s, b, team_index, b_first, b_last):
    """Return the row of the operand that has pair (s, b): a team's rows of an input block follow each other."""
    return a.input_steps * b_first + ROOM * team_index + s % a.input_steps * (b_last - b_first) + b - b_first


def operand(a, s, k, row):
    """Return the address of K block k of x, of a row of the operand of the input block around s."""
    block = s // a.input_steps % 2 * a.components * k_blocks_of(a.I) + k
    return a.row_operand + block * a.k_block_stride + row * 64


def input_preact_address(a, p, row):
    """Return the address of the input projection of a row of the operand, for panel p."""
    return a.input_preact + (p * (a.k_block_stride // 64) + row) * 4 * VECTOR


def pack_weights(a, p, packed_index, scratch):
    pack_hh(a, p, packed_index)
    pack_columns(a, p, a.weight_ih, a.ih_row_stride, a.I, 4, 0, columns_at(a, packed_index), scratch)


def pack_x_operand(a, s, team_index, b_first, b_last, x_first, x_last, scratch):
    """Write x of an input block, if one begins at s, to its row operand: that of rows `x_first` to `x_last`."""
    if s % a.input_steps != 0:
        return
    for s_x in range(s, min(s + a.input_steps, a.T)):
        for b in range(x_first, x_last, ROW_BLOCK):
            rows, row = min(ROW_BLOCK, x_last - b), operand_row(a, s_x, b, team_index, b_first, b_last)
            for k in range(k_blocks_of(a.I)):
                next_component = k_blocks_of(a.I) * a.k_block_stride
                split_inputs(a, s_x, k, b, rows, operand(a, s, k, row), next_component, scratch)


def multiply_inputs(a, s, p, team_index, b_first, b_last):
    """Compute the input projection of an input block for panel p, if the block begins at s."""
    if s % a.input_steps == 0:
        row, stride = operand_row(a, s, b_first, team_index, b_first, b_last), a.k_block_stride
        call(
            a.matrix_product, min(a.input_steps, a.T - s) * (b_last - b_first), a.biases + p * 4 * VECTOR, 0,
            input_preact_address(a, p, row), 4 * VECTOR, operand(a, s, 0, row), stride, k_blocks_of(a.I) * stride,
            columns_at(a, p), 4 * TILE, k_blocks_of(a.I), 4, k_blocks_together(a.components),
        )  # fmt: skip


def preact(a, s, p, packed_index, b, rows, team_index, b_first, b_last, scratch, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p: see `products.ForwardProducts`."""
    init = input_preact_address(a, p, operand_row(a, s, b, team_index, b_first, b_last))
    add_product(
        a, 4, packed_hh_address(a, packed_index), a.H, 0, a.H if h_in != 0 else 0, a.k_block, rows, init, 4 * VECTOR,
        scratch, 4 * VECTOR, h_in + b * h_in_stride, h_in_stride,
    )  # fmt: skip


PRODUCTS = ForwardProducts(pack_weights, multiply_inputs, preact, pack_x_operand)
