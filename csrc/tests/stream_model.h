// Streams with random weights, for their tests.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/stream/file.h"

namespace rnnfast {

template <class T>
std::vector<T> draw(std::mt19937& random, int64_t count, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    std::vector<T> numbers(static_cast<size_t>(count));
    for (T& number : numbers) number = T(normal(random));
    return numbers;
}

// The arrays of AnyStream, of a size that states stay of the size of 1 with.
template <class T>
std::vector<std::vector<T>> draw_parameters(std::mt19937& random, const AnyStream& stream) {
    std::vector<std::vector<T>> arrays;
    for (const int64_t size : stream.parameter_sizes())
        arrays.push_back(draw<T>(random, size, .7 / std::sqrt(double(stream.shape.H))));
    return arrays;
}

template <class Pointer, class T>
std::vector<Pointer> pointers_to(std::vector<std::vector<T>>& arrays) {
    std::vector<Pointer> pointers;
    for (std::vector<T>& array : arrays) pointers.push_back(array.data());
    return pointers;
}

template <class T>
std::unique_ptr<AnyStream> draw_stream(std::mt19937& random, const StreamShape& shape, int64_t B) {
    std::unique_ptr<AnyStream> stream = make_stream(shape, sizeof(T), B);
    std::vector<std::vector<T>> arrays = draw_parameters<T>(random, *stream);
    stream->set_parameters(pointers_to<const void*>(arrays));
    return stream;
}

}  // namespace rnnfast
