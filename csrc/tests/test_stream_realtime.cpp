// What a real-time thread needs: after opening, no step allocates, locks or calls the system. The memory functions and
// the lock of the C library are replaced by ones that count; then the kernel kills whoever calls it.
#include <dlfcn.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "stream.h"
#include "stream_model.h"

namespace {
std::atomic<long> calls{0};
}

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t size) { return ++calls, __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return ++calls, __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return ++calls, __libc_realloc(old, size); }
void* aligned_alloc(size_t alignment, size_t size) { return ++calls, __libc_memalign(alignment, size); }
void free(void* old) { ++calls, __libc_free(old); }

int pthread_mutex_lock(pthread_mutex_t* mutex) {
    static const auto real = reinterpret_cast<int (*)(pthread_mutex_t*)>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
    return ++calls, real(mutex);
}
}

namespace {

using namespace rnnfast;

constexpr int64_t I = 3, B = 2, H = 50, O = 4, chunk = 70;

struct Run {
    rnnfast_stream* stream;
    std::vector<float> x = std::vector<float>(chunk * B * I, .5f), y = std::vector<float>(chunk * B * O);
    std::vector<float> h = std::vector<float>(2 * B * 20), c = std::vector<float>(2 * B * H);

    // -> is all well?
    bool everything() {
        const unsigned char mask[B] = {1, 0};
        bool well = true;
        for (int i = 0; i < 1000; ++i) {
            well &= rnnfast_step(stream, x.data(), y.data()) == RNNFAST_OK;
            well &= rnnfast_reset(stream, i % 2 ? mask : nullptr) == RNNFAST_OK;
            well &= rnnfast_state(stream, h.data(), c.data()) == RNNFAST_OK;
            well &= rnnfast_set_state(stream, h.data(), c.data()) == RNNFAST_OK;
        }
        return well && rnnfast_steps(stream, chunk, x.data(), y.data()) == RNNFAST_OK;
    }
};

// In a child that may do nothing but read, write and exit. -> its status: 0 if it came to its end.
int status_in_strict_mode(Run& run, bool calls_the_system) {
    const pid_t child = fork();
    if (child == 0) {
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) syscall(SYS_exit, 77);
        if (calls_the_system) getppid();
        syscall(SYS_exit, run.everything() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

}  // namespace

int main() {
    std::mt19937 random(1);
    const std::string bytes =
        write_stream(*draw_stream<float>(random, {&find_cell("lstm"), I, H, 20, 2, true, O, true}, B));
    const long before_opening = calls;
    Run run{rnnfast_open_bytes(bytes.data(), bytes.size(), B, nullptr)};
    const bool counts = calls > before_opening;
    const long before = calls;
    const bool well = run.everything();
    const long during = calls - before;
    if (!counts || !well || during) std::printf("FAILED: %ld calls for memory or locks, all well: %d\n", during, well);

    const int status = status_in_strict_mode(run, false), killed = status_in_strict_mode(run, true);
    const bool no_strict_mode = WIFEXITED(status) && WEXITSTATUS(status) == 77;
    const bool silent = no_strict_mode || (status == 0 && WIFSIGNALED(killed));
    if (no_strict_mode) std::printf("this machine has no strict mode: calls of the system were not looked for\n");
    if (!silent) std::printf("FAILED: a call of the system: status %d, of one that does call %d\n", status, killed);
    rnnfast_close(run.stream);
    return counts && well && !during && silent ? 0 : 1;
}
