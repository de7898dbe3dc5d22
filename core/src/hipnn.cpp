// HIP-NN-TS, whole models: partial energies, gradients by pair vectors and by every parameter.
//
// Atoms are processed in blocks. Per block: fields of its pairs (unit vectors, cutoff function),
// the environments (sums over neighbors of sensitivity x tensor component x feature), then all
// layers on atoms as matrix products, then the same backward. Sensitivities are evaluated again
// on the way back, so nothing of the size of pairs x channels leaves the cache.
//
// With several interaction layers the features of all atoms are kept between them, and the way back
// repeats each layer's forward step. Every part of the atoms has its own sums, added up in the
// order of the parts: results depend on the number of threads, never on their timing.

#include "network.h"
#include "pairs.h"
#include "peak.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace potstill::POTSTILL_ISA {
namespace {

typedef double Double4 __attribute__((vector_size(32)));

// Four numbers for every atom: positions and forces of a pair are one load or store.
struct alignas(32) Quad {
    double x[4];
};
POTSTILL_INLINE Double4 load_quad(const Quad *q) { return *reinterpret_cast<const Double4 *>(q); }
POTSTILL_INLINE void store_quad(Quad *q, Double4 v) { *reinterpret_cast<Double4 *>(q) = v; }

// Four vectors of four lanes, and their transpose.
template <class T>
struct Four;
template <>
struct Four<float> {
    typedef float type __attribute__((vector_size(16)));
};
template <>
struct Four<double> {
    typedef double type __attribute__((vector_size(32)));
};
template <class T>
POTSTILL_INLINE void transpose_four(typename Four<T>::type &a, typename Four<T>::type &b,
                                    typename Four<T>::type &c, typename Four<T>::type &d) {
    const auto ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const auto ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const auto cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const auto cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}
template <class T>
POTSTILL_INLINE typename Four<T>::type load_four(const T *p) {
    typename Four<T>::type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
POTSTILL_INLINE void store_four(T *p, typename Four<T>::type v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class F>
void for_parts(int n_parts, F &&work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(n_parts) if (n_parts > 1)
    {
        FlushSubnormals flush;
        for (int part = omp_get_thread_num(); part < n_parts; part += omp_get_num_threads())
            work(part);
    }
#else
    FlushSubnormals flush;
    for (int part = 0; part < n_parts; ++part) work(part);
#endif
}

// Parameters of an interaction layer as the kernels want them.
template <class T>
struct Prepared {
    T *weights;  // (n_features, n_sensitivities * n_in)
    Radial<T> radial;
};

// What one part of the atoms works in.
template <class T>
struct Scratch {
    PairFields<T> fields;
    Run *runs;                 // (block_atoms, n_runs)
    T *raw[3], *raw_species;   // pairs of one atom before compression
    int32_t *labels;           // of the last atoms of the list
    T *weighted;               // (M, pairs of one atom)
    T *pair_gradient[3];       // pairs of one atom
    T *atom_environment;       // (n_sens, n_in, M) or (n_sens, M, padded n_in) of one atom
    T *environment;            // (n_sens * n_in, M, B)
    T *tensor;                 // (n_features, M, B), later its cotangent
    T *norms;                  // (2, n_features, B)
    T *features;               // (n_atom_layers + 2, max(n_in, n_features), B): inputs of the layers
    T *value, *derivative;     // (n_atom_layers + 1, n_features, B): softplus and its derivative
    T *cotangent, *inner;      // (max(n_in, n_features), B)
    T *weights;                // (B): of this block's energy term
    T *transposed;
    // Dense features only:
    T *near, *near_columns;    // (pairs, padded n_features) and its transpose
    T *spelled, *by_spelled;   // (n_sens * M, pairs)
    T *by_near;                // (pairs, padded n_features)
    // Gradients of parameters:
    MatrixGradient<T> *matrices;
    T *moments;                // (n_interaction_layers, n_sens, 2, L)
    double *flat;              // (n_parameters)
    T *virial;                 // (9, L)
    double virial_sum[9];
    Quad *forces;              // (n_atoms)
    T *feature_cotangent[2];   // (n_local, padded n_features) of this layer's output and input
    bool indices_fit;
};

// One call: a model with M tensor components, over all atoms.
template <class T, int M>
class Driver {
  public:
    explicit Driver(const Task &task)
        : task_(task),
          model_(*task.model),
          layout_(*task.layout),
          parameters_(static_cast<const T *>(task.parameters)),
          pairs_(*task.pairs),
          n_layers_(model_.n_interaction_layers),
          n_sens_(model_.n_sensitivities),
          n_features_(model_.n_features),
          n_parts_(task.n_threads) {
        want_parameters_ = task.pass && task.pass->parameter_gradient;
        want_pairs_ = task.pass ? task.pass->gradient != nullptr : task.md->forces != nullptr;
        want_virial_ = task.md && task.md->virial;
    }

    int run() {
        max_row_ = 0;
        for (int64_t i = 0; i < pairs_.n_local; ++i) {
            const int64_t n = pairs_.row_ptr[i + 1] - pairs_.row_ptr[i];
            if (n > max_row_) max_row_ = static_cast<int>(n);
        }
        Carver measure(nullptr);
        carve(measure);
        if (!arena_reserve(task_.arena, measure.used())) return -1;
        Carver assign(task_.arena->data);
        carve(assign);
        prepare();
        const bool backward = want_parameters_ || want_pairs_;
        for_parts(n_parts_, [&](int part) { start_part(part); });
        for (int part = 0; part < n_parts_; ++part)
            if (!scratch_[part].indices_fit) return -2;
        for (int layer = 0; layer < n_layers_; ++layer) {
            const bool turn = backward && layer == n_layers_ - 1;
            for_parts(n_parts_, [&](int part) { sweep(part, layer, true, turn); });
        }
        if (backward)
            for (int layer = n_layers_ - 2; layer >= 0; --layer) {
                for_parts(n_parts_, [&](int part) { gather_cotangents(part, layer); });
                for_parts(n_parts_, [&](int part) { sweep(part, layer, false, true); });
            }
        for_parts(n_parts_, [&](int part) { finish_part(part); });
        finish();
        return 0;
    }

  private:
    static constexpr int B = block_atoms;
    static constexpr int L = lanes<T>;

    const Task &task_;
    const potstill_hipnn &model_;
    const Layout &layout_;
    const T *parameters_;
    const potstill_pairs &pairs_;
    const int n_layers_, n_sens_, n_features_, n_parts_;
    bool want_parameters_, want_pairs_, want_virial_;
    int max_row_ = 0;
    Prepared<T> *prepared_ = nullptr;
    Scratch<T> *scratch_ = nullptr;
    Quad *positions_ = nullptr, *offsets_ = nullptr;
    int32_t *counting_ = nullptr;  // 0, 1, 2, ...
    T **features_ = nullptr;  // per layer but the last: (n_local, padded n_features)

    // -- memory --------------------------------------------------------------------------------

    int n_runs(int layer) const { return layer == 0 ? model_.n_species : 1; }
    int ld_features() const { return padded<T>(n_features_); }

    void carve(Carver &c) {
        prepared_ = c.take<Prepared<T>>(n_layers_);
        scratch_ = c.take<Scratch<T>>(n_parts_);
        features_ = c.take<T *>(n_layers_);
        for (int layer = 0; layer < n_layers_; ++layer) {
            Prepared<T> p;
            p.weights = c.take<T>(size_t(n_features_) * n_sens_ * layout_.blocks[layer].n_in);
            T *a = c.take<T>(n_sens_), *b = c.take<T>(n_sens_), *slope = c.take<T>(n_sens_);
            p.radial = {n_sens_, a, b, slope};
            T *features = layer + 1 < n_layers_ ? c.take<T>(pairs_.n_local * ld_features()) : nullptr;
            if (prepared_) prepared_[layer] = p, features_[layer] = features;
        }
        counting_ = c.take<int32_t>(max_row_ + 32);
        if (task_.md) {
            positions_ = c.take<Quad>(pairs_.n_atoms);
            offsets_ = c.take<Quad>(task_.md->n_images);
        }
        for (int part = 0; part < n_parts_; ++part) {
            Scratch<T> s = carve_part(c);
            if (scratch_) scratch_[part] = s;
        }
    }

    Scratch<T> carve_part(Carver &c) {
        Scratch<T> s{};
        const int species = model_.n_species, row = padded<T>(max_row_) + L;
        const size_t wide = species > n_features_ ? species : n_features_;
        const size_t block_pairs = size_t(B) * (row + species * L);
        T **const fields[] = {&s.fields.unit[0], &s.fields.unit[1], &s.fields.unit[2], &s.fields.r,
                              &s.fields.inverse_r, &s.fields.envelope, &s.fields.slope};
        for (T **field : fields) *field = c.take<T>(block_pairs + L);
        s.fields.label = c.take<int32_t>(block_pairs + 16);
        s.runs = c.take<Run>(size_t(B) * species);
        const size_t atom_pairs = row + size_t(species) * L;
        for (T *&raw : s.raw) raw = c.take<T>(row);
        s.raw_species = c.take<T>(row);
        s.labels = c.take<int32_t>(row + 16);
        s.weighted = c.take<T>(M * atom_pairs);
        for (T *&g : s.pair_gradient) g = c.take<T>(atom_pairs);
        size_t in_width = species, ld_in = species;
        if (n_layers_ > 1 && size_t(ld_features()) > ld_in) ld_in = ld_features();
        if (n_layers_ > 1 && size_t(n_features_) > in_width) in_width = n_features_;
        s.atom_environment = c.take<T>(n_sens_ * M * ld_in);
        s.environment = c.take<T>(n_sens_ * in_width * M * B);
        s.tensor = c.take<T>(size_t(n_features_) * M * B);
        s.norms = c.take<T>(size_t(2) * n_features_ * B);
        const int n_layers = model_.n_atom_layers + 1;
        s.features = c.take<T>((n_layers + 1) * wide * B);
        s.value = c.take<T>(size_t(n_layers) * n_features_ * B);
        s.derivative = c.take<T>(size_t(n_layers) * n_features_ * B);
        s.cotangent = c.take<T>(wide * B);
        s.inner = c.take<T>(wide * B);
        s.weights = c.take<T>(B);
        if (n_layers_ > 1) {
            s.near = c.take<T>(atom_pairs * ld_features());
            s.near_columns = c.take<T>(atom_pairs * n_features_);
            s.spelled = c.take<T>(n_sens_ * M * atom_pairs);
            s.by_spelled = c.take<T>(n_sens_ * M * atom_pairs);
            s.by_near = c.take<T>(atom_pairs * ld_features());
            for (T *&x : s.feature_cotangent) x = c.take<T>(pairs_.n_local * ld_features());
        }
        if (want_parameters_) carve_gradients(c, s, in_width);
        s.virial = c.take<T>(9 * L);
        if (task_.md && want_pairs_) s.forces = c.take<Quad>(pairs_.n_atoms);
        return s;
    }

    int matrices_per_layer() const { return 4 + 2 * model_.n_atom_layers; }

    // Matrices of a layer: int_weights, selfint, res_layer, adjust; then per atom layer both.
    void carve_gradients(Carver &c, Scratch<T> &s, size_t in_width) {
        s.matrices = c.take<MatrixGradient<T>>(size_t(n_layers_) * matrices_per_layer());
        int k = 0;
        auto matrix = [&](int64_t start, int n_columns, int n_in) {
            const int ld = padded<T>(n_columns);
            MatrixGradient<T> g{c.take<T>(size_t(n_features_) * ld), n_features_, n_columns, ld,
                                start, n_in};
            if (s.matrices) s.matrices[k] = g;
            ++k;
        };
        for (int layer = 0; layer < n_layers_; ++layer) {
            const int n_in = layout_.blocks[layer].n_in;
            const ResidualLayout *r = layout_.blocks[layer].residuals;
            matrix(r->weight, n_sens_ * n_in, n_in);
            matrix(r->self_weight, n_in, 0);
            matrix(r->res_weight, n_features_, 0);
            matrix(r->adjust, n_in, 0);
            for (int a = 0; a < model_.n_atom_layers; ++a) {
                ++r;
                matrix(r->weight, n_features_, 0);
                matrix(r->res_weight, n_features_, 0);
            }
        }
        s.moments = c.take<T>(size_t(n_layers_) * n_sens_ * 2 * L);
        s.flat = c.take<double>(layout_.n_parameters);
        size_t widest = size_t(padded<T>(n_features_)) * B;
        const size_t other = size_t(padded<T>(int(n_sens_ * in_width))) * M * B;
        s.transposed = c.take<T>(widest > other ? widest : other);
    }

    // -- before and after ----------------------------------------------------------------------

    void prepare() {
        for (int k = 0; k < max_row_ + 32; ++k) counting_[k] = k;
        for (int layer = 0; layer < n_layers_; ++layer) {
            const int n_in = layout_.blocks[layer].n_in;
            const ResidualLayout &r = layout_.blocks[layer].residuals[0];
            T *w = prepared_[layer].weights;
            for (int n = 0; n < n_sens_; ++n)
                for (int f = 0; f < n_features_; ++f)
                    for (int i = 0; i < n_in; ++i)
                        w[(int64_t(f) * n_sens_ + n) * n_in + i] =
                            parameters_[r.weight + (int64_t(n) * n_features_ + f) * n_in + i];
            // exp(-x^2/2) = 2^-(k x)^2 with k^2 = log2(e) / 2
            const double k = 0.8493218002880190428, ln2 = 0.6931471805599453094;
            const Radial<T> &radial = prepared_[layer].radial;
            for (int n = 0; n < n_sens_; ++n) {
                const double a = k * double(parameters_[r.sigma + n]);
                radial.a[n] = T(a);
                radial.b[n] = T(a / double(parameters_[r.mu + n]));
                radial.slope[n] = T(-2.0 * ln2 * a);
            }
        }
        if (task_.md)
            for (int64_t k = 0; k < task_.md->n_images; ++k)
                store_quad(offsets_ + k, vector_of(task_.md->offsets + 3 * k));
    }

    static POTSTILL_INLINE Double4 vector_of(const double *x) { return Double4{x[0], x[1], x[2], 0}; }

    // Whether the neighbors and images of a part are indices into their arrays.
    bool check_indices(int part) const {
        const int64_t first = pairs_.row_ptr[start_of(part)], last = pairs_.row_ptr[start_of(part + 1)];
        uint32_t neighbor = 0;
        for (int64_t k = first; k < last; ++k) {
            const uint32_t j = uint32_t(pairs_.neighbor[k]);
            neighbor = j > neighbor ? j : neighbor;
        }
        uint16_t image = 0;
        if (task_.md && task_.md->image)
            for (int64_t k = first; k < last; ++k)
                image = task_.md->image[k] > image ? task_.md->image[k] : image;
        return first == last || (int64_t(neighbor) < pairs_.n_atoms &&
                                 (!task_.md || !task_.md->image || image < task_.md->n_images));
    }

    void start_part(int part) {
        Scratch<T> &s = scratch_[part];
        s.indices_fit = pairs_.n_local == 0 || check_indices(part);
        for (double &v : s.virial_sum) v = 0.0;
        clear(9 * L, s.virial);
        if (task_.md) {
            const int64_t n = pairs_.n_atoms;
            const int64_t first = n * part / n_parts_, last = n * (part + 1) / n_parts_;
            for (int64_t i = first; i < last; ++i)
                store_quad(positions_ + i, vector_of(task_.md->positions + 3 * i));
            if (s.forces)
                for (int64_t i = 0; i < n; ++i) store_quad(s.forces + i, Double4{});
        }
        if (n_layers_ > 1)
            for (T *x : s.feature_cotangent) clear(size_t(pairs_.n_local) * ld_features(), x);
        if (want_parameters_) {
            for (int k = 0; k < n_layers_ * matrices_per_layer(); ++k)
                clear(size_t(s.matrices[k].n_rows) * s.matrices[k].ld, s.matrices[k].sums);
            clear(size_t(n_layers_) * n_sens_ * 2 * L, s.moments);
            clear(size_t(layout_.n_parameters), s.flat);
        }
    }

    void finish_part(int part) {
        if (task_.md && want_pairs_) {
            const int64_t n = pairs_.n_atoms;
            const int64_t first = n * part / n_parts_, last = n * (part + 1) / n_parts_;
            for (int64_t i = first; i < last; ++i) {
                Double4 sum{};
                for (int p = 0; p < n_parts_; ++p) sum += load_quad(scratch_[p].forces + i);
                for (int d = 0; d < 3; ++d) task_.md->forces[3 * i + d] = sum[d];
            }
        }
        if (want_parameters_) {
            const int64_t n = layout_.n_parameters;
            const int64_t first = n * part / n_parts_, last = n * (part + 1) / n_parts_;
            for (int64_t k = first; k < last; ++k) {
                double sum = 0.0;
                for (int p = 0; p < n_parts_; ++p) sum += scratch_[p].flat[k];
                task_.pass->parameter_gradient[k] = sum;
            }
        }
    }

    void finish() {
        if (!want_virial_) return;
        for (int k = 0; k < 9; ++k) {
            double sum = 0.0;
            for (int p = 0; p < n_parts_; ++p) sum += scratch_[p].virial_sum[k];
            task_.md->virial[k] = sum;
        }
    }

    // First atom of a part: parts hold about the same number of pairs and atoms.
    int64_t start_of(int part) const {
        if (part == n_parts_) return pairs_.n_local;
        const int64_t per_atom = 64;
        const int64_t total = pairs_.row_ptr[pairs_.n_local] + per_atom * pairs_.n_local;
        const int64_t wanted = total / n_parts_ * part;
        int64_t low = 0, high = pairs_.n_local;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (pairs_.row_ptr[middle] + per_atom * middle < wanted)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    // -- one layer over all atoms of a part ----------------------------------------------------

    void sweep(int part, int layer, bool first_time, bool backward) {
        Scratch<T> &s = scratch_[part];
        const int64_t first = start_of(part), last = start_of(part + 1);
        int since_flush = 0;
        for (int64_t i = first; i < last; i += B) {
            const int n = last - i < B ? int(last - i) : B;
            block_forward(s, layer, i, n, first_time);
            if (!backward) continue;
            block_backward(s, layer, i, n);
            if (want_virial_) flush_virial(s);
            if (want_parameters_ && ++since_flush == 8) flush_parameters(s, layer), since_flush = 0;
        }
        if (backward && want_parameters_) flush_parameters(s, layer);
    }

    void flush_virial(Scratch<T> &s) {
        for (int k = 0; k < 9; ++k) s.virial_sum[k] += double(sum_lanes<T>(load(s.virial + k * L)));
        clear(9 * L, s.virial);
    }

    void flush_parameters(Scratch<T> &s, int layer) {
        MatrixGradient<T> *matrices = s.matrices + layer * matrices_per_layer();
        for (int k = 0; k < matrices_per_layer(); ++k)
            if (used(layer, k)) flush(matrices[k], s.flat);
        const ResidualLayout &r = layout_.blocks[layer].residuals[0];
        const double ln2 = 0.6931471805599453094, k2 = 0.7213475204444817037;
        T *moments = s.moments + size_t(layer) * n_sens_ * 2 * L;
        for (int n = 0; n < n_sens_; ++n) {
            const double sigma = double(parameters_[r.sigma + n]), mu = double(parameters_[r.mu + n]);
            const double first = double(sum_lanes<T>(load(moments + 2 * n * L)));
            const double second = double(sum_lanes<T>(load(moments + (2 * n + 1) * L)));
            // tau = k sigma (1/r - 1/mu); the sums are over q and q tau, q = dE/d(ln s) tau
            const double a = __builtin_sqrt(k2) * sigma;
            s.flat[r.mu + n] += -2.0 * ln2 * a / (mu * mu) * first;
            if (sigma != 0.0) s.flat[r.sigma + n] += -2.0 * ln2 / sigma * second;
        }
        clear(size_t(n_sens_) * 2 * L, moments);
    }

    // Matrix gradients that `add_outer` fills; those of one-hot inputs go to `flat` directly.
    bool used(int layer, int k) const {
        if (k == 1) return layer > 0;
        if (k == 3) return layer > 0 && layout_.blocks[layer].residuals[0].adjust >= 0;
        return true;
    }

    // -- pairs ---------------------------------------------------------------------------------

    // Pair vectors of an atom to `raw`; returns their number.
    int load_row(Scratch<T> &s, int64_t i) {
        const int64_t begin = pairs_.row_ptr[i];
        const int n = int(pairs_.row_ptr[i + 1] - begin);
        if (task_.md)
            load_positions(s, i, begin, n);
        else if (task_.pass->r_ij_is_double)
            load_vectors(s, static_cast<const double *>(task_.pass->r_ij) + 3 * begin, n);
        else
            load_vectors(s, static_cast<const float *>(task_.pass->r_ij) + 3 * begin, n);
        // Beyond any cutoff, so that the last vector is whole.
        store(s.raw[0] + n, broadcast(T(2) * cutoff()));
        store(s.raw[1] + n, Vector<T>{});
        store(s.raw[2] + n, Vector<T>{});
        return n;
    }

    T cutoff() const { return T(model_.cutoff); }

    // Four vectors to places k to k + 3 of `raw`.
    static POTSTILL_INLINE void put_four(Scratch<T> &s, int k, typename Four<T>::type a,
                                         typename Four<T>::type b, typename Four<T>::type c,
                                         typename Four<T>::type d) {
        transpose_four<T>(a, b, c, d);
        store_four(s.raw[0] + k, a);
        store_four(s.raw[1] + k, b);
        store_four(s.raw[2] + k, c);
    }

    template <class R>
    static void load_vectors(Scratch<T> &s, const R *r, int n) {
        auto vector = [r](int k) {
            return __builtin_convertvector(load_four(r + 3 * k), typename Four<T>::type);
        };
        int k = 0;
        for (; k + 4 < n; k += 4)  // not to the end: each load reaches into the next vector
            put_four(s, k, vector(k), vector(k + 1), vector(k + 2), vector(k + 3));
        for (; k < n; ++k) {
            s.raw[0][k] = T(r[3 * k]);
            s.raw[1][k] = T(r[3 * k + 1]);
            s.raw[2][k] = T(r[3 * k + 2]);
        }
    }

    void load_positions(Scratch<T> &s, int64_t i, int64_t begin, int n) {
        const int32_t *neighbor = pairs_.neighbor + begin;
        const uint16_t *image = task_.md->image ? task_.md->image + begin : nullptr;
        const Double4 center = load_quad(positions_ + i);
        auto vector = [&](int k) {
            Double4 d = load_quad(positions_ + neighbor[k]) - center;
            if (image) d += load_quad(offsets_ + image[k]);
            return __builtin_convertvector(d, typename Four<T>::type);
        };
        int k = 0;
        for (; k + 4 <= n; k += 4)
            put_four(s, k, vector(k), vector(k + 1), vector(k + 2), vector(k + 3));
        if (k < n) {
            const auto zero = typename Four<T>::type{};
            put_four(s, k, vector(k), k + 1 < n ? vector(k + 1) : zero,
                     k + 2 < n ? vector(k + 2) : zero, zero);
        }
    }

    // Fields of all pairs of a block's atom; returns the offset behind them.
    int fill_fields(Scratch<T> &s, int layer, int64_t i, int b, int offset, bool first_time) {
        const int n = load_row(s, i), n_r = n_runs(layer);
        if (first_time && layer == 0 && task_.zbl) add_zbl(s, i, n);
        const T square = cutoff() * cutoff();
        if (n_r > 1) {
            const int32_t *neighbor = pairs_.neighbor + pairs_.row_ptr[i];
            for (int k = 0; k < n; ++k) s.raw_species[k] = T(pairs_.species[neighbor[k]]);
        }
        const PairFields<T> &f = s.fields;
        const int32_t *labels = task_.md ? pairs_.neighbor + pairs_.row_ptr[i] : counting_;
        // The last vector of labels may reach beyond the list.
        if (task_.md && pairs_.row_ptr[i] + n + 16 > pairs_.row_ptr[pairs_.n_local]) {
            for (int k = 0; k < n; ++k) s.labels[k] = labels[k];
            labels = s.labels;
        }
        for (int z = 0; z < n_r; ++z) {
            Run &run = s.runs[b * n_r + z];
            run.first = offset;
            run.n_pairs = compress<T>(n, s.raw[0], s.raw[1], s.raw[2], labels,
                                      n_r > 1 ? s.raw_species : nullptr, T(z), square,
                                      f.unit[0] + offset, f.unit[1] + offset, f.unit[2] + offset,
                                      f.label + offset);
            complete_fields(f, run, cutoff(), model_.cutoff_function == POTSTILL_POLYNOMIAL);
            offset += run.n_vectors * L;
        }
        return offset;
    }

    void add_zbl(Scratch<T> &s, int64_t i, int n) {
        const double cutoff = task_.zbl->cutoff;
        const T limit = T(cutoff * cutoff * 1.0001);
        bool near = false;
        for (int k = 0; k < n; k += L) {
            const Vector<T> x = load(s.raw[0] + k), y = load(s.raw[1] + k), z = load(s.raw[2] + k);
            const Vector<T> square = x * x + y * y + z * z;
            const auto hit = square < limit;
            for (int l = 0; l < L; ++l) near |= hit[l] != 0 && k + l < n;
        }
        if (!near) return;
        const int64_t begin = pairs_.row_ptr[i];
        const Double4 center = load_quad(positions_ + i);
        Double4 force{};
        double energy = 0.0;
        for (int64_t p = begin; p < begin + n; ++p) {
            const int32_t j = pairs_.neighbor[p];
            Double4 d = load_quad(positions_ + j) - center;
            if (task_.md->image) d += load_quad(offsets_ + task_.md->image[p]);
            const double r = __builtin_sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
            if (!(r < cutoff)) continue;
            double slope;
            energy += zbl_half_pair(*task_.zbl, pairs_.species[i], pairs_.species[j], r, &slope);
            if (!want_pairs_) continue;
            const Double4 g = d * (slope / r);
            force += g;
            store_quad(s.forces + j, load_quad(s.forces + j) - g);
            if (want_virial_)
                for (int a = 0; a < 3; ++a)
                    for (int c = 0; c < 3; ++c) s.virial_sum[3 * a + c] += d[a] * g[c];
        }
        if (want_pairs_) store_quad(s.forces + i, load_quad(s.forces + i) + force);
        task_.md->energies[i] += energy;
    }

    // -- forward -------------------------------------------------------------------------------

    void block_forward(Scratch<T> &s, int layer, int64_t first, int n, bool first_time) {
        if (first_time && layer == 0) write_first_term(first, n);
        const int n_in = layout_.blocks[layer].n_in, k_env = n_sens_ * n_in;
        if (n < B) clear(size_t(k_env) * M * B, s.environment);
        int offset = 0;
        for (int b = 0; b < n; ++b) {
            const int start = offset;
            offset = fill_fields(s, layer, first + b, b, offset, first_time);
            weighted_components<T, M>(s.fields, start, (offset - start) / L, s.weighted, stride());
            if (layer == 0)
                one_hot_environment(s, b, start);
            else
                dense_environment(s, layer, first + b, b);
        }
        const ResidualLayout *r = layout_.blocks[layer].residuals;
        gemm<T, Order::rows>(n_features_, M * B, k_env, prepared_[layer].weights, k_env,
                             s.environment, M * B, s.tensor, M * B);
        input_features(s, layer, first, n);
        // Pre-activation: scalar part, self-interaction and norms.
        self_interaction(s, layer, first, n, s.inner);
        add_norms<T, M>(n_features_, s.tensor, scale(*r, 0), scale(*r, 1), T(model_.cusp_reg),
                        s.inner);
        const size_t size = size_t(n_features_) * B;
        T *x = s.features + wide() * B;  // output of the interaction layer
        same_features(s, layer, first, n, x);
        residual(s, 0, r->res_weight, r->res_bias, x);
        for (int a = 0; a < model_.n_atom_layers; ++a) {
            ++r;
            gemm<T, Order::rows>(n_features_, B, n_features_, parameters_ + r->weight, n_features_, x,
                                 B, s.inner, B, Start::bias, parameters_ + r->bias);
            T *next = x + wide() * B;
            copy(int(size), x, next);
            x = next;
            residual(s, a + 1, r->res_weight, r->res_bias, x);
        }
        if (first_time) write_term(layer, first, n, x);
        if (first_time && layer + 1 < n_layers_)
            for (int b = 0; b < n; ++b) {
                T *row = features_[layer] + (first + b) * ld_features();
                for (int f = 0; f < n_features_; ++f) row[f] = x[f * B + b];
                for (int f = n_features_; f < ld_features(); ++f) row[f] = T(0);
            }
    }

    size_t wide() const {
        return model_.n_species > n_features_ ? model_.n_species : n_features_;
    }

    const T *scale(const ResidualLayout &r, int rank) const {
        return r.scale[rank] >= 0 ? parameters_ + r.scale[rank] : nullptr;
    }

    // Length of the arrays of one atom's pairs.
    ptrdiff_t stride() const {
        return padded<T>(max_row_) + L + ptrdiff_t(model_.n_species) * L;
    }

    void one_hot_environment(Scratch<T> &s, int b, int start) {
        const int n_s = model_.n_species;
        for (int z = 0; z < n_s; ++z) {
            const Run &run = s.runs[b * n_s + z];
            environment<T, M>(run.n_vectors, s.fields.inverse_r + run.first,
                              s.weighted + (run.first - start), stride(), prepared_[0].radial,
                              s.atom_environment + z * M, ptrdiff_t(n_s) * M);
        }
        for (int k = 0; k < n_sens_ * n_s * M; ++k) s.environment[k * B + b] = s.atom_environment[k];
    }

    int64_t neighbor_of(const Scratch<T> &s, int64_t i, int k) const {
        const int32_t label = s.fields.label[k];
        return task_.md ? label : pairs_.neighbor[pairs_.row_ptr[i] + label];
    }

    // Features of the neighbors of an atom, in the order of its pairs.
    void gather(Scratch<T> &s, int layer, int64_t i, const Run &run) {
        const int ld = ld_features();
        for (int p = 0; p < run.n_vectors * L; ++p) {
            if (p < run.n_pairs)
                copy(ld, features_[layer - 1] + neighbor_of(s, i, run.first + p) * ld, s.near + p * ld);
            else
                clear(ld, s.near + p * ld);
        }
        spell_out<T, M>(run.n_vectors, s.fields.inverse_r + run.first, s.weighted, stride(),
                        prepared_[layer].radial, s.spelled, stride());
    }

    void dense_environment(Scratch<T> &s, int layer, int64_t i, int b) {
        const Run &run = s.runs[b];
        gather(s, layer, i, run);
        const int ld = ld_features();
        gemm<T, Order::rows>(n_sens_ * M, ld, run.n_vectors * L, s.spelled, stride(), s.near, ld,
                             s.atom_environment, ld);
        for (int n = 0; n < n_sens_; ++n)
            for (int m = 0; m < M; ++m)
                for (int f = 0; f < n_features_; ++f)
                    s.environment[((n * n_features_ + f) * M + m) * B + b] =
                        s.atom_environment[(n * M + m) * ld + f];
    }

    // Dense input features of a block to the first slot of `features`, as (feature, atom).
    void input_features(Scratch<T> &s, int layer, int64_t first, int n) {
        if (layer == 0) return;
        if (n < B) clear(size_t(n_features_) * B, s.features);
        for (int b = 0; b < n; ++b) {
            const T *row = features_[layer - 1] + (first + b) * ld_features();
            for (int f = 0; f < n_features_; ++f) s.features[f * B + b] = row[f];
        }
    }

    // out[b] = base + table[species of atom b]
    void pick(const T *table, T base, int64_t first, int n, T *out) const {
        if (model_.n_species == 1) {
            for (int b = 0; b < B; b += L) store(out + b, broadcast(base + table[0]));
            return;
        }
        for (int b = 0; b < B; ++b)
            out[b] = b < n ? base + table[pairs_.species[first + b]] : T(0);
    }

    void self_interaction(Scratch<T> &s, int layer, int64_t first, int n, T *out) {
        const ResidualLayout &r = layout_.blocks[layer].residuals[0];
        if (layer > 0) {
            gemm<T, Order::rows>(n_features_, B, n_features_, parameters_ + r.self_weight, n_features_,
                                 s.features, B, out, B, Start::bias, parameters_ + r.bias);
            return;
        }
        const int n_in = model_.n_species;
        for (int f = 0; f < n_features_; ++f) {
            const T bias = parameters_[r.bias + f];
            pick(parameters_ + r.self_weight + f * n_in, bias, first, n, out + f * B);
        }
    }

    // What the interaction layer's input contributes to its output directly.
    void same_features(Scratch<T> &s, int layer, int64_t first, int n, T *out) {
        const int64_t adjust = layout_.blocks[layer].residuals[0].adjust;
        if (layer > 0) {  // n_in equals n_features: there is no adjust
            copy(n_features_ * B, s.features, out);
            return;
        }
        const int n_in = model_.n_species;
        for (int f = 0; f < n_features_; ++f) {
            if (adjust >= 0)
                pick(parameters_ + adjust + f * n_in, T(0), first, n, out + f * B);
            else
                for (int b = 0; b < B; ++b)
                    out[f * B + b] = b < n ? T(pairs_.species[first + b] == f) : T(0);
        }
    }

    // x += W softplus(inner) + bias, keeping softplus and its derivative for the way back.
    void residual(Scratch<T> &s, int k, int64_t weight, int64_t bias, T *x) {
        const size_t size = size_t(n_features_) * B;
        T *value = s.value + k * size;
        softplus_all(int(size), s.inner, value, s.derivative + k * size);
        gemm<T, Order::rows>(n_features_, B, n_features_, parameters_ + weight, n_features_, value, B,
                             s.inner, B, Start::bias, parameters_ + bias);
        add(int(size), x, s.inner);
    }

    void write_first_term(int64_t first, int n) {
        for (int64_t i = first; i < first + n; ++i)
            set_term(i, 0, double(parameters_[layout_.e0 + pairs_.species[i]]));
    }

    void write_term(int layer, int64_t first, int n, const T *x) {
        const T *w = parameters_ + layout_.blocks[layer].energy_weight;
        alignas(64) T sum[B];
        for (int b = 0; b < B; b += L) {
            Vector<T> v = broadcast(parameters_[layout_.blocks[layer].energy_bias]);
            for (int f = 0; f < n_features_; ++f) v += w[f] * load(x + f * B + b);
            store(sum + b, v);
        }
        for (int b = 0; b < n; ++b) set_term(first + b, layer + 1, double(sum[b]));
    }

    void set_term(int64_t i, int k, double value) {
        if (task_.md)
            task_.md->energies[i] = k == 0 ? value : task_.md->energies[i] + value;
        else if (task_.pass->terms)
            task_.pass->terms[i * (n_layers_ + 1) + k] = value;
    }

    // -- backward ------------------------------------------------------------------------------

    double weight(int64_t i, int k) const {
        return task_.pass && task_.pass->weights ? task_.pass->weights[i * (n_layers_ + 1) + k] : 1.0;
    }

    // Sum over the parts of the cotangents of a layer's output features, in part 0's buffer.
    void gather_cotangents(int part, int layer) {
        const int side = layer & 1;
        const int64_t n = pairs_.n_local * ld_features();
        const int64_t first = n * part / n_parts_, last = n * (part + 1) / n_parts_;
        T *sum = scratch_[0].feature_cotangent[side];
        for (int p = 1; p < n_parts_; ++p) {
            T *other = scratch_[p].feature_cotangent[side];
            for (int64_t k = first; k < last; ++k) sum[k] += other[k];
        }
        // The other side receives those of the layer's input: empty since `start_part`, or used.
        for (int p = 0; p < n_parts_; ++p) {
            T *other = scratch_[p].feature_cotangent[1 - side];
            for (int64_t k = first; k < last; ++k) other[k] = T(0);
        }
    }

    void block_backward(Scratch<T> &s, int layer, int64_t first, int n) {
        const BlockLayout &block = layout_.blocks[layer];
        const ResidualLayout *r = block.residuals + model_.n_atom_layers;
        const size_t slot = wide() * B;
        MatrixGradient<T> *matrices =
            want_parameters_ ? s.matrices + layer * matrices_per_layer() : nullptr;
        energy_backward(s, layer, first, n);
        for (int k = model_.n_atom_layers; k > 0; --k, --r) {
            residual_backward(s, k, *r, matrices ? matrices + 3 + 2 * k : nullptr);
            if (matrices) {
                add_outer(matrices[2 + 2 * k], B, s.inner, B, s.features + k * slot, B, s.transposed);
                add_rows(s.flat, r->bias, n_features_, s.inner);
            }
            gemm<T, Order::columns>(n_features_, B, n_features_, parameters_ + r->weight, n_features_,
                                    s.inner, B, s.cotangent, B, Start::keep);
        }
        residual_backward(s, 0, *r, matrices ? matrices + 2 : nullptr);
        norms_backward<T, M>(n_features_, s.inner, scale(*r, 0), scale(*r, 1), T(model_.cusp_reg),
                             s.tensor, matrices ? s.norms : nullptr);
        const int k_env = n_sens_ * block.n_in;
        if (matrices) interaction_gradients(s, layer, first, n, matrices);
        if (layer > 0) features_backward(s, layer, first, n);
        // The environment gives way to its cotangent.
        gemm<T, Order::columns>(k_env, M * B, n_features_, prepared_[layer].weights, k_env, s.tensor,
                                M * B, s.environment, M * B);
        T *moments = matrices ? s.moments + size_t(layer) * n_sens_ * 2 * L : nullptr;
        for (int b = 0; b < n; ++b) {
            if (layer == 0)
                one_hot_backward(s, first + b, b, moments);
            else
                dense_backward(s, layer, first + b, b, moments);
        }
    }

    // Cotangent of the block's output features: from the energy, and from the layers above.
    void energy_backward(Scratch<T> &s, int layer, int64_t first, int n) {
        const BlockLayout &block = layout_.blocks[layer];
        double total = 0.0;
        for (int b = 0; b < B; ++b) {
            const double w = b < n ? weight(first + b, layer + 1) : 0.0;
            s.weights[b] = T(w);
            total += w;
        }
        const T *w = parameters_ + block.energy_weight;
        for (int f = 0; f < n_features_; ++f)
            for (int b = 0; b < B; b += L) store(s.cotangent + f * B + b, w[f] * load(s.weights + b));
        if (layer + 1 < n_layers_) {
            const T *above = scratch_[0].feature_cotangent[layer & 1];
            for (int b = 0; b < n; ++b)
                for (int f = 0; f < n_features_; ++f)
                    s.cotangent[f * B + b] += above[(first + b) * ld_features() + f];
        }
        if (!want_parameters_) return;
        if (layer == n_layers_ - 1)
            for (int b = 0; b < n; ++b)
                s.flat[layout_.e0 + pairs_.species[first + b]] += weight(first + b, 0);
        s.flat[block.energy_bias] += total;
        const T *x = s.features + (model_.n_atom_layers + 1) * wide() * B;
        for (int f = 0; f < n_features_; ++f)
            add_rows(s.flat, block.energy_weight + f, 1, x + f * B, s.weights);
    }

    // inner = cotangent of the activation's argument in residual layer k.
    void residual_backward(Scratch<T> &s, int k, const ResidualLayout &r, MatrixGradient<T> *matrix) {
        const size_t size = size_t(n_features_) * B;
        if (matrix) {
            add_outer(*matrix, B, s.cotangent, B, s.value + k * size, B, s.transposed);
            add_rows(s.flat, r.res_bias, n_features_, s.cotangent);
        }
        gemm<T, Order::columns>(n_features_, B, n_features_, parameters_ + r.res_weight, n_features_,
                                s.cotangent, B, s.inner, B);
        multiply(int(size), s.inner, s.derivative + k * size);
    }

    void interaction_gradients(Scratch<T> &s, int layer, int64_t first, int n,
                               MatrixGradient<T> *matrices) {
        const ResidualLayout &r = layout_.blocks[layer].residuals[0];
        add_outer(matrices[0], M * B, s.tensor, M * B, s.environment, M * B, s.transposed);
        add_rows(s.flat, r.bias, n_features_, s.inner);
        for (int rank = 0; rank < model_.l_max; ++rank)
            add_rows(s.flat, r.scale[rank], n_features_, s.inner,
                     s.norms + size_t(rank) * n_features_ * B);
        if (layer > 0) {
            add_outer(matrices[1], B, s.inner, B, s.features, B, s.transposed);
            return;
        }
        const int n_in = model_.n_species;
        for (int f = 0; f < n_features_; ++f)
            for (int b = 0; b < n; ++b) {
                const int z = pairs_.species[first + b];
                s.flat[r.self_weight + f * n_in + z] += double(s.inner[f * B + b]);
                if (r.adjust >= 0) s.flat[r.adjust + f * n_in + z] += double(s.cotangent[f * B + b]);
            }
    }

    // What reaches an atom's own input features, of self-interaction and the residual's identity.
    void features_backward(Scratch<T> &s, int layer, int64_t first, int n) {
        const ResidualLayout &r = layout_.blocks[layer].residuals[0];
        gemm<T, Order::columns>(n_features_, B, n_features_, parameters_ + r.self_weight, n_features_,
                                s.inner, B, s.cotangent, B, Start::keep);
        T *below = s.feature_cotangent[(layer - 1) & 1];
        for (int b = 0; b < n; ++b)
            for (int f = 0; f < n_features_; ++f)
                below[(first + b) * ld_features() + f] += s.cotangent[f * B + b];
    }

    void one_hot_backward(Scratch<T> &s, int64_t i, int b, T *moments) {
        const int n_s = model_.n_species;
        for (int k = 0; k < n_sens_ * n_s * M; ++k) s.atom_environment[k] = s.environment[k * B + b];
        if (layer_comes_first(0)) clear_gradient(i);
        for (int z = 0; z < n_s; ++z) {
            const Run &run = s.runs[b * n_s + z];
            backward_run<T, M, false>(s.fields, run, prepared_[0].radial, s.atom_environment + z * M,
                                      ptrdiff_t(n_s) * M, moments, s.pair_gradient);
            deliver(s, i, run);
        }
    }

    void dense_backward(Scratch<T> &s, int layer, int64_t i, int b, T *moments) {
        const Run &run = s.runs[b];
        const int ld = ld_features(), n_pairs = run.n_vectors * L;
        weighted_components<T, M>(s.fields, run.first, run.n_vectors, s.weighted, stride());
        gather(s, layer, i, run);
        for (int n = 0; n < n_sens_; ++n)
            for (int m = 0; m < M; ++m) {
                T *row = s.atom_environment + (n * M + m) * ld;
                for (int f = 0; f < n_features_; ++f)
                    row[f] = s.environment[((n * n_features_ + f) * M + m) * B + b];
                for (int f = n_features_; f < ld; ++f) row[f] = T(0);
            }
        transpose(n_pairs, n_features_, s.near, ld, s.near_columns, stride());
        gemm<T, Order::rows>(n_sens_ * M, n_pairs, n_features_, s.atom_environment, ld, s.near_columns,
                             stride(), s.by_spelled, stride());
        gemm<T, Order::columns>(n_pairs, ld, n_sens_ * M, s.spelled, stride(), s.atom_environment, ld,
                                s.by_near, ld);
        T *below = s.feature_cotangent[(layer - 1) & 1];
        for (int p = 0; p < run.n_pairs; ++p)
            add(ld, below + neighbor_of(s, i, run.first + p) * ld, s.by_near + p * ld);
        if (layer_comes_first(layer)) clear_gradient(i);
        backward_run<T, M, true>(s.fields, run, prepared_[layer].radial, s.by_spelled, stride(),
                                 moments, s.pair_gradient);
        deliver(s, i, run);
    }

    // Pair gradients are sums over the layers, begun by the one that comes first on the way back.
    bool layer_comes_first(int layer) const {
        return task_.pass && want_pairs_ && layer == n_layers_ - 1;
    }

    void clear_gradient(int64_t i) {
        T *row = static_cast<T *>(task_.pass->gradient) + 3 * pairs_.row_ptr[i];
        clear(size_t(3 * (pairs_.row_ptr[i + 1] - pairs_.row_ptr[i])), row);
    }

    void deliver(Scratch<T> &s, int64_t i, const Run &run) {
        if (!want_pairs_) return;
        if (task_.pass) {
            T *row = static_cast<T *>(task_.pass->gradient) + 3 * pairs_.row_ptr[i];
            for (int p = 0; p < run.n_pairs; ++p) {
                T *at = row + 3 * int64_t(s.fields.label[run.first + p]);
                for (int d = 0; d < 3; ++d) at[d] += s.pair_gradient[d][p];
            }
            return;
        }
        if (want_virial_) add_virial(s, run);
        Double4 total{};
        const int32_t *neighbor = s.fields.label + run.first;
        auto push = [&](int p, typename Four<T>::type gradient) {
            const Double4 g = __builtin_convertvector(gradient, Double4);
            Quad *other = s.forces + neighbor[p];
            store_quad(other, load_quad(other) - g);
            total += g;
        };
        for (int p = 0; p < run.n_pairs; p += 4) {
            auto x = load_four(s.pair_gradient[0] + p), y = load_four(s.pair_gradient[1] + p),
                 z = load_four(s.pair_gradient[2] + p);
            typename Four<T>::type w{};
            transpose_four<T>(x, y, z, w);
            push(p, x);
            if (p + 1 < run.n_pairs) push(p + 1, y);
            if (p + 2 < run.n_pairs) push(p + 2, z);
            if (p + 3 < run.n_pairs) push(p + 3, w);
        }
        store_quad(s.forces + i, load_quad(s.forces + i) + total);
    }

    void add_virial(Scratch<T> &s, const Run &run) {
        for (int v = 0; v < run.n_vectors; ++v) {
            const int k = run.first + v * L;
            const Vector<T> r = load(s.fields.r + k);
            for (int a = 0; a < 3; ++a) {
                const Vector<T> x = r * load(s.fields.unit[a] + k);
                for (int c = 0; c < 3; ++c) {
                    T *at = s.virial + (3 * a + c) * L;
                    store(at, load(at) + x * load(s.pair_gradient[c] + v * L));
                }
            }
        }
    }
};

template <class T>
int run(const Task &task) {
    switch (task.model->l_max) {
        case 0: return Driver<T, 1>(task).run();
        case 1: return Driver<T, 4>(task).run();
        default: return Driver<T, 9>(task).run();
    }
}

}  // namespace

Kernels kernels() { return {run<float>, run<double>, measure_gflops<float>, measure_gflops<double>}; }

}  // namespace potstill::POTSTILL_ISA
