// The core without Python: every instruction set against a plain loop, every gradient against finite differences, with
// arrays of exactly the right size so that the address sanitizer sees the first number read or written outside.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>

#include "cpu/kernels.h"
#include "cpu/runtime/memory.h"
#include "cpu/stack/layout.h"
#include "larger.h"
#include "rnnfast.h"

namespace {

using namespace rnnfast;

struct Case {
    const char* name;
    const char* cell;
    int64_t T, B, I, H, P, L, D;
    bool bias, initial, dropout;
    std::vector<int64_t> batch_sizes;
    std::vector<uint8_t> resets = {};

    int64_t size(int64_t t) const { return batch_sizes.empty() ? B : batch_sizes[t]; }
    bool reset(int64_t row) const { return !resets.empty() && resets[row]; }
    Shape shape() const {
        const int64_t* sizes = batch_sizes.empty() ? nullptr : batch_sizes.data();
        return {&find_cell(cell), T, B, I, H, P, L, D, bias, sizes, resets.empty() ? nullptr : resets.data()};
    }
};

std::vector<uint8_t> every_fifth_but_first(int64_t rows) {
    std::vector<uint8_t> resets(rows);
    for (int64_t row = 5; row < rows; row += 5) resets[row] = 1;
    return resets;
}

const Case cases[] = {
    {"ones", "lstm", 1, 1, 1, 1, 0, 1, 1, true, false, false, {}},
    {"one sequence", "tanh", 9, 1, 3, 20, 0, 1, 1, true, true, false, {}},
    {"ragged", "lstm", 7, 13, 5, 19, 0, 1, 1, true, true, false, {}},
    {"deep both ways", "lstm", 5, 4, 6, 33, 0, 3, 2, true, true, true, {}},
    {"no bias", "relu", 6, 7, 2, 17, 0, 2, 1, false, false, true, {}},
    {"projected", "lstm", 5, 7, 3, 21, 5, 2, 2, true, true, false, {}},
    {"packed", "lstm", 6, 5, 3, 18, 0, 2, 2, true, true, true, {5, 5, 3, 3, 1, 1}},
    {"packed projected", "lstm", 4, 6, 3, 34, 17, 2, 2, false, false, false, {6, 4, 4, 2}},
    {"packed elman", "tanh", 5, 9, 8, 16, 0, 2, 2, true, true, false, {9, 7, 7, 2, 1}},
    {"few rows", "lstm", 2, 2, 5, 21, 6, 2, 2, true, true, true, {}},
    {"one step", "tanh", 1, 3, 37, 70, 0, 2, 1, true, true, false, {}},
    {"two steps, long sums", "lstm", 2, 11, 500, 7, 3, 1, 1, true, true, false, {}},
    {"one step, long sums", "relu", 1, 19, 400, 18, 0, 1, 2, true, true, false, {}},
    {"wide", "tanh", 4, 6, 100, 130, 0, 2, 2, true, true, false, {}},
    {"long blocks", "lstm", 40, 9, 300, 12, 0, 1, 1, true, false, false, {}},
    {"gru", "gru", 7, 13, 5, 19, 0, 1, 1, true, true, false, {}},
    {"gru, deep both ways", "gru", 5, 4, 6, 33, 0, 3, 2, true, true, true, {}},
    {"gru, packed", "gru", 6, 5, 3, 18, 0, 2, 2, true, true, true, {5, 5, 3, 3, 1, 1}},
    {"gru, one", "gru", 1, 1, 1, 1, 0, 1, 1, true, true, false, {}},
    {"gru, few rows", "gru", 2, 3, 5, 21, 0, 2, 2, false, true, false, {}},
    {"gru, long sums", "gru", 2, 11, 500, 19, 0, 1, 1, true, false, false, {}},
    {"gru, wide", "gru", 3, 6, 100, 130, 0, 1, 1, true, true, false, {}},
    {"leaky", "leaky_tanh", 7, 13, 5, 19, 0, 1, 1, true, true, false, {}},
    {"leaky, deep both ways", "leaky_tanh", 5, 4, 6, 33, 0, 3, 2, false, true, true, {}},
    {"leaky, packed", "leaky_relu", 6, 5, 3, 18, 0, 2, 2, true, true, true, {5, 5, 3, 3, 1, 1}},
    {"leaky, few rows", "leaky_relu", 2, 3, 5, 21, 0, 1, 2, true, false, false, {}},
    {"leaky, wide", "leaky_tanh", 3, 6, 30, 130, 0, 1, 1, true, true, false, {}},
    {"resets", "lstm", 5, 4, 3, 19, 0, 2, 2, true, true, true, {}, {0, 1, 0, 1, 0, 0, 0, 0, 0, 1,
                                                                    1, 1, 0, 0, 1, 0, 1, 0, 0, 0}},
    {"resets, zeros", "lstm", 4, 3, 3, 21, 0, 1, 2, true, false, false, {}, {0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}},
    {"resets, projected", "lstm", 4, 3, 3, 21, 5, 2, 2, true, true, false, {}, {1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1}},
    {"resets, elman", "tanh", 5, 4, 3, 18, 0, 2, 2, true, true, false, {}, {0, 1, 0, 1, 0, 0, 0, 0, 0, 1,
                                                                            1, 1, 0, 0, 1, 0, 1, 0, 0, 0}},
    {"resets, relu", "relu", 3, 2, 3, 9, 0, 1, 2, true, true, false, {}, {0, 1, 1, 0, 0, 1}},
    {"resets, gru", "gru", 5, 4, 3, 19, 0, 2, 2, true, true, true, {}, {0, 1, 0, 1, 0, 0, 0, 0, 0, 1,
                                                                        1, 1, 0, 0, 1, 0, 1, 0, 0, 0}},
    {"resets, gru, packed",
     "gru",
     6,
     5,
     3,
     18,
     0,
     2,
     2,
     true,
     true,
     true,
     {5, 5, 3, 3, 1, 1},
     {0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1}},
    {"resets, lstm, packed",
     "lstm",
     6,
     5,
     3,
     18,
     0,
     2,
     2,
     true,
     true,
     true,
     {5, 5, 3, 3, 1, 1},
     {0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1}},
    {"resets, leaky", "leaky_tanh", 5, 4, 3, 19, 0, 2, 2, true, true, true, {}, {0, 1, 0, 1, 0, 0, 0, 0, 0, 1,
                                                                                 1, 1, 0, 0, 1, 0, 1, 0, 0, 0}},
    {"resets, few rows", "gru", 3, 2, 3, 9, 0, 1, 2, true, true, false, {}, {0, 1, 1, 0, 0, 1}},
    {"resets, blocks", "lstm", 70, 3, 2, 9, 0, 1, 2, true, true, false, {}, every_fifth_but_first(210)},
};

template <class T>
using Numbers = std::vector<T>;

// All arrays of one call, filled with random numbers.
template <class T>
struct Arrays {
    Numbers<T> x, h0, c0, dropout, y, h_n, c_n, reserve, dy, dh_n, dc_n, dx, dh0, dc0, swept;
    std::vector<Numbers<T>> weights, gradients;

    Arrays(const Case& c, unsigned seed) : random_(seed) {
        const Shape s = c.shape();
        const int64_t N = s.rows(), R = s.recurrent(), LD = s.L * s.D;
        x = draw(N * s.I);
        y = draw(N * s.D * R);
        h_n = draw(LD * s.B * R);
        c_n = draw(s.cell->has_c() ? LD * s.B * s.H : 0);
        reserve = draw(ReserveLayout::of_forward(s, N).size);
        if (c.initial) h0 = draw(h_n.size()), c0 = draw(c_n.size());
        if (c.dropout) dropout = draw((s.L - 1) * N * s.D * R);
        dy = draw(y.size()), dh_n = draw(h_n.size()), dc_n = draw(c_n.size());
        dx = draw(x.size()), dh0 = draw(h0.size()), dc0 = draw(c0.size());
        for (int64_t l = 0; l < s.L; ++l)
            for (int64_t d = 0; d < s.D; ++d) {
                std::vector<int64_t> sizes{s.input_rows() * s.input(l), s.recurrent_rows() * R};
                if (s.bias) sizes.insert(sizes.end(), {s.input_rows(), s.recurrent_rows()});
                if (s.P) sizes.push_back(s.P * s.H);
                if (s.cell->unit_parameters) sizes.push_back(s.cell->unit_parameters * s.H);
                for (const int64_t size : sizes) {
                    weights.push_back(draw(size, T(1 / std::sqrt(double(s.H)))));
                    gradients.push_back(draw(size));
                }
            }
    }

    template <class P, class From>
    static std::vector<Parameters<P>> parameters(const Shape& s, From& from) {
        size_t i = 0;
        const auto next = [&](bool there = true) -> P { return there ? from[i++].data() : nullptr; };
        std::vector<Parameters<P>> out;
        while (i < from.size())
            out.push_back({next(), next(), next(s.bias), next(s.bias), next(s.P), next(s.cell->unit_parameters)});
        return out;
    }

    void forward(const Shape& s, int threads, bool keep) { rnnfast::forward<T>(s, call(s, keep), threads); }
    Forward<T> call(const Shape& s, bool keep) {
        return {x.data(), optional(h0), optional(c0), parameters<const T*>(s, weights), optional(dropout),
                y.data(), h_n.data(),   c_n.data(),   keep ? reserve_or_y() : nullptr};
    }
    void backward(const Shape& s, int threads, int64_t groups = 1, const T* z = nullptr) {
        Cotangents<T> of = cotangents();
        of.z = z;
        rnnfast::backward<T>(s, past(s), of, to(s, groups), optional(swept), threads);
    }
    // Treat `v` as a direction: its inputs are tangents, its outputs become the tangent outputs.
    void tangent(const Shape& s, int threads, Arrays& v, T* z) {
        rnnfast::tangent<T>(s, past(s), v.direction(s), z, threads);
    }
    // `first` gets the gradients of the tangents, `plain` those of the inputs: the derivative of the backward pass, and
    // one more pass, whose cotangents are those of `plain` and what that derivative has for the forward pass.
    void second(const Shape& s, int threads, Arrays& v, Arrays& first, Arrays& plain) {
        first.swept.resize(AdjointLayout(s).size);
        rnnfast::backward<T>(s, past(s), first.cotangents(), first.to(s, 1), first.swept.data(), threads);
        const T unset = std::numeric_limits<T>::quiet_NaN();
        Numbers<T> y(plain.dy.size(), unset), saved(ReserveLayout::of_forward(s, s.rows()).size, unset);
        rnnfast::second<T>(s, past(s), first.swept.data(), v.direction(s), plain.to(s, 1),
                           saved_gradients(s, y.data(), saved.data()), threads);
        std::vector<Numbers<T>> direct;
        for (const auto* gradient : plain.input_gradients()) direct.push_back(*gradient);
        for (size_t i = 0; i < y.size(); ++i) y[i] += plain.dy[i];
        Cotangents<T> of = plain.cotangents();
        of.y = y.data();
        add_saved(s, saved.data(), of);
        rnnfast::backward<T>(s, past(s), of, plain.to(s, 1), nullptr, threads);
        for (size_t i = 0; i < direct.size(); ++i)
            for (size_t j = 0; j < direct[i].size(); ++j) (*plain.input_gradients()[i])[j] += direct[i][j];
    }
    Tangent<T> direction(const Shape& s) {
        return {x.data(), optional(h0), optional(c0), parameters<const T*>(s, weights),
                y.data(), h_n.data(),   c_n.data()};
    }
    Past<T> past(const Shape& s) {
        return {x.data(),          optional(h0), optional(c0),  parameters<const T*>(s, weights),
                optional(dropout), y.data(),     reserve_or_y()};
    }
    Cotangents<T> cotangents() { return {dy.data(), dh_n.data(), optional(dc_n)}; }
    Gradients<T> to(const Shape& s, int64_t groups) {
        return {dx.data(), optional(dh0), optional(dc0), parameters<T*>(s, gradients), groups};
    }
    double loss() const { return dot(y, dy) + dot(h_n, dh_n) + dot(c_n, dc_n); }

    std::vector<Numbers<T>*> inputs() {
        std::vector<Numbers<T>*> all{&x, &h0, &c0};
        for (auto& w : weights) all.push_back(&w);
        return all;
    }
    std::vector<Numbers<T>*> input_gradients() {
        std::vector<Numbers<T>*> all{&dx, &dh0, &dc0};
        for (auto& g : gradients) all.push_back(&g);
        return all;
    }
    static double dot(const Numbers<T>& a, const Numbers<T>& b) {
        double sum = 0;
        for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * double(b[i]);
        return sum;
    }
    Numbers<T> draw(int64_t n, T scale = 1) {
        std::normal_distribution<double> normal;
        Numbers<T> out(n);
        for (T& value : out) value = T(normal(random_)) * scale;
        return out;
    }

private:
    T* reserve_or_y() { return reserve.empty() ? y.data() : reserve.data(); }
    static T* optional(Numbers<T>& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

    std::mt19937 random_;
};

bool has(const Slots& slots, int g) { return g >= slots.first && g < slots.first + slots.count; }

bool is(const Shape& s, const char* cell) { return std::string(s.cell->name) == cell; }

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// One step of one sequence, by the equations.
template <class T>
void plain_step(const Shape& s, const Parameters<const T*>& p, int64_t I, const std::vector<double>& x,
                std::vector<double>& h, std::vector<double>& c) {
    const int64_t R = s.recurrent(), rows = s.input_rows();  // as many of W_hh
    std::vector<double> of_x(rows), of_h(rows), z(rows), m(s.H);
    for (int64_t j = 0; j < rows; ++j) {
        of_x[j] = s.bias ? double(p.b_ih[j]) : 0, of_h[j] = s.bias ? double(p.b_hh[j]) : 0;
        for (int64_t k = 0; k < I; ++k) of_x[j] += double(p.w_ih[j * I + k]) * x[k];
        for (int64_t k = 0; k < R; ++k) of_h[j] += double(p.w_hh[j * R + k]) * h[k];
        z[j] = of_x[j] + of_h[j];
    }
    for (int64_t j = 0; j < s.H; ++j) {
        if (is(s, "tanh")) m[j] = std::tanh(z[j]);
        if (is(s, "relu")) m[j] = std::max(0.0, z[j]);
        if (is(s, "leaky_tanh")) m[j] = (1 - double(p.unit[j])) * h[j] + double(p.unit[j]) * std::tanh(z[j]);
        if (is(s, "leaky_relu")) m[j] = (1 - double(p.unit[j])) * h[j] + double(p.unit[j]) * std::max(0.0, z[j]);
        if (is(s, "gru")) {  // rows r,z,n
            const double r = sigmoid(z[j]), keep = sigmoid(z[s.H + j]);
            m[j] = (1 - keep) * std::tanh(of_x[2 * s.H + j] + r * of_h[2 * s.H + j]) + keep * h[j];
        }
        if (is(s, "lstm")) {
            c[j] = sigmoid(z[s.H + j]) * c[j] + sigmoid(z[j]) * std::tanh(z[2 * s.H + j]);
            m[j] = sigmoid(z[3 * s.H + j]) * std::tanh(c[j]);
        }
    }
    if (!s.P) {
        h = m;
        return;
    }
    for (int64_t r = 0; r < s.P; ++r) {
        h[r] = 0;
        for (int64_t j = 0; j < s.H; ++j) h[r] += double(p.w_hr[r * s.H + j]) * m[j];
    }
}

// y (N,D*R), h_n (L*D,B,R) and c_n (L*D,B,H).
struct Outputs {
    std::vector<double> y, h_n, c_n;
};

// A whole stack by plain loops in float64.
template <class T>
Outputs plain_forward(const Case& which, Arrays<T>& a) {
    const Shape s = which.shape();
    const int64_t R = s.recurrent(), N = s.rows();
    const auto parameters = Arrays<T>::template parameters<const T*>(s, a.weights);
    std::vector<int64_t> first(s.T + 1, 0);
    for (int64_t t = 0; t < s.T; ++t) first[t + 1] = first[t] + which.size(t);
    std::vector<double> in(a.x.begin(), a.x.end()), out, h_n(a.h_n.size()), c_n(a.c_n.size());
    for (int64_t l = 0; l < s.L; ++l) {
        const int64_t I = s.input(l);
        out.assign(N * s.D * R, 0);
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t b = 0; b < s.B; ++b) {
                const int64_t state = (l * s.D + d) * s.B + b;
                int64_t last = 0;
                while (last + 1 < s.T && b < which.size(last + 1)) ++last;
                // Episode by episode, each a sequence of its own.
                for (int64_t begin = 0, end; begin <= last; begin = end) {
                    for (end = begin + 1; end <= last && !which.reset(first[end] + b);) ++end;
                    std::vector<double> h(R, 0), c(s.H, 0);
                    const bool initial = which.initial && begin == 0 && !which.reset(b);
                    if (initial) std::copy_n(a.h0.begin() + state * R, R, h.begin());
                    if (initial && s.cell->has_c()) std::copy_n(a.c0.begin() + state * s.H, s.H, c.begin());
                    for (int64_t step = 0; step < end - begin; ++step) {
                        const int64_t row = first[d ? end - 1 - step : begin + step] + b;
                        const std::vector<double> x(in.begin() + row * I, in.begin() + (row + 1) * I);
                        plain_step(s, parameters[l * s.D + d], I, x, h, c);
                        std::copy(h.begin(), h.end(), out.begin() + (row * s.D + d) * R);
                    }
                    if (d ? begin != 0 : end != last + 1) continue;  // the direction goes on
                    std::copy(h.begin(), h.end(), h_n.begin() + state * R);
                    if (s.cell->has_c()) std::copy(c.begin(), c.end(), c_n.begin() + state * s.H);
                }
            }
        in = out;
        if (which.dropout && l + 1 < s.L)
            for (size_t i = 0; i < in.size(); ++i) in[i] *= double(a.dropout[l * in.size() + i]);
    }
    return {out, h_n, c_n};
}

int failures = 0;

void expect(bool good, const char* what, const char* name, int bytes, int threads, double error) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s: %s, float%d, %s, %d threads, error %g\n", what, name, bytes * 8, isa().c_str(), threads,
                error);
}

template <class T>
void check_forward(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<T> a(which, 1);
    const Outputs truth = plain_forward(which, a);
    a.forward(s, threads, true);
    const Numbers<T> trained[] = {a.y, a.h_n, a.c_n};
    const auto compare = [&](const std::vector<double>& expected, const Numbers<T>& got, const char* what) {
        // relu is not bounded by 1: measured against the largest number
        double error = 0, scale = 1;
        for (size_t i = 0; i < expected.size(); ++i) error = larger(error, std::abs(expected[i] - double(got[i])));
        for (const double value : expected) scale = larger(scale, std::abs(value));
        const double epsilon = sizeof(T) == 4 ? 6e-8 : 1.2e-16;
        expect(error <= 64 * epsilon * scale, what, which.name, sizeof(T), threads, error);
    };
    compare(truth.y, a.y, "forward");
    compare(truth.h_n, a.h_n, "last h");
    compare(truth.c_n, a.c_n, "last c");
    a.forward(s, threads, false);
    const bool same = a.y == trained[0] && a.h_n == trained[1] && a.c_n == trained[2];
    expect(same, "inference equals training", which.name, sizeof(T), threads, 0);
}

// Every gradient along a random direction v: <gradient, v> = (loss(p + e v) - loss(p - e v)) / 2e.
void check_backward(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> a(which, 2);
    a.forward(s, threads, true);
    a.backward(s, threads);
    const auto inputs = a.inputs(), gradients = a.input_gradients();
    for (size_t i = 0; i < inputs.size(); ++i) {
        const Numbers<double> start = *inputs[i], v = a.draw(start.size());
        const double step = 1e-6 / std::sqrt(double(v.size()) + 1);
        double loss[2];
        for (const int side : {0, 1}) {
            for (size_t j = 0; j < v.size(); ++j) (*inputs[i])[j] = start[j] + (side ? step : -step) * v[j];
            a.forward(s, threads, false);
            loss[side] = a.loss();
        }
        *inputs[i] = start;
        const double slope = (loss[1] - loss[0]) / (2 * step), exact = Arrays<double>::dot(*gradients[i], v);
        expect(std::abs(slope - exact) <= 1e-5 * (1 + std::abs(exact)), "gradient", which.name, 8, threads,
               slope - exact);
    }
}

// The tangents of the outputs and of the gradients along v, against finite differences of both.
void check_second(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> a(which, 4), v(which, 5), first(which, 6), plain(which, 7), expected(which, 7);
    v.dropout = a.dropout;
    a.forward(s, threads, true);
    a.second(s, threads, v, first, plain);
    const auto inputs = a.inputs(), directions = v.inputs();
    const double step = 1e-6;
    std::vector<Numbers<double>> slopes, start;
    for (const auto* input : inputs) start.push_back(*input);
    Numbers<double> y_slope;
    for (const int side : {1, -1}) {
        for (size_t i = 0; i < inputs.size(); ++i)
            for (size_t j = 0; j < inputs[i]->size(); ++j) (*inputs[i])[j] += side * step * (*directions[i])[j];
        a.dy = first.dy, a.dh_n = first.dh_n, a.dc_n = first.dc_n;
        a.forward(s, threads, true);
        a.backward(s, threads);
        const auto gradients = a.input_gradients();
        slopes.resize(gradients.size());
        y_slope.resize(a.y.size());
        for (size_t i = 0; i < gradients.size(); ++i) {
            slopes[i].resize(gradients[i]->size());
            for (size_t j = 0; j < slopes[i].size(); ++j) slopes[i][j] += side * (*gradients[i])[j] / (2 * step);
        }
        for (size_t j = 0; j < y_slope.size(); ++j) y_slope[j] += side * a.y[j] / (2 * step);
        for (size_t i = 0; i < inputs.size(); ++i) *inputs[i] = start[i];
    }
    a.forward(s, threads, true);
    a.backward(s, threads);
    for (size_t i = 0; i < slopes.size(); ++i)  // first-order gradients of the tangents are those of `first`
        expect(*first.input_gradients()[i] == *a.input_gradients()[i], "first equals backward", which.name, 8, threads,
               0);
    a.dy = plain.dy, a.dh_n = plain.dh_n, a.dc_n = plain.dc_n;
    a.backward(s, threads);
    double error = 0;
    for (size_t j = 0; j < y_slope.size(); ++j) error = larger(error, std::abs(y_slope[j] - v.y[j]));
    expect(error <= 1e-6, "tangent", which.name, 8, threads, error);
    for (size_t i = 0; i < slopes.size(); ++i) {
        double worst = 0, scale = 1;
        for (size_t j = 0; j < slopes[i].size(); ++j) {
            const double want = slopes[i][j] + (*a.input_gradients()[i])[j];
            worst = larger(worst, std::abs((*plain.input_gradients()[i])[j] - want));
            scale = larger(scale, std::abs(want));
        }
        expect(worst <= 1e-6 * scale, "second derivative", which.name, 8, threads, worst / scale);
    }
}

// What the tangent pass gives for the pre-activations and what the backward pass takes for them belong together:
// <outputs' gradients, tangent outputs> + <z, z_dot> = <gradients, tangents>.
void check_pre_activations(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> a(which, 9), v(which, 10), without(which, 10);
    v.dropout = a.dropout;
    a.forward(s, threads, true);
    const int64_t units = s.rows() * s.gates() * s.H;
    Numbers<double> z_dot = a.draw(s.L * s.D * units);
    const Numbers<double> z = a.draw(s.L * s.D * units);
    a.tangent(s, threads, v, z_dot.data());
    a.tangent(s, threads, without, nullptr);
    expect(v.y == without.y && v.h_n == without.h_n && v.c_n == without.c_n, "tangents of z change nothing else",
           which.name, 8, threads, 0);
    a.backward(s, threads, 1, z.data());
    const auto dot = Arrays<double>::dot;
    const double there = dot(a.dy, v.y) + dot(a.dh_n, v.h_n) + dot(a.dc_n, v.c_n) + dot(z, z_dot);
    double back = 0, scale = 1;
    for (size_t i = 0; i < v.inputs().size(); ++i) {
        const double part = dot(*a.input_gradients()[i], *v.inputs()[i]);
        back += part, scale += std::abs(part);
    }
    expect(std::abs(there - back) <= 1e-11 * scale, "pre-activations, there and back", which.name, 8, threads,
           there - back);
    if (s.cell->saves_gates) return;
    double error = 0;  // of the top layer: y_dot = slope(y) * z_dot
    for (int64_t row = 0; row < s.rows(); ++row)
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t j = 0; j < s.H; ++j) {
                const int64_t i = (row * s.D + d) * s.H + j;
                const double slope = is(s, "tanh") ? 1 - a.y[i] * a.y[i] : a.y[i] > 0;
                error = larger(error, std::abs(v.y[i] - slope * z_dot[((s.L - 1) * s.D + d) * units + row * s.H + j]));
            }
    expect(error <= 1e-14, "tangents of z", which.name, 8, threads, error);
}

// A tangent is linear in the direction: it is the sum of those along its arrays, each with nothing beside it.
void check_parts(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> a(which, 14), v(which, 15);
    v.dropout = a.dropout;
    a.forward(s, threads, true);
    const Tangent<double> whole = v.direction(s);
    rnnfast::tangent<double>(s, a.past(s), whole, nullptr, threads);
    Numbers<double> rest = v.y;
    const auto subtract = [&](const Tangent<double>& part) {
        rnnfast::tangent<double>(s, a.past(s), part, nullptr, threads);
        for (size_t i = 0; i < rest.size(); ++i) rest[i] -= v.y[i];
    };
    Tangent<double> nothing = whole;
    nothing.x = nothing.h0 = nothing.c0 = nullptr;
    nothing.parameters.assign(whole.parameters.size(), {});
    for (const auto array : {&Tangent<double>::x, &Tangent<double>::h0, &Tangent<double>::c0}) {
        Tangent<double> part = nothing;
        part.*array = whole.*array;
        subtract(part);
    }
    using P = Parameters<const double*>;
    for (const auto array : {&P::w_ih, &P::w_hh, &P::b_ih, &P::b_hh, &P::w_hr, &P::unit}) {
        Tangent<double> part = nothing;
        for (size_t i = 0; i < whole.parameters.size(); ++i) part.parameters[i].*array = whole.parameters[i].*array;
        subtract(part);
    }
    double error = 0, scale = 1;
    for (const double value : v.y) scale = larger(scale, std::abs(value));
    for (const double value : rest) error = larger(error, std::abs(value));
    expect(error <= 1e-12 * scale, "parts of a tangent", which.name, 8, threads, error);
}

// Values with tangents of x, h0 and c0 in one pass: the same bits as in two.
template <class T>
void check_dual(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<T> values(which, 11), tangents(which, 12), two_values(which, 11), two_tangents(which, 12);
    two_values.forward(s, threads, true);
    Tangent<T> dot = two_tangents.direction(s);
    dot.parameters.assign(dot.parameters.size(), {});
    rnnfast::tangent<T>(s, two_values.past(s), dot, nullptr, threads);
    Tangent<T> along = tangents.direction(s);
    along.parameters = dot.parameters;
    rnnfast::forward_dual<T>(s, values.call(s, false), along, threads);
    const auto off = [](const Arrays<T>& a, const Arrays<T>& b) {
        double worst = 0;
        for (const auto& [one, two] : {std::pair(&a.y, &b.y), {&a.h_n, &b.h_n}, {&a.c_n, &b.c_n}})
            for (size_t i = 0; i < one->size(); ++i)
                worst = larger(worst, std::abs(double((*one)[i]) - double((*two)[i])));
        return worst;
    };
    // Rows of a step or two, and few rows at all, go through the weights in another order: a rounding for each summand.
    const double roundings = s.T <= 2 || s.rows() <= 8 ? double(std::max<int64_t>(64, s.I + s.recurrent())) : 0;
    const double bound = roundings * double(std::numeric_limits<T>::epsilon());
    const double value = off(values, two_values), tangent = off(tangents, two_tangents);
    expect(value <= bound, "values beside tangents", which.name, sizeof(T), threads, value);
    expect(tangent <= bound, "tangents beside values", which.name, sizeof(T), threads, tangent);
}

// Gradients of each group of sequences, added up, are those of the batch.
void check_groups(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> whole(which, 8), grouped(which, 8);
    for (auto& gradient : grouped.gradients) gradient.resize(gradient.size() * s.B);
    whole.forward(s, threads, true);
    whole.backward(s, threads);
    grouped.forward(s, threads, true);
    grouped.backward(s, threads, s.B);
    for (size_t i = 0; i < whole.gradients.size(); ++i) {
        const size_t size = whole.gradients[i].size();
        double worst = 0;
        for (size_t j = 0; j < size; ++j) {
            double sum = 0;
            for (int64_t b = 0; b < s.B; ++b) sum += grouped.gradients[i][b * size + j];
            worst = larger(worst, std::abs(sum - whole.gradients[i][j]));
        }
        expect(worst <= 1e-11, "groups add up", which.name, 8, threads, worst);
    }
}

// What the sweep leaves: dL/dz summed up over all rows is the gradient of the bias (and what follows it that of the
// unit parameters), dL/dc_t of the first step times its forget gate is that of c_0; and all gradients are the same bits
// as without.
void check_swept(const Case& which, int threads) {
    const Shape s = which.shape();
    Arrays<double> plain(which, 9), asked(which, 9);
    const int64_t N = s.rows(), H = s.H;
    const AdjointLayout at(s);
    asked.swept.resize(at.size);
    for (auto* arrays : {&plain, &asked}) {
        arrays->forward(s, threads, true);
        arrays->backward(s, threads);
    }
    expect(plain.gradients == asked.gradients && plain.dx == asked.dx, "keeping the sweep changes nothing", which.name,
           8, threads, 0);
    const auto parameters = Arrays<double>::parameters<const double*>(s, plain.gradients);
    double worst = 0;
    for (int64_t i = 0; i < s.L * s.D; ++i) {
        const auto compare = [&](const double* gradient, int64_t column) {  // of H units
            for (int64_t j = 0; gradient && j < H; ++j) {
                double sum = -gradient[j];
                for (int64_t row = 0; row < N; ++row)
                    sum += asked.swept[at.dz + (i * N + row) * at.dz_stride + column + j];
                worst = larger(worst, std::abs(sum));
            }
        };
        const Cell& cell = *s.cell;
        for (int g = 0; s.bias && g < cell.gates; ++g) {
            const int64_t row = cell.torch_gates[g] * H;
            if (has(cell.input_gates, g)) compare(parameters[i].b_ih + row, g * H);
            if (has(cell.recurrent_gates, g)) compare(parameters[i].b_hh + row, g * H);
        }
        for (int u = 0; u < cell.unit_parameters; ++u) compare(parameters[i].unit + u * H, (cell.gates + u) * H);
        if (asked.dc0.empty()) continue;
        for (int64_t b = 0; b < s.B; ++b) {
            if (which.reset(b)) continue;
            // backwards, a sequence begins with the last step of its first episode
            int64_t row = b;
            if (i % s.D == 1)
                for (int64_t t = 1; t < s.T && b < which.size(t); ++t) {
                    const int64_t next = row + which.size(t - 1);
                    if (which.reset(next)) break;
                    row = next;
                }
            for (int64_t j = 0; j < H; ++j) {
                const double f = asked.reserve[((i * N + row) * 4 + 1) * H + j];
                const double dc = f * asked.swept[at.dc + (i * N + row) * H + j];
                worst = larger(worst, std::abs(dc - asked.dc0[(i * s.B + b) * H + j]));
            }
        }
    }
    expect(worst <= 1e-11, "what the sweep leaves", which.name, 8, threads, worst);
}

// Results must not depend on the number of threads, to the last bit.
template <class T>
void check_threads(const Case& which) {
    const Shape s = which.shape();
    Arrays<T> one(which, 3), many(which, 3);
    one.forward(s, 1, true);
    one.backward(s, 1);
    many.forward(s, 3, true);
    many.backward(s, 3);
    bool same = one.y == many.y && one.h_n == many.h_n && one.c_n == many.c_n && one.dx == many.dx;
    same = same && one.dh0 == many.dh0 && one.dc0 == many.dc0 && one.gradients == many.gradients;
    expect(same, "one thread equals three", which.name, sizeof(T), 3, 0);
}

// Leaky units with a leak of 1 are Elman's, to the last bit.
void check_leak_of_one(const Case& which, const char* elman, int threads) {
    Case plain_case = which;
    plain_case.cell = elman;
    const Shape s = which.shape(), plain_shape = plain_case.shape();
    Arrays<float> leaky(which, 13), plain(plain_case, 13);
    const size_t each = leaky.weights.size() / (s.L * s.D);
    std::vector<Numbers<float>> kept;
    for (size_t i = 0; i < leaky.weights.size(); ++i)
        if (i % each == each - 1)
            std::fill(leaky.weights[i].begin(), leaky.weights[i].end(), 1.f);
        else
            kept.push_back(leaky.weights[i]);
    plain.weights = kept, plain.x = leaky.x, plain.h0 = leaky.h0, plain.dropout = leaky.dropout;
    plain.dy = leaky.dy, plain.dh_n = leaky.dh_n;
    leaky.forward(s, threads, true), leaky.backward(s, threads);
    plain.forward(plain_shape, threads, true), plain.backward(plain_shape, threads);
    for (size_t i = leaky.gradients.size(); i-- > 0;)
        if (i % each == each - 1) leaky.gradients.erase(leaky.gradients.begin() + i);
    const bool same = leaky.y == plain.y && leaky.h_n == plain.h_n && leaky.dx == plain.dx && leaky.dh0 == plain.dh0;
    expect(same && leaky.gradients == plain.gradients, "a leak of 1 is none", which.name, 4, threads, 0);
}

void check_selection() {
    for (const char* name : {"avx1024", "AVX2 "}) {
        bool refused = false;
        try {
            select_isa(name);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        expect(refused, "unknown instruction set is an error", name, 0, 0, 0);
    }
}

// Half a vector of AVX-512 is a vector of AVX2, which computes no empty lanes.
void check_narrow_cells() {
    const int lanes = kernels<double>().lanes;
    for (int64_t H = 1; H <= 3 * lanes; ++H) {
        const int expected = isa() == "avx512" && 2 * H <= lanes ? lanes / 2 : lanes;
        expect(kernels_for<double>(H).lanes == expected, "lanes of narrow cells", "units", 8, int(H), 0);
        expect(kernels_for<float>(2 * H).lanes == 2 * expected, "lanes of narrow cells", "units", 4, int(2 * H), 0);
    }
}

// Blocks must not overlap, also when they come from those that were given back, by several threads.
void check_memory() {
    const auto use = [](unsigned char mark) {
        std::vector<Memory> blocks;
        std::vector<std::size_t> sizes;
        for (int i = 0; i < 40; ++i) {
            sizes.push_back(i % 3 ? Memory::large + std::size_t(i) * 1000003 : 100 + std::size_t(i));
            blocks.push_back(Memory(sizes.back()));
            std::memset(blocks.back().data(), mark + i, sizes.back());
            if (i % 4 == 1)
                blocks[i / 2] = Memory(sizes[i / 2] = 64), std::memset(blocks[i / 2].data(), mark + i / 2, 64);
        }
        for (int i = 0; i < 40; ++i) {
            const auto* bytes = static_cast<const unsigned char*>(blocks[i].data());
            const unsigned char expected = mark + i;
            const bool whole =
                bytes[0] == expected && bytes[sizes[i] / 2] == expected && bytes[sizes[i] - 1] == expected;
            const bool aligned = reinterpret_cast<std::uintptr_t>(bytes) % 64 == 0;
            expect(whole && aligned, "memory is one's own and aligned", "block", int(sizes[i]), mark, 0);
        }
    };
    std::thread other([&] { use(100); });
    use(0);
    other.join();
    use(200);
}

}  // namespace

int main() {
    int checks = 0;
    for (const std::string& name : usable_isas()) {
        select_isa(name);
        if (has_products(Precision::medium)) continue;  // else as the one before
        check_narrow_cells();
        for (const Case& which : cases) {
            for (const int threads : {1, 2, 5}) {
                check_forward<float>(which, threads);
                check_forward<double>(which, threads);
                check_backward(which, threads);
                if (std::string(which.cell).find("relu") == std::string::npos)
                    check_second(which, threads);  // relu bends where no difference is small
                check_pre_activations(which, threads);
                check_parts(which, threads);
                check_dual<float>(which, threads);
                check_dual<double>(which, threads);
                check_groups(which, threads);
                check_swept(which, threads);
                if (find_cell(which.cell).unit_parameters)
                    check_leak_of_one(which, std::strchr(which.cell, '_') + 1, threads);
                ++checks;
            }
            check_threads<float>(which);
            check_threads<double>(which);
        }
    }
    check_selection();
    check_memory();
    std::printf("%d case runs, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
