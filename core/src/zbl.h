// The ZBL term of one atom. Internal linkage: every translation unit has its own copy, with the
// instructions that it is compiled for.
#pragma once

#include "kernels.h"

namespace potstill {

// Half of a pair's repulsion, and its derivative by the distance.
double zbl_half_pair(const ZblTable &, int32_t first, int32_t second, double r, double *derivative);

namespace {

// Energy of local atom i. Adds its pairs to forces, `stride` numbers per atom, and virial, unless
// they are NULL.
inline double zbl_of_atom(const ZblTable &table, const potstill_pairs &pairs, const potstill_md &md,
                          int64_t i, double *forces, ptrdiff_t stride, double *virial) {
    double energy = 0.0, total[3] = {0.0, 0.0, 0.0};
    const double *own = md.positions + 3 * i;
    for (int64_t p = pairs.row_ptr[i]; p < pairs.row_ptr[i + 1]; ++p) {
        const int64_t j = pairs.neighbor[p];
        const double *offset = md.image ? md.offsets + 3 * int64_t(md.image[p]) : nullptr;
        double d[3];
        for (int a = 0; a < 3; ++a) {
            d[a] = md.positions[3 * j + a] - own[a];
            if (offset) d[a] += offset[a];
        }
        const double r = __builtin_sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
        if (!(r < table.cutoff)) continue;
        double slope;
        energy += zbl_half_pair(table, pairs.species[i], pairs.species[j], r, &slope);
        if (!forces) continue;
        double g[3];
        for (int a = 0; a < 3; ++a) {
            g[a] = d[a] * (slope / r);
            total[a] += g[a];
            forces[stride * j + a] -= g[a];
        }
        if (virial)
            for (int a = 0; a < 3; ++a)
                for (int c = 0; c < 3; ++c) virial[3 * a + c] += d[a] * g[c];
    }
    if (forces)
        for (int a = 0; a < 3; ++a) forces[stride * i + a] += total[a];
    return energy;
}

}  // namespace
}  // namespace potstill
