// The C interface: checks, the layout of parameters, scratch memory and the choice of instructions.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace potstill {

namespace {

enum { bad_argument = -2, out_of_memory = -3, no_instructions = -4 };

thread_local char message[256] = "";

int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

// -- instruction sets ---------------------------------------------------------------------------

struct InstructionSet {
    const char *name;
    Kernels (*kernels)();
};

const InstructionSet instruction_sets[] = {
    {"baseline", baseline::kernels},
#ifdef POTSTILL_X86
    {"avx2", avx2::kernels},
    {"avx512", avx512::kernels},
#endif
};

bool runs_here(const InstructionSet &set) {
#ifdef POTSTILL_X86
    __builtin_cpu_init();
    if (!std::strcmp(set.name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!std::strcmp(set.name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
    (void)set;
    return true;
}

const InstructionSet *find(const char *name) {
    for (const InstructionSet &set : instruction_sets)
        if (!std::strcmp(set.name, name)) return &set;
    return nullptr;
}

std::mutex choice_lock;
const InstructionSet *choice = nullptr;

// What `name` stands for, or NULL with the reason in `message`.
const InstructionSet *usable(const char *name, const char *where) {
    const InstructionSet *set = find(name);
    if (!set) {
        char known[64] = "";
        for (const InstructionSet &s : instruction_sets) {
            if (*known) std::strcat(known, ", ");
            std::strcat(known, s.name);
        }
        fail(no_instructions, "%s is '%s', but known are %s", where, name, known);
    } else if (!runs_here(*set)) {
        fail(no_instructions, "%s is '%s', which this processor cannot run", where, name);
        set = nullptr;
    }
    return set;
}

const InstructionSet *current() {
    std::lock_guard<std::mutex> guard(choice_lock);
    if (choice) return choice;
    const char *name = std::getenv("POTSTILL_SIMD");
    if (name && *name) return choice = usable(name, "POTSTILL_SIMD");
    for (const InstructionSet &set : instruction_sets)
        if (runs_here(set)) choice = &set;
    return choice;
}

// -- memory -------------------------------------------------------------------------------------

struct OwnedArena : Arena {
    OwnedArena() : Arena{nullptr, 0} {}
    ~OwnedArena() { std::free(data); }
};
thread_local OwnedArena arena;

// -- layout of the parameters -------------------------------------------------------------------

bool is_valid(const potstill_hipnn &m) {
    return m.n_species >= 1 && m.n_features >= 1 && m.n_sensitivities >= 1 && m.l_max >= 0 &&
           m.l_max <= 2 && m.n_interaction_layers >= 1 && m.n_atom_layers >= 0 && m.cutoff > 0.0 &&
           m.cusp_reg >= 0.0 &&
           (m.cutoff_function == POTSTILL_COSINE_SQUARED || m.cutoff_function == POTSTILL_POLYNOMIAL);
}

struct OwnedLayout {
    Layout layout;
    std::vector<BlockLayout> blocks;
    std::vector<ResidualLayout> residuals;

    explicit OwnedLayout(const potstill_hipnn &m) {
        const int64_t width = m.n_features;
        int64_t at = 0;
        auto take = [&at](int64_t n) {
            const int64_t start = at;
            at += n;
            return start;
        };
        const int per_block = 1 + m.n_atom_layers;
        residuals.resize(size_t(m.n_interaction_layers) * per_block);
        blocks.resize(m.n_interaction_layers);
        for (int b = 0; b < m.n_interaction_layers; ++b) {
            const int64_t n_in = b == 0 ? m.n_species : m.n_features;
            ResidualLayout *r = &residuals[size_t(b) * per_block];
            blocks[b].n_in = int32_t(n_in);
            blocks[b].residuals = r;
            r->weight = take(m.n_sensitivities * width * n_in);
            r->mu = take(m.n_sensitivities);
            r->sigma = take(m.n_sensitivities);
            r->self_weight = take(width * n_in);
            r->bias = take(width);
            for (int rank = 0; rank < 2; ++rank)
                r->scale[rank] = rank < m.l_max ? take(width) : -1;
            r->res_weight = take(width * width);
            r->res_bias = take(width);
            r->adjust = n_in != width ? take(width * n_in) : -1;
            for (int a = 0; a < m.n_atom_layers; ++a) {
                ++r;
                *r = {take(width * width), take(width), -1, -1, {-1, -1}, -1, -1, 0, 0};
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

// -- checks -------------------------------------------------------------------------------------

int check_pairs(const potstill_pairs &p, int32_t n_species) {
    if (p.n_local < 0 || p.n_local > p.n_atoms)
        return fail(bad_argument, "there are %lld local atoms of %lld", (long long)p.n_local,
                    (long long)p.n_atoms);
    if (p.n_local > 0 && p.row_ptr[0] != 0)
        return fail(bad_argument, "the neighbor list does not start at pair 0");
    for (int64_t i = 0; i < p.n_local; ++i)
        if (p.row_ptr[i + 1] < p.row_ptr[i] || p.row_ptr[i + 1] - p.row_ptr[i] > 1000000)
            return fail(bad_argument, "atom %lld has an impossible number of neighbors",
                        (long long)i);
    for (int64_t i = 0; i < p.n_atoms; ++i)
        if (p.species[i] < 0 || p.species[i] >= n_species)
            return fail(bad_argument, "atom %lld has species %d of %d", (long long)i, p.species[i],
                        n_species);
    return 0;
}

// The kernels check the same, where it costs less.
int check_indices(const potstill_pairs &p, const potstill_md &md) {
    const int64_t n_pairs = p.n_local > 0 ? p.row_ptr[p.n_local] : 0;
    for (int64_t k = 0; k < n_pairs; ++k)
        if (p.neighbor[k] < 0 || p.neighbor[k] >= p.n_atoms ||
            (md.image && md.image[k] >= md.n_images))
            return fail(bad_argument, "pair %lld has a neighbor or image that does not exist",
                        (long long)k);
    return 0;
}

int check_images(double n_images) {
    if (n_images > 65536.0)
        return fail(bad_argument, "cell shifts span %.0f images, and at most 65536 fit: wrap the positions",
                    n_images);
    return 0;
}

int check_systems(const potstill_systems &systems, int n_threads) {
    if (n_threads < 1) return fail(bad_argument, "n_threads must be at least 1");
    if (!(systems.cutoff > 0.0)) return fail(bad_argument, "the cutoff must be positive");
    if (systems.first_atom[systems.n_systems] > INT32_MAX)
        return fail(bad_argument, "there are more atoms than 32 bits can count");
    return 0;
}

int list_error(int code) {
    if (code == -1) return fail(out_of_memory, "there is not enough memory for the neighbor list");
    if (code)
        return fail(bad_argument, "a cell is far smaller than the cutoff, or an atom far outside its cell");
    return 0;
}

int check_model(const potstill_hipnn *model, const potstill_pairs &pairs) {
    if (!is_valid(*model)) return fail(bad_argument, "the hyper-parameters are out of range");
    if (model->n_interaction_layers > 1 && pairs.n_local < pairs.n_atoms)
        return fail(bad_argument, "several interaction layers need all atoms without ghosts");
    return check_pairs(pairs, model->n_species);
}

// -- calls --------------------------------------------------------------------------------------

int run(Task &task, bool single) {
    const InstructionSet *set = current();
    if (!set) return no_instructions;
    if (task.n_threads < 1) return fail(bad_argument, "n_threads must be at least 1");
    const OwnedLayout layout(*task.model);
    task.layout = &layout.layout;
    task.arena = &arena;
    const Kernels kernels = set->kernels();
    const int code = single ? kernels.run_f32(task) : kernels.run_f64(task);
    if (code == -2) return fail(bad_argument, "a pair has a neighbor or image that does not exist");
    if (code) return fail(out_of_memory, "there is not enough memory for the scratch arrays");
    return 0;
}

int pass(const potstill_hipnn *model, const void *parameters, const potstill_pairs *pairs,
         const potstill_pass *what, int n_threads, bool single) {
    if (const int code = check_model(model, *pairs)) return code;
    Task task{};
    task.model = model;
    task.parameters = parameters;
    task.pairs = pairs;
    task.pass = what;
    task.n_threads = n_threads;
    return run(task, single);
}

struct OwnedZbl {
    std::vector<double> power;
    ZblTable table;

    OwnedZbl(const potstill_zbl &zbl, int32_t n_species) : power(n_species) {
        for (int32_t k = 0; k < n_species; ++k) power[k] = std::pow(zbl.charge[k], 0.23);
        table = {n_species, zbl.charge, power.data(), zbl.coulomb, zbl.inner, zbl.cutoff};
    }
};

// Only the ZBL term: a plain loop, since nearly all pairs end at the comparison of distances.
void zbl_alone(const ZblTable &table, const potstill_pairs &p, const potstill_md &md) {
    for (int64_t i = 0; i < p.n_local; ++i) md.energies[i] = 0.0;
    for (int64_t k = 0; md.forces && k < 3 * p.n_atoms; ++k) md.forces[k] = 0.0;
    for (int k = 0; md.virial && k < 9; ++k) md.virial[k] = 0.0;
    const double limit = table.cutoff * table.cutoff;
    for (int64_t i = 0; i < p.n_local; ++i) {
        for (int64_t k = p.row_ptr[i]; k < p.row_ptr[i + 1]; ++k) {
            const int32_t j = p.neighbor[k];
            const double *offset = md.image ? md.offsets + 3 * md.image[k] : nullptr;
            double d[3], square = 0.0;
            for (int a = 0; a < 3; ++a) {
                d[a] = md.positions[3 * j + a] - md.positions[3 * i + a] + (offset ? offset[a] : 0.0);
                square += d[a] * d[a];
            }
            if (!(square < limit)) continue;
            const double r = std::sqrt(square);
            double slope;
            md.energies[i] += zbl_half_pair(table, p.species[i], p.species[j], r, &slope);
            if (!md.forces) continue;
            for (int a = 0; a < 3; ++a) {
                const double g = slope / r * d[a];
                md.forces[3 * i + a] += g;
                md.forces[3 * j + a] -= g;
                if (md.virial)
                    for (int b = 0; b < 3; ++b) md.virial[3 * b + a] += d[b] * g;
            }
        }
    }
}

int check_zbl(const potstill_zbl &zbl) {
    if (!(zbl.inner >= 0.0 && zbl.inner < zbl.cutoff))
        return fail(bad_argument, "ZBL needs 0 <= inner < cutoff, not %g and %g", zbl.inner, zbl.cutoff);
    return 0;
}

int md(const potstill_hipnn *model, const void *parameters, const potstill_pairs *pairs,
       const potstill_md *what, int n_threads, bool single) {
    if (pairs->n_atoms == 0) {  // whose arrays may well have no address
        for (int k = 0; what->virial && k < 9; ++k) what->virial[k] = 0.0;
        return 0;
    }
    if (what->virial && !what->forces)
        return fail(bad_argument, "the virial is only computed together with the forces");
    int32_t n_species = model ? model->n_species : 0;
    if (!model) {
        if (!what->zbl) return fail(bad_argument, "there is neither a model nor a ZBL term");
        for (int64_t i = 0; i < pairs->n_atoms; ++i)
            n_species = pairs->species[i] >= n_species ? pairs->species[i] + 1 : n_species;
    }
    if (const int code = model ? check_model(model, *pairs) : check_pairs(*pairs, n_species))
        return code;
    if (what->zbl)
        if (const int code = check_zbl(*what->zbl)) return code;
    if (!model) {
        if (const int code = check_indices(*pairs, *what)) return code;
        zbl_alone(OwnedZbl(*what->zbl, n_species).table, *pairs, *what);
        return 0;
    }
    Task task{};
    task.model = model;
    task.parameters = parameters;
    task.pairs = pairs;
    task.md = what;
    task.n_threads = n_threads;
    if (!what->zbl) return run(task, single);
    const OwnedZbl zbl(*what->zbl, n_species);
    task.zbl = &zbl.table;
    return run(task, single);
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

extern "C" {

int64_t potstill_n_parameters(const potstill_hipnn *model) {
    if (!is_valid(*model)) return fail(-1, "the hyper-parameters are out of range");
    return OwnedLayout(*model).layout.n_parameters;
}

int potstill_pass_f32(const potstill_hipnn *model, const float *parameters, const potstill_pairs *pairs,
                      const potstill_pass *what, int n_threads) {
    return pass(model, parameters, pairs, what, n_threads, true);
}

int potstill_pass_f64(const potstill_hipnn *model, const double *parameters, const potstill_pairs *pairs,
                      const potstill_pass *what, int n_threads) {
    return pass(model, parameters, pairs, what, n_threads, false);
}

int potstill_md_f32(const potstill_hipnn *model, const float *parameters, const potstill_pairs *pairs,
                    const potstill_md *what, int n_threads) {
    return md(model, parameters, pairs, what, n_threads, true);
}

int potstill_md_f64(const potstill_hipnn *model, const double *parameters, const potstill_pairs *pairs,
                    const potstill_md *what, int n_threads) {
    return md(model, parameters, pairs, what, n_threads, false);
}

int potstill_pack_pairs(int64_t n_pairs, int64_t n_local, const int64_t *center, const int64_t *neighbor,
                        const int64_t *shifts, int64_t *row_ptr, int32_t *neighbor_out,
                        uint16_t *image, int32_t *images) {
    std::memset(row_ptr, 0, sizeof(int64_t) * (n_local + 1));
    int64_t low[3] = {0, 0, 0}, high[3] = {0, 0, 0};
    for (int64_t k = 0; k < n_pairs; ++k) {
        if (center[k] < 0 || center[k] >= n_local || (k > 0 && center[k] < center[k - 1]))
            return fail(bad_argument, "the pairs are not sorted by center");
        if (neighbor[k] < 0 || neighbor[k] > INT32_MAX)
            return fail(bad_argument, "a neighbor's index is outside of 32 bits");
        ++row_ptr[center[k] + 1];
        neighbor_out[k] = int32_t(neighbor[k]);
        for (int d = 0; d < 3; ++d) {
            const int64_t s = shifts[3 * k + d];
            low[d] = s < low[d] ? s : low[d];
            high[d] = s > high[d] ? s : high[d];
        }
    }
    for (int64_t i = 0; i < n_local; ++i) row_ptr[i + 1] += row_ptr[i];
    int64_t size[3];
    double n_images = 1.0;
    for (int d = 0; d < 3; ++d) {
        size[d] = high[d] - low[d] + 1;
        n_images *= double(size[d]);
    }
    if (const int code = check_images(n_images)) return code;
    for (int64_t k = 0; k < n_pairs; ++k) {
        const int64_t *s = shifts + 3 * k;
        image[k] = uint16_t(((s[0] - low[0]) * size[1] + (s[1] - low[1])) * size[2] + (s[2] - low[2]));
    }
    int32_t *row = images;
    for (int64_t a = low[0]; a <= high[0]; ++a)
        for (int64_t b = low[1]; b <= high[1]; ++b)
            for (int64_t c = low[2]; c <= high[2]; ++c) {
                *row++ = int32_t(a);
                *row++ = int32_t(b);
                *row++ = int32_t(c);
            }
    return int(n_images);
}

int potstill_count_pairs(const potstill_systems *systems, int64_t *row_ptr, int32_t *shift_range,
                         int n_threads) {
    if (const int code = check_systems(*systems, n_threads)) return code;
    if (const int code = list_error(count_pairs(*systems, row_ptr, shift_range, n_threads))) return code;
    double n_images = 1.0;
    for (int d = 0; d < 3; ++d) n_images *= double(shift_range[3 + d]) - double(shift_range[d]) + 1.0;
    return check_images(n_images);
}

int potstill_list_pairs(const potstill_systems *systems, const int64_t *row_ptr,
                        const int32_t *shift_range, int32_t *neighbor, uint16_t *image, int n_threads) {
    if (const int code = check_systems(*systems, n_threads)) return code;
    return list_error(list_pairs(*systems, row_ptr, shift_range, neighbor, image, n_threads));
}

const char *const *potstill_compiled_instruction_sets(void) {
    static const char *names[8] = {};
    static const bool filled = [] {
        int k = 0;
        for (const InstructionSet &set : instruction_sets) names[k++] = set.name;
        return true;
    }();
    (void)filled;
    return names;
}

int potstill_runnable(const char *instruction_set) {
    const InstructionSet *set = find(instruction_set);
    return set && runs_here(*set);
}

int potstill_select(const char *instruction_set) {
    const InstructionSet *set = nullptr;
    if (instruction_set) {
        set = usable(instruction_set, "the instruction set");
        if (!set) return no_instructions;
    }
    std::lock_guard<std::mutex> guard(choice_lock);
    choice = set;
    return 0;
}

const char *potstill_instruction_set(void) {
    const InstructionSet *set = current();
    return set ? set->name : nullptr;
}

double potstill_measure_gflops_f32(double seconds) {
    const InstructionSet *set = current();
    return set ? set->kernels().gflops_f32(seconds) : 0.0;
}

double potstill_measure_gflops_f64(double seconds) {
    const InstructionSet *set = current();
    return set ? set->kernels().gflops_f64(seconds) : 0.0;
}

const char *potstill_error(void) { return message; }

void potstill_release_memory(void) {
    std::free(arena.data);
    arena.data = nullptr;
    arena.size = 0;
}

size_t potstill_scratch_bytes(void) { return arena.size; }

}  // extern "C"
