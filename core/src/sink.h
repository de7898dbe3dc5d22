// Where results go: terms of energy and gradients by given pair vectors, or atomic energies, forces
// and virial.
#pragma once

#include "arena.h"
#include "pairs.h"
#include "quads.h"
#include "prior.h"

namespace potstill::POTSTILL_ISA {
namespace {

// What one part of the atoms has added up of forces and virial.
template <class T>
struct ForceSums {
    Span<Quad> forces;  // (n_atoms)
    Span<double> neighbor_virials;  // (n_atoms, 9) if asked for
    Span<T> virial;     // (9, L), of the latest block
    double virial_sum[9];

    ForceSums(const Task &task, Carver &c)
        : forces(c.take<Quad>(task.md && task.md->forces ? task.pairs.n_atoms : 0)),
          neighbor_virials(c.take<double>(task.wants_atom_virials() ? 9 * task.pairs.n_atoms : 0)),
          virial(c.take<T>(9 * lanes<T>)) {}

    void clear() {
        for (double &v : virial_sum) v = 0.0;
        virial.clear();
        forces.clear();
        neighbor_virials.clear();
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
          prior_(task.prior),
          n_terms_(task.model.n_interaction_layers + 1),
          wants_pairs_(task.wants_pairs()) {}

    bool wants_pairs() const { return wants_pairs_; }
    bool wants_virial() const { return md_ && md_->virial; }
    const PriorTable *prior() const { return prior_; }

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

    // Of an atom's pairs at some places in its row.
    void add_prior(int64_t i, const int32_t *near, int n_near, ForceSums<T> &sums) const {
        double *forces = wants_pairs_ ? sums.forces.data->x : nullptr;
        md_->energies[i] += prior_of_atom(*prior_, pairs_, *md_, i, near, n_near, forces, 4,
                                        wants_virial() ? sums.virial_sum : nullptr,
                                        md_->center_virials ? sums.neighbor_virials.data : nullptr);
    }

    // Gradients by the vectors of an atom are sums over the layers, that start here.
    void start_gradient(int64_t i) const {
        if (pass_ && wants_pairs_)
            clear(size_t(3 * (pairs_.row_ptr[i + 1] - pairs_.row_ptr[i])), gradient(i));
    }

    void add_virial(const PairFields<T> &fields, const Run &run, const T *const *by_pair,
                    const ForceSums<T> &sums) const {
        constexpr int L = lanes<T>;
        if (!wants_virial()) return;
        Vector<T> sum[9];
        for (int k = 0; k < 9; ++k) sum[k] = load(sums.virial + k * L);
        for (int v = 0; v < run.n_vectors; ++v) {
            const int k = run.first + v * L;
            const Vector<T> r = load(fields.r + k);
            const Vector<T> gx = load(by_pair[0] + v * L), gy = load(by_pair[1] + v * L),
                            gz = load(by_pair[2] + v * L);
#pragma GCC unroll 3
            for (int a = 0; a < 3; ++a) {
                const Vector<T> x = r * load(fields.unit[a] + k);
                sum[3 * a] += x * gx, sum[3 * a + 1] += x * gy, sum[3 * a + 2] += x * gz;
            }
        }
        for (int k = 0; k < 9; ++k) store(sums.virial + k * L, sum[k]);
    }

    // Virials of atom i's pairs at both of their atoms: from place `lane` of the run on, each `step`.
    void share_virial(int64_t i, const OwnPairs &own, const PairFields<T> &fields, const Run &run,
                      int lane, ptrdiff_t step, const T *const *by_pair, ForceSums<T> &sums) const {
        if (!md_ || !md_->center_virials) return;
        double *center = md_->center_virials + 9 * i;
        for (int p = 0; p < own.n; ++p) {
            const ptrdiff_t at = lane + p * step, k = run.first + at;
            double *neighbor = sums.neighbor_virials + 9 * int64_t(fields.label[own.label + p]);
            for (int a = 0; a < 3; ++a) {
                const double x = double(fields.r[k]) * double(fields.unit[a][k]);
                for (int c = 0; c < 3; ++c) {
                    const double part = x * double(by_pair[c][at]);
                    center[3 * a + c] += part;
                    neighbor[3 * a + c] += part;
                }
            }
        }
    }

    // Take the gradients by the vectors of atom i's pairs, `step` numbers from one to the next; the
    // virial is added beforehand.
    void deliver(int64_t i, const OwnPairs &own, const int32_t *labels, const T *const *by_pair,
                 ptrdiff_t step, ForceSums<T> &sums) const {
        const T *const gx = by_pair[0], *const gy = by_pair[1], *const gz = by_pair[2];
        labels += own.label;
        if (pass_) {
            T *row = gradient(i);
            for (int p = 0; p < own.n; ++p) {
                T *at = row + 3 * int64_t(labels[p]);
                at[0] += gx[p * step], at[1] += gy[p * step], at[2] += gz[p * step];
            }
            return;
        }
        Double4 total{};
        for (int p = 0; p < own.n; ++p)
            push(Four<T>{gx[p * step], gy[p * step], gz[p * step], T(0)}, sums.forces + labels[p], total);
        store_quad(sums.forces + i, load_quad(sums.forces + i) + total);
    }

    // The same of atoms i, i + 1, ..., in lanes: forces of four at a time.
    void deliver_lanes(int64_t i, int n_atoms, const OwnPairs *own, const int32_t *labels,
                       const T *const *by_pair, ForceSums<T> &sums) const {
        constexpr int L = lanes<T>;
        int a = 0;
        for (; a + 4 <= n_atoms && md_; a += 4) {
            int most = 0;
            for (int q = a; q < a + 4; ++q) most = own[q].n > most ? own[q].n : most;
            Double4 total[4] = {};
            for (int p = 0; p < most; ++p) {
                const ptrdiff_t at = p * L + a;
                Four<T> part[4] = {load_four(by_pair[0] + at), load_four(by_pair[1] + at),
                                   load_four(by_pair[2] + at)};
                transpose_four(part[0], part[1], part[2], part[3]);
                for (int q = 0; q < 4; ++q)
                    if (p < own[a + q].n)
                        push(part[q], sums.forces + labels[own[a + q].label + p], total[q]);
            }
            for (int q = 0; q < 4; ++q) {
                Quad *center = sums.forces + i + a + q;
                store_quad(center, load_quad(center) + total[q]);
            }
        }
        for (; a < n_atoms; ++a) {
            const T *const own_part[3] = {by_pair[0] + a, by_pair[1] + a, by_pair[2] + a};
            deliver(i + a, own[a], labels, own_part, L, sums);
        }
    }

  private:
    const potstill_pairs &pairs_;
    const potstill_pass *pass_;
    const potstill_md *md_;
    const PriorTable *prior_;
    const int n_terms_;
    const bool wants_pairs_;

    // To the force on a neighbor, and the other way to the center's.
    static POTSTILL_INLINE void push(Four<T> gradient, Quad *neighbor, Double4 &center) {
        const Double4 g = __builtin_convertvector(gradient, Double4);
        store_quad(neighbor, load_quad(neighbor) - g);
        center += g;
    }

    T *gradient(int64_t i) const {
        return static_cast<T *>(pass_->gradient) + 3 * pairs_.row_ptr[i];
    }

};

}  // namespace
}  // namespace potstill::POTSTILL_ISA
