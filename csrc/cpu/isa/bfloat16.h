// Two numbers of 16 bits in the place of one of 32: how float32 numbers are rounded to bfloat16, to nearest, ties to
// even. Infinities and NaN stay what they are.
#pragma once

#include "../kernels.h"
#include "vector.h"

namespace rnnfast {
namespace {

// A number as it lies in memory. Loads give float32, which has all its bits.
struct BFloat16 {
    uint16_t bits;
};

inline Vec<float> load(const BFloat16* p) {
    typedef uint16_t half __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
    half numbers;
    std::memcpy(&numbers, p, sizeof numbers);
    return (Vec<float>)(__builtin_convertvector(numbers, VecBits<float>) << 16);
}

inline Vec<float> load(const BFloat16* p, int n) {
    if (n == lanes_of<float>) return load(p);
    BFloat16 numbers[lanes_of<float>] = {};
    std::memcpy(numbers, p, n * sizeof *p);
    return load(numbers);
}

// Calls body(matrices) with the type that their numbers have.
template <class T, class Body>
RNNFAST_INLINE void with_numbers_of(const Matrices& w, const Body& body) {
    if constexpr (sizeof(T) == sizeof(float))
        if (w.bfloat16) return body(reinterpret_cast<const BFloat16* const*>(w.gates));
    body(reinterpret_cast<const T* const*>(w.gates));
}

using Pairs = VecBits<float>;  // in each lane two bfloat16 numbers, the first in the low half

constexpr uint32_t high_half = 0xffff0000u;

// Of each pair the one or the other number.
inline Vec<float> first_of(Pairs pairs) { return (Vec<float>)(pairs << 16); }
inline Vec<float> second_of(Pairs pairs) { return (Vec<float>)(pairs & high_half); }

#if defined(__AVX512BF16__) && RNNFAST_VECTOR_BYTES == 64

// bfloat16 numbers of a, then of b.
inline __m512i rounded(Vec<float> a, Vec<float> b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

inline Pairs beside(Vec<float> first, Vec<float> second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Pairs)_mm512_permutexvar_epi16(order, rounded(first, second));
}

inline Pairs neighbours(Vec<float> low, Vec<float> high) { return (Pairs)rounded(low, high); }

#else

inline Pairs rounded(Vec<float> x) {
    const Pairs bits = (Pairs)x;
    const Pairs up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x == x ? up : bits | 0x400000u;
}

// (first[j], second[j]) in lane j.
inline Pairs beside(Vec<float> first, Vec<float> second) {
    return (rounded(first) >> 16) | (rounded(second) & high_half);
}

// (x[2j], x[2j+1]) in lane j, where x is `low`, then `high`.
inline Pairs neighbours(Vec<float> low, Vec<float> high) {
    constexpr int V = lanes_of<float>;
    VecBits<float> even, odd;
    for (int j = 0; j < V; ++j) even[j] = 2 * j, odd[j] = 2 * j + 1;
    return beside(__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd));
}

#endif

// What rounding leaves of x, of which `rounded` is the nearest bfloat16 number: nothing of an infinity.
inline Vec<float> rest(Vec<float> x, Vec<float> rounded) {
    const Vec<float> rest = x - rounded;
    return rest == rest ? rest : Vec<float>{};
}

}  // namespace
}  // namespace rnnfast
