"""How the pre-activations of a cell and their gradients lie in memory, and the primitives that work on them. As in all
kernels, `a` is the struct of a kernel's arguments, see `fields`, and VECTOR is the bytes of a vector.
"""

from fastlstm.backends.numba.constants import k_blocks_of
from fastlstm.backends.numba.kernels.shared import VECTOR, inlined
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64

# Saved gates of more bytes are stored past the caches. They would evict what is read sooner, and would themselves be
# evicted before they are read.
STREAMED = 6 << 20


def is_compact(a, p):
    """Return whether panel p is compact: a last, partly filled panel whose gates lie side by side."""
    return a.has_compact != 0 and (p + 1) * a.lanes > a.H


def vectors_of(a, p, count):
    """Return the number of vectors that `count` gates of panel p take."""
    return (count * (a.H - p * a.lanes) + a.lanes - 1) // a.lanes if is_compact(a, p) else count


def gate_offset(a, p, gate):
    """Return the offset of a gate in a row of panel p."""
    return gate * (a.H - p * a.lanes) * a.size if is_compact(a, p) else gate * VECTOR


def count_vector_groups(vectors):
    """Return the number of vector groups, of at most 4 vectors, in a row of `vectors`."""
    return (vectors + 3) // 4


def first_vector(vectors, q):
    """Return the first vector of vector group q. Groups have 4 or 3 vectors if possible, to fill a register tile."""
    if vectors <= 4:  # a division would take as long as a product of a row
        return q * vectors
    return (vectors * q + count_vector_groups(vectors) - 1) // count_vector_groups(vectors)


def first_h_preact(a):
    """Return the first pre-activation that has a product with h."""
    return a.preacts - a.h_preacts


def columns_of_h(a):
    """Return the number of columns of h that are multiplied, 0 without weight_hh."""
    return a.h_width if a.h_preacts != 0 else 0


def lanes_inside(a, p, width):
    """Return how many lanes of panel p lie inside a row of `width` units: all, but in the last panels."""
    return max(0, min(a.lanes, width - p * a.lanes))


def panels_of_h(a):
    """Return the number of panels of h: of all units, or in a projected layer of fewer."""
    return (a.h_width + a.lanes - 1) // a.lanes


def head_begin(a, unit):
    """Return the first unit of a unit's head, which is also the first column of h that the unit sees."""
    return 0 if a.heads == 1 else unit // a.head * a.head


def head_end(a, unit, last):
    """Return the end of the units of the head that `unit` is of, `last` at most."""
    return last if a.heads == 1 else min(head_begin(a, unit) + a.head, last)


def seen_begin(a, p):
    """Return the first of the columns of h that panel p multiplies: those of its units' heads."""
    return head_begin(a, p * a.lanes)


def seen_count(a, p):
    """Return the number of columns of h that panel p multiplies, at most `span`."""
    return a.h_width if a.heads == 1 else head_begin(a, min((p + 1) * a.lanes, a.H) - 1) + a.head - seen_begin(a, p)


def seen_of_value(a, p):
    """Return the number of columns of a value of the step that panel p multiplies."""
    return a.H if a.heads == 1 else seen_count(a, p)


def spans_heads(a, p):
    """Return whether panel p has units of several heads."""
    # the address of `masked` is 0 in a layer whose heads fill whole panels
    return a.heads > 1 and a.masked != 0 and seen_count(a, p) > a.head


def seen_alike(a, p, last):
    """Return the end of the panels from p on, before `last`, that multiply the same columns of h."""
    if a.heads == 1:
        return last
    end = p + 1
    while end < last and seen_begin(a, end) == seen_begin(a, p) and seen_count(a, end) == seen_count(a, p):
        end += 1
    return end


def first_unit(a, vectors, q, units):
    """Return the first of the `units`, all or those of a head, that multiply vector group q of `vectors` of columns.
    The bf16 unit runs heads of whole vector groups.
    """
    return 0 if units == a.H else first_vector(vectors, q) * a.lanes // units * units


def reach_begin(a, q):
    """Return the first panel of dpreact that is multiplied for vector group q of dh. Columns of h are seen by the units
    of their heads alone, so these are the panels with units of the heads that the group has columns of.
    """
    return head_begin(a, first_vector(a.panels, q) * a.lanes) // a.lanes


def reach_count(a, q):
    """Return how many panels of dpreact are multiplied for vector group q of dh, at most `reach`."""
    if a.heads == 1:
        return a.panels
    end = head_begin(a, min(first_vector(a.panels, q + 1) * a.lanes, a.H) - 1) + a.head  # of the units
    return (end + a.lanes - 1) // a.lanes - reach_begin(a, q)


def block(a, k):
    """Return entry k of the gate blocks."""
    return get_int64(a.gate_blocks + 8 * k)


def block_ih(a, k):
    """Return the gate block of weight_ih of the k-th pre-activation of x."""
    return block(a, k)


def block_hh(a, k):
    """Return the gate block of weight_hh of the k-th pre-activation of h."""
    return block(a, a.x_preacts + k)


def expand(a, p, rows, source, target):
    """Copy the rows of the compact panel's pre-activations to (rows, S, lanes)."""
    row_stride, valid = vectors_of(a, p, a.preacts) * VECTOR, a.H - p * a.lanes
    for gate in range(a.preacts):
        gates = source + gate_offset(a, p, gate)
        call(a.copy_rows, rows, valid, a.lanes, gates, row_stride, target + gate * VECTOR, a.preacts * VECTOR)


def compact(a, p, rows, source, target):
    """Copy dpreact (rows, S, lanes) of the last panel to its compact rows, with zeros after them."""
    L, gates, valid = a.lanes, a.preacts, a.H - p * a.lanes
    vectors = vectors_of(a, p, gates)
    for gate in range(gates):
        gate_target = target + gate_offset(a, p, gate)
        call(a.copy_rows, rows, valid, valid, source + gate * VECTOR, gates * VECTOR, gate_target, vectors * VECTOR)
    gate_target = target + gates * valid * a.size
    call(a.copy_rows, rows, 0, vectors * L - gates * valid, source, 0, gate_target, vectors * VECTOR)


def dpreact_address(a, p, s, b):
    """Return the address of dpreact of panel p, step s and row b. A panel's rows follow each other."""
    row, gates = s % a.dpreact_steps * a.B + b, a.terms
    return a.dpreact + p * a.dpreact_steps * a.B * gates * VECTOR + row * vectors_of(a, p, gates) * VECTOR


def dpreact_row_address(a, s, b, gate):
    """Return the address of row (s, b) of dpreact as a row operand, from K block 0 of a term on: it has room for
    `dpreact_row_steps` steps.
    """
    row = s % a.dpreact_row_steps * a.B + b
    return a.dpreact_rows + gate * k_blocks_of(a.H) * a.k_block_stride + row * 64


def count_row_groups(a):
    """Return the number of row groups, over each of which the gradients of params are summed from step to step."""
    return (a.B + a.group_rows - 1) // a.group_rows


def param_sums_address(a, p, b):
    """Return the address of the sums of the gradients of params, of panel p and of the row group of row b."""
    # `group_stride` is the stride of one row, and this is the group's first row, as group_rows is a power of two
    return a.param_sums + (b & -a.group_rows) * a.group_stride + p * a.params * VECTOR


def saved_address(a, rows, t, p, b):
    """Return the address of a panel's saved values. Those that a row's units share are those of one more panel."""
    return a.gates + ((t * a.gate_panels + p) * rows + b) * a.saved * VECTOR


@inlined
def multiply(a, kernel, rows, init, init_row, out, out_row, w, w_row, x, x_row, x_column, columns):
    """Store ``out = init + x w`` for `rows` rows, by a `kernel` of `gemm_of`. w has a row of vectors for each column of
    x. From one row to the next it is `_row` bytes, and `x_column` bytes from one column of x to the next.
    """
    call(kernel, rows, init, init_row, out, out_row, w, w_row, x, x_row, x_column, columns, 1, 0, 0, x, 0, 0)


@inlined
def multiply_blocks(
    a, kernel, rows, init, init_row, out, out_row, w, w_row, x, x_row, x_column, columns, blocks, x_block, w_block
):  # fmt: skip
    """Do as `multiply`, in one sum over `blocks` blocks of columns: `x_block` bytes apart in x, and `w_block` in w."""
    call(
        kernel, rows, init, init_row, out, out_row, w, w_row, x, x_row, x_column, columns, blocks, x_block, w_block,
        x, 0, 0,
    )  # fmt: skip


def gemm_of(a, vectors):
    """Return the kernel of products of rows for `vectors` vectors."""
    if vectors == 4:
        return a.gemm4
    return a.gemm3 if vectors == 3 else a.gemm2 if vectors == 2 else a.gemm1


def gemv_of(a, vectors):
    """Return the product of one row for `vectors` vectors."""
    if vectors == 4:
        return a.gemv4
    return a.gemv3 if vectors == 3 else a.gemv2 if vectors == 2 else a.gemv1


def rows_forward_of(a):
    """Return the primitive that computes the values which a row's units share in the forward pass."""
    return a.rows_forward if a.gates == 0 else a.rows_forward_saving


def cell_forward_of(a):
    """Return the cell's forward primitive, which saves nothing, saves, or saves past the caches. Such stores need no
    fence: threads synchronize with locked instructions before the backward pass reads them.
    """
    if a.gates == 0:
        return a.cell_forward
    size = a.T * a.panels * a.rows * a.saved * VECTOR
    # such stores need aligned vectors, which memory of this size has
    return a.cell_forward_streaming if size > STREAMED and a.gates % VECTOR == 0 else a.cell_forward_saving
