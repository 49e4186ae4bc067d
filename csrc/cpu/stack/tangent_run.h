// Forward mode: the tangents of a finished forward pass along a direction.
//   z_dot = W_ih x_dot + W_hh h_dot_{t-1} + W_ih_dot x + W_hh_dot h_{t-1} + b_dot
// Only the term with h_dot waits for the step before; the rest is summed up chunk by chunk.
#pragma once

#include "time_run.h"

namespace rnnfast {

template <class T>
class TangentRun : public TimeRun<T> {
public:
    // saved: as ReserveLayout::of_tangents, out. z_dot: as in tangent().
    TangentRun(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, T* z_dot, T* saved, int threads)
        : TimeRun<T>(shape, threads, 1, false),
          past(past),
          trace(trace_of(past, ReserveLayout::of_forward(shape, N))),
          dot(dot),
          z_dot(z_dot),
          saved(saved),
          at(ReserveLayout::of_tangents(s, N)) {
        for (int64_t i = 0; i < s.L * s.D; ++i) {
            weights.push_back(this->room_for(past.parameters[i], s.input(i / s.D)));
            weights_dot.push_back(this->room_for(dot.parameters[i], s.input(i / s.D)));
        }
        if (past.dropout) {
            dropped = Buffer<T>((s.L - 1) * N * s.D * R);
            for (Buffer<T>& buffer : dropped_dot) buffer = Buffer<T>(N * s.D * R);
        }
        const int64_t rows_of_chunk = chunk_steps * this->group_size();
        for (int i = 0; i < plan.threads(); ++i) {
            rows.push_back(Rows(rows_of_chunk));
            if (!z_dot && s.cell->saves_gates) z_dot_chunk.push_back(Buffer<T>(rows_of_chunk * row_stride(G * s.H)));
        }
    }

protected:
    using TimeRun<T>::s, TimeRun<T>::R, TimeRun<T>::G, TimeRun<T>::N, TimeRun<T>::sequence, TimeRun<T>::kernel,
        TimeRun<T>::cell, TimeRun<T>::plan, TimeRun<T>::group_barriers, TimeRun<T>::gates, TimeRun<T>::input_gates,
        TimeRun<T>::recurrent_gates, TimeRun<T>::projected, TimeRun<T>::chunk_steps;

    // The step of the rows of time t, whose pointers and sums are ready.
    virtual void cell_step(const Share&, int64_t /*l*/, int64_t /*d*/, int64_t /*t*/, const StepTangent<T>& step) {
        cell.step_tangent(step);
    }

    const Past<T>& past;
    const Trace<T> trace;

private:
    struct Rows {
        explicit Rows(int64_t n)
            : a(n), bias(n), gates(n), c_prev(n), c_dot_prev(n), m(n), z_dot(n), c_dot(n), m_dot(n), y_dot(n) {}
        Buffer<const T*> a, bias, gates, c_prev, c_dot_prev, m;
        Buffer<T*> z_dot, c_dot, m_dot, y_dot;
    };

    void prepare(int thread) override {
        for (int64_t i = 0; i < s.L * s.D; ++i) {
            this->pack(past.parameters[i], s.input(i / s.D), thread, weights[i]);
            this->pack(dot.parameters[i], s.input(i / s.D), thread, weights_dot[i]);
        }
        if (past.dropout) drop(thread);
    }

    // The inputs of the upper layers as dropout left them.
    void drop(int thread) {
        const int64_t size = N * s.D * R;
        const Range all = Range::part(size, thread, plan.threads());
        for (int64_t l = 0; l + 1 < s.L; ++l)
            multiply_columns(dropped.get() + l * size, trace.output(s, N, l), past.dropout + l * size, all);
    }

    const T* input(int64_t l) const {
        if (l == 0) return past.x;
        return past.dropout ? dropped.get() + (l - 1) * N * s.D * R : trace.output(s, N, l - 1);
    }
    T* output_dot(int64_t l) const { return l == s.L - 1 ? dot.y : saved + at.hidden + l * N * s.D * R; }
    const T* input_dot(int64_t l) const {
        if (l == 0) return dot.x;
        return past.dropout ? dropped_dot[(l - 1) % 2].get() : output_dot(l - 1);
    }

    // z_dot of the steps of a chunk without the term of h_dot; their rows stay in rows.z_dot, step after step.
    void start_chunk(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1,
                     const Range& panels) override {
        const Direction way = this->direction(d);
        const int64_t I = s.input(l);
        const PackedWeights<T>&w = weights[this->index(l, d)], &w_dot = weights_dot[this->index(l, d)];
        Rows& to = rows[my.thread];
        int64_t n = 0;
        this->for_rows(my, way, step0, step1, [&](int64_t t, int64_t b) {
            to.bias[n] = w_dot.bias.get();
            to.z_dot[n] = z_dot_row(my, l, d, sequence.row(t) + b, n);
            ++n;
        });
        const T* const* init = to.bias.get();
        // Adds W of the rows that row_of(t, b) gives; K = 0: none, for what is in init already.
        const auto add = [&](const Columns& gates, const Buffer<T>& W, int64_t K, const auto& row_of) {
            if (init != to.z_dot.get())
                this->start_others(gates, this->columns_of(gates, panels), n, init, to.z_dot.get());
            int64_t i = 0;
            this->for_rows(my, way, step0, step1, [&](int64_t t, int64_t b) { to.a[i++] = row_of(t, b); });
            kernel.product({n, K, to.a.get(), 1, gates, panels.begin, panels.end, W.get(), init, to.z_dot.get()});
            init = to.z_dot.get();
        };
        const auto x_row = [&](int64_t t, int64_t b) { return input(l) + (sequence.row(t) + b) * I; };
        const auto x_dot_row = [&](int64_t t, int64_t b) { return input_dot(l) + (sequence.row(t) + b) * I; };
        const auto h_row = [&](int64_t t, int64_t b) {
            const T* h0 = this->state(past.h0, l, d, b, R);
            return this->previous(way.origin(t), t, b, trace.output(s, N, l) + d * R, s.D * R, h0);
        };
        if (w_dot.x || !input_dot(l)) add(input_gates, w_dot.x, w_dot.x ? I : 0, x_row);
        if (w_dot.h) add(recurrent_gates, w_dot.h, R, h_row);
        if (input_dot(l)) add(input_gates, w.x, I, x_dot_row);
    }

    // Where z_dot of a row is summed up; n counts the rows of the chunk.
    T* z_dot_row(const Share& my, int64_t l, int64_t d, int64_t row, int64_t n) const {
        if (z_dot) return z_dot + (this->index(l, d) * N + row) * G * s.H;
        if (!s.cell->saves_gates) return output_dot(l) + (row * s.D + d) * R;  // there it becomes h_dot
        return z_dot_chunk[my.thread].get() + n * row_stride(G * s.H);
    }

    int64_t take_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first,
                      const Range& panels) override {
        const Direction way = this->direction(d);
        const int64_t t = way.time(step), i = this->index(l, d);
        const Range batch = this->my_rows(my, t);
        const Origin from = way.origin(t);
        Rows& to = rows[my.thread];
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b, out = (row * s.D + d) * R;
            const T* h0_dot = this->state(dot.h0, l, d, b, R);
            to.a[n] = this->previous(from, t, b, output_dot(l) + d * R, s.D * R, h0_dot);
            to.gates[n] = trace.gates(s, N, l, d, row);
            to.y_dot[n] = to.m_dot[n] = output_dot(l) + out;
            if (s.P) to.m_dot[n] = saved + at.m + (i * N + row) * s.H;
            if (s.P) to.m[n] = trace.m(s, N, i) + row * s.H;
            if (s.cell->carries_h()) {
                to.c_prev[n] = this->previous(from, t, b, trace.output(s, N, l) + d * R, s.D * R,
                                              this->state(past.h0, l, d, b, R));
                to.c_dot_prev[n] = to.a[n];
            }
            if (!s.cell->has_c()) continue;
            T* const c_dot = saved + at.c + i * N * s.H;
            to.c_prev[n] = this->previous(from, t, b, trace.c(s, N, i), s.H, this->state(past.c0, l, d, b, s.H));
            to.c_dot_prev[n] = this->previous(from, t, b, c_dot, s.H, this->state(dot.c0, l, d, b, s.H));
            to.c_dot[n] = c_dot + row * s.H;
        }
        T** z = to.z_dot.get() + first;
        const Product<T> product{n, R, to.a.get(), 1, recurrent_gates, panels.begin, panels.end, weights[i].h.get(),
                                 z, z};
        const T* const unit_dot = dot.parameters[i].unit ? dot.parameters[i].unit : this->zeros.get();
        cell_step(my, l, d, t,
                  {product, to.gates.get(), to.c_prev.get(), to.c_dot_prev.get(), to.c_dot.get(), to.m_dot.get(),
                   past.parameters[i].unit, unit_dot});
        if (s.P) project(my, i, n);
        return n;
    }

    // h_dot = W_hr m_dot + W_hr_dot m
    void project(const Share& my, int64_t i, int64_t n) {
        group_barriers[my.group].wait();
        const Range r = this->my_panels(my, projected);
        Rows& to = rows[my.thread];
        kernel.product(
            {n, s.H, to.m_dot.get(), 1, projected, r.begin, r.end, weights[i].hr.get(), nullptr, to.y_dot.get()});
        if (weights_dot[i].hr)
            kernel.product({n, s.H, to.m.get(), 1, projected, r.begin, r.end, weights_dot[i].hr.get(), to.y_dot.get(),
                            to.y_dot.get()});
    }

    void finish_sweep(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) override {
        const Direction way = this->direction(d);
        const int64_t i = this->index(l, d);
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            const int64_t row = sequence.row(way.end(b)) + b;
            copy_columns(dot.h_n + (i * s.B + b) * R, output_dot(l) + (row * s.D + d) * R, outputs);
            if (s.cell->has_c()) copy_columns(dot.c_n + (i * s.B + b) * s.H, saved + at.c + (i * N + row) * s.H, units);
        }
        if (past.dropout && l < s.L - 1)
            this->drop_columns(my, dropped_dot[l % 2].get() + d * R, output_dot(l) + d * R,
                               past.dropout + l * N * s.D * R + d * R, outputs);
    }

    const Tangent<T>& dot;
    T* const z_dot;
    T* const saved;
    const ReserveLayout at;                              // of `saved`
    std::vector<PackedWeights<T>> weights, weights_dot;  // [L*D]
    Buffer<T> dropped;                                   // (L-1,N,D*R), inputs of the upper layers after dropout
    Buffer<T> dropped_dot[2];                            // (N,D*R), input tangents of the layer at hand and the next
    std::vector<Rows> rows;                              // [threads]
    std::vector<Buffer<T>> z_dot_chunk;                  // [threads] (rows of a chunk,G,H)
};

}  // namespace rnnfast
