// The definitions that a file for one number type instantiates.
#pragma once

#include "persistent.h"
#include "run.h"
#include "steps.h"

namespace rnnfast::cuda {

// No tensor cores for these numbers, so no persistent kernels either.
template <Number number, class Cell>
constexpr bool by_steps_alone = number == Number::float64 || number == Number::float32 || !is_persistent<Cell>;

// What run(Cell()) returns for the cell of an index in the list.
template <class Run, class Cell, class... More>
auto with_cell(CellList<Cell, More...>, int index, const Run& run) {
    if constexpr (sizeof...(More) > 0)
        if (index > 0) return with_cell(CellList<More...>(), index - 1, run);
    return run(Cell());
}

template <Number number, class Cell, class Call>
void run_cell(const Plan& plan, const Sweep& sweep, const Call& call, void* stream) {
    if constexpr (!by_steps_alone<number, Cell>)
        if (plan.kernel != Kernel::steps) return run_persistent<number, Cell>(plan, sweep, call, stream);
    run_by_steps<typename NumberOf<number>::type, Cell>(sweep, call, stream);
}

template <Number number, class Call>
void run(const Plan& plan, const Sweep& sweep, const Call& call, void* stream) {
    with_cell(AllCells(), sweep.cell, [&](auto cell) { run_cell<number, decltype(cell)>(plan, sweep, call, stream); });
}

template <Number number, class Cell, bool backward>
Plan make_plan_of(const Card& card, const Sweep& sweep, const std::string& forced) {
    if constexpr (by_steps_alone<number, Cell>) {
        return choose(card, sweep, number, backward, forced, [](const Geometry&) { return 0; });
    } else {
        const auto clusters = [&](const Geometry& g) { return persistent_clusters<number, Cell, backward>(card, g); };
        const Plan plan = choose(card, sweep, number, backward, forced, clusters);
        if (plan.kernel != Kernel::steps) prepare_persistent<number, Cell, backward>(card, plan);
        return plan;
    }
}

template <Number number>
Plan make_plan(const Card& card, const Sweep& sweep, bool backward, const std::string& forced) {
    return with_cell(AllCells(), sweep.cell, [&](auto cell) {
        using Cell = decltype(cell);
        return (backward ? make_plan_of<number, Cell, true> : make_plan_of<number, Cell, false>)(card, sweep, forced);
    });
}

#define RNNFAST_RUN(number)                                                               \
    template void run<Number::number>(const Plan&, const Sweep&, const Forward&, void*);  \
    template void run<Number::number>(const Plan&, const Sweep&, const Backward&, void*); \
    template Plan make_plan<Number::number>(const Card&, const Sweep&, bool, const std::string&)

}  // namespace rnnfast::cuda
