// The forward pass of a layer: every time step for this thread's rows and units.
#pragma once

// The sum of the biases of panel p to [gate][lane], units past H zero.
template <class E> NOINLINE void pack_biases(const fastlstm_forward_args *a, int64_t p, E *to) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t valid = min(L, a->H - p * L);
    zero_rows<E>(1, 4 * L, {to, 0});
    for (int64_t gate = 0; gate < 4; gate++) {
        int64_t row = gate * a->H + p * L;
        if (a->bias) copy_rows<E>(1, valid, valid, {(const E *)a->bias + row, 0}, {to + gate * L, 0});
        if (a->bias_hh) add_rows<E>(1, valid, {(const E *)a->bias_hh + row, 0}, {to + gate * L, 0});
    }
}

template <class E> bool differ(const E *x, const E *y) { return __builtin_memcmp(x, y, sizeof *x) != 0; }

// Whether panel p is not the weights' in a bias or in one element of each of their rows, from a column that moves on with
// the row so that every column is met. What changes a whole row, a whole column or everything is found.
template <class E> NOINLINE bool is_changed(const fastlstm_forward_args *a, const E *packed, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = a->I, H = a->H, K = I + H, panels = ceil_div(H, L), columns = min(I, 4 * H);
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    const E *panel = packed + p * K * 4 * L;
    alignas(64) E biases[4 * L];
    pack_biases<E>(a, p, biases);
    if (__builtin_memcmp(biases, packed + (panels * K + p) * 4 * L, sizeof biases)) return true;
    for (int64_t gate = 0; gate < 4; gate++) {
        int64_t row = gate * H + p * L, column = row % columns;
        const E *at = panel + gate * L;
        for (int64_t u = p * L; u < min(H, (p + 1) * L); u++, row++, at++) {
            if (differ(weight_hh[row] + u, at + (I + u) * 4 * L)) return true;
            for (int64_t k = column; k < I; k += 4 * H)
                if (differ(weight_ih[row] + k, at + k * 4 * L)) return true;
            if (++column == columns) column = 0;
        }
    }
    return false;
}

// Rows of weight_ih and weight_hh to [panel][k][gate][lane], units past H zero; then the biases [panel][gate][lane].
template <class E> void pack_weights(const fastlstm_forward_args *a, void *packed, int64_t first, int64_t last) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = a->I, H = a->H, K = I + H, panels = ceil_div(H, L);
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    for (int64_t p = first; p < last; p++) {
        E *panel = (E *)packed + p * K * 4 * L;
        int64_t valid = min(L, H - p * L);
        pack_biases<E>(a, p, (E *)packed + (panels * K + p) * 4 * L);
        if (valid < L) zero_rows<E>(1, K * 4 * L, {panel, 0});
        for (int64_t gate = 0; gate < 4; gate++) {
            int64_t row = gate * H + p * L;
            transpose<E>(valid, I, weight_ih.from(row, 0), {panel + gate * L, 4 * L});
            transpose<E>(valid, H, weight_hh.from(row, 0), {panel + I * 4 * L + gate * L, 4 * L});
        }
    }
}

template <class E> struct ForwardScratch {
    alignas(64) E preact[CHUNK * 4 * Vector<E>::N], c_old[CHUNK * Vector<E>::N], c_new[CHUNK * Vector<E>::N],
        h_new[CHUNK * Vector<E>::N];
};

// preact (rows, 4, lanes) of one panel: the rows of x and h against its weights, in blocks of at most BLOCK_K
template <class E>
void preact_of(int64_t rows, int64_t I, int64_t K, const E *w, const E *biases, Rows<const E> x, Rows<const E> h, E *out) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t block = ceil_div(K, ceil_div(K, BLOCK_K));
    Rows<const E> init{biases, 0};
    for (int64_t k = 0; k < K; k += block, init = {out, 4 * L}) {
        int64_t last = min(k + block, K), of_x = max(0, min(last, I) - k), of_h = last - k - of_x;
        const E *x_k = of_x ? x.at + k : x.at, *h_k = of_h ? h.at + max(0, k - I) : h.at;
        product<E, 4>(rows, {init.at, init.row, out, 4 * L, w + k * 4 * L, x_k, x.row, 1, of_x, 1, 0, h_k, h.row, of_h});
    }
}

// h and c of one panel from its preact. Whole vectors go to scratch, then what belongs to the user's rows, where the
// panel is not full or a row is reset or held.
template <class E>
void finish_cells(int64_t rows, int64_t valid, const int32_t *mask, ForwardScratch<E> &scratch, Rows<const E> h_prev,
                  Rows<const E> c_prev, Rows<E> h, Rows<E> c, E *gates) {
    constexpr int64_t L = Vector<E>::N;
    auto cells = gates ? cells_forward<E, true> : cells_forward<E, false>;
    bool resets = any_row(mask, rows, RESET), holds = any_row(mask, rows, HOLD);
    if (valid == L && !resets && !holds) return cells(rows, scratch.preact, c_prev, c, h, gates);
    Rows<E> c_old{scratch.c_old, L}, c_new{scratch.c_new, L}, h_new{scratch.h_new, L};
    copy_rows<E>(rows, valid, L, c_prev, c_old);
    if (resets) zero_masked(mask, RESET, rows, L, c_old);
    cells(rows, scratch.preact, c_old, c_new, h_new, gates);
    for (int64_t r = 0; r < rows; r++) {
        bool held = mask && mask[r] == HOLD;
        copy_rows<E>(1, valid, valid, {held ? h_prev[r] : h_new[r], 0}, {h[r], 0});
        copy_rows<E>(1, valid, valid, {held ? c_prev[r] : c_new[r], 0}, {c[r], 0});
    }
}

template <class E> void forward(void *argument, int thread, int threads) {
    constexpr int64_t L = Vector<E>::N;
    const ForwardJob &job = *(const ForwardJob *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, K = I + H, panels = ceil_div(H, L);
    const int64_t first = share(panels, thread, place.everyone), last = share(panels, thread + 1, place.everyone);
    if (job.pack) {
        pack_weights<E>(&a, job.packed, first, last);
        place.meet_everyone();
    } else if (a.changed) {  // the results are then thrown away, but the team still meets at its barriers
        for (int64_t p = first; p < last; p++)
            if (is_changed(&a, (const E *)job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = share(panels, place.member, place.members);
    const int64_t p_last = share(panels, place.member + 1, place.members);
    const E *packed = (const E *)job.packed, *biases = packed + panels * K * 4 * L;
    E *h_all = (E *)a.h, *c_all = (E *)(a.c ? a.c : a.c_n);
    ForwardScratch<E> scratch;
    Rows<const E> h_prev{(const E *)a.h_0, a.h_0_row}, c_prev{(const E *)a.c_0, a.c_0_row};

    for (int64_t s = 0; s < T; s++) {
        const int64_t t = a.reverse ? T - 1 - s : s;
        const Rows<const E> x{(const E *)a.x + t * a.x_step, a.x_row};
        const Rows<E> h{h_all + t * B * H, H}, c{a.c ? c_all + t * B * H : c_all, H};
        const int32_t *mask = a.mask ? a.mask + t * B : nullptr;
        Rows<const E> h_seen = h_prev;
        if (any_row(mask ? mask + b_first : mask, b_last - b_first, RESET)) {
            Rows<E> reset{(E *)job.resets + thread * B * H, H};
            copy_rows<E>(b_last - b_first, H, H, h_prev.from(b_first, 0), reset.from(b_first, 0));
            zero_masked<E>(mask + b_first, RESET, b_last - b_first, H, reset.from(b_first, 0));
            h_seen = reset;
        }
        for (int64_t p = p_first; p < p_last; p++) {
            const int64_t valid = min(L, H - p * L), u = p * L;
            for (int64_t b = b_first; b < b_last; b += CHUNK) {
                int64_t rows = min(CHUNK, b_last - b);
                preact_of<E>(rows, I, K, packed + p * K * 4 * L, biases + p * 4 * L, x.from(b, 0), h_seen.from(b, 0),
                             scratch.preact);
                E *gates = a.gates ? (E *)a.gates + ((t * panels + p) * B + b) * 4 * L : nullptr;
                finish_cells<E>(rows, valid, mask ? mask + b : mask, scratch, h_prev.from(b, u), c_prev.from(b, u),
                                h.from(b, u), c.from(b, u), gates);
            }
        }
        h_prev = h, c_prev = c;
        place.meet_team();
    }
    if (place.member == 0) {
        int64_t rows = b_last - b_first;
        copy_rows<E>(rows, H, H, h_prev.from(b_first, 0), {(E *)a.h_n + b_first * H, H});
        if (a.c) copy_rows<E>(rows, H, H, c_prev.from(b_first, 0), {(E *)a.c_n + b_first * H, H});
    }
}
