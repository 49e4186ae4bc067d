// How the threads of one call share the work of a layer.
#pragma once

#include "../../rnnfast.h"
#include "../kernels.h"
#include "machine.h"
#include "threads.h"

namespace rnnfast {

// Teams of threads run the directions side by side; in a team, `row_groups` groups take a part of the batch each, and
// in a group `splits` threads take a part of the hidden units each, with a barrier every step.
struct Plan {
    int directions = 1;
    int row_groups = 1;
    int splits = 1;

    int threads() const { return directions * row_groups * splits; }
    // Does any thread need what another one has written: within a layer, or between two layers.
    bool exchanges(int64_t D) const { return splits > 1 || (D > 1 && directions > 1); }
};

// A step of the one needs h of all units of the step before, of the other dz of all their gates.
enum class Sweep { forward, backward };

// `lanes` and `costs` as in Kernels.
Plan choose_plan(const Shape& shape, Sweep sweep, int threads, int lanes, const ProductCosts& costs,
                 const Machine& machine);
// For this machine, which is measured once there is a call that gains more by it than measuring takes.
Plan choose_plan(const Shape& shape, Sweep sweep, int threads, int lanes, const ProductCosts& costs);

// How threads share the sums of a matrix (rows, panels of columns): each packs for itself what its panels are
// multiplied with.
struct Tiling {
    int row_parts = 1;
    int panel_parts = 1;

    static Tiling of(int64_t rows, int64_t panels, int threads);

    // None for threads that are left over.
    Range rows(int64_t count, int thread) const {
        if (thread >= row_parts * panel_parts) return {0, 0};
        return Range::part(count, thread % row_parts, row_parts);
    }
    Range panels(int64_t count, int thread) const { return Range::part(count, thread / row_parts, panel_parts); }
};

}  // namespace rnnfast
