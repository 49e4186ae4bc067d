// Uninitialised working memory. Large blocks are kept for the next call: the system clears the pages that it hands out,
// which took up to a fifth of a pass.
#pragma once

#include <cstddef>
#include <utility>

namespace rnnfast {

class Memory {
public:
    // From this size on blocks are kept. Smaller ones are the heap's.
    static constexpr std::size_t large = std::size_t(1) << 18;

    Memory() = default;
    // Aligned to cache lines. Throws std::bad_alloc. May be freed by any thread.
    explicit Memory(std::size_t bytes);
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Memory();

    void* data() const { return data_; }

private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;  // as many as there are, at least those asked for
};

}  // namespace rnnfast
