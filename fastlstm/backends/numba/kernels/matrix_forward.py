"""The forward pass's products on the bf16 unit: every step's x, padded to 32 columns, then h, also padded, are written
to one of two row operands, see `llvm.matrix`, which take turns. If every pre-activation has both products, and the
layer one head, these are one; otherwise that of x has the first tiles of a panel, and that of h the last.
"""

from fastlstm.backends.numba.constants import ROW_BLOCK, k_blocks_of, k_blocks_together
from fastlstm.backends.numba.kernels.layout import block, first_h_preact, seen_begin
from fastlstm.backends.numba.kernels.products import ForwardProducts
from fastlstm.backends.numba.kernels.row_masks import any_held, zero_held, zero_reset
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, read_rows
from fastlstm.backends.numba.kernels.states import scratch_slot
from fastlstm.backends.numba.kernels.vector_forward import biases_address, copy_preacts
from fastlstm.backends.numba.llvm.intrinsics import call

TILE = 1024  # bytes of one component of a K block of 32 columns for a vector of units


def count_h_blocks(a):
    """Return the number of K blocks of h."""
    return k_blocks_of(a.H) if a.h_preacts != 0 else 0


def count_seen_blocks(a):
    """Return the number of K blocks of h that a panel multiplies: those of its head."""
    return k_blocks_of(a.head) if a.h_preacts != 0 else 0


def component_stride(a):
    return (k_blocks_of(a.I) + count_h_blocks(a)) * a.k_block_stride


def operand(a, s, k, b):
    """Return the address of K block k of step s and row b: those of x come first."""
    return a.row_operand + (s % 2) * a.components * component_stride(a) + k * a.k_block_stride + b * 64


def h_operand(a, s, p, b):
    """Return the address of h of panel p before step s, of row b."""
    return operand(a, s, k_blocks_of(a.I) + p // 2, b) + p % 2 * 32


def copy_square(a, height, rows, columns, source, source_row, target):
    """Copy `rows` by `columns` weights to `height` by 16 float32 numbers, zeros elsewhere."""
    read_rows(a, a.is_bfloat16, rows, columns, 16, source, source_row, target, VECTOR)
    call(a.copy_rows, height - rows, 0, 16, source, 0, target + rows * VECTOR, VECTOR)


def pack_columns(a, p, weight, weight_row, columns, gates, first_block, target, scratch):
    """Pack panel p of a weight as a column operand with a tile for each of its `gates`, see `vector_forward`."""
    L, H, next_component = a.lanes, a.H, gates * TILE
    units, copy, tile = min(L, H - p * L), scratch, scratch + 16 * VECTOR
    for gate in range(gates):
        row = weight + (block(a, first_block + gate) * H + p * L) * weight_row
        for k in range(k_blocks_of(columns)):
            for half in range(2):
                column = 32 * k + half * L
                source, source_row, width = (
                    row + column * element_bytes(a),
                    weight_row,
                    max(0, min(L, columns - column)),
                )
                if a.is_bfloat16 != 0 and width == L and units == L:  # they are their only component
                    call(a.copy_rows, L, 8, 8, source, source_row, tile + half * 32, 64)
                    continue
                if width < L or units < L:
                    copy_square(a, L, units, width, source, source_row, copy)
                    source, source_row = copy, VECTOR
                call(a.to_row_operand, L, source, source_row, tile + half * 32, TILE, a.overflow_flag)
            packed = target + (k * a.components * gates + gate) * TILE
            call(a.transpose_tiles, a.components, tile, TILE, packed, next_component)


def packed_address(a, packed_index):
    """Return the address of a panel's K blocks of x, which those of h follow."""
    tiles = k_blocks_of(a.I) * a.x_preacts + count_seen_blocks(a) * a.h_preacts
    return a.packed + packed_index * tiles * a.components * TILE


def packed_h_address(a, packed_index):
    return packed_address(a, packed_index) + k_blocks_of(a.I) * a.x_preacts * a.components * TILE


def pack_weights(a, p, packed_index, scratch):
    """Pack panel p of both weights."""
    copy, x_columns, h_columns = (
        scratch_slot(a, scratch, 0),
        packed_address(a, packed_index),
        packed_h_address(a, packed_index),
    )
    pack_columns(a, p, a.weight_ih, a.ih_row_stride, a.I, a.x_preacts, 0, x_columns, copy)
    pack_columns(a, p, a.weight_hh, a.hh_row_stride, a.head, a.h_preacts, a.x_preacts, h_columns, copy)


def preact(a, s, p, packed_index, b, rows, scratch, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p: see `products.ForwardProducts`."""
    stride, next_component, row = a.k_block_stride, component_stride(a), a.preacts * VECTOR
    x_blocks, h_blocks = k_blocks_of(a.I), count_seen_blocks(a) if h_in != 0 else 0
    biases, together = biases_address(a, p), k_blocks_together(a.components)
    is_one_product = a.joint != 0 and a.heads == 1  # the K blocks of a head may not follow those of x
    call(
        a.matrix_product, rows, biases, 0, scratch, row, operand(a, s, 0, b), stride, next_component,
        packed_address(a, packed_index), a.x_preacts * TILE, x_blocks + h_blocks if is_one_product else x_blocks,
        a.x_preacts, together,
    )  # fmt: skip
    if not is_one_product:
        copy_preacts(a, a.x_preacts, a.preacts, rows, biases, 0, scratch, row)
        h_sums, h = scratch + first_h_preact(a) * VECTOR, operand(a, s, x_blocks + seen_begin(a, p) // 32, b)
        call(
            a.matrix_product, rows, h_sums, row, h_sums, row, h, stride, next_component,
            packed_h_address(a, packed_index), a.h_preacts * TILE, h_blocks, a.h_preacts, together,
        )  # fmt: skip


def split_inputs(a, s, k, b, rows, target, next_component, scratch):
    """Write K block k of x, of step s and `rows` rows from `b` on, to the row operand at `target`."""
    L, I, T = a.lanes, a.I, a.T
    t, copy = T - 1 - s if a.reverse != 0 else s, scratch_slot(a, scratch, 0)
    x, x_row = a.x + t * a.x_step_stride + b * a.x_row_stride + 32 * k * element_bytes(a), a.x_row_stride
    pairs = min(16, (I - 32 * k) // 2)
    if a.is_bfloat16 != 0 and (pairs == 16 or I % 2 == 0):  # it is its only component
        call(a.copy_rows, rows, pairs, 16, x, x_row, target, 64)
        return
    for half in range(2):
        width, source, source_row = max(0, min(L, I - 32 * k - half * L)), x + half * L * element_bytes(a), x_row
        if width < L or a.is_bfloat16 != 0:
            read_rows(a, a.is_bfloat16, rows, width, L, source, source_row, copy, VECTOR)
            source, source_row = copy, VECTOR
        if a.components > 1 and any_held(a, t, b, rows):  # padding may have numbers that the unit cannot take
            if source != copy:
                call(a.copy_rows, rows, L, L, source, source_row, copy, VECTOR)
                source, source_row = copy, VECTOR
            zero_held(a, t, b, rows, L, copy, VECTOR)
        call(a.to_row_operand, rows, source, source_row, target + half * 32, next_component, a.overflow_flag)


def pack_x_operand(a, s, x_first, x_last, scratch):
    """Write x of step s, of rows `x_first` to `x_last`, to its row operand."""
    for k in range(k_blocks_of(a.I)):
        for b in range(x_first, x_last, ROW_BLOCK):
            rows = min(ROW_BLOCK, x_last - b)
            split_inputs(a, s, k, b, rows, operand(a, s, k, b), component_stride(a), scratch)


def write_units(a, p, rows, source, source_row, target, next_component):
    """Write panel p of some rows of units to a row operand, with zeros in the half of a K block that is left."""
    call(a.to_row_operand, rows, source, source_row, target, next_component, a.overflow_flag)
    for n in range(a.components if p == a.panels - 1 and p % 2 == 0 else 0):
        call(a.copy_rows, rows, 0, 8, source, 0, target + n * next_component + 32, 64)


def pack_h_operand(a, s, p, b, rows, h, h_row, scratch):
    """Write h before step s to its row operand: zeros after a reset, and beyond H, where infinity would give NaN."""
    if a.h_preacts == 0:
        return
    L, t, next_component = a.lanes, a.T - 1 - s if a.reverse != 0 else s, component_stride(a)
    if a.H - p * L < L:
        copy = scratch_slot(a, scratch, 0)
        call(a.copy_rows, rows, a.H - p * L, L, h, h_row, copy, VECTOR)
        h, h_row = copy, VECTOR
    target = h_operand(a, s, p, b)
    write_units(a, p, rows, h, h_row, target, next_component)
    for n in range(a.components):
        zero_reset(a, t, b, rows, 8, target + n * next_component, 64)


PRODUCTS = ForwardProducts(pack_weights, preact, pack_x_operand, pack_h_operand)
