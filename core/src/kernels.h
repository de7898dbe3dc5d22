// What the translation units of all instruction sets share: plain data, no code.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "potstill_core.h"

namespace potstill {

// Where the parameters of one residual layer start in the flat array; -1 where there are none.
// `weight` is (n_out, n_in) of an atom layer, and int_weights of an interaction layer.
struct ResidualLayout {
    int64_t weight, bias;
    int64_t mu, sigma, scale[2], adjust;  // interaction layers only
    int64_t self_weight;
    int64_t res_weight, res_bias;
};

struct BlockLayout {
    int32_t n_in;
    int64_t energy_weight, energy_bias;
    const ResidualLayout *residuals;  // interaction layer, then atom layers
};

struct Layout {
    int64_t n_parameters;
    int64_t e0;
    const BlockLayout *blocks;
};

// Tables of the ZBL term: charge^0.23 besides the charges.
struct ZblTable {
    int32_t n_species;
    const double *charge, *power;
    double coulomb, inner, cutoff;
};

// Half of a pair's repulsion, and its derivative by the distance.
double zbl_half_pair(const ZblTable &, int32_t first, int32_t second, double r, double *derivative);

// Scratch memory that outlives a call; aligned to 64 bytes.
struct Arena {
    char *data;
    size_t size;
};
// Grow to at least `bytes`; false if there is not so much memory.
bool arena_reserve(Arena *, size_t bytes);

struct Task {
    const potstill_hipnn *model;
    const Layout *layout;
    const void *parameters;
    const potstill_pairs *pairs;
    const potstill_pass *pass;  // either this
    const potstill_md *md;      // or this
    const ZblTable *zbl;
    int n_threads;
    Arena *arena;
};

// The two steps of a neighbor list: see `potstill_count_pairs` and `potstill_list_pairs`. 0, -1 when
// memory runs out, or -2 for a system whose cells or bins cannot be counted.
int count_pairs(const potstill_systems &, int64_t *row_ptr, int32_t *shift_range, int n_threads);
int list_pairs(const potstill_systems &, const int64_t *row_ptr, const int32_t *shift_range,
               int32_t *neighbor, uint16_t *image, int n_threads);

// 0, -1 when memory runs out, or -2 for a neighbor or image that does not exist.
struct Kernels {
    int (*run_f32)(const Task &);
    int (*run_f64)(const Task &);
    double (*gflops_f32)(double seconds);
    double (*gflops_f64)(double seconds);
};

namespace baseline {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}

}  // namespace potstill
