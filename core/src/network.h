// What happens on atoms: interaction weights, norms, residual layers and energies of a block of
// atoms, forward and backward. Arrays are (feature, atom): lanes of the vectors are atoms.
#pragma once

#include "gemm.h"
#include "simd.h"

namespace potstill::POTSTILL_ISA {

// Atoms of a block.
constexpr int block_atoms = 32;

// flat[start + r] += sum over b of x(r, b) (times y(r, b))
template <class T>
inline void add_rows(double *flat, int64_t start, int n_rows, const T *x, const T *y = nullptr) {
    constexpr int L = lanes<T>;
    for (int r = 0; r < n_rows; ++r) {
        Vector<T> sum{};
        for (int b = r * block_atoms; b < (r + 1) * block_atoms; b += L)
            sum += y ? load(x + b) * load(y + b) : load(x + b);
        flat[start + r] += double(sum_lanes<T>(sum));
    }
}

// softplus and its derivative of n numbers, a multiple of the lanes.
template <class T>
inline void softplus_all(int n, const T *x, T *value, T *derivative) {
    for (int k = 0; k < n; k += lanes<T>) {
        Vector<T> v, d;
        softplus<T>(load(x + k), v, d);
        store(value + k, v);
        store(derivative + k, d);
    }
}

template <class T>
inline void multiply(int n, T *x, const T *y) {
    for (int k = 0; k < n; k += lanes<T>) store(x + k, load(x + k) * load(y + k));
}

template <class T>
inline void copy(int n, const T *from, T *to) {
    for (int k = 0; k < n; k += lanes<T>) store(to + k, load(from + k));
}

template <class T>
inline void add(int n, T *x, const T *y) {
    for (int k = 0; k < n; k += lanes<T>) store(x + k, load(x + k) + load(y + k));
}

template <class T>
inline void clear(size_t n, T *x) {
    for (size_t k = 0; k < n; ++k) x[k] = T(0);
}

// out = s + sum over ranks of scale norm, where y(f, m, b) holds the tensor components.
template <class T, int M>
inline void add_norms(int n_features, const T *y, const T *scale1, const T *scale2, T cusp_reg,
                      T *out) {
    constexpr int B = block_atoms, L = lanes<T>;
    for (int f = 0; f < n_features; ++f)
        for (int b = 0; b < B; b += L) {
            const T *at = y + f * M * B + b;
            Vector<T> sum = load(out + f * B + b) + load(at);
            if constexpr (M >= 4) {
                const Vector<T> u = load(at + B), v = load(at + 2 * B), w = load(at + 3 * B);
                sum += scale1[f] * square_root<T>(u * u + v * v + w * w + cusp_reg);
            }
            if constexpr (M == 9) {
                const Vector<T> xx = load(at + 4 * B), xy = load(at + 5 * B), xz = load(at + 6 * B),
                                yy = load(at + 7 * B), yz = load(at + 8 * B);
                const Vector<T> square =
                    T(2) * (xx * xx + xy * xy + xz * xz + yy * yy + yz * yz + xx * yy);
                sum += scale2[f] * square_root<T>(square + cusp_reg);
            }
            store(out + f * B + b, sum);
        }
}

// Replace y by its cotangent, given that of the sum; norms go to `norms` (rank - 1, f, b) if asked.
template <class T, int M>
inline void norms_backward(int n_features, const T *cotangent, const T *scale1, const T *scale2,
                           T cusp_reg, T *y, T *norms) {
    constexpr int B = block_atoms, L = lanes<T>;
    for (int f = 0; f < n_features; ++f)
        for (int b = 0; b < B; b += L) {
            T *at = y + f * M * B + b;
            const Vector<T> d = load(cotangent + f * B + b);
            store(at, d);
            if constexpr (M >= 4) {
                const Vector<T> u = load(at + B), v = load(at + 2 * B), w = load(at + 3 * B);
                const Vector<T> norm = square_root<T>(u * u + v * v + w * w + cusp_reg);
                const Vector<T> c = norm > T(0) ? d * scale1[f] / norm : Vector<T>{};
                store(at + B, c * u);
                store(at + 2 * B, c * v);
                store(at + 3 * B, c * w);
                if (norms) store(norms + f * B + b, norm);
            }
            if constexpr (M == 9) {
                const Vector<T> xx = load(at + 4 * B), xy = load(at + 5 * B), xz = load(at + 6 * B),
                                yy = load(at + 7 * B), yz = load(at + 8 * B);
                const Vector<T> square =
                    T(2) * (xx * xx + xy * xy + xz * xz + yy * yy + yz * yz + xx * yy);
                const Vector<T> norm = square_root<T>(square + cusp_reg);
                const Vector<T> c = norm > T(0) ? d * scale2[f] / norm : Vector<T>{};
                store(at + 4 * B, c * (T(2) * xx + yy));
                store(at + 5 * B, c * T(2) * xy);
                store(at + 6 * B, c * T(2) * xz);
                store(at + 7 * B, c * (T(2) * yy + xx));
                store(at + 8 * B, c * T(2) * yz);
                if (norms) store(norms + (n_features + f) * B + b, norm);
            }
        }
}

// Inner product of a rank's tensor components at `at`, B numbers apart, with themselves. Rank 2 has
// xx, xy, xz, yy, yz with zz = -xx - yy.
template <class T, int rank>
POTSTILL_INLINE Vector<T> square_norm(const T *at) {
    constexpr int B = block_atoms;
    Vector<T> sum{};
#pragma GCC unroll 9
    for (int m = 0; m < 2 * rank + 1; ++m) {
        const Vector<T> t = load(at + m * B);
        sum += t * t;
    }
    if constexpr (rank == 2) sum = T(2) * (sum + load(at) * load(at + 3 * B));
    return sum;
}

// out(f, b) = sqrt(1 + |T|^2) - 1 of the tensors y(f, m, b) of a rank, in the form that is exact for
// small ones.
template <class T, int M, int rank>
inline void invariants_of(int n_channels, const T *y, T *out) {
    constexpr int B = block_atoms, L = lanes<T>;
    for (int f = 0; f < n_channels; ++f)
        for (int b = 0; b < B; b += L) {
            const Vector<T> square = square_norm<T, rank>(y + (f * M + rank * rank) * B + b);
            store(out + f * B + b, square / (square_root<T>(square + T(1)) + T(1)));
        }
}

// Replace the tensors of a rank by their cotangents, given those of the invariants.
template <class T, int M, int rank>
inline void invariants_backward_of(int n_channels, const T *cotangent, const T *invariants, T *y) {
    constexpr int B = block_atoms, L = lanes<T>;
    for (int f = 0; f < n_channels; ++f)
        for (int b = 0; b < B; b += L) {
            T *at = y + (f * M + rank * rank) * B + b;
            const Vector<T> c = load(cotangent + f * B + b) / (load(invariants + f * B + b) + T(1));
            Vector<T> xx{}, yy{};
            if constexpr (rank == 2) xx = load(at), yy = load(at + 3 * B);
#pragma GCC unroll 9
            for (int m = 0; m < 2 * rank + 1; ++m) {
                Vector<T> t = load(at + m * B);
                if constexpr (rank == 2) t = T(2) * t + (m == 0 ? yy : m == 3 ? xx : Vector<T>{});
                store(at + m * B, c * t);
            }
        }
}

// All ranks: the invariants are (rank - 1, f, b).
template <class T, int M, int rank = 1>
inline void smooth_invariants(int n_channels, const T *y, T *out) {
    if constexpr (rank * rank < M) {
        invariants_of<T, M, rank>(n_channels, y, out);
        smooth_invariants<T, M, rank + 1>(n_channels, y, out + n_channels * block_atoms);
    }
}

template <class T, int M, int rank = 1>
inline void smooth_invariants_backward(int n_channels, const T *cotangent, const T *invariants, T *y) {
    if constexpr (rank * rank < M) {
        const int size = n_channels * block_atoms;
        invariants_backward_of<T, M, rank>(n_channels, cotangent, invariants, y);
        smooth_invariants_backward<T, M, rank + 1>(n_channels, cotangent + size, invariants + size, y);
    }
}

}  // namespace potstill::POTSTILL_ISA
