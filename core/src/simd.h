// Vectors of the instruction set that this translation unit is compiled for, and the functions of
// them that HIP-NN needs, at the full precision of their type.
//
// Everything lives in a namespace named after the instruction set: the same sources are compiled
// several times, and the linker must not merge the copies. For the same reason no function of the
// standard library that could be emitted out of line is used here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#ifndef POTSTILL_ISA
#error "compile with -DPOTSTILL_ISA=baseline, avx2 or avx512"
#endif

#define POTSTILL_INLINE inline __attribute__((always_inline))

namespace potstill::POTSTILL_ISA {

// On x86 the intrinsics that do the same at every width.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#define POTSTILL_INTRINSIC(operation) _mm512_##operation
typedef __m512 Floats;
typedef __m512d Doubles;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#define POTSTILL_INTRINSIC(operation) _mm256_##operation
typedef __m256 Floats;
typedef __m256d Doubles;
#else
constexpr int vector_bytes = 16;
#ifdef __SSE2__
#define POTSTILL_INTRINSIC(operation) _mm_##operation
typedef __m128 Floats;
typedef __m128d Doubles;
#endif
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(vector_bytes)));
    typedef float unaligned
        __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(vector_bytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(vector_bytes)));
    typedef double unaligned
        __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
    typedef int64_t integer __attribute__((vector_size(vector_bytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Integers = typename VectorOf<T>::integer;

// Lanes of a vector.
template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

// Vector registers: how many accumulators a kernel may hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int n_registers = 32;
#else
constexpr int n_registers = 16;
#endif

template <class T>
POTSTILL_INLINE Vector<T> load(const T *p) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned *>(p);
}
// For several products: GCC would load it again for each, as the operand of an instruction.
template <class T>
POTSTILL_INLINE Vector<T> load_once(const T *p) {
    Vector<T> v = load(p);
#ifdef __SSE2__
    asm("" : "+v"(v));
#endif
    return v;
}
template <class T>
POTSTILL_INLINE void store(T *p, Vector<T> v) {
    *reinterpret_cast<typename VectorOf<T>::unaligned *>(p) = v;
}
template <class T>
POTSTILL_INLINE Vector<T> broadcast(T x) {
    return x - Vector<T>{};
}

POTSTILL_INLINE float scalar_sqrt(float x) { return __builtin_sqrtf(x); }
POTSTILL_INLINE double scalar_sqrt(double x) { return __builtin_sqrt(x); }

template <class T>
POTSTILL_INLINE Vector<T> square_root(Vector<T> x) {
#ifdef POTSTILL_INTRINSIC
    if constexpr (sizeof(T) == 4)
        return (Vector<T>)POTSTILL_INTRINSIC(sqrt_ps)((Floats)x);
    else
        return (Vector<T>)POTSTILL_INTRINSIC(sqrt_pd)((Doubles)x);
#else
    Vector<T> y;
    for (int k = 0; k < lanes<T>; ++k) y[k] = scalar_sqrt(x[k]);
    return y;
#endif
}

// GCC turns the generic spelling into a comparison and a selection.
template <class T>
POTSTILL_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
#ifdef POTSTILL_INTRINSIC
    if constexpr (sizeof(T) == 4)
        return (Vector<T>)POTSTILL_INTRINSIC(min_ps)((Floats)a, (Floats)b);
    else
        return (Vector<T>)POTSTILL_INTRINSIC(min_pd)((Doubles)a, (Doubles)b);
#else
    return a < b ? a : b;
#endif
}
template <class T>
POTSTILL_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
#ifdef POTSTILL_INTRINSIC
    if constexpr (sizeof(T) == 4)
        return (Vector<T>)POTSTILL_INTRINSIC(max_ps)((Floats)a, (Floats)b);
    else
        return (Vector<T>)POTSTILL_INTRINSIC(max_pd)((Doubles)a, (Doubles)b);
#else
    return a > b ? a : b;
#endif
}

// 1 / sqrt(x)
template <class T>
POTSTILL_INLINE Vector<T> inverse_square_root(Vector<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        // 14 bits, doubled by one step of Newton's method.
        const Vector<T> y = (Vector<T>)_mm512_rsqrt14_ps((__m512)x);
        return y + y * (T(0.5) - T(0.5) * x * y * y);
    }
#elif defined(POTSTILL_INTRINSIC)
    if constexpr (sizeof(T) == 4) {
        // 11 bits, tripled by one step of Halley's method; Newton's would not reach rounding.
        const Vector<T> y = (Vector<T>)POTSTILL_INTRINSIC(rsqrt_ps)((Floats)x);
        const Vector<T> h = T(1) - x * y * y;
        return y + y * h * (T(0.5) + T(0.375) * h);
    }
#endif
    return T(1) / square_root<T>(x);
}

// Lanes of a (0 to 3) and b (4 to 7). GCC 11 has only the other spelling.
template <int i, int j, int k, int l, class V>
POTSTILL_INLINE V shuffled(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, i, j, k, l);
#else
    typedef decltype(a < b) Lanes;
    return __builtin_shuffle(a, b, Lanes{i, j, k, l});
#endif
}

template <class T>
POTSTILL_INLINE T sum_lanes(Vector<T> v) {
    T sum[lanes<T>];
    store(sum, v);
#pragma GCC unroll 4
    for (int half = lanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    return sum[0];
}

// c[0] + x c[1] + x^2 c[2] + ..., Horner's scheme.
template <class T, int N>
POTSTILL_INLINE Vector<T> polynomial(Vector<T> x, const T (&c)[N]) {
    Vector<T> y = broadcast(c[N - 1]);
#pragma GCC unroll 16
    for (int k = N - 2; k >= 0; --k) y = y * x + c[k];
    return y;
}

// Coefficients are Chebyshev interpolants computed with 60 digits; relative errors are at most
// 3e-9 (float) and 5e-18 (double), far below rounding.
template <class T>
struct Coefficients;
template <>
struct Coefficients<float> {
    // 2^f on [0, 1) and on [-1/2, 1/2]
    static constexpr float exp2_unit[7] = {
        1.000000002530745193f,   0.6931469327588668605f,   0.2402304544123056801f,
        0.05548063019670532827f, 0.009684186310342369562f, 0.00123913318344114804f,
        0.0002186578478659805281f};
    static constexpr float exp2_half[7] = {
        1.0f,                    0.6931472067028325958f,   0.2402265092228875807f,
        0.05550327226670302059f, 0.009618056678524638075f, 0.001340042817761583794f,
        0.0001546144469856912908f};
    // atanh(z)/z on z^2 in [0, 1/9]
    static constexpr float atanh_ratio[6] = {0.9999999999045030065f, 0.3333333951321698478f,
                                             0.1999935562343116581f, 0.1431010370421861916f,
                                             0.1069928025333927162f, 0.1219695404201151245f};
    // sin(y)/y and cos(y) on y^2 in [0, pi^2/4]
    static constexpr float sin_ratio[6] = {
        0.9999999999829191073f,     -0.1666666661681556662f,   0.008333330974207582837f,
        -0.000198408611793195517f,  2.7525269812298849e-6f,    -2.388921777345280581e-8f};
    static constexpr float cos_even[7] = {
        0.9999999999992479627f,     -0.4999999999701274968f,     0.04166666647285179379f,
        -0.001388888417078905405f,  0.00002480103992800827182f,  -2.752467042508166412e-7f,
        1.990750610376022787e-9f};
};
template <>
struct Coefficients<double> {
    static constexpr double exp2_unit[12] = {
        1.0,                      0.6931471805599465259,   0.2402265069590427773,
        0.0555041086659011981,    0.009618129097245029602, 0.001333355873491951536,
        0.0001540350928370369056, 0.00001525323114136426254, 1.320769749209033067e-6,
        1.025818885418417411e-7,  6.538608553499254727e-9, 6.30147811743377886e-10};
    static constexpr double exp2_half[12] = {
        1.0,                      0.6931471805599453093,   0.2402265069591015957,
        0.05550410866482162704,   0.009618129107587256668, 0.00133335581464064707,
        0.0001540353046372435421, 0.00001525273384155677259, 1.321543253591237617e-6,
        1.01780570877339411e-7,   7.074194297288521006e-9, 4.455817908336064493e-10};
    static constexpr double atanh_ratio[12] = {
        1.0,                    0.3333333333333334166,  0.1999999999999643338,
        0.1428571428631146398,  0.111111110595518372,   0.09090911711247626246,
        0.07692223530229983777, 0.06668438407871917677, 0.05857637334055212642,
        0.05488308318973747033, 0.0349019524916621601,  0.08244142965694784311};
    static constexpr double sin_ratio[10] = {
        1.0,                      -0.1666666666666666666,   0.008333333333333333003,
        -0.0001984126984126966984, 2.755731922394071272e-6, -2.505210837860219652e-8,
        1.605904320630094769e-10, -7.647127739966417538e-13, 2.810214535002210289e-15,
        -7.982518961783832418e-18};
    static constexpr double cos_even[11] = {
        1.0,                     -0.5,                     0.04166666666666666665,
        -0.001388888888888888803, 0.00002480158730158702302, -2.755731922393318287e-7,
        2.087675698165018725e-9, -1.147074512655104528e-11, 4.779454386333555695e-14,
        -1.5612261954095733e-16, 3.99125349769939134e-19};
};

// 2^x for x <= 0; zero or the smallest normal number where the result would be smaller than that.
template <class T>
POTSTILL_INLINE Vector<T> exp2_of_negative(Vector<T> x) {
#if defined(__AVX512DQ__)
    if constexpr (sizeof(T) == 4) {
        Vector<T> f = (Vector<T>)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
        return (Vector<T>)_mm512_scalef_ps((__m512)polynomial(f, Coefficients<T>::exp2_unit),
                                           (__m512)x);
    } else {
        Vector<T> f = (Vector<T>)_mm512_reduce_pd((__m512d)x, 1);
        return (Vector<T>)_mm512_scalef_pd((__m512d)polynomial(f, Coefficients<T>::exp2_unit),
                                           (__m512d)x);
    }
#else
    // Adding 1.5 x 2^23 (2^52) rounds to an integer and leaves it in the lowest bits.
    constexpr bool single = sizeof(T) == 4;
    constexpr T magic = single ? T(12582912.0) : T(6755399441055744.0);
    x = maximum<T>(x, broadcast(single ? T(-126.0) : T(-1022.0)));
    Vector<T> shifted = x + magic;
    Vector<T> f = x - (shifted - magic);
    Integers<T> exponent = ((Integers<T>)shifted) << (single ? 23 : 52);
    return (Vector<T>)((Integers<T>)polynomial(f, Coefficients<T>::exp2_half) + exponent);
#endif
}

// softplus(x) = log(1 + e^x) and its derivative. Above 20 it is x itself, as in torch.
template <class T>
POTSTILL_INLINE void softplus(Vector<T> x, Vector<T> &value, Vector<T> &derivative) {
    constexpr T log2_e = T(1.442695040888963407);
    const Vector<T> size = x < T(0) ? -x : x;
    const Vector<T> t = exp2_of_negative<T>(-size * log2_e);
    // log(1 + t) = 2 atanh(t / (2 + t)); one division serves 1/(2 + t) and 1/(1 + t).
    const Vector<T> inverse = T(1) / ((t + T(1)) * (t + T(2)));
    const Vector<T> z = t * (t + T(1)) * inverse;
    const Vector<T> sigmoid = (t + T(2)) * inverse;  // of |x|
    const Vector<T> log = T(2) * z * polynomial(z * z, Coefficients<T>::atanh_ratio);
    const Vector<T> positive = x > T(0) ? x : Vector<T>{};
    value = x > T(20) ? x : positive + log;
    derivative = x > T(20) ? broadcast(T(1)) : (x < T(0) ? t * sigmoid : sigmoid);
}

// Subnormal numbers count as zero while one of these lives: they would slow everything down.
class FlushSubnormals {
  public:
#if defined(__SSE2__)
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FlushSubnormals() {}
#endif
};

}  // namespace potstill::POTSTILL_ISA
