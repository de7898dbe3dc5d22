#include "pair_potstill_base.h"

#include <cstring>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "update.h"
#include "utils.h"

using namespace LAMMPS_NS;

// Of the nine components xx, xy, xz, yx, yy, yz, zx, zy, zz, those that LAMMPS wants in its orders.
static constexpr int symmetric[6][2] = {{0, 0}, {4, 4}, {8, 8}, {1, 3}, {2, 6}, {5, 7}};
static constexpr int centroid[9] = {0, 4, 8, 1, 2, 5, 3, 6, 7};

PairPotstillBase::PairPotstillBase(LAMMPS *lmp, const char *name) : Pair(lmp), name_(name) {
    single_enable = 0;
    restartinfo = 0;  // LAMMPS says so where it reads a restart file
    one_coeff = 1;
    manybody_flag = 1;
    no_virial_fdotr_compute = 1;  // the model has the virial
    centroidstressflag = CENTROID_NOTAVAIL;
}

PairPotstillBase::~PairPotstillBase() {
    if (copymode || !allocated) return;
    memory->destroy(setflag);
    memory->destroy(cutsq);
    delete[] map;
    map = nullptr;
}

void PairPotstillBase::allocate() {
    const int n = atom->ntypes + 1;
    memory->create(setflag, n, n, "pair:setflag");
    memory->create(cutsq, n, n, "pair:cutsq");
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) setflag[i][j] = 0;
    map = new int[n];
    allocated = 1;
}

// -- commands -----------------------------------------------------------------------------------

void PairPotstillBase::settings(int narg, char **arg) {
    if (narg > 1) error->all(FLERR, "Pair style {} takes one argument at most, single or double", name_);
    precision_ = -1;
    if (narg == 0) return;
    if (std::strcmp(arg[0], "single") != 0 && std::strcmp(arg[0], "double") != 0)
        error->all(FLERR, "Pair style {} knows single and double, not {}", name_, arg[0]);
    precision_ = std::strcmp(arg[0], "double") == 0;
}

void PairPotstillBase::coeff(int narg, char **arg) {
    if (!allocated) allocate();
    const int n_types = atom->ntypes;
    if (narg != 3 + n_types)
        error->all(FLERR,
                   "Pair style {} needs pair_coeff * * FILE and an element or NULL for each of the "
                   "{} atom types: {} arguments, not {}",
                   name_, n_types, 3 + n_types, narg);
    file_ = arg[2];
    const std::vector<std::string> species = read_model(arg[2]);
    std::string known;
    for (const std::string &name : species) known += (known.empty() ? "" : ", ") + name;
    int n_mapped = 0;
    for (int type = 1; type <= n_types; ++type) {
        const char *name = arg[2 + type];
        map[type] = -1;
        if (std::strcmp(name, "NULL") == 0) continue;
        for (size_t k = 0; k < species.size(); ++k)
            if (species[k] == name) map[type] = int(k);
        if (map[type] < 0)
            error->all(FLERR, "The model in {} does not know the element {} of atom type {}, only {}", file_,
                       name, type, known);
        ++n_mapped;
    }
    if (!n_mapped) error->all(FLERR, "Pair style {} has no atom types: all of them are NULL", name_);
    for (int i = 1; i <= n_types; ++i)
        for (int j = i; j <= n_types; ++j) setflag[i][j] = map[i] >= 0 && map[j] >= 0;
}

void PairPotstillBase::init_style() {
    if (file_.empty()) error->all(FLERR, "Pair style {} needs a pair_coeff command", name_);
    const std::string units = update->unit_style;
    if (units == "metal")
        energy_unit_ = 1.0;
    else if (units == "real")
        energy_unit_ = utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL);
    else
        error->all(FLERR, "Pair style {} needs units metal or real, not {}", name_, units);
    // A pair that LAMMPS drops or scales for a bond would be missing in the atoms' surroundings.
    for (int k = 1; k < 4 && atom->molecular != Atom::ATOMIC; ++k)
        if (force->special_lj[k] != 1.0 || force->special_coul[k] != 1.0)
            error->all(FLERR, "Pair style {} needs all pairs: set special_bonds lj/coul 1.0 1.0 1.0", name_);
}

// Hybrid styles ask for these sizes before a model is known.
void PairPotstillBase::reserve_communication(int forward, int reverse) {
    comm_forward = forward;
    comm_reverse = comm_reverse_off = reverse;
    Pair *outer = force->pair;
    outer->comm_forward = outer->comm_forward > forward ? outer->comm_forward : forward;
    outer->comm_reverse = outer->comm_reverse > reverse ? outer->comm_reverse : reverse;
    outer->comm_reverse_off = outer->comm_reverse_off > reverse ? outer->comm_reverse_off : reverse;
}

// -- results ------------------------------------------------------------------------------------

// What ghosts have goes to their owners, where LAMMPS itself would not take it.
void PairPotstillBase::collect_ghosts(std::vector<double> &values, int width) {
    if (force->newton) return;
    const size_t bytes = size_t(width) * sizeof(double);
    rows_ = {reinterpret_cast<char *>(values.data()), bytes, bytes, true};
    comm->reverse_comm(this);
}

void PairPotstillBase::add_energies() {
    for (int i = 0; i < atom->nlocal; ++i) {
        if (map[atom->type[i]] < 0) continue;  // of another style of a hybrid
        const double energy = energy_unit_ * energies_[i];
        if (eflag_global) eng_vdwl += energy;
        if (eflag_atom) eatom[i] += energy;
    }
}

void PairPotstillBase::add_forces() {
    collect_ghosts(forces_, 3);
    const int n = force->newton ? atom->nlocal + atom->nghost : atom->nlocal;
    for (int i = 0; i < n; ++i)
        for (int d = 0; d < 3; ++d) atom->f[i][d] += energy_unit_ * forces_[3 * size_t(i) + d];
}

void PairPotstillBase::add_virial(const double *total) {
    for (int k = 0; k < 6; ++k)
        virial[k] -= 0.5 * energy_unit_ * (total[symmetric[k][0]] + total[symmetric[k][1]]);
}

// Per-atom virials: half of each pair's at both of its atoms, and for the centroid form, which the
// heat flux needs, all of it at the neighbor.
void PairPotstillBase::add_atom_virials() {
    collect_ghosts(neighbor_virials_, 9);
    const int n_local = atom->nlocal, n = force->newton ? n_local + atom->nghost : n_local;
    for (int i = 0; i < n; ++i) {
        const double *neighbor = neighbor_virials_.data() + 9 * size_t(i);
        const bool own = i < n_local && !center_virials_.empty();
        const double *center = own ? center_virials_.data() + 9 * size_t(i) : nullptr;
        for (int k = 0; k < 6 && vflag_atom; ++k)
            for (const int c : symmetric[k])
                vatom[i][k] -= 0.25 * energy_unit_ * (neighbor[c] + (center ? center[c] : 0.0));
        for (int k = 0; k < 9 && cvflag_atom; ++k) cvatom[i][k] -= energy_unit_ * neighbor[centroid[k]];
    }
}

// -- communication ------------------------------------------------------------------------------

int PairPotstillBase::pack_forward_comm(int n, int *list, double *buffer, int, int *) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k)
        std::memcpy(buffer + size_t(k) * width, rows_.data + size_t(list[k]) * rows_.stride, rows_.bytes);
    return n * width;
}

void PairPotstillBase::unpack_forward_comm(int n, int first, double *buffer) {
    const int width = rows_.n_doubles();
    for (int k = 0; k < n; ++k)
        std::memcpy(rows_.data + size_t(first + k) * rows_.stride, buffer + size_t(k) * width, rows_.bytes);
}

int PairPotstillBase::pack_reverse_comm(int n, int first, double *buffer) {
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

void PairPotstillBase::unpack_reverse_comm(int n, int *list, double *buffer) {
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

double PairPotstillBase::memory_usage() {
    return Pair::memory_usage() + 8.0 * double(energies_.capacity() + forces_.capacity() +
                                               center_virials_.capacity() + neighbor_virials_.capacity());
}
