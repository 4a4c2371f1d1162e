"""The forward pass's products on the processor's own vectors: x and h are read where they lie.

A narrow x shares the K blocks of h, if every pre-activation has both products. Few rows multiply an x with K blocks of
its own for several steps at once, and a single row does so with any x.
"""

from fastlstm.backends.numba.kernels.heads import add_product_of_heads
from fastlstm.backends.numba.kernels.layout import (
    block,
    count_vector_groups,
    expand,
    first_h_preact,
    first_vector,
    gate_offset,
    gemm_of,
    gemv_of,
    head_begin,
    head_end,
    is_compact,
    lanes_inside,
    multiply,
    seen_alike,
    seen_begin,
    seen_count,
    spans_heads,
    vectors_of,
)
from fastlstm.backends.numba.kernels.products import ForwardProducts
from fastlstm.backends.numba.kernels.row_masks import rows_to_last_active
from fastlstm.backends.numba.kernels.shared import VECTOR, inlined
from fastlstm.backends.numba.kernels.states import scratch_slot
from fastlstm.backends.numba.llvm.intrinsics import call


def packed_hh_address(a, packed_index):
    """Return the address of a packed panel of weight_hh. `packed_index`: the panel, or the thread that packs it."""
    return a.packed + packed_index * a.span * a.h_preacts * VECTOR


def packed_ih_address(a, packed_index):
    """Return a packed panel of weight_ih, after all of weight_hh: with gaps a single row took 1.15 times as long."""
    return packed_hh_address(a, a.packed_panels) + packed_index * a.I * a.x_preacts * VECTOR


def biases_address(a, p):
    """Return the address of the biases (S, L) of panel p."""
    return a.biases + p * a.preacts * VECTOR


def pack_panel(a, p, weight, weight_row, units, columns, gates, first_block, has_heads, panel):
    """Pack panel p of a weight as [vector group][k][gate][lane], a compact panel as [k], its gates side by side.

    Units of several heads have zeros in the columns that only others see. `gates`: the weight's blocks of `units` rows,
    in the order of the gate blocks from `first_block` on. `has_heads`: a unit sees the columns of its head alone.
    """
    L, size = a.lanes, a.size
    valid, vectors = lanes_inside(a, p, units), vectors_of(a, p, gates)
    width, first_column = (a.head, seen_begin(a, p)) if has_heads and a.heads > 1 else (columns, 0)
    if valid < L or width < columns:
        call(a.copy_rows, 1, 0, columns * vectors * L, panel, 0, panel, 0)
    for q in range(count_vector_groups(vectors)):
        first, last = first_vector(vectors, q), first_vector(vectors, q + 1)
        target, stride = panel + first * columns * VECTOR, (last - first) * VECTOR
        for gate in range(first, gates if last == vectors else last):
            row = block(a, first_block + gate) * units
            gate_target, unit = target + gate_offset(a, p, gate) - first * VECTOR, p * L
            while unit < p * L + valid:
                column = head_begin(a, unit) if has_heads else 0
                end = head_end(a, unit, p * L + valid) if has_heads else p * L + valid
                unit_target = gate_target + (unit - p * L) * size + (column - first_column) * stride
                source = weight + (row + unit) * weight_row
                call(a.transpose, end - unit, width, source, weight_row, unit_target, stride)
                unit = end


def pack_hh(a, p, packed_index):
    panel, columns = packed_hh_address(a, packed_index), seen_count(a, p)
    pack_panel(a, p, a.weight_hh, a.hh_row_stride, a.H, columns, a.h_preacts, a.x_preacts, True, panel)


def pack_ih(a, p, packed_index):
    panel = packed_ih_address(a, packed_index)
    pack_panel(a, p, a.weight_ih, a.ih_row_stride, a.H, a.I, a.x_preacts, 0, False, panel)


def pack_weights(a, p, packed_index, scratch):
    pack_hh(a, p, packed_index)
    pack_ih(a, p, packed_index)


def input_preact_address(a, p, s, row):
    """Return the input projection of panel p at step s: an entry for each row if x has K blocks of its own, else two
    for the only row: x's whole K blocks, and the rest of x, in whose K block h follows.
    """
    entries = a.B if a.x_k_block != 0 else 2
    return a.input_preact + ((p * a.input_steps + s % a.input_steps) * entries + row) * a.preacts * VECTOR


def add_product(a, vectors, w, columns, first, last, block, rows, init, init_row, out, out_row, x, x_row):
    """Store ``out = init +`` columns `first` to `last` of x times a panel, by K blocks of `block` columns."""
    for q in range(count_vector_groups(vectors)):
        v, w_row = first_vector(vectors, q), (first_vector(vectors, q + 1) - first_vector(vectors, q)) * VECTOR
        k, begin_row = first, init_row
        kernel, begin, target = gemm_of(a, w_row // VECTOR), init + v * VECTOR, out + v * VECTOR
        while True:
            w_k, x_k, count = w + v * columns * VECTOR + k * w_row, x + k * a.size, min(block, last - k)
            multiply(
                a, kernel, rows, init=begin, init_row=begin_row, out=target, out_row=out_row, w=w_k, w_row=w_row,
                x=x_k, x_row=x_row, x_column=a.size, columns=count,
            )  # fmt: skip
            begin, begin_row, k = target, out_row, k + block
            if k >= last:
                break


def copy_preacts(a, first, last, rows, source, source_row, target, target_row):
    """Copy the pre-activations `first` to `last`, which have no product, of `rows` rows."""
    if first < last:
        offset, width = first * VECTOR, (last - first) * a.lanes
        call(a.copy_rows, rows, width, width, source + offset, source_row, target + offset, target_row)


def multiply_inputs(a, s, p, b_first, b_last):
    """Compute the input projection of an input block for panel p, if it begins at s: a row reads the weights once."""
    if a.input_steps != 0 and s % a.input_steps == 0:
        t, x_step = (a.T - 1 - s, -a.x_step_stride) if a.reverse != 0 else (s, a.x_step_stride)
        rows, x, biases, I = min(a.input_steps, a.T - s), a.x + t * a.x_step_stride, biases_address(a, p), a.I
        vectors, w, stride = vectors_of(a, p, a.x_preacts), packed_ih_address(a, p), a.preacts * VECTOR
        if a.x_k_block != 0:
            earliest = t - rows + 1 if a.reverse != 0 else s
            active = rows_to_last_active(a, earliest, b_first, b_last - b_first)  # in any of the steps
            for b in range(b_first, b_first + active):
                x_b, out, out_row = x + b * a.x_row_stride, input_preact_address(a, p, s, b), a.B * stride
                add_product(a, vectors, w, I, 0, I, a.x_k_block, rows, biases, 0, out, out_row, x_b, x_step)
                copy_preacts(a, a.x_preacts, a.preacts, rows, biases, 0, out, out_row)
        else:
            whole, out = I // a.k_block * a.k_block, input_preact_address(a, p, s, 0)
            if whole > 0:
                add_product(a, vectors, w, I, 0, whole, a.k_block, rows, biases, 0, out, 2 * stride, x, x_step)
            if whole < I:
                out += stride
                add_product(a, vectors, w, I, whole, I, a.k_block, rows, a.constants, 0, out, 2 * stride, x, x_step)


@inlined
def preact_of_row(a, s, p, packed_index, panels, step, b, out, x, h_in):
    """Compute the pre-activations of row b for panels from p on, with the bits of several. `step` is 1 or -1."""
    I, columns, stride = a.I, seen_count(a, p), step * a.preacts * VECTOR
    h_columns = columns if h_in != 0 else 0
    w_x, w_h = packed_ih_address(a, packed_index), packed_hh_address(a, packed_index)
    x_step, h_step = step * a.x_preacts * a.I * VECTOR, step * a.h_preacts * a.span * VECTOR
    init, init_step, part, part_step, first = biases_address(a, p), stride, a.constants, 0, a.k_block
    if a.input_steps != 0:
        rest = I % a.k_block if a.x_k_block == 0 else 0
        preact_step = input_preact_address(a, step, 0, 0) - input_preact_address(a, 0, 0, 0)
        if rest != I or a.x_k_block != 0:  # there are whole K blocks of x, or no columns of it at all
            init, init_step = input_preact_address(a, p, s, b), preact_step
        if rest != 0:
            part, part_step, first = input_preact_address(a, p, s, 1), preact_step, a.k_block - rest
        I = 0
        copy_preacts(a, 0, first_h_preact(a), panels, init, init_step, out, stride)
    elif a.x_k_block != 0:
        vectors = vectors_of(a, p, a.x_preacts)
        for q in range(count_vector_groups(vectors)):
            v = first_vector(vectors, q)
            call(
                gemv_of(a, first_vector(vectors, q + 1) - v), panels, init + v * VECTOR, init_step, out + v * VECTOR,
                stride, x, w_x + v * I * VECTOR, x_step, I, x, w_x, 0, 0, a.x_k_block, a.x_k_block, part, 0,
            )  # fmt: skip
        copy_preacts(a, a.x_preacts, a.preacts, panels, init, init_step, out, stride)
        init, init_step, I = out, stride, 0
    vectors, begin = vectors_of(a, p, a.h_preacts), first_h_preact(a) * VECTOR
    for q in range(count_vector_groups(vectors)):
        v = first_vector(vectors, q)
        call(
            gemv_of(a, first_vector(vectors, q + 1) - v), panels, init + begin + v * VECTOR, init_step,
            out + begin + v * VECTOR, stride, x, w_x + v * a.I * VECTOR, x_step, I, h_in, w_h + v * columns * VECTOR,
            h_step, h_columns, first, a.k_block, part + (v * VECTOR if part_step != 0 else 0), part_step,
        )  # fmt: skip


@inlined
def preact_of_only_row(a, s, p_first, p_last, scratch, x, h_in):
    """Compute the pre-activations of the only row for some full panels, one after the other in scratch."""
    if a.input_steps != 0 and s % a.input_steps == 0:
        for p in range(p_first, p_last):
            multiply_inputs(a, s, p, 0, 1)
    begin = p_first
    while begin < p_last:
        end, h, p, step = seen_alike(a, begin, p_last), h_in, begin, 1
        if h_in != 0:
            h += seen_begin(a, begin) * a.size
        if (s + a.flip) % 2 != 0:
            p, step = end - 1, -1
        out = scratch + (p - p_first) * a.preacts * VECTOR
        crosses = spans_heads(a, begin)
        preact_of_row(a, s, p, p, end - begin, step, 0, out, x, 0 if crosses else h)
        if crosses and h_in != 0:  # no two panels of several heads see the same columns
            of_h, w = out + first_h_preact(a) * VECTOR, packed_hh_address(a, p)
            add_product_of_heads(a, p, 1, of_h, a.preacts * VECTOR, a.h_preacts, w, h, 0)
        begin = end


@inlined
def preact_of_joint_blocks(a, p, packed_index, b, rows, init, out, stride, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p if x and h share K blocks."""
    size, I, vectors, columns = a.size, a.I, stride // VECTOR, seen_count(a, p)
    w_x, w_h, x_row = packed_ih_address(a, packed_index), packed_hh_address(a, packed_index), a.x_row_stride
    used = I + columns if h_in != 0 else I
    for q in range(count_vector_groups(vectors)):
        v, k, w_row = first_vector(vectors, q), 0, (first_vector(vectors, q + 1) - first_vector(vectors, q)) * VECTOR
        kernel, begin, begin_row, target = gemm_of(a, w_row // VECTOR), init + v * VECTOR, 0, out + v * VECTOR
        while True:
            k_last = min(k + a.k_block, used)
            x_columns, h_before = max(0, min(k_last, I) - k), max(0, k - I)  # columns of h in the K blocks before
            x_k, h_k = x + b * x_row + k * size, h_in + b * h_in_stride + h_before * size
            w, w_2 = w_x + v * I * VECTOR + k * w_row, w_h + v * columns * VECTOR + h_before * w_row
            call(
                kernel, rows, begin, begin_row, target, stride, w, w_row, x_k, x_row, size, x_columns, 1, 0, w_2 - w,
                h_k, h_in_stride, k_last - k - x_columns,
            )  # fmt: skip
            begin, begin_row, k = target, stride, k_last
            if k >= used:
                break


@inlined
def preact(a, s, p, packed_index, b, rows, scratch, x, h_in, h_in_stride):
    """Compute the pre-activations of panel p: see `products.ForwardProducts`."""
    out, stride, compact = scratch, vectors_of(a, p, a.preacts) * VECTOR, is_compact(a, p)
    if compact:
        out = scratch_slot(a, scratch, 0)
    init, init_row, x_row = biases_address(a, p), 0, a.x_row_stride
    h_of_heads, crosses = h_in, spans_heads(a, p)
    if crosses:
        h_in = 0
    if rows == 1:
        h = h_in + b * h_in_stride if h_in != 0 else 0
        preact_of_row(a, s, p, packed_index, 1, 1, b, out, x + b * x_row, h)
    elif a.x_k_block == 0:
        preact_of_joint_blocks(a, p, packed_index, b, rows, init, out, stride, x, h_in, h_in_stride)
    else:
        if a.input_steps != 0:
            init, init_row = input_preact_address(a, p, s, b), a.preacts * VECTOR
            copy_preacts(a, 0, first_h_preact(a), rows, init, init_row, out, stride)
        else:
            vectors, w, I = vectors_of(a, p, a.x_preacts), packed_ih_address(a, packed_index), a.I
            add_product(a, vectors, w, I, 0, I, a.x_k_block, rows, init, 0, out, stride, x + b * x_row, x_row)
            copy_preacts(a, a.x_preacts, a.preacts, rows, init, 0, out, stride)
            init, init_row = out, stride
        seen, begin = seen_count(a, p), first_h_preact(a) * VECTOR
        columns = seen if h_in != 0 else 0
        if columns != 0 or a.input_steps != 0:
            add_product(
                a, vectors_of(a, p, a.h_preacts), packed_hh_address(a, packed_index), seen, 0, columns, a.k_block,
                rows, init + begin, init_row, out + begin, stride, h_in + b * h_in_stride, h_in_stride,
            )  # fmt: skip
    if crosses and h_of_heads != 0:
        add_product_of_heads(
            a, p, rows, out + first_h_preact(a) * VECTOR, a.preacts * VECTOR, a.h_preacts,
            packed_hh_address(a, packed_index), h_of_heads + b * h_in_stride, h_in_stride,
        )  # fmt: skip
    if compact:
        expand(a, p, rows, out, scratch)


PRODUCTS = ForwardProducts(pack_weights, preact)
