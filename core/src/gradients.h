// Gradients of the parameters, as one part of the atoms adds them up: in the model's type for some
// blocks at a time, in double precision over the whole call.
#pragma once

#include "arena.h"
#include "network.h"
#include "pairs.h"

namespace potstill::POTSTILL_ISA {
namespace {

// Sums of a matrix' gradient: rows padded to whole vectors.
template <class T>
struct MatrixSums {
    Span<T> sums;
    int n_rows, n_columns, ld;
    int64_t start;  // in the flat array
    int n_in;       // > 0: int_weights, whose column n n_in + c lies at [n, row, c]

    void place(Carver &c, int rows, int columns, int64_t at, int input = 0) {
        n_rows = rows, n_columns = columns, ld = padded<T>(columns), start = at, n_in = input;
        sums = c.take<T>(size_t(rows) * ld);
    }

    void flush(double *flat) const {
        for (int r = 0; r < n_rows; ++r)
            for (int c = 0; c < n_columns; ++c) {
                int64_t at = int64_t(r) * n_columns + c;
                if (n_in) at = (int64_t(c / n_in) * n_rows + r) * n_in + c % n_in;
                flat[start + at] += double(sums[r * ld + c]);
                sums[r * ld + c] = T(0);
            }
    }

    // sums(r, c) += sum over b of rows(r, b) columns(c, b); `scratch` takes the transpose of `columns`.
    void add_outer(int n_b, const T *rows, const T *columns, T *scratch) const {
        add_outer(n_b, rows, n_b, columns, n_b, scratch);
    }
    void add_outer(int n_b, const T *rows, ptrdiff_t ld_rows, const T *columns, ptrdiff_t ld_columns,
                   T *scratch) const {
        transpose<T>(n_columns, n_b, columns, ld_columns, scratch, ld);
        gemm<T, Order::rows>(n_rows, ld, n_b, rows, ld_rows, scratch, ld, sums, ld, Start::keep);
    }
};

template <class T>
struct ParameterSums {
    // Of one residual layer; `weight` is int_weights of an interaction layer.
    struct Residual {
        MatrixSums<T> weight, res_weight;
    };
    Span<Residual> residuals;      // (n_interaction_layers, 1 + n_atom_layers)
    // Of an interaction layer: self-interaction of dense features; tensor weights and mixing of
    // smooth invariants.
    struct Layer {
        MatrixSums<T> self, tensor[4], mixing;
    };
    Span<Layer> layers;
    Span<T> moments;               // (n_interaction_layers, n_sens, 2, L): see `backward_tile`
    Span<double> flat;             // (n_parameters)
    Span<T> transposed;
    int per_block;

    ParameterSums(const Task &task, const Sizes<T> &sizes, Carver &c)
        : per_block(1 + sizes.n_atom_layers) {
        if (!task.wants_parameters()) return;
        residuals = c.take<Residual>(size_t(sizes.n_layers) * per_block);
        layers = c.take<Layer>(sizes.n_layers);
        const int width = sizes.n_features;
        for (int layer = 0; layer < sizes.n_layers; ++layer) {
            const BlockLayout &block = task.layout.blocks[layer];
            for (int a = 0; a < per_block; ++a) {
                const ResidualLayout &r = block.residuals[a];
                Residual sums;
                if (a == 0)
                    sums.weight.place(c, width, sizes.n_sens * block.n_in, r.weight, block.n_in);
                else
                    sums.weight.place(c, width, width, r.weight);
                sums.res_weight.place(c, width, width, r.res_weight);
                if (c.assigns()) residuals[layer * per_block + a] = sums;
            }
            const ResidualLayout &first = block.residuals[0];
            Layer own;
            own.self.place(c, width, layer > 0 ? width : 0, first.self_weight);
            for (int rank = 0; rank < 4; ++rank) {
                const bool used = task.is_smooth() && rank < task.model.l_max;
                own.tensor[rank].place(c, used ? task.n_channels() : 0,
                                       used ? task.n_sens(rank + 1) * block.n_in : 0,
                                       first.tensor_weight[rank], block.n_in);
            }
            own.mixing.place(c, width, task.n_invariants(), first.mixing);
            if (c.assigns()) layers[layer] = own;
        }
        moments = c.take<T>(size_t(sizes.n_layers) * sizes.n_sens * 2 * lanes<T>);
        flat = c.take<double>(task.layout.n_parameters);
        const int invariants = padded<T>(task.n_invariants());
        const size_t widest =
            size_t(invariants > sizes.ld_features ? invariants : sizes.ld_features) * block_atoms;
        const size_t other = padded<T>(int(sizes.n_sens * sizes.widest_input())) *
                             n_components(task.model.l_max) * size_t(block_atoms);
        transposed = c.take<T>(widest > other ? widest : other);
    }

    explicit operator bool() const { return flat.size > 0; }
    const Residual *block(int layer) const { return residuals + layer * per_block; }
    T *moments_of(int layer, int n_sens) const {
        return moments + size_t(layer) * n_sens * 2 * lanes<T>;
    }

    void clear() const {
        for (size_t k = 0; k < residuals.size; ++k)
            residuals[k].weight.sums.clear(), residuals[k].res_weight.sums.clear();
        for (size_t k = 0; k < layers.size; ++k) {
            layers[k].self.sums.clear(), layers[k].mixing.sums.clear();
            for (const MatrixSums<T> &tensor : layers[k].tensor) tensor.sums.clear();
        }
        moments.clear();
        flat.clear();
    }

    void flush(const Task &task, int layer) const {
        for (int a = 0; a < per_block; ++a)
            block(layer)[a].weight.flush(flat), block(layer)[a].res_weight.flush(flat);
        layers[layer].self.flush(flat), layers[layer].mixing.flush(flat);
        for (const MatrixSums<T> &tensor : layers[layer].tensor) tensor.flush(flat);
        if (task.is_smooth()) return;
        constexpr int L = lanes<T>;
        const ResidualLayout &r = task.layout.blocks[layer].residuals[0];
        const T *parameters = static_cast<const T *>(task.parameters);
        const double ln2 = 0.6931471805599453094, k2 = 0.7213475204444817037;
        const int n_sens = task.model.n_sensitivities;
        T *m = moments_of(layer, n_sens);
        for (int n = 0; n < n_sens; ++n) {
            const double sigma = double(parameters[r.sigma + n]), mu = double(parameters[r.mu + n]);
            const double first = double(sum_lanes<T>(load(m + 2 * n * L)));
            const double second = double(sum_lanes<T>(load(m + (2 * n + 1) * L)));
            // tau = k sigma (1/r - 1/mu); the sums are over q and q tau, q = dE/d(ln s) tau
            const double a = __builtin_sqrt(k2) * sigma;
            flat[r.mu + n] += -2.0 * ln2 * a / (mu * mu) * first;
            if (sigma != 0.0) flat[r.sigma + n] += -2.0 * ln2 / sigma * second;
        }
        potstill::POTSTILL_ISA::clear(size_t(n_sens) * 2 * L, m);
    }
};

}  // namespace
}  // namespace potstill::POTSTILL_ISA
