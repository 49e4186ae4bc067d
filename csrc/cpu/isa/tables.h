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

}  // namespace rnnfast
