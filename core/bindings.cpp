// Python bindings: arrays in, arrays filled. Everything is checked by potstill.core, which is the
// only caller; here only the addresses are taken, without copies, and the lock is released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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

void check(int code) {
    if (code < 0) throw std::runtime_error(potstill_error());
}

template <class T>
T *address(const Optional<T> &array) {
    return array ? array->data() : nullptr;
}

potstill_hipnn hipnn(int n_species, int n_features, int n_sensitivities, int l_max,
                     int n_interaction_layers, int n_atom_layers, int cutoff_function, double cutoff,
                     double cusp_reg) {
    return {n_species,     n_features,      n_sensitivities, l_max, n_interaction_layers,
            n_atom_layers, cutoff_function, cutoff,          cusp_reg};
}

potstill_pairs pairs(const Array<const int32_t> &species, const Array<const int64_t> &row_ptr,
                     const Array<const int32_t> &neighbor) {
    return {int64_t(species.size()), int64_t(row_ptr.size()) - 1, species.data(), row_ptr.data(),
            neighbor.data()};
}

template <class T, class R, class F>
void run_pass(F function, const potstill_hipnn &model, Array<const T> parameters,
              Array<const int32_t> species, Array<const int64_t> row_ptr, Array<const int32_t> neighbor,
              Array<const R> r_ij, Optional<const double> weights, Optional<double> terms,
              Optional<T> gradient, Optional<double> parameter_gradient, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    const potstill_pass what{r_ij.data(),    sizeof(R) == 8,    address(weights),
                             address(terms), address(gradient), address(parameter_gradient)};
    int code;
    {
        nb::gil_scoped_release release;
        code = function(&model, parameters.data(), &list, &what, n_threads);
    }
    check(code);
}

template <class T, class F>
void run_md(F function, const potstill_hipnn *model, Optional<const T> parameters,
            Array<const int32_t> species, Array<const int64_t> row_ptr, Array<const int32_t> neighbor,
            Array<const double> positions, Optional<const uint16_t> image,
            Array<const double> offsets, Optional<const double> zbl_charge, double zbl_coulomb,
            double zbl_inner, double zbl_cutoff, Array<double> energies, Optional<double> forces,
            Optional<double> virial, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    const potstill_zbl zbl{address(zbl_charge), zbl_coulomb, zbl_inner, zbl_cutoff};
    const potstill_md what{positions.data(),
                           address(image),
                           offsets.data(),
                           int64_t(offsets.shape(0)),
                           zbl_charge ? &zbl : nullptr,
                           energies.data(),
                           address(forces),
                           address(virial)};
    int code;
    {
        nb::gil_scoped_release release;
        code = function(model, address(parameters), &list, &what, n_threads);
    }
    check(code);
}

template <class T, class F>
void pair_vectors(F function, Array<const int32_t> species, Array<const int64_t> row_ptr,
                  Array<const int32_t> neighbor, Array<const double> positions,
                  Array<const int32_t> system, Optional<const uint16_t> image,
                  Array<const double> offsets, Array<T> r_ij, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    const potstill_batch batch{positions.data(), system.data(), address(image), offsets.data(),
                               int64_t(offsets.shape(1))};
    nb::gil_scoped_release release;
    function(&list, &batch, r_ij.data(), n_threads);
}

template <class T, class F>
void pair_forces(F function, Array<const int32_t> species, Array<const int64_t> row_ptr,
                 Array<const int32_t> neighbor, Array<const int64_t> first_atom, Array<const T> r_ij,
                 Array<const T> gradient, Array<double> forces, Optional<double> virial, int n_threads) {
    const potstill_pairs list = pairs(species, row_ptr, neighbor);
    nb::gil_scoped_release release;
    function(&list, first_atom.data(), int64_t(first_atom.size()) - 1, r_ij.data(), gradient.data(),
             forces.data(), address(virial), n_threads);
}

int pack_pairs(Array<const int64_t> center, Array<const int64_t> neighbor, Array<const int64_t> shifts,
               Array<int64_t> row_ptr, Array<int32_t> neighbor_out, Array<uint16_t> image,
               Array<int32_t> images) {
    int code;
    {
        nb::gil_scoped_release release;
        code = potstill_pack_pairs(int64_t(center.size()), int64_t(row_ptr.size()) - 1, center.data(),
                                   neighbor.data(), shifts.data(), row_ptr.data(),
                                   neighbor_out.data(), image.data(), images.data());
    }
    check(code);
    return code;
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
    int code;
    {
        nb::gil_scoped_release release;
        code = potstill_count_pairs(&all, row_ptr.data(), shift_range.data(), n_threads);
    }
    check(code);
}

void list_pairs(Array<const int64_t> first_atom, Array<const double> positions, Array<const double> cells,
                Array<const uint8_t> periodic, double cutoff, Array<const int64_t> row_ptr,
                Array<const int32_t> shift_range, Array<int32_t> neighbor, Optional<uint16_t> image,
                int n_threads) {
    const potstill_systems all = systems(first_atom, positions, cells, periodic, cutoff);
    int code;
    {
        nb::gil_scoped_release release;
        code = potstill_list_pairs(&all, row_ptr.data(), shift_range.data(), neighbor.data(),
                                   address(image), n_threads);
    }
    check(code);
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

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<potstill_hipnn>(m, "Hipnn").def(
        "__init__",
        [](potstill_hipnn *self, int n_species, int n_features, int n_sensitivities, int l_max,
           int n_interaction_layers, int n_atom_layers, int cutoff_function, double cutoff,
           double cusp_reg) {
            new (self) potstill_hipnn(hipnn(n_species, n_features, n_sensitivities, l_max,
                                            n_interaction_layers, n_atom_layers, cutoff_function,
                                            cutoff, cusp_reg));
        });
    m.def("n_parameters", [](const potstill_hipnn &model) {
        const int64_t n = potstill_n_parameters(&model);
        if (n < 0) throw std::runtime_error(potstill_error());
        return n;
    });
#define POTSTILL_DEFINE_PASS(NAME, T, R, FUNCTION)                                                  \
    m.def(                                                                                          \
        NAME,                                                                                       \
        [](const potstill_hipnn &model, Array<const T> parameters, Array<const int32_t> species,    \
           Array<const int64_t> row_ptr, Array<const int32_t> neighbor, Array<const R> r_ij,        \
           Optional<const double> weights, Optional<double> terms, Optional<T> gradient,            \
           Optional<double> parameter_gradient, int n_threads) {                                    \
            run_pass<T, R>(FUNCTION, model, parameters, species, row_ptr, neighbor, r_ij, weights,  \
                           terms, gradient, parameter_gradient, n_threads);                         \
        },                                                                                          \
        nb::arg("model"), nb::arg("parameters"), nb::arg("species"), nb::arg("row_ptr"),            \
        nb::arg("neighbor"), nb::arg("r_ij"), nb::arg("weights").none(), nb::arg("terms").none(),   \
        nb::arg("gradient").none(), nb::arg("parameter_gradient").none(), nb::arg("n_threads"))
    POTSTILL_DEFINE_PASS("pass_f32_f32", float, float, potstill_pass_f32);
    POTSTILL_DEFINE_PASS("pass_f32_f64", float, double, potstill_pass_f32);
    POTSTILL_DEFINE_PASS("pass_f64_f32", double, float, potstill_pass_f64);
    POTSTILL_DEFINE_PASS("pass_f64_f64", double, double, potstill_pass_f64);
#define POTSTILL_DEFINE_MD(NAME, T, FUNCTION)                                                       \
    m.def(                                                                                          \
        NAME,                                                                                       \
        [](const potstill_hipnn *model, Optional<const T> parameters, Array<const int32_t> species, \
           Array<const int64_t> row_ptr, Array<const int32_t> neighbor,                             \
           Array<const double> positions, Optional<const uint16_t> image,                           \
           Array<const double> offsets, Optional<const double> zbl_charge, double zbl_coulomb,      \
           double zbl_inner, double zbl_cutoff, Array<double> energies, Optional<double> forces,                      \
           Optional<double> virial, int n_threads) {                                                \
            run_md<T>(FUNCTION, model, parameters, species, row_ptr, neighbor, positions, image,    \
                      offsets, zbl_charge, zbl_coulomb, zbl_inner, zbl_cutoff, energies, forces, virial,         \
                      n_threads);                                                                   \
        },                                                                                          \
        nb::arg("model").none(), nb::arg("parameters").none(), nb::arg("species"),                  \
        nb::arg("row_ptr"), nb::arg("neighbor"), nb::arg("positions"), nb::arg("image").none(),     \
        nb::arg("offsets"), nb::arg("zbl_charge").none(), nb::arg("zbl_coulomb"), nb::arg("zbl_inner"),                     \
        nb::arg("zbl_cutoff"), nb::arg("energies"), nb::arg("forces").none(),                       \
        nb::arg("virial").none(), nb::arg("n_threads"))
    POTSTILL_DEFINE_MD("md_f32", float, potstill_md_f32);
    POTSTILL_DEFINE_MD("md_f64", double, potstill_md_f64);
#define POTSTILL_DEFINE_GEOMETRY(SUFFIX, T)                                                         \
    m.def("pair_vectors_" #SUFFIX,                                                                  \
          [](Array<const int32_t> species, Array<const int64_t> row_ptr,                            \
             Array<const int32_t> neighbor, Array<const double> positions,                          \
             Array<const int32_t> system, Optional<const uint16_t> image,                           \
             Array<const double> offsets, Array<T> r_ij, int n_threads) {                           \
              pair_vectors<T>(potstill_pair_vectors_##SUFFIX, species, row_ptr, neighbor,           \
                              positions, system, image, offsets, r_ij, n_threads);                  \
          },                                                                                        \
          nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"), nb::arg("positions"),        \
          nb::arg("system"), nb::arg("image").none(), nb::arg("offsets"), nb::arg("r_ij"),          \
          nb::arg("n_threads"));                                                                    \
    m.def("pair_forces_" #SUFFIX,                                                                   \
          [](Array<const int32_t> species, Array<const int64_t> row_ptr,                            \
             Array<const int32_t> neighbor, Array<const int64_t> first_atom, Array<const T> r_ij,   \
             Array<const T> gradient, Array<double> forces, Optional<double> virial,                \
             int n_threads) {                                                                       \
              pair_forces<T>(potstill_pair_forces_##SUFFIX, species, row_ptr, neighbor, first_atom, \
                             r_ij, gradient, forces, virial, n_threads);                            \
          },                                                                                        \
          nb::arg("species"), nb::arg("row_ptr"), nb::arg("neighbor"), nb::arg("first_atom"),       \
          nb::arg("r_ij"), nb::arg("gradient"), nb::arg("forces"), nb::arg("virial").none(),        \
          nb::arg("n_threads"))
    POTSTILL_DEFINE_GEOMETRY(f32, float);
    POTSTILL_DEFINE_GEOMETRY(f64, double);
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
    m.def("gflops_f32", &potstill_measure_gflops_f32, nb::call_guard<nb::gil_scoped_release>());
    m.def("gflops_f64", &potstill_measure_gflops_f64, nb::call_guard<nb::gil_scoped_release>());
    m.def("release_memory", &potstill_release_memory);
    m.def("scratch_bytes", &potstill_scratch_bytes);
}
