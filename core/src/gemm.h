// Matrix products of a few dozen rows with register blocks; no BLAS.
#pragma once

#include "quads.h"
#include "simd.h"

namespace potstill::POTSTILL_ISA {

template <int N>
struct Count {
    static constexpr int value = N;
};

// work(Count<n>), for n of 1 to `most`.
template <int most, class F>
POTSTILL_INLINE void with_count(int n, F &&work) {
    if constexpr (most > 1)
        if (n < most) return with_count<most - 1>(n, work);
    work(Count<most>{});
}

// How the coefficients A(row, k) lie in memory.
enum class Order {
    rows,     // A[row * stride + k]
    columns,  // A[k * stride + row]
};

enum class Start { zero, bias, keep };

template <class T, Order order, int R, int C>
POTSTILL_INLINE void gemm_tile(int n_k, const T *a, ptrdiff_t stride, const T *x, ptrdiff_t ld_x, T *y,
                               ptrdiff_t ld_y, Start start, const T *bias) {
    constexpr int L = lanes<T>;
    Vector<T> sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
            sum[r][c] = start == Start::zero   ? Vector<T>{}
                        : bias                 ? broadcast(bias[r])
                                               : load(y + r * ld_y + c * L);
    for (int k = 0; k < n_k; ++k) {
        Vector<T> column[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) column[c] = load(x + c * L);
        x += ld_x;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vector<T> factor =
                broadcast(order == Order::rows ? a[r * stride + k] : a[r]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sum[r][c] += factor * column[c];
        }
        if (order == Order::columns) a += stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(y + r * ld_y + c * L, sum[r][c]);
}

template <class T, Order order, int C>
void gemm_columns(int n_rows, int n_k, const T *a, ptrdiff_t stride, const T *x, ptrdiff_t ld_x, T *y,
                  ptrdiff_t ld_y, Start start, const T *bias) {
    constexpr int R = n_registers == 32 ? 8 : 6;
    const ptrdiff_t step = order == Order::rows ? stride : 1;
    int row = 0;
    auto at = [&](int r) { return bias ? bias + r : nullptr; };
    for (; row + R <= n_rows; row += R)
        gemm_tile<T, order, R, C>(n_k, a + row * step, stride, x, ld_x, y + row * ld_y, ld_y, start,
                                  at(row));
    if (row < n_rows)
        with_count<R - 1>(n_rows - row, [&](auto rest) {
            gemm_tile<T, order, decltype(rest)::value, C>(n_k, a + row * step, stride, x, ld_x,
                                                          y + row * ld_y, ld_y, start, at(row));
        });
}

// y(row, :) = [0 | bias(row) | y(row, :)] + sum over k of A(row, k) x(k, :), for n_columns columns,
// a multiple of the lanes.
template <class T, Order order>
void gemm(int n_rows, int n_columns, int n_k, const T *a, ptrdiff_t stride, const T *x, ptrdiff_t ld_x,
          T *y, ptrdiff_t ld_y, Start start = Start::zero, const T *bias = nullptr) {
    constexpr int L = lanes<T>;
    constexpr int C = 2;
    int column = 0;
    for (; column + C * L <= n_columns; column += C * L)
        gemm_columns<T, order, C>(n_rows, n_k, a, stride, x + column, ld_x, y + column, ld_y, start,
                                  bias);
    for (; column < n_columns; column += L)
        gemm_columns<T, order, 1>(n_rows, n_k, a, stride, x + column, ld_x, y + column, ld_y, start,
                                  bias);
}

// to(column, row) = from(row, column)
template <class T>
inline void transpose(int n_rows, int n_columns, const T *from, ptrdiff_t ld_from, T *to,
                      ptrdiff_t ld_to) {
    const int whole_rows = n_rows / 4 * 4, whole_columns = n_columns / 4 * 4;
    for (int c = 0; c < whole_columns; c += 4)
        for (int r = 0; r < whole_rows; r += 4) {
            const T *at = from + r * ld_from + c;
            Four<T> v0 = load_four(at), v1 = load_four(at + ld_from), v2 = load_four(at + 2 * ld_from),
                    v3 = load_four(at + 3 * ld_from);
            transpose_four(v0, v1, v2, v3);
            T *out = to + c * ld_to + r;
            store_four(out, v0);
            store_four(out + ld_to, v1);
            store_four(out + 2 * ld_to, v2);
            store_four(out + 3 * ld_to, v3);
        }
    for (int c = 0; c < n_columns; ++c)
        for (int r = c < whole_columns ? whole_rows : 0; r < n_rows; ++r)
            to[c * ld_to + r] = from[r * ld_from + c];
}

// One operand of a product of matrices that every lane has of its own: entry (i, k) is a vector.
template <class T>
struct LaneMatrix {
    const T *data;
    ptrdiff_t ld, ld_k;  // from one i to the next, and from one k

    LaneMatrix from(int i) const { return {data + i * ld, ld, ld_k}; }
};

template <class T, int I, int J>
POTSTILL_INLINE void lane_tile(int n_k, LaneMatrix<T> a, LaneMatrix<T> x, T *y, ptrdiff_t ld_i,
                               ptrdiff_t ld_j, bool keep) {
    Vector<T> sum[I][J];
#pragma GCC unroll 5
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 5
        for (int j = 0; j < J; ++j)
            sum[i][j] = keep ? load(y + i * ld_i + j * ld_j) : Vector<T>{};
    for (int k = 0; k < n_k; ++k) {
        Vector<T> column[J];
#pragma GCC unroll 5
        for (int j = 0; j < J; ++j) column[j] = load(x.data + j * x.ld);
#pragma GCC unroll 5
        for (int i = 0; i < I; ++i) {
            const Vector<T> factor = load_once(a.data + i * a.ld);
#pragma GCC unroll 5
            for (int j = 0; j < J; ++j) sum[i][j] += factor * column[j];
        }
        a.data += a.ld_k;
        x.data += x.ld_k;
    }
#pragma GCC unroll 5
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 5
        for (int j = 0; j < J; ++j) store(y + i * ld_i + j * ld_j, sum[i][j]);
}

// work(Count<size>, first) for parts of at most `most`, all but the last one of the same size.
template <int most, class F>
POTSTILL_INLINE void in_parts(int n, F &&work) {
    if (n <= 0) return;
    const int n_parts = (n + most - 1) / most;
    with_count<most>((n + n_parts - 1) / n_parts, [&](auto count) {
        constexpr int size = decltype(count)::value;
        int first = 0;
        for (; first + size <= n; first += size) work(count, first);
        if constexpr (size > 1)
            if (first < n) with_count<size - 1>(n - first, [&](auto rest) { work(rest, first); });
    });
}

// Columns of a tile of such a product.
constexpr int lane_columns = n_registers == 32 ? 5 : 2;

// y(i, j) = [0 | y(i, j)] + sum over k of a(i, k) x(j, k), lane by lane.
template <class T>
void lane_product(int n_i, int n_j, int n_k, LaneMatrix<T> a, LaneMatrix<T> x, T *y, ptrdiff_t ld_i,
                  ptrdiff_t ld_j, bool keep = false) {
    in_parts<5>(n_i, [&](auto rows, int i) {
        in_parts<lane_columns>(n_j, [&](auto columns, int j) {
            lane_tile<T, decltype(rows)::value, decltype(columns)::value>(
                n_k, a.from(i), x.from(j), y + i * ld_i + j * ld_j, ld_i, ld_j, keep);
        });
    });
}

}  // namespace potstill::POTSTILL_ISA
