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

template <class T>
constexpr int run_vectors = run_length / lanes_of<T>;
// Sums that registers hold at once, and the runs that they are of.
constexpr int sums_at_once = RNNFAST_VECTOR_BYTES == 64 ? 8 : 4;
template <class T>
constexpr int max_runs = sums_at_once > run_vectors<T> ? sums_at_once / run_vectors<T> : 1;

// sums[i] of vector i of runs r0, r0 + 1, ...: sum_k w[k] * h[starts[k] + place of the unit in its run].
template <class T, int NR>
inline void run_sums(const SparseReservoirStep<T>& s, int64_t r0, const T* h, Vec<T>* sums) {
    constexpr int V = lanes_of<T>, NV = run_vectors<T>;
    const float* w[NR];
    const int32_t* starts[NR];
    Vec<T> sum[NR][NV] = {};
    for (int r = 0; r < NR; ++r) {
        w[r] = s.w + (r0 + r) * s.F * run_length;
        starts[r] = s.starts + (r0 + r) * s.F;
    }
    for (int64_t k = 0; k < s.F; ++k)
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) {
            const T* from = h + starts[r][k];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v)
                sum[r][v] += load_floats<T>(w[r] + k * run_length + v * V) * load(from + v * V);
        }
    for (int r = 0; r < NR; ++r)
        for (int v = 0; v < NV; ++v) sums[r * NV + v] = sum[r][v];
}

template <class T>
using RunSums = void (*)(const SparseReservoirStep<T>&, int64_t, const T*, Vec<T>*);

template <class T, int NR = max_runs<T>>
RunSums<T> run_sums_of(int runs) {
    if constexpr (NR > 1)
        if (runs < NR) return run_sums_of<T, NR - 1>(runs);
    return run_sums<T, NR>;
}

// Runs r0 to r0 + count; of those at the ends of what is asked for only the vectors that are.
template <class T>
void step_runs(const SparseReservoirStep<T>& s, int64_t r0, int count) {
    constexpr int V = lanes_of<T>, NV = run_vectors<T>;
    const int64_t first = r0 * NV, size = s.H + run_length;
    for (int64_t r = 0; r < s.rows; ++r) {
        Vec<T> sums[max_runs<T> * NV];
        run_sums_of<T>(count)(s, r0, s.ring_prev[r], sums);
        for (int64_t v = first > s.vector0 ? first : s.vector0; v < first + count * NV && v < s.vector1; ++v) {
            const int64_t j = v * V;
            const int n = int(s.H - j < V ? s.H - j : V);
            const Vec<T> h = leaky_units<T>(s.leaky, r, j, n, sums[v - first]);
            for (int64_t to = j; to < size; to += s.H) store(s.ring[r] + to, h, int(size - to < n ? size - to : n));
        }
    }
}

template <class T>
void sparse_reservoir_step(const SparseReservoirStep<T>& s) {
    const int64_t end = (s.vector1 + run_vectors<T> - 1) / run_vectors<T>;
    for (int64_t r0 = s.vector0 / run_vectors<T>; r0 < end; r0 += max_runs<T>)
        step_runs(s, r0, int(end - r0 < max_runs<T> ? end - r0 : max_runs<T>));
}

// sums[v] = sum_k w[k * run_length] * h[starts[k]][v], rows of h `stride` apart
template <class T, int NV>
inline void sums_across(int64_t F, const float* w, const int32_t* starts, const T* h, int64_t stride, T* sums) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[NV] = {};
    for (int64_t k = 0; k < F; ++k) {
        const T* row = h + starts[k] * stride;
        const Vec<T> weight = splat(T(w[k * run_length]));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += weight * load(row + v * V);
    }
    for (int v = 0; v < NV; ++v) store(sums + v * V, sum[v]);
}

template <class T>
using SumsAcross = void (*)(int64_t, const float*, const int32_t*, const T*, int64_t, T*);

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
        const float* w = s.w + j / run_length * s.F * run_length + j % run_length;
        for (int64_t row0 = 0; row0 < s.rows; row0 += most) {
            const int64_t row1 = s.rows < row0 + most ? s.rows : row0 + most;
            T block[V][most];  // (units, rows), sums and then states
            for (int i = 0; i < n; ++i)
                sums_across_of<T>[(row1 - row0 - 1) / V](s.F, w + i, starts, h + i* s.stride + row0, s.stride,
                                                         block[i]);
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
