// One step of a reservoir, with the recurrent product of a dense matrix or of a sparse one. Both sum up in the same
// order for any number of rows, so that neither batches nor threads change a result.
#pragma once

#include "activations.h"
#include "tile.h"

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

}  // namespace
}  // namespace rnnfast
