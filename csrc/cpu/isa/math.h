// exp-based activations on vectors. Errors against libm: a few ulp; exact at 0, +-inf and saturation; NaN stays NaN.
#pragma once

#include "vector.h"

namespace rnnfast {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    // 1.5 * 2^23: adding it rounds to an integer in the low bits, there increased by the bias of an exponent.
    static constexpr float round_magic = 12582912.0f + 127;
    static constexpr float log2e = 1.44269504088896341f;
    static constexpr float ln2_high = 0.693145751953125f;  // 14 bits, so that n * ln2_high is exact
    static constexpr float ln2_low = 1.42860682030941723e-6f;
    static constexpr float largest = 88.722839f;    // n = 128 there: 2^n is inf
    static constexpr float smallest = -87.336544f;  // n = -126: the last normal power
    static constexpr float tanh_saturates = 10.0f;
    static constexpr int mantissa = 23;
    // (exp(r) - 1 - r) / r^2, highest power first: on |r| <= 0.347 > ln2/2, exp's largest error is the least, 3.2e-9.
    static constexpr float minimax[] = {0.0013950628926977515f, 0.008368969894945621f, 0.04166620224714279f,
                                        0.166665181517601f, 0.5f};
};

template <>
struct ExpConstants<double> {
    static constexpr double round_magic = 6755399441055744.0 + 1023;  // 1.5 * 2^52
    static constexpr double log2e = 1.44269504088896340736;
    static constexpr double ln2_high = 6.93147180369123816490e-01;  // 33 bits
    static constexpr double ln2_low = 1.90821492927058770002e-10;
    static constexpr double largest = 709.78271289338399;
    static constexpr double smallest = -708.39641853226408;
    static constexpr double tanh_saturates = 20.0;
    static constexpr int mantissa = 52;
    // As above, 3.5e-18.
    static constexpr double minimax[] = {2.511721421013766e-08, 2.7631463704169896e-07, 2.7557218474183317e-06,
                                         2.480148944986499e-05, 0.00019841269914760984, 0.0013888888947469924,
                                         0.008333333333308537,  0.041666666666513766,   0.16666666666666696,
                                         0.5000000000000013};
};

template <class T>
struct Power {
    Vec<T> scale;  // 2^n
    Vec<T> expm1;  // exp(r) - 1
};

// exp(x) = 2^n * exp(r) with |r| <= ln2/2, for smallest <= x <= largest.
template <class T>
inline Power<T> split_exp(Vec<T> x) {
    using C = ExpConstants<T>;
    const Vec<T> shifted = x * C::log2e + C::round_magic;
    const Vec<T> n = shifted - C::round_magic;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    Vec<T> p = splat<T>(C::minimax[0]);
    for (size_t j = 1; j < sizeof(C::minimax) / sizeof(T); ++j) p = p * r + C::minimax[j];
    const VecBits<T> exponent = (VecBits<T>)shifted << C::mantissa;
    return {(Vec<T>)exponent, r + r * r * p};
}

template <class T>
inline Vec<T> sigmoid_of(Vec<T> x) {
    using C = ExpConstants<T>;
    x = at_most(at_least(x, splat<T>(-C::largest)), splat<T>(-C::smallest));
    const Power<T> e = split_exp<T>(-x);
    return T(1) / (T(1) + e.scale * (T(1) + e.expm1));  // not scale + scale * expm1: scale may be inf, expm1 below 0
}

template <class T>
inline Vec<T> tanh_of(Vec<T> x) {
    using C = ExpConstants<T>;
    x = at_most(at_least(x, splat<T>(-C::tanh_saturates)), splat<T>(C::tanh_saturates));
    const Power<T> e = split_exp<T>(x + x);
    const Vec<T> expm1 = e.scale * e.expm1 + (e.scale - T(1));
    return expm1 / (expm1 + T(2));
}

// The functions that a cell is written with, see cells/number.h. Those of NaN are NaN.
inline Vec<float> sigmoid(Vec<float> x) { return sigmoid_of<float>(x); }
inline Vec<double> sigmoid(Vec<double> x) { return sigmoid_of<double>(x); }
inline Vec<float> tanh(Vec<float> x) { return tanh_of<float>(x); }
inline Vec<double> tanh(Vec<double> x) { return tanh_of<double>(x); }
inline Vec<float> relu(Vec<float> x) { return at_least(x, Vec<float>{}); }
inline Vec<double> relu(Vec<double> x) { return at_least(x, Vec<double>{}); }
// v where h > 0 or is NaN, else 0
inline Vec<float> if_positive(Vec<float> h, Vec<float> v) { return h <= 0 ? Vec<float>{} : v; }
inline Vec<double> if_positive(Vec<double> h, Vec<double> v) { return h <= 0 ? Vec<double>{} : v; }

}  // namespace
}  // namespace rnnfast
