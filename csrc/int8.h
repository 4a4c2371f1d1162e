// The forward pass of a layer with int8 weights: included after kernels.h by a file for each instruction set.
//
// Each weight row is a row of int8 numbers times its scale. Each row of x, and of h before each step, is quantized in the
// same way, to 8 bits or to 16, which are two pieces of 8. Their products are sums of integers, exact in any order, and the
// rest has one order: so all instruction sets, threads and batches give the same bits.
#pragma once

#include "dots.h"

#define INLINE inline __attribute__((always_inline))

using fastlstm::Int8Job;
using fastlstm::int8_pitch;

// What a panel of packed weights has beside these. Packed memory may lie anywhere.
template <class C> struct Int8Panel {
    static constexpr int64_t L = Vector<float>::N;
    int32_t starts_x[C::X * L];  // of the sums: -ZERO times each weight row's own sum
    float scales_x[C::X * L], biases[C::S * L], scales_h[C::Y * L];
    int32_t starts_h[C::Y * L];
    char digest[sizeof(Digest)];
};

// Packed memory: all panels, then of each of them weight_ih, then weight_hh. A group of 4 columns has a vector for each sum,
// and a lane of it a unit's 4 weights.
template <class C> struct Int8Packed {
    int64_t groups_x, groups_h, size_x, size_h;  // of 4 columns, and bytes of a panel
    Int8Panel<C> *panels;
    int8_t *weights_x, *weights_h;

    Int8Packed(const fastlstm_forward_args &a, void *packed)
        : groups_x(ceil_div(a.I, 4)), groups_h(ceil_div(a.H, 4)), size_x(groups_x * C::X * VECTOR_BYTES),
          size_h(groups_h * C::Y * VECTOR_BYTES), panels((Int8Panel<C> *)packed) {
        const int64_t count = ceil_div(a.H, Vector<float>::N);
        weights_x = (int8_t *)(panels + count), weights_h = weights_x + count * size_x;
    }
};

// The scales of panel p of one weight, zeros after them
inline void pack_scales(const fastlstm_forward_args &a, int64_t p, int count, const int *blocks, const float *from,
                        float *to) {
    constexpr int64_t L = Vector<float>::N;
    for (int64_t k = 0; k < count; k++)
        copy_rows<float>(1, min(L, a.H - p * L), L, {from + blocks[k] * a.H + p * L, 0}, {to + k * L, 0});
}

// Panel p of one weight (count H, columns), zeros after its rows and columns
NOINLINE void pack_bytes(const fastlstm_forward_args &a, int64_t p, int count, const int *blocks,
                         Rows<const int8_t> weight, int64_t columns, int8_t *to, int32_t *starts) {
    constexpr int64_t L = Vector<float>::N;
    __builtin_memset(to, 0, ceil_div(columns, 4) * count * VECTOR_BYTES);
    __builtin_memset(starts, 0, count * L * 4);
    for (int64_t k = 0; k < count; k++) {
        for (int64_t r = 0; r < min(L, a.H - p * L); r++) {
            const int8_t *from = weight[blocks[k] * a.H + p * L + r];
            int8_t *lane = to + k * VECTOR_BYTES + r * 4;
            int32_t sum = 0;
            for (int64_t c = 0; c < columns; c++) {
                lane[c / 4 * count * VECTOR_BYTES + c % 4] = from[c];
                sum += from[c];
            }
            starts[k * L + r] = -ZERO * sum;
        }
    }
}

template <class C> NOINLINE void pack_int8_panel(const fastlstm_forward_args &a, int64_t p, const Int8Packed<C> &packed) {
    Int8Panel<C> &panel = packed.panels[p];
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, panel.scales_x);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, panel.scales_h);
    pack_biases<C, float>(&a, p, panel.L, panel.biases);
    pack_bytes(a, p, C::X, C::BLOCKS_IH, {(const int8_t *)a.weight_ih, a.weight_ih_row}, a.I,
               packed.weights_x + p * packed.size_x, panel.starts_x);
    pack_bytes(a, p, C::Y, C::BLOCKS_HH, {(const int8_t *)a.weight_hh, a.weight_hh_row}, a.H,
               packed.weights_h + p * packed.size_h, panel.starts_h);
}

// To be kept: the digest comes first, so that what is written to the weights from now on makes it differ.
template <class C> void pack_int8(const fastlstm_forward_args *a, void *memory) {
    const Int8Packed<C> packed(*a, memory);
    for (int64_t p = 0; p < ceil_div(a->H, Vector<float>::N); p++) {
        const Digest digest_of_p = digest<C, float, int8_t>(a, p);
        __builtin_memcpy(packed.panels[p].digest, &digest_of_p, sizeof digest_of_p);
        pack_int8_panel<C>(*a, p, packed);
    }
}

// Whether the weights, scales or biases of panel p have changed since they were packed
template <class C> NOINLINE bool is_int8_changed(const fastlstm_forward_args &a, const Int8Panel<C> &panel, int64_t p) {
    constexpr int64_t L = Vector<float>::N;
    alignas(64) float seen[(C::X + C::Y + C::S) * L];  // as they lie in the panel
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, seen);
    pack_biases<C, float>(&a, p, L, seen + C::X * L);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, seen + (C::X + C::S) * L);
    if (__builtin_memcmp(seen, panel.scales_x, sizeof seen)) return true;
    const Digest now = digest<C, float, int8_t>(&a, p);
    return __builtin_memcmp(&now, panel.digest, sizeof now) != 0;
}

constexpr float TOP[] = {0, 127, 127 * 256};  // the largest number of so many bytes

// Rounds values times `inverse` to numbers of PIECES bytes, `piece` apart. A sum with 1.5 * 2**23 has the nearest integer in
// its last bits.
template <int PIECES> inline void store_rounded(Raw<float> values, float inverse, uint8_t *to, int64_t piece) {
    constexpr int OFFSET = PIECES == 1 ? ZERO : 128 + 256 * ZERO;
    const Ints numbers = (Ints)(values * inverse + (1.5f * (1 << 23) + OFFSET));
    store_low(PIECES == 1 ? numbers : numbers >> 8, to);
    if (PIECES == 2) store_low(ZERO ? numbers : numbers ^ 128, to + piece);
}

// Calls body(floats, k) for vectors of a row's floats from k on, zeros after a row of less. The last may overlap.
template <class Body> inline void for_vectors(int64_t count, const float *from, Body body) {
    constexpr int64_t L = Vector<float>::N;
    for (int64_t k = 0; count >= L && k < count; k += L) {
        const int64_t at = min(k, count - L);
        body(Vector<float>::load(from + at).raw, at);
    }
    if (count >= L) return;
    Raw<float> few = {};
    __builtin_memcpy(&few, from, count * 4);
    body(few, 0);
}

template <int BYTES> inline int32_t largest_lane(const int32_t __attribute__((vector_size(BYTES))) lanes) {
    struct { int32_t __attribute__((vector_size(BYTES / 2))) low, high; } halves;
    __builtin_memcpy(&halves, &lanes, BYTES);
    const auto larger = halves.low > halves.high ? halves.low : halves.high;
    if constexpr (BYTES > 16) return largest_lane<BYTES / 2>(larger);
    else return max(larger[0], larger[1]);
}

// Writes a row in PIECES of bytes, `piece` apart and whole vectors of them, and returns its scale. The largest size is
// `least` or more. A row that is not finite has a scale of NaN, and one that is next to nothing a scale of 0.
template <int PIECES>
NOINLINE float quantize(int64_t count, const float *from, float least, uint8_t *to, int64_t piece) {
    constexpr int64_t L = Vector<float>::N;
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
        __builtin_memset(to, ZERO, (PIECES - 1) * piece + (count + L - 1) / L * L);
        return finite ? 0 : __builtin_nanf("");
    }
    const float inverse = TOP[PIECES] / largest;
    for_vectors(count, from, [&](Raw<float> values, int64_t k) { store_rounded<PIECES>(values, inverse, to + k, piece); });
    return largest / TOP[PIECES];
}

// Rows of bytes, and some panels of weights that each is multiplied with.
template <class C> struct Int8Product {
    const Int8Panel<C> *panel;  // the first one
    const int8_t *weights;
    int64_t size, groups, sign; // of a panel's weights, their groups, and 1 or -1 for panels backwards
    const uint8_t *a;
    int64_t piece;              // bytes from one piece of a row to its next, or to the next row's first
    const float *scales;        // of the rows
};

// sums[m][n] = scales[m] * weight_scales[n] * (sum over k of a[m, k] w[k, n]) + init(m, n) for R rows and N vectors of a panel.
template <int PIECES, int R, int N, class C> struct Int8Sums {
    static constexpr int A = R * PIECES, U = A * N >= CHAINS ? 1 : A * N > 4 ? 2 : 4;  // rows of bytes, and sums of each
    static constexpr int64_t L = Vector<float>::N;
    Ints totals[A][N];

    INLINE Int8Sums(const Int8Product<C> &s, const int32_t *starts) {
        Dots sums[U][A][N] = {};
        if (ZERO)
            UNROLL for (int m = 0; m < A; m++)
                UNROLL for (int n = 0; n < N; n++) __builtin_memcpy(&sums[0][m][n], starts + n * L, VECTOR_BYTES);
        const int8_t *w = s.weights;
        const uint8_t *a = s.a;
        const int64_t piece = s.piece;
        int64_t groups = s.groups;
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

// Vector n of a row: init + scale * weight_scales * total
template <int PIECES, int N>
inline Raw<float> scaled(const Ints (*totals)[N], int n, float scale, const float *weight_scales, Raw<float> init) {
    Raw<float> sum = __builtin_convertvector(totals[0][n], Raw<float>);
    if (PIECES == 2) sum = fused(sum, 256.0f - Raw<float>{}, __builtin_convertvector(totals[PIECES - 1][n], Raw<float>));
    return fused(sum, Vector<float>::load(weight_scales + n * Vector<float>::N).raw * scale, init);
}

// What x makes of the sums: (panels, rows, X, L) from `out` on.
template <class C, int PIECES> struct Int8Inputs : Int8Product<C> {
    static constexpr int64_t L = Vector<float>::N;
    float *out;
    int64_t out_panel;

    template <int R> INLINE void tile() const {
        const Int8Panel<C> &p = *this->panel;
        const Int8Sums<PIECES, R, C::X, C> sums(*this, p.starts_x);
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int n = 0; n < C::X; n++) {
                const Raw<float> init = Vector<float>::load(p.biases + n * L).raw;
                const auto value = scaled<PIECES, C::X>(sums.totals + r * PIECES, n, this->scales[r], p.scales_x, init);
                Vector<float>(value).store(out + (r * C::X + n) * L);
            }
        }
    }
    void skip(int64_t rows) { this->a += rows * PIECES * this->piece, this->scales += rows, out += rows * C::X * L; }
    void next() { this->panel += this->sign, this->weights += this->sign * this->size, out += out_panel; }
};

// A time step: products of h, and the cells. The state that a cell reads is in `carried`, whole vectors of h go to `out`, and its bytes to
// `to`. The scale that a row of these has becomes NaN where h is.
template <class C, int PIECES> struct Int8Step : Int8Product<C> {
    static constexpr int64_t L = Vector<float>::N;
    const float *sums_x;  // see Int8Inputs
    int64_t sums_panel;
    float *carried;       // (panels, .., L)
    int64_t carried_panel;
    float *out;
    int64_t out_row;
    uint8_t *to;
    float *to_scales;

    template <int R> INLINE void tile() const {
        const Int8Sums<PIECES, R, C::Y, C> sums(*this, this->panel->starts_h);
        if constexpr (R == 1) cells(1, sums.totals);
        else cells_apart(R, sums.totals);
    }
    // Its constants then take no registers from the sums.
    NOINLINE __attribute__((flatten)) void cells_apart(int64_t rows, const Ints (*totals)[C::Y]) const { cells(rows, totals); }
    INLINE void cells(int64_t rows, const Ints (*totals)[C::Y]) const {
        const Int8Panel<C> &p = *this->panel;
        const float *from_x = sums_x, *row_scales = this->scales;
        const int64_t piece = this->piece, row = out_row;
        float *state = carried, *h = out;
        uint8_t *bytes = to;
        for (int64_t r = 0; r < rows; r++) {
            Vector<float> pre[C::S], before[C::STATES], after[C::STATES], saved[C::SAVED];
            UNROLL for (int k = 0; k < C::S; k++) {
                constexpr int FIRST = C::S - C::Y;
                Raw<float> value = Vector<float>::load(k < C::X ? from_x + k * L : p.biases + k * L).raw;
                if (k >= FIRST) value = scaled<PIECES, C::Y>(totals + r * PIECES, k - FIRST, row_scales[r], p.scales_h, value);
                pre[k] = value;
            }
            before[C::OWN] = Vector<float>::load(state);
            C::forward(pre, before, after, saved);
            after[C::OWN].store(state);
            after[0].store(h);
            store_rounded<PIECES>(after[0].raw, TOP[PIECES], bytes, piece);
            if (__builtin_expect(any_nan(after[0].raw), 0)) to_scales[r] = __builtin_nanf("");
            from_x += C::X * L, state += L, h += row, bytes += PIECES * piece;
        }
    }
    void skip(int64_t rows) {
        this->a += rows * PIECES * this->piece, this->scales += rows, sums_x += rows * C::X * L, carried += rows * L;
        out += rows * out_row, to += rows * PIECES * this->piece, to_scales += rows;
    }
    void next() {
        const int64_t sign = this->sign;
        this->panel += sign, this->weights += sign * this->size, sums_x += sign * sums_panel;
        carried += sign * carried_panel, out += sign * L, to += sign * L;
    }
};

// Several tiles of R rows, or one against several panels: t goes on to what comes then.
template <int R, class T> NOINLINE __attribute__((flatten)) void run_tiles(int64_t panels, int64_t tiles, T &t) {
    const bool across = panels > 1;
    for (int64_t k = across ? panels : tiles; k > 0; k--) {
        t.template tile<R>();
        if (across) t.next();
        else t.skip(R);
    }
}
template <int R, class T> inline void in_tiles(int64_t rows, int64_t panels, T &t) {
    if (rows >= R) run_tiles<R>(panels, rows / R, t);
    if constexpr (R > 1) in_tiles<R - 1>(rows % R, panels, t);
}
// Rows of one tile pass all panels at once.
template <int PIECES, class T> NOINLINE void multiply_int8(int64_t rows, int64_t panels, T &&t) {
    constexpr int MOST = (INT8_ROWS + PIECES - 1) / PIECES;
    if (rows <= MOST) return in_tiles<MOST>(rows, panels, t);
    for (; panels > 0; panels--, t.skip(-rows), t.next()) in_tiles<MOST>(rows, 1, t);
}

template <class C, int PIECES> void run_int8(const Int8Job &job, Place &place) {
    constexpr int64_t L = Vector<float>::N, OF_X = C::X * L;
    static_assert(C::STATES - C::OWN == 1, "one state is carried");
    constexpr float CLEAN = 1 / TOP[PIECES];  // the scale of a row whose largest number is at most 1
    const fastlstm_forward_args &a = *job.args;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, L), block = job.block;
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels), count = b_last - b_first;
    const int64_t p_whole = min(p_last, H / L), first = p_first * L, width = min(p_last * L, H) - first;
    const int64_t r_first = place.first_of_team(count), r_last = place.last_of_team(count);
    const int64_t piece_x = int8_pitch(I), piece_h = int8_pitch(H), row_x = PIECES * piece_x, row_h = PIECES * piece_h;
    const Int8Packed<C> packed(a, job.packed);
    auto time_of = [&](int64_t s) { return a.reverse ? T - 1 - s : s; };
    // The part's rows of h before step s, and of the scales, with three turns: read, written, made ready
    auto bytes_of = [&](int64_t s) { return job.h + (s % 2 * B + b_first) * row_h; };
    auto scales_of = [&](int64_t s) { return job.scales_h + s % 3 * B + b_first; };
    float *const own_scales = job.scales + place.thread * B, *const carried = job.carried + b_first * L;
    auto inputs_at = [&](int64_t s) { return (s / block % 2 * B + b_first) * block; };  // the first of a block's rows
    auto round_inputs = [&](int64_t s) {
        const int64_t rows = min(block, T - s) * count;
        for (int64_t k = place.first_of_team(rows); k < place.last_of_team(rows); k++) {
            const float *from = (const float *)a.x + time_of(s + k / count) * a.x_step + (b_first + k % count) * a.x_row;
            const int64_t at = inputs_at(s) + k;
            job.scales_x[at] = quantize<PIECES>(I, from, 0, job.x + at * row_x, piece_x);
        }
    };
    alignas(64) float of_x[CHUNK * OF_X], tail[CHUNK * L];
    auto multiply_inputs = [&](int64_t s, int64_t p, int64_t count_p, int64_t row, int64_t rows, float *out) {
        const int64_t at = inputs_at(s) + row;
        multiply_int8<PIECES>(rows, count_p, Int8Inputs<C, PIECES>{
            {packed.panels + p, packed.weights_x + p * packed.size_x, packed.size_x, packed.groups_x, 1, job.x + at * row_x, piece_x, job.scales_x + at},
            out, B * block * OF_X});
    };
    // Step s of `some` panels from p on, or back, for rows that are not held
    auto run_panels = [&](int64_t s, const float *scales, int64_t p, int64_t some, int64_t sign, int64_t r, int64_t rows, const float *sums_x) {
        const bool cut = (p + 1) * L > H;
        float *const out = (float *)a.h + (time_of(s) * B + b_first + r) * H + p * L;
        multiply_int8<PIECES>(rows, some, Int8Step<C, PIECES>{
            {packed.panels + p, packed.weights_h + p * packed.size_h, packed.size_h, packed.groups_h, sign, bytes_of(s) + r * row_h, piece_h, scales + r},
            sums_x, B * block * OF_X, carried + (p * B + r) * L, B * L, cut ? tail : out, cut ? L : H,
            bytes_of(s + 1) + r * row_h + p * L, scales_of(s + 1) + r});
        if (cut) copy_rows<float>(rows, H - p * L, H - p * L, {tail, L}, {out, H});
    };
    auto set_bytes = [&](int64_t s, int64_t r, const uint8_t *from) {  // this thread's units of a row before step s
        for (int64_t k = 0; k < PIECES; k++) {
            uint8_t *to = bytes_of(s) + r * row_h + k * piece_h + first;
            if (from) __builtin_memcpy(to, from + k * piece_h + first, (p_last - p_first) * L);
            else __builtin_memset(to, ZERO, (p_last - p_first) * L);
        }
    };
    const Rows<const float> starts[] = {{(const float *)a.h_0, a.h_0_row}, {(const float *)a.c_0, a.c_0_row}};
    for (int64_t r = r_first; r < r_last; r++) {
        scales_of(0)[r] = quantize<PIECES>(H, starts[0][b_first + r], 1, bytes_of(0) + r * row_h, piece_h);
        scales_of(1)[r] = scales_of(2)[r] = CLEAN;
    }
    for (int64_t p = p_first; p < p_last; p++)
        copy_rows<float>(count, min(L, H - p * L), L, starts[C::OWN].from(b_first, p * L), {carried + p * B * L, L});
    round_inputs(0);
    place.meet_team();
    bool is_large = false;  // a GRU's h stays beyond 1 then
    for (int64_t r = 0; C::OWN == 0 && r < count; r++) is_large |= scales_of(0)[r] != CLEAN;
    auto reset = [&](int64_t s) {
        const Mask mask(a, time_of(s), b_first);
        for (int64_t r = mask.next(RESET, count); r < count; r = mask.next(RESET, count, r + 1))
            set_bytes(s, r, nullptr);
        for (int64_t p = p_first; p < p_last; p++) mask.zero<float>(RESET, count, L, {carried + p * B * L, L});
    };
    if (a.reset) place.meet_team(), reset(0), place.meet_team();

    for (int64_t s = 0; s < T; s++) {
        const int64_t t = time_of(s), in_block = s % block, steps = min(block, T - s);
        const Mask mask(a, t, b_first);
        for (int64_t r = 0; a.reset && r < count; r++) own_scales[r] = mask.is(RESET, r) ? CLEAN : scales_of(s)[r];
        const float *const scales = a.reset ? own_scales : scales_of(s);
        for (int64_t r = r_first; r < r_last; r++)  // hardly ever: other threads keep what they have read
            if (scales_of(s + 2)[r] != CLEAN) scales_of(s + 2)[r] = CLEAN;
        float *const of_block = job.sums_x + (p_first * B + b_first) * block * OF_X;
        if (job.few && in_block == 0) multiply_inputs(s, p_first, p_last - p_first, 0, steps * count, of_block);
        for (int64_t r = mask.next(HOLD, count); r < count; r = mask.next(HOLD, count, r + 1)) {
            set_bytes(s + 1, r, bytes_of(s) + r * row_h), scales_of(s + 1)[r] = scales[r];
            zero_rows<float>(1, width, {(float *)a.h + (t * B + b_first + r) * H + first, 0});
        }
        const int64_t at_once = job.few ? max(1, p_whole - p_first) : 1;
        for (int64_t done = 0; done < p_last - p_first;) {  // to and fro: the weights read last are still in the L2 cache
            const bool back = s % 2 != 0;
            const int64_t some = min(at_once, p_last - p_first - done);
            int64_t p = p_first + done;
            if (job.few && p < p_whole && back) p += some - 1;
            if (!job.few && back) p = p_last - 1 - done;
            done += some;
            for (int64_t r = 0, rows; r < count; r += rows) {
                rows = min(CHUNK, mask.next(HOLD, count, r) - r);
                if (rows == 0) {
                    rows = 1;
                    continue;
                }
                const float *sums_x = of_x;
                if (job.few) sums_x = job.sums_x + ((p * B + b_first) * block + in_block * count + r) * OF_X;
                else multiply_inputs(s, p, 1, r, rows, of_x);
                run_panels(s, scales, p, some, back ? -1 : 1, r, rows, sums_x);
            }
        }
        if (s + 1 < T && a.reset) reset(s + 1);
        if (s + 1 < T && (s + 1) % block == 0) round_inputs(s + 1);
        place.meet_team();
        if (!is_large || s + 1 == T) continue;
        const Mask next(a, time_of(s + 1), b_first);
        for (int64_t r = r_first; r < r_last; r++) {
            if (mask.holds(r) || next.is(RESET, r)) continue;
            const float *h = (const float *)a.h + (t * B + b_first + r) * H;
            scales_of(s + 1)[r] = quantize<PIECES>(H, h, 1, bytes_of(s + 1) + r * row_h, piece_h);
        }
        place.meet_team();
    }
    const Rows<float> h_n{(float *)a.h_n + b_first * H + first, H};
    const Rows<const float> h{(const float *)a.h + b_first * H + first, H};
    if (!a.lengths) copy_rows<float>(count, width, width, h.from(time_of(T - 1) * B, 0), h_n);
    for (int64_t r = 0; a.lengths && r < count; r++) {
        const int64_t length = min(a.lengths[b_first + r], T);
        const float *from = length > 0 ? h[(a.reverse ? 0 : length - 1) * B + r] : starts[0][b_first + r] + first;
        copy_rows<float>(1, width, width, {from, 0}, h_n.from(r, 0));
    }
    for (int64_t p = p_first; C::OWN > 0 && p < p_last; p++) {
        const int64_t valid = min(L, H - p * L);
        copy_rows<float>(count, valid, valid, {carried + p * B * L, L}, {(float *)a.c_n + b_first * H + p * L, H});
    }
}

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
    if (job.pieces == 1) run_int8<C, 1>(job, place);
    else run_int8<C, 2>(job, place);
}

#define INT8_KERNELS {VECTOR_BYTES, {pack_int8<Lstm>, pack_int8<Gru>}, {forward_int8<Lstm>, forward_int8<Gru>}}
