// Pair vectors of batches of systems, and what gradients by them mean for atoms and cells. These are
// bound by memory, not by arithmetic: plain loops, parallel over atoms or over systems.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "potstill_core.h"

namespace {

int32_t system_of(const potstill_batch &batch, int64_t i) { return batch.system ? batch.system[i] : 0; }

template <class T>
void pair_vectors(const potstill_pairs &p, const potstill_batch &batch, T *r_ij, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t i = 0; i < p.n_local; ++i) {
        const double *own = batch.positions + 3 * i;
        const double *offsets = batch.offsets + 3 * batch.n_images * system_of(batch, i);
        for (int64_t k = p.row_ptr[i]; k < p.row_ptr[i + 1]; ++k) {
            const double *other = batch.positions + 3 * int64_t(p.neighbor[k]);
            const double *offset = offsets + (batch.image ? 3 * int64_t(batch.image[k]) : 0);
            for (int d = 0; d < 3; ++d) r_ij[3 * k + d] = T(other[d] - own[d] + offset[d]);
        }
    }
}

// Forces and virial of atoms first .. last - 1, whose neighbors are among them.
template <class T>
void forces_of(const potstill_pairs &p, int64_t first, int64_t last, const T *r_ij, const T *gradient,
               double *forces, double *virial) {
    double sum[9] = {};  // in registers: stores to forces would send it to memory at every pair
    for (int64_t i = first; i < last; ++i) {
        double total[3] = {0.0, 0.0, 0.0};
        for (int64_t k = p.row_ptr[i]; k < p.row_ptr[i + 1]; ++k) {
            double *other = forces + 3 * int64_t(p.neighbor[k]);
            for (int d = 0; d < 3; ++d) {
                const double g = double(gradient[3 * k + d]);
                total[d] += g;
                other[d] -= g;
                if (virial)
                    for (int a = 0; a < 3; ++a) sum[3 * a + d] += double(r_ij[3 * k + a]) * g;
            }
        }
        for (int d = 0; d < 3; ++d) forces[3 * i + d] += total[d];
    }
    if (virial) memcpy(virial, sum, sizeof sum);
}

template <class T>
void pair_forces(const potstill_pairs &p, const int64_t *first_atom, int64_t n_systems, const T *r_ij,
                 const T *gradient, double *forces, double *virial, int n_threads) {
    memset(forces, 0, sizeof(double) * 3 * size_t(p.n_atoms));
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (int64_t s = 0; s < n_systems; ++s)
        forces_of(p, first_atom[s], first_atom[s + 1], r_ij, gradient, forces,
                  virial ? virial + 9 * s : nullptr);
}

}  // namespace

extern "C" {

void potstill_pair_vectors_f32(const potstill_pairs *pairs, const potstill_batch *batch, float *r_ij,
                               int n_threads) {
    pair_vectors(*pairs, *batch, r_ij, n_threads);
}

void potstill_pair_vectors_f64(const potstill_pairs *pairs, const potstill_batch *batch, double *r_ij,
                               int n_threads) {
    pair_vectors(*pairs, *batch, r_ij, n_threads);
}

void potstill_pair_forces_f32(const potstill_pairs *pairs, const int64_t *first_atom, int64_t n_systems,
                              const float *r_ij, const float *gradient, double *forces, double *virial,
                              int n_threads) {
    pair_forces(*pairs, first_atom, n_systems, r_ij, gradient, forces, virial, n_threads);
}

void potstill_pair_forces_f64(const potstill_pairs *pairs, const int64_t *first_atom, int64_t n_systems,
                              const double *r_ij, const double *gradient, double *forces,
                              double *virial, int n_threads) {
    pair_forces(*pairs, first_atom, n_systems, r_ij, gradient, forces, virial, n_threads);
}

}  // extern "C"
