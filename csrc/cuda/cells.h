// One unit of one sequence at one step: pre-activations to h and c, and dL/dh back to dL/dz. W: float or double.
#pragma once

#include "device.h"

namespace rnnfast::cuda {

// The nonlinearities to the last bits of float or double.
template <class W>
struct Exact {
    __device__ static W tanh(W x) {
        if constexpr (sizeof(W) == 4)
            return tanhf(x);
        else
            return ::tanh(x);
    }
    __device__ static W sigmoid(W x) {
        if constexpr (sizeof(W) == 4)
            return 1 / (1 + expf(-x));
        else
            return 1 / (1 + ::exp(-x));
    }
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

template <class Nonlinear, class W>
__device__ inline W elman(Cell cell, W z) {
    return cell == Cell::relu ? (z < W(0) ? W(0) : z) : Nonlinear::tanh(z);  // relu of NaN is NaN
}

// dL/dz of dL/dh
template <class W>
__device__ inline W elman_backward(Cell cell, W h, W dh) {
    return cell == Cell::relu ? (h > W(0) ? dh : W(0)) : dh * (W(1) - h * h);
}

// z (i,f,g,o) becomes the gates, c becomes c_t; returns h
template <class Nonlinear, class W>
__device__ inline W lstm(W (&z)[4], W& c) {
    z[0] = Nonlinear::sigmoid(z[0]);
    z[1] = Nonlinear::sigmoid(z[1]);
    z[2] = Nonlinear::tanh(z[2]);
    z[3] = Nonlinear::sigmoid(z[3]);
    c = z[1] * c + z[0] * z[2];
    return z[3] * Nonlinear::tanh(c);
}

// gates become dL/dz; dc, which is dL/dc_t by way of c_{t+1}, becomes dL/dc_{t-1}; returns dL/dc_t
template <class Nonlinear, class W>
__device__ inline W lstm_backward(W (&gates)[4], W c, W c_before, W dh, W& dc) {
    const W i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = Nonlinear::tanh(c);
    const W all = dc + dh * o * (W(1) - t * t);
    gates[0] = all * g * i * (W(1) - i);
    gates[1] = all * c_before * f * (W(1) - f);
    gates[2] = all * i * (W(1) - g * g);
    gates[3] = dh * t * o * (W(1) - o);
    dc = all * f;
    return all;
}

}  // namespace rnnfast::cuda
