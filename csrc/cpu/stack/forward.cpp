// The forward pass of a stack, alone or with the tangents of x, h0 and c0, whose rows go through the same products,
// after those of the values.
#include "time_run.h"

namespace rnnfast {
namespace {

// Up to so many rows the weights are read where they lie: to pack them would take longer. Of a step or two that is so
// for more rows the longer the sums are; more steps read W_ih again and again.
int64_t direct_rows(const Shape& s) { return s.T <= 2 ? std::clamp<int64_t>((s.I + s.recurrent()) / 16, 8, 64) : 8; }

template <class T>
class ForwardRun : public TimeRun<T> {
    using TimeRun<T>::s, TimeRun<T>::R, TimeRun<T>::G, TimeRun<T>::N, TimeRun<T>::sequence, TimeRun<T>::kernel,
        TimeRun<T>::cell, TimeRun<T>::plan, TimeRun<T>::group_barriers, TimeRun<T>::gates, TimeRun<T>::input_gates,
        TimeRun<T>::recurrent_gates, TimeRun<T>::projected, TimeRun<T>::chunk_steps, TimeRun<T>::bfloat16;

public:
    // dot: the tangents to take along, or nullptr.
    ForwardRun(const Shape& shape, const Forward<T>& call, const Tangent<T>* dot, int threads)
        : TimeRun<T>(shape, threads, dot ? 2 : 1, call.bfloat16_weights),
          call(call),
          dot(dot),
          halves(dot ? 2 : 1),
          reserve(ReserveLayout::of_forward(shape, N)),
          direct(N <= direct_rows(s) && !dot) {
        const int64_t rows_of_chunk = chunk_steps * halves * this->group_size();
        const bool inference = !call.reserve;
        for (int64_t i = 0; i < s.L * s.D; ++i)
            weights.push_back(this->room_for(direct ? Parameters<const T*>{} : call.parameters[i], s.input(i / s.D)));
        if (inference && s.cell->saves_gates)
            for (int g = 0; g < plan.directions * plan.row_groups; ++g)
                z_chunk.push_back(Buffer<T>(rows_of_chunk * row_stride(G * s.H)));
        if (inference && s.P) m_step = Buffer<T>(halves * s.D * s.B * s.H);
        for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) {
            if (inference) hidden[i] = Buffer<T>(halves * N * s.D * R);
            if (call.dropout) dropped[i] = Buffer<T>(halves * N * s.D * R);
        }
        if (dot) {
            const int64_t widest = std::max({s.I, s.D * R, G * s.H});
            nothing = Buffer<T>(widest);
            std::fill_n(nothing.get(), widest, T(0));
            if (s.cell->has_c()) states = Buffer<T>(s.D * N * s.H);
        }
        for (int i = 0; i < plan.threads(); ++i) rows.push_back(Rows(rows_of_chunk));
    }

private:
    // Row pointers of one thread.
    struct Rows {
        explicit Rows(int64_t n)
            : from(5 * n),
              to(5 * n),
              x(from.get()),
              bias(x + n),
              h_prev(bias + n),
              c_prev(h_prev + n),
              c_dot_prev(c_prev + n),
              z(to.get()),
              c(z + n),
              m(c + n),
              y(m + n),
              c_dot(y + n) {}
        Buffer<const T*> from;
        Buffer<T*> to;
        const T **x, **bias, **h_prev, **c_prev, **c_dot_prev;
        T **z, **c, **m, **y, **c_dot;
    };

    void prepare(int thread) override {
        for (int64_t i = 0; i < s.L * s.D; ++i) this->pack(call.parameters[i], s.input(i / s.D), thread, weights[i]);
    }

    // Of values (half 0) and of tangents (half 1).
    const T* input(int64_t l, int half) const {
        if (l == 0) return half ? dot->x : call.x;
        return call.dropout ? dropped[(l - 1) % 2].get() + half * N * s.D * R : output(l - 1, half);
    }
    T* output(int64_t l, int half) const {
        if (l == s.L - 1) return half ? dot->y : call.y;
        return call.reserve ? call.reserve + reserve.hidden + l * N * s.D * R
                            : hidden[l % 2].get() + half * N * s.D * R;
    }

    // z = W_ih x + b of the steps of a chunk. Leaves their z rows, step after step, in rows.z.
    void start_chunk(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1,
                     const Range& panels) override {
        const Direction way = this->direction(d);
        const int64_t I = s.input(l);
        const PackedWeights<T>& w = weights[this->index(l, d)];
        Rows& to = rows[my.thread];
        int64_t n = 0;
        for (int64_t step = step0; step < step1; ++step)
            for (int half = 0; half < halves; ++half)
                this->for_rows(my, way, step, step + 1, [&](int64_t t, int64_t b) {
                    const int64_t row = sequence.row(t) + b;
                    to.x[n] = input(l, half) ? input(l, half) + row * I : nothing.get();
                    to.bias[n] = half ? nothing.get() : w.bias.get();
                    to.z[n] = z_row(my, l, d, row, half, n);
                    ++n;
                });
        if (direct) return;
        kernel.product({n, I, to.x, 1, input_gates, panels.begin, panels.end, w.x.get(), to.bias, to.z});
        this->start_others(input_gates, this->columns_of(input_gates, panels), n, to.bias, to.z);
    }

    // Where the pre-activations of a row are summed up; n counts the rows of the chunk.
    T* z_row(const Share& my, int64_t l, int64_t d, int64_t row, int half, int64_t n) const {
        if (!s.cell->saves_gates) return output(l, half) + (row * s.D + d) * R;
        if (!call.reserve) return z_chunk[my.group].get() + n * row_stride(G * s.H);
        return call.reserve + reserve.gates + (this->index(l, d) * N + row) * G * s.H;
    }

    int64_t take_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first,
                      const Range& panels) override {
        const Direction way = this->direction(d);
        const int64_t t = way.time(step), i = this->index(l, d);
        const Origin from = way.origin(t);
        Rows& to = rows[my.thread];
        const int64_t count = h_previous(my, from, l, d, t, to);
        if (s.cell->has_c()) state_rows(my, from, l, d, t, to);
        const Range batch = this->my_rows(my, t);
        int64_t n = 0;
        for (int half = 0; half < halves; ++half)
            for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
                const int64_t row = sequence.row(t) + b;
                to.y[n] = output(l, half) + (row * s.D + d) * R;
                to.m[n] = !s.P           ? to.y[n]
                          : call.reserve ? call.reserve + reserve.m + (i * N + row) * s.H
                                         : m_step.get() + ((half * s.D + d) * s.B + b) * s.H;
            }
        const T* const* state = s.cell->carries_h() ? to.h_prev : to.c_prev;
        const Step<T> values{recurrence(l, d, to, count, first, panels), state, to.c, to.m, call.parameters[i].unit};
        if (dot) {
            const int64_t half = count / halves;
            const T* const* state_dot = s.cell->carries_h() ? state + half : to.c_dot_prev;
            const StepTangent<T> tangents{{},       values.product.c, state,       state_dot,
                                          to.c_dot, values.m + half,  values.unit, this->zeros.get()};
            cell.step_dual({values, tangents});
        } else {
            cell.step(values);
        }
        if (s.P) project(my, i, count);
        return count;
    }

    // h_{t-1} of the rows of step t, into to.h_prev; -> how many
    int64_t h_previous(const Share& my, const Origin& from, int64_t l, int64_t d, int64_t t, Rows& to) const {
        const Range batch = this->my_rows(my, t);
        int64_t n = 0;
        for (int half = 0; half < halves; ++half)
            for (int64_t b = batch.begin; b < batch.end; ++b) {
                const T* h0 = this->state(half ? dot->h0 : call.h0, l, d, b, R);
                to.h_prev[n++] = this->previous(from, t, b, output(l, half) + d * R, s.D * R, h0);
            }
        return n;
    }

    // Where c_{t-1}, c_t and their tangents are, of the rows of step t. Inference carries c in c_n, and tangents their
    // own likewise.
    void state_rows(const Share& my, const Origin& from, int64_t l, int64_t d, int64_t t, Rows& to) const {
        const Range batch = this->my_rows(my, t);
        T* const history = state_history(l, d);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t at = (this->index(l, d) * s.B + b) * s.H;
            const T* c0 = this->state(call.c0, l, d, b, s.H);
            to.c[n] = history ? history + (sequence.row(t) + b) * s.H : call.c_n + at;
            to.c_prev[n] = history ? this->previous(from, t, b, history, s.H, c0)
                                   : this->previous(from, t, b, call.c_n + at, 0, c0);
            if (!dot) continue;
            to.c_dot[n] = dot->c_n + at;
            to.c_dot_prev[n] = this->previous(from, t, b, dot->c_n + at, 0, this->state(dot->c0, l, d, b, s.H));
        }
    }

    // The product of a step: z += W_hh h_{t-1}. Direct: computes all of z now and returns an empty product.
    Product<T> recurrence(int64_t l, int64_t d, Rows& to, int64_t n, int64_t first, const Range& panels) const {
        const int64_t i = this->index(l, d);
        T** z = to.z + first;
        if (direct) {
            const Parameters<const T*>& p = call.parameters[i];
            const auto ih = this->matrices_of(p.w_ih, s.cell->input_gates, s.input(l)),
                       hh = this->matrices_of(p.w_hh, s.cell->recurrent_gates, R);
            kernel.direct_product({n,
                                   {s.input(l), R},
                                   {to.x + first, to.h_prev},
                                   {{ih.data(), bfloat16}, {hh.data(), bfloat16}},
                                   gates,
                                   panels.begin,
                                   panels.end,
                                   to.bias,
                                   z});
        }
        return {n, direct ? 0 : R, to.h_prev, 1, recurrent_gates, panels.begin, panels.end, weights[i].h.get(), z, z};
    }

    // y = W_hr m, of all parts of the units.
    void project(const Share& my, int64_t i, int64_t n) {
        group_barriers[my.group].wait();
        Rows& to = rows[my.thread];
        const Range r = this->my_panels(my, projected);
        const void* const w_hr = call.parameters[i].w_hr;
        if (direct)
            kernel.direct_product(
                {n, {s.H, 0}, {to.m, nullptr}, {{&w_hr, bfloat16}, {}}, projected, r.begin, r.end, nullptr, to.y});
        else
            kernel.product({n, s.H, to.m, 1, projected, r.begin, r.end, weights[i].hr.get(), nullptr, to.y});
    }

    // The states of all steps of a sweep (N,H), or nullptr: not at hand.
    T* state_history(int64_t l, int64_t d) const {
        if (call.reserve) return call.reserve + reserve.c + this->index(l, d) * N * s.H;
        return dot ? states.get() + d * N * s.H : nullptr;
    }

    // Final states, and the output of this layer scaled by dropout for the next one.
    void finish_sweep(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) override {
        const Direction way = this->direction(d);
        const int64_t i = this->index(l, d);
        const T* const history = s.cell->has_c() ? state_history(l, d) : nullptr;
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            const int64_t t = way.end(b), row = sequence.row(t) + b;
            for (int half = 0; half < halves; ++half)
                copy_columns((half ? dot->h_n : call.h_n) + (i * s.B + b) * R, output(l, half) + (row * s.D + d) * R,
                             outputs);
            if (history) copy_columns(call.c_n + (i * s.B + b) * s.H, history + row * s.H, units);
        }
        if (call.dropout && l < s.L - 1)
            for (int half = 0; half < halves; ++half)
                this->drop_columns(my, dropped[l % 2].get() + half * N * s.D * R + d * R, output(l, half) + d * R,
                                   call.dropout + l * N * s.D * R + d * R, outputs);
    }

    const Forward<T>& call;
    const Tangent<T>* const dot;  // or nullptr
    const int halves;             // of the rows: values, and tangents if there are any
    const ReserveLayout reserve;
    const bool direct;
    std::vector<PackedWeights<T>> weights;  // [L*D]
    std::vector<Buffer<T>> z_chunk;         // [groups], inference: rows (G,H) of one chunk
    Buffer<T> m_step;                       // (halves,D,B,H), inference: output of the cell before W_hr
    Buffer<T> hidden[2];                    // (halves,N,D*R), inference: output of the layer below, by turns
    Buffer<T> dropped[2];                   // (halves,N,D*R), the same after dropout
    Buffer<T> states;                       // (D,N,H), with tangents, which need c_{t-1} beside c_t
    Buffer<T> nothing;                      // zeros: tangents that are not given, and of the biases
    std::vector<Rows> rows;                 // [threads]
};

}  // namespace

template <class T>
void forward(const Shape& shape, const Forward<T>& call, int threads) {
    run_with(threads, [&](int n) { return std::make_unique<ForwardRun<T>>(shape, call, nullptr, n); });
}

template <class T>
void forward_dual(const Shape& shape, const Forward<T>& call, const Tangent<T>& dot, int threads) {
    run_with(threads, [&](int n) { return std::make_unique<ForwardRun<T>>(shape, call, &dot, n); });
}

template void forward<float>(const Shape&, const Forward<float>&, int);
template void forward<double>(const Shape&, const Forward<double>&, int);
template void forward_dual<float>(const Shape&, const Forward<float>&, const Tangent<float>&, int);
template void forward_dual<double>(const Shape&, const Forward<double>&, const Tangent<double>&, int);

}  // namespace rnnfast
