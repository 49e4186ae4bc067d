// Uninitialised working memory, aligned to cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace rnnfast {

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t size) {
        if (size <= 0) return;
        const std::size_t bytes = (std::size_t(size) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
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
