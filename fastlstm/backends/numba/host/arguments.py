"""The argument structs: each kernel reads one C struct of 64-bit integers, which the host fills, see `fields`.

First come the fields that all calls of one signature share, then buffers, packed weights and the fields of a call, and
at the end a record for each inner state, input and param, which kernels find by address.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from fastlstm.backends.numba import fields
from fastlstm.backends.numba.fields import TAILS
from fastlstm.backends.numba.host.cell_counts import Counts
from fastlstm.backends.numba.llvm import matrix
from fastlstm.backends.numba.llvm.cells import NAMES as CELL_FUNCTIONS
from fastlstm.backends.numba.llvm.primitives import NAMES


def _struct(name: str, *tables: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int64) for t in tables for f in fields.names(t)]})


_PRIMITIVES = "\n".join((*NAMES, *CELL_FUNCTIONS, *matrix.NAMES))
_COMMON = _PRIMITIVES, fields.SIZES, fields.CELL, fields.SCRATCH, fields.LAYOUT
# For each pass: the fields of packed weights, which calls with a cache write, and the fields that every call writes.
_CALLS = {
    "Forward": (fields.FORWARD_KEPT + fields.KEPT, fields.WEIGHTS + fields.LAYER + fields.FORWARD_CALL),
    "Backward": (fields.BACKWARD_KEPT + fields.KEPT, fields.WEIGHTS + fields.LAYER + fields.BACKWARD_CALL),
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


Source = tuple[str, int]  # the name of a value, and what is added to it
ZERO = "zero"  # the name of a value that is 0
ADDED = ("flip", "mismatches")  # the values of a call that are no addresses of its tensors
Writer = Callable[[ctypes.Structure, tuple[int, ...]], object]


def kept_names(kind: str) -> list[str]:
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
