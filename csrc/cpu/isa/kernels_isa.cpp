// Compiled once per instruction set with its own flags; see CMakeLists.txt. Only what the table points to leaves this
// file, and no code that other files share (a template of the standard library, say) may be instantiated here: the
// linker could pick this copy, with instructions the CPU lacks, for everybody.
#include "table.h"
#include "tables.h"

namespace rnnfast {

template <>
const Kernels<float>* RNNFAST_ISA_TABLE<float>() {
    return &Table<Plain<float>, AllCells>::all;
}
template <>
const Kernels<double>* RNNFAST_ISA_TABLE<double>() {
    return &Table<Plain<double>, AllCells>::all;
}

}  // namespace rnnfast
