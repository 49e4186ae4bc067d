// Which kernel takes a sweep, and its launch geometry: plain C++, tested on the CPU.
#pragma once

#include <cstddef>
#include <string>

#include "sweep.h"

namespace rnnfast::cuda {

// What is asked of a graphics card.
struct Card {
    int sm;               // 90: compute capability 9.0
    int multiprocessors;  // each runs one block of the persistent kernels at a time
    int shared_memory;    // bytes that a block may have
};

// steps      one launch a step, W_hh from L2: any size, any number, projection
// block      one block for 8 or 16 sequences, with all of W_hh in its registers
// cluster    a thread-block cluster for as many sequences, each block with its slice of W_hh in registers
// grid       likewise, but the blocks of a group meet in global memory
enum class Kernel { steps, block, cluster, grid };
const char* name(Kernel kernel);

// Of the persistent kernels. A group is a direction and a slice of the batch: the C blocks that share the units.
struct Geometry {
    int C;          // blocks in a group
    int U;          // units of a block, a multiple of 8
    int tiles;      // a group has 8 * tiles sequences, tiles is 1 or max_tiles
    int slices;     // groups for each direction
    int rows;       // warps of a block along its units ...
    int splits;     // ... times warps along K; at least tiles * halves_of(...), who finish a tile or half
    int k_steps;    // tensor-core steps along all of K, K = C * U forward, C * G * U backward
    int stride;     // of a row of operands in shared memory, in numbers
    int shared;     // bytes of shared memory
    int exchanged;  // bytes of the global memory that the blocks of a group exchange numbers through: counter, 2
                    // buffers

    int threads() const { return 32 * rows * splits; }
};

struct Plan {
    Kernel kernel;
    Geometry geometry;  // but for steps
    int64_t workspace;  // bytes, zeroed before each sweep
    int multiprocessors;
    std::string why;
};

constexpr int persistent_threads = 256;  // at most: 8 warps that have 255 registers for each lane
constexpr int weight_registers = 128;    // of these; as many tensor-core steps along K times tiles of rows as fit
constexpr int counter_bytes = 128;       // a cache line of its own

RNNFAST_BOTH constexpr int bytes_of(Number number) {
    return number == Number::float64 ? 8 : number == Number::float32 || number == Number::tf32 ? 4 : 2;
}
// Tiles of 16 rows that a warp has: forward an LSTM's four gates of 8 units, else 16 units.
RNNFAST_BOTH constexpr int row_tiles(bool lstm, bool backward) { return lstm && !backward ? 2 : 1; }
RNNFAST_BOTH constexpr int units_of_warp(bool lstm, bool backward) { return lstm && !backward ? 8 : 16; }
// Parts of 8 units that a row tile has.
RNNFAST_BOTH constexpr int halves_of(bool lstm, bool backward) { return units_of_warp(lstm, backward) / 8; }
// Steps along K whose weights a warp keeps; each step and row tile takes 4 registers.
RNNFAST_BOTH constexpr int steps_of_warp(bool lstm, bool backward) {
    return weight_registers / 4 / row_tiles(lstm, backward);
}
RNNFAST_BOTH constexpr int k_of_step(Number number) { return number == Number::tf32 ? 8 : 16; }
constexpr int max_tiles = 2;

// `forced` is the name of a kernel, or "": the best. Throws std::invalid_argument for an unknown name, or if the forced
// kernel cannot take the sweep.
Plan choose(const Card& card, const Sweep& sweep, Number number, bool backward, const std::string& forced);

}  // namespace rnnfast::cuda
