// The persistent kernel of a forward sweep; see persistent.h.
#pragma once

#include "cells.h"
#include "exchange.h"
#include "product.h"

namespace rnnfast::cuda {

template <Number number, class Cell, int tiles, bool grid>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_forward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    using V = Scalar<float, Fast>;
    constexpr int G = Cell::gates, row_tiles_ = row_tiles(G, false);
    using Lane = Mine<G, false, tiles>;
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

    const auto row_of_w = [&](int tile, int row) -> const S* {
        const GateRow p = row_of_tile(G, tile, row);
        const int own = here.row * units_of_warp(G, false) + p.unit, unit = here.rank * g.U + own;
        return own < g.U && unit < H ? a.w_hh + ((int64_t(d) * G + p.gate) * H + unit) * H : nullptr;
    };
    const Stationary<number, row_tiles_, steps_of_warp(G, false)> stationary(
        here, g, [&](int tile, int row, int k) -> Vector {
            const S* const w = row_of_w(tile, row);
            Vector stored = {};
            if (!w || k >= H) return stored;
            if (a.aligned) return to_operands(load_vector(reinterpret_cast<const Vector*>(w + k)), S());
            S some[per_vector];
            for (int i = 0; i < per_vector; ++i) some[i] = k + i < H ? w[k + i] : narrow<S>(0.f);
            return to_operands(packed(some), S());
        });

    clear(memory, (operand_size + other_operand) * static_cast<int>(sizeof(Operand)));
    if (a.h0)
        for (int64_t i = threadIdx.x; i < 8 * tiles * H; i += blockDim.x) {
            const int64_t b = here.b_0 + i / H;
            if (b < B) operands[i / H * g.stride + i % H] = to_operand(a.h0[(int64_t(d) * B + b) * H + i % H]);
        }
    S h[count];
    V c[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        const int64_t state = (int64_t(d) * B + b) * H + my.unit;
        const bool given = my.exists && b < B;
        h[e] = given && a.h0 ? a.h0[state] : narrow<S>(0.f);
        c[e] = {has_state<Cell> && given ? a.c[state] : 0.f};
    }
    S next_z[count][G];  // as stored, so that nothing waits for them before they are used
    const auto load = [&](const DeviceSteps::Rows& rows) {
#pragma unroll
        for (int e = 0; e < count; ++e) {
            const int b = my.first + my.offset(e);
            const bool there = my.exists && b < rows.count;
            const S* const from = a.gates + (there ? ((rows.first + b) * a.D + d) * G * H + my.unit : 0);
#pragma unroll
            for (int gate = 0; gate < G; ++gate) next_z[e][gate] = from[there ? gate * H : 0];
        }
    };
    Exchange<S, sizeof(Operand), sizeof(Operand), grid> exchange(a, here);
    exchange.begin();

    DeviceSteps::Rows now = a.steps.at(0, d), then = a.steps.at(1, d);
    load(now);
    int which = 0;
    for (int k = 0; k < a.steps.T; ++k) {
        const bool runs = now.count > here.b_0;  // the same for all of the group
        Operand* const next = operands + (which ^ 1) * other_operand;
        V z[count][G];  // later on the gates
#pragma unroll
        for (int e = 0; e < count; ++e)
#pragma unroll
            for (int gate = 0; gate < G; ++gate) z[e][gate] = {wide(next_z[e][gate])};
        if (!late_loads(tiles)) load(then);
        const DeviceSteps::Rows later = a.steps.at(k + 2, d);
        float total[Lane::owned][row_tiles_ * 4 / Lane::halves];
        if (runs) {
            float sum[row_tiles_][tiles][4];
            stationary.multiply(sum, operands + which * other_operand, g.stride, here.lane);
            add_splits<row_tiles_, tiles, Lane::halves, Lane::owned, grid>(total, sum, parts, here, g);
        }
        if (late_loads(tiles)) load(then);
        if (runs) {
#pragma unroll
            for (int e = 0; e < count; ++e) {
                if (!my.exists) continue;
                const bool goes_on = my.first + my.offset(e) < now.count;
#pragma unroll
                for (int gate = 0; gate < G; ++gate) z[e][gate].x += total[e / 2][sum_of(gate, e % 2)];
                // computed in any case, so that the sequences of a lane do not wait for each other
                V gates[G], c_t = c[e];
                Cell::activate(z[e], gates);
                const V h_t = Cell::combine(gates, c_t);
#pragma unroll
                for (int gate = 0; gate < G; ++gate) z[e][gate] = gates[gate];
                c[e] = goes_on ? c_t : c[e];
                h[e] = goes_on ? narrow<S>(h_t.x) : h[e];
                next[(my.column + my.offset(e)) * g.stride + my.unit] = to_operand(h[e]);
            }
            exchange.arrive(reinterpret_cast<unsigned char*>(next), which ^ 1);
#pragma unroll
            for (int e = 0; e < count; ++e) {
                const int b = my.first + my.offset(e);
                if (!my.exists || b >= now.count) continue;
                const int64_t at = (now.first + b) * a.D + d;
                if (saves_gates<Cell>(a.cells)) {
#pragma unroll
                    for (int gate = 0; gate < G; ++gate)
                        a.gates[(at * G + gate) * H + my.unit] = narrow<S>(z[e][gate].x);
                }
                if (has_state<Cell> && a.cells) a.cells[at * H + my.unit] = narrow<S>(c[e].x);
                a.y[at * H + my.unit] = h[e];
            }
            exchange.wait(reinterpret_cast<unsigned char*>(next), which ^ 1);
            which ^= 1;
        }
        now = then;
        then = later;
    }
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        const int64_t state = (int64_t(d) * B + b) * H + my.unit;
        if (!my.exists || b >= B) continue;
        a.h_n[state] = h[e];
        if (has_state<Cell>) a.c[state] = c[e].x;
    }
}

}  // namespace rnnfast::cuda
