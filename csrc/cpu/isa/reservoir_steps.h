// One step of a reservoir, with the recurrent product of a dense matrix or of a sparse one. Both sum up in the same
// order for any number of rows, so that neither batches nor threads change a result.
#pragma once

#include "math.h"
#include "tile.h"

namespace rnnfast {
namespace {

template <class T>
inline Vec<T> activate(Unit unit, Vec<T> z) {
    return unit == Unit::tanh ? tanh(z) : unit == Unit::relu ? relu(z) : z;
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
    Plain<T>::template run<false>(s.product,
                                  [&](int64_t row0, int64_t row1, const Panel& panel, const Piece<T>& piece) {
                                      for (int v = 0; v < panel.vectors; ++v) {
                                          const int64_t j = panel.column + v * int64_t(V);
                                          const int n = panel.lanes(s.product.columns, v);
                                          for (int64_t r = row0; r < row1; ++r)
                                              leaky_units<T>(s.leaky, r, j, n, load(piece.vector(v)[r - row0]));
                                      }
                                  });
}

// sums[v] of unit vectors v0 + v: sum_k w[k] * h[starts[k] + place of the unit in its run].
template <class T, int NV>
inline void run_sums(const SparseReservoirStep<T>& s, int64_t v0, const T* h, Vec<T>* sums) {
    constexpr int V = lanes_of<T>, vectors_in_run = run_length / V;
    const T *w[NV], *source[NV];
    const int32_t* starts[NV];
    Vec<T> sum[NV] = {};
    for (int v = 0; v < NV; ++v) {
        w[v] = s.w + (v0 + v) * s.F * V;
        source[v] = h + (v0 + v) % vectors_in_run * V;
        starts[v] = s.starts + (v0 + v) / vectors_in_run * s.F;
    }
    for (int64_t k = 0; k < s.F; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += load(w[v] + k * V) * load(source[v] + starts[v][k]);
    for (int v = 0; v < NV; ++v) sums[v] = sum[v];
}

template <class T>
using RunSums = void (*)(const SparseReservoirStep<T>&, int64_t, const T*, Vec<T>*);

template <class T>
constexpr RunSums<T> run_sums_of[max_tile_vectors] = {run_sums<T, 1>, run_sums<T, 2>, run_sums<T, 3>, run_sums<T, 4>};

template <class T>
void sparse_reservoir_step(const SparseReservoirStep<T>& s) {
    constexpr int V = lanes_of<T>;
    for (int64_t v0 = s.vector0; v0 < s.vector1; v0 += max_tile_vectors) {
        const int vectors = int(s.vector1 - v0 < max_tile_vectors ? s.vector1 - v0 : max_tile_vectors);
        for (int64_t r = 0; r < s.rows; ++r) {
            Vec<T> sums[max_tile_vectors];
            run_sums_of<T>[vectors - 1](s, v0, s.ring_prev[r], sums);
            for (int v = 0; v < vectors; ++v) {
                const int64_t j = (v0 + v) * V;
                const int n = int(s.H - j < V ? s.H - j : V);
                const Vec<T> h = leaky_units<T>(s.leaky, r, j, n, sums[v]);
                const int64_t size = s.H + run_length;
                for (int64_t to = j; to < size; to += s.H) store(s.ring[r] + to, h, int(size - to < n ? size - to : n));
            }
        }
    }
}

// sums[v] = sum_k w[k * V] * h[starts[k]][v], rows of h `stride` apart
template <class T, int NV>
inline void sums_across(int64_t F, const T* w, const int32_t* starts, const T* h, int64_t stride, T* sums) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[NV] = {};
    for (int64_t k = 0; k < F; ++k) {
        const T* row = h + starts[k] * stride;
        const Vec<T> weight = splat(w[k * V]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += weight * load(row + v * V);
    }
    for (int v = 0; v < NV; ++v) store(sums + v * V, sum[v]);
}

template <class T>
using SumsAcross = void (*)(int64_t, const T*, const int32_t*, const T*, int64_t, T*);

template <class T>
constexpr SumsAcross<T> sums_across_of[max_tile_vectors] = {sums_across<T, 1>, sums_across<T, 2>, sums_across<T, 3>,
                                                            sums_across<T, 4>};

template <class T>
void wide_reservoir_step(const WideReservoirStep<T>& s) {
    constexpr int V = lanes_of<T>;
    constexpr int64_t most = max_tile_vectors * V;
    for (int64_t v = s.vector0; v < s.vector1; ++v) {
        const int64_t j = v * V, size = s.H + run_length;
        const int n = int(s.H - j < V ? s.H - j : V);
        const T* h = s.across_prev + j % run_length * s.stride;
        const int32_t* starts = s.starts + j / run_length * s.F;
        for (int64_t row0 = 0; row0 < s.rows; row0 += most) {
            const int64_t row1 = s.rows < row0 + most ? s.rows : row0 + most;
            T block[V][most];  // (units, rows), sums and then states
            for (int i = 0; i < n; ++i)
                sums_across_of<T>[(row1 - row0 - 1) / V](s.F, s.w + j* s.F + i, starts, h + i* s.stride + row0,
                                                         s.stride, block[i]);
            for (int64_t r = row0; r < row1; ++r) {
                Vec<T> sum = {};
                for (int i = 0; i < n; ++i) sum[i] = block[i][r - row0];
                const Vec<T> next = leaky_units<T>(s.leaky, r, j, n, sum);
                for (int i = 0; i < n; ++i) block[i][r - row0] = next[i];
            }
            for (int i = 0; i < n; ++i)
                for (int64_t to = j + i; to < size; to += s.H)
                    for (int64_t at = row0; at < row1; at += V)
                        store(s.across + to * s.stride + at, load(block[i] + at - row0));
        }
    }
}

}  // namespace
}  // namespace rnnfast
