// The forward pass of a layer: every time step for this thread's rows and units.
#pragma once

// The biases of panel p, `pitch` from one sum to the next, added up where both products fill a sum, then zeros.
template <class C, class E>
NOINLINE void pack_biases(const fastlstm_forward_args *a, int64_t p, int64_t pitch, E *to) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t valid = min(L, a->H - p * L);
    zero_rows<E>(1, C::S * L, {to, 0});
    for (int64_t k = 0; a->bias_ih && k < C::X; k++) {
        const E *from = (const E *)a->bias_ih + C::BLOCKS_IH[k] * a->H + p * L;
        copy_rows<E>(1, valid, valid, {from, 0}, {to + k * pitch, 0});
    }
    for (int64_t k = 0; a->bias_hh && k < C::Y; k++) {
        const E *from = (const E *)a->bias_hh + C::BLOCKS_HH[k] * a->H + p * L;
        add_rows<E>(1, valid, {from, 0}, {to + (C::S - C::Y + k) * pitch, 0});
    }
}

// A digest of weights, as that of the numba backend (llvm/digest.py): each 64-bit pair of words goes to one of many lanes,
// lane = rotate_left(lane + pair, 13), and every fourth time, and at the end, lane * FACTOR. All lanes are kept and compared.
// A change within one pair is always seen; several changes in the same lane go unseen with odds of about 2**-64.
struct Digest {
    static constexpr int64_t CHAINS = fastlstm::digest_vectors(VECTOR_BYTES), ROUND = CHAINS * VECTOR_BYTES;
    typedef uint64_t Pairs __attribute__((vector_size(VECTOR_BYTES)));
    Pairs lanes[CHAINS];

    Digest() {
        for (uint64_t n = 0; n < CHAINS; n++)
            for (uint64_t k = 0; k < VECTOR_BYTES / 8; k++) lanes[n][k] = n * VECTOR_BYTES / 8 + k + 1;
    }
    static Pairs mix(Pairs lane, const char *from, int64_t bytes = VECTOR_BYTES, bool multiplies = true) {
        Pairs pairs = {};
        __builtin_memcpy(&pairs, from, bytes);
        lane += pairs;
        lane = lane << 13 | lane >> 51;
        return multiplies ? lane * UINT64_C(0x9E3779B1) : lane;
    }
    NOINLINE void add(const void *words, int64_t bytes) {
        const char *at = (const char *)words;
        Pairs own[CHAINS];  // which stay in registers
        UNROLL for (int64_t n = 0; n < CHAINS; n++) own[n] = lanes[n];
        for (; bytes >= 4 * ROUND; bytes -= 4 * ROUND)
            UNROLL for (int k = 0; k < 4; k++, at += ROUND)
                UNROLL for (int64_t n = 0; n < CHAINS; n++) own[n] = mix(own[n], at + n * VECTOR_BYTES, VECTOR_BYTES, k == 3);
        for (; bytes >= ROUND; bytes -= ROUND, at += ROUND)
            UNROLL for (int64_t n = 0; n < CHAINS; n++) own[n] = mix(own[n], at + n * VECTOR_BYTES);
        UNROLL for (int64_t n = 0; n < CHAINS; n++) {
            const int64_t next = min(bytes, VECTOR_BYTES);
            if (next == VECTOR_BYTES) own[n] = mix(own[n], at);
            else if (next) own[n] = mix(own[n], at, next);
            at += next, bytes -= next;
        }
        UNROLL for (int64_t n = 0; n < CHAINS; n++) lanes[n] = own[n];
    }
    template <class W> void add_rows(int64_t rows, int64_t columns, Rows<const W> weight) {
        if (weight.row == columns) columns *= rows, rows = 1;  // side by side: as one
        for (int64_t r = 0; r < rows; r++) add(weight[r], columns * sizeof(W));
    }
};

// Of the part of all weights, which are of W, that is kept with panel p of E. All parts together are compared.
template <class C, class E, class W = E> NOINLINE Digest digest(const fastlstm_forward_args *a, int64_t p) {
    const int64_t panels = ceil_div(a->H, Vector<E>::N), first_x = share(C::X * a->H, p, panels);
    const int64_t first_h = share(C::Y * a->H, p, panels);
    const Rows<const W> ih{(const W *)a->weight_ih, a->weight_ih_row}, hh{(const W *)a->weight_hh, a->weight_hh_row};
    Digest digest;
    digest.add_rows<W>(share(C::X * a->H, p + 1, panels) - first_x, a->I, ih.from(first_x, 0));
    digest.add_rows<W>(share(C::Y * a->H, p + 1, panels) - first_h, a->H, hh.from(first_h, 0));
    return digest;
}

// Elements of a panel of packed weights; a narrow one, which is the last, leaves some of its unused.
template <class C, class E> int64_t panel_size(const fastlstm_forward_args *a) {
    return (a->I * C::X + a->H * C::Y) * Vector<E>::N;
}
// Where packed biases lie, behind all panels of the weights or those that there is room for, and after them the digests.
template <class C, class E> E *biases_of(const fastlstm_forward_args *a, void *packed, int64_t panels = -1) {
    if (panels < 0) panels = ceil_div(a->H, Vector<E>::N);
    return (E *)packed + panels * panel_size<C, E>(a);
}
template <class C, class E> Digest *digests_of(const fastlstm_forward_args *a, void *packed) {
    return (Digest *)(biases_of<C, E>(a, packed) + ceil_div(a->H, Vector<E>::N) * C::S * Vector<E>::N);
}

// Whether the weights or biases of panel p have changed since they were packed.
template <class C, class E> NOINLINE bool is_changed(const fastlstm_forward_args *a, void *packed, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    alignas(64) E biases[C::S * L];
    pack_biases<C, E>(a, p, Panel<C, E>(a->H, p).pitch, biases);
    if (__builtin_memcmp(biases, biases_of<C, E>(a, packed) + p * C::S * L, sizeof biases)) return true;
    const Digest seen = digest<C, E>(a, p);
    return __builtin_memcmp(&seen, (const char *)(digests_of<C, E>(a, packed) + p), sizeof seen) != 0;
}

// Rows of weight_ih of panel p to [k] and sums as they lie (see Panel), then zeros; then those of weight_hh.
template <class C, class E> void pack_panel(const fastlstm_forward_args *a, int64_t p, E *to) {
    constexpr int64_t L = Vector<E>::N;
    const Rows<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Rows<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    const Panel<C, E> panel(a->H, p);
    const int64_t of_x = panel.of_x() * L, of_h = panel.of_h() * L;
    E *const to_h = to + a->I * of_x;
    if (panel.valid < L) zero_rows<E>(1, a->I * of_x + a->H * of_h, {to, 0});
    auto pack = [&](Rows<const E> weight, int64_t block, int64_t columns, Rows<E> target) {
        transpose<E>(panel.valid, columns, weight.from(block * a->H + p * L, 0), target);
    };
    for (int64_t k = 0; k < C::X; k++) pack(weight_ih, C::BLOCKS_IH[k], a->I, {to + k * panel.pitch, of_x});
    for (int64_t k = 0; k < C::Y; k++) pack(weight_hh, C::BLOCKS_HH[k], a->H, {to_h + k * panel.pitch, of_h});
}

template <class C, class E> size_t packed_size(int64_t I, int64_t H) {
    constexpr int64_t L = Vector<E>::N;
    return (size_t)ceil_div(H, L) * ((I * C::X + H * C::Y + C::S) * L * sizeof(E) + sizeof(Digest));
}

// Packed weights to be kept: weights, biases and digests. The digests come first: what is written to the weights from now on
// makes them differ.
template <class C, class E> void pack_weights(const fastlstm_forward_args *a, void *packed) {
    constexpr int64_t L = Vector<E>::N;
    for (int64_t p = 0; p < ceil_div(a->H, L); p++) {
        const Digest digest_of_p = digest<C, E>(a, p);
        __builtin_memcpy((char *)(digests_of<C, E>(a, packed) + p), &digest_of_p, sizeof digest_of_p);
        pack_biases<C, E>(a, p, Panel<C, E>(a->H, p).pitch, biases_of<C, E>(a, packed) + p * C::S * L);
        pack_panel<C, E>(a, p, (E *)packed + p * panel_size<C, E>(a));
    }
}

template <class C, class E> struct ForwardScratch {
    static constexpr int64_t L = Vector<E>::N;
    alignas(64) E preact[CHUNK * C::S * L], side_by_side[CHUNK * (C::S - 1) * L], old[C::STATES - C::OWN][CHUNK * L],
        made[C::STATES][CHUNK * L];
};

// out (rows, vectors) = init + a (rows, count) times w (count, vectors), in blocks of at most BLOCK_K
template <class E>
void add_product(int64_t vectors, int64_t rows, Rows<const E> init, Rows<E> out, const E *w, Rows<const E> a,
                 int64_t count) {
    const int64_t block = ceil_div(count, ceil_div(count, BLOCK_K)), wide = vectors * Vector<E>::N;
    for (int64_t k = 0; k < count; k += block, init = out)
        multiply<E>(vectors, rows,
                    {init.at, init.row, out.at, out.row, w + k * wide, a.at + k, a.row, 1, min(block, count - k), 1, 0,
                     a.at, 0, 0});
}

// preact (rows, S, lanes) of one panel: the rows of x and h against its weights, in blocks of at most BLOCK_K. No h: it
// is zero. Where both products fill all sums, a block may have some of both.
template <class C, class E>
void preact_of(int64_t rows, Panel<C, E> panel, int64_t I, int64_t H, const E *w, const E *biases, Rows<const E> x,
               Rows<const E> h, ForwardScratch<C, E> &scratch) {
    constexpr int64_t L = Vector<E>::N;
    if (!panel.ALIKE) {
        const Rows<E> out{scratch.preact, C::S * L}, out_h = out.from(0, (C::S - C::Y) * L);
        copy_rows<E>(rows, (C::S - C::X) * L, 0, {biases + C::X * L, 0}, out.from(0, C::X * L));
        add_product<E>(C::X, rows, {biases, 0}, out, w, x, I);
        if (h.at) add_product<E>(C::Y, rows, out_h, out_h, w + I * C::X * L, h, H);
        return;
    }
    const int64_t K = I + H, block = ceil_div(K, ceil_div(K, BLOCK_K)), used = h.at ? K : I, wide = panel.wide();
    E *out = panel.is_narrow() ? scratch.side_by_side : scratch.preact;
    Rows<const E> init{biases, 0};
    for (int64_t k = 0; k < used; k += block, init = {out, wide}) {
        int64_t last = min(k + block, used), of_x = max(0, min(last, I) - k), of_h = last - k - of_x;
        const E *x_k = of_x ? x.at + k : x.at, *h_k = of_h ? h.at + max(0, k - I) : h.at;
        multiply<E>(panel.vectors, rows,
                    {init.at, init.row, out, wide, w + k * wide, x_k, x.row, 1, of_x, 1, 0, h_k, h.row, of_h});
    }
    if (panel.is_narrow()) panel.spread(rows, out, scratch.preact);
}

// The states of one panel from its preact. Whole vectors go to scratch, then what belongs to the user's rows, where the
// panel is not full. A held row's are those before. MAY_SAVE: `saved` is not always NULL.
template <class C, class E, bool MAY_SAVE = true>
void finish_cells(int64_t rows, int64_t valid, Mask mask, const E *preact, ForwardScratch<C, E> &scratch,
                  Rows<const E> (&prev)[C::STATES], const Rows<E> (&next)[C::STATES], E *saved) {
    constexpr int64_t L = Vector<E>::N;
    auto cells = saved ? cells_forward<C, E, MAY_SAVE> : cells_forward<C, E, false>;
    const bool resets = mask.any(RESET, rows), holds = mask.any(HOLD, rows), cut = valid < L;
    Rows<E> made[C::STATES];
    for (int k = 0; k < C::STATES; k++) {
        made[k] = cut ? Rows<E>{scratch.made[k], L} : next[k];
        if (k < C::OWN || !(cut || resets || (holds && prev[k].at == next[k].at))) continue;
        const Rows<E> aside{scratch.old[k - C::OWN], L};  // cut off, reset, or still wanted when overwritten
        copy_rows<E>(rows, valid, L, prev[k], aside);
        if (resets) mask.zero<E>(RESET, rows, L, aside);
        prev[k] = aside;
    }
    cells(rows, preact, prev, made, saved);
    for (int k = 0; cut && k < C::STATES; k++) copy_rows<E>(rows, valid, valid, made[k], next[k]);
    for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1))
        for (int k = 0; k < C::STATES; k++) copy_rows<E>(1, valid, valid, {prev[k][r], 0}, {next[k][r], 0});
}

template <class C, class E> void forward(void *argument, int thread, int threads) {
    constexpr int64_t L = Vector<E>::N;
    const ForwardJob &job = *(const ForwardJob *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, L), size = panel_size<C, E>(&a);
    const int64_t first = place.first(panels), last = place.last(panels);
    // One step may read every panel once: a thread packs it when it comes to it, into memory that stays in its cache.
    const bool packs_as_used = job.pack && job.panels < panels;
    E *const biases = biases_of<C, E>(&a, job.packed, job.panels);
    if (job.pack) {
        for (int64_t p = first; p < last; p++) {
            pack_biases<C, E>(&a, p, Panel<C, E>(H, p).pitch, biases + p * C::S * L);
            if (!packs_as_used) pack_panel<C, E>(&a, p, (E *)job.packed + p * size);
        }
        if (place.parts > 1) place.meet_everyone();  // otherwise everybody has packed what it will use
    } else if (a.changed) {  // the results are then thrown away, but the team still meets at its barriers
        for (int64_t p = first; p < last; p++)
            if (is_changed<C, E>(&a, job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    // What is this thread's of the rows and units, and where it begins
    const int64_t count = b_last - b_first, width = min(p_last * L, H) - p_first * L, own = b_first * H + p_first * L;
    // h and c: all steps, or one where c is not kept, and the states before a step and after it
    static_assert(C::STATES <= 2, "the arguments have no more states");
    E *const all[] = {(E *)a.h, (E *)(a.c ? a.c : a.c_n)};
    const int64_t step[] = {B * H, a.c ? B * H : 0};
    Rows<const E> prev[] = {{(const E *)a.h_0, a.h_0_row}, {(const E *)a.c_0, a.c_0_row}};
    ForwardScratch<C, E> scratch;
    const bool begins_at_zero = is_zero<E>(B, H, prev[0]);  // all rows: who computes which must not decide
    // Held steps carry the state until everybody has read it.
    auto hide = [&](int64_t t) { Mask(a, t, b_first).zero<E>(HOLD, count, width, {all[0] + t * B * H + own, H}); };

    for (int64_t s = 0; s < T; s++) {
        const int64_t t = a.reverse ? T - 1 - s : s;
        const Rows<const E> x{(const E *)a.x + t * a.x_step, a.x_row};
        const Rows<E> next[] = {{all[0] + t * step[0], H}, {all[1] + t * step[1], H}};
        const Mask mask(a, t, b_first);
        if (mask.any(RESET, count)) {  // of a held row it is what it was
            Rows<E> reset{(E *)job.resets + thread * B * H, H};
            copy_rows<E>(count, H, H, prev[0].from(b_first, 0), reset.from(b_first, 0));
            mask.zero<E>(RESET, count, H, reset.from(b_first, 0));
            prev[0] = reset;
        }
        for (int64_t j = p_first; j < p_last; j++) {  // to and fro: the weights read last are still in the L2 cache
            const int64_t p = s % 2 == 0 ? j : p_first + p_last - 1 - j;
            const int64_t valid = min(L, H - p * L), u = p * L;
            E *const packed = (E *)job.packed + (packs_as_used ? thread : p) * size;
            if (packs_as_used) pack_panel<C, E>(&a, p, packed);
            for (int64_t b = b_first; b < b_last; b += CHUNK) {
                int64_t rows = min(CHUNK, b_last - b);
                const Rows<const E> h_rows = s == 0 && begins_at_zero ? Rows<const E>{nullptr, 0} : prev[0].from(b, 0);
                preact_of<C, E>(rows, {H, p}, I, H, packed, biases + p * C::S * L, x.from(b, 0), h_rows, scratch);
                E *saved = a.gates ? (E *)a.gates + ((t * panels + p) * B + b) * C::SAVED * L : nullptr;
                Rows<const E> from[C::STATES];
                Rows<E> to[C::STATES];
                for (int k = 0; k < C::STATES; k++) from[k] = prev[k].from(b, u), to[k] = next[k].from(b, u);
                finish_cells<C, E>(rows, valid, Mask(a, t, b), scratch.preact, scratch, from, to, saved);
            }
        }
        place.meet_team();
        if (s > 0) hide(a.reverse ? t + 1 : t - 1);
        for (int k = 0; k < C::STATES; k++) prev[k] = next[k];
    }
    copy_rows<E>(count, width, width, {prev[0].at + own, H}, {(E *)a.h_n + own, H});
    if (a.c) copy_rows<E>(count, width, width, {prev[1].at + own, H}, {(E *)a.c_n + own, H});
    if (a.h != a.h_n) hide(a.reverse ? 0 : T - 1);
}
