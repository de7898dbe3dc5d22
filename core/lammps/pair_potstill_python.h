// pair_style potstill/python: any potential of potstill, by PyTorch in a Python in the same process.
#ifndef LMP_PAIR_POTSTILL_PYTHON_H
#define LMP_PAIR_POTSTILL_PYTHON_H

#include "pair_potstill_base.h"

// The functions and structures of potstill/deploy/lammps_python.py, which says what they mean.
extern "C" {
typedef struct {
    int64_t n_ranks, n_threads, precision;
    int64_t number;
    double cutoff, reach;
    char species[4096], error[2048];
} potstill_python_model;

typedef struct {
    int64_t number, n_local, n_all, fresh, by_atom;
    int64_t periodic[3];
    double skin, cell[9], virial[9];
    const int32_t *species;
    const double *positions;
    double *energies, *forces, *virials;
    char error[2048];
} potstill_python_step;

typedef struct {
    void (*open)(const char *path, potstill_python_model *);
    void (*step)(potstill_python_step *);
    void (*close)(int64_t number);
} potstill_python;
}

namespace LAMMPS_NS {

class PairPotstillPython : public PairPotstillBase {
  public:
    explicit PairPotstillPython(class LAMMPS *);
    ~PairPotstillPython() override;

    void compute(int eflag, int vflag) override;
    void init_style() override;
    double init_one(int i, int j) override;

  private:
    potstill_python_model model_{};
    std::vector<int32_t> species_;

    std::vector<std::string> read_model(const char *path) override;
    const potstill_python &python();
    void close();
};

}  // namespace LAMMPS_NS

#endif
