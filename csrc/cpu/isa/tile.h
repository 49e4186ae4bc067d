// The matrix product under everything: MR rows times NV vectors of columns held in registers while k runs.
#pragma once

#include "../kernels.h"
#include "vector.h"

namespace rnnfast {
namespace {

// Accumulators + broadcasts + one load fit the register file: 24 + 6 + 1 of 32 with AVX-512, 12 + 3 + 1 of 16 else.
constexpr int max_tile_rows = RNNFAST_VECTOR_BYTES == 64 ? 6 : 3;
constexpr int max_tile_vectors = 4;
// Panels of three gates leave room for as many accumulators in four rows, where the vectors are held in place of the
// rows' numbers: 12 + 3 + 1 of 16.
constexpr int tall_tile_rows = RNNFAST_VECTOR_BYTES == 64 ? max_tile_rows : 4;
// Rows of a panel that one pass of k takes. The slice stays in the first-level cache while all row tiles use it; with
// AVX-512, whose 6 rows ask for half as many bytes a cycle, the second level is near enough and fewer passes count
// more.
template <class T>
constexpr int64_t k_block = 16384 / (max_tile_vectors * RNNFAST_VECTOR_BYTES) * (RNNFAST_VECTOR_BYTES == 64 ? 8 : 1);

// Some rows of numbers, each from `start` on.
template <class P>
struct Rows {
    P const* rows;  // nullptr: zeros
    ptrdiff_t start;

    RNNFAST_INLINE P operator[](int64_t r) const { return rows[r] + start; }
    RNNFAST_INLINE explicit operator bool() const { return rows; }
};

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

// Where one panel lies.
struct Panel {
    int64_t column;  // of its first vector, within a gate
    int vectors;
    ptrdiff_t stride;  // columns between its vectors
    int last_lanes;    // columns in its last vector (with gates: in each of them)
    int64_t offset;    // of its numbers, in units of K

    Panel(const Columns& columns, int64_t panel) {
        const int64_t first = columns.first_vector(panel);
        const int64_t end = columns.first_vector(panel + 1);
        column = first * columns.lanes;
        vectors = columns.gates > 1 ? columns.gates : int(end - first);
        stride = columns.gates > 1 ? columns.size : columns.lanes;
        const int64_t left = columns.size - (end - 1) * columns.lanes;
        last_lanes = int(left < columns.lanes ? left : columns.lanes);
        offset = column * columns.gates;
    }
    int lanes(const Columns& columns, int v) const {
        return columns.gates > 1 || v == vectors - 1 ? last_lanes : columns.lanes;
    }
    // Vector v is of this gate, and begins with this one of its columns.
    int gate(const Columns& columns, int v) const { return columns.gates > 1 ? v : 0; }
    int64_t column_of(const Columns& columns, int v) const {
        return columns.gates > 1 ? column : column + int64_t(v) * columns.lanes;
    }
};

// A finished piece of c, of which whole vectors can be read. A ragged one is a copy that goes on beyond the columns
// that there are: what has just been stored in parts comes back from memory late, and holds up its neighbours' loads.
template <class T>
struct Piece {
    Rows<T*> rows;     // the first vector of each row
    ptrdiff_t stride;  // from one vector of a row to the next

    RNNFAST_INLINE Rows<T*> vector(int v) const { return {rows.rows, rows.start + v * stride}; }
};

// Room for a tile of whole vectors, as many as a tile can have.
template <class T>
struct FullTile {
    T numbers[tall_tile_rows][max_tile_vectors * lanes_of<T>];
    T* rows[tall_tile_rows];

    FullTile() {
        for (int r = 0; r < tall_tile_rows; ++r) rows[r] = numbers[r];
    }
};

// A tile whose last vector is only partly there: through a full one.
template <class T>
void ragged_tile(int rows, const Product<T>& p, const Panel& panel, int64_t K, Rows<const T*> a, const T* slice,
                 Rows<const T*> init, Rows<T*> c, FullTile<T>& full, bool stores) {
    constexpr int V = lanes_of<T>;
    if (init)
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < panel.vectors; ++v)
                store(full.rows[r] + v * V, load(init[r] + v * panel.stride, panel.lanes(p.columns, v)));
    const Rows<const T*> start{init ? full.rows : nullptr, 0};
    tiles<T>[rows - 1][panel.vectors - 1](K, a, p.a_stride, slice, start, {full.rows, 0}, V);
    if (!stores) return;
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < panel.vectors; ++v)
            store(c[r] + v * panel.stride, load(full.rows[r] + v * V), panel.lanes(p.columns, v));
}

// Runs the product; done(row0, row1, panel, piece) follows on each finished piece of c while it is in the cache.
template <bool done_stores = false, class T, class Done>
void run_product(const Product<T>& p, Done done) {
    if (!p.rows) return;
    // Row tiles of nearly the same height: `longer` ones have a row more than the rest.
    const int64_t row_tiles = p.columns.gates == 3 ? (p.rows + tall_tile_rows - 1) / tall_tile_rows
                                                   : (p.rows + max_tile_rows - 1) / max_tile_rows;
    const int64_t tile_rows = p.rows / row_tiles, longer = p.rows % row_tiles;
    const int64_t k_blocks = p.K ? (p.K + k_block<T> - 1) / k_block<T> : 1;
    FullTile<T> full;
    for (int64_t q = p.panel0; q < p.panel1; ++q) {
        const Panel panel(p.columns, q);
        const bool whole = panel.last_lanes == lanes_of<T>;
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
            const int64_t k0 = kb * p.K / k_blocks, k1 = (kb + 1) * p.K / k_blocks;
            const T* slice = p.packed + panel.offset * p.K + k0 * panel.vectors * lanes_of<T>;
            const T* const* const init = kb ? p.c : p.init;
            for (int64_t row0 = 0, left = row_tiles; left; --left) {
                const int rows = int(row0 < longer * (tile_rows + 1) ? tile_rows + 1 : tile_rows);
                const Rows<const T*> a{p.a + row0, k0 * p.a_stride};
                const Rows<const T*> start{init ? init + row0 : nullptr, p.columns.first + panel.column};
                const Rows<T*> c{p.c + row0, p.columns.first + panel.column};
                if (whole)
                    tiles<T>[rows - 1][panel.vectors - 1](k1 - k0, a, p.a_stride, slice, start, c, panel.stride);
                else
                    ragged_tile(rows, p, panel, k1 - k0, a, slice, start, c, full, !done_stores || kb < k_blocks - 1);
                if (kb == k_blocks - 1)
                    done(row0, row0 + rows, panel,
                         whole ? Piece<T>{c, panel.stride} : Piece<T>{{full.rows, 0}, lanes_of<T>});
                row0 += rows;
            }
        }
    }
}

template <class T>
void product(const Product<T>& p) {
    run_product(p, [](int64_t, int64_t, const Panel&, const Piece<T>&) {});
}

// Columns [j, j + count) of one gate in rows [r0, r0 + MR) of a direct product. The order of a sum does not depend on
// MR.
template <class T, int MR>
void direct_tile(const DirectProduct<T>& p, int64_t r0, int gate, int64_t j, int count) {
    constexpr int V = lanes_of<T>, most = max_tile_vectors;
    Vec<T> partial[MR][most] = {};
    for (int i = 0; i < 2; ++i) {
        const int64_t K = p.K[i];
        if (!K || !p.w[i][gate]) continue;
        const T *a[MR], *w[most];
        for (int r = 0; r < MR; ++r) a[r] = p.a[i][r0 + r];
        // A ragged end computes its last column again in place of those that are not there.
        for (int v = 0; v < most; ++v) w[v] = p.w[i][gate] + (j + (v < count ? v : count - 1)) * K;
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

template <class T>
constexpr void (*direct_tiles[])(const DirectProduct<T>&, int64_t, int, int64_t, int) = {
    direct_tile<T, 1>, direct_tile<T, 2>, direct_tile<T, 3>,
#if RNNFAST_VECTOR_BYTES == 64
    direct_tile<T, 4>, direct_tile<T, 5>, direct_tile<T, 6>,
#endif
};

template <class T>
void direct_product(const DirectProduct<T>& p) {
    for (int64_t q = p.panel0; q < p.panel1; ++q) {
        const Panel panel(p.columns, q);
        for (int v = 0; v < panel.vectors; ++v) {
            const int lanes = panel.lanes(p.columns, v);
            for (int first = 0; first < lanes; first += max_tile_vectors) {
                const int count = lanes - first < max_tile_vectors ? lanes - first : max_tile_vectors;
                const int64_t j = panel.column_of(p.columns, v) + first;
                for (int64_t r = 0; r < p.rows; r += max_tile_rows) {
                    const int64_t rows = p.rows - r < max_tile_rows ? p.rows - r : max_tile_rows;
                    direct_tiles<T>[rows - 1](p, r, panel.gate(p.columns, v), j, count);
                }
            }
        }
    }
}

// to[i * to_stride + j] = from[j * from_stride + i] for i < count, j < lanes, and 0 up to the last lane.
template <class T>
inline void transpose_block(const T* from, ptrdiff_t from_stride, int lanes, int count, T* to, ptrdiff_t to_stride) {
    constexpr int V = lanes_of<T>;
    Vec<T> square[V] = {};
    if (lanes == V && count == V) {
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) square[j] = load(from + j * from_stride);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) store(to + i * to_stride, square[i]);
    } else {
        for (int j = 0; j < lanes; ++j) square[j] = load(from + j * from_stride, count);
        transpose<T>(square);
        for (int i = 0; i < count; ++i) store(to + i * to_stride, square[i]);
    }
}

template <class T>
void pack_transposed(const Columns& columns, int64_t K, const T* const* w, ptrdiff_t stride, int64_t panel0,
                     int64_t panel1, T* packed) {
    constexpr int V = lanes_of<T>;
    for (int64_t q = panel0; q < panel1; ++q) {
        const Panel panel(columns, q);
        const ptrdiff_t row = panel.vectors * V;
        for (int v = 0; v < panel.vectors; ++v) {
            const T* from = w[panel.gate(columns, v)] + panel.column_of(columns, v) * stride;
            T* to = packed + panel.offset * K + v * V;
            for (int64_t k = 0; k < K; k += V)
                transpose_block(from + k, stride, panel.lanes(columns, v), int(K - k < V ? K - k : V), to + k * row,
                                row);
        }
    }
}

template <class T>
void pack_rows(const Columns& columns, int64_t K, const T* const* rows, int64_t panel0, int64_t panel1, T* packed) {
    constexpr int V = lanes_of<T>;
    for (int64_t q = panel0; q < panel1; ++q) {
        const Panel panel(columns, q);
        T* to = packed + panel.offset * K;
        for (int64_t k = 0; k < K; ++k)
            for (int v = 0; v < panel.vectors; ++v, to += V)
                store(to, load(rows[k] + panel.column + v * panel.stride, panel.lanes(columns, v)));
    }
}

}  // namespace
}  // namespace rnnfast
