"""What the forward and backward kernels share: who does which part, waiting, and the step mask."""

from typing import Any

from numba import njit
from numba.core.types import unliteral

from fastlstm.backends.numba.intrinsics import add_atomic, call, call_int, get_int32, load_atomic
from fastlstm.backends.numba.simd import VECTOR_BYTES

VECTOR = VECTOR_BYTES
# Batch rows that pass a panel together, and rows of packed weights in a block: 16 KB of these whatever a vector's size
# and, at 32 bytes, 8 KB of sums, so that both stay in a 32 KB L1 cache while the rows' tiles are computed. A lower tile
# wants longer sums: 3 rows took up to 1.2 times as long in blocks of half of that.
CHUNK, BLOCK_K = 64, 4096 // VECTOR
BLOCK_STEPS = 2  # steps of k whose operands stay in a 48 KB L1 cache while all their tiles are multiplied: 24 + 12 KB
FOLD = 8  # chunks of steps that the matrix unit sums together
STREAMED = 6 << 20  # bytes of gates that would take the caches from what is wanted sooner, and be gone when they are
RESET, HOLD = 1, 2
ONE = 1024  # where the constants' one lies, after the zeros


def jit(function: Any) -> Any:
    """For functions that kernels call: compiled without wrappers, which Python would need (it has `py_func`), and once,
    not for each constant that they are called with. The loops take 8 s for 13.
    """
    options: Any = {"boundscheck": False, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = njit(**options)(function)
    for_types = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: for_types((*map(unliteral, args),), kws)
    return compiled


def named_for(what: object) -> Any:
    """A decorator that names a function for what it closes over. Functions of one name that numba's cache keeps from
    different processes can be taken for each other: a kernel then ran another's code.
    """

    def name(function: Any) -> Any:
        function.__qualname__ = f"{function.__qualname__}.{what}"
        return function

    return name


@jit
def share(count, part, parts):
    """The first of `count` things that belongs to `part` of `parts`."""
    return count * part // parts


@jit
def share_rows(count, part, parts):
    """As `share`, in pairs, so that no pair of rows is split."""
    return min(count, 2 * share((count + 1) // 2, part, parts))


@jit
def operand_steps(I, H):
    """Steps of 32 columns that x and h make for the matrix unit, each padded to 16."""
    return ((I + 15) // 16 + (H + 15) // 16 + 1) // 2


@jit
def arrive(barrier, threads):
    """Tell `wait_for` that this thread is there."""
    if threads > 1:
        add_atomic(barrier, 1)


@jit
def wait_for(barrier, threads, times, relax):
    """Return when `threads` threads have arrived `times` times. The counter only grows; a spin yields."""
    if threads > 1:
        spins = 0
        while load_atomic(barrier) < threads * times:
            spins += 1
            if spins > 2000 and relax != 0:
                call_int(relax)


@jit
def wait(barrier, threads, passed, relax):
    """Return when `threads` threads have called this for the (`passed` + 1)th time."""
    arrive(barrier, threads)
    wait_for(barrier, threads, passed + 1, relax)
    return passed + 1


@jit
def any_row(mask, rows, value):
    """True where a row of this step has this mask value; False without a mask."""
    if mask != 0:
        for r in range(rows):
            if get_int32(mask + 4 * r) == value:
                return True
    return False


@jit
def rows_alive(mask, rows):
    """How many rows there are up to the last that is not held: those of sequences sorted by length that go on."""
    if mask != 0:
        while rows > 0 and get_int32(mask + 4 * (rows - 1)) == HOLD:
            rows -= 1
    return rows


@jit
def steps_before(a, rows):
    """Steps of the first `rows` batch rows, where those that go on come first at every step."""
    steps = 0
    for t in range(a.T):
        mask, low, high = a.mask + t * a.rows * 4, 0, rows
        while low < high:
            middle = (low + high) // 2
            if get_int32(mask + 4 * middle) == HOLD:
                high = middle
            else:
                low = middle + 1
        steps += low
    return steps


@jit
def begin_alive(a, total, part, parts):
    """The first batch row of a part, an even one: before it lies the part's share of all steps. One part's end is the
    next one's begin; rows without a step are the last part's.
    """
    if part == parts:
        return a.B
    low, high = 0, (a.B + 1) // 2
    while low < high:
        middle = (low + high) // 2
        if steps_before(a, 2 * middle) * parts < total * part:
            low = middle + 1
        else:
            high = middle
    return min(2 * low, a.B)


@jit
def share_rows_alive(a, part, parts):
    """The first batch row of a part and of the next. Where sequences are sorted by length, as packed ones are, parts
    have as many steps of theirs, not as many rows.
    """
    first, last = share_rows(a.B, part, parts), share_rows(a.B, part + 1, parts)
    if a.mask == 0 or parts == 1:
        return first, last
    total = 0
    for t in range(a.T):
        mask = a.mask + t * a.rows * 4
        alive = rows_alive(mask, a.B)
        if any_row(mask, alive, HOLD):
            return first, last
        total += alive
    if total == a.T * a.B:
        return first, last
    return begin_alive(a, total, part, parts), begin_alive(a, total, part + 1, parts)


@jit
def item(a, narrow):
    """Bytes of an element, of 16 bits if `narrow`."""
    return 2 if narrow != 0 else a.size


@jit
def read_rows(a, narrow, rows, valid, width, source, source_row, target, target_row):
    """`valid` elements of each row, then zeros up to `width`."""
    if narrow != 0:
        call(a.widen, rows, valid, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, valid, width, source, source_row, target, target_row)


@jit
def write_rows(a, narrow, rows, width, source, source_row, target, target_row):
    """`width` elements of each row, rounded if `narrow`."""
    if narrow != 0:
        call(a.narrow, rows, width, source, source_row, target, target_row)
    else:
        call(a.copy_rows, rows, width, width, source, source_row, target, target_row)


@jit
def is_zero(rows, width, source, source_row):
    """Whether `width` bytes of each row are zero: then a product of finite weights with them is left out, and no sum
    differs.
    """
    for r in range(rows if source_row != 0 else min(rows, 1)):
        found = 0
        for k in range(0, width, 4):
            found |= get_int32(source + r * source_row + k)
        if found != 0:
            return False
    return True


@jit
def zero_rows(a, rows, width, mask, value, target, target_row):
    """Zero the rows whose step has this mask value."""
    for r in range(rows):
        if get_int32(mask + 4 * r) == value:
            call(a.copy_rows, 1, 0, width, target, 0, target + r * target_row, 0)


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
