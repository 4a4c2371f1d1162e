"""How gates and dpreact lie in memory, and the primitives for what lies so."""

from fastlstm.backends.numba.kernels.shared import VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call

STREAMED = 6 << 20  # bytes of gates that would take the caches from what is wanted sooner, and be gone when they are


@jit
def vectors_of(a, p):
    """Vectors that the gates of panel p make. A last panel that is not full has its gates side by side, so that a
    product takes no more vectors than it needs.
    """
    return a.tail if (p + 1) * a.lanes > a.H else 4


@jit
def gate_at(a, p, gate):
    """Where a gate lies in a row of panel p."""
    return gate * VECTOR if vectors_of(a, p) == 4 else gate * (a.H - p * a.lanes) * a.size


@jit
def spread(a, p, rows, source, target):
    """Rows of the last panel's gates side by side to (rows, 4, lanes)."""
    wide, valid = vectors_of(a, p) * VECTOR, a.H - p * a.lanes
    for gate in range(4):
        at = source + gate_at(a, p, gate)
        call(a.copy_rows, rows, valid, a.lanes, at, wide, target + gate * VECTOR, 4 * VECTOR)


@jit
def gather(a, p, rows, source, target):
    """(rows, 4, lanes) of the last panel to its gates side by side, zeros after them."""
    L, vectors, valid = a.lanes, vectors_of(a, p), a.H - p * a.lanes
    for gate in range(4):
        to = target + gate_at(a, p, gate)
        call(a.copy_rows, rows, valid, valid, source + gate * VECTOR, 4 * VECTOR, to, vectors * VECTOR)
    to = target + 4 * valid * a.size
    call(a.copy_rows, rows, 0, vectors * L - 4 * valid, source, 0, to, vectors * VECTOR)


@jit
def dpreact_of(a, p, s, b):
    """Where dpreact of panel p, step s and row b lies: of `kept` steps, each panel's rows side by side."""
    return a.dpreact + p * a.kept * a.B * 4 * VECTOR + (s % a.kept * a.B + b) * vectors_of(a, p) * VECTOR


@jit
def product_of(a, vectors):
    """The product for so many vectors."""
    if vectors == 4:
        return a.product4
    return a.product3 if vectors == 3 else a.product2 if vectors == 2 else a.product1


@jit
def lone_of(a, vectors):
    """The product of a lone row for so many vectors."""
    if vectors == 4:
        return a.lone4
    return a.lone3 if vectors == 3 else a.lone2 if vectors == 2 else a.lone1


@jit
def cell_forward_of(a):
    """The cells' forward pass, and how it leaves gates, which nobody reads before the backward pass: by then threads
    have met, at locked instructions, which such stores wait for.
    """
    if a.gates == 0:
        return a.cell_forward
    size = a.T * ((a.H + a.lanes - 1) // a.lanes) * a.rows * 4 * VECTOR
    # such stores want whole vectors where they belong, as memory of this size has them
    return a.cell_forward_streaming if size > STREAMED and a.gates % VECTOR == 0 else a.cell_forward_saving
