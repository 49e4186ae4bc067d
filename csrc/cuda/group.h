// A group of the persistent kernels: its arguments, its rows, and who of its threads has what.
#pragma once

#include "arrays.h"
#include "launch.h"

namespace rnnfast::cuda {

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
struct PersistentArgs : Arrays<S> {
    Geometry g;
    DeviceSteps steps;
    int B, H, D, first_group;  // as plan.cpp has made sure, small enough; numbers of rows are not
    unsigned char* exchange;   // g.exchanged bytes for each group, grid only
    bool aligned;              // do rows of w_hh begin at multiples of 16 bytes?
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

// The unit of a lane and its 2 * owned sequences.
template <int gates, bool backward, int tiles>
struct Mine {
    static constexpr int halves = halves_of(gates, backward), owned = owned_by_warp(gates, tiles), count = 2 * owned;
    int own, unit;      // in the block, in the layer
    int column, first;  // of the first sequence: in the slice, in the batch
    bool exists;

    template <class S>
    __device__ Mine(const PersistentArgs<S>& a, const Here& here)
        : own(here.row * units_of_warp(gates, backward) + here.lane / 4 + (halves == 2 ? 8 * (here.split % 2) : 0)),
          unit(here.rank * a.g.U + own),
          column(here.split / halves * 8 + here.lane % 4 * 2),
          first(here.b_0 + column),
          exists(here.split < finishers(gates, backward, tiles) && own < a.g.U && unit < a.H) {}
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

}  // namespace rnnfast::cuda
