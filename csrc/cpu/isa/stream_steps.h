// What a stream does in a step: products of few rows with weights that were packed long ago, then the cell. Rows have
// whole vectors: what fills them up is computed along and never read by a product.
#pragma once

// clang-format off: the cells need the functions of the vectors that they are written for
#include "math.h"
#include "tile.h"
#include "../../cells/list.h"
// clang-format on

namespace rnnfast {
namespace {

// out[r][v] = bias[v] + sum_k a[r][k] * w[k][v]. The order of a sum depends on neither MR nor NV.
template <class T, int MR, int NV>
void affine_tile(int64_t K, const T* a, ptrdiff_t a_stride, const T* w, ptrdiff_t w_stride, const T* bias, T* out,
                 ptrdiff_t out_stride) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[MR][NV] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < K; ++k, w += w_stride) {
        Vec<T> s[MR];
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
            s[r] = splat(a[r * a_stride + k]);
            keep_in_register(s[r]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            Vec<T> b = load(w + v * V);
            if constexpr (MR > 1) keep_in_register(b);
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) sum[r][v] += s[r] * b;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(out + r * out_stride + v * V, load(bias + v * V) + sum[r][v]);
}

template <class T>
using AffineTile = void (*)(int64_t, const T*, ptrdiff_t, const T*, ptrdiff_t, const T*, T*, ptrdiff_t);

template <class T, int MR>
constexpr AffineTile<T> affine_tiles_of_rows[] = {affine_tile<T, MR, 1>, affine_tile<T, MR, 2>, affine_tile<T, MR, 3>,
                                                  affine_tile<T, MR, 4>};

template <class T>
constexpr const AffineTile<T>* affine_tiles[] = {
    affine_tiles_of_rows<T, 1>, affine_tiles_of_rows<T, 2>, affine_tiles_of_rows<T, 3>,
#if RNNFAST_VECTOR_BYTES == 64
    affine_tiles_of_rows<T, 4>, affine_tiles_of_rows<T, 5>, affine_tiles_of_rows<T, 6>,
#endif
};

// One row takes a whole group at once: with fewer sums a multiply-add would wait for the one before.
template <class T>
constexpr AffineTile<T> affine_tiles_of_one_row[affine_group] = {
    affine_tile<T, 1, 1>, affine_tile<T, 1, 2>, affine_tile<T, 1, 3>, affine_tile<T, 1, 4>,
    affine_tile<T, 1, 5>, affine_tile<T, 1, 6>, affine_tile<T, 1, 7>, affine_tile<T, 1, 8>};

template <class T>
void affine(const Affine<T>& p) {
    constexpr int V = lanes_of<T>;
    for (int64_t group = p.group0; group < p.group1; ++group) {
        const int64_t first = group * affine_group;
        const int width = int(p.vectors - first < affine_group ? p.vectors - first : affine_group);
        const ptrdiff_t w_stride = width * V;
        const T* const w = p.packed + first * V * p.K;
        if (p.rows == 1) {
            affine_tiles_of_one_row<T>[width - 1](p.K, p.a, p.a_stride, w, w_stride, p.bias + first* V,
                                                  p.out + first* V, p.out_stride);
            continue;
        }
        for (int v = 0; v < width; v += max_tile_vectors) {
            const int vectors = width - v < max_tile_vectors ? width - v : max_tile_vectors;
            const int64_t column = (first + v) * V;
            for (int64_t row = 0; row < p.rows; row += max_tile_rows) {
                const int64_t rows = p.rows - row < max_tile_rows ? p.rows - row : max_tile_rows;
                affine_tiles<T>[rows - 1][vectors - 1](p.K, p.a + row* p.a_stride, p.a_stride, w + v* V, w_stride,
                                                       p.bias + column, p.out + row* p.out_stride + column,
                                                       p.out_stride);
            }
        }
    }
}

template <class Cell, class T>
void stream_step(const StreamStep<T>& s) {
    constexpr int V = lanes_of<T>, G = Cell::gates;
    for (int64_t r = 0; r < s.rows; ++r) {
        const T* z_x = s.z_x + r * s.z_x_stride + s.vector0 * G * V;
        const T* z_h = s.z_h + r * s.z_h_stride + s.vector0 * G * V;
        for (int64_t j = s.vector0 * V; j < s.vector1 * V; j += V, z_x += G * V, z_h += G * V) {
            Vec<T> z[G], a[G], c = {};
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) z[g] = load(z_x + g * V) + load(z_h + g * V);
            Cell::activate(z, a);
            if constexpr (Cell::has_state) c = load(s.c_prev + r * s.c_stride + j);
            const Vec<T> m = Cell::combine(a, c);
            if constexpr (Cell::has_state) store(s.c + r * s.c_stride + j, c);
            store(s.m + r * s.m_stride + j, m);
        }
    }
}

}  // namespace
}  // namespace rnnfast
