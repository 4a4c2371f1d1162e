"""What kernels have to know of a cell: how many values of each kind it has, and the fields that depend on it alone."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from fastlstm.cells.spec import Cell


class Counts(NamedTuple):
    """Counts the values of a cell, and says what its kernels must be able to do.

    Attributes:
        preacts, x_preacts, h_preacts: all pre-activations, those with a product of x, and those with one of h.
        joint: whether every pre-activation has both products.
        carries_h: whether the gradient of h goes to the step before also beside its product.
        reads_new: whether the backward pass reads states after the step.
        means: whether the cell takes means over units.
        has_phases: whether the cell takes means over units or has products, and so runs in phases.
        products, product_groups, group_size: products of values of the step, their groups, and the most of a group.
    """

    preacts: int
    x_preacts: int
    h_preacts: int
    params: int
    inputs: int
    inner_states: int
    joint: bool
    carries_h: bool
    reads_new: bool
    means: bool
    has_phases: bool
    products: int
    product_groups: int
    group_size: int

    @property
    def operands(self) -> int:
        return self.inputs + self.params


@cache
def counts(cell: Cell) -> Counts:
    layout, read = cell.layout, set(cell.derived().states_read)
    first, *inner = layout.states
    numbers = len(layout.preacts), len(layout.x_preacts), len(layout.h_preacts)
    joint, means = layout.x_preacts == layout.h_preacts, bool(cell.derived().means)
    has_phases = means or bool(cell.products)
    return Counts(
        *numbers, len(layout.params), len(layout.inputs), len(inner), joint,
        first in layout.carried, bool(read & set(layout.states)), means, has_phases,
        len(layout.products), len(layout.product_groups), max(map(len, layout.product_groups), default=0),
    )  # fmt: skip


@cache
def gate_blocks(cell: Cell) -> Any:
    """Return the gate blocks of weight_ih, of weight_hh, and of products' weights, as the kernels read them."""
    blocks = *cell.layout.blocks_ih, *cell.layout.blocks_hh, *range(len(cell.products))
    return (ctypes.c_int64 * len(blocks))(*blocks)


@cache
def product_records(cell: Cell, backward: bool) -> Any:
    """Return an array of the records of the values that products multiply, as the kernels read them."""
    from fastlstm.backends.numba.llvm.cells import functions_of

    functions, layout, numbers, first = functions_of(cell), cell.layout, list[int](), 0
    phases = functions.backward if backward else functions.forward
    phase_of_group = {group: k for k, each in enumerate(phases.phases) for group in each.products}
    for k, names in enumerate(layout.product_groups):
        numbers += phase_of_group.get(k, -1), first, len(names), layout.multiplied[k]
        first += len(names)
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def cell_fields(cell: Cell, kind: str) -> dict[str, int]:
    """Return those argument fields of a pass that depend on the cell alone."""
    from fastlstm.backends.numba.llvm.cells import backward_table, forward_table, functions_of

    of_cell, functions, layout, derived = counts(cell), functions_of(cell), cell.layout, cell.derived()
    backward, names = kind == "Backward", forward_table(layout)
    taken = (derived.backward if backward else derived.forward).arguments
    read = {*taken, *(f"{state}_prev" for state in layout.states[1:])}  # held rows copy these
    host_only = "reads_new", "means", "has_phases"
    fields = {name: int(value) for name, value in of_cell._asdict().items() if name not in host_only}
    # two pointer tables lie before the rows of scratch: each in cache lines of its own
    table_bytes = -(-16 * len(backward_table(layout)) // 64) * 64
    passes = (functions.backward,) if backward else (functions.forward, functions.saving)
    return fields | {
        "phases": functions.phases[backward], "later_values": max(len(each.kept) for each in passes),
        "shared_values": max(len(each.of_rows) + len(each.sums) for each in passes),
        "operands": of_cell.operands, "gate_blocks": ctypes.addressof(gate_blocks(cell)), "table_bytes": table_bytes,
        "read_bits": sum(1 << k for k, name in enumerate(names) if name in read),
        "terms": of_cell.preacts + of_cell.products,
        "product_records": ctypes.addressof(product_records(cell, backward)),
    }  # fmt: skip


def count_copy_vectors(cell: Cell, kind: str) -> int:
    """Return how many vectors each scratch row has for copies, in addition to those that hold a product."""
    of_cell = counts(cell)
    entries = 2 * of_cell.inner_states + 2 + of_cell.operands
    if kind == "Forward":  # the pre-activations of a compact panel lie there before they are expanded
        return max(entries, of_cell.preacts)
    return max(4, entries + 1 + of_cell.inputs + of_cell.preacts + of_cell.products)  # 4: a product of dx
