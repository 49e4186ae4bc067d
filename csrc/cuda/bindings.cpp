// Python's door to the CUDA sweeps: addresses arrive as integers, the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cells/list.h"
#include "run.h"

namespace py = pybind11;

namespace rnnfast::cuda {
namespace {

using Address = uintptr_t;  // tensor.data_ptr(), 0: absent
using Addresses = std::vector<Address>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A plan for the sweeps of one layer, of any length.
struct Planned {
    int device;
    Sweep sweep;
    Number number;
    bool backward;
    Plan plan;
};

// What run(std::integral_constant<Number, ...>) returns for a number that is known at run time.
template <int n = 0, class Run>
auto with_number(Number number, const Run& run) {
    constexpr std::integral_constant<Number, static_cast<Number>(n)> one;
    if constexpr (one() != Number::bfloat16)  // the last of them
        if (number != one()) return with_number<n + 1>(number, run);
    return run(one);
}

struct Traits {
    int gates;
    bool projects, runs;
};

template <class... Cells>
std::vector<Traits> traits_of(CellList<Cells...>) {
    return {{Cells::gates, Cells::projects, runs<Cells>}...};
}

Planned asked(int device, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward) {
    static const auto cells = traits_of(AllCells());
    if (cell < 0 || cell >= static_cast<int>(cells.size()) || number < 0 || number > 4 || H < 1 || P < 0 || B < 0 ||
        H > INT32_MAX / 64 || P > INT32_MAX / 64 || B > INT32_MAX / 64 || D < 1 || D > 2)
        throw std::invalid_argument("sizes out of range");
    const auto [gates, projects, runs] = cells[cell];
    if (!runs) throw std::invalid_argument("no kernel for this cell");
    if (P && !projects) throw std::invalid_argument("no projection of this cell");
    const Sweep sweep{cell, gates, 0, B, H, P, D, nullptr, nullptr};
    return {device, sweep, static_cast<Number>(number), backward, {}};
}

Planned plan_for(int device, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward,
                 const std::string& forced) {
    Planned p = asked(device, cell, number, H, P, B, D, backward);
    const py::gil_scoped_release release;
    const OnDevice here(device);
    p.plan =
        with_number(p.number, [&](auto n) { return make_plan<n.value>(card_of(device), p.sweep, backward, forced); });
    return p;
}

// For a card that need not be there. clusters: how many of each size run at a time; of others as many as have room.
Planned plan_on(const Card& card, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward,
                const std::string& forced, const std::map<int, int>& clusters) {
    Planned p = asked(0, cell, number, H, P, B, D, backward);
    p.plan = choose(card, p.sweep, p.number, backward, forced, [&](const Geometry& g) {
        const auto known = clusters.find(g.C);
        return known == clusters.end() ? card.multiprocessors / g.C : known->second;
    });
    return p;
}

void expect(const Addresses& a, size_t count) {
    if (a.size() != count) throw std::invalid_argument("wrong number of arrays");
}

Sweep sweep_of(const Planned& p, bool backward, int64_t T, Address batch_sizes, Address offsets) {
    if (p.backward != backward) throw std::invalid_argument("the plan is for the other direction of a pass");
    if (T < 0 || T > INT32_MAX || !batch_sizes != !offsets) throw std::invalid_argument("sizes out of range");
    Sweep s = p.sweep;
    s.T = T;
    s.batch_sizes = at<const int64_t>(batch_sizes);
    s.offsets = at<const int64_t>(offsets);
    return s;
}

// Arrays in the order of sweep.h.
void forward_at(const Planned& p, Address stream, int64_t T, Address batch_sizes, Address offsets, const Addresses& a) {
    expect(a, 10);
    const Sweep s = sweep_of(p, false, T, batch_sizes, offsets);
    const Forward call{at<void>(a[0]), at<void>(a[1]), at<void>(a[2]), at<void>(a[3]), at<void>(a[4]),
                       at<void>(a[5]), at<void>(a[6]), at<void>(a[7]), at<void>(a[8]), at<void>(a[9])};
    const py::gil_scoped_release release;
    const OnDevice here(p.device);
    void* const on = at<void>(stream);
    with_number(p.number, [&](auto n) { run<n.value>(p.plan, s, call, on); });
}

void backward_at(const Planned& p, Address stream, int64_t T, Address batch_sizes, Address offsets, const Addresses& a,
                 bool add) {
    expect(a, 13);
    const Sweep s = sweep_of(p, true, T, batch_sizes, offsets);
    const Backward call{at<void>(a[0]),  at<void>(a[1]),
                        at<void>(a[2]),  at<void>(a[3]),
                        at<void>(a[4]),  at<void>(a[5]),
                        at<void>(a[6]),  at<void>(a[7]),
                        at<void>(a[8]),  at<void>(a[9]),
                        at<void>(a[10]), at<void>(a[11]),
                        at<void>(a[12]), add};
    const py::gil_scoped_release release;
    const OnDevice here(p.device);
    void* const on = at<void>(stream);
    with_number(p.number, [&](auto n) { run<n.value>(p.plan, s, call, on); });
}

bool runs_on(int device) {
    const OnDevice here(device);
    return runs_here();
}

void upload_at(int device, Address stream, Address host, int64_t count, Address there) {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    upload(at<const int64_t>(host), count, at<int64_t>(there), at<void>(stream));
}

}  // namespace
}  // namespace rnnfast::cuda

PYBIND11_MODULE(RNNFAST_CUDA_MODULE, m) {
    using namespace rnnfast::cuda;
    m.doc() = "rnnfast's CUDA kernels. Sizes and addresses only; see csrc/cuda/sweep.h.";
    py::class_<Card>(m, "Card")
        .def(py::init([](int sm, int multiprocessors, int shared_memory) {
                 return Card{sm, multiprocessors, shared_memory};
             }),
             py::arg("sm"), py::arg("multiprocessors"), py::arg("shared_memory"))
        .def_static("of", &card_of, py::arg("device"))
        .def_readonly("sm", &Card::sm)
        .def_readonly("multiprocessors", &Card::multiprocessors)
        .def_readonly("shared_memory", &Card::shared_memory);
    py::class_<Planned>(m, "Plan")
        .def(py::init(&plan_for), py::arg("device"), py::arg("cell"), py::arg("number"), py::arg("H"), py::arg("P"),
             py::arg("B"), py::arg("D"), py::arg("backward"), py::arg("forced"))
        .def_static("on", &plan_on, py::arg("card"), py::arg("cell"), py::arg("number"), py::arg("H"), py::arg("P"),
                    py::arg("B"), py::arg("D"), py::arg("backward"), py::arg("forced"),
                    py::arg("clusters") = std::map<int, int>())
        .def_property_readonly("kernel", [](const Planned& p) { return name(p.plan.kernel); })
        .def_property_readonly("waves", [](const Planned& p) { return p.plan.waves; })
        .def_property_readonly("why", [](const Planned& p) { return p.plan.why; })
        .def_property_readonly("workspace_bytes", [](const Planned& p) { return p.plan.workspace; })
        .def_property_readonly("geometry", [](const Planned& p) {
            const Geometry& g = p.plan.geometry;
            py::dict out;
            out["C"] = g.C;
            out["U"] = g.U;
            out["tiles"] = g.tiles;
            out["slices"] = g.slices;
            out["threads"] = g.threads();
            out["splits"] = g.splits;
            out["k_steps"] = g.k_steps;
            out["at_a_time"] = g.at_a_time;
            out["shared"] = g.shared;
            return out;
        });
    m.def("forward", &forward_at);
    m.def("backward", &backward_at);
    m.def("upload", &upload_at);
    m.def("runs_on", &runs_on);
}
