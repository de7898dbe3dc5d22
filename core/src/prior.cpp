// The short-range terms; the same formulas as in potstill.models.prior.
//
// Ziegler, Biersack and Littmark's universal screened repulsion, "The Stopping and Range of Ions in
// Solids" (1985), times a quintic switch; and the repulsion of beads, eps ((R / r)^4 - 1)^3.
#include <cmath>

#include "prior.h"

namespace potstill {

namespace {
constexpr double coefficients[4] = {0.18175, 0.50986, 0.28022, 0.02817};
constexpr double exponents[4] = {3.19980, 0.94229, 0.40290, 0.20162};
constexpr double length = 0.46850;  // angstrom

double zbl(const PriorTable &table, int32_t first, int32_t second, double r, double *derivative) {
    const double inverse_length = (table.power[first] + table.power[second]) / length;
    double screening = 0.0, slope = 0.0;
    for (int k = 0; k < 4; ++k) {
        const double term = coefficients[k] * std::exp(-exponents[k] * r * inverse_length);
        screening += term;
        slope -= exponents[k] * inverse_length * term;
    }
    const double width = table.cutoff - table.inner;
    double t = (r - table.inner) / width;
    t = t < 0.0 ? 0.0 : t > 1.0 ? 1.0 : t;
    const double keep = 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t);
    const double keep_slope = -30.0 * t * t * (1.0 - t) * (1.0 - t) / width;
    const double strength = 0.5 * table.coulomb * table.charge[first] * table.charge[second] / r;
    *derivative =
        strength * (slope * keep + screening * keep_slope - screening * keep / r);
    return strength * screening * keep;
}

double repulsion(const PriorTable &table, int32_t first, int32_t second, double r, double *derivative) {
    const size_t k = size_t(first) * size_t(table.n_species) + size_t(second);
    const double ratio = table.radius[k] / r;
    if (!(ratio > 1.0)) return *derivative = 0.0;
    const double power = ratio * ratio * ratio * ratio, excess = power - 1.0;
    const double half = 0.5 * table.strength[k] * excess * excess;
    *derivative = -12.0 * half * power / r;
    return half * excess;
}
}  // namespace

double prior_half_pair(const PriorTable &table, int32_t first, int32_t second, double r,
                       double *derivative) {
    return (table.strength ? repulsion : zbl)(table, first, second, r, derivative);
}

}  // namespace potstill
