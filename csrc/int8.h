// The forward pass of a layer with int8 weights: included after kernels.h by a file for each instruction set.
//
// Each weight row is a row of int8 numbers times its scale. Each row of x, and of h before each step, is rounded in the
// same way, to 8 bits or to 16, which are two pieces of 8. Their products are sums of integers, exact in any order, and the
// rest has one order: so all instruction sets, threads and batches give the same bits.
#pragma once

#define INLINE inline __attribute__((always_inline))
#define FLATTEN __attribute__((flatten))  // all calls within are inlined

#include "dots.h"
#include "amx.h"
#include "int8_weights.h"

using fastlstm::Int8Job;
using fastlstm::int8_pitch;

constexpr float TOP[] = {0, 127, 127 * 256};  // the largest number of so many bytes

// Rounds values times `inverse` to numbers of PIECES bytes, `piece` apart. A sum with 1.5 * 2**23 has the nearest integer
// in its last bits.
template <int PIECES> inline void store_rounded(Raw<float> values, float inverse, uint8_t *to, int64_t piece) {
    constexpr int OFFSET = PIECES == 1 ? ZERO : 128 + 256 * ZERO;
    const Ints numbers = (Ints)(values * inverse + (1.5f * (1 << 23) + OFFSET));
    store_low(PIECES == 1 ? numbers : numbers >> 8, to);
    if (PIECES == 2) store_low(ZERO ? numbers : numbers ^ 128, to + piece);
}

// Calls body(floats, k) for the vectors of a row, which begin at its columns k. The last may overlap the one before. A row
// of less than a vector has zeros after it.
template <class Body> inline void for_vectors(int64_t count, const float *from, Body body) {
    constexpr int64_t L = Vector<float>::N;
    float few[L] = {};
    if (count < L) __builtin_memcpy(few, from, count * 4), from = few, count = L;
    for (int64_t k = 0; k < count; k += L) {
        const int64_t at = min(k, count - L);
        body(Vector<float>::load(from + at).raw, at);
    }
}

template <int BYTES> inline int32_t largest_lane(const int32_t __attribute__((vector_size(BYTES))) lanes) {
    struct { int32_t __attribute__((vector_size(BYTES / 2))) low, high; } halves;
    __builtin_memcpy(&halves, &lanes, BYTES);
    const auto larger = halves.low > halves.high ? halves.low : halves.high;
    if constexpr (BYTES > 16) return largest_lane<BYTES / 2>(larger);
    else return larger[0] > larger[1] ? larger[0] : larger[1];
}

// Rounds a row to PIECES of bytes, `piece` apart and whole vectors of them, and returns its scale. The row's largest size
// counts as `least` at least. A row that is not finite has a scale of NaN, and one that is next to nothing a scale of 0.
template <int PIECES>
NOINLINE float quantize(int64_t count, const float *from, float least, uint8_t *to, int64_t piece) {
    Ints most = (Ints)(least - Raw<float>{});  // floats of no sign are in the order of their bits, and NaN is last
    for_vectors(count, from, [&](Raw<float> values, int64_t) {
        const Ints size = (Ints)values & INT32_MAX;
        most = size > most ? size : most;
    });
    const int32_t bits = largest_lane<VECTOR_BYTES>(most);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    if (!finite || largest < 0x1p-100f) {
        __builtin_memset(to, ZERO, PIECES * piece);
        return finite ? 0 : __builtin_nanf("");
    }
    const float inverse = TOP[PIECES] / largest;
    for_vectors(count, from, [&](Raw<float> values, int64_t k) { store_rounded<PIECES>(values, inverse, to + k, piece); });
    return largest / TOP[PIECES];
}

// The sums of a[m, k] w[k, n] over `groups` of 4 columns, for A rows of bytes `piece` apart and N vectors of n. They start
// from the vectors at `starts`, `starts_row` further for each row. Few sums are each computed as U: one would wait for itself.
template <int A, int N> struct Int8Sums {
    static constexpr int U = A * N >= CHAINS ? 1 : A * N > 4 ? 2 : 4;
    Ints totals[A][N];

    INLINE Int8Sums(const int32_t *starts, int64_t starts_row, const uint8_t *a, int64_t piece, const int8_t *w, int64_t groups) {
        Dots sums[U][A][N] = {};
        UNROLL for (int m = 0; m < A && ZERO; m++)
            UNROLL for (int n = 0; n < N; n++)
                __builtin_memcpy(&sums[0][m][n], starts + m * starts_row + n * Vector<float>::N, VECTOR_BYTES);
        for (; groups >= U; groups -= U, w += U * N * VECTOR_BYTES, a += U * 4)
            UNROLL for (int u = 0; u < U; u++) add(sums[u], w + u * N * VECTOR_BYTES, a + u * 4, piece);
        for (; U > 1 && groups > 0; groups--, w += N * VECTOR_BYTES, a += 4) add(sums[0], w, a, piece);
        UNROLL for (int m = 0; m < A; m++) {
            UNROLL for (int n = 0; n < N; n++) {
                totals[m][n] = sums[0][m][n].total();
                UNROLL for (int u = 1; u < U; u++) totals[m][n] += sums[u][m][n].total();
            }
        }
    }
    static INLINE void add(Dots (&sums)[A][N], const int8_t *w, const uint8_t *a, int64_t piece) {
        Bytes held[N];
        UNROLL for (int n = 0; n < N; n++) __builtin_memcpy(&held[n], w + n * VECTOR_BYTES, VECTOR_BYTES);
        UNROLL for (int m = 0; m < A; m++) {
            const Dots::Operand x = Dots::operand(a + m * piece);
            UNROLL for (int n = 0; n < N; n++) sums[m][n].add(held[n], x);
        }
    }
};

// Rows of bytes against panels of weights. For x (IS_STEP false) the results are what it makes of the sums. For h they are a
// time step: the cells follow while the sums are at hand.
template <class C, int PIECES, bool IS_STEP> struct Int8Rows {
    static constexpr int64_t L = Vector<float>::N, X = C::X * L;
    static constexpr int N = IS_STEP ? C::Y : C::X, MOST = (INT8_ROWS + PIECES - 1) / PIECES;  // vectors, rows of a tile
    const Int8Panel<C> *panel;   // the first one
    const int8_t *weights;
    int64_t size, groups, sign;  // bytes of a panel's weights, their groups, and 1 or -1: to the next panel or back
    const uint8_t *a;
    int64_t piece;               // bytes from one piece of a row to its next, or to the next row's first
    const float *scales;         // of the rows
    float *sums_x;               // (panels, rows, X, L): what x makes of the sums, with biases
    int64_t sums_panel;
    // Of a step alone
    float *carried;              // (panels, rows, L): the state that the cell reads
    int64_t carried_panel;
    float *h;                    // whole vectors, rows of h_row
    int64_t h_row;
    uint8_t *next;               // h in bytes, in rows like those of a
    float *next_scales;          // which become NaN where h is
    // Where sums start if not at the panel's: see `on_unit`
    const int32_t *starts = nullptr;
    int64_t starts_row = 0;

    const int32_t *starts_of_panel() const { return IS_STEP ? panel->starts_h : panel->starts_x; }

    template <int R> INLINE void tile() const {
        const Int8Sums<R * PIECES, N> sums(starts ? starts : starts_of_panel(), starts_row, a, piece, weights, groups);
        if constexpr (!IS_STEP) store(R, sums.totals);
        else if constexpr (R == 1) cells(1, sums.totals);
        else cells_apart(R, sums.totals);
    }
    // Vector n of a row: init + scale * weight_scales * total
    static INLINE Raw<float> scaled(const Ints (*totals)[N], int n, float scale, const float *weight_scales, Raw<float> init) {
        Raw<float> sum = __builtin_convertvector(totals[0][n], Raw<float>);
        if (PIECES == 2) sum = fused(sum, 256.0f - Raw<float>{}, __builtin_convertvector(totals[PIECES - 1][n], Raw<float>));
        return fused(sum, Vector<float>::load(weight_scales + n * L).raw * scale, init);
    }
    INLINE void store(int rows, const Ints (*totals)[N]) const {
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int n = 0; n < N; n++) {
                const Raw<float> bias = Vector<float>::load(panel->biases + n * L).raw;
                const Raw<float> sum = scaled(totals + r * PIECES, n, scales[r], panel->scales_x, bias);
                Vector<float>(sum).store(sums_x + r * X + n * L);
            }
        }
    }
    // The constants of the cell then take no registers from the sums.
    NOINLINE FLATTEN void cells_apart(int64_t rows, const Ints (*totals)[N]) const { cells(rows, totals); }
    INLINE void cells(int64_t rows, const Ints (*totals)[N]) const {
        const Int8Panel<C> &p = *panel;
        const Int8Rows s = *this;  // which what is stored cannot change
        for (int64_t r = 0; r < rows; r++) {
            Vector<float> pre[C::S], before[C::STATES], after[C::STATES], saved[C::SAVED];
            UNROLL for (int k = 0; k < C::S; k++) {
                constexpr int FIRST = C::S - C::Y;  // of the sums of h
                Raw<float> value = Vector<float>::load(k < C::X ? s.sums_x + r * X + k * L : p.biases + k * L).raw;
                if (k >= FIRST) value = scaled(totals + r * PIECES, k - FIRST, s.scales[r], p.scales_h, value);
                pre[k] = value;
            }
            before[C::OWN] = Vector<float>::load(s.carried + r * L);
            C::forward(pre, before, after, saved);
            after[C::OWN].store(s.carried + r * L);
            after[0].store(s.h + r * s.h_row);
            store_rounded<PIECES>(after[0].raw, TOP[PIECES], s.next + r * PIECES * s.piece, s.piece);
            if (__builtin_expect(any_nan(after[0].raw), 0)) s.next_scales[r] = __builtin_nanf("");
        }
    }

    void skip(int64_t rows) {
        a += rows * PIECES * piece, scales += rows, sums_x += rows * X, starts += rows * PIECES * starts_row;
        if (IS_STEP) carried += rows * L, h += rows * h_row, next += rows * PIECES * piece, next_scales += rows;
    }
    void next_panel() {
        panel += sign, weights += sign * size, sums_x += sign * sums_panel;
        if (IS_STEP) carried += sign * carried_panel, h += sign * L, next += sign * L;
    }

    // Several tiles of R rows, or one against several panels, and then on to what comes after them
    template <int R> NOINLINE FLATTEN void tiles(int64_t panels, int64_t count) {
        const bool across = panels > 1;
        for (int64_t k = across ? panels : count; k > 0; k--) {
            tile<R>();
            if (across) next_panel();
            else skip(R);
        }
    }
    template <int R = MOST> void in_tiles(int64_t rows, int64_t panels) {
        if (rows >= R) tiles<R>(panels, rows / R);
        if constexpr (R > 1) in_tiles<R - 1>(rows % R, panels);
    }
    // A panel of weights against UNIT_ROWS rows or more. Blocks of so many get the sums over whole tiles of columns from
    // the matrix unit. The last block begins with rows of the one before, whose sums are not used.
    void on_unit(int64_t rows) {
        const int64_t steps = groups / UNIT_GROUPS;
        alignas(64) int32_t sums[PIECES * UNIT_ROWS * N * L];
        for (int64_t count; rows > 0; rows -= count) {
            count = min(rows, UNIT_ROWS);
            const int64_t before = (UNIT_ROWS - count) * PIECES;
            for (int64_t k = 0; k < PIECES; k++)
                unit_sums<N>(starts_of_panel(), a + (k * UNIT_ROWS - before) * piece, piece, weights, steps,
                             sums + k * UNIT_ROWS * N * L);
            Int8Rows rest = *this;
            rest.weights += steps * UNIT_GROUPS * N * VECTOR_BYTES, rest.groups -= steps * UNIT_GROUPS;
            rest.a += steps * UNIT_GROUPS * 4, rest.starts = sums + before * N * L, rest.starts_row = N * L;
            rest.in_tiles(count, 1);
            skip(count);
        }
    }
    // Rows of one tile pass all panels at once.
    NOINLINE void multiply(int64_t rows, int64_t panels, bool has_unit) {
        if (rows <= MOST) return in_tiles(rows, panels);
        for (; panels > 0; panels--, skip(-rows), next_panel()) {
            if constexpr (HAS_UNIT)
                if (has_unit && rows >= UNIT_ROWS && groups >= UNIT_GROUPS) {
                    on_unit(rows);
                    continue;
                }
            in_tiles(rows, 1);
        }
    }
};

// This thread's share of a layer. Threads of a part share its bytes: at a step all read those of h before it and write those
// after it, each for its own units.
template <class C, int PIECES> struct Int8Layer {
    static constexpr int64_t L = Vector<float>::N, X = C::X * L;
    static_assert(C::STATES - C::OWN == 1, "one state is carried");
    static constexpr float CLEAN = 1 / TOP[PIECES];  // the scale of a row of h whose numbers are within 1
    const Int8Job &job;
    Place &place;
    const fastlstm_forward_args &a;
    const Int8Packed<C> packed{a, job.packed};
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, block = job.block, panels = ceil_div(H, L);
    const int64_t piece_x = int8_pitch(I), piece_h = int8_pitch(H), row_x = PIECES * piece_x, row_h = PIECES * piece_h;
    // Rows of the part, panels of this thread and how many of these are whole, its units, and the rows that it rounds
    const int64_t b_first = share(B, place.part, place.parts), rows = share(B, place.part + 1, place.parts) - b_first;
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    const int64_t whole = min(p_last, H / L) - p_first, u_first = p_first * L, units = min(p_last * L, H) - u_first;
    const int64_t r_first = place.first_of_team(rows), r_last = place.last_of_team(rows);
    float *const carried = job.carried + b_first * L, *const own_scales = job.scales + place.thread * B;
    const Rows<const float> h_0{(const float *)a.h_0 + b_first * a.h_0_row, a.h_0_row};
    const Rows<const float> start{C::OWN ? (const float *)a.c_0 + b_first * a.c_0_row : h_0.at, C::OWN ? a.c_0_row : a.h_0_row};
    const Rows<float> h{(float *)a.h + b_first * H, H}, h_n{(float *)a.h_n + b_first * H, H};
    alignas(64) float chunk_x[CHUNK * X], tail[CHUNK * L];

    Int8Layer(const Int8Job &job, Place &place) : job(job), place(place), a(*job.args) {}
    int64_t time_of(int64_t s) const { return a.reverse ? T - 1 - s : s; }
    Mask mask_of(int64_t s) const { return Mask(a, time_of(s), b_first); }
    // h before step s: its bytes, and their scales in three turns, which are read, written and made ready
    uint8_t *bytes_of(int64_t s) const { return job.h + (s % 2 * B + b_first) * row_h; }
    float *scales_of(int64_t s) const { return job.scales_h + s % 3 * B + b_first; }
    int64_t inputs_of(int64_t s) const { return (s / block % 2 * B + b_first) * block; }  // the first of a block's rows of x
    float *sums_of(int64_t p) const { return job.sums_x + (p * B + b_first) * block * X; }

    void round_inputs(int64_t s) const {  // this thread's rows of the block that begins with step s
        const int64_t count = s < T ? min(block, T - s) * rows : 0;
        for (int64_t k = place.first_of_team(count); k < place.last_of_team(count); k++) {
            const float *x = (const float *)a.x + time_of(s + k / rows) * a.x_step + (b_first + k % rows) * a.x_row;
            const int64_t to = inputs_of(s) + k;
            job.scales_x[to] = quantize<PIECES>(I, x, 0, job.x + to * row_x, piece_x);
        }
    }
    void round_state(int64_t s, int64_t r, const float *from) const {
        scales_of(s)[r] = quantize<PIECES>(H, from, 1, bytes_of(s) + r * row_h, piece_h);
    }
    void multiply_inputs(int64_t s, int64_t p, int64_t count, int64_t first, int64_t some, float *sums_x) const {
        const int64_t at = inputs_of(s) + first;
        Int8Rows<C, PIECES, false> x = {};
        x.panel = packed.panels + p, x.weights = packed.weights_x + p * packed.size_x, x.size = packed.size_x;
        x.groups = packed.groups_x, x.sign = 1, x.a = job.x + at * row_x, x.piece = piece_x, x.scales = job.scales_x + at;
        x.sums_x = sums_x, x.sums_panel = B * block * X;
        x.multiply(some, count, job.has_unit);
    }
    // Step s of `count` panels from p on, or back, for some rows
    void run(int64_t s, int64_t p, int64_t count, int64_t sign, int64_t r, int64_t some, float *sums_x, const float *scales) {
        const bool cut = (p + 1) * L > H;
        const Rows<float> to = h.from(time_of(s) * B + r, p * L);
        Int8Rows<C, PIECES, true> step = {};
        step.panel = packed.panels + p, step.weights = packed.weights_h + p * packed.size_h, step.size = packed.size_h;
        step.groups = packed.groups_h, step.sign = sign, step.a = bytes_of(s) + r * row_h, step.piece = piece_h;
        step.scales = scales + r, step.sums_x = sums_x, step.sums_panel = B * block * X;
        step.carried = carried + (p * B + r) * L, step.carried_panel = B * L;
        step.h = cut ? tail : to.at, step.h_row = cut ? L : H;
        step.next = bytes_of(s + 1) + r * row_h + p * L, step.next_scales = scales_of(s + 1) + r;
        step.multiply(some, count, job.has_unit);
        if (cut) copy_rows<float>(some, H - p * L, H - p * L, {tail, L}, to);
    }
    // Rows that are reset before step s: this thread's units
    void reset(int64_t s) const {
        const Mask mask = mask_of(s);
        for (int64_t r = mask.next(RESET, rows); r < rows; r = mask.next(RESET, rows, r + 1))
            for (int64_t k = 0; k < PIECES; k++)
                __builtin_memset(bytes_of(s) + r * row_h + k * piece_h + u_first, ZERO, (p_last - p_first) * L);
        for (int64_t p = p_first; p < p_last; p++) mask.zero<float>(RESET, rows, L, {carried + p * B * L, L});
    }
    void hold(int64_t s, int64_t r, float scale) const {  // a row that step s leaves as it is
        for (int64_t at = r * row_h + u_first; at < (r + 1) * row_h; at += piece_h)
            __builtin_memcpy(bytes_of(s + 1) + at, bytes_of(s) + at, (p_last - p_first) * L);
        scales_of(s + 1)[r] = scale;
        zero_rows<float>(1, units, h.from(time_of(s) * B + r, u_first));
    }

    void begin() const {
        for (int64_t r = r_first; r < r_last; r++) round_state(0, r, h_0[r]), scales_of(1)[r] = scales_of(2)[r] = CLEAN;
        for (int64_t p = p_first; p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), L, start.from(0, p * L), {carried + p * B * L, L});
        round_inputs(0);
        place.meet_team();
        if (a.reset) reset(0), place.meet_team();
    }
    void step(int64_t s) {
        const Mask mask = mask_of(s);
        const float *scales = scales_of(s);
        for (int64_t r = 0; a.reset && r < rows; r++) own_scales[r] = mask.is(RESET, r) ? CLEAN : scales[r];
        if (a.reset) scales = own_scales;
        for (int64_t r = r_first; r < r_last; r++)  // seldom, so that other threads keep what they have read
            if (scales_of(s + 2)[r] != CLEAN) scales_of(s + 2)[r] = CLEAN;
        for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) hold(s, r, scales[r]);
        const int64_t of_block = s % block * rows, at_once = job.few ? max(1, whole) : 1;
        if (job.few && of_block == 0)
            multiply_inputs(s, p_first, p_last - p_first, 0, min(block, T - s) * rows, sums_of(p_first));
        // To and fro: the weights read last are still in the L2 cache. A panel that is cut comes last, or else first.
        const int64_t sign = s % 2 ? -1 : 1;
        for (int64_t p = p_first, count; p < p_last; p += count) {
            count = p < p_first + whole ? min(at_once, p_first + whole - p) : 1;
            const int64_t from = p >= p_first + whole || sign > 0 ? p : p_first + (p_first + whole - 1 - p);
            for (int64_t r = 0, some; r < rows; r += max(1, some)) {
                some = min(CHUNK, mask.next(HOLD, rows, r) - r);
                if (some == 0) continue;
                float *const sums_x = job.few ? sums_of(from) + (of_block + r) * X : chunk_x;
                if (!job.few) multiply_inputs(s, from, 1, r, some, sums_x);
                run(s, from, count, sign, r, some, sums_x, scales);
            }
        }
        if (a.reset) reset(s + 1);
        if ((s + 1) % block == 0) round_inputs(s + 1);
        place.meet_team();
    }
    // The state of a GRU that began beyond 1 may stay there: then its rows are rounded anew after each step.
    bool is_large() const {
        bool large = false;
        for (int64_t r = 0; C::OWN == 0 && r < rows; r++) large |= scales_of(0)[r] != CLEAN;
        return large;
    }
    void round_states(int64_t s) const {
        const Mask mask = mask_of(s), next = mask_of(s + 1);
        for (int64_t r = r_first; r < r_last; r++)
            if (!mask.holds(r) && !next.is(RESET, r)) round_state(s + 1, r, h[time_of(s) * B + r]);
        place.meet_team();
    }
    void finish() const {
        if (!a.lengths) copy_rows<float>(rows, units, units, h.from(time_of(T - 1) * B, u_first), h_n.from(0, u_first));
        for (int64_t r = 0; a.lengths && r < rows; r++) {
            const int64_t length = min(a.lengths[b_first + r], T), last = a.reverse ? 0 : length - 1;
            copy_rows<float>(1, units, units, {(length > 0 ? h[last * B + r] : h_0[r]) + u_first, 0}, h_n.from(r, u_first));
        }
        for (int64_t p = p_first; C::OWN > 0 && p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), 0, {carried + p * B * L, L}, {(float *)a.c_n + b_first * H + p * L, H});
    }
    void forward() {
        if (job.has_unit) configure_unit();
        begin();
        const bool large = is_large();
        for (int64_t s = 0; s < T; s++) {
            step(s);
            if (large && s + 1 < T) round_states(s);
        }
        finish();
        if (job.has_unit) release_unit();
    }
};

template <class C> void forward_int8(void *argument, int thread, int threads) {
    const Int8Job &job = *(const Int8Job *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t panels = ceil_div(a.H, Vector<float>::N);
    const Int8Packed<C> packed(a, job.packed);
    for (int64_t p = place.first(panels); p < place.last(panels); p++) {
        if (job.pack) pack_int8_panel<C>(a, p, packed);
        else if (a.changed && is_int8_changed<C>(a, packed.panels[p], p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    if (job.pack && place.parts > 1) place.meet_everyone();
    if (job.pieces == 1) Int8Layer<C, 1>(job, place).forward();
    else Int8Layer<C, 2>(job, place).forward();
}

#define INT8_KERNELS {VECTOR_BYTES, HAS_UNIT, {pack_int8<Lstm>, pack_int8<Gru>}, {forward_int8<Lstm>, forward_int8<Gru>}}
