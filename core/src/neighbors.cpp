// Neighbor lists straight into rows of 32 bits per pair: counted first, then written, so that
// nothing larger than the list itself ever exists.
//
// Atoms are wrapped into the cell and sorted into bins that are half as wide as the cutoff. The
// neighbors of an atom are in the bins around its own, in so many images of the cell as it takes; a
// row of bins along the third axis is one run of sorted atoms, wherever it crosses no boundary.
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "kernels.h"

using potstill::fail;

namespace {

constexpr double bins_per_cutoff = 2.0;
constexpr int64_t bins_per_atom = 2;  // at most: nearly empty boxes must not fill the memory
constexpr double farthest = 1e6;      // cells from the first, and bins that the cutoff spans

struct Atom {
    double x[3];
    int32_t index;  // within its system
};

// Whole lattice vectors by which atoms have left the cell.
struct Wraps {
    int32_t w[3];
};

struct Range {
    int32_t low[3] = {INT32_MAX, INT32_MAX, INT32_MAX}, high[3] = {INT32_MIN, INT32_MIN, INT32_MIN};

    void add(const int32_t *s) {
        for (int d = 0; d < 3; ++d) {
            low[d] = s[d] < low[d] ? s[d] : low[d];
            high[d] = s[d] > high[d] ? s[d] : high[d];
        }
    }
    void add(const Range &other) {
        if (other.low[0] > other.high[0]) return;
        add(other.low), add(other.high);
    }
};

void cross(const double *a, const double *b, double *out) {
    for (int d = 0; d < 3; ++d)
        out[d] = a[(d + 1) % 3] * b[(d + 2) % 3] - a[(d + 2) % 3] * b[(d + 1) % 3];
}

double dot(const double *a, const double *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// The atoms of one system, wrapped and sorted into bins.
class Grid {
  public:
    Grid(const potstill_systems &all, int64_t system)
        : cell_(all.cells + 9 * system),
          periodic_(all.periodic + 3 * system),
          cutoff_(all.cutoff),
          n_(all.first_atom[system + 1] - all.first_atom[system]) {
        invert();
        const double *positions = all.positions + 3 * all.first_atom[system];
        std::vector<double> fractions(size_t(3 * n_));
        wraps_.resize(size_t(n_));
        possible_ = wrap(positions, fractions.data()) && choose_bins(positions);
        if (possible_) sort(positions, fractions.data());
    }

    // Whether all numbers of cells and bins fit their types.
    bool is_possible() const { return possible_; }
    int64_t n_atoms() const { return n_; }
    int32_t index(int64_t slot) const { return atoms_[size_t(slot)].index; }

    // Calls found(neighbor's slot, image's cell shift) for every neighbor of the atom in a slot.
    // `hits` has room for one number more than there are atoms.
    template <class F>
    void visit(int64_t slot, int32_t *hits, F &&found) const {
        const Atom &own = atoms_[size_t(slot)];
        int own_bin[3];
        int64_t bin = bin_of_[size_t(slot)];
        for (int d = 2; d >= 0; --d) own_bin[d] = int(bin % n_bins_[d]), bin /= n_bins_[d];
        int32_t m[3];
        int at[3];
        for (int a = -reach_[0]; a <= reach_[0]; ++a) {
            if (!locate(0, own_bin[0] + a, at, m)) continue;
            for (int b = -reach_[1]; b <= reach_[1]; ++b) {
                if (!locate(1, own_bin[1] + b, at, m)) continue;
                const int last = own_bin[2] + reach_[2];
                for (int c = own_bin[2] - reach_[2]; c <= last;) {
                    if (!locate(2, c, at, m)) {
                        ++c;
                        continue;
                    }
                    const int length = last - c < n_bins_[2] - 1 - at[2] ? last - c : n_bins_[2] - 1 - at[2];
                    const int64_t first = (int64_t(at[0]) * n_bins_[1] + at[1]) * n_bins_[2] + at[2];
                    run(own, slot, m, starts_[size_t(first)], starts_[size_t(first + length + 1)], hits, found);
                    c += length + 1;
                }
            }
        }
    }

    // The cell shift of a pair of slots whose wrapped positions are `m` cells apart.
    void shift(int64_t own, int64_t other, const int32_t *m, int32_t *s) const {
        const int32_t *mine = wraps_[size_t(index(own))].w, *its = wraps_[size_t(index(other))].w;
        for (int d = 0; d < 3; ++d) s[d] = m[d] + mine[d] - its[d];
    }

  private:
    const double *cell_;
    const uint8_t *periodic_;
    const double cutoff_;
    const int64_t n_;
    double inverse_[9];  // columns give fractional coordinates
    double height_[3];   // distance of opposite faces
    double low_[3] = {0.0, 0.0, 0.0}, high_[3] = {1.0, 1.0, 1.0};  // of fractional coordinates
    int n_bins_[3], reach_[3];
    bool possible_;
    std::vector<Wraps> wraps_;
    std::vector<Atom> atoms_;
    std::vector<int32_t> bin_of_, starts_;

    void invert() {
        for (int d = 0; d < 3; ++d) {
            double normal[3];
            cross(cell_ + 3 * ((d + 1) % 3), cell_ + 3 * ((d + 2) % 3), normal);
            const double volume = dot(cell_ + 3 * d, normal);
            for (int k = 0; k < 3; ++k) inverse_[3 * d + k] = normal[k] / volume;
            height_[d] = std::fabs(volume) / std::sqrt(dot(normal, normal));
        }
    }

    bool wrap(const double *positions, double *fractions) {
        for (int64_t i = 0; i < n_; ++i)
            for (int d = 0; d < 3; ++d) {
                double f = dot(positions + 3 * i, inverse_ + 3 * d);
                if (!(std::fabs(f) < farthest)) return false;
                int32_t w = 0;
                if (periodic_[d]) {
                    const double whole = std::floor(f);
                    f -= whole, w = int32_t(whole);
                } else {
                    low_[d] = i == 0 || f < low_[d] ? f : low_[d];
                    high_[d] = i == 0 || f > high_[d] ? f : high_[d];
                }
                fractions[3 * i + d] = f;
                wraps_[size_t(i)].w[d] = w;
            }
        return true;
    }

    bool choose_bins(const double *positions) {
        double largest = 0.0;
        for (int64_t k = 0; k < 3 * n_; ++k)
            largest = std::fabs(positions[k]) > largest ? std::fabs(positions[k]) : largest;
        // Rounding may put an atom into the bin beside its own: bins are wider by more than that.
        const double reach = cutoff_ + 1e-9 * (cutoff_ + largest);
        double count[3], total = 1.0;
        for (int d = 0; d < 3; ++d) {
            count[d] = std::floor((high_[d] - low_[d]) * height_[d] * bins_per_cutoff / reach);
            count[d] = count[d] < 1.0 ? 1.0 : count[d];
            total *= count[d];
        }
        const double limit = double(bins_per_atom * n_ + 64);
        while (total > limit) {
            int widest = count[1] > count[0] ? 1 : 0;
            if (count[2] > count[widest]) widest = 2;
            total /= count[widest];
            count[widest] = std::floor(0.5 * count[widest]);
            total *= count[widest];
        }
        for (int d = 0; d < 3; ++d) {
            n_bins_[d] = int(count[d]);
            const double width = (high_[d] - low_[d]) * height_[d] / count[d];
            // An open direction ends with its last bin, and may have no width at all.
            double bins = std::ceil(reach / width);
            if (!periodic_[d] && !(bins < count[d])) bins = count[d] - 1.0;
            if (!(bins < farthest)) return false;
            reach_[d] = int(bins);
        }
        return true;
    }

    void sort(const double *positions, const double *fractions) {
        std::vector<int32_t> bins(static_cast<size_t>(n_));
        starts_.assign(size_t(n_bins_[0]) * size_t(n_bins_[1]) * size_t(n_bins_[2]) + 1, 0);
        for (int64_t i = 0; i < n_; ++i) {
            int64_t bin = 0;
            for (int d = 0; d < 3; ++d) {
                const double span = high_[d] - low_[d];
                const double place = span > 0.0 ? (fractions[3 * i + d] - low_[d]) / span : 0.0;
                const int k = int(place * n_bins_[d]);
                bin = bin * n_bins_[d] + (k < n_bins_[d] ? k : n_bins_[d] - 1);
            }
            bins[size_t(i)] = int32_t(bin);
            ++starts_[size_t(bin) + 1];
        }
        for (size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
        std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
        atoms_.resize(size_t(n_)), bin_of_.resize(size_t(n_));
        for (int64_t i = 0; i < n_; ++i) {
            const size_t slot = size_t(next[size_t(bins[size_t(i)])]++);
            bin_of_[slot] = bins[size_t(i)];
            Atom &atom = atoms_[slot];
            atom.index = int32_t(i);
            for (int d = 0; d < 3; ++d) {
                atom.x[d] = positions[3 * i + d];
                for (int a = 0; a < 3; ++a) atom.x[d] -= wraps_[size_t(i)].w[a] * cell_[3 * a + d];
            }
        }
    }

    // Which bin along axis d, in which image of the cell; false if there is none.
    bool locate(int d, int bin, int *at, int32_t *m) const {
        const int n = n_bins_[d];
        if (!periodic_[d]) {
            at[d] = bin, m[d] = 0;
            return bin >= 0 && bin < n;
        }
        const int image = bin >= 0 ? bin / n : -((n - 1 - bin) / n);
        at[d] = bin - image * n, m[d] = image;
        return true;
    }

    template <class F>
    void run(const Atom &own, int64_t slot, const int32_t *m, int32_t first, int32_t last, int32_t *hits,
             F &&found) const {
        double origin[3];  // of the image, seen from the atom
        for (int d = 0; d < 3; ++d) {
            origin[d] = -own.x[d];
            for (int a = 0; a < 3; ++a) origin[d] += m[a] * cell_[3 * a + d];
        }
        const double limit = cutoff_ * cutoff_;
        int n = 0;
        for (int32_t k = first; k < last; ++k) {
            double square = 0.0;
            for (int d = 0; d < 3; ++d) {
                const double x = atoms_[size_t(k)].x[d] + origin[d];
                square += x * x;
            }
            hits[n] = k;
            n += square < limit;
        }
        const bool home = m[0] == 0 && m[1] == 0 && m[2] == 0;
        for (int h = 0; h < n; ++h)
            if (!(home && hits[h] == slot)) found(hits[h], m);
    }
};

// Runs work(grid, system, first slot, last slot, hits) over all atoms: threads share the systems, or
// the atoms of a single one. Returns 0 or an error.
template <class F>
int for_slots(const potstill_systems &all, int n_threads, F &&work) {
    int code = 0;
    const int among_systems = all.n_systems > 1 ? n_threads : 1;
    const int among_atoms = all.n_systems > 1 ? 1 : n_threads;
#pragma omp parallel for schedule(dynamic) num_threads(among_systems) if (among_systems > 1)
    for (int64_t s = 0; s < all.n_systems; ++s) {
        try {
            const Grid grid(all, s);
            if (!grid.is_possible()) {
#pragma omp atomic write
                code = POTSTILL_BAD_ARGUMENT;
                continue;
            }
            const int64_t n = grid.n_atoms();
            std::vector<std::vector<int32_t>> hits(size_t(among_atoms), std::vector<int32_t>(size_t(n) + 1));
#pragma omp parallel for num_threads(among_atoms) if (among_atoms > 1)
            for (int part = 0; part < among_atoms; ++part)
                work(grid, s, n * part / among_atoms, n * (part + 1) / among_atoms, hits[size_t(part)].data());
        } catch (const std::bad_alloc &) {
#pragma omp atomic write
            code = POTSTILL_OUT_OF_MEMORY;
        }
    }
    if (code == POTSTILL_OUT_OF_MEMORY)
        return fail(code, "there is not enough memory for the neighbor list");
    if (code)
        return fail(code, "a cell is far smaller than the cutoff, or an atom far outside its cell");
    return 0;
}

int check_systems(const potstill_systems &systems, int n_threads) {
    if (n_threads < 1) return fail(POTSTILL_BAD_ARGUMENT, "n_threads must be at least 1");
    if (!(systems.cutoff > 0.0)) return fail(POTSTILL_BAD_ARGUMENT, "the cutoff must be positive");
    if (systems.first_atom[systems.n_systems] > INT32_MAX)
        return fail(POTSTILL_BAD_ARGUMENT, "there are more atoms than 32 bits can count");
    return 0;
}

int check_images(double n_images) {
    if (n_images > 65536.0)
        return fail(POTSTILL_BAD_ARGUMENT,
                    "cell shifts span %.0f images, and at most 65536 fit: wrap the positions", n_images);
    return 0;
}

}  // namespace

extern "C" {

int potstill_count_pairs(const potstill_systems *systems, int64_t *row_ptr, int32_t *shift_range,
                         int n_threads) {
    const potstill_systems &all = *systems;
    if (const int code = check_systems(all, n_threads)) return code;
    Range total;
    int32_t zero[3] = {0, 0, 0};
    total.add(zero);
    const int code = for_slots(all, n_threads, [&](const Grid &grid, int64_t s, int64_t first,
                                                   int64_t last, int32_t *hits) {
        Range range;
        int64_t *counts = row_ptr + 1 + all.first_atom[s];
        for (int64_t slot = first; slot < last; ++slot) {
            int64_t count = 0;
            grid.visit(slot, hits, [&](int32_t other, const int32_t *m) {
                int32_t shift[3];
                grid.shift(slot, other, m, shift);
                range.add(shift);
                ++count;
            });
            counts[grid.index(slot)] = count;
        }
#pragma omp critical(potstill_range)
        total.add(range);
    });
    if (code) return code;
    row_ptr[0] = 0;
    for (int64_t i = 0; i < all.first_atom[all.n_systems]; ++i) row_ptr[i + 1] += row_ptr[i];
    double n_images = 1.0;
    for (int d = 0; d < 3; ++d) {
        shift_range[d] = total.low[d], shift_range[3 + d] = total.high[d];
        n_images *= double(total.high[d]) - double(total.low[d]) + 1.0;
    }
    return check_images(n_images);
}

int potstill_list_pairs(const potstill_systems *systems, const int64_t *row_ptr,
                        const int32_t *shift_range, int32_t *neighbor, uint16_t *image, int n_threads) {
    const potstill_systems &all = *systems;
    if (const int code = check_systems(all, n_threads)) return code;
    int64_t size[3];
    for (int d = 0; d < 3; ++d) size[d] = int64_t(shift_range[3 + d]) - shift_range[d] + 1;
    return for_slots(all, n_threads, [&](const Grid &grid, int64_t s, int64_t first, int64_t last,
                                         int32_t *hits) {
        const int32_t first_atom = int32_t(all.first_atom[s]);
        for (int64_t slot = first; slot < last; ++slot) {
            int64_t k = row_ptr[first_atom + grid.index(slot)];
            grid.visit(slot, hits, [&](int32_t other, const int32_t *m) {
                neighbor[k] = first_atom + grid.index(other);
                if (image) {
                    int32_t t[3];
                    grid.shift(slot, other, m, t);
                    for (int d = 0; d < 3; ++d) t[d] -= shift_range[d];
                    image[k] = uint16_t((t[0] * size[1] + t[1]) * size[2] + t[2]);
                }
                ++k;
            });
        }
    });
}

int potstill_pack_pairs(int64_t n_pairs, int64_t n_local, const int64_t *center, const int64_t *neighbor,
                        const int64_t *shifts, int64_t *row_ptr, int32_t *neighbor_out,
                        uint16_t *image, int32_t *images) {
    for (int64_t i = 0; i <= n_local; ++i) row_ptr[i] = 0;
    int64_t low[3] = {0, 0, 0}, high[3] = {0, 0, 0};
    for (int64_t k = 0; k < n_pairs; ++k) {
        if (center[k] < 0 || center[k] >= n_local || (k > 0 && center[k] < center[k - 1]))
            return fail(POTSTILL_BAD_ARGUMENT, "the pairs are not sorted by center");
        if (neighbor[k] < 0 || neighbor[k] > INT32_MAX)
            return fail(POTSTILL_BAD_ARGUMENT, "a neighbor's index is outside of 32 bits");
        ++row_ptr[center[k] + 1];
        neighbor_out[k] = int32_t(neighbor[k]);
        for (int d = 0; d < 3; ++d) {
            const int64_t s = shifts[3 * k + d];
            low[d] = s < low[d] ? s : low[d];
            high[d] = s > high[d] ? s : high[d];
        }
    }
    for (int64_t i = 0; i < n_local; ++i) row_ptr[i + 1] += row_ptr[i];
    int64_t size[3];
    double n_images = 1.0;
    for (int d = 0; d < 3; ++d) {
        size[d] = high[d] - low[d] + 1;
        n_images *= double(size[d]);
    }
    if (const int code = check_images(n_images)) return code;
    for (int64_t k = 0; k < n_pairs; ++k) {
        const int64_t *s = shifts + 3 * k;
        image[k] = uint16_t(((s[0] - low[0]) * size[1] + (s[1] - low[1])) * size[2] + (s[2] - low[2]));
    }
    int32_t *row = images;
    for (int64_t a = low[0]; a <= high[0]; ++a)
        for (int64_t b = low[1]; b <= high[1]; ++b)
            for (int64_t c = low[2]; c <= high[2]; ++c) {
                *row++ = int32_t(a);
                *row++ = int32_t(b);
                *row++ = int32_t(c);
            }
    return int(n_images);
}

}  // extern "C"
