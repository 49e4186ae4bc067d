// One unit of one sequence at one step: pre-activations to h and c, and dL/dh back to dL/dz. W: float or double.
#pragma once

#include "device.h"

namespace rnnfast::cuda {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
template <class W>
__device__ inline W sigmoid_of(W x) {
    return W(1) / (W(1) + exp_of(-x));
}

template <class W>
__device__ inline W elman(Cell cell, W z) {
    return cell == Cell::relu ? (z < W(0) ? W(0) : z) : tanh_of(z);  // relu of NaN is NaN
}

// dL/dz of dL/dh
template <class W>
__device__ inline W elman_backward(Cell cell, W h, W dh) {
    return cell == Cell::relu ? (h > W(0) ? dh : W(0)) : dh * (W(1) - h * h);
}

// z (i,f,g,o) becomes the gates, c becomes c_t; returns h
template <class W>
__device__ inline W lstm(W (&z)[4], W& c) {
    z[0] = sigmoid_of(z[0]);
    z[1] = sigmoid_of(z[1]);
    z[2] = tanh_of(z[2]);
    z[3] = sigmoid_of(z[3]);
    c = z[1] * c + z[0] * z[2];
    return z[3] * tanh_of(c);
}

// gates become dL/dz; dc, which is dL/dc_t by way of c_{t+1}, becomes dL/dc_{t-1}; returns dL/dc_t
template <class W>
__device__ inline W lstm_backward(W (&gates)[4], W c, W c_before, W dh, W& dc) {
    const W i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = tanh_of(c);
    const W all = dc + dh * o * (W(1) - t * t);
    gates[0] = all * g * i * (W(1) - i);
    gates[1] = all * c_before * f * (W(1) - f);
    gates[2] = all * i * (W(1) - g * g);
    gates[3] = dh * t * o * (W(1) - o);
    dc = all * f;
    return all;
}

}  // namespace rnnfast::cuda
