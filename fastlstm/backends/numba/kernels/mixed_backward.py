"""The backward pass's products with some on the bf16 unit: the weight gradients over many pairs, and the gradient of x
if the forward pass has x's products there, see `host.sizes.input_components`. No row's gradients depend on other rows.
"""

from fastlstm.backends.numba.kernels import matrix_backward, vector_backward
from fastlstm.backends.numba.kernels.matrix_backward import add_accumulators, store_dpreact_columns, store_dpreact_rows
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.kernels.vector_backward import back_product, dpreact_target, pack_transposed
from fastlstm.backends.numba.kernels.weight_gradients import write_weight_gradients
from fastlstm.backends.numba.llvm.intrinsics import call

pack_vectors, pack_columns = vector_backward.pack_transposed, matrix_backward.pack_transposed
vector_gradient, unit_gradient = vector_backward.input_gradient, matrix_backward.input_gradient
pack_sums, pack_strips = matrix_backward.pack_activations, vector_backward.pack_activations


def pack_transposed_inputs(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    """Pack vector groups `first` to `last` of weight_ih for the unit that computes dx."""
    if a.dpreact_row_steps != 0:
        pack_columns(a, weight, weight_row, N, of_h, packed, first, last, scratch)
    else:
        pack_vectors(a, weight, weight_row, N, of_h, packed, first, last, scratch)


def store_dpreact(a, p, s, b, rows, dpre, phase):
    """Store dpreact (rows, 4, lanes) of panel p, step s and rows from `b` on as operands of the bf16 unit."""
    if a.dpreact_row_steps != 0:
        store_dpreact_rows(a, p, s, b, rows, dpre, 0, a.preacts)
    store_dpreact_columns(a, p, s, b, rows, dpre)


def pack_activations(a, chunk, thread, threads, scratch):
    """Pack this thread's share of x, h and ones of a time chunk, for the unit that computes the weight gradients."""
    if a.dweights != 0:
        pack_sums(a, chunk, thread, threads, scratch)
    else:
        pack_strips(a, chunk, thread, threads, scratch)


def add_gradients(a, scratch, chunk, rows, thread, threads):
    """Add this thread's share of a time chunk to the weight gradients, and compute that of dx."""
    panels, s, s_last = a.panels, chunk * a.chunk, min((chunk + 1) * a.chunk, a.T)
    call(a.configure, 16)
    add_accumulators(a, chunk, thread, threads)
    if a.dpreact_row_steps != 0:
        unit_gradient(a, scratch, s, s_last, thread, threads)
    call(a.release)
    if a.dweights == 0 and a.strips != 0:
        strips = a.strips + chunk % a.ring * a.strips_bytes
        first, last = share(panels, thread, threads), share(panels, thread + 1, threads)
        write_weight_gradients(a, strips, scratch, first, last)
    if a.dpreact_row_steps == 0 and a.dx != 0:
        vector_gradient(a, scratch, s, s_last, thread, threads)


PRODUCTS = BackwardProducts(
    False, pack_transposed, pack_transposed_inputs, dpreact_target, store_dpreact, back_product,
    pack_activations, add_gradients,
)  # fmt: skip
