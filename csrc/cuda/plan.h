// Which kernel takes a sweep, and its launch geometry: plain C++, tested on the CPU.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "../cells/traits.h"
#include "sweep.h"

namespace rnnfast::cuda {

// What is asked of a graphics card.
struct Card {
    int sm;               // 90: compute capability 9.0
    int multiprocessors;  // each runs one block of the persistent kernels at a time
    int shared_memory;    // bytes that a block may have
};

// steps      one launch a step, W_hh from L2: any cell, size and number, projection, resets, gradients inside
// block      one block for 8 to 32 sequences, with all of W_hh in its registers
// cluster    a thread-block cluster for as many sequences, each block with its slice of W_hh in registers
// grid       likewise, but the blocks of a group meet in global memory
enum class Kernel { steps, block, cluster, grid };
const char* name(Kernel kernel);

// Of the persistent kernels. A group is a direction and a slice of the batch: the C blocks that share the units.
struct Geometry {
    int C;          // blocks in a group
    int U;          // units of a block, a multiple of 8
    int tiles;      // a group has 8 * tiles sequences: 1, 2 or 4
    int slices;     // groups for each direction
    int rows;       // warps of a block along its units ...
    int splits;     // ... times warps along K; at least finishers(...), who finish a tile or half
    int k_steps;    // tensor-core steps along K of a warp, a multiple of k_batch; K = C * U forward, C * G * U backward
    int stride;     // of a row of operands in shared memory, in numbers
    int shared;     // bytes of shared memory
    int exchanged;  // bytes of the global memory that the blocks of a group exchange numbers through: counter, 2
                    // buffers
    int at_a_time;  // groups that the card runs at a time

    int threads() const { return 32 * rows * splits; }
};

struct Plan {
    Kernel kernel;
    Geometry geometry;  // but for steps
    int waves;          // rounds of groups that wait for each other; 0 for steps
    int64_t workspace;  // bytes, zeroed before each sweep
    std::string why;
};

constexpr int persistent_threads = 256;  // at most: 8 warps that have 255 registers for each lane
constexpr int weight_registers = 128;    // of these; as many tensor-core steps along K times tiles of rows as fit
constexpr int counter_bytes = 128;       // a cache line of its own
constexpr int k_batch = 4;               // tensor-core steps whose operands a warp loads before it multiplies

RNNFAST_BOTH constexpr int bytes_of(Number number) {
    return number == Number::float64 ? 8 : number == Number::float32 || number == Number::tf32 ? 4 : 2;
}
// The persistent kernels are for cells whose products are both for all of their gates and that carry no other state
// than c, of so many gates. Others go by steps.
template <class Cell>
constexpr bool is_persistent = Cell::input_gates.count == Cell::gates && Cell::recurrent_gates.count == Cell::gates &&
                               Cell::state != State::output && Cell::unit_parameters == 0;
RNNFAST_BOTH constexpr bool has_layout(int gates) { return gates == 1 || gates == 4; }
// Forward, the rows of a warp are all gates of its units.
RNNFAST_BOTH constexpr int units_of_warp(int gates, bool backward) { return gates > 1 && !backward ? 8 : 16; }
// Tiles of 16 rows that a warp has.
RNNFAST_BOTH constexpr int row_tiles(int gates, bool backward) {
    return (backward ? 1 : gates) * units_of_warp(gates, backward) / 16;
}
// Parts of 8 units that a row tile has.
RNNFAST_BOTH constexpr int halves_of(int gates, bool backward) { return units_of_warp(gates, backward) / 8; }
// Steps along K whose weights a warp keeps; each step and row tile takes 4 registers.
RNNFAST_BOTH constexpr int steps_of_warp(int gates, bool backward) {
    return weight_registers / 4 / row_tiles(gates, backward);
}
RNNFAST_BOTH constexpr int k_of_step(Number number) { return number == Number::tf32 ? 8 : 16; }
// Of the batch, in a group. Four gates' dz of 32 sequences is more than shared memory holds where it would be of use.
RNNFAST_BOTH constexpr int max_tiles(int gates, bool backward) { return gates > 1 && backward ? 2 : 4; }
// Tiles (or halves) that a warp finishes, and how many warps along K do: a cell of one gate is little work, and warps
// along K are few where units are many.
RNNFAST_BOTH constexpr int owned_by_warp(int gates, int tiles) { return gates == 1 ? tiles : tiles == 4 ? 2 : 1; }
RNNFAST_BOTH constexpr int finishers(int gates, bool backward, int tiles) {
    return tiles * halves_of(gates, backward) / owned_by_warp(gates, tiles);
}

// How many clusters of a geometry the card runs at a time, 0 if none: what cudaOccupancyMaxActiveClusters says of the
// kernel. It is less than multiprocessors / C: the multiprocessors of a cluster are neighbours.
using ClustersAtATime = std::function<int(const Geometry&)>;

// `forced` is the name of a kernel, or "": the best. Throws std::invalid_argument for an unknown name, or if the forced
// kernel cannot take the sweep.
Plan choose(const Card& card, const Sweep& sweep, Number number, bool backward, const std::string& forced,
            const ClustersAtATime& clusters);

}  // namespace rnnfast::cuda
