#include "tangent_run.h"

namespace rnnfast {

template <class T>
void tangent(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, T* z_dot, int threads) {
    const Buffer<T> saved(ReserveLayout::of_tangents(shape, shape.rows()).size);
    run_with(threads, [&](int n) { return std::make_unique<TangentRun<T>>(shape, past, dot, z_dot, saved.get(), n); });
}

template void tangent<float>(const Shape&, const Past<float>&, const Tangent<float>&, float*, int);
template void tangent<double>(const Shape&, const Past<double>&, const Tangent<double>&, double*, int);

}  // namespace rnnfast
