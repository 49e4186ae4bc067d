// Leaky units: a unit keeps a part of h_{t-1} and takes over a share `leak` of f, f = tanh or relu of its
// pre-activation. The leak is a parameter of each unit; where it is 1, this is an Elman unit.
#pragma once

#include "elman.h"

namespace rnnfast {
namespace {

template <class F>
constexpr const char* leaky_name = nullptr;
template <>
constexpr const char* leaky_name<Tanh> = "leaky_tanh";
template <>
constexpr const char* leaky_name<Relu> = "leaky_relu";

template <class F>
struct Leaky {
    static constexpr const char* name = leaky_name<F>;
    static constexpr int gates = 1, unit_parameters = 1;
    static constexpr Slots input_gates = {0, 1}, recurrent_gates = {0, 1};
    static constexpr int torch_gates[] = {0};
    static constexpr State state = State::output;
    static constexpr bool saves_gates = true, projects = false;

    template <class Z, class A>
    static RNNFAST_CELL void activate(const Z (&z)[1], A (&f)[1]) {
        f[0] = F::of(z[0]);
    }
    // h_{t-1} becomes h_t
    template <class A>
    static RNNFAST_CELL A combine(const A (&f)[1], A& h, const A (&leak)[1]) {
        h = (one - leak[0]) * h + leak[0] * f[0];
        return h;
    }
    // dL/dz, dL/dleak and dL/dh_{t-1} past W_hh, from dL/dh_t
    template <class A, class V>
    static RNNFAST_CELL void backward(const A (&f)[1], const A& h_prev, const A&, const V& dh, const V&, A (&dz)[1],
                                      A& dh_prev, const A (&leak)[1], A (&d_leak)[1]) {
        dz[0] = F::backward(f[0], dh * leak[0]);
        d_leak[0] = dh * (f[0] - h_prev);
        dh_prev = dh * (one - leak[0]);
    }
};

}  // namespace
}  // namespace rnnfast
