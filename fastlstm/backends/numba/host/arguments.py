"""The argument structs: each kernel reads one C struct of 64-bit integers, which the host fills, see `fields`.

First come the fields that all calls of one signature share, those of the cell among them, then buffers, packed weights
and the fields of a call, and at the end a record for each inner state, input and param, which kernels find by address.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from fastlstm.backends.numba import fields
from fastlstm.backends.numba.fields import TAILS
from fastlstm.backends.numba.host.signature import ZERO, Counts, Source, counts
from fastlstm.backends.numba.llvm import matrix
from fastlstm.backends.numba.llvm.cells import NAMES as CELL_FUNCTIONS
from fastlstm.backends.numba.llvm.cells import backward_table, forward_table, functions_of
from fastlstm.backends.numba.llvm.primitives import NAMES
from fastlstm.cells.spec import Cell


def _struct(name: str, *tables: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int64) for t in tables for f in fields.names(t)]})


_PRIMITIVES = "\n".join((*NAMES, *CELL_FUNCTIONS, *matrix.NAMES))
_COMMON = _PRIMITIVES, fields.SIZES, fields.CELL, fields.SCRATCH, fields.LAYOUT
# For each pass: the fields of packed weights, which calls with a cache write, and the fields that every call writes.
_CALLS = {
    "Forward": (fields.FORWARD_PACKED + fields.DIGESTS, fields.WEIGHTS + fields.LAYER + fields.FORWARD_CALL),
    "Backward": (fields.BACKWARD_PACKED + fields.DIGESTS, fields.WEIGHTS + fields.LAYER + fields.BACKWARD_CALL),
}
ForwardArguments = _struct(
    "ForwardArguments", *_COMMON, fields.FORWARD, fields.BUFFERS, fields.FORWARD_BUFFERS, *_CALLS["Forward"]
)
BackwardArguments = _struct(
    "BackwardArguments", *_COMMON, fields.BACKWARD, fields.BUFFERS, fields.BACKWARD_BUFFERS, *_CALLS["Backward"]
)

StackArguments = _struct("StackArguments", fields.STACK)  # independent calls of one task
BothArguments = _struct("BothArguments", fields.BOTH)  # two calls of one task, side by side
RegionArguments = _struct("RegionArguments", fields.REGION)  # read by each thread of an OpenMP region

_HEADS = {"Forward": ForwardArguments, "Backward": BackwardArguments}
_RECORDS = {
    "Forward": (fields.FORWARD_STATE, fields.FORWARD_OPERAND),
    "Backward": (fields.BACKWARD_STATE, fields.BACKWARD_OPERAND),
}


def _record_fields(kind: str, counts: Counts) -> list[list[str]]:
    """Return the fields, numbered by record, of inner states, of inputs and params, and of the params' gradients."""
    state_fields, operand_fields = map(fields.names, _RECORDS[kind])
    return [
        [f"{field}{k}" for k in range(counts.inner_states) for field in state_fields],
        [f"{field}{k}" for k in range(counts.operands) for field in operand_fields],
        [f"dparam{k}" for k in range(counts.params + counts.products if kind == "Backward" else 0)],
    ]


@cache
def struct_of(kind: str, counts: Counts) -> tuple[Any, dict[str, int]]:
    """Return the argument struct of a pass of a cell, and the offset at which the records of each of `TAILS` begin."""
    records, head = _record_fields(kind, counts), _HEADS[kind]
    all_fields = [(field, ctypes.c_int64) for part in records for field in part]
    offsets, offset = {}, ctypes.sizeof(head)
    for name, part in zip(TAILS, records):
        offsets[name] = offset
        offset += 8 * len(part)
    return type(head.__name__, (head,), {"_fields_": all_fields}), offsets


ADDED = ("flip", "mismatches")  # the values of a call that are no addresses of its tensors
Writer = Callable[[ctypes.Structure, tuple[int, ...]], object]


def cached_names(kind: str) -> list[str]:
    """Return the fields of packed weights, in the order of `PackedWeights.addresses`."""
    return [field for field in fields.names(_CALLS[kind][0]) if field not in ADDED]


def writer(kind: str, is_cached: bool, counts: Counts, values: Sequence[str], sources: dict[str, Source]) -> Writer:
    """Return a function that writes the fields of a call into a struct, in their order there.

    Args:
        is_cached: whether the call has packed weights that are kept, whose fields it then writes too.
        values: the names of the values that the function gets, among them `ZERO`.
        sources: of each field. A field is 0 if it has no source, or if `values` lack the source's name.
    """
    own, first, pack_into = _call_fields(kind, is_cached, counts)
    known = [source if (source := sources.get(field, (ZERO, 0)))[0] in values else (ZERO, 0) for field in own]
    constants = tuple({offset: None for name, offset in known if name == ZERO})
    shifted = tuple({(values.index(name), offset): None for name, offset in known if name != ZERO and offset})
    places = [*[(name, 0) for name in values], *[(ZERO, offset) for offset in constants]]
    places += [(values[index], offset) for index, offset in shifted]
    pick = _picker(*[places.index(source) for source in known])
    if not shifted:
        return lambda arguments, numbers: pack_into(arguments, first, *pick(numbers + constants))
    return lambda arguments, numbers: pack_into(
        arguments, first, *pick((*numbers, *constants, *[numbers[index] + offset for index, offset in shifted]))
    )


_picker = cache(itemgetter)  # calls of many signatures share one


@cache
def _call_fields(kind: str, is_cached: bool, counts: Counts) -> tuple[list[str], int, Callable[..., None]]:
    """Return the fields that a call writes, the offset of the first one, and what packs their numbers."""
    own = [field for table in _CALLS[kind][not is_cached :] for field in fields.names(table)]
    first = getattr(_HEADS[kind], own[0]).offset
    for record in _record_fields(kind, counts):
        own += record
    # the format of pointers packs in half the time of other integers
    return own, first, struct.Struct(f"{len(own)}n").pack_into


@cache
def gate_blocks(cell: Cell) -> Any:
    """Return the gate blocks of weight_ih, of weight_hh, and of products' weights, as the kernels read them."""
    blocks = *cell.layout.blocks_ih, *cell.layout.blocks_hh, *range(len(cell.products))
    return (ctypes.c_int64 * len(blocks))(*blocks)


@cache
def product_records(cell: Cell, backward: bool) -> Any:
    """Return an array of the records of the values that products multiply, as the kernels read them."""
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
    of_cell, functions, layout, derived = counts(cell), functions_of(cell), cell.layout, cell.derived()
    backward, names = kind == "Backward", forward_table(layout)
    taken = (derived.backward if backward else derived.forward).arguments
    read = {*taken, *(f"{state}_prev" for state in layout.states[1:])}  # held rows copy these
    host_only = "reads_new", "means", "has_phases", "group_size"
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
