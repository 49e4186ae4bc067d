// One vector register as a value, by the compiler's vector extension: the same source for every instruction set.
// RNNFAST_VECTOR_BYTES (16, 32, 64) and RNNFAST_ISA come from the build, file by file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace rnnfast {
namespace {  // each instruction set keeps its own copy of everything below

template <class T>
struct VectorTypes;

template <>
struct VectorTypes<float> {
    typedef float value __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
    typedef float anywhere __attribute__((vector_size(RNNFAST_VECTOR_BYTES), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};

template <>
struct VectorTypes<double> {
    typedef double value __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
    typedef double anywhere __attribute__((vector_size(RNNFAST_VECTOR_BYTES), aligned(8), may_alias));
    typedef uint64_t bits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};

template <class T>
using Vec = typename VectorTypes<T>::value;
template <class T>
using VecBits = typename VectorTypes<T>::bits;

template <class T>
constexpr int lanes_of = RNNFAST_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VectorTypes<T>::anywhere*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename VectorTypes<T>::anywhere*>(p) = v;
}

#if RNNFAST_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline Vec<float> load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), p); }
inline Vec<double> load_first(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1 << n) - 1), p); }
inline void store_first(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1 << n) - 1), v); }
inline void store_first(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1 << n) - 1), v); }
#elif RNNFAST_VECTOR_BYTES == 32 && defined(__AVX2__)
inline __m256i first_floats(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_doubles(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_floats(n)); }
inline Vec<double> load_first(const double* p, int n) { return _mm256_maskload_pd(p, first_doubles(n)); }
inline void store_first(float* p, Vec<float> v, int n) {
    __m128 part = _mm256_castps256_ps128(v);
    if (n & 4) {
        _mm_storeu_ps(p, part);
        part = _mm256_extractf128_ps(v, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
        part = _mm_movehl_ps(part, part);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
}
inline void store_first(double* p, Vec<double> v, int n) {
    __m128d part = _mm256_castpd256_pd128(v);
    if (n & 2) {
        _mm_storeu_pd(p, part);
        part = _mm256_extractf128_pd(v, 1);
        p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
}
#else
template <class T>
inline Vec<T> load_first(const T* p, int n) {
    Vec<T> v = {};
    std::memcpy(&v, p, n * sizeof(T));
    return v;
}
template <class T>
inline void store_first(T* p, Vec<T> v, int n) {
    std::memcpy(p, &v, n * sizeof(T));
}
#endif

// A number of lanes that the compiler knows: all of a vector.
template <int lanes>
struct AllLanes {
    inline __attribute__((always_inline)) constexpr operator int() const { return lanes; }
};

// The first n lanes; the rest reads as zero and is not written.
template <class T>
inline Vec<T> load(const T* p, int n) {
    return n == lanes_of<T> ? load(p) : load_first(p, n);
}

template <class T>
inline void store(T* p, Vec<T> v, int n) {
    n == lanes_of<T> ? store(p, v) : store_first(p, v, n);
}

template <class T>
inline Vec<T> splat(T s) {
    return s - Vec<T>{};  // minus: exact for -0, too
}

// The larger and the lesser of x and a bound, by one instruction where there is one, which gives its second operand if
// either is NaN: NaN stays.
#if RNNFAST_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline Vec<float> at_least(Vec<float> x, Vec<float> low) { return _mm512_maskz_max_ps(__mmask16(-1), low, x); }
inline Vec<float> at_most(Vec<float> x, Vec<float> high) { return _mm512_maskz_min_ps(__mmask16(-1), high, x); }
inline Vec<double> at_least(Vec<double> x, Vec<double> low) { return _mm512_maskz_max_pd(__mmask8(-1), low, x); }
inline Vec<double> at_most(Vec<double> x, Vec<double> high) { return _mm512_maskz_min_pd(__mmask8(-1), high, x); }
#elif RNNFAST_VECTOR_BYTES == 32 && defined(__AVX2__)
inline Vec<float> at_least(Vec<float> x, Vec<float> low) { return _mm256_max_ps(low, x); }
inline Vec<float> at_most(Vec<float> x, Vec<float> high) { return _mm256_min_ps(high, x); }
inline Vec<double> at_least(Vec<double> x, Vec<double> low) { return _mm256_max_pd(low, x); }
inline Vec<double> at_most(Vec<double> x, Vec<double> high) { return _mm256_min_pd(high, x); }
#else
template <class V>
inline V at_least(V x, V low) {
    return x < low ? low : x;
}
template <class V>
inline V at_most(V x, V high) {
    return x > high ? high : x;
}
#endif

inline Vec<float> reversed(Vec<float> v) {
    VecBits<float> order;
    for (int j = 0; j < lanes_of<float>; ++j) order[j] = lanes_of<float> - 1 - j;
    return __builtin_shuffle(v, order);
}

// A vector from as many floats. GCC converts a vector of AVX-512 in two halves unless it is told not to.
template <class T>
inline Vec<T> load_floats(const float* p);
template <>
inline Vec<float> load_floats<float>(const float* p) {
    return load(p);
}
template <>
inline Vec<double> load_floats<double>(const float* p) {
#if RNNFAST_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return _mm512_maskz_cvtps_pd(__mmask8(-1), _mm256_loadu_ps(p));  // whose zeros GCC does not warn of
#elif RNNFAST_VECTOR_BYTES == 32 && defined(__AVX2__)
    return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    Vec<double> v;
    for (int j = 0; j < lanes_of<double>; ++j) v[j] = p[j];
    return v;
#endif
}

// The sum of all lanes.
template <class T>
inline T sum(Vec<T> v) {
    T lane[lanes_of<T>];
    store(lane, v);
#pragma GCC unroll 8
    for (int width = lanes_of<T> / 2; width; width /= 2)
        for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    return lane[0];
}

// Rows of a square become its columns. All shuffles are such as take one instruction and no register for their order:
// two rows are zipped within parts of 16 bytes, which makes a square of each part, and then whole parts change places.
template <class T>
inline void transpose(Vec<T> (&rows)[lanes_of<T>]) {
    constexpr int V = lanes_of<T>, P = 16 / sizeof(T), parts = V / P;
    static_assert(parts == 1 || parts == 2 || parts == 4);
    VecBits<T> zip_low, zip_high, left, right, even, odd;  // of the 2V numbers of two rows
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
        const int part = j / P * P, at = j % P;
        zip_low[j] = part + at / 2 + at % 2 * V;
        zip_high[j] = zip_low[j] + P / 2;
        left[j] = j < V / 2 ? j : j + V / 2;
        right[j] = left[j] + V / 2;
        even[j] = 2 * part + at;
        odd[j] = even[j] + P;
    }
    Vec<T> zipped[V];
#pragma GCC unroll 2
    for (int round = 1; round < P; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) {
            const int first = i / P * P + i % P / 2;
            zipped[i] = __builtin_shuffle(rows[first], rows[first + P / 2], i % 2 ? zip_high : zip_low);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) rows[i] = zipped[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
        if constexpr (parts == 2) {
            const Vec<T> a = rows[i], b = rows[i + P];
            rows[i] = __builtin_shuffle(a, b, left);
            rows[i + P] = __builtin_shuffle(a, b, right);
        }
        if constexpr (parts == 4) {
            const Vec<T> a = rows[i], b = rows[i + P], c = rows[i + 2 * P], d = rows[i + 3 * P];
            const Vec<T> ab = __builtin_shuffle(a, b, left), cd = __builtin_shuffle(c, d, left);
            const Vec<T> ab_right = __builtin_shuffle(a, b, right), cd_right = __builtin_shuffle(c, d, right);
            rows[i] = __builtin_shuffle(ab, cd, even);
            rows[i + P] = __builtin_shuffle(ab, cd, odd);
            rows[i + 2 * P] = __builtin_shuffle(ab_right, cd_right, even);
            rows[i + 3 * P] = __builtin_shuffle(ab_right, cd_right, odd);
        }
    }
}

// Holds a loaded value in a register. Without it GCC folds the load into each multiply-add that uses the value, and
// the loop of the tile product then waits for the load ports (a third of the speed on Zen 3).
template <class V>
inline void keep_in_register([[maybe_unused]] V& v) {
#ifdef __AVX512F__
    asm("" : "+v"(v));
#elif defined(__x86_64__) && RNNFAST_VECTOR_BYTES <= 32
    asm("" : "+x"(v));
#endif
}

}  // namespace
}  // namespace rnnfast
