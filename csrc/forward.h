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

// A digest of all weights of a panel, that of fastlstm/backends/numba/primitives.py: each 64-bit pair of words goes to one of
// many lanes, lane = rotate_left(lane + pair, 13) * FACTOR. All lanes are kept and compared. A change within one pair is always
// seen; several changes in the same lane go unseen with odds of about 2**-64.
struct Digest {
    static constexpr int64_t CHAINS = fastlstm::digest_vectors(VECTOR_BYTES);
    typedef uint64_t Pairs __attribute__((vector_size(VECTOR_BYTES)));
    Pairs lanes[CHAINS];

    Digest() {
        for (uint64_t n = 0; n < CHAINS; n++)
            for (uint64_t k = 0; k < VECTOR_BYTES / 8; k++) lanes[n][k] = n * VECTOR_BYTES / 8 + k + 1;
    }
    static Pairs mix(Pairs lane, const char *from, int64_t bytes) {
        Pairs pairs = {};
        __builtin_memcpy(&pairs, from, bytes);
        lane += pairs;
        return (lane << 13 | lane >> 51) * UINT64_C(0x9E3779B1);
    }
    NOINLINE void add(const void *words, int64_t bytes) {
        const char *at = (const char *)words;
        Pairs own[CHAINS];  // which stay in registers
        UNROLL for (int64_t n = 0; n < CHAINS; n++) own[n] = lanes[n];
        for (; bytes >= CHAINS * VECTOR_BYTES; bytes -= CHAINS * VECTOR_BYTES)
            UNROLL for (int64_t n = 0; n < CHAINS; n++, at += VECTOR_BYTES) own[n] = mix(own[n], at, VECTOR_BYTES);
        for (; bytes >= VECTOR_BYTES; bytes -= VECTOR_BYTES, at += VECTOR_BYTES) own[0] = mix(own[0], at, VECTOR_BYTES);
        if (bytes) own[1] = mix(own[1], at, bytes);
        UNROLL for (int64_t n = 0; n < CHAINS; n++) lanes[n] = own[n];
    }
    template <class E> void add_rows(int64_t rows, int64_t columns, Rows<const E> weight) {
        if (weight.row == columns) columns *= rows, rows = 1;  // side by side: as one
        for (int64_t r = 0; r < rows; r++) add(weight[r], columns * sizeof(E));
    }
};

template <class E> NOINLINE Digest digest(const fastlstm_forward_args *a, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t valid = min(L, a->H - p * L);
    Digest digest;
    for (int64_t gate = 0; gate < 4; gate++) {
        const int64_t row = gate * a->H + p * L;
        digest.add_rows<E>(valid, a->I, {(const E *)a->weight_ih + row * a->weight_ih_row, a->weight_ih_row});
        digest.add_rows<E>(valid, a->H, {(const E *)a->weight_hh + row * a->weight_hh_row, a->weight_hh_row});
    }
    return digest;
}

// Where packed biases lie, behind all panels of the weights or those that there is room for, and after them the digests.
template <class E> E *biases_of(const fastlstm_forward_args *a, void *packed, int64_t panels = -1) {
    if (panels < 0) panels = ceil_div(a->H, Vector<E>::N);
    return (E *)packed + panels * (a->I + a->H) * 4 * Vector<E>::N;
}
template <class E> Digest *digests_of(const fastlstm_forward_args *a, void *packed) {
    return (Digest *)(biases_of<E>(a, packed) + ceil_div(a->H, Vector<E>::N) * 4 * Vector<E>::N);
}

// Whether the weights or biases of panel p have changed since they were packed.
template <class E> NOINLINE bool is_changed(const fastlstm_forward_args *a, void *packed, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    alignas(64) E biases[4 * L];
    pack_biases<E>(a, p, biases);
    if (__builtin_memcmp(biases, biases_of<E>(a, packed) + p * 4 * L, sizeof biases)) return true;
    const Digest seen = digest<E>(a, p);
    return __builtin_memcmp(&seen, (const char *)(digests_of<E>(a, packed) + p), sizeof seen) != 0;
}

// Rows of weight_ih and weight_hh of panel p to [k] and gates as they lie (see Panel), then zeros.
template <class E> void pack_panel(const fastlstm_forward_args *a, int64_t p, E *to) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t I = a->I, H = a->H, K = I + H;
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    const Panel<E> panel(H, p);
    if (panel.valid < L) zero_rows<E>(1, K * panel.wide(), {to, 0});
    for (int64_t gate = 0; gate < 4; gate++, to += panel.gate) {
        int64_t row = gate * H + p * L;
        transpose<E>(panel.valid, I, weight_ih.from(row, 0), {to, panel.wide()});
        transpose<E>(panel.valid, H, weight_hh.from(row, 0), {to + I * panel.wide(), panel.wide()});
    }
}

// Packed weights to be kept: weights, biases and digests. The digests come first: what is written to the weights from now on
// makes them differ.
template <class E> void pack_weights(const fastlstm_forward_args *a, void *packed) {
    constexpr int64_t L = Vector<E>::N;
    for (int64_t p = 0; p < ceil_div(a->H, L); p++) {
        const Digest digest_of_p = digest<E>(a, p);
        __builtin_memcpy((char *)(digests_of<E>(a, packed) + p), &digest_of_p, sizeof digest_of_p);
        pack_biases<E>(a, p, biases_of<E>(a, packed) + p * 4 * L);
        pack_panel<E>(a, p, (E *)packed + p * (a->I + a->H) * 4 * L);
    }
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
void finish_cells(int64_t rows, int64_t valid, Mask mask, ForwardScratch<E> &scratch, Rows<const E> h_prev,
                  Rows<const E> c_prev, Rows<E> h, Rows<E> c, E *gates) {
    constexpr int64_t L = Vector<E>::N;
    auto cells = gates ? cells_forward<E, true> : cells_forward<E, false>;
    const bool resets = mask.any(RESET, rows), holds = mask.any(HOLD, rows), cut = valid < L;
    if (cut || resets || (holds && c_prev.at == c.at)) {  // read aside: cut off, reset, or still wanted when overwritten
        copy_rows<E>(rows, valid, L, c_prev, {scratch.c_old, L});
        if (resets) mask.zero<E>(RESET, rows, L, {scratch.c_old, L});
        c_prev = {scratch.c_old, L};
    }
    cells(rows, scratch.preact, c_prev, cut ? Rows<E>{scratch.c_new, L} : c, cut ? Rows<E>{scratch.h_new, L} : h, gates);
    if (cut) {
        copy_rows<E>(rows, valid, valid, {scratch.h_new, L}, h);
        copy_rows<E>(rows, valid, valid, {scratch.c_new, L}, c);
    }
    for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) {
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
    // One step may read every panel once: a thread packs it when it comes to it, into memory that stays in its cache.
    const bool packs_as_used = job.pack && job.panels < panels;
    E *const biases = biases_of<E>(&a, job.packed, job.panels);
    if (job.pack) {
        for (int64_t p = first; p < last; p++) {
            pack_biases<E>(&a, p, biases + p * 4 * L);
            if (!packs_as_used) pack_panel<E>(&a, p, (E *)job.packed + p * K * 4 * L);
        }
        if (place.parts > 1) place.meet_everyone();  // otherwise everybody has packed what it will use
    } else if (a.changed) {  // the results are then thrown away, but the team still meets at its barriers
        for (int64_t p = first; p < last; p++)
            if (is_changed<E>(&a, job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    // What is this thread's of the rows and units, and where it begins
    const int64_t count = b_last - b_first, width = min(p_last * L, H) - p_first * L, own = b_first * H + p_first * L;
    E *h_all = (E *)a.h, *c_all = (E *)(a.c ? a.c : a.c_n);
    ForwardScratch<E> scratch;
    Rows<const E> h_prev{(const E *)a.h_0, a.h_0_row}, c_prev{(const E *)a.c_0, a.c_0_row};
    const bool begins_at_zero = is_zero<E>(B, H, h_prev);  // all rows: who computes which must not decide
    // Held steps carry the state until everybody has read it.
    auto hide = [&](int64_t t) { Mask(a, t, b_first).zero<E>(HOLD, count, width, {h_all + t * B * H + own, H}); };

    for (int64_t s = 0; s < T; s++) {
        const int64_t t = a.reverse ? T - 1 - s : s;
        const Rows<const E> x{(const E *)a.x + t * a.x_step, a.x_row};
        const Rows<E> h{h_all + t * B * H, H}, c{a.c ? c_all + t * B * H : c_all, H};
        const Mask mask(a, t, b_first);
        Rows<const E> h_seen = h_prev;
        if (mask.any(RESET, count)) {
            Rows<E> reset{(E *)job.resets + thread * B * H, H};
            copy_rows<E>(count, H, H, h_prev.from(b_first, 0), reset.from(b_first, 0));
            mask.zero<E>(RESET, count, H, reset.from(b_first, 0));
            h_seen = reset;
        }
        for (int64_t j = p_first; j < p_last; j++) {  // to and fro: the weights read last are still in the L2 cache
            const int64_t p = s % 2 == 0 ? j : p_first + p_last - 1 - j;
            const int64_t valid = min(L, H - p * L), u = p * L;
            E *const packed = (E *)job.packed + (packs_as_used ? thread : p) * K * 4 * L;
            if (packs_as_used) pack_panel<E>(&a, p, packed);
            for (int64_t b = b_first; b < b_last; b += CHUNK) {
                int64_t rows = min(CHUNK, b_last - b);
                const Rows<const E> h_rows = s == 0 && begins_at_zero ? Rows<const E>{nullptr, 0} : h_seen.from(b, 0);
                preact_of<E>(rows, {H, p}, I, K, packed, biases + p * 4 * L, x.from(b, 0), h_rows, scratch);
                E *gates = a.gates ? (E *)a.gates + ((t * panels + p) * B + b) * 4 * L : nullptr;
                finish_cells<E>(rows, valid, Mask(a, t, b), scratch, h_prev.from(b, u), c_prev.from(b, u),
                                h.from(b, u), c.from(b, u), gates);
            }
        }
        place.meet_team();
        if (s > 0) hide(a.reverse ? t + 1 : t - 1);
        h_prev = h, c_prev = c;
    }
    copy_rows<E>(count, width, width, {h_prev.at + own, H}, {(E *)a.h_n + own, H});
    if (a.c) copy_rows<E>(count, width, width, {c_prev.at + own, H}, {(E *)a.c_n + own, H});
    if (a.h != a.h_n) hide(a.reverse ? 0 : T - 1);
}
