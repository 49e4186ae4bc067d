#include "memory.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <new>

namespace rnnfast {
namespace {

constexpr std::size_t huge_page = std::size_t(1) << 21;
constexpr std::size_t page = std::size_t(1) << 12;

// Blocks that nobody uses at the moment, the oldest first.
class Kept {
public:
    // The smallest one that holds `bytes` and wastes at most a quarter of that, or nullptr. `bytes` becomes its size.
    void* take(std::size_t& bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t best = count_;
        for (std::size_t i = 0; i < count_; ++i) {
            const std::size_t size = blocks_[i].bytes;
            if (size >= bytes && size <= bytes + bytes / 4 && (best == count_ || size < blocks_[best].bytes)) best = i;
        }
        if (best == count_) return nullptr;
        bytes = blocks_[best].bytes;
        return remove(best);
    }

    void add(void* data, std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (bytes > most_bytes) return std::free(data);
        while (count_ == most_blocks || bytes_ + bytes > most_bytes) std::free(remove(0));
        blocks_[count_++] = {data, bytes};
        bytes_ += bytes;
    }

    std::mutex mutex;

private:
    static constexpr std::size_t most_blocks = 32, most_bytes = std::size_t(256) << 20;

    void* remove(std::size_t i) {
        void* const data = blocks_[i].data;
        bytes_ -= blocks_[i].bytes;
        for (--count_; i < count_; ++i) blocks_[i] = blocks_[i + 1];
        return data;
    }

    struct Block {
        void* data;
        std::size_t bytes;
    } blocks_[most_blocks];
    std::size_t count_ = 0, bytes_ = 0;
};

// Never destroyed: tensors may be freed later than static objects.
Kept& kept() {
    static Kept* const instance = new Kept;
    return *instance;
}

// The child of a fork must not inherit a mutex that another thread had locked.
const int at_fork =
    pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); }, [] { kept().mutex.unlock(); });

void* allocate(std::size_t alignment, std::size_t bytes) {
    void* const data = std::aligned_alloc(alignment, bytes);
    if (!data) throw std::bad_alloc();
    return data;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Memory::Memory(std::size_t bytes) {
    if (bytes < large) {
        bytes_ = round_up(bytes, 64);
        data_ = allocate(64, bytes_);
        return;
    }
    const bool huge = bytes > huge_page;
    bytes_ = round_up(bytes, huge ? huge_page : page);
    data_ = kept().take(bytes_);
    if (data_) return;
    data_ = allocate(huge ? huge_page : page, bytes_);
#ifdef __linux__
    if (huge) (void)madvise(data_, bytes_, MADV_HUGEPAGE);  // only a hint: whatever the answer, the memory works
#endif
}

Memory::~Memory() {
    if (bytes_ < large)
        std::free(data_);
    else
        kept().add(data_, bytes_);
}

}  // namespace rnnfast
