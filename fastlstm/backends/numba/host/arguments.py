"""What a kernel call is told: one C struct of 64-bit integers a task.

Addresses and strides are in bytes; a zero address means absent. R counts the batch rows of all groups of a stack. A
struct has first what is the same for all calls of one signature, then buffers, then what is a call's own.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache

import numpy as np

from fastlstm.backends.numba.llvm import matrix
from fastlstm.backends.numba.llvm.primitives import NAMES


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_int64) for field in fields.split()]})


# size: bytes of an element; lanes: elements of a vector; tail: vectors of the last panel's gates, see `vectors_of`.
# rows: R, batch rows from one step to the next. parts: into how many the batch rows are split. relax: what a waiting
# thread calls. constants: a kilobyte of zeros, then a one. original_size: bytes of an element of the weights that are
# digested. For the matrix unit: pieces of a number; pitch, bytes from one step of 32 of an operand's rows to the next.
# narrow_rows and narrow_weights: whether x, dx, dh and h, and the weights and their gradients, are of bfloat16.
_COMMON = " ".join((*NAMES, *matrix.NAMES)) + (
    " size lanes tail T B rows I H reverse parts relax scratch_bytes constants original_size pieces pitch narrow_rows "
    "narrow_weights x_step x_row weight_ih_row weight_hh_row"
)
# barrier: counters at which threads meet. scratch: each thread's own, scratch_bytes apart. large: where a one is left
# if there was a number that the unit cannot take.
_BUFFERS = "barrier scratch large"
# The kernel packs weight_ih (4H,I), weight_hh (4H,H), and the sum of bias and bias_hh (4H,). What is digested are the
# originals, contiguous: those packed may be copies of them.
_WEIGHTS = "weight_ih weight_hh bias bias_hh original_ih original_hh original_bias original_bias_hh"
# x (T,B,I), h (T,B,H), h_0 and c_0 (B,H) with any strides but the last. lengths: int64 (R,), the steps of each row.
# reset: bytes (T,R), one where the states are zero before a step. c (T,B,H), or with c_step 0 one (B,H).
# gates (T,panels,B,4,lanes), if saved.
_LAYER = "x h_0 h_0_row c_0 c_0_row lengths reset h c gates"
# Where packed weights are kept from call to call. digests: one for each block of the originals. stale: where to count
# those that are others, if the weights are packed already; if it is absent they are packed, and the digests stored.
_KEPT = "digests stale"

# packed: (places,H,4,lanes) weight_hh, then (places,I,4,lanes) weight_ih, or with the unit the columns of this or of
# both. There is a place for each panel, or one for each thread, which packs a panel when it comes to it.
# biases (panels,4,lanes). flip: whether the first step takes the panels from last to first. states: where narrow_rows,
# two steps' float32 rows of h, which goes to `h` with out_step and out_row. operand: x and h as rows, of two steps; or
# x alone, of twice `feed` steps. fed: what x makes of the sums of `feed` steps, (panels,feed,B,4,lanes), with 2 for B
# where block_x is 0; with the unit (panels,pitch/64,4,lanes). block_x and block are those of `sizes.blocks_of`.
FORWARD_CALL, FORWARD_KEPT = f"{_WEIGHTS} {_LAYER} h_n c_n flip", f"packed biases {_KEPT}"
ForwardArguments = _struct(
    "ForwardArguments",
    f"{_COMMON} h_step h_row c_step out_step out_row places block_x block feed {_BUFFERS} states operand fed "
    f"{FORWARD_CALL} {FORWARD_KEPT}",
)

# dh and dc (T,B,H), dh_n and dc_n (B,H): incoming, or absent. dpreact (panels,kept,B,4,lanes). dc_carried
# (panels,B,lanes), then the same for dh of held rows. gate_rows: from one panel's gates to the next's. packed_hh and
# packed_ih: for each group of panels (4H, its vectors); packs: whether any is read. strips: for `ring` chunks of
# `chunk` steps, strips_bytes apart, the columns of [x, h, 1]. dweights (halves,panels,sum_rows,4,lanes), over half of
# the batch rows each where halves is 2, and as many again where the unit sums more than FOLD chunks: x's rows first,
# h's from sums_of_h on, the bias' at sum_of_one. Where dweights is absent and strips are not, rows are few, and
# strips hold them for `outer`. For the unit there is dpreact as rows, of `rows_kept` steps, for products with
# weights, and as columns, columns_bytes apart, for the sums, whose strips are rows of the transposed [x, 1, h].
BACKWARD_CALL = (
    f"{_WEIGHTS} {_LAYER} dh dh_step dh_row dh_n dh_n_row dc_n dc_n_row dc dc_step dc_row "
    "dx dweight_ih dweight_hh dbias dh_0 dc_0"
)
BACKWARD_KEPT = f"packed_hh packed_ih {_KEPT}"
BackwardArguments = _struct(
    "BackwardArguments",
    f"{_COMMON} gate_rows chunk ring halves sum_rows sums_of_h sum_of_one kept packs rows_kept strips_bytes "
    f"columns_bytes {_BUFFERS} dpreact dc_carried strips dweights dpreact_rows columns {BACKWARD_CALL} {BACKWARD_KEPT}",
)

# Tasks of one kind that know nothing of each other: `count` structs from `first` on, `bytes` apart. A lane is what has
# buffers of its own: struct k runs in lane k % lanes.
StackArguments = _struct("StackArguments", "task first bytes count lanes")
# What each thread of a team is handed.
RegionArguments = _struct("RegionArguments", "task arguments thread_number team_size")

FORWARD, BACKWARD = np.dtype(ForwardArguments), np.dtype(BackwardArguments)
STACK, REGION = np.dtype(StackArguments), np.dtype(RegionArguments)
STRUCTS = {"Forward": ForwardArguments, "Backward": BackwardArguments}
CALLS = {"Forward": (FORWARD_CALL, FORWARD_KEPT), "Backward": (BACKWARD_CALL, BACKWARD_KEPT)}


@cache
def writer(kind: str, kept: bool) -> tuple[Callable[..., None], int]:
    """What writes a call's own fields into a struct, with those of kept weights or without, and where they begin."""
    names = " ".join(CALLS[kind][: 1 + kept]).split()
    # the format of pointers, which packs in half the time of other integers
    return struct.Struct(f"{len(names)}n").pack_into, getattr(STRUCTS[kind], names[0]).offset
