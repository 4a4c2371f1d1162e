"""What a kernel call is told: one C struct of 64-bit integers a task.

Addresses and strides are in bytes; a zero address means absent. R counts the batch rows of all groups of a stack. A
struct has first what is the same for all calls of one signature, then buffers, then what is a call's own. It ends with
what there are as many of as the cell has states, inputs and params: kernels find these by address.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache

import numpy as np

from fastlstm.backends.numba.llvm import matrix
from fastlstm.backends.numba.llvm.cells import NAMES as CELLS
from fastlstm.backends.numba.llvm.primitives import NAMES


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_int64) for field in fields.split()]})


# size: bytes of an element; lanes: elements of a vector; panels: those of H; dense: see `is_dense`. rows: R, batch rows
# from one step to the next. sums, of_x, of_h, saved, params, inputs: counts of the cell's layout; others: its states
# but the first; values: inputs and params. joint: x and h have all sums in common; blocks: the blocks of weights, of_x,
# then of_h. reads: bits of the values that the cells read, in the order of `llvm.cells`' tables; table_bytes: of one.
# wide, slots: vectors of a row of scratch, and then beside it, see `states.slot`. c_step: of the states but the first.
# parts: into how many the batch rows are split. relax: what a waiting thread calls. constants: a kilobyte of zeros,
# then a one. original_size: bytes of an element of the weights that are digested. For the matrix unit: pieces of a
# number; pitch, bytes from one step of 32 of an operand's rows to the next. is_narrow: whether x, dx, dh and h, and
# the weights and their gradients, are of bfloat16.
_COMMON = " ".join((*NAMES, *CELLS, *matrix.NAMES)) + (
    " size lanes panels dense T B rows I H sums of_x of_h saved params inputs others values joint carries_h blocks"
    " reads table_bytes wide slots c_step reverse parts relax scratch_bytes constants original_size pieces pitch"
    " is_narrow x_step x_row weight_ih_row weight_hh_row"
)
# barrier: counters at which threads meet. scratch: each thread's own, scratch_bytes apart: two tables, then rows of
# vectors. large: where a one is left if there was a number that the unit cannot take. What ends the struct lies at
# others_at and so on.
TAILS = "others_at", "values_at", "dparams_at"
_BUFFERS = " ".join(("barrier scratch large", *TAILS))
# Where packed weights are kept from call to call. digests: one for each block of the originals. stale: where to count
# those that are others, if the weights are packed already; if it is absent they are packed, and the digests stored.
_KEPT = "digests stale"
# The kernel packs weight_ih (X H,I), weight_hh (Y H,H), and the sum of bias (X H,) and bias_hh (Y H,). What is digested
# are the originals, contiguous: those packed may be copies of them.
_WEIGHTS = "weight_ih weight_hh bias bias_hh original_ih original_hh original_bias original_bias_hh"
# x (T,B,I), h (T,B,H), h_0 (B,H) with any strides but the last. lengths: int64 (R,), the steps of each row. reset:
# bytes (T,R), one where the states are zero before a step. gates (T,panels,B,K,lanes), if saved.
_LAYER = "x h_0 h_0_row lengths reset h gates"

# packed: (places,H,Y,lanes) weight_hh, then (places,I,X,lanes) weight_ih, or with the unit the columns of this or of
# both. There is a place for each panel, or one for each thread, which packs a panel when it comes to it, or none: then
# few rows read the weights as they lie. biases (panels,S,lanes). flip: whether the first step takes the panels from
# last to first. states: where is_narrow, two steps' float32 rows of h, which goes to `h` with out_step and out_row.
# operand: x and h as rows, of two steps; or x alone, of twice `feed` steps. fed: what x makes of the sums of `feed`
# steps, (panels,feed,B,S,lanes), with 2 for B where block_x is 0; with the unit (panels,pitch/64,4,lanes). block_x and
# block are those of `sizes.blocks_of`.
FORWARD_KEPT, FORWARD_CALL = f"packed biases {_KEPT}", f"{_WEIGHTS} {_LAYER} h_n flip"
# Of each state but the first: where it starts (B,H), the states after each step (T,B,H), or with c_step 0 one (B,H),
# and where the last go. Of each input and param: (T,B,H), or of a param (H,) with strides of zero.
FORWARD_OTHER, FORWARD_VALUE = "start start_row steps last", "value value_step value_row"
ForwardArguments = _struct(
    "ForwardArguments",
    f"{_COMMON} h_step h_row out_step out_row places block_x block feed {_BUFFERS} states operand fed "
    f"{FORWARD_KEPT} {FORWARD_CALL}",
)

# dh (T,B,H) and dh_n (B,H): incoming; dh is zeros, or dh_n absent, where there is none. dpreact
# (panels,kept,B,S+P,lanes). carried: (panels,B,lanes) for each state but the first, then if it carries_h for the first,
# then for dh of held rows. gate_rows: from one panel's gates to the next's. packed_hh and packed_ih: for each group of
# panels (Y H, its vectors), or X H; packs: whether any is read. strips: for `ring` chunks of `chunk` steps,
# strips_bytes apart, the columns of [x, h, 1]. dweights (halves,panels,sum_rows,max(X,Y),lanes), over half of the batch
# rows each where halves is 2, and as many again where the unit sums more than FOLD chunks: x's rows first, h's from
# sums_of_h on, those of ones at sum_of_one. Where dweights is absent and strips are not, rows are few, and strips hold
# them for `outer`. strip: columns of one. For the unit there is dpreact as rows, of `rows_kept` steps, for products
# with weights, and as columns, columns_bytes apart, for the sums, whose strips are rows of the transposed [x, 1, h].
BACKWARD_KEPT = f"packed_hh packed_ih {_KEPT}"
BACKWARD_CALL = f"{_WEIGHTS} {_LAYER} dh dh_step dh_row dh_n dh_n_row dx dweight_ih dweight_hh dbias_ih dbias_hh dh_0"
BACKWARD_OTHER = "start start_row steps d d_step d_row d_last d_last_row d_start"
BACKWARD_VALUE = "value value_step value_row d_value"
BackwardArguments = _struct(
    "BackwardArguments",
    f"{_COMMON} gate_rows chunk ring strip halves sum_rows sums_of_h sum_of_one kept packs rows_kept strips_bytes "
    f"columns_bytes {_BUFFERS} dpreact carried strips dweights dpreact_rows columns "
    f"{BACKWARD_KEPT} {BACKWARD_CALL}",
)

# Tasks of one kind that know nothing of each other: `count` structs from `first` on, `bytes` apart. A lane is what has
# buffers of its own: struct k runs in lane k % lanes.
StackArguments = _struct("StackArguments", "task first bytes count lanes")
# What each thread of a team is handed.
RegionArguments = _struct("RegionArguments", "task arguments thread_number team_size")

FORWARD, BACKWARD = np.dtype(ForwardArguments), np.dtype(BackwardArguments)
STACK, REGION = np.dtype(StackArguments), np.dtype(RegionArguments)
_HEADS = {"Forward": ForwardArguments, "Backward": BackwardArguments}
_CALLS = {"Forward": (FORWARD_KEPT, FORWARD_CALL), "Backward": (BACKWARD_KEPT, BACKWARD_CALL)}
_TAILS = {"Forward": (FORWARD_OTHER, FORWARD_VALUE), "Backward": (BACKWARD_OTHER, BACKWARD_VALUE)}


def _tail(kind: str, others: int, values: int, params: int) -> list[list[str]]:
    """The names of what ends a struct, each with its number: what there is of states, of inputs and params, and where
    the gradients of params go.
    """
    of_other, of_value = (names.split() for names in _TAILS[kind])
    return [
        [f"{name}{k}" for k in range(others) for name in of_other],
        [f"{name}{k}" for k in range(values) for name in of_value],
        [f"dparam{k}" for k in range(params if kind == "Backward" else 0)],
    ]


@cache
def struct_of(kind: str, others: int, values: int, params: int) -> tuple[type[ctypes.Structure], dict[str, int]]:
    """The struct of a kernel's arguments for a cell of so many states but the first, inputs and params, and how far
    behind its start what ends it begins.
    """
    tails, head = _tail(kind, others, values, params), _HEADS[kind]
    made = type(head.__name__, (head,), {"_fields_": [(name, ctypes.c_int64) for names in tails for name in names]})
    places, at = {}, ctypes.sizeof(head)
    for name, names in zip(TAILS, tails):
        places[name] = at
        at += 8 * len(names)
    return made, places


@cache
def writer(kind: str, kept: bool, others: int, values: int, params: int) -> tuple[Callable[..., None], int]:
    """What writes a call's own fields into a struct, with those of kept weights or without, and where they begin."""
    names = " ".join(_CALLS[kind][not kept :]).split()
    count = len(names) + sum(map(len, _tail(kind, others, values, params)))
    # the format of pointers, which packs in half the time of other integers
    return struct.Struct(f"{count}n").pack_into, getattr(_HEADS[kind], names[0]).offset
