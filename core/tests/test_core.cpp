// A stand-alone check of the C interface, meant to run under the address and undefined-behavior
// sanitizers: random systems with tiny cells, isolated atoms, ghosts, several species and several
// interaction layers; gradients, forces and virials against central differences, energies against
// their terms, domains layer by layer against the whole, wrong input against its error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "potstill_core.h"

namespace {

int failures = 0;

void expect(bool holds, const std::string &what) {
    if (holds) return;
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
}

std::mt19937 generator(1);
double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(generator);
}

struct System {
    std::vector<int32_t> species, neighbor;
    std::vector<int64_t> row_ptr;
    std::vector<double> positions, offsets, r_ij;
    std::vector<uint16_t> image;
    int64_t n_local;

    potstill_pairs pairs() const {
        return {int64_t(species.size()), n_local, species.data(), row_ptr.data(), neighbor.data(), nullptr, 0};
    }
    size_t n_pairs() const { return neighbor.size(); }
};

// Atoms in a cubic cell with its nearest images; `reach` is the radius of the list.
System make_system(int n_atoms, int n_local, int n_species, double cell, double reach) {
    System s;
    s.n_local = n_local;
    for (int i = 0; i < n_atoms; ++i) {
        s.species.push_back(int32_t(generator() % unsigned(n_species)));
        for (int d = 0; d < 3; ++d) s.positions.push_back(uniform(0.0, cell));
    }
    for (int a = -1; a <= 1; ++a)
        for (int b = -1; b <= 1; ++b)
            for (int c = -1; c <= 1; ++c)
                for (int shift : {a, b, c}) s.offsets.push_back(shift * cell);
    s.row_ptr.push_back(0);
    for (int i = 0; i < n_local; ++i) {
        for (int j = 0; j < n_atoms; ++j)
            for (int k = 0; k < 27; ++k) {
                if (i == j && k == 13) continue;
                double d[3], square = 0.0;
                for (int x = 0; x < 3; ++x) {
                    d[x] = s.positions[3 * j + x] - s.positions[3 * i + x] + s.offsets[3 * k + x];
                    square += d[x] * d[x];
                }
                if (square > reach * reach || square < 0.5) continue;
                s.neighbor.push_back(j);
                s.image.push_back(uint16_t(k));
                for (double x : d) s.r_ij.push_back(x);
            }
        s.row_ptr.push_back(int64_t(s.neighbor.size()));
    }
    return s;
}

std::vector<double> make_parameters(const potstill_hipnn &m) {
    std::vector<double> p(size_t(potstill_n_parameters(&m)));
    const bool smooth = m.invariants == POTSTILL_SMOOTH;
    for (double &x : p) x = (smooth ? 0.25 : 1.0) * uniform(-0.4, 0.4);
    if (smooth) return p;
    // Centers and widths of the sensitivities follow the interaction weights of each block.
    size_t at = 0;
    for (int b = 0; b < m.n_interaction_layers; ++b) {
        const size_t width = size_t(m.n_features), n = size_t(m.n_sensitivities);
        const size_t n_in = b == 0 ? size_t(m.n_species) : width;
        at += n * width * n_in;
        for (size_t k = 0; k < n; ++k) p[at + k] = 1.5 + 2.5 * double(k) / double(n);
        for (size_t k = 0; k < n; ++k) p[at + n + k] = 12.0;
        at += 2 * n + width * n_in + width * size_t(1 + m.l_max) + width * width + width;
        if (n_in != width) at += width * n_in;
        at += size_t(m.n_atom_layers) * 2 * (width * width + width);
    }
    return p;
}

struct Outcome {
    std::vector<double> terms, gradient, by_parameter;
};

double weighted(const std::vector<double> &terms, const std::vector<double> &weights) {
    double sum = 0.0;
    for (size_t k = 0; k < terms.size(); ++k) sum += terms[k] * weights[k];
    return sum;
}

Outcome run_f64(const potstill_hipnn &m, const std::vector<double> &p, const System &s,
                const std::vector<double> &weights, int n_threads) {
    Outcome o;
    o.terms.resize(size_t(s.n_local) * size_t(m.n_interaction_layers + 1));
    o.gradient.resize(3 * s.n_pairs());
    o.by_parameter.resize(p.size());
    const potstill_pairs pairs = s.pairs();
    const potstill_pass pass{s.r_ij.data(),   1, weights.data(), o.terms.data(), o.gradient.data(),
                             o.by_parameter.data()};
    expect(potstill_pass_f64(&m, p.data(), &pairs, &pass, n_threads) == 0, potstill_error());
    return o;
}

void run_f32(const potstill_hipnn &m, const std::vector<double> &p, const System &s,
             const Outcome &reference, const std::vector<double> &weights) {
    // Vectors of exact size, so that the sanitizer sees a single element too many.
    std::vector<float> parameters(p.begin(), p.end()), r_ij(s.r_ij.begin(), s.r_ij.end());
    std::vector<float> gradient(3 * s.n_pairs());
    std::vector<double> terms(reference.terms.size()), by_parameter(p.size());
    const potstill_pairs pairs = s.pairs();
    const potstill_pass pass{r_ij.data(),     0, weights.data(), terms.data(), gradient.data(),
                             by_parameter.data()};
    expect(potstill_pass_f32(&m, parameters.data(), &pairs, &pass, 2) == 0, potstill_error());
    for (size_t k = 0; k < terms.size(); ++k)
        expect(std::fabs(terms[k] - reference.terms[k]) < 1e-3 + 1e-4 * std::fabs(reference.terms[k]),
               "float and double terms agree");
}

void check_differences(const potstill_hipnn &m, const std::vector<double> &p, const System &s,
                       const Outcome &o, const std::vector<double> &weights) {
    const double step = 1e-5;
    for (int trial = 0; trial < 6; ++trial) {
        double numeric[2], exact[2] = {0.0, 0.0};
        for (int side = 0; side < 2; ++side) {
            const double sign = side ? 1.0 : -1.0;
            System moved = s;
            std::vector<double> changed = p;
            if (s.n_pairs() && trial % 2 == 0) {
                const size_t k = (size_t(trial) * 7919) % moved.r_ij.size();
                moved.r_ij[k] += sign * step;
                exact[0] = o.gradient[k];
            } else {
                const size_t k = (size_t(trial) * 7919) % p.size();
                changed[k] += sign * step;
                exact[0] = o.by_parameter[k];
            }
            numeric[side] = weighted(run_f64(m, changed, moved, weights, 1).terms, weights);
        }
        const double slope = (numeric[1] - numeric[0]) / (2.0 * step);
        expect(std::fabs(slope - exact[0]) < 1e-6 * (1.0 + std::fabs(slope)),
               "gradients equal differences");
    }
}

struct MdOutcome {
    std::vector<double> energies, forces, virial, centers, neighbors;

    explicit MdOutcome(const System &s)
        : energies(size_t(s.n_local)),
          forces(3 * s.species.size()),
          virial(9),
          centers(9 * size_t(s.n_local)),
          neighbors(9 * s.species.size()) {
        // An address even in a domain without atoms: they are asked for.
        for (std::vector<double> *x : {&forces, &centers, &neighbors}) x->reserve(3);
    }
    potstill_md task(const System &s, const potstill_zbl *zbl, const potstill_repulsion *beads = nullptr,
                     const potstill_bonds *bonds = nullptr) {
        return {s.positions.data(), s.image.empty() ? nullptr : s.image.data(), s.offsets.data(),
                int64_t(s.offsets.size() / 3), zbl, energies.data(), forces.data(), virial.data(),
                0, centers.data(), neighbors.data(), beads, bonds};
    }
    double energy() const {
        double sum = 0.0;
        for (double e : energies) sum += e;
        return sum;
    }
};

MdOutcome run_md(const potstill_hipnn &m, const std::vector<double> &p, const System &s,
                 const potstill_zbl *zbl, int n_threads, const potstill_repulsion *beads = nullptr,
                 const potstill_bonds *bonds = nullptr) {
    MdOutcome o(s);
    const potstill_md md = o.task(s, zbl, beads, bonds);
    const potstill_pairs pairs = s.pairs();
    expect(potstill_md_f64(&m, p.data(), &pairs, &md, n_threads) == 0, potstill_error());
    return o;
}

bool close(double a, double b, double tolerance) {
    return std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
}

// With ZBL, or the repulsion and bonds of beads.
void check_md(const potstill_hipnn &m, const std::vector<double> &p, const System &s,
              const potstill_zbl *zbl, const potstill_repulsion *beads, const potstill_bonds *bonds) {
    const MdOutcome o = run_md(m, p, s, zbl, 2, beads, bonds), bare = run_md(m, p, s, nullptr, 1);
    // The energies are sums of the terms, plus the prior's, which also come alone.
    const size_t n_terms = size_t(m.n_interaction_layers) + 1;
    const std::vector<double> ones(size_t(s.n_local) * n_terms, 1.0);
    const Outcome terms = run_f64(m, p, s, ones, 1);
    MdOutcome repulsion(s);
    const potstill_md alone = repulsion.task(s, zbl, beads, bonds);
    const potstill_pairs pairs = s.pairs();
    if (s.n_local) expect(potstill_md_f64(nullptr, nullptr, &pairs, &alone, 1) == 0, potstill_error());
    for (size_t i = 0; i < size_t(s.n_local); ++i) {
        double sum = 0.0;
        for (size_t k = 0; k < n_terms; ++k) sum += terms.terms[i * n_terms + k];
        expect(close(bare.energies[i], sum, 1e-12), "energies are sums of terms");
        expect(close(o.energies[i], sum + repulsion.energies[i], 1e-12), "the prior adds its energies");
    }
    for (size_t k = 0; k < 9; ++k)
        expect(close(o.virial[k], bare.virial[k] + repulsion.virial[k], 1e-10), "the prior adds its virial");
    // Virials by atoms are sums of r_ij outer dE/dr_ij over their pairs.
    std::vector<double> centers(bare.centers.size()), neighbors(bare.neighbors.size());
    for (size_t i = 0; i < size_t(s.n_local); ++i)
        for (size_t k = size_t(s.row_ptr[i]); k < size_t(s.row_ptr[i + 1]); ++k)
            for (size_t x = 0; x < 9; ++x) {
                const double part = s.r_ij[3 * k + x / 3] * terms.gradient[3 * k + x % 3];
                centers[9 * i + x] += part, neighbors[9 * size_t(s.neighbor[k]) + x] += part;
            }
    for (size_t k = 0; k < centers.size(); ++k)
        expect(close(bare.centers[k], centers[k], 1e-10) &&
                   close(o.centers[k], centers[k] + repulsion.centers[k], 1e-10),
               "virials of centers");
    for (size_t k = 0; k < neighbors.size(); ++k)
        expect(close(bare.neighbors[k], neighbors[k], 1e-10) &&
                   close(o.neighbors[k], neighbors[k] + repulsion.neighbors[k], 1e-10),
               "virials of neighbors");
    for (size_t d = 0; d < 3; ++d) {
        double total = 0.0;
        for (size_t i = 0; i < s.species.size(); ++i) total += o.forces[3 * i + d];
        expect(std::fabs(total) < 1e-9, "forces sum to zero");
    }
    const double step = 1e-5;
    const size_t n = s.species.size();
    for (size_t trial = 0; n && trial < 4; ++trial) {
        double energy[2];
        const size_t moving = (trial * 7919) % (3 * n), a = trial % 3, b = (trial / 2) % 3;
        for (int side = 0; side < 2; ++side) {
            System moved = s;
            const double by = side ? step : -step;
            if (trial < 2)
                moved.positions[moving] += by;
            else  // a strain of all vectors
                for (std::vector<double> *x : {&moved.positions, &moved.offsets})
                    for (size_t k = 0; k < x->size(); k += 3) (*x)[k + b] += by * (*x)[k + a];
            energy[side] = run_md(m, p, moved, zbl, 1, beads, bonds).energy();
        }
        const double slope = (energy[1] - energy[0]) / (2.0 * step);
        if (trial < 2)
            expect(close(-o.forces[moving], slope, 1e-6), "forces are slopes of the energy");
        else
            expect(close(o.virial[3 * a + b], slope, 1e-6), "the virial is the slope by strain");
    }
    // A list without images, and neither forces nor virial.
    std::vector<float> parameters(p.begin(), p.end());
    MdOutcome other(s);
    potstill_md md = other.task(s, zbl, beads, bonds);
    md.image = nullptr, md.forces = nullptr, md.virial = nullptr;
    md.center_virials = md.neighbor_virials = nullptr;
    expect(potstill_md_f32(&m, parameters.data(), &pairs, &md, 1) == 0, potstill_error());
}

void check_md(const potstill_hipnn &m, const std::vector<double> &p, const System &s) {
    const size_t n = size_t(m.n_species);
    const std::vector<double> charge(n, 13.0), strength(n * n, 0.002);
    std::vector<double> radius(n * n, 1.6);
    radius[0] = 1.9;
    const potstill_zbl zbl{charge.data(), 14.3996, 1.0, 2.5};
    const potstill_repulsion beads{strength.data(), radius.data(), m.n_species};
    // Bonds between the first species and itself, and the next one where there is one.
    const size_t next = n > 1 ? 1 : 0;
    std::vector<double> of_bonds(4 * n * n);
    for (size_t k : {size_t(0), next, next * n}) {
        const double values[4] = {1.2, 0.3, 1.5, 2.4};
        for (size_t x = 0; x < 4; ++x) of_bonds[x * n * n + k] = values[x];
    }
    const std::vector<double> angles = {0.0, 0.0, 0.0, -0.3, 0.2, double(next), 0.0, 0.0, 0.1, 0.4};
    const potstill_bonds bonds{of_bonds.data(), angles.data(), 2, m.n_species};
    static int turn = 0;  // each model with one of them
    switch (turn++ % 3) {
        case 0: check_md(m, p, s, &zbl, nullptr, nullptr); break;
        case 1: check_md(m, p, s, nullptr, &beads, nullptr); break;
        default: check_md(m, p, s, nullptr, turn % 2 ? &beads : nullptr, &bonds);
    }
    MdOutcome o(s);
    const potstill_md both = o.task(s, &zbl, &beads);
    const potstill_pairs pairs = s.pairs();
    if (s.n_local) expect(potstill_md_f64(&m, p.data(), &pairs, &both, 1) < 0, "both priors at once");
}

// One of the domains that a system is split into: local atoms, then ghosts, without images.
struct Domain {
    System s;
    std::vector<size_t> owner;  // of all its atoms, in the whole system
};

struct Home {
    size_t domain, index;
};

std::vector<Domain> split(const System &whole, double cell, std::vector<Home> &home) {
    std::vector<Domain> domains(2);
    home.resize(whole.species.size());
    for (size_t i = 0; i < home.size(); ++i) {
        const size_t d = whole.positions[3 * i] < 0.5 * cell ? 0 : 1;
        home[i] = {d, domains[d].owner.size()};
        domains[d].owner.push_back(i);
    }
    for (size_t d = 0; d < 2; ++d) {
        Domain &domain = domains[d];
        System &s = domain.s;
        s.n_local = int64_t(domain.owner.size());
        s.offsets.assign(3, 0.0);
        s.row_ptr.push_back(0);
        std::map<std::pair<size_t, int>, size_t> ghosts;
        std::vector<int> image(domain.owner.size(), 13);
        for (size_t own = 0; own < size_t(s.n_local); ++own) {
            const size_t i = domain.owner[own];
            for (int64_t k = whole.row_ptr[i]; k < whole.row_ptr[i + 1]; ++k) {
                const size_t j = size_t(whole.neighbor[size_t(k)]);
                const int shift = whole.image[size_t(k)];
                size_t at = home[j].index;
                if (home[j].domain != d || shift != 13) {
                    const auto found = ghosts.insert({{j, shift}, domain.owner.size()});
                    at = found.first->second;
                    if (found.second) domain.owner.push_back(j), image.push_back(shift);
                }
                s.neighbor.push_back(int32_t(at));
            }
            s.row_ptr.push_back(int64_t(s.neighbor.size()));
        }
        for (size_t k = 0; k < domain.owner.size(); ++k) {
            s.species.push_back(whole.species[domain.owner[k]]);
            for (size_t x = 0; x < 3; ++x)
                s.positions.push_back(whole.positions[3 * domain.owner[k] + x] +
                                      whole.offsets[3 * size_t(image[k]) + x]);
        }
    }
    return domains;
}

int begin(potstill_state *state, const potstill_hipnn &m, const std::vector<double> &p,
          const potstill_pairs &pairs, const potstill_md &md, int n_threads) {
    return potstill_begin_f64(state, &m, p.data(), &pairs, &md, n_threads);
}
int begin(potstill_state *state, const potstill_hipnn &m, const std::vector<float> &p,
          const potstill_pairs &pairs, const potstill_md &md, int n_threads) {
    return potstill_begin_f32(state, &m, p.data(), &pairs, &md, n_threads);
}

// Two domains, with features and their derivatives carried by hand, equal the whole.
template <class T>
void check_domains(const potstill_hipnn &m, const std::vector<double> &p, const System &whole,
                   double cell, double tolerance) {
    std::vector<double> charge(size_t(m.n_species), 13.0);
    const potstill_zbl zbl{charge.data(), 14.3996, 1.0, 2.5};
    const MdOutcome expected = run_md(m, p, whole, &zbl, 1);
    const std::vector<T> parameters(p.begin(), p.end());
    std::vector<Home> home;
    const std::vector<Domain> domains = split(whole, cell, home);
    potstill_state *states[2];
    std::vector<MdOutcome> outcomes;
    for (const Domain &domain : domains) outcomes.emplace_back(domain.s);
    // One domain keeps its neighbors in rows, with a bit of its own, and adds to the forces it has.
    const System &first = domains[0].s;
    std::vector<int32_t> marked(first.neighbor);
    for (int32_t &j : marked) j |= 1 << 30;
    std::vector<const int32_t *> rows(size_t(first.n_local) + 1);
    for (size_t i = 0; i < size_t(first.n_local); ++i) rows[i] = marked.data() + first.row_ptr[i];
    for (size_t d = 0; d < 2; ++d) {
        potstill_md md = outcomes[d].task(domains[d].s, &zbl);
        potstill_pairs pairs = domains[d].s.pairs();
        if (d == 0) {
            pairs.neighbor = nullptr, pairs.rows = rows.data(), pairs.mask = (1 << 30) - 1;
            md.add_forces = 1;
            for (double &f : outcomes[d].forces) f = 7.0;
        }
        states[d] = potstill_new_state();
        expect(begin(states[d], m, parameters, pairs, md, 1 + int(d)) == 0, potstill_error());
    }
    // Rows of ghosts and of their owners: carry(ghost's, owner's).
    auto exchange = [&](void *(*rows)(potstill_state *, int, int64_t *), int layer, auto carry) {
        int64_t stride = 0;
        T *data[2];
        for (size_t d = 0; d < 2; ++d) data[d] = static_cast<T *>(rows(states[d], layer, &stride));
        for (size_t d = 0; d < 2; ++d)
            for (size_t g = size_t(domains[d].s.n_local); g < domains[d].owner.size(); ++g) {
                const Home at = home[domains[d].owner[g]];
                for (int64_t f = 0; f < m.n_features; ++f)
                    carry(data[d][int64_t(g) * stride + f],
                          data[at.domain][int64_t(at.index) * stride + f]);
            }
    };
    const int n = m.n_interaction_layers;
    for (int k = 0; k < n; ++k) {
        for (potstill_state *state : states)
            expect(potstill_layer_forward(state, k) == 0, potstill_error());
        if (k < n - 1) exchange(potstill_layer_features, k, [](T &ghost, T &own) { ghost = own; });
    }
    for (int k = n - 1; k >= 0; --k) {
        for (potstill_state *state : states)
            expect(potstill_layer_reverse(state, k) == 0, potstill_error());
        if (k > 0) exchange(potstill_layer_cotangents, k - 1, [](T &ghost, T &own) { own += ghost; });
    }
    MdOutcome sum(whole);
    for (size_t d = 0; d < 2; ++d) {
        expect(potstill_finish(states[d]) == 0, potstill_error());
        potstill_delete_state(states[d]);
        for (double &f : outcomes[d].forces) f -= d == 0 ? 7.0 : 0.0;
        for (size_t k = 0; k < outcomes[d].centers.size(); ++k)
            sum.centers[9 * domains[d].owner[k / 9] + k % 9] += outcomes[d].centers[k];
        for (size_t k = 0; k < outcomes[d].neighbors.size(); ++k)
            sum.neighbors[9 * domains[d].owner[k / 9] + k % 9] += outcomes[d].neighbors[k];
        for (size_t k = 0; k < 9; ++k) sum.virial[k] += outcomes[d].virial[k];
        for (size_t i = 0; i < domains[d].owner.size(); ++i) {
            const size_t owner = domains[d].owner[i];
            if (i < outcomes[d].energies.size()) sum.energies[owner] = outcomes[d].energies[i];
            for (size_t x = 0; x < 3; ++x)
                sum.forces[3 * owner + x] += outcomes[d].forces[3 * i + x];
        }
    }
    auto agree = [&](const std::vector<double> &a, const std::vector<double> &b, const char *what) {
        double scale = 1.0;
        for (double x : b) scale = std::fabs(x) > scale ? std::fabs(x) : scale;
        for (size_t k = 0; k < a.size(); ++k) expect(std::fabs(a[k] - b[k]) <= tolerance * scale, what);
    };
    agree(sum.energies, expected.energies, "domains have the whole's energies");
    agree(sum.forces, expected.forces, "domains have the whole's forces");
    agree(sum.virial, expected.virial, "domains have the whole's virial");
    agree(sum.centers, expected.centers, "domains have the whole's virials of centers");
    agree(sum.neighbors, expected.neighbors, "domains have the whole's virials of neighbors");
}

// A form of the invariants, and the sizes that go with it.
struct Form {
    int invariants, l_max, n_sensitivities, n_channels, n_triples, taper = 0;
};

const Form forms[] = {{POTSTILL_NORMS, 0, 3, 0, 0},  {POTSTILL_NORMS, 1, 3, 0, 0},
                      {POTSTILL_NORMS, 2, 3, 0, 0},  {POTSTILL_SMOOTH, 0, 2, 4, 1},
                      {POTSTILL_SMOOTH, 1, 1, 1, 0}, {POTSTILL_SMOOTH, 2, 2, 4, 3},
                      {POTSTILL_SMOOTH, 3, 17, 2, 2}, {POTSTILL_SMOOTH, 4, 3, 4, 0},
                      {POTSTILL_SMOOTH, 4, 2, 3, 2}, {POTSTILL_SMOOTH, 4, 9, 2, 1, 2},
                      {POTSTILL_SMOOTH, 2, 3, 2, 1, 1}};

void check_models() {
    for (const char *const *set = potstill_compiled_instruction_sets(); *set; ++set) {
        if (!potstill_runnable(*set)) {
            std::printf("%s cannot run here\n", *set);
            continue;
        }
        expect(potstill_select(*set) == 0, potstill_error());
        std::printf("%s\n", potstill_instruction_set());
        for (const Form &form : forms)
            for (int n_layers = 1; n_layers <= 3; ++n_layers)
                for (int n_species = 1; n_species <= 3; n_species += 2) {
                    potstill_hipnn m{n_species, n_species == 3 ? 3 : 5, form.n_sensitivities,
                                     form.l_max, n_layers, form.l_max % 3, n_layers % 2, 4.0,
                                     1e-3, form.invariants, form.n_channels, form.n_triples, {}};
                    for (int rank = 0; rank < 4; ++rank)
                        m.n_tensor_sensitivities[rank] =
                            form.n_sensitivities - form.taper * (rank + 1);
                    const std::vector<double> p = make_parameters(m);
                    for (int kind = 0; kind < 5; ++kind) {
                        const int n = kind == 0 ? 0 : kind == 1 ? 1 : kind == 2 ? 35 : 3;
                        const double cell = kind == 4 ? 20.0 : kind == 2 ? 8.0 : 3.5;
                        const System s = make_system(n, n, n_species, cell, 4.5);
                        std::vector<double> weights(size_t(n) * size_t(n_layers + 1));
                        for (double &w : weights) w = uniform(-1.0, 1.0);
                        const Outcome o = run_f64(m, p, s, weights, 1);
                        const Outcome two = run_f64(m, p, s, weights, 3);
                        const Outcome again = run_f64(m, p, s, weights, 3);
                        expect(two.by_parameter == again.by_parameter, "repeatable");
                        for (size_t k = 0; k < p.size(); ++k)
                            expect(std::fabs(o.by_parameter[k] - two.by_parameter[k]) < 1e-9,
                                   "the number of threads does not matter");
                        run_f32(m, p, s, o, weights);
                        if (kind == 3) check_differences(m, p, s, o, weights);
                        check_md(m, p, s);
                        if (kind != 2 && kind != 3) continue;
                        check_domains<double>(m, p, s, cell, 1e-12);
                        check_domains<float>(m, p, s, cell, 1e-4);
                    }
                    if (n_layers > 1) continue;
                    check_md(m, p, make_system(20, 9, n_species, 8.0, 4.5));  // ghosts
                }
    }
    expect(potstill_select(nullptr) == 0, potstill_error());
}

// Steps out of their order are refused, and leave the evaluation where it was.
void check_steps(potstill_hipnn m, std::vector<double> p, const System &s) {
    m.n_interaction_layers = 2;
    p = make_parameters(m);
    MdOutcome o(s);
    potstill_md md = o.task(s, nullptr);
    const potstill_pairs pairs = s.pairs();
    potstill_state *state = potstill_new_state();
    int64_t stride = 0;
    expect(potstill_layer_forward(state, 0) < 0, "nothing has begun");
    for (int with_forces = 0; with_forces < 2; ++with_forces) {
        md.center_virials = md.neighbor_virials = nullptr;
        if (!with_forces) md.forces = nullptr, md.virial = nullptr;
        else md.forces = o.forces.data(), md.virial = o.virial.data();
        expect(potstill_begin_f64(state, &m, p.data(), &pairs, &md, 1) == 0, potstill_error());
        expect(potstill_layer_forward(state, 1) < 0, "layer 0 comes first");
        expect(potstill_layer_forward(state, 0) == 0, potstill_error());
        expect(potstill_layer_features(state, 0, &stride) != nullptr, "features to hand on");
        expect(potstill_layer_features(state, 1, &stride) == nullptr, "the last layer has none");
        expect(potstill_finish(state) < 0, "there is a layer left");
        expect(potstill_layer_forward(state, 1) == 0, potstill_error());
        expect(potstill_layer_forward(state, 2) < 0, "there is no layer 2");
        expect(potstill_layer_reverse(state, 0) < 0, "layer 1 comes first on the way back");
        for (int k = 1; k >= 0; --k)
            expect((potstill_layer_reverse(state, k) == 0) == bool(with_forces), "the way back");
        expect(potstill_finish(state) == 0, potstill_error());
    }
    expect(potstill_finish(state) < 0, "it is finished");
    potstill_delete_state(state);
}

void check_errors() {
    potstill_hipnn m{1, 4, 3, 1, 1, 1, 0, 4.0, 1e-3, POTSTILL_NORMS, 0, 0, {3, 3, 3, 3}};
    const std::vector<double> p = make_parameters(m);
    System s = make_system(4, 4, 1, 4.0, 4.5);
    const potstill_pass pass{s.r_ij.data(), 1, nullptr, nullptr, nullptr, nullptr};
    auto refused = [&](const char *what) {
        const potstill_pairs pairs = s.pairs();
        expect(potstill_pass_f64(&m, p.data(), &pairs, &pass, 1) < 0, what);
        expect(std::strlen(potstill_error()) > 10, "errors are explained");
    };
    s.neighbor[0] = 4;
    refused("a neighbor beyond the atoms");
    s.neighbor[0] = -1;
    refused("a negative neighbor");
    s.neighbor[0] = 1;
    s.species[2] = 1;
    refused("an unknown species");
    s.species[2] = 0;
    s.row_ptr[1] = s.row_ptr[2] + 1;
    refused("rows that overlap");
    s.row_ptr[1] = s.row_ptr[0];
    check_steps(m, p, s);
    m.l_max = 3;
    expect(potstill_n_parameters(&m) < 0, "l_max 3 of norms");
    m.invariants = POTSTILL_SMOOTH;
    expect(potstill_n_parameters(&m) < 0, "no channels");
    m.n_channels = 2;
    expect(potstill_n_parameters(&m) > 0, "l_max 3 of smooth invariants");
    m.n_triples = 3;
    expect(potstill_n_parameters(&m) < 0, "more triples than channels");
    m.n_triples = 2;
    expect(potstill_n_parameters(&m) > 0, "all channels");
    m.n_tensor_sensitivities[1] = 4;
    expect(potstill_n_parameters(&m) < 0, "more radial functions than the rank before");
    m.n_tensor_sensitivities[1] = m.n_tensor_sensitivities[2] = 0;
    expect(potstill_n_parameters(&m) < 0, "no radial functions");
    m.n_tensor_sensitivities[1] = m.n_tensor_sensitivities[2] = 2;
    expect(potstill_n_parameters(&m) > 0, "fewer of higher ranks");
    m.l_max = 5;
    expect(potstill_n_parameters(&m) < 0, "l_max 5");
    expect(potstill_select("mmx") < 0, "an unknown instruction set");
}

void check_packing() {
    const int64_t center[] = {0, 0, 2}, neighbor[] = {1, 2, 0};
    const int64_t shifts[] = {0, 0, 0, 1, 0, -1, -1, 0, 1};
    int64_t row_ptr[4];
    int32_t packed[3];
    uint16_t image[3];
    std::vector<int32_t> images(65536 * 3);
    const int n = potstill_pack_pairs(3, 3, center, neighbor, shifts, row_ptr, packed, image,
                                      images.data());
    expect(n == 9, "a box of images");
    expect(row_ptr[1] == 2 && row_ptr[2] == 2 && row_ptr[3] == 3, "row pointers");
    for (int k = 0; k < 3; ++k)
        for (int d = 0; d < 3; ++d)
            expect(images[size_t(3 * image[k] + d)] == shifts[3 * k + d], "images hold the shifts");
    const int64_t unsorted[] = {2, 0, 0};
    expect(potstill_pack_pairs(3, 3, unsorted, neighbor, shifts, row_ptr, packed, image,
                               images.data()) < 0,
           "unsorted centers");
}

// Pairs counted and listed against all images of all atoms.
void check_lists() {
    for (int trial = 0; trial < 60; ++trial) {
        const int n = trial % 12;
        const double edge = trial % 3 == 0 ? 2.5 : trial % 3 == 1 ? 6.0 : 14.0;
        const uint8_t periodic[] = {uint8_t(trial & 1), uint8_t(trial & 2), uint8_t(trial & 4),
                                    uint8_t(trial & 1), uint8_t(trial & 2), uint8_t(trial & 4)};
        std::vector<double> cells;
        for (int s = 0; s < 2; ++s)
            for (int k = 0; k < 9; ++k)
                cells.push_back(k % 4 == 0 ? edge : uniform(-0.3, 0.3) * edge);
        const int64_t first_atom[] = {0, n, 2 * n};
        std::vector<double> positions(size_t(6 * n));
        for (double &x : positions) x = uniform(-edge, 2.0 * edge);
        const double cutoff = uniform(1.0, 5.0);
        const potstill_systems systems{2, first_atom, positions.data(), cells.data(), periodic, cutoff};
        std::vector<int64_t> row_ptr(size_t(2 * n) + 1);
        int32_t range[6];
        expect(potstill_count_pairs(&systems, row_ptr.data(), range, 1 + trial % 3) == 0, potstill_error());
        std::vector<int32_t> neighbor(size_t(row_ptr.back()));
        std::vector<uint16_t> image(neighbor.size());
        expect(potstill_list_pairs(&systems, row_ptr.data(), range, neighbor.data(), image.data(), 2) == 0,
               potstill_error());
        for (int i = 0; i < 2 * n; ++i) {
            const int first = i < n ? 0 : n;
            const double *cell = cells.data() + (i < n ? 0 : 9);
            int64_t expected = 0;
            const int most = 9;  // images; the cells' faces are at least 0.6 edges apart
            for (int j = first; j < first + n; ++j)
                for (int a = -most * !!periodic[0]; a <= most * !!periodic[0]; ++a)
                    for (int b = -most * !!periodic[1]; b <= most * !!periodic[1]; ++b)
                        for (int c = -most * !!periodic[2]; c <= most * !!periodic[2]; ++c) {
                            if (i == j && !a && !b && !c) continue;
                            double square = 0.0;
                            for (int d = 0; d < 3; ++d) {
                                const double x = positions[size_t(3 * j + d)] - positions[size_t(3 * i + d)] +
                                                 a * cell[d] + b * cell[3 + d] + c * cell[6 + d];
                                square += x * x;
                            }
                            expected += square < cutoff * cutoff;
                        }
            expect(row_ptr[size_t(i) + 1] - row_ptr[size_t(i)] == expected, "counted all pairs");
            for (int64_t k = row_ptr[size_t(i)]; k < row_ptr[size_t(i) + 1]; ++k)
                expect(neighbor[size_t(k)] >= first && neighbor[size_t(k)] < first + n, "of one system");
        }
    }
    const int64_t first_atom[] = {0, 1};
    const double cell[] = {1e-8, 0, 0, 0, 5, 0, 0, 0, 5}, position[] = {0.0, 0.0, 0.0};
    const uint8_t periodic[] = {1, 1, 1};
    potstill_systems systems{1, first_atom, position, cell, periodic, 3.0};
    int64_t row_ptr[2];
    int32_t range[6];
    expect(potstill_count_pairs(&systems, row_ptr, range, 1) < 0, "a cell that is far too small");
    systems.cutoff = 0.0;
    expect(potstill_count_pairs(&systems, row_ptr, range, 1) < 0, "no cutoff");
}

// A model file, and whatever may have happened to it.
void check_files() {
    const potstill_hipnn m{1, 4, 3, 1, 2, 1, 0, 4.0, 1e-3, POTSTILL_NORMS, 0, 0, {0, 0, 0, 0}};
    std::vector<double> numbers = make_parameters(m);
    const size_t end = 8 * numbers.size();
    numbers.push_back(-3.5), numbers.push_back(13.0);
    auto file = [&](const std::string &sum) {
        auto tensor = [](const char *name, size_t from, size_t to) {
            return "\"" + std::string(name) + "\":{\"dtype\":\"F64\",\"shape\":[" +
                   std::to_string((to - from) / 8) + "],\"data_offsets\":[" + std::to_string(from) + "," +
                   std::to_string(to) + "]}";
        };
        const std::string header =
            R"({"__metadata__":{"format":"potstill","format_version":"1","checksum":")" + sum +
            R"(","model":"{\"units\":\"angstrom, eV\",\"precision\":\"float64\",\"species\":[\"Al\"],)"
            R"(\"network\":\"hipnn\",\"hipnn\":{\"n_species\":1,\"n_features\":4,\"n_sensitivities\":3,)"
            R"(\"l_max\":1,\"n_interaction_layers\":2,\"n_atom_layers\":1,\"n_channels\":0,)"
            R"(\"n_triples\":0,\"cutoff\":4.0,\"cusp_reg\":1e-3,\"cutoff_function\":\"cosine_squared\",)"
            R"(\"invariants\":\"norms\",\"n_tensor_sensitivities\":[]},\"zbl\":{\"coulomb\":14.3996,)"
            R"(\"inner\":1.0,\"cutoff\":2.5}}","provenance":"{\"note\": \"\u00c5\"}"},)" +
            tensor("parameters", 0, end) + "," + tensor("offsets", end, end + 8) + "," +
            tensor("zbl.charge", end + 8, end + 16) + "}";
        const uint64_t length = header.size();
        std::string content(reinterpret_cast<const char *>(&length), 8);
        content += header;
        content.append(reinterpret_cast<const char *>(numbers.data()), 8 * numbers.size());
        return content;
    };
    auto opens = [](const std::string &content) {
        const std::vector<char> exact(content.begin(), content.end());
        potstill_model *model = potstill_parse_model(exact.data(), exact.size());
        potstill_close_model(model);
        return model != nullptr;
    };
    expect(!opens(file("00000000")), "a wrong checksum");
    const std::string words = potstill_error(), mark = "its checksum is ";
    const std::string content = file(words.substr(words.find(mark) + mark.size(), 8));
    potstill_model *model = potstill_parse_model(content.data(), content.size());
    expect(model != nullptr, potstill_error());
    if (!model) return;
    expect(!std::strcmp(potstill_model_species(model, 0), "Al"), "the species");
    expect(potstill_model_species(model, 1) == nullptr, "one species only");
    expect(potstill_model_cutoff(model) == 4.0 && potstill_model_n_layers(model) == 2, "sizes");
    // It evaluates as its parts do.
    const System s = make_system(12, 12, 1, 5.0, 4.5);
    const double charge = 13.0;
    const potstill_zbl zbl{&charge, 14.3996, 1.0, 2.5};
    const std::vector<double> p(numbers.begin(), numbers.end() - 2);
    const MdOutcome expected = run_md(m, p, s, &zbl, 1);
    MdOutcome o(s);
    const potstill_md md = o.task(s, nullptr);
    const potstill_pairs pairs = s.pairs();
    potstill_state *state = potstill_new_state();
    expect(potstill_begin_model(state, model, 1, &pairs, &md, 1) == 0, potstill_error());
    for (int k = 0; k < 2; ++k) potstill_layer_forward(state, k);
    for (int k = 1; k >= 0; --k) potstill_layer_reverse(state, k);
    expect(potstill_finish(state) == 0, potstill_error());
    expect(potstill_state_bytes(state) > 0, "a state keeps memory");
    potstill_delete_state(state);
    potstill_close_model(model);
    expect(o.forces == expected.forces && o.virial == expected.virial, "forces of a model from a file");
    for (size_t i = 0; i < o.energies.size(); ++i)
        expect(close(o.energies[i], expected.energies[i] - 3.5, 1e-14), "its energies have their zero");
    for (size_t n = 0; n < content.size(); n += n < 2000 ? 1 : 97)
        expect(!opens(content.substr(0, n)), "a part of a file");
    for (size_t k = 0; k < content.size(); k += k < 2000 ? 1 : 97) {
        std::string damaged = content;
        damaged[k] = char(damaged[k] ^ (1 << (k % 7)));
        expect(!opens(damaged), "a damaged file");
    }
    expect(potstill_open_model("no/such/file") == nullptr, "a missing file");
}

}  // namespace

int main() {
    check_models();
    check_errors();
    check_files();
    check_packing();
    check_lists();
    potstill_release_memory();
    std::printf(failures ? "%d checks failed\n" : "all passed\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
