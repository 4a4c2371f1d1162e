"""What calls are told of their cell, and its own primitives."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from fastlstm.cells.spec import Cell


class Counts(NamedTuple):
    """How many sums a cell has, of x and of h; values that are saved; params, inputs, and states but the first."""

    sums: int
    of_x: int
    of_h: int
    saved: int
    params: int
    inputs: int
    others: int
    joint: bool  # all sums are of x and of h
    on_unit: bool  # the kernels of the matrix unit can run it
    carries_h: bool  # the gradient of the first state is carried to the step before beside its product
    reads_new: bool  # backward reads states after the step
    means: bool  # it takes means over units, and so runs in phases

    @property
    def values(self) -> int:
        """Inputs and params."""
        return self.inputs + self.params


@cache
def counts(cell: Cell) -> Counts:
    """Those of a cell."""
    layout, read = cell.layout, set(cell.derived().states_read)
    first, *others = layout.states
    numbers = (len(layout.sums), len(layout.of_x), len(layout.of_h), len(layout.saved_units))
    joint = layout.of_x == layout.of_h
    # whose h may be of bfloat16, and is not kept by a single step
    means = bool(cell.derived().means)
    plain = not (means or layout.params or layout.inputs) and read <= {f"{state}_prev" for state in others}
    return Counts(
        *numbers, len(layout.params), len(layout.inputs), len(others), joint, joint and numbers[0] == 4 and plain,
        first in layout.carried, bool(read & set(layout.states)), means,
    )  # fmt: skip


@cache
def blocks(cell: Cell) -> Any:
    """The blocks of weight_ih, then of weight_hh, as the kernels read them."""
    found = *cell.layout.blocks_ih, *cell.layout.blocks_hh
    return (ctypes.c_int64 * len(found))(*found)


@cache
def fields(cell: Cell, kind: str) -> dict[str, int]:
    """Those of a kernel's arguments that depend on the cell alone."""
    from fastlstm.backends.numba.llvm.cells import backward_table, forward_table, functions_of

    found, functions, layout = counts(cell), functions_of(cell), cell.layout
    names, takes = forward_table(layout), functions.takes[kind == "Backward"]
    read = {*takes, *(f"{state}_prev" for state in layout.states[1:])}  # which a held step hands on
    of_host = "on_unit", "reads_new", "means"
    made = {name: int(value) for name, value in found._asdict().items() if name not in of_host}
    # two tables lie before the rows of scratch: each in cache lines of its own
    table_bytes = -(-16 * len(backward_table(layout)) // 64) * 64
    back = kind == "Backward"
    passes = (functions.backward,) if back else (functions.forward, functions.saving)
    return made | {
        "phases": functions.phases[back], "later_values": max(len(each.kept) for each in passes),
        "shared_values": max(len(each.of_rows) + len(each.sums) for each in passes),
        "values": found.values, "blocks": ctypes.addressof(blocks(cell)), "table_bytes": table_bytes,
        "reads": sum(1 << k for k, name in enumerate(names) if name in read),
    }  # fmt: skip


def vectors_aside(cell: Cell, kind: str) -> int:
    """Vectors for each row of scratch, beside those that products are summed in."""
    found = counts(cell)
    entries = 2 * found.others + 2 + found.values
    if kind == "Forward":  # a last panel whose sums are side by side lies there before
        return max(entries, found.sums)
    return entries + 1 + found.others + found.inputs + found.sums + found.params
