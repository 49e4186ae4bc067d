// The plain kernels: one launch a step, two if projected. Any cell, size and number, resets; products by multiply-adds
// in the wide type, W_hh from L2. Blocks do not talk to each other. What everything else is checked against on a GPU.
#pragma once

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "cells.h"
#include "launch.h"

namespace rnnfast::cuda {

// A block computes 16 units of 16 sequences of a direction, a thread one of them.
constexpr int step_units = 16, step_rows = 16, step_threads = step_units * step_rows, step_depth = 32;

// Rows of one step of a direction, which is `step` counted from the beginning of the sequences; count 0 before the
// first and after the last one.
struct Rows {
    int64_t first, count, step;
};

template <class T>
struct StepArgs : Arrays<T> {
    int64_t B, H, R, D;
    int64_t b_0;                       // first sequence of the launch
    Rows now[2], before[2], after[2];  // of each direction, in the order of the forward pass
    const bool* resets;                // (N) or nullptr
    const int64_t* first_reset;        // (B)
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

// Where the state comes from that a step begins with.
enum class From { before, given, zeros };

// Of sequence b < now.count. Each episode is a sequence of its own: what was given enters the one that begins at step 0
// without a reset, in the order of a direction the first of its steps.
template <class T>
__device__ inline From source(const StepArgs<T>& a, int64_t d, int64_t b, const Rows& now, const Rows& before) {
    const bool follows = b < before.count;
    if (!a.resets) return follows ? From::before : From::given;
    if (follows && !a.resets[(d ? before : now).first + b]) return From::before;
    return now.step < a.first_reset[b] ? From::given : From::zeros;
}

// (R) h before the step `now` of sequence b < now.count; nullptr: zeros
template <class T>
__device__ inline const T* h_before(const StepArgs<T>& a, int64_t d, int64_t b) {
    const From from = source(a, d, b, a.now[d], a.before[d]);
    if (from == From::before) return a.y + ((a.before[d].first + b) * a.D + d) * a.R;
    return from == From::given && a.h0 ? a.h0 + (d * a.B + b) * a.R : nullptr;
}

// sum[j] = Σ over k < K of w(j, unit, k) * row(b)[k]; w is 0 outside of its array, row(b) nullptr for zeros. b_0: first
// sequence of the launch; k_first: is w contiguous in k?
template <class W, int J, class Weights, class RowOf>
__device__ inline void product(W (&sum)[J], int64_t b_0, int64_t K, bool k_first, const Weights& w,
                               const RowOf& row_of) {
    constexpr int rows_at_a_time = step_threads / step_depth, own = step_rows / rows_at_a_time;
    W* w_tile = reinterpret_cast<W*>(shared_memory());       // [J][step_depth][step_units + 1]
    W* v_tile = w_tile + J * step_depth * (step_units + 1);  // [step_rows][step_depth + 1]
    const int64_t unit_0 = int64_t(blockIdx.x) * step_units;
    b_0 += int64_t(blockIdx.y) * step_rows;
    const int thread = threadIdx.x, unit = thread % step_units, row = thread / step_units;
    const int column = thread % step_depth, first_row = thread / step_depth;
    decltype(row_of(0)) rows[own];
    for (int i = 0; i < own; ++i) rows[i] = row_of(b_0 + first_row + i * rows_at_a_time);
    for (int j = 0; j < J; ++j) sum[j] = 0;
    for (int64_t k_0 = 0; k_0 < K; k_0 += step_depth) {
        for (int i = thread; i < J * step_units * step_depth; i += step_threads) {
            const int j = i / (step_units * step_depth), rest = i % (step_units * step_depth);
            const int u = k_first ? rest / step_depth : rest % step_units;
            const int k = k_first ? rest % step_depth : rest / step_units;
            w_tile[(j * step_depth + k) * (step_units + 1) + u] = k_0 + k < K ? w(j, unit_0 + u, k_0 + k) : W(0);
        }
        for (int i = 0; i < own; ++i)
            v_tile[(first_row + i * rows_at_a_time) * (step_depth + 1) + column] =
                rows[i] && k_0 + column < K ? wide(rows[i][k_0 + column]) : W(0);
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

// (U) the parameters of a unit
template <class Cell, class T, class V>
__device__ inline void load_unit(const StepArgs<T>& a, const Thread& i, V (&p)[room_for_unit<Cell>]) {
    for (int u = 0; u < Cell::unit_parameters; ++u)
        p[u] = {wide(a.unit[(i.d * Cell::unit_parameters + u) * a.H + i.unit])};
}

template <class T, class Cell>
__global__ void __launch_bounds__(step_threads, 1) step_forward(const StepArgs<T> a) {
    using W = Wide<T>;
    using V = Scalar<W, Exact>;
    constexpr int G = Cell::gates;
    constexpr Slots recurrent = Cell::recurrent_gates;
    const Thread i = mine(a);
    const int64_t d = i.d, H = a.H, R = a.R;
    W sum[recurrent.count];
    product(
        sum, a.b_0, R, true,
        [&](int gate, int64_t unit, int64_t k) {
            return unit < H ? wide(a.w_hh[((d * recurrent.count + gate) * H + unit) * R + k]) : W(0);
        },
        [&](int64_t b) -> const T* { return b < a.now[d].count ? h_before(a, d, b) : nullptr; });
    if (i.unit >= H || i.b >= a.now[d].count) return;
    const int64_t at = (a.now[d].first + i.b) * a.D + d, state = (d * a.B + i.b) * H + i.unit;
    V z[G], gates[G], c = {}, p[room_for_unit<Cell>] = {};
    for (int gate = 0; gate < G; ++gate) z[gate] = {wide(a.gates[(at * G + gate) * H + i.unit])};
    for (int gate = 0; gate < recurrent.count; ++gate) z[recurrent.first + gate].x += sum[gate];
    Cell::activate(z, gates);
    if (saves_gates<Cell>(a.cells))
        for (int gate = 0; gate < G; ++gate) a.gates[(at * G + gate) * H + i.unit] = narrow<T>(gates[gate].x);
    if constexpr (has_state<Cell>) {
        const From from = source(a, d, i.b, a.now[d], a.before[d]);
        c = {from == From::before ? a.c[state] : from == From::given ? a.c_0[state] : W(0)};
    }
    if constexpr (carries_h<Cell>)
        if (const T* const h = h_before(a, d, i.b)) c = {wide(h[i.unit])};
    load_unit<Cell>(a, i, p);
    const V m = combine<Cell>(gates, c, p);
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
        [&](int64_t b) -> const T* {
            return b < a.now[d].count ? a.m + ((a.now[d].first + b) * a.D + d) * a.H : nullptr;
        });
    if (i.unit < a.R && i.b < a.now[d].count) store_h(a, i, h[0]);
}

// --- backward --------------------------------------------------------------------------------------------------------

// Does the step `after` of sequence b begin with the state of the step `now`?
template <class T>
__device__ inline bool goes_on(const StepArgs<T>& a, int64_t d, int64_t b) {
    return b < a.after[d].count && source(a, d, b, a.after[d], a.now[d]) == From::before;
}

// The states c after and before a step, and dL/dc after it. What the steps after it leave of dL/dc is in a.c.
template <class T, class Cell, class V>
__device__ inline void load_c(const StepArgs<T>& a, const Thread& i, From from, V& c, V& c_before, V& dc) {
    const int64_t d = i.d, state = (d * a.B + i.b) * a.H + i.unit;
    const int64_t at = ((a.now[d].first + i.b) * a.D + d) * a.H + i.unit;
    c = {wide(a.cells[at])};
    if (from == From::before)
        c_before = {wide(a.cells[((a.before[d].first + i.b) * a.D + d) * a.H + i.unit])};
    else if (from == From::given && a.c0)
        c_before = {wide(a.c0[state])};
    if (i.b >= a.after[d].count || goes_on(a, d, i.b)) dc = {a.c[state]};
    if (a.dc_more) dc.x += wide(a.dc_more[at]);
}

// dL/dm, m being h before W_hr, to dL/dz
template <class T, class Cell>
__device__ inline void cell_backward(const StepArgs<T>& a, const Thread& i, Wide<T> dm) {
    using W = Wide<T>;
    using V = Scalar<W, Exact>;
    constexpr int G = Cell::gates, U = Cell::unit_parameters;
    const int64_t d = i.d, H = a.H, at = (a.now[d].first + i.b) * a.D + d;
    const int64_t state = (d * a.B + i.b) * H + i.unit;
    V gates[G], dz[G], c = {}, c_before = {}, dc = {}, dc_before = {};
    V p[room_for_unit<Cell>] = {}, dp[room_for_unit<Cell>] = {};
    for (int gate = 0; gate < G; ++gate) gates[gate] = {wide(a.gates[(at * G + gate) * H + i.unit])};
    const From from = source(a, d, i.b, a.now[d], a.before[d]);
    if constexpr (has_state<Cell>) {
        load_c<T, Cell>(a, i, from, c, c_before, dc);
        dc = dc + Cell::state_gradient(gates, c, V{dm});
        if (a.d_cells) a.d_cells[at * H + i.unit] = narrow<T>(dc.x);
    }
    if constexpr (carries_h<Cell>)
        if (const T* const h = h_before(a, d, i.b)) c_before = {wide(h[i.unit])};
    load_unit<Cell>(a, i, p);
    backward<Cell>(gates, c_before, c, V{dm}, dc, dz, dc_before, p, dp);
    if (has_state<Cell> && from == From::given) a.c_0[state] = dc_before.x;
    if (carries_h<Cell> || (has_state<Cell> && from == From::before)) a.c[state] = dc_before.x;
    if (a.dm) a.dm[at * H + i.unit] = narrow<T>(dm);
    for (int u = 0; u < U; ++u) a.d_unit[(at * U + u) * H + i.unit] = narrow<T>(dp[u].x);
    for (int gate = 0; gate < G; ++gate) {
        T& out = a.dz[(at * G + gate) * H + i.unit];
        out = narrow<T>(a.add ? dz[gate].x + wide(out) : dz[gate].x);
    }
}

template <class T, class Cell>
__global__ void __launch_bounds__(step_threads, 1) step_backward(const StepArgs<T> a) {
    using W = Wide<T>;
    constexpr Slots recurrent = Cell::recurrent_gates;
    const Thread i = mine(a);
    const int64_t d = i.d, R = a.R, K = recurrent.count * a.H;
    W dh[1];
    product(
        dh, a.b_0, K, false,
        [&](int, int64_t r, int64_t k) { return r < R ? wide(a.w_hh[(d * K + k) * R + r]) : W(0); },
        [&](int64_t b) -> const T* {
            const int64_t row = (a.after[d].first + b) * a.D + d;
            return b < a.after[d].count ? a.dz + (row * Cell::gates + recurrent.first) * a.H : nullptr;
        });
    if (i.unit >= R) return;
    const int64_t state = (d * a.B + i.b) * R + i.unit, at = (a.now[d].first + i.b) * a.D + d;
    From from = From::zeros;  // of the state that the step after begins with
    if (i.b < a.after[d].count) {
        from = source(a, d, i.b, a.after[d], a.now[d]);
        if (carries_h<Cell>) dh[0] += a.c[state];
        if (from == From::given) a.dh0[state] = narrow<T>(dh[0]);
    }
    if (i.b >= a.now[d].count) return;            // its first step is behind it
    W all = from == From::before ? dh[0] : W(0);  // not 0 * infinity
    if (i.b >= a.after[d].count && a.dh_n) all = wide(a.dh_n[state]);
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
        [&](int64_t b) -> const T* {
            return b < a.now[d].count ? a.dh + ((a.now[d].first + b) * a.D + d) * a.R : nullptr;
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
        if (k < 0 || k >= T_) return {};
        const int64_t t = reverse ? T_ - 1 - k : k;
        return {first_[t], first_[t + 1] - first_[t], t};
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
    a.resets = s.resets;
    a.first_reset = s.first_reset;
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
        launch_step("step_forward", &step_forward<T, Cell>, a, s.H, count, step_shared<T>(Cell::recurrent_gates.count),
                    stream);
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
