// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates in torch's order
// i,f,g,o.
#pragma once

#include "number.h"

namespace rnnfast {
namespace {

struct Lstm {
    static constexpr const char* name = "lstm";
    static constexpr int gates = 4, unit_parameters = 0;
    static constexpr Slots input_gates = {0, 4}, recurrent_gates = {0, 4};
    static constexpr int torch_gates[] = {0, 1, 2, 3};
    static constexpr State state = State::own;
    static constexpr bool saves_gates = true, projects = true;

    // a: the gates of the pre-activations z
    template <class Z, class A>
    static RNNFAST_CELL void activate(const Z (&z)[4], A (&a)[4]) {
        a[0] = sigmoid(z[0]);
        a[1] = sigmoid(z[1]);
        a[2] = tanh(z[2]);
        a[3] = sigmoid(z[3]);
    }
    // c_{t-1} becomes c_t; returns m, which is h_t before a projection
    template <class A>
    static RNNFAST_CELL A combine(const A (&a)[4], A& c) {
        c = a[1] * c + a[0] * a[2];
        return a[3] * tanh(c);
    }
    // what dL/dm adds to dL/dc_t
    template <class A, class V>
    static RNNFAST_CELL A state_gradient(const A (&a)[4], const A& c, const V& dm) {
        const A t = tanh(c);
        return dm * a[3] * (one - t * t);
    }
    // dL/dz and dL/dc_{t-1} from dL/dm and all of dL/dc_t
    template <class A, class V>
    static RNNFAST_CELL void backward(const A (&a)[4], const A& c_prev, const A& c, const V& dm, const V& dc,
                                      A (&dz)[4], A& dc_prev) {
        dz[0] = dc * a[2] * (a[0] * (one - a[0]));
        dz[1] = dc * c_prev * (a[1] * (one - a[1]));
        dz[2] = dc * a[0] * (one - a[2] * a[2]);
        dz[3] = dm * tanh(c) * (a[3] * (one - a[3]));
        dc_prev = dc * a[1];
    }
};

}  // namespace
}  // namespace rnnfast
