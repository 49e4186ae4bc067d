// The definitions that a file for one number type instantiates.
#pragma once

#include "persistent.h"
#include "run.h"
#include "steps.h"

namespace rnnfast::cuda {

template <Number number>
struct Stored {
    using type = typename NumberOf<number>::type;
};
template <>
struct Stored<Number::float64> {
    using type = double;
};

// No tensor cores for these, so no persistent kernels either.
constexpr bool by_steps_alone(Number number) { return number == Number::float64 || number == Number::float32; }

template <Number number, bool is_lstm>
void run_forward_of(const Plan& plan, const Sweep& sweep, const Forward& call, void* stream) {
    if constexpr (!by_steps_alone(number))
        if (plan.kernel != Kernel::steps) return forward_persistent<number, is_lstm>(plan, sweep, call, stream);
    forward_by_steps<typename Stored<number>::type, is_lstm>(sweep, call, stream);
}

template <Number number, bool is_lstm>
void run_backward_of(const Plan& plan, const Sweep& sweep, const Backward& call, void* stream) {
    if constexpr (!by_steps_alone(number))
        if (plan.kernel != Kernel::steps) return backward_persistent<number, is_lstm>(plan, sweep, call, stream);
    backward_by_steps<typename Stored<number>::type, is_lstm>(sweep, call, stream);
}

template <Number number>
void run_forward(const Plan& plan, const Sweep& sweep, const Forward& call, void* stream) {
    (sweep.cell == Cell::lstm ? run_forward_of<number, true> : run_forward_of<number, false>)(plan, sweep, call,
                                                                                              stream);
}

template <Number number>
void run_backward(const Plan& plan, const Sweep& sweep, const Backward& call, void* stream) {
    (sweep.cell == Cell::lstm ? run_backward_of<number, true> : run_backward_of<number, false>)(plan, sweep, call,
                                                                                                stream);
}

#define RNNFAST_RUN(number)                                                                      \
    template void run_forward<Number::number>(const Plan&, const Sweep&, const Forward&, void*); \
    template void run_backward<Number::number>(const Plan&, const Sweep&, const Backward&, void*)

}  // namespace rnnfast::cuda
