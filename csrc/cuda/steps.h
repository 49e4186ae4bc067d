// The plain kernels: one launch a step, two if projected. Any size, any number; products by multiply-adds in the wide
// type, W_hh from L2. Blocks do not talk to each other. What everything else is checked against on a GPU.
#pragma once

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "cells.h"
#include "launch.h"

namespace rnnfast::cuda {

// A block computes 16 units of 16 sequences of a direction, a thread one of them.
constexpr int step_units = 16, step_rows = 16, step_threads = step_units * step_rows, step_depth = 32;

// Rows of one step of a direction; count 0 before the first and after the last step.
struct Rows {
    int64_t first, count;
};

template <class T>
struct StepArgs : Arrays<T> {
    int64_t B, H, R, D;
    int64_t b_0;                       // first sequence of the launch
    Rows now[2], before[2], after[2];  // of each direction, in the order of the forward pass
    bool projected;
};

// Which unit and sequence a thread has.
struct Thread {
    int64_t d, unit, b;
};
template <class T>
__device__ inline Thread mine(const StepArgs<T>& a) {
    return {blockIdx.z, int64_t(blockIdx.x) * step_units + threadIdx.x % step_units,
            a.b_0 + int64_t(blockIdx.y) * step_rows + threadIdx.x / step_units};
}

// sum[j] = Σ over k < K of w(j, unit, k) * v(b, k), both 0 outside of their arrays. b_0: first sequence of the launch;
// k_first: is w contiguous in k?
template <class W, int J, class Weights, class Values>
__device__ inline void product(W (&sum)[J], int64_t b_0, int64_t K, bool k_first, const Weights& w, const Values& v) {
    W* w_tile = reinterpret_cast<W*>(shared_memory());       // [J][step_depth][step_units + 1]
    W* v_tile = w_tile + J * step_depth * (step_units + 1);  // [step_rows][step_depth + 1]
    const int64_t unit_0 = int64_t(blockIdx.x) * step_units;
    b_0 += int64_t(blockIdx.y) * step_rows;
    const int thread = threadIdx.x, unit = thread % step_units, row = thread / step_units;
    for (int j = 0; j < J; ++j) sum[j] = 0;
    for (int64_t k_0 = 0; k_0 < K; k_0 += step_depth) {
        for (int i = thread; i < J * step_units * step_depth; i += step_threads) {
            const int j = i / (step_units * step_depth), rest = i % (step_units * step_depth);
            const int u = k_first ? rest / step_depth : rest % step_units;
            const int k = k_first ? rest % step_depth : rest / step_units;
            w_tile[(j * step_depth + k) * (step_units + 1) + u] = k_0 + k < K ? w(j, unit_0 + u, k_0 + k) : W(0);
        }
        for (int i = thread; i < step_rows * step_depth; i += step_threads) {
            const int b = i / step_depth, k = i % step_depth;
            v_tile[b * (step_depth + 1) + k] = k_0 + k < K ? v(b_0 + b, k_0 + k) : W(0);
        }
        sync_block();
        for (int k = 0; k < step_depth; ++k)
            for (int j = 0; j < J; ++j)
                sum[j] += w_tile[(j * step_depth + k) * (step_units + 1) + unit] * v_tile[row * (step_depth + 1) + k];
        sync_block();
    }
}
template <class T>
constexpr int step_shared(int J) {
    return (J * step_depth * (step_units + 1) + step_rows * (step_depth + 1)) * static_cast<int>(sizeof(Wide<T>));
}

// --- forward ---------------------------------------------------------------------------------------------------------

// h_t of a unit; for sequences that end here also h_n.
template <class T>
__device__ inline void store_h(const StepArgs<T>& a, const Thread& i, Wide<T> h) {
    const T stored = narrow<T>(h);
    a.y[((a.now[i.d].first + i.b) * a.D + i.d) * a.R + i.unit] = stored;
    if (i.b >= a.after[i.d].count) a.h_n[(i.d * a.B + i.b) * a.R + i.unit] = stored;
}

template <class T, class Cell>
__global__ void __launch_bounds__(step_threads, 1) step_forward(const StepArgs<T> a) {
    using W = Wide<T>;
    using V = Scalar<W, Exact>;
    constexpr int G = Cell::gates;
    const Thread i = mine(a);
    const int64_t d = i.d, H = a.H, R = a.R;
    W sum[G];
    product(
        sum, a.b_0, R, true,
        [&](int gate, int64_t unit, int64_t k) {
            return unit < H ? wide(a.w_hh[((d * G + gate) * H + unit) * R + k]) : W(0);
        },
        [&](int64_t b, int64_t k) {
            if (b < a.before[d].count) return wide(a.y[((a.before[d].first + b) * a.D + d) * R + k]);
            return b < a.now[d].count && a.h0 ? wide(a.h0[(d * a.B + b) * R + k]) : W(0);
        });
    if (i.unit >= H || i.b >= a.now[d].count) return;
    const int64_t at = (a.now[d].first + i.b) * a.D + d;
    V z[G], gates[G], c = {};
    for (int gate = 0; gate < G; ++gate) z[gate] = {sum[gate] + wide(a.gates[(at * G + gate) * H + i.unit])};
    Cell::activate(z, gates);
    if (saves_gates<Cell>(a.cells))
        for (int gate = 0; gate < G; ++gate) a.gates[(at * G + gate) * H + i.unit] = narrow<T>(gates[gate].x);
    const int64_t state = (d * a.B + i.b) * H + i.unit;
    if (has_state<Cell>) c = {a.c[state]};
    const V m = Cell::combine(gates, c);
    if (has_state<Cell>) a.c[state] = c.x;
    if (has_state<Cell> && a.cells) a.cells[at * H + i.unit] = narrow<T>(c.x);
    if (a.projected)
        a.m[at * H + i.unit] = narrow<T>(m.x);
    else
        store_h(a, i, m.x);
}

template <class T>
__global__ void __launch_bounds__(step_threads, 1) step_project(const StepArgs<T> a) {
    using W = Wide<T>;
    const Thread i = mine(a);
    const int64_t d = i.d;
    W h[1];
    product(
        h, a.b_0, a.H, true,
        [&](int, int64_t r, int64_t k) { return r < a.R ? wide(a.w_hr[(d * a.R + r) * a.H + k]) : W(0); },
        [&](int64_t b, int64_t k) {
            return b < a.now[d].count ? wide(a.m[((a.now[d].first + b) * a.D + d) * a.H + k]) : W(0);
        });
    if (i.unit < a.R && i.b < a.now[d].count) store_h(a, i, h[0]);
}

// --- backward --------------------------------------------------------------------------------------------------------

// dL/dm, m being h before W_hr, to dL/dz
template <class T, class Cell>
__device__ inline void cell_backward(const StepArgs<T>& a, const Thread& i, Wide<T> dm) {
    using W = Wide<T>;
    using V = Scalar<W, Exact>;
    constexpr int G = Cell::gates;
    const int64_t d = i.d, H = a.H, at = (a.now[d].first + i.b) * a.D + d;
    const int64_t state = (d * a.B + i.b) * H + i.unit;
    V gates[G], dz[G], c = {}, c_before = {}, dc = {}, dc_before = {};
    for (int gate = 0; gate < G; ++gate) gates[gate] = {wide(a.gates[(at * G + gate) * H + i.unit])};
    if constexpr (has_state<Cell>) {
        c = {wide(a.cells[at * H + i.unit])};
        if (i.b < a.before[d].count)
            c_before = {wide(a.cells[((a.before[d].first + i.b) * a.D + d) * H + i.unit])};
        else if (a.c0)
            c_before = {wide(a.c0[state])};
        dc = V{a.c[state]} + Cell::state_gradient(gates, c, V{dm});
        if (a.d_cells) a.d_cells[at * H + i.unit] = narrow<T>(dc.x);
    }
    Cell::backward(gates, c_before, c, V{dm}, dc, dz, dc_before);
    if (has_state<Cell>) a.c[state] = dc_before.x;
    for (int gate = 0; gate < G; ++gate) {
        T& out = a.dz[(at * G + gate) * H + i.unit];
        out = narrow<T>(a.add ? dz[gate].x + wide(out) : dz[gate].x);
    }
}

template <class T, class Cell>
__global__ void __launch_bounds__(step_threads, 1) step_backward(const StepArgs<T> a) {
    using W = Wide<T>;
    const Thread i = mine(a);
    const int64_t d = i.d, R = a.R, GH = Cell::gates * a.H;
    W dh[1];
    product(
        dh, a.b_0, GH, false,
        [&](int, int64_t r, int64_t k) { return r < R ? wide(a.w_hh[(d * GH + k) * R + r]) : W(0); },
        [&](int64_t b, int64_t k) {
            return b < a.after[d].count ? wide(a.dz[((a.after[d].first + b) * a.D + d) * GH + k]) : W(0);
        });
    if (i.unit >= R) return;
    const int64_t state = (d * a.B + i.b) * R + i.unit, at = (a.now[d].first + i.b) * a.D + d;
    if (i.b >= a.now[d].count) {  // its first step is behind it
        if (i.b < a.after[d].count) a.dh0[state] = narrow<T>(dh[0]);
        return;
    }
    W all = dh[0];
    if (i.b >= a.after[d].count) all = a.dh_n ? wide(a.dh_n[state]) : W(0);  // not 0 * infinity
    if (a.dy) all += wide(a.dy[at * R + i.unit]);
    if (a.projected)
        a.dh[at * R + i.unit] = narrow<T>(all);
    else
        cell_backward<T, Cell>(a, i, all);
}

template <class T, class Cell>
__global__ void __launch_bounds__(step_threads, 1) step_backward_projected(const StepArgs<T> a) {
    using W = Wide<T>;
    const Thread i = mine(a);
    const int64_t d = i.d;
    W dm[1];
    product(
        dm, a.b_0, a.R, false,
        [&](int, int64_t unit, int64_t k) { return unit < a.H ? wide(a.w_hr[(d * a.R + k) * a.H + unit]) : W(0); },
        [&](int64_t b, int64_t k) {
            return b < a.now[d].count ? wide(a.dh[((a.now[d].first + b) * a.D + d) * a.R + k]) : W(0);
        });
    if (i.unit < a.H && i.b < a.now[d].count) cell_backward<T, Cell>(a, i, dm[0]);
}

// --- host ------------------------------------------------------------------------------------------------------------

// Where the rows of each step are.
class Steps {
public:
    explicit Steps(const Sweep& s) : T_(s.T), first_(s.T + 1) {
        for (int64_t t = 0; t < s.T; ++t) first_[t + 1] = first_[t] + (s.batch_sizes ? s.batch_sizes[t] : s.B);
    }
    // Of step k in the order in which a direction takes them forward.
    Rows at(int64_t k, bool reverse) const {
        if (k < 0 || k >= T_) return {0, 0};
        const int64_t t = reverse ? T_ - 1 - k : k;
        return {first_[t], first_[t + 1] - first_[t]};
    }

private:
    int64_t T_;
    std::vector<int64_t> first_;
};

template <class T, class Call>
StepArgs<T> step_args(const Sweep& s, const Call& call) {
    StepArgs<T> a = {};
    a.set(call);
    a.B = s.B;
    a.H = s.H;
    a.R = s.recurrent();
    a.D = s.D;
    a.projected = s.P > 0;
    return a;
}

// Returns how many sequences step k has, at most of both directions.
template <class T>
int64_t go_to(StepArgs<T>& a, const Steps& steps, int64_t k) {
    int64_t count = 0;
    for (int d = 0; d < a.D; ++d) {
        a.before[d] = steps.at(k - 1, d);
        a.now[d] = steps.at(k, d);
        a.after[d] = steps.at(k + 1, d);
        count = std::max(count, a.now[d].count);
    }
    return count;
}

// Every block for `units` units and the largest `count` of both directions: one launch, but for more sequences than a
// launch may have blocks for.
template <class T>
void launch_step(const char* name, void (*kernel)(StepArgs<T>), StepArgs<T> a, int64_t units, int64_t count, int shared,
                 void* stream) {
    const auto blocks = [](int64_t n, int size) { return static_cast<unsigned>((n + size - 1) / size); };
    constexpr int64_t most = int64_t(most_blocks_along_y) * step_rows;
    for (a.b_0 = 0; a.b_0 < count; a.b_0 += most)
        launch(kernel,
               {name, blocks(units, step_units), blocks(std::min(count - a.b_0, most), step_rows),
                static_cast<unsigned>(a.D), step_threads, shared, 1, false, stream},
               a);
}

template <class T, class Cell>
void run_by_steps(const Sweep& s, const Forward& call, void* stream) {
    StepArgs<T> a = step_args<T>(s, call);
    const Steps steps(s);
    for (int64_t k = 0; k < s.T; ++k) {
        const int64_t count = go_to(a, steps, k);
        launch_step("step_forward", &step_forward<T, Cell>, a, s.H, count, step_shared<T>(Cell::gates), stream);
        if constexpr (Cell::projects)
            if (a.projected) launch_step("step_project", &step_project<T>, a, a.R, count, step_shared<T>(1), stream);
    }
}

template <class T, class Cell>
void run_by_steps(const Sweep& s, const Backward& call, void* stream) {
    StepArgs<T> a = step_args<T>(s, call);
    const Steps steps(s);
    int64_t count = 0;
    for (int64_t k = s.T - 1; k >= -1; --k) {  // the last one is for dh0 alone
        const int64_t after = count;
        count = go_to(a, steps, k);
        launch_step("step_backward", &step_backward<T, Cell>, a, a.R, std::max(count, after), step_shared<T>(1),
                    stream);
        if constexpr (Cell::projects)
            if (a.projected)
                launch_step("step_backward_projected", &step_backward_projected<T, Cell>, a, s.H, count,
                            step_shared<T>(1), stream);
    }
}

}  // namespace rnnfast::cuda
