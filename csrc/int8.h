// The forward pass of a layer with int8 weights: included after kernels.h by a file for each instruction set.
//
// Each weight row is a row of int8 numbers times its scale. Each row of x, and of h before each step, is quantized in the
// same way, to 8 bits or to 16, which are two pieces of 8. Their products are sums of integers, exact in any order, and the
// rest has one order: so all instruction sets, threads and batches give the same bits.
#pragma once

#include "dots.h"

using fastlstm::Int8Job;
using fastlstm::int8_pitch;

// One panel of packed weights. A group of 4 columns has a vector for each sum, and a lane of it a unit's 4 weights.
template <class C> struct Int8Panel {
    static constexpr int64_t L = Vector<float>::N;
    int8_t *weights_x, *weights_h;
    float *scales_x, *scales_h, *biases;  // (X, L), (Y, L), (S, L)
    int32_t *starts_x, *starts_h;         // of the sums: (X, L), (Y, L), -ZERO times each weight row's own sum
    Digest *digest;

    static int64_t size(const fastlstm_forward_args &a) {
        return fastlstm::int8_panel_size(C::S, C::X, C::Y, a.I, a.H, VECTOR_BYTES);
    }
    Int8Panel(const fastlstm_forward_args &a, void *packed, int64_t p) {
        weights_x = (int8_t *)packed + p * size(a);
        weights_h = weights_x + ceil_div(a.I, 4) * C::X * VECTOR_BYTES;
        scales_x = (float *)(weights_h + ceil_div(a.H, 4) * C::Y * VECTOR_BYTES);
        scales_h = scales_x + C::X * L, biases = scales_h + C::Y * L;
        starts_x = (int32_t *)(biases + C::S * L), starts_h = starts_x + C::X * L;
        digest = (Digest *)(starts_h + C::Y * L);
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

template <class C> NOINLINE void pack_int8_panel(const fastlstm_forward_args &a, int64_t p, void *packed) {
    const Int8Panel<C> panel(a, packed, p);
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, panel.scales_x);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, panel.scales_h);
    pack_biases<C, float>(&a, p, panel.L, panel.biases);
    pack_bytes(a, p, C::X, C::BLOCKS_IH, {(const int8_t *)a.weight_ih, a.weight_ih_row}, a.I, panel.weights_x,
               panel.starts_x);
    pack_bytes(a, p, C::Y, C::BLOCKS_HH, {(const int8_t *)a.weight_hh, a.weight_hh_row}, a.H, panel.weights_h,
               panel.starts_h);
}

// To be kept: the digest comes first, so that what is written to the weights from now on makes it differ.
template <class C> void pack_int8(const fastlstm_forward_args *a, void *packed) {
    for (int64_t p = 0; p < ceil_div(a->H, Vector<float>::N); p++) {
        const Digest digest_of_p = digest<C, float, int8_t>(a, p);
        __builtin_memcpy((char *)Int8Panel<C>(*a, packed, p).digest, &digest_of_p, sizeof digest_of_p);
        pack_int8_panel<C>(*a, p, packed);
    }
}

// Whether the weights, scales or biases of panel p have changed since they were packed
template <class C> NOINLINE bool is_int8_changed(const fastlstm_forward_args &a, void *packed, int64_t p) {
    constexpr int64_t L = Vector<float>::N;
    const Int8Panel<C> panel(a, packed, p);
    alignas(64) float seen[(C::X + C::Y + C::S) * L];  // as they lie in the panel
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, seen);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, seen + C::X * L);
    pack_biases<C, float>(&a, p, L, seen + (C::X + C::Y) * L);
    if (__builtin_memcmp(seen, panel.scales_x, sizeof seen)) return true;
    const Digest now = digest<C, float, int8_t>(&a, p);
    return __builtin_memcmp(&now, (const char *)panel.digest, sizeof now) != 0;
}

// `count` floats from `from`, in a vector with zeros after them
inline Raw<float> load_first(const float *from, int64_t count) {
    Raw<float> raw = {};
    if (count >= Vector<float>::N) return Vector<float>::load(from).raw;
    __builtin_memcpy(&raw, from, count * 4);
    return raw;
}

// Writes a row in PIECES of bytes, `piece` apart and whole vectors of them, and returns its scale. The largest size is
// `least` or more. A row that is not finite has a scale of NaN, and one that is next to nothing a scale of 0.
template <int PIECES>
NOINLINE float quantize(int64_t count, const float *from, float least, uint8_t *to, int64_t piece) {
    constexpr int64_t L = Vector<float>::N;
    constexpr float TOP = PIECES == 1 ? 127 : 127 * 256, ROUND = 1.5f * (1 << 23);
    typedef uint8_t Narrow __attribute__((vector_size(L)));
    Ints most = (Ints)(least - Raw<float>{});  // floats of no sign are in the order of their bits, and NaN is last
    for (int64_t k = 0; k < count; k += L) {
        const Ints size = (Ints)load_first(from + k, count - k) & INT32_MAX;
        most = size > most ? size : most;
    }
    int32_t bits = most[0];
    for (int64_t k = 1; k < L; k++) bits = most[k] > bits ? most[k] : bits;
    float largest, scale = 0, inverse = TOP;
    __builtin_memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000, vanishes = largest < 0x1p-100f;
    if (!finite || vanishes) {
        __builtin_memset(to, ZERO, (PIECES - 1) * piece + (count + L - 1) / L * L);
        return finite ? 0 : __builtin_nanf("");
    }
    scale = largest / TOP;
    if (largest != 1) inverse = TOP / largest;
    for (int64_t k = 0; k < count; k += L) {
        // a sum with ROUND has the nearest integer in its last bits
        const Raw<float> shifted = load_first(from + k, count - k) * inverse + ROUND;
        const Ints q = (Ints)shifted - (Ints)(ROUND - Raw<float>{}), high = PIECES == 1 ? q : (q + 128) >> 8;
        const Narrow first = __builtin_convertvector(high + ZERO, Narrow);
        __builtin_memcpy(to + k, &first, L);
        if (PIECES == 1) continue;
        const Narrow second = __builtin_convertvector(q - (high << 8) + ZERO, Narrow);
        __builtin_memcpy(to + piece + k, &second, L);
    }
    return scale;
}

// out[m, n] = init[m, n] + scales[m] * weight_scales[n] * (sum over k of a[m, k] w[k, n]) for some rows m, each of PIECES
// rows of bytes, and N vectors of n.
struct Int8Sum {
    const int8_t *w;
    const float *weight_scales;
    const int32_t *starts;
    int64_t groups;  // of 4 columns
    const uint8_t *a;
    int64_t piece;
    const float *scales, *init;
    int64_t init_row;
    float *out;
    int64_t out_row;
};

template <int PIECES, int R, int N> NOINLINE void int8_tile(const Int8Sum &s) {
    constexpr int A = R * PIECES, U = A * N < CHAINS ? 2 : 1;  // rows of bytes, and sums of each
    constexpr int64_t L = Vector<float>::N;
    Dots sums[U][A][N] = {};
    const int8_t *w = s.w;
    const uint8_t *a = s.a;
    const int64_t piece = s.piece;
    int64_t groups = s.groups;
    for (; groups >= U; groups -= U, w += U * N * VECTOR_BYTES, a += U * 4) {
        UNROLL for (int u = 0; u < U; u++) {
            Bytes held[N];
            UNROLL for (int n = 0; n < N; n++) __builtin_memcpy(&held[n], w + (u * N + n) * VECTOR_BYTES, VECTOR_BYTES);
            UNROLL for (int m = 0; m < A; m++) {
                const Dots::Operand x = Dots::operand(a + m * piece + u * 4);
                UNROLL for (int n = 0; n < N; n++) sums[u][m][n].add(held[n], x);
            }
        }
    }
    if (U > 1 && groups) {
        UNROLL for (int m = 0; m < A; m++) {
            const Dots::Operand x = Dots::operand(a + m * piece);
            UNROLL for (int n = 0; n < N; n++) {
                Bytes held;
                __builtin_memcpy(&held, w + n * VECTOR_BYTES, VECTOR_BYTES);
                sums[0][m][n].add(held, x);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        const Raw<float> scale = s.scales[r] - Raw<float>{};
        UNROLL for (int n = 0; n < N; n++) {
            Raw<float> value[PIECES];
            UNROLL for (int k = 0; k < PIECES; k++) {
                Ints total;
                __builtin_memcpy(&total, s.starts + n * L, sizeof total);
                UNROLL for (int u = 0; u < U; u++) total += sums[u][r * PIECES + k][n].total();
                value[k] = __builtin_convertvector(total, Raw<float>);
            }
            Raw<float> sum = value[0];
            if (PIECES == 2) sum = fused(sum, 256.0f - Raw<float>{}, value[PIECES - 1]);
            const Raw<float> of_row = Vector<float>::load(s.weight_scales + n * L).raw * scale;
            const Raw<float> init = Vector<float>::load(s.init + r * s.init_row + n * L).raw;
            Vector<float>(fused(sum, of_row, init)).store(s.out + r * s.out_row + n * L);
        }
    }
}

template <int PIECES, int N, int R> inline void int8_tiles(int64_t rows, Int8Sum &s) {
    for (; rows >= R; rows -= R) {
        int8_tile<PIECES, R, N>(s);
        s.a += R * PIECES * s.piece, s.scales += R, s.init += R * s.init_row, s.out += R * s.out_row;
    }
    if constexpr (R > 1) int8_tiles<PIECES, N, R - 1>(rows, s);
}
template <int N> NOINLINE void int8_product(int64_t pieces, int64_t rows, Int8Sum &&s) {
    if (pieces == 1) int8_tiles<1, N, INT8_ROWS>(rows, s);
    else int8_tiles<2, N, (INT8_ROWS + 1) / 2>(rows, s);
}

template <class C> void forward_int8(void *argument, int thread, int threads) {
    constexpr int64_t L = Vector<float>::N, WIDE = C::S * L;
    const Int8Job &job = *(const Int8Job *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, L);
    for (int64_t p = place.first(panels); p < place.last(panels); p++) {
        if (job.pack) pack_int8_panel<C>(a, p, job.packed);
        else if (a.changed && is_int8_changed<C>(a, job.packed, p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    if (job.pack && place.parts > 1) place.meet_everyone();
    const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    // What is this thread's of the rows and units, and where it begins
    const int64_t count = b_last - b_first, width = min(p_last * L, H) - p_first * L, own = b_first * H + p_first * L;
    const int64_t pieces = job.pieces, block = job.block, piece_x = int8_pitch(I), piece_h = int8_pitch(H);
    const int64_t row_x = pieces * piece_x, row_h = pieces * piece_h;
    const auto quantized = pieces == 1 ? quantize<1> : quantize<2>;
    uint8_t *const x = job.x + thread * block * B * row_x, *const h = job.h + thread * B * row_h;
    float *const scales_x = job.scales + thread * (block + 1) * B, *const scales_h = scales_x + block * B;
    float *const all[] = {(float *)a.h, (float *)a.c_n};
    const int64_t step[] = {B * H, 0};
    Rows<const float> prev[] = {{(const float *)a.h_0, a.h_0_row}, {(const float *)a.c_0, a.c_0_row}};
    ForwardScratch<C, float> scratch;
    // Held steps carry the state until everybody has read it.
    auto hide = [&](int64_t t) { Mask(a, t, b_first).zero<float>(HOLD, count, width, {all[0] + t * B * H + own, H}); };

    for (int64_t s = 0; s < T; s++) {
        const int64_t t = a.reverse ? T - 1 - s : s, in_block = s % block, steps = min(block, T - s);
        const Rows<float> next[] = {{all[0] + t * step[0], H}, {all[1], H}};
        const Mask mask(a, t, b_first);
        for (int64_t r = 0; in_block == 0 && r < steps * count; r++) {
            const float *from = (const float *)a.x + (a.reverse ? t - r / count : t + r / count) * a.x_step;
            from += (b_first + r % count) * a.x_row;
            scales_x[r] = quantized(I, from, 0, x + r * row_x, piece_x);
        }
        for (int64_t r = 0; r < count; r++) {
            const bool resets = mask.is(RESET, r);
            scales_h[r] = quantized(resets ? 0 : H, prev[0][b_first + r], 1, h + r * row_h, piece_h);
            if (resets) __builtin_memset(h + r * row_h, ZERO, row_h);
        }
        for (int64_t j = p_first; j < p_last; j++) {  // to and fro: the weights read last are still in the L2 cache
            const int64_t p = s % 2 == 0 ? j : p_first + p_last - 1 - j;
            const int64_t valid = min(L, H - p * L), u = p * L;
            const Int8Panel<C> panel(a, job.packed, p);
            for (int64_t r = 0; r < count; r += CHUNK) {
                const int64_t rows = min(CHUNK, count - r);
                float *preact = scratch.preact;
                if (block > 1) preact = job.preact + ((p * B + b_first) * block + r) * WIDE;
                float *const of_h = preact + in_block * count * WIDE + (C::S - C::Y) * L;
                if (in_block == 0) {
                    const int64_t of_block = block > 1 ? steps * count : rows;
                    copy_rows<float>(of_block, (C::S - C::X) * L, 0, {panel.biases + C::X * L, 0},
                                     {preact + C::X * L, WIDE});
                    int8_product<C::X>(pieces, of_block,
                                       {panel.weights_x, panel.scales_x, panel.starts_x, ceil_div(I, 4), x + r * row_x,
                                        piece_x, scales_x + r, panel.biases, 0, preact, WIDE});
                }
                int8_product<C::Y>(pieces, rows,
                                   {panel.weights_h, panel.scales_h, panel.starts_h, ceil_div(H, 4), h + r * row_h,
                                    piece_h, scales_h + r, of_h, WIDE, of_h, WIDE});
                Rows<const float> from[C::STATES];
                Rows<float> to[C::STATES];
                const int64_t b = b_first + r;
                for (int k = 0; k < C::STATES; k++) from[k] = prev[k].from(b, u), to[k] = next[k].from(b, u);
                finish_cells<C, float, false>(rows, valid, Mask(a, t, b), preact + in_block * count * WIDE, scratch, from,
                                              to, nullptr);
            }
        }
        place.meet_team();
        if (s > 0) hide(a.reverse ? t + 1 : t - 1);
        for (int k = 0; k < C::STATES; k++) prev[k] = next[k];
    }
    copy_rows<float>(count, width, width, {prev[0].at + own, H}, {(float *)a.h_n + own, H});
    if (a.h != a.h_n) hide(a.reverse ? 0 : T - 1);
}

#define INT8_KERNELS {VECTOR_BYTES, {pack_int8<Lstm>, pack_int8<Gru>}, {forward_int8<Lstm>, forward_int8<Gru>}}
