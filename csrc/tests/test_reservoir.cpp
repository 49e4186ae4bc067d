// Reservoirs without Python: every instruction set and number of threads against plain loops in float64, with arrays of
// exactly the right size so that the address sanitizer sees the first number read or written outside.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>

#include "larger.h"
#include "rnnfast.h"

namespace {

using namespace rnnfast;

struct Case {
    const char* name;
    Unit unit;
    int64_t M, Q, B, T, I, H, F;  // F < H: sparse
    int64_t O, E;                 // O > 0: closed loop
    bool noise, shared_x;
    int64_t gap;  // numbers between the rows of states; closed loop: < 0 where no states are wanted

    ReservoirShape shape() const { return {unit, M, Q, I, H, F}; }
};

const Case cases[] = {
    {"ones", Unit::tanh, 1, 1, 1, 1, 1, 1, 1, 0, 0, false, false, 0},
    {"sparse", Unit::tanh, 1, 1, 1, 12, 3, 37, 5, 0, 0, true, false, 4},
    {"fewer units than a run", Unit::relu, 1, 1, 2, 9, 2, 5, 2, 0, 0, false, false, 0},
    {"dense", Unit::tanh, 1, 1, 3, 12, 3, 37, 37, 0, 0, true, false, 1},
    {"no inputs", Unit::identity, 1, 1, 1, 5, 0, 20, 3, 0, 0, false, false, 0},
    {"many", Unit::tanh, 3, 2, 5, 7, 4, 33, 6, 0, 0, true, true, 5},
    {"wide", Unit::tanh, 1, 6, 3, 6, 2, 37, 5, 0, 0, true, true, 1},
    {"wide loop", Unit::relu, 2, 1, 35, 5, 3, 21, 4, 1, 2, false, false, -1},
    {"wide, shared units", Unit::tanh, 1, 1, 5, 3, 2, 700, 300, 0, 0, false, false, 0},
    {"many dense", Unit::tanh, 2, 3, 9, 5, 2, 18, 18, 0, 0, false, true, 0},
    {"long chunks", Unit::tanh, 1, 1, 1, 210, 2, 16, 4, 0, 0, false, false, 0},
    {"shared units", Unit::tanh, 1, 1, 1, 3, 2, 700, 300, 0, 0, true, false, 0},
    {"shared units, dense", Unit::tanh, 1, 1, 2, 3, 2, 300, 300, 0, 0, false, false, 0},
    {"loop", Unit::tanh, 1, 1, 1, 12, 2, 37, 5, 2, 2, false, false, -1},
    {"loop with inputs", Unit::relu, 2, 2, 3, 6, 5, 21, 4, 2, 3, false, true, 2},
    {"dense loop", Unit::tanh, 1, 3, 2, 6, 4, 19, 19, 3, 1, true, false, -1},
    {"shared units, loop", Unit::tanh, 1, 1, 1, 4, 3, 700, 300, 3, 0, false, false, -1},
};

template <class T>
using Numbers = std::vector<T>;

// All arrays of one call.
template <class T>
struct Arrays {
    Numbers<T> w, w_in, bias, leak, scale, x, noise, h, states, b_out, w_x, w_h, y0, y;
    std::vector<float> sparse;  // w, with 24 bits, where F < H
    std::vector<int32_t> starts;
    bool wants_states;

    explicit Arrays(const Case& c) : wants_states(c.gap >= 0) {
        const int64_t S = c.M * c.Q, sequences = (c.shared_x ? 1 : S) * c.B, rows = S * c.B * c.T;
        w = draw(c.M * c.H * c.F, 1 / std::sqrt(double(c.F)));
        sparse = std::vector<float>(w.begin(), w.end());
        if (c.F < c.H) w = Numbers<T>(sparse.begin(), sparse.end());
        if (c.F < c.H) {
            starts.resize(c.M * ((c.H + run_length - 1) / run_length) * c.F);
            for (int32_t& start : starts) start = std::uniform_int_distribution<int32_t>(0, int32_t(c.H) - 1)(random);
        }
        w_in = draw(S * c.H * c.I), bias = draw(S * c.H), scale = draw(S, .5);
        leak = draw(S);
        for (T& a : leak) a = T(1 / (1 + double(a) * double(a)));
        x = draw(sequences * c.T * (c.I - c.O));
        noise = draw(c.noise ? rows * c.H : 0, .1);
        h = draw(S * c.B * c.H);
        states = draw(wants_states ? (rows - 1) * (c.H + c.gap) + c.H : 0);
        b_out = draw(S * c.O), w_x = draw(S * c.O * c.E, .3), w_h = draw(S * c.O * c.H, .1 / std::sqrt(double(c.H)));
        y0 = draw(S * c.B * c.O), y = draw(rows * c.O);
    }

    void run(const Case& c, int threads) {
        const Reservoirs<T> reservoirs(c.shape(), {starts.empty() ? w.data() : nullptr, sparse.data(), starts.data(),
                                                   w_in.data(), bias.data(), leak.data(), scale.data()});
        reservoirs.run({c.B, c.T, x.data(), c.shared_x, c.noise ? noise.data() : nullptr, h.data(),
                        wants_states ? states.data() : nullptr, c.H + c.gap, c.O, c.E, b_out.data(), w_x.data(),
                        w_h.data(), y0.data(), y.data()},
                       threads);
    }

private:
    Numbers<T> draw(int64_t n, double scale = 1) {
        std::normal_distribution<double> normal;
        Numbers<T> out(n);
        for (T& value : out) value = T(normal(random) * scale);
        return out;
    }

    std::mt19937 random{1};
};

double activate(Unit unit, double z) {
    return unit == Unit::tanh ? std::tanh(z) : unit == Unit::relu ? std::max(0.0, z) : z;
}

struct Truth {
    std::vector<double> states, y;  // (S,B,T,H), (S,B,T,O)
};

// By the equations, one sequence after another.
template <class T>
Truth plain(const Case& c, const Arrays<T>& a) {
    Truth truth;
    const int64_t X = c.I - c.O, groups = (c.H + run_length - 1) / run_length;
    for (int64_t s = 0; s < c.M * c.Q; ++s)
        for (int64_t b = 0; b < c.B; ++b) {
            const int64_t m = s / c.Q, sequence = s * c.B + b;
            std::vector<double> h(&a.h[sequence * c.H], &a.h[sequence * c.H] + c.H), y(c.O), u(c.I), next(c.H);
            for (int64_t o = 0; o < c.O; ++o) y[o] = double(a.y0[sequence * c.O + o]);
            for (int64_t t = 0; t < c.T; ++t) {
                const int64_t row = (c.shared_x ? b : sequence) * c.T + t;
                for (int64_t i = 0; i < c.I; ++i) u[i] = i < X ? double(a.x[row * X + i]) : y[i - X];
                for (int64_t j = 0; j < c.H; ++j) {
                    double z = double(a.bias[s * c.H + j]), sum = 0;
                    for (int64_t i = 0; i < c.I; ++i) z += double(a.w_in[(s * c.H + j) * c.I + i]) * u[i];
                    for (int64_t k = 0; k < c.F; ++k) {
                        const int64_t from =
                            c.F == c.H ? k : (a.starts[(m * groups + j / run_length) * c.F + k] + j % run_length) % c.H;
                        sum += double(a.w[(m * c.H + j) * c.F + k]) * h[from];
                    }
                    const double leak = double(a.leak[s]);
                    next[j] = (1 - leak) * h[j] + leak * activate(c.unit, z + double(a.scale[s]) * sum);
                    if (c.noise) next[j] += double(a.noise[(sequence * c.T + t) * c.H + j]);
                }
                h = next;
                for (int64_t o = 0; o < c.O; ++o) {
                    y[o] = double(a.b_out[s * c.O + o]);
                    for (int64_t e = 0; e < c.E; ++e) y[o] += double(a.w_x[(s * c.O + o) * c.E + e]) * u[e];
                    for (int64_t j = 0; j < c.H; ++j) y[o] += double(a.w_h[(s * c.O + o) * c.H + j]) * h[j];
                }
                truth.states.insert(truth.states.end(), h.begin(), h.end());
                truth.y.insert(truth.y.end(), y.begin(), y.end());
            }
        }
    return truth;
}

int failures = 0;

void expect(bool good, const char* what, const char* name, int bytes, int threads, double error) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s: %s, float%d, %s, %d threads, error %g\n", what, name, bytes * 8, isa().c_str(), threads,
                error);
}

template <class T>
void check(const Case& c, int threads) {
    Arrays<T> a(c), one(c);
    const Truth truth = plain(c, a);
    const Numbers<T> untouched = a.states;
    a.run(c, threads);
    double scale = 1, error = 0;
    for (const double value : truth.states) scale = larger(scale, std::abs(value));
    for (const double value : truth.y) scale = larger(scale, std::abs(value));
    for (size_t i = 0; i < truth.y.size(); ++i) error = larger(error, std::abs(truth.y[i] - double(a.y[i])));
    const int64_t rows = c.M * c.Q * c.B * c.T, stride = c.H + c.gap;
    for (int64_t row = 0; row < rows; ++row) {
        const double* h = &truth.states[row * c.H];
        for (int64_t j = 0; j < c.H; ++j) {
            if (a.wants_states) error = larger(error, std::abs(h[j] - double(a.states[row * stride + j])));
            if (row % c.T == c.T - 1) error = larger(error, std::abs(h[j] - double(a.h[row / c.T * c.H + j])));
        }
        for (int64_t j = c.H; a.wants_states && row + 1 < rows && j < stride; ++j)
            expect(a.states[row * stride + j] == untouched[row * stride + j], "between rows", c.name, sizeof(T),
                   threads, 0);
    }
    expect(error <= 400 * (sizeof(T) == 4 ? 6e-8 : 1.2e-16) * scale, "equations", c.name, sizeof(T), threads, error);
    one.run(c, 1);
    expect(a.states == one.states && a.h == one.h && a.y == one.y, "one thread equals more", c.name, sizeof(T), threads,
           0);
}

void check_starts() {
    Arrays<double> a(cases[1]);
    a.starts.back() = 37;
    bool refused = false;
    try {
        a.run(cases[1], 1);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    expect(refused, "start outside", cases[1].name, 8, 1, 0);
}

void check_gram(int64_t S, int64_t n, int64_t Z, int threads) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    const int64_t stride = n * Z + 3;
    constexpr int64_t O = 2;
    std::vector<double> x((S - 1) * stride + n * Z), y(n * O), gram(S * Z * Z), moment(S * O * Z), one, moment_of_one;
    for (std::vector<double>* const all : {&x, &y, &gram, &moment})
        for (double& value : *all) value = normal(random);
    const std::vector<double> before = one = gram, moment_before = moment_of_one = moment;
    const ReadoutRows rows{S, n, Z, O, x.data(), stride, y.data()};
    GramSum sum_of_some(rows, gram.data(), moment.data());
    std::thread helper([&] { sum_of_some.work(1); });
    sum_of_some.work(threads);
    helper.join();
    GramSum(rows, one.data(), moment_of_one.data()).work(1);
    double error = 0;
    for (int64_t s = 0; s < S; ++s)
        for (int64_t i = 0; i < Z; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                double sum = before[(s * Z + i) * Z + j];
                for (int64_t k = 0; k < n; ++k) sum += x[s * stride + k * Z + i] * x[s * stride + k * Z + j];
                error = larger(error, std::abs(sum - gram[(s * Z + i) * Z + j]));
            }
    for (int64_t s = 0; s < S; ++s)
        for (int64_t i = 0; i < O * Z; ++i) {
            double sum = moment_before[s * O * Z + i];
            for (int64_t k = 0; k < n; ++k) sum += y[k * O + i / Z] * x[s * stride + k * Z + i % Z];
            error = larger(error, std::abs(sum - moment[s * O * Z + i]));
        }
    expect(error <= 1e-14 * double(n + 10), "Gram matrix", "", 8, threads, error);
    expect(gram == one && moment == moment_of_one, "Gram matrix of one thread", "", 8, threads, 0);
}

}  // namespace

int main() {
    int checks = 0;
    for (const std::string& name : usable_isas()) {
        select_isa(name);
        if (has_products(Precision::medium)) continue;  // else as the one before
        for (const Case& c : cases)
            for (const int threads : {1, 2, 5}) {
                check<float>(c, threads);
                check<double>(c, threads);
                ++checks;
            }
        for (const int threads : {1, 3})
            for (const int64_t Z : {1, 7, 32, 33, 150})
                for (const int64_t n : {1, 20, 700}) check_gram(n == 20 ? 3 : 1, n, Z, threads);
    }
    check_starts();
    std::printf("%d case runs, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
