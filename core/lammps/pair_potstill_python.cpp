#include "pair_potstill_python.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "neighbor.h"
#include "utils.h"

// The Python that is started where LAMMPS does not run in one: its executable and its library.
#ifndef POTSTILL_PYTHON
#define POTSTILL_PYTHON ""
#endif
#ifndef POTSTILL_LIBPYTHON
#define POTSTILL_LIBPYTHON ""
#endif

using namespace LAMMPS_NS;

PairPotstillPython::PairPotstillPython(LAMMPS *lmp) : PairPotstillBase(lmp, "potstill/python") {
    model_.number = -1;
}

PairPotstillPython::~PairPotstillPython() { close(); }

void PairPotstillPython::close() {
    if (model_.number >= 0) python().close(model_.number);
    model_.number = -1;
}

// -- Python -------------------------------------------------------------------------------------

// The little that is needed of its C interface is looked up by name: no headers, no version.
template <class Function>
static Function *look_up(void *library, const char *name) {
    return reinterpret_cast<Function *>(dlsym(library, name));
}

// Starts Python unless this process is one, and has potstill fill the table. Returns what went wrong.
static std::string connect(potstill_python &table) {
    void *library = RTLD_DEFAULT;
    auto is_running = look_up<int()>(library, "Py_IsInitialized");
    if (!is_running) {
        const std::string path = POTSTILL_LIBPYTHON;
        const std::string way_out =
            "; run LAMMPS from Python (`from lammps import lammps`), or build the plugin by a Python with one";
        if (path.empty()) return "the Python " POTSTILL_PYTHON " has no shared library" + way_out;
        library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);  // extension modules need its symbols
        if (!library) return std::string("Python's library cannot be loaded: ") + dlerror() + way_out;
        is_running = look_up<int()>(library, "Py_IsInitialized");
    }
    auto start = look_up<void(int)>(library, "Py_InitializeEx");
    auto leave = look_up<void *()>(library, "PyEval_SaveThread");
    auto take = look_up<int()>(library, "PyGILState_Ensure");
    auto give = look_up<void(int)>(library, "PyGILState_Release");
    auto run = look_up<int(const char *)>(library, "PyRun_SimpleString");
    if (!is_running || !start || !leave || !take || !give || !run) return "Python's library is incomplete";
    if (!is_running()) {
        // Python finds its environment where `python3` is on the PATH.
        const std::string python = POTSTILL_PYTHON;
        const char *before = std::getenv("PATH");
        const std::string old = before ? before : "";
        if (!python.empty()) setenv("PATH", (python.substr(0, python.rfind('/')) + ":" + old).c_str(), 1);
        start(0);  // signals stay LAMMPS' own
        setenv("PATH", old.c_str(), 1);
        leave();
    }
    std::vector<char> problem(2048, 0);
    std::ostringstream code;
    code << "import ctypes, sys\n"
            "try:\n"
            "    from potstill.deploy.lammps_python import connect\n"
            "    connect("
         << reinterpret_cast<uintptr_t>(&table) << ", "
         << sizeof(potstill_python_model) + sizeof(potstill_python_step)
         << ")\n"
            "except BaseException as error:\n"
            "    text = f'{type(error).__name__}: {error} (Python in {sys.prefix})'.encode()[:2000]\n"
            "    ctypes.memmove("
         << reinterpret_cast<uintptr_t>(problem.data()) << ", text, len(text))\n";
    const int held = take();
    const int failed = run(code.str().c_str());
    give(held);
    if (failed) return "Python did not run";
    return problem.data();
}

const potstill_python &PairPotstillPython::python() {
    static potstill_python table{};
    if (table.open) return table;
    const std::string problem = connect(table);
    if (!problem.empty()) error->one(FLERR, "Pair style potstill/python cannot use Python: {}", problem);
    return table;
}

// -- commands -----------------------------------------------------------------------------------

std::vector<std::string> PairPotstillPython::read_model(const char *path) {
    close();
    model_.n_ranks = comm->nprocs;
    model_.n_threads = comm->nthreads;
    model_.precision = precision_;
    python().open(path, &model_);
    if (model_.error[0]) error->one(FLERR, "The checkpoint {} cannot be used: {}", path, model_.error);
    if (comm->me == 0)
        error->warning(FLERR,
                       "Pair style potstill/python calls PyTorch in every step: expect it to be 10 to 100 times "
                       "slower than a native potential");
    std::istringstream words(model_.species);
    std::vector<std::string> species;
    for (std::string word; words >> word;) species.push_back(word);
    return species;
}

// Where there are several domains, ghost atoms stand for all that decides the energies of own atoms:
// through n layers of messages, the halo is n cutoffs wide. One domain is evaluated as a periodic system.
void PairPotstillPython::init_style() {
    PairPotstillBase::init_style();
    if (neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol)
        error->all(FLERR, "Pair style potstill/python needs all pairs: no neigh_modify exclude");
    reserve_communication(0, 9);
    if (comm->nprocs == 1 || model_.reach <= model_.cutoff) return;
    if (!(model_.reach < 1e10))
        error->all(FLERR,
                   "Pair style potstill/python runs this model on one MPI rank only: how far its energies "
                   "reach is not known");
    if (comm->mode != Comm::SINGLE) error->all(FLERR, "Pair style potstill/python needs comm_modify mode single");
    const double halo = model_.reach + neighbor->skin;
    if (comm->cutghostuser >= halo) return;
    comm->cutghostuser = halo;
    if (comm->me == 0)
        utils::logmesg(lmp, "Pair style potstill/python: ghost atoms up to {:.2f}, as by comm_modify cutoff\n",
                       halo);
}

double PairPotstillPython::init_one(int i, int j) {
    if (setflag[i][j] == 0)
        error->all(FLERR, "Pair style potstill/python has no coefficients for types {} and {}", i, j);
    return model_.cutoff;
}

// -- evaluation ---------------------------------------------------------------------------------

void PairPotstillPython::compute(int eflag, int vflag) {
    ev_init(eflag, vflag);
    const int n_local = atom->nlocal, n_all = n_local + atom->nghost;
    const bool by_atom = vflag_atom != 0;
    species_.resize(size_t(n_all) + 1);
    for (int i = 0; i < n_all; ++i) species_[i] = map[atom->type[i]];
    energies_.resize(size_t(n_local) + 1);
    forces_.resize(3 * size_t(n_all) + 3);
    if (by_atom) neighbor_virials_.resize(9 * size_t(n_all) + 9);

    double none[3];
    potstill_python_step step{};
    step.number = model_.number;
    step.n_local = n_local;
    step.n_all = n_all;
    step.fresh = neighbor->ago == 0;
    step.by_atom = by_atom;
    step.skin = neighbor->skin;
    const double *h = domain->h;  // xx, yy, zz, yz, xz, xy; rows are lattice vectors here
    const double cell[9] = {h[0], 0.0, 0.0, h[5], h[1], 0.0, h[4], h[3], h[2]};
    std::memcpy(step.cell, cell, sizeof cell);
    for (int d = 0; d < 3; ++d) step.periodic[d] = domain->periodicity[d];
    step.species = species_.data();
    step.positions = n_all ? atom->x[0] : none;
    step.energies = energies_.data();
    step.forces = forces_.data();
    step.virials = by_atom ? neighbor_virials_.data() : nullptr;
    python().step(&step);
    if (step.error[0]) error->one(FLERR, "Pair style potstill/python: {}", step.error);

    if (eflag_either) add_energies();
    add_forces();
    if (vflag_global) add_virial(step.virial);
    if (by_atom) add_atom_virials();
}
