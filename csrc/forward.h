// The forward pass of a layer: all time steps, for the rows and units of one thread.
#pragma once

// Writes panel p's biases, `gate_stride` elements from gate to gate, then zeros. A gate of both products has their sum.
template <class C, class E>
NOINLINE void pack_biases(const fastlstm_forward_args *a, int64_t p, int64_t gate_stride, E *target) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t valid = min(L, a->H - p * L);
    zero_rows<E>(1, C::S * L, {target, 0});
    for (int64_t k = 0; a->bias_ih && k < C::X; k++) {
        const E *from = (const E *)a->bias_ih + C::BLOCKS_IH[k] * a->H + p * L;
        copy_rows<E>(1, valid, valid, {from, 0}, {target + k * gate_stride, 0});
    }
    for (int64_t k = 0; a->bias_hh && k < C::Y; k++) {
        const E *from = (const E *)a->bias_hh + C::BLOCKS_HH[k] * a->H + p * L;
        add_rows<E>(1, valid, {from, 0}, {target + (C::S - C::Y + k) * gate_stride, 0});
    }
}

// A digest of weights, like that of fastlstm/backends/numba/llvm/digest.py. Each 64-bit pair of words goes to one of
// many lanes: lane = rotate_left(lane + pair, 13), and lane *= 0x9E3779B1 after every fourth pair and after each that
// is left over. All lanes are stored and compared. A change within one pair always shows. Changes of several pairs of a
// lane cancel out with a probability of about 2**-64.
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
        lane += pairs, lane = lane << 13 | lane >> 51;
        return multiplies ? lane * UINT64_C(0x9E3779B1) : lane;
    }
    NOINLINE void add(const void *words, int64_t bytes) {
        const char *next = (const char *)words;
        Pairs chains[CHAINS];
        UNROLL for (int64_t n = 0; n < CHAINS; n++) chains[n] = lanes[n];
        for (; bytes >= 4 * ROUND; bytes -= 4 * ROUND)
            UNROLL for (int k = 0; k < 4; k++, next += ROUND)
                UNROLL for (int64_t n = 0; n < CHAINS; n++)
                    chains[n] = mix(chains[n], next + n * VECTOR_BYTES, VECTOR_BYTES, k == 3);
        for (; bytes >= ROUND; bytes -= ROUND, next += ROUND)
            UNROLL for (int64_t n = 0; n < CHAINS; n++) chains[n] = mix(chains[n], next + n * VECTOR_BYTES);
        UNROLL for (int64_t n = 0; n < CHAINS; n++) {
            const int64_t last_bytes = min(bytes, VECTOR_BYTES);
            if (last_bytes == VECTOR_BYTES) chains[n] = mix(chains[n], next);
            else if (last_bytes) chains[n] = mix(chains[n], next, last_bytes);
            next += last_bytes, bytes -= last_bytes;
        }
        UNROLL for (int64_t n = 0; n < CHAINS; n++) lanes[n] = chains[n];
    }
    template <class W> void add_rows(int64_t rows, int64_t columns, Matrix<const W> weight) {
        if (weight.stride == columns) columns *= rows, rows = 1;  // rows without gaps are digested as one
        for (int64_t r = 0; r < rows; r++) add(weight[r], columns * sizeof(W));
    }
};

// Returns the digest of one share of the weights, of type W. There are as many shares as panels, and all are compared.
template <class C, class E, class W = E> NOINLINE Digest digest(const fastlstm_forward_args *a, int64_t p) {
    const int64_t panels = ceil_div(a->H, Vector<E>::N), first_x = share(C::X * a->H, p, panels);
    const int64_t first_h = share(C::Y * a->H, p, panels);
    const Matrix<const W> ih{(const W *)a->weight_ih, a->weight_ih_row}, hh{(const W *)a->weight_hh, a->weight_hh_row};
    Digest digest;
    digest.add_rows<W>(share(C::X * a->H, p + 1, panels) - first_x, a->I, ih.from(first_x, 0));
    digest.add_rows<W>(share(C::Y * a->H, p + 1, panels) - first_h, a->H, hh.from(first_h, 0));
    return digest;
}

// Returns the elements of a panel of packed weights. A compact panel, which is the last, leaves some of them unused.
template <class C, class E> int64_t panel_size(const fastlstm_forward_args *a) {
    return (a->I * C::X + a->H * C::Y) * Vector<E>::N;
}
// Returns the address of the packed biases, which lie behind the weights of `panels` panels, or of all. The digests follow.
template <class C, class E> E *biases_of(const fastlstm_forward_args *a, void *packed, int64_t panels = -1) {
    if (panels < 0) panels = ceil_div(a->H, Vector<E>::N);
    return (E *)packed + panels * panel_size<C, E>(a);
}
template <class C, class E> Digest *digests_of(const fastlstm_forward_args *a, void *packed) {
    return (Digest *)(biases_of<C, E>(a, packed) + ceil_div(a->H, Vector<E>::N) * C::S * Vector<E>::N);
}

// Returns whether the weights or biases of panel p have changed since they were packed.
template <class C, class E> NOINLINE bool is_changed(const fastlstm_forward_args *a, void *packed, int64_t p) {
    constexpr int64_t L = Vector<E>::N;
    alignas(64) E biases[C::S * L];
    pack_biases<C, E>(a, p, Panel<C, E>(a->H, p).gate_stride, biases);
    if (__builtin_memcmp(biases, biases_of<C, E>(a, packed) + p * C::S * L, sizeof biases)) return true;
    const Digest current = digest<C, E>(a, p);
    return __builtin_memcmp(&current, (const char *)(digests_of<C, E>(a, packed) + p), sizeof current) != 0;
}

// Packs panel p: for each column of weight_ih the gates as Panel orders them, then zeros; then the same of weight_hh.
template <class C, class E> void pack_panel(const fastlstm_forward_args *a, int64_t p, E *packed) {
    constexpr int64_t L = Vector<E>::N;
    const Matrix<const E> weight_ih{(const E *)a->weight_ih, a->weight_ih_row};
    const Matrix<const E> weight_hh{(const E *)a->weight_hh, a->weight_hh_row};
    const Panel<C, E> panel(a->H, p);
    const int64_t x_columns = panel.x_vectors() * L, h_columns = panel.h_vectors() * L;
    E *const packed_h = packed + a->I * x_columns;
    if (panel.valid < L) zero_rows<E>(1, a->I * x_columns + a->H * h_columns, {packed, 0});
    auto pack = [&](Matrix<const E> weight, int64_t block, int64_t columns, Matrix<E> target) {
        transpose<E>(panel.valid, columns, weight.from(block * a->H + p * L, 0), target);
    };
    for (int64_t k = 0; k < C::X; k++) pack(weight_ih, C::BLOCKS_IH[k], a->I, {packed + k * panel.gate_stride, x_columns});
    for (int64_t k = 0; k < C::Y; k++) pack(weight_hh, C::BLOCKS_HH[k], a->H, {packed_h + k * panel.gate_stride, h_columns});
}

template <class C, class E> size_t packed_size(int64_t I, int64_t H) {
    constexpr int64_t L = Vector<E>::N;
    return (size_t)ceil_div(H, L) * ((I * C::X + H * C::Y + C::S) * L * sizeof(E) + sizeof(Digest));
}

// Packs weights and biases for later calls. A panel's digest comes first: a change from then on makes it differ.
template <class C, class E> void pack_weights(const fastlstm_forward_args *a, void *packed) {
    constexpr int64_t L = Vector<E>::N;
    for (int64_t p = 0; p < ceil_div(a->H, L); p++) {
        const Digest digest_of_p = digest<C, E>(a, p);
        __builtin_memcpy((char *)(digests_of<C, E>(a, packed) + p), &digest_of_p, sizeof digest_of_p);
        pack_biases<C, E>(a, p, Panel<C, E>(a->H, p).gate_stride, biases_of<C, E>(a, packed) + p * C::S * L);
        pack_panel<C, E>(a, p, (E *)packed + p * panel_size<C, E>(a));
    }
}

template <class C, class E> struct ForwardScratch {
    static constexpr int64_t L = Vector<E>::N;
    alignas(64) E preact[ROW_BLOCK * C::S * L], prev[C::STATES - C::FIRST_READ][ROW_BLOCK * L];
};

// Computes out (rows, vectors) = init + [x, h] (rows, I + H) times w (I + H, vectors), in K blocks of at most BLOCK_K, one of
// which may span the end of x and the beginning of h. An h of NULL is zero.
template <class E>
void add_product(int64_t vectors, int64_t rows, Matrix<const E> init, Matrix<E> out, const E *w, Matrix<const E> x, int64_t I,
                 Matrix<const E> h, int64_t H) {
    const int64_t K = I + H, k_block = ceil_div(K, ceil_div(K, BLOCK_K)), columns = h.data ? K : I,
                  width = vectors * Vector<E>::N;
    for (int64_t k = 0; k < columns; k += k_block, init = out) {
        int64_t last = min(k + k_block, columns), x_columns = max(0, min(last, I) - k), h_columns = last - k - x_columns;
        const E *x_k = x_columns ? x.data + k : x.data, *h_k = h_columns ? h.data + max(0, k - I) : h.data;
        multiply<E>(vectors, rows, {init.data, init.stride, out.data, out.stride, w + k * width, x_k, x.stride, 1, x_columns,
                     1, 0, h_k, h.stride, h_columns});
    }
}

// Computes preact of one panel, as `panel` orders it, from rows of x and h. An h of NULL is zero.
template <class C, class E>
void preact_of(int64_t rows, Panel<C, E> panel, int64_t I, int64_t H, const E *w, const E *biases, Matrix<const E> x,
               Matrix<const E> h, ForwardScratch<C, E> &scratch) {
    constexpr int64_t L = Vector<E>::N;
    const Matrix<E> out{scratch.preact, panel.row_elements()}, out_h = out.from(0, (C::S - C::Y) * L);
    if (panel.JOINT) return add_product<E>(panel.vectors, rows, {biases, 0}, out, w, x, I, h, H);
    copy_rows<E>(rows, (C::S - C::X) * L, 0, {biases + C::X * L, 0}, out.from(0, C::X * L));
    add_product<E>(C::X, rows, {biases, 0}, out, w, x, I, x, 0);
    if (h.data) add_product<E>(C::Y, rows, out_h, out_h, w + I * C::X * L, h, H, h, 0);
}

// Computes the states of one panel from its preact. A held row keeps its states.
template <class C, class E>
void finish_cells(int64_t rows, Panel<C, E> panel, Mask mask, ForwardScratch<C, E> &scratch,
                  Matrix<const E> (&prev)[C::STATES], const Matrix<E> (&next)[C::STATES], E *saved) {
    constexpr int64_t L = Vector<E>::N;
    auto run_cells = saved ? cells_forward<C, E, true> : cells_forward<C, E, false>;
    const bool resets = mask.any(RESET, rows), holds = mask.any(HOLD, rows);
    for (int k = C::FIRST_READ; k < C::STATES; k++) {
        if (!(resets || (holds && prev[k].data == next[k].data))) continue;
        const Matrix<E> copy{scratch.prev[k - C::FIRST_READ], L};  // which the cell may read
        copy_rows<E>(rows, panel.valid, L, prev[k], copy);
        if (resets) mask.zero<E>(RESET, rows, L, copy);
        prev[k] = copy;
    }
    run_cells(rows, panel, scratch.preact, prev, next, saved);
    for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1))
        for (int k = 0; k < C::STATES; k++) copy_rows<E>(1, panel.valid, panel.valid, {prev[k][r], 0}, {next[k][r], 0});
}

// The states of one row before a step and after it, and its x
template <class E> struct Row {
    const E *x, *h;  // whose products are added; that of h is left out if it is NULL
    const E *prev[2];
    E *next[2];
};

// Panels of a single row that run at once. NEON's short vectors need more chains of sums than one panel has.
#ifdef __aarch64__
constexpr int64_t ROW_PANELS = 4;
#else
constexpr int64_t ROW_PANELS = 1;
#endif

// Adds a row of a (count) and of a2 (count2) times w (count + count2, N vectors) to N vectors of `preact` from `first` on.
// It does so for P panels, whose weights are `size` elements apart.
template <class E, int N, int P, int S>
INLINE void add_row(Vector<E> (&preact)[P][S], int first, const E *w, int64_t size, const E *a, int64_t count, const E *a2,
                    int64_t count2) {
    Raw<E> acc[P][1][N] = {};
    if constexpr (P == 1) {
        w = accumulate<E, 1, N, N>(acc[0], a, 0, 1, w, count);
        accumulate<E, 1, N, N>(acc[0], a2, 0, 1, w, count2);
    } else {
        for (int part = 0; part < 2; part++, a = a2, count = count2)
            for (; count > 0; count--, a++, w += N * Vector<E>::N)
                UNROLL for (int p = 0; p < P; p++) accumulate<E, 1, N, N>(acc[p], a, 0, 1, w + p * size, 1);
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int n = 0; n < N; n++) preact[p][first + n] = preact[p][first + n] + Vector<E>(acc[p][0][n]);
}
// Does so for the columns of x and then of h, in the K blocks of preact_of, with N vectors of each column.
template <class E, int N, int P, int S>
INLINE void add_row_in_blocks(Vector<E> (&preact)[P][S], int first, const E *w, int64_t size, const E *x, int64_t I,
                              const E *h, int64_t H) {
    const int64_t K = I + H, blocks = ceil_div(K, BLOCK_K), k_block = quotient(K + blocks - 1, blocks), columns = h ? K : I;
    for (int64_t k = 0; k < columns; k += k_block) {
        const int64_t last = min(k + k_block, columns), x_columns = max(0, min(last, I) - k), h_columns = last - k - x_columns;
        const E *x_k = x_columns ? x + k : x, *h_k = h_columns ? h + max(0, k - I) : h;
        add_row<E, N>(preact, first, w + k * N * Vector<E>::N, size, x_k, x_columns, h_k, h_columns);
    }
}

// Runs one step of one row for P panels from p on, without masks. All but the last of a layer are whole.
template <class C, class E, int P>
INLINE void step_of_panels(int64_t p, int64_t I, int64_t H, const E *w, const E *biases, const Row<E> &row) {
    using V = Vector<E>;
    constexpr int64_t L = V::N;
    const int64_t size = (I * C::X + H * C::Y) * L;
    const Panel<C, E> panel(H, p + P - 1);
    V preact[P][C::S];
    UNROLL for (int j = 0; j < P; j++)
        UNROLL for (int k = 0; k < C::S; k++) preact[j][k] = V::load(biases + (j * C::S + k) * L);
    if constexpr (!panel.JOINT) {
        add_row_in_blocks<E, C::X>(preact, 0, w, size, row.x, I, row.x, 0);
        if (row.h) add_row_in_blocks<E, C::Y>(preact, C::S - C::Y, w + I * C::X * L, size, row.h, H, row.x, 0);
    } else if (P > 1 || !panel.is_compact()) {
        add_row_in_blocks<E, C::S>(preact, 0, w, size, row.x, I, row.h, H);
    } else {
        if (panel.vectors == 1) add_row_in_blocks<E, 1>(preact, 0, w, size, row.x, I, row.h, H);
        else if (panel.vectors == 2) add_row_in_blocks<E, 2>(preact, 0, w, size, row.x, I, row.h, H);
        else add_row_in_blocks<E, 3>(preact, 0, w, size, row.x, I, row.h, H);
        alignas(64) E compact[C::S * L];
        UNROLL for (int k = 0; k < C::S; k++) preact[0][k].store(compact + k * L);
        UNROLL for (int k = 0; k < C::S; k++) preact[0][k] = V::load(compact + k * panel.gate_stride, panel.valid);
    }
    UNROLL for (int j = 0; j < P; j++, p++) {
        const int64_t valid = j < P - 1 ? L : panel.valid;
        V old_states[C::STATES], new_states[C::STATES], saved[C::SAVED];
        UNROLL for (int k = C::FIRST_READ; k < C::STATES; k++) old_states[k] = V::load(row.prev[k] + p * L, valid);
        C::forward(preact[j], old_states, new_states, saved);
        UNROLL for (int k = 0; k < C::STATES; k++) new_states[k].store(row.next[k] + p * L, valid);
    }
}
// Does so for the panels p to p_last, in registers, with the bits of preact_of and finish_cells.
template <class C, class E>
NOINLINE void step_of_row(int64_t p, int64_t p_last, int64_t I, int64_t H, const E *w, const E *biases, const Row<E> &row) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t size = (I * C::X + H * C::Y) * L;
    if constexpr (ROW_PANELS > 1) {
        for (; p + ROW_PANELS <= p_last && !Panel<C, E>(H, p + ROW_PANELS - 1).is_compact();
             p += ROW_PANELS, w += ROW_PANELS * size, biases += ROW_PANELS * C::S * L)
            step_of_panels<C, E, ROW_PANELS>(p, I, H, w, biases, row);
    }
    for (; p < p_last; p++, w += size, biases += C::S * L) step_of_panels<C, E, 1>(p, I, H, w, biases, row);
}

// Runs one step of one row with packed weights, for `fastlstm_step`.
template <class C, class E>
void step(const fastlstm_forward_args *a, const void *x, const void *h, const void *c, void *h_next, void *c_next) {
    const E *const h_0 = is_zero<E>(1, a->H, {(const E *)h, 0}) ? nullptr : (const E *)h;
    const Row<E> row{(const E *)x, h_0, {(const E *)h, (const E *)c}, {(E *)h_next, (E *)c_next}};
    const E *const biases = biases_of<C, E>(a, (void *)a->packed);
    step_of_row<C, E>(0, ceil_div(a->H, Vector<E>::N), a->I, a->H, (const E *)a->packed, biases, row);
}

template <class C, class E> void forward(void *argument, int thread, int threads) {
    constexpr int64_t L = Vector<E>::N;
    const ForwardJob &job = *(const ForwardJob *)argument;
    const fastlstm_forward_args &a = *job.args;
    ThreadPosition position(job, thread, threads);
    if (thread >= position.used_threads) return;
    // Of several teams only one has the row, and the others would compute it as well
    const bool is_plain_row = a.B == 1 && position.teams == 1 && !a.gates && !a.reset && !a.lengths;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, L), size = panel_size<C, E>(&a);
    const int64_t first_panel = position.first(panels), last_panel = position.last(panels);
    // A single step reads every panel once. A thread then packs a panel just before it, into memory that stays in its cache.
    const bool packs_as_used = job.pack && job.panels < panels;
    E *const biases = biases_of<C, E>(&a, job.packed, job.panels);
    if (job.pack) {
        for (int64_t p = first_panel; p < last_panel; p++) {
            pack_biases<C, E>(&a, p, Panel<C, E>(H, p).gate_stride, biases + p * C::S * L);
            if (!packs_as_used) pack_panel<C, E>(&a, p, (E *)job.packed + p * size);
        }
        if (position.teams > 1) position.all_barrier();  // a single team's threads have packed what they use
    } else if (a.changed) {  // the caller discards the results then, but all threads go through all barriers
        for (int64_t p = first_panel; p < last_panel; p++)
            if (is_changed<C, E>(&a, job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    const int64_t b_first = share(B, position.team, position.teams), b_last = share(B, position.team + 1, position.teams);
    const int64_t p_first = position.first_of_team(panels), p_last = position.last_of_team(panels);
    // This thread's rows and units, and the offset of the first
    const int64_t team_rows = b_last - b_first, team_units = min(p_last * L, H) - p_first * L,
                  own_offset = b_first * H + p_first * L;
    // h and c of all steps, or c of one step if the caller wants no more
    static_assert(C::STATES <= 2, "the arguments have no more states");
    E *const sequences[] = {(E *)a.h, (E *)(a.c ? a.c : a.c_n)};
    const int64_t sequence_strides[] = {B * H, a.c ? B * H : 0};
    Matrix<const E> prev[] = {{(const E *)a.h_0, a.h_0_row}, {(const E *)a.c_0, a.c_0_row}};
    ForwardScratch<C, E> scratch;
    const bool begins_at_zero = is_zero<E>(B, H, prev[0]);  // of all rows, so that results do not depend on the split
    // The outputs of held rows have the state until all threads of the team have read it, and are zero then.
    auto zero_held = [&](int64_t t) {
        Mask(a, t, b_first).zero<E>(HOLD, team_rows, team_units, {sequences[0] + t * B * H + own_offset, H});
    };

    for (int64_t s = 0; s < T; s++) {
        PAUSE();
        const int64_t t = a.reverse ? T - 1 - s : s;
        const Matrix<const E> x{(const E *)a.x + t * a.x_step, a.x_row};
        const Matrix<E> next[] = {{sequences[0] + t * sequence_strides[0], H}, {sequences[1] + t * sequence_strides[1], H}};
        const Mask mask(a, t, b_first);
        if (mask.any(RESET, team_rows)) {  // which leaves held rows as they are
            Matrix<E> reset{(E *)job.resets + thread * B * H, H};
            copy_rows<E>(team_rows, H, H, prev[0].from(b_first, 0), reset.from(b_first, 0));
            mask.zero<E>(RESET, team_rows, H, reset.from(b_first, 0));
            prev[0] = reset;
        }
        // In serpentine order: the weights read last are still in the L2 cache
        for (int64_t j = p_first, count; j < p_last; j += count) {
            count = ROW_PANELS > 1 && is_plain_row && !packs_as_used ? min(ROW_PANELS, p_last - j) : 1;
            const int64_t p = s % 2 == 0 ? j : p_first + p_last - count - j;
            const int64_t u = p * L;
            const Panel<C, E> panel(H, p);
            E *const packed = (E *)job.packed + (packs_as_used ? thread : p) * size;
            if (packs_as_used) pack_panel<C, E>(&a, p, packed);
            if (is_plain_row) {
                const E *h = s == 0 && begins_at_zero ? nullptr : prev[0].data;
                const Row<E> row{x.data, h, {prev[0].data, prev[1].data}, {next[0].data, next[1].data}};
                step_of_row<C, E>(p, p + count, I, H, packed, biases + p * C::S * L, row);
                continue;
            }
            for (int64_t b = b_first; b < b_last; b += ROW_BLOCK) {
                int64_t rows = min(ROW_BLOCK, b_last - b);
                const Matrix<const E> h_rows = s == 0 && begins_at_zero ? Matrix<const E>{nullptr, 0} : prev[0].from(b, 0);
                preact_of<C, E>(rows, panel, I, H, packed, biases + p * C::S * L, x.from(b, 0), h_rows, scratch);
                E *saved = a.gates ? (E *)a.gates + ((t * panels + p) * B + b) * C::SAVED * L : nullptr;
                Matrix<const E> old_states[C::STATES];
                Matrix<E> new_states[C::STATES];
                for (int k = 0; k < C::STATES; k++) old_states[k] = prev[k].from(b, u), new_states[k] = next[k].from(b, u);
                finish_cells<C, E>(rows, panel, Mask(a, t, b), scratch, old_states, new_states, saved);
            }
        }
        position.team_barrier();
        if (s > 0) zero_held(a.reverse ? t + 1 : t - 1);
        for (int k = 0; k < C::STATES; k++) prev[k] = next[k];
    }
    if (a.h != a.h_n)
        copy_rows<E>(team_rows, team_units, team_units, {prev[0].data + own_offset, H}, {(E *)a.h_n + own_offset, H});
    if (a.c) copy_rows<E>(team_rows, team_units, team_units, {prev[1].data + own_offset, H}, {(E *)a.c_n + own_offset, H});
    if (a.h != a.h_n) zero_held(a.reverse ? 0 : T - 1);
}
