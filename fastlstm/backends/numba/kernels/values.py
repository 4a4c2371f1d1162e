"""Products of values that a step computes, between two phases of its cell.

A phase stores such a value as rows of H units, the operand. The product of all its units with all weights of the value
is there when the next phase begins. In the backward pass a phase stores the gradients of products beside dpreact, and
their product with the transposed weights is there when the next phase begins.
"""

from fastlstm.backends.numba.kernels.layout import (
    count_vector_groups,
    dpreact_address,
    first_vector,
    gemm_of,
    gemv_of,
    saved_address,
)
from fastlstm.backends.numba.kernels.row_masks import zero_held
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR
from fastlstm.backends.numba.kernels.states import scratch_slot
from fastlstm.backends.numba.kernels.weight_gradients import accumulator_address, accumulator_row_bytes, unpack_weight
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


def record_phase(a, g):
    """Return the phase before which value g is multiplied, or -1."""
    return get_int64(a.product_records + 32 * g)


def record_first(a, g):
    """Return the first product of value g."""
    return get_int64(a.product_records + 32 * g + 8)


def record_count(a, g):
    """Return the number of products of value g."""
    return get_int64(a.product_records + 32 * g + 16)


def has_products(a, phase):
    """Return whether values are multiplied before a phase."""
    for g in range(a.product_groups):  # noqa: SIM110 - `llvm.emit` knows no any()
        if record_phase(a, g) == phase:
            return True
    return False


def operand_address(a, scratch, g):
    """Return the address of the operand (ROW_BLOCK, panels, L) of value g, in the forward pass."""
    return scratch_slot(a, scratch, a.operand_slot + g * a.panels)


def results_address(a, scratch, p):
    """Return the address of the results of products (ROW_BLOCK, products, L) of panel p, in the forward pass."""
    return scratch_slot(a, scratch, a.operand_slot + a.product_groups * a.panels + p * a.products)


def packed_address(a, g, p):
    """Return the address of the packed weights (H, N, L) of the N products of value g, for panel p."""
    base = a.packed + a.packed_panels * (a.span * a.h_preacts + a.I * a.x_preacts) * VECTOR
    return base + (record_first(a, g) * a.panels + record_count(a, g) * p) * a.H * VECTOR


def pack_products(a, p):
    """Pack panel p of the weights of all products as [value][vector group][k][product][lane]."""
    L, size, H = a.lanes, a.size, a.H
    valid = min(L, H - p * L)
    for g in range(a.product_groups):
        first, count, panel = record_first(a, g), record_count(a, g), packed_address(a, g, p)
        if valid < L:
            call(a.copy_rows, 1, 0, H * count * L, panel, 0, panel, 0)
        for q in range(count_vector_groups(count)):
            v, v_last = first_vector(count, q), first_vector(count, q + 1)
            for k in range(v, v_last):
                source, target = a.weight_products + ((first + k) * H + p * L) * H * size, panel + v * H * VECTOR
                call(a.transpose, valid, H, source, H * size, target + (k - v) * VECTOR, (v_last - v) * VECTOR)


def multiply_values(a, scratch, phase, p_first, p_last, rows):
    """Store the results of the products before a phase, of panels `p_first` to `p_last` and `rows` rows."""
    H, block = a.H, a.k_block
    for g in range(a.product_groups):
        count, x, x_row = record_count(a, g), operand_address(a, scratch, g), a.panels * VECTOR
        for p in range(p_first, p_last if record_phase(a, g) == phase else p_first):
            out, out_row = results_address(a, scratch, p) + record_first(a, g) * VECTOR, a.products * VECTOR
            for q in range(count_vector_groups(count)):
                v, w_row = first_vector(count, q), (first_vector(count, q + 1) - first_vector(count, q)) * VECTOR
                w, target, begin, begin_row = packed_address(a, g, p) + v * H * VECTOR, out + v * VECTOR, a.constants, 0
                for k in range(0, H, block):
                    call(
                        gemm_of(a, w_row // VECTOR), rows, begin, begin_row, target, out_row, w + k * w_row, w_row,
                        x + k * a.size, x_row, a.size, min(block, H - k), 1, 0, 0, x, 0, 0,
                    )  # fmt: skip
                    begin, begin_row = target, out_row


def multiply_values_of_only_row(a, scratch, phase, p_first, p_last):
    """Do as `multiply_values` for the only row, whose results (panels, products, L) follow each other."""
    H = a.H
    for g in range(a.product_groups if p_first < p_last else 0):
        if record_phase(a, g) == phase:
            count, x, out_step = record_count(a, g), operand_address(a, scratch, g), a.products * VECTOR
            out = results_address(a, scratch, 0) + p_first * out_step + record_first(a, g) * VECTOR
            for q in range(count_vector_groups(count)):
                v = first_vector(count, q)
                w = packed_address(a, g, p_first) + v * H * VECTOR
                call(
                    gemv_of(a, first_vector(count, q + 1) - v), p_last - p_first, a.constants, 0, out + v * VECTOR,
                    out_step, x, w, 0, 0, x, w, count * H * VECTOR, H, a.k_block, a.k_block, a.constants, 0,
                )  # fmt: skip


def back_results_address(a, scratch, g, q):
    """Return the address of the transposed product (ROW_BLOCK, 4, L) of value g, for vector group q of its units."""
    return scratch_slot(a, scratch, a.operand_slot + (g * count_vector_groups(a.panels) + q) * 4)


def packed_back_address(a, g, q):
    """Return the address of the packed transposed weights (panels, N L, 4 L) of the N products of value g, for vector
    group q of its units.
    """
    L, groups = a.lanes, count_vector_groups(a.panels)
    return a.packed_products + (record_first(a, g) * groups + record_count(a, g) * q) * a.panels * L * 4 * VECTOR


def pack_back_products(a, first, last):
    """Pack vector groups `first` to `last` of the transposed weights of all products as [value][k][3 or 4 vectors]."""
    L, size, H, panels = a.lanes, a.size, a.H, a.panels
    for g in range(a.product_groups):
        count = record_count(a, g)
        for p in range(panels):
            units = min(L, H - p * L)
            for k in range(count):
                source = a.weight_products + ((record_first(a, g) + k) * H + p * L) * H * size
                for q in range(first, last):
                    column = first_vector(panels, q) * L
                    n = 4 if first_vector(panels, q + 1) - first_vector(panels, q) == 4 else 3
                    target, row = packed_back_address(a, g, q) + (p * count + k) * L * n * VECTOR, n * VECTOR
                    width = min(n * L, H - column)
                    call(a.copy_rows, units, width, n * L, source + column * size, H * size, target, row)
                    call(a.copy_rows, L - units, 0, n * L, source, 0, target + units * row, row)


def multiply_back(a, scratch, phase, s, b, rows, q_first, q_last):
    """Store the transposed products before a phase, of vector groups `q_first` to `q_last` and `rows` rows from b."""
    L, panels, row = a.lanes, a.panels, 4 * VECTOR
    for g in range(a.product_groups):
        count, gate = record_count(a, g), a.preacts + record_first(a, g)
        blocks = (panels * count * L + BLOCK_K - 1) // BLOCK_K
        block = (panels + blocks - 1) // blocks  # panels
        for q in range(q_first, q_last if record_phase(a, g) == phase else q_first):
            n = 4 if first_vector(panels, q + 1) - first_vector(panels, q) == 4 else 3
            out, w_row, init, init_row = back_results_address(a, scratch, g, q), n * VECTOR, a.constants, 0
            for p in range(0, panels, block):
                dpre = dpreact_address(a, p, s, b) + gate * VECTOR
                call(
                    a.gemm4 if n == 4 else a.gemm3, rows, init, init_row, out, row,
                    packed_back_address(a, g, q) + p * count * L * w_row, w_row, dpre, a.terms * VECTOR, a.size,
                    count * L, min(block, panels - p), a.dpreact_steps * a.B * a.terms * VECTOR, count * L * w_row,
                    dpre, 0, 0,
                )  # fmt: skip
                init, init_row = out, row


def first_value_column(a, g):
    """Return the first column of value g in the strips, and its first accumulator row."""
    return a.first_value_row + g * ((a.H + a.strip - 1) // a.strip * a.strip)


def pack_values(a, strips, s_first, s_last, b_first, b_last):
    """Pack the values that products multiply, of the steps and batch rows given, as [strip][pair][column]."""
    size, B, row, count, L = a.size, a.B, a.strip * a.size, b_last - b_first, a.lanes
    strip_bytes = (s_last - s_first) * B * row
    for s in range(s_first, s_last):
        t = a.T - 1 - s if a.reverse != 0 else s
        for g in range(a.product_groups):
            slot, unit = get_int64(a.product_records + 32 * g + 24), 0
            while unit < a.H:
                column = first_value_column(a, g) + unit
                run = min(min(L - unit % L, a.strip - column % a.strip), a.H - unit)
                source = saved_address(a, a.gate_rows, t, unit // L, b_first) + slot * VECTOR + unit % L * size
                target = strips + column // a.strip * strip_bytes
                target += ((s - s_first) * B + b_first) * row + column % a.strip * size
                call(a.copy_rows, count, run, run, source, a.saved * VECTOR, target, row)
                zero_held(a, t, b_first, count, run, target, row)
                unit += run


def unpack_product_gradients(a, scratch, p_first, p_last):
    """Write the wanted gradients of the weights of products, of panels `p_first` to `p_last`, from accumulators."""
    L, H = a.lanes, a.H
    for p in range(p_first, p_last):
        for g in range(a.product_groups):
            first = accumulator_address(a, 0, p) + first_value_column(a, g) * accumulator_row_bytes(a)
            for k in range(record_count(a, g)):
                target = get_int64(a.dparam_addresses + 8 * (a.params + record_first(a, g) + k))
                if target != 0:
                    valid = min(L, H - p * L)
                    unpack_weight(a, scratch, first + k * VECTOR, H, valid, target + p * L * H * a.size)
