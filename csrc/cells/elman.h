// Elman (1990): h_t = f(z_t), f tanh or relu. The gate is h_t itself, so nothing else of a step is saved.
#pragma once

#include "number.h"

namespace rnnfast {
namespace {

struct Tanh {
    static constexpr const char* name = "tanh";
    template <class Z>
    static RNNFAST_CELL auto of(const Z& z) {
        return tanh(z);
    }
    template <class A, class V>
    static RNNFAST_CELL A backward(const A& h, const V& dh) {
        return dh * (one - h * h);
    }
};

struct Relu {
    static constexpr const char* name = "relu";
    template <class Z>
    static RNNFAST_CELL auto of(const Z& z) {
        return relu(z);
    }
    template <class A, class V>
    static RNNFAST_CELL A backward(const A& h, const V& dh) {
        return if_positive(h, dh);
    }
};

template <class F>
struct Elman {
    static constexpr const char* name = F::name;
    static constexpr int gates = 1, unit_parameters = 0;
    static constexpr Slots input_gates = {0, 1}, recurrent_gates = {0, 1};
    static constexpr int torch_gates[] = {0};
    static constexpr State state = State::none;
    static constexpr bool saves_gates = false, projects = false;

    template <class Z, class A>
    static RNNFAST_CELL void activate(const Z (&z)[1], A (&a)[1]) {
        a[0] = F::of(z[0]);
    }
    template <class A>
    static RNNFAST_CELL A combine(const A (&a)[1], A&) {
        return a[0];
    }
    template <class A, class V>
    static RNNFAST_CELL void backward(const A (&a)[1], const A&, const A&, const V& dm, const V&, A (&dz)[1], A&) {
        dz[0] = F::backward(a[0], dm);
    }
};

}  // namespace
}  // namespace rnnfast
