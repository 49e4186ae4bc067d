// The CUDA kernels on the emulated device, without Python, for the sanitizers: with
// -DRNNFAST_SANITIZE=address,undefined arrays of exactly the right size, with =thread the barriers and the exchange
// between blocks. All kernels against the plain one in float64; and the layouts on their own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/bfloat16.cu"
#include "cuda/float16.cu"
#include "cuda/tf32.cu"
#include "cuda/wide.cu"

namespace {

using namespace rnnfast::cuda;

int failures = 0;

void expect(bool holds, const char* what, const char* where) {
    if (holds) return;
    std::printf("FAILED %s: %s\n", where, what);
    ++failures;
}

struct Case {
    const char* name;
    Cell cell;
    int64_t T, B, H, P, D;
    std::vector<int64_t> batch_sizes;

    Sweep sweep(const std::vector<int64_t>& offsets) const {
        if (batch_sizes.empty()) return {cell, T, B, H, P, D, nullptr, nullptr};
        return {cell, T, B, H, P, D, batch_sizes.data(), offsets.data()};
    }
};

const Case cases[] = {
    {"one", Cell::tanh, 1, 1, 1, 0, 1, {}},
    {"both ways", Cell::lstm, 3, 9, 20, 0, 2, {}},
    {"packed", Cell::lstm, 3, 18, 17, 0, 2, {18, 9, 1}},
    {"packed elman", Cell::relu, 4, 9, 24, 0, 2, {9, 9, 3, 1}},
    {"projected", Cell::lstm, 2, 3, 9, 4, 2, {3, 1}},
};

// One forward and one backward pass: results as doubles, in the order of sweep.h.
template <Number number>
std::vector<double> run(const Case& c, const std::string& kernel) {
    using S = typename Stored<number>::type;
    using W = Wide<S>;
    std::vector<int64_t> offsets{0};
    for (const int64_t n : c.batch_sizes) offsets.push_back(offsets.back() + n);
    const Sweep s = c.sweep(offsets);
    const int64_t N = c.batch_sizes.empty() ? c.T * c.B : offsets.back(), G = s.gates(), R = s.recurrent();
    std::mt19937 random(1);
    const auto draw = [&](int64_t count) {
        std::vector<S> numbers(count);
        for (S& x : numbers) x = narrow<S>(static_cast<W>(std::normal_distribution<double>(0, 0.5)(random)));
        return numbers;
    };
    const auto none = [](int64_t count) { return std::vector<S>(count, narrow<S>(W(NAN))); };
    const bool lstm = c.cell == Cell::lstm;
    auto gates = draw(N * c.D * G * c.H), w_hh = draw(c.D * G * c.H * R), w_hr = draw(c.D * c.P * c.H);
    auto h0 = draw(c.D * c.B * R), c0 = draw(lstm ? c.D * c.B * c.H : 0), dy = draw(N * c.D * R);
    auto dh_n = draw(c.D * c.B * R), dc_n = draw(c0.size()), z = draw(gates.size());
    auto cells = none(lstm ? N * c.D * c.H : 0), m = none(c.P ? N * c.D * c.H : 0), h_n = none(h0.size());
    auto y = lstm ? none(N * c.D * R) : std::vector<S>();
    std::vector<W> state, d_state;
    for (const S x : c0) state.push_back(wide(x));
    for (const S x : dc_n) d_state.push_back(wide(x));
    const Card card = card_of(0);

    const Plan forward = choose(card, s, number, false, kernel);
    std::vector<Vector> workspace(forward.workspace / 16 + 1, Vector{});
    void* const out = lstm ? y.data() : gates.data();
    run_forward<number>(forward, s,
                        {gates.data(), w_hh.data(), w_hr.data(), h0.data(), state.data(), cells.data(), m.data(), out,
                         h_n.data(), workspace.data()},
                        nullptr);

    const Plan backward = choose(card, s, number, true, kernel);
    workspace.assign(backward.workspace / 16 + 1, Vector{});
    auto dz = z, dh = none(c.P ? N * c.D * c.P : 0), dh0 = none(h0.size()), d_cells = none(cells.size());
    run_backward<number>(
        backward, s,
        {gates.data(), cells.data(), w_hh.data(), w_hr.data(), c0.data(), dy.data(), dh_n.data(), d_state.data(),
         dz.data(), dh.data(), dh0.data(), lstm ? d_cells.data() : nullptr, workspace.data(), true},
        nullptr);

    std::vector<double> results;
    const auto keep = [&](const auto& numbers) {
        for (const auto x : numbers) results.push_back(wide(x));
    };
    keep(gates), keep(state), keep(cells), keep(m), keep(y), keep(h_n);
    keep(d_state), keep(dz), keep(dh), keep(dh0), keep(d_cells);
    return results;
}

template <Number number>
void compare(const Case& c, const std::vector<double>& truth, double tolerance) {
    for (const char* kernel : {"steps", "block", "cluster", "grid"}) {
        std::vector<double> got;
        try {
            got = run<number>(c, kernel);
        } catch (const std::invalid_argument&) {  // no room, or no such kernel for these sizes
            continue;
        }
        expect(got.size() == truth.size(), "number of results", c.name);
        double worst = 0;
        for (size_t i = 0; i < truth.size(); ++i) {
            const double error = std::abs(got[i] - truth[i]) / (1 + std::abs(truth[i]));
            worst = error <= worst ? worst : error;  // NaN counts
        }
        if (!(worst <= tolerance)) std::printf("error %g > %g in number %d, ", worst, tolerance, int(number));
        expect(worst <= tolerance, kernel, c.name);
    }
}

// Each element of a fragment once, and the gates of a unit in one lane.
void check_layouts() {
    for (const int bytes : {2, 4}) {
        const int K = bytes == 2 ? 16 : 8;
        std::vector<int> a(16 * K), b(K * 8), d(16 * 8);
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 16 * K / 32; ++i) {
                const Place p = place_in_a(bytes, lane, i);
                ++a[p.row * K + p.column];
            }
            for (int i = 0; i < K * 8 / 32; ++i) {
                const Place p = place_in_b(bytes, lane, i);
                ++b[p.row * 8 + p.column];
            }
            for (int i = 0; i < 4; ++i) {
                const Place p = place_in_d(lane, i);
                ++d[p.row * 8 + p.column];
            }
            for (int gate = 0; gate < 4; ++gate)
                for (int e = 0; e < 2; ++e) {
                    const Place p = place_in_d(lane, lstm_element(gate, e));
                    const GateRow row = lstm_row(lstm_tile(gate), p.row);
                    expect(row.gate == gate && row.unit == lane / 4 && p.column == lane % 4 * 2 + e, "gate", "layout");
                }
        }
        for (const auto* counts : {&a, &b, &d})
            expect(std::all_of(counts->begin(), counts->end(), [](int n) { return n == 1; }), "fragment", "layout");
    }
    for (const int G : {1, 4})
        for (int k = 0; k < 3 * G * 8; ++k) {
            const GateColumn p = dz_column(G, 8, k);
            expect((p.unit / 8 * G + p.gate) * 8 + p.unit % 8 == k, "column of dz", "layout");
        }
}

void check_upload() {
    std::vector<int64_t> numbers(1001), there(numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int64_t>(i) << 33;
    upload(numbers.data(), static_cast<int64_t>(numbers.size()), there.data(), nullptr);
    expect(there == numbers, "numbers", "upload");
}

}  // namespace

int main() {
    check_layouts();
    check_upload();
    for (const Case& c : cases) {
        const std::vector<double> truth = run<Number::float64>(c, "steps");
        compare<Number::float32>(c, truth, 2e-5);
        compare<Number::tf32>(c, truth, 2e-2);
        compare<Number::float16>(c, truth, 2e-2);
        compare<Number::bfloat16>(c, truth, 2e-1);
        std::printf("%s\n", c.name);
        std::fflush(stdout);
    }
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? 1 : 0;
}
