// How many bits of its factors a product of the core takes.
#pragma once

namespace rnnfast {

// What the factors of the products of float32 numbers are rounded to, where the CPU gains by it; sums, states, carried
// gradients and all that is stored stay float32. Of float64 everything is float64. As torch.float32_matmul_precision.
enum class Precision {
    highest,  // not at all
    high,     // the sum of two bfloat16 numbers
    medium    // bfloat16
};

}  // namespace rnnfast
