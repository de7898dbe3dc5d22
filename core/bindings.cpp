// Python bindings: arrays in, arrays filled. Everything is checked by potstill.core, which is the
// only caller; here only the addresses are taken, without copies, and the lock is released. Functions
// of float and double carry one name: the dtype of the arrays chooses.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "potstill_core.h"

namespace nb = nanobind;

namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Optional = std::optional<Array<T>>;

// The C functions of a type.
template <class T>
struct Functions;
template <>
struct Functions<float> {
    static constexpr auto pass = potstill_pass_f32;
    static constexpr auto md = potstill_md_f32;
    static constexpr auto begin = potstill_begin_f32;
    static constexpr auto pair_vectors = potstill_pair_vectors_f32;
    static constexpr auto pair_forces = potstill_pair_forces_f32;
};
template <>
struct Functions<double> {
    static constexpr auto pass = potstill_pass_f64;
    static constexpr auto md = potstill_md_f64;
    static constexpr auto begin = potstill_begin_f64;
    static constexpr auto pair_vectors = potstill_pair_vectors_f64;
    static constexpr auto pair_forces = potstill_pair_forces_f64;
};

template <class T>
T *address(const Optional<T> &array) {
    return array ? array->data() : nullptr;
}

template <class N>
N check(N code) {
    if (code < 0) throw std::runtime_error(potstill_error());
    return code;
}

// Without Python's lock; a negative result is an error.
template <class F>
auto unlocked(F &&call) {
    auto code = [&] {
        nb::gil_scoped_release release;
        return call();
    }();
    return check(code);
}

potstill_pairs pairs(const Array<const int32_t> &species, const Array<const int64_t> &row_ptr,
                     const Array<const int32_t> &neighbor) {
    return {int64_t(species.size()), int64_t(row_ptr.size()) - 1, species.data(), row_ptr.data(),
            neighbor.data(), nullptr, 0};
}

template <class T, class R>
void run_pass(const potstill_hipnn &model, Array<const T> parameters, Array<const int32_t> species,
              Array<const int64_t> row_ptr, Array<const int32_t> neighbor, Array<const R> r_ij,
              Optional<const double> weights, Array<double> terms, Optional<T> gradient,
              Optional<double> parameter_gradient, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    const potstill_pass what{r_ij.data(),  sizeof(R) == 8,    address(weights),
                             terms.data(), address(gradient), address(parameter_gradient)};
    unlocked([&] { return Functions<T>::pass(&model, parameters.data(), &list, &what, n_threads); });
}

// One system's geometry and where its results go. It keeps the arrays alive.
struct Geometry {
    Array<const int32_t> species, neighbor;
    Array<const int64_t> row_ptr;
    Array<const double> positions, offsets;
    Optional<const uint16_t> image;
    Optional<const double> charge, strength, radius, bond_pairs, bond_angles;
    Array<double> energies;
    Optional<double> forces, virial, center_virials, neighbor_virials;
    potstill_pairs list;
    potstill_zbl zbl;
    potstill_repulsion repulsion;
    potstill_bonds bonds;
    potstill_md md;

    Geometry(Array<const int32_t> species_, Array<const int64_t> row_ptr_,
             Array<const int32_t> neighbor_, Array<const double> positions_,
             Optional<const uint16_t> image_, Array<const double> offsets_,
             Optional<const double> zbl_charge, double zbl_coulomb, double zbl_inner,
             double zbl_cutoff, Optional<const double> repulsion_strength,
             Optional<const double> repulsion_radius, Optional<const double> bond_pairs_,
             Optional<const double> bond_angles_, int32_t n_angles, int32_t n_species,
             Array<double> energies_, Optional<double> forces_,
             Optional<double> virial_, bool add_forces, Optional<double> center_virials_,
             Optional<double> neighbor_virials_)
        : species(species_),
          neighbor(neighbor_),
          row_ptr(row_ptr_),
          positions(positions_),
          offsets(offsets_),
          image(image_),
          charge(zbl_charge),
          strength(repulsion_strength),
          radius(repulsion_radius),
          bond_pairs(bond_pairs_),
          bond_angles(bond_angles_),
          energies(energies_),
          forces(forces_),
          virial(virial_),
          center_virials(center_virials_),
          neighbor_virials(neighbor_virials_),
          list(pairs(species, row_ptr, neighbor)),
          zbl{address(charge), zbl_coulomb, zbl_inner, zbl_cutoff},
          repulsion{address(strength), address(radius), n_species},
          bonds{address(bond_pairs), address(bond_angles), n_angles, n_species} {
        md = {positions.data(),        address(image),  offsets.data(),  int64_t(offsets.shape(0)),
              charge ? &zbl : nullptr, energies.data(), address(forces), address(virial),
              add_forces,              address(center_virials), address(neighbor_virials),
              strength ? &repulsion : nullptr, bond_pairs ? &bonds : nullptr};
    }
    Geometry(const Geometry &) = delete;  // `md` points into it
};

template <class T>
void run_md(const Geometry &g, const potstill_hipnn &model, Array<const T> parameters, int n_threads) {
    unlocked([&] { return Functions<T>::md(&model, parameters.data(), &g.list, &g.md, n_threads); });
}

void run_prior(const Geometry &g) {
    unlocked([&] { return potstill_md_f64(nullptr, nullptr, &g.list, &g.md, 1); });
}

// An evaluation layer by layer, with all that it reads and writes.
struct State {
    potstill_state *state = potstill_new_state();
    nb::object geometry, parameters;
    bool is_double = false;
    int n_features = 0;
    int64_t n_atoms = 0;

    State() {
        if (!state) throw std::bad_alloc();
    }
    State(const State &) = delete;
    ~State() { potstill_delete_state(state); }

    template <class T>
    void begin(nb::object given, const potstill_hipnn &model, Array<const T> values, int n_threads) {
        const Geometry &g = nb::cast<const Geometry &>(given);
        geometry = given, parameters = nb::cast(values);
        is_double = sizeof(T) == 8, n_features = model.n_features, n_atoms = g.list.n_atoms;
        unlocked([&] {
            return Functions<T>::begin(state, &model, values.data(), &g.list, &g.md, n_threads);
        });
    }

    void forward(int layer) {
        unlocked([&] { return potstill_layer_forward(state, layer); });
    }
    void reverse(int layer) {
        unlocked([&] { return potstill_layer_reverse(state, layer); });
    }
    void finish() {
        unlocked([&] { return potstill_finish(state); });
    }
};

// A model that was read from a file.
struct ModelFile {
    potstill_model *model;

    explicit ModelFile(const std::string &path) : model(potstill_open_model(path.c_str())) {
        if (!model) throw std::runtime_error(potstill_error());
    }
    ModelFile(const ModelFile &) = delete;
    ~ModelFile() { potstill_close_model(model); }

    std::vector<std::string> species() const {
        std::vector<std::string> names;
        for (int k = 0; k < potstill_model_n_species(model); ++k)
            names.emplace_back(potstill_model_species(model, k));
        return names;
    }

    void evaluate(const Geometry &g, bool in_double, int n_threads) const {
        State s;
        const int n_layers = potstill_model_n_layers(model);
        unlocked([&] {
            int code = potstill_begin_model(s.state, model, in_double, &g.list, &g.md, n_threads);
            for (int k = 0; k < n_layers && code == 0; ++k) code = potstill_layer_forward(s.state, k);
            for (int k = n_layers - 1; k >= 0 && code == 0 && g.md.forces; --k)
                code = potstill_layer_reverse(s.state, k);
            return code == 0 ? potstill_finish(s.state) : code;
        });
    }
};

// (n_atoms, n_features) rows of a layer, in place.
template <void *(*rows)(potstill_state *, int, int64_t *)>
nb::object rows_of(nb::handle_t<State> self, int layer) {
    const State &s = nb::cast<const State &>(self);
    int64_t stride = 0;
    void *data = rows(s.state, layer, &stride);
    if (!data) throw std::runtime_error("this layer has no features to hand on now");
    const size_t shape[] = {size_t(s.n_atoms), size_t(s.n_features)};
    const int64_t strides[] = {stride, 1};
    if (s.is_double) return nb::cast(nb::ndarray<nb::numpy, double>(data, 2, shape, self, strides));
    return nb::cast(nb::ndarray<nb::numpy, float>(data, 2, shape, self, strides));
}

template <class T>
void pair_vectors(Array<const int32_t> species, Array<const int64_t> row_ptr,
                  Array<const int32_t> neighbor, Array<const double> positions,
                  Array<const int32_t> system, Optional<const uint16_t> image,
                  Array<const double> offsets, Array<T> r_ij, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    const potstill_batch batch{positions.data(), system.data(), address(image), offsets.data(),
                               int64_t(offsets.shape(1))};
    nb::gil_scoped_release release;
    Functions<T>::pair_vectors(&list, &batch, r_ij.data(), n_threads);
}

template <class T>
void pair_forces(Array<const int32_t> species, Array<const int64_t> row_ptr,
                 Array<const int32_t> neighbor, Array<const int64_t> first_atom, Array<const T> r_ij,
                 Array<const T> gradient, Array<double> forces, Optional<double> virial, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    nb::gil_scoped_release release;
    Functions<T>::pair_forces(&list, first_atom.data(), int64_t(first_atom.size()) - 1, r_ij.data(),
                              gradient.data(), forces.data(), address(virial), n_threads);
}

int pack_pairs(Array<const int64_t> center, Array<const int64_t> neighbor, Array<const int64_t> shifts,
               Array<int64_t> row_ptr, Array<int32_t> neighbor_out, Array<uint16_t> image,
               Array<int32_t> images) {
    return unlocked([&] {
        return potstill_pack_pairs(int64_t(center.size()), int64_t(row_ptr.size()) - 1, center.data(),
                                   neighbor.data(), shifts.data(), row_ptr.data(),
                                   neighbor_out.data(), image.data(), images.data());
    });
}

potstill_systems systems(const Array<const int64_t> &first_atom, const Array<const double> &positions,
                         const Array<const double> &cells, const Array<const uint8_t> &periodic,
                         double cutoff) {
    return {int64_t(first_atom.size()) - 1, first_atom.data(), positions.data(),
            cells.data(),                   periodic.data(),   cutoff};
}

void count_pairs(Array<const int64_t> first_atom, Array<const double> positions, Array<const double> cells,
                 Array<const uint8_t> periodic, double cutoff, Array<int64_t> row_ptr,
                 Array<int32_t> shift_range, int n_threads) {
    const potstill_systems all = systems(first_atom, positions, cells, periodic, cutoff);
    unlocked([&] { return potstill_count_pairs(&all, row_ptr.data(), shift_range.data(), n_threads); });
}

void list_pairs(Array<const int64_t> first_atom, Array<const double> positions, Array<const double> cells,
                Array<const uint8_t> periodic, double cutoff, Array<const int64_t> row_ptr,
                Array<const int32_t> shift_range, Array<int32_t> neighbor, Optional<uint16_t> image,
                int n_threads) {
    const potstill_systems all = systems(first_atom, positions, cells, periodic, cutoff);
    unlocked([&] {
        return potstill_list_pairs(&all, row_ptr.data(), shift_range.data(), neighbor.data(),
                                   address(image), n_threads);
    });
}

std::vector<std::string> compiled() {
    std::vector<std::string> names;
    for (const char *const *name = potstill_compiled_instruction_sets(); *name; ++name)
        names.emplace_back(*name);
    return names;
}

std::string instruction_set() {
    const char *name = potstill_instruction_set();
    if (!name) throw std::runtime_error(potstill_error());
    return name;
}

// Arguments that may be None, and those whose dtype must be that of the function.
template <class T>
void define_functions(nb::module_ &m, nb::class_<State> &state) {
    m.def("md", &run_md<T>, nb::arg("geometry"), nb::arg("model"), nb::arg("parameters").noconvert(),
          nb::arg("n_threads"));
    state.def("begin", &State::begin<T>, nb::arg("geometry"), nb::arg("model"),
              nb::arg("parameters").noconvert(), nb::arg("n_threads"));
    m.def("pair_vectors", &pair_vectors<T>, nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"),
          nb::arg("positions"), nb::arg("system"), nb::arg("image").none(), nb::arg("offsets"),
          nb::arg("r_ij").noconvert(), nb::arg("n_threads"));
    m.def("pair_forces", &pair_forces<T>, nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"),
          nb::arg("first_atom"), nb::arg("r_ij").noconvert(), nb::arg("gradient").noconvert(),
          nb::arg("forces"), nb::arg("virial").none(), nb::arg("n_threads"));
}

template <class T, class R>
void define_pass(nb::module_ &m) {
    m.def("run_pass", &run_pass<T, R>, nb::arg("model"), nb::arg("parameters").noconvert(),
          nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"), nb::arg("r_ij").noconvert(),
          nb::arg("weights").none(), nb::arg("terms"), nb::arg("gradient").none(),
          nb::arg("parameter_gradient").none(), nb::arg("n_threads"));
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<potstill_hipnn>(m, "Hipnn").def(
        "__init__",
        [](potstill_hipnn *self, int n_species, int n_features, int n_sensitivities, int l_max,
           int n_interaction_layers, int n_atom_layers, int cutoff_function, double cutoff,
           double cusp_reg, int invariants, int n_channels, int n_triples,
           std::array<int, 4> n_tensor_sensitivities) {
            new (self) potstill_hipnn{n_species,       n_features,           n_sensitivities,
                                      l_max,           n_interaction_layers, n_atom_layers,
                                      cutoff_function, cutoff,               cusp_reg,
                                      invariants,      n_channels,           n_triples,
                                      {}};
            std::copy(n_tensor_sensitivities.begin(), n_tensor_sensitivities.end(),
                      self->n_tensor_sensitivities);
        });
    nb::class_<Geometry>(m, "Geometry")
        .def(nb::init<Array<const int32_t>, Array<const int64_t>, Array<const int32_t>,
                      Array<const double>, Optional<const uint16_t>, Array<const double>,
                      Optional<const double>, double, double, double, Optional<const double>,
                      Optional<const double>, Optional<const double>, Optional<const double>,
                      int32_t, int32_t, Array<double>, Optional<double>,
                      Optional<double>, bool, Optional<double>, Optional<double>>(),
             nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"), nb::arg("positions"),
             nb::arg("image").none(), nb::arg("offsets"), nb::arg("zbl_charge").none(),
             nb::arg("zbl_coulomb"), nb::arg("zbl_inner"), nb::arg("zbl_cutoff"),
             nb::arg("repulsion_strength").none(), nb::arg("repulsion_radius").none(),
             nb::arg("bond_pairs").none(), nb::arg("bond_angles").none(), nb::arg("n_angles"),
             nb::arg("n_species"), nb::arg("energies"), nb::arg("forces").none(), nb::arg("virial").none(),
             nb::arg("add_forces"), nb::arg("center_virials").none(),
             nb::arg("neighbor_virials").none());
    nb::class_<State> state(m, "State");
    state.def(nb::init<>())
        .def("forward", &State::forward)
        .def("reverse", &State::reverse)
        .def("finish", &State::finish)
        .def("features", &rows_of<potstill_layer_features>)
        .def("cotangents", &rows_of<potstill_layer_cotangents>);
    nb::class_<ModelFile>(m, "ModelFile")
        .def(nb::init<const std::string &>())
        .def_prop_ro("species", &ModelFile::species)
        .def_prop_ro("cutoff", [](const ModelFile &f) { return potstill_model_cutoff(f.model); })
        .def_prop_ro("n_layers", [](const ModelFile &f) { return potstill_model_n_layers(f.model); })
        .def_prop_ro("is_double", [](const ModelFile &f) { return potstill_model_is_double(f.model) != 0; })
        .def_prop_ro("provenance",
                     [](const ModelFile &f) { return std::string(potstill_model_provenance(f.model)); })
        .def("evaluate", &ModelFile::evaluate);
    define_functions<float>(m, state);
    define_functions<double>(m, state);
    define_pass<float, float>(m);
    define_pass<float, double>(m);
    define_pass<double, float>(m);
    define_pass<double, double>(m);
    m.def("prior", &run_prior);
    m.def("pack_pairs", &pack_pairs);
    m.def("count_pairs", &count_pairs);
    m.def("list_pairs", &list_pairs, nb::arg("first_atom"), nb::arg("positions"), nb::arg("cells"),
          nb::arg("periodic"), nb::arg("cutoff"), nb::arg("row_ptr"), nb::arg("shift_range"),
          nb::arg("neighbor"), nb::arg("image").none(), nb::arg("n_threads"));
    m.def("compiled_instruction_sets", &compiled);
    m.def("runnable", [](const std::string &name) { return potstill_runnable(name.c_str()) != 0; });
    m.def("select", [](std::optional<std::string> name) {
        check(potstill_select(name ? name->c_str() : nullptr));
    }, nb::arg("instruction_set").none());
    m.def("instruction_set", &instruction_set);
    m.def("release_memory", &potstill_release_memory);
    m.def("scratch_bytes", &potstill_scratch_bytes);
}
