// Matrix products of a few dozen rows with register blocks; no BLAS.
#pragma once

#include "simd.h"

namespace potstill::POTSTILL_ISA {

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
    for (; row + 2 <= n_rows; row += 2)
        gemm_tile<T, order, 2, C>(n_k, a + row * step, stride, x, ld_x, y + row * ld_y, ld_y, start,
                                  at(row));
    if (row < n_rows)
        gemm_tile<T, order, 1, C>(n_k, a + row * step, stride, x, ld_x, y + row * ld_y, ld_y, start,
                                  at(row));
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
    for (int c = 0; c < n_columns; ++c)
        for (int r = 0; r < n_rows; ++r) to[c * ld_to + r] = from[r * ld_from + c];
}

}  // namespace potstill::POTSTILL_ISA
