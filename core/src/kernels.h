// What the translation units of all instruction sets share: plain data, no code.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "potstill_core.h"

namespace potstill {

// Where the parameters of one residual layer start in the flat array; -1 where there are none.
// `weight` is (n_out, n_in) of an atom layer, and int_weights of an interaction layer.
struct ResidualLayout {
    int64_t weight = -1, bias = -1;
    int64_t self_weight = -1, adjust = -1;            // interaction layers only, as all that follows
    int64_t mu = -1, sigma = -1, scale[2] = {-1, -1};  // of norms
    int64_t tensor_weight[4] = {-1, -1, -1, -1}, mixing = -1;  // of smooth invariants
    int64_t res_weight = -1, res_bias = -1;
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

// Tables of the short-range terms: of ZBL, with charge^0.23 besides the charges, or of beads.
struct PriorTable {
    const double *charge, *power;  // NULL without ZBL
    double coulomb, inner, zbl_cutoff;
    const double *strength, *radius;  // NULL without repulsion
    const double *bonds, *angles;     // NULL without bonds
    int32_t n_angles, n_species;
    double cutoff;        // of all
    const double *reach;  // (n_species, n_species): squares of the pairs' own cutoffs
};

// Of tensors.
constexpr int HIGHEST_RANK = 4;

// Invariant products of three tensors of ranks from 1 to l_max whose sum is even.
constexpr int n_products(int l_max) {
    return l_max < 2 ? 0 : l_max == 2 ? 2 : l_max == 3 ? 4 : 9;
}

// One evaluation of a model: what the caller gave, and where the parameters are.
struct Task {
    potstill_hipnn model;
    Layout layout;
    const void *parameters;
    potstill_pairs pairs;
    const potstill_pass *pass;  // either this
    const potstill_md *md;      // or this
    const PriorTable *prior;
    int n_threads;

    bool is_smooth() const { return model.invariants == POTSTILL_SMOOTH; }
    // Channels of each rank of smooth invariants, and the invariants of all ranks.
    int n_channels() const { return is_smooth() && model.l_max > 0 ? model.n_channels : 0; }
    int n_invariants() const {
        return model.l_max * n_channels() + n_products(model.l_max) * n_triples();
    }
    int n_triples() const { return is_smooth() ? model.n_triples : 0; }
    // Radial functions of a rank.
    int n_sens(int rank) const {
        return rank > 0 && is_smooth() ? model.n_tensor_sensitivities[rank - 1] : model.n_sensitivities;
    }
    bool wants_atom_virials() const { return md && md->center_virials; }
    bool wants_parameters() const { return pass && pass->parameter_gradient; }
    bool wants_pairs() const { return pass ? pass->gradient != nullptr : md->forces != nullptr; }
};

// Scratch memory that outlives a call; aligned to 64 bytes.
struct Arena {
    char *data;
    size_t size;
};
// Grow to at least `bytes`; false if there is not so much memory.
bool arena_reserve(Arena *, size_t bytes);

// Write down what is wrong for `potstill_error`; returns `code`.
int fail(int code, const char *format, ...);

// The steps of an evaluation, of one instruction set, type and l_max. `begin` places all it needs in
// the arena; the others take the address that it gives. It returns 0 or an error of the C interface.
struct Kernels {
    int (*begin)(const Task &, Arena *, void **evaluation);
    void (*forward)(void *evaluation, int layer);
    void (*reverse)(void *evaluation, int layer);
    void (*finish)(void *evaluation);
    void *(*features)(void *evaluation, int layer);
    void *(*cotangents)(void *evaluation, int layer);
    int (*stride)(int n_features);  // numbers from one atom's features to the next one's
};

using KernelsOf = const Kernels &(*)(bool single, int l_max);
namespace baseline {
const Kernels &kernels(bool single, int l_max);
}
namespace avx2 {
const Kernels &kernels(bool single, int l_max);
}
namespace avx512 {
const Kernels &kernels(bool single, int l_max);
}

// The kernels of the instruction set in use; NULL, with a message, if there is none.
KernelsOf current_kernels();

}  // namespace potstill
