// Numbers as they are stored and as operands of the tensor cores in shared memory.
#pragma once

#include "device.h"

namespace rnnfast::cuda {

// The type of stored numbers, and of operands in shared memory.
template <Number number>
struct NumberOf {
    using type = float;
    using Operand = uint32_t;
};
template <>
struct NumberOf<Number::float64> {
    using type = double;
};
template <>
struct NumberOf<Number::float16> {
    using type = Float16;
    using Operand = uint16_t;
};
template <>
struct NumberOf<Number::bfloat16> {
    using type = BFloat16;
    using Operand = uint16_t;
};
__device__ inline uint32_t to_operand(float x) { return tf32_bits(x); }
__device__ inline uint16_t to_operand(Float16 x) { return bits(x); }
__device__ inline uint16_t to_operand(BFloat16 x) { return bits(x); }
// 16 bytes of stored numbers as operands.
__device__ inline Vector to_operands(const Vector& v, float) {
    Vector operands;
#pragma unroll
    for (int i = 0; i < 4; ++i) operands.x[i] = tf32_bits(float_of(v.x[i]));
    return operands;
}
template <class S>
__device__ inline Vector to_operands(const Vector& v, S) {
    return v;
}

// 16 bytes of stored numbers.
__device__ inline Vector packed(const float (&some)[4]) {
    return {{bits_of(some[0]), bits_of(some[1]), bits_of(some[2]), bits_of(some[3])}};
}
template <class S>
__device__ inline Vector packed(const S (&some)[8]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.x[i] = bits(some[2 * i]) | static_cast<uint32_t>(bits(some[2 * i + 1])) << 16;
    return v;
}

}  // namespace rnnfast::cuda
