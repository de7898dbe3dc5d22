// The pairs of a row that count, side by side: stream compaction.
#pragma once

#include "simd.h"

namespace potstill::POTSTILL_ISA {

#if defined(__AVX512F__)

template <class T>
POTSTILL_INLINE unsigned bits_of(Integers<T> mask) {
    if constexpr (sizeof(T) == 4)
        return _mm512_movepi32_mask((__m512i)mask);
    else
        return _mm512_movepi64_mask((__m512i)mask);
}

// Writes the lanes whose bits are set side by side, and anything behind them.
template <class T>
struct Packer {
    unsigned bits;

    explicit Packer(unsigned set) : bits(set) {}
    POTSTILL_INLINE void write(T *out, Vector<T> v) const {
        if constexpr (sizeof(T) == 4)
            _mm512_storeu_ps(out, _mm512_maskz_compress_ps(__mmask16(bits), (__m512)v));
        else
            _mm512_storeu_pd(out, _mm512_maskz_compress_pd(__mmask8(bits), (__m512d)v));
    }
    POTSTILL_INLINE void write(int32_t *out, const int32_t *labels) const {
        if constexpr (sizeof(T) == 4)
            _mm512_storeu_si512(
                out, _mm512_maskz_compress_epi32(__mmask16(bits), _mm512_loadu_si512(labels)));
        else
            _mm256_storeu_si256((__m256i *)out,
                                _mm256_maskz_compress_epi32(
                                    __mmask8(bits), _mm256_loadu_si256((const __m256i *)labels)));
    }
};

#elif defined(__AVX2__)

template <class T>
POTSTILL_INLINE unsigned bits_of(Integers<T> mask) {
    if constexpr (sizeof(T) == 4)
        return unsigned(_mm256_movemask_ps((__m256)mask));
    else
        return unsigned(_mm256_movemask_pd((__m256d)mask));
}

// Bytes of entry `bits`: the numbers of the bits that are set. Halves of doubles come in pairs.
template <int n_lanes>
struct PackOrders {
    uint64_t of[1 << n_lanes];

    constexpr PackOrders() : of() {
        for (int bits = 0; bits < 1 << n_lanes; ++bits)
            for (int bit = 0, n = 0; bit < n_lanes; ++bit)
                if (bits >> bit & 1) {
                    if (n_lanes == 8) of[bits] |= uint64_t(bit) << 8 * n;
                    if (n_lanes == 4) of[bits] |= uint64_t(2 * bit + 256 * (2 * bit + 1)) << 16 * n;
                    ++n;
                }
    }
};
template <int n_lanes>
constexpr PackOrders<n_lanes> pack_orders{};

template <class T>
struct Packer {
    __m256i order;
    unsigned bits;

    explicit Packer(unsigned set)
        : order(_mm256_cvtepu8_epi32(
              _mm_cvtsi64_si128((long long)pack_orders<lanes<T>>.of[set]))),
          bits(set) {}
    POTSTILL_INLINE void write(T *out, Vector<T> v) const {
        store(out, (Vector<T>)_mm256_permutevar8x32_ps((__m256)v, order));
    }
    POTSTILL_INLINE void write(int32_t *out, const int32_t *labels) const {
        if constexpr (sizeof(T) == 4) {
            const __m256i all = _mm256_loadu_si256((const __m256i *)labels);
            _mm256_storeu_si256((__m256i *)out, _mm256_permutevar8x32_epi32(all, order));
        } else {
            // Every other number of the order, halved.
            const __m256i even = _mm256_permutevar8x32_epi32(order, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
            const __m128i places = _mm_srli_epi32(_mm256_castsi256_si128(even), 1);
            const __m128 all = _mm_loadu_ps((const float *)labels);
            _mm_storeu_ps((float *)out, _mm_permutevar_ps(all, places));
        }
    }
};

#endif

// Copy the pairs with r < cutoff and species `wanted` (any, if `species` is NULL) and their labels.
// Returns how many; up to a vector beyond them is overwritten.
template <class T>
inline int compress(int n_raw, const T *x, const T *y, const T *z, const int32_t *labels,
                    const T *species, T wanted, T cutoff_square, T *x_out, T *y_out, T *z_out,
                    int32_t *labels_out) {
    int n = 0;
#if defined(__AVX2__)
    for (int k = 0; k < n_raw; k += lanes<T>) {
        const Vector<T> vx = load(x + k), vy = load(y + k), vz = load(z + k);
        unsigned bits = bits_of<T>(vx * vx + (vy * vy + vz * vz) < cutoff_square);
        if (species) bits &= bits_of<T>(load(species + k) == wanted);
        const Packer<T> packer(bits);
        packer.write(x_out + n, vx);
        packer.write(y_out + n, vy);
        packer.write(z_out + n, vz);
        packer.write(labels_out + n, labels + k);
        n += __builtin_popcount(bits);
    }
#else
    for (int k = 0; k < n_raw; ++k) {
        x_out[n] = x[k], y_out[n] = y[k], z_out[n] = z[k], labels_out[n] = labels[k];
        const T square = x[k] * x[k] + (y[k] * y[k] + z[k] * z[k]);
        n += (square < cutoff_square) & (!species || species[k] == wanted);
    }
#endif
    return n;
}

}  // namespace potstill::POTSTILL_ISA
