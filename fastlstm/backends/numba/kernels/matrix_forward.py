"""The forward pass's products on the bf16 unit: every step's x, padded to 16 columns, then h, each panel 16 wide, are
written to one of two row operands, see `llvm.matrix`, which take turns.
"""

from fastlstm.backends.numba.constants import K_BLOCKS_TOGETHER, ROW_BLOCK, operand_k_blocks
from fastlstm.backends.numba.kernels.products import ForwardProducts
from fastlstm.backends.numba.kernels.row_masks import any_held, zero_held, zero_reset
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, read_rows
from fastlstm.backends.numba.kernels.vector_forward import multiply_inputs
from fastlstm.backends.numba.llvm.intrinsics import call

TILES = 4096  # bytes of one component of a K block of the column operand, for 64 columns


def count_x_groups(a):
    """Return the number of groups of 16 columns of x."""
    return (a.I + 15) // 16


def count_k_blocks(a):
    """Return the number of K blocks of 32 columns of x and h."""
    return operand_k_blocks(a.I, a.H)


def operand(a, s, j, b):
    """Return the address of 16 columns from 16 j on, of step s and row b."""
    blocks, stride = count_k_blocks(a), a.k_block_stride
    return a.row_operand + (s % 2) * a.components * blocks * stride + j // 2 * stride + b * 64 + j % 2 * 32


def copy_square(a, rows, columns, source, source_row, target):
    """Copy `rows` by `columns` weights to 16 by 16 float32 numbers, zeros elsewhere."""
    read_rows(a, a.is_bfloat16, rows, columns, 16, source, source_row, target, VECTOR)
    call(a.copy_rows, 16 - rows, 0, 16, source, 0, target + rows * VECTOR, VECTOR)


def pack_columns(a, p, x_groups, h_groups, target, scratch):
    """Pack panel p as a column operand, 16 columns a gate: K runs over groups of 16 columns of x, then of h."""
    L, I, H = a.lanes, a.I, a.H
    units, copy, tile, group_bytes = min(L, H - p * L), scratch, scratch + 16 * VECTOR, L * element_bytes(a)
    for gate in range(4):
        row = gate * H + p * L
        for k in range((x_groups + h_groups + 1) // 2):
            for half in range(2):
                j = 2 * k + half
                source, source_row = a.weight_ih + row * a.ih_row_stride + j * group_bytes, a.ih_row_stride
                columns = I - j * L
                if j >= x_groups:
                    source_row = a.hh_row_stride
                    source = a.weight_hh + row * source_row + (j - x_groups) * group_bytes
                    columns = H - (j - x_groups) * L if h_groups != 0 else 0
                if columns < L or units < L:
                    copy_square(a, units, max(0, min(L, columns)), source, source_row, copy)
                    call(a.to_row_operand, L, copy, VECTOR, tile + half * 32, 1024, a.overflow_flag)
                elif a.is_bfloat16 != 0:  # they are their only component
                    call(a.copy_rows, L, 8, 8, source, source_row, tile + half * 32, 64)
                else:
                    call(a.to_row_operand, L, source, source_row, tile + half * 32, 1024, a.overflow_flag)
            call(a.transpose_tiles, a.components, tile, 1024, target + k * a.components * TILES + gate * 1024, TILES)


def pack_weights(a, p, packed_index, scratch):
    """Pack panel p of both weights as a column operand."""
    target = a.packed + packed_index * count_k_blocks(a) * a.components * TILES
    pack_columns(a, p, count_x_groups(a), a.panels, target, scratch)


def preact(a, s, p, packed_index, b, rows, team_index, b_first, b_last, scratch, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p: see `products.ForwardProducts`."""
    blocks, stride = count_k_blocks(a), a.k_block_stride
    used = blocks if h_in != 0 else max(1, (count_x_groups(a) + 1) // 2)
    call(
        a.matrix_product, rows, a.biases + p * 4 * VECTOR, 0, scratch, 4 * VECTOR, operand(a, s, 0, b), stride,
        blocks * stride, a.packed + packed_index * blocks * a.components * TILES, used, 2, K_BLOCKS_TOGETHER,
    )  # fmt: skip


def split_inputs(a, s, j, b, rows, target, component_stride, scratch):
    """Write 16 columns of x, from 16 j on, of step s and `rows` rows from `b` on to the row operand at `target`."""
    L, I, T = a.lanes, a.I, a.T
    t = T - 1 - s if a.reverse != 0 else s
    source, source_row = a.x + t * a.x_step_stride + b * a.x_row_stride + j * L * element_bytes(a), a.x_row_stride
    copy = scratch + ROW_BLOCK * 4 * VECTOR
    if I - j * L < L or a.is_bfloat16 != 0:
        read_rows(a, a.is_bfloat16, rows, min(L, I - j * L), L, source, source_row, copy, VECTOR)
        source, source_row = copy, VECTOR
    if any_held(a, t, b, rows):  # padding may have numbers that the unit cannot take
        if source != copy:
            call(a.copy_rows, rows, L, L, source, source_row, copy, VECTOR)
            source, source_row = copy, VECTOR
        zero_held(a, t, b, rows, L, copy, VECTOR)
    call(a.to_row_operand, rows, source, source_row, target, component_stride, a.overflow_flag)


def pack_x_operand(a, s, team_index, b_first, b_last, x_first, x_last, scratch):
    """Write x of step s, of rows `x_first` to `x_last`, to its row operand."""
    x_groups, component_stride = count_x_groups(a), count_k_blocks(a) * a.k_block_stride
    for j in range(x_groups):
        for b in range(x_first, x_last, ROW_BLOCK):
            split_inputs(a, s, j, b, min(ROW_BLOCK, x_last - b), operand(a, s, j, b), component_stride, scratch)
    columns = x_groups + a.panels
    if s == 0 and columns % 2 != 0:  # the half of a K block that nothing else fills
        for n in range(2 * a.components):
            target = operand(a, n % 2, columns, x_first) + n // 2 * component_stride
            call(a.copy_rows, x_last - x_first, 0, 8, scratch, 0, target, 64)


def pack_h_operand(a, s, p, b, rows, h, h_row, scratch):
    """Write h before step s to its row operand: zeros after a reset, and beyond H, where infinity would give NaN."""
    L, T = a.lanes, a.T
    component_stride = count_k_blocks(a) * a.k_block_stride
    if a.H - p * L < L:
        copy = scratch + ROW_BLOCK * 6 * VECTOR
        call(a.copy_rows, rows, a.H - p * L, L, h, h_row, copy, VECTOR)
        h, h_row = copy, VECTOR
    target = operand(a, s, count_x_groups(a) + p, b)
    call(a.to_row_operand, rows, h, h_row, target, component_stride, a.overflow_flag)
    t = T - 1 - s if a.reverse != 0 else s
    for n in range(a.components):
        zero_reset(a, t, b, rows, 8, target + n * component_stride, 64)


PRODUCTS = ForwardProducts(pack_weights, multiply_inputs, preact, pack_x_operand, pack_h_operand)
