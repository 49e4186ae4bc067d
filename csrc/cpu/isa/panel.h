// What the products of this instruction set have in common: how panels lie, finished pieces of a result, transposes.
#pragma once

#include "../kernels.h"
#include "vector.h"

namespace rnnfast {
namespace {

constexpr int max_tile_vectors = 4;

// Some rows of numbers, each from `start` on.
template <class P>
struct Rows {
    P const* rows;  // nullptr: zeros
    ptrdiff_t start;

    RNNFAST_INLINE P operator[](int64_t r) const { return rows[r] + start; }
    RNNFAST_INLINE explicit operator bool() const { return rows; }
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
template <class T, int most_rows>
struct FullTile {
    T numbers[most_rows][max_tile_vectors * lanes_of<T>];
    T* rows[most_rows];

    FullTile() {
        for (int r = 0; r < most_rows; ++r) rows[r] = numbers[r];
    }
};

// Runs tile(init, c, numbers from vector to vector), through a full one if the last vector is only partly there, and
// returns where whole vectors of the result can be read; such a piece reaches c itself only if it `stores`.
template <class T, int most_rows, class Tile>
RNNFAST_INLINE Piece<T> run_tile(const Product<T>& p, const Panel& panel, int rows, Rows<const T*> init, Rows<T*> c,
                                 FullTile<T, most_rows>& full, bool stores, const Tile& tile) {
    constexpr int V = lanes_of<T>;
    if (panel.last_lanes == V) {
        tile(init, c, panel.stride);
        return {c, panel.stride};
    }
    if (init)
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < panel.vectors; ++v)
                store(full.rows[r] + v * V, load(init[r] + v * panel.stride, panel.lanes(p.columns, v)));
    tile(Rows<const T*>{init ? full.rows : nullptr, 0}, Rows<T*>{full.rows, 0}, V);
    if (stores)
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < panel.vectors; ++v)
                store(c[r] + v * panel.stride, load(full.rows[r] + v * V), panel.lanes(p.columns, v));
    return {{full.rows, 0}, V};
}

// Neighbouring rows in tiles of nearly the same height, of at most `most` rows: the first `longer` ones have one more.
struct RowTiles {
    int64_t count, height, longer;

    RowTiles(int64_t rows, int64_t most)
        : count((rows + most - 1) / most), height(count ? rows / count : 0), longer(count ? rows % count : 0) {}
    int rows_at(int64_t row0) const { return int(row0 < longer * (height + 1) ? height + 1 : height); }
};

// to[i * to_stride + j] = from[j * from_stride + i] for i < count, j < lanes, and 0 up to the last lane.
template <class T, class W>
inline void transpose_block(const W* from, ptrdiff_t from_stride, int lanes, int count, T* to, ptrdiff_t to_stride) {
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

}  // namespace
}  // namespace rnnfast
