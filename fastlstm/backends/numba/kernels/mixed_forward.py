"""The forward pass's products with those of the input, for several steps at once, on the matrix unit, and the recurrent
ones on the processor's own vectors: a batch row takes its own part of both, so its bits do not depend on the others.

x of `feed` steps is laid out as an operand, in two that take turns; its product is what the steps' sums start from.
"""

from fastlstm.backends.numba.kernels.matrix_forward import TILES, groups_of_x, pack_columns, split_inputs
from fastlstm.backends.numba.kernels.shared import BLOCK_STEPS, CHUNK, VECTOR, jit
from fastlstm.backends.numba.kernels.vector_forward import add_product, feed_states, pack_states, states_at  # noqa: F401
from fastlstm.backends.numba.llvm.intrinsics import call

READS_STATES, READS_INPUTS = True, False
ROOM = 32  # rows of whole tiles beyond a part's last


@jit
def steps_of(a):
    return (a.I + 31) // 32


@jit
def columns_at(a, p):
    """Where panel p of weight_ih lies as columns: behind all panels of weight_hh."""
    return a.packed + a.panels * a.H * 4 * VECTOR + p * steps_of(a) * a.pieces * TILES


@jit
def row_of(a, s, b, part, b_first, b_last):
    """Row (s, b) among those of the `feed` steps: a part's rows of all of them side by side."""
    return a.feed * b_first + ROOM * part + s % a.feed * (b_last - b_first) + b - b_first


@jit
def operand(a, s, j, row):
    """Where 16 columns of x from 16 j on lie, of a row of the steps around s."""
    return a.operand + (s // a.feed % 2 * a.pieces * steps_of(a) + j // 2) * a.pitch + row * 64 + j % 2 * 32


@jit
def fed(a, p, row):
    """Where a row's part of preact of panel p lies."""
    return a.fed + (p * (a.pitch // 64) + row) * 4 * VECTOR


@jit
def pack_weights(a, p, place, scratch):
    pack_states(a, p, place)
    pack_columns(a, p, groups_of_x(a), 0, columns_at(a, place), scratch)


@jit
def feed_inputs(a, s, part, b_first, b_last, x_first, x_last, scratch):
    """x of `feed` steps from s on, of rows `x_first` to `x_last`, where these begin."""
    if s % a.feed != 0:
        return
    of_x, piece = groups_of_x(a), steps_of(a) * a.pitch
    for s_x in range(s, min(s + a.feed, a.T)):
        for b in range(x_first, x_last, CHUNK):
            rows, row = min(CHUNK, x_last - b), row_of(a, s_x, b, part, b_first, b_last)
            for j in range(of_x):
                split_inputs(a, s_x, j, b, rows, operand(a, s, j, row), piece, scratch)
            if of_x % 2 != 0:  # the half of a step that nothing else fills
                for n in range(a.pieces):
                    call(a.copy_rows, rows, 0, 8, scratch, 0, operand(a, s, of_x, row) + n * piece, 64)


@jit
def multiply_inputs(a, s, p, part, b_first, b_last):
    """What panel p's sums of `feed` steps from s on start from, where these begin."""
    if s % a.feed == 0:
        row = row_of(a, s, b_first, part, b_first, b_last)
        call(
            a.matrix_product, min(a.feed, a.T - s) * (b_last - b_first), a.biases + p * 4 * VECTOR, 0, fed(a, p, row),
            4 * VECTOR, operand(a, s, 0, row), a.pitch, steps_of(a) * a.pitch, columns_at(a, p), steps_of(a), 2,
            BLOCK_STEPS,
        )  # fmt: skip


@jit
def preact(a, s, p, place, b, rows, part, b_first, b_last, scratch, x, h_seen, h_seen_row):
    """See `vector_forward.preact`."""
    init = fed(a, p, row_of(a, s, b, part, b_first, b_last))
    add_product(
        a, 4, states_at(a, place), a.H, 0, a.H if h_seen != 0 else 0, a.block, rows, init, 4 * VECTOR, scratch,
        4 * VECTOR, h_seen + b * h_seen_row, h_seen_row,
    )  # fmt: skip


@jit
def preact_of_lone(a, s, p_first, p_last, scratch, x, h_seen):
    pass
