// What the drivers, the layouts and Python know of a cell besides its name; csrc/cells has the equations.
#pragma once

namespace rnnfast {

// A cell has up to so many slots of pre-activations for each unit: vectors of one panel of a product.
constexpr int max_gates = 4;

// Neighbouring slots.
struct Slots {
    int first, count;
};

// What a cell carries from step to step, beside what W_hh makes of h.
enum class State {
    none,
    own,    // c
    output  // h itself
};

}  // namespace rnnfast
