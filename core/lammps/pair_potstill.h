// pair_style potstill: a potential that potstill exported, in LAMMPS.
#ifndef LMP_PAIR_POTSTILL_H
#define LMP_PAIR_POTSTILL_H

#include "pair_potstill_base.h"
#include "potstill_core.h"

namespace LAMMPS_NS {

class PairPotstill : public PairPotstillBase {
  public:
    explicit PairPotstill(class LAMMPS *);
    ~PairPotstill() override;

    void compute(int eflag, int vflag) override;
    void init_style() override;
    double init_one(int i, int j) override;
    double memory_usage() override;

  private:
    potstill_model *model_ = nullptr;
    potstill_state *state_ = nullptr;
    bool in_double_ = true;

    std::vector<const int32_t *> neighbors_;
    std::vector<int64_t> row_ptr_;
    std::vector<int32_t> species_;

    std::vector<std::string> read_model(const char *path) override;
    void list_pairs();
    void run_layers(const potstill_md &);
    Rows layer_rows(void *data, int64_t stride) const;
    void check(int code);
};

}  // namespace LAMMPS_NS

#endif
