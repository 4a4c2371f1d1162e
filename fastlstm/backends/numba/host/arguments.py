"""The structs that kernels read: their fields stand in `fields`.

A struct has first what all calls of one signature share, then buffers, then packed weights, then what is a call's own.
It ends with a record for each state but the first, then for each input and param, which kernels find by address.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache

from fastlstm.backends.numba.host import fields
from fastlstm.backends.numba.host.fields import TAILS
from fastlstm.backends.numba.llvm import matrix
from fastlstm.backends.numba.llvm.cells import NAMES as CELLS
from fastlstm.backends.numba.llvm.primitives import NAMES


def _struct(name: str, *tables: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int64) for t in tables for f in fields.names(t)]})


_PRIMITIVES = "\n".join((*NAMES, *CELLS, *matrix.NAMES))
_COMMON = _PRIMITIVES, fields.SIZES, fields.CELL, fields.SCRATCH, fields.LAYOUT
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

StackArguments = _struct("StackArguments", fields.STACK)  # tasks of one kind that know nothing of each other
RegionArguments = _struct("RegionArguments", fields.REGION)  # what each thread of a team is handed

_HEADS = {"Forward": ForwardArguments, "Backward": BackwardArguments}
_RECORDS = {
    "Forward": (fields.FORWARD_STATE, fields.FORWARD_VALUE),
    "Backward": (fields.BACKWARD_STATE, fields.BACKWARD_VALUE),
}


def _tail(kind: str, others: int, values: int, params: int) -> list[list[str]]:
    """Return the fields of the records of states, those of the records of inputs and params, and those of the params'
    gradients. Each has its record's number after its name.
    """
    of_state, of_value = map(fields.names, _RECORDS[kind])
    return [
        [f"{field}{k}" for k in range(others) for field in of_state],
        [f"{field}{k}" for k in range(values) for field in of_value],
        [f"dparam{k}" for k in range(params if kind == "Backward" else 0)],
    ]


@cache
def struct_of(kind: str, others: int, values: int, params: int) -> tuple[type[ctypes.Structure], dict[str, int]]:
    """Return the struct of a pass of a cell with so many states but the first, inputs and params together, and params.
    And for each of `TAILS` the offset in it at which these records begin.
    """
    tails, head = _tail(kind, others, values, params), _HEADS[kind]
    struct_type = type(
        head.__name__, (head,), {"_fields_": [(field, ctypes.c_int64) for part in tails for field in part]}
    )
    offsets, offset = {}, ctypes.sizeof(head)
    for name, part in zip(TAILS, tails):
        offsets[name] = offset
        offset += 8 * len(part)
    return struct_type, offsets


@cache
def writer(kind: str, kept: bool, others: int, values: int, params: int) -> tuple[Callable[..., None], int]:
    """Return a function that writes a call's own fields into a struct, and the offset at which they begin. If weights
    are `kept`, the fields of packed weights come before them.
    """
    own = [field for table in _CALLS[kind][not kept :] for field in fields.names(table)]
    count = len(own) + sum(map(len, _tail(kind, others, values, params)))
    # the format of pointers, which packs in half the time of other integers
    return struct.Struct(f"{count}n").pack_into, getattr(_HEADS[kind], own[0]).offset
