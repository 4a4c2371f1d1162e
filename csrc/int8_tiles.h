// Quantizes rows of numbers, multiplies them by int8 weights, and runs the cells of an int8 layer.
#pragma once

#define FLATTEN __attribute__((flatten))  // inlines all calls within

#include "dots.h"
#include "amx.h"
#include "int8_weights.h"

constexpr float TOP[] = {0, 127, 127 * 256};  // the largest number of one and of two activation bytes

// Rounds values times `inverse` to numbers of ACT_BYTES bytes, which lie byte_stride apart. The sum with 1.5 * 2**23
// has the nearest integer in its last bits.
template <int ACT_BYTES> inline void store_rounded(Raw<float> values, float inverse, uint8_t *bytes, int64_t byte_stride) {
    constexpr int OFFSET = ACT_BYTES == 1 ? ZERO : 128 + 256 * ZERO;
    const Ints numbers = (Ints)(values * inverse + (1.5f * (1 << 23) + OFFSET));
    store_low(ACT_BYTES == 1 ? numbers : numbers >> 8, bytes);
    if (ACT_BYTES == 2) store_low(ZERO ? numbers : numbers ^ 128, bytes + byte_stride);
}

// Calls body(floats, k) for the vector at column k, for all vectors of a row. The last may overlap the one before. A
// row shorter than a vector is padded with zeros.
template <class Body> inline void for_vectors(int64_t count, const float *from, Body body) {
    constexpr int64_t L = Vector<float>::N;
    float padded[L] = {};
    if (count < L) __builtin_memcpy(padded, from, count * 4), from = padded, count = L;
    for (int64_t k = 0; k < count; k += L) {
        const int64_t column = min(k, count - L);
        body(Vector<float>::load(from + column).raw, column);
    }
}

template <int BYTES> inline int32_t largest_lane(const int32_t __attribute__((vector_size(BYTES))) lanes) {
    struct { int32_t __attribute__((vector_size(BYTES / 2))) low, high; } halves;
    __builtin_memcpy(&halves, &lanes, BYTES);
    const auto larger = halves.low > halves.high ? halves.low : halves.high;
    if constexpr (BYTES > 16) return largest_lane<BYTES / 2>(larger);
    else return larger[0] > larger[1] ? larger[0] : larger[1];
}

// Quantizes a row to ACT_BYTES bytes a number, in whole vectors, and returns its scale. The largest absolute value
// counts as `least` at least. A row that is not finite has the scale NaN, and a row of tiny values the scale 0.
template <int ACT_BYTES>
NOINLINE float quantize(int64_t count, const float *from, float least, uint8_t *bytes, int64_t byte_stride) {
    Ints largest_bits = (Ints)(least - Raw<float>{});  // absolute values are ordered as their bits, with NaN as the largest
    for_vectors(count, from, [&](Raw<float> values, int64_t) {
        const Ints size = (Ints)values & INT32_MAX;
        largest_bits = size > largest_bits ? size : largest_bits;
    });
    const int32_t largest_int = largest_lane<VECTOR_BYTES>(largest_bits);
    float largest;
    __builtin_memcpy(&largest, &largest_int, 4);
    const bool finite = largest_int < 0x7f800000;
    if (!finite || largest < 0x1p-100f) {
        __builtin_memset(bytes, ZERO, ACT_BYTES * byte_stride);
        return finite ? 0 : __builtin_nanf("");
    }
    const float inverse = TOP[ACT_BYTES] / largest;
    for_vectors(count, from,
                [&](Raw<float> values, int64_t k) { store_rounded<ACT_BYTES>(values, inverse, bytes + k, byte_stride); });
    return largest / TOP[ACT_BYTES];
}

// The sums of a[m, k] w[k, n] over `groups` of 4 columns, for A rows of bytes and N vectors of n. They start from vectors at
// `starts`, whose rows are starts_row apart. Few sums are computed as U sums each, which do not wait for each other.
template <int A, int N> struct Int8Sums {
    static constexpr int U = A * N >= CHAINS ? 1 : A * N > 4 ? 2 : 4;
    Ints totals[A][N];

    INLINE Int8Sums(const int32_t *starts, int64_t starts_row, const uint8_t *a, int64_t row_stride, const int8_t *w,
                    int64_t groups) {
        Dots sums[U][A][N] = {};
        UNROLL for (int m = 0; m < A && ZERO; m++)
            UNROLL for (int n = 0; n < N; n++)
                __builtin_memcpy(&sums[0][m][n], starts + m * starts_row + n * Vector<float>::N, VECTOR_BYTES);
        for (; groups >= U; groups -= U, w += U * N * VECTOR_BYTES, a += U * 4)
            UNROLL for (int u = 0; u < U; u++) add(sums[u], w + u * N * VECTOR_BYTES, a + u * 4, row_stride);
        for (; U > 1 && groups > 0; groups--, w += N * VECTOR_BYTES, a += 4) add(sums[0], w, a, row_stride);
        UNROLL for (int m = 0; m < A; m++) {
            UNROLL for (int n = 0; n < N; n++) {
                totals[m][n] = sums[0][m][n].total();
                UNROLL for (int u = 1; u < U; u++) totals[m][n] += sums[u][m][n].total();
            }
        }
    }
    static INLINE void add(Dots (&sums)[A][N], const int8_t *w, const uint8_t *a, int64_t row_stride) {
        Bytes loaded[N];
        UNROLL for (int n = 0; n < N; n++) __builtin_memcpy(&loaded[n], w + n * VECTOR_BYTES, VECTOR_BYTES);
        UNROLL for (int m = 0; m < A; m++) {
            const Dots::Operand x = Dots::operand(a + m * row_stride);
            UNROLL for (int n = 0; n < N; n++) sums[m][n].add(loaded[n], x);
        }
    }
};

// Multiplies rows of activation bytes by panels of weights. For x (IS_STEP false) the result is the input projection.
// For h the cells follow while the sums are in registers, and the result is a time step.
template <class C, int ACT_BYTES, bool IS_STEP> struct Int8Rows {
    static constexpr int64_t L = Vector<float>::N, X = C::X * L;
    static constexpr int N = IS_STEP ? C::Y : C::X,
                         MAX_ROWS = (INT8_ROWS + ACT_BYTES - 1) / ACT_BYTES;  // vectors of a tile, and its most rows
    const Int8Panel<C> *panel;   // the first one
    const int8_t *weights;
    int64_t panel_bytes, groups, direction;  // bytes and column groups of a panel's weights; 1 or -1
    const uint8_t *a;
    int64_t byte_stride;         // of int8 from row to row; of int16 from a row's high bytes to its low ones, and on
    const float *scales;         // of the rows
    float *sums_x;               // (panels, rows, X, L): the input projection, with biases
    int64_t sums_x_panel;
    // With IS_STEP
    float *carried;              // (panels, rows, L): the state that the cell reads
    int64_t carried_panel;
    float *h;                    // in whole vectors; h_row is its row stride
    int64_t h_row;
    uint8_t *next;               // h as activation bytes, in rows like those of a
    float *next_scales;          // which become NaN where h is
    // The values from which sums start, if they are not the panel's: see `on_amx`
    const int32_t *starts = nullptr;
    int64_t starts_row = 0;

    const int32_t *starts_of_panel() const { return IS_STEP ? panel->starts_h : panel->starts_x; }

    template <int R> INLINE void tile() const {
        const Int8Sums<R * ACT_BYTES, N> sums(starts ? starts : starts_of_panel(), starts_row, a, byte_stride, weights, groups);
        if constexpr (!IS_STEP) store(R, sums.totals);
        else if constexpr (R == 1) cells(1, sums.totals);
        else cells_not_inlined(R, sums.totals);
    }
    // Returns vector n of a row: init + scale * weight_scales * total.
    static INLINE Raw<float> scaled(const Ints (*totals)[N], int n, float scale, const float *weight_scales, Raw<float> init) {
        Raw<float> sum = __builtin_convertvector(totals[0][n], Raw<float>);
        if (ACT_BYTES == 2)
            sum = fused(sum, 256.0f - Raw<float>{}, __builtin_convertvector(totals[ACT_BYTES - 1][n], Raw<float>));
        return fused(sum, Vector<float>::load(weight_scales + n * L).raw * scale, init);
    }
    INLINE void store(int rows, const Ints (*totals)[N]) const {
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int n = 0; n < N; n++) {
                const Raw<float> bias = Vector<float>::load(panel->biases + n * L).raw;
                const Raw<float> sum = scaled(totals + r * ACT_BYTES, n, scales[r], panel->scales_x, bias);
                Vector<float>(sum).store(sums_x + r * X + n * L);
            }
        }
    }
    // Without inlining, the constants of the cell take no registers from the sums.
    NOINLINE FLATTEN void cells_not_inlined(int64_t rows, const Ints (*totals)[N]) const { cells(rows, totals); }
    INLINE void cells(int64_t rows, const Ints (*totals)[N]) const {
        const Int8Panel<C> &p = *panel;
        const Int8Rows s = *this;  // a copy, since a store might change *this
        for (int64_t r = 0; r < rows; r++) {
            Vector<float> preacts[C::S], old_states[C::STATES], new_states[C::STATES], saved[C::SAVED];
            UNROLL for (int k = 0; k < C::S; k++) {
                constexpr int FIRST = C::S - C::Y;  // pre-activation of h
                Raw<float> value = Vector<float>::load(k < C::X ? s.sums_x + r * X + k * L : p.biases + k * L).raw;
                if (k >= FIRST) value = scaled(totals + r * ACT_BYTES, k - FIRST, s.scales[r], p.scales_h, value);
                preacts[k] = value;
            }
            old_states[C::FIRST_READ] = Vector<float>::load(s.carried + r * L);
            C::forward(preacts, old_states, new_states, saved);
            new_states[C::FIRST_READ].store(s.carried + r * L);
            new_states[0].store(s.h + r * s.h_row);
            store_rounded<ACT_BYTES>(new_states[0].raw, TOP[ACT_BYTES], s.next + r * ACT_BYTES * s.byte_stride, s.byte_stride);
            if (__builtin_expect(any_nan(new_states[0].raw), 0)) {  // another thread of the team may find it in its units
                constexpr float nan = __builtin_nanf("");
                __atomic_store(&s.next_scales[r], &nan, __ATOMIC_RELAXED);
            }
        }
    }

    void skip(int64_t rows) {
        a += rows * ACT_BYTES * byte_stride, scales += rows, sums_x += rows * X, starts += rows * ACT_BYTES * starts_row;
        if (IS_STEP) carried += rows * L, h += rows * h_row, next += rows * ACT_BYTES * byte_stride, next_scales += rows;
    }
    void next_panel() {
        panel += direction, weights += direction * panel_bytes, sums_x += direction * sums_x_panel;
        if (IS_STEP) carried += direction * carried_panel, h += direction * L, next += direction * L;
    }

    // Computes several tiles of R rows, or one tile for each of several panels, and moves on past them.
    template <int R> NOINLINE FLATTEN void tiles(int64_t panels, int64_t count) {
        const bool per_panel = panels > 1;
        for (int64_t k = per_panel ? panels : count; k > 0; k--) {
            tile<R>();
            if (per_panel) next_panel();
            else skip(R);
        }
    }
    template <int R = MAX_ROWS> void run_tiles(int64_t rows, int64_t panels) {
        if (rows >= R) tiles<R>(panels, rows / R);
        if constexpr (R > 1) run_tiles<R - 1>(rows % R, panels);
    }
    // Multiplies a panel of weights by AMX_ROWS rows or more. AMX sums over whole tiles of columns for blocks of
    // AMX_ROWS rows. If the last block has fewer rows, it begins with rows of the one before, whose sums are not used.
    void on_amx(int64_t rows) {
        const int64_t steps = groups / AMX_GROUPS;
        alignas(64) int32_t sums[ACT_BYTES * AMX_ROWS * N * L];
        for (int64_t count; rows > 0; rows -= count) {
            count = min(rows, AMX_ROWS);
            const int64_t skipped = (AMX_ROWS - count) * ACT_BYTES;
            for (int64_t k = 0; k < ACT_BYTES; k++)
                amx_sums<N>(starts_of_panel(), a + (k * AMX_ROWS - skipped) * byte_stride, byte_stride, weights, steps,
                             sums + k * AMX_ROWS * N * L);
            Int8Rows rest = *this;
            rest.weights += steps * AMX_GROUPS * N * VECTOR_BYTES, rest.groups -= steps * AMX_GROUPS;
            rest.a += steps * AMX_GROUPS * 4, rest.starts = sums + skipped * N * L, rest.starts_row = N * L;
            rest.run_tiles(count, 1);
            skip(count);
        }
    }
    // Multiplies all rows by all panels. The rows of a single tile pass all panels in one call.
    NOINLINE void multiply(int64_t rows, int64_t panels, bool has_amx) {
        if (rows <= MAX_ROWS) return run_tiles(rows, panels);
        for (; panels > 0; panels--, skip(-rows), next_panel()) {
            if constexpr (HAS_AMX)
                if (has_amx && rows >= AMX_ROWS && groups >= AMX_GROUPS) {
                    on_amx(rows);
                    continue;
                }
            run_tiles(rows, 1);
        }
    }
};
