// Streams for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast {

void define_stream(pybind11::module_& m);

}  // namespace rnnfast
