"""What every call needs before its kernel runs: sizes, threads, memory, and the fields of its argument struct."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlstm.backends.numba.constants import FOLD, ROW_BLOCK, STRIP, WEIGHT_BLOCK_BYTES, operand_steps
from fastlstm.backends.numba.host import cells
from fastlstm.backends.numba.host.panels import lanes_of, panels_of, reach_of, saved_panels, span_of

if TYPE_CHECKING:
    from fastlstm.backends.numba.host.signature import Signature


@cache
def most_pieces() -> int:
    from fastlstm.backends.numba.llvm import matrix

    return matrix.most_pieces()


def split(team: int, s: Signature, panels: int, back: bool = False) -> tuple[int, int]:
    """Return how many of `team` threads work, and how many teams they form.

    Teams split the batch rows and do not wait for each other between steps, but each team reads all weights. The
    threads of one team split the hidden units, so that each reads a share of the weights, at the cost of a barrier of
    a microsecond a step. A team gets enough rows for its products to last longer than its reading: few rows if there
    are few weights, and no more than pass a panel together.

    Args:
        team: the number of threads that may work.
        back: whether it is the backward pass, whose steps read weight_hh alone.
    """
    threads, T, B, H, pieces, products = team, s.T, s.B, s.H, s.pieces, s.products
    if s.counts.means:  # a thread has all units of its rows, a tile at least; a team of fewer meets twice a step
        team_count = max(1, min(threads, B // 6))
        if team_count < threads and B * H * products < 2 * SERIAL:
            threads = team_count
        threads = min(threads, team_count * panels)
        small = team_count == threads and T * B * (H + 8) * (products + 64 * s.counts.sums) < SERIAL_CALL
        return (1, 1) if small else (threads // team_count * team_count, team_count)
    least = 2 if pieces < 2 else 32  # rows that fill the tiles of the matrix unit
    enough = min(64, max(least, 4 * H * (s.counts.of_h * H // s.heads if back else products) // ROW_BYTES))
    team_count = min(threads, max(1, B // enough, min(panels_of(threads, panels), B // 2)))
    # products of bfloat16 are so much faster where few rows use them: on the matrix unit, or on vectors
    by_unit = 1 if pieces != 1 else 8 if most_pieces() > 1 else 2
    if team_count < threads and SERIAL * by_unit > B * H * products:
        threads = team_count
    threads = min(threads, team_count * panels)
    if team_count == threads and T * B * (H + 8) * (products + 32 * s.counts.sums) < SERIAL_CALL:
        return 1, 1
    return threads, team_count


CHUNK_ROWS = 128  # (step, row) pairs whose dpreact is turned into gradients together
RING = 4  # chunks of these that are kept: a thread may write one while another reads the chunk three before it
# Bytes of the sums over these pairs from which they no longer stay in the second-level caches, and four times as many
# pairs are summed together.
SUM_BYTES, MATRIX_SUM_BYTES = 9 << 18, 1 << 22
# Up to this size of the sums over (step, row) pairs, or half of it where batch rows are few but steps many, each half
# of the batch rows has its own: a thread's are then over what it has in its cache. It depends on nothing but the shape,
# so that the bits do not on the threads.
HALF_BYTES = 1 << 19
FEW_ROWS = 128  # (step, row) pairs whose weight gradients are written row by row, less for padding, see `outer`
UNIT_PIECES = 3  # of a float32, where some products alone run on the matrix unit: all that it has
MANY_SUMS = 1 << 22  # multiply-adds a step, from which sums for the weights run there: laying dpreact out costs a tenth
MANY_INPUTS = 1 << 18  # weights of the input from which its products run there, see `input_pieces`
SERIAL = 75_000  # multiply-adds of a step, below which a barrier costs what the second thread saves
SERIAL_CALL = 1_000_000  # of a call, with 32 more a sum for the cells, below which waking the second thread does
# Bytes of both weights that a call's first 8 steps read, above which more than a few rows, too, multiply a wide input
# for several steps at once: 10 MB, which a cache shared with others loses from step to step, and more where steps are
# fewer. FED_ROWS: (step, row) pairs at most whose products are kept.
READ_IN_EIGHT_STEPS, FED_ROWS = 5 << 24, 512
ROWS_TOGETHER = 48  # of a cell that takes means, whose sums for all units stay in the second-level cache
ROW_BYTES = 1 << 15  # of weights in float32, for each row of a part


def transposed_sizes(s: Signature, panels: int, lanes: int, of_x: int) -> dict[str, int]:
    """Elements of the transposed weights packed for products with dpreact: of each group of four vectors."""
    I, H, gates = s.I, s.H, (s.counts.of_x, s.counts.of_h)
    ih, hh = (
        panels * 2 * n * 1024 if n else panels * count * lanes * 4 * lanes for n, count in zip((of_x, s.pieces), gates)
    )
    if s.heads > 1:
        hh = hh // panels * reach_of(s.H, s.heads, lanes)
    return {"packed_ih": panels_of(I, 4 * lanes) * ih, "packed_hh": panels_of(H, 4 * lanes) * hh}


def blocks_of(I: int, H: int, joint: bool) -> tuple[int, int]:
    """Rows of weights in a block of x's sum, 0 where a narrow x is in h's, and of h's. How many batch rows there are
    must not decide: a row's bits would depend on it. `joint`: whether all sums are of x and of h.
    """
    most = WEIGHT_BLOCK_BYTES // (16 * lanes_of(torch.float32))

    def block(rows: int) -> int:
        return -(-rows // -(-rows // most)) if rows else 1

    return (block(I), block(H)) if 4 * I >= H or not joint else (0, block(I + H))


def is_dense(s: Signature) -> bool:
    """Whether a last panel that is not full has its sums side by side: where they then make fewer vectors, all of them
    are of x and of h, the matrix unit has no part, and no unit of it is of another head.
    """
    lanes, sums, rest = lanes_of(s.dtype), s.counts.sums, s.H % lanes_of(s.dtype)
    unit = s.pieces or (s.counts.on_unit and s.dtype == torch.float32 and most_pieces() >= UNIT_PIECES)
    if unit or s.counts.means or s.heads > 1 or not s.counts.joint or sums > 4:
        return False
    return 0 < -(-sums * rest // lanes) < sums


def input_pieces(s: Signature) -> int:
    """Pieces of a number in the products with the input, of both passes: 0 without the matrix unit.

    Where all other products do without it these still take it if they are two thirds of all, and many. How many rows
    there are must not decide: a row's bits would depend on the rows beside it, a step's on the steps around it.
    """
    many = s.dtype == torch.float32 and s.I >= 2 * s.H and 4 * s.H * s.I >= MANY_INPUTS
    return s.pieces or (UNIT_PIECES if s.unit and many and most_pieces() >= UNIT_PIECES else 0)


def forward_sizes(s: Signature, of_x: int, team_count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Fields of the forward kernel's arguments and elements of its buffers, but for packed weights."""
    T, B, I, H, dtype, pieces, sums = s.T, s.B, s.I, s.H, s.dtype, s.pieces, s.counts.sums
    lanes, (fields, scratch) = lanes_of(dtype), common_sizes(s, "Forward", sums, panels_of(H, lanes_of(dtype)))
    buffers = {"scratch": scratch + (B * H if s.resets and not pieces else 0)}
    if s.narrow:
        buffers["states"] = 2 * B * H
    if pieces:  # the last tile may be cut off
        fields["pitch"] = (B + 32) * 64
        buffers["operand"] = 2 * pieces * operand_steps(I, H) * fields["pitch"] // 4
    elif of_x:
        steps = max(1, min(T, CHUNK_ROWS // max(B, 1)))
        rows = steps * B + 32 * team_count
        fields |= {"input_steps": steps, "pitch": rows * 64, "block": blocks_of(I, H, joint=True)[1]}
        buffers["operand"] = 2 * of_x * panels_of(I, 32) * rows * 16
        buffers["input_preact"] = panels_of(H, lanes) * rows * 4 * lanes
    else:
        fields["block_x"], fields["block"] = blocks_of(I, fields["span"], s.counts.joint)
        wide, large = fields["block_x"] > 0, H * s.products * dtype.itemsize * min(T, 8) > READ_IN_EIGHT_STEPS
        most = min(32, FED_ROWS // max(B, 1))  # steps for which a row reads the weights once
        steps = -(-T // -(-T // most)) if T > 1 and most else 0
        few = ROW_BLOCK if large else steps // max(B, 1)
        if steps and (B == 1 or (wide and 0 < B <= few)):
            fields["input_steps"] = steps
            buffers["input_preact"] = panels_of(H, lanes) * steps * (B if wide else 2) * sums * lanes
    return fields, buffers


def packed_size(s: Signature, lanes: int, of_x: int, places: int) -> int:
    """Elements of the packed weights of so many panels."""
    if s.pieces:
        return places * operand_steps(s.I, s.H) * s.pieces * 1024
    of_inputs = panels_of(s.I, 32) * of_x * 1024 if of_x else s.I * s.counts.of_x * lanes
    return places * (span_of(s.H, s.heads, lanes) * s.counts.of_h * lanes + of_inputs)


def sum_places(s: Signature, of_sums: int) -> tuple[int, int, int]:
    """Where the sums of h and of ones begin among those of the rows of [x, h, 1], and how many rows there are.

    If all have the same terms to be multiplied with, and the matrix unit has no part, they follow each other.
    Otherwise those of each begin a strip of columns. A row has a vector for each sum of x, or of h. That of ones takes
    as many rows as it needs. A panel has no rows for those columns of h that its heads do not see.
    """
    counts, I, H = s.counts, s.I, s.H if s.counts.of_h else 0
    if of_sums:
        of_x = -(-(I + 1) // 16) * 16
        return of_x, I, of_x + panels_of(H, lanes_of(s.dtype)) * 16
    unseen = H - span_of(s.H, s.heads, lanes_of(s.dtype)) if H else 0
    if counts.joint and not counts.params:
        return I, I + H, I + H + 1 - unseen
    of_h = panels_of(I, STRIP) * STRIP
    of_one = of_h + panels_of(H, STRIP) * STRIP
    return of_h, of_one, of_one - unseen + panels_of(counts.sums + counts.params, max(counts.of_x, counts.of_h, 1))


def common_sizes(s: Signature, kind: str, wide: int, count: int) -> tuple[dict[str, int], int]:
    """Fields of both kernels' arguments, and elements of a thread's scratch, whose rows have so many vectors that
    products are summed in; of all `count` panels or groups of them where a cell takes means.
    """
    of_cell, slots = cells.fields(s.cell, kind), cells.vectors_aside(s.cell, kind)
    lanes, size, means = lanes_of(s.dtype), s.dtype.itemsize, s.counts.means
    panels = panels_of(s.H, lanes)
    shared_slot = slots + panels * of_cell["later_values"]
    fields = {
        "T": s.T, "B": s.B, "I": s.I, "H": s.H, "panels": panels, "c_step": s.rows * s.H * size, "dense": is_dense(s),
        "heads": s.heads, "head": s.H // s.heads, "span": span_of(s.H, s.heads, lanes),
        "saved": s.cell.layout.saved_vectors(lanes), "gate_panels": saved_panels(s.cell, s.H, lanes),
        "panel_bytes": ROW_BLOCK * wide * lanes * size if means else 0,
        "rows_together": ROWS_TOGETHER if means else max(s.B, 1),
        "later_slot": slots, "shared_slot": shared_slot, "slots": shared_slot + of_cell["shared_values"],
        "wide": wide * count if means else wide,
    }  # fmt: skip
    return of_cell | fields, 2 * of_cell["table_bytes"] // size + ROW_BLOCK * (fields["wide"] + fields["slots"]) * lanes


def backward_sizes(s: Signature, sums: bool, to_x: bool) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Fields of the backward kernel's arguments and elements of its buffers, but for transposed weights; and the pieces
    of a number in the products for x and in the sums for the weights: 0 without the matrix unit.

    `sums`: whether a gradient of the weights or of a bias is wanted; `to_x`: whether one of x is.
    """
    T, B, I, H, dtype, pieces, unit = s.T, s.B, s.I, s.H, s.dtype, s.pieces, s.unit
    lanes, size, counts = lanes_of(dtype), dtype.itemsize, s.counts
    panels, wide, terms = panels_of(H, lanes), 4 * lanes, (counts.sums + counts.params) * lanes
    columns = (panels_of(I, wide) + panels_of(H, wide)) * wide
    few = not pieces and T * B * columns <= FEW_ROWS * (I + H)
    of_inputs = input_pieces(s)
    of_x = of_inputs if to_x else 0
    # where dx takes the unit its kernel sums there, too: then always, since the sums must not depend on who wants dx
    long = dtype == torch.float32 and (of_inputs or B * H * s.products >= MANY_SUMS)
    of_sums = pieces or (UNIT_PIECES if unit and sums and long and not few and most_pieces() >= UNIT_PIECES else 0)
    mixed = of_sums and not pieces
    sums_of_h, sum_of_one, sum_rows = sum_places(s, of_sums)
    of_half = panels * sum_rows * max(counts.of_x, counts.of_h, 1) * lanes * size  # bytes
    rows = CHUNK_ROWS
    if few:  # x and h each in strips of four vectors, and no ones
        sums_of_h = panels_of(I, wide) * wide
        sum_of_one = sums_of_h + H
    if mixed:  # dpreact takes more memory, for which a batch of few rows gets no speed
        rows = CHUNK_ROWS // 2 if B < 64 else CHUNK_ROWS
    elif of_half > (MATRIX_SUM_BYTES if pieces else SUM_BYTES):
        rows = 4 * CHUNK_ROWS
    chunk = -(-T // max(1, round(T * B / rows)))
    ring = min(RING, -(-T // chunk))
    many = B >= 4 and T * B >= 1024 and of_half <= HALF_BYTES // 2
    halves = 2 if many or (B >= 128 and of_half <= HALF_BYTES) else 1
    kept = ring * chunk if (sums and not of_sums) or (to_x and not of_x) else 2
    fields, scratch = common_sizes(s, "Backward", 4, panels_of(H, wide))
    fields |= {"reach": reach_of(s.H, s.heads, lanes), "chunk": chunk, "ring": ring, "halves": halves, "kept": kept}
    fields |= {"strip": wide if few else STRIP, "sum_rows": sum_rows, "sums_of_h": sums_of_h, "sum_of_one": sum_of_one}
    carried = counts.others + counts.carries_h + s.ends_early
    buffers = {"scratch": scratch, "carried": panels * B * lanes * carried}
    if not pieces:
        buffers["dpreact"] = panels * kept * B * terms
    if pieces or of_x:
        kept = ring * chunk if to_x else 2
        fields |= {"rows_kept": kept, "pitch": (kept * B + 32) * 64}
        buffers["dpreact_rows"] = (pieces or of_x) * 2 * panels * fields["pitch"] // size
    if of_sums:
        blocks = -(-chunk * (B + B % 2) // 32)
        fields["columns_bytes"] = panels * blocks * of_sums * 4096
        fields["strips_bytes"] = of_sums * blocks * sum_rows * 64
        buffers["columns"] = ring * fields["columns_bytes"] // size if sums else 0
    else:
        columns = columns if few else panels_of(sum_of_one + 1, STRIP) * STRIP
        fields["strips_bytes"] = chunk * B * columns * size
    both = 2 if of_sums and -(-T // chunk) > FOLD else 1  # the sums, and those of the last chunks
    buffers["dweights"] = both * halves * of_half // size if sums and not few else 0
    buffers["strips"] = ring * fields["strips_bytes"] // size if sums else 0
    return fields, buffers, of_x, of_sums


def row(a: Tensor) -> tuple[int, int]:
    """The address of (..., rows, columns) and the bytes from one row to the next."""
    return a.data_ptr(), a.stride(-2) * a.element_size()


def step_row(a: Tensor) -> tuple[int, int, int]:
    """The address of (steps, ..., rows, columns) and the bytes from one step and one row to the next."""
    size, (step, *_, row, _) = a.element_size(), a.stride()
    return a.data_ptr(), step * size, row * size


def row_steps(B: int, **tensors: Tensor | None) -> dict[str, int]:
    """Bytes from one group's B rows to the next one's."""
    return {k: B * a.stride(-2) * a.element_size() for k, a in tensors.items() if a is not None}


def first_steps(**tensors: Tensor | None) -> dict[str, int]:
    return {k: a.stride(0) * a.element_size() for k, a in tensors.items() if a is not None}
