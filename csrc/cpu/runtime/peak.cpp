// The machine's rate of multiply-adds, as the line that benchmarks are held against.
#include <algorithm>
#include <chrono>

#include "../../rnnfast.h"
#include "../kernels.h"
#include "threads.h"

namespace rnnfast {

template <class T>
double fma_peak_gflops(int threads, Precision precision) {
    constexpr int64_t rounds = 200000;
    constexpr int tries = 7, many_units = 1024;
    double best = 0;
    for (int i = 0; i < tries; ++i) {
        std::atomic<int64_t> operations{0};
        const auto start = std::chrono::steady_clock::now();
        const auto body = [&](int) { operations += kernels_for<T>(many_units, precision).burn(rounds); };
        if (!run_parallel(threads, body)) body(0);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, double(operations) / seconds.count() * 1e-9);
    }
    return best;
}

template double fma_peak_gflops<float>(int, Precision);
template double fma_peak_gflops<double>(int, Precision);

}  // namespace rnnfast
