#include "layout.h"

#include <numeric>
#include <stdexcept>

#include "../../cells/list.h"

namespace rnnfast {
namespace {

// What the drivers rely on.
template <class C>
constexpr bool fits =
    C::gates <= max_gates && C::input_gates.count == C::recurrent_gates.count &&  // panels of the same units
    (C::saves_gates || (C::gates == 1 && C::state == State::none)) && !(C::projects && C::state == State::output);

template <class... Cells>
std::vector<Cell> traits_of(CellList<Cells...>) {
    static_assert((fits<Cells> && ...));
    int index = 0;
    return {Cell{Cells::name, index++, Cells::gates, Cells::input_gates, Cells::recurrent_gates, Cells::torch_gates,
                 Cells::state, Cells::saves_gates, Cells::projects, Cells::unit_parameters}...};
}

}  // namespace

const std::vector<Cell>& cells() {
    static const std::vector<Cell> all = traits_of(AllCells());
    return all;
}

const Cell& find_cell(const std::string& name) {
    std::string known;
    for (const Cell& cell : cells()) {
        if (name == cell.name) return cell;
        known += (known.empty() ? "" : ", ") + std::string(cell.name);
    }
    throw std::invalid_argument("unknown cell '" + name + "', expected one of " + known);
}

int64_t Shape::rows() const { return batch_sizes ? std::accumulate(batch_sizes, batch_sizes + T, int64_t(0)) : T * B; }

}  // namespace rnnfast
