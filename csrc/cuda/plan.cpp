#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rnnfast::cuda {
namespace {

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

struct Asked {
    const Card& card;
    const Sweep& sweep;
    Number number;
    bool backward;

    int64_t groups(const Geometry& g) const { return sweep.D * g.slices; }
};

// The geometry of groups of C blocks for 8 * tiles sequences; false if it does not fit.
bool fits(const Asked& a, Kernel kernel, int C, int tiles, Geometry& g) {
    const bool backward = a.backward;
    const int gates = a.sweep.gates, bytes = bytes_of(a.number), K = k_of_step(a.number);
    g.C = C;
    g.U = 8 * ceil_div(a.sweep.H, 8 * C);
    if (int64_t(C - 1) * g.U >= a.sweep.H) return false;  // a block without units
    g.tiles = tiles;
    g.slices = ceil_div(a.sweep.B, 8 * tiles);
    g.rows = ceil_div(g.U, units_of_warp(gates, backward));
    const int columns = C * g.U * (backward ? gates : 1);
    g.splits = std::max(finishers(gates, backward, tiles), ceil_div(columns, K * steps_of_warp(gates, backward)));
    if (g.threads() > persistent_threads) return false;
    g.k_steps = round_up(ceil_div(columns, K * g.splits), k_batch);
    // A warp reads 64 bytes of 8 rows, two rows at a time: these have to start in different halves of the banks.
    g.stride = (round_up(g.splits * g.k_steps * K * bytes, 128) + 64) / bytes;
    const int64_t operand = int64_t(8) * tiles * g.stride * bytes;
    const int64_t sums =
        g.splits == 1 ? 0 : int64_t(g.rows) * tiles * g.splits * row_tiles(gates, backward) * 4 * 32 * 4;
    const int64_t shared = (kernel == Kernel::grid ? 1 : 2) * operand + sums;
    if (shared > a.card.shared_memory) return false;
    g.shared = static_cast<int>(shared);
    g.exchanged = static_cast<int>(counter_bytes + 2 * operand);
    return true;
}

// Cycles that a sweep takes for a step, all waves: rough, to compare plans with each other.
int64_t cost(const Asked& a, Kernel kernel, const Geometry& g) {
    const int tiles = row_tiles(a.sweep.gates, a.backward) * g.tiles, owned = owned_by_warp(a.sweep.gates, g.tiles);
    const int64_t product = g.k_steps * (16 + 8 * tiles), cell = 300 * owned;
    const int64_t columns = g.U * (a.backward ? a.sweep.gates : 1) * bytes_of(a.number);
    const int64_t others = (g.C - 1) * 8 * g.tiles * columns;  // bytes
    const int64_t exchange = kernel == Kernel::block     ? 0
                             : kernel == Kernel::cluster ? 700 + others / 32
                                                         : 2400 + others / 32;
    return (product + cell + exchange) * ceil_div(a.groups(g), g.at_a_time);
}

// Clusters of 16 are beyond what CUDA promises for every card; data-centre cards have them.
int largest_cluster(const Card& card) {
    if (card.sm < 90) return 0;
    return card.sm < 110 ? 16 : 8;
}

// All geometries that fit and that the card runs, those of fewer blocks first.
template <class Take>
void each_candidate(const Asked& a, const ClustersAtATime& clusters, const Take& take) {
    Geometry g{};
    const int most = max_tiles(a.sweep.gates, a.backward);
    for (int tiles = 1; tiles <= most; tiles *= 2) {
        if (fits(a, Kernel::block, 1, tiles, g)) {
            g.at_a_time = a.card.multiprocessors;
            take(Kernel::block, g);
        }
        for (int C = 2; C <= largest_cluster(a.card); C *= 2)
            if (fits(a, Kernel::cluster, C, tiles, g) && (g.at_a_time = clusters(g)) > 0) take(Kernel::cluster, g);
        for (int C = 2; C <= a.card.multiprocessors; ++C)
            if (fits(a, Kernel::grid, C, tiles, g)) {
                g.at_a_time = a.card.multiprocessors / C;
                take(Kernel::grid, g);
                break;
            }
    }
}

std::string sizes(const Sweep& s) {
    return "H=" + std::to_string(s.H) + " P=" + std::to_string(s.P) + " B=" + std::to_string(s.B) +
           " D=" + std::to_string(s.D) + " G=" + std::to_string(s.gates);
}

}  // namespace

const char* name(Kernel kernel) {
    static const char* const names[] = {"steps", "block", "cluster", "grid"};
    return names[static_cast<int>(kernel)];
}

Plan choose(const Card& card, const Sweep& s, Number number, bool backward, const std::string& forced,
            const ClustersAtATime& clusters) {
    if (forced != "" && forced != "steps" && forced != "block" && forced != "cluster" && forced != "grid")
        throw std::invalid_argument("RNNFAST_CUDA_KERNEL: expected composite, steps, block, cluster or grid, got " +
                                    forced);
    // Tensor cores multiply 16-bit numbers and TF32; a projected h would need a second product and exchange a step.
    const bool tensor_cores = number != Number::float64 && number != Number::float32;
    const Asked asked{card, s, number, backward};
    Plan best{Kernel::steps, Geometry{}, 0, 0, ""};
    int64_t least = 0;
    if (tensor_cores && has_layout(s.gates) && !s.by_steps && !s.P && card.sm >= 80 && s.B > 0)
        each_candidate(asked, clusters, [&](Kernel kernel, const Geometry& g) {
            if (!forced.empty() && forced != name(kernel)) return;
            const int64_t cycles = cost(asked, kernel, g), groups = asked.groups(g);
            if (best.kernel != Kernel::steps && cycles >= least) return;
            least = cycles;
            best = {kernel, g, ceil_div(groups, g.at_a_time), kernel == Kernel::grid ? groups * g.exchanged : 0,
                    "W_hh fits one " + std::string(name(kernel))};
        });
    if (best.kernel != Kernel::steps && forced != "steps") return best;
    if (forced != "" && forced != "steps")
        throw std::invalid_argument("RNNFAST_CUDA_KERNEL=" + forced + ": this kernel cannot take " + sizes(s) +
                                    (s.by_steps     ? ": a cell, resets or gradients that only steps know"
                                     : tensor_cores ? ""
                                                    : " in float64, or in float32 without TF32"));
    const char* why = s.by_steps             ? "a cell, resets or gradients that only steps know"
                      : s.P                  ? "projected"
                      : !tensor_cores        ? "no tensor cores for this number type"
                      : !has_layout(s.gates) ? "no layout for a cell of so many gates"
                                             : "W_hh does not fit the card";
    return {Kernel::steps, Geometry{}, 0, 0, forced.empty() ? why : "forced"};
}

}  // namespace rnnfast::cuda
