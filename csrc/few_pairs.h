// Weight gradients of few (step, row) pairs, written directly to the rows of the gradients, from strips of x and h_in
// that are 4 vectors wide, with the sums of gradients.h, whose accumulators would take longer than the products.
#pragma once

// Writes the rows of one pre-activation and panel of a weight's gradient, `width` columns, from its dpreact of all steps.
template <class C, class E>
void write_columns(Gradients<C, E> &g, Panel<C, E> panel, const E *dpreact, const E *packed, E *weight, int64_t width) {
    constexpr int64_t strip_width = 4 * Vector<E>::N;
    const int64_t pairs = g.T * g.B, rows = panel.valid;
    for (int64_t k = 0; k < width; k += strip_width, packed += pairs * strip_width) {
        const bool is_whole = width - k >= strip_width;  // otherwise vectors would overwrite the next row
        Matrix<E> out = is_whole ? Matrix<E>{weight + k, width} : Matrix<E>{g.products, strip_width};
        product<E, 4>(rows, {g.zeros, 0, out.data, out.stride, packed, dpreact, 1, panel.row_elements(), pairs, 1, 0,
                             dpreact, 0, 0});
        if (!is_whole) copy_rows<E>(rows, width - k, width - k, out, {weight + k, width});
    }
}

// Writes some panels of the wanted gradients of weights and biases.
template <class C, class E>
void write_weight_gradients(Gradients<C, E> &g, const E *packed, int64_t p_first, int64_t p_last) {
    constexpr int64_t L = Vector<E>::N;
    const fastlstm_backward_args &a = g.a;
    const int64_t I = g.I, H = g.H, pairs = g.T * g.B;
    const E one = 1, *packed_h = packed + ceil_div(I, 4 * L) * pairs * 4 * L;
    for (int64_t p = p_first; p < p_last; p++) {
        const Panel<C, E> panel(H, p);
        const E *x_dpreact = g.dpreact_of(p, 0, 0), *h_dpreact = x_dpreact + g.FIRST_H * L;
        auto row = [&](int64_t block) { return block * H + p * L; };
        for (int64_t k = 0; a.dweight_ih && k < C::X; k++)
            write_columns(g, panel, x_dpreact + k * panel.gate_stride, packed, (E *)a.dweight_ih + row(C::BLOCKS_IH[k]) * I, I);
        for (int64_t k = 0; a.dweight_hh && k < C::Y; k++)
            write_columns(g, panel, h_dpreact + k * panel.gate_stride, packed_h,
                          (E *)a.dweight_hh + row(C::BLOCKS_HH[k]) * H, H);
        if (!a.dbias_ih && !a.dbias_hh) continue;
        multiply<E>(panel.vectors, 1, {g.zeros, 0, g.products, 0, x_dpreact, &one, 0, 0, pairs, 1, 0, x_dpreact, 0, 0});
        auto write = [&](int64_t k, void *bias, int64_t block) {
            const Matrix<const E> from{g.products + k * panel.gate_stride, 0};
            if (bias) copy_rows<E>(1, panel.valid, panel.valid, from, {(E *)bias + row(block), 0});
        };
        for (int64_t k = 0; k < C::X; k++) write(k, a.dbias_ih, C::BLOCKS_IH[k]);
        for (int64_t k = 0; k < C::Y; k++) write(g.FIRST_H + k, a.dbias_hh, C::BLOCKS_HH[k]);
    }
}
