// The second derivative: forward mode, which takes along what its tangents and the adjoints of the backward pass make
// of the saved z and c; then the products of a backward pass with tangents in the place of inputs and weights:
//   dx = dz W_ih_dot, dW = dz^T [x_dot, h_dot], and dz W_hh_dot for h.
#include "products.h"
#include "tangent_run.h"

namespace rnnfast {
namespace {

template <class T>
T* d_output(const Shape& s, int64_t N, const SavedGradients<T>& to, int64_t l) {  // (N,D*R)
    return l == s.L - 1 ? to.y : to.hidden + l * N * s.D * s.recurrent();
}

template <class T>
class SecondTangentRun : public TangentRun<T> {
    using TangentRun<T>::s, TangentRun<T>::R, TangentRun<T>::G, TangentRun<T>::N, TangentRun<T>::sequence,
        TangentRun<T>::cell, TangentRun<T>::plan, TangentRun<T>::zeros, TangentRun<T>::trace;

public:
    // d_initial: (L*D,B,H) of the state before all steps, past W_hh, or nullptr: not wanted. d_unit: (L,D,N,U,H), out.
    SecondTangentRun(const Shape& shape, const Past<T>& past, const T* adjoints, const Tangent<T>& dot, T* d_initial,
                     const SavedGradients<T>& to, T* saved, T* d_unit, int threads)
        : TangentRun<T>(shape, past, dot, nullptr, saved, threads),
          adjoints(adjoints),
          d_initial(d_initial),
          d_unit(d_unit),
          at(s, N),
          to(to) {
        if (!d_initial && s.cell->state != State::none) own_d_initial = Buffer<T>(s.L * s.D * s.B * s.H);
        for (int i = 0; i < plan.threads(); ++i) rows.push_back(Rows(s.B, s.resets ? s.H : 0));
    }

private:
    struct Rows {
        Rows(int64_t n, int64_t H) : c(n), dc(n), dm(n), d_gates(n), d_c(n), d_c_prev(n), d_unit(n), d_zeros(H) {
            std::fill(d_zeros.get(), d_zeros.get() + H, T(0));
        }
        Buffer<const T*> c, dc, dm;
        Buffer<T*> d_gates, d_c, d_c_prev, d_unit;
        Buffer<T> d_zeros;  // (H) of a state of zeros, for nobody
    };

    void start_sweep(const Share& my, int64_t l, int64_t d, const Range& units) override {
        if (s.cell->state == State::none) return;
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) copy_columns(initial_row(l, d, b), zeros.get(), units);
    }

    void cell_step(const Share& my, int64_t l, int64_t d, int64_t t, const StepTangent<T>& step) override {
        const Direction way = this->direction(d);
        const Range batch = this->my_rows(my, t);
        const Origin from = way.origin(t);
        const int64_t i = this->index(l, d), U = s.cell->unit_parameters;
        Rows& row = rows[my.thread];
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t r = i * N + sequence.row(t) + b;
            T* const d_h = d_output(s, N, to, l) + d * R;
            row.dm[n] = adjoints + at.dm + r * s.H;
            row.d_gates[n] = s.cell->saves_gates ? to.z + r * G * s.H : d_h + (r - i * N) * s.D * R;
            row.d_unit[n] = d_unit + r * U * s.H;
            if (s.cell->carries_h()) {
                row.d_c[n] = d_h + (r - i * N) * s.D * R;
                row.d_c_prev[n] =
                    this->template previous<T*>(from, t, b, d_h, s.D * R, initial_row(l, d, b), row.d_zeros.get());
            }
            if (!s.cell->has_c()) continue;
            row.c[n] = trace.c(s, N, 0) + r * s.H;
            row.dc[n] = adjoints + at.dc + r * s.H;
            row.d_c[n] = to.c + r * s.H;
            row.d_c_prev[n] = this->template previous<T*>(from, t, b, to.c + i * N * s.H, s.H, initial_row(l, d, b),
                                                          row.d_zeros.get());
        }
        cell.step_second({step, row.c.get(), row.dc.get(), row.dm.get(), row.d_gates.get(), row.d_c.get(),
                          row.d_c_prev.get(), row.d_unit.get()});
    }

    T* initial_row(int64_t l, int64_t d, int64_t b) const {
        return (d_initial ? d_initial : own_d_initial.get()) + (this->index(l, d) * s.B + b) * s.H;
    }

    const T* const adjoints;
    T* const d_initial;
    T* const d_unit;
    const AdjointLayout at;
    const SavedGradients<T>& to;
    Buffer<T> own_d_initial;
    std::vector<Rows> rows;  // [threads]
};

template <class T>
class SecondProducts : public Products<T> {
    using Products<T>::s, Products<T>::R, Products<T>::N, Products<T>::sequence, Products<T>::kernel, Products<T>::plan,
        Products<T>::everyone, Products<T>::parameters, Products<T>::dropout, Products<T>::gradients, Products<T>::GH,
        Products<T>::recurrent_rows, Products<T>::units, Products<T>::outputs, Products<T>::scratch;

public:
    SecondProducts(const Shape& shape, const Trace<T>& dot, const std::vector<Parameters<const T*>>& parameters_dot,
                   const T* dropout, const T* adjoints, const Gradients<T>& direct, const SavedGradients<T>& to,
                   const T* d_unit, int threads)
        : Products<T>(shape, dot, parameters_dot, dropout, direct, threads), to(to), d_unit(d_unit) {
        const AdjointLayout at(s, N);
        this->adjoints = {adjoints + at.dz, adjoints + at.dm, adjoints + at.dc, adjoints + at.dh, at.dz_stride, true};
        for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1) && dropout; ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
    }

private:
    void work(const Share& my) override {
        const Range mine = Range::part(N * s.D * R, my.thread, plan.threads());
        const bool is_there = !s.cell->saves_gates || s.cell->carries_h();  // what h brings as a gate or as the state
        for (int64_t l = 0; l < s.L && !is_there; ++l) std::fill(output(l) + mine.begin, output(l) + mine.end, T(0));
        for (int64_t l = s.L - 1; l >= 0; --l) {
            this->pack(l, my.thread);
            this->drop(l, my.thread);
            everyone.wait();
            for (int64_t d = 0; d < s.D; ++d) {
                recurrent_gradient(l, d, my.thread);
                if (s.P) projection_gradient(l, d, my.thread);
            }
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) this->initial_output_gradient(my, l, d);
            if (this->wants_input(l)) input_gradient(l, my.thread);
            for (int64_t d = 0; d < s.D; ++d) this->weight_gradients(l, d, my.thread);
            if (l > 0) everyone.wait();
        }
    }

    // h_t enters z_dot_{t+1} by W_hh_dot: adds dz_{t+1} W_hh_dot.
    void recurrent_gradient(int64_t l, int64_t d, int thread) {
        if (!parameters[this->index(l, d)].w_hh) return;
        const Direction way = this->direction(d);
        const Range steps = Range::part(s.T, thread, plan.threads());
        auto& my = scratch[thread];
        int64_t n = 0;
        const auto flush = [&] {
            kernel.product({n, recurrent_rows, my.a.get(), 1, outputs, 0, outputs.panels,
                            this->h.get() + d * outputs.packed(recurrent_rows), my.init.get(), my.to.get()});
            n = 0;
        };
        for (int64_t t = steps.begin; t < steps.end; ++t) {
            const int64_t next = t + way.stride();
            const Origin here = way.origin(next);
            for (int64_t b = 0; b < here.count; ++b) {
                if (!here.goes_on(b)) continue;
                my.a[n] = this->recurrent_row(l, d, sequence.row(next) + b);
                my.init[n] = my.to[n] = output(l) + ((sequence.row(t) + b) * s.D + d) * R;
                if (++n == Products<T>::block_rows) flush();
            }
        }
        flush();
    }

    // The cell's output enters h_dot_t by W_hr_dot: dh_t W_hr_dot.
    void projection_gradient(int64_t l, int64_t d, int thread) {
        T* m = to.m + this->index(l, d) * N * s.H;
        const Range mine = Range::part(N, thread, plan.threads());
        if (!parameters[this->index(l, d)].w_hr) {
            std::fill(m + mine.begin * s.H, m + mine.end * s.H, T(0));
            return;
        }
        auto& my = scratch[thread];
        for (int64_t row0 = mine.begin; row0 < mine.end; row0 += Products<T>::block_rows) {
            const int64_t n = std::min(Products<T>::block_rows, mine.end - row0);
            for (int64_t r = 0; r < n; ++r) {
                my.a[r] = this->dh_row(l, d, row0 + r);
                my.to[r] = m + (row0 + r) * s.H;
            }
            kernel.product({n, s.P, my.a.get(), 1, units, 0, units.panels, this->hr.get() + d * units.packed(s.P),
                            nullptr, my.to.get()});
        }
    }

    // Adds to what the layer below has; dropout applies to the new part alone, which then takes a place of its own.
    void input_gradient(int64_t l, int thread) {
        T* const below = l ? output(l - 1) : gradients.x;
        T* const dx = l && dropout ? d_hidden[(l - 1) % 2].get() : below;
        Products<T>::input_gradient(l, thread, dx, l && !dropout, [&](const Range& all) {
            if (dx != below) add_columns(below, dx, all);
        });
    }

    // Biases do not enter a tangent but by their own.
    void add_vectors(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread) override {
        const int64_t width = s.cell->unit_parameters * s.H;
        const auto row_of = [&](int64_t r) {
            return d_unit + (this->index(l, d) * N + scratch[thread].block[r].row) * width;
        };
        this->for_vectors({{}, {}, {}, {}, {}, to.unit}, thread, [&](const Range&, const Range& numbers, T* vector) {
            this->add_rows(n, numbers, row_of, width, thread, vector + numbers.begin);
        });
    }

    T* output(int64_t l) const { return d_output(s, N, to, l); }

    const SavedGradients<T>& to;
    const T* const d_unit;  // (L,D,N,U,H)
    Buffer<T> d_hidden[2];  // (N,D*R), with dropout, by turns
};

}  // namespace

template <class T>
void second(const Shape& of_call, const Past<T>& past, const T* adjoints, const Tangent<T>& dot,
            const Gradients<T>& direct, const SavedGradients<T>& saved, int threads) {
    Shape shape = of_call;
    shape.precision = Precision::highest;  // differences of products are too small for fewer bits
    const ReserveLayout at = ReserveLayout::of_tangents(shape, shape.rows());
    const Buffer<T> saved_dot(at.size),
        d_unit(shape.L * shape.D * shape.rows() * shape.cell->unit_parameters * shape.H);
    T* const d_initial = shape.cell->has_c() ? direct.c0 : direct.h0;
    run_with(threads, [&](int n) {
        return std::make_unique<SecondTangentRun<T>>(shape, past, adjoints, dot, d_initial, saved, saved_dot.get(),
                                                     d_unit.get(), n);
    });
    const Trace<T> trace{dot.x, dot.h0, dot.c0, dot.y, saved_dot.get(), at};
    run_with(threads, [&](int n) {
        return std::make_unique<SecondProducts<T>>(shape, trace, dot.parameters, past.dropout, adjoints, direct, saved,
                                                   d_unit.get(), n);
    });
}

template void second<float>(const Shape&, const Past<float>&, const float*, const Tangent<float>&,
                            const Gradients<float>&, const SavedGradients<float>&, int);
template void second<double>(const Shape&, const Past<double>&, const double*, const Tangent<double>&,
                             const Gradients<double>&, const SavedGradients<double>&, int);

}  // namespace rnnfast
