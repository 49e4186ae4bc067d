// What a reservoir's unit does with its input.
#pragma once

namespace rnnfast {

enum class Unit { tanh, relu, identity };

}  // namespace rnnfast
