// The table of kernels of one instruction set, whose products are those of M: Plain, or fewer bits.
#pragma once

#include "cell_steps.h"
#include "reservoir_steps.h"
#include "stream_steps.h"

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

template <class M, class T = typename M::Number>
void product(const Product<T>& p) {
    M::template run<false>(p, [](int64_t, int64_t, const Panel&, const Piece<T>&) {});
}

template <class M, class List>
struct Table;

template <class M, class... Cells>
struct Table<M, CellList<Cells...>> {
    using T = typename M::Number;
    static constexpr CellKernels<T> cells[] = {{step<Cells, M>, step_backward<Cells, M>, step_tangent<Cells, M>,
                                                step_dual<Cells, M>, M::has_all_bits ? step_second<Cells, M> : nullptr,
                                                M::has_all_bits ? stream_step<Cells, T> : nullptr}...};
    static constexpr Kernels<T> all = {lanes_of<T>,
                                       M::costs,
                                       M::pack_transposed,
                                       M::pack_rows,
                                       product<M>,
                                       direct_product<T>,
                                       cells,
                                       add_rows<T>,
                                       M::burn,
                                       M::has_all_bits ? affine<T> : nullptr,
                                       M::has_all_bits ? dense_reservoir_step<T> : nullptr,
                                       M::has_all_bits ? sparse_reservoir_step<T> : nullptr,
                                       M::has_all_bits ? wide_reservoir_step<T> : nullptr};
};

}  // namespace
}  // namespace rnnfast
