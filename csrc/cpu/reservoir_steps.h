// One step of a reservoir, with the recurrent product taken in three ways. Each of them sums up over the connections of
// a unit in the same order for any number of rows, so that neither batches nor threads change a result.
#pragma once

#include "activations.h"
#include "tile.h"

#if RNNFAST_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace rnnfast {
namespace {

template <class T>
inline Vec<T> activate(Unit unit, Vec<T> z) {
    return unit == Unit::tanh ? tanh<T>(z) : unit == Unit::relu ? relu<T>(z) : z;
}

// h of n units from j on in row r; `sum` is their recurrent product.
template <class T>
inline Vec<T> leaky_units(const LeakyRows<T>& s, int64_t r, int64_t j, int n, Vec<T> sum) {
    const T a = s.leak[r];
    const Vec<T> z = load(s.h[r] + j, n) + s.scale[r] * sum;
    Vec<T> h = (T(1) - a) * load(s.h_prev[r] + j, n) + a * activate<T>(s.unit, z);
    if (s.noise) h += load(s.noise[r] + j, n);
    store(s.h[r] + j, h, n);
    return h;
}

template <class T>
void dense_reservoir_step(const DenseReservoirStep<T>& s) {
    constexpr int V = lanes_of<T>;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for (int v = 0; v < panel.vectors; ++v) {
            const int64_t j = panel.column + v * int64_t(V);
            const int n = panel.lanes(s.product.columns, v);
            for (int64_t r = row0; r < row1; ++r) leaky_units<T>(s.leaky, r, j, n, load(s.product.c[r] + j, n));
        }
    });
}

// h[from[lane]] for each lane
template <class T>
inline Vec<T> gather(const T* h, const int32_t* from) {
    Vec<T> v;
    for (int lane = 0; lane < lanes_of<T>; ++lane) v[lane] = h[from[lane]];
    return v;
}

#if RNNFAST_VECTOR_BYTES == 64
template <>
inline Vec<double> gather(const double* h, const int32_t* from) {
    return (Vec<double>)_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), h, 8);
}
template <>
inline Vec<float> gather(const float* h, const int32_t* from) {
    return (Vec<float>)_mm512_i32gather_ps(_mm512_loadu_si512(from), h, 4);
}
#endif

template <class T>
void sparse_reservoir_step(const SparseReservoirStep<T>& s) {
    constexpr int V = lanes_of<T>;
    for (int64_t v = s.vector0; v < s.vector1; ++v) {
        const int64_t j = v * V;
        const int n = int(s.H - j < V ? s.H - j : V);
        for (int64_t r = 0; r < s.rows; ++r) {
            const T* w = s.w + j * s.F;
            const int32_t* from = s.from + j * s.F;
            const T* h = s.leaky.h_prev[r];
            Vec<T> sum = {};
            for (int64_t k = 0; k < s.F; ++k) sum += load(w + k * V) * gather<T>(h, from + k * V);
            leaky_units<T>(s.leaky, r, j, n, sum);
        }
    }
}

// sums[v] = sum_k w[k] * h[from[k]][v]
template <class T, int NV>
inline void add_across(int64_t F, const T* w, const int32_t* from, const T* h, int64_t stride, T* sums) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[NV] = {};
    for (int64_t k = 0; k < F; ++k) {
        const T* row = h + from[k] * stride;
        const Vec<T> weight = splat(w[k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += weight * load(row + v * V);
    }
    for (int v = 0; v < NV; ++v) store(sums + v * V, sum[v]);
}

template <class T>
using AddAcross = void (*)(int64_t, const T*, const int32_t*, const T*, int64_t, T*);

template <class T>
constexpr AddAcross<T> add_across_vectors[max_tile_vectors] = {add_across<T, 1>, add_across<T, 2>, add_across<T, 3>,
                                                               add_across<T, 4>};

template <class T>
void wide_reservoir_step(const WideReservoirStep<T>& s) {
    constexpr int V = lanes_of<T>;
    constexpr int64_t most = max_tile_vectors * V;
    for (int64_t v = s.vector0; v < s.vector1; ++v) {
        const int64_t j = v * V;
        const int n = int(s.H - j < V ? s.H - j : V);
        for (int64_t row0 = 0; row0 < s.rows; row0 += most) {
            const int64_t row1 = s.rows < row0 + most ? s.rows : row0 + most;
            T sums[V][most];  // (units, rows)
            for (int i = 0; i < n; ++i)
                add_across_vectors<T>[(row1 - row0 - 1) / V](s.F, s.w + (j + i)* s.F, s.from + (j + i)* s.F,
                                                             s.across_prev + row0, s.stride, sums[i]);
            for (int64_t r = row0; r < row1; ++r) {
                Vec<T> sum = {};
                for (int i = 0; i < n; ++i) sum[i] = sums[i][r - row0];
                const Vec<T> h = leaky_units<T>(s.leaky, r, j, n, sum);
                for (int i = 0; i < n; ++i) s.across[(j + i) * s.stride + r] = h[i];
            }
        }
    }
}

}  // namespace
}  // namespace rnnfast
