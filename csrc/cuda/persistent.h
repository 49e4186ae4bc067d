// The persistent kernels: one launch for the whole sweep, W_hh stays in registers, only h (backward: dz) moves.
//
// A group of C blocks has 8 * tiles sequences of a direction; each block U of the units. At each step a warp multiplies
// its rows of W_hh, the stationary operand A of the tensor cores, with its part of K of h^T (dz^T), the operand B from
// shared memory. Warps that share rows split K; some of them add the parts up, each its own tile (or half), always in
// the same order. They end up with all gates of a unit in one lane (layout.h), compute the cell, and put h (dz) into
// the next operand of its own block; the block passes its columns on to the others of the group, stores what the step
// leaves behind while the others' columns arrive. What the next step needs is asked for when a step begins. In a
// cluster there are two operands, read and written in turn, so that one meeting of the group a step is enough; a grid
// has its two in global memory.
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
// 16 bytes of stored numbers as operands.
__device__ inline Vector to_operands(const Vector& v, float) {
    Vector operands;
#pragma unroll
    for (int i = 0; i < 4; ++i) operands.x[i] = tf32_bits(float_of(v.x[i]));
    return operands;
}
template <class S>
__device__ inline Vector to_operands(const Vector& v, S) {
    return v;
}

// 16 bytes of stored numbers.
__device__ inline Vector packed(const float (&some)[4]) {
    return {{bits_of(some[0]), bits_of(some[1]), bits_of(some[2]), bits_of(some[3])}};
}
template <class S>
__device__ inline Vector packed(const S (&some)[8]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.x[i] = bits(some[2 * i]) | static_cast<uint32_t>(bits(some[2 * i + 1])) << 16;
    return v;
}

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
    bool aligned;  // do rows of w_hh begin at multiples of 16 bytes?
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
template <class S, int unit_bytes, int number_bytes, bool grid>
class Exchange {
public:
    __device__ Exchange(const PersistentArgs<S>& a, const Here& here) : a_(a), here_(here), met_(0) {
        // Threads go through the vectors of a block's columns; those that are left do so for other blocks at the same
        // time. All divisions are made here.
        const int threads = blockDim.x, thread = threadIdx.x, per_row = a.g.U * unit_bytes / 16;
        vectors_ = 8 * a.g.tiles * per_row;
        step_ = vectors_ < threads ? vectors_ : threads;
        teams_ = threads / step_;
        team_ = thread / step_;
        vector_ = team_ < teams_ ? thread % step_ : vectors_;  // no part for what is left of the threads
        block_bytes_ = per_row * 16;
        row_bytes_ = a.g.stride * number_bytes;
        per_row_ = per_row;
        at_ = place(vector_);
    }

    // Before anything is passed on: all blocks have filled their first operand.
    __device__ void begin() const {
        sync_block();
        if (grid || a_.g.C == 1) return;
        arrive_at_cluster();
        wait_for_cluster();
    }

    // After the block's own columns are in `operand`, which is number `which` of two. Ends in a state where all threads
    // of the block have passed a barrier.
    __device__ void arrive(unsigned char* operand, int which) {
        sync_block();
        const int own = here_.rank * block_bytes_;
        if (grid) {
            for (int i = threadIdx.x; i < vectors_; i += blockDim.x) {
                const int at = own + (i == vector_ ? at_ : place(i));
                store_vector(vector(buffer(which) + at), load_vector(vector(operand + at)));
            }
            sync_block();
            if (threadIdx.x == 0) arrive_at(counter());
        } else if (a_.g.C > 1) {
            for (int i = vector_; i < vectors_; i += step_) {
                Vector* const at = vector(operand + own + (i == vector_ ? at_ : place(i)));
                const Vector mine = load_vector(at);
                for (int other = team_; other < a_.g.C; other += teams_)
                    if (other != here_.rank) store_in_block(at, other, mine);
            }
            arrive_at_cluster();
        }
    }

    // Until the others' columns are in `operand`.
    __device__ void wait(unsigned char* operand, int which) {
        if (grid) {
            met_ += a_.g.C;
            if (threadIdx.x == 0) wait_until(counter(), met_);
            sync_block();
            gather(operand, buffer(which));
            sync_block();
        } else if (a_.g.C > 1) {
            wait_for_cluster();
        }
    }

private:
    // As many loads at a time as hide their way from L2.
    __device__ void gather(unsigned char* operand, unsigned char* from) const {
        constexpr int batch = 4;
        for (int i = vector_; i < vectors_; i += step_) {
            const int at = i == vector_ ? at_ : place(i);
            for (int first = team_; first < a_.g.C; first += batch * teams_) {
                Vector some[batch];
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const int other = first + j * teams_;
                    if (other < a_.g.C) some[j] = load_from_others(vector(from + at + other * block_bytes_));
                }
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const int other = first + j * teams_;
                    if (other < a_.g.C) store_vector(vector(operand + at + other * block_bytes_), some[j]);
                }
            }
        }
    }

    // Bytes from the first column of a block in an operand to vector i of the block.
    __device__ int place(int i) const { return i / per_row_ * row_bytes_ + i % per_row_ * 16; }
    __device__ unsigned char* group() const { return a_.exchange + int64_t(here_.group) * a_.g.exchanged; }
    __device__ unsigned* counter() const { return reinterpret_cast<unsigned*>(group()); }
    __device__ unsigned char* buffer(int which) const {
        return group() + counter_bytes + which * 8 * a_.g.tiles * row_bytes_;
    }
    __device__ static Vector* vector(unsigned char* p) { return reinterpret_cast<Vector*>(p); }

    const PersistentArgs<S>& a_;
    const Here& here_;
    unsigned met_;
    int vectors_, per_row_, block_bytes_, row_bytes_;  // of a block's columns, of these in a row of the operand
    int vector_, step_, team_, teams_, at_;            // which of them this thread has, for which blocks
};

// A warp's part of W_hh in registers, and its product with an operand.
template <Number number, int row_tiles, int k_steps>
struct Stationary {
    using Operand = typename NumberOf<number>::Operand;
    static constexpr int K = k_of_step(number), per_vector = 16 / sizeof(Operand);
    uint32_t w[k_steps][row_tiles][4];
    int first, count;  // column, steps along K; a multiple of k_batch

    // weights(tile, row, column): per_vector weights from a column on, as operands; 0 where there are none.
    template <class Weights>
    __device__ Stationary(const Here& here, const Geometry& g, const Weights& weights)
        : first(here.split * g.k_steps * K + here.lane % 4 * per_vector), count(g.k_steps) {
#pragma unroll
        for (int k = 0; k < k_steps; k += 2)
#pragma unroll
            for (int tile = 0; tile < row_tiles; ++tile) {
                Vector rows[2] = {};
                if (k < count)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        rows[half] = weights(tile, here.lane / 4 + 8 * half, first + k * K);
#pragma unroll
                for (int step = 0; step < 2; ++step)
#pragma unroll
                    for (int reg = 0; reg < 4; ++reg)
                        w[k + step][tile][reg] = rows[lower_rows(reg)].x[word_of_register(step, reg)];
            }
    }

    // sum[tile][n] of the 8 sequences of tile n. One product waits for the one before with the same sum: where there is
    // one sum only, two are made of it.
    template <int tiles>
    __device__ void multiply(float (&sum)[row_tiles][tiles][4], const Operand* operand, int stride, int lane) const {
        constexpr int chains = row_tiles * tiles == 1 ? 2 : 1, batch = tiles == 4 ? 2 : k_batch;  // registers are few
        float part[chains][row_tiles][tiles][4] = {};
        const Operand* const row = operand + lane / 4 * stride + first;
#pragma unroll
        for (int k = 0; k < k_steps; k += batch)
            if (k < count) {
                Vector b[batch / 2][tiles];
#pragma unroll
                for (int pair = 0; pair < batch / 2; ++pair)
#pragma unroll
                    for (int n = 0; n < tiles; ++n)
                        b[pair][n] =
                            load_vector(reinterpret_cast<const Vector*>(row + n * 8 * stride + (k + 2 * pair) * K));
#pragma unroll
                for (int i = 0; i < batch; ++i)
#pragma unroll
                    for (int n = 0; n < tiles; ++n) {
                        const uint32_t (&x)[4] = b[i / 2][n].x;
                        const uint32_t both[2] = {x[2 * (i % 2)], x[2 * (i % 2) + 1]};
#pragma unroll
                        for (int tile = 0; tile < row_tiles; ++tile)
                            multiply_add<number>(part[i % chains][tile][n], w[k + i][tile], both);
                    }
            }
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
            for (int n = 0; n < tiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sum[tile][n][i] = part[0][tile][n][i] + (chains == 2 ? part[chains - 1][tile][n][i] : 0.f);
    }
};

// The sums of all warps that share rows: warp `split` of the first few gets those of part split, split + finishers, ...
// of all tiles and halves. A row tile of 16 units has two halves of 8, so that a lane ends up with one unit in any
// case. After it no warp reads the operand any more.
template <int row_tiles, int tiles, int halves, int owned, bool always_sync>
__device__ inline void add_splits(float (&total)[owned][row_tiles * 4 / halves],
                                  const float (&sum)[row_tiles][tiles][4], float* parts, const Here& here,
                                  const Geometry& g) {
    constexpr int values = row_tiles * 4 / halves, all = tiles * halves, finishers = all / owned;
    const auto part = [&](int one, int split, int value) -> float& {
        return parts[(((here.row * all + one) * g.splits + split) * values + value) * 32 + here.lane];
    };
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int one = n * halves + (halves == 2 ? i / 2 : 0);
                const int value = halves == 2 ? i % 2 : tile * 4 + i;
                if (one % finishers == here.split)
                    total[one / finishers][value] = sum[tile][n][i];
                else
                    part(one, here.split, value) = sum[tile][n][i];
            }
    if (g.splits > 1 || always_sync) sync_block();
    if (here.split >= finishers) return;
    for (int split = 0; split < g.splits; ++split)
        if (split != here.split)
#pragma unroll
            for (int j = 0; j < owned; ++j)
#pragma unroll
                for (int value = 0; value < values; ++value)
                    total[j][value] += part(here.split + j * finishers, split, value);
}

// The unit of a lane and its 2 * owned sequences.
template <bool is_lstm, bool backward, int tiles>
struct Mine {
    static constexpr int halves = halves_of(is_lstm, backward), owned = owned_by_warp(is_lstm, tiles),
                         count = 2 * owned;
    int own, unit;      // in the block, in the layer
    int column, first;  // of the first sequence: in the slice, in the batch
    bool exists;

    template <class S>
    __device__ Mine(const PersistentArgs<S>& a, const Here& here)
        : own(here.row * units_of_warp(is_lstm, backward) + here.lane / 4 + (halves == 2 ? 8 * (here.split % 2) : 0)),
          unit(here.rank * a.g.U + own),
          column(here.split / halves * 8 + here.lane % 4 * 2),
          first(here.b_0 + column),
          exists(here.split < finishers(is_lstm, backward, tiles) && own < a.g.U && unit < a.H) {}
    // From the first sequence to number e.
    __device__ static constexpr int offset(int e) { return e / 2 * (8 * tiles / owned) + e % 2; }
};

// Are registers too few to hold what the next step needs while this one multiplies?
RNNFAST_BOTH constexpr bool late_loads(int tiles) { return tiles == 4; }

// All operands zero: columns and sequences that do not exist stay so.
__device__ inline void clear(unsigned char* operands, int bytes) {
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
        store_vector(reinterpret_cast<Vector*>(operands) + i, Vector{});
    sync_block();
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <Number number, bool is_lstm, int tiles, bool grid>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_forward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    using Lane = Mine<is_lstm, false, tiles>;
    constexpr int G = is_lstm ? 4 : 1, row_tiles_ = row_tiles(is_lstm, false), count = Lane::count;
    constexpr int per_vector = 16 / sizeof(S);
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
        const GateRow p = is_lstm ? lstm_row(tile, row) : GateRow{0, row};
        const int own = here.row * units_of_warp(is_lstm, false) + p.unit, unit = here.rank * g.U + own;
        return own < g.U && unit < H ? a.w_hh + ((int64_t(d) * G + p.gate) * H + unit) * H : nullptr;
    };
    const Stationary<number, row_tiles_, steps_of_warp(is_lstm, false)> stationary(
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
    float c[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        const int64_t state = (int64_t(d) * B + b) * H + my.unit;
        const bool given = my.exists && b < B;
        h[e] = given && a.h0 ? a.h0[state] : narrow<S>(0.f);
        c[e] = is_lstm && given ? a.c[state] : 0.f;
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
        float z[count][G];
#pragma unroll
        for (int e = 0; e < count; ++e)
#pragma unroll
            for (int gate = 0; gate < G; ++gate) z[e][gate] = wide(next_z[e][gate]);
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
                for (int gate = 0; gate < G; ++gate)
                    z[e][gate] +=
                        is_lstm ? total[e / 2][lstm_tile(gate) * 4 + lstm_element(gate, e % 2)] : total[e / 2][e % 2];
                // computed in any case, so that the sequences of a lane do not wait for each other
                float c_t = c[e], h_t;
                if constexpr (is_lstm)
                    h_t = lstm<Fast>(z[e], c_t);
                else
                    h_t = elman<Fast>(a.cell, z[e][0]);
                c[e] = goes_on ? c_t : c[e];
                h[e] = goes_on ? narrow<S>(h_t) : h[e];
                next[(my.column + my.offset(e)) * g.stride + my.unit] = to_operand(h[e]);
            }
            exchange.arrive(reinterpret_cast<unsigned char*>(next), which ^ 1);
#pragma unroll
            for (int e = 0; e < count; ++e) {
                const int b = my.first + my.offset(e);
                if (!my.exists || b >= now.count) continue;
                const int64_t at = (now.first + b) * a.D + d;
                if (is_lstm && a.cells) {
#pragma unroll
                    for (int gate = 0; gate < G; ++gate) a.gates[(at * G + gate) * H + my.unit] = narrow<S>(z[e][gate]);
                    a.cells[at * H + my.unit] = narrow<S>(c[e]);
                }
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
        if (is_lstm) a.c[state] = c[e];
    }
}

// --- backward --------------------------------------------------------------------------------------------------------

template <Number number, bool is_lstm, int tiles, bool grid>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_backward(const PersistentArgs<typename NumberOf<number>::type> a) {
    using S = typename NumberOf<number>::type;
    using Operand = typename NumberOf<number>::Operand;
    using Lane = Mine<is_lstm, true, tiles>;
    constexpr int G = is_lstm ? 4 : 1, count = Lane::count, per_vector = 16 / sizeof(S);
    const Geometry& g = a.g;
    const Here here(a);
    const Lane my(a, here);
    const int64_t H = a.H;
    const int d = here.d, B = a.B;
    unsigned char* const memory = shared_memory();
    const int operand_size = 8 * tiles * g.stride, other_operand = grid ? 0 : operand_size;
    Operand* const operands = reinterpret_cast<Operand*>(memory);
    float* const parts = reinterpret_cast<float*>(operands + operand_size + other_operand);

    const Stationary<number, 1, steps_of_warp(is_lstm, true)> stationary(
        here, g, [&](int, int row, int k) -> Vector {  // of W_hh^T: one column of W_hh, consecutive units of a gate
            const int own = here.row * units_of_warp(is_lstm, true) + row, unit = here.rank * g.U + own;
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
    float dc[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const int b = my.first + my.offset(e);
        dc[e] = is_lstm && my.exists && b < B ? a.c[(int64_t(d) * B + b) * H + my.unit] : 0.f;
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
            if constexpr (is_lstm) {
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
        float gates[count][G], c[count], c_before[count], dy[count];
#pragma unroll
        for (int e = 0; e < count; ++e) {
#pragma unroll
            for (int gate = 0; gate < G; ++gate) gates[e][gate] = wide(loaded[e].gates[gate]);
            dy[e] = wide(loaded[e].dy);
            if constexpr (is_lstm) {
                c[e] = wide(loaded[e].c);
                c_before[e] = wide(loaded[e].c_before);
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
            float dh = total[e / 2][e % 2], dc_t = dc[e];
            if (went_on && !goes_on) a.dh0[state] = narrow<S>(dh);             // its first step is behind it
            if (!went_on) dh = goes_on && a.dh_n ? wide(a.dh_n[state]) : 0.f;  // not 0 * infinity
            dh += dy[e];
            // computed in any case, so that the sequences of a lane do not wait for each other
            if constexpr (is_lstm)
                c[e] = lstm_backward<Fast>(gates[e], c[e], c_before[e], dh, dc_t);  // from here on dL/dc_t
            else
                gates[e][0] = elman_backward(a.cell, gates[e][0], dh);
            dc[e] = goes_on ? dc_t : dc[e];
            if (!goes_on) continue;
            const int64_t at = (now.first + b) * a.D + d;
#pragma unroll
            for (int gate = 0; gate < G; ++gate) {  // from here on dL/dz
                if (a.add) gates[e][gate] += wide(a.dz[(at * G + gate) * H + my.unit]);
                next[(my.column + my.offset(e)) * g.stride + (here.rank * G + gate) * g.U + my.own] =
                    to_operand(narrow<S>(gates[e][gate]));
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
                for (int gate = 0; gate < G; ++gate) a.dz[(at * G + gate) * H + my.unit] = narrow<S>(gates[e][gate]);
                if (is_lstm && a.d_cells) a.d_cells[at * H + my.unit] = narrow<S>(c[e]);
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
        if (is_lstm && my.exists && b < B) a.c[(int64_t(d) * B + b) * H + my.unit] = dc[e];
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <Number number>
using PersistentKernel = void (*)(PersistentArgs<typename NumberOf<number>::type>);

template <Number number, bool is_lstm, bool backward, int tiles>
PersistentKernel<number> kernel_of_tiles(bool grid) {
    if constexpr (tiles > max_tiles(is_lstm, backward))
        return nullptr;  // plan.cpp makes no such geometry
    else if constexpr (backward)
        return grid ? &persistent_backward<number, is_lstm, tiles, true>
                    : &persistent_backward<number, is_lstm, tiles, false>;
    else
        return grid ? &persistent_forward<number, is_lstm, tiles, true>
                    : &persistent_forward<number, is_lstm, tiles, false>;
}

template <Number number, bool is_lstm, bool backward>
PersistentKernel<number> persistent_kernel(const Geometry& g, bool grid) {
    const auto of_tiles = g.tiles == 1   ? &kernel_of_tiles<number, is_lstm, backward, 1>
                          : g.tiles == 2 ? &kernel_of_tiles<number, is_lstm, backward, 2>
                                         : &kernel_of_tiles<number, is_lstm, backward, 4>;
    return of_tiles(grid);
}

// How groups of a geometry are launched; name: of the kernel.
inline Launch launch_of(const char* name, const Geometry& g, int groups, bool grid, void* stream) {
    const auto blocks = static_cast<unsigned>(groups * g.C);
    return {name, blocks, 1, 1, g.threads(), g.shared, grid ? static_cast<int>(blocks) : g.C, grid, stream};
}

constexpr const char* persistent_name(bool backward) { return backward ? "persistent_backward" : "persistent_forward"; }

template <Number number, bool is_lstm, bool backward>
int persistent_clusters(const Card& card, const Geometry& g) {
    const auto kernel = persistent_kernel<number, is_lstm, backward>(g, false);
    prepare(kernel, persistent_name(backward), card);
    return clusters_at_a_time(kernel, launch_of(persistent_name(backward), g, 1, false, nullptr));
}

template <Number number, bool is_lstm, bool backward>
void prepare_persistent(const Card& card, const Plan& plan) {
    const bool grid = plan.kernel == Kernel::grid;
    prepare(persistent_kernel<number, is_lstm, backward>(plan.geometry, grid), persistent_name(backward), card);
}

template <class S>
PersistentArgs<S> persistent_args(const Plan& plan, const Sweep& s, const void* w_hh, void* workspace) {
    PersistentArgs<S> a = {};
    a.g = plan.geometry;
    a.cell = s.cell;
    a.steps = {s.batch_sizes ? s.offsets : nullptr, static_cast<int>(s.T), static_cast<int>(s.B)};
    a.B = static_cast<int>(s.B);
    a.H = static_cast<int>(s.H);
    a.D = static_cast<int>(s.D);
    a.w_hh = static_cast<const S*>(w_hh);
    a.aligned = s.H * static_cast<int64_t>(sizeof(S)) % 16 == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
    a.exchange = static_cast<unsigned char*>(workspace);
    return a;
}

// The groups of a grid wait for each other's blocks, so that as many are launched at a time as the card holds.
template <Number number, bool is_lstm, bool backward, class S>
void launch_groups(const Plan& plan, PersistentArgs<S> a, void* stream) {
    const Geometry& g = plan.geometry;
    const bool grid = plan.kernel == Kernel::grid;
    const auto kernel = persistent_kernel<number, is_lstm, backward>(g, grid);
    const int groups = a.D * g.slices, at_a_time = grid ? g.at_a_time : groups;
    for (a.first_group = 0; a.first_group < groups; a.first_group += at_a_time) {
        const int some = groups - a.first_group < at_a_time ? groups - a.first_group : at_a_time;
        launch(kernel, launch_of(persistent_name(backward), g, some, grid, stream), a);
    }
}

template <Number number, bool is_lstm>
void forward_persistent(const Plan& plan, const Sweep& s, const Forward& call, void* stream) {
    using S = typename NumberOf<number>::type;
    PersistentArgs<S> a = persistent_args<S>(plan, s, call.w_hh, call.workspace);
    a.gates = static_cast<S*>(call.gates);
    a.h0 = static_cast<const S*>(call.h0);
    a.c = static_cast<float*>(call.c);
    a.cells = static_cast<S*>(call.cells);
    a.y = static_cast<S*>(call.y);
    a.h_n = static_cast<S*>(call.h_n);
    launch_groups<number, is_lstm, false>(plan, a, stream);
}

template <Number number, bool is_lstm>
void backward_persistent(const Plan& plan, const Sweep& s, const Backward& call, void* stream) {
    using S = typename NumberOf<number>::type;
    PersistentArgs<S> a = persistent_args<S>(plan, s, call.w_hh, call.workspace);
    a.gates = static_cast<S*>(const_cast<void*>(call.gates));
    a.cells = static_cast<S*>(const_cast<void*>(call.cells));
    a.c0 = static_cast<const S*>(call.c0);
    a.dy = static_cast<const S*>(call.dy);
    a.dh_n = static_cast<const S*>(call.dh_n);
    a.c = static_cast<float*>(call.dc);
    a.dz = static_cast<S*>(call.dz);
    a.dh0 = static_cast<S*>(call.dh0);
    a.d_cells = static_cast<S*>(call.d_cells);
    a.add = call.add;
    launch_groups<number, is_lstm, true>(plan, a, stream);
}

}  // namespace rnnfast::cuda
