// HIP-NN-TS, whole models and layer by layer: the steps of an evaluation over all local atoms.
//
// Threads share the local atoms in parts. Every part has its own sums, added up in the order of the
// parts: results depend on the number of threads, never on their timing. The features of all atoms
// are kept between interaction layers, and the way back repeats each layer's forward step.

#include "layers.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace potstill::POTSTILL_ISA {
namespace {

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

// A model with M tensor components over all local atoms. It lives in the arena as all it uses does.
template <class T, int M>
class Evaluation {
  public:
    static int begin(const Task &task, Arena *arena, void **evaluation) {
        const Sizes<T> sizes(task);
        Carver measure(nullptr);
        measure.take<Evaluation>(1);
        Evaluation(task, sizes, measure);
        if (!arena_reserve(arena, measure.used()))
            return fail(POTSTILL_OUT_OF_MEMORY, "there is not enough memory for the scratch arrays");
        Carver assign(arena->data);
        Evaluation *all = new (assign.take<Evaluation>(1).data) Evaluation(task, sizes, assign);
        *evaluation = all;
        return all->start();
    }

    static void forward(void *evaluation, int layer) {
        static_cast<Evaluation *>(evaluation)->forward(layer);
    }
    static void reverse(void *evaluation, int layer) {
        static_cast<Evaluation *>(evaluation)->reverse(layer);
    }
    static void finish(void *evaluation) { static_cast<Evaluation *>(evaluation)->finish(); }
    static void *features(void *evaluation, int layer) {
        return static_cast<Evaluation *>(evaluation)->layers_.features(layer).data;
    }
    static void *cotangents(void *evaluation, int layer) {
        return static_cast<Evaluation *>(evaluation)->parts_[0].feature_cotangent[layer & 1].data;
    }

  private:
    static constexpr int B = block_atoms;

    const Task &task_;
    const potstill_pairs &pairs_;
    const int n_layers_, n_parts_;
    const bool backward_;
    Layers<T, M> layers_;
    Span<Part<T>> parts_;

    Evaluation(const Task &task, const Sizes<T> &sizes, Carver &c)
        : task_(task),
          pairs_(task.pairs),
          n_layers_(sizes.n_layers),
          n_parts_(task.n_threads),
          backward_(task.wants_parameters() || task.wants_pairs()),
          layers_(task, sizes, c),
          parts_(c.take<Part<T>>(n_parts_)) {
        for (int k = 0; k < n_parts_; ++k) {
            const Part<T> part(task, sizes, M, c);
            if (c.assigns()) parts_[k] = part;
        }
    }
    // The linker must not meet the standard library's.
    static void *operator new(size_t, void *at) { return at; }

    int start() {
        layers_.prepare();
        for_parts(n_parts_, [&](int k) {
            Part<T> &part = parts_[k];
            part.indices_fit =
                pairs_.n_local == 0 || layers_.source().indices_fit(start_of(k), start_of(k + 1));
            layers_.source().copy_positions(share(pairs_.n_atoms, k), share(pairs_.n_atoms, k + 1));
            part.sums.clear();
            for (Span<T> &x : part.feature_cotangent) x.clear();
            part.parameters.clear();
            for (int64_t v = 9 * start_of(k); task_.wants_atom_virials() && v < 9 * start_of(k + 1); ++v)
                task_.md->center_virials[v] = 0.0;
        });
        for (int k = 0; k < n_parts_; ++k)
            if (!parts_[k].indices_fit)
                return fail(POTSTILL_BAD_ARGUMENT, "a pair has a neighbor or image that does not exist");
        return 0;
    }

    // The last layer's way back is part of its forward step, which has all that it needs.
    void forward(int layer) {
        const bool turn = backward_ && layer == n_layers_ - 1;
        for_parts(n_parts_, [&](int part) { sweep(part, layer, true, turn); });
    }

    void reverse(int layer) {
        if (layer < n_layers_ - 1)
            for_parts(n_parts_, [&](int part) { sweep(part, layer, false, true); });
        if (layer > 0) for_parts(n_parts_, [&](int part) { gather_cotangents(part, layer - 1); });
    }

    void finish() {
        for_parts(n_parts_, [&](int part) {
            if (task_.md && task_.md->forces)
                for (int64_t i = share(pairs_.n_atoms, part); i < share(pairs_.n_atoms, part + 1); ++i) {
                    Double4 sum{};
                    for (int p = 0; p < n_parts_; ++p) sum += load_quad(parts_[p].sums.forces + i);
                    double *force = task_.md->forces + 3 * i;
                    for (int d = 0; d < 3; ++d) force[d] = task_.md->add_forces ? force[d] + sum[d] : sum[d];
                }
            const int64_t n_virials = task_.wants_atom_virials() ? 9 * pairs_.n_atoms : 0;
            for (int64_t k = share(n_virials, part); k < share(n_virials, part + 1); ++k) {
                double sum = 0.0;
                for (int p = 0; p < n_parts_; ++p) sum += parts_[p].sums.neighbor_virials[k];
                task_.md->neighbor_virials[k] = sum;
            }
            if (!task_.wants_parameters()) return;
            const int64_t n = task_.layout.n_parameters;
            for (int64_t k = share(n, part); k < share(n, part + 1); ++k) {
                double sum = 0.0;
                for (int p = 0; p < n_parts_; ++p) sum += parts_[p].parameters.flat[k];
                task_.pass->parameter_gradient[k] = sum;
            }
        });
        for (int k = 0; k < 9 && layers_.sink().wants_virial(); ++k) {
            double sum = 0.0;
            for (int p = 0; p < n_parts_; ++p) sum += parts_[p].sums.virial_sum[k];
            task_.md->virial[k] = sum;
        }
    }

    int64_t share(int64_t n, int part) const { return n * part / n_parts_; }

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

    // One layer over all atoms of a part.
    void sweep(int part, int layer, bool first_time, bool backward) {
        Part<T> &s = parts_[part];
        const T *above = parts_[0].feature_cotangent[layer & 1];
        const int64_t first = start_of(part), last = start_of(part + 1);
        int since_flush = 0;
        for (int64_t i = first; i < last; i += B) {
            const int n = last - i < B ? int(last - i) : B;
            layers_.forward(s, layer, i, n, first_time);
            if (!backward) continue;
            layers_.backward(s, layer, i, n, above);
            if (layers_.sink().wants_virial()) s.sums.flush_virial();
            if (s.parameters && ++since_flush == 8) s.parameters.flush(task_, layer), since_flush = 0;
        }
        if (backward && s.parameters) s.parameters.flush(task_, layer);
    }

    // Sum over the parts of the cotangents of a layer's output features, in part 0's buffer. The
    // other side, which the layer above has used, is made ready for those of the layer below.
    void gather_cotangents(int part, int layer) {
        const int side = layer & 1;
        const int64_t n = int64_t(parts_[0].feature_cotangent[side].size);
        T *sum = parts_[0].feature_cotangent[side];
        for (int p = 0; p < n_parts_; ++p) {
            T *same = parts_[p].feature_cotangent[side], *other = parts_[p].feature_cotangent[1 - side];
            for (int64_t k = share(n, part); k < share(n, part + 1); ++k) {
                if (p > 0) sum[k] += same[k];
                other[k] = T(0);
            }
        }
    }
};

template <class T, int M>
constexpr Kernels steps{Evaluation<T, M>::begin,    Evaluation<T, M>::forward,
                        Evaluation<T, M>::reverse,  Evaluation<T, M>::finish,
                        Evaluation<T, M>::features, Evaluation<T, M>::cotangents,
                        padded<T>};

template <class T>
const Kernels &of_rank(int l_max) {
    static constexpr const Kernels *all[] = {&steps<T, 1>, &steps<T, 4>, &steps<T, 9>, &steps<T, 16>,
                                             &steps<T, 25>};
    return *all[l_max];
}

}  // namespace

const Kernels &kernels(bool single, int l_max) {
    return single ? of_rank<float>(l_max) : of_rank<double>(l_max);
}

}  // namespace potstill::POTSTILL_ISA
