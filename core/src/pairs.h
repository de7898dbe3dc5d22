// Pairs: geometry, cutoff function, radial sensitivities, tensor components, and the way back to pair
// vectors. Lanes of the vectors are pairs: the k-th pairs of as many atoms, or pairs of one atom.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace potstill::POTSTILL_ISA {

// Components of the tensors up to rank l_max.
constexpr int n_components(int l_max) { return (l_max + 1) * (l_max + 1); }

// The pairs within the cutoff, by fields, padded to whole vectors with pairs beyond the cutoff: unit
// vector, distance, its inverse, cutoff function and its derivative.
template <class T>
struct PairFields {
    T *unit[3], *r, *inverse_r, *envelope, *slope;
    int32_t *label;  // of positions: the neighbor; of pair vectors: the place in the row
};

// A run of vectors in the fields of a block.
struct Run {
    int32_t first;  // offset of the first pair, a multiple of the lanes
    int32_t n_vectors;
};

// The pairs of one atom in a run, without the padding: where their labels are, and how many.
struct OwnPairs {
    int32_t label, n;
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

// Which radial functions go with which tensor components. Functions of a rank are the first ones, and
// none has more of them than the rank before.
class Ranks {
  public:
    // Components m to m + n_m - 1 with functions n to n + n_n - 1.
    struct Part {
        int m, n_m, n, n_n;
    };
    struct Parts {
        int size = 0;
        Part part[HIGHEST_RANK + 2];

        const Part *begin() const { return part; }
        const Part *end() const { return part + size; }
    };
    // What is used and nothing else; functions that are of rank 0 alone come apart.
    Parts used;
    // All that is used, by functions from the first component on, with a few others: functions of a
    // part are at least four where they can be, as many sums as the processor adds to at a time.
    Parts by_function;

    explicit Ranks(const Task &task) {
        const int l_max = task.model.l_max;
        for (int rank = 0; rank <= l_max; ++rank) n_[rank] = task.n_sens(rank);
        n_ranks_ = l_max + 1;
        const int first = l_max > 0 ? n_[1] : n_[0];
        for (int rank = 0; rank <= l_max; ++rank) {
            const int n = rank == 0 ? first : n_[rank], n_m = 2 * rank + 1;
            if (used.size > 0 && used.part[used.size - 1].n_n == n)
                used.part[used.size - 1].n_m += n_m;
            else
                used.part[used.size++] = {rank * rank, n_m, 0, n};
        }
        if (first < n_[0]) used.part[used.size++] = {0, 1, first, n_[0] - first};
        for (int n = 0; n < n_[0];) {
            const int m = components_of(n), begin = n;
            while (n < n_[0] && (components_of(n) == m || (n - begin < 4 && components_of(n) > 1))) ++n;
            by_function.part[by_function.size++] = {0, m, begin, n - begin};
        }
    }

    // Components that function n goes with, from the first one on.
    int components_of(int n) const {
        int rank = n_ranks_ - 1;
        while (rank > 0 && n >= n_[rank]) --rank;
        return (rank + 1) * (rank + 1);
    }

  private:
    int n_[HIGHEST_RANK + 1], n_ranks_;
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

// Turn the pair vectors in `unit` of a run into all fields.
template <class T>
inline void complete_fields(const PairFields<T> &f, const Run &run, T cutoff, bool is_polynomial) {
    constexpr int L = lanes<T>;
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

// Sum over components of s(m) times the gradient of component m, up to its part along the vector.
template <class T, int M>
POTSTILL_INLINE void contract_gradients(Vector<T> x, Vector<T> y, Vector<T> z, const T *s,
                                        Vector<T> &px, Vector<T> &py, Vector<T> &pz) {
    auto at = [&](int m) { return load(s + m * lanes<T>); };
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

// All tensor components of `n_vectors` vectors, vector after vector. The cutoff function multiplies
// them where they belong to Gaussians.
template <class T, int M>
inline void components_of(const PairFields<T> &f, int first, int n_vectors, const Radial<T> &radial,
                          T *out) {
    constexpr int L = lanes<T>;
    for (int k = first; k < first + n_vectors * L; k += L, out += M * L) {
        Vector<T> t[M];
        components<T, M>(load(f.unit[0] + k), load(f.unit[1] + k), load(f.unit[2] + k), t);
        const Vector<T> factor = radial.chebyshev() ? broadcast(T(1)) : load(f.envelope + k);
#pragma GCC unroll 25
        for (int m = 0; m < M; ++m) store(out + m * L, t[m] * factor);
    }
}

// All sensitivities of a run, vector after vector. Polynomials come with the cutoff function, Gaussians
// without.
template <class T>
inline void sensitivities(const PairFields<T> &f, const Run &run, const Radial<T> &radial, T *out) {
    constexpr int L = lanes<T>;
    const int end = run.first + run.n_vectors * L;
    if (radial.chebyshev()) {
        for (int k = run.first; k < end; k += L) {
            // Beyond the cutoff, where the envelope is zero, polynomials stay finite.
            const Vector<T> x = minimum<T>(load(f.r + k) * radial.scale - T(1), broadcast(T(1)));
            Vector<T> value = load(f.envelope + k), before = x * value;  // T_-1 = T_1
            for (int n = 0; n < radial.n; ++n, out += L) {
                store(out, value);
                const Vector<T> next = T(2) * x * value - before;
                before = value;
                value = next;
            }
        }
        return;
    }
    for (int k = run.first; k < end; k += L) {
        const Vector<T> inverse = load(f.inverse_r + k);
#pragma GCC unroll 2
        for (int n = 0; n < radial.n; ++n, out += L) {
            const Vector<T> tau = radial.a[n] * inverse - radial.b[n];
            store(out, exp2_of_negative<T>(Vector<T>{} - tau * tau));
        }
    }
}

// out(n M + m, pair) = sensitivity n times tensor component m, for dense features.
template <class T, int M>
inline void spell_out(int n_vectors, int n_sens, const T *g, const T *t, T *out, ptrdiff_t ld_out) {
    constexpr int L = lanes<T>;
    for (int n = 0; n < n_sens; ++n)
        for (int v = 0; v < n_vectors; ++v) {
            const Vector<T> factor = load(g + (v * n_sens + n) * L);
#pragma GCC unroll 9
            for (int m = 0; m < M; ++m)
                store(out + (n * M + m) * ld_out + v * L, factor * load(t + (v * M + m) * L));
        }
}

// dE/d(environment) of vector v of a run, at [n ld_n + m ld_m + v ld_v]: the same for all, with ld_v
// zero, where lanes are atoms.
template <class T>
struct Cotangent {
    const T *data;
    ptrdiff_t ld_n, ld_m, ld_v;
};

// Backward of a run with Gaussians; `g` holds its sensitivities. Writes dE/dr_ij to the three arrays
// `out`; adds to `moments`, if given, per sensitivity the sums over pairs of q and q tau with
// q = tau dE/d(ln sensitivity), a vector of partial sums each.
template <class T, int M, bool with_moments, int U>
POTSTILL_INLINE void backward_tile(const PairFields<T> &f, int k0, const Radial<T> &radial, const T *g,
                                   Cotangent<T> by_sum, T *moments, T *const *out) {
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
            const Vector<T> factor = load(g + (u * radial.n + n) * L);
            const Vector<T> tau = radial.a[n] * inverse[u] - radial.b[n];
            Vector<T> h;
#pragma GCC unroll 9
            for (int m = 0; m < M; ++m) {
                const Vector<T> c =
                    load_once(by_sum.data + n * by_sum.ld_n + m * by_sum.ld_m + u * by_sum.ld_v);
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

template <class T, int M, bool with_moments>
inline void backward_run_as(const PairFields<T> &f, const Run &run, const Radial<T> &radial, const T *g,
                            Cotangent<T> by_sum, T *moments, T *const *out) {
    constexpr int L = lanes<T>;
    constexpr int U = n_registers == 32 && M <= 4 ? 2 : 1;
    int v = 0;
    auto tile = [&](auto width) {
        T *const at[3] = {out[0] + v * L, out[1] + v * L, out[2] + v * L};
        backward_tile<T, M, with_moments, decltype(width)::value>(
            f, run.first + v * L, radial, g + v * radial.n * L, by_sum, moments, at);
        v += decltype(width)::value;
        by_sum.data += decltype(width)::value * by_sum.ld_v;
    };
    while (v + U <= run.n_vectors) tile(Count<U>{});
    while (v < run.n_vectors) tile(Count<1>{});
}

template <class T, int M>
inline void backward_run(const PairFields<T> &f, const Run &run, const Radial<T> &radial, const T *g,
                         Cotangent<T> by_sum, T *moments, T *const *out) {
    if (moments)
        backward_run_as<T, M, true>(f, run, radial, g, by_sum, moments, out);
    else
        backward_run_as<T, M, false>(f, run, radial, g, by_sum, moments, out);
}

// Backward of `n_vectors` vectors with Chebyshev polynomials and one cotangent, zero where a function
// does not go with a component, given their sensitivities and tensor components. The scratch arrays
// have room for M and n_sens vectors each.
template <class T, int M>
inline void chebyshev_backward(const PairFields<T> &f, int first, int n_vectors, const Radial<T> &radial,
                               const Ranks &ranks, const T *g, const T *t, Cotangent<T> by_sum,
                               T *by_component, T *by_function, T *const *out) {
    constexpr int L = lanes<T>;
    const int n_sens = radial.n;
    for (const Ranks::Part &p : ranks.used)
        if (p.n == 0)  // the component of rank 0 has no gradient
            lane_product<T>(p.n_m, n_vectors, p.n_n,
                            {by_sum.data + p.m * by_sum.ld_m, by_sum.ld_m, by_sum.ld_n},
                            {g, n_sens * L, L}, by_component + p.m * L, L, M * L);
    for (const Ranks::Part &p : ranks.by_function)
        lane_product<T>(p.n_n, n_vectors, p.n_m,
                        {by_sum.data + p.n * by_sum.ld_n, by_sum.ld_n, by_sum.ld_m}, {t, M * L, L},
                        by_function + p.n * L, L, n_sens * L);
    for (int v = 0; v < n_vectors; ++v, by_component += M * L) {
        const int p = v * L, k = first + p;
        const Vector<T> x = load(f.unit[0] + k), y = load(f.unit[1] + k), z = load(f.unit[2] + k);
        const Vector<T> argument =
            minimum<T>(load(f.r + k) * radial.scale - T(1), broadcast(T(1)));
        // Derivatives of the products with the cutoff function, of which the one before the first
        // equals the second: T_-1 = T_1.
        const Vector<T> twice = T(2) * argument;
        Vector<T> derivative = load(f.slope + k), radial_part{};
        Vector<T> before = derivative * argument + load(f.envelope + k) * radial.scale;
        for (int n = 0; n < n_sens; ++n, g += L, by_function += L) {
            radial_part += load(by_function) * derivative;
            // This sum does not wait for the derivative.
            const Vector<T> known = (T(2) * radial.scale) * load(g) - before;
            before = derivative;
            derivative = known + twice * derivative;
        }
        Vector<T> px, py, pz;
        contract_gradients<T, M>(x, y, z, by_component, px, py, pz);
        const Vector<T> scale = load(f.inverse_r + k);
        px *= scale, py *= scale, pz *= scale;
        radial_part -= px * x + py * y + pz * z;
        store(out[0] + p, radial_part * x + px);
        store(out[1] + p, radial_part * y + py);
        store(out[2] + p, radial_part * z + pz);
    }
}

}  // namespace potstill::POTSTILL_ISA
