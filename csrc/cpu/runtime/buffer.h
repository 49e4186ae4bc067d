// Uninitialised array of numbers.
#pragma once

#include <cstdint>

#include "memory.h"

namespace rnnfast {

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t size) {
        if (size > 0) memory_ = Memory(std::size_t(size) * sizeof(T));
    }
    T* get() const { return static_cast<T*>(memory_.data()); }
    T& operator[](int64_t at) const { return get()[at]; }
    explicit operator bool() const { return memory_.data() != nullptr; }

private:
    Memory memory_;
};

}  // namespace rnnfast
