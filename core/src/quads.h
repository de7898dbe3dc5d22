// Four numbers at a time: positions and forces of atoms, and blocks of four pair vectors.
#pragma once

#include "simd.h"

namespace potstill::POTSTILL_ISA {

typedef double Double4 __attribute__((vector_size(32)));

// Four numbers for every atom: positions and forces of a pair are one load or store.
struct alignas(32) Quad {
    double x[4];
};
POTSTILL_INLINE Double4 load_quad(const Quad *q) { return *reinterpret_cast<const Double4 *>(q); }
POTSTILL_INLINE void store_quad(Quad *q, Double4 v) { *reinterpret_cast<Double4 *>(q) = v; }
POTSTILL_INLINE Double4 vector_of(const double *x) { return Double4{x[0], x[1], x[2], 0}; }

template <class T>
struct FourOf;
template <>
struct FourOf<float> {
    typedef float type __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
    typedef double type __attribute__((vector_size(32)));
};
template <class T>
using Four = typename FourOf<T>::type;

template <class V>
POTSTILL_INLINE void transpose_four(V &a, V &b, V &c, V &d) {
    const V ab_low = shuffled<0, 4, 1, 5>(a, b), ab_high = shuffled<2, 6, 3, 7>(a, b);
    const V cd_low = shuffled<0, 4, 1, 5>(c, d), cd_high = shuffled<2, 6, 3, 7>(c, d);
    a = shuffled<0, 1, 4, 5>(ab_low, cd_low);
    b = shuffled<2, 3, 6, 7>(ab_low, cd_low);
    c = shuffled<0, 1, 4, 5>(ab_high, cd_high);
    d = shuffled<2, 3, 6, 7>(ab_high, cd_high);
}

template <class T>
POTSTILL_INLINE Four<T> load_four(const T *p) {
    Four<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
POTSTILL_INLINE void store_four(T *p, Four<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

}  // namespace potstill::POTSTILL_ISA
