#include "pair_potstill.h"

#include <cstdio>
#include <cstring>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"
#include "utils.h"

using namespace LAMMPS_NS;

// Of the nine components xx, xy, xz, yx, yy, yz, zx, zy, zz, those that LAMMPS wants in its orders.
static constexpr int symmetric[6][2] = {{0, 0}, {4, 4}, {8, 8}, {1, 3}, {2, 6}, {5, 7}};
static constexpr int centroid[9] = {0, 4, 8, 1, 2, 5, 3, 6, 7};

PairPotstill::PairPotstill(LAMMPS *lmp) : Pair(lmp), state_(potstill_new_state()) {
    single_enable = 0;
    restartinfo = 0;  // LAMMPS says so where it reads a restart file
    one_coeff = 1;
    manybody_flag = 1;
    no_virial_fdotr_compute = 1;  // the core has the virial
    centroidstressflag = CENTROID_NOTAVAIL;
    if (!state_) error->one(FLERR, "Pair style potstill: there is not enough memory");
}

PairPotstill::~PairPotstill() {
    potstill_delete_state(state_);
    potstill_close_model(model_);
    if (copymode || !allocated) return;
    memory->destroy(setflag);
    memory->destroy(cutsq);
    delete[] map;
    map = nullptr;
}

void PairPotstill::allocate() {
    const int n = atom->ntypes + 1;
    memory->create(setflag, n, n, "pair:setflag");
    memory->create(cutsq, n, n, "pair:cutsq");
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) setflag[i][j] = 0;
    map = new int[n];
    allocated = 1;
}

void PairPotstill::check(int code) {
    if (code < 0) error->one(FLERR, "Pair style potstill: {}", potstill_error());
}

// -- commands -----------------------------------------------------------------------------------

void PairPotstill::settings(int narg, char **arg) {
    if (narg > 1) error->all(FLERR, "Pair style potstill takes one argument at most, single or double");
    precision_ = -1;
    if (narg == 0) return;
    if (std::strcmp(arg[0], "single") != 0 && std::strcmp(arg[0], "double") != 0)
        error->all(FLERR, "Pair style potstill knows single and double, not {}", arg[0]);
    precision_ = std::strcmp(arg[0], "double") == 0;
}

void PairPotstill::coeff(int narg, char **arg) {
    if (!allocated) allocate();
    const int n_types = atom->ntypes;
    if (narg != 3 + n_types)
        error->all(FLERR,
                   "Pair style potstill needs pair_coeff * * FILE and an element or NULL for each of the "
                   "{} atom types: {} arguments, not {}",
                   n_types, 3 + n_types, narg);
    read_model(arg[2]);
    in_double_ = precision_ < 0 ? potstill_model_is_double(model_) : precision_ != 0;

    const int n_species = potstill_model_n_species(model_);
    int n_mapped = 0;
    for (int type = 1; type <= n_types; ++type) {
        const char *name = arg[2 + type];
        map[type] = -1;
        if (std::strcmp(name, "NULL") == 0) continue;
        std::string known;
        for (int k = 0; k < n_species; ++k) {
            const char *species = potstill_model_species(model_, k);
            known += std::string(k ? ", " : "") + species;
            if (std::strcmp(name, species) == 0) map[type] = k;
        }
        if (map[type] < 0)
            error->all(FLERR, "The model in {} does not know the element {} of atom type {}, only {}", file_,
                       name, type, known);
        ++n_mapped;
    }
    if (!n_mapped) error->all(FLERR, "Pair style potstill has no atom types: all of them are NULL");
    for (int i = 1; i <= n_types; ++i)
        for (int j = i; j <= n_types; ++j) setflag[i][j] = map[i] >= 0 && map[j] >= 0;
}

// One rank reads, all have the content.
void PairPotstill::read_model(const char *path) {
    std::string content;
    bigint size = -1;
    if (comm->me == 0) {
        if (FILE *file = std::fopen(path, "rb")) {
            char part[65536];
            for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) content.append(part, n);
            if (!std::ferror(file)) size = bigint(content.size());
            std::fclose(file);
        }
    }
    MPI_Bcast(&size, 1, MPI_LMP_BIGINT, 0, world);
    if (size < 0) error->all(FLERR, "The model file {} of pair style potstill cannot be read", path);
    if (size > MAXSMALLINT) error->all(FLERR, "{} is too large for a model file of potstill", path);
    content.resize(size_t(size));
    MPI_Bcast(&content[0], int(size), MPI_CHAR, 0, world);
    potstill_close_model(model_);
    file_ = path;
    model_ = potstill_parse_model(content.data(), content.size());
    if (!model_) error->all(FLERR, "The model file {} cannot be used: {}", path, potstill_error());
}

void PairPotstill::init_style() {
    if (!model_) error->all(FLERR, "Pair style potstill needs a pair_coeff command");
    const std::string units = update->unit_style;
    if (units == "metal")
        energy_unit_ = 1.0;
    else if (units == "real")
        energy_unit_ = utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL);
    else
        error->all(FLERR, "Pair style potstill needs units metal or real, not {}", units);
    // A pair that LAMMPS drops or scales for a bond would be missing in the atoms' surroundings.
    for (int k = 1; k < 4 && atom->molecular != Atom::ATOMIC; ++k)
        if (force->special_lj[k] != 1.0 || force->special_coul[k] != 1.0)
            error->all(FLERR, "Pair style potstill needs all pairs: set special_bonds lj/coul 1.0 1.0 1.0");
    neighbor->add_request(this, NeighConst::REQ_FULL);

    const int n_layers = potstill_model_n_layers(model_);
    const int per_row = potstill_model_n_features(model_) * (in_double_ ? 2 : 1);  // halves of a double
    comm_forward = n_layers > 1 ? (per_row + 1) / 2 : 0;
    // Ghosts' forces (3) and virials (9 of neighbors) where LAMMPS does not carry them itself.
    comm_reverse = comm_reverse_off = comm_forward > 9 ? comm_forward : 9;
    // Hybrid styles have asked for these sizes before the model was known.
    Pair *outer = force->pair;
    outer->comm_forward = outer->comm_forward > comm_forward ? outer->comm_forward : comm_forward;
    outer->comm_reverse = outer->comm_reverse > comm_reverse ? outer->comm_reverse : comm_reverse;
    outer->comm_reverse_off =
        outer->comm_reverse_off > comm_reverse_off ? outer->comm_reverse_off : comm_reverse_off;
    // Energies of other atoms depend on a pair through features: no atom's own share of them.
    centroidstressflag = n_layers == 1 ? CENTROID_AVAIL : CENTROID_NOTAVAIL;
}

double PairPotstill::init_one(int i, int j) {
    if (setflag[i][j] == 0) error->all(FLERR, "Pair style potstill has no coefficients for types {} and {}", i, j);
    return potstill_model_cutoff(model_);
}

// -- evaluation ---------------------------------------------------------------------------------

void PairPotstill::compute(int eflag, int vflag) {
    ev_init(eflag, vflag);
    const int n_local = atom->nlocal, n_all = n_local + atom->nghost;
    list_pairs();
    // The core adds to LAMMPS' forces, but where they have another unit, or ghosts' would be lost.
    const bool direct = energy_unit_ == 1.0 && force->newton;
    const bool by_atom = vflag_atom || cvflag_atom;
    energies_.resize(size_t(n_local) + 1);  // an address even where there are no atoms
    if (!direct) forces_.resize(3 * size_t(n_all) + 3);
    if (by_atom) {
        center_virials_.resize(9 * size_t(n_local) + 9);
        neighbor_virials_.resize(9 * size_t(n_all) + 9);
    }
    double total_virial[9];
    double none[3];
    potstill_md md{};
    md.positions = n_all ? atom->x[0] : none;
    md.energies = energies_.data();
    md.forces = direct ? (n_all ? atom->f[0] : none) : forces_.data();
    md.add_forces = direct;
    md.virial = vflag_global ? total_virial : nullptr;
    md.center_virials = by_atom ? center_virials_.data() : nullptr;
    md.neighbor_virials = by_atom ? neighbor_virials_.data() : nullptr;
    run_layers(md);

    if (eflag_either) add_energies();
    if (!direct) add_forces();
    for (int k = 0; k < 6 && vflag_global; ++k)
        virial[k] -= 0.5 * energy_unit_ * (total_virial[symmetric[k][0]] + total_virial[symmetric[k][1]]);
    if (by_atom) add_virials();
}

// LAMMPS' list as it is: its pages are read in place. Atoms of types that belong to other styles of a
// hybrid have no pairs here; what the model says of them is not used.
void PairPotstill::list_pairs() {
    const int n_local = atom->nlocal, n_all = n_local + atom->nghost;
    species_.resize(size_t(n_all));
    for (int i = 0; i < n_all; ++i) {
        const int species = map[atom->type[i]];
        species_[i] = species < 0 ? 0 : species;
    }
    neighbors_.assign(size_t(n_local) + 1, nullptr);
    row_ptr_.assign(size_t(n_local) + 1, 0);
    for (int k = 0; k < list->inum; ++k) {
        const int i = list->ilist[k];
        neighbors_[i] = list->firstneigh[i];
        row_ptr_[i + 1] = list->numneigh[i];
    }
    for (int i = 0; i < n_local; ++i) row_ptr_[i + 1] += row_ptr_[i];
}

void PairPotstill::run_layers(const potstill_md &md) {
    const int64_t n_local = atom->nlocal, n_all = n_local + atom->nghost;
    const potstill_pairs pairs{n_all,   n_local,           species_.data(), row_ptr_.data(),
                               nullptr, neighbors_.data(), NEIGHMASK};
    const int n_layers = potstill_model_n_layers(model_);
    check(potstill_begin_model(state_, model_, in_double_, &pairs, &md, comm->nthreads));
    int64_t stride = 0;
    for (int k = 0; k < n_layers; ++k) {
        check(potstill_layer_forward(state_, k));
        if (k == n_layers - 1) break;
        void *data = potstill_layer_features(state_, k, &stride);
        rows_ = layer_rows(data, stride);
        comm->forward_comm(this);
    }
    for (int k = n_layers - 1; k >= 0; --k) {
        check(potstill_layer_reverse(state_, k));
        if (k == 0) break;
        void *data = potstill_layer_cotangents(state_, k - 1, &stride);
        rows_ = layer_rows(data, stride);
        comm->reverse_comm(this);
    }
    check(potstill_finish(state_));
}

PairPotstill::Rows PairPotstill::layer_rows(void *data, int64_t stride) const {
    const size_t size = in_double_ ? sizeof(double) : sizeof(float);
    return {static_cast<char *>(data), size_t(stride) * size, size_t(potstill_model_n_features(model_)) * size,
            in_double_};
}

// What ghosts have goes to their owners, where LAMMPS itself would not take it.
void PairPotstill::collect_ghosts(std::vector<double> &values, int width) {
    if (force->newton) return;
    const size_t bytes = size_t(width) * sizeof(double);
    rows_ = {reinterpret_cast<char *>(values.data()), bytes, bytes, true};
    comm->reverse_comm(this);
}

void PairPotstill::add_energies() {
    for (int k = 0; k < list->inum; ++k) {
        const int i = list->ilist[k];
        const double energy = energy_unit_ * energies_[i];
        if (eflag_global) eng_vdwl += energy;
        if (eflag_atom) eatom[i] += energy;
    }
}

void PairPotstill::add_forces() {
    collect_ghosts(forces_, 3);
    const int n = force->newton ? atom->nlocal + atom->nghost : atom->nlocal;
    for (int i = 0; i < n; ++i)
        for (int d = 0; d < 3; ++d) atom->f[i][d] += energy_unit_ * forces_[3 * size_t(i) + d];
}

// Per-atom virials: half of each pair's at both of its atoms, and for the centroid form, which the
// heat flux needs, all of it at the neighbor.
void PairPotstill::add_virials() {
    collect_ghosts(neighbor_virials_, 9);
    const int n_local = atom->nlocal, n = force->newton ? n_local + atom->nghost : n_local;
    for (int i = 0; i < n; ++i) {
        const double *neighbor = neighbor_virials_.data() + 9 * size_t(i);
        const double *center = i < n_local ? center_virials_.data() + 9 * size_t(i) : nullptr;
        for (int k = 0; k < 6 && vflag_atom; ++k)
            for (const int c : symmetric[k])
                vatom[i][k] -= 0.25 * energy_unit_ * (neighbor[c] + (center ? center[c] : 0.0));
        for (int k = 0; k < 9 && cvflag_atom; ++k) cvatom[i][k] -= energy_unit_ * neighbor[centroid[k]];
    }
}

// -- communication ------------------------------------------------------------------------------

int PairPotstill::pack_forward_comm(int n, int *list, double *buffer, int, int *) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k)
        std::memcpy(buffer + size_t(k) * width, rows_.data + size_t(list[k]) * rows_.stride, rows_.bytes);
    return n * width;
}

void PairPotstill::unpack_forward_comm(int n, int first, double *buffer) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k)
        std::memcpy(rows_.data + size_t(first + k) * rows_.stride, buffer + size_t(k) * width, rows_.bytes);
}

int PairPotstill::pack_reverse_comm(int n, int first, double *buffer) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k)
        std::memcpy(buffer + size_t(k) * width, rows_.data + size_t(first + k) * rows_.stride, rows_.bytes);
    return n * width;
}

template <class T>
static void add_row(char *to, const double *from, size_t bytes) {
    T *sum = reinterpret_cast<T *>(to);
    for (size_t k = 0; k < bytes / sizeof(T); ++k) {
        T part;
        std::memcpy(&part, reinterpret_cast<const char *>(from) + k * sizeof(T), sizeof(T));
        sum[k] += part;
    }
}

void PairPotstill::unpack_reverse_comm(int n, int *list, double *buffer) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k) {
        char *to = rows_.data + size_t(list[k]) * rows_.stride;
        const double *from = buffer + size_t(k) * width;
        if (rows_.in_double)
            add_row<double>(to, from, rows_.bytes);
        else
            add_row<float>(to, from, rows_.bytes);
    }
}

double PairPotstill::memory_usage() {
    const size_t own = neighbors_.capacity() * 8 + row_ptr_.capacity() * 8 + species_.capacity() * 4 +
                       8 * (energies_.capacity() + forces_.capacity() + center_virials_.capacity() +
                            neighbor_virials_.capacity());
    return Pair::memory_usage() + double(own + potstill_state_bytes(state_));
}
