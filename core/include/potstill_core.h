/* The plain C interface of potstill's native core: HIP-NN with tensor sensitivities.
 *
 * Units are those of potstill: angstrom, eV. All arrays are contiguous, row-major and owned by the
 * caller. Functions return 0 (or a number that is asked for), or one of the negative codes below;
 * `potstill_error` says in one sentence what is wrong. They may be called from several threads at a
 * time, each with its own output arrays.
 */
#ifndef POTSTILL_CORE_H
#define POTSTILL_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    POTSTILL_BAD_ARGUMENT = -1,
    POTSTILL_OUT_OF_MEMORY = -2,
    POTSTILL_NO_INSTRUCTIONS = -3 /* POTSTILL_SIMD names none that runs here */
};

enum { POTSTILL_COSINE_SQUARED = 0, POTSTILL_POLYNOMIAL = 1 };
enum { POTSTILL_NORMS = 0, POTSTILL_SMOOTH = 1 };

/* Hyper-parameters of a model.
 *
 * Its parameters are one flat array. Per block, first the interaction layer: int_weights
 * (n_sensitivities, n_features, n_in), mu (n_sensitivities), sigma (n_sensitivities), selfint.weight
 * (n_features, n_in), selfint.bias (n_features), scales of rank 1 and 2 as far as l_max goes
 * (n_features each), res_layer.weight (n_features, n_features), res_layer.bias (n_features), and
 * adjust.weight (n_features, n_in) if n_in != n_features. With smooth invariants, tensor weights
 * (n_tensor_sensitivities, n_channels, n_in) of rank 1 to l_max and mixing (n_features, l_max
 * n_channels + n_products n_triples) take the place of mu and sigma, and there are no scales;
 * n_products is 0, 0, 2, 4, 9 for l_max from 0 to 4. Then per atom layer: layer.weight,
 * layer.bias, res_layer.weight, res_layer.bias. After all blocks the energy layers: E0 (n_species),
 * then weight (n_features) and bias (1) per block. n_in is n_species in the first block and
 * n_features in the others. */
typedef struct {
    int32_t n_species;
    int32_t n_features;
    int32_t n_sensitivities;
    int32_t l_max;                /* at most 2 (norms) or 4 (smooth) */
    int32_t n_interaction_layers; /* at least 1 */
    int32_t n_atom_layers;        /* at least 0 */
    int32_t cutoff_function;      /* POTSTILL_COSINE_SQUARED or POTSTILL_POLYNOMIAL */
    double cutoff;
    double cusp_reg;
    int32_t invariants; /* POTSTILL_NORMS or POTSTILL_SMOOTH */
    int32_t n_channels; /* tensors of each rank, of smooth invariants */
    int32_t n_triples;  /* of these, whose products of three are taken */
    /* How many of the n_sensitivities, from the first on, tensors of rank 1 to 4 have in smooth
     * invariants: at least 1 up to l_max, and no more than the rank before. */
    int32_t n_tensor_sensitivities[4];
} potstill_hipnn;

/* Neighbors of the local atoms: pairs of atom i are row_ptr[i] .. row_ptr[i + 1] - 1. Engines that keep
 * each atom's neighbors in a place of its own give `rows` instead of `neighbor`: with positions, not
 * with pair vectors. These indices are taken as they are, without a check. */
typedef struct {
    int64_t n_atoms;         /* local atoms, then ghosts */
    int64_t n_local;
    const int32_t *species;  /* (n_atoms) */
    const int64_t *row_ptr;  /* (n_local + 1), starts at 0 */
    const int32_t *neighbor; /* (row_ptr[n_local]), or NULL if there are rows */
    const int32_t *const *rows; /* (n_local) addresses, or NULL */
    int32_t mask;               /* bits of a number in `rows` that are the neighbor's index */
} potstill_pairs;

/* Ziegler-Biersack-Littmark repulsion; charge per species, radii as in potstill.models.prior. */
typedef struct {
    const double *charge; /* (n_species) */
    double coulomb;       /* e^2 / (4 pi epsilon_0), eV angstrom */
    double inner;
    double cutoff;
} potstill_zbl;

/* Repulsion of beads as in potstill.models.prior, by (n_species, n_species) symmetric matrices. */
typedef struct {
    const double *strength; /* eV */
    const double *radius;   /* angstrom, where it ends; zero where there is none */
    int32_t n_species;
} potstill_repulsion;

/* Bonds and angles of beads as in potstill.models.bonded. */
typedef struct {
    const double *pairs;  /* (4, n_species, n_species): length, stiffness, inner, outer; zero without */
    const double *angles; /* (n_angles, 5): species of one end, vertex, other end; cosine, stiffness */
    int32_t n_angles;
    int32_t n_species;
} potstill_bonds;

/* One pass over given pair vectors. Sum over atoms and terms of weight * partial energy is what the
 * gradients derive. Outputs that are NULL are not computed. */
typedef struct {
    const void *r_ij;          /* (E, 3) float or double */
    int32_t r_ij_is_double;
    const double *weights;     /* (n_local, n_interaction_layers + 1), or NULL for ones */
    double *terms;             /* (n_local, n_interaction_layers + 1): E0 term first */
    void *gradient;            /* (E, 3) in the model's type: d(weighted sum)/d r_ij */
    double *parameter_gradient; /* (n_parameters), summed in double precision */
} potstill_pass;

/* Energies, forces and virial at given positions. A pair's vector is
 * positions[neighbor] - positions[center] + offsets[image]; pairs may lie beyond the cutoff. */
typedef struct {
    const double *positions;   /* (n_atoms, 3) */
    const uint16_t *image;     /* (E), or NULL where no pair crosses a boundary */
    const double *offsets;     /* (n_images, 3): whole lattice vectors, Cartesian */
    int64_t n_images;
    const potstill_zbl *zbl;   /* added if not NULL */
    double *energies;          /* (n_local) */
    double *forces;            /* (n_atoms, 3), ghosts included; or NULL */
    double *virial;            /* (9) sum of r_ij outer dE/dr_ij; or NULL; needs forces */
    int32_t add_forces;        /* whether to add to what `forces` holds */
    /* The virial by atoms, both or NULL: each pair's at its center (n_local, 9), and at its neighbor
     * (n_atoms, 9), ghosts included. Of one interaction layer the latter is what the heat flux takes
     * (Fan et al., Phys. Rev. B 92, 094301 (2015), equation 20). */
    double *center_virials, *neighbor_virials;
    const potstill_repulsion *repulsion; /* added if not NULL; then there is no ZBL term */
    const potstill_bonds *bonds;         /* added if not NULL */
} potstill_md;

/* Number of parameters, or an error for hyper-parameters out of range. */
int64_t potstill_n_parameters(const potstill_hipnn *model);

int potstill_pass_f32(const potstill_hipnn *, const float *parameters, const potstill_pairs *,
                      const potstill_pass *, int n_threads);
int potstill_pass_f64(const potstill_hipnn *, const double *parameters, const potstill_pairs *,
                      const potstill_pass *, int n_threads);

/* The model may be NULL: then only the ZBL term, repulsion and bonds are computed. */
int potstill_md_f32(const potstill_hipnn *, const float *parameters, const potstill_pairs *,
                    const potstill_md *, int n_threads);
int potstill_md_f64(const potstill_hipnn *, const double *parameters, const potstill_pairs *,
                    const potstill_md *, int n_threads);

/* The same model layer by layer, for engines that divide space into domains.
 *
 * Local atoms are the centers of pairs; their neighbors may be ghosts, copies of atoms that another
 * domain owns. A layer computes the features of the local atoms, and before the next layer the
 * engine copies them to the ghosts. On the way back a layer adds up the derivatives of the energy by
 * its input features, of local atoms and ghosts, and before the layer below the engine adds the
 * ghosts' to their owners', as it does with the ghosts' forces in the end:
 *
 *     potstill_begin_f64(state, &model, parameters, &pairs, &md, n_threads);
 *     for (k = 0; k < n_layers; ++k) {
 *         potstill_layer_forward(state, k);
 *         if (k < n_layers - 1) copy_to_ghosts(potstill_layer_features(state, k, &stride), stride);
 *     }
 *     for (k = n_layers - 1; k >= 0; --k) {
 *         potstill_layer_reverse(state, k);
 *         if (k > 0) add_to_owners(potstill_layer_cotangents(state, k - 1, &stride), stride);
 *     }
 *     potstill_finish(state);
 *
 * Without forces to compute there is no way back. The functions above, for whole models, take the
 * same steps. The arrays given to `begin` must stay until `finish`, which writes forces and virial;
 * steps in another order are refused. A state keeps its memory for the next evaluation, and any
 * number of states may be on their way at a time. */
typedef struct potstill_state potstill_state;
potstill_state *potstill_new_state(void); /* NULL if there is no memory */
void potstill_delete_state(potstill_state *);

int potstill_begin_f32(potstill_state *, const potstill_hipnn *, const float *parameters,
                       const potstill_pairs *, const potstill_md *, int n_threads);
int potstill_begin_f64(potstill_state *, const potstill_hipnn *, const double *parameters,
                       const potstill_pairs *, const potstill_md *, int n_threads);
int potstill_layer_forward(potstill_state *, int layer);
int potstill_layer_reverse(potstill_state *, int layer);
int potstill_finish(potstill_state *);

/* Output features of a layer, and the derivatives by them: (n_atoms, n_features) numbers of the
 * model's type, with `*stride` numbers from one atom to the next. NULL for the last layer, or
 * outside of an evaluation. */
void *potstill_layer_features(potstill_state *, int layer, int64_t *stride);
void *potstill_layer_cotangents(potstill_state *, int layer, int64_t *stride);

/* Bytes of memory that a state keeps. */
size_t potstill_state_bytes(const potstill_state *);

/* Models in files: network, repulsion and the energies of single atoms, all that a potential of
 * potstill is made of. The format is described in docs/lammps.md. `open` and `parse` return NULL
 * where a file is missing, damaged, newer than this library or no such file. */
typedef struct potstill_model potstill_model;
potstill_model *potstill_open_model(const char *path);
potstill_model *potstill_parse_model(const void *content, size_t n_bytes); /* of such a file */
void potstill_close_model(potstill_model *);

int32_t potstill_model_n_species(const potstill_model *);
const char *potstill_model_species(const potstill_model *, int32_t species); /* e.g. "Al" */
double potstill_model_cutoff(const potstill_model *); /* the largest of all its parts */
int32_t potstill_model_n_layers(const potstill_model *);
int32_t potstill_model_n_features(const potstill_model *);
int32_t potstill_model_is_double(const potstill_model *); /* what it was trained in */
const char *potstill_model_provenance(const potstill_model *); /* JSON: versions, training, license */

/* As `potstill_begin_f32` or `_f64`, with all parts of the model: `md->zbl`, `md->repulsion`
 * and `md->bonds` are not looked at, and the energies of single atoms are added to `md->energies`. */
int potstill_begin_model(potstill_state *, const potstill_model *, int32_t in_double,
                         const potstill_pairs *, const potstill_md *, int n_threads);

/* Pack a list of pairs sorted by center. Returns the number of images n_images, or a negative
 * error. `image` holds, per pair, the row of `images` with its cell shift. `images` has room for
 * 65536 rows of 3. */
int potstill_pack_pairs(int64_t n_pairs, int64_t n_local, const int64_t *center,
                        const int64_t *neighbor, const int64_t *shifts, int64_t *row_ptr,
                        int32_t *neighbor_out, uint16_t *image, int32_t *images);

/* Systems side by side, for their neighbor lists. */
typedef struct {
    int64_t n_systems;
    const int64_t *first_atom; /* (n_systems + 1), starts at 0 */
    const double *positions;   /* (n_atoms, 3) */
    const double *cells;       /* (n_systems, 3, 3), rows are vectors; open ones only span the space */
    const uint8_t *periodic;   /* (n_systems, 3) */
    double cutoff;
} potstill_systems;

/* Count the pairs closer than the cutoff, in all images: row_ptr (n_atoms + 1), and the smallest and
 * largest cell shift along each axis, shift_range (low 3, high 3), zero always among them. */
int potstill_count_pairs(const potstill_systems *, int64_t *row_ptr, int32_t *shift_range, int n_threads);
/* Write them: neighbors, and images as rows of the box of shifts, its last axis running fastest.
 * `image` may be NULL where the box holds one shift, and the box holds at most 65536. */
int potstill_list_pairs(const potstill_systems *, const int64_t *row_ptr, const int32_t *shift_range,
                        int32_t *neighbor, uint16_t *image, int n_threads);

/* Where the atoms of a batch of systems are. */
typedef struct {
    const double *positions; /* (n_atoms, 3) */
    const int32_t *system;   /* (n_atoms), or NULL for one system */
    const uint16_t *image;   /* (E), or NULL for image 0 throughout */
    const double *offsets;   /* (n_systems, n_images, 3): whole lattice vectors, Cartesian */
    int64_t n_images;
} potstill_batch;

/* (E, 3) pair vectors: positions[neighbor] - positions[center] + offsets[system][image]. */
void potstill_pair_vectors_f32(const potstill_pairs *, const potstill_batch *, float *r_ij, int n_threads);
void potstill_pair_vectors_f64(const potstill_pairs *, const potstill_batch *, double *r_ij, int n_threads);

/* Forces (n_atoms, 3) and, unless NULL, virials (n_systems, 9) from dE/dr_ij. Atoms of system s are
 * first_atom[s] .. first_atom[s + 1] - 1, and have their neighbors among themselves. */
void potstill_pair_forces_f32(const potstill_pairs *, const int64_t *first_atom, int64_t n_systems,
                              const float *r_ij, const float *gradient, double *forces, double *virial,
                              int n_threads);
void potstill_pair_forces_f64(const potstill_pairs *, const int64_t *first_atom, int64_t n_systems,
                              const double *r_ij, const double *gradient, double *forces, double *virial,
                              int n_threads);

/* Instruction sets: "baseline", "avx2", "avx512". NULL-terminated lists. */
const char *const *potstill_compiled_instruction_sets(void);
int potstill_runnable(const char *instruction_set);
/* Choose one; NULL returns to the default: POTSTILL_SIMD, or the best that runs. */
int potstill_select(const char *instruction_set);
/* The one in use, or NULL with `potstill_error` saying what is wrong with POTSTILL_SIMD. */
const char *potstill_instruction_set(void);

/* Last error of this thread, as one sentence. */
const char *potstill_error(void);

/* Scratch memory is kept from call to call, per calling thread; this returns it. */
void potstill_release_memory(void);
size_t potstill_scratch_bytes(void);

#ifdef __cplusplus
}
#endif

#endif
