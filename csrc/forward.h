// The forward pass of a layer: every time step for this thread's rows and units.
#pragma once

// The sum of the biases of panel p as its gates lie (see Panel), then zeros.
template <class E> NOINLINE void pack_biases(const fastlstm_forward_args *a, int64_t p, E *to) {
    constexpr int64_t L = Vector<E>::N;
    const Panel<E> panel(a->H, p);
    zero_rows<E>(1, 4 * L, {to, 0});
    for (int64_t gate = 0; gate < 4; gate++, to += panel.gate) {
        int64_t row = gate * a->H + p * L;
        if (a->bias) copy_rows<E>(1, panel.valid, panel.valid, {(const E *)a->bias + row, 0}, {to, 0});
        if (a->bias_hh) add_rows<E>(1, panel.valid, {(const E *)a->bias_hh + row, 0}, {to, 0});
    }
}

// A vector of bits over all weights of a panel. Any change of one 32-bit word changes it; rotation, exclusive or and product
// keep other changes from cancelling: a turned sign of all weights, two rows swapped.
struct Digest {
    static constexpr int64_t CHAINS = 4;
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    Words state[CHAINS];

    Digest() {
        for (uint32_t n = 0; n < CHAINS; n++)
            for (uint32_t k = 0; k < VECTOR_BYTES / 4; k++) state[n][k] = n * VECTOR_BYTES / 4 + k + 1;
    }
    void mix(int64_t n, const char *from, int64_t bytes) {
        Words words = {};
        __builtin_memcpy(&words, from, bytes);
        words ^= state[n];
        state[n] = (words << 13 | words >> 19) * UINT32_C(0x9E3779B1);
    }
    NOINLINE void add(const void *row, int64_t bytes) {
        const char *at = (const char *)row;
        for (; bytes >= CHAINS * VECTOR_BYTES; bytes -= CHAINS * VECTOR_BYTES)
            UNROLL for (int64_t n = 0; n < CHAINS; n++, at += VECTOR_BYTES) mix(n, at, VECTOR_BYTES);
        for (; bytes >= VECTOR_BYTES; bytes -= VECTOR_BYTES, at += VECTOR_BYTES) mix(0, at, VECTOR_BYTES);
        if (bytes) mix(0, at, bytes);
    }
    void store(void *to) {
        for (int64_t n = 1; n < CHAINS; n++) mix(0, (const char *)&state[n], VECTOR_BYTES);
        __builtin_memcpy(to, &state[0], VECTOR_BYTES);
    }
};

template <class E> NOINLINE void digest(const fastlstm_forward_args *a, int64_t p, E *to) {
    constexpr int64_t L = Vector<E>::N;
    Digest digest;
    for (int64_t gate = 0; gate < 4; gate++) {
        for (int64_t row = gate * a->H + p * L, end = row + min(L, a->H - p * L); row < end; row++) {
            digest.add((const E *)a->weight_ih + row * a->weight_ih_row, a->I * sizeof(E));
            digest.add((const E *)a->weight_hh + row * a->weight_hh_row, a->H * sizeof(E));
        }
    }
    digest.store(to);
}

template <class E> bool differ(const E *x, const E *y) { return __builtin_memcmp(x, y, sizeof *x) != 0; }

// Whether panel p is not the weights' in a bias or in one element of each of their rows, from a column that moves on with
// the row so that every column is met: what changes a whole row, a whole column or everything is found. Where a backward
// pass follows, in any element.
template <class E> NOINLINE bool is_changed(const fastlstm_forward_args *a, const E *packed, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = a->I, H = a->H, K = I + H, panels = ceil_div(H, L), columns = min(I, 4 * H);
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    const Panel<E> panel(H, p);
    const E *weights = packed + p * K * 4 * L, *of_biases = packed + panels * K * 4 * L, *digests = of_biases + panels * 4 * L;
    alignas(64) E seen[4 * L];
    pack_biases<E>(a, p, seen);
    if (__builtin_memcmp(seen, of_biases + p * 4 * L, sizeof seen)) return true;
    if (a->gates) {
        digest<E>(a, p, seen);
        return __builtin_memcmp(seen, digests + p * L, VECTOR_BYTES) != 0;
    }
    for (int64_t gate = 0; gate < 4; gate++) {
        int64_t row = gate * H + p * L, column = row % columns;
        const E *at = weights + gate * panel.gate;
        for (int64_t u = p * L; u < min(H, (p + 1) * L); u++, row++, at++) {
            if (differ(weight_hh[row] + u, at + (I + u) * panel.wide())) return true;
            for (int64_t k = column; k < I; k += 4 * H)
                if (differ(weight_ih[row] + k, at + k * panel.wide())) return true;
            if (++column == columns) column = 0;
        }
    }
    return false;
}

// Rows of weight_ih and weight_hh to [panel][k] and gates as they lie (see Panel), then zeros; then the biases, and where the
// packed weights are to be kept a digest of each panel.
template <class E>
void pack_panels(const fastlstm_forward_args *a, void *packed, int64_t first, int64_t last, bool keep) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = a->I, H = a->H, K = I + H, panels = ceil_div(H, L);
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    for (int64_t p = first; p < last; p++) {
        const Panel<E> panel(H, p);
        E *to = (E *)packed + p * K * 4 * L;
        pack_biases<E>(a, p, (E *)packed + (panels * K + p) * 4 * L);
        if (keep) digest<E>(a, p, (E *)packed + panels * (K + 1) * 4 * L + p * L);
        if (panel.valid < L) zero_rows<E>(1, K * panel.wide(), {to, 0});
        for (int64_t gate = 0; gate < 4; gate++, to += panel.gate) {
            int64_t row = gate * H + p * L;
            transpose<E>(panel.valid, I, weight_ih.from(row, 0), {to, panel.wide()});
            transpose<E>(panel.valid, H, weight_hh.from(row, 0), {to + I * panel.wide(), panel.wide()});
        }
    }
}

template <class E> void pack_weights(const fastlstm_forward_args *a, void *packed) {
    pack_panels<E>(a, packed, 0, ceil_div(a->H, Vector<E>::N), true);
}

template <class E> struct ForwardScratch {
    alignas(64) E preact[CHUNK * 4 * Vector<E>::N], side_by_side[CHUNK * 3 * Vector<E>::N], c_old[CHUNK * Vector<E>::N],
        c_new[CHUNK * Vector<E>::N], h_new[CHUNK * Vector<E>::N];
};

// preact (rows, 4, lanes) of one panel: the rows of x and h against its weights, in blocks of at most BLOCK_K. No h: it is
// zero.
template <class E>
void preact_of(int64_t rows, Panel<E> panel, int64_t I, int64_t K, const E *w, const E *biases, Rows<const E> x,
               Rows<const E> h, ForwardScratch<E> &scratch) {
    const int64_t block = ceil_div(K, ceil_div(K, BLOCK_K)), used = h.at ? K : I, wide = panel.wide();
    E *out = panel.vectors < 4 ? scratch.side_by_side : scratch.preact;
    Rows<const E> init{biases, 0};
    for (int64_t k = 0; k < used; k += block, init = {out, wide}) {
        int64_t last = min(k + block, used), of_x = max(0, min(last, I) - k), of_h = last - k - of_x;
        const E *x_k = of_x ? x.at + k : x.at, *h_k = of_h ? h.at + max(0, k - I) : h.at;
        multiply<E>(panel.vectors, rows,
                      {init.at, init.row, out, wide, w + k * wide, x_k, x.row, 1, of_x, 1, 0, h_k, h.row, of_h});
    }
    if (panel.vectors < 4) panel.spread(rows, out, scratch.preact);
}

// h and c of one panel from its preact. Whole vectors go to scratch, then what belongs to the user's rows, where the
// panel is not full. A held row's are those before.
template <class E>
void finish_cells(int64_t rows, int64_t valid, const int32_t *mask, ForwardScratch<E> &scratch, Rows<const E> h_prev,
                  Rows<const E> c_prev, Rows<E> h, Rows<E> c, E *gates) {
    constexpr int64_t L = Vector<E>::N;
    auto cells = gates ? cells_forward<E, true> : cells_forward<E, false>;
    const bool resets = any_row(mask, rows, RESET), holds = any_row(mask, rows, HOLD), cut = valid < L;
    if (cut || resets || (holds && c_prev.at == c.at)) {  // read aside: cut off, reset, or still wanted when overwritten
        copy_rows<E>(rows, valid, L, c_prev, {scratch.c_old, L});
        if (resets) zero_masked<E>(mask, RESET, rows, L, {scratch.c_old, L});
        c_prev = {scratch.c_old, L};
    }
    cells(rows, scratch.preact, c_prev, cut ? Rows<E>{scratch.c_new, L} : c, cut ? Rows<E>{scratch.h_new, L} : h, gates);
    if (cut) {
        copy_rows<E>(rows, valid, valid, {scratch.h_new, L}, h);
        copy_rows<E>(rows, valid, valid, {scratch.c_new, L}, c);
    }
    for (int64_t r = 0; holds && r < rows; r++) {
        if (mask[r] != HOLD) continue;
        copy_rows<E>(1, valid, valid, {h_prev[r], 0}, {h[r], 0});
        copy_rows<E>(1, valid, valid, {c_prev[r], 0}, {c[r], 0});
    }
}

template <class E> void forward(void *argument, int thread, int threads) {
    constexpr int64_t L = Vector<E>::N;
    const ForwardJob &job = *(const ForwardJob *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, K = I + H, panels = ceil_div(H, L);
    const int64_t first = place.first(panels), last = place.last(panels);
    if (job.pack) {
        pack_panels<E>(&a, job.packed, first, last, false);
        if (place.parts > 1) place.meet_everyone();  // otherwise everybody has packed what it will use
    } else if (a.changed) {  // the results are then thrown away, but the team still meets at its barriers
        for (int64_t p = first; p < last; p++)
            if (is_changed(&a, (const E *)job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    const E *packed = (const E *)job.packed, *biases = packed + panels * K * 4 * L;
    E *h_all = (E *)a.h, *c_all = (E *)(a.c ? a.c : a.c_n);
    ForwardScratch<E> scratch;
    Rows<const E> h_prev{(const E *)a.h_0, a.h_0_row}, c_prev{(const E *)a.c_0, a.c_0_row};
    const bool begins_at_zero = is_zero<E>(B, H, h_prev);  // all rows: who computes which must not decide

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
        for (int64_t j = p_first; j < p_last; j++) {  // to and fro: the weights read last are still in the L2 cache
            const int64_t p = s % 2 == 0 ? j : p_first + p_last - 1 - j;
            const int64_t valid = min(L, H - p * L), u = p * L;
            for (int64_t b = b_first; b < b_last; b += CHUNK) {
                int64_t rows = min(CHUNK, b_last - b);
                const Rows<const E> h_rows = s == 0 && begins_at_zero ? Rows<const E>{nullptr, 0} : h_seen.from(b, 0);
                preact_of<E>(rows, {H, p}, I, K, packed + p * K * 4 * L, biases + p * 4 * L, x.from(b, 0), h_rows, scratch);
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
