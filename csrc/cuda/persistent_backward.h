// The persistent kernel of a backward sweep; see persistent.h.
#pragma once

#include "cells.h"
#include "exchange.h"
#include "product.h"

namespace rnnfast::cuda {

template <Number number, class Cell, int tiles, bool grid>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_backward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    using V = Scalar<float, Fast>;
    constexpr int G = Cell::gates;
    using Lane = Mine<G, true, tiles>;
    constexpr int count = Lane::count, per_vector = 16 / sizeof(S);
    const Geometry& g = a.g;
    const Here here(a);
    const Lane my(a, here);
    const int64_t H = a.H;
    const int d = here.d, B = a.B;
    unsigned char* const memory = shared_memory();
    const int operand_size = 8 * tiles * g.stride, other_operand = grid ? 0 : operand_size;
    Operand* const operands = reinterpret_cast<Operand*>(memory);
    float* const parts = reinterpret_cast<float*>(operands + operand_size + other_operand);

    const Stationary<number, 1, steps_of_warp(G, true)> stationary(
        here, g, [&](int, int row, int k) -> Vector {  // of W_hh^T: one column of W_hh, consecutive units of a gate
            const int own = here.row * units_of_warp(G, true) + row, unit = here.rank * g.U + own;
            const GateColumn p = dz_column(G, g.U, k);
            const S* const w = a.w_hh + ((int64_t(d) * G + p.gate) * H + p.unit) * H + unit;
            const bool there = own < g.U && unit < H && p.gate < G;
            S some[per_vector];
#pragma unroll
            for (int i = 0; i < per_vector; ++i) some[i] = there && p.unit + i < H ? w[i * H] : narrow<S>(0.f);
            return to_operands(packed(some), S());
        });

    clear(memory, (operand_size + other_operand) * static_cast<int>(sizeof(Operand)));
    // What a step needs, loaded while the step before it runs, as it is stored.
    struct Stored {
        S gates[G], dy, c, c_before;
    };
    Stored loaded[count] = {};
    V dc[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        dc[e] = {has_state<Cell> && my.exists && b < B ? a.c[(int64_t(d) * B + b) * H + my.unit] : 0.f};
    }
    const auto load = [&](const DeviceSteps::Rows& rows, const DeviceSteps::Rows& before) {
#pragma unroll
        for (int e = 0; e < count; ++e) {
            const int b = my.first + my.offset(e);
            if (!my.exists || b >= rows.count) continue;
            const int64_t at = (rows.first + b) * a.D + d;
#pragma unroll
            for (int gate = 0; gate < G; ++gate) loaded[e].gates[gate] = a.gates[(at * G + gate) * H + my.unit];
            loaded[e].dy = a.dy ? a.dy[at * H + my.unit] : narrow<S>(0.f);
            if constexpr (has_state<Cell>) {
                loaded[e].c = a.cells[at * H + my.unit];
                const bool goes_on = b < before.count;
                const S* const from =
                    goes_on ? a.cells + ((before.first + b) * a.D + d) * H : a.c0 + (int64_t(d) * B + b) * H;
                loaded[e].c_before = goes_on || a.c0 ? from[my.unit] : narrow<S>(0.f);
            }
        }
    };
    Exchange<S, G * sizeof(Operand), sizeof(Operand), grid> exchange(a, here);
    exchange.begin();

    const int T = a.steps.T;
    DeviceSteps::Rows after = {0, 0}, now = a.steps.at(T - 1, d), then = a.steps.at(T - 2, d),
                      later = a.steps.at(T - 3, d);
    load(now, then);
    int which = 0;
    for (int k = T - 1; k >= -1; --k) {                                            // the last one is for dh0 alone
        const bool follows = after.count > here.b_0, runs = now.count > here.b_0;  // the same for all of the group
        Operand* const next = operands + (which ^ 1) * other_operand;
        V gates[count][G], c[count], c_before[count];
        float dy[count];
#pragma unroll
        for (int e = 0; e < count; ++e) {
#pragma unroll
            for (int gate = 0; gate < G; ++gate) gates[e][gate] = {wide(loaded[e].gates[gate])};
            dy[e] = wide(loaded[e].dy);
            if constexpr (has_state<Cell>) {
                c[e] = {wide(loaded[e].c)};
                c_before[e] = {wide(loaded[e].c_before)};
            }
        }
        if (!late_loads(tiles)) load(then, later);
        const DeviceSteps::Rows last = a.steps.at(k - 3, d);
        float total[Lane::owned][4 / Lane::halves] = {};
        if (follows) {
            float sum[1][tiles][4];
            stationary.multiply(sum, operands + which * other_operand, g.stride, here.lane);
            add_splits<1, tiles, Lane::halves, Lane::owned, grid>(total, sum, parts, here, g);
        }
        if (late_loads(tiles)) load(then, later);
#pragma unroll
        for (int e = 0; e < count; ++e) {
            const int b = my.first + my.offset(e);
            const int64_t state = (int64_t(d) * B + b) * H + my.unit;
            if (!my.exists) continue;
            const bool goes_on = b < now.count, went_on = b < after.count;
            float dh = total[e / 2][e % 2];
            if (went_on && !goes_on) a.dh0[state] = narrow<S>(dh);             // its first step is behind it
            if (!went_on) dh = goes_on && a.dh_n ? wide(a.dh_n[state]) : 0.f;  // not 0 * infinity
            dh += dy[e];
            // computed in any case, so that the sequences of a lane do not wait for each other
            V dz[G], dc_t = dc[e], dc_before = {};
            if constexpr (has_state<Cell>) dc_t = dc_t + Cell::state_gradient(gates[e], c[e], V{dh});
            Cell::backward(gates[e], c_before[e], c[e], V{dh}, dc_t, dz, dc_before);
            c[e] = dc_t;  // from here on dL/dc_t
            dc[e] = goes_on ? dc_before : dc[e];
            if (!goes_on) continue;
            const int64_t at = (now.first + b) * a.D + d;
#pragma unroll
            for (int gate = 0; gate < G; ++gate) {  // from here on dL/dz
                gates[e][gate] = dz[gate];
                if (a.add) gates[e][gate].x += wide(a.dz[(at * G + gate) * H + my.unit]);
                next[(my.column + my.offset(e)) * g.stride + (here.rank * G + gate) * g.U + my.own] =
                    to_operand(narrow<S>(gates[e][gate].x));
            }
        }
        if (runs) {
            exchange.arrive(reinterpret_cast<unsigned char*>(next), which ^ 1);
#pragma unroll
            for (int e = 0; e < count; ++e) {
                const int b = my.first + my.offset(e);
                if (!my.exists || b >= now.count) continue;
                const int64_t at = (now.first + b) * a.D + d;
#pragma unroll
                for (int gate = 0; gate < G; ++gate) a.dz[(at * G + gate) * H + my.unit] = narrow<S>(gates[e][gate].x);
                if (has_state<Cell> && a.d_cells) a.d_cells[at * H + my.unit] = narrow<S>(c[e].x);
            }
            exchange.wait(reinterpret_cast<unsigned char*>(next), which ^ 1);
            which ^= 1;
        }
        after = now;
        now = then;
        then = later;
        later = last;
    }
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        if (has_state<Cell> && my.exists && b < B) a.c[(int64_t(d) * B + b) * H + my.unit] = dc[e].x;
    }
}

}  // namespace rnnfast::cuda
