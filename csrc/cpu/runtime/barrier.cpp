#include <sched.h>

#include "threads.h"

namespace rnnfast {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

constexpr int short_tries = 4096;

}  // namespace

void let_pass(int tries) {
    if (tries < short_tries)
        pause_cpu();
    else
        sched_yield();
}

void Barrier::wait() {
    if (count_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
}

}  // namespace rnnfast
