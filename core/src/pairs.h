// Pairs of one atom: geometry, cutoff function, radial sensitivities and the sums over neighbors,
// forward and backward. Lanes of the vectors are neighbors.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace potstill::POTSTILL_ISA {

// Components of the tensors up to rank l_max.
constexpr int n_components(int l_max) { return (l_max + 1) * (l_max + 1); }

// The pairs within the cutoff, by fields, each run of pairs padded to whole vectors with pairs
// beyond the cutoff: unit vector, distance, its inverse, cutoff function and its derivative.
template <class T>
struct PairFields {
    T *unit[3], *r, *inverse_r, *envelope, *slope;
    int32_t *label;  // of positions: the neighbor; of pair vectors: the place in the row
};

// A run of vectors in the fields of a block: the pairs of one atom with one species of neighbors.
struct Run {
    int32_t first;      // offset of the first pair, a multiple of the lanes
    int32_t n_pairs;    // without the padding
    int32_t n_vectors;
};

// Gaussians in inverse distance as 2^-(a/r - b)^2, with d/d(1/r) = slope (a/r - b) x value; or
// Chebyshev polynomials T_n(scale r - 1), if `a` is NULL.
template <class T>
struct Radial {
    int n;
    T scale;
    T *a, *b, *slope;

    bool chebyshev() const { return !a; }
};

template <int N>
struct Count {
    static constexpr int value = N;
};

// Cutoff function and its derivative; both vanish from the cutoff on.
template <class T>
POTSTILL_INLINE void cutoff_function(Vector<T> r, T cutoff, bool is_polynomial, Vector<T> &value,
                                     Vector<T> &slope) {
    if (is_polynomial) {
        const Vector<T> x = minimum<T>(r * (T(1) / cutoff), broadcast(T(1)));
        value = T(1) - x * x * x * (T(10) - T(15) * x + T(6) * x * x);
        slope = (T(-30) / cutoff) * x * x * (T(1) - x) * (T(1) - x);
    } else {
        // cos^2(pi r / 2 rc) = sin^2(y) with y = pi (rc - r) / 2 rc, exact near the cutoff.
        constexpr T pi = T(3.141592653589793238);
        const Vector<T> y = maximum<T>(cutoff - r, Vector<T>{}) * (T(0.5) * pi / cutoff);
        const Vector<T> square = y * y;
        const Vector<T> sine = y * polynomial(square, Coefficients<T>::sin_ratio);
        const Vector<T> cosine = polynomial(square, Coefficients<T>::cos_even);
        value = sine * sine;
        slope = (-pi / cutoff) * sine * cosine;
    }
}

// Turn the pair vectors in `unit` of a run, after padding it, into all fields.
template <class T>
inline void complete_fields(const PairFields<T> &f, Run &run, T cutoff, bool is_polynomial) {
    constexpr int L = lanes<T>;
    store(f.unit[0] + run.first + run.n_pairs, broadcast(T(2) * cutoff));
    store(f.unit[1] + run.first + run.n_pairs, Vector<T>{});
    store(f.unit[2] + run.first + run.n_pairs, Vector<T>{});
    run.n_vectors = (run.n_pairs + L - 1) / L;
    for (int k = run.first; k < run.first + run.n_vectors * L; k += L) {
        const Vector<T> x = load(f.unit[0] + k), y = load(f.unit[1] + k), z = load(f.unit[2] + k);
        const Vector<T> square = x * x + (y * y + z * z);
        const Vector<T> inverse = inverse_square_root<T>(square), r = square * inverse;
        store(f.unit[0] + k, x * inverse);
        store(f.unit[1] + k, y * inverse);
        store(f.unit[2] + k, z * inverse);
        store(f.r + k, r);
        store(f.inverse_r + k, inverse);
        Vector<T> value, slope;
        cutoff_function<T>(r, cutoff, is_polynomial, value, slope);
        store(f.envelope + k, value);
        store(f.slope + k, slope);
    }
}

// Factors of the real spherical harmonics of rank 3 and 4, the sum of whose squares is 1.
template <class T>
struct Harmonics {
    static constexpr T a3 = T(0.7905694150420948330),   // sqrt(5/8)
                       b3 = T(3.8729833462074168852),   // sqrt(15)
                       c3 = T(0.6123724356957945245),   // sqrt(3/8)
                       a4 = T(2.9580398915498080213),   // sqrt(35)/2
                       b4 = T(2.0916500663351888699),   // sqrt(35/8)
                       c4 = T(1.1180339887498948482),   // sqrt(5)/2
                       d4 = T(0.7905694150420948330);   // sqrt(5/8)
};

// Tensor components of a unit vector: 1; x, y, z; xx, xy, xz, yy, yz of u u - 1/3; of rank 3 and 4
// the real spherical harmonics from m = -l to l.
template <class T, int M>
POTSTILL_INLINE void components(Vector<T> x, Vector<T> y, Vector<T> z, Vector<T> (&t)[M]) {
    t[0] = broadcast(T(1));
    if constexpr (M >= 4) t[1] = x, t[2] = y, t[3] = z;
    const Vector<T> xx = x * x, yy = y * y, zz = z * z;
    if constexpr (M >= 9) {
        const Vector<T> third = (xx + yy + zz) * T(1.0 / 3.0);
        t[4] = xx - third, t[5] = x * y, t[6] = x * z, t[7] = yy - third, t[8] = y * z;
    }
    const Vector<T> difference = xx - yy, first = T(3) * xx - yy, last = xx - T(3) * yy;
    using H = Harmonics<T>;
    if constexpr (M >= 16) {
        const Vector<T> five = T(5) * zz - T(1);
        t[9] = H::a3 * y * first, t[10] = H::b3 * x * y * z, t[11] = H::c3 * y * five;
        t[12] = z * (T(2.5) * zz - T(1.5)), t[13] = H::c3 * x * five;
        t[14] = T(0.5) * H::b3 * z * difference, t[15] = H::a3 * x * last;
    }
    if constexpr (M >= 25) {
        const Vector<T> one = T(7) * zz - T(1), three = T(7) * zz - T(3);
        t[16] = H::a4 * x * y * difference, t[17] = H::b4 * y * z * first;
        t[18] = H::c4 * x * y * one, t[19] = H::d4 * y * z * three;
        t[20] = (T(4.375) * zz - T(3.75)) * zz + T(0.375), t[21] = H::d4 * x * z * three;
        t[22] = T(0.5) * H::c4 * difference * one, t[23] = H::b4 * x * z * last;
        t[24] = T(0.25) * H::a4 * (difference * difference - T(4) * xx * yy);
    }
}

// Sum over components of s[m ld] times the gradient of component m, up to its part along the vector.
template <class T, int M>
POTSTILL_INLINE void contract_gradients(Vector<T> x, Vector<T> y, Vector<T> z, const T *s, ptrdiff_t ld,
                                        Vector<T> &px, Vector<T> &py, Vector<T> &pz) {
    auto at = [&](int m) { return load(s + m * ld); };
    px = py = pz = Vector<T>{};
    if constexpr (M >= 4) px = at(1), py = at(2), pz = at(3);
    if constexpr (M >= 9) {
        // The trace drops out.
        px += T(2) * x * at(4) + y * at(5) + z * at(6);
        py += x * at(5) + T(2) * y * at(7) + z * at(8);
        pz += x * at(6) + y * at(8);
    }
    const Vector<T> xx = x * x, yy = y * y, zz = z * z, difference = xx - yy;
    const Vector<T> first = T(3) * xx - yy, last = xx - T(3) * yy;
    using H = Harmonics<T>;
    if constexpr (M >= 16) {
        const Vector<T> a9 = H::a3 * at(9), a10 = H::b3 * at(10), a11 = H::c3 * at(11),
                        a13 = H::c3 * at(13), a14 = H::b3 * at(14), a15 = H::a3 * at(15);
        const Vector<T> five = T(5) * zz - T(1);
        px += T(6) * x * y * a9 + y * z * a10 + five * a13 + x * z * a14 + T(3) * difference * a15;
        py += T(3) * difference * a9 + x * z * a10 + five * a11 - y * z * a14 - T(6) * x * y * a15;
        pz += x * y * a10 + T(10) * z * (y * a11 + x * a13) + (T(7.5) * zz - T(1.5)) * at(12) +
              T(0.5) * difference * a14;
    }
    if constexpr (M >= 25) {
        const Vector<T> a16 = H::a4 * at(16), a17 = H::b4 * at(17), a18 = H::c4 * at(18),
                        a19 = H::d4 * at(19), a21 = H::d4 * at(21), a22 = H::c4 * at(22),
                        a23 = H::b4 * at(23), a24 = H::a4 * at(24);
        const Vector<T> one = T(7) * zz - T(1), three = T(7) * zz - T(3), xyz = x * y * z;
        px += y * first * a16 + T(6) * xyz * a17 + y * one * a18 + z * three * a21 + x * one * a22 +
              T(3) * z * difference * a23 + x * last * a24;
        py += x * last * a16 + T(3) * z * difference * a17 + x * one * a18 + z * three * a19 -
              y * one * a22 - T(6) * xyz * a23 - y * first * a24;
        pz += y * first * a17 + T(14) * xyz * a18 + T(3) * one * (y * a19 + x * a21) +
              z * (T(17.5) * zz - T(7.5)) * at(20) + T(7) * z * difference * a22 + x * last * a23;
    }
}

// Cutoff function times tensor components of `n_vectors` vectors, side by side: `out` holds
// M arrays of length `ld`.
template <class T, int M>
inline void weighted_components(const PairFields<T> &f, int first, int n_vectors, T *out,
                                ptrdiff_t ld) {
    constexpr int L = lanes<T>;
    for (int v = 0; v < n_vectors; ++v) {
        const int k = first + v * L;
        Vector<T> t[M];
        components<T, M>(load(f.unit[0] + k), load(f.unit[1] + k), load(f.unit[2] + k), t);
        const Vector<T> envelope = load(f.envelope + k);
#pragma GCC unroll 25
        for (int m = 0; m < M; ++m) store(out + m * ld + v * L, t[m] * envelope);
    }
}

// All sensitivities of `n_vectors` vectors: that of function n and vector v to out[(n n_vectors + v) L].
template <class T>
inline void sensitivities(int n_vectors, const PairFields<T> &f, int first, const Radial<T> &radial,
                          T *out) {
    constexpr int L = lanes<T>;
    if (radial.chebyshev()) {
        for (int v = 0; v < n_vectors; ++v) {
            // Beyond the cutoff, where the envelope is zero, polynomials stay finite.
            const Vector<T> x =
                minimum<T>(load(f.r + first + v * L) * radial.scale - T(1), broadcast(T(1)));
            Vector<T> before = x, value = broadcast(T(1));  // T_-1 = T_1
            for (int n = 0; n < radial.n; ++n) {
                store(out + (n * ptrdiff_t(n_vectors) + v) * L, value);
                const Vector<T> next = T(2) * x * value - before;
                before = value;
                value = next;
            }
        }
        return;
    }
    const T *inverse_r = f.inverse_r + first;
    for (int n = 0; n < radial.n; ++n, out += n_vectors * L) {
        const Vector<T> a = broadcast(radial.a[n]), b = broadcast(radial.b[n]);
#pragma GCC unroll 2
        for (int v = 0; v < n_vectors; ++v) {
            const Vector<T> tau = a * load(inverse_r + v * L) - b;
            store(out + v * L, exp2_of_negative<T>(Vector<T>{} - tau * tau));
        }
    }
}

// Rows n and n + 1, ..., components m, ... of the environment: N x C of them.
template <class T, int N, int C>
POTSTILL_INLINE void environment_tile(int n_vectors, const T *g, const T *weighted, ptrdiff_t ld, T *out,
                                      ptrdiff_t ld_out) {
    constexpr int L = lanes<T>;
    Vector<T> sum[N * C] = {};
    for (int v = 0; v < n_vectors; ++v) {
        Vector<T> factor[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) factor[n] = load(g + (n * ptrdiff_t(n_vectors) + v) * L);
#pragma GCC unroll 9
        for (int c = 0; c < C; ++c) {
            const Vector<T> t = load(weighted + c * ld + v * L);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[n * C + c] += factor[n] * t;
        }
    }
    T totals[N * C];
    sum_lanes_of<T>(sum, totals);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 9
        for (int c = 0; c < C; ++c) out[n * ld_out + c] = totals[n * C + c];
}

template <class T, int M, int N>
POTSTILL_INLINE void environment_rows(int n_vectors, const T *g, const T *weighted, ptrdiff_t ld, T *out,
                                      ptrdiff_t ld_out) {
    // As many accumulators as registers allow, in blocks of components of nearly the same size.
    constexpr int most = n_registers == 32 ? 9 : 5, n_blocks = (M + most - 1) / most;
    constexpr int C = (M + n_blocks - 1) / n_blocks, last = M - (n_blocks - 1) * C;
    for (int k = 0; k < n_blocks - 1; ++k)
        environment_tile<T, N, C>(n_vectors, g, weighted + k * C * ld, ld, out + k * C, ld_out);
    constexpr int m = (n_blocks - 1) * C;
    environment_tile<T, N, last>(n_vectors, g, weighted + m * ld, ld, out + m, ld_out);
}

// out(n, m) = sum over the pairs of a run of sensitivity n times tensor component m.
template <class T, int M>
inline void environment(int n_vectors, const T *g, const T *weighted, ptrdiff_t ld, int n_sens, T *out,
                        ptrdiff_t ld_out) {
    int n = 0;
    auto rows = [&](auto count) {
        constexpr int N = decltype(count)::value;
        for (; n + N <= n_sens; n += N)
            environment_rows<T, M, N>(n_vectors, g + n * ptrdiff_t(n_vectors) * lanes<T>, weighted, ld,
                                      out + n * ld_out, ld_out);
    };
    if constexpr (M == 1) rows(Count<4>{});
    rows(Count<2>{});
    rows(Count<1>{});
}

// out(n M + m, pair) = sensitivity n times tensor component m, for dense features.
template <class T, int M>
inline void spell_out(int n_vectors, const T *g, const T *weighted, ptrdiff_t ld, int n_sens, T *out,
                      ptrdiff_t ld_out) {
    constexpr int L = lanes<T>;
    for (int n = 0; n < n_sens; ++n)
        for (int v = 0; v < n_vectors; ++v) {
            const Vector<T> factor = load(g + (n * ptrdiff_t(n_vectors) + v) * L);
#pragma GCC unroll 9
            for (int m = 0; m < M; ++m)
                store(out + (n * M + m) * ld_out + v * L, factor * load(weighted + m * ld + v * L));
        }
}

// Backward of a run; `g` holds its sensitivities. `cotangent` is dE/d(environment): for one-hot features the same for all pairs
// of the run, at [n ld + m]; for dense features one per pair, at [(n M + m) ld + pair]. Writes
// dE/dr_ij to the three arrays `out`; adds to `moments`, if given, per sensitivity the sums over
// pairs of q and q tau with q = tau dE/d(ln sensitivity), a vector of partial sums each.
template <class T, int M, bool dense, bool with_moments, int U>
POTSTILL_INLINE void backward_tile(const PairFields<T> &f, int k0, const Radial<T> &radial, const T *g,
                                   ptrdiff_t ld_g, const T *cotangent, ptrdiff_t ld, T *moments,
                                   T *const *out) {
    constexpr int L = lanes<T>;
    Vector<T> inverse[U], envelope[U], t[U][M], sums[U][M] = {}, by_inverse[U] = {};
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
        const int k = k0 + u * L;
        inverse[u] = load(f.inverse_r + k);
        envelope[u] = load(f.envelope + k);
        components<T, M>(load(f.unit[0] + k), load(f.unit[1] + k), load(f.unit[2] + k), t[u]);
    }
    for (int n = 0; n < radial.n; ++n) {
        Vector<T> first{}, second{};
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            const Vector<T> factor = load(g + n * ld_g + u * L);
            const Vector<T> tau = radial.a[n] * inverse[u] - radial.b[n];
            Vector<T> h;
#pragma GCC unroll 9
            for (int m = 0; m < M; ++m) {
                Vector<T> c;
                if constexpr (dense)
                    c = load(cotangent + (n * M + m) * ld + u * L);
                else
                    c = broadcast(cotangent[n * ld + m]);
                h = m == 0 ? c : h + c * t[u][m];
                sums[u][m] += c * factor;
            }
            const Vector<T> q = factor * h * tau;
            by_inverse[u] += radial.slope[n] * q;
            if constexpr (with_moments) {
                const Vector<T> w = envelope[u] * q;
                first += w;
                second += w * tau;
            }
        }
        if constexpr (with_moments) {
            T *at = moments + 2 * n * L;
            store(at, load(at) + first);
            store(at + L, load(at + L) + second);
        }
    }
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
        const int k = k0 + u * L;
        const Vector<T> x = load(f.unit[0] + k), y = load(f.unit[1] + k), z = load(f.unit[2] + k);
        Vector<T> by_envelope = sums[u][0];
#pragma GCC unroll 9
        for (int m = 1; m < M; ++m) by_envelope += t[u][m] * sums[u][m];
        Vector<T> radial_part =
            load(f.slope + k) * by_envelope - envelope[u] * by_inverse[u] * inverse[u] * inverse[u];
        Vector<T> px{}, py{}, pz{};
        if constexpr (M >= 4) px = sums[u][1], py = sums[u][2], pz = sums[u][3];
        if constexpr (M == 9) {
            // What is parallel to the unit vector drops out below, the trace among it.
            const Vector<T> xx = sums[u][4], xy = sums[u][5], xz = sums[u][6], yy = sums[u][7],
                            yz = sums[u][8];
            px += T(2) * x * xx + y * xy + z * xz;
            py += x * xy + T(2) * y * yy + z * yz;
            pz += x * xz + y * yz;
        }
        if constexpr (M >= 4) {
            const Vector<T> scale = envelope[u] * inverse[u];
            px *= scale, py *= scale, pz *= scale;
            radial_part -= px * x + py * y + pz * z;
        }
        store(out[0] + u * L, radial_part * x + px);
        store(out[1] + u * L, radial_part * y + py);
        store(out[2] + u * L, radial_part * z + pz);
    }
}

template <class T, int M, bool dense, bool with_moments>
inline void backward_run_as(const PairFields<T> &f, const Run &run, const Radial<T> &radial, const T *g,
                            const T *cotangent, ptrdiff_t ld, T *moments, T *const *out) {
    constexpr int L = lanes<T>;
    constexpr int U = n_registers == 32 && M <= 4 && !dense ? 2 : 1;
    int v = 0;
    auto tile = [&](auto width) {
        T *const at[3] = {out[0] + v * L, out[1] + v * L, out[2] + v * L};
        backward_tile<T, M, dense, with_moments, decltype(width)::value>(
            f, run.first + v * L, radial, g + v * L, run.n_vectors * L, cotangent + (dense ? v * L : 0), ld,
            moments, at);
        v += decltype(width)::value;
    };
    while (v + U <= run.n_vectors) tile(Count<U>{});
    while (v < run.n_vectors) tile(Count<1>{});
}

template <class T, int M, bool dense>
inline void backward_run(const PairFields<T> &f, const Run &run, const Radial<T> &radial, const T *g,
                         const T *cotangent, ptrdiff_t ld, T *moments, T *const *out) {
    if (moments)
        backward_run_as<T, M, dense, true>(f, run, radial, g, cotangent, ld, moments, out);
    else
        backward_run_as<T, M, dense, false>(f, run, radial, g, cotangent, ld, moments, out);
}

// Backward of a run with Chebyshev polynomials; arguments as of `backward_run`. `weighted` holds the
// run's weighted components; the scratch arrays have room for M and n_sens rows of length `ld_w`.
template <class T, int M, bool dense>
inline void chebyshev_backward(const PairFields<T> &f, const Run &run, const Radial<T> &radial, const T *g,
                               const T *weighted, ptrdiff_t ld_w, const T *cotangent, ptrdiff_t ld,
                               T *by_component, T *by_function, T *const *out) {
    constexpr int L = lanes<T>;
    const int n_pairs = run.n_vectors * L;
    if constexpr (dense) {
        for (int m = 0; m < M; ++m)
            for (int p = 0; p < n_pairs; p += L) store(by_component + m * ld_w + p, Vector<T>{});
        for (int n = 0; n < radial.n; ++n)
            for (int p = 0; p < n_pairs; p += L) {
                const Vector<T> factor = load(g + n * ptrdiff_t(n_pairs) + p);
                Vector<T> sum{};
                for (int m = 0; m < M; ++m) {
                    const Vector<T> c = load(cotangent + (n * M + m) * ld + p);
                    T *at = by_component + m * ld_w + p;
                    store(at, load(at) + c * factor);
                    sum += c * load(weighted + m * ld_w + p);
                }
                store(by_function + n * ld_w + p, sum);
            }
    } else {
        gemm<T, Order::columns>(M, n_pairs, radial.n, cotangent, ld, g, n_pairs, by_component, ld_w);
        gemm<T, Order::rows>(radial.n, n_pairs, M, cotangent, ld, weighted, ld_w, by_function, ld_w);
    }
    for (int p = 0; p < n_pairs; p += L) {
        const int k = run.first + p;
        const Vector<T> x = load(f.unit[0] + k), y = load(f.unit[1] + k), z = load(f.unit[2] + k);
        const Vector<T> argument =
            minimum<T>(load(f.r + k) * radial.scale - T(1), broadcast(T(1)));
        Vector<T> before = broadcast(T(1)), derivative{}, by_argument{};  // T_-1 = T_1
        for (int n = 0; n < radial.n; ++n) {
            by_argument += load(by_function + n * ld_w + p) * derivative;
            const Vector<T> next =
                T(2) * (load(g + n * ptrdiff_t(n_pairs) + p) + argument * derivative) - before;
            before = derivative;
            derivative = next;
        }
        Vector<T> t[M], by_envelope{}, px, py, pz;
        components<T, M>(x, y, z, t);
#pragma GCC unroll 25
        for (int m = 0; m < M; ++m) by_envelope += t[m] * load(by_component + m * ld_w + p);
        contract_gradients<T, M>(x, y, z, by_component + p, ld_w, px, py, pz);
        const Vector<T> scale = load(f.envelope + k) * load(f.inverse_r + k);
        px *= scale, py *= scale, pz *= scale;
        const Vector<T> radial_part =
            load(f.slope + k) * by_envelope + by_argument * radial.scale - (px * x + py * y + pz * z);
        store(out[0] + p, radial_part * x + px);
        store(out[1] + p, radial_part * y + py);
        store(out[2] + p, radial_part * z + pz);
    }
}

}  // namespace potstill::POTSTILL_ISA
