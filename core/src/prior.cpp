// The short-range terms; the same formulas as in potstill.models.prior.
//
// Ziegler, Biersack and Littmark's universal screened repulsion, "The Stopping and Range of Ions in
// Solids" (1985), times a quintic switch; the repulsion of beads, eps ((R / r)^4 - 1)^3; and their
// bonds and angles, which the same switch ends.
#include <cmath>

#include "prior.h"

namespace potstill {

namespace {
constexpr double coefficients[4] = {0.18175, 0.50986, 0.28022, 0.02817};
constexpr double exponents[4] = {3.19980, 0.94229, 0.40290, 0.20162};
constexpr double length = 0.46850;  // angstrom

double quintic_switch(double r, double inner, double outer, double *slope) {
    const double width = outer - inner;
    double t = (r - inner) / width;
    t = t < 0.0 ? 0.0 : t > 1.0 ? 1.0 : t;
    *slope = -30.0 * t * t * (1.0 - t) * (1.0 - t) / width;
    return 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t);
}

double zbl(const PriorTable &table, int32_t first, int32_t second, double r, double *derivative) {
    const double inverse_length = (table.power[first] + table.power[second]) / length;
    double screening = 0.0, slope = 0.0;
    for (int k = 0; k < 4; ++k) {
        const double term = coefficients[k] * std::exp(-exponents[k] * r * inverse_length);
        screening += term;
        slope -= exponents[k] * inverse_length * term;
    }
    double keep_slope;
    const double keep = quintic_switch(r, table.inner, table.zbl_cutoff, &keep_slope);
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

double dot(const double *a, const double *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
}  // namespace

bool find_bond(const PriorTable &table, int32_t first, int32_t second, Bonded *b) {
    const size_t n = size_t(table.n_species), k = size_t(first) * n + size_t(second);
    const double outer = table.bonds[3 * n * n + k];
    if (!(b->r < outer)) return false;
    b->keep = quintic_switch(b->r, table.bonds[2 * n * n + k], outer, &b->keep_slope);
    return true;
}

double angle_energy(const double *angle, const Bonded &a, const Bonded &b, double *first,
                    double *second) {
    const double cosine = dot(a.d, b.d) / (a.r * b.r), away = cosine - angle[3];
    const double energy = 0.5 * angle[4] * away * away, slope = angle[4] * away * a.keep * b.keep;
    for (int x = 0; x < 3; ++x) {
        const double ua = a.d[x] / a.r, ub = b.d[x] / b.r;
        first[x] = slope * (ub - cosine * ua) / a.r + energy * a.keep_slope * b.keep * ua;
        second[x] = slope * (ua - cosine * ub) / b.r + energy * a.keep * b.keep_slope * ub;
    }
    return energy * a.keep * b.keep;
}

double prior_half_pair(const PriorTable &table, int32_t first, int32_t second, double r,
                       double *derivative) {
    double energy = 0.0;
    *derivative = 0.0;
    if (table.strength)
        energy = repulsion(table, first, second, r, derivative);
    else if (table.charge)
        energy = zbl(table, first, second, r, derivative);
    Bonded bond{};
    bond.r = r;
    if (!table.bonds || !find_bond(table, first, second, &bond)) return energy;
    const size_t n = size_t(table.n_species), k = size_t(first) * n + size_t(second);
    const double stretch = r - table.bonds[k], half = 0.25 * table.bonds[n * n + k] * stretch;
    *derivative += half * (2.0 * bond.keep + stretch * bond.keep_slope);
    return energy + half * stretch * bond.keep;
}

}  // namespace potstill
