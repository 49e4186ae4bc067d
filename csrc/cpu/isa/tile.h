// Products of numbers as they are: MR rows times NV vectors of columns held in registers while k runs.
#pragma once

#include <type_traits>

#include "bfloat16.h"
#include "panel.h"

namespace rnnfast {
namespace {

// Accumulators + broadcasts + one load fit the register file: 24 + 6 + 1 of 32 with AVX-512, 12 + 3 + 1 of 16 else.
constexpr int max_tile_rows = RNNFAST_VECTOR_BYTES == 64 ? 6 : 3;
// Panels of three gates leave room for as many accumulators in four rows, where the vectors are held in place of the
// rows' numbers: 12 + 3 + 1 of 16.
constexpr int tall_tile_rows = RNNFAST_VECTOR_BYTES == 64 ? max_tile_rows : 4;
// Rows of a panel that one pass of k takes. The slice stays in the first-level cache while all row tiles use it; with
// AVX-512, whose 6 rows ask for half as many bytes a cycle, the second level is near enough and fewer passes count
// more.
template <class T>
constexpr int64_t k_block = 16384 / (max_tile_vectors * RNNFAST_VECTOR_BYTES) * (RNNFAST_VECTOR_BYTES == 64 ? 8 : 1);

// c[r][v] = init[r][v] + sum_k a[r][k * a_stride] * panel[k][v]; neighbouring vectors of c and init lie c_stride apart.
// The order of the sum does not depend on MR or NV, so neither do the results.
template <class T, int MR, int NV>
void tile(int64_t K, Rows<const T*> a, ptrdiff_t a_stride, const T* panel, Rows<const T*> init, Rows<T*> c,
          ptrdiff_t c_stride) {
    constexpr int V = lanes_of<T>;
    Vec<T> sum[MR][NV] = {};
    const T* row[MR];
    for (int r = 0; r < MR; ++r) row[r] = K ? a[r] : nullptr;
    ptrdiff_t at = 0;
#pragma GCC unroll 2
    for (int64_t k = 0; k < K; ++k) {
        if constexpr (MR <= max_tile_rows) {
            Vec<T> s[MR];
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                s[r] = splat(row[r][at]);
                keep_in_register(s[r]);
            }
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                Vec<T> b = load(panel + v * V);
                keep_in_register(b);
#pragma GCC unroll 6
                for (int r = 0; r < MR; ++r) sum[r][v] += s[r] * b;
            }
        } else {
            Vec<T> b[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                b[v] = load(panel + v * V);
                keep_in_register(b[v]);
            }
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                Vec<T> s = splat(row[r][at]);
                keep_in_register(s);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) sum[r][v] += s * b[v];
            }
        }
        panel += NV * V;
        at += a_stride;
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
        T* const to = c[r];
        const T* const from = init ? init[r] : nullptr;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            store(to + v * c_stride, (from ? load(from + v * c_stride) : Vec<T>{}) + sum[r][v]);
    }
}

template <class T>
using Tile = void (*)(int64_t, Rows<const T*>, ptrdiff_t, const T*, Rows<const T*>, Rows<T*>, ptrdiff_t);

template <class T, int MR>
constexpr Tile<T> tiles_of_rows[max_tile_vectors] = {tile<T, MR, 1>, tile<T, MR, 2>, tile<T, MR, 3>, tile<T, MR, 4>};

template <class T>
constexpr Tile<T> tall_tiles[max_tile_vectors] = {nullptr, nullptr, tile<T, tall_tile_rows, 3>, nullptr};

template <class T>
constexpr const Tile<T>* tiles[] = {
    tiles_of_rows<T, 1>, tiles_of_rows<T, 2>, tiles_of_rows<T, 3>,
#if RNNFAST_VECTOR_BYTES == 64
    tiles_of_rows<T, 4>, tiles_of_rows<T, 5>, tiles_of_rows<T, 6>,
#else
    tall_tiles<T>,
#endif
};

// Columns [j, j + count) of one gate in rows [r0, r0 + MR) of a direct product. The order of a sum does not depend on
// MR. W: of the numbers of w.
template <class T, class W, int MR>
void direct_tile(const DirectProduct<T>& p, int64_t r0, int gate, int64_t j, int count) {
    constexpr int V = lanes_of<T>, most = max_tile_vectors;
    Vec<T> partial[MR][most] = {};
    for (int i = 0; i < 2; ++i) {
        const int64_t K = p.K[i];
        if (!K || !p.w[i].gates[gate]) continue;
        const T* a[MR];
        const W* w[most];
        for (int r = 0; r < MR; ++r) a[r] = p.a[i][r0 + r];
        // A ragged end computes its last column again in place of those that are not there.
        for (int v = 0; v < most; ++v)
            w[v] = static_cast<const W*>(p.w[i].gates[gate]) + (j + (v < count ? v : count - 1)) * K;
        const auto add = [&](int64_t k, auto lanes) {
            Vec<T> s[MR];
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) s[r] = load(a[r] + k, lanes);
#pragma GCC unroll 4
            for (int v = 0; v < most; ++v) {
                Vec<T> b = load(w[v] + k, lanes);
                keep_in_register(b);
#pragma GCC unroll 6
                for (int r = 0; r < MR; ++r) partial[r][v] += s[r] * b;
            }
        };
        int64_t k = 0;
        for (; k + V <= K; k += V) add(k, AllLanes<V>());
        if (k < K) add(k, int(K - k));
    }
    const int64_t at = gate * p.columns.size + j;
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < count; ++v)
            p.c[r0 + r][at + v] = (p.init ? p.init[r0 + r][at + v] : T(0)) + sum<T>(partial[r][v]);
}

template <class T, class W>
constexpr void (*direct_tiles[])(const DirectProduct<T>&, int64_t, int, int64_t, int) = {
    direct_tile<T, W, 1>, direct_tile<T, W, 2>, direct_tile<T, W, 3>,
#if RNNFAST_VECTOR_BYTES == 64
    direct_tile<T, W, 4>, direct_tile<T, W, 5>, direct_tile<T, W, 6>,
#endif
};

template <class T, class W>
void direct_product_of(const DirectProduct<T>& p) {
    for (int64_t q = p.panel0; q < p.panel1; ++q) {
        const Panel panel(p.columns, q);
        for (int v = 0; v < panel.vectors; ++v) {
            const int lanes = panel.lanes(p.columns, v);
            for (int first = 0; first < lanes; first += max_tile_vectors) {
                const int count = lanes - first < max_tile_vectors ? lanes - first : max_tile_vectors;
                const int64_t j = panel.column_of(p.columns, v) + first;
                for (int64_t r = 0; r < p.rows; r += max_tile_rows) {
                    const int64_t rows = p.rows - r < max_tile_rows ? p.rows - r : max_tile_rows;
                    direct_tiles<T, W>[rows - 1](p, r, panel.gate(p.columns, v), j, count);
                }
            }
        }
    }
}

// Both matrices are of the same numbers.
template <class T>
void direct_product(const DirectProduct<T>& p) {
    with_numbers_of<T>(p.w[0], [&](auto* const* w) {
        direct_product_of<T, std::remove_const_t<std::remove_reference_t<decltype(**w)>>>(p);
    });
}

// Products of numbers as they are.
template <class T>
struct Plain {
    using Number = T;
    static constexpr bool has_all_bits = true;
    static constexpr ProductCosts costs = {max_tile_rows, sizeof(T), 1};

    // Runs the product; done(row0, row1, panel, piece) follows on each finished piece of c while it is in the cache.
    template <bool done_stores, class Done>
    static void run(const Product<T>& p, const Done& done);
    // See Kernels.
    static void pack_transposed(const Columns& columns, int64_t K, const Matrices& w, ptrdiff_t stride, int64_t panel0,
                                int64_t panel1, T* packed);
    static void pack_rows(const Columns& columns, int64_t K, const T* const* rows, int64_t panel0, int64_t panel1,
                          T* packed);
    static int64_t burn(int64_t rounds);
};

template <class T>
template <bool done_stores, class Done>
void Plain<T>::run(const Product<T>& p, const Done& done) {
    const RowTiles row_tiles(p.rows, p.columns.gates == 3 ? tall_tile_rows : max_tile_rows);
    const int64_t k_blocks = p.K ? (p.K + k_block<T> - 1) / k_block<T> : 1;
    FullTile<T, tall_tile_rows> full;
    for (int64_t q = p.panel0; q < p.panel1; ++q) {
        const Panel panel(p.columns, q);
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
            const int64_t k0 = kb * p.K / k_blocks, k1 = (kb + 1) * p.K / k_blocks;
            const bool last = kb == k_blocks - 1;
            const T* slice = p.packed + panel.offset * p.K + k0 * panel.vectors * lanes_of<T>;
            const T* const* const init = kb ? p.c : p.init;
            int rows;
            for (int64_t row0 = 0; row0 < p.rows; row0 += rows) {
                rows = row_tiles.rows_at(row0);
                const Rows<const T*> a{p.a + row0, k0 * p.a_stride};
                const Rows<const T*> start{init ? init + row0 : nullptr, p.columns.first + panel.column};
                const Rows<T*> c{p.c + row0, p.columns.first + panel.column};
                const auto tile = [&](Rows<const T*> from, Rows<T*> to, ptrdiff_t stride) {
                    tiles<T>[rows - 1][panel.vectors - 1](k1 - k0, a, p.a_stride, slice, from, to, stride);
                };
                const Piece<T> piece = run_tile(p, panel, rows, start, c, full, !done_stores || !last, tile);
                if (last) done(row0, row0 + rows, panel, piece);
            }
        }
    }
}

template <class T>
void Plain<T>::pack_transposed(const Columns& columns, int64_t K, const Matrices& w, ptrdiff_t stride, int64_t panel0,
                               int64_t panel1, T* packed) {
    constexpr int V = lanes_of<T>;
    with_numbers_of<T>(w, [&](auto* const* matrices) {
        for (int64_t q = panel0; q < panel1; ++q) {
            const Panel panel(columns, q);
            const ptrdiff_t row = panel.vectors * V;
            for (int v = 0; v < panel.vectors; ++v) {
                const auto* from = matrices[panel.gate(columns, v)] + panel.column_of(columns, v) * stride;
                T* to = packed + panel.offset * K + v * V;
                for (int64_t k = 0; k < K; k += V)
                    transpose_block(from + k, stride, panel.lanes(columns, v), int(K - k < V ? K - k : V), to + k * row,
                                    row);
            }
        }
    });
}

template <class T>
void Plain<T>::pack_rows(const Columns& columns, int64_t K, const T* const* rows, int64_t panel0, int64_t panel1,
                         T* packed) {
    constexpr int V = lanes_of<T>;
    for (int64_t q = panel0; q < panel1; ++q) {
        const Panel panel(columns, q);
        T* to = packed + panel.offset * K;
        for (int64_t k = 0; k < K; ++k)
            for (int v = 0; v < panel.vectors; ++v, to += V)
                store(to, load(rows[k] + panel.column + v * panel.stride, panel.lanes(columns, v)));
    }
}

// Twelve chains of multiply-adds hide how long each of them takes.
template <class T>
int64_t Plain<T>::burn(int64_t rounds) {
    constexpr int chains = 12;
    Vec<T> sum[chains];
    Vec<T> factor = splat(T(0.999)), term = splat(T(0.001));
#pragma GCC unroll 12
    for (int j = 0; j < chains; ++j) sum[j] = splat(T(j));
    for (int64_t i = 0; i < rounds; ++i) {
        keep_in_register(factor);
        keep_in_register(term);
#pragma GCC unroll 12
        for (int j = 0; j < chains; ++j) sum[j] = sum[j] * factor + term;
    }
    Vec<T> total = {};
    for (int j = 0; j < chains; ++j) total += sum[j];
    const bool used = total[0] > T(0);  // always; keeps the loop alive
    return used ? rounds * chains * lanes_of<T> * 2 : 0;
}

}  // namespace
}  // namespace rnnfast
