// Models in files: the safetensors format, with what the tensors mean in its metadata.
#include "model_file.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>

#include "json.h"
#include "kernels.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "model files are little-endian, and so must be the machine"
#endif

namespace potstill {
namespace {

constexpr int64_t newest_version = 2;  // 2: with a repulsion or bonds of beads

struct WrongFile : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The checksum of zlib and PNG.
class Crc32 {
  public:
    Crc32() {
        for (uint32_t k = 0; k < 256; ++k) {
            uint32_t c = k;
            for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            table_[k] = c;
        }
    }
    void add(const char *data, size_t n) {
        for (size_t k = 0; k < n; ++k) state_ = table_[(state_ ^ uint8_t(data[k])) & 0xFF] ^ (state_ >> 8);
    }
    std::string hexadecimal() const {
        char digits[9];
        std::snprintf(digits, sizeof digits, "%08x", unsigned(~state_));
        return digits;
    }

  private:
    std::array<uint32_t, 256> table_;
    uint32_t state_ = 0xFFFFFFFFu;
};

// A file's header, and its tensors by name.
class Container {
  public:
    Container(const char *content, size_t size) : content_(content), size_(size) {
        uint64_t length = 0;
        if (size >= 8) std::memcpy(&length, content, 8);
        if (size < 8 || length > size - 8 || content[8] != '{')
            throw WrongFile("this is no model file of potstill, or only a part of one");
        data_ = 8 + size_t(length);
        const std::string text(content + 8, size_t(length));
        try {
            header_ = JsonReader(text).read();
        } catch (const std::runtime_error &) {
            throw WrongFile("the header is damaged, or this is no model file of potstill");
        }
        const Json *metadata = header_.find("__metadata__");
        const Json *format = metadata ? metadata->find("format") : nullptr;
        if (!format || format->string != "potstill")
            throw WrongFile("this is no model file of potstill");
        check_version(about().as_text("format_version"));
        check_sum(text, about().as_text("checksum"));
    }

    const Json &about() const { return header_.expect("__metadata__", Json::object); }

    // Numbers of a tensor, in double precision.
    std::vector<double> numbers(const std::string &name) const {
        const Json &tensor = header_.expect(name, Json::object);
        const Json &offsets = tensor.expect("data_offsets", Json::array);
        const std::string &type = tensor.as_text("dtype");
        if (offsets.members.size() != 2 || (type != "F32" && type != "F64"))
            throw WrongFile("tensor '" + name + "' is not of a known kind");
        const double first = offsets.members[0].second.value, last = offsets.members[1].second.value;
        const double room = double(size_ - data_);
        if (!(first >= 0.0 && first <= last && last <= room))
            throw WrongFile("tensor '" + name + "' lies outside of the file");
        const char *from = content_ + data_ + size_t(first);
        const size_t bytes = size_t(last) - size_t(first);
        return type == "F32" ? read<float>(from, bytes) : read<double>(from, bytes);
    }

  private:
    const char *content_;
    size_t size_, data_;
    Json header_;

    template <class T>
    static std::vector<double> read(const char *from, size_t bytes) {
        std::vector<double> numbers(bytes / sizeof(T));
        for (size_t k = 0; k < numbers.size(); ++k) {
            T x;
            std::memcpy(&x, from + k * sizeof(T), sizeof(T));
            numbers[k] = double(x);
        }
        return numbers;
    }

    static void check_version(const std::string &version) {
        const long found = std::strtol(version.c_str(), nullptr, 10);
        if (found > newest_version)
            throw WrongFile("the file has format version " + version + ", and this potstill reads up to " +
                            std::to_string(newest_version) + ": update potstill, then build again");
        if (found < 1) throw WrongFile("the file's format version is '" + version + "'");
    }

    // The sum is that of the whole file with zeros in its own place.
    void check_sum(const std::string &text, const std::string &sum) const {
        const std::string key = "\"checksum\":\"";
        const size_t found = text.find(key + sum);
        if (sum.size() != 8 || found == std::string::npos)
            throw WrongFile("the file has no checksum: it is damaged, or was edited");
        const size_t at = 8 + found + key.size();
        Crc32 crc;
        crc.add(content_, at);
        crc.add("00000000", 8);
        crc.add(content_ + at + 8, size_ - at - 8);
        if (crc.hexadecimal() != sum)
            throw WrongFile("the file is damaged, or was edited: its checksum is " + crc.hexadecimal() +
                            ", not " + sum);
    }
};

int32_t choice(const Json &json, const std::string &name, std::initializer_list<const char *> known) {
    const std::string &word = json.as_text(name);
    int32_t k = 0;
    for (const char *candidate : known) {
        if (word == candidate) return k;
        ++k;
    }
    throw WrongFile("'" + name + "' is '" + word + "', which this potstill does not know");
}

potstill_hipnn hyper_parameters(const Json &network, double cutoff) {
    potstill_hipnn h{};
    const std::pair<const char *, int32_t *> integers[] = {
        {"n_species", &h.n_species},
        {"n_features", &h.n_features},
        {"n_sensitivities", &h.n_sensitivities},
        {"l_max", &h.l_max},
        {"n_interaction_layers", &h.n_interaction_layers},
        {"n_atom_layers", &h.n_atom_layers},
        {"n_channels", &h.n_channels},
        {"n_triples", &h.n_triples},
    };
    for (const auto &[name, place] : integers) {
        const int64_t value = network.as_integer(name);
        if (value < 0 || value > 1000000) throw WrongFile(std::string("'") + name + "' is out of range");
        *place = int32_t(value);
    }
    h.cutoff = cutoff;
    h.cusp_reg = network.as_number("cusp_reg");
    h.cutoff_function = choice(network, "cutoff_function", {"cosine_squared", "polynomial"});
    h.invariants = choice(network, "invariants", {"norms", "smooth"});
    const Json &by_rank = network.expect("n_tensor_sensitivities", Json::array);
    for (size_t rank = 0; rank < by_rank.members.size() && rank < 4; ++rank)
        h.n_tensor_sensitivities[rank] = int32_t(by_rank.members[rank].second.value);
    return h;
}

std::unique_ptr<potstill_model> parse(const char *content, size_t size) {
    const Container file(content, size);
    const Json description = JsonReader(file.about().as_text("model")).read();
    auto model = std::make_unique<potstill_model>();
    if (description.as_text("units") != "angstrom, eV") throw WrongFile("the file's units are not angstrom, eV");
    model->is_double = choice(description, "precision", {"float32", "float64"}) == 1;
    model->provenance = file.about().as_text("provenance");
    for (const auto &member : description.expect("species", Json::array).members)
        model->species.push_back(member.second.string);
    choice(description, "network", {"hipnn"});
    model->hipnn = hyper_parameters(description.expect("hipnn", Json::object),
                                    description.at("hipnn").as_number("cutoff"));
    const int64_t n_parameters = potstill_n_parameters(&model->hipnn);
    if (n_parameters < 0) throw WrongFile("the hyper-parameters are out of range");
    model->in_double = file.numbers("parameters");
    model->offsets = file.numbers("offsets");
    const size_t n_species = size_t(model->hipnn.n_species);
    if (model->in_double.size() != size_t(n_parameters) || model->offsets.size() != n_species ||
        model->species.size() != n_species)
        throw WrongFile("the arrays do not have the sizes that the hyper-parameters ask for");
    model->in_single.assign(model->in_double.begin(), model->in_double.end());
    if (const Json &zbl = description.at("zbl"); zbl.kind == Json::object) {
        model->charge = file.numbers("zbl.charge");
        if (model->charge.size() != n_species) throw WrongFile("the ZBL term has charges of other species");
        model->zbl = {model->charge.data(), zbl.as_number("coulomb"), zbl.as_number("inner"),
                      zbl.as_number("cutoff")};
        model->has_zbl = true;
    }
    if (const Json *beads = description.find("repulsion"); beads && beads->kind == Json::object) {
        model->strength = file.numbers("repulsion.strength");
        model->radius = file.numbers("repulsion.radius");
        if (model->strength.size() != n_species * n_species || model->radius.size() != n_species * n_species)
            throw WrongFile("the repulsion is of other species");
        model->repulsion = {model->strength.data(), model->radius.data(), model->hipnn.n_species};
        model->has_repulsion = true;
    }
    if (const Json *bonds = description.find("bonds"); bonds && bonds->kind == Json::object) {
        model->pairs = file.numbers("bonds.pairs");
        model->angles = file.numbers("bonds.angles");
        if (model->pairs.size() != 4 * n_species * n_species || model->angles.size() % 5)
            throw WrongFile("the bonds are of other species");
        model->bonds = {model->pairs.data(), model->angles.data(), int32_t(model->angles.size() / 5),
                        model->hipnn.n_species};
        model->has_bonds = true;
    }
    return model;
}

// Files are small: weights of one student.
bool read_whole(const char *path, std::string &content) {
    std::FILE *file = std::fopen(path, "rb");
    if (!file) return false;
    char part[65536];
    for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) content.append(part, n);
    const bool whole = !std::ferror(file);
    std::fclose(file);
    return whole;
}

}  // namespace
}  // namespace potstill

using namespace potstill;

extern "C" {

potstill_model *potstill_parse_model(const void *content, size_t n_bytes) {
    try {
        return parse(static_cast<const char *>(content), n_bytes).release();
    } catch (const std::bad_alloc &) {
        fail(POTSTILL_OUT_OF_MEMORY, "there is not enough memory for the model");
    } catch (const std::exception &error) {
        fail(POTSTILL_BAD_ARGUMENT, "%s", error.what());
    }
    return nullptr;
}

potstill_model *potstill_open_model(const char *path) {
    std::string content;
    if (!read_whole(path, content)) {
        fail(POTSTILL_BAD_ARGUMENT, "the file cannot be read");
        return nullptr;
    }
    return potstill_parse_model(content.data(), content.size());
}

void potstill_close_model(potstill_model *model) { delete model; }

int32_t potstill_model_n_species(const potstill_model *model) { return model->hipnn.n_species; }
const char *potstill_model_species(const potstill_model *model, int32_t species) {
    return species >= 0 && species < model->hipnn.n_species ? model->species[size_t(species)].c_str() : nullptr;
}
double potstill_model_cutoff(const potstill_model *model) {
    double cutoff = model->hipnn.cutoff;
    if (model->has_zbl && model->zbl.cutoff > cutoff) cutoff = model->zbl.cutoff;
    for (const double radius : model->radius)
        if (radius > cutoff) cutoff = radius;
    for (size_t k = 3 * model->pairs.size() / 4; k < model->pairs.size(); ++k)
        if (model->pairs[k] > cutoff) cutoff = model->pairs[k];
    return cutoff;
}
int32_t potstill_model_n_layers(const potstill_model *model) { return model->hipnn.n_interaction_layers; }
int32_t potstill_model_n_features(const potstill_model *model) { return model->hipnn.n_features; }
int32_t potstill_model_is_double(const potstill_model *model) { return model->is_double; }
const char *potstill_model_provenance(const potstill_model *model) { return model->provenance.c_str(); }

}  // extern "C"
