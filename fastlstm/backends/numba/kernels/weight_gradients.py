"""What each thread does of a time chunk for the gradients of the weights and of x; the accumulators of the first, and
how they become gradients. The sums over few pairs do without them.
"""

from typing import Any

from fastlstm.backends.numba.constants import ONE_OFFSET, ROW_BLOCK
from fastlstm.backends.numba.kernels.layout import (
    block_hh,
    block_ih,
    columns_of_h,
    count_row_groups,
    count_vector_groups,
    dpreact_address,
    first_h_preact,
    first_vector,
    gate_offset,
    gemm_of,
    head_begin,
    head_end,
    multiply,
    param_sums_address,
    seen_begin,
    vectors_of,
)
from fastlstm.backends.numba.kernels.products import BackwardProducts
from fastlstm.backends.numba.kernels.row_masks import rows_to_last_active
from fastlstm.backends.numba.kernels.shared import VECTOR, element_bytes, write_rows
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


def accumulator_row_bytes(a):
    return a.accumulator_vectors * VECTOR


def accumulator_address(a, k_set, p):
    """Return the address of the accumulators of panel p in one split-K set."""
    return a.dweights + (k_set * a.panels + p) * a.accumulator_rows * accumulator_row_bytes(a)


def strips_address(a, chunk):
    """Return the address of the strips of a time chunk."""
    return a.strips + chunk % a.ring * a.strips_bytes


def unpack_weight(a, scratch, accumulators, width, units, weight):
    """Transpose accumulators (width, gates, lanes) of one gate into its rows of a weight's gradient."""
    L, row_stride = a.lanes, accumulator_row_bytes(a)
    for k in range(0, width, L):
        column_count, source = min(L, width - k), accumulators + k * row_stride
        if a.is_bfloat16 != 0:
            call(a.transpose, column_count, units, source, row_stride, scratch, VECTOR)
            call(a.narrow, units, column_count, scratch, VECTOR, weight + k * 2, width * 2)
        else:
            call(a.transpose, column_count, units, source, row_stride, weight + k * a.size, width * a.size)


def unpack_weight_of_heads(a, scratch, p, accumulators, first_column, units, D, weight):
    """Transpose accumulators (columns, gates, lanes) of one gate and panel, from `first_column` on, into rows of a
    weight's gradient, of `units` in all, which have the D columns of their own head.
    """
    unit, last = p * a.lanes, min((p + 1) * a.lanes, units)
    while unit < last:  # of one head
        end, row = head_end(a, unit, last), head_begin(a, unit) - first_column
        source = accumulators + (unit - p * a.lanes) * a.size + row * accumulator_row_bytes(a)
        unpack_weight(a, scratch, source, D, end - unit, weight + unit * D * element_bytes(a))
        unit = end


def write_vector(a, units, source, target):
    """Write a panel of the gradient of a bias or param, or add it to what is there."""
    if a.accumulates != 0:
        call(a.add_rows, 1, units, source, 0, target, 0)
    else:
        call(a.copy_rows, 1, units, units, source, 0, target, 0)


def write_vectors(a, p, ones):
    """Write panel p of the wanted gradients of biases and params: biases from `ones`, the accumulators of the ones."""
    size, unit = a.size, p * a.lanes
    valid = min(a.lanes, a.H - unit)
    for k in range(a.x_preacts if a.dbias_ih != 0 else 0):
        write_vector(a, valid, ones + gate_offset(a, p, k), a.dbias_ih + (block_ih(a, k) * a.H + unit) * size)
    for k in range(a.h_preacts if a.dbias_hh != 0 else 0):
        source = ones + gate_offset(a, p, first_h_preact(a) + k)
        write_vector(a, valid, source, a.dbias_hh + (block_hh(a, k) * a.H + unit) * size)
    total, stride = param_sums_address(a, p, 0), a.panels * a.params * VECTOR
    if a.params != 0:
        call(a.add_rows, count_row_groups(a) - 1, a.params * a.lanes, total + stride, stride, total, 0)
    for k in range(a.params):
        dparam = get_int64(a.dparam_addresses + 8 * k)
        if dparam != 0:
            write_vector(a, valid, total + k * VECTOR, dparam + unit * size)


def unpack_weight_gradients(a, scratch, p_first, p_last):
    """Write the wanted gradients of weights, biases and params of panels `p_first` to `p_last` from accumulators."""
    L, I, H, h_columns = a.lanes, a.I, a.H, columns_of_h(a)
    # without the bf16 unit a panel's accumulators have no rows for the columns of h that it does not see
    unseen = h_columns - min(a.span, h_columns) if a.components == 0 else 0
    D = h_columns if a.heads == 1 else a.head  # the number of columns of weight_hh
    element, row_stride = element_bytes(a), accumulator_row_bytes(a)
    for p in range(p_first, p_last):
        accumulators, valid = accumulator_address(a, 0, p), min(L, H - p * L)
        if a.split_k == 2:  # the unused ends of narrower rows are added too
            width = a.accumulator_rows * accumulator_row_bytes(a) // a.size
            call(a.add_rows, 1, width, accumulator_address(a, 1, p), 0, accumulators, 0)
        for gate in range(a.x_preacts if a.dweight_ih != 0 else 0):
            source, row = accumulators + gate_offset(a, p, gate), block_ih(a, gate) * H + p * L
            unpack_weight(a, scratch, source, I, valid, a.dweight_ih + row * I * element)
        h_accumulators = accumulators + a.first_h_row * accumulator_row_bytes(a)
        for gate in range(a.h_preacts if a.dweight_hh != 0 else 0):
            source, target = (
                h_accumulators + gate_offset(a, p, gate),
                a.dweight_hh + block_hh(a, gate) * H * D * element,
            )
            first_column = seen_begin(a, p) if a.components == 0 else 0
            unpack_weight_of_heads(a, scratch, p, source, first_column, H, D, target)
        write_vectors(a, p, accumulators + (a.ones_row - unseen) * row_stride)


def write_columns(a, scratch, rows, dpre, dpre_row, packed, weight, column, width):
    """Write rows of one gate and panel of a weight's gradient (gates H, `width`), from columns of [x, h], or add them
    to what is there.
    """
    size, count, wide, row = a.size, a.T * a.B, 4 * a.lanes, width * a.size
    for k in range(column // wide * wide, column + width, wide):
        begin = max(k, column)
        target, valid = weight + (begin - column) * size, min(k + wide, column + width) - begin
        out, out_row = target, row
        if valid < wide:  # whole vectors would reach into the next row
            out, out_row = scratch, 4 * VECTOR
        part = scratch + (begin - k) * size
        init, init_row = a.constants, 0
        if a.accumulates != 0:
            init, init_row = out, out_row
            if valid < wide:
                call(a.copy_rows, rows, valid, valid, target, row, part, 4 * VECTOR)
        multiply(
            a, a.gemm4, rows, init=init, init_row=init_row, out=out, out_row=out_row,
            w=packed + k // wide * count * 4 * VECTOR, w_row=4 * VECTOR, x=dpre, x_row=size, x_column=dpre_row,
            columns=count,
        )  # fmt: skip
        if valid < wide:
            call(a.copy_rows, rows, valid, valid, part, 4 * VECTOR, target, row)


def write_weight_gradients(a, packed, scratch, p_first, p_last):
    """Write panels of the wanted gradients of weights, biases and params, summed over few pairs straight into the
    weights' layout, with the sums of `vector_backward.add_weight_gradients`: accumulators would be most of the work.
    What they are added to must not change in a call that runs again.
    """
    if a.accumulates != 0 and a.mismatches != 0 and get_int64(a.mismatches) != 0:
        return
    L, size, I, H, D, count = a.lanes, a.size, a.I, a.H, a.head, a.T * a.B
    h_strips = packed + a.first_h_row * count * size
    for p in range(p_first, p_last):
        valid, dpreact, vectors = min(L, H - p * L), dpreact_address(a, p, 0, 0), vectors_of(a, p, a.preacts)
        dpre_row = vectors * VECTOR
        for gate in range(a.x_preacts if a.dweight_ih != 0 else 0):
            weight = a.dweight_ih + (block_ih(a, gate) * H + p * L) * I * size
            write_columns(a, scratch, valid, dpreact + gate_offset(a, p, gate), dpre_row, packed, weight, 0, I)
        for gate in range(a.h_preacts if a.dweight_hh != 0 else 0):
            row, unit, source = block_hh(a, gate) * H, p * L, dpreact + gate_offset(a, p, first_h_preact(a) + gate)
            while unit < p * L + valid:  # of one head
                end, weight = head_end(a, unit, p * L + valid), a.dweight_hh + (row + unit) * D * size
                dpre = source + (unit - p * L) * size
                write_columns(a, scratch, end - unit, dpre, dpre_row, h_strips, weight, head_begin(a, unit), D)
                unit = end
        if a.dbias_ih != 0 or a.dbias_hh != 0:
            for q in range(count_vector_groups(vectors)):
                v = first_vector(vectors, q)
                multiply(
                    a, gemm_of(a, first_vector(vectors, q + 1) - v), rows=1, init=a.constants, init_row=0,
                    out=scratch + v * VECTOR, out_row=0, w=dpreact + v * VECTOR, w_row=dpre_row,
                    x=a.constants + ONE_OFFSET, x_row=0, x_column=0, columns=count,
                )  # fmt: skip
        write_vectors(a, p, scratch)


def add_gradients_with(products: BackwardProducts) -> Any:
    is_on_bf16_unit, back_product, add_weight_gradients = (
        products.is_on_bf16_unit, products.back_product, products.add_weight_gradients,
    )  # fmt: skip

    def input_gradient(a, scratch, s_first, s_last, thread, threads):
        """Compute dx for a time chunk: this thread's share of its pairs."""
        L, element, I, B, T = a.lanes, element_bytes(a), a.I, a.B, a.T
        vectors = (I + L - 1) // L
        pairs = (s_last - s_first) * B
        first, last = share(pairs, thread, threads), share(pairs, thread + 1, threads)
        q_first, q_last = 0, count_vector_groups(vectors)
        if pairs == 1:  # threads share its columns instead
            first, last, q_first, q_last = 0, 1, share(q_last, thread, threads), share(q_last, thread + 1, threads)
        while first < last:
            s, b = s_first + first // B, first % B
            # The rows of the next step follow those of this one: so register tiles are full even if a batch has few
            # rows. With lengths a block ends with its step, of which only the rows to the last active one are computed.
            count = min(ROW_BLOCK if a.lengths == 0 else min(ROW_BLOCK, B - b), last - first)
            active = rows_to_last_active(a, T - 1 - s if a.reverse != 0 else s, b, count)
            for q in range(q_first, q_last):
                column = first_vector(vectors, q) * L
                width = min((first_vector(vectors, q + 1) - first_vector(vectors, q)) * L, I - column)
                back_product(a, active, b, s, False, a.packed_ih, vectors, q, scratch)
                call(a.copy_rows, count - active, 0, width, scratch, 0, scratch + active * 4 * VECTOR, 4 * VECTOR)
                done = 0
                while done < count:
                    s_done, row = s_first + (first + done) // B, (first + done) % B
                    t, run = T - 1 - s_done if a.reverse != 0 else s_done, min(B - row, count - done)
                    target = a.dx + ((t * a.rows + row) * I + column) * element
                    write_rows(a, run, width, scratch + done * 4 * VECTOR, 4 * VECTOR, target, I * element)
                    done += run
            first += count

    def add_gradients(a, scratch, chunk, rows, thread, threads):
        """Add this thread's share of a time chunk to the gradients of the weights, and compute that of dx. `rows`: the
        rows of the thread's team.
        """
        panels = a.panels
        if is_on_bf16_unit:
            call(a.configure, 16)
        if a.dweights != 0:
            for k_set in range(a.split_k):  # a thread gets, as far as possible, sums over rows that it has computed
                first = max(share(a.split_k * panels, thread, threads) - k_set * panels, 0)
                last = min(share(a.split_k * panels, thread + 1, threads) - k_set * panels, panels)
                add_weight_gradients(a, chunk, k_set, first, last)
        elif not is_on_bf16_unit and a.strips != 0:
            first, last = share(panels, thread, threads), share(panels, thread + 1, threads)
            write_weight_gradients(a, strips_address(a, chunk), scratch, first, last)
        if a.dx != 0:
            input_gradient(a, scratch, chunk * a.chunk, min((chunk + 1) * a.chunk, a.T), thread, threads)
        if is_on_bf16_unit:
            call(a.configure, max(rows, 1))

    return add_gradients
