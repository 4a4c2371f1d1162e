// Rows of numbers rounded to bytes, and their tiles of products with int8 weights, with the cells of an int8 layer.
#pragma once

#define INLINE inline __attribute__((always_inline))
#define FLATTEN __attribute__((flatten))  // all calls within are inlined

#include "dots.h"
#include "amx.h"
#include "int8_weights.h"

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

    INLINE Int8Sums(const int32_t *starts, int64_t starts_row, const uint8_t *a, int64_t piece, const int8_t *w,
                    int64_t groups) {
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
