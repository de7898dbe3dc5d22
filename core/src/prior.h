// The short-range term of one atom. Internal linkage: every translation unit has its own copy, with the
// instructions that it is compiled for.
#pragma once

#include "kernels.h"

namespace potstill {

// Half of a pair's energy, and its derivative by the distance.
double prior_half_pair(const PriorTable &, int32_t first, int32_t second, double r,
                       double *derivative);

// A bonded neighbor: its vector, and how much of the bond there is.
struct Bonded {
    int64_t neighbor;
    int32_t species;
    double d[3], r, keep, keep_slope;
};

// Fills in `keep`; false for a pair that is not bonded.
bool find_bond(const PriorTable &, int32_t first, int32_t second, Bonded *);

// Energy of the angle between two bonds, and its derivatives by their vectors.
double angle_energy(const double *angle, const Bonded &, const Bonded &, double *first, double *second);

// A bead with more bonds has fused with others: no more of them make angles.
constexpr int MOST_BONDS = 64;

namespace {

// Neighbor of pair p, which is one of atom i's.
inline int64_t neighbor_of_pair(const potstill_pairs &pairs, int64_t i, int64_t p) {
    return pairs.rows ? pairs.rows[i][p - pairs.row_ptr[i]] & pairs.mask : pairs.neighbor[p];
}

// Energy of local atom i with `n_near` of its pairs, whose places in its row are given; NULL stands for
// the first ones. Adds them to forces, `stride` numbers per atom, virial and the virials of neighbors,
// unless they are NULL.
inline double prior_of_atom(const PriorTable &table, const potstill_pairs &pairs, const potstill_md &md,
                          int64_t i, const int32_t *near, int64_t n_near, double *forces,
                          ptrdiff_t stride, double *virial, double *neighbor_virials) {
    double energy = 0.0, total[3] = {0.0, 0.0, 0.0};
    Bonded bonded[MOST_BONDS];
    int n_bonds = 0;
    // Takes the derivative by a pair's vector.
    const auto add = [&](int64_t j, const double *d, const double *g) {
        for (int a = 0; a < 3; ++a) {
            total[a] += g[a];
            forces[stride * j + a] -= g[a];
        }
        for (int a = 0; a < 3 && (virial || neighbor_virials); ++a)
            for (int c = 0; c < 3; ++c) {
                const double part = d[a] * g[c];
                if (virial) virial[3 * a + c] += part;
                if (!neighbor_virials) continue;
                md.center_virials[9 * i + 3 * a + c] += part;
                neighbor_virials[9 * j + 3 * a + c] += part;
            }
    };
    const double *own = md.positions + 3 * i;
    const double *reach = table.reach + int64_t(table.n_species) * pairs.species[i];
    for (int64_t k = 0; k < n_near; ++k) {
        const int64_t p = pairs.row_ptr[i] + (near ? near[k] : k);
        const int64_t j = neighbor_of_pair(pairs, i, p);
        const double *offset = md.image ? md.offsets + 3 * int64_t(md.image[p]) : nullptr;
        double d[3];
        for (int a = 0; a < 3; ++a) {
            d[a] = md.positions[3 * j + a] - own[a];
            if (offset) d[a] += offset[a];
        }
        const double square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
        if (!(square < reach[pairs.species[j]])) continue;
        const double r = __builtin_sqrt(square);
        double slope;
        energy += prior_half_pair(table, pairs.species[i], pairs.species[j], r, &slope);
        if (table.n_angles && n_bonds < MOST_BONDS) {
            Bonded &b = bonded[n_bonds];
            b.neighbor = j, b.species = pairs.species[j], b.r = r;
            for (int a = 0; a < 3; ++a) b.d[a] = d[a];
            n_bonds += find_bond(table, pairs.species[i], pairs.species[j], &b);
        }
        if (!forces) continue;
        double g[3];
        for (int a = 0; a < 3; ++a) g[a] = d[a] * (slope / r);
        add(j, d, g);
    }
    for (int k = 0; k < table.n_angles && n_bonds > 1; ++k) {
        const double *angle = table.angles + 5 * k;
        const int32_t first = int32_t(angle[0]), last = int32_t(angle[2]);
        if (int32_t(angle[1]) != pairs.species[i]) continue;
        for (int u = 0; u < n_bonds; ++u)
            for (int v = first == last ? u + 1 : 0; v < n_bonds; ++v) {
                if (bonded[u].species != first || bonded[v].species != last) continue;
                double by_first[3], by_second[3];
                energy += angle_energy(angle, bonded[u], bonded[v], by_first, by_second);
                if (!forces) continue;
                add(bonded[u].neighbor, bonded[u].d, by_first);
                add(bonded[v].neighbor, bonded[v].d, by_second);
            }
    }
    if (forces)
        for (int a = 0; a < 3; ++a) forces[stride * i + a] += total[a];
    return energy;
}

}  // namespace
}  // namespace potstill
