// The CUDA kernels on the emulated device, without Python, for the sanitizers: with
// -DRNNFAST_SANITIZE=address,undefined arrays of exactly the right size, with =thread the barriers and the exchange
// between blocks. All kernels against the plain one in float64, for the cells that there are and for some that have
// other traits; and the layouts on their own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda/bfloat16.cu"
#include "cuda/float16.cu"
#include "cuda/tf32.cu"
#include "cuda/wide.cu"
#include "larger.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Elman, rnnfast::Gru, rnnfast::Leaky, rnnfast::Lstm, rnnfast::Relu, rnnfast::Slots, rnnfast::State,
    rnnfast::Tanh;

int failures = 0;

void expect(bool holds, const char* what, const char* where) {
    if (holds) return;
    std::printf("FAILED %s: %s\n", where, what);
    ++failures;
}

// One gate and a state: c_t = a c_{t-1} + (1 - a) a, and h_t = c_t.
struct Mean {
    static constexpr int gates = 1, unit_parameters = 0;
    static constexpr Slots input_gates = {0, 1}, recurrent_gates = {0, 1};
    static constexpr State state = State::own;
    static constexpr bool saves_gates = true, projects = false;
    template <class A>
    static void activate(const A (&z)[1], A (&a)[1]) {
        a[0] = sigmoid(z[0]);
    }
    template <class A>
    static A combine(const A (&a)[1], A& c) {
        return c = a[0] * c + (1 - a[0]) * a[0];
    }
    template <class A>
    static A state_gradient(const A (&)[1], const A&, const A& dm) {
        return dm;
    }
    template <class A>
    static void backward(const A (&a)[1], const A& c_prev, const A&, const A&, const A& dc, A (&dz)[1], A& dc_prev) {
        dz[0] = dc * (c_prev + (1 - a[0]) - a[0]) * (a[0] * (1 - a[0]));
        dc_prev = dc * a[0];
    }
};

// Pairs of gates and no state: h_t = a_0 a_1 + ...
template <int G>
struct Pairs {
    static constexpr int gates = G, unit_parameters = 0;
    static constexpr Slots input_gates = {0, G}, recurrent_gates = {0, G};
    static constexpr State state = State::none;
    static constexpr bool saves_gates = true, projects = true;
    template <class A>
    static void activate(const A (&z)[G], A (&a)[G]) {
        for (int g = 0; g < G; g += 2) a[g] = sigmoid(z[g]), a[g + 1] = tanh(z[g + 1]);
    }
    template <class A>
    static A combine(const A (&a)[G], A&) {
        A m = a[0] * a[1];
        for (int g = 2; g < G; g += 2) m = m + a[g] * a[g + 1];
        return m;
    }
    template <class A>
    static void backward(const A (&a)[G], const A&, const A&, const A& dm, const A&, A (&dz)[G], A&) {
        for (int g = 0; g < G; g += 2) {
            dz[g] = dm * a[g + 1] * (a[g] * (1 - a[g]));
            dz[g + 1] = dm * a[g] * (1 - a[g + 1] * a[g + 1]);
        }
    }
};

struct Case {
    const char* name;
    int64_t T, B, H, P, D;
    std::vector<int64_t> batch_sizes;
    int episodes = 0;  // one in so many rows begins one; 0: no resets
};

// The rows of a case.
struct RowsOf {
    std::vector<int64_t> batch_sizes, offsets{0}, first_reset;
    std::unique_ptr<bool[]> resets;

    explicit RowsOf(const Case& c) : batch_sizes(c.batch_sizes), first_reset(c.B, c.T) {
        for (int64_t t = 0; t < c.T; ++t)
            offsets.push_back(offsets.back() + (batch_sizes.empty() ? c.B : batch_sizes[t]));
        if (!c.episodes) return;
        resets.reset(new bool[count()]);
        for (int64_t t = c.T - 1; t >= 0; --t)
            for (int64_t row = offsets[t]; row < offsets[t + 1]; ++row) {
                resets[row] = (row * 7 + 3) % c.episodes == 0;
                if (resets[row]) first_reset[row - offsets[t]] = t;
            }
    }
    int64_t count() const { return offsets.back(); }

    template <class Cell>
    Sweep sweep(const Case& c) const {
        const bool packed = !batch_sizes.empty();
        return {0,
                Cell::gates,
                c.T,
                c.B,
                c.H,
                c.P,
                c.D,
                packed ? batch_sizes.data() : nullptr,
                packed ? offsets.data() : nullptr,
                resets.get(),
                resets ? first_reset.data() : nullptr,
                resets || !is_persistent<Cell>};
    }
};

const Case single{"single", 1, 1, 1, 0, 1, {}}, both_ways{"both ways", 3, 9, 20, 0, 2, {}},
    uneven{"uneven", 3, 18, 17, 0, 2, {18, 9, 1}}, many{"many", 2, 37, 9, 0, 2, {}},
    many_uneven{"many, uneven", 2, 70, 20, 0, 2, {70, 33}}, long_uneven{"long, uneven", 4, 9, 24, 0, 2, {9, 9, 3, 1}},
    projected{"projected", 2, 3, 9, 4, 2, {3, 1}}, episodes{"episodes", 5, 3, 9, 0, 2, {3, 3, 2, 2, 1}, 3},
    projected_episodes{"projected, episodes", 4, 3, 9, 4, 2, {}, 3};

// One forward and one backward pass: results as doubles, in the order of sweep.h.
template <Number number, class Cell>
std::vector<double> both_passes(const Case& c, const std::string& kernel) {
    using S = typename NumberOf<number>::type;
    using W = Wide<S>;
    const RowsOf rows(c);
    const Sweep s = rows.sweep<Cell>(c);
    const int64_t N = rows.count(), G = s.gates, R = s.recurrent(), U = Cell::unit_parameters;
    // Gradients inside of a sweep, where it goes by steps anyway.
    const bool inside = s.by_steps;
    std::mt19937 random(1);
    const auto draw = [&](int64_t count) {
        std::vector<S> numbers(count);
        for (S& x : numbers) x = narrow<S>(static_cast<W>(std::normal_distribution<double>(0, 0.5)(random)));
        return numbers;
    };
    const auto none = [](int64_t count) { return std::vector<S>(count, narrow<S>(W(NAN))); };
    auto gates = draw(N * c.D * G * c.H), w_hh = draw(c.D * Cell::recurrent_gates.count * c.H * R),
         w_hr = draw(c.D * c.P * c.H);
    auto h0 = draw(c.D * c.B * R), c0 = draw(has_state<Cell> ? c.D * c.B * c.H : 0), dy = draw(N * c.D * R);
    auto dh_n = draw(c.D * c.B * R), dc_n = draw(c0.size()), z = draw(gates.size());
    auto unit = draw(c.D * U * c.H), dc_more = draw(has_state<Cell> ? N * c.D * c.H : 0);
    auto cells = none(has_state<Cell> ? N * c.D * c.H : 0), m = none(c.P ? N * c.D * c.H : 0), h_n = none(h0.size());
    auto y = Cell::saves_gates ? none(N * c.D * R) : std::vector<S>();
    std::vector<W> state, d_state;
    for (const S x : c0) state.push_back(wide(x));
    for (const S x : dc_n) d_state.push_back(wide(x));
    d_state.resize(has_state<Cell> || carries_h<Cell> ? c.D * c.B * c.H : 0, W(NAN));
    std::vector<W> first_state = state, d_first_state(c0.size());
    const Card card = card_of(0);

    const Plan forward = make_plan_of<number, Cell, false>(card, s, kernel);
    std::vector<Vector> workspace(forward.workspace / 16 + 1, Vector{});
    void* const out = Cell::saves_gates ? y.data() : gates.data();
    run_cell<number, Cell>(
        forward, s,
        Forward{gates.data(), w_hh.data(), w_hr.data(), h0.data(), state.data(), cells.data(), m.data(), out,
                h_n.data(), unit.data(), s.resets ? first_state.data() : state.data(), workspace.data()},
        nullptr);

    const Plan backward = make_plan_of<number, Cell, true>(card, s, kernel);
    workspace.assign(backward.workspace / 16 + 1, Vector{});
    auto dz = z, dh = none(c.P ? N * c.D * c.P : 0), d_cells = none(cells.size());
    auto dh0 = s.resets ? std::vector<S>(h0.size(), narrow<S>(W(0))) : none(h0.size());
    auto d_unit = none(N * c.D * U * c.H), dm = none(inside ? N * c.D * c.H : 0);
    run_cell<number, Cell>(backward, s,
                           Backward{gates.data(),
                                    cells.data(),
                                    w_hh.data(),
                                    w_hr.data(),
                                    c0.data(),
                                    dy.data(),
                                    dh_n.data(),
                                    d_state.data(),
                                    dz.data(),
                                    dh.data(),
                                    dh0.data(),
                                    has_state<Cell> ? d_cells.data() : nullptr,
                                    out,
                                    h0.data(),
                                    unit.data(),
                                    d_unit.data(),
                                    inside ? dm.data() : nullptr,
                                    inside && has_state<Cell> ? dc_more.data() : nullptr,
                                    s.resets ? d_first_state.data() : d_state.data(),
                                    workspace.data(),
                                    true},
                           nullptr);

    std::vector<double> results;
    const auto keep = [&](const auto& numbers) {
        for (const auto x : numbers) results.push_back(wide(x));
    };
    keep(gates), keep(state), keep(cells), keep(m), keep(y), keep(h_n);
    keep(s.resets ? d_first_state : d_state), keep(dz), keep(dh), keep(dh0), keep(d_cells), keep(d_unit), keep(dm);
    return results;
}

template <Number number, class Cell>
void compare(const Case& c, const std::vector<double>& truth, double tolerance) {
    for (const char* kernel : {"steps", "block", "cluster", "grid"}) {
        std::vector<double> got;
        try {
            got = both_passes<number, Cell>(c, kernel);
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

template <class Cell>
void check(std::initializer_list<Case> cases) {
    for (const Case& c : cases) {
        const std::vector<double> truth = both_passes<Number::float64, Cell>(c, "steps");
        compare<Number::float32, Cell>(c, truth, 2e-5);
        compare<Number::tf32, Cell>(c, truth, 2e-2);
        compare<Number::float16, Cell>(c, truth, 2e-2);
        compare<Number::bfloat16, Cell>(c, truth, 2e-1);
        std::printf("%d gates, %s\n", Cell::gates, c.name);
        std::fflush(stdout);
    }
}

// What lanes hold of two steps along K: a column of A and the row of B that it meets are in the same place in memory,
// and each register holds what the tables say.
void check_words(int bytes, int lane) {
    const int K = bytes == 2 ? 16 : 8, per_lane = 16 / bytes, halves = 4 / bytes;
    const auto place = [&](int lane, const Word& w) { return lane % 4 * per_lane + w.word * halves + w.half; };
    for (int step = 0; step < 2; ++step)
        for (int i = 0; i < K / 4; ++i) {
            const int column = place_in_b(bytes, lane, i).row, at = place(lane, word_of_b(bytes, step, i));
            for (int j = 0; j < K / 2; ++j) {
                const Place p = place_in_a(bytes, lane, j);
                const Word w = word_of_a(bytes, step, j);
                expect((p.column == column) == (place(lane, w) == at), "operands in memory", "layout");
                const int reg = j / halves;
                expect(w.word == word_of_register(step, reg) && p.row / 8 == lower_rows(reg), "register", "layout");
            }
            expect(word_of_b(bytes, step, i).word == 2 * step + i / halves, "register of B", "layout");
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
            check_words(bytes, lane);
            for (int gate = 0; gate < 4; ++gate)
                for (int e = 0; e < 2; ++e) {
                    const Place p = place_in_d(lane, sum_of(gate, e) % 4);
                    const GateRow row = row_of_tile(4, sum_of(gate, e) / 4, p.row);
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

// Against float64; what the special function units are wrong by is in the emulated ones.
void check_fast_nonlinearities() {
    double tanh_error = 0, sigmoid_error = 0;
    const auto look = [&](float x) {
        const double t = std::tanh(double(x)), s = 1 / (1 + std::exp(-double(x)));
        if (t != 0) tanh_error = larger(tanh_error, std::abs(Fast::tanh(x) - t) / std::abs(t));
        sigmoid_error = larger(sigmoid_error, std::abs(Fast::sigmoid(x) - s) / s / (4 + std::abs(x)));
    };
    for (float x = 1e-30f; x < 80; x *= 1.0003f) look(x), look(-x);
    expect(tanh_error <= 0x1p-17, "tanh", "nonlinearities");
    expect(sigmoid_error <= 0x1p-22, "logistic function", "nonlinearities");
    for (const float large : {88.f, 89.f, 1e4f, 3e38f, INFINITY}) {
        expect(std::abs(Fast::tanh(large) - 1) <= 0x1p-21 && std::abs(Fast::tanh(-large) + 1) <= 0x1p-21,
               "tanh far out", "nonlinearities");
        expect(std::abs(Fast::sigmoid(large) - 1) <= 0x1p-21 && Fast::sigmoid(-large) < 1e-37, "sigmoid far out",
               "nonlinearities");
    }
    expect(std::isnan(Fast::tanh(NAN)) && std::isnan(Fast::sigmoid(NAN)), "NaN", "nonlinearities");
    expect(Fast::tanh(0.f) == 0 && Fast::tanh(-0.f) == 0, "zero", "nonlinearities");
}

// Made-up numbers of clusters that run at a time.
void check_plans() {
    const Card h100{90, 132, 227 * 1024};
    const auto plan = [&](const Card& card, int gates, int64_t H, int64_t B, bool backward, int of_16,
                          bool by_steps = false) {
        const Sweep s{0, gates, 0, B, H, 0, 1, nullptr, nullptr, nullptr, nullptr, by_steps};
        return choose(card, s, Number::bfloat16, backward, "", [&](const Geometry& g) {
            return of_16 == 0 ? 0 : g.C == 16 ? of_16 : card.multiprocessors / g.C;
        });
    };
    const auto is = [](const Plan& p, Kernel kernel, int C, int waves) {
        return p.kernel == kernel && p.geometry.C == C && p.waves == waves;
    };
    expect(is(plan(h100, 4, 512, 32, true, 7), Kernel::cluster, 16, 1), "4 groups at a time", "plans");
    // 8 groups of 16 sequences would take two rounds of 7 clusters; 4 groups of 32 take one, or a grid does
    expect(is(plan(h100, 4, 512, 128, false, 7), Kernel::cluster, 16, 1), "larger groups", "plans");
    expect(plan(h100, 4, 512, 128, true, 7).waves == 1, "no second round", "plans");
    expect(plan(h100, 4, 512, 128, true, 7).kernel == Kernel::grid, "a grid in place of two rounds", "plans");
    expect(plan(h100, 4, 512, 128, true, 8).kernel == Kernel::cluster, "8 clusters at a time", "plans");
    expect(plan(h100, 1, 1024, 128, true, 7).waves == 1, "one gate", "plans");
    const Card slice{90, 16, 227 * 1024};  // of a card that is cut into parts
    expect(plan(slice, 4, 512, 16, false, 0).kernel == Kernel::grid, "no clusters", "plans");
    expect(plan(slice, 4, 1024, 16, false, 0).kernel == Kernel::steps, "no room", "plans");
    expect(plan(h100, 4, 64, 16, false, 0).kernel == Kernel::block, "one block", "plans");
    expect(plan(h100, 4, 64, 16, false, 0, true).kernel == Kernel::steps, "what only steps know", "plans");
    expect(plan(h100, 3, 64, 16, false, 0).why == "no layout for a cell of so many gates", "three gates", "plans");
    for (const int of_16 : {1, 3, 7}) {
        const Plan p = plan(h100, 4, 512, 2048, false, of_16);
        expect(p.waves == (p.geometry.slices + p.geometry.at_a_time - 1) / p.geometry.at_a_time, "rounds", "plans");
        expect(p.kernel != Kernel::cluster || p.geometry.C != 16 || p.geometry.at_a_time == of_16, "at a time",
               "plans");
    }
}

}  // namespace

int main() {
    check_layouts();
    check_fast_nonlinearities();
    check_plans();
    check_upload();
    check<Elman<Tanh>>({single, many_uneven, episodes});
    check<Elman<Relu>>({long_uneven});
    check<Lstm>({both_ways, uneven, many, projected, episodes, projected_episodes});
    check<Mean>({both_ways});
    check<Gru>({both_ways, episodes});
    check<Leaky<Tanh>>({episodes});
    check<Pairs<2>>({projected});
    check<Pairs<4>>({uneven});
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? 1 : 0;
}
