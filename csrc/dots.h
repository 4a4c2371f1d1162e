// Sums of products of signed bytes, four to a lane of int32, by each instruction set. All sums are exact.
#pragma once

typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));

inline int32_t four_bytes(const uint8_t *from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return four;
}

struct Sums {
    Ints sums;
    Ints total() const { return sums; }
};

// An activation is stored plus ZERO, the zero point, since AVX-512's instruction takes one operand unsigned. A sum over a
// row of weights is then too large by ZERO times the sum of these weights. It therefore starts at minus this number, which
// `pack_bytes` has computed. A tile has INT8_ROWS rows of activations, and CHAINS independent sums hide the latency of one
// add. An `Operand` has the same four activations in every lane. `add` adds their products with the four weights of each
// lane. None is -128, so two products fit 16 bits.
#if VECTOR_BYTES == 64
constexpr int ZERO = 128, INT8_ROWS = 6, CHAINS = 10;
struct Dots : Sums {
    using Operand = Ints;
    static Operand operand(const uint8_t *from) { return four_bytes(from) - Ints{}; }  // broadcasts
    void add(Bytes weights, Operand x) { sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights); }
};
#elif VECTOR_BYTES == 32
constexpr int ZERO = 0, INT8_ROWS = 2, CHAINS = 1;
struct Dots : Sums {
    struct Operand { __m256i signs, size; };
    static Operand operand(const uint8_t *from) {
        const __m256i x = _mm256_set1_epi32(four_bytes(from));
        return {x, _mm256_abs_epi8(x)};
    }
    // A pair of products is at most 2 * 128 * 127 and does not saturate.
    void add(Bytes weights, Operand x) {
        const __m256i pairs = _mm256_maddubs_epi16(x.size, _mm256_sign_epi8((__m256i)weights, x.signs));
        sums += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};
#elif defined(__aarch64__)
#ifdef __ARM_FEATURE_DOTPROD
constexpr int ZERO = 0, INT8_ROWS = 4, CHAINS = 10;
#else
constexpr int ZERO = 0, INT8_ROWS = 4, CHAINS = 1;
#endif
struct Dots : Sums {
    using Operand = int8x16_t;
    static Operand operand(const uint8_t *from) { return vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(from))); }
    void add(Bytes weights, Operand x) {
        const int8x16_t w = (int8x16_t)weights;
#ifdef __ARM_FEATURE_DOTPROD
        sums = (Ints)vdotq_s32((int32x4_t)sums, w, x);
#else  // a pair of products fits in 16 bits
        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
        sums = (Ints)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
#endif
    }
};
#else
constexpr int ZERO = 0, INT8_ROWS = 1, CHAINS = 1;
struct Dots {
    using Operand = __m128i;
    Ints low, high;  // of two lanes each, two sums for a lane
    static __m128i extended(__m128i bytes) { return _mm_srai_epi16(bytes, 8); }  // from the upper half of 16 bits
    static Operand operand(const uint8_t *from) {
        const __m128i x = _mm_set1_epi32(four_bytes(from));
        return extended(_mm_unpacklo_epi8(x, x));
    }
    void add(Bytes weights, Operand x) {
        const __m128i w = (__m128i)weights;
        low += (Ints)_mm_madd_epi16(extended(_mm_unpacklo_epi8(w, w)), x);
        high += (Ints)_mm_madd_epi16(extended(_mm_unpackhi_epi8(w, w)), x);
    }
    Ints total() const {
        const __m128 l = (__m128)low, h = (__m128)high;  // the first of each pair, and the second
        return (Ints)_mm_shuffle_ps(l, h, 0x88) + (Ints)_mm_shuffle_ps(l, h, 0xdd);
    }
};
#endif

// Stores the lowest byte of each lane; and says whether a lane is NaN.
#if VECTOR_BYTES == 64
inline void store_low(Ints numbers, uint8_t *to) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)numbers)); }
inline bool any_nan(__m512 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
#elif VECTOR_BYTES == 32
inline void store_low(Ints numbers, uint8_t *to) {
    const __m256i first = _mm256_set1_epi32(0x0c080400), bytes = _mm256_shuffle_epi8((__m256i)numbers, first);
    const __m128i low_bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i *)to, low_bytes);
}
inline bool any_nan(__m256 x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
#elif defined(__x86_64__)
inline void store_low(Ints numbers, uint8_t *to) {
    const __m128i words = _mm_packs_epi32((__m128i)(numbers & 255), __m128i{}), bytes = _mm_packus_epi16(words, words);
    const int32_t four = _mm_cvtsi128_si32(bytes);
    __builtin_memcpy(to, &four, 4);
}
inline bool any_nan(__m128 x) { return _mm_movemask_ps(_mm_cmpunord_ps(x, x)) != 0; }
#else
inline void store_low(Ints numbers, uint8_t *to) {
    for (int k = 0; k < VECTOR_BYTES / 4; k++) to[k] = (uint8_t)numbers[k];
}
inline bool any_nan(float32x4_t x) { return x[0] != x[0] || x[1] != x[1] || x[2] != x[2] || x[3] != x[3]; }
#endif
