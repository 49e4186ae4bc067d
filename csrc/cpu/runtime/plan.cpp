#include "plan.h"

#include <algorithm>

namespace rnnfast {
namespace {

// A model of one step in cycles of one thread; only its order matters. Two numbers make it: multiply-adds over their
// rate, and bytes of weights over the bandwidth of the level of memory that holds them. A thread takes each panel of
// its weights through its rows, tile by tile. The first tile takes as long as its multiply-adds, or as the panel takes
// to arrive if that is longer; the others find it near. Threads that share the batch have few tiles each, and all the
// weights arrive at all of them; threads that share the units have all tiles, and a part of the weights each. So units
// are split where weights arrive more slowly than a tile multiplies them; else nothing is won that a barrier is worth.
// A third number is what the threads write for each other, which has to leave one core for another: of the batch's
// threads each packs a part of the weights for all, once; those of the units hand their part of each step to all. The
// constants are of the size measured on current x86 server cores.
constexpr double cycles_per_barrier = 600;
constexpr double cycles_per_region = 15000;
constexpr double cycles_per_activation = 25;  // one vector of a gate
// Of cores that share a third level some 5, of others less than 1.
constexpr double bytes_per_cycle_between_cores = 2;

double ceil_div(int64_t a, int64_t b) { return double((a + b - 1) / b); }

double cycles_per_step(const Shape& s, Sweep sweep, const Plan& plan, int lanes, const ProductCosts& costs,
                       const Machine& machine) {
    const bool is_forward = sweep == Sweep::forward;
    const double G = s.gates(), R = s.recurrent();
    const double input = s.cell->input_gates.count, recurrent = s.cell->recurrent_gates.count;
    const double rows = ceil_div(s.B, plan.row_groups), tiles = ceil_div(int64_t(rows), costs.tile_rows);
    const double mine = ceil_div((s.H + lanes - 1) / lanes, plan.splits);  // vectors of units
    const double sweeps = s.D > plan.directions ? double(s.D) : 1;
    const bool is_far = recurrent * mine * lanes * R * costs.bytes > machine.near_bytes();
    // of a vector of weights: each row multiplies it, and its load in each tile costs about half a row
    const double tile = (rows / tiles + .5) / (machine.rates.multiply_adds * costs.speed);
    const double arrival = is_far ? lanes * costs.bytes / machine.rates.far_bytes : 0;
    const double multiply =
        mine * (recurrent * R * ((tiles - 1) * tile + std::max(tile, arrival)) + input * double(s.I) * tiles * tile);
    const double activate = G * mine * rows * cycles_per_activation;
    const double wait = plan.splits > 1 ? cycles_per_barrier * (s.P ? 2 : 1) : 0;
    // Backward only W_hh has a part in the sweep; what W_ih costs above stands for the products that follow it.
    const double packed = double(s.H) * (recurrent * R + (is_forward ? input * double(s.I) : 0)) * costs.bytes;
    const double handed = double(sizeof(float)) * rows * (is_forward ? R : recurrent * double(s.H));
    const double bytes = packed * (1 - 1. / plan.row_groups) / double(s.T) + handed * (1 - 1. / plan.splits);
    const double start = plan.threads() > 1 ? cycles_per_region / double(s.T * s.L) : 0;
    return sweeps * (multiply + activate + wait + bytes / bytes_per_cycle_between_cores) + start;
}

// So many multiply-adds take a few times as long as measuring.
constexpr double worth_measuring = 1e8;

// The rates decide where there is a choice and weights come from afar.
bool needs_rates(const Shape& s, int threads, double bytes, const Machine& machine) {
    const double weights = double(s.recurrent_rows() * s.recurrent());  // of one layer and direction
    return threads > 1 && s.B > 1 && weights * bytes > machine.near_bytes() &&
           weights * double(s.T * s.B * s.L * s.D) > worth_measuring;
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

Plan choose_plan(const Shape& shape, Sweep sweep, int threads, int lanes, const ProductCosts& costs,
                 const Machine& machine) {
    Plan best;
    if (threads == 1 || shape.T < 1 || shape.B < 1) return best;
    double best_cycles = cycles_per_step(shape, sweep, best, lanes, costs, machine);
    const int64_t vectors = (shape.H + lanes - 1) / lanes;
    for (int directions = 1; directions <= shape.D; ++directions) {
        const int team = threads / directions;
        for (int row_groups = 1; row_groups <= std::min<int64_t>(team, shape.B); ++row_groups) {
            const int splits = int(std::min<int64_t>(team / row_groups, vectors));
            for (const int n : {1, splits}) {
                if (n < 1) continue;
                const Plan plan{directions, row_groups, n};
                const double cycles = cycles_per_step(shape, sweep, plan, lanes, costs, machine);
                if (cycles < best_cycles) best = plan, best_cycles = cycles;
            }
        }
    }
    return best;
}

Plan choose_plan(const Shape& shape, Sweep sweep, int threads, int lanes, const ProductCosts& costs) {
    if (threads == 1) return {};
    const Machine& asked = asked_machine();
    const bool measures = needs_rates(shape, threads, costs.bytes, asked);
    return choose_plan(shape, sweep, threads, lanes, costs, measures ? measured_machine() : asked);
}

}  // namespace rnnfast
