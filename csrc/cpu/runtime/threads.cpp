#include "threads.h"

#include <omp.h>
#include <pthread.h>

namespace rnnfast {
namespace {

std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

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

}  // namespace rnnfast
