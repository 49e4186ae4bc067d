// Forward mode: the tangents of a finished forward pass along a direction, and the second derivative, which goes the
// same way. z_dot = W_ih x_dot + W_hh h_dot_{t-1} + W_ih_dot x + W_hh_dot h_{t-1} + b_dot; only the term with h_dot
// waits for the step before, so the rest is summed up chunk by chunk, as the forward pass does with W_ih x.
#include "backward.h"
#include "reserve.h"
#include "run.h"

namespace rnnfast {
namespace {

constexpr int64_t chunk_rows = 96;  // as in the forward pass

template <class T>
class TangentRun : Run<T> {
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::zeros,
        Run<T>::everyone, Run<T>::group_barriers;

public:
    // What a second derivative takes from a backward pass, and what it makes of it.
    struct Second {
        const T* swept;
        T* c0;  // (L*D,B,H), nullptr: not wanted
        Bend<T> bend;
    };

    // kept: Reserve::of_tangents(...).size numbers, out.
    TangentRun(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, T* kept, const Second* second,
               int threads)
        : Run<T>(shape, threads),
          past(past),
          dot(dot),
          kept(kept),
          second(second),
          swept(s),
          reserve(s, N),
          at(Reserve::of_tangents(s, N)),
          trace(past, reserve),
          gates(s.cell == Cell::lstm ? Columns::of_gates(s.H, kernel.lanes)
                                     : Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
          projected(Columns::of_matrix(s.P, kernel.lanes, plan.splits)),
          chunk_steps(std::max<int64_t>(1, std::min(s.T, chunk_rows / this->group_size()))) {
        for (int64_t i = 0; i < s.L * s.D; ++i)
            for (const auto* parameters : {&past.parameters, &dot.parameters}) {
                const Parameters<const T*>& p = (*parameters)[i];
                weights.push_back({Buffer<T>(p.w_ih ? gates.packed(s.input(i / s.D)) : 0),
                                   Buffer<T>(p.w_hh ? gates.packed(R) : 0),
                                   Buffer<T>(p.w_hr ? projected.packed(s.H) : 0), Buffer<T>(G * s.H)});
            }
        if (past.dropout) {
            dropped = Buffer<T>((s.L - 1) * N * s.D * R);
            for (Buffer<T>& buffer : dropped_dot) buffer = Buffer<T>(N * s.D * R);
        }
        if (second && !second->c0 && s.cell == Cell::lstm) no_c0 = Buffer<T>(s.L * s.D * s.B * s.H);
        const int64_t rows_of_chunk = chunk_steps * this->group_size();
        for (int i = 0; i < plan.threads(); ++i) {
            rows.push_back(Rows(rows_of_chunk));
            if (!dot.z && s.cell == Cell::lstm) z_dot_chunk.push_back(Buffer<T>(rows_of_chunk * G * s.H));
        }
    }

    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

private:
    struct Weights {
        Buffer<T> x, h, hr;  // packed W_ih (I,G*H), W_hh (R,G*H), W_hr (H,P), each transposed; empty: zeros
        Buffer<T> bias;      // b_ih + b_hh (G*H)
    };
    struct Rows {
        explicit Rows(int64_t n)
            : a(n),
              bias(n),
              gates(n),
              h(n),
              c(n),
              c_prev(n),
              c_dot_prev(n),
              m(n),
              dc(n),
              dm(n),
              z_dot(n),
              c_dot(n),
              m_dot(n),
              y_dot(n),
              z_bend(n),
              c_bend(n),
              c_bend_prev(n),
              h_bend(n) {}
        Buffer<const T*> a, bias, gates, h, c, c_prev, c_dot_prev, m, dc, dm;
        Buffer<T*> z_dot, c_dot, m_dot, y_dot, z_bend, c_bend, c_bend_prev, h_bend;
    };

    const Weights& plain(int64_t l, int64_t d) const { return weights[2 * this->sweep(l, d)]; }
    const Weights& moved(int64_t l, int64_t d) const { return weights[2 * this->sweep(l, d) + 1]; }

    void work(const Share& my) {
        pack(my.thread);
        if (past.dropout) drop(my.thread);
        everyone.wait();
        for (int64_t l = 0; l < s.L; ++l) {
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep_tangent(my, l, d);
            if (l + 1 < s.L && plan.exchanges(s.D)) everyone.wait();
        }
    }

    void pack(int thread) {
        const int count = plan.threads();
        const Range z = Range::part(gates.panels, thread, count), r = Range::part(projected.panels, thread, count);
        const Range units = Range::part(G * s.H, thread, count);
        for (int64_t i = 0; i < 2 * s.L * s.D; ++i) {
            const Parameters<const T*>& p = (i % 2 ? dot.parameters : past.parameters)[i / 2];
            const Weights& to = weights[i];
            const int64_t I = s.input(i / 2 / s.D);
            if (p.w_ih) kernel.pack_transposed(gates, I, p.w_ih, I, z.begin, z.end, to.x.get());
            if (p.w_hh) kernel.pack_transposed(gates, R, p.w_hh, R, z.begin, z.end, to.h.get());
            if (p.w_hr) kernel.pack_transposed(projected, s.H, p.w_hr, s.H, r.begin, r.end, to.hr.get());
            for (int64_t j = units.begin; j < units.end; ++j)
                to.bias[j] = (p.b_ih ? p.b_ih[j] : T(0)) + (p.b_hh ? p.b_hh[j] : T(0));
        }
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
    T* output_dot(int64_t l) const { return l == s.L - 1 ? dot.y : kept + at.hidden + l * N * s.D * R; }
    const T* input_dot(int64_t l) const {
        if (l == 0) return dot.x;
        return past.dropout ? dropped_dot[(l - 1) % 2].get() : output_dot(l - 1);
    }

    void sweep_tangent(const Share& my, int64_t l, int64_t d) {
        const Range panels = this->my_panels(my, gates);
        const Range units = this->columns_of(gates, panels);
        const Range outputs = s.P ? this->columns_of(projected, this->my_panels(my, projected)) : units;
        if (second && s.cell == Cell::lstm)
            for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
                copy_columns(c0_bend() + (this->sweep(l, d) * s.B + b) * s.H, zeros.get(), units);
        for (int64_t step0 = 0; step0 < s.T; step0 += chunk_steps) {
            const int64_t step1 = std::min(s.T, step0 + chunk_steps);
            known_terms(my, l, d, step0, step1, panels);
            int64_t first = 0;
            for (int64_t step = step0; step < step1; ++step) {
                first += tangent_step(my, l, d, step, first, panels);
                group_barriers[my.group].wait();
            }
        }
        finish(my, l, d, units, outputs);
    }

    // z_dot of the steps of a chunk without the term of h_dot; their rows stay in rows.z_dot, step after step.
    void known_terms(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1, const Range& panels) {
        const Direction way = this->direction(d);
        const int64_t I = s.input(l);
        Rows& to = rows[my.thread];
        int64_t n = 0;
        this->for_rows(my, way, step0, step1, [&](int64_t t, int64_t b) {
            to.bias[n] = moved(l, d).bias.get();
            to.z_dot[n] = z_dot_row(my, l, d, sequence.row(t) + b, n);
            ++n;
        });
        const T* const* init = to.bias.get();
        // Adds W of the rows that row_of(t, b) gives; K = 0: none, for what is in init already.
        const auto add = [&](const Buffer<T>& w, int64_t K, const auto& row_of) {
            int64_t i = 0;
            this->for_rows(my, way, step0, step1, [&](int64_t t, int64_t b) { to.a[i++] = row_of(t, b); });
            kernel.product({n, K, to.a.get(), 1, gates, panels.begin, panels.end, w.get(), init, to.z_dot.get()});
            init = to.z_dot.get();
        };
        const auto x_row = [&](int64_t t, int64_t b) { return input(l) + (sequence.row(t) + b) * I; };
        const auto x_dot_row = [&](int64_t t, int64_t b) { return input_dot(l) + (sequence.row(t) + b) * I; };
        const auto h_row = [&](int64_t t, int64_t b) {
            const T* h0 = this->state(past.h0, l, d, b, R);
            return this->previous(way, t, b, trace.output(s, N, l) + d * R, s.D * R, h0);
        };
        const Weights& dot_of = moved(l, d);
        if (dot_of.x || !input_dot(l)) add(dot_of.x, dot_of.x ? I : 0, x_row);
        if (dot_of.h) add(dot_of.h, R, h_row);
        if (input_dot(l)) add(plain(l, d).x, I, x_dot_row);
    }

    // Where z_dot of a row is summed up; n counts the rows of the chunk.
    T* z_dot_row(const Share& my, int64_t l, int64_t d, int64_t row, int64_t n) const {
        if (dot.z) return dot.z + (this->sweep(l, d) * N + row) * G * s.H;
        if (s.cell != Cell::lstm) return output_dot(l) + (row * s.D + d) * R;  // there it becomes h_dot
        return z_dot_chunk[my.thread].get() + n * G * s.H;
    }

    int64_t tangent_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first, const Range& panels) {
        const Direction way = this->direction(d);
        const int64_t t = way.time(step), start = this->sweep(l, d) * N;
        const Range batch = this->my_rows(my, t);
        Rows& to = rows[my.thread];
        const bool lstm = s.cell == Cell::lstm;
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b, out = (row * s.D + d) * R;
            const T* h0_dot = this->state(dot.h0, l, d, b, R);
            to.a[n] = this->previous(way, t, b, output_dot(l) + d * R, s.D * R, h0_dot);
            to.h[n] = trace.output(s, N, l) + out;
            to.y_dot[n] = to.m_dot[n] = output_dot(l) + out;
            if (second) bend_row(to, n, way, l, d, t, b);
            if (!lstm) continue;
            const T *cells = trace.cells + start * s.H, *cells_dot = kept + at.cells + start * s.H;
            to.gates[n] = trace.gates + (start + row) * G * s.H;
            to.c[n] = cells + row * s.H;
            to.c_prev[n] = this->previous(way, t, b, cells, s.H, this->state(past.c0, l, d, b, s.H));
            to.c_dot_prev[n] = this->previous(way, t, b, cells_dot, s.H, this->state(dot.c0, l, d, b, s.H));
            to.c_dot[n] = kept + at.cells + (start + row) * s.H;
            if (s.P) to.m_dot[n] = kept + at.m + (start + row) * s.H;
            if (s.P) to.m[n] = trace.m + (start + row) * s.H;
        }
        T** z_dot = to.z_dot.get() + first;
        const Product<T> product{n,     R,    to.a.get(), 1, gates, panels.begin, panels.end, plain(l, d).h.get(),
                                 z_dot, z_dot};
        if (lstm)
            kernel.lstm_step_tangent({product, to.gates.get(), to.c.get(), to.c_prev.get(), to.c_dot_prev.get(),
                                      to.c_dot.get(), to.m_dot.get(), to.dc.get(), to.dm.get(),
                                      second ? to.z_bend.get() : nullptr, to.c_bend.get(), to.c_bend_prev.get()});
        else
            kernel.elman_step_tangent({product, to.h.get(), to.m_dot.get(), s.cell == Cell::relu, to.dm.get(),
                                       second ? to.h_bend.get() : nullptr});
        if (s.P) project(my, l, d, n);
        return n;
    }

    // Where row n of a step, at (t, b), finds its gradients, and where what comes of them goes.
    void bend_row(Rows& to, int64_t n, const Direction& way, int64_t l, int64_t d, int64_t t, int64_t b) {
        const int64_t i = this->sweep(l, d), row = sequence.row(t) + b, before = t - way.stride();
        to.dm[n] = second->swept + swept.dm + (i * N + row) * s.H;
        to.h_bend[n] = output_bend(l) + (row * s.D + d) * R;
        if (s.cell != Cell::lstm) return;
        T* cells = second->bend.kept + reserve.cells + i * N * s.H;
        to.dc[n] = second->swept + swept.dc + (i * N + row) * s.H;
        to.z_bend[n] = second->bend.kept + reserve.gates + (i * N + row) * G * s.H;
        to.c_bend[n] = cells + row * s.H;
        to.c_bend_prev[n] =
            b < sequence.size(before) ? cells + (sequence.row(before) + b) * s.H : c0_bend() + (i * s.B + b) * s.H;
    }
    T* c0_bend() const { return second->c0 ? second->c0 : no_c0.get(); }
    T* output_bend(int64_t l) const {
        return l == s.L - 1 ? second->bend.y : second->bend.kept + reserve.hidden + l * N * s.D * R;
    }

    // h_dot = W_hr m_dot + W_hr_dot m
    void project(const Share& my, int64_t l, int64_t d, int64_t n) {
        group_barriers[my.group].wait();
        const Range r = this->my_panels(my, projected);
        Rows& to = rows[my.thread];
        kernel.product(
            {n, s.H, to.m_dot.get(), 1, projected, r.begin, r.end, plain(l, d).hr.get(), nullptr, to.y_dot.get()});
        if (moved(l, d).hr)
            kernel.product({n, s.H, to.m.get(), 1, projected, r.begin, r.end, moved(l, d).hr.get(), to.y_dot.get(),
                            to.y_dot.get()});
    }

    void finish(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) {
        const Direction way = this->direction(d);
        const int64_t i = this->sweep(l, d);
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            const int64_t row = sequence.row(way.end(b)) + b;
            copy_columns(dot.h_n + (i * s.B + b) * R, output_dot(l) + (row * s.D + d) * R, outputs);
            if (s.cell == Cell::lstm)
                copy_columns(dot.c_n + (i * s.B + b) * s.H, kept + at.cells + (i * N + row) * s.H, units);
        }
        if (past.dropout && l < s.L - 1)
            this->drop_columns(my, dropped_dot[l % 2].get() + d * R, output_dot(l) + d * R,
                               past.dropout + l * N * s.D * R + d * R, outputs);
    }

    const Past<T>& past;
    const Tangent<T>& dot;
    T* const kept;
    const Second* const second;  // or nullptr
    const Swept swept;
    const Reserve reserve, at;  // of the forward pass; of the tangents
    const Trace<T> trace;
    const Columns gates, projected;
    const int64_t chunk_steps;
    std::vector<Weights> weights;        // [L*D*2], of the parameters and of their tangents by turns
    Buffer<T> no_c0;                     // (L*D,B,H), for a bend of c0 that is not wanted
    Buffer<T> dropped;                   // (L-1,N,D*R), inputs of the upper layers after dropout
    Buffer<T> dropped_dot[2];            // (N,D*R), input tangents of the layer at hand and the next
    std::vector<Rows> rows;              // [threads]
    std::vector<Buffer<T>> z_dot_chunk;  // [threads] (rows of a chunk,G,H), LSTM only
};

}  // namespace

template <class T>
void tangent(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, int threads) {
    const Buffer<T> kept(Reserve::of_tangents(shape, shape.rows()).size);
    run_with(threads, [&](int n) { return std::make_unique<TangentRun<T>>(shape, past, dot, kept.get(), nullptr, n); });
}

template <class T>
void second(const Shape& shape, const Past<T>& past, const T* swept, const Tangent<T>& dot, const Adjoint<T>& direct,
            const Bend<T>& bend, int threads) {
    const Reserve at = Reserve::of_tangents(shape, shape.rows());
    const Buffer<T> kept(at.size);
    const typename TangentRun<T>::Second along{swept, direct.c0, bend};
    run_with(threads, [&](int n) { return std::make_unique<TangentRun<T>>(shape, past, dot, kept.get(), &along, n); });
    const Trace<T> trace(dot, kept.get(), at);
    run_with(threads, [&](int n) {
        return std::make_unique<BackwardRun<T>>(shape, past, swept, trace, dot.parameters, direct, bend, n);
    });
}

template void tangent<float>(const Shape&, const Past<float>&, const Tangent<float>&, int);
template void tangent<double>(const Shape&, const Past<double>&, const Tangent<double>&, int);
template void second<float>(const Shape&, const Past<float>&, const float*, const Tangent<float>&,
                            const Adjoint<float>&, const Bend<float>&, int);
template void second<double>(const Shape&, const Past<double>&, const double*, const Tangent<double>&,
                             const Adjoint<double>&, const Bend<double>&, int);

}  // namespace rnnfast
