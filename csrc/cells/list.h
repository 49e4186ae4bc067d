// The cells that there are. Everything else reads this list: kernel tables, layouts, bindings, Python.
#pragma once

#include "elman.h"
#include "gru.h"
#include "leaky.h"
#include "lstm.h"

namespace rnnfast {
namespace {

template <class... Cells>
struct CellList {};

using AllCells = CellList<Elman<Tanh>, Elman<Relu>, Lstm, Gru, Leaky<Tanh>, Leaky<Relu>>;

}  // namespace
}  // namespace rnnfast
