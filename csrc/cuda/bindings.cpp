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
    bool projects, is_persistent;
};

template <class... Cells>
std::vector<Traits> traits_of(CellList<Cells...>) {
    return {{Cells::gates, Cells::projects, is_persistent<Cells>}...};
}

// by_steps: for resets or gradients inside; cells that no other kernel knows go by steps anyway.
Planned asked(int device, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward,
              bool by_steps) {
    static const auto cells = traits_of(AllCells());
    if (cell < 0 || cell >= static_cast<int>(cells.size()) || number < 0 || number > 4 || H < 1 || P < 0 || B < 0 ||
        H > INT32_MAX / 64 || P > INT32_MAX / 64 || B > INT32_MAX / 64 || D < 1 || D > 2)
        throw std::invalid_argument("sizes out of range");
    const auto [gates, projects, is_persistent] = cells[cell];
    if (P && !projects) throw std::invalid_argument("no projection of this cell");
    const Sweep sweep{cell, gates, 0, B, H, P, D, nullptr, nullptr, nullptr, nullptr, by_steps || !is_persistent};
    return {device, sweep, static_cast<Number>(number), backward, {}};
}

Planned plan_for(int device, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward,
                 bool by_steps, const std::string& forced) {
    Planned p = asked(device, cell, number, H, P, B, D, backward, by_steps);
    const py::gil_scoped_release release;
    const OnDevice here(device);
    p.plan =
        with_number(p.number, [&](auto n) { return make_plan<n.value>(card_of(device), p.sweep, backward, forced); });
    return p;
}

// For a card that need not be there. clusters: how many of each size run at a time; of others as many as have room.
Planned plan_on(const Card& card, int cell, int number, int64_t H, int64_t P, int64_t B, int64_t D, bool backward,
                bool by_steps, const std::string& forced, const std::map<int, int>& clusters) {
    Planned p = asked(0, cell, number, H, P, B, D, backward, by_steps);
    p.plan = choose(card, p.sweep, p.number, backward, forced, [&](const Geometry& g) {
        const auto known = clusters.find(g.C);
        return known == clusters.end() ? card.multiprocessors / g.C : known->second;
    });
    return p;
}

// The arrays of a call, one after the other in the order of sweep.h.
class InOrder {
public:
    InOrder(const Addresses& addresses, size_t count) : next_(addresses.data()) {
        if (addresses.size() != count) throw std::invalid_argument("wrong number of arrays");
    }
    operator void*() { return at<void>(*next_++); }

private:
    const Address* next_;
};

// Of the rows: batch_sizes, offsets, resets, first_reset.
Sweep sweep_of(const Planned& p, bool backward, int64_t T, const Addresses& rows) {
    if (p.backward != backward) throw std::invalid_argument("the plan is for the other direction of a pass");
    if (rows.size() != 4) throw std::invalid_argument("wrong number of arrays");
    if (T < 0 || T > INT32_MAX || !rows[0] != !rows[1] || !rows[2] != !rows[3])
        throw std::invalid_argument("sizes out of range");
    if (rows[2] && !p.sweep.by_steps) throw std::invalid_argument("the plan is for sweeps without resets");
    Sweep s = p.sweep;
    s.T = T;
    s.batch_sizes = at<const int64_t>(rows[0]);
    s.offsets = at<const int64_t>(rows[1]);
    s.resets = at<const bool>(rows[2]);
    s.first_reset = at<const int64_t>(rows[3]);
    return s;
}

template <class Call>
void run_on(const Planned& p, Address stream, const Sweep& s, const Call& call) {
    const py::gil_scoped_release release;
    const OnDevice here(p.device);
    with_number(p.number, [&](auto n) { run<n.value>(p.plan, s, call, at<void>(stream)); });
}

void forward_at(const Planned& p, Address stream, int64_t T, const Addresses& rows, const Addresses& arrays) {
    InOrder a(arrays, 12);
    run_on(p, stream, sweep_of(p, false, T, rows), Forward{a, a, a, a, a, a, a, a, a, a, a, a});
}

void backward_at(const Planned& p, Address stream, int64_t T, const Addresses& rows, const Addresses& arrays,
                 bool add) {
    InOrder a(arrays, 20);
    const Backward call{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, add};
    if ((call.dm || call.dc_more) && !p.sweep.by_steps)
        throw std::invalid_argument("the plan is for sweeps without gradients inside");
    run_on(p, stream, sweep_of(p, true, T, rows), call);
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
             py::arg("B"), py::arg("D"), py::arg("backward"), py::arg("by_steps"), py::arg("forced"))
        .def_static("on", &plan_on, py::arg("card"), py::arg("cell"), py::arg("number"), py::arg("H"), py::arg("P"),
                    py::arg("B"), py::arg("D"), py::arg("backward"), py::arg("by_steps"), py::arg("forced"),
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
