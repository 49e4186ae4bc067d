// What is known of reservoirs by those who use them and by the kernels.
#pragma once

namespace rnnfast {

// What a unit does with its input.
enum class Unit { tanh, relu, identity };

// So many neighbouring units get their connections from as many neighbours: one load of a vector of them, where
// independent sources would take a slow gather. The longest vector of any instruction set.
constexpr int run_length = 16;

}  // namespace rnnfast
