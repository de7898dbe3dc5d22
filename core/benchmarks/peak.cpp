// The peak rate of fused multiply-adds of one thread, for rooflines: independent chains in all
// registers. Prints GFLOP/s of float and of double.
#include <stdio.h>
#include <time.h>

#include "simd.h"

namespace potstill::POTSTILL_ISA {

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The best of many short runs: what the processor can do while nothing else takes its time.
template <class T>
double measure_gflops(double seconds) {
    constexpr int n_chains = n_registers == 32 ? 24 : 12, n_rounds = 20000;
    const double end = now() + seconds;
    double best = 0.0;
    Vector<T> sum[n_chains];
    for (Vector<T> &v : sum) v = broadcast(T(1));
    const Vector<T> factor = broadcast(T(0.999)), addend = broadcast(T(0.001));
    do {
        const double began = now();
        for (int k = 0; k < n_rounds; ++k) {
#pragma GCC unroll 24
            for (int c = 0; c < n_chains; ++c) sum[c] = sum[c] * factor + addend;
        }
        // The optimizer must believe that the chains matter.
        for (Vector<T> &v : sum) __asm__ volatile("" : "+m"(v));
        const double rate = 2.0 * lanes<T> * n_chains * n_rounds / (now() - began) * 1e-9;
        best = rate > best ? rate : best;
    } while (now() < end);
    return best;
}

}  // namespace potstill::POTSTILL_ISA

int main() {
    using namespace potstill::POTSTILL_ISA;
    printf("%.17g %.17g\n", measure_gflops<float>(1.0), measure_gflops<double>(1.0));
    return 0;
}
