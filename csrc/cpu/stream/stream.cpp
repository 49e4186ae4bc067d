#include "stream.h"

#include <algorithm>
#include <cstring>

namespace rnnfast {
namespace {

// Rows that go through W_ih together: of a chunk, so that each of its weights serves many.
constexpr int64_t block_rows = 48;
// From so many sequences for each thread on threads share the batch, else the units.
constexpr int64_t rows_of_a_thread = 4;

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

template <class T>
Buffer<T> zeros(int64_t size) {
    Buffer<T> numbers(size);
    if (size) std::memset(numbers.get(), 0, size_t(size) * sizeof(T));
    return numbers;
}

// Calls copy(row of the matrix, its first number among the packed ones, numbers from one k to the next).
template <class Copy>
void for_each_row(const Placement& at, Copy copy) {
    for (int64_t slot = 0; slot < at.slots; ++slot)
        for (int64_t unit = 0; unit < at.size; ++unit) {
            const int64_t vector = unit / at.lanes * at.slots + slot;
            const int64_t first = vector / affine_group * affine_group;
            const int64_t width = std::min<int64_t>(affine_group, at.vectors() - first);
            copy((at.gates ? at.gates[slot] : slot) * at.size + unit,
                 (first * at.K + vector - first) * at.lanes + unit % at.lanes, width * at.lanes);
        }
}

}  // namespace

double StreamShape::work() const {
    double all = double(O) * double(recurrent()) + double(L) * double(P) * double(H);
    const double x = cell->input_gates.count, h = cell->recurrent_gates.count;
    for (int64_t l = 0; l < L; ++l) all += double(H) * (x * double(input(l)) + h * double(recurrent()));
    return all;
}

template <class T>
Stream<T>::Product::Product(int64_t size, int64_t slots, int64_t K, int64_t lanes, const int* gates)
    : at{size, slots, K, lanes, gates},
      vectors(at.vectors()),
      groups(at.groups()),
      w(zeros<T>(at.packed())),
      bias(zeros<T>(vectors * lanes)) {}

template <class T>
Stream<T>::Stream(const StreamShape& s, int64_t B)
    : AnyStream(s, B),
      kernel_(kernels_for<T>(s.H)),
      lanes_(kernel_.lanes),
      R_(round_up(s.recurrent(), lanes_)),
      H_(round_up(s.H, lanes_)),
      O_(round_up(s.O, lanes_)),
      unit_vectors_(H_ / lanes_),
      block_(std::max<int64_t>(1, block_rows / B)),
      readout_(s.O, 1, s.recurrent(), lanes_) {
    const int64_t R = s.recurrent();
    const Slots x = s.cell->input_gates, h = s.cell->recurrent_gates;
    const int* const gates = s.cell->torch_gates;
    for (int64_t l = 0; l < s.L; ++l)
        layers_.push_back({Product(s.H, x.count, s.input(l), lanes_, gates + x.first),
                           Product(s.H, h.count, R, lanes_, gates + h.first), Product(s.P, 1, s.H, lanes_),
                           zeros<T>((block_ + 1) * B * R_), zeros<T>(s.cell->has_c() ? B * H_ : 0),
                           zeros<T>(s.cell->unit_parameters * H_)});
    z_x_ = zeros<T>(block_ * B * x.count * H_);
    z_h_ = zeros<T>(B * h.count * H_);
    m_ = zeros<T>(s.P ? B * H_ : 0);
    y_ = zeros<T>(block_ * B * O_);
}

template <class T>
std::vector<typename Stream<T>::Array> Stream<T>::arrays() const {
    std::vector<Array> all;
    const auto add_weight = [&](const Product& p) { all.push_back({p.at, p.w.get()}); };
    const auto add_bias = [&](const Product& p) {
        all.push_back({{p.at.size, p.at.slots, 1, p.at.lanes, p.at.gates}, p.bias.get()});
    };
    for (const Layer& layer : layers_) {
        add_weight(layer.x);
        add_weight(layer.h);
        if (shape.bias) add_bias(layer.x), add_bias(layer.h);
        if (layer.hr.exists()) add_weight(layer.hr);
        if (layer.unit) all.push_back({{shape.H, shape.cell->unit_parameters, 1, lanes_}, layer.unit.get()});
    }
    if (readout_.exists()) add_weight(readout_);
    if (readout_.exists() && shape.readout_bias) add_bias(readout_);
    return all;
}

template <class T>
std::vector<int64_t> Stream<T>::parameter_sizes() const {
    std::vector<int64_t> sizes;
    for (const Array& array : arrays()) sizes.push_back(array.at.rows() * array.at.K);
    return sizes;
}

template <class T>
void Stream<T>::set_parameters(const std::vector<const void*>& from) {
    const std::vector<Array> all = arrays();
    for (size_t i = 0; i < all.size(); ++i) {
        const T* const matrix = static_cast<const T*>(from[i]);
        const int64_t K = all[i].at.K;
        for_each_row(all[i].at, [&](int64_t row, int64_t first, int64_t stride) {
            for (int64_t k = 0; k < K; ++k) all[i].numbers[first + k * stride] = matrix[row * K + k];
        });
    }
}

template <class T>
void Stream<T>::get_parameters(const std::vector<void*>& to) const {
    const std::vector<Array> all = arrays();
    for (size_t i = 0; i < all.size(); ++i) {
        T* const matrix = static_cast<T*>(to[i]);
        const int64_t K = all[i].at.K;
        for_each_row(all[i].at, [&](int64_t row, int64_t first, int64_t stride) {
            for (int64_t k = 0; k < K; ++k) matrix[row * K + k] = all[i].numbers[first + k * stride];
        });
    }
}

template <class T>
void Stream<T>::run(int64_t steps, const void* x, void* y) {
    now_ = work(steps, static_cast<const T*>(x), static_cast<T*>(y), {{0, B}, 0, 1}, [] {});
}

template <class T>
void Stream<T>::run_part(int64_t steps, const void* x, void* y, int part, int parts, Barrier& barrier) {
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    // Sequences do not wait for each other, but few rows of a product cost nearly as much as one.
    if (B >= rows_of_a_thread * parts)
        work(steps, from, to, {Range::part(B, part, parts), 0, 1}, [] {});
    else
        work(steps, from, to, {{0, B}, part, parts}, [&] { barrier.wait(); });
}

template <class T>
void Stream<T>::finish_parts(int64_t steps) {
    for (int64_t count; steps; steps -= count) {
        count = std::min(room(now_), steps);
        now_ = now_ < block_ ? now_ + count : count;
    }
}

template <class T>
template <class Wait>
int64_t Stream<T>::work(int64_t steps, const T* x, T* y, const Part& my, Wait wait) {
    const StreamShape& s = shape;
    const int64_t R = R_, out = s.output();
    int64_t now = now_;
    for (int64_t step = 0, count; step < steps; step += count, now += count) {
        count = std::min(room(now), steps - step);
        if (now == block_) {
            if (my.index == 0)
                for (const Layer& layer : layers_)
                    std::memcpy(hidden(layer, 0) + my.sequences.begin * R, hidden(layer, now) + my.sequences.begin * R,
                                size_t(my.rows() * R) * sizeof(T));
            now = 0;
            wait();
        }
        for (int64_t l = 0; l < s.L; ++l) run_layer(l, now, count, x + step * B * s.I, my, wait);
        const T* const top = hidden(layers_.back(), now + 1);  // (count,B,R)
        if (readout_.exists()) {
            for_rows(count, my, [&](int64_t row, int64_t rows) {
                multiply(readout_, rows, top + row * R, R, y_.get() + row * O_, my);
            });
            wait();
        }
        if (my.index == 0)
            for_rows(count, my, [&](int64_t row, int64_t rows) {
                const T* const from = readout_.exists() ? y_.get() + row * O_ : top + row * R;
                copy_rows(rows, from, readout_.exists() ? O_ : R, y + (step * B + row) * out, out);
            });
        wait();
    }
    return now;
}

template <class T>
template <class Wait>
void Stream<T>::run_layer(int64_t l, int64_t now, int64_t steps, const T* x, const Part& my, Wait wait) {
    const int64_t R = R_, H = H_, XH = shape.cell->input_gates.count * H, GH = shape.cell->recurrent_gates.count * H;
    Layer& layer = layers_[size_t(l)];
    const bool projected = layer.hr.exists();
    const T* const input = l ? hidden(layers_[size_t(l - 1)], now + 1) : x;
    const int64_t input_stride = l ? R : shape.I;
    for_rows(steps, my, [&](int64_t row, int64_t rows) {
        multiply(layer.x, rows, input + row * input_stride, input_stride, z_x_.get() + row * XH, my);
    });
    const Range units = my.of(unit_vectors_);
    const int64_t b = my.sequences.begin;
    T *const z_h = z_h_.get() + b * GH, *const c = layer.c.get() + (layer.c ? b * H : 0);
    for (int64_t row = b; row < steps * B; row += B) {
        T *const h_prev = hidden(layer, now) + row * R, *const h = h_prev + B * R;
        T* const m = projected ? m_.get() + b * H : h;
        multiply(layer.h, my.rows(), h_prev, R, z_h, my);
        wait();
        const bool carries_h = shape.cell->carries_h();
        kernel_.cells[shape.cell->index].stream_step({my.rows(), units.begin, units.end, z_x_.get() + row * XH, XH, z_h,
                                                      GH, layer.unit.get(), carries_h ? h_prev : c, c,
                                                      carries_h ? R : H, m, projected ? H : R});
        wait();
        if (!projected) continue;
        multiply(layer.hr, my.rows(), m, H, h, my);
        wait();
    }
}

// Calls f(first row, rows) for neighbouring rows of `steps` steps.
template <class T>
template <class F>
void Stream<T>::for_rows(int64_t steps, const Part& my, F f) const {
    if (my.rows() == B) return f(0, steps * B);
    for (int64_t t = 0; t < steps; ++t) f(t * B + my.sequences.begin, my.rows());
}

template <class T>
void Stream<T>::multiply(const Product& by, int64_t rows, const T* a, int64_t a_stride, T* out, const Part& my) const {
    const Range groups = my.of(by.groups);
    kernel_.affine({rows, by.at.K, a, a_stride, by.vectors, groups.begin, groups.end, by.w.get(), by.bias.get(), out,
                    by.vectors * lanes_});
}

// From rows of whole vectors to dense ones.
template <class T>
void Stream<T>::copy_rows(int64_t rows, const T* from, int64_t from_stride, T* to, int64_t size) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * size, from + r * from_stride, size_t(size) * sizeof(T));
}

template <class T>
void Stream<T>::reset(const uint8_t* mask) {
    for (Layer& layer : layers_)
        for (int64_t b = 0; b < B; ++b) {
            if (mask && !mask[b]) continue;
            std::memset(hidden(layer, now_) + b * R_, 0, size_t(R_) * sizeof(T));
            if (layer.c) std::memset(layer.c.get() + b * H_, 0, size_t(H_) * sizeof(T));
        }
}

template <class T>
void Stream<T>::get_state(void* h, void* c) const {
    const int64_t R = shape.recurrent(), H = shape.H;
    for (int64_t l = 0; l < shape.L; ++l) {
        copy_rows(B, hidden(layers_[size_t(l)], now_), R_, static_cast<T*>(h) + l * B * R, R);
        if (layers_[size_t(l)].c) copy_rows(B, layers_[size_t(l)].c.get(), H_, static_cast<T*>(c) + l * B * H, H);
    }
}

template <class T>
void Stream<T>::set_state(const void* h, const void* c) {
    const int64_t R = shape.recurrent(), H = shape.H;
    for (int64_t i = 0; i < shape.L * B; ++i) {
        Layer& layer = layers_[size_t(i / B)];
        const int64_t b = i % B;
        std::memcpy(hidden(layer, now_) + b * R_, static_cast<const T*>(h) + i * R, size_t(R) * sizeof(T));
        if (layer.c) std::memcpy(layer.c.get() + b * H_, static_cast<const T*>(c) + i * H, size_t(H) * sizeof(T));
    }
}

template class Stream<float>;
template class Stream<double>;

}  // namespace rnnfast
