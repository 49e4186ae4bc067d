// Streams beside the forward pass of the core, with every instruction set; their files, whole and damaged; the C
// interface. Arrays have exactly the right size so that the address sanitizer sees the first number read or written
// outside.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

#include "stream.h"
#include "stream_model.h"

namespace {

using namespace rnnfast;

int failures = 0;

void expect(bool holds, const char* what, const std::string& where) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s, %s, %s\n", what, where.c_str(), isa().c_str());
}

struct Case {
    const char* cell;
    int64_t B, I, H, P, L;
    bool bias;
    int64_t O;
    bool readout_bias;

    StreamShape shape() const { return {&find_cell(cell), I, H, P, L, bias, O, readout_bias}; }
    std::string name() const {
        return std::string(cell) + " B" + std::to_string(B) + " I" + std::to_string(I) + " H" + std::to_string(H) +
               " P" + std::to_string(P) + " L" + std::to_string(L) + " O" + std::to_string(O);
    }
};

// Every remainder of a vector, of a group of vectors and of a tile of rows.
const Case cases[] = {
    {"lstm", 1, 1, 1, 0, 1, true, 0, false},        {"tanh", 1, 1, 1, 0, 1, false, 1, true},
    {"lstm", 1, 3, 4, 0, 2, true, 2, true},         {"lstm", 1, 1, 16, 0, 1, true, 1, false},
    {"lstm", 1, 17, 33, 0, 1, true, 0, false},      {"relu", 1, 5, 80, 0, 2, true, 3, true},
    {"tanh", 1, 2, 130, 0, 1, true, 0, false},      {"lstm", 1, 9, 40, 7, 3, true, 0, false},
    {"lstm", 3, 4, 21, 20, 1, false, 5, true},      {"tanh", 2, 7, 9, 0, 3, true, 0, false},
    {"lstm", 7, 2, 19, 0, 2, true, 17, true},       {"relu", 13, 33, 24, 0, 1, false, 0, false},
    {"gru", 1, 3, 33, 0, 2, true, 2, true},         {"gru", 5, 4, 20, 0, 1, false, 0, false},
    {"leaky_tanh", 1, 3, 17, 0, 2, true, 0, false}, {"leaky_relu", 3, 3, 40, 0, 1, true, 0, false},
    {"lstm", 50, 3, 10, 3, 2, true, 0, false},      {"lstm", 1, 200, 2, 0, 1, true, 0, false},
};

constexpr int64_t steps = 60;  // more than a block of them

// All outputs (steps,B,output) by the forward pass of the core and a plain readout, from the states that are given.
template <class T, class From>
std::vector<double> expected_outputs(const StreamShape& s, int64_t B, std::vector<std::vector<From>>& weights,
                                     const std::vector<From>& x, const std::vector<From>& h,
                                     const std::vector<From>& c) {
    const Shape shape{s.cell, steps, B, s.I, s.H, s.P, s.L, 1, s.bias, nullptr};
    std::vector<std::vector<T>> own;
    for (const std::vector<From>& w : weights) own.emplace_back(w.begin(), w.end());
    const size_t own_unit = s.cell->unit_parameters ? 1 : 0, each = 2 + (s.bias ? 2 : 0) + (s.P ? 1 : 0) + own_unit;
    std::vector<Parameters<const T*>> parameters;
    for (size_t i = 0; i < each * size_t(s.L); i += each)
        parameters.push_back({own[i].data(), own[i + 1].data(), s.bias ? own[i + 2].data() : nullptr,
                              s.bias ? own[i + 3].data() : nullptr, s.P ? own[i + each - 1].data() : nullptr,
                              own_unit ? own[i + each - 1].data() : nullptr});
    const std::vector<T> own_x(x.begin(), x.end()), h0(h.begin(), h.end()), c0(c.begin(), c.end());
    const int64_t R = s.recurrent(), rows = steps * B;
    std::vector<T> top(size_t(rows * R)), h_n(h.size()), c_n(c.size());
    forward<T>(shape,
               {own_x.data(), h0.data(), c0.data(), parameters, nullptr, top.data(), h_n.data(), c_n.data(), nullptr},
               1);
    if (!s.O) return {top.begin(), top.end()};
    std::vector<double> y;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < s.O; ++o) {
            T sum = s.readout_bias ? own.back()[size_t(o)] : T(0);
            for (int64_t k = 0; k < R; ++k) sum += own[each * size_t(s.L)][size_t(o * R + k)] * top[size_t(r * R + k)];
            y.push_back(double(sum));
        }
    return y;
}

template <class A, class B>
double largest_difference(const std::vector<A>& a, const std::vector<B>& b) {
    double largest = a.size() == b.size() ? 0 : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
        largest = std::max(largest, std::abs(double(a[i]) - double(b[i])));
    return largest;
}

template <class T>
void check_numbers(const Case& which) {
    std::mt19937 random(7);
    const StreamShape s = which.shape();
    const int64_t B = which.B, R = s.recurrent();
    std::unique_ptr<AnyStream> stream = make_stream(s, sizeof(T), B);
    std::vector<std::vector<T>> weights = draw_parameters<T>(random, *stream);
    stream->set_parameters(pointers_to<const void*>(weights));
    const std::vector<T> x = draw<T>(random, steps * B * s.I), h = draw<T>(random, s.L * B * R);
    const std::vector<T> c = draw<T>(random, s.cell->has_c() ? s.L * B * s.H : 0);
    std::vector<T> y(size_t(steps * B * s.output())), one_by_one(y.size()), by_threads(y.size());

    stream->set_state(h.data(), c.data());
    stream->run(steps, x.data(), y.data());
    const std::vector<double> exact = expected_outputs<double>(s, B, weights, x, h, c);
    double largest = 1;
    for (const double value : exact) largest = std::max(largest, std::abs(value));
    // Of float the core's own error, of double a bound: each step rounds each of its sums' terms.
    const double eps = std::numeric_limits<T>::epsilon();
    const double allowed =
        sizeof(T) == 4 ? 4 * largest_difference(expected_outputs<T>(s, B, weights, x, h, c), exact) + 4 * eps * largest
                       : eps * double(steps * (s.I + R + 10)) * largest;
    expect(largest_difference(y, exact) <= allowed, "outputs are those of the layer", which.name());

    std::vector<T> h_n(h.size()), c_n(c.size()), h_same(h.size()), c_same(c.size());
    stream->get_state(h_n.data(), c_n.data());
    // A chunk of any size gives the same bits.
    stream->set_state(h.data(), c.data());
    for (int64_t t = 0, size = 1; t < steps; t += size, size = size % 7 + 1) {
        size = std::min(size, steps - t);
        stream->run(size, x.data() + t * B * s.I, one_by_one.data() + t * B * s.output());
    }
    stream->get_state(h_same.data(), c_same.data());
    expect(y == one_by_one && h_n == h_same && c_n == c_same, "chunks of any size give the same", which.name());

    stream->set_state(h.data(), c.data());
    Barrier barrier;
    barrier.expect(3);
    std::vector<std::thread> team;
    for (int part = 0; part < 3; ++part)
        team.emplace_back([&, part] { stream->run_part(steps, x.data(), by_threads.data(), part, 3, barrier); });
    for (std::thread& thread : team) thread.join();
    stream->finish_parts(steps);
    stream->get_state(h_same.data(), c_same.data());
    expect(y == by_threads && h_n == h_same && c_n == c_same, "threads give the same", which.name());

    if (s.output() == s.I) {
        std::vector<T> in_place = x;
        stream->set_state(h.data(), c.data());
        stream->run(steps, in_place.data(), in_place.data());
        expect(y == in_place, "outputs in the place of inputs", which.name());
    }
}

// Sequence b, where the mask is set, goes on as after opening; the others do not see it.
void check_reset(const Case& which) {
    std::mt19937 random(11);
    const StreamShape s = which.shape();
    const int64_t B = which.B, O = s.output();
    std::unique_ptr<AnyStream> stream = draw_stream<float>(random, s, B);
    const std::vector<float> x = draw<float>(random, B * s.I);
    std::vector<float> fresh(size_t(B * O)), later(fresh.size()), mixed(fresh.size());
    std::vector<uint8_t> mask;
    for (int64_t b = 0; b < B; ++b) mask.push_back(b % 2 == 0);
    const auto run_to = [&](std::vector<float>& y) { stream->run(1, x.data(), y.data()); };
    run_to(fresh);
    run_to(later);
    stream->reset(nullptr);
    run_to(mixed);
    expect(mixed == fresh, "reset of all", which.name());
    stream->reset(mask.data());
    run_to(mixed);
    for (int64_t b = 0; b < B; ++b) {
        const std::vector<float>& from = mask[size_t(b)] ? fresh : later;
        expect(std::memcmp(&mixed[size_t(b * O)], &from[size_t(b * O)], size_t(O) * sizeof(float)) == 0,
               "reset of some", which.name());
    }
    // NaN spreads in its sequence alone, and a reset ends it.
    std::vector<float> bad = x;
    bad[0] = std::numeric_limits<float>::quiet_NaN();
    stream->run(1, bad.data(), later.data());
    const bool is_relu = std::string(which.cell) == "relu";
    expect(is_relu || std::isnan(later[0]), "NaN is not lost", which.name());
    for (size_t i = size_t(O); i < later.size(); ++i) expect(!std::isnan(later[i]), "NaN stays at home", which.name());
    stream->reset(nullptr);
    run_to(mixed);
    expect(mixed == fresh, "reset after NaN", which.name());
}

template <class T>
void check_file(const Case& which) {
    std::mt19937 random(13);
    const StreamShape s = which.shape();
    std::unique_ptr<AnyStream> stream = draw_stream<T>(random, s, which.B);
    const std::string bytes = write_stream(*stream);
    // Behind an odd address: files in memory lie anywhere.
    std::vector<char> shifted(bytes.size() + 1);
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + 1);
    std::unique_ptr<AnyStream> again = read_stream(shifted.data() + 1, bytes.size(), which.B);
    expect(write_stream(*again) == bytes, "a file gives the same file", which.name());
    const std::vector<T> x = draw<T>(random, steps * which.B * s.I);
    std::vector<T> y(size_t(steps * which.B * s.output())), same(y.size());
    stream->run(steps, x.data(), y.data());
    again->run(steps, x.data(), same.data());
    expect(y == same, "a file gives the same outputs", which.name());
}

uint32_t crc32_of(const std::string& bytes) {
    uint32_t crc = ~0u;
    for (const char byte : bytes) {
        crc ^= uint8_t(byte);
        for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    }
    return ~crc;
}

// Damaged files are refused; those that are damaged and then get a new checksum are refused or are models, which run.
void check_damaged_files() {
    std::mt19937 random(17);
    int refused = 0, opened = 0;
    for (int trial = 0; trial < 10000; ++trial) {
        const Case& which = cases[trial % 4];
        std::string bytes = write_stream(*draw_stream<float>(random, which.shape(), 1));
        const bool seal = trial % 2;
        const int kind = int(random() % 4);
        const auto anywhere = [&](size_t size) { return random() % size; };
        const size_t end = random() % 3 ? std::min<size_t>(bytes.size(), 80) : bytes.size();  // mostly in the header
        if (kind == 0) bytes.resize(anywhere(bytes.size()));
        if (kind == 1) bytes[anywhere(end)] ^= char(1 << random() % 8);
        if (kind == 2)
            for (int i = 0; i < 8; ++i) bytes[anywhere(end)] = char(random());
        if (kind == 3) bytes.insert(anywhere(bytes.size()), 1 + random() % 9, char(random()));
        if (seal && bytes.size() >= 4) {
            bytes.resize(bytes.size() - 4);
            const uint32_t crc = crc32_of(bytes);
            for (int i = 0; i < 4; ++i) bytes += char(crc >> 8 * i & 0xff);
        }
        std::vector<char> exact(bytes.begin(), bytes.end());
        rnnfast_error error = {RNNFAST_OK, "untouched"};
        rnnfast_stream* const stream = rnnfast_open_bytes(exact.data(), exact.size(), 1, &error);
        if (!stream) {
            ++refused;
            expect(error.status != RNNFAST_OK && error.message[0], "a refusal has a reason", which.name());
            continue;
        }
        ++opened;
        expect(seal, "a damaged file is refused", which.name());
        rnnfast_sizes sizes;
        rnnfast_get_sizes(stream, &sizes);
        if (sizes.number_bytes == 4) {
            std::vector<float> x(size_t(sizes.input_size)), y(size_t(sizes.output_size));
            rnnfast_step(stream, x.data(), y.data());
        } else {
            std::vector<double> x(size_t(sizes.input_size)), y(size_t(sizes.output_size));
            rnnfast_step_double(stream, x.data(), y.data());
        }
        rnnfast_close(stream);
    }
    expect(refused > 5000 && opened > 500, "both kinds of damage were tried", std::to_string(opened));
}

void check_c_errors() {
    std::mt19937 random(19);
    std::string bytes = write_stream(*draw_stream<float>(random, cases[2].shape(), 1));
    rnnfast_error error;
    const auto status_of = [&](const std::string& file, int64_t batch_size) {
        rnnfast_stream* const stream = rnnfast_open_bytes(file.data(), file.size(), batch_size, &error);
        rnnfast_close(stream);
        return stream ? RNNFAST_OK : error.status;
    };
    const auto is = [&](rnnfast_status status, rnnfast_status expected, const char* what) {
        expect(status == expected, what, rnnfast_status_text(status));
    };
    is(status_of(bytes, 1), RNNFAST_OK, "a whole file");
    is(status_of(bytes, 0), RNNFAST_ARGUMENT, "no sequence");
    is(status_of(bytes, -1), RNNFAST_ARGUMENT, "fewer than none");
    is(status_of(bytes, INT32_MAX), RNNFAST_MEMORY, "more sequences than fit into memory");
    is(status_of(bytes.substr(0, 200), 1), RNNFAST_CHECKSUM, "a part of a file");
    is(status_of("hello", 1), RNNFAST_FORMAT, "no model");
    std::string newer = bytes;
    newer[8] = 2;
    is(status_of(newer, 1), RNNFAST_VERSION, "a newer file");
    expect(std::strstr(error.message, "expected 1, got 2") != nullptr, "which version", error.message);
    std::string flipped = bytes;
    flipped[120] ^= 1;
    is(status_of(flipped, 1), RNNFAST_CHECKSUM, "a flipped bit");
    expect(!rnnfast_open("/nonexistent/model.rnn", 1, nullptr), "no file, nobody to tell", "");
    expect(!rnnfast_open("/nonexistent/model.rnn", 1, &error) && error.status == RNNFAST_FILE, "no file",
           error.message);
    expect(!rnnfast_open(nullptr, 1, &error) && error.status == RNNFAST_ARGUMENT, "no name", error.message);
    rnnfast_close(nullptr);

    rnnfast_stream* const stream = rnnfast_open_bytes(bytes.data(), bytes.size(), 1, &error);
    float x[3] = {}, y[2], h[8], c[8];
    double wide[8] = {};
    is(error.status, RNNFAST_OK, "opened");
    is(rnnfast_step(stream, x, y), RNNFAST_OK, "a step");
    is(rnnfast_step(stream, nullptr, y), RNNFAST_ARGUMENT, "no input");
    is(rnnfast_step(nullptr, x, y), RNNFAST_ARGUMENT, "no stream");
    is(rnnfast_steps(stream, -1, x, y), RNNFAST_ARGUMENT, "fewer than no steps");
    is(rnnfast_steps(stream, 0, x, y), RNNFAST_OK, "no steps");
    is(rnnfast_step_double(stream, wide, wide), RNNFAST_TYPE, "the other type");
    is(rnnfast_state(stream, h, nullptr), RNNFAST_ARGUMENT, "no room for c");
    is(rnnfast_state(stream, h, c), RNNFAST_OK, "a state");
    is(rnnfast_reset(stream, nullptr), RNNFAST_OK, "a reset");
    float again[2], from_state[2];
    rnnfast_step(stream, x, again);
    expect(std::memcmp(y, again, sizeof(y)) == 0, "reset of a C stream", "");
    rnnfast_step(stream, x, again);
    is(rnnfast_set_state(stream, h, c), RNNFAST_OK, "a state is set");
    rnnfast_step(stream, x, from_state);
    expect(std::memcmp(from_state, again, sizeof(y)) == 0, "the state that was read", "");
    rnnfast_close(stream);
}

}  // namespace

int main() {
    int checks = 0;
    for (const std::string& name : usable_isas()) {
        select_isa(name);
        if (has_products(Precision::medium)) continue;  // else as the one before
        for (const Case& which : cases) {
            check_numbers<float>(which);
            check_numbers<double>(which);
            check_reset(which);
            check_file<float>(which);
            check_file<double>(which);
            ++checks;
        }
    }
    check_damaged_files();
    check_c_errors();
    std::printf("%d case runs, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
