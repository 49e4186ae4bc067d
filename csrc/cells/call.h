// Cell::combine and Cell::backward of a cell that has unit parameters p, or has none and does without.
#pragma once

#include "number.h"

namespace rnnfast {
namespace {

template <class Cell>
constexpr int room_for_unit = Cell::unit_parameters ? Cell::unit_parameters : 1;

template <class Cell, class A>
RNNFAST_CELL A combine(const A (&a)[Cell::gates], A& c, const A (&p)[room_for_unit<Cell>]) {
    if constexpr (Cell::unit_parameters > 0)
        return Cell::combine(a, c, p);
    else
        return Cell::combine(a, c);
}
template <class Cell, class A, class V>
RNNFAST_CELL void backward(const A (&a)[Cell::gates], const A& c_prev, const A& c, const V& dm, const V& dc,
                           A (&dz)[Cell::gates], A& dc_prev, const A (&p)[room_for_unit<Cell>],
                           A (&dp)[room_for_unit<Cell>]) {
    if constexpr (Cell::unit_parameters > 0)
        Cell::backward(a, c_prev, c, dm, dc, dz, dc_prev, p, dp);
    else
        Cell::backward(a, c_prev, c, dm, dc, dz, dc_prev);
}

}  // namespace
}  // namespace rnnfast
