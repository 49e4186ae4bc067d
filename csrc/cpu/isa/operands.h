// What a unit that multiplies pairs of 16-bit numbers gets.
#pragma once

#include "panel.h"

namespace rnnfast {
namespace {

// Rows on the left and a panel, in pairs; of numbers that are the sum of two, part by part.
template <int parts>
struct Operands {
    int64_t pairs;
    const uint32_t* a[parts];  // rows (pairs), a_row apart
    ptrdiff_t a_row;
    const uint32_t* panel[parts];  // (pairs,vectors,V)
};

}  // namespace
}  // namespace rnnfast
