// Weight gradients summed over few rows, straight into the rows of the weights' own layout. A sum in the tile's layout has
// to be started, added to and transposed: over few rows that is all there is to do. The sums are those of gradients.h, in
// the same order.
#pragma once

// Rows (s, b) of x, then of h_prev, of some batch rows: to [4 vectors of columns][row][column], zeros past the last column
template <class E>
void pack_rows(const Gradients<E> &g, E *packed, int64_t b_first, int64_t b_last) {
    constexpr int64_t wide = 4 * Vector<E>::N;
    const int64_t count = b_last - b_first, next = g.T * g.B * wide;
    for (int64_t s = 0; s < g.T; s++) {
        Rows<E> to{packed + (s * g.B + b_first) * wide, wide};
        for (int64_t k = 0; k < g.I; k += wide, to.at += next)
            g.copy_seen(true, s, b_first, count, k, min(wide, g.I - k), wide, to);
        for (int64_t k = 0; k < g.H; k += wide, to.at += next)
            g.copy_seen(false, s, b_first, count, k, min(wide, g.H - k), wide, to);
    }
}

// One gate and panel's rows of a (4H, width) gradient, from its dpreact of all steps
template <class E>
void write_columns(Gradients<E> &g, Panel<E> panel, const E *dpreact, const E *packed, E *weight, int64_t width) {
    constexpr int64_t wide = 4 * Vector<E>::N;
    const int64_t count = g.T * g.B, rows = panel.valid;
    for (int64_t k = 0; k < width; k += wide, packed += count * wide) {
        const bool whole = width - k >= wide;  // otherwise vectors would reach into the next row
        Rows<E> out = whole ? Rows<E>{weight + k, width} : Rows<E>{g.sums, wide};
        product<E, 4>(rows, {g.zeros, 0, out.at, out.row, packed, dpreact, 1, panel.wide(), count, 1, 0, dpreact, 0, 0});
        if (!whole) copy_rows<E>(rows, width - k, width - k, out, {weight + k, width});
    }
}

// Some panels of dweight_ih, dweight_hh and dbias, those that are wanted
template <class E>
void write_weight_gradients(Gradients<E> &g, const E *packed, int64_t p_first, int64_t p_last) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = g.I, H = g.H, count = g.T * g.B;
    const E one = 1, *of_h = packed + ceil_div(I, 4 * L) * count * 4 * L;
    for (int64_t p = p_first; p < p_last; p++) {
        const Panel<E> panel(H, p);
        const int64_t valid = panel.valid;
        const E *dpreact = g.dpreact_of(p, 0, 0);
        for (int64_t gate = 0; gate < 4; gate++) {
            const int64_t row = gate * H + p * L;
            const E *of_gate = dpreact + gate * panel.gate;
            if (g.a.dweight_ih) write_columns<E>(g, panel, of_gate, packed, (E *)g.a.dweight_ih + row * I, I);
            if (g.a.dweight_hh) write_columns<E>(g, panel, of_gate, of_h, (E *)g.a.dweight_hh + row * H, H);
        }
        if (!g.a.dbias) continue;
        multiply<E>(panel.vectors, 1, {g.zeros, 0, g.sums, 0, dpreact, &one, 0, 0, count, 1, 0, dpreact, 0, 0});
        for (int64_t gate = 0; gate < 4; gate++)
            copy_rows<E>(1, valid, valid, {g.sums + gate * panel.gate, 0}, {(E *)g.a.dbias + gate * H + p * L, 0});
    }
}
