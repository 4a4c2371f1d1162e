// Vectors of VECTOR_BYTES as a class: arithmetic, sigmoid and tanh.
//
// Products are fused into sums in one fixed way (compile with -ffp-contract=off), so no row's bits depend on its tile.
#pragma once

#if VECTOR_BYTES == 64
inline __m512 fused(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
inline __m512d fused(__m512d x, __m512d y, __m512d z) { return _mm512_fmadd_pd(x, y, z); }
#elif VECTOR_BYTES == 32
inline __m256 fused(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
inline __m256d fused(__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }
#elif defined(__aarch64__)
inline float32x4_t fused(float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }
inline float64x2_t fused(float64x2_t x, float64x2_t y, float64x2_t z) { return vfmaq_f64(z, x, y); }
#else
template <class Raw> inline Raw fused(Raw x, Raw y, Raw z) { return x * y + z; }
#ifdef EXACTLY_FUSED  // fuses float32 with one rounding, as processors with FMA do
// In float64 the product is exact. Its sum with z is rounded to odd there, so that the float32 result is rounded once.
inline __m128 fused_half(__m128 x, __m128 y, __m128 z) {
    typedef int64_t Longs __attribute__((vector_size(16)));
    const __m128d product = _mm_cvtps_pd(x) * _mm_cvtps_pd(y), addend = _mm_cvtps_pd(z), sum = product + addend;
    const __m128d part = sum - product, error = (product - (sum - part)) + (addend - part);  // NaN if sum is not finite
    const Longs inexact = (error > 0) | (error < 0), even = ((Longs)sum & 1) - 1;
    const Longs outwards = ((error > 0) ^ (sum > 0)) | 1;  // the exact sum lies there, in units of the last place
    return _mm_cvtpd_ps((__m128d)((Longs)sum + (inexact & even & outwards)));
}
NOINLINE __m128 fused(__m128 x, __m128 y, __m128 z) {
    return _mm_movelh_ps(fused_half(x, y, z),
                         fused_half(_mm_movehl_ps(x, x), _mm_movehl_ps(y, y), _mm_movehl_ps(z, z)));
}
#endif
#endif

// The smaller and the larger of two, or y if x or y is NaN. Compilers need two instructions for the general form.
#define EXTREMES(Raw, set, type) \
    inline Raw smaller(Raw x, Raw y) { return set##_min_##type(x, y); } \
    inline Raw larger(Raw x, Raw y) { return set##_max_##type(x, y); }
#if VECTOR_BYTES == 64
EXTREMES(__m512, _mm512, ps)
EXTREMES(__m512d, _mm512, pd)
#elif VECTOR_BYTES == 32
EXTREMES(__m256, _mm256, ps)
EXTREMES(__m256d, _mm256, pd)
#elif defined(__aarch64__)  // NaN if x or y is NaN
inline float32x4_t smaller(float32x4_t x, float32x4_t y) { return vminq_f32(x, y); }
inline float32x4_t larger(float32x4_t x, float32x4_t y) { return vmaxq_f32(x, y); }
inline float64x2_t smaller(float64x2_t x, float64x2_t y) { return vminq_f64(x, y); }
inline float64x2_t larger(float64x2_t x, float64x2_t y) { return vmaxq_f64(x, y); }
#else
EXTREMES(__m128, _mm, ps)
EXTREMES(__m128d, _mm, pd)
#endif

template <class E> struct Register;
template <> struct Register<float> { typedef float Raw __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct Register<double> { typedef double Raw __attribute__((vector_size(VECTOR_BYTES))); };

// Loads `count` lanes, fewer than there are. The others are zero.
#if VECTOR_BYTES == 64
inline __m512 partial_load(const float *from, int64_t count) { return _mm512_maskz_loadu_ps((1 << count) - 1, from); }
inline __m512d partial_load(const double *from, int64_t count) { return _mm512_maskz_loadu_pd((1 << count) - 1, from); }
#elif VECTOR_BYTES == 32
inline __m256 partial_load(const float *from, int64_t count) {
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
inline __m256d partial_load(const double *from, int64_t count) {
    return _mm256_maskload_pd(from, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3)));
}
#else
template <class E> inline auto partial_load(const E *from, int64_t count) {
    typename Register<E>::Raw raw = {};
    for (int64_t k = 0; k < count; k++) raw[k] = from[k];
    return raw;
}
#endif

// Stores fewer than 2 N elements, in powers of two.
template <class E, int N> inline void partial_store(int64_t count, const E *from, E *to) {
    if (count & N) __builtin_memcpy(to, from, N * sizeof(E));
    if constexpr (N > 1) partial_store<E, N / 2>(count, from + (count & N), to + (count & N));
}

template <class E> struct Constants;

template <class E> struct Vector {
    static constexpr int64_t N = VECTOR_BYTES / sizeof(E);
    using Raw = typename Register<E>::Raw;
    using Bits = decltype(Raw{} < Raw{});
    Raw raw;

    Vector() = default;
    Vector(Raw raw) : raw(raw) {}
    Vector(E value) : raw(value - Raw{}) {}  // in every lane; minus zero stays what it is
    static Vector load(const E *from) {
        Vector v;
        __builtin_memcpy(&v, from, sizeof v);
        return v;
    }
    void store(E *to) const { __builtin_memcpy(to, this, sizeof *this); }
    // The same for the first `count` lanes, or for all
    static Vector load(const E *from, int64_t count) { return count >= N ? load(from) : partial_load(from, count); }
    void store(E *to, int64_t count) const {
        if (count >= N) store(to);
        else partial_store<E, N / 2>(count, (const E *)this, to);
    }

    struct Product {  // which a sum can fuse
        Raw x, y;
        operator Vector() const { return x * y; }
    };
    friend Product operator*(Vector x, Vector y) { return {x.raw, y.raw}; }
    friend Vector operator+(Vector x, Vector y) { return x.raw + y.raw; }
    friend Vector operator+(Product p, Vector z) { return fused(p.x, p.y, z.raw); }
    friend Vector operator+(Vector z, Product p) { return fused(p.x, p.y, z.raw); }
    friend Vector operator+(Product p, Product q) { return fused(p.x, p.y, q.x * q.y); }
    friend Vector operator-(Vector x, Vector y) { return x.raw - y.raw; }
    friend Vector operator-(E z, Product p) { return fused(-p.x, p.y, Vector(z).raw); }
    friend Vector operator/(Vector x, Vector y) { return x.raw / y.raw; }

    Vector clamp(E least, E most) const {
        return larger(Vector(least).raw, smaller(Vector(most).raw, raw));  // NaN stays NaN
    }
    Vector first(int64_t count) const {  // the other lanes zero
        Bits lane;
        for (int64_t k = 0; k < N; k++) lane[k] = k;
        return (Raw)((Bits)raw & (lane < (decltype(lane[0] + 0))count));
    }
    friend Vector sigmoid(Vector x) {
        using C = Constants<E>;
        return Exponential(x.clamp(C::sigmoid_low, C::sigmoid_high), C::sigmoid()).sigmoid();
    }
    friend Vector tanh(Vector x) {
        using C = Constants<E>;
        return Exponential(x.clamp(-C::tanh_limit, C::tanh_limit), C::tanh()).tanh();
    }

    // sigmoid and tanh from one form. With t = x L = N + f, |f| <= 1/2, and L = log2(e), for tanh twice that:
    //   e^(t ln 2) = (b + f) / (2^-N b),  b = q0 - f/2 + q1 f^2 + q2 f^4 ..,
    //   f / (e^(f ln 2) - 1) being -f/2 and an even function.
    // So sigmoid = a / (a + s b) and tanh = (a - s b) / (a + s b), a = b + f, s = 2^-N: in range by construction.
    // The limits of t keep s a power of 2, zero or infinity, which sigmoid reaches where it is to be 0.
    struct Exponential {
        Vector a, b, f, s;
        template <class Q> Exponential(Vector x, Q q) {
            Vector shifted = x * Vector(-q.log2e[0]) + Vector(Constants<E>::magic);  // -N and the bias in its last bits
            f = x * Vector(q.log2e[0]) + (shifted - Constants<E>::magic);
            if (Constants<E>::log2e_parts == 2) f = x * Vector(q.log2e[1]) + f;
            s = (Raw)((Bits)shifted.raw << Constants<E>::mantissa);
            b = q.base(f);
            a = b + f;
        }
        Vector sigmoid() const { return a / (s * b + a); }
        // with 1 - s, exact relative behaviour at zero
        Vector tanh() const { return ((Vector(1) - s) * b + f) / (s * b + a); }
    };
};

// Minimax fits: sigmoid and tanh are within 1.9e-7 and 1.3e-7 in float32, 2e-16 and 3e-16 in float64.
template <> struct Constants<float> {
    using V = Vector<float>;
    static constexpr float magic = 1.5f * (1 << 23) + 127;
    static constexpr float sigmoid_low = -88.72f, sigmoid_high = 87, tanh_limit = 10;
    static constexpr int mantissa = 23, log2e_parts = 1;
    struct Sigmoid {
        float log2e[2] = {1.44269502f, 0};
        V base(V f) const { return (f * V(0.0576181859f) + V(-0.5f)) * f + V(1.44270408f); }
    };
    struct Tanh {
        float log2e[2] = {2.88539004f, 0};
        V base(V f) const {
            V w = f * f;
            return w * (w * V(-0.000460556475f) + V(0.0577620789f)) + (f * V(-0.5f) + V(1.44269502f));
        }
    };
    static constexpr Sigmoid sigmoid() { return {}; }
    static constexpr Tanh tanh() { return {}; }
};

template <> struct Constants<double> {
    using V = Vector<double>;
    static constexpr double magic = 1.5 * (1LL << 52) + 1023;
    static constexpr double sigmoid_low = -709.78, sigmoid_high = 700, tanh_limit = 22;
    static constexpr int mantissa = 52, log2e_parts = 2;
    struct Fit {
        double log2e[2];
        V base(V f) const {
            V w = f * f, even = -0x1.10f329f1e0b97p-24 + w * V(0x1.a40d209d03a1dp-31);
            even = w * even + V(0x1.63144e989154dp-18);
            even = w * even + V(-0x1.e50096dde992ap-12);
            even = w * even + V(0x1.d9303fea2f7bbp-5);
            return w * even + (f * V(-0.5) + V(0x1.71547652b82fep+0));
        }
    };
    static constexpr Fit sigmoid() { return {{0x1.71547652b82fep+0, 0x1.777d0ffda0d24p-56}}; }
    static constexpr Fit tanh() { return {{0x1.71547652b82fep+1, 0x1.777d0ffda0d24p-55}}; }
};
