// The cells: what happens to a finished piece of a step's product, forward and backward.
#pragma once

#include "activations.h"
#include "tile.h"

namespace rnnfast {
namespace {

// Calls body(column, lanes) for each vector of a panel's units.
template <class T, class Body>
inline void for_units(const Product<T>& p, const Panel& panel, Body body) {
    const int vectors = p.columns.gates == 4 ? 1 : panel.vectors;
    for (int v = 0; v < vectors; ++v)
        body(panel.column + v * int64_t(lanes_of<T>), v == vectors - 1 ? panel.last_lanes : lanes_of<T>);
}

template <class T>
void lstm_step(const LstmStep<T>& s) {
    const int64_t H = s.product.columns.size;
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, int n) {
            for (int64_t r = row0; r < row1; ++r) {
                T* z = s.product.c[r] + j;  // (G,H)
                const Vec<T> i = sigmoid<T>(load(z, n));
                const Vec<T> f = sigmoid<T>(load(z + H, n));
                const Vec<T> g = tanh<T>(load(z + 2 * H, n));
                const Vec<T> o = sigmoid<T>(load(z + 3 * H, n));
                const Vec<T> c = f * load(s.c_prev[r] + j, n) + i * g;
                store(s.c[r] + j, c, n);
                store(s.h[r] + j, o * tanh<T>(c), n);
                if (s.keep_gates) {
                    store(z, i, n);
                    store(z + H, f, n);
                    store(z + 2 * H, g, n);
                    store(z + 3 * H, o, n);
                }
            }
        });
    });
}

template <class T>
void elman_step(const ElmanStep<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, int n) {
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
        for_units(s.product, panel, [&](int64_t j, int n) {
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
            }
        });
    });
}

template <class T>
void elman_step_backward(const ElmanStepBackward<T>& s) {
    run_product(s.product, [&](int64_t row0, int64_t row1, const Panel& panel) {
        for_units(s.product, panel, [&](int64_t j, int n) {
            for (int64_t r = row0; r < row1; ++r) {
                T* dz = s.product.c[r] + j;
                const Vec<T> dh = load(dz, n), h = load(s.h[r] + j, n);
                // relu like torch: no gradient where h <= 0, all of it where h > 0 or h is NaN
                store(dz, s.relu ? (h <= T(0) ? Vec<T>{} : dh) : dh * (T(1) - h * h), n);
            }
        });
    });
}

}  // namespace
}  // namespace rnnfast
