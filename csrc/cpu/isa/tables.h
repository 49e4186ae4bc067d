// The table of each instruction set, by name.
#pragma once

#include "../kernels.h"

namespace rnnfast {

template <class T>
const Kernels<T>* baseline_kernels();
template <class T>
const Kernels<T>* avx2_kernels();
template <class T>
const Kernels<T>* avx512_kernels();

// With products of fewer bits than float32; nullptr: a unit has none for this precision, or gains nothing.
const Kernels<float>* avx512_bf16_products(Precision precision);
const Kernels<float>* amx_products(Precision precision);
// The same algorithms in plain C++, for any CPU, to be checked.
const Kernels<float>* emulated_avx512_bf16_products(Precision precision);
const Kernels<float>* emulated_amx_products(Precision precision);

}  // namespace rnnfast
