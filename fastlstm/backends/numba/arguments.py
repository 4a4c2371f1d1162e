"""What a kernel call is told: one C struct of 64-bit integers a task.

Addresses and strides are in bytes; a zero address means absent.
"""

import ctypes

import numpy as np

from fastlstm.backends.numba import matrix
from fastlstm.backends.numba.primitives import NAMES


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_int64) for field in fields.split()]})


# size: bytes of an element; lanes: elements of a vector; tail: vectors of the last panel's gates, see `vectors_of`.
# parts: into how many the batch rows are split. barrier: counters; relax: what a waiting thread calls. scratch: each
# thread's own, scratch_bytes apart. constants: a kilobyte of zeros, then a one. rows: batch rows from one step of h, c,
# dx and mask to the next: B, or those of all groups of a stack. For the matrix unit: pieces of a number; pitch,
# bytes from one step of 32 to the next of an operand's rows; large, where a one is left if there was a number that the
# unit cannot take. narrow_rows and narrow_weights: whether x, dx, dh and h, and the weights and their gradients, are
# of bfloat16, which only the matrix unit's kernels take. The forward kernel then keeps h as float32 in two steps' rows,
# (2,B,H), and leaves it to out (T,B,H), as it leaves `h` otherwise.
_COMMON = " ".join((*NAMES, *matrix.NAMES)) + (
    " size lanes tail T B rows I H reverse parts barrier relax scratch scratch_bytes constants mask pieces pitch large"
    " narrow_rows narrow_weights"
)

# x (T,B,I), h (T,B,H), h_0 and c_0 (B,H) with any strides but the last; weights (4H,I), (4H,H), bias and bias_hh
# (4H,), which are added. c (T,B,H), or with c_step 0 one (B,H), and gates (T,panels,B,4,lanes) if saved. packed:
# (places,H,4,lanes) weight_hh, then (places,I,4,lanes) weight_ih, or the columns of this one where only x is
# multiplied on the matrix unit, or of both; a place for each panel, or where there are fewer one for each
# thread, which packs a panel there when it comes to it; biases (panels,4,lanes). stale: where to count the blocks of
# weights found to have changed, if they are packed already; if absent, they are packed first. digests: one for each
# block of the originals, contiguous weights and biases of original_size bytes an element, which were packed or copied
# to be packed; they are compared where stale is given, and otherwise stored, so that packed weights can be kept.
# recurs: whether weight_hh is looked at for changes even by one step from zeros, which does not multiply by it. hides:
# whether h of held steps is left zero; shown (T,B,H): where to leave h so as well, if anywhere. flip: whether the first
# step takes the panels from last to first. operand: x and h as rows, of two steps; or x alone, of twice `feed` steps,
# whose products go to fed (panels,pitch/64,4,lanes). Without the unit: fed (panels,feed,B,4,lanes) if feed, with 2 for
# B where block_x is 0; block_x and block are those of `host.blocks_of`.
ForwardArguments = _struct(
    "ForwardArguments",
    f"{_COMMON} x x_step x_row weight_ih weight_ih_row weight_hh weight_hh_row bias bias_hh h_0 h_0_row c_0 c_0_row "
    "h h_step h_row c c_step gates h_n c_n packed places biases original_ih original_hh original_bias original_bias_hh "
    "original_size stale hides shown recurs digests flip block_x block operand feed fed "
    "out out_step out_row",
)

# dh and dc (T,B,H), dh_n and dc_n (B,H): incoming, or absent. dpreact (panels,kept,B,4,lanes). dc_carried
# (panels,B,lanes). gate_rows: from one panel's gates to the next's. packed_hh and packed_ih: for each group of panels
# (4H, its vectors), packed first if `packs`. strips: for `ring` chunks of `chunk` steps, strips_bytes apart, the
# columns of [x, h, 1]. dweights (halves,panels,sum_rows,4,lanes), over half of the batch rows each where halves is 2,
# and for the matrix unit, where there are more than FOLD chunks, as many again for the last of them: x's rows first,
# h's from sums_of_h on, the bias' at sum_of_one. Where dweights is absent and strips are not, rows are few, and
# strips hold them for `outer`. hides: whether dh of held steps is not looked at. For the matrix unit there is dpreact
# as rows, of `rows_kept` steps, for products with weights, and as columns, for `ring` chunks, columns_bytes apart,
# for the sums, whose strips are rows of the transposed [x, 1, h].
BackwardArguments = _struct(
    "BackwardArguments",
    f"{_COMMON} x x_step x_row weight_ih weight_ih_row weight_hh weight_hh_row h_0 h_0_row c_0 c_0_row h c gates "
    "gate_rows dh dh_step dh_row dh_n dh_n_row dc_n dc_n_row dc dc_step dc_row chunk ring dpreact dc_carried packs "
    "packed_hh packed_ih strips strips_bytes dweights halves sum_rows sums_of_h sum_of_one kept dpreact_rows rows_kept "
    "columns columns_bytes hides dx dweight_ih dweight_hh dbias dh_0 dc_0",
)

# Tasks of one kind that know nothing of each other: `count` structs from `first` on, `bytes` apart. A lane is what has
# buffers of its own: struct k runs in lane k % lanes.
StackArguments = _struct("StackArguments", "task first bytes count lanes")

# What each thread of a team is handed
RegionArguments = _struct("RegionArguments", "task arguments thread_number team_size")

FORWARD, BACKWARD = np.dtype(ForwardArguments), np.dtype(BackwardArguments)
STACK, REGION = np.dtype(StackArguments), np.dtype(RegionArguments)
