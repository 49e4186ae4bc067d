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

#include <type_traits>

#include "persistent_backward.h"
#include "persistent_forward.h"

namespace rnnfast::cuda {

template <Number number>
using PersistentKernel = void (*)(PersistentArgs<typename NumberOf<number>::type>);

template <Number number, class Cell, bool backward, int tiles>
PersistentKernel<number> kernel_of_tiles(bool grid) {
    if constexpr (!has_layout(Cell::gates) || tiles > max_tiles(Cell::gates, backward))
        return nullptr;  // plan.cpp makes no such geometry
    else if constexpr (backward)
        return grid ? &persistent_backward<number, Cell, tiles, true>
                    : &persistent_backward<number, Cell, tiles, false>;
    else
        return grid ? &persistent_forward<number, Cell, tiles, true> : &persistent_forward<number, Cell, tiles, false>;
}

template <Number number, class Cell, bool backward>
PersistentKernel<number> persistent_kernel(const Geometry& g, bool grid) {
    const auto of_tiles = g.tiles == 1   ? &kernel_of_tiles<number, Cell, backward, 1>
                          : g.tiles == 2 ? &kernel_of_tiles<number, Cell, backward, 2>
                                         : &kernel_of_tiles<number, Cell, backward, 4>;
    return of_tiles(grid);
}

// How groups of a geometry are launched; name: of the kernel.
inline Launch launch_of(const char* name, const Geometry& g, int groups, bool grid, void* stream) {
    const auto blocks = static_cast<unsigned>(groups * g.C);
    return {name, blocks, 1, 1, g.threads(), g.shared, grid ? static_cast<int>(blocks) : g.C, grid, stream};
}

constexpr const char* persistent_name(bool backward) { return backward ? "persistent_backward" : "persistent_forward"; }

template <Number number, class Cell, bool backward>
int persistent_clusters(const Card& card, const Geometry& g) {
    const auto kernel = persistent_kernel<number, Cell, backward>(g, false);
    prepare(kernel, persistent_name(backward), card);
    return clusters_at_a_time(kernel, launch_of(persistent_name(backward), g, 1, false, nullptr));
}

template <Number number, class Cell, bool backward>
void prepare_persistent(const Card& card, const Plan& plan) {
    const bool grid = plan.kernel == Kernel::grid;
    prepare(persistent_kernel<number, Cell, backward>(plan.geometry, grid), persistent_name(backward), card);
}

// A forward or a backward sweep. The groups of a grid wait for each other's blocks, so that as many are launched at a
// time as the card holds.
template <Number number, class Cell, class Call>
void run_persistent(const Plan& plan, const Sweep& s, const Call& call, void* stream) {
    using S = typename NumberOf<number>::type;
    constexpr bool backward = std::is_same_v<Call, Backward>;
    const Geometry& g = plan.geometry;
    const bool grid = plan.kernel == Kernel::grid;
    PersistentArgs<S> a = {};
    a.set(call);
    a.g = g;
    a.steps = {s.batch_sizes ? s.offsets : nullptr, static_cast<int>(s.T), static_cast<int>(s.B)};
    a.B = static_cast<int>(s.B);
    a.H = static_cast<int>(s.H);
    a.D = static_cast<int>(s.D);
    a.aligned = s.H * static_cast<int64_t>(sizeof(S)) % 16 == 0 && reinterpret_cast<uintptr_t>(a.w_hh) % 16 == 0;
    a.exchange = static_cast<unsigned char*>(call.workspace);
    const auto kernel = persistent_kernel<number, Cell, backward>(g, grid);
    const int groups = a.D * g.slices, at_a_time = grid ? g.at_a_time : groups;
    for (a.first_group = 0; a.first_group < groups; a.first_group += at_a_time) {
        const int some = groups - a.first_group < at_a_time ? groups - a.first_group : at_a_time;
        launch(kernel, launch_of(persistent_name(backward), g, some, grid, stream), a);
    }
}

}  // namespace rnnfast::cuda
