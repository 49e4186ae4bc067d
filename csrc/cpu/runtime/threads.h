// Threads of one call: a parallel region of torch's OpenMP pool, and barriers light enough for every time step.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace rnnfast {

// Runs body(thread) for every thread in [0, threads) at once and returns true; body may use barriers. Returns false,
// with nothing run, where that many cannot be had: inside another parallel region, in a forked child, whose pool is
// gone, or when the runtime grants fewer. One thread is the calling one and can always be had.
bool run_parallel(int threads, const std::function<void(int thread)>& body);

// Lets some time pass, after `tries` others: at first a few cycles, since the wait is shorter than a sleep; then what
// the system gives to others.
void let_pass(int tries);

template <class Condition>
void wait_until(Condition done) {
    for (int tries = 0; !done(); ++tries) let_pass(tries);
}

// Waits until `count` threads have come.
class Barrier {
public:
    void expect(int count) { count_ = count; }
    void wait();

private:
    int count_ = 1;
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

// [begin, end) number `part` of `parts` nearly equal ones of [0, size).
struct Range {
    int64_t begin, end;
    static Range part(int64_t size, int64_t part, int64_t parts) {
        return {size * part / parts, size * (part + 1) / parts};
    }
};

}  // namespace rnnfast
