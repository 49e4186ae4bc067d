// The numbers that a cell is written for. A cell's functions take any V with +, -, * and sigmoid, tanh, if_positive: a
// CPU vector, a GPU scalar, or one of the two below, which carry a derivative along. The includer declares the
// functions of its own V before this file. Everything is private to its translation unit: see cpu/isa.
#pragma once

#include "traits.h"

#if defined(__CUDACC__)
#define RNNFAST_CELL __host__ __device__ inline
#else
#define RNNFAST_CELL inline __attribute__((always_inline))
#endif

namespace rnnfast {
namespace {

// 1, for every V.
struct One {};
constexpr One one;
template <class V>
RNNFAST_CELL V operator-(One, const V& b) {
    return 1 - b;
}

// A value and its derivative along a direction.
template <class V>
struct Dual {
    V value, dot;
};

template <class V>
RNNFAST_CELL Dual<V> operator+(const Dual<V>& a, const Dual<V>& b) {
    return {a.value + b.value, a.dot + b.dot};
}
template <class V>
RNNFAST_CELL Dual<V> operator-(const Dual<V>& a, const Dual<V>& b) {
    return {a.value - b.value, a.dot - b.dot};
}
template <class V>
RNNFAST_CELL Dual<V> operator*(const Dual<V>& a, const Dual<V>& b) {
    return {a.value * b.value, a.dot * b.value + a.value * b.dot};
}
template <class V>
RNNFAST_CELL Dual<V> operator*(const V& a, const Dual<V>& b) {
    return {a * b.value, a * b.dot};
}
template <class V>
RNNFAST_CELL Dual<V> operator-(One, const Dual<V>& b) {
    return {one - b.value, -b.dot};
}
template <class V>
RNNFAST_CELL Dual<V> tanh(const Dual<V>& x) {
    const V t = tanh(x.value);
    return {t, (one - t * t) * x.dot};
}
// v where h > 0, else 0; straight in v, which is a constant in the first.
template <class V>
RNNFAST_CELL Dual<V> if_positive(const Dual<V>& h, const V& v) {
    return {if_positive(h.value, v), V{}};
}
template <class V>
RNNFAST_CELL Dual<V> if_positive(const Dual<V>& h, const Dual<V>& v) {
    return {if_positive(h.value, v.value), if_positive(h.value, v.dot)};
}

// The tangent of a pre-activation whose activation was saved: a nonlinearity gives both, and costs no exponential.
template <class V>
struct Known {
    V activated, dot;

    RNNFAST_CELL operator Dual<V>() const { return {activated, dot}; }  // where a gate is the pre-activation itself
};

// What a gate adds to a pre-activation on its way into the nonlinearity.
template <class V>
RNNFAST_CELL Known<V> operator+(const Known<V>& z, const Dual<V>& a) {
    return {z.activated, z.dot + a.dot};
}

template <class V>
RNNFAST_CELL Dual<V> sigmoid(const Known<V>& z) {
    return {z.activated, z.activated * (one - z.activated) * z.dot};
}
template <class V>
RNNFAST_CELL Dual<V> tanh(const Known<V>& z) {
    return {z.activated, z.dot * (one - z.activated * z.activated)};
}
template <class V>
RNNFAST_CELL Dual<V> relu(const Known<V>& z) {
    return {z.activated, if_positive(z.activated, z.dot)};
}

}  // namespace
}  // namespace rnnfast
