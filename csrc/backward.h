// The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the gradients that sum
// over rows. What a chunk leaves is used while it is in the cache: dpreact of two chunks is all there ever is.
#pragma once

constexpr int64_t BLOCK_ROWS = 128;  // rows of dpreact and of a strip that stay in the L1 cache together

// Columns of transposed weights in groups of 4 or 3 vectors wherever it can be: a lone vector would leave the tile idle.
inline int64_t groups_of(int64_t vectors) { return ceil_div(vectors, 4); }
inline int64_t group(int64_t vectors, int64_t q) { return ceil_div(vectors * q, groups_of(vectors)); }

// Column groups of (4H, columns) weights to [group][k][3 or 4 vectors]
template <class E>
void pack_transposed(Rows<const E> weight, int64_t H, int64_t columns, E *packed, int64_t first, int64_t last) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t panels = ceil_div(H, L), vectors = ceil_div(columns, L);
    for (int64_t q = first; q < last; q++) {
        int64_t column = group(vectors, q) * L, wide = group(vectors, q + 1) - group(vectors, q) == 4 ? 4 * L : 3 * L;
        int64_t valid = min(wide, columns - column);
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t gate = 0; gate < 4; gate++) {
                Rows<E> to{packed + q * panels * 16 * L * L + (p * 4 + gate) * L * wide, wide};
                int64_t units = min(L, H - p * L);
                copy_rows<E>(units, valid, wide, weight.from(gate * H + p * L, column), to);
                zero_rows<E>(L - units, wide, to.from(units, 0));
            }
        }
    }
}

// The backward pass of this thread
template <class E> struct Backward {
    static constexpr int64_t L = Vector<E>::N;
    const BackwardJob &job;
    const fastlstm_backward_args &a;
    const int64_t T, B, I, H, panels;
    alignas(64) E sums[CHUNK * 4 * L];  // a product's, or what stands in for it
    alignas(64) E c_old[CHUNK * L], dh_old[CHUNK * L], dc_held[CHUNK * L], zeros[4 * L] = {};

    Backward(const BackwardJob &job)
        : job(job), a(*job.args), T(a.T), B(a.B), I(a.I), H(a.H), panels(ceil_div(H, L)) {}

    int64_t time_of(int64_t s) const { return a.reverse ? T - 1 - s : s; }
    const int32_t *mask_of(int64_t s, int64_t b) const {
        return a.mask && s >= 0 && s < T ? a.mask + time_of(s) * B + b : nullptr;
    }
    // (rows, 4, lanes) of a panel; each panel's rows lie side by side
    E *dpreact_of(int64_t p, int64_t s, int64_t b) const {
        return (E *)job.dpreact + ((p * 2 * job.chunk + s % (2 * job.chunk)) * B + b) * 4 * L;
    }
    E *dc_of(int64_t p, int64_t b) const { return (E *)job.carried + (p * B + b) * L; }
    E *dh_held_of(int64_t p, int64_t b) const { return dc_of(panels + p, b); }  // what a held step hands on
    Rows<const E> h_before(int64_t s) const {  // the state that step s saw, but for resets
        if (s == 0) return {(const E *)a.h_0, a.h_0_row};
        return {(const E *)a.h + time_of(s - 1) * B * H, H};
    }
    Rows<const E> c_before(int64_t s) const {
        if (s == 0) return {(const E *)a.c_0, a.c_0_row};
        return {(const E *)a.c + time_of(s - 1) * B * H, H};
    }

    // sums (rows, 4 vectors) = dpreact of step s times column group q of the transposed weights
    void back_product(int64_t rows, int64_t b, int64_t s, const E *packed, int64_t vectors, int64_t q) {
        const int64_t wide = group(vectors, q + 1) - group(vectors, q) == 4 ? 4 : 3;
        const int64_t block = ceil_div(panels, ceil_div(panels * 4 * L, BLOCK_K));  // panels
        Rows<const E> init{zeros, 0};
        for (int64_t p = 0; p < panels; p += block, init = {sums, 4 * L}) {
            const E *w = packed + q * panels * 16 * L * L + p * 4 * L * wide * L, *d = dpreact_of(p, s, b);
            Sum<E> sum{init.at, init.row, sums, 4 * L, w, d, 4 * L, 1, 4 * L, min(block, panels - p),
                       2 * job.chunk * B * 4 * L, d, 0, 0};
            wide == 4 ? product<E, 4>(rows, sum) : product<E, 3>(rows, sum);
        }
    }

    // dpreact of one panel; dh (rows, 4 vectors apart) is the gradient from the step after
    void cells(int64_t p, int64_t s, int64_t b, int64_t rows, Rows<E> dh) {
        const int64_t t = time_of(s), u = p * L, valid = min(L, H - u);
        const int32_t *mask = mask_of(s, b);
        const bool resets = any_row(mask, rows, RESET), holds = any_row(mask, rows, HOLD);
        E *dc = dc_of(p, b), *dpreact = dpreact_of(p, s, b);
        if (a.dc) add_rows<E>(rows, valid, {(const E *)a.dc + t * a.dc_step + b * a.dc_row + u, a.dc_row}, {dc, L});
        Rows<const E> c_prev = c_before(s).from(b, u), dh_out{zeros, 0};
        if (a.dh) dh_out = {(const E *)a.dh + t * a.dh_step + b * a.dh_row + u, a.dh_row};
        if (valid < L || resets) {
            copy_rows<E>(rows, valid, L, c_prev, {c_old, L});
            if (resets) zero_masked<E>(mask, RESET, rows, L, {c_old, L});
            c_prev = {c_old, L};
            if (a.dh) {
                copy_rows<E>(rows, valid, L, dh_out, {dh_old, L});
                dh_out = {dh_old, L};
            }
        }
        if (holds) {  // a held row hands on what it got: dh and dc pass, dpreact is zero
            copy_rows<E>(rows, L, L, {dc, L}, {dc_held, L});
            copy_rows<E>(rows, valid, L, dh, {dh_held_of(p, b), L});
            add_rows<E>(rows, valid, dh_out, {dh_held_of(p, b), L});
        }
        const E *gates = (const E *)a.gates + ((t * panels + p) * B + b) * 4 * L;
        cells_backward<E>(rows, valid, dh, dh_out, dc, gates, c_prev, dpreact);
        for (int64_t r = 0; holds && r < rows; r++) {
            if (mask[r] != HOLD) continue;
            copy_rows<E>(1, L, L, {dc_held + r * L, 0}, {dc + r * L, 0});
            zero_rows<E>(1, 4 * L, {dpreact + r * 4 * L, 0});
        }
    }

    // Step s for some rows and one group of panels; step -1 is where the gradients arrive at h_0 and c_0
    void step(int64_t s, int64_t b, int64_t rows, int64_t q) {
        const int64_t p_first = group(panels, q), p_last = group(panels, q + 1), column = p_first * L;
        const int32_t *mask_next = mask_of(s + 1, b);
        const bool resets = any_row(mask_next, rows, RESET), holds = any_row(mask_next, rows, HOLD);
        const Rows<E> all{sums, 4 * L};
        if (s < T - 1) {
            back_product(rows, b, s + 1, (const E *)job.packed_hh, panels, q);
        } else {
            int64_t given = a.dh_n ? min((p_last - p_first) * L, H - column) : 0;
            copy_rows<E>(rows, given, 4 * L, given ? Rows<const E>{(const E *)a.dh_n, a.dh_n_row}.from(b, column) : all, all);
        }
        zero_masked<E>(resets ? mask_next : nullptr, RESET, rows, 4 * L, all);
        for (int64_t p = p_first; p < p_last; p++) {
            const int64_t u = p * L, valid = min(L, H - u);
            const Rows<E> dh = all.from(0, u - column), dc{dc_of(p, b), L};
            if (s == T - 1) {
                int64_t given = a.dc_n ? valid : 0;
                copy_rows<E>(rows, given, L, given ? Rows<const E>{(const E *)a.dc_n, a.dc_n_row}.from(b, u) : dc, dc);
            }
            if (resets) zero_masked<E>(mask_next, RESET, rows, L, dc);
            for (int64_t r = 0; holds && r < rows; r++)
                if (mask_next[r] == HOLD) copy_rows<E>(1, L, L, {dh_held_of(p, b + r), 0}, {dh[r], 0});
            if (s >= 0) {
                cells(p, s, b, rows, dh);
            } else {
                copy_rows<E>(rows, valid, valid, dh, Rows<E>{(E *)a.dh_0, H}.from(b, u));
                copy_rows<E>(rows, valid, valid, dc, Rows<E>{(E *)a.dc_0, H}.from(b, u));
            }
        }
    }

    E *strips_of(int64_t s) const {  // two chunks in turn: another thread may still read the one after
        int64_t strips = ceil_div(I + H + 1, STRIP);
        return (E *)job.strips + s / job.chunk % 2 * job.chunk * B * strips * STRIP;
    }

    // Rows (s, b) of [x, h_prev, 1] to [strip][row][column]; h_prev is what the step saw: zero after a reset
    void pack_strips(int64_t s_first, int64_t s_last, int64_t first, int64_t last) {
        const int64_t columns = I + H + 1, all = (s_last - s_first) * B;
        E *strips = strips_of(s_first);
        for (int64_t row = first; row < last; row++) {
            int64_t s = s_first + row / B, b = row % B;
            const E *x = (const E *)a.x + time_of(s) * a.x_step + b * a.x_row, *h = h_before(s)[b];
            int32_t mask = a.mask ? *mask_of(s, b) : 0;
            for (int64_t k = 0, run; k < columns; k += run) {
                Rows<E> to{strips + (k / STRIP * all + row) * STRIP + k % STRIP, 0};
                run = min(STRIP - k % STRIP, (k < I ? I : k < I + H ? I + H : columns) - k);
                if (k == I + H)
                    *to.at = 1;
                else if (mask == HOLD || (mask == RESET && k >= I))  // a held row has no part: its padding may be NaN
                    zero_rows<E>(1, run, to);
                else
                    copy_rows<E>(1, run, run, {k < I ? x + k : h + (k - I), 0}, to);
            }
        }
    }

    // Add a chunk of steps to some panels of dweights: every row in one order, whoever else works beside
    void add_weight_gradients(int64_t s_first, int64_t s_last, int64_t p_first, int64_t p_last) {
        const int64_t columns = I + H + 1, rows = (s_last - s_first) * B, block = ceil_div(rows, ceil_div(rows, BLOCK_ROWS));
        for (int64_t k = 0; k < columns; k += STRIP) {
            const E *strip = strips_of(s_first) + k * rows;
            for (int64_t p = p_first; p < p_last; p++) {
                E *out = (E *)job.dweights + (p * columns + k) * 4 * L;
                for (int64_t r = 0; r < rows; r += block) {
                    const E *a = strip + r * STRIP, *w = dpreact_of(p, s_first, 0) + r * 4 * L;
                    product<E, 4>(min(STRIP, columns - k),
                                  {out, 4 * L, out, 4 * L, w, a, 1, STRIP, min(block, rows - r), 1, 0, a, 0, 0});
                }
            }
        }
    }

    // Panels of dweights to dweight_ih, dweight_hh and dbias, those that are wanted
    void unpack_weight_gradients(int64_t p_first, int64_t p_last) {
        for (int64_t p = p_first; p < p_last; p++) {
            for (int64_t gate = 0; gate < 4; gate++) {
                const int64_t row = gate * H + p * L, valid = min(L, H - p * L);
                const Rows<const E> from{(const E *)job.dweights + p * (I + H + 1) * 4 * L + gate * L, 4 * L};
                for (int64_t k = 0; a.dweight_ih && k < I; k += L)
                    transpose<E>(min(L, I - k), valid, from.from(k, 0), {(E *)a.dweight_ih + row * I + k, I});
                for (int64_t k = 0; a.dweight_hh && k < H; k += L)
                    transpose<E>(min(L, H - k), valid, from.from(I + k, 0), {(E *)a.dweight_hh + row * H + k, H});
                if (a.dbias) copy_rows<E>(1, valid, valid, from.from(I + H, 0), {(E *)a.dbias + row, 0});
            }
        }
    }

    // dx = dpreact times weight_ih for some rows of a chunk of steps
    void input_gradient(int64_t s_first, int64_t first, int64_t last) {
        const int64_t vectors = ceil_div(I, L);
        for (int64_t rows; first < last; first += rows) {
            int64_t s = s_first + first / B, b = first % B;
            rows = min(min(CHUNK, B - b), last - first);
            for (int64_t q = 0; q < groups_of(vectors); q++) {
                int64_t column = group(vectors, q) * L, width = min(group(vectors, q + 1) * L, I) - column;
                back_product(rows, b, s, (const E *)job.packed_ih, vectors, q);
                copy_rows<E>(rows, width, width, {sums, 4 * L}, Rows<E>{(E *)a.dx, I}.from(time_of(s) * B + b, column));
            }
        }
    }

    void run(Place &place) {
        const int64_t groups = groups_of(panels), groups_x = groups_of(ceil_div(I, L));
        auto first = [&](int64_t count) { return share(count, place.thread, place.everyone); };
        auto last = [&](int64_t count) { return share(count, place.thread + 1, place.everyone); };
        pack_transposed<E>({(const E *)a.weight_hh, a.weight_hh_row}, H, H, (E *)job.packed_hh, first(groups), last(groups));
        if (a.dx)
            pack_transposed<E>({(const E *)a.weight_ih, a.weight_ih_row}, H, I, (E *)job.packed_ih, first(groups_x),
                               last(groups_x));
        if (job.strips) {
            int64_t panel = (I + H + 1) * 4 * L;
            zero_rows<E>(last(panels) - first(panels), panel, {(E *)job.dweights + first(panels) * panel, panel});
        }
        place.meet_everyone();

        const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
        const int64_t q_first = share(groups, place.member, place.members);
        const int64_t q_last = share(groups, place.member + 1, place.members);
        for (int64_t s = T - 1; s >= -1; s--) {
            for (int64_t q = q_first; q < q_last; q++)
                for (int64_t b = b_first; b < b_last; b += CHUNK) step(s, b, min(CHUNK, b_last - b), q);
            place.meet_team();
            if (s < 0 || s % job.chunk || (!job.strips && !a.dx)) continue;
            // The chunk before this one may be written over: all have read it before anybody could come to this meeting.
            const int64_t s_last = min(s + job.chunk, T), rows = (s_last - s) * B;
            if (job.strips) pack_strips(s, s_last, first(rows), last(rows));
            place.meet_everyone();
            if (job.strips) add_weight_gradients(s, s_last, first(panels), last(panels));
            if (a.dx) input_gradient(s, first(rows), last(rows));
        }
        if (job.strips) unpack_weight_gradients(first(panels), last(panels));
    }
};

template <class E> void backward(void *argument, int thread, int threads) {
    const BackwardJob &job = *(const BackwardJob *)argument;
    Place place(job, thread, threads);
    if (thread < place.everyone) Backward<E>(job).run(place);
}
