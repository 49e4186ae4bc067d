#include "plan.h"

#include <algorithm>

namespace rnnfast {
namespace {

// A model of one step in cycles of one thread; only its order matters. The constants are of the size measured on
// current x86 server cores.
constexpr double cycles_per_barrier = 600;
constexpr double cycles_per_region = 15000;
constexpr double near_cache = 512 * 1024;     // bytes of weights that a thread keeps at hand
constexpr double far_bytes_per_cycle = 8;     // of weights beyond, each step
constexpr double cycles_per_activation = 25;  // one vector of a gate

double cycles_per_step(const Shape& s, const Plan& plan, int tile_rows, int lanes, int bytes) {
    const double G = s.gates(), R = s.recurrent();
    const double input = s.cell->input_gates.count, recurrent = s.cell->recurrent_gates.count;
    const double rows = double((s.B + plan.row_groups - 1) / plan.row_groups);
    const double tiles = double((int64_t(rows) + tile_rows - 1) / tile_rows);
    const int64_t vectors = (s.H + lanes - 1) / lanes;
    const double mine = double((vectors + plan.splits - 1) / plan.splits);  // vectors of units
    const double sweeps = s.D > plan.directions ? double(s.D) : 1;
    // a row of a tile costs one cycle for each vector, its panel's load about half a row
    const double multiply = mine * (recurrent * R + input * double(s.I)) * (rows + .5 * tiles);
    const double activate = G * mine * rows * cycles_per_activation;
    const double weights = recurrent * mine * lanes * R * bytes;
    const double stream = weights > near_cache ? weights / far_bytes_per_cycle : 0;
    const double wait = plan.splits > 1 ? cycles_per_barrier * (s.P ? 2 : 1) : 0;
    const double start = plan.threads() > 1 ? cycles_per_region / double(s.T * s.L) : 0;
    return sweeps * (std::max(multiply, stream) + activate + wait) + start;
}

// Of a block of sums, in units of a row of one panel: to pack a panel, and to fetch what a row is multiplied by. Of the
// size measured at H = 128 on two threads.
constexpr double rows_per_packing = 16;
constexpr double rows_per_fetch = .25;

}  // namespace

Tiling Tiling::of(int64_t rows, int64_t panels, int threads) {
    const auto cost = [&](const Tiling& t) {
        const double mine = double((rows + t.row_parts - 1) / t.row_parts);
        return double((panels + t.panel_parts - 1) / t.panel_parts) * (mine + rows_per_packing) + mine * rows_per_fetch;
    };
    Tiling best;
    for (int panel_parts = 1; panel_parts <= std::min<int64_t>(threads, panels); ++panel_parts) {
        const Tiling tiling{threads / panel_parts, panel_parts};
        if (cost(tiling) < cost(best)) best = tiling;
    }
    return best;
}

Plan choose_plan(const Shape& shape, int threads, int tile_rows, int lanes, int bytes) {
    Plan best;
    if (shape.T < 1 || shape.B < 1) return best;
    double best_cycles = cycles_per_step(shape, best, tile_rows, lanes, bytes);
    const int64_t vectors = (shape.H + lanes - 1) / lanes;
    for (int directions = 1; directions <= shape.D; ++directions) {
        const int team = threads / directions;
        for (int row_groups = 1; row_groups <= std::min<int64_t>(team, shape.B); ++row_groups) {
            const int splits = int(std::min<int64_t>(team / row_groups, vectors));
            for (const int n : {1, splits}) {
                if (n < 1) continue;
                const Plan plan{directions, row_groups, n};
                const double cycles = cycles_per_step(shape, plan, tile_rows, lanes, bytes);
                if (cycles < best_cycles) best = plan, best_cycles = cycles;
            }
        }
    }
    return best;
}

}  // namespace rnnfast
