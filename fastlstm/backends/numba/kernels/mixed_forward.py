"""The forward pass's products with those of the input, for several steps at once, on the matrix unit, and the recurrent
ones on the processor's own vectors: a batch row takes its own part of both, so its bits do not depend on the others.

x of `input_steps` steps is laid out as an operand, in two that take turns. Its product is what the steps' sums start
from.
"""

from fastlstm.backends.numba.constants import BLOCK_STEPS, ROW_BLOCK
from fastlstm.backends.numba.kernels.matrix_forward import TILES, groups_of_x, pack_columns, split_inputs
from fastlstm.backends.numba.kernels.shared import VECTOR, jit
from fastlstm.backends.numba.kernels.vector_forward import add_product, pack_h_operand, pack_hh, states_at  # noqa: F401
from fastlstm.backends.numba.llvm.intrinsics import call

READS_H_UNPACKED, READS_X_UNPACKED = True, False
ROOM = 32  # rows of whole tiles beyond a part's last


@jit
def count_k_blocks(a):
    return (a.I + 31) // 32


@jit
def columns_at(a, p):
    """Where panel p of weight_ih lies as columns: behind all panels of weight_hh."""
    return a.packed + a.panels * a.H * 4 * VECTOR + p * count_k_blocks(a) * a.pieces * TILES


@jit
def row_of(a, s, b, team_index, b_first, b_last):
    """Row (s, b) among those of the `feed` steps: a part's rows of all of them side by side."""
    return a.input_steps * b_first + ROOM * team_index + s % a.input_steps * (b_last - b_first) + b - b_first


@jit
def operand(a, s, j, row):
    """Where 16 columns of x from 16 j on lie, of a row of the steps around s."""
    return (
        a.operand + (s // a.input_steps % 2 * a.pieces * count_k_blocks(a) + j // 2) * a.pitch + row * 64 + j % 2 * 32
    )


@jit
def input_preact_at(a, p, row):
    """Where a row's part of preact of panel p lies."""
    return a.input_preact + (p * (a.pitch // 64) + row) * 4 * VECTOR


@jit
def pack_weights(a, p, place, scratch):
    pack_hh(a, p, place)
    pack_columns(a, p, groups_of_x(a), 0, columns_at(a, place), scratch)


@jit
def pack_x_operand(a, s, team_index, b_first, b_last, x_first, x_last, scratch):
    """x of `input_steps` steps from s on, of rows `x_first` to `x_last`, where these begin."""
    if s % a.input_steps != 0:
        return
    of_x, piece = groups_of_x(a), count_k_blocks(a) * a.pitch
    for s_x in range(s, min(s + a.input_steps, a.T)):
        for b in range(x_first, x_last, ROW_BLOCK):
            rows, row = min(ROW_BLOCK, x_last - b), row_of(a, s_x, b, team_index, b_first, b_last)
            for j in range(of_x):
                split_inputs(a, s_x, j, b, rows, operand(a, s, j, row), piece, scratch)
            if of_x % 2 != 0:  # the half of a step that nothing else fills
                for n in range(a.pieces):
                    call(a.copy_rows, rows, 0, 8, scratch, 0, operand(a, s, of_x, row) + n * piece, 64)


@jit
def multiply_inputs(a, s, p, team_index, b_first, b_last):
    """What panel p's sums of `input_steps` steps from s on start from, where these begin."""
    if s % a.input_steps == 0:
        row = row_of(a, s, b_first, team_index, b_first, b_last)
        call(
            a.matrix_product, min(a.input_steps, a.T - s) * (b_last - b_first), a.biases + p * 4 * VECTOR, 0,
            input_preact_at(a, p, row), 4 * VECTOR, operand(a, s, 0, row), a.pitch, count_k_blocks(a) * a.pitch,
            columns_at(a, p), count_k_blocks(a), 2, BLOCK_STEPS,
        )  # fmt: skip


@jit
def preact(a, s, p, place, b, rows, team_index, b_first, b_last, scratch, x, h_in, h_seen_row):
    """See `vector_forward.preact`."""
    init = input_preact_at(a, p, row_of(a, s, b, team_index, b_first, b_last))
    add_product(
        a, 4, states_at(a, place), a.H, 0, a.H if h_in != 0 else 0, a.block, rows, init, 4 * VECTOR, scratch,
        4 * VECTOR, h_in + b * h_seen_row, h_seen_row,
    )  # fmt: skip


@jit
def preact_of_only_row(a, s, p_first, p_last, scratch, x, h_in):
    pass
