"""What the backward pass's products have in common: groups of columns, sums of weight gradients and where they go."""

from fastlstm.backends.numba.kernels.layout import gate_at
from fastlstm.backends.numba.kernels.shared import VECTOR, item, jit
from fastlstm.backends.numba.llvm.intrinsics import call


@jit
def groups_of(vectors):
    """How many groups of at most 4 vectors a row of `vectors` makes."""
    return (vectors + 3) // 4


@jit
def group(vectors, q):
    """The first vector of group q.

    Groups are 4 or 3 wide wherever they can be: a lone vector would leave the tile idle.
    """
    return (vectors * q + groups_of(vectors) - 1) // groups_of(vectors)


@jit
def sum_at(a, half, p):
    """Where the sum of panel p over half of the batch rows lies."""
    panels = (a.H + a.lanes - 1) // a.lanes
    return a.dweights + (half * panels + p) * a.sum_rows * 4 * VECTOR


@jit
def unpack_weight(a, scratch, of_sums, width, units, weight):
    """Sums (width, 4, lanes) of one gate to its rows of a weight's gradient."""
    L = a.lanes
    for k in range(0, width, L):
        columns, source = min(L, width - k), of_sums + k * 4 * VECTOR
        if a.narrow_weights != 0:
            call(a.transpose, columns, units, source, 4 * VECTOR, scratch, VECTOR)
            call(a.narrow, units, columns, scratch, VECTOR, weight + k * 2, width * 2)
        else:
            call(a.transpose, columns, units, source, 4 * VECTOR, weight + k * a.size, width * a.size)


@jit
def unpack_weight_gradients(a, scratch, p_first, p_last):
    """Panels of dweights to dweight_ih, dweight_hh and dbias, those that are wanted."""
    L, S, I, H = a.lanes, a.size, a.I, a.H
    wide = item(a, a.narrow_weights)
    for p in range(p_first, p_last):
        if a.halves == 2:  # of a last panel that is not full, with what its fewer vectors leave unused
            call(a.add_rows, 1, a.sum_rows * 4 * L, sum_at(a, 1, p), 0, sum_at(a, 0, p), 0)
        for gate in range(4):
            row, valid = gate * H + p * L, min(L, H - p * L)
            at = sum_at(a, 0, p) + gate_at(a, p, gate)
            if a.dweight_ih != 0:
                unpack_weight(a, scratch, at, I, valid, a.dweight_ih + row * I * wide)
            if a.dweight_hh != 0:
                unpack_weight(a, scratch, at + a.sums_of_h * 4 * VECTOR, H, valid, a.dweight_hh + row * H * wide)
            if a.dbias != 0:
                call(a.copy_rows, 1, valid, valid, at + a.sum_of_one * 4 * VECTOR, 0, a.dbias + row * S, 0)
