// The numbers that csrc/cells is written for here: a float or double, and by what its nonlinearities are computed.
#pragma once

#include "device.h"

#pragma nv_diagnostic push
#pragma nv_diag_suppress 177  // kernels have no use for the names of cells
#include "../cells/call.h"
#include "../cells/list.h"
#pragma nv_diagnostic pop

namespace rnnfast::cuda {

// To the last bits.
struct Exact {
    __device__ static float tanh(float x) { return tanhf(x); }
    __device__ static double tanh(double x) { return ::tanh(x); }
    __device__ static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
    __device__ static double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
};

// By the special function units, without a branch: for numbers that are rounded to 11 bits or fewer afterwards. Wrong
// by at most 2^-17 of tanh and (4 + |x|) 2^-22 of the logistic function; 0 or 1 up to 2^-21 far out, NaN of NaN.
struct Fast {
    static constexpr float log2_e = 1.4426950408889634f;
    __device__ static float tanh(float x) {
        const float square = x * x;
        const float small = x + x * square * (-1.f / 3 + square * (2.f / 15));  // where 1 - 2 / ... would cancel
        const float large = 1 - 2 * reciprocal_approx(1 + exp2_approx(2 * log2_e * x));
        return square < 0.0625f * 0.0625f ? small : large;
    }
    __device__ static float sigmoid(float x) { return reciprocal_approx(1 + exp2_approx(-log2_e * x)); }
};

template <class W, class Nonlinear>
struct Scalar {
    W x;

    __device__ friend Scalar operator+(Scalar a, Scalar b) { return {a.x + b.x}; }
    __device__ friend Scalar operator-(Scalar a, Scalar b) { return {a.x - b.x}; }
    __device__ friend Scalar operator-(W a, Scalar b) { return {a - b.x}; }
    __device__ friend Scalar operator-(Scalar a) { return {-a.x}; }
    __device__ friend Scalar operator*(Scalar a, Scalar b) { return {a.x * b.x}; }
    __device__ friend Scalar tanh(Scalar z) { return {Nonlinear::tanh(z.x)}; }
    __device__ friend Scalar sigmoid(Scalar z) { return {Nonlinear::sigmoid(z.x)}; }
    __device__ friend Scalar relu(Scalar z) { return {z.x < 0 ? 0 : z.x}; }  // of NaN is NaN
    __device__ friend Scalar if_positive(Scalar h, Scalar v) { return {h.x > 0 ? v.x : 0}; }
};

// Does a cell carry c beside h?
template <class Cell>
constexpr bool has_state = Cell::state == State::own;

// Is h itself what a cell carries?
template <class Cell>
constexpr bool carries_h = Cell::state == State::output;

// Does a forward pass leave activated gates behind? `cells`: where states are kept, if they are wanted.
template <class Cell>
RNNFAST_BOTH bool saves_gates(const void* cells) {
    static_assert(Cell::saves_gates || (Cell::gates == 1 && !has_state<Cell> && !Cell::projects),
                  "the gate of a cell that saves none is h itself");
    return Cell::saves_gates && (cells || !has_state<Cell>);
}

}  // namespace rnnfast::cuda
