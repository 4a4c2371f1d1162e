"""The backward pass's products with some of them on the matrix unit, the rest on the processor's own vectors.

On the unit are sums over many rows, for the weights, and the gradient of x where the forward pass has x's products
there, see `host.input_pieces`. Neither makes a row's own gradients depend on which rows there are.
"""

from fastlstm.backends.numba.kernels import matrix_backward, vector_backward
from fastlstm.backends.numba.kernels.matrix_backward import add_sums, store_dpreact_columns, store_dpreact_rows
from fastlstm.backends.numba.kernels.outer import write_weight_gradients
from fastlstm.backends.numba.kernels.shared import jit
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.kernels.vector_backward import (  # noqa: F401  the kernel's
    back_product,
    dpreact_place,
    pack_transposed,
)
from fastlstm.backends.numba.llvm.intrinsics import call

pack_vectors, pack_columns = vector_backward.pack_transposed, matrix_backward.pack_transposed
vector_gradient, unit_gradient = vector_backward.input_gradient, matrix_backward.input_gradient
pack_sums, pack_strips = matrix_backward.pack_activations, vector_backward.pack_activations


@jit
def pack_transposed_inputs(a, weight, weight_row, N, of_h, packed, first, last, scratch):
    if a.rows_kept != 0:
        pack_columns(a, weight, weight_row, N, of_h, packed, first, last, scratch)
    else:
        pack_vectors(a, weight, weight_row, N, of_h, packed, first, last, scratch)


@jit
def store_dpreact(a, p, s, b, rows, dpre):
    if a.rows_kept != 0:
        store_dpreact_rows(a, p, s, b, rows, dpre)
    store_dpreact_columns(a, p, s, b, rows, dpre)


@jit
def pack_activations(a, chunk, thread, threads, scratch):
    """What the weight gradients of a chunk of steps are sums over, this thread's part of it."""
    if a.dweights != 0:
        pack_sums(a, chunk, thread, threads, scratch)
    else:
        pack_strips(a, chunk, thread, threads, scratch)


@jit
def add_gradients(a, scratch, chunk, rows, thread, threads):
    """This thread's part of the gradients of the weights and of x, for a chunk of steps that all have been through."""
    panels, s, s_last = a.panels, chunk * a.chunk, min((chunk + 1) * a.chunk, a.T)
    call(a.configure, 16)
    add_sums(a, chunk, thread, threads)
    if a.rows_kept != 0:
        unit_gradient(a, scratch, s, s_last, thread, threads)
    call(a.release)
    if a.dweights == 0 and a.strips != 0:
        strips = a.strips + chunk % a.ring * a.strips_bytes
        first, last = share(panels, thread, threads), share(panels, thread + 1, threads)
        write_weight_gradients(a, strips, scratch, first, last)
    if a.rows_kept == 0 and a.dx != 0:
        vector_gradient(a, scratch, s, s_last, thread, threads)
