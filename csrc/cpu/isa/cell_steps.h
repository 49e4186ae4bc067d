// What follows a step's product while its piece is in the cache: the cell, for one vector of units after another.
// Forward, backward, tangent and second derivative of every cell in csrc/cells.
#pragma once

// clang-format off: the cells need the functions of the vectors that they are written for
#include "math.h"
#include "panel.h"
#include "../../cells/call.h"
#include "../../cells/list.h"
// clang-format on

namespace rnnfast {
namespace {

// Runs a product of M (Plain, say), and body(row0, row1, column, lanes, rows of the vector, numbers from gate to gate
// there) on each vector of units of each finished piece; the compiler knows how many lanes a whole one has.
// body_stores: as done_stores of M::run.
template <class M, bool body_stores = false, class T, class Body>
inline void product_then(const Product<T>& p, const Body& body) {
    constexpr int V = lanes_of<T>;
    M::template run<body_stores>(p, [&](int64_t row0, int64_t row1, const Panel& panel, const Piece<T>& piece) {
        const int vectors = p.columns.gates > 1 ? 1 : panel.vectors;
        const int whole = panel.last_lanes == V ? vectors : vectors - 1;
        for (int v = 0; v < whole; ++v)
            body(row0, row1, panel.column + v * int64_t(V), AllLanes<V>(), piece.vector(v), piece.stride);
        if (whole < vectors)
            body(row0, row1, panel.column + whole * int64_t(V), panel.last_lanes, piece.vector(whole), piece.stride);
    });
}

// Some rows of units, (size,H), from unit j on.
template <class T, int size, class Lanes>
inline void load_gates(Vec<T> (&a)[size], const T* row, ptrdiff_t stride, Lanes n) {
#pragma GCC unroll 4
    for (int g = 0; g < size; ++g) a[g] = load(row + g * stride, n);
}
template <class T, int size, class Lanes>
inline void store_gates(T* row, const Vec<T> (&a)[size], ptrdiff_t stride, Lanes n) {
#pragma GCC unroll 4
    for (int g = 0; g < size; ++g) store(row + g * stride, a[g], n);
}

// The gates of one row of z from unit j on while the step's product is at hand: the recurrent ones are whole vectors of
// the product's piece, `stride` numbers apart, the others n lanes of the row itself (G,H).
template <class Cell, class T, class Lanes>
struct GatesOfStep {
    T* piece;
    ptrdiff_t stride;
    T* row;
    int64_t H;
    Lanes n;

    static constexpr Slots recurrent = Cell::recurrent_gates;
    static constexpr bool in_piece(int g) { return g >= recurrent.first && g < recurrent.first + recurrent.count; }

    RNNFAST_INLINE Vec<T> operator[](int g) const {
        return in_piece(g) ? load(piece + (g - recurrent.first) * stride) : load(row + g * H, n);
    }
    RNNFAST_INLINE void load_to(Vec<T> (&z)[Cell::gates]) const {
#pragma GCC unroll 4
        for (int g = 0; g < Cell::gates; ++g) z[g] = (*this)[g];
    }
    RNNFAST_INLINE void set(const Vec<T> (&a)[Cell::gates]) const {
#pragma GCC unroll 4
        for (int g = 0; g < Cell::gates; ++g)
            in_piece(g) ? store(piece + (g - recurrent.first) * stride, a[g]) : store(row + g * H, a[g], n);
    }
    // Does the row have what was set, or is it in a copy still?
    RNNFAST_INLINE bool is_copy() const { return piece != row + recurrent.first * H; }
};

template <class Cell, class T, class Lanes>
RNNFAST_INLINE GatesOfStep<Cell, T, Lanes> gates_of_step(const Product<T>& p, Rows<T*> pieces, ptrdiff_t stride,
                                                         int64_t row0, int64_t r, int64_t j, Lanes n) {
    return {pieces[r - row0], stride, p.c[r] + j, p.columns.size, n};
}

// Rows [row0, row1) of units from j on, n lanes of them; zs: their product, `stride` from gate to gate.
template <class Cell, class T, class Lanes>
inline void step_values(const Step<T>& s, int64_t row0, int64_t row1, int64_t j, Lanes n, Rows<T*> zs,
                        ptrdiff_t stride) {
    const int64_t H = s.product.columns.size;
    const auto gates_of = [&](int64_t r) { return gates_of_step<Cell>(s.product, zs, stride, row0, r, j, n); };
    // In two loops: the gates do not wait for each other, what is made of them waits for all.
    for (int64_t r = row0; r < row1; ++r) {
        const auto gates = gates_of(r);
        Vec<T> z[Cell::gates], a[Cell::gates];
        gates.load_to(z);
        Cell::activate(z, a);
        if constexpr (Cell::saves_gates)
            gates.set(a);
        else
            store_gates(gates.row, a, H, n);
    }
    if constexpr (Cell::saves_gates)
        for (int64_t r = row0; r < row1; ++r) {
            const auto gates = gates_of(r);
            Vec<T> a[Cell::gates], p[room_for_unit<Cell>] = {}, c = {};
            gates.load_to(a);
            if constexpr (Cell::state != State::none) c = load(s.c_prev[r] + j, n);
            if constexpr (Cell::unit_parameters > 0) load_gates(p, s.unit + j, H, n);
            const Vec<T> m = combine<Cell>(a, c, p);
            if constexpr (Cell::state == State::own) store(s.c[r] + j, c, n);
            store(s.m[r] + j, m, n);
            if (gates.is_copy()) store_gates(gates.row, a, H, n);
        }
}

template <class Cell, class M, class T = typename M::Number>
void step(const Step<T>& s) {
    product_then<M, true>(s.product, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z, ptrdiff_t stride) {
        step_values<Cell>(s, row0, row1, j, n, z, stride);
    });
}

template <class Cell, class M, class T = typename M::Number>
void step_backward(const StepBackward<T>& s) {
    const int64_t H = s.product.columns.size;
    product_then<M>(s.product, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> dms, ptrdiff_t) {
        for (int64_t r = row0; r < row1; ++r) {
            Vec<T> a[Cell::gates], dz[Cell::gates], c = {}, c_prev = {}, dc = {}, dc_prev;
            Vec<T> p[room_for_unit<Cell>] = {}, dp[room_for_unit<Cell>];
            load_gates(a, s.gates[r] + j, H, n);
            Vec<T> dm = load(dms[r - row0]);
            if constexpr (Cell::state != State::none) c_prev = load(s.c_prev[r] + j, n);
            if constexpr (Cell::state == State::own) {
                c = load(s.c[r] + j, n);
                dc = load(s.dc[r] + j, n) + Cell::state_gradient(a, c, dm);
                if (s.dc_total) store(s.dc_total[r] + j, dc, n);
            }
            if constexpr (Cell::state == State::output) {
                dm += load(s.dc[r] + j, n);
                if (s.dc_total) store(s.dc_total[r] + j, dm, n);
            }
            if constexpr (Cell::unit_parameters > 0) load_gates(p, s.unit + j, H, n);
            backward<Cell>(a, c_prev, c, dm, dc, dz, dc_prev, p, dp);
            store_gates(s.dz[r] + j, dz, H, n);
            if constexpr (Cell::unit_parameters > 0) store_gates(s.dz[r] + j + Cell::gates * H, dp, H, n);
            if constexpr (Cell::state != State::none) store(s.dc[r] + j, dc_prev, n);
        }
    });
}

// A row's gates, states and unit parameters with their tangents.
template <class Cell, class T>
struct DualRow {
    Known<Vec<T>> z[Cell::gates];
    Dual<Vec<T>> a[Cell::gates], p[room_for_unit<Cell>], c_prev, c, m;
};

// Stores the tangents of row r and returns what they were made of; z_dot: those of all gates of the row.
template <class Cell, class T, class Lanes>
inline DualRow<Cell, T> row_tangent(const StepTangent<T>& s, const GatesOfStep<Cell, T, Lanes>& z_dot, int64_t r,
                                    int64_t j) {
    const int64_t H = z_dot.H;
    const Lanes n = z_dot.n;
    DualRow<Cell, T> row = {};
    Vec<T> a[Cell::gates];
    load_gates(a, s.gates[r] + j, H, n);
#pragma GCC unroll 4
    for (int g = 0; g < Cell::gates; ++g) row.z[g] = {a[g], z_dot[g]};
    Cell::activate(row.z, row.a);
    if constexpr (Cell::state != State::none) row.c_prev = {load(s.c_prev[r] + j, n), load(s.c_dot_prev[r] + j, n)};
    for (int u = 0; u < Cell::unit_parameters; ++u)
        row.p[u] = {load(s.unit + u * H + j, n), load(s.unit_dot + u * H + j, n)};
    row.c = row.c_prev;
    row.m = combine<Cell>(row.a, row.c, row.p);
    if constexpr (Cell::state == State::own) store(s.c_dot[r] + j, row.c.dot, n);
    store(s.m_dot[r] + j, row.m.dot, n);
    return row;
}

template <class Cell, class M, class T = typename M::Number>
void step_tangent(const StepTangent<T>& s) {
    const Product<T>& p = s.product;
    product_then<M>(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z_dot, ptrdiff_t stride) {
        for (int64_t r = row0; r < row1; ++r)
            row_tangent(s, gates_of_step<Cell>(p, z_dot, stride, row0, r, j, n), r, j);
    });
}

template <class Cell, class M, class T = typename M::Number>
void step_second(const StepSecond<T>& s) {
    const Product<T>& p = s.tangent.product;
    const int64_t H = p.columns.size;
    product_then<M>(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z_dot, ptrdiff_t stride) {
        for (int64_t r = row0; r < row1; ++r) {
            DualRow<Cell, T> row = row_tangent(s.tangent, gates_of_step<Cell>(p, z_dot, stride, row0, r, j, n), r, j);
            Dual<Vec<T>> dz[Cell::gates], dp[room_for_unit<Cell>], dc_prev;
            const Vec<T> dm = load(s.dm[r] + j, n);
            Vec<T> dc = {};
            if constexpr (Cell::state == State::own) {
                dc = load(s.dc[r] + j, n);
                row.c.value = load(s.c[r] + j, n);
                store(s.d_c[r] + j, Cell::state_gradient(row.a, row.c, dm).dot, n);
            }
            if constexpr (Cell::state == State::output) store(s.d_c[r] + j, Vec<T>{}, n);
            // dm a'(z) z_dot, by the rule of the chain: along a_dot it is the gradient of z, along z_dot that of a.
            if constexpr (!Cell::saves_gates) row.a[0].dot = row.z[0].dot;
            backward<Cell>(row.a, row.c_prev, row.c, dm, dc, dz, dc_prev, row.p, dp);
#pragma GCC unroll 4
            for (int g = 0; g < Cell::gates; ++g) store(s.d_gates[r] + j + g * H, dz[g].dot, n);
            for (int u = 0; u < Cell::unit_parameters; ++u) store(s.d_unit[r] + j + u * H, dp[u].dot, n);
            if constexpr (Cell::state != State::none) {
                T* const d_c_prev = s.d_c_prev[r] + j;
                store(d_c_prev, load(d_c_prev, n) + dc_prev.dot, n);
            }
        }
    });
}

template <class Cell, class M, class T = typename M::Number>
void step_dual(const StepDual<T>& s) {
    const Product<T>& p = s.step.product;
    const int64_t count = p.rows / 2;
    product_then<M, true>(p, [&](int64_t row0, int64_t row1, int64_t j, auto n, Rows<T*> z, ptrdiff_t stride) {
        if (row0 < count) step_values<Cell>(s.step, row0, row1 < count ? row1 : count, j, n, z, stride);
        for (int64_t r = row0 > count ? row0 : count; r < row1; ++r)
            row_tangent(s.tangent, gates_of_step<Cell>(p, z, stride, row0, r, j, n), r - count, j);
    });
}

}  // namespace
}  // namespace rnnfast
