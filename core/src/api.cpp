// Evaluations through the C interface: checks, the layout of parameters, and the order of the steps.
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"
#include "model_file.h"
#include "prior.h"

namespace potstill {

namespace {

// -- layout of the parameters -------------------------------------------------------------------

bool smooth_is_valid(const potstill_hipnn &m) {
    int32_t most = m.n_sensitivities;
    for (int rank = 0; rank < m.l_max; ++rank) {
        const int32_t n = m.n_tensor_sensitivities[rank];
        if (n < 1 || n > most) return false;
        most = n;
    }
    return m.n_channels >= 1 && m.n_triples >= 0 && m.n_triples <= m.n_channels;
}

bool is_valid(const potstill_hipnn &m) {
    return m.n_species >= 1 && m.n_features >= 1 && m.n_sensitivities >= 1 && m.l_max >= 0 &&
           m.l_max <= (m.invariants == POTSTILL_SMOOTH ? 4 : 2) && m.n_interaction_layers >= 1 &&
           m.n_atom_layers >= 0 && m.cutoff > 0.0 && m.cusp_reg >= 0.0 &&
           (m.invariants == POTSTILL_NORMS || (m.invariants == POTSTILL_SMOOTH && smooth_is_valid(m))) &&
           (m.cutoff_function == POTSTILL_COSINE_SQUARED || m.cutoff_function == POTSTILL_POLYNOMIAL);
}

struct OwnedLayout {
    Layout layout;
    std::vector<BlockLayout> blocks;
    std::vector<ResidualLayout> residuals;

    void fill(const potstill_hipnn &m) {
        const int64_t width = m.n_features;
        int64_t at = 0;
        auto take = [&at](int64_t n) {
            const int64_t start = at;
            at += n;
            return start;
        };
        const int per_block = 1 + m.n_atom_layers;
        residuals.assign(size_t(m.n_interaction_layers) * per_block, {});
        blocks.resize(m.n_interaction_layers);
        for (int b = 0; b < m.n_interaction_layers; ++b) {
            const int64_t n_in = b == 0 ? m.n_species : m.n_features;
            ResidualLayout *r = &residuals[size_t(b) * per_block];
            blocks[b].n_in = int32_t(n_in);
            blocks[b].residuals = r;
            r->weight = take(m.n_sensitivities * width * n_in);
            const bool smooth = m.invariants == POTSTILL_SMOOTH;
            if (smooth) {
                for (int rank = 0; rank < m.l_max; ++rank)
                    r->tensor_weight[rank] =
                        take(int64_t(m.n_tensor_sensitivities[rank]) * m.n_channels * n_in);
                r->mixing = take(width * (m.l_max * m.n_channels + n_products(m.l_max) * m.n_triples));
            } else {
                r->mu = take(m.n_sensitivities);
                r->sigma = take(m.n_sensitivities);
            }
            r->self_weight = take(width * n_in);
            r->bias = take(width);
            for (int rank = 0; rank < m.l_max && !smooth; ++rank) r->scale[rank] = take(width);
            r->res_weight = take(width * width);
            r->res_bias = take(width);
            r->adjust = n_in != width ? take(width * n_in) : -1;
            for (int a = 0; a < m.n_atom_layers; ++a) {
                ++r;
                r->weight = take(width * width);
                r->bias = take(width);
                r->res_weight = take(width * width);
                r->res_bias = take(width);
            }
        }
        layout.e0 = take(m.n_species);
        for (BlockLayout &block : blocks) {
            block.energy_weight = take(width);
            block.energy_bias = take(1);
        }
        layout.blocks = blocks.data();
        layout.n_parameters = at;
    }
};

struct OwnedPrior {
    std::vector<double> power, reach;
    PriorTable table;

    // The table of what an evaluation adds, or NULL.
    const PriorTable *fill(const potstill_md &md, int32_t n_species) {
        table = {};
        table.n_species = n_species;
        if (md.repulsion) table.n_species = md.repulsion->n_species;
        if (md.bonds) table.n_species = md.bonds->n_species;
        const size_t n = size_t(table.n_species) * size_t(table.n_species);
        reach.assign(n, 0.0);
        const auto widen = [this](size_t pair, double radius) {
            if (radius > table.cutoff) table.cutoff = radius;
            if (radius * radius > reach[pair]) reach[pair] = radius * radius;
        };
        if (const potstill_zbl *zbl = md.zbl) {
            power.resize(size_t(n_species));
            for (size_t k = 0; k < power.size(); ++k) power[k] = std::pow(zbl->charge[k], 0.23);
            table.charge = zbl->charge, table.power = power.data(), table.coulomb = zbl->coulomb;
            table.inner = zbl->inner, table.zbl_cutoff = zbl->cutoff;
            for (size_t k = 0; k < n; ++k) widen(k, zbl->cutoff);
        }
        if (const potstill_repulsion *beads = md.repulsion) {
            table.strength = beads->strength, table.radius = beads->radius;
            for (size_t k = 0; k < n; ++k) widen(k, beads->radius[k]);
        }
        if (const potstill_bonds *bonds = md.bonds) {
            table.bonds = bonds->pairs, table.angles = bonds->angles;
            table.n_angles = bonds->n_angles;
            for (size_t k = 0; k < n; ++k) widen(k, bonds->pairs[3 * n + k]);
        }
        table.reach = reach.data();
        return table.cutoff > 0.0 ? &table : nullptr;
    }
};

// -- checks -------------------------------------------------------------------------------------

int check_pairs(const potstill_pairs &p, int32_t n_species) {
    if (p.n_local < 0 || p.n_local > p.n_atoms)
        return fail(POTSTILL_BAD_ARGUMENT, "there are %lld local atoms of %lld", (long long)p.n_local,
                    (long long)p.n_atoms);
    if (p.n_local > 0 && p.row_ptr[0] != 0)
        return fail(POTSTILL_BAD_ARGUMENT, "the neighbor list does not start at pair 0");
    for (int64_t i = 0; i < p.n_local; ++i)
        if (p.row_ptr[i + 1] < p.row_ptr[i] || p.row_ptr[i + 1] - p.row_ptr[i] > 1000000)
            return fail(POTSTILL_BAD_ARGUMENT, "atom %lld has an impossible number of neighbors",
                        (long long)i);
    for (int64_t i = 0; i < p.n_atoms; ++i)
        if (p.species[i] < 0 || p.species[i] >= n_species)
            return fail(POTSTILL_BAD_ARGUMENT, "atom %lld has species %d of %d", (long long)i,
                        p.species[i], n_species);
    return 0;
}

// The kernels check the same, where it costs less.
int check_indices(const potstill_pairs &p, const potstill_md &md) {
    const int64_t n_pairs = p.n_local > 0 ? p.row_ptr[p.n_local] : 0;
    for (int64_t k = 0; k < n_pairs; ++k)
        if ((!p.rows && (p.neighbor[k] < 0 || p.neighbor[k] >= p.n_atoms)) ||
            (md.image && md.image[k] >= md.n_images))
            return fail(POTSTILL_BAD_ARGUMENT, "pair %lld has a neighbor or image that does not exist",
                        (long long)k);
    return 0;
}

int check_md(const potstill_md &md, int32_t n_species) {
    if ((md.virial || md.center_virials) && !md.forces)
        return fail(POTSTILL_BAD_ARGUMENT, "the virial is only computed together with the forces");
    if (!md.center_virials != !md.neighbor_virials)
        return fail(POTSTILL_BAD_ARGUMENT, "the virials of centers and of neighbors come together");
    if (md.zbl && !(md.zbl->inner >= 0.0 && md.zbl->inner < md.zbl->cutoff))
        return fail(POTSTILL_BAD_ARGUMENT, "ZBL needs 0 <= inner < cutoff, not %g and %g",
                    md.zbl->inner, md.zbl->cutoff);
    if (md.repulsion && md.zbl)
        return fail(POTSTILL_BAD_ARGUMENT, "ZBL and the repulsion of beads do not come together");
    if (md.repulsion && md.repulsion->n_species < n_species)
        return fail(POTSTILL_BAD_ARGUMENT, "the repulsion is of %d species, not of %d",
                    md.repulsion->n_species, n_species);
    if (md.bonds && (md.bonds->n_species < n_species ||
                     (md.repulsion && md.bonds->n_species != md.repulsion->n_species)))
        return fail(POTSTILL_BAD_ARGUMENT, "the bonds are of %d species, not of %d",
                    md.bonds->n_species, n_species);
    return 0;
}

}  // namespace

bool arena_reserve(Arena *a, size_t bytes) {
    if (a->size >= bytes) return true;
    std::free(a->data);
    const size_t rounded = (bytes + bytes / 8 + 4095) / 4096 * 4096;
    a->data = static_cast<char *>(std::aligned_alloc(4096, rounded));
    a->size = a->data ? rounded : 0;
    return a->data != nullptr;
}

}  // namespace potstill

using namespace potstill;

// An evaluation on its way. Steps count forward through the layers, then back through them.
struct potstill_state {
    Task task{};
    potstill_pass pass{};
    potstill_md md{};
    OwnedLayout layout;
    OwnedPrior prior;
    Arena arena{};
    const Kernels *kernels = nullptr;
    void *evaluation = nullptr;  // NULL between evaluations
    int step = 0;
    const double *offsets = nullptr;  // (n_species) energies of single atoms, of models from files

    potstill_state() = default;
    potstill_state(const potstill_state &) = delete;
    ~potstill_state() { release(); }

    int n_layers() const { return task.model.n_interaction_layers; }
    int n_steps() const {
        return task.wants_pairs() || task.wants_parameters() ? 2 * n_layers() : n_layers();
    }

    void release() {
        std::free(arena.data);
        arena = {};
        evaluation = nullptr;
    }

    int begin(const potstill_hipnn &model, const void *parameters, const potstill_pairs &pairs,
              const potstill_pass *given_pass, const potstill_md *given_md, int n_threads, bool single) {
        evaluation = nullptr;
        offsets = nullptr;
        if (!is_valid(model)) return fail(POTSTILL_BAD_ARGUMENT, "the hyper-parameters are out of range");
        if (const int code = check_pairs(pairs, model.n_species)) return code;
        if (given_md && pairs.n_atoms > 0)  // no atoms, no forces: their array may have no address
            if (const int code = check_md(*given_md, model.n_species)) return code;
        if (given_pass && pairs.rows)
            return fail(POTSTILL_BAD_ARGUMENT, "neighbors in rows are for given positions");
        if (n_threads < 1) return fail(POTSTILL_BAD_ARGUMENT, "n_threads must be at least 1");
        const KernelsOf of = current_kernels();
        if (!of) return POTSTILL_NO_INSTRUCTIONS;
        static const int64_t no_rows[1] = {0};
        task = {};
        task.model = model, task.parameters = parameters, task.pairs = pairs, task.n_threads = n_threads;
        if (pairs.n_local == 0) task.pairs.row_ptr = no_rows;  // empty arrays may have no address
        if (given_pass) pass = *given_pass, task.pass = &pass;
        if (given_md) md = *given_md, task.md = &md;
        try {
            layout.fill(model);
            if (given_md) task.prior = prior.fill(md, model.n_species);
        } catch (const std::bad_alloc &) {
            return fail(POTSTILL_OUT_OF_MEMORY, "there is not enough memory for the parameters' layout");
        }
        task.layout = layout.layout;
        kernels = &of(single, model.l_max);
        step = 0;
        const int code = kernels->begin(task, &arena, &evaluation);
        if (code) evaluation = nullptr;
        return code;
    }

    // Whether the step that is asked for comes next.
    int take_step(int wanted, const char *name, int layer) {
        if (!evaluation) return fail(POTSTILL_BAD_ARGUMENT, "no evaluation has begun");
        if (layer < 0 || layer >= n_layers() || wanted != step || wanted >= n_steps())
            return fail(POTSTILL_BAD_ARGUMENT, "%s of layer %d is not the next step of the evaluation",
                        name, layer);
        ++step;
        return 0;
    }

    int forward(int layer) {
        if (const int code = take_step(layer, "forward", layer)) return code;
        kernels->forward(evaluation, layer);
        return 0;
    }

    int reverse(int layer) {
        if (const int code = take_step(2 * n_layers() - 1 - layer, "reverse", layer)) return code;
        kernels->reverse(evaluation, layer);
        return 0;
    }

    int finish() {
        if (!evaluation || step != n_steps())
            return fail(POTSTILL_BAD_ARGUMENT, "the evaluation has steps left, or none has begun");
        kernels->finish(evaluation);
        evaluation = nullptr;
        for (int64_t i = 0; offsets && i < task.pairs.n_local; ++i)
            md.energies[i] += offsets[task.pairs.species[i]];
        return 0;
    }

    // The whole model in one call.
    int run(const potstill_hipnn &model, const void *parameters, const potstill_pairs &pairs,
            const potstill_pass *given_pass, const potstill_md *given_md, int n_threads, bool single) {
        if (model.n_interaction_layers > 1 && pairs.n_local < pairs.n_atoms)
            return fail(POTSTILL_BAD_ARGUMENT,
                        "several interaction layers need all atoms without ghosts, or one call per layer");
        if (const int code = begin(model, parameters, pairs, given_pass, given_md, n_threads, single))
            return code;
        for (int k = 0; k < n_layers(); ++k) forward(k);
        for (int k = n_layers() - 1; k >= 0 && step < n_steps(); --k) reverse(k);
        return finish();
    }
};

namespace {

thread_local potstill_state own_state;

// Only the short-range term: a plain loop, since nearly all pairs end at the comparison of distances.
int prior_alone(const potstill_pairs &p, const potstill_md &md) {
    if (!md.zbl && !md.repulsion && !md.bonds)
        return fail(POTSTILL_BAD_ARGUMENT, "there is neither a model nor a short-range term");
    int32_t n_species = 0;
    for (int64_t i = 0; i < p.n_atoms; ++i)
        n_species = p.species[i] >= n_species ? p.species[i] + 1 : n_species;
    if (const int code = check_pairs(p, n_species)) return code;
    if (const int code = check_md(md, n_species)) return code;
    if (const int code = check_indices(p, md)) return code;
    OwnedPrior prior;
    prior.fill(md, n_species);
    for (int64_t k = 0; md.forces && !md.add_forces && k < 3 * p.n_atoms; ++k) md.forces[k] = 0.0;
    for (int64_t k = 0; md.center_virials && k < 9 * p.n_local; ++k) md.center_virials[k] = 0.0;
    for (int64_t k = 0; md.neighbor_virials && k < 9 * p.n_atoms; ++k) md.neighbor_virials[k] = 0.0;
    for (int k = 0; md.virial && k < 9; ++k) md.virial[k] = 0.0;
    for (int64_t i = 0; i < p.n_local; ++i)
        md.energies[i] =
            prior_of_atom(prior.table, p, md, i, nullptr, p.row_ptr[i + 1] - p.row_ptr[i], md.forces, 3,
                          md.virial, md.neighbor_virials);
    return 0;
}

int run_md(const potstill_hipnn *model, const void *parameters, const potstill_pairs &pairs,
           const potstill_md &md, int n_threads, bool single) {
    return model ? own_state.run(*model, parameters, pairs, nullptr, &md, n_threads, single)
                 : prior_alone(pairs, md);
}

// Features or cotangents of a layer that has some.
void *rows(potstill_state *state, int layer, int64_t *stride, bool cotangents) {
    if (!state->evaluation || layer < 0 || layer + 1 >= state->n_layers()) return nullptr;
    *stride = state->kernels->stride(state->task.model.n_features);
    return (cotangents ? state->kernels->cotangents : state->kernels->features)(state->evaluation, layer);
}

}  // namespace

extern "C" {

int64_t potstill_n_parameters(const potstill_hipnn *model) {
    if (!is_valid(*model)) return fail(POTSTILL_BAD_ARGUMENT, "the hyper-parameters are out of range");
    OwnedLayout layout;
    layout.fill(*model);
    return layout.layout.n_parameters;
}

int potstill_pass_f32(const potstill_hipnn *model, const float *parameters, const potstill_pairs *pairs,
                      const potstill_pass *what, int n_threads) {
    return own_state.run(*model, parameters, *pairs, what, nullptr, n_threads, true);
}

int potstill_pass_f64(const potstill_hipnn *model, const double *parameters, const potstill_pairs *pairs,
                      const potstill_pass *what, int n_threads) {
    return own_state.run(*model, parameters, *pairs, what, nullptr, n_threads, false);
}

int potstill_md_f32(const potstill_hipnn *model, const float *parameters, const potstill_pairs *pairs,
                    const potstill_md *what, int n_threads) {
    return run_md(model, parameters, *pairs, *what, n_threads, true);
}

int potstill_md_f64(const potstill_hipnn *model, const double *parameters, const potstill_pairs *pairs,
                    const potstill_md *what, int n_threads) {
    return run_md(model, parameters, *pairs, *what, n_threads, false);
}

potstill_state *potstill_new_state(void) { return new (std::nothrow) potstill_state; }
void potstill_delete_state(potstill_state *state) { delete state; }

int potstill_begin_f32(potstill_state *state, const potstill_hipnn *model, const float *parameters,
                       const potstill_pairs *pairs, const potstill_md *what, int n_threads) {
    return state->begin(*model, parameters, *pairs, nullptr, what, n_threads, true);
}

int potstill_begin_f64(potstill_state *state, const potstill_hipnn *model, const double *parameters,
                       const potstill_pairs *pairs, const potstill_md *what, int n_threads) {
    return state->begin(*model, parameters, *pairs, nullptr, what, n_threads, false);
}

int potstill_begin_model(potstill_state *state, const potstill_model *model, int32_t in_double,
                         const potstill_pairs *pairs, const potstill_md *what, int n_threads) {
    potstill_md md = *what;
    md.zbl = model->has_zbl ? &model->zbl : nullptr;
    md.repulsion = model->has_repulsion ? &model->repulsion : nullptr;
    md.bonds = model->has_bonds ? &model->bonds : nullptr;
    const void *parameters = in_double ? static_cast<const void *>(model->in_double.data())
                                       : static_cast<const void *>(model->in_single.data());
    if (const int code = state->begin(model->hipnn, parameters, *pairs, nullptr, &md, n_threads, !in_double))
        return code;
    state->offsets = model->offsets.data();
    return 0;
}

size_t potstill_state_bytes(const potstill_state *state) { return state->arena.size; }

int potstill_layer_forward(potstill_state *state, int layer) { return state->forward(layer); }
int potstill_layer_reverse(potstill_state *state, int layer) { return state->reverse(layer); }
int potstill_finish(potstill_state *state) { return state->finish(); }

void *potstill_layer_features(potstill_state *state, int layer, int64_t *stride) {
    return rows(state, layer, stride, false);
}

void *potstill_layer_cotangents(potstill_state *state, int layer, int64_t *stride) {
    return rows(state, layer, stride, true);
}

void potstill_release_memory(void) { own_state.release(); }
size_t potstill_scratch_bytes(void) { return own_state.arena.size; }

}  // extern "C"
