// Python's door to the core: pointers arrive as integers, sizes are checked, the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/runtime/machine.h"
#include "cpu/stack/layout.h"
#include "rnnfast.h"
#include "stream_binding.h"
#include "tensors.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

using Address = uintptr_t;  // tensor.data_ptr(), 0: absent

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<Address>;

std::pair<int, int> slots(const Slots& s) { return {s.first, s.count}; }

void expect(const Addresses& addresses, size_t count) {
    if (addresses.size() != count) throw std::invalid_argument("wrong number of arrays");
}

Precision precision_of(int precision) {
    if (precision < 0 || precision > 2)
        throw std::invalid_argument("precision: expected 0 (highest), 1 (high), 2 (medium)");
    return static_cast<Precision>(precision);
}

Shape make_shape(int cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t L, int64_t D, bool bias,
                 Address batch_sizes, Address resets, int precision) {
    if (cell < 0 || cell >= int(cells().size())) throw std::invalid_argument("cell: expected an index in cells()");
    if (T < 1) throw std::runtime_error("Expected sequence length to be larger than 0 in RNN");  // torch's words
    if (B < 0 || I < 0 || H < 1 || P < 0 || L < 1 || D < 1 || D > 2 || (P && !cells()[cell].projects))
        throw std::invalid_argument("sizes out of range");
    const auto* sizes = at<const int64_t>(batch_sizes);
    if (sizes)
        for (int64_t t = 0; t < T; ++t)
            if (sizes[t] < 1 || sizes[t] > (t ? sizes[t - 1] : B))
                throw std::runtime_error("batch_sizes: expected positive numbers that do not increase, got " +
                                         std::to_string(sizes[t]) + " at step " + std::to_string(t));
    return {&cells()[cell], T, B, I, H, P, L, D, bias, sizes, at<const uint8_t>(resets), precision_of(precision)};
}

// Arrays that always travel together, in this order.
template <class P>
struct InputArrays {  // x, h0, c0, then for each layer and direction w_ih, w_hh, b_ih, b_hh if biased, w_hr if
                      // projected, unit if the cell has unit parameters
    P x, h0, c0;
    std::vector<Parameters<P>> parameters;

    InputArrays(const Shape& s, const Addresses& a) {
        const bool unit = s.cell->unit_parameters;
        expect(a, 3 + (2 + 2 * s.bias + !!s.P + unit) * s.L * s.D);
        size_t i = 0;
        const auto next = [&](bool there = true) { return there ? reinterpret_cast<P>(a[i++]) : nullptr; };
        x = next(), h0 = next(), c0 = next();
        while (i < a.size())  // in braces: one after the other
            parameters.push_back({next(), next(), next(s.bias), next(s.bias), next(s.P), next(unit)});
    }
};

template <class P>
struct OutputArrays {
    P y, h_n, c_n;

    explicit OutputArrays(const Addresses& a) {
        expect(a, 3);
        y = reinterpret_cast<P>(a[0]), h_n = reinterpret_cast<P>(a[1]), c_n = reinterpret_cast<P>(a[2]);
    }
};

// What every call starts with: the sizes, the inputs, the dropout masks.
template <class T>
Past<T> past_of(const Shape& s, const Addresses& inputs, Address dropout, Address y, Address reserve) {
    InputArrays<const T*> in(s, inputs);
    return {in.x, in.h0, in.c0, std::move(in.parameters), at<const T>(dropout), at<const T>(y), at<const T>(reserve)};
}

template <class T>
Forward<T> forward_of(const Shape& s, const Addresses& inputs, Address dropout, const Addresses& outputs,
                      Address reserve) {
    InputArrays<const T*> in(s, inputs);
    const OutputArrays<T*> out(outputs);
    return {in.x,    in.h0,   in.c0,         std::move(in.parameters), at<const T>(dropout), out.y,
            out.h_n, out.c_n, at<T>(reserve)};
}

template <class T>
Tangent<T> tangent_of(const Shape& s, const Addresses& inputs_dot, const Addresses& outputs_dot) {
    InputArrays<const T*> in(s, inputs_dot);
    const OutputArrays<T*> out(outputs_dot);
    return {in.x, in.h0, in.c0, std::move(in.parameters), out.y, out.h_n, out.c_n};
}

template <class T>
Gradients<T> gradients_of(const Shape& s, const Addresses& gradients, int64_t groups) {
    if (groups < 1 || (s.B && s.B % groups)) throw std::invalid_argument("groups must divide the batch");
    InputArrays<T*> in(s, gradients);
    return {in.x, in.h0, in.c0, std::move(in.parameters), groups};
}

template <class T>
void forward_at(const Shape& s, int threads, const Addresses& inputs, Address dropout, const Addresses& outputs,
                Address reserve, bool bfloat16_weights) {
    if (bfloat16_weights && sizeof(T) != sizeof(float))
        throw std::invalid_argument("bfloat16 weights: expected float32 beside them");
    Forward<T> call = forward_of<T>(s, inputs, dropout, outputs, reserve);
    call.bfloat16_weights = bfloat16_weights;
    const py::gil_scoped_release release;
    forward(s, call, threads);
}

template <class T>
void forward_dual_at(const Shape& s, int threads, const Addresses& inputs, Address dropout, const Addresses& outputs,
                     const Addresses& inputs_dot, const Addresses& outputs_dot) {
    const Forward<T> call = forward_of<T>(s, inputs, dropout, outputs, 0);
    const Tangent<T> dot = tangent_of<T>(s, inputs_dot, outputs_dot);
    for (const auto& p : dot.parameters)
        if (p.w_ih || p.w_hh || p.b_ih || p.b_hh || p.w_hr || p.unit)
            throw std::invalid_argument("values with tangents: expected none of the weights");
    const py::gil_scoped_release release;
    forward_dual(s, call, dot, threads);
}

// inner: gradients of what stays inside: pre-activations, c, outputs of the lower layers; d_reserve: of all that was
// saved, these among it; one of the two at most.
template <class T>
void backward_at(const Shape& s, int threads, const Addresses& inputs, Address dropout, Address y, Address reserve,
                 const Addresses& cotangents, const Addresses& inner, Address d_reserve, const Addresses& gradients,
                 int64_t groups, Address adjoints) {
    expect(inner, 3);
    if (d_reserve && (inner[0] || inner[1] || inner[2]))
        throw std::invalid_argument("gradients of what was saved: expected once");
    const Past<T> past = past_of<T>(s, inputs, dropout, y, reserve);
    const OutputArrays<const T*> of(cotangents);
    Cotangents<T> all{
        of.y, of.h_n, of.c_n, at<const T>(inner[0]), at<const T>(inner[1]), nullptr, at<const T>(inner[2])};
    if (d_reserve) add_saved(s, at<const T>(d_reserve), all);
    const Gradients<T> to = gradients_of<T>(s, gradients, groups);
    const py::gil_scoped_release release;
    backward(s, past, all, to, at<T>(adjoints), threads);
}

template <class T>
void tangent_at(const Shape& s, int threads, const Addresses& inputs, Address dropout, Address y, Address reserve,
                const Addresses& inputs_dot, const Addresses& outputs_dot, Address z_dot) {
    const Past<T> past = past_of<T>(s, inputs, dropout, y, reserve);
    const Tangent<T> dot = tangent_of<T>(s, inputs_dot, outputs_dot);
    const py::gil_scoped_release release;
    tangent(s, past, dot, at<T>(z_dot), threads);
}

template <class T>
void second_at(const Shape& s, int threads, const Addresses& inputs, Address dropout, Address y, Address reserve,
               Address adjoints, const Addresses& inputs_dot, const Addresses& outputs_dot, const Addresses& direct,
               int64_t groups, Address d_y, Address d_reserve) {
    const Past<T> past = past_of<T>(s, inputs, dropout, y, reserve);
    const Tangent<T> dot = tangent_of<T>(s, inputs_dot, outputs_dot);
    const Gradients<T> to = gradients_of<T>(s, direct, groups);
    const SavedGradients<T> saved = saved_gradients(s, at<T>(d_y), at<T>(d_reserve));
    const py::gil_scoped_release release;
    second(s, past, at<const T>(adjoints), dot, to, saved, threads);
}

// Weights: w, starts, w_in, bias, leak, scale.
template <class T>
std::unique_ptr<Reservoirs<T>> make_reservoirs(int unit, int64_t M, int64_t Q, int64_t I, int64_t H, int64_t F,
                                               const Addresses& a) {
    expect(a, 7);
    if (unit < 0 || unit > 2) throw std::invalid_argument("unit: expected 0 (tanh), 1 (relu) or 2 (identity)");
    if (M < 1 || Q < 1 || I < 0 || H < 1 || F < 1 || (a[0] ? F != H : !a[1] || !a[2]) || H > INT32_MAX)
        throw std::invalid_argument("sizes out of range");
    const ReservoirWeights<T> weights{at<const T>(a[0]), at<const float>(a[1]), at<const int32_t>(a[2]),
                                      at<const T>(a[3]), at<const T>(a[4]),     at<const T>(a[5]),
                                      at<const T>(a[6])};
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

// Arrays: x, y, gram, moment.
std::unique_ptr<GramSum> make_gram_sum(int64_t S, int64_t n, int64_t Z, int64_t O, int64_t x_stride,
                                       const Addresses& a) {
    expect(a, 4);
    if (S < 0 || n < 0 || Z < 1 || O < 1) throw std::invalid_argument("sizes out of range");
    const ReadoutRows rows{S, n, Z, O, at<const double>(a[0]), x_stride, at<const double>(a[1])};
    return std::make_unique<GramSum>(rows, at<double>(a[2]), at<double>(a[3]));
}

void work_on_gram_sum(GramSum& sum, int threads) {
    if (threads < 1) throw std::invalid_argument("threads: expected at least one");
    const py::gil_scoped_release release;
    sum.work(threads);
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

// What is not known, or has not been needed so far, is None.
py::dict describe_machine() {
    const Caches& caches = asked_machine().caches;
    const Machine* const measured = machine_if_measured();
    const std::string name = cpu_name();
    py::dict d;
    d["cpu"] = name.empty() ? py::object(py::none()) : py::str(name);
    d["l1d_kib"] = caches.l1d / 1024;
    d["l2_kib"] = caches.l2 / 1024;
    d["l3_kib"] = caches.l3 ? py::object(py::int_(caches.l3 / 1024)) : py::none();
    d["l3_threads"] = caches.l3 ? py::object(py::int_(caches.l3_threads)) : py::none();
    d["vectors_per_cycle"] = measured ? py::object(py::float_(measured->rates.multiply_adds)) : py::none();
    d["far_bytes_per_cycle"] = measured ? py::object(py::float_(measured->rates.far_bytes)) : py::none();
    return d;
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_C, m) {
    using namespace rnnfast;
    m.doc() = "rnnfast's compiled core. Sizes and pointers only; see csrc/rnnfast.h.";
    py::class_<Shape>(m, "Shape")
        .def(py::init(&make_shape), py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
             py::arg("P"), py::arg("L"), py::arg("D"), py::arg("bias"), py::arg("batch_sizes"), py::arg("resets") = 0,
             py::arg("precision") = 0)
        .def_property_readonly("rows", &Shape::rows)
        .def_property_readonly("reserve", [](const Shape& s) { return ReserveLayout::of_forward(s, s.rows()); })
        .def_property_readonly("adjoints", [](const Shape& s) { return AdjointLayout(s); });
    py::class_<Cell>(m, "Cell")
        .def_readonly("name", &Cell::name)
        .def_readonly("index", &Cell::index)
        .def_readonly("gates", &Cell::gates)
        .def_property_readonly("input_gates", [](const Cell& c) { return slots(c.input_gates); })
        .def_property_readonly("recurrent_gates", [](const Cell& c) { return slots(c.recurrent_gates); })
        .def_property_readonly("torch_gates",
                               [](const Cell& c) { return std::vector<int>(c.torch_gates, c.torch_gates + c.gates); })
        .def_property_readonly("state",
                               [](const Cell& c) { return c.has_c()       ? "own"
                                                          : c.carries_h() ? "output"
                                                                          : "none"; })
        .def_readonly("saves_gates", &Cell::saves_gates)
        .def_readonly("projects", &Cell::projects)
        .def_readonly("unit_parameters", &Cell::unit_parameters);
    m.def("cells", &cells);
    py::class_<ReserveLayout>(m, "ReserveLayout")
        .def_readonly("gates", &ReserveLayout::gates)
        .def_readonly("c", &ReserveLayout::c)
        .def_readonly("m", &ReserveLayout::m)
        .def_readonly("hidden", &ReserveLayout::hidden)
        .def_readonly("size", &ReserveLayout::size);
    py::class_<AdjointLayout>(m, "AdjointLayout")
        .def_readonly("dz_stride", &AdjointLayout::dz_stride)
        .def_readonly("dz", &AdjointLayout::dz)
        .def_readonly("dm", &AdjointLayout::dm)
        .def_readonly("dc", &AdjointLayout::dc)
        .def_readonly("size", &AdjointLayout::size);
    py::class_<Layout>(m, "Layout")
        .def(py::init<py::object, std::vector<Layout::Shape>, int>(), py::arg("tensor_type"), py::arg("shapes"),
             py::arg("bytes"))
        .def("addresses", &Layout::addresses, py::arg("tensors"));
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
    define_stream(m);
    py::class_<GramSum>(m, "GramSum")
        .def(py::init(&make_gram_sum), py::arg("S"), py::arg("n"), py::arg("Z"), py::arg("O"), py::arg("x_stride"),
             py::arg("arrays"))
        .def("work", &work_on_gram_sum, py::arg("threads"));
    m.def("isa", &isa);
    m.def("usable_isas", &usable_isas);
    m.def("isas_by_name", &isas_by_name);
    m.def("select_isa", &select_isa);
    m.def("has_products", [](int precision) { return has_products(precision_of(precision)); });
    m.def("machine", &describe_machine);
    m.def(
        "fma_peak_gflops",
        [](int bytes, int threads, int precision) {
            return bytes == 4 ? fma_peak_gflops<float>(threads, precision_of(precision))
                              : fma_peak_gflops<double>(threads, precision_of(precision));
        },
        py::arg("bytes"), py::arg("threads"), py::arg("precision") = 0);
}
