// pair_style potstill: a potential that potstill exported, in LAMMPS.
#ifndef LMP_PAIR_POTSTILL_H
#define LMP_PAIR_POTSTILL_H

#include <string>
#include <vector>

#include "pair.h"
#include "potstill_core.h"

namespace LAMMPS_NS {

class PairPotstill : public Pair {
  public:
    explicit PairPotstill(class LAMMPS *);
    ~PairPotstill() override;

    void compute(int eflag, int vflag) override;
    void settings(int narg, char **arg) override;
    void coeff(int narg, char **arg) override;
    void init_style() override;
    double init_one(int i, int j) override;
    double memory_usage() override;

    int pack_forward_comm(int n, int *list, double *buffer, int pbc_flag, int *pbc) override;
    void unpack_forward_comm(int n, int first, double *buffer) override;
    int pack_reverse_comm(int n, int first, double *buffer) override;
    void unpack_reverse_comm(int n, int *list, double *buffer) override;

  private:
    // What LAMMPS carries between domains: rows of one array, in either direction.
    struct Rows {
        char *data = nullptr;
        size_t stride = 0, bytes = 0;  // from one atom to the next, and how many of them count
        bool in_double = true;
        int n_doubles() const { return int((bytes + sizeof(double) - 1) / sizeof(double)); }
    };

    potstill_model *model_ = nullptr;
    potstill_state *state_ = nullptr;
    std::string file_;
    int precision_ = -1;  // of float32 0, of float64 1, of the model -1
    bool in_double_ = true;
    double energy_unit_ = 1.0;  // eV in the units of the run
    Rows rows_;

    std::vector<const int32_t *> neighbors_;
    std::vector<int64_t> row_ptr_;
    std::vector<int32_t> species_;
    std::vector<double> energies_, forces_, center_virials_, neighbor_virials_;

    void allocate();
    void read_model(const char *path);
    void list_pairs();
    void run_layers(const potstill_md &);
    Rows layer_rows(void *data, int64_t stride) const;
    void collect_ghosts(std::vector<double> &, int width);
    void add_energies();
    void add_forces();
    void add_virials();
    void check(int code);
};

}  // namespace LAMMPS_NS

#endif
