// Invariant products of three tensors of a channel, sum over i, j, k of G_ijk A_i B_j C_k, where G are
// the integrals of three real spherical harmonics over the sphere (Gaunt coefficients). Bartok, Payne,
// Kondor, Csanyi, Phys. Rev. Lett. 104, 136403 (2010), Eq. 6, without ranks whose sum is odd.
#pragma once

#include "network.h"
#include "pairs.h"

namespace potstill::POTSTILL_ISA {

// -- coefficients, at compile time ----------------------------------------------------------------

// A real spherical harmonic as a polynomial of a unit vector; the sum of the squares of a rank is 1.
struct Harmonic {
    struct Term {
        double factor;
        int power[3];
    } terms[4];
};

constexpr double root3 = 1.7320508075688772935, root35 = 5.9160797830996160426;

// Of rank 0 to 4, as in `tensor_components` but for rank 2: xx - yy, zz, xy, xz, yz.
constexpr Harmonic harmonics[25] = {
    {{{1, {0, 0, 0}}}},
    {{{1, {1, 0, 0}}}},
    {{{1, {0, 1, 0}}}},
    {{{1, {0, 0, 1}}}},
    {{{root3 / 2, {2, 0, 0}}, {-root3 / 2, {0, 2, 0}}}},
    {{{1.5, {0, 0, 2}}, {-0.5, {0, 0, 0}}}},
    {{{root3, {1, 1, 0}}}},
    {{{root3, {1, 0, 1}}}},
    {{{root3, {0, 1, 1}}}},
    {{{3 * Harmonics<double>::a3, {2, 1, 0}}, {-Harmonics<double>::a3, {0, 3, 0}}}},
    {{{Harmonics<double>::b3, {1, 1, 1}}}},
    {{{5 * Harmonics<double>::c3, {0, 1, 2}}, {-Harmonics<double>::c3, {0, 1, 0}}}},
    {{{2.5, {0, 0, 3}}, {-1.5, {0, 0, 1}}}},
    {{{5 * Harmonics<double>::c3, {1, 0, 2}}, {-Harmonics<double>::c3, {1, 0, 0}}}},
    {{{Harmonics<double>::b3 / 2, {2, 0, 1}}, {-Harmonics<double>::b3 / 2, {0, 2, 1}}}},
    {{{Harmonics<double>::a3, {3, 0, 0}}, {-3 * Harmonics<double>::a3, {1, 2, 0}}}},
    {{{Harmonics<double>::a4, {3, 1, 0}}, {-Harmonics<double>::a4, {1, 3, 0}}}},
    {{{3 * Harmonics<double>::b4, {2, 1, 1}}, {-Harmonics<double>::b4, {0, 3, 1}}}},
    {{{7 * Harmonics<double>::c4, {1, 1, 2}}, {-Harmonics<double>::c4, {1, 1, 0}}}},
    {{{7 * Harmonics<double>::d4, {0, 1, 3}}, {-3 * Harmonics<double>::d4, {0, 1, 1}}}},
    {{{4.375, {0, 0, 4}}, {-3.75, {0, 0, 2}}, {0.375, {0, 0, 0}}}},
    {{{7 * Harmonics<double>::d4, {1, 0, 3}}, {-3 * Harmonics<double>::d4, {1, 0, 1}}}},
    {{{3.5 * Harmonics<double>::c4, {2, 0, 2}},
      {-0.5 * Harmonics<double>::c4, {2, 0, 0}},
      {-3.5 * Harmonics<double>::c4, {0, 2, 2}},
      {0.5 * Harmonics<double>::c4, {0, 2, 0}}}},
    {{{Harmonics<double>::b4, {3, 0, 1}}, {-3 * Harmonics<double>::b4, {1, 2, 1}}}},
    {{{root35 / 8, {4, 0, 0}}, {-root35 * 0.75, {2, 2, 0}}, {root35 / 8, {0, 4, 0}}}}};

// Mean over the sphere of x^p y^q z^r: (p-1)!! (q-1)!! (r-1)!! / (p+q+r+1)!! of even powers.
constexpr double moment(const int (&power)[3]) {
    double value = 1.0;
    int sum = 0;
    for (int p : power) {
        if (p % 2) return 0.0;
        for (int k = p - 1; k > 1; k -= 2) value *= k;
        sum += p;
    }
    for (int k = sum + 1; k > 1; k -= 2) value /= k;
    return value;
}

// Mean over the sphere of the product of three. The terms of a harmonic end with one of factor 0.
constexpr double gaunt(const Harmonic &a, const Harmonic &b, const Harmonic &c) {
    double sum = 0.0;
    for (const Harmonic::Term &s : a.terms)
        for (const Harmonic::Term &t : b.terms) {
            if (s.factor == 0.0 || t.factor == 0.0) break;
            for (const Harmonic::Term &u : c.terms) {
                if (u.factor == 0.0) break;
                const int power[3] = {s.power[0] + t.power[0] + u.power[0],
                                      s.power[1] + t.power[1] + u.power[1],
                                      s.power[2] + t.power[2] + u.power[2]};
                sum += s.factor * t.factor * u.factor * moment(power);
            }
        }
    return sum;
}

// The product of three tensors of ranks A <= B <= C as a sum over pairs of components (i, j) of x_i
// x_j times a linear form of x, in all of which equal monomials are one. It is 1 for harmonics of the
// same unit vector.
template <int A, int B, int C>
struct Coupling {
    struct Pair {
        int i = 0, j = 0, n = 0;
        int k[2 * C + 1] = {};
        double factor[2 * C + 1] = {};
    };
    Pair pairs[(2 * A + 1) * (2 * B + 1)] = {};
    int n = 0;

    constexpr Coupling() {
        const int z[4] = {3, 5, 12, 20};  // the components of a vector along z that are 1
        const double scale = 1.0 / gaunt(harmonics[z[A - 1]], harmonics[z[B - 1]], harmonics[z[C - 1]]);
        for (int i = A * A; i < (A + 1) * (A + 1); ++i)
            for (int j = A == B ? i : B * B; j < (B + 1) * (B + 1); ++j) {
                Pair &pair = pairs[n];
                pair.i = i, pair.j = j, pair.n = 0;
                for (int k = B == C ? j : C * C; k < (C + 1) * (C + 1); ++k) {
                    const double g = scale * gaunt(harmonics[i], harmonics[j], harmonics[k]);
                    if (g < 1e-9 && g > -1e-9) continue;
                    pair.k[pair.n] = k;
                    pair.factor[pair.n++] = g * orders(i, j, k);
                }
                n += pair.n > 0;
            }
    }

    // Whether the next pair, if any, has another i.
    constexpr bool ends_row(int p) const { return p + 1 == n || pairs[p + 1].i != pairs[p].i; }

  private:
    // Orders of three components, where those of equal ranks may be exchanged.
    static constexpr int orders(int i, int j, int k) {
        if (A == C) return i == j && j == k ? 1 : i == j || j == k ? 3 : 6;
        if (A == B) return i == j ? 1 : 2;
        return B == C && j != k ? 2 : 1;
    }
};

template <int A, int B, int C>
inline constexpr Coupling<A, B, C> coupling{};

// -- of a vector of atoms -------------------------------------------------------------------------

// The linear form of a pair.
template <class T, int A, int B, int C, int p>
POTSTILL_INLINE Vector<T> linear_form(const Vector<T> *x) {
    constexpr const auto &pair = coupling<A, B, C>.pairs[p];
    Vector<T> form = T(pair.factor[0]) * x[pair.k[0]];
#pragma GCC unroll 9
    for (int e = 1; e < pair.n; ++e) form += T(pair.factor[e]) * x[pair.k[e]];
    return form;
}

// The product of ranks A, B, C of the tensors x, pair by pair; `row` sums over those with the same i.
// Functions of their own: inlined into one, all of them would take minutes to compile.
template <class T, int A, int B, int C, int p = 0>
POTSTILL_INLINE void add_pairs(const Vector<T> *x, Vector<T> row, Vector<T> &sum) {
    constexpr const Coupling<A, B, C> &g = coupling<A, B, C>;
    if constexpr (p < g.n) {
        constexpr const auto &pair = g.pairs[p];
        row += x[pair.j] * linear_form<T, A, B, C, p>(x);
        if constexpr (g.ends_row(p)) {
            sum += x[pair.i] * row;
            row = Vector<T>{};
        }
        add_pairs<T, A, B, C, p + 1>(x, row, sum);
    }
}
template <class T, int A, int B, int C>
__attribute__((noinline)) Vector<T> product(const Vector<T> *x) {
    Vector<T> sum{};
    add_pairs<T, A, B, C>(x, Vector<T>{}, sum);
    return sum;
}

// by_x += by_product d(product)/dx
template <class T, int A, int B, int C, int p = 0>
POTSTILL_INLINE void pairs_backward(const Vector<T> *x, Vector<T> by_product, Vector<T> row,
                                    Vector<T> *__restrict by_x) {
    constexpr const Coupling<A, B, C> &g = coupling<A, B, C>;
    if constexpr (p < g.n) {
        constexpr const auto &pair = g.pairs[p];
        const Vector<T> scaled = by_product * x[pair.i], form = linear_form<T, A, B, C, p>(x);
        const Vector<T> by_form = scaled * x[pair.j];
        row += form * x[pair.j];
        by_x[pair.j] += form * scaled;
#pragma GCC unroll 9
        for (int e = 0; e < pair.n; ++e) by_x[pair.k[e]] += T(pair.factor[e]) * by_form;
        if constexpr (g.ends_row(p)) {
            by_x[pair.i] += by_product * row;
            row = Vector<T>{};
        }
        pairs_backward<T, A, B, C, p + 1>(x, by_product, row, by_x);
    }
}
template <class T, int A, int B, int C>
__attribute__((noinline)) void product_backward(const Vector<T> *x, Vector<T> by_product,
                                                Vector<T> *__restrict by_x) {
    pairs_backward<T, A, B, C>(x, by_product, Vector<T>{}, by_x);
}

template <int rank>
struct Rank {
    static constexpr int value = rank;
};
// work(Rank<A>, Rank<B>, Rank<C>, number) for all products of ranks that M components reach, in order.
template <int M, class F>
POTSTILL_INLINE void for_products(F &&work) {
    if constexpr (M >= 9) {
        work(Rank<1>{}, Rank<1>{}, Rank<2>{}, 0);
        work(Rank<2>{}, Rank<2>{}, Rank<2>{}, 1);
    }
    if constexpr (M >= 16) {
        work(Rank<1>{}, Rank<2>{}, Rank<3>{}, 2);
        work(Rank<2>{}, Rank<3>{}, Rank<3>{}, 3);
    }
    if constexpr (M >= 25) {
        work(Rank<1>{}, Rank<3>{}, Rank<4>{}, 4);
        work(Rank<2>{}, Rank<2>{}, Rank<4>{}, 5);
        work(Rank<2>{}, Rank<4>{}, Rank<4>{}, 6);
        work(Rank<3>{}, Rank<3>{}, Rank<4>{}, 7);
        work(Rank<4>{}, Rank<4>{}, Rank<4>{}, 8);
    }
}

// Tensors of one channel with orthogonal components, and 1/3 plus the squares of each rank.
template <class T, int M>
struct Orthogonal {
    static constexpr T root2 = T(1.4142135623730950488), root_half = T(0.7071067811865475244),
                       root_3_2 = T(1.2247448713915890491);
    Vector<T> x[M], square[5];

    POTSTILL_INLINE explicit Orthogonal(const T *y) {
#pragma GCC unroll 25
        for (int m = 1; m < M; ++m) x[m] = load(y + m * block_atoms);
        if constexpr (M >= 9) {
            const Vector<T> xx = x[4], xy = x[5], xz = x[6], yy = x[7], yz = x[8];
            x[4] = root_half * (xx - yy), x[5] = -root_3_2 * (xx + yy);
            x[6] = root2 * xy, x[7] = root2 * xz, x[8] = root2 * yz;
        }
#pragma GCC unroll 4
        for (int rank = 1; rank * rank < M; ++rank) {
            square[rank] = broadcast(T(1) / T(3));
#pragma GCC unroll 9
            for (int m = rank * rank; m < (rank + 1) * (rank + 1); ++m) square[rank] += x[m] * x[m];
        }
    }

    // Cotangents of the components as they came, given those of the orthogonal ones.
    static POTSTILL_INLINE void write(const Vector<T> *by_x, T *out) {
        constexpr int B = block_atoms;
#pragma GCC unroll 25
        for (int m = 1; m < M; ++m)
            if (m < 4 || m > 8) store(out + m * B, by_x[m]);
        if constexpr (M >= 9) {
            const Vector<T> difference = root_half * by_x[4], sum = root_3_2 * by_x[5];
            store(out + 4 * B, difference - sum);
            store(out + 5 * B, root2 * by_x[6]);
            store(out + 6 * B, root2 * by_x[7]);
            store(out + 7 * B, -difference - sum);
            store(out + 8 * B, root2 * by_x[8]);
        }
    }
};

// out(product, f, b) = (A B C) / (1 + |A|^2 + |B|^2 + |C|^2) of the tensors y(f, m, b), which grows
// no faster than they do.
template <class T, int M>
inline void triples(int n_channels, const T *y, T *out) {
    constexpr int B = block_atoms, L = lanes<T>;
    if constexpr (M >= 9)
        for (int f = 0; f < n_channels; ++f)
            for (int b = 0; b < B; b += L) {
                const Orthogonal<T, M> t(y + f * M * B + b);
                for_products<M>([&](auto a, auto b_, auto c, int number) __attribute__((always_inline)) {
                    constexpr int i = decltype(a)::value, j = decltype(b_)::value, k = decltype(c)::value;
                    store(out + (number * n_channels + f) * B + b,
                          product<T, i, j, k>(t.x) / (t.square[i] + t.square[j] + t.square[k]));
                });
            }
}

// by_y(f, m, b) = cotangents of the tensors y, given those of `values`, the invariants.
template <class T, int M>
inline void triples_backward(int n_channels, const T *cotangent, const T *values, const T *y,
                             T *by_y) {
    constexpr int B = block_atoms, L = lanes<T>;
    if constexpr (M >= 9)
        for (int f = 0; f < n_channels; ++f)
            for (int b = 0; b < B; b += L) {
                const Orthogonal<T, M> t(y + f * M * B + b);
                Vector<T> by_x[M] = {}, by_square[5] = {};
                for_products<M>([&](auto a, auto b_, auto c, int number) __attribute__((always_inline)) {
                    constexpr int i = decltype(a)::value, j = decltype(b_)::value, k = decltype(c)::value;
                    const int at = (number * n_channels + f) * B + b;
                    const Vector<T> by_product =
                        load(cotangent + at) / (t.square[i] + t.square[j] + t.square[k]);
                    product_backward<T, i, j, k>(t.x, by_product, by_x);
                    const Vector<T> by_sum = T(-2) * by_product * load(values + at);
                    by_square[i] += by_sum, by_square[j] += by_sum, by_square[k] += by_sum;
                });
#pragma GCC unroll 4
                for (int rank = 1; rank * rank < M; ++rank)
#pragma GCC unroll 9
                    for (int m = rank * rank; m < (rank + 1) * (rank + 1); ++m)
                        by_x[m] += by_square[rank] * t.x[m];
                Orthogonal<T, M>::write(by_x, by_y + f * M * B + b);
            }
}

}  // namespace potstill::POTSTILL_ISA
