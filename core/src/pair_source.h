// Where pairs come from: given vectors, or positions. They are loaded atom by atom, and those within
// the cutoff go to the fields that the layers read: atoms side by side, or one atom's.
#pragma once

#include "arena.h"
#include "packing.h"
#include "pairs.h"
#include "quads.h"

namespace potstill::POTSTILL_ISA {
namespace {

// The pairs of one atom, as many as the list holds.
template <class T>
struct Row {
    Span<T> x[3], species;
    Span<int32_t> own_labels;
    const int32_t *labels;
    int n;

    Row(const Sizes<T> &sizes, Carver &c) {
        for (Span<T> &component : x) component = c.take<T>(sizes.row());
        species = c.take<T>(sizes.row());
        own_labels = c.take<int32_t>(sizes.row() + 16);
    }
};

// Four vectors to places k to k + 3 of three arrays.
template <class T>
POTSTILL_INLINE void put_four(T *x, T *y, T *z, int k, Four<T> a, Four<T> b, Four<T> c, Four<T> d) {
    transpose_four(a, b, c, d);
    store_four(x + k, a);
    store_four(y + k, b);
    store_four(z + k, c);
}

template <class T>
class PairSource {
  public:
    PairSource(const Task &task, const Sizes<T> &sizes, Carver &c)
        : task_(task),
          pairs_(task.pairs),
          counting_(c.take<int32_t>(sizes.max_row + 32)),
          positions_(c.take<Quad>(task.md ? task.pairs.n_atoms : 0)),
          offsets_(c.take<Quad>(task.md ? task.md->n_images : 0)) {}

    void prepare() const {
        for (size_t k = 0; k < counting_.size; ++k) counting_[k] = int32_t(k);
        for (size_t k = 0; k < offsets_.size; ++k)
            store_quad(offsets_ + k, vector_of(task_.md->offsets + 3 * k));
    }

    void copy_positions(int64_t first, int64_t last) const {
        if (!task_.md) return;
        for (int64_t i = first; i < last; ++i)
            store_quad(positions_ + i, vector_of(task_.md->positions + 3 * i));
    }

    // Whether the neighbors and images of some atoms are indices into their arrays.
    bool indices_fit(int64_t first_atom, int64_t last_atom) const {
        if (pairs_.rows) return true;  // as the engine says
        const int64_t first = pairs_.row_ptr[first_atom], last = pairs_.row_ptr[last_atom];
        uint32_t neighbor = 0;
        for (int64_t k = first; k < last; ++k) {
            const uint32_t j = uint32_t(pairs_.neighbor[k]);
            neighbor = j > neighbor ? j : neighbor;
        }
        const uint16_t *images = task_.md ? task_.md->image : nullptr;
        uint16_t image = 0;
        if (images)
            for (int64_t k = first; k < last; ++k) image = images[k] > image ? images[k] : image;
        return first == last || (int64_t(neighbor) < pairs_.n_atoms &&
                                 (!images || image < task_.md->n_images));
    }

    void load(int64_t i, Row<T> &row) const {
        const int64_t begin = pairs_.row_ptr[i];
        const int n = row.n = int(pairs_.row_ptr[i + 1] - begin);
        const int32_t *neighbor = pairs_.rows ? masked(row, i, n) : pairs_.neighbor + begin;
        if (task_.md)
            load_positions(row, i, neighbor, begin, n);
        else if (task_.pass->r_ij_is_double)
            load_vectors(row, static_cast<const double *>(task_.pass->r_ij) + 3 * begin, n);
        else
            load_vectors(row, static_cast<const float *>(task_.pass->r_ij) + 3 * begin, n);
        // So that the last vector is whole.
        pad(row.x[0] + n, row.x[1] + n, row.x[2] + n, lanes<T>);
        for (int k = 0; k < n && task_.model.n_species > 1; ++k)
            row.species[k] = T(pairs_.species[neighbor[k]]);
        row.labels = task_.md ? neighbor : counting_.data;
        // The last vector of labels may reach beyond the list.
        if (task_.md && !pairs_.rows && begin + n + 16 > pairs_.row_ptr[pairs_.n_local]) {
            for (int k = 0; k < n; ++k) row.own_labels[k] = row.labels[k];
            row.labels = row.own_labels;
        }
    }

    // An atom's pairs within the cutoff and with one species of neighbors, if there are several: the
    // vectors from `at` on, behind which a vector is overwritten.
    void pack(const Row<T> &row, int species, const Span<T> *x, ptrdiff_t at, int32_t *labels,
              OwnPairs &own) const {
        own.n = compress<T>(row.n, row.x[0], row.x[1], row.x[2], row.labels,
                            task_.model.n_species > 1 ? row.species.data : nullptr, T(species),
                            cutoff() * cutoff(), x[0] + at, x[1] + at, x[2] + at, labels);
    }

    // Fields of the packed pairs of several atoms: lane a of vector k is pair k of atom a.
    void interleave(const Span<T> *packed, ptrdiff_t ld, const OwnPairs *own, const PairFields<T> &f,
                    Run &run) const {
        constexpr int L = lanes<T>;
        for (int a = 0; a < L; ++a) run.n_vectors = own[a].n > run.n_vectors ? own[a].n : run.n_vectors;
        for (int a = 0; a < L; ++a) {
            const ptrdiff_t end = a * ld + own[a].n;
            pad(packed[0] + end, packed[1] + end, packed[2] + end, run.n_vectors - own[a].n);
        }
        for (int d = 0; d < 3; ++d)
            transpose<T>(L, run.n_vectors, packed[d], ld, f.unit[d] + run.first, L);
        complete(f, run);
    }

    // Fields of an atom's pairs within the cutoff, from run.first on; labels have the same places.
    void select(const Row<T> &row, const PairFields<T> &f, Run &run, OwnPairs &own) const {
        T *const x = f.unit[0] + run.first, *const y = f.unit[1] + run.first;
        T *const z = f.unit[2] + run.first;
        own.label = run.first;
        own.n = compress<T>(row.n, row.x[0], row.x[1], row.x[2], row.labels, nullptr, T(0),
                            cutoff() * cutoff(), x, y, z, f.label + own.label);
        run.n_vectors = (own.n + lanes<T> - 1) / lanes<T>;
        pad(x + own.n, y + own.n, z + own.n, run.n_vectors * lanes<T> - own.n);
        complete(f, run);
    }

    // The neighbor that a label of atom i's fields stands for.
    int64_t neighbor_of(int64_t i, int32_t label) const {
        return task_.md ? label : pairs_.neighbor[pairs_.row_ptr[i] + label];
    }

    // Places in the row of the pairs that are shorter than the root of `limit`, and how many there are.
    // `x` from `at` on is room for their vectors.
    int find_within(const Row<T> &row, T limit, const Span<T> *x, ptrdiff_t at, int32_t *places) const {
        int n = compress<T>(row.n, row.x[0], row.x[1], row.x[2], counting_, nullptr, T(0), limit,
                            x[0] + at, x[1] + at, x[2] + at, places);
        while (n > 0 && places[n - 1] >= row.n) --n;  // the padding of a short cutoff
        return n;
    }

  private:
    const Task &task_;
    const potstill_pairs &pairs_;
    Span<int32_t> counting_;  // 0, 1, 2, ...: places in a row
    Span<Quad> positions_, offsets_;

    T cutoff() const { return T(task_.model.cutoff); }

    void complete(const PairFields<T> &f, const Run &run) const {
        complete_fields(f, run, cutoff(), task_.model.cutoff_function == POTSTILL_POLYNOMIAL);
    }
    // Pairs beyond any cutoff.
    void pad(T *x, T *y, T *z, int n) const {
        for (int k = 0; k < n; ++k) x[k] = T(2) * cutoff(), y[k] = z[k] = T(0);
    }
    const int32_t *masked(Row<T> &row, int64_t i, int n) const {
        const int32_t *from = pairs_.rows[i];
        int32_t *const to = row.own_labels;
        const int32_t mask = pairs_.mask;
        for (int k = 0; k < n; ++k) to[k] = from[k] & mask;
        return to;
    }

    template <class R>
    static void load_vectors(const Row<T> &row, const R *r, int n) {
        T *const x = row.x[0], *const y = row.x[1], *const z = row.x[2];
        auto vector = [r](int k) { return __builtin_convertvector(load_four(r + 3 * k), Four<T>); };
        int k = 0;
        for (; k + 4 < n; k += 4)  // not to the end: each load reaches into the next vector
            put_four<T>(x, y, z, k, vector(k), vector(k + 1), vector(k + 2), vector(k + 3));
        for (; k < n; ++k) {
            x[k] = T(r[3 * k]);
            y[k] = T(r[3 * k + 1]);
            z[k] = T(r[3 * k + 2]);
        }
    }

    void load_positions(const Row<T> &row, int64_t i, const int32_t *neighbor, int64_t begin,
                        int n) const {
        const uint16_t *image = task_.md->image ? task_.md->image + begin : nullptr;
        // In registers: for all the compiler knows, the stores could change members.
        T *const x = row.x[0], *const y = row.x[1], *const z = row.x[2];
        const Quad *const positions = positions_, *const offsets = offsets_;
        const Double4 center = load_quad(positions + i);
        auto vector = [=](int k) {
            Double4 d = load_quad(positions + neighbor[k]) - center;
            if (image) d += load_quad(offsets + image[k]);
            return __builtin_convertvector(d, Four<T>);
        };
        int k = 0;
        for (; k + 4 <= n; k += 4)
            put_four<T>(x, y, z, k, vector(k), vector(k + 1), vector(k + 2), vector(k + 3));
        if (k < n) {
            const Four<T> zero{};
            put_four<T>(x, y, z, k, vector(k), k + 1 < n ? vector(k + 1) : zero,
                        k + 2 < n ? vector(k + 2) : zero, zero);
        }
    }
};

}  // namespace
}  // namespace potstill::POTSTILL_ISA
