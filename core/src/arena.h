// Named pieces of one block of scratch memory.
#pragma once

#include "kernels.h"
#include "simd.h"

#if defined(__SANITIZE_ADDRESS__)
#define POTSTILL_POISON 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define POTSTILL_POISON 1
#endif
#endif
#ifdef POTSTILL_POISON
#include <sanitizer/asan_interface.h>
#endif

namespace potstill::POTSTILL_ISA {

template <class T>
constexpr int padded(int n) {
    return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class U>
struct Span {
    U *data = nullptr;
    size_t size = 0;

    POTSTILL_INLINE operator U *() const { return data; }
    void clear() const {
        for (size_t k = 0; k < size; ++k) data[k] = U{};
    }
};

// Places memory: run once to measure, once to assign. Pieces are a cache line apart; the address
// sanitizer reports who leaves one.
class Carver {
  public:
    explicit Carver(char *start) : start_(start) {}

    template <class U>
    Span<U> take(size_t n) {
        const size_t bytes = n * sizeof(U), whole = (bytes + 127) / 64 * 64;
        char *at = start_ ? start_ + used_ : nullptr;
#ifdef POTSTILL_POISON
        if (at) {
            ASAN_UNPOISON_MEMORY_REGION(at, whole);
            ASAN_POISON_MEMORY_REGION(at + bytes, whole - bytes);
        }
#endif
        used_ += whole;
        return {reinterpret_cast<U *>(at), n};
    }
    bool assigns() const { return start_ != nullptr; }
    size_t used() const { return used_; }

  private:
    char *start_;
    size_t used_ = 0;
};

// What the sizes of all arrays follow from.
template <class T>
struct Sizes {
    static constexpr int L = lanes<T>;
    int n_species, n_features, n_sens, n_layers, n_atom_layers, max_row, ld_features;
    size_t widest;     // of one-hot and dense features
    // Length of the arrays of pairs within the cutoff, per atom of a block: of atoms side by side, each
    // species has as many vectors as the atom with most neighbors of it has pairs.
    ptrdiff_t stride;

    explicit Sizes(const Task &task)
        : n_species(task.model.n_species),
          n_features(task.model.n_features),
          n_sens(task.model.n_sensitivities),
          n_layers(task.model.n_interaction_layers),
          n_atom_layers(task.model.n_atom_layers),
          max_row(0),
          ld_features(padded<T>(n_features)),
          widest(n_species > n_features ? n_species : n_features) {
        for (int64_t i = 0; i < task.pairs.n_local; ++i) {
            const int64_t n = task.pairs.row_ptr[i + 1] - task.pairs.row_ptr[i];
            if (n > max_row) max_row = static_cast<int>(n);
        }
        const ptrdiff_t lanes_wide = ptrdiff_t(n_species < L ? n_species : L) * max_row;
        stride = n_layers > 1 && row() > lanes_wide ? row() : lanes_wide;
    }
    // Room for the pairs of one atom in the list, with a vector behind them.
    int row() const { return padded<T>(max_row) + L; }
    // Of the environments of one atom.
    size_t widest_input() const { return n_layers > 1 ? widest : size_t(n_species); }
};

}  // namespace potstill::POTSTILL_ISA
