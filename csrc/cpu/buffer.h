// Uninitialised working memory, aligned to cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rnnfast {

constexpr std::size_t huge_page = std::size_t(1) << 21;

// Asks for huge pages for memory that is about to be written first. Clearing it page by page cost up to a fifth of a
// large forward pass. Only a hint: whatever the kernel answers, the memory works.
inline void prefer_huge_pages(void* start, std::size_t bytes) {
#ifdef __linux__
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t begin = (at + huge_page - 1) / huge_page * huge_page,
                         end = (at + bytes) / huge_page * huge_page;
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t size) {
        if (size <= 0) return;
        const std::size_t bytes = std::size_t(size) * sizeof(T);
        const std::size_t alignment = bytes < 2 * huge_page ? 64 : huge_page;
        data_ = static_cast<T*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
        if (!data_) throw std::bad_alloc();
        if (alignment == huge_page) prefer_huge_pages(data_, bytes);
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Buffer() { std::free(data_); }

    T* get() const { return data_; }
    T& operator[](int64_t at) const { return data_[at]; }
    explicit operator bool() const { return data_ != nullptr; }

private:
    T* data_ = nullptr;
};

}  // namespace rnnfast
