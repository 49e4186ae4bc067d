// Products whose factors have 16 bits, on every unit that multiplies them and on those in plain C++: against sums in
// float64 of factors that are rounded here, on arrays of exactly the right size, so that the address sanitizer sees the
// first number read or written outside.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "rnnfast.h"

namespace {

using namespace rnnfast;

int failures = 0;

void expect(bool holds, const char* what, const char* name, double error) {
    if (holds) return;
    ++failures;
    std::printf("FAILED %s: %s, %s, error %g\n", what, name, isa().c_str(), error);
}

// To bfloat16: nearest, ties to even.
float rounded(float x) {
    if (!std::isfinite(x)) return x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint16_t high_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
}

// Rounded as a number it would be 0.
float nan_of_all_ones() {
    const uint32_t bits = 0x7fffffff;
    float nan;
    std::memcpy(&nan, &bits, 4);
    return nan;
}

// What a product takes for x.
double factor(float x, Precision precision) {
    const float first = rounded(x);
    if (precision == Precision::medium || !std::isfinite(x)) return first;
    return double(first) + rounded(x - first);
}

struct Case {
    const char* name;
    int64_t rows, K, size;
    int gates;
    int a_stride;     // 1, -1, or 0: rows are the columns of an array
    bool transposed;  // how W lies
    bool init;
};

const Case cases[] = {
    {"one number", 1, 1, 1, 1, 1, true, false},
    {"a pair", 3, 2, 5, 1, 1, false, true},
    {"odd", 7, 33, 19, 4, 1, true, true},
    {"three gates", 13, 31, 33, 3, 1, true, true},
    {"whole tiles", 16, 64, 64, 4, 1, true, false},
    {"a tile and a row", 17, 65, 48, 1, 1, false, true},
    {"backwards", 5, 50, 20, 1, -1, false, false},
    {"backwards, whole vectors", 20, 96, 130, 1, -1, false, true},
    {"columns", 40, 13, 21, 1, 0, false, false},
    {"columns, whole", 64, 128, 64, 1, 0, false, true},
    {"several blocks of rows", 200, 9, 17, 2, 1, true, true},
    {"several slices of K", 10, 1500, 18, 4, 1, true, true},
    {"slices of columns", 100, 1031, 40, 1, 0, false, true},
    {"nothing", 9, 0, 20, 4, 1, true, true},
};

struct Operands {
    std::vector<float> a, w;       // as they lie
    std::vector<uint16_t> halves;  // w in bfloat16
    std::vector<const float*> a_rows, w_rows;
    int64_t a_stride;
    const Case& which;

    float& left(int64_t r, int64_t k) { return a[left_at(r) + k * a_stride]; }
    float right(int64_t k, int64_t j) const { return which.transposed ? w[j * which.K + k] : w[k * width() + j]; }
    int64_t width() const { return which.size * which.gates; }
    int64_t left_at(int64_t r) const {
        return which.a_stride == 0 ? r : which.a_stride == 1 ? r * which.K : r * which.K + which.K - 1;
    }

    explicit Operands(const Case& which) : which(which) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        a.resize(which.rows * which.K), w.resize(which.K * width());
        for (auto* numbers : {&a, &w})
            for (float& x : *numbers) x = normal(random);
        a_stride = which.a_stride ? which.a_stride : which.rows;
        for (int64_t r = 0; r < which.rows; ++r) a_rows.push_back(a.data() + (which.K ? left_at(r) : 0));
        for (int64_t k = 0; k < which.K && !which.transposed; ++k) w_rows.push_back(w.data() + k * width());
        halves.resize(w.size());
        for (size_t i = 0; i < w.size(); ++i) halves[i] = high_half(rounded(w[i]));
    }

    // W's numbers may be given in 16 bits.
    std::vector<std::vector<float>> product(const Kernels<float>& kernel, bool bfloat16 = false) {
        const Columns columns = which.gates > 1 ? Columns::of_gates(which.size, which.gates, kernel.lanes)
                                                : Columns::of_matrix(which.size, kernel.lanes, 1);
        std::vector<float> packed(columns.packed(which.K));
        std::vector<const void*> gates;
        for (int64_t at = 0; at < width(); at += which.size)
            gates.push_back(bfloat16 ? static_cast<const void*>(halves.data() + at * which.K)
                                     : w.data() + at * which.K);
        if (which.transposed)
            kernel.pack_transposed(columns, which.K, {gates.data(), bfloat16}, which.K, 0, columns.panels,
                                   packed.data());
        else
            kernel.pack_rows(columns, which.K, w_rows.data(), 0, columns.panels, packed.data());
        std::vector<std::vector<float>> c(which.rows, std::vector<float>(width(), 1.f)), init = c;
        std::vector<float*> to;
        std::vector<const float*> from;
        for (int64_t r = 0; r < which.rows; ++r) to.push_back(c[r].data()), from.push_back(init[r].data());
        kernel.product({which.rows, which.K, a_rows.data(), a_stride, columns, 0, columns.panels, packed.data(),
                        which.init ? from.data() : nullptr, to.data()});
        return c;
    }
};

void check_sums(const Case& which, Precision precision, const Kernels<float>& kernel) {
    Operands of(which);
    const auto c = of.product(kernel);
    double worst = 0;
    for (int64_t r = 0; r < which.rows; ++r)
        for (int64_t j = 0; j < of.width(); ++j) {
            double sum = which.init, size = 1;
            for (int64_t k = 0; k < which.K; ++k) {
                const double one = factor(of.left(r, k), precision), other = factor(of.right(k, j), precision);
                sum += one * other, size += std::fabs(one * other);
            }
            worst = std::max(worst, std::fabs(c[r][j] - sum) / size);
        }
    // Rounding of float32 sums; and the product of both rests, 2^-18 of each other, which is left out.
    const double bound = precision == Precision::high ? 2e-6 + 3.9e-6 : 2e-6;
    expect(worst < bound, "sums", which.name, worst);
}

// A row with NaN or an infinity is alone with it, and what it brings is NaN or that infinity times W.
void check_rows_are_alone(const Case& which, const Kernels<float>& kernel) {
    if (which.rows < 2 || !which.K) return;
    Operands of(which);
    const auto before = of.product(kernel);
    const float inf = std::numeric_limits<float>::infinity();
    for (const float bad : {nan_of_all_ones(), inf, -inf}) {
        const int64_t row = which.rows / 2, k = which.K - 1;
        of.left(row, k) = bad;
        const auto after = of.product(kernel);
        bool alone = true, right = true;
        for (int64_t r = 0; r < which.rows; ++r)
            for (int64_t j = 0; j < of.width(); ++j)
                if (r != row)
                    alone = alone && after[r][j] == before[r][j];
                else if (std::isnan(bad))
                    right = right && std::isnan(after[r][j]);
                else
                    right = right && after[r][j] == bad * of.right(k, j);
        expect(alone, "other rows keep their numbers", which.name, bad);
        expect(right, "what it brings", which.name, bad);
    }
}

// Weights in 16 bits are those that they are rounded to.
void check_bfloat16_weights(const Case& which, Precision precision, const Kernels<float>& kernel) {
    if (!which.transposed) return;
    Operands of(which);
    if (precision != Precision::medium)
        for (float& x : of.w) x = rounded(x);
    expect(of.product(kernel, true) == of.product(kernel), "weights in 16 bits", which.name, 0);
}

// The same of a product that reads them where they lie.
void check_bfloat16_direct() {
    const Case which{"where they lie", 5, 37, 21, 3, 1, true, true};
    Operands of(which), rounded_ones(which);
    for (float& x : rounded_ones.w) x = rounded(x);
    const auto run = [&](Operands& of, bool bfloat16) {
        const Columns columns = Columns::of_gates(which.size, which.gates, kernels<float>().lanes);
        std::vector<std::vector<float>> c(which.rows, std::vector<float>(of.width()));
        std::vector<float*> to;
        for (auto& row : c) to.push_back(row.data());
        std::vector<const void*> gates;
        for (int g = 0; g < which.gates; ++g) {
            const int64_t at = g * which.size * which.K;
            gates.push_back(bfloat16 ? static_cast<const void*>(of.halves.data() + at) : of.w.data() + at);
        }
        kernels<float>().direct_product({which.rows,
                                         {which.K, 0},
                                         {of.a_rows.data(), nullptr},
                                         {{gates.data(), bfloat16}, {}},
                                         columns,
                                         0,
                                         columns.panels,
                                         nullptr,
                                         to.data()});
        return c;
    };
    expect(run(of, true) == run(rounded_ones, false), "weights in 16 bits", which.name, 0);
}

// Sums do not depend on who computes which panels, or on how many rows there are.
void check_order(const Kernels<float>& kernel) {
    const Case many{"many rows", 37, 77, 90, 4, 1, true, true};
    Case few = many;
    few.rows = 1;
    Operands of_many(many), of_few(few);
    of_few.w = of_many.w;
    std::copy(of_many.a.begin(), of_many.a.begin() + few.K, of_few.a.begin());
    expect(of_few.product(kernel)[0] == of_many.product(kernel)[0], "one row as among many", many.name, 0);
}

}  // namespace

int main() {
    int checks = 0;
    std::vector<std::string> names = usable_isas();
    for (const std::string& name : isas_by_name()) names.push_back(name);
    for (const std::string& name : names) {
        select_isa(name);
        check_bfloat16_direct();
        for (const Case& which : cases) check_bfloat16_weights(which, Precision::highest, kernels<float>());
        for (const Precision precision : {Precision::high, Precision::medium}) {
            if (!has_products(precision)) continue;
            const Kernels<float>& kernel = kernels_for<float>(64, precision);
            for (const Case& which : cases) {
                check_bfloat16_weights(which, precision, kernel);
                check_sums(which, precision, kernel);
                check_rows_are_alone(which, kernel);
                ++checks;
            }
            check_order(kernel);
        }
    }
    select_isa("");
    std::printf("%d cases, %d failures\n", checks, failures);
    return failures || checks < 42 ? 1 : 0;  // emulated units are there on every machine
}
