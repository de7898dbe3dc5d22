// What potstill's pair styles share: elements by atom type, units, and results that go to LAMMPS.
#ifndef LMP_PAIR_POTSTILL_BASE_H
#define LMP_PAIR_POTSTILL_BASE_H

#include <cstdint>
#include <string>
#include <vector>

#include "pair.h"

namespace LAMMPS_NS {

class PairPotstillBase : public Pair {
  public:
    PairPotstillBase(class LAMMPS *, const char *name);
    ~PairPotstillBase() override;

    void settings(int narg, char **arg) override;
    void coeff(int narg, char **arg) override;
    void init_style() override;
    double memory_usage() override;

    int pack_forward_comm(int n, int *list, double *buffer, int pbc_flag, int *pbc) override;
    void unpack_forward_comm(int n, int first, double *buffer) override;
    int pack_reverse_comm(int n, int first, double *buffer) override;
    void unpack_reverse_comm(int n, int *list, double *buffer) override;

  protected:
    // What LAMMPS carries between domains: rows of one array, in either direction.
    struct Rows {
        char *data = nullptr;
        size_t stride = 0, bytes = 0;  // from one atom to the next, and how many of them count
        bool in_double = true;
        int n_doubles() const { return int((bytes + sizeof(double) - 1) / sizeof(double)); }
    };

    const char *name_;  // of the style, in messages
    std::string file_;
    int precision_ = -1;        // of float32 0, of float64 1, of the model -1
    double energy_unit_ = 1.0;  // eV in the units of the run
    Rows rows_;

    // Of this step, in eV and Å: energies of own atoms, forces on all, and of each pair's virial what is
    // its center's and its neighbor's.
    std::vector<double> energies_, forces_, center_virials_, neighbor_virials_;

    // Reads the file; returns the species that the model knows.
    virtual std::vector<std::string> read_model(const char *path) = 0;
    void reserve_communication(int forward, int reverse);
    void collect_ghosts(std::vector<double> &, int width);
    void add_energies();
    void add_forces();
    void add_virial(const double *total);
    void add_atom_virials();

  private:
    void allocate();
};

}  // namespace LAMMPS_NS

#endif
