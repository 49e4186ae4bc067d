// How the threads of one call share the work of a layer.
#pragma once

#include "../rnnfast.h"
#include "kernels.h"

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

// `tile_rows` and `lanes` as in Kernels, `bytes` those of a number.
Plan choose_plan(const Shape& shape, int threads, int tile_rows, int lanes, int bytes);

}  // namespace rnnfast
