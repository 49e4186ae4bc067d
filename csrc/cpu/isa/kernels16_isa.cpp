// Kernels of float32 numbers whose products take factors of 16 bits, once for each kind of unit that multiplies them;
// what is said in kernels_isa.cpp goes for this file, too.
#include "product16.h"
#include "table.h"
#ifdef RNNFAST_UNIT_TILES
#include "tile_unit.h"
#else
#include "pair_unit.h"
#endif
#include "tables.h"

namespace rnnfast {

const Kernels<float>* RNNFAST_UNIT_TABLE(Precision precision) {
#ifdef RNNFAST_UNIT_TILES
    if (precision == Precision::high) return &Table<Sixteen<TileUnit, 2>, AllCells>::all;
    return &Table<Sixteen<TileUnit, 1>, AllCells>::all;
#else
    return precision == Precision::medium ? &Table<Sixteen<PairUnit, 1>, AllCells>::all : nullptr;
#endif
}

}  // namespace rnnfast
