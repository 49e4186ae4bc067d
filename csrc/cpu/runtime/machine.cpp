#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "../kernels.h"
#include "buffer.h"

namespace rnnfast {
namespace {

// Shortest of some tries: whatever disturbs one makes it longer.
template <class Body>
double seconds(int tries, const Body& body) {
    double best = 1e9;
    for (int i = 0; i < tries; ++i) {
        const auto start = std::chrono::steady_clock::now();
        body();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::min(best, taken.count());
    }
    return std::max(best, 1e-9);
}

// Of one cycle: additions, each of which waits for the one before, take one each on all CPUs. The summand is not known
// to the compiler, nor a constant that newer CPUs add for nothing.
double cycle_seconds() {
    constexpr int additions = 10000;
    uint64_t sum = 0, summand = 1;
    return seconds(5,
                   [&] {
                       asm volatile("" : "+r"(summand));
                       for (int i = 0; i < additions; ++i) {
                           sum += summand;
                           asm volatile("" : "+r"(sum));
                       }
                   }) /
           additions;
}

double vectors_per_second() {
    constexpr int64_t rounds = 1000;
    int64_t operations = 0;
    const double taken = seconds(5, [&] { operations = kernels<float>().burn(rounds); });
    return double(operations) / (2 * kernels<float>().lanes * taken);
}

// Of one row times a matrix four times as large as the second level: the product as it is when it waits for weights.
double far_bytes_per_second(int64_t l2) {
    constexpr int64_t K = 512;
    const Kernels<float>& kernel = kernels<float>();
    const int64_t numbers = 4 * l2 / int64_t(sizeof(float)), size = numbers / K;
    const Columns columns = Columns::of_matrix(size, kernel.lanes, 1);
    Buffer<float> packed(columns.packed(K)), row(K), sums(size);
    std::fill_n(packed.get(), columns.packed(K), 0.f);
    std::fill_n(row.get(), K, 0.f);
    const float* const a = row.get();
    float* const c = sums.get();
    const double taken =
        seconds(6, [&] { kernel.product({1, K, &a, 1, columns, 0, columns.panels, packed.get(), nullptr, &c}); });
    return double(columns.packed(K)) * sizeof(float) / taken;
}

// Within what a machine can be: clocks stop and neighbours compute.
Rates measure(int64_t l2) {
    const double cycle = cycle_seconds();
    return {std::clamp(vectors_per_second() * cycle, .25, 4.), std::clamp(far_bytes_per_second(l2) * cycle, 2., 64.)};
}

std::atomic<const Machine*> asked{nullptr}, measured{nullptr};

// Of threads that come at once each makes its own, and the first to end is right for all: no lock that a forked child
// could find held.
template <class Make>
const Machine& once(std::atomic<const Machine*>& kept, const Make& make) {
    const Machine* machine = kept.load(std::memory_order_acquire);
    if (machine) return *machine;
    auto mine = std::make_unique<const Machine>(make());
    if (kept.compare_exchange_strong(machine, mine.get(), std::memory_order_acq_rel)) machine = mine.release();
    return *machine;
}

}  // namespace

// The C library comes last: on some AMD CPUs it takes the caches of other cores for this one's.
const Machine& asked_machine() {
    return once(asked, [] {
        return Machine{Caches::agreed({caches_of_sysfs("/sys/devices/system/cpu/cpu0/cache"), caches_of_cpuid(),
                                       caches_of_sysconf()}),
                       {}};
    });
}

const Machine& measured_machine() {
    return once(measured, [] {
        const Caches& caches = asked_machine().caches;
        return Machine{caches, measure(caches.l2)};
    });
}

const Machine* machine_if_measured() { return measured.load(std::memory_order_acquire); }

}  // namespace rnnfast
