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

template <class T>
void lstm_step(const LstmStep<T>& s) {
    const int64_t H = s.product.columns.size;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
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
        });
    });
}

template <class T>
void elman_step(const ElmanStep<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                T* h = s.product.c[r] + j;
                const Vec<T> z = load(h, n);
                store(h, s.relu ? relu<T>(z) : tanh<T>(z), n);
            }
        });
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
                store(dz, times_slope<T>(dh, h, s.relu), n);
            }
        });
    });
}

template <class T>
void lstm_step_tangent(const LstmStepTangent<T>& s) {
    const int64_t H = s.product.columns.size;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                const T *gates = s.gates[r] + j, *z_dot = s.product.c[r] + j;  // (G,H)
                const Vec<T> i = load(gates, n), f = load(gates + H, n);
                const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
                const Vec<T> i_dot = i * (T(1) - i) * load(z_dot, n);
                const Vec<T> f_dot = f * (T(1) - f) * load(z_dot + H, n);
                const Vec<T> g_dot = (T(1) - g * g) * load(z_dot + 2 * H, n);
                const Vec<T> o_dot = o * (T(1) - o) * load(z_dot + 3 * H, n);
                const Vec<T> tanh_c = tanh<T>(load(s.c[r] + j, n));
                const Vec<T> c_dot =
                    f_dot * load(s.c_prev[r] + j, n) + f * load(s.c_dot_prev[r] + j, n) + i_dot * g + i * g_dot;
                store(s.c_dot[r] + j, c_dot, n);
                store(s.h_dot[r] + j, o_dot * tanh_c + o * (T(1) - tanh_c * tanh_c) * c_dot, n);
            }
        });
    });
}

template <class T>
void elman_step_tangent(const ElmanStepTangent<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r)
                store(s.h_dot[r] + j, times_slope<T>(load(s.product.c[r] + j, n), load(s.h[r] + j, n), s.relu), n);
        });
    });
}

template <class T>
void lstm_step_second(const LstmStepSecond<T>& second) {
    const LstmStepBackward<T>& s = second.step;
    const int64_t H = s.product.columns.size;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                const T *gates = s.gates[r] + j, *z_dot = second.z_dot[r] + j;  // (G,H)
                const T* dz_first = second.dz_first[r] + j;                     // (G,H)
                const Vec<T> i = load(gates, n), f = load(gates + H, n);
                const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
                const Vec<T> di = i * (T(1) - i), df = f * (T(1) - f), dg = T(1) - g * g, dO = o * (T(1) - o);
                const Vec<T> zi = load(z_dot, n), zf = load(z_dot + H, n);
                const Vec<T> zg = load(z_dot + 2 * H, n), zo = load(z_dot + 3 * H, n);
                const Vec<T> t = tanh<T>(load(s.c[r] + j, n)), dt = T(1) - t * t;
                const Vec<T> c_dot = load(second.c_dot[r] + j, n);
                const Vec<T> dh = load(s.product.c[r] + j, n);
                const Vec<T> dh_first = load(second.dh_first[r] + j, n), dc_first = load(second.dc_first[r] + j, n);
                // h = o t and h_dot = o_dot t + o dt c_dot, with d dt / dc = -2 t dt
                const Vec<T> d_t = dh * o + dh_first * (dO * zo - T(2) * t * c_dot * o);
                const Vec<T> d_o = dh * t + dh_first * dt * c_dot;
                const Vec<T> dc = load(s.dc[r] + j, n) + d_t * dt;
                // c = f c_prev + i g and c_dot = f_dot c_prev + f c_dot_prev + i_dot g + i g_dot
                const Vec<T> d_i = dc * g + dc_first * dg * zg;
                const Vec<T> d_f = dc * load(s.c_prev[r] + j, n) + dc_first * load(second.c_dot_prev[r] + j, n);
                const Vec<T> d_g = dc * i + dc_first * di * zi;
                T* dz = s.dz[r] + j;  // (G,H)
                store(dz, d_i * di + load(dz_first, n) * zi * (T(1) - T(2) * i), n);
                store(dz + H, d_f * df + load(dz_first + H, n) * zf * (T(1) - T(2) * f), n);
                store(dz + 2 * H, d_g * dg - T(2) * load(dz_first + 2 * H, n) * zg * g, n);
                store(dz + 3 * H, d_o * dO + load(dz_first + 3 * H, n) * zo * (T(1) - T(2) * o), n);
                store(s.dc[r] + j, dc * f + dc_first * df * zf, n);
            }
        });
    });
}

template <class T>
void elman_step_second(const ElmanStepSecond<T>& second) {
    const ElmanStepBackward<T>& s = second.step;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, auto n) {
            for (int64_t r = row0; r < row1; ++r) {
                T* dz = s.product.c[r] + j;
                const Vec<T> dh = load(dz, n), h = load(s.h[r] + j, n);
                const Vec<T> bend = T(-2) * h * load(second.dz_first[r] + j, n) * load(second.z_dot[r] + j, n);
                store(dz, s.relu ? times_slope<T>(dh, h, true) : times_slope<T>(dh, h, false) + bend, n);
            }
        });
    });
}

}  // namespace
}  // namespace rnnfast
