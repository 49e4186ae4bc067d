// Time of a step in C: a model of rnnfast.Stream, and beside it the same network by RTNeural's static model where the
// headers of RTNeural and xsimd are on the include path. Prints JSON; benchmarks/stream.py builds and reads it.
//
//     stream_steps MODEL STEPS
//
// MODEL: one LSTM with one input and a biased readout of one output, or any other model: then rnnfast alone.
#include <rnnfast/stream.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if __has_include(<RTNeural/RTNeural.h>) && __has_include(<xsimd/xsimd.hpp>)
#define WITH_RTNEURAL
#define RTNEURAL_USE_XSIMD 1
#ifdef __AVX512F__
#define RTNEURAL_DEFAULT_ALIGNMENT 64
#else
#define RTNEURAL_DEFAULT_ALIGNMENT 32
#endif
#include <RTNeural/RTNeural.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Floats = std::vector<float>;

constexpr int batches = 31;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double quantile(std::vector<double> numbers, double q) {
    std::sort(numbers.begin(), numbers.end());
    return numbers[size_t(q * double(numbers.size() - 1))];
}

// x (steps,I): a tone with overtones, so that no step is like the one before.
Floats signal(int64_t steps, int64_t I) {
    Floats x;
    for (int64_t t = 0; t < steps * I; ++t) x.push_back(float(0.4 * std::sin(0.05 * t) + 0.3 * std::sin(0.31 * t)));
    return x;
}

struct Contender {
    std::string name;
    // Steps through x (count,I) in a loop that the compiler sees, y (count,O).
    std::function<void(const float* x, float* y, int64_t count)> run;
    std::vector<double> batch_s, step_s;
    Floats y;
};

#ifdef WITH_RTNEURAL

// The file's numbers, from `at` on, as rows.
std::vector<Floats> rows(const Floats& numbers, size_t& at, size_t count, size_t width) {
    std::vector<Floats> found;
    for (size_t r = 0; r < count; ++r, at += width)
        found.emplace_back(numbers.begin() + long(at), numbers.begin() + long(at + width));
    return found;
}

std::vector<Floats> transposed(const std::vector<Floats>& rows) {
    std::vector<Floats> columns(rows[0].size(), Floats(rows.size()));
    for (size_t r = 0; r < rows.size(); ++r)
        for (size_t c = 0; c < rows[r].size(); ++c) columns[c][r] = rows[r][c];
    return columns;
}

template <int H>
Contender rtneural(const Floats& numbers) {
    using Model = RTNeural::ModelT<float, 1, 1, RTNeural::LSTMLayerT<float, 1, H>, RTNeural::DenseT<float, H, 1>>;
    auto model = std::make_shared<Model>();
    size_t at = 0;  // gates lie in the same order: i, f, g, o
    auto& lstm = model->template get<0>();
    lstm.setWVals(transposed(rows(numbers, at, 4 * H, 1)));
    lstm.setUVals(transposed(rows(numbers, at, 4 * H, H)));
    const std::vector<Floats> biases = rows(numbers, at, 2, 4 * H);
    Floats bias = biases[0];
    for (size_t j = 0; j < bias.size(); ++j) bias[j] += biases[1][j];
    lstm.setBVals(bias);
    model->template get<1>().setWeights(rows(numbers, at, 1, H));
    model->template get<1>().setBias(&numbers[at]);
    model->reset();
    return {"RTNeural",
            [model](const float* x, float* y, int64_t count) {
                for (int64_t t = 0; t < count; ++t) y[t] = model->forward(x + t);
            },
            {},
            {},
            {}};
}

std::string read(const char* path) {
    std::string bytes;
    std::FILE* const file = std::fopen(path, "rb");
    char part[4096];
    for (size_t got; file && (got = std::fread(part, 1, sizeof(part), file)) > 0;) bytes.append(part, got);
    if (file) std::fclose(file);
    return bytes;
}

// Nothing for sizes that it is not compiled for.
void add_rtneural(std::vector<Contender>& to, int64_t H, const Floats& numbers) {
    switch (H) {
        case 4:
            return to.push_back(rtneural<4>(numbers));
        case 8:
            return to.push_back(rtneural<8>(numbers));
        case 16:
            return to.push_back(rtneural<16>(numbers));
        case 20:
            return to.push_back(rtneural<20>(numbers));
        case 32:
            return to.push_back(rtneural<32>(numbers));
        case 40:
            return to.push_back(rtneural<40>(numbers));
        case 64:
            return to.push_back(rtneural<64>(numbers));
        case 80:
            return to.push_back(rtneural<80>(numbers));
        default:
            return;
    }
}

#endif

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return std::fprintf(stderr, "usage: %s MODEL STEPS\n", arguments[0]), 2;
    rnnfast_error error;
    rnnfast_stream* const stream = rnnfast_open(arguments[1], 1, &error);
    if (!stream) return std::fprintf(stderr, "%s\n", error.message), 1;
    rnnfast_sizes sizes;
    rnnfast_get_sizes(stream, &sizes);
    const int64_t steps = std::atoll(arguments[2]), I = sizes.input_size, O = sizes.output_size;
    const Floats x = signal(steps, I);

    std::vector<Contender> contenders;
    contenders.push_back({"rnnfast",
                          [&](const float* x, float* y, int64_t count) {
                              for (int64_t t = 0; t < count; ++t) rnnfast_step(stream, x + t * I, y + t * O);
                          },
                          {},
                          {},
                          {}});
    contenders.push_back({"rnnfast, blocks of 48",
                          [&](const float* x, float* y, int64_t count) {
                              for (int64_t t = 0; t < count; t += 48)
                                  rnnfast_steps(stream, std::min<int64_t>(48, count - t), x + t * I, y + t * O);
                          },
                          {},
                          {},
                          {}});
#ifdef WITH_RTNEURAL
    const std::string bytes = read(arguments[1]);
    Floats numbers((bytes.size() - 84) / sizeof(float));
    std::memcpy(numbers.data(), bytes.data() + 80, numbers.size() * sizeof(float));
    if (I == 1 && O == 1 && sizes.num_layers == 1) add_rtneural(contenders, sizes.hidden_size, numbers);
#endif

    for (Contender& c : contenders) {  // from the same state
        c.y.resize(size_t(steps * O));
        rnnfast_reset(stream, nullptr);
        c.run(x.data(), c.y.data(), steps);
    }
    double off = 0;
    for (const Contender& c : contenders)
        for (size_t i = 0; i < c.y.size(); ++i) off = std::max(off, double(std::fabs(c.y[i] - contenders[0].y[i])));

    const int64_t batch = std::max<int64_t>(1, steps / batches);
    for (int64_t first = 0; first + batch <= steps; first += batch)
        for (Contender& c : contenders) {
            const Clock::time_point start = Clock::now();
            c.run(x.data() + first * I, c.y.data(), batch);
            c.batch_s.push_back(seconds_since(start) / double(batch));
        }
    for (Contender& c : contenders)
        for (int64_t t = 0; t < steps; ++t) {
            const Clock::time_point start = Clock::now();
            c.run(x.data() + t * I, c.y.data(), 1);
            c.step_s.push_back(seconds_since(start));
        }
    std::printf("{\"off\": %g", off);
    for (const Contender& c : contenders)
        std::printf(", \"%s\": {\"median_s\": %g, \"least_s\": %g, \"single_median_s\": %g, \"single_999_s\": %g}",
                    c.name.c_str(), quantile(c.batch_s, .5), quantile(c.batch_s, 0), quantile(c.step_s, .5),
                    quantile(c.step_s, .999));
    std::printf("}\n");
    rnnfast_close(stream);
    return 0;
}
