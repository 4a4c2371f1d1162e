"""Products of values that a step computes, between two phases of its cell. A product group has all products of a value.

A phase stores a value as rows of H units, the operand; in the backward pass, gradients of products beside dpreact. The
product with all weights of the value, of H units or fewer in a projected layer, is there when the next phase begins.
"""

from fastlstm.backends.numba.constants import ROW_BLOCK, k_blocks_of, k_blocks_together
from fastlstm.backends.numba.kernels.heads import add_product_of_heads, back_product_of_heads
from fastlstm.backends.numba.kernels.layout import (
    count_vector_groups,
    dpreact_address,
    dpreact_row_address,
    first_unit,
    first_vector,
    gemm_of,
    gemv_of,
    lanes_inside,
    multiply,
    multiply_blocks,
    panels_of_h,
    saved_address,
    seen_alike,
    seen_begin,
    seen_of_value,
    spans_heads,
)
from fastlstm.backends.numba.kernels.matrix_forward import (
    TILE,
    pack_columns,
    write_units,
)
from fastlstm.backends.numba.kernels.matrix_forward import (
    packed_address as packed_panel_address,
)
from fastlstm.backends.numba.kernels.row_masks import zero_held
from fastlstm.backends.numba.kernels.shared import BLOCK_K, VECTOR, element_bytes
from fastlstm.backends.numba.kernels.states import scratch_slot
from fastlstm.backends.numba.kernels.threads import wait
from fastlstm.backends.numba.kernels.vector_forward import pack_panel
from fastlstm.backends.numba.kernels.weight_gradients import (
    accumulator_address,
    accumulator_row_bytes,
    unpack_weight_of_heads,
)
from fastlstm.backends.numba.llvm.intrinsics import call, get_int64


def record_phase(a, group):
    """Return the phase before which a product group's value is multiplied, or -1."""
    return get_int64(a.product_records + 32 * group)


def record_first(a, group):
    return get_int64(a.product_records + 32 * group + 8)


def record_count(a, group):
    return get_int64(a.product_records + 32 * group + 16)


def record_saved(a, group):
    """Return the place of a product group's value among the saved vectors."""
    return get_int64(a.product_records + 32 * group + 24)


def has_products(a, phase):
    """Return whether values are multiplied before a phase."""
    for group in range(a.product_groups):  # noqa: SIM110 - `llvm.translate` knows no any()
        if record_phase(a, group) == phase:
            return True
    return False


def wait_for_results(a, barrier, team_size, barriers_passed):
    """Wait for the results of products if members split the rows for the cell. Otherwise each has computed its own."""
    if a.splits_rows != 0:
        return wait(barrier, team_size, barriers_passed, a.relax)
    return barriers_passed


def operand_address(a, scratch, group):
    """Return the address of the operand (ROW_BLOCK, panels, L) of a product group, in the forward pass."""
    return scratch_slot(a, scratch, a.operand_slot + group * a.panels)


def results_address(a, scratch, p):
    """Return the address of the results of products (ROW_BLOCK, products, L) of panel p, in the forward pass."""
    return scratch_slot(a, scratch, a.operand_slot + a.product_groups * a.panels + p * a.products)


def packed_address(a, group, p):
    """Return the address of the packed weights (columns, N, L) of the N products of a group, for panel p."""
    if a.components != 0:
        tiles = (record_first(a, group) * a.panels + record_count(a, group) * p) * k_blocks_of(a.head)
        return packed_panel_address(a, a.packed_panels) + tiles * a.components * TILE
    base = a.packed + a.packed_panels * (a.span * a.h_preacts + a.I * a.x_preacts) * VECTOR
    return base + (record_first(a, group) * a.panels + record_count(a, group) * p) * value_span(a) * VECTOR


def value_span(a):
    """Return the most columns of a value that a panel multiplies."""
    return a.H if a.heads == 1 else a.span


def pack_products(a, p, scratch):
    for group in range(a.product_groups):
        count, first_block = record_count(a, group), a.x_preacts + a.h_preacts + record_first(a, group)
        row, panel, columns = a.head * element_bytes(a), packed_address(a, group, p), seen_of_value(a, p)
        if a.components != 0:
            pack_columns(a, p, a.weight_products, row, columns, count, first_block, panel, scratch_slot(a, scratch, 0))
        else:
            pack_panel(a, p, a.weight_products, row, a.h_width, columns, count, first_block, True, panel)


def row_operand_address(a, scratch, group, k):
    """Return the address of K block k of a group's value as a row operand of the bf16 unit. A block fills a slot."""
    slot = a.operand_slot + (a.product_groups + a.products) * a.panels
    return scratch_slot(a, scratch, slot + group * a.components * k_blocks_of(a.H) + k)


def store_row_operands(a, t, p, b, rows, scratch, phase, team_scratch, team_row):
    """Write the values of panel p that are multiplied after a phase to their row operands, if the unit does that."""
    copy, next_component = scratch_slot(a, scratch, 0), k_blocks_of(a.H) * ROW_BLOCK * 64
    for group in range(a.product_groups if a.components != 0 else 0):
        if record_phase(a, group) == phase + 1:
            source = operand_address(a, team_scratch, group) + (team_row * a.panels + p) * VECTOR
            call(a.copy_rows, rows, lanes_inside(a, p, a.H), a.lanes, source, a.panels * VECTOR, copy, VECTOR)
            zero_held(a, t, b, rows, a.lanes, copy, VECTOR)  # the unit may not be able to take what padding gives
            target = row_operand_address(a, team_scratch, group, p // 2) + team_row * 64 + p % 2 * 32
            write_units(a, p, rows, copy, VECTOR, target, next_component)


def multiply_values(a, scratch, phase, p_first, p_last, rows, barrier, team_size, barriers_passed):
    """Store the products before a phase, once the team has stored the operands. Return how many barriers it passed."""
    if not has_products(a, phase):
        return barriers_passed
    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
    for group in range(a.product_groups):
        count, x_row, out_row = record_count(a, group), a.panels * VECTOR, a.products * VECTOR
        for p in range(p_first, p_last if record_phase(a, group) == phase else p_first):
            columns, x = seen_of_value(a, p), operand_address(a, scratch, group) + seen_begin(a, p) * a.size
            out, crosses = results_address(a, scratch, p) + record_first(a, group) * VECTOR, spans_heads(a, p)
            if a.components != 0:
                x, stride = row_operand_address(a, scratch, group, seen_begin(a, p) // 32), ROW_BLOCK * 64
                call(
                    a.matrix_product, rows, a.constants, 0, out, out_row, x, stride, k_blocks_of(a.H) * stride,
                    packed_address(a, group, p), count * TILE, k_blocks_of(a.head), count,
                    k_blocks_together(a.components),
                )  # fmt: skip
                continue
            if crosses:
                call(a.copy_rows, rows, 0, count * a.lanes, out, 0, out, out_row)
                add_product_of_heads(a, p, rows, out, out_row, count, packed_address(a, group, p), x, x_row)
            for q in range(0 if crosses else count_vector_groups(count)):
                v, w_row = first_vector(count, q), (first_vector(count, q + 1) - first_vector(count, q)) * VECTOR
                w, target, begin, begin_row = packed_address(a, group, p), out + v * VECTOR, a.constants, 0
                for k in range(0, columns, a.value_k_block):
                    multiply(
                        a, gemm_of(a, w_row // VECTOR), rows, init=begin, init_row=begin_row, out=target,
                        out_row=out_row, w=w + v * columns * VECTOR + k * w_row, w_row=w_row, x=x + k * a.size,
                        x_row=x_row, x_column=a.size, columns=min(a.value_k_block, columns - k),
                    )  # fmt: skip
                    begin, begin_row = target, out_row
    return wait_for_results(a, barrier, team_size, barriers_passed)


def multiply_values_of_only_row(a, scratch, phase, p_first, p_last, barrier, team_size, barriers_passed):
    """Do as `multiply_values` for the only row, whose results (panels, products, L) follow each other."""
    if not has_products(a, phase):
        return barriers_passed
    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
    for group in range(a.product_groups):
        count, out_step, begin = record_count(a, group), a.products * VECTOR, p_first
        while begin < (p_last if record_phase(a, group) == phase else p_first):
            end, columns = seen_alike(a, begin, p_last), seen_of_value(a, begin)
            x = operand_address(a, scratch, group) + seen_begin(a, begin) * a.size
            out = results_address(a, scratch, 0) + begin * out_step + record_first(a, group) * VECTOR
            packed, crosses = packed_address(a, group, begin), spans_heads(a, begin)
            if crosses:  # no two panels of several heads see the same columns
                call(a.copy_rows, 1, 0, count * a.lanes, out, 0, out, 0)
                add_product_of_heads(a, begin, 1, out, out_step, count, packed, x, 0)
            for q in range(0 if crosses else count_vector_groups(count)):
                v = first_vector(count, q)
                w = packed + v * columns * VECTOR
                call(
                    gemv_of(a, first_vector(count, q + 1) - v), end - begin, a.constants, 0, out + v * VECTOR,
                    out_step, x, w, 0, 0, x, w, count * value_span(a) * VECTOR, columns,
                    a.value_k_block, a.value_k_block, a.constants, 0,
                )  # fmt: skip
            begin = end
    return wait_for_results(a, barrier, team_size, barriers_passed)


def back_results_address(a, scratch, group, q):
    """Return the address of the transposed product (ROW_BLOCK, 4, L) of a group, for vector group q of units."""
    return scratch_slot(a, scratch, a.operand_slot + (group * count_vector_groups(a.panels) + q) * 4)


def packed_back_address(a, group):
    """Return the packed transposed weights (vector groups, reach, N L, 4 L) of the N products of a group."""
    vector_groups = record_first(a, group) * count_vector_groups(a.panels)
    if a.components != 0:
        return a.packed_products + vector_groups * k_blocks_of(a.head) * a.components * 4 * TILE
    return a.packed_products + vector_groups * a.reach * a.lanes * 4 * VECTOR


def back_product_on_unit(a, rows, b, s, gate, gates, units, packed, vectors, q, out):
    """Store the product of `gates` terms of dpreact, from `gate` on, of step s and rows from b on, with vector group q
    of the transposed weights. `units`: how many multiply a column: all, or those of its head.
    """
    blocks, stride, next_gate = k_blocks_of(units), a.k_block_stride, k_blocks_of(a.H) * a.k_block_stride
    dpre = dpreact_row_address(a, s, b, gate) + first_unit(a, vectors, q, units) // 32 * stride
    tile, init, init_row = a.components * 4 * TILE, a.constants, 0
    runs = 1 if units == a.H else gates  # a head's units of two gates do not follow each other
    for k in range(runs):
        call(
            a.matrix_product, rows, init, init_row, out, 4 * VECTOR, dpre + k * next_gate, stride, a.terms * next_gate,
            packed + (q * gates + k) * blocks * tile, 4 * TILE, gates // runs * blocks,
            first_vector(vectors, q + 1) - first_vector(vectors, q), k_blocks_together(a.components),
        )  # fmt: skip
        init, init_row = out, 4 * VECTOR


def multiply_back(a, scratch, phase, s, b, rows, q_first, q_last, barrier, team_size, barriers_passed):
    """Store the transposed products before a phase, once the team has stored gradients. Return the barriers passed."""
    if not has_products(a, phase):
        return barriers_passed
    barriers_passed = wait(barrier, team_size, barriers_passed, a.relax)
    L, panels, row, summed = a.lanes, a.panels, 4 * VECTOR, panels_of_h(a)
    for group in range(a.product_groups):
        count, gate, packed = record_count(a, group), a.preacts + record_first(a, group), packed_back_address(a, group)
        blocks = (summed * count * L + BLOCK_K - 1) // BLOCK_K
        block = (summed + blocks - 1) // blocks  # panels
        for q in range(q_first, q_last if record_phase(a, group) == phase else q_first):
            out = back_results_address(a, scratch, group, q)
            if a.components != 0:
                back_product_on_unit(a, rows, b, s, gate, count, a.head, packed, panels, q, out)
                continue
            if a.heads > 1:
                back_product_of_heads(a, rows, b, s, gate, count, packed, panels, q, out)
                continue
            n = 4 if first_vector(panels, q + 1) - first_vector(panels, q) == 4 else 3
            w, w_row, init, init_row = packed + q * panels * 4 * VECTOR * count * L, n * VECTOR, a.constants, 0
            for p in range(0, summed, block):
                dpre = dpreact_address(a, p, s, b) + gate * VECTOR
                multiply_blocks(
                    a, gemm_of(a, n), rows, init=init, init_row=init_row, out=out, out_row=row,
                    w=w + p * count * L * w_row, w_row=w_row, x=dpre, x_row=a.terms * VECTOR, x_column=a.size,
                    columns=count * L, blocks=min(block, summed - p),
                    x_block=a.dpreact_steps * a.B * a.terms * VECTOR, w_block=count * L * w_row,
                )  # fmt: skip
                init, init_row = out, row
    return wait_for_results(a, barrier, team_size, barriers_passed)


def first_value_column(a, group):
    """Return the first column of a group's value in the strips, and its first accumulator row."""
    return a.first_value_row + group * ((a.H + a.strip - 1) // a.strip * a.strip)


def pack_values(a, strips, s_first, s_last, b_first, b_last):
    """Pack the values that products multiply, of the steps and batch rows given, as [strip][pair][column]."""
    size, B, row, count, L = a.size, a.B, a.strip * a.size, b_last - b_first, a.lanes
    strip_bytes = (s_last - s_first) * B * row
    for s in range(s_first, s_last):
        t = a.T - 1 - s if a.reverse != 0 else s
        for group in range(a.product_groups):
            slot, unit = record_saved(a, group), 0
            while unit < a.H:
                column = first_value_column(a, group) + unit
                run = min(min(L - unit % L, a.strip - column % a.strip), a.H - unit)
                source = saved_address(a, a.gate_rows, t, unit // L, b_first) + slot * VECTOR + unit % L * size
                target = strips + column // a.strip * strip_bytes
                target += ((s - s_first) * B + b_first) * row + column % a.strip * size
                call(a.copy_rows, count, run, run, source, a.saved * VECTOR, target, row)
                zero_held(a, t, b_first, count, run, target, row)
                unit += run


def unpack_product_gradients(a, scratch, p_first, p_last):
    """Write the wanted gradients of the weights of products, of panels `p_first` to `p_last`, from accumulators."""
    for p in range(p_first, min(p_last, panels_of_h(a))):
        for group in range(a.product_groups):
            first = accumulator_address(a, 0, p) + first_value_column(a, group) * accumulator_row_bytes(a)
            for k in range(record_count(a, group)):
                target = get_int64(a.dparam_addresses + 8 * (a.params + record_first(a, group) + k))
                if target != 0:
                    unpack_weight_of_heads(a, scratch, p, first + k * VECTOR, 0, a.h_width, a.head, target)
