// What a stream does in a step: products of few rows with weights that were packed long ago, then the cell. Rows have
// whole vectors: what fills them up is computed along and never read by a product.
#pragma once

#include "cell_steps.h"

namespace rnnfast {
namespace {

// Sums that run side by side for each column of a group of so many vectors: with fewer than eight in all each
// multiply-add of a lone row would wait for the one before.
constexpr int chains_of(int group_width) { return group_width <= 2 ? 4 : group_width <= 4 ? 2 : 1; }

// out[r][v] = bias[v] + sum_k a[r][k] * w[k][v], in `chains` sums of each. The order does not depend on MR or NV.
template <class T, int MR, int NV, int chains>
void affine_tile(int64_t K, const T* a, ptrdiff_t a_stride, const T* w, ptrdiff_t w_stride, const T* bias, T* out,
                 ptrdiff_t out_stride) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[chains][MR][NV] = {};
    const auto add = [&](Vec<T>(&to)[MR][NV], int64_t k) {
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
            for (int r = 0; r < MR; ++r) to[r][v] += s[r] * b;
        }
        w += w_stride;
    };
    int64_t k = 0;
#pragma GCC unroll 2
    for (; k + chains <= K; k += chains)
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; ++chain) add(sum[chain], k + chain);
    for (; k < K; ++k) add(sum[0], k);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            Vec<T> total = sum[0][r][v];
            if constexpr (chains == 2) total += sum[1][r][v];
            if constexpr (chains == 4) total = (total + sum[1][r][v]) + (sum[2][r][v] + sum[3][r][v]);
            store(out + r * out_stride + v * V, load(bias + v * V) + total);
        }
}

template <class T>
using AffineTile = void (*)(int64_t, const T*, ptrdiff_t, const T*, ptrdiff_t, const T*, T*, ptrdiff_t);

// One row takes a whole group at once.
template <class T>
constexpr AffineTile<T> affine_tiles_of_one_row[affine_group] = {
    affine_tile<T, 1, 1, chains_of(1)>, affine_tile<T, 1, 2, chains_of(2)>, affine_tile<T, 1, 3, chains_of(3)>,
    affine_tile<T, 1, 4, chains_of(4)>, affine_tile<T, 1, 5, chains_of(5)>, affine_tile<T, 1, 6, chains_of(6)>,
    affine_tile<T, 1, 7, chains_of(7)>, affine_tile<T, 1, 8, chains_of(8)>};

// More rows take some vectors of it, as many as leave room for all sums.
template <class T, int MR>
void affine_rows(const Affine<T>& p, int64_t row, int64_t first, int width) {
    constexpr int V = lanes_of<T>;
    const auto run = [&](auto tiles, int most) {
        for (int v = 0; v < width; v += most) {
            const int vectors = width - v < most ? width - v : most;
            const int64_t column = (first + v) * V;
            tiles[vectors - 1](p.K, p.a + row * p.a_stride, p.a_stride, p.packed + first * V * p.K + v * V, width * V,
                               p.bias + column, p.out + row * p.out_stride + column, p.out_stride);
        }
    };
    static constexpr AffineTile<T> of_four_chains[] = {affine_tile<T, MR, 1, 4>};
    static constexpr AffineTile<T> of_two[] = {affine_tile<T, MR, 1, 2>, affine_tile<T, MR, 2, 2>};
    static constexpr AffineTile<T> of_one[] = {affine_tile<T, MR, 1, 1>, affine_tile<T, MR, 2, 1>,
                                               affine_tile<T, MR, 3, 1>, affine_tile<T, MR, 4, 1>};
    if (chains_of(width) == 4)
        run(of_four_chains, max_tile_vectors / 4);
    else if (chains_of(width) == 2)
        run(of_two, max_tile_vectors / 2);
    else
        run(of_one, max_tile_vectors);
}

template <class T>
constexpr void (*affine_rows_of[])(const Affine<T>&, int64_t, int64_t, int) = {
    affine_rows<T, 1>, affine_rows<T, 2>, affine_rows<T, 3>,
#if RNNFAST_VECTOR_BYTES == 64
    affine_rows<T, 4>, affine_rows<T, 5>, affine_rows<T, 6>,
#endif
};

template <class T>
void affine(const Affine<T>& p) {
    constexpr int V = lanes_of<T>;
    for (int64_t group = p.group0; group < p.group1; ++group) {
        const int64_t first = group * affine_group;
        const int width = int(p.vectors - first < affine_group ? p.vectors - first : affine_group);
        if (p.rows == 1) {
            affine_tiles_of_one_row<T>[width - 1](p.K, p.a, p.a_stride, p.packed + first* V* p.K, width* V,
                                                  p.bias + first* V, p.out + first* V, p.out_stride);
            continue;
        }
        for (int64_t row = 0; row < p.rows; row += max_tile_rows) {
            const int64_t rows = p.rows - row < max_tile_rows ? p.rows - row : max_tile_rows;
            affine_rows_of<T>[rows - 1](p, row, first, width);
        }
    }
}

template <class Cell, class T>
void stream_step(const StreamStep<T>& s) {
    constexpr int V = lanes_of<T>, G = Cell::gates, U = Cell::unit_parameters;
    constexpr Slots input = Cell::input_gates, recurrent = Cell::recurrent_gates;
    for (int64_t r = 0; r < s.rows; ++r) {
        const T* z_x = s.z_x + r * s.z_x_stride + s.vector0 * input.count * V;
        const T* z_h = s.z_h + r * s.z_h_stride + s.vector0 * recurrent.count * V;
        const T* unit = s.unit + s.vector0 * U * V;
        for (int64_t j = s.vector0 * V; j < s.vector1 * V; j += V) {
            Vec<T> z[G] = {}, a[G], p[room_for_unit<Cell>] = {}, c = {};
#pragma GCC unroll 4
            for (int g = 0; g < input.count; ++g) z[input.first + g] = load(z_x + g * V);
#pragma GCC unroll 4
            for (int g = 0; g < recurrent.count; ++g) z[recurrent.first + g] += load(z_h + g * V);
            if constexpr (U > 0)
                for (int u = 0; u < U; ++u) p[u] = load(unit + u * V);
            Cell::activate(z, a);
            if constexpr (Cell::state != State::none) c = load(s.c_prev + r * s.c_stride + j);
            const Vec<T> m = combine<Cell>(a, c, p);
            if constexpr (Cell::state == State::own) store(s.c + r * s.c_stride + j, c);
            store(s.m + r * s.m_stride + j, m);
            z_x += input.count * V, z_h += recurrent.count * V, unit += U * V;
        }
    }
}

}  // namespace
}  // namespace rnnfast
