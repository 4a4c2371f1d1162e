"""The forward pass's products on the matrix unit: every step's x and h are first laid out as an operand (see `matrix`).

Columns of the operand: x, padded to 16, then h, each panel 16 wide. Two operands take turns, since a step writes the
next one's while it reads its own.
"""

from fastlstm.backends.numba.constants import BLOCK_STEPS, ROW_BLOCK, operand_steps
from fastlstm.backends.numba.kernels.ends import any_held, zero_held, zero_reset
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, jit, read_rows
from fastlstm.backends.numba.kernels.vector_forward import multiply_inputs  # noqa: F401  the kernel's
from fastlstm.backends.numba.llvm.intrinsics import call

READS_H_UNPACKED, READS_X_UNPACKED = False, False
TILES = 4096  # bytes of one piece of a step of columns


@jit
def groups_of_x(a):
    return (a.I + 15) // 16


@jit
def count_k_blocks(a):
    return operand_steps(a.I, a.H)


@jit
def operand(a, s, j, b):
    """Where 16 columns from 16 j on lie, of step s and row b."""
    steps = count_k_blocks(a)
    return a.operand + (s % 2) * a.pieces * steps * a.pitch + j // 2 * a.pitch + b * 64 + j % 2 * 32


@jit
def square_of(a, rows, columns, source, source_row, target):
    """16 by 16 weights in memory of their own, zeros beyond `rows` and `columns`."""
    read_rows(a, a.is_narrow, rows, columns, 16, source, source_row, target, VECTOR)
    call(a.copy_rows, 16 - rows, 0, 16, source, 0, target + rows * VECTOR, VECTOR)


@jit
def pack_columns(a, p, of_x, of_h, to, scratch):
    """Panel p of the weights to columns, one for each gate: 16 columns for each of the first `of_x` steps of 16 of
    weight_ih, then `of_h` of weight_hh.
    """
    L, I, H = a.lanes, a.I, a.H
    units, aside, tile, wide = min(L, H - p * L), scratch, scratch + 16 * VECTOR, L * element_bytes(a)
    for gate in range(4):
        row = gate * H + p * L
        for k in range((of_x + of_h + 1) // 2):
            for half in range(2):
                j = 2 * k + half
                source, source_row = a.weight_ih + row * a.weight_ih_row + j * wide, a.weight_ih_row
                columns = I - j * L
                if j >= of_x:
                    source, source_row = a.weight_hh + row * a.weight_hh_row + (j - of_x) * wide, a.weight_hh_row
                    columns = H - (j - of_x) * L if of_h != 0 else 0
                if columns < L or units < L:
                    square_of(a, units, max(0, min(L, columns)), source, source_row, aside)
                    call(a.split, L, aside, VECTOR, tile + half * 32, 1024, a.large)
                elif a.is_narrow != 0:  # one piece, as they are
                    call(a.copy_rows, L, 8, 8, source, source_row, tile + half * 32, 64)
                else:
                    call(a.split, L, source, source_row, tile + half * 32, 1024, a.large)
            call(a.transpose_tiles, a.pieces, tile, 1024, to + k * a.pieces * TILES + gate * 1024, TILES)


@jit
def pack_weights(a, p, place, scratch):
    """Panel p of the weights to columns."""
    to = a.packed + place * count_k_blocks(a) * a.pieces * TILES
    pack_columns(a, p, groups_of_x(a), a.panels, to, scratch)


@jit
def preact(a, s, p, place, b, rows, team_index, b_first, b_last, scratch, x, h_in, h_seen_row):
    """See `vector_forward.preact`."""
    steps = count_k_blocks(a)
    used = steps if h_in != 0 else max(1, (groups_of_x(a) + 1) // 2)
    call(
        a.matrix_product, rows, a.biases + p * 4 * VECTOR, 0, scratch, 4 * VECTOR, operand(a, s, 0, b), a.pitch,
        steps * a.pitch, a.packed + place * steps * a.pieces * TILES, used, 2, BLOCK_STEPS,
    )  # fmt: skip


@jit
def split_inputs(a, s, j, b, rows, to, piece, scratch):
    """16 columns of x from 16 j on, of step s and `rows` rows from `b` on, to an operand."""
    L, I, T = a.lanes, a.I, a.T
    t = T - 1 - s if a.reverse != 0 else s
    source, source_row = a.x + t * a.x_step + b * a.x_row + j * L * element_bytes(a), a.x_row
    aside = scratch + ROW_BLOCK * 4 * VECTOR
    if I - j * L < L or a.is_narrow != 0:
        read_rows(a, a.is_narrow, rows, min(L, I - j * L), L, source, source_row, aside, VECTOR)
        source, source_row = aside, VECTOR
    if any_held(a, t, b, rows):  # padding may hold what the unit cannot take
        if source != aside:
            call(a.copy_rows, rows, L, L, source, source_row, aside, VECTOR)
            source, source_row = aside, VECTOR
        zero_held(a, t, b, rows, L, aside, VECTOR)
    call(a.split, rows, source, source_row, to, piece, a.large)


@jit
def pack_x_operand(a, s, team_index, b_first, b_last, x_first, x_last, scratch):
    """x of step s, of rows `x_first` to `x_last`, to its operand."""
    of_x, piece = groups_of_x(a), count_k_blocks(a) * a.pitch
    for j in range(of_x):
        for b in range(x_first, x_last, ROW_BLOCK):
            split_inputs(a, s, j, b, min(ROW_BLOCK, x_last - b), operand(a, s, j, b), piece, scratch)
    columns = of_x + a.panels
    if s == 0 and columns % 2 != 0:  # the half of a step that nothing else fills
        for n in range(2 * a.pieces):
            to = operand(a, n % 2, columns, x_first) + n // 2 * piece
            call(a.copy_rows, x_last - x_first, 0, 8, scratch, 0, to, 64)


@jit
def pack_h_operand(a, s, p, b, rows, h, h_row, scratch):
    """h before step s, of panel p and `rows` rows from `b` on, to the step's operand: zeros where the step resets, and
    beyond H, where an infinity in x would leave NaN.
    """
    L, T = a.lanes, a.T
    piece = count_k_blocks(a) * a.pitch
    if a.H - p * L < L:
        aside = scratch + ROW_BLOCK * 6 * VECTOR
        call(a.copy_rows, rows, a.H - p * L, L, h, h_row, aside, VECTOR)
        h, h_row = aside, VECTOR
    to = operand(a, s, groups_of_x(a) + p, b)
    call(a.split, rows, h, h_row, to, piece, a.large)
    t = T - 1 - s if a.reverse != 0 else s
    for n in range(a.pieces):
        zero_reset(a, t, b, rows, 8, to + n * piece, 64)


@jit
def preact_of_only_row(a, s, p_first, p_last, scratch, x, h_in):
    pass
