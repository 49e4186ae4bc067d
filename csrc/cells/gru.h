// Gated recurrent unit (Cho et al. 2014) as torch has it: r resets what W_hh makes of h, bias and all, so that the two
// parts of n's pre-activation have a slot each, what x brings (x_n) and what h brings (h_n). Slots x_n,r,z,h_n; after
// activation n,r,z,h_n.
#pragma once

#include "number.h"

namespace rnnfast {
namespace {

struct Gru {
    static constexpr const char* name = "gru";
    static constexpr int gates = 4, unit_parameters = 0;
    static constexpr Slots input_gates = {0, 3}, recurrent_gates = {1, 3};
    static constexpr int torch_gates[] = {2, 0, 1, 2};  // torch: r,z,n
    static constexpr State state = State::output;
    static constexpr bool saves_gates = true, projects = false;

    template <class Z, class A>
    static RNNFAST_CELL void activate(const Z (&slots)[4], A (&a)[4]) {
        auto& [n, r, z, h_n] = a;
        r = sigmoid(slots[1]);
        z = sigmoid(slots[2]);
        h_n = slots[3];
        n = tanh(slots[0] + r * h_n);
    }
    // h_{t-1} becomes h_t = (1 - z) * n + z * h_{t-1}, with a rounding less
    template <class A>
    static RNNFAST_CELL A combine(const A (&a)[4], A& h) {
        auto& [n, r, z, h_n] = a;
        h = n + z * (h - n);
        return h;
    }
    // dL/dslots and dL/dh_{t-1} past W_hh, from dL/dh_t
    template <class A, class V>
    static RNNFAST_CELL void backward(const A (&a)[4], const A& h_prev, const A&, const V& dh, const V&,
                                      A (&d_slots)[4], A& dh_prev) {
        auto& [n, r, z, h_n] = a;
        auto& [d_n, d_r, d_z, d_h_n] = d_slots;
        d_n = dh * (one - z) * (one - n * n);
        d_r = d_n * h_n * (r * (one - r));
        d_z = dh * (h_prev - n) * (z * (one - z));
        d_h_n = d_n * r;
        dh_prev = dh * z;
    }
};

}  // namespace
}  // namespace rnnfast
