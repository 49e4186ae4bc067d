// The cells: what happens to a finished piece of a step's product, forward and backward.
#pragma once

#include <type_traits>

#include "activations.h"
#include "tile.h"

namespace rnnfast {
namespace {

// Calls body(column, lanes) for each vector of a panel's units; the compiler knows how many lanes a whole one has.
template <class T, class Body>
inline void for_units(const Product<T>& p, const Panel& panel, Body body) {
    constexpr int V = lanes_of<T>;
    const int vectors = p.columns.gates == 4 ? 1 : panel.vectors;
    const int whole = panel.last_lanes == V ? vectors : vectors - 1;
    for (int v = 0; v < whole; ++v) body(panel.column + v * int64_t(V), std::integral_constant<int, V>());
    if (whole < vectors) body(panel.column + whole * int64_t(V), panel.last_lanes);
}

// Rows [row0, row1) of units from j on, n lanes of them, of a finished product.
template <class T, class Lanes>
inline void lstm_values(const LstmStep<T>& s, int64_t row0, int64_t row1, int64_t j, Lanes n) {
    const int64_t H = s.product.columns.size;
    // In two loops: the gates do not wait for each other, tanh(c) waits for them.
    for (int64_t r = row0; r < row1; ++r) {
        T* z = s.product.c[r] + j;  // (G,H)
        store(z, sigmoid<T>(load(z, n)), n);
        store(z + H, sigmoid<T>(load(z + H, n)), n);
        store(z + 2 * H, tanh<T>(load(z + 2 * H, n)), n);
        store(z + 3 * H, sigmoid<T>(load(z + 3 * H, n)), n);
    }
    for (int64_t r = row0; r < row1; ++r) {
        const T* gates = s.product.c[r] + j;  // (G,H)
        const Vec<T> i = load(gates, n), f = load(gates + H, n);
        const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
        const Vec<T> c = f * load(s.c_prev[r] + j, n) + i * g;
        store(s.c[r] + j, c, n);
        store(s.h[r] + j, o * tanh<T>(c), n);
    }
}

template <class T>
void lstm_step(const LstmStep<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) { lstm_values(s, row0, row1, j, n); });
    });
}

template <class T, class Lanes>
inline void elman_values(T* const* rows, int64_t row0, int64_t row1, bool is_relu, int64_t j, Lanes n) {
    for (int64_t r = row0; r < row1; ++r) {
        T* h = rows[r] + j;
        const Vec<T> z = load(h, n);
        store(h, is_relu ? relu<T>(z) : tanh<T>(z), n);
    }
}

template <class T>
void elman_step(const ElmanStep<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) { elman_values(s.product.c, row0, row1, s.relu, j, n); });
    });
}

template <class T>
void lstm_step_backward(const LstmStepBackward<T>& s) {
    const int64_t H = s.product.columns.size;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                const T* gates = s.gates[r] + j;  // (G,H)
                const Vec<T> i = load(gates, n), f = load(gates + H, n);
                const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
                const Vec<T> tanh_c = tanh<T>(load(s.c[r] + j, n));
                const Vec<T> dh = load(s.product.c[r] + j, n);
                const Vec<T> dc = load(s.dc[r] + j, n) + dh * o * (T(1) - tanh_c * tanh_c);
                T* dz = s.dz[r] + j;  // (G,H)
                store(dz, dc * g * (i * (T(1) - i)), n);
                store(dz + H, dc * load(s.c_prev[r] + j, n) * (f * (T(1) - f)), n);
                store(dz + 2 * H, dc * i * (T(1) - g * g), n);
                store(dz + 3 * H, dh * tanh_c * (o * (T(1) - o)), n);
                store(s.dc[r] + j, dc * f, n);
                if (s.dc_all) store(s.dc_all[r] + j, dc, n);
            }
        });
    });
}

// v * d tanh or relu / dz, from the output h. For relu like torch: nothing where h <= 0, v where h > 0 or h is NaN.
template <class T>
inline Vec<T> times_slope(Vec<T> v, Vec<T> h, bool is_relu) {
    return is_relu ? (h <= T(0) ? Vec<T>{} : v) : v * (T(1) - h * h);
}

template <class T>
void elman_step_backward(const ElmanStepBackward<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                T* dz = s.product.c[r] + j;
                const Vec<T> dh = load(dz, n), h = load(s.h[r] + j, n);
                if (s.dh_all) store(s.dh_all[r] + j, dh, n);
                store(dz, times_slope<T>(dh, h, s.relu), n);
            }
        });
    });
}

// d^2/dz^2 of a sigmoid or tanh by its value and slope: slope * (1 - 2 s), slope * (-2 tanh).
template <class T>
inline Vec<T> sigmoid_curve(Vec<T> s, Vec<T> slope) {
    return slope * (T(1) - T(2) * s);
}
template <class T>
inline Vec<T> tanh_curve(Vec<T> t, Vec<T> slope) {
    return T(-2) * t * slope;
}

// The same of the tangents of a step; z_dots: rows (G,H).
template <bool bends, class T, class Lanes>
inline void lstm_tangents(const LstmStepTangent<T>& s, T* const* z_dots, int64_t H, int64_t row0, int64_t row1,
                          int64_t j, Lanes n) {
    for (int64_t r = row0; r < row1; ++r) {
        const T *gates = s.gates[r] + j, *z_dot = z_dots[r] + j;  // (G,H)
        const Vec<T> i = load(gates, n), f = load(gates + H, n);
        const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
        const Vec<T> t = tanh<T>(load(s.c[r] + j, n)), c_prev = load(s.c_prev[r] + j, n);
        // slopes, and with them the tangents
        const Vec<T> i_z = i * (T(1) - i), f_z = f * (T(1) - f), g_z = T(1) - g * g, o_z = o * (T(1) - o);
        const Vec<T> t_c = T(1) - t * t;
        const Vec<T> i_dot = i_z * load(z_dot, n), f_dot = f_z * load(z_dot + H, n);
        const Vec<T> g_dot = g_z * load(z_dot + 2 * H, n), o_dot = o_z * load(z_dot + 3 * H, n);
        const Vec<T> c_dot_prev = load(s.c_dot_prev[r] + j, n);
        const Vec<T> c_dot = f_dot * c_prev + f * c_dot_prev + i_dot * g + i * g_dot;
        const Vec<T> t_dot = t_c * c_dot;
        store(s.c_dot[r] + j, c_dot, n);
        store(s.m_dot[r] + j, o_dot * t + o * t_dot, n);
        if constexpr (bends) {
            // What dc c_dot + dm m_dot changes by with z, c and c_prev; a_bend, of an activation, is da_dot/dz.
            const Vec<T> dc = load(s.dc[r] + j, n), dm = load(s.dm[r] + j, n);
            const Vec<T> i_bend = sigmoid_curve<T>(i, i_z) * load(z_dot, n);
            const Vec<T> f_bend = sigmoid_curve<T>(f, f_z) * load(z_dot + H, n);
            const Vec<T> g_bend = tanh_curve<T>(g, g_z) * load(z_dot + 2 * H, n);
            const Vec<T> o_bend = sigmoid_curve<T>(o, o_z) * load(z_dot + 3 * H, n);
            T* z_bend = s.z_bend[r] + j;  // (G,H)
            store(z_bend, dc * (i_bend * g + i_z * g_dot), n);
            store(z_bend + H, dc * (f_bend * c_prev + f_z * c_dot_prev), n);
            store(z_bend + 2 * H, dc * (i * g_bend + i_dot * g_z), n);
            store(z_bend + 3 * H, dm * (o_bend * t + o_z * t_dot), n);
            store(s.c_bend[r] + j, dm * (o_dot * t_c + o * tanh_curve<T>(t, t_c) * c_dot), n);
            T* c_bend_prev = s.c_bend_prev[r] + j;
            store(c_bend_prev, load(c_bend_prev, n) + dc * f_dot, n);
        }
    }
}

template <bool bends, class T>
void lstm_step_tangent(const LstmStepTangent<T>& s) {
    const Product<T>& p = s.product;
    run_product(p, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(p, panel, [&](int64_t j, auto n) { lstm_tangents<bends>(s, p.c, p.columns.size, row0, row1, j, n); });
    });
}

template <class T>
void lstm_step_tangent(const LstmStepTangent<T>& s) {
    if (s.z_bend)
        lstm_step_tangent<true>(s);
    else
        lstm_step_tangent<false>(s);
}

template <class T>
void elman_step_tangent(const ElmanStepTangent<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                const Vec<T> z_dot = load(s.product.c[r] + j, n), h = load(s.h[r] + j, n);
                store(s.h_dot[r] + j, times_slope<T>(z_dot, h, s.relu), n);
                // h_dot = (1 - h^2) z_dot, so dh h_dot has this gradient for h; relu is straight
                if (s.h_bend) store(s.h_bend[r] + j, s.relu ? Vec<T>{} : T(-2) * h * load(s.dh[r] + j, n) * z_dot, n);
            }
        });
    });
}

// Calls values(row0, row1) and then tangents(row0, row1) for what there is of both in a piece of their product's rows.
template <class T, class Values, class Tangents>
inline void run_dual(const Product<T>& p, Values values, Tangents tangents) {
    const int64_t count = p.rows / 2;
    run_product(p, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(p, panel, [&](int64_t j, auto n) {
            if (row0 < count) values(row0, row1 < count ? row1 : count, j, n);
            if (row1 > count) tangents(row0 > count ? row0 - count : 0, row1 - count, j, n);
        });
    });
}

template <class T>
void lstm_step_dual(const LstmStepDual<T>& s) {
    const Product<T>& p = s.step.product;
    run_dual(
        p, [&](int64_t row0, int64_t row1, int64_t j, auto n) { lstm_values(s.step, row0, row1, j, n); },
        [&](int64_t row0, int64_t row1, int64_t j, auto n) {
            lstm_tangents<false>(s.tangent, p.c + p.rows / 2, p.columns.size, row0, row1, j, n);
        });
}

template <class T>
void elman_step_dual(const ElmanStepDual<T>& s) {
    T *const *h = s.product.c, *const *h_dot = h + s.product.rows / 2;
    run_dual(
        s.product, [&](int64_t row0, int64_t row1, int64_t j, auto n) { elman_values(h, row0, row1, s.relu, j, n); },
        [&](int64_t row0, int64_t row1, int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r)
                store(h_dot[r] + j, times_slope<T>(load(h_dot[r] + j, n), load(h[r] + j, n), s.relu), n);
        });
}

}  // namespace
}  // namespace rnnfast
