// Compiled once per instruction set with its own flags; see CMakeLists.txt. Only what the table points to leaves this
// file, and no code that other files share (a template of the standard library, say) may be instantiated here: the
// linker could pick this copy, with instructions the CPU lacks, for everybody.
#include "cell_steps.h"
#include "reservoir_steps.h"
#include "stream_steps.h"
#include "tables.h"

namespace rnnfast {
namespace {

template <class T>
void add_rows(int64_t count, const T* rows, ptrdiff_t stride, int64_t size, T* sums) {
    constexpr int V = lanes_of<T>;
    for (int64_t j = 0; j < size; j += V) {
        const int n = int(size - j < V ? size - j : V);
        Vec<T> sum = {};
        for (int64_t r = 0; r < count; ++r) sum += load(rows + r * stride + j, n);
        store(sums + j, load(sums + j, n) + sum, n);
    }
}

template <class T>
int64_t burn(int64_t rounds) {
    constexpr int chains = 12;
    Vec<T> sum[chains];
    Vec<T> factor = splat(T(0.999)), term = splat(T(0.001));
#pragma GCC unroll 12
    for (int j = 0; j < chains; ++j) sum[j] = splat(T(j));
    for (int64_t i = 0; i < rounds; ++i) {
        keep_in_register(factor);
        keep_in_register(term);
#pragma GCC unroll 12
        for (int j = 0; j < chains; ++j) sum[j] = sum[j] * factor + term;
    }
    Vec<T> total = {};
    for (int j = 0; j < chains; ++j) total += sum[j];
    const bool used = total[0] > T(0);  // always; keeps the loop alive
    return used ? rounds * chains * lanes_of<T> * 2 : 0;
}

template <class T, class List>
struct Table;

template <class T, class... Cells>
struct Table<T, CellList<Cells...>> {
    static constexpr CellKernels<T> cells[] = {{step<Cells, T>, step_backward<Cells, T>, step_tangent<Cells, T>,
                                                step_second<Cells, T>, step_dual<Cells, T>, stream_step<Cells, T>}...};
    static constexpr Kernels<T> all = {lanes_of<T>,
                                       max_tile_rows,
                                       pack_transposed<T>,
                                       pack_rows<T>,
                                       product<T>,
                                       direct_product<T>,
                                       cells,
                                       affine<T>,
                                       dense_reservoir_step<T>,
                                       sparse_reservoir_step<T>,
                                       wide_reservoir_step<T>,
                                       add_rows<T>,
                                       burn<T>};
};

}  // namespace

template <>
const Kernels<float>* RNNFAST_ISA_TABLE<float>() {
    return &Table<float, AllCells>::all;
}
template <>
const Kernels<double>* RNNFAST_ISA_TABLE<double>() {
    return &Table<double, AllCells>::all;
}

}  // namespace rnnfast
