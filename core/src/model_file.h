// A model as it is read from a file.
#pragma once

#include <string>
#include <vector>

#include "potstill_core.h"

struct potstill_model {
    potstill_hipnn hipnn{};
    bool is_double = false, has_zbl = false, has_repulsion = false, has_bonds = false;
    std::vector<double> in_double;  // its parameters, in both types
    std::vector<float> in_single;
    std::vector<double> offsets;    // (n_species) energies of single atoms
    std::vector<double> charge;     // (n_species)
    potstill_zbl zbl{};             // `charge` is that above
    std::vector<double> strength, radius;  // (n_species, n_species)
    potstill_repulsion repulsion{};        // of these
    std::vector<double> pairs, angles;     // (4, n_species, n_species), (n_angles, 5)
    potstill_bonds bonds{};                // of these
    std::vector<std::string> species;
    std::string provenance;
};
