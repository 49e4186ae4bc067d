// What follows a step's product while its piece is in the cache: the cell, for one vector of units after another.
// Forward, backward, tangent and second derivative of every cell in csrc/cells.
#pragma once

// clang-format off: the cells need the functions of the vectors that they are written for
#include "math.h"
#include "tile.h"
#include "../../cells/list.h"
// clang-format on

namespace rnnfast {
namespace {

// Runs the product, and body(row0, row1, column, lanes, rows of the vector, numbers from gate to gate there) on each
// vector of units of each finished piece; the compiler knows how many lanes a whole one has. body_stores: see
// run_product.
template <bool body_stores = false, class T, class Body>
inline void product_then(const Product<T>& p, Body body) {
    constexpr int V = lanes_of<T>;
    run_product<body_stores>(p, [&](int64_t row0, int64_t row1, const Panel& panel, const Piece<T>& piece) {
        const int vectors = p.columns.gates > 1 ? 1 : panel.vectors;
        const int whole = panel.last_lanes == V ? vectors : vectors - 1;
        for (int v = 0; v < whole; ++v)
            body(row0, row1, panel.column + v * int64_t(V), AllLanes<V>(), piece.vector(v), piece.stride);
        if (whole < vectors)
            body(row0, row1, panel.column + whole * int64_t(V), panel.last_lanes, piece.vector(whole), piece.stride);
    });
}

// The gates of a row from unit j on, `stride` numbers apart.
template <class T, int G, class Lanes>
inline void load_gates(Vec<T> (&a)[G], const T* row, ptrdiff_t stride, Lanes n) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) a[g] = load(row + g * stride, n);
}
template <class T, int G, class Lanes>
inline void store_gates(T* row, const Vec<T> (&a)[G], ptrdiff_t stride, Lanes n) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(row + g * stride, a[g], n);
}

// Rows [row0, row1) of units from j on, n lanes of them; zs: their product, `stride` from gate to gate.
template <class Cell, class T, class Lanes>
inline void step_values(const Step<T>& s, int64_t row0, int64_t row1, int64_t j, Lanes n, Rows<T*> zs,
                        ptrdiff_t stride) {
    constexpr AllLanes<lanes_of<T>> all{};
    const int64_t H = s.product.columns.size;
    // In two loops: the gates do not wait for each other, what is made of them waits for all.
    for (int64_t r = row0; r < row1; ++r) {
        T* const row = zs[r - row0];
        Vec<T> z[Cell::gates], a[Cell::gates];
        load_gates(z, row, stride, all);
        Cell::activate(z, a);
        if constexpr (Cell::saves_gates)
            store_gates(row, a, stride, all);
        else
            store_gates(s.product.c[r] + j, a, H, n);
    }
    if constexpr (Cell::saves_gates)
        for (int64_t r = row0; r < row1; ++r) {
            T *const row = zs[r - row0], *const gates = s.product.c[r] + j;  // (G,H)
            Vec<T> a[Cell::gates], c = {};
            load_gates(a, row, stride, all);
            if constexpr (Cell::has_state) c = load(s.c_prev[r] + j, n);
            const Vec<T> m = Cell::combine(a, c);
            if constexpr (Cell::has_state) store(s.c[r] + j, c, n);
            store(s.m[r] + j, m, n);
            if (gates != row) store_gates(gates, a, H, n);
        }
}

template <class Cell, class T>
void step(const Step<T>& s) {
    product_then<true>(s.product, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z, ptrdiff_t stride) {
        step_values<Cell>(s, row0, row1, j, n, z, stride);
    });
}

template <class Cell, class T>
void step_backward(const StepBackward<T>& s) {
    const int64_t H = s.product.columns.size;
    product_then(s.product, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> dms, ptrdiff_t) {
        for (int64_t r = row0; r < row1; ++r) {
            Vec<T> a[Cell::gates], dz[Cell::gates], c = {}, c_prev = {}, dc = {}, dc_prev;
            load_gates(a, s.gates[r] + j, H, n);
            const Vec<T> dm = load(dms[r - row0]);
            if constexpr (Cell::has_state) {
                c = load(s.c[r] + j, n);
                c_prev = load(s.c_prev[r] + j, n);
                dc = load(s.dc[r] + j, n) + Cell::state_gradient(a, c, dm);
                if (s.dc_total) store(s.dc_total[r] + j, dc, n);
            }
            Cell::backward(a, c_prev, c, dm, dc, dz, dc_prev);
            store_gates(s.dz[r] + j, dz, H, n);
            if constexpr (Cell::has_state) store(s.dc[r] + j, dc_prev, n);
        }
    });
}

// A row's gates and states with their tangents.
template <class Cell, class T>
struct DualRow {
    Known<Vec<T>> z[Cell::gates];
    Dual<Vec<T>> a[Cell::gates], c_prev, c, m;
};

// Stores the tangents of one row and returns what they were made of.
template <class Cell, class T, class Lanes>
inline DualRow<Cell, T> row_tangent(const StepTangent<T>& s, const T* z_dot, ptrdiff_t stride, int64_t H, int64_t r,
                                    int64_t j, Lanes n) {
    DualRow<Cell, T> row = {};
    Vec<T> a[Cell::gates];
    load_gates(a, s.gates[r] + j, H, n);
#pragma GCC unroll 4
    for (int g = 0; g < Cell::gates; ++g) row.z[g] = {a[g], load(z_dot + g * stride)};
    Cell::activate(row.z, row.a);
    if constexpr (Cell::has_state) row.c_prev = {load(s.c_prev[r] + j, n), load(s.c_dot_prev[r] + j, n)};
    row.c = row.c_prev;
    row.m = Cell::combine(row.a, row.c);
    if constexpr (Cell::has_state) store(s.c_dot[r] + j, row.c.dot, n);
    store(s.m_dot[r] + j, row.m.dot, n);
    return row;
}

template <class Cell, class T>
void step_tangent(const StepTangent<T>& s) {
    const Product<T>& p = s.product;
    product_then(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z_dot, ptrdiff_t stride) {
        for (int64_t r = row0; r < row1; ++r) row_tangent<Cell>(s, z_dot[r - row0], stride, p.columns.size, r, j, n);
    });
}

template <class Cell, class T>
void step_second(const StepSecond<T>& s) {
    const Product<T>& p = s.tangent.product;
    const int64_t H = p.columns.size;
    product_then(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z_dot, ptrdiff_t stride) {
        for (int64_t r = row0; r < row1; ++r) {
            DualRow<Cell, T> row = row_tangent<Cell>(s.tangent, z_dot[r - row0], stride, H, r, j, n);
            Dual<Vec<T>> dz[Cell::gates], dc_prev;
            const Vec<T> dm = load(s.dm[r] + j, n);
            Vec<T> dc = {};
            if constexpr (Cell::has_state) {
                dc = load(s.dc[r] + j, n);
                row.c.value = load(s.c[r] + j, n);
                store(s.d_c[r] + j, Cell::state_gradient(row.a, row.c, dm).dot, n);
            }
            // dm a'(z) z_dot, by the rule of the chain: along a_dot it is the gradient of z, along z_dot that of a.
            if constexpr (!Cell::saves_gates) row.a[0].dot = row.z[0].dot;
            Cell::backward(row.a, row.c_prev, row.c, dm, dc, dz, dc_prev);
#pragma GCC unroll 4
            for (int g = 0; g < Cell::gates; ++g) store(s.d_gates[r] + j + g * H, dz[g].dot, n);
            if constexpr (Cell::has_state) {
                T* const d_c_prev = s.d_c_prev[r] + j;
                store(d_c_prev, load(d_c_prev, n) + dc_prev.dot, n);
            }
        }
    });
}

template <class Cell, class T>
void step_dual(const StepDual<T>& s) {
    const Product<T>& p = s.step.product;
    const int64_t count = p.rows / 2;
    product_then<true>(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z, ptrdiff_t stride) {
        if (row0 < count) step_values<Cell>(s.step, row0, row1 < count ? row1 : count, j, n, z, stride);
        for (int64_t r = row0 > count ? row0 : count; r < row1; ++r)
            row_tangent<Cell>(s.tangent, z[r - row0], stride, p.columns.size, r - count, j, n);
    });
}

}  // namespace
}  // namespace rnnfast
