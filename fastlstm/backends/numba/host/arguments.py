"""The argument structs: each kernel reads one C struct of 64-bit integers, which the host fills, see `fields`.

First come the fields that all calls of one signature share, then buffers, packed weights and the fields of a call, and
at the end a record for each inner state, input and param, which kernels find by address.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache
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


@cache
def writer(kind: str, cached: bool, counts: Counts) -> tuple[Callable[..., None], int]:
    """Return what writes a call's fields into a struct, with packed weights if `cached`, and the first offset."""
    own = [field for table in _CALLS[kind][not cached :] for field in fields.names(table)]
    count = len(own) + sum(map(len, _record_fields(kind, counts)))
    # the format of pointers, which packs in half the time of other integers
    return struct.Struct(f"{count}n").pack_into, getattr(_HEADS[kind], own[0]).offset
