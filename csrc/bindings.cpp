// Python's door to the core: pointers arrive as integers, sizes are checked, the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/memory.h"
#include "rnnfast.h"
#include "tensors.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

using Address = uintptr_t;  // tensor.data_ptr(), 0: absent

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void expect(const std::vector<Address>& addresses, size_t count) {
    if (addresses.size() != count) throw std::invalid_argument("wrong number of arrays");
}

Shape make_shape(int cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t L, int64_t D, bool bias,
                 Address batch_sizes) {
    if (cell < 0 || cell > 2) throw std::invalid_argument("cell: expected 0 (tanh), 1 (relu) or 2 (lstm)");
    if (T < 1) throw std::runtime_error("Expected sequence length to be larger than 0 in RNN");  // torch's words
    if (B < 0 || I < 0 || H < 1 || P < 0 || L < 1 || D < 1 || D > 2 || (P && cell != 2))
        throw std::invalid_argument("sizes out of range");
    const auto* sizes = at<const int64_t>(batch_sizes);
    if (sizes)
        for (int64_t t = 0; t < T; ++t)
            if (sizes[t] < 1 || sizes[t] > (t ? sizes[t - 1] : B))
                throw std::runtime_error("batch_sizes: expected positive numbers that do not increase, got " +
                                         std::to_string(sizes[t]) + " at step " + std::to_string(t));
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

using Addresses = std::vector<Address>;

// Memory that a tensor can stand on.
struct SharedMemory {
    explicit SharedMemory(size_t bytes) : memory(bytes), bytes(bytes) {}
    Memory memory;
    size_t bytes;
};

// A finished forward pass: x, h0, c0, dropout, y, reserve; parameters.
template <class T>
Past<T> past_at(const Shape& s, const Addresses& a, const Addresses& parameters) {
    expect(a, 6);
    return {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]), unflatten<const T*>(s, parameters),
            at<const T>(a[3]), at<const T>(a[4]), at<const T>(a[5])};
}

// Gradients: of y, h_n, c_n, pre-activations, what was kept in, of x, h0, c0, what is swept out; of the parameters out.
template <class T>
Adjoint<T> adjoint_at(const Shape& s, const Addresses& a, const Addresses& parameters, int64_t groups) {
    expect(a, 9);
    if (groups < 1 || (s.B && s.B % groups)) throw std::invalid_argument("groups must divide the batch");
    if (a[3] && a[4]) throw std::invalid_argument("gradients of pre-activations: expected once");
    return {at<const T>(a[0]),
            at<const T>(a[1]),
            at<const T>(a[2]),
            at<T>(a[5]),
            at<T>(a[6]),
            at<T>(a[7]),
            unflatten<T*>(s, parameters),
            groups,
            at<const T>(a[3]),
            at<const T>(a[4]),
            at<T>(a[8])};
}

// Tangents: of x, h0, c0 in, of y, h_n, c_n out; of the parameters in.
template <class T>
Tangent<T> tangent_of(const Shape& s, const Addresses& a, const Addresses& parameters) {
    expect(a, 6);
    return {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]), unflatten<const T*>(s, parameters),
            at<T>(a[3]),       at<T>(a[4]),       at<T>(a[5])};
}

// x, h0, c0, dropout in, y, h_n, c_n, reserve out.
template <class T>
Forward<T> forward_of(const Shape& s, const Addresses& a, const Addresses& parameters) {
    expect(a, 8);
    return {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]), unflatten<const T*>(s, parameters),
            at<const T>(a[3]), at<T>(a[4]),       at<T>(a[5]),       at<T>(a[6]),
            at<T>(a[7])};
}

template <class T>
void forward_at(const Shape& s, int threads, const Addresses& parameters, const Addresses& arrays) {
    const Forward<T> call = forward_of<T>(s, arrays, parameters);
    const py::gil_scoped_release release;
    forward(s, call, threads);
}

template <class T>
void forward_dual_at(const Shape& s, int threads, const Addresses& parameters, const Addresses& arrays,
                     const Addresses& dot) {
    const Forward<T> call = forward_of<T>(s, arrays, parameters);
    if (call.reserve) throw std::invalid_argument("values with tangents: nothing can be kept");
    const Tangent<T> t = tangent_of<T>(s, dot, Addresses(parameters.size(), 0));
    const py::gil_scoped_release release;
    forward_dual(s, call, t, threads);
}

template <class T>
void backward_at(const Shape& s, int threads, const Addresses& parameters, const Addresses& past,
                 const Addresses& adjoint, const Addresses& gradients, int64_t groups) {
    const Past<T> p = past_at<T>(s, past, parameters);
    const Adjoint<T> a = adjoint_at<T>(s, adjoint, gradients, groups);
    const py::gil_scoped_release release;
    backward(s, p, a, threads);
}

template <class T>
void tangent_at(const Shape& s, int threads, const Addresses& parameters, const Addresses& past, const Addresses& dot,
                const Addresses& parameters_dot, Address z) {
    const Past<T> p = past_at<T>(s, past, parameters);
    Tangent<T> t = tangent_of<T>(s, dot, parameters_dot);
    t.z = at<T>(z);
    const py::gil_scoped_release release;
    tangent(s, p, t, threads);
}

// Gradients of x, h0, c0 out, and of the parameters; of y and of what was kept, out.
template <class T>
void second_at(const Shape& s, int threads, const Addresses& parameters, const Addresses& past, Address swept,
               const Addresses& dot, const Addresses& parameters_dot, const Addresses& direct,
               const Addresses& direct_gradients, int64_t groups, const Addresses& bend) {
    expect(direct, 3);
    expect(bend, 2);
    const Past<T> p = past_at<T>(s, past, parameters);
    const Tangent<T> t = tangent_of<T>(s, dot, parameters_dot);
    const Adjoint<T> a =
        adjoint_at<T>(s, {0, 0, 0, 0, 0, direct[0], direct[1], direct[2], 0}, direct_gradients, groups);
    const Bend<T> to{at<T>(bend[0]), at<T>(bend[1])};
    const py::gil_scoped_release release;
    second(s, p, at<const T>(swept), t, a, to, threads);
}

// Weights: w, starts, w_in, bias, leak, scale.
template <class T>
std::unique_ptr<Reservoirs<T>> make_reservoirs(int unit, int64_t M, int64_t Q, int64_t I, int64_t H, int64_t F,
                                               const Addresses& a) {
    expect(a, 6);
    if (unit < 0 || unit > 2) throw std::invalid_argument("unit: expected 0 (tanh), 1 (relu) or 2 (identity)");
    if (M < 1 || Q < 1 || I < 0 || H < 1 || F < 1 || (!a[1] && F != H) || H > INT32_MAX)
        throw std::invalid_argument("sizes out of range");
    const ReservoirWeights<T> weights{at<const T>(a[0]), at<const int32_t>(a[1]), at<const T>(a[2]),
                                      at<const T>(a[3]), at<const T>(a[4]),       at<const T>(a[5])};
    const py::gil_scoped_release release;
    return std::make_unique<Reservoirs<T>>(ReservoirShape{static_cast<Unit>(unit), M, Q, I, H, F}, weights);
}

// Arrays: x, noise, h, states; of a closed loop (O > 0) also b_out, w_x, w_h, y0, y.
template <class T>
void run_reservoirs(const Reservoirs<T>& reservoirs, int64_t B, int64_t steps, bool shared_x, int64_t state_stride,
                    int64_t O, int64_t E, const Addresses& a, int threads) {
    expect(a, 9);
    const ReservoirShape& s = reservoirs.shape;
    if (B < 0 || steps < 0 || O < 0 || O > s.I || E < 0 || E > s.I || threads < 1 || (!O && !a[3]) ||
        (a[3] && state_stride < s.H))
        throw std::invalid_argument("sizes out of range");
    const ReservoirRun<T> call{
        B, steps, at<const T>(a[0]), shared_x,          at<const T>(a[1]), at<T>(a[2]),       at<T>(a[3]), state_stride,
        O, E,     at<const T>(a[4]), at<const T>(a[5]), at<const T>(a[6]), at<const T>(a[7]), at<T>(a[8])};
    const py::gil_scoped_release release;
    reservoirs.run(call, threads);
}

void add_gram_at(int64_t S, int64_t n, int64_t Z, Address x, int64_t x_stride, Address gram, int threads) {
    if (S < 0 || n < 0 || Z < 1 || threads < 1) throw std::invalid_argument("sizes out of range");
    const py::gil_scoped_release release;
    add_gram(S, n, Z, at<const double>(x), x_stride, at<double>(gram), threads);
}

template <class T>
void define_reservoirs(py::module_& m, const char* name) {
    py::class_<Reservoirs<T>>(m, name)
        .def(py::init(&make_reservoirs<T>), py::arg("unit"), py::arg("M"), py::arg("Q"), py::arg("I"), py::arg("H"),
             py::arg("F"), py::arg("weights"))
        .def("threads_for", &Reservoirs<T>::threads_for, py::arg("B"), py::arg("threads"))
        .def("run", &run_reservoirs<T>, py::arg("B"), py::arg("steps"), py::arg("shared_x"), py::arg("state_stride"),
             py::arg("O"), py::arg("E"), py::arg("arrays"), py::arg("threads"));
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
        .def_property_readonly("reserve_per_row", &reserve_per_row)
        .def_property_readonly("swept", [](const Shape& s) { return Swept(s); });
    py::class_<Swept>(m, "Swept")
        .def_readonly("dz_stride", &Swept::dz_stride)
        .def_readonly("dz", &Swept::dz)
        .def_readonly("dc", &Swept::dc)
        .def_readonly("size", &Swept::size);
    py::class_<Layout>(m, "Layout")
        .def(py::init<py::object, std::vector<Layout::Shape>, int>(), py::arg("tensor_type"), py::arg("shapes"),
             py::arg("bytes"))
        .def("addresses", &Layout::addresses, py::arg("tensors"));
    py::class_<SharedMemory>(m, "Memory", py::buffer_protocol())
        .def(py::init<size_t>(), py::arg("bytes"))
        .def_buffer(
            [](const SharedMemory& s) { return py::buffer_info(static_cast<uint8_t*>(s.memory.data()), s.bytes); });
    m.attr("LARGE_MEMORY") = Memory::large;
    m.def("forward_float32", &forward_at<float>);
    m.def("forward_float64", &forward_at<double>);
    m.def("forward_dual_float32", &forward_dual_at<float>);
    m.def("forward_dual_float64", &forward_dual_at<double>);
    m.def("backward_float32", &backward_at<float>);
    m.def("backward_float64", &backward_at<double>);
    m.def("tangent_float32", &tangent_at<float>);
    m.def("tangent_float64", &tangent_at<double>);
    m.def("second_float32", &second_at<float>);
    m.def("second_float64", &second_at<double>);
    define_reservoirs<float>(m, "ReservoirsFloat32");
    define_reservoirs<double>(m, "ReservoirsFloat64");
    m.def("add_gram", &add_gram_at);
    m.def("isa", &isa);
    m.def("usable_isas", &usable_isas);
    m.def("select_isa", &select_isa);
    m.def("fma_peak_gflops", [](int bytes, int threads) {
        return bytes == 4 ? fma_peak_gflops<float>(threads) : fma_peak_gflops<double>(threads);
    });
}
