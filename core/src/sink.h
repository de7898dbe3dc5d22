// Where results go: terms of energy and gradients by given pair vectors, or atomic energies, forces
// and virial.
#pragma once

#include "arena.h"
#include "pairs.h"
#include "quads.h"
#include "zbl.h"

namespace potstill::POTSTILL_ISA {
namespace {

// What one part of the atoms has added up of forces and virial.
template <class T>
struct ForceSums {
    Span<Quad> forces;  // (n_atoms)
    Span<T> virial;     // (9, L), of the latest block
    double virial_sum[9];

    ForceSums(const Task &task, Carver &c)
        : forces(c.take<Quad>(task.md && task.md->forces ? task.pairs.n_atoms : 0)),
          virial(c.take<T>(9 * lanes<T>)) {}

    void clear() {
        for (double &v : virial_sum) v = 0.0;
        virial.clear();
        forces.clear();
    }
    void flush_virial() {
        for (int k = 0; k < 9; ++k)
            virial_sum[k] += double(sum_lanes<T>(load(virial + k * lanes<T>)));
        virial.clear();
    }
};

template <class T>
class Sink {
  public:
    explicit Sink(const Task &task)
        : pairs_(task.pairs),
          pass_(task.pass),
          md_(task.md),
          zbl_(task.zbl),
          n_terms_(task.model.n_interaction_layers + 1),
          wants_pairs_(task.wants_pairs()) {}

    bool wants_virial() const { return md_ && md_->virial; }
    const ZblTable *zbl() const { return zbl_; }

    // Term k of the energy of atom i; those of molecular dynamics come in their order.
    void set_term(int64_t i, int k, double value) const {
        if (md_)
            md_->energies[i] = k == 0 ? value : md_->energies[i] + value;
        else if (pass_->terms)
            pass_->terms[i * n_terms_ + k] = value;
    }

    double weight(int64_t i, int k) const {
        return pass_ && pass_->weights ? pass_->weights[i * n_terms_ + k] : 1.0;
    }

    void add_zbl(int64_t i, ForceSums<T> &sums) const {
        double *forces = wants_pairs_ ? sums.forces.data->x : nullptr;
        md_->energies[i] += zbl_of_atom(*zbl_, pairs_, *md_, i, forces, 4,
                                        wants_virial() ? sums.virial_sum : nullptr);
    }

    // Gradients by the vectors of an atom are sums over the layers, that start here.
    void start_gradient(int64_t i) const {
        if (pass_ && wants_pairs_)
            clear(size_t(3 * (pairs_.row_ptr[i + 1] - pairs_.row_ptr[i])), gradient(i));
    }

    // Take the gradients by the vectors of a run of atom i's pairs.
    void deliver(int64_t i, const PairFields<T> &fields, const Run &run, const Span<T> *by_pair,
                 ForceSums<T> &sums) const {
        if (!wants_pairs_) return;
        if (pass_) {
            T *row = gradient(i);
            for (int p = 0; p < run.n_pairs; ++p) {
                T *at = row + 3 * int64_t(fields.label[run.first + p]);
                for (int d = 0; d < 3; ++d) at[d] += by_pair[d][p];
            }
            return;
        }
        if (md_->virial) add_virial(fields, run, by_pair, sums.virial);
        Double4 total{};
        const int32_t *neighbor = fields.label + run.first;
        const T *const gx = by_pair[0], *const gy = by_pair[1], *const gz = by_pair[2];
        Quad *const forces = sums.forces;
        auto push = [&](int p, Four<T> part) {
            const Double4 g = __builtin_convertvector(part, Double4);
            Quad *other = forces + neighbor[p];
            store_quad(other, load_quad(other) - g);
            total += g;
        };
        for (int p = 0; p < run.n_pairs; p += 4) {
            Four<T> x = load_four(gx + p), y = load_four(gy + p), z = load_four(gz + p), w{};
            transpose_four(x, y, z, w);
            push(p, x);
            if (p + 1 < run.n_pairs) push(p + 1, y);
            if (p + 2 < run.n_pairs) push(p + 2, z);
            if (p + 3 < run.n_pairs) push(p + 3, w);
        }
        store_quad(forces + i, load_quad(forces + i) + total);
    }

  private:
    const potstill_pairs &pairs_;
    const potstill_pass *pass_;
    const potstill_md *md_;
    const ZblTable *zbl_;
    const int n_terms_;
    const bool wants_pairs_;

    T *gradient(int64_t i) const {
        return static_cast<T *>(pass_->gradient) + 3 * pairs_.row_ptr[i];
    }

    static void add_virial(const PairFields<T> &fields, const Run &run, const Span<T> *by_pair,
                           T *virial) {
        constexpr int L = lanes<T>;
        for (int v = 0; v < run.n_vectors; ++v) {
            const int k = run.first + v * L;
            const Vector<T> r = load(fields.r + k);
            for (int a = 0; a < 3; ++a) {
                const Vector<T> x = r * load(fields.unit[a] + k);
                for (int c = 0; c < 3; ++c) {
                    T *at = virial + (3 * a + c) * L;
                    store(at, load(at) + x * load(by_pair[c] + v * L));
                }
            }
        }
    }
};

}  // namespace
}  // namespace potstill::POTSTILL_ISA
