#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace rnnfast::cuda {
namespace {

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The geometry of groups of C blocks for 8 * tiles sequences; false if it does not fit.
bool fits(const Card& card, const Sweep& s, Number number, bool backward, int C, int tiles, Geometry& g) {
    const bool lstm = s.cell == Cell::lstm;
    const int bytes = bytes_of(number);
    g.C = C;
    g.U = 8 * ceil_div(s.H, 8 * C);
    if (int64_t(C - 1) * g.U >= s.H) return false;  // a block without units
    g.tiles = tiles;
    g.slices = ceil_div(s.B, 8 * tiles);
    g.rows = ceil_div(g.U, units_of_warp(lstm, backward));
    g.k_steps = ceil_div(int64_t(C) * g.U * (backward ? s.gates() : 1), k_of_step(number));
    g.splits = std::max(tiles * halves_of(lstm, backward), ceil_div(g.k_steps, steps_of_warp(lstm, backward)));
    if (g.threads() > persistent_threads) return false;
    // 16 bytes more than the numbers take: rows of a multiple of 32 bytes would start in few banks, and the 8 rows that
    // a warp reads at a time would get in each other's way; now they are 4 banks apart.
    g.stride = g.k_steps * k_of_step(number) + 16 / bytes;
    const int operands = 2 * 8 * tiles * g.stride * bytes;
    const int sums = g.splits == 1 ? 0 : g.rows * tiles * g.splits * row_tiles(lstm, backward) * 4 * 32 * 4;
    g.shared = operands + sums;
    g.exchanged = counter_bytes + operands;
    return g.shared <= card.shared_memory;
}

// As few sequences in a group as leave all groups room at a time, since groups do not wait for each other; else as many
// as fit.
bool fits(const Card& card, const Sweep& s, Number number, bool backward, int C, Geometry& best) {
    bool found = false;
    for (int tiles = 1; tiles <= max_tiles; tiles *= 2) {
        Geometry g;
        if (!fits(card, s, number, backward, C, tiles, g)) continue;
        best = g;
        found = true;
        if (s.D * g.slices * C <= card.multiprocessors) break;
    }
    return found;
}

// Clusters of 16 are beyond what CUDA promises for every card; data-centre cards have them.
int largest_cluster(const Card& card) {
    if (card.sm < 90) return 0;
    return card.sm < 110 ? 16 : 8;
}

std::string sizes(const Sweep& s) {
    return "H=" + std::to_string(s.H) + " P=" + std::to_string(s.P) + " B=" + std::to_string(s.B) +
           " D=" + std::to_string(s.D);
}

}  // namespace

const char* name(Kernel kernel) {
    static const char* const names[] = {"steps", "block", "cluster", "grid"};
    return names[static_cast<int>(kernel)];
}

Plan choose(const Card& card, const Sweep& s, Number number, bool backward, const std::string& forced) {
    const auto wants = [&](Kernel kernel) { return forced.empty() || forced == name(kernel); };
    const auto planned = [&](Kernel kernel, const Geometry& g, const std::string& why) {
        const int64_t groups = s.D * g.slices;
        return Plan{kernel, g, kernel == Kernel::grid ? groups * g.exchanged : 0, card.multiprocessors, why};
    };
    if (forced != "" && forced != "steps" && forced != "block" && forced != "cluster" && forced != "grid")
        throw std::invalid_argument("RNNFAST_CUDA_KERNEL: expected composite, steps, block, cluster or grid, got " +
                                    forced);

    // Tensor cores multiply 16-bit numbers and TF32; a projected h would need a second product and exchange a step.
    const bool tensor_cores = number != Number::float64 && number != Number::float32;
    const bool persistent = tensor_cores && !s.P && card.sm >= 80 && s.B > 0;
    Geometry g{};
    if (persistent) {
        // The fewer blocks share the units, the less they have to tell each other: none, then clusters, which have a
        // barrier and each other's shared memory in hardware, then global memory.
        if (wants(Kernel::block) && fits(card, s, number, backward, 1, g))
            return planned(Kernel::block, g, "W_hh fits one block");
        if (wants(Kernel::cluster))
            for (int C = 2; C <= largest_cluster(card); C *= 2)
                if (fits(card, s, number, backward, C, g)) return planned(Kernel::cluster, g, "W_hh fits a cluster");
        if (wants(Kernel::grid))
            for (int C = 2; C <= card.multiprocessors; ++C)
                if (fits(card, s, number, backward, C, g)) return planned(Kernel::grid, g, "W_hh fits the card");
    }
    if (!wants(Kernel::steps))
        throw std::invalid_argument("RNNFAST_CUDA_KERNEL=" + forced + ": this kernel cannot take " + sizes(s) +
                                    (tensor_cores ? "" : " in float64, or in float32 without TF32"));
    const char* why = s.P             ? "projected"
                      : !tensor_cores ? "no tensor cores for this number type"
                                      : "W_hh does not fit the card";
    return {Kernel::steps, Geometry{}, 0, card.multiprocessors, why};
}

}  // namespace rnnfast::cuda
