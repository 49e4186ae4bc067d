#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

namespace rnnfast {
namespace {

std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

bool run_parallel(int threads, const std::function<void(int)>& body) {
    if (threads == 1) {
        body(0);
        return true;
    }
    if (omp_in_parallel() || forked.load(std::memory_order_relaxed)) return false;
    bool granted = true;
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_num_threads() == threads)
            body(omp_get_thread_num());
        else if (omp_get_thread_num() == 0)
            granted = false;
    }
    return granted;
}

void Barrier::wait() {
    if (count_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins < 4096)
            pause_cpu();
        else
            sched_yield();
    }
}

}  // namespace rnnfast
