"""How the sums of a cell and their gradients lie in memory, and the primitives for what lies so."""

from fastlstm.backends.numba.kernels.shared import VECTOR, jit
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64

STREAMED = 6 << 20  # bytes of gates that would take the caches from what is wanted sooner, and be gone when they are


@jit
def terms_of(a):
    """How many vectors a row of dpreact has: a gradient of each sum, then a term of each param's."""
    return a.sums + a.params


@jit
def is_compact(a, p):
    """Whether panel p, a last one that is not full, has its sums side by side, so that a product takes no more vectors
    than it needs.
    """
    return a.dense != 0 and (p + 1) * a.lanes > a.H


@jit
def vectors_of(a, p, count):
    """Vectors that `count` sums of panel p make."""
    return (count * (a.H - p * a.lanes) + a.lanes - 1) // a.lanes if is_compact(a, p) else count


@jit
def gate_at(a, p, gate):
    """Where a sum lies in a row of panel p."""
    return gate * (a.H - p * a.lanes) * a.size if is_compact(a, p) else gate * VECTOR


@jit
def count_vector_groups(vectors):
    """How many groups of at most 4 vectors a row of `vectors` makes."""
    return (vectors + 3) // 4


@jit
def first_vector(vectors, q):
    """The first vector of group q.

    Groups are 4 or 3 wide wherever they can be: a lone vector would leave the tile idle.
    """
    if vectors <= 4:  # a division would take as long as a product of a row
        return q * vectors
    return (vectors * q + count_vector_groups(vectors) - 1) // count_vector_groups(vectors)


@jit
def first_h_preact(a):
    """The first sum that h is multiplied for."""
    return a.sums - a.of_h


@jit
def columns_of_h(a):
    """Columns of h that are multiplied, 0 where there is no weight_hh."""
    return a.H if a.of_h != 0 else 0


@jit
def head_begin(a, unit):
    """The first unit of the head that has this unit, and the first column of h that the unit sees."""
    return 0 if a.heads == 1 else unit // a.head * a.head


@jit
def head_end(a, unit, last):
    """The end of that head's units, `last` at most."""
    return last if a.heads == 1 else min(head_begin(a, unit) + a.head, last)


@jit
def seen_from(a, p):
    """The first of the columns of h that panel p multiplies: those of its units' heads."""
    return head_begin(a, p * a.lanes)


@jit
def seen_by(a, p):
    """How many columns of h panel p multiplies, at most `span`."""
    return a.H if a.heads == 1 else head_begin(a, min((p + 1) * a.lanes, a.H) - 1) + a.head - seen_from(a, p)


@jit
def spans_heads(a, p):
    """Whether panel p has units of several heads."""
    return a.heads > 1 and a.masked != 0 and seen_by(a, p) > a.head


@jit
def seen_alike(a, p, last):
    """The end of the panels from p on, before `last`, that multiply the same columns of h."""
    if a.heads == 1:
        return last
    end = p + 1
    while end < last and seen_from(a, end) == seen_from(a, p) and seen_by(a, end) == seen_by(a, p):
        end += 1
    return end


@jit
def summed_from(a, q):
    """The first of the panels whose dpreact column group q of h multiplies: those of its columns' heads."""
    return head_begin(a, first_vector(a.panels, q) * a.lanes) // a.lanes


@jit
def summed_by(a, q):
    """How many panels these are, at most `reach`."""
    if a.heads == 1:
        return a.panels
    end = head_begin(a, min(first_vector(a.panels, q + 1) * a.lanes, a.H) - 1) + a.head  # of the units
    return (end + a.lanes - 1) // a.lanes - summed_from(a, q)


@jit
def block_ih(a, k):
    """Which block of weight_ih the k-th sum of x has."""
    return get_int64(a.blocks + 8 * k)


@jit
def block_hh(a, k):
    """Which block of weight_hh the k-th sum of h has."""
    return get_int64(a.blocks + 8 * (a.of_x + k))


@jit
def expand(a, p, rows, source, target):
    """Rows of the last panel's sums side by side to (rows, S, lanes)."""
    wide, valid = vectors_of(a, p, a.sums) * VECTOR, a.H - p * a.lanes
    for gate in range(a.sums):
        at = source + gate_at(a, p, gate)
        call(a.copy_rows, rows, valid, a.lanes, at, wide, target + gate * VECTOR, a.sums * VECTOR)


@jit
def gather(a, p, rows, source, target):
    """dpreact (rows, S + P, lanes) of the last panel to its terms side by side, zeros after them."""
    L, terms, valid = a.lanes, terms_of(a), a.H - p * a.lanes
    vectors = vectors_of(a, p, terms)
    for gate in range(terms):
        to = target + gate_at(a, p, gate)
        call(a.copy_rows, rows, valid, valid, source + gate * VECTOR, terms * VECTOR, to, vectors * VECTOR)
    to = target + terms * valid * a.size
    call(a.copy_rows, rows, 0, vectors * L - terms * valid, source, 0, to, vectors * VECTOR)


@jit
def dpreact_of(a, p, s, b):
    """Where dpreact of panel p, step s and row b lies: of `kept` steps, each panel's rows side by side."""
    terms = terms_of(a)
    return a.dpreact + p * a.kept * a.B * terms * VECTOR + (s % a.kept * a.B + b) * vectors_of(a, p, terms) * VECTOR


@jit
def panel_saved(a, rows, t, p, b):
    """Where what is saved of panel p lies, from row b of step t on, of `rows` rows. What a row's units share is
    saved as if of a panel behind all others.
    """
    return a.gates + ((t * a.gate_panels + p) * rows + b) * a.saved * VECTOR


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
def rows_forward_of(a):
    """The forward pass of what is the same for all units of a row."""
    return a.rows_forward if a.gates == 0 else a.rows_forward_saving


@jit
def cell_forward_of(a):
    """The cells' forward pass, and how it leaves gates, which nobody reads before the backward pass: by then threads
    have met, at locked instructions, which such stores wait for.
    """
    if a.gates == 0:
        return a.cell_forward
    if a.phases > 1:  # which read some again
        return a.cell_forward_saving
    size = a.T * a.panels * a.rows * a.saved * VECTOR
    # such stores want whole vectors where they belong, as memory of this size has them
    return a.cell_forward_streaming if size > STREAMED and a.gates % VECTOR == 0 else a.cell_forward_saving
