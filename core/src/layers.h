// The layers of HIP-NN on a block of atoms, forward and backward.
//
// Forward: the pairs of the atoms, the environments (sums over neighbors of sensitivity x tensor
// component x feature), then all layers on atoms as matrix products. Backward the same in reverse;
// what is of the size of pairs x channels is kept for one block of atoms, in the cache.
#pragma once

#include "gradients.h"
#include "network.h"
#include "pair_source.h"
#include "pairs.h"
#include "sink.h"
#include "triples.h"

namespace potstill::POTSTILL_ISA {
namespace {

// Parameters of an interaction layer as the kernels want them, and what it hands on.
template <class T>
struct Prepared {
    Span<T> weights;  // (n_features, n_sens * n_in); and of smooth tensors (n_channels, the same)
    Span<T> tensor_weights[4];
    Radial<T> radial;
    Span<T> features;  // (n_atoms, padded n_features), of all layers but the last
};

// Vectors of pairs that are worked on at a time, in whole tiles: their tensor components stay in the
// fastest cache, or where tiles are larger (AVX-512) do not leave the second.
constexpr int chunk_vectors(int M) {
    return (n_registers == 32 ? 680 : 400) / (M + 8) / lane_columns * lane_columns;
}

// Pairs within the cutoff, of as many atoms as there are lanes, or of one where features are dense.
template <class T>
struct PairScratch {
    Span<T> packed[3];     // (L, row): the pair vectors of each atom
    Span<T> by_pair[3];    // gradients as the fields are
    Span<T> components;    // (chunk, M), or of dense features (pairs, M)
    Span<T> by_component, by_function;  // Chebyshev polynomials: (chunk, M), (chunk, n_sens)
    Span<T> sums;          // (n_sens, M, L): environments of one species, or their cotangents
    // Dense features only:
    Span<T> environment;          // (n_sens, M, padded n_in)
    Span<T> near, near_columns;   // (pairs, padded n_features) and its transpose
    Span<T> spelled, by_spelled;  // (n_sens * M, pairs)
    Span<T> by_near;              // (pairs, padded n_features)

    PairScratch(const Task &task, const Sizes<T> &sizes, int M, Carver &c) {
        constexpr size_t L = lanes<T>;
        const size_t chunk = chunk_vectors(M) * L;
        const size_t pairs = sizes.row(), channels = size_t(sizes.n_sens) * M;
        const bool dense = sizes.n_layers > 1;
        for (Span<T> &x : packed) x = c.take<T>(L * pairs);
        for (Span<T> &g : by_pair) g = c.take<T>(L * pairs);
        components = c.take<T>(M * (dense && pairs > chunk ? pairs : chunk));
        by_component = c.take<T>(task.is_smooth() ? M * chunk : 0);
        by_function = c.take<T>(task.is_smooth() ? sizes.n_sens * chunk : 0);
        sums = c.take<T>(channels * L);
        const int ld = sizes.ld_features;
        environment = c.take<T>(dense ? channels * ld : 0);
        near = c.take<T>(dense ? pairs * ld : 0);
        near_columns = c.take<T>(dense ? pairs * sizes.n_features : 0);
        spelled = c.take<T>(dense ? channels * pairs : 0);
        by_spelled = c.take<T>(dense ? channels * pairs : 0);
        by_near = c.take<T>(dense ? pairs * ld : 0);
    }
};

// The layers on a block of B atoms.
template <class T>
struct BlockScratch {
    Span<T> environment;        // (n_sens * n_in, M, B), later its cotangent
    Span<T> tensor;             // (n_features or n_channels, M, B), later its cotangent
    Span<T> norms;              // (2, n_features, B); or smooth invariants (n_invariants, B)
    Span<T> by_invariants;      // the cotangent of the latter
    Span<T> by_triples;         // (n_triples, M, B): cotangents of the tensors
    Span<T> features;           // (n_atom_layers + 2, widest, B): inputs of the layers
    Span<T> value, derivative;  // (n_atom_layers + 1, n_features, B): softplus and its derivative
    Span<T> cotangent, inner;   // (widest, B)
    Span<T> weights;            // (B): of this block's energy term

    BlockScratch(const Task &task, const Sizes<T> &sizes, int M, Carver &c) {
        constexpr size_t B = block_atoms;
        const size_t width = sizes.n_features, n_layers = sizes.n_atom_layers + 1;
        environment = c.take<T>(sizes.n_sens * sizes.widest_input() * M * B);
        tensor = c.take<T>((task.is_smooth() ? task.n_channels() : width) * M * B);
        norms = c.take<T>((task.is_smooth() ? task.n_invariants() : 2 * width) * B);
        by_invariants = c.take<T>(task.n_invariants() * B);
        by_triples = c.take<T>(size_t(task.n_triples()) * M * B);
        features = c.take<T>((n_layers + 1) * sizes.widest * B);
        value = c.take<T>(n_layers * width * B);
        derivative = c.take<T>(n_layers * width * B);
        cotangent = c.take<T>(sizes.widest * B);
        inner = c.take<T>(sizes.widest * B);
        weights = c.take<T>(B);
    }
};

// What one part of the atoms works in.
template <class T>
struct Part {
    Span<Row<T>> rows;      // (L), or one where there is one species
    PairFields<T> fields;   // of a block's atoms
    Span<Run> runs;         // (B / L, n_species) of atoms side by side, (B) where features are dense
    Span<OwnPairs> own;     // (B / L, n_species, L) or (B)
    Span<T> sensitivities;  // of a block's runs, (their vectors, n_sens) each
    PairScratch<T> pairs;
    BlockScratch<T> block;
    ForceSums<T> sums;
    ParameterSums<T> parameters;
    Span<T> feature_cotangent[2];  // (n_atoms, padded n_features) of a layer's output and input
    bool indices_fit;

    Part(const Task &task, const Sizes<T> &sizes, int M, Carver &c)
        : rows(place_rows(sizes, c)),
          fields(place_fields(sizes, c)),
          runs(c.take<Run>(size_t(block_atoms) * sizes.n_species)),
          own(c.take<OwnPairs>(size_t(block_atoms) * sizes.n_species)),
          sensitivities(c.take<T>(size_t(block_atoms) * sizes.stride * sizes.n_sens)),
          pairs(task, sizes, M, c),
          block(task, sizes, M, c),
          sums(task, c),
          parameters(task, sizes, c),
          indices_fit(true) {
        for (Span<T> &x : feature_cotangent)
            x = c.take<T>(sizes.n_layers > 1 ? task.pairs.n_atoms * sizes.ld_features : 0);
    }

    T *sensitivities_of(const Run &run, int n_sens) const {
        return sensitivities + ptrdiff_t(run.first) * n_sens;
    }

    static Span<Row<T>> place_rows(const Sizes<T> &sizes, Carver &c) {
        const Span<Row<T>> rows = c.take<Row<T>>(sizes.n_species > 1 ? lanes<T> : 1);
        for (size_t a = 0; a < rows.size; ++a) {
            const Row<T> row(sizes, c);
            if (c.assigns()) rows[a] = row;
        }
        return rows;
    }
    static PairFields<T> place_fields(const Sizes<T> &sizes, Carver &c) {
        const size_t pairs = size_t(block_atoms) * sizes.stride;
        PairFields<T> f;
        T **const all[] = {&f.unit[0],   &f.unit[1],  &f.unit[2], &f.r,
                           &f.inverse_r, &f.envelope, &f.slope};
        for (T **field : all) *field = c.take<T>(pairs + lanes<T>);
        f.label = c.take<int32_t>(pairs + 16);
        return f;
    }
};

template <class T, int M>
class Layers {
  public:
    Layers(const Task &task, const Sizes<T> &sizes, Carver &c)
        : task_(task),
          sizes_(sizes),
          parameters_(static_cast<const T *>(task.parameters)),
          ranks_(task),
          source_(task, sizes, c),
          sink_(task),
          prepared_(c.take<Prepared<T>>(sizes.n_layers)) {
        const int n_sens = sizes.n_sens;
        for (int layer = 0; layer < sizes.n_layers; ++layer) {
            const bool last = layer + 1 == sizes.n_layers;
            Prepared<T> p;
            const size_t n_in = block_of(layer).n_in;
            p.weights = c.take<T>(n_features() * n_sens * n_in);
            for (int rank = 0; rank < task.model.l_max && task.is_smooth(); ++rank)
                p.tensor_weights[rank] = c.take<T>(task.n_channels() * task.n_sens(rank + 1) * n_in);
            const T scale = T(2.0 / task.model.cutoff);
            p.radial = {n_sens, scale, nullptr, nullptr, nullptr};
            if (!task.is_smooth()) {
                p.radial.a = c.take<T>(n_sens);
                p.radial.b = c.take<T>(n_sens);
                p.radial.slope = c.take<T>(n_sens);
            }
            p.features = c.take<T>(last ? 0 : task.pairs.n_atoms * sizes.ld_features);
            if (c.assigns()) prepared_[layer] = p;
        }
    }

    const PairSource<T> &source() const { return source_; }
    const Sink<T> &sink() const { return sink_; }
    const Span<T> &features(int layer) const { return prepared_[layer].features; }

    void prepare() const {
        source_.prepare();
        for (int layer = 0; layer < sizes_.n_layers; ++layer) {
            const int n_in = block_of(layer).n_in, n_sens = sizes_.n_sens;
            const ResidualLayout &r = block_of(layer).residuals[0];
            arrange(n_features(), n_sens, n_in, parameters_ + r.weight, prepared_[layer].weights);
            for (int rank = 0; rank < task_.model.l_max && task_.is_smooth(); ++rank)
                arrange(task_.n_channels(), task_.n_sens(rank + 1), n_in,
                        parameters_ + r.tensor_weight[rank], prepared_[layer].tensor_weights[rank]);
            // exp(-x^2/2) = 2^-(k x)^2 with k^2 = log2(e) / 2
            const double k = 0.8493218002880190428, ln2 = 0.6931471805599453094;
            const Radial<T> &radial = prepared_[layer].radial;
            for (int n = 0; n < n_sens && !radial.chebyshev(); ++n) {
                const double a = k * double(parameters_[r.sigma + n]);
                radial.a[n] = T(a);
                radial.b[n] = T(a / double(parameters_[r.mu + n]));
                radial.slope[n] = T(-2.0 * ln2 * a);
            }
            // The last ones of a row are read as whole vectors, and ghosts' rows come from outside.
            T *ghosts = prepared_[layer].features + task_.pairs.n_local * sizes_.ld_features;
            if (layer + 1 < sizes_.n_layers)
                clear(size_t(task_.pairs.n_atoms - task_.pairs.n_local) * sizes_.ld_features, ghosts);
        }
    }

    // Atoms first to first + n - 1, B at most; energies and features are written the first time only.
    void forward(Part<T> &s, int layer, int64_t first, int n, bool first_time) const {
        if (first_time && layer == 0) write_first_term(first, n);
        const int k_env = sizes_.n_sens * block_of(layer).n_in;
        if (n < B) clear<T>(size_t(k_env) * M * B, s.block.environment);
        if (layer == 0)
            one_hot_environment(s, first, n, first_time);
        else
            dense_environment(s, layer, first, n);
        const ResidualLayout *r = block_of(layer).residuals;
        input_features(s, layer, first, n);
        // Pre-activation: self-interaction, scalar part, and norms or smooth invariants.
        self_interaction(s, layer, first, n, s.block.inner);
        if (task_.is_smooth())
            add_invariants(s, layer);
        else if constexpr (M <= 9) {
            gemm<T, Order::rows>(n_features(), M * B, k_env, prepared_[layer].weights, k_env,
                                 s.block.environment, M * B, s.block.tensor, M * B);
            add_norms<T, M>(n_features(), s.block.tensor, scale(*r, 0), scale(*r, 1),
                            T(task_.model.cusp_reg), s.block.inner);
        }
        const size_t size = size_t(n_features()) * B, slot = sizes_.widest * B;
        T *x = s.block.features + slot;  // output of the interaction layer
        same_features(s, layer, first, n, x);
        residual(s, 0, r->res_weight, r->res_bias, x);
        for (int a = 0; a < sizes_.n_atom_layers; ++a) {
            ++r;
            gemm<T, Order::rows>(n_features(), B, n_features(), parameters_ + r->weight,
                                 n_features(), x, B, s.block.inner, B, Start::bias,
                                 parameters_ + r->bias);
            T *next = x + slot;
            copy(int(size), x, next);
            x = next;
            residual(s, a + 1, r->res_weight, r->res_bias, x);
        }
        if (first_time) write_term(layer, first, n, x);
        if (first_time && layer + 1 < sizes_.n_layers)
            for (int b = 0; b < n; ++b) {
                const int ld = sizes_.ld_features;
                T *row = prepared_[layer].features + (first + b) * ld;
                for (int f = 0; f < n_features(); ++f) row[f] = x[f * B + b];
                for (int f = n_features(); f < ld; ++f) row[f] = T(0);
            }
    }

    // After `forward` of the same atoms; `above` holds the cotangents of the layer's features.
    void backward(Part<T> &s, int layer, int64_t first, int n, const T *above) const {
        const BlockLayout &block = block_of(layer);
        const ResidualLayout *r = block.residuals + sizes_.n_atom_layers;
        const ParameterSums<T> &sums = s.parameters;
        const typename ParameterSums<T>::Residual *residuals = sums ? sums.block(layer) : nullptr;
        const size_t slot = sizes_.widest * B;
        energy_backward(s, layer, first, n, above);
        for (int k = sizes_.n_atom_layers; k > 0; --k, --r) {
            residual_backward(s, k, *r, residuals);
            if (residuals) {
                residuals[k].weight.add_outer(B, s.block.inner, s.block.features + k * slot,
                                              sums.transposed);
                add_rows<T>(sums.flat, r->bias, n_features(), s.block.inner);
            }
            gemm<T, Order::columns>(n_features(), B, n_features(), parameters_ + r->weight,
                                    n_features(), s.block.inner, B, s.block.cotangent, B, Start::keep);
        }
        residual_backward(s, 0, *r, residuals);
        if (task_.is_smooth())
            invariants_backward(s, layer);
        else if constexpr (M <= 9)
            norms_backward<T, M>(n_features(), s.block.inner, scale(*r, 0), scale(*r, 1),
                                 T(task_.model.cusp_reg), s.block.tensor,
                                 residuals ? s.block.norms.data : nullptr);
        const int k_env = sizes_.n_sens * block.n_in;
        if (residuals) interaction_gradients(s, layer, first, n);
        if (layer > 0) features_backward(s, layer, first, n);
        const bool moving = residuals && !task_.is_smooth();
        if (layer == 0 && !sink_.wants_pairs() && !moving) return;
        // The environment gives way to its cotangent.
        if (task_.is_smooth())
            environment_backward(s, layer);
        else
            gemm<T, Order::columns>(k_env, M * B, n_features(), prepared_[layer].weights, k_env,
                                    s.block.tensor, M * B, s.block.environment, M * B);
        T *moments = moving ? sums.moments_of(layer, sizes_.n_sens) : nullptr;
        for (int b = 0; b < n && layer == sizes_.n_layers - 1; ++b) sink_.start_gradient(first + b);
        if (layer == 0)
            one_hot_backward(s, first, n, moments);
        else
            for (int b = 0; b < n; ++b) dense_backward(s, layer, first + b, b, moments);
    }

  private:
    static constexpr int B = block_atoms;
    static constexpr int L = lanes<T>;

    const Task &task_;
    const Sizes<T> sizes_;
    const T *parameters_;
    const Ranks ranks_;
    PairSource<T> source_;
    Sink<T> sink_;
    Span<Prepared<T>> prepared_;

    int n_features() const { return sizes_.n_features; }
    const BlockLayout &block_of(int layer) const { return task_.layout.blocks[layer]; }
    const T *scale(const ResidualLayout &r, int rank) const {
        return r.scale[rank] >= 0 ? parameters_ + r.scale[rank] : nullptr;
    }

    // The arrays that the atom's packed pairs are about to fill, `at` and `label` on, are used before.
    void add_prior(Part<T> &s, const Row<T> &row, int64_t i, ptrdiff_t at, int label) const {
        const double cutoff = sink_.prior()->cutoff;
        int32_t *near = s.fields.label + label;
        const int n = source_.find_within(row, T(cutoff * cutoff * 1.0001), s.pairs.packed, at, near);
        if (n > 0) sink_.add_prior(i, near, n, s.sums);
    }

    // int_weights (n_sens, n_out, n_in) as (n_out, n_sens * n_in).
    static void arrange(int n_out, int n_sens, int n_in, const T *from, T *to) {
        for (int n = 0; n < n_sens; ++n)
            for (int f = 0; f < n_out; ++f)
                for (int i = 0; i < n_in; ++i)
                    to[(int64_t(f) * n_sens + n) * n_in + i] = from[(int64_t(n) * n_out + f) * n_in + i];
    }

    // -- smooth invariants ---------------------------------------------------------------------

    // work(rank, first component, number of them) for the ranks 1 to l_max.
    template <class F>
    void for_ranks(F &&work) const {
        for (int rank = 1; rank <= task_.model.l_max; ++rank) work(rank, rank * rank, 2 * rank + 1);
    }

    // Sums over neighbors of a component of a rank.
    int n_sums(int layer, int rank) const { return task_.n_sens(rank) * block_of(layer).n_in; }

    void add_invariants(Part<T> &s, int layer) const {
        const BlockScratch<T> &x = s.block;
        const int n_channels = task_.n_channels(), n_invariants = task_.n_invariants();
        const int k_env = n_sums(layer, 0);
        gemm<T, Order::rows>(n_features(), B, k_env, prepared_[layer].weights, k_env, x.environment,
                             M * B, x.inner, B, Start::keep);
        for_ranks([&](int rank, int m, int n) {
            const int k = n_sums(layer, rank);
            gemm<T, Order::rows>(n_channels, n * B, k, prepared_[layer].tensor_weights[rank - 1], k,
                                 x.environment + m * B, M * B, x.tensor + m * B, M * B);
        });
        smooth_invariants<T, M>(n_channels, x.tensor, x.norms);
        triples<T, M>(task_.n_triples(), x.tensor, x.norms + task_.model.l_max * n_channels * B);
        gemm<T, Order::rows>(n_features(), B, n_invariants,
                             parameters_ + block_of(layer).residuals[0].mixing, n_invariants, x.norms, B,
                             x.inner, B, Start::keep);
    }

    // Tensors give way to their cotangents.
    void invariants_backward(Part<T> &s, int layer) const {
        const BlockScratch<T> &x = s.block;
        const int n_invariants = task_.n_invariants();
        gemm<T, Order::columns>(n_invariants, B, n_features(),
                                parameters_ + block_of(layer).residuals[0].mixing, n_invariants, x.inner,
                                B, x.by_invariants, B);
        const int n_triples = task_.n_triples(), squares = task_.model.l_max * task_.n_channels() * B;
        triples_backward<T, M>(n_triples, x.by_invariants + squares, x.norms + squares, x.tensor,
                               x.by_triples);
        smooth_invariants_backward<T, M>(task_.n_channels(), x.by_invariants, x.norms, x.tensor);
        if constexpr (M >= 9)
            for (int f = 0; f < n_triples; ++f)
                add((M - 1) * B, x.tensor + (f * M + 1) * B, x.by_triples + (f * M + 1) * B);
    }

    void environment_backward(Part<T> &s, int layer) const {
        const BlockScratch<T> &x = s.block;
        const int k_env = n_sums(layer, 0);
        gemm<T, Order::columns>(k_env, B, n_features(), prepared_[layer].weights, k_env, x.inner, B,
                                x.environment, M * B);
        for_ranks([&](int rank, int m, int n) {
            const int k = n_sums(layer, rank);
            gemm<T, Order::columns>(k, n * B, task_.n_channels(),
                                    prepared_[layer].tensor_weights[rank - 1], k, x.tensor + m * B,
                                    M * B, x.environment + m * B, M * B);
        });
    }

    // -- forward -------------------------------------------------------------------------------

    // work(first vector, number of them) for parts of about the same size, in whole tiles if it can be;
    // once without vectors, too.
    template <class F>
    static void in_chunks(int n_vectors, F &&work) {
        constexpr int most = chunk_vectors(M);
        int parts = (n_vectors + most - 1) / most, first = 0;
        do {
            const int rest = n_vectors - first, share = parts > 0 ? (rest + parts - 1) / parts : 0;
            const int whole = (share + lane_columns - 1) / lane_columns * lane_columns;
            const int size = whole < rest ? whole : rest;
            work(first, size);
            first += size;
        } while (--parts > 0);
    }

    // Lanes are atoms, so that sums over pairs take no sums over lanes.
    void one_hot_environment(Part<T> &s, int64_t first, int n, bool first_time) const {
        const int n_s = sizes_.n_species, n_sens = sizes_.n_sens, ld = sizes_.row();
        const Radial<T> &radial = prepared_[0].radial;
        int offset = 0, label = 0;
        for (int b = 0, r = 0; b < n; b += L) {
            const int n_atoms = n - b < L ? n - b : L;
            for (int z = 0; z < n_s; ++z, ++r) {
                Run &run = s.runs[r];
                OwnPairs *own = s.own + r * L;
                run = {offset, 0};
                for (int a = 0; a < L; ++a) {
                    own[a] = {label, 0};
                    if (a >= n_atoms) continue;
                    Row<T> &row = s.rows[n_s > 1 ? a : 0];  // kept for the other species
                    if (z == 0) source_.load(first + b + a, row);
                    if (z == 0 && first_time && sink_.prior()) add_prior(s, row, first + b + a, a * ld, label);
                    source_.pack(row, z, s.pairs.packed, a * ld, s.fields.label + label, own[a]);
                    label += own[a].n;
                }
                source_.interleave(s.pairs.packed, ld, own, s.fields, run);
                offset += run.n_vectors * L;
                T *const g = s.sensitivities_of(run, n_sens), *const t = s.pairs.components;
                sensitivities<T>(s.fields, run, radial, g);
                in_chunks(run.n_vectors, [&](int v, int n_v) {
                    components_of<T, M>(s.fields, run.first + v * L, n_v, radial, t);
                    for (const Ranks::Part &p : ranks_.used)
                        lane_product<T>(p.n_m, p.n_n, n_v, {t + p.m * L, L, M * L},
                                        {g + (v * n_sens + p.n) * L, L, n_sens * L},
                                        s.pairs.sums + (p.n * M + p.m) * L, L, M * L, v > 0);
                });
                T *out = s.block.environment + z * M * B + b;
                for (int k = 0; k < n_sens; ++k)
                    for (int m = 0, used = ranks_.components_of(k); m < used; ++m)
                        store(out + (k * n_s * M + m) * B, load(s.pairs.sums + (k * M + m) * L));
            }
        }
    }

    // Features of an atom's neighbors, and what is multiplied with them, in the order of its pairs.
    void gather(Part<T> &s, int layer, int64_t i, const Run &run, int n_pairs) const {
        const int ld = sizes_.ld_features;
        const T *features = prepared_[layer - 1].features;
        for (int p = 0; p < run.n_vectors * L; ++p) {
            if (p < n_pairs)
                copy(ld, features + neighbor_of(s, i, run.first + p) * ld, s.pairs.near + p * ld);
            else
                clear(ld, s.pairs.near + p * ld);
        }
        components_of<T, M>(s.fields, run.first, run.n_vectors, prepared_[layer].radial,
                            s.pairs.components);
        spell_out<T, M>(run.n_vectors, sizes_.n_sens, s.sensitivities_of(run, sizes_.n_sens),
                        s.pairs.components, s.pairs.spelled, sizes_.row());
    }

    int64_t neighbor_of(const Part<T> &s, int64_t i, int k) const {
        return source_.neighbor_of(i, s.fields.label[k]);
    }

    void dense_environment(Part<T> &s, int layer, int64_t first, int n) const {
        const int ld = sizes_.ld_features, n_sens = sizes_.n_sens, pairs = sizes_.row();
        for (int b = 0, offset = 0; b < n; ++b) {
            Run &run = s.runs[b];
            run.first = offset;
            source_.load(first + b, s.rows[0]);
            source_.select(s.rows[0], s.fields, run, s.own[b]);
            offset += run.n_vectors * L;
            sensitivities<T>(s.fields, run, prepared_[layer].radial, s.sensitivities_of(run, n_sens));
            gather(s, layer, first + b, run, s.own[b].n);
            gemm<T, Order::rows>(n_sens * M, ld, run.n_vectors * L, s.pairs.spelled, pairs,
                                 s.pairs.near, ld, s.pairs.environment, ld);
            for (int k = 0; k < n_sens; ++k)
                for (int m = 0; m < M; ++m)
                    for (int f = 0; f < n_features(); ++f)
                        s.block.environment[((k * n_features() + f) * M + m) * B + b] =
                            s.pairs.environment[(k * M + m) * ld + f];
        }
    }

    // Dense input features of a block to the first slot of `features`, as (feature, atom).
    void input_features(Part<T> &s, int layer, int64_t first, int n) const {
        if (layer == 0) return;
        if (n < B) clear<T>(size_t(n_features()) * B, s.block.features);
        for (int b = 0; b < n; ++b) {
            const T *row = prepared_[layer - 1].features + (first + b) * sizes_.ld_features;
            for (int f = 0; f < n_features(); ++f) s.block.features[f * B + b] = row[f];
        }
    }

    // out[b] = base + table[species of atom b]
    void pick(const T *table, T base, int64_t first, int n, T *out) const {
        if (sizes_.n_species == 1) {
            for (int b = 0; b < B; b += L) store(out + b, broadcast(base + table[0]));
            return;
        }
        for (int b = 0; b < B; ++b)
            out[b] = b < n ? base + table[task_.pairs.species[first + b]] : T(0);
    }

    void self_interaction(Part<T> &s, int layer, int64_t first, int n, T *out) const {
        const ResidualLayout &r = block_of(layer).residuals[0];
        if (layer > 0) {
            gemm<T, Order::rows>(n_features(), B, n_features(), parameters_ + r.self_weight,
                                 n_features(), s.block.features, B, out, B, Start::bias,
                                 parameters_ + r.bias);
            return;
        }
        const int n_in = sizes_.n_species;
        for (int f = 0; f < n_features(); ++f) {
            const T bias = parameters_[r.bias + f];
            pick(parameters_ + r.self_weight + f * n_in, bias, first, n, out + f * B);
        }
    }

    // What the interaction layer's input contributes to its output directly.
    void same_features(Part<T> &s, int layer, int64_t first, int n, T *out) const {
        const int64_t adjust = block_of(layer).residuals[0].adjust;
        if (layer > 0) {  // n_in equals n_features: there is no adjust
            copy<T>(n_features() * B, s.block.features, out);
            return;
        }
        const int n_in = sizes_.n_species;
        for (int f = 0; f < n_features(); ++f) {
            if (adjust >= 0)
                pick(parameters_ + adjust + f * n_in, T(0), first, n, out + f * B);
            else
                for (int b = 0; b < B; ++b)
                    out[f * B + b] = b < n ? T(task_.pairs.species[first + b] == f) : T(0);
        }
    }

    // x += W softplus(inner) + bias, keeping softplus and its derivative for the way back.
    void residual(Part<T> &s, int k, int64_t weight, int64_t bias, T *x) const {
        const size_t size = size_t(n_features()) * B;
        T *value = s.block.value + k * size;
        softplus_all<T>(int(size), s.block.inner, value, s.block.derivative + k * size);
        gemm<T, Order::rows>(n_features(), B, n_features(), parameters_ + weight, n_features(),
                             value, B, s.block.inner, B, Start::bias, parameters_ + bias);
        add<T>(int(size), x, s.block.inner);
    }

    void write_first_term(int64_t first, int n) const {
        for (int64_t i = first; i < first + n; ++i)
            sink_.set_term(i, 0, double(parameters_[task_.layout.e0 + task_.pairs.species[i]]));
    }

    void write_term(int layer, int64_t first, int n, const T *x) const {
        const T *w = parameters_ + block_of(layer).energy_weight;
        alignas(64) T sum[B];
        for (int b = 0; b < B; b += L) {
            Vector<T> v = broadcast(parameters_[block_of(layer).energy_bias]);
            for (int f = 0; f < n_features(); ++f) v += w[f] * load(x + f * B + b);
            store(sum + b, v);
        }
        for (int b = 0; b < n; ++b) sink_.set_term(first + b, layer + 1, double(sum[b]));
    }

    // -- backward ------------------------------------------------------------------------------

    // Cotangent of the block's output features: from the energy, and from the layers above.
    void energy_backward(Part<T> &s, int layer, int64_t first, int n, const T *above) const {
        const BlockLayout &block = block_of(layer);
        const BlockScratch<T> &x = s.block;
        double total = 0.0;
        for (int b = 0; b < B; ++b) {
            const double w = b < n ? sink_.weight(first + b, layer + 1) : 0.0;
            x.weights[b] = T(w);
            total += w;
        }
        const T *w = parameters_ + block.energy_weight;
        for (int f = 0; f < n_features(); ++f)
            for (int b = 0; b < B; b += L)
                store(x.cotangent + f * B + b, w[f] * load(x.weights + b));
        if (layer + 1 < sizes_.n_layers)
            for (int b = 0; b < n; ++b)
                for (int f = 0; f < n_features(); ++f)
                    x.cotangent[f * B + b] += above[(first + b) * sizes_.ld_features + f];
        if (!s.parameters) return;
        double *flat = s.parameters.flat;
        if (layer == sizes_.n_layers - 1)
            for (int b = 0; b < n; ++b)
                flat[task_.layout.e0 + task_.pairs.species[first + b]] += sink_.weight(first + b, 0);
        flat[block.energy_bias] += total;
        const T *last = x.features + (sizes_.n_atom_layers + 1) * sizes_.widest * B;
        for (int f = 0; f < n_features(); ++f)
            add_rows<T>(flat, block.energy_weight + f, 1, last + f * B, x.weights);
    }

    // inner = cotangent of the activation's argument in residual layer k.
    void residual_backward(Part<T> &s, int k, const ResidualLayout &r,
                           const typename ParameterSums<T>::Residual *residuals) const {
        const size_t size = size_t(n_features()) * B;
        const BlockScratch<T> &x = s.block;
        if (residuals) {
            residuals[k].res_weight.add_outer(B, x.cotangent, x.value + k * size,
                                              s.parameters.transposed);
            add_rows<T>(s.parameters.flat, r.res_bias, n_features(), x.cotangent);
        }
        gemm<T, Order::columns>(n_features(), B, n_features(), parameters_ + r.res_weight,
                                n_features(), x.cotangent, B, x.inner, B);
        multiply<T>(int(size), x.inner, x.derivative + k * size);
    }

    void interaction_gradients(Part<T> &s, int layer, int64_t first, int n) const {
        const ResidualLayout &r = block_of(layer).residuals[0];
        const ParameterSums<T> &sums = s.parameters;
        const BlockScratch<T> &x = s.block;
        const typename ParameterSums<T>::Layer &own = sums.layers[layer];
        add_rows<T>(sums.flat, r.bias, n_features(), x.inner);
        if (task_.is_smooth()) {
            sums.block(layer)[0].weight.add_outer(B, x.inner, B, x.environment, M * B, sums.transposed);
            for_ranks([&](int rank, int m, int n_m) {
                own.tensor[rank - 1].add_outer(n_m * B, x.tensor + m * B, M * B, x.environment + m * B,
                                               M * B, sums.transposed);
            });
            own.mixing.add_outer(B, x.inner, x.norms, sums.transposed);
        } else {
            sums.block(layer)[0].weight.add_outer(M * B, x.tensor, x.environment, sums.transposed);
            for (int rank = 0; rank < task_.model.l_max; ++rank)
                add_rows<T>(sums.flat, r.scale[rank], n_features(), x.inner,
                            x.norms + size_t(rank) * n_features() * B);
        }
        if (layer > 0) {
            own.self.add_outer(B, x.inner, x.features, sums.transposed);
            return;
        }
        const int n_in = sizes_.n_species;
        for (int f = 0; f < n_features(); ++f)
            for (int b = 0; b < n; ++b) {
                const int z = task_.pairs.species[first + b];
                sums.flat[r.self_weight + f * n_in + z] += double(x.inner[f * B + b]);
                if (r.adjust >= 0)
                    sums.flat[r.adjust + f * n_in + z] += double(x.cotangent[f * B + b]);
            }
    }

    // What reaches an atom's own input features, of self-interaction and the residual's identity.
    void features_backward(Part<T> &s, int layer, int64_t first, int n) const {
        const ResidualLayout &r = block_of(layer).residuals[0];
        gemm<T, Order::columns>(n_features(), B, n_features(), parameters_ + r.self_weight,
                                n_features(), s.block.inner, B, s.block.cotangent, B, Start::keep);
        T *below = s.feature_cotangent[(layer - 1) & 1];
        for (int b = 0; b < n; ++b)
            for (int f = 0; f < n_features(); ++f)
                below[(first + b) * sizes_.ld_features + f] += s.block.cotangent[f * B + b];
    }

    void one_hot_backward(Part<T> &s, int64_t first, int n, T *moments) const {
        const int n_s = sizes_.n_species;
        const PairScratch<T> &x = s.pairs;
        const Radial<T> &radial = prepared_[0].radial;
        T *const by_pair[3] = {x.by_pair[0], x.by_pair[1], x.by_pair[2]};
        for (int b = 0, r = 0; b < n; b += L) {
            const int n_atoms = n - b < L ? n - b : L;
            for (int z = 0; z < n_s; ++z, ++r) {
                const Run &run = s.runs[r];
                const T *g = s.sensitivities_of(run, sizes_.n_sens);
                const Cotangent<T> by_sum{x.sums, M * L, L, 0};
                const T *in = s.block.environment + z * M * B + b;
                for (int k = 0; k < sizes_.n_sens; ++k) {
                    const int used = ranks_.components_of(k);
                    for (int m = 0; m < M; ++m)
                        store(x.sums + (k * M + m) * L,
                              m < used ? load(in + (k * n_s * M + m) * B) : Vector<T>{});
                }
                if (radial.chebyshev())
                    in_chunks(run.n_vectors, [&](int v, int n_v) {
                        T *const at[3] = {by_pair[0] + v * L, by_pair[1] + v * L, by_pair[2] + v * L};
                        const int k = run.first + v * L;
                        components_of<T, M>(s.fields, k, n_v, radial, x.components);
                        chebyshev_backward<T, M>(s.fields, k, n_v, radial, ranks_,
                                                 g + v * sizes_.n_sens * L, x.components, by_sum,
                                                 x.by_component, x.by_function, at);
                    });
                else if constexpr (M <= 9)
                    backward_run<T, M>(s.fields, run, radial, g, by_sum, moments, by_pair);
                if (!sink_.wants_pairs()) continue;
                sink_.add_virial(s.fields, run, by_pair, s.sums);
                for (int a = 0; a < n_atoms; ++a)
                    sink_.share_virial(first + b + a, s.own[r * L + a], s.fields, run, a, L, by_pair,
                                       s.sums);
                sink_.deliver_lanes(first + b, n_atoms, s.own + r * L, s.fields.label, by_pair, s.sums);
            }
        }
    }

    void dense_backward(Part<T> &s, int layer, int64_t i, int b, T *moments) const {
        const Run &run = s.runs[b];
        const int n_own = s.own[b].n;
        const PairScratch<T> &x = s.pairs;
        const int ld = sizes_.ld_features, n_pairs = run.n_vectors * L, n_sens = sizes_.n_sens;
        const ptrdiff_t stride = sizes_.row();
        gather(s, layer, i, run, n_own);
        for (int n = 0; n < n_sens; ++n)
            for (int m = 0; m < M; ++m) {
                T *row = x.environment + (n * M + m) * ld;
                if (m >= ranks_.components_of(n)) {
                    clear(ld, row);
                    continue;
                }
                for (int f = 0; f < n_features(); ++f)
                    row[f] = s.block.environment[((n * n_features() + f) * M + m) * B + b];
                for (int f = n_features(); f < ld; ++f) row[f] = T(0);
            }
        gemm<T, Order::columns>(n_pairs, ld, n_sens * M, x.spelled, stride, x.environment, ld,
                                x.by_near, ld);
        T *below = s.feature_cotangent[(layer - 1) & 1];
        for (int p = 0; p < n_own; ++p)
            add(ld, below + neighbor_of(s, i, run.first + p) * ld, x.by_near + p * ld);
        if (!sink_.wants_pairs() && !moments) return;
        transpose<T>(n_pairs, n_features(), x.near, ld, x.near_columns, stride);
        gemm<T, Order::rows>(n_sens * M, n_pairs, n_features(), x.environment, ld, x.near_columns,
                             stride, x.by_spelled, stride);
        T *const by_pair[3] = {x.by_pair[0], x.by_pair[1], x.by_pair[2]};
        const Radial<T> &radial = prepared_[layer].radial;
        const T *g = s.sensitivities_of(run, n_sens);
        Cotangent<T> by_sum{x.by_spelled, M * stride, stride, L};
        if (radial.chebyshev())
            for (int v = 0; v < run.n_vectors; ++v, by_sum.data += L) {
                T *const at[3] = {by_pair[0] + v * L, by_pair[1] + v * L, by_pair[2] + v * L};
                chebyshev_backward<T, M>(s.fields, run.first + v * L, 1, radial, ranks_,
                                         g + v * n_sens * L, x.components + v * M * L, by_sum,
                                         x.by_component, x.by_function, at);
            }
        else if constexpr (M <= 9)
            backward_run<T, M>(s.fields, run, radial, g, by_sum, moments, by_pair);
        if (!sink_.wants_pairs()) return;
        sink_.add_virial(s.fields, run, by_pair, s.sums);
        sink_.share_virial(i, s.own[b], s.fields, run, 0, 1, by_pair, s.sums);
        sink_.deliver(i, s.own[b], s.fields.label, by_pair, 1, s.sums);
    }
};

}  // namespace
}  // namespace potstill::POTSTILL_ISA
