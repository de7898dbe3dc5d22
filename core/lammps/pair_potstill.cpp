#include "pair_potstill.h"

#include <cstdio>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "neigh_list.h"
#include "neighbor.h"

using namespace LAMMPS_NS;

PairPotstill::PairPotstill(LAMMPS *lmp) : PairPotstillBase(lmp, "potstill"), state_(potstill_new_state()) {
    if (!state_) error->one(FLERR, "Pair style potstill: there is not enough memory");
}

PairPotstill::~PairPotstill() {
    potstill_delete_state(state_);
    potstill_close_model(model_);
}

void PairPotstill::check(int code) {
    if (code < 0) error->one(FLERR, "Pair style potstill: {}", potstill_error());
}

// One rank reads, all have the content.
std::vector<std::string> PairPotstill::read_model(const char *path) {
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
    model_ = potstill_parse_model(content.data(), content.size());
    if (!model_) error->all(FLERR, "The model file {} cannot be used: {}", path, potstill_error());
    in_double_ = precision_ < 0 ? potstill_model_is_double(model_) : precision_ != 0;
    std::vector<std::string> species;
    for (int k = 0; k < potstill_model_n_species(model_); ++k)
        species.push_back(potstill_model_species(model_, k));
    return species;
}

void PairPotstill::init_style() {
    PairPotstillBase::init_style();
    neighbor->add_request(this, NeighConst::REQ_FULL);

    const int n_layers = potstill_model_n_layers(model_);
    const int per_row = potstill_model_n_features(model_) * (in_double_ ? 2 : 1);  // halves of a double
    const int forward = n_layers > 1 ? (per_row + 1) / 2 : 0;
    // Ghosts' forces (3) and virials (9 of neighbors) where LAMMPS does not carry them itself.
    reserve_communication(forward, forward > 9 ? forward : 9);
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
    if (vflag_global) add_virial(total_virial);
    if (by_atom) add_atom_virials();
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

double PairPotstill::memory_usage() {
    const size_t own = neighbors_.capacity() * 8 + row_ptr_.capacity() * 8 + species_.capacity() * 4;
    return PairPotstillBase::memory_usage() + double(own + potstill_state_bytes(state_));
}
