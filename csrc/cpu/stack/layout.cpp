#include "layout.h"

#include <stdexcept>

#include "../../cells/list.h"
#include "sequence.h"

namespace rnnfast {
namespace {

template <class... Cells>
std::vector<Cell> traits_of(CellList<Cells...>) {
    int index = 0;
    return {Cell{Cells::name, index++, Cells::gates, Cells::has_state, Cells::saves_gates, Cells::projects}...};
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

int64_t Shape::rows() const { return Sequence(*this).N(); }

}  // namespace rnnfast
