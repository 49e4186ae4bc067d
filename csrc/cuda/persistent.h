// The persistent kernels: one launch for the whole sweep, W_hh stays in registers, only h (backward: dz) moves.
//
// A group of C blocks has 8 * tiles sequences of a direction; each block U of the units. At each step a warp multiplies
// its rows of W_hh, the stationary operand A of the tensor cores, with its part of K of h^T (dz^T), the operand B from
// shared memory. Warps that share rows split K; some of them add the parts up, each its own tile (or half), always in
// the same order. They end up with all gates of a unit in one lane (layout.h), compute the cell, and put h (dz) into
// the next operand of its own block; the block passes its columns on to the others of the group, stores what the step
// leaves behind and loads what the next one needs while the others' columns arrive. There are two operands, read and
// written in turn, so that one meeting of the group a step is enough.
#pragma once

#include "cells.h"
#include "launch.h"
#include "layout.h"

namespace rnnfast::cuda {

// The type of stored numbers, and of operands in shared memory.
template <Number number>
struct NumberOf {
    using type = float;
    using Operand = uint32_t;
};
template <>
struct NumberOf<Number::float16> {
    using type = Float16;
    using Operand = uint16_t;
};
template <>
struct NumberOf<Number::bfloat16> {
    using type = BFloat16;
    using Operand = uint16_t;
};
__device__ inline uint32_t to_operand(float x) { return tf32_bits(x); }
__device__ inline uint16_t to_operand(Float16 x) { return bits(x); }
__device__ inline uint16_t to_operand(BFloat16 x) { return bits(x); }

// Rows of a step of a direction, in the order of the forward pass; none before the first and after the last.
struct DeviceSteps {
    const int64_t* offsets;
    int T, B;

    struct Rows {
        int64_t first;
        int count;
    };
    __device__ Rows at(int k, bool reverse) const {
        if (k < 0 || k >= T) return {0, 0};
        const int t = reverse ? T - 1 - k : k;
        if (!offsets) return {int64_t(t) * B, B};
        return {offsets[t], static_cast<int>(offsets[t + 1] - offsets[t])};
    }
};

template <class S>
struct PersistentArgs {
    Geometry g;
    Kernel kernel;
    Cell cell;
    DeviceSteps steps;
    int B, H, D, first_group;  // as plan.cpp has made sure, small enough; numbers of rows are not
    unsigned char* exchange;   // g.exchanged bytes for each group, grid only
    // As in sweep.h
    S* gates;
    const S* w_hh;
    const S* h0;
    const S* c0;
    float* c;  // backward: dc
    S* cells;
    S* y;
    S* h_n;
    const S* dy;
    const S* dh_n;
    S* dz;
    S* dh0;
    S* d_cells;
    bool add;
};

// Where a thread stands.
struct Here {
    int rank, row, split, lane;  // block in its group, warp along the units, warp along K
    int group, d;                // direction
    int b_0;                     // first sequence

    template <class S>
    __device__ explicit Here(const PersistentArgs<S>& a)
        : rank(blockIdx.x % a.g.C),
          row(threadIdx.x / 32 % a.g.rows),
          split(threadIdx.x / 32 / a.g.rows),
          lane(threadIdx.x % 32),
          group(a.first_group + blockIdx.x / a.g.C),
          d(group % a.D),
          b_0(group / a.D * 8 * a.g.tiles) {}
};

// Passes a block's columns of an operand on to the other blocks of its group. unit_bytes: columns of a unit.
template <class S, int unit_bytes, int number_bytes>
class Exchange {
public:
    __device__ Exchange(const PersistentArgs<S>& a, const Here& here) : a_(a), here_(here), met_(0) {}

    // Before anything is passed on: all blocks have filled their first operand.
    __device__ void begin() const {
        sync_block();
        if (a_.kernel != Kernel::cluster) return;
        arrive_at_cluster();
        wait_for_cluster();
    }

    // After the block's own columns are in `operand`, which is number `which` of two. Ends in a state where all threads
    // of the block have passed a barrier.
    __device__ void arrive(unsigned char* operand, int which) {
        sync_block();
        const int vectors = vectors_of_block();
        if (a_.kernel == Kernel::cluster) {
            for (int i = threadIdx.x; i < (a_.g.C - 1) * vectors; i += blockDim.x) {
                const int other = i / vectors, at = place(here_.rank, i % vectors);
                unsigned char* const there = in_block(operand, other + (other >= here_.rank));
                *vector(there + at) = *vector(operand + at);
            }
            arrive_at_cluster();
        } else if (a_.kernel == Kernel::grid) {
            for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
                const int at = place(here_.rank, i);
                *vector(buffer(which) + at) = *vector(operand + at);
            }
            sync_block();
            if (threadIdx.x == 0) arrive_at(counter());
        }
    }

    // Until the others' columns are in `operand`.
    __device__ void wait(unsigned char* operand, int which) {
        if (a_.kernel == Kernel::cluster) {
            wait_for_cluster();
        } else if (a_.kernel == Kernel::grid) {
            const int vectors = vectors_of_block();
            met_ += a_.g.C;
            if (threadIdx.x == 0) wait_until(counter(), met_);
            sync_block();
            for (int i = threadIdx.x; i < (a_.g.C - 1) * vectors; i += blockDim.x) {
                const int other = i / vectors, at = place(other + (other >= here_.rank), i % vectors);
                *vector(operand + at) = load_from_others(vector(buffer(which) + at));
            }
            sync_block();
        }
    }

private:
    __device__ int per_row() const { return a_.g.U * unit_bytes / 16; }
    __device__ int vectors_of_block() const { return 8 * a_.g.tiles * per_row(); }
    __device__ int place(int rank, int i) const {
        return i / per_row() * a_.g.stride * number_bytes + (rank * per_row() + i % per_row()) * 16;
    }
    __device__ unsigned char* group() const { return a_.exchange + int64_t(here_.group) * a_.g.exchanged; }
    __device__ unsigned* counter() const { return reinterpret_cast<unsigned*>(group()); }
    __device__ unsigned char* buffer(int which) const {
        return group() + counter_bytes + which * 8 * a_.g.tiles * a_.g.stride * number_bytes;
    }
    __device__ static Vector* vector(unsigned char* p) { return reinterpret_cast<Vector*>(p); }

    const PersistentArgs<S>& a_;
    const Here& here_;
    unsigned met_;
};

// A warp's part of W_hh in registers, and its product with an operand.
template <Number number, int row_tiles, int k_steps>
struct Stationary {
    using Operand = typename NumberOf<number>::Operand;
    static constexpr int bytes = sizeof(Operand), K = k_of_step(number);
    uint32_t w[k_steps][row_tiles][4];
    int first, count;  // steps along K

    // weight(tile, row, k) is 0 outside.
    template <class Weight>
    __device__ Stationary(const Here& here, const Geometry& g, const Weight& weight) {
        const int each = (g.k_steps + g.splits - 1) / g.splits;
        first = here.split * each;
        count = g.k_steps - first < each ? g.k_steps - first : each;  // none or less for a warp that has no part
#pragma unroll
        for (int k = 0; k < k_steps; ++k)
#pragma unroll
            for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
                for (int reg = 0; reg < 4; ++reg) {
                    w[k][tile][reg] = 0;
#pragma unroll
                    for (int half = 0; half < 4 / bytes; ++half) {
                        const Place p = place_in_a(bytes, here.lane, reg * (4 / bytes) + half);
                        if (k < count)
                            w[k][tile][reg] |= static_cast<uint32_t>(weight(tile, p.row, (first + k) * K + p.column))
                                               << 16 * half;
                    }
                }
    }

    // sum[tile][n] of the 8 sequences of tile n
    template <int tiles>
    __device__ void multiply(float (&sum)[row_tiles][tiles][4], const Operand* operand, int stride, int lane) const {
#pragma unroll
        for (int k = 0; k < k_steps; ++k)
            if (k < count)
#pragma unroll
                for (int n = 0; n < tiles; ++n) {
                    uint32_t b[2];
#pragma unroll
                    for (int reg = 0; reg < 2; ++reg) {
                        const Place p = place_in_b(bytes, lane, reg * (4 / bytes));  // pairs of 16 bit lie side by side
                        const Operand* at = operand + (n * 8 + p.column) * stride + (first + k) * K + p.row;
                        b[reg] = *reinterpret_cast<const uint32_t*>(at);
                    }
#pragma unroll
                    for (int tile = 0; tile < row_tiles; ++tile) multiply_add<number>(sum[tile][n], w[k][tile], b);
                }
    }
};

// The sums of all warps that share rows: warp `split` < tiles * halves gets its values of tile split / halves. A row
// tile of 16 units has two halves of 8, so that a lane ends up with one unit of two sequences in any case.
template <int row_tiles, int tiles, int halves>
__device__ inline void add_splits(float (&total)[row_tiles * 4 / halves], const float (&sum)[row_tiles][tiles][4],
                                  float* parts, const Here& here, const Geometry& g) {
    constexpr int values = row_tiles * 4 / halves;
    const auto part = [&](int owner, int split, int value) -> float& {
        return parts[(((here.row * tiles * halves + owner) * g.splits + split) * values + value) * 32 + here.lane];
    };
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int owner = n * halves + (halves == 2 ? i / 2 : 0);
                const int value = halves == 2 ? i % 2 : tile * 4 + i;
                if (owner == here.split)
                    total[value] = sum[tile][n][i];
                else
                    part(owner, here.split, value) = sum[tile][n][i];
            }
    if (g.splits == 1) return;
    sync_block();
    if (here.split >= tiles * halves) return;
    for (int split = 0; split < g.splits; ++split)
        if (split != here.split)
#pragma unroll
            for (int value = 0; value < values; ++value) total[value] += part(here.split, split, value);
}

// Both operands zero: columns and sequences that do not exist stay so.
template <class S>
__device__ inline void clear_operands(const PersistentArgs<S>& a, unsigned char* operands, int bytes) {
    for (int i = threadIdx.x; i < 2 * 8 * a.g.tiles * a.g.stride * bytes / 4; i += blockDim.x)
        reinterpret_cast<uint32_t*>(operands)[i] = 0;
    sync_block();
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <Number number, bool is_lstm, int tiles>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_forward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    constexpr int G = is_lstm ? 4 : 1, row_tiles_ = row_tiles(is_lstm, false), halves = halves_of(is_lstm, false);
    const Geometry& g = a.g;
    const Here here(a);
    const int64_t H = a.H;
    const int d = here.d, B = a.B;
    const int unit_0 = here.rank * g.U;
    unsigned char* const memory = shared_memory();
    const int operand_size = 8 * tiles * g.stride;
    Operand* const operands = reinterpret_cast<Operand*>(memory);
    float* const parts = reinterpret_cast<float*>(operands + 2 * operand_size);

    const Stationary<number, row_tiles_, steps_of_warp(is_lstm, false)> stationary(
        here, g, [&](int tile, int row, int k) -> Operand {
            const GateRow p = is_lstm ? lstm_row(tile, row) : GateRow{0, row};
            const int unit = here.row * units_of_warp(is_lstm, false) + p.unit;
            if (unit >= g.U || unit_0 + unit >= H || k >= H) return 0;
            return to_operand(a.w_hh[((int64_t(d) * G + p.gate) * H + unit_0 + unit) * H + k]);
        });

    // This lane's unit in the block, and its two sequences in the slice: column, column + 1.
    const int own = here.row * units_of_warp(is_lstm, false) + here.lane / 4 + (halves == 2 ? 8 * (here.split % 2) : 0);
    const int column = here.split / halves * 8 + here.lane % 4 * 2;
    const int unit = unit_0 + own, b_0 = here.b_0 + column;
    const bool exists = here.split < tiles * halves && own < g.U && unit < H;

    clear_operands(a, memory, sizeof(Operand));
    if (a.h0)
        for (int64_t i = threadIdx.x; i < 8 * tiles * H; i += blockDim.x) {
            const int64_t b = here.b_0 + i / H;
            if (b < B) operands[i / H * g.stride + i % H] = to_operand(a.h0[(int64_t(d) * B + b) * H + i % H]);
        }
    S h[2];
    float c[2], z[2][G];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int b = b_0 + e;
        const int64_t state = (int64_t(d) * B + b) * H + unit;
        const bool given = exists && b < B;
        h[e] = given && a.h0 ? a.h0[state] : narrow<S>(0.f);
        c[e] = is_lstm && given ? a.c[state] : 0.f;
    }
    const auto load = [&](const DeviceSteps::Rows& rows) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int b = b_0 + e;
            if (!exists || b >= rows.count) continue;
#pragma unroll
            for (int gate = 0; gate < G; ++gate)
                z[e][gate] = wide(a.gates[(((rows.first + b) * a.D + d) * G + gate) * H + unit]);
        }
    };
    Exchange<S, sizeof(Operand), sizeof(Operand)> exchange(a, here);
    exchange.begin();

    DeviceSteps::Rows now = a.steps.at(0, d);
    load(now);
    int which = 0;
    for (int k = 0; k < a.steps.T; ++k) {
        const bool runs = now.count > here.b_0;  // the same for all of the group
        Operand* const next = operands + (which ^ 1) * operand_size;
        if (runs) {
            float sum[row_tiles_][tiles][4] = {}, total[row_tiles_ * 4 / halves];
            stationary.multiply(sum, operands + which * operand_size, g.stride, here.lane);
            add_splits<row_tiles_, tiles, halves>(total, sum, parts, here, g);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (!exists) continue;
                if (b_0 + e < now.count) {
#pragma unroll
                    for (int gate = 0; gate < G; ++gate)
                        z[e][gate] += is_lstm ? total[lstm_tile(gate) * 4 + lstm_element(gate, e)] : total[e];
                    if constexpr (is_lstm)
                        h[e] = narrow<S>(lstm(z[e], c[e]));
                    else
                        h[e] = narrow<S>(elman(a.cell, z[e][0]));
                }
                next[(column + e) * g.stride + unit] = to_operand(h[e]);
            }
            exchange.arrive(reinterpret_cast<unsigned char*>(next), which ^ 1);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int b = b_0 + e;
                if (!exists || b >= now.count) continue;
                const int64_t at = (now.first + b) * a.D + d;
                if constexpr (is_lstm) {
#pragma unroll
                    for (int gate = 0; gate < G; ++gate) a.gates[(at * G + gate) * H + unit] = narrow<S>(z[e][gate]);
                    if (a.cells) a.cells[at * H + unit] = narrow<S>(c[e]);
                }
                a.y[at * H + unit] = h[e];
            }
        }
        now = a.steps.at(k + 1, d);
        load(now);
        if (runs) {
            exchange.wait(reinterpret_cast<unsigned char*>(next), which ^ 1);
            which ^= 1;
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int b = b_0 + e;
        const int64_t state = (int64_t(d) * B + b) * H + unit;
        if (!exists || b >= B) continue;
        a.h_n[state] = h[e];
        if (is_lstm) a.c[state] = c[e];
    }
}

// --- backward --------------------------------------------------------------------------------------------------------

template <Number number, bool is_lstm, int tiles>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_backward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    constexpr int G = is_lstm ? 4 : 1, halves = halves_of(is_lstm, true);
    const Geometry& g = a.g;
    const Here here(a);
    const int64_t H = a.H;
    const int d = here.d, B = a.B;
    const int unit_0 = here.rank * g.U;
    unsigned char* const memory = shared_memory();
    const int operand_size = 8 * tiles * g.stride;
    Operand* const operands = reinterpret_cast<Operand*>(memory);
    float* const parts = reinterpret_cast<float*>(operands + 2 * operand_size);

    const Stationary<number, 1, steps_of_warp(is_lstm, true)> stationary(
        here, g, [&](int, int row, int k) -> Operand {  // of W_hh^T
            const int unit = here.row * units_of_warp(is_lstm, true) + row;
            const GateColumn p = dz_column(G, g.U, k);
            if (unit >= g.U || unit_0 + unit >= H || p.unit >= H) return 0;
            return to_operand(a.w_hh[((int64_t(d) * G + p.gate) * H + p.unit) * H + unit_0 + unit]);
        });

    // This lane's unit in the block, and its two sequences in the slice: column, column + 1.
    const int own = here.row * units_of_warp(is_lstm, true) + here.lane / 4 + (halves == 2 ? 8 * (here.split % 2) : 0);
    const int column = here.split / halves * 8 + here.lane % 4 * 2;
    const int unit = unit_0 + own, b_0 = here.b_0 + column;
    const bool exists = here.split < tiles * halves && own < g.U && unit < H;

    clear_operands(a, memory, sizeof(Operand));
    // What a step needs, loaded while the step before it meets the group.
    float dc[2], gates[2][G], c[2], c_before[2], dy[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int b = b_0 + e;
        dc[e] = is_lstm && exists && b < B ? a.c[(int64_t(d) * B + b) * H + unit] : 0.f;
    }
    const auto load = [&](const DeviceSteps::Rows& rows, const DeviceSteps::Rows& before) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int b = b_0 + e;
            if (!exists || b >= rows.count) continue;
            const int64_t at = (rows.first + b) * a.D + d;
#pragma unroll
            for (int gate = 0; gate < G; ++gate) gates[e][gate] = wide(a.gates[(at * G + gate) * H + unit]);
            dy[e] = a.dy ? wide(a.dy[at * H + unit]) : 0.f;
            if constexpr (is_lstm) {
                c[e] = wide(a.cells[at * H + unit]);
                c_before[e] = a.c0 ? wide(a.c0[(int64_t(d) * B + b) * H + unit]) : 0.f;
                if (b < before.count) c_before[e] = wide(a.cells[((before.first + b) * a.D + d) * H + unit]);
            }
        }
    };
    Exchange<S, G * sizeof(Operand), sizeof(Operand)> exchange(a, here);
    exchange.begin();

    DeviceSteps::Rows now = a.steps.at(a.steps.T - 1, d), after = {0, 0};
    load(now, a.steps.at(a.steps.T - 2, d));
    int which = 0;
    for (int k = a.steps.T - 1; k >= -1; --k) {                                    // the last one is for dh0 alone
        const bool follows = after.count > here.b_0, runs = now.count > here.b_0;  // the same for all of the group
        Operand* const next = operands + (which ^ 1) * operand_size;
        float total[4 / halves] = {};
        if (follows) {
            float sum[1][tiles][4] = {};
            stationary.multiply(sum, operands + which * operand_size, g.stride, here.lane);
            add_splits<1, tiles, halves>(total, sum, parts, here, g);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int b = b_0 + e;
            const int64_t state = (int64_t(d) * B + b) * H + unit;
            if (!exists) continue;
            if (b >= now.count) {  // its first step is behind it
                if (b < after.count) a.dh0[state] = narrow<S>(total[e]);
                continue;
            }
            float dh = total[e];
            if (b >= after.count) dh = a.dh_n ? wide(a.dh_n[state]) : 0.f;  // not 0 * infinity
            dh += dy[e];
            if constexpr (is_lstm)
                c[e] = lstm_backward(gates[e], c[e], c_before[e], dh, dc[e]);  // from here on dL/dc_t
            else
                gates[e][0] = elman_backward(a.cell, gates[e][0], dh);
            const int64_t at = (now.first + b) * a.D + d;
#pragma unroll
            for (int gate = 0; gate < G; ++gate) {  // from here on dL/dz
                if (a.add) gates[e][gate] += wide(a.dz[(at * G + gate) * H + unit]);
                next[(column + e) * g.stride + (here.rank * G + gate) * g.U + own] =
                    to_operand(narrow<S>(gates[e][gate]));
            }
        }
        if (runs) {
            exchange.arrive(reinterpret_cast<unsigned char*>(next), which ^ 1);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int b = b_0 + e;
                if (!exists || b >= now.count) continue;
                const int64_t at = (now.first + b) * a.D + d;
#pragma unroll
                for (int gate = 0; gate < G; ++gate) a.dz[(at * G + gate) * H + unit] = narrow<S>(gates[e][gate]);
                if (is_lstm && a.d_cells) a.d_cells[at * H + unit] = narrow<S>(c[e]);
            }
        }
        after = now;
        now = a.steps.at(k - 1, d);
        load(now, a.steps.at(k - 2, d));
        if (runs) {
            exchange.wait(reinterpret_cast<unsigned char*>(next), which ^ 1);
            which ^= 1;
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int b = b_0 + e;
        if (is_lstm && exists && b < B) a.c[(int64_t(d) * B + b) * H + unit] = dc[e];
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class S>
PersistentArgs<S> persistent_args(const Plan& plan, const Sweep& s, void* workspace) {
    PersistentArgs<S> a = {};
    a.g = plan.geometry;
    a.kernel = plan.kernel;
    a.cell = s.cell;
    a.steps = {s.batch_sizes ? s.offsets : nullptr, static_cast<int>(s.T), static_cast<int>(s.B)};
    a.B = static_cast<int>(s.B);
    a.H = static_cast<int>(s.H);
    a.D = static_cast<int>(s.D);
    a.exchange = static_cast<unsigned char*>(workspace);
    return a;
}

// The groups of a grid wait for each other's blocks, so that as many are launched at a time as the card holds.
template <class S>
void launch_groups(const char* name, void (*kernel)(PersistentArgs<S>), const Plan& plan, PersistentArgs<S> a,
                   int multiprocessors, void* stream) {
    const Geometry& g = plan.geometry;
    const bool grid = plan.kernel == Kernel::grid;
    const int groups = a.D * g.slices;
    const int at_a_time = grid ? multiprocessors / g.C : groups;
    for (a.first_group = 0; a.first_group < groups; a.first_group += at_a_time) {
        const int some = groups - a.first_group < at_a_time ? groups - a.first_group : at_a_time;
        const auto blocks = static_cast<unsigned>(some * g.C);
        launch(kernel, {name, blocks, 1, 1, g.threads(), g.shared, grid ? static_cast<int>(blocks) : g.C, grid, stream},
               a);
    }
}

template <Number number, bool is_lstm>
void forward_persistent(const Plan& plan, const Sweep& s, const Forward& call, void* stream) {
    using S = typename NumberOf<number>::type;
    PersistentArgs<S> a = persistent_args<S>(plan, s, call.workspace);
    a.gates = static_cast<S*>(call.gates);
    a.w_hh = static_cast<const S*>(call.w_hh);
    a.h0 = static_cast<const S*>(call.h0);
    a.c = static_cast<float*>(call.c);
    a.cells = static_cast<S*>(call.cells);
    a.y = static_cast<S*>(call.y);
    a.h_n = static_cast<S*>(call.h_n);
    const auto kernel = plan.geometry.tiles == 1 ? &persistent_forward<number, is_lstm, 1>
                                                 : &persistent_forward<number, is_lstm, max_tiles>;
    launch_groups("persistent_forward", kernel, plan, a, plan.multiprocessors, stream);
}

template <Number number, bool is_lstm>
void backward_persistent(const Plan& plan, const Sweep& s, const Backward& call, void* stream) {
    using S = typename NumberOf<number>::type;
    PersistentArgs<S> a = persistent_args<S>(plan, s, call.workspace);
    a.gates = static_cast<S*>(const_cast<void*>(call.gates));
    a.cells = static_cast<S*>(const_cast<void*>(call.cells));
    a.w_hh = static_cast<const S*>(call.w_hh);
    a.c0 = static_cast<const S*>(call.c0);
    a.dy = static_cast<const S*>(call.dy);
    a.dh_n = static_cast<const S*>(call.dh_n);
    a.c = static_cast<float*>(call.dc);
    a.dz = static_cast<S*>(call.dz);
    a.dh0 = static_cast<S*>(call.dh0);
    a.d_cells = static_cast<S*>(call.d_cells);
    a.add = call.add;
    const auto kernel = plan.geometry.tiles == 1 ? &persistent_backward<number, is_lstm, 1>
                                                 : &persistent_backward<number, is_lstm, max_tiles>;
    launch_groups("persistent_backward", kernel, plan, a, plan.multiprocessors, stream);
}

}  // namespace rnnfast::cuda
