// Python's door to the core: pointers arrive as integers, sizes are checked, the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rnnfast.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

using Address = uintptr_t;  // tensor.data_ptr(), 0: absent

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Shape make_shape(int cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t L, int64_t D, bool bias,
                 Address batch_sizes) {
    if (cell < 0 || cell > 2) throw std::invalid_argument("cell: expected 0 (tanh), 1 (relu) or 2 (lstm)");
    if (T < 0 || B < 0 || I < 0 || H < 1 || P < 0 || L < 1 || D < 1 || D > 2 || (P && cell != 2))
        throw std::invalid_argument("sizes out of range");
    const auto* sizes = at<const int64_t>(batch_sizes);
    if (sizes)
        for (int64_t t = 0; t < T; ++t)
            if (sizes[t] < 1 || sizes[t] > (t ? sizes[t - 1] : B))
                throw std::invalid_argument("batch_sizes must be positive and must not increase");
    return {static_cast<Cell>(cell), T, B, I, H, P, L, D, bias, sizes};
}

// Addresses in torch's order for each layer and direction: w_ih, w_hh, then b_ih, b_hh if biased, then w_hr if
// projected.
template <class P>
std::vector<Parameters<P>> unflatten(const Shape& s, const std::vector<Address>& flat) {
    const size_t each = 2 + (s.bias ? 2 : 0) + (s.P ? 1 : 0);
    if (flat.size() != each * s.L * s.D) throw std::invalid_argument("wrong number of parameters");
    std::vector<Parameters<P>> out;
    for (size_t i = 0; i < flat.size(); i += each) {
        const auto get = [&](size_t j) { return reinterpret_cast<P>(flat[i + j]); };
        out.push_back(
            {get(0), get(1), s.bias ? get(2) : nullptr, s.bias ? get(3) : nullptr, s.P ? get(each - 1) : nullptr});
    }
    return out;
}

template <class T>
void forward_at(const Shape& shape, int threads, const std::vector<Address>& parameters, Address x, Address h0,
                Address c0, Address dropout, Address y, Address h_n, Address c_n, Address reserve) {
    const Forward<T> call{
        at<const T>(x),       at<const T>(h0), at<const T>(c0), unflatten<const T*>(shape, parameters),
        at<const T>(dropout), at<T>(y),        at<T>(h_n),      at<T>(c_n),
        at<T>(reserve)};
    const py::gil_scoped_release release;
    forward(shape, call, threads);
}

template <class T>
void backward_at(const Shape& shape, int threads, const std::vector<Address>& parameters, Address x, Address h0,
                 Address c0, Address dropout, Address y, Address reserve, Address dy, Address dh_n, Address dc_n,
                 Address dx, Address dh0, Address dc0, const std::vector<Address>& gradients) {
    const Backward<T> call{at<const T>(x),
                           at<const T>(h0),
                           at<const T>(c0),
                           unflatten<const T*>(shape, parameters),
                           at<const T>(dropout),
                           at<const T>(y),
                           at<const T>(reserve),
                           at<const T>(dy),
                           at<const T>(dh_n),
                           at<const T>(dc_n),
                           at<T>(dx),
                           at<T>(dh0),
                           at<T>(dc0),
                           unflatten<T*>(shape, gradients)};
    const py::gil_scoped_release release;
    backward(shape, call, threads);
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_C, m) {
    using namespace rnnfast;
    m.doc() = "rnnfast's compiled core. Sizes and pointers only; see csrc/rnnfast.h.";
    py::class_<Shape>(m, "Shape")
        .def(py::init(&make_shape), py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
             py::arg("P"), py::arg("L"), py::arg("D"), py::arg("bias"), py::arg("batch_sizes"))
        .def_property_readonly("rows", &Shape::rows)
        .def_property_readonly("reserve_per_row", &reserve_per_row);
    m.def("forward_float32", &forward_at<float>);
    m.def("forward_float64", &forward_at<double>);
    m.def("backward_float32", &backward_at<float>);
    m.def("backward_float64", &backward_at<double>);
    m.def("isa", &isa);
    m.def("usable_isas", &usable_isas);
    m.def("select_isa", &select_isa);
    m.def("fma_peak_gflops", [](int bytes, int threads) {
        return bytes == 4 ? fma_peak_gflops<float>(threads) : fma_peak_gflops<double>(threads);
    });
}
