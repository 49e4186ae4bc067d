// The forward pass of a stack of layers and directions: chunk by chunk of time, x through W_ih for the whole chunk,
// then step by step h through W_hh and the cell.
#include "reserve.h"
#include "run.h"

namespace rnnfast {
namespace {

// Rows of x that go through W_ih together, so that its panels serve many rows also when the batch is small.
constexpr int64_t chunk_rows = 96;

// Up to here (a streaming step, say) the weights are read where they lie: to pack them would take longer.
constexpr int64_t direct_rows = 8;

template <class T>
class ForwardRun : Run<T> {
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::zeros,
        Run<T>::everyone, Run<T>::group_barriers;

public:
    // dot: tangents of x, h0 and c0 to take along, or nullptr. Their rows go through the same products, after those of
    // the values.
    ForwardRun(const Shape& shape, const Forward<T>& call, const Tangent<T>* dot, int threads)
        : Run<T>(shape, threads),
          call(call),
          dot(dot),
          halves(dot ? 2 : 1),
          reserve(shape, N),
          gates(s.cell == Cell::lstm ? Columns::of_gates(s.H, kernel.lanes)
                                     : Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
          projected(Columns::of_matrix(s.P, kernel.lanes, plan.splits)),
          direct(N <= direct_rows && !dot),
          chunk_steps(direct ? 1 : std::max<int64_t>(1, std::min(s.T, chunk_rows / (halves * this->group_size())))) {
        const int64_t rows_of_chunk = chunk_steps * halves * this->group_size();
        const bool inference = !call.reserve;
        for (int64_t l = 0; l < s.L; ++l)
            for (int64_t d = 0; d < s.D; ++d)
                weights.push_back({Buffer<T>(direct ? 0 : gates.packed(s.input(l))),
                                   Buffer<T>(direct ? 0 : gates.packed(R)),
                                   Buffer<T>(direct || !s.P ? 0 : projected.packed(s.H)), Buffer<T>(G * s.H)});
        if (inference && s.cell == Cell::lstm)
            for (int g = 0; g < plan.directions * plan.row_groups; ++g)
                z_chunk.push_back(Buffer<T>(rows_of_chunk * G * s.H));
        if (inference && s.P) m_step = Buffer<T>(halves * s.D * s.B * s.H);
        for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) {
            if (inference) hidden[i] = Buffer<T>(halves * N * s.D * R);
            if (call.dropout) dropped[i] = Buffer<T>(halves * N * s.D * R);
        }
        if (dot) {
            const int64_t widest = std::max({s.I, s.D * R, G * s.H});
            nothing = Buffer<T>(widest);
            std::fill_n(nothing.get(), widest, T(0));
            if (s.cell == Cell::lstm) cells = Buffer<T>(s.D * N * s.H);
        }
        for (int i = 0; i < plan.threads(); ++i) rows.push_back(Rows(rows_of_chunk, dot));
    }

    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

private:
    struct Weights {
        Buffer<T> x, h, hr;  // packed W_ih (I,G*H), W_hh (R,G*H), W_hr (H,P), each transposed
        Buffer<T> bias;      // b_ih + b_hh (G*H)
    };
    // Row pointers of one thread.
    struct Rows {
        Rows(int64_t n, bool dual) : x(n), bias(n), h_prev(n), c_prev(n), z(n), c(n), h(n), y(n), c_dot(dual ? n : 0) {}
        Buffer<const T*> x, bias, h_prev, c_prev;
        Buffer<T*> z, c, h, y, c_dot;
    };

    void work(const Share& my) {
        pack(my.thread, plan.threads());
        everyone.wait();
        for (int64_t l = 0; l < s.L; ++l) {
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep_forward(my, l, d);
            if (l + 1 < s.L && plan.exchanges(s.D)) everyone.wait();
        }
    }

    void pack(int thread, int count) {
        const Range z = Range::part(gates.panels, thread, count), r = Range::part(projected.panels, thread, count);
        const Range units = Range::part(G * s.H, thread, count);
        for (int64_t i = 0; i < s.L * s.D; ++i) {
            const Parameters<const T*>& p = call.parameters[i];
            const Weights& to = weights[i];
            const int64_t I = s.input(i / s.D);
            for (int64_t j = units.begin; j < units.end; ++j) to.bias[j] = s.bias ? p.b_ih[j] + p.b_hh[j] : T(0);
            if (direct) continue;
            kernel.pack_transposed(gates, I, p.w_ih, I, z.begin, z.end, to.x.get());
            kernel.pack_transposed(gates, R, p.w_hh, R, z.begin, z.end, to.h.get());
            if (s.P) kernel.pack_transposed(projected, s.H, p.w_hr, s.H, r.begin, r.end, to.hr.get());
        }
    }

    // Of values (half 0) and of tangents (half 1).
    const T* input(int64_t l, int half = 0) const {
        if (l == 0) return half ? dot->x : call.x;
        return call.dropout ? dropped[(l - 1) % 2].get() + half * N * s.D * R : output(l - 1, half);
    }
    T* output(int64_t l, int half = 0) const {
        if (l == s.L - 1) return half ? dot->y : call.y;
        return call.reserve ? call.reserve + reserve.hidden + l * N * s.D * R
                            : hidden[l % 2].get() + half * N * s.D * R;
    }

    void sweep_forward(const Share& my, int64_t l, int64_t d) {
        const Range panels = this->my_panels(my, gates);
        const Range units = this->columns_of(gates, panels);
        const Range outputs = s.P ? this->columns_of(projected, this->my_panels(my, projected)) : units;
        if (s.cell == Cell::lstm && !call.reserve) start_cells(my, l, d, units);
        for (int64_t step0 = 0; step0 < s.T; step0 += chunk_steps) {
            const int64_t step1 = std::min(s.T, step0 + chunk_steps);
            project_input(my, l, d, step0, step1, panels);
            int64_t first = 0;
            for (int64_t step = step0; step < step1; ++step) {
                first += s.cell == Cell::lstm ? lstm_step(my, l, d, step, first, panels)
                                              : elman_step(my, l, d, step, first, panels);
                group_barriers[my.group].wait();
            }
        }
        finish(my, l, d, units, outputs);
    }

    // z = W_ih x + b of the steps of a chunk. Leaves their z rows, step after step, in rows.z.
    void project_input(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1, const Range& panels) {
        const Direction way = this->direction(d);
        const int64_t I = s.input(l);
        const Weights& w = weights[this->sweep(l, d)];
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
        if (!direct)
            kernel.product(
                {n, I, to.x.get(), 1, gates, panels.begin, panels.end, w.x.get(), to.bias.get(), to.z.get()});
    }

    // Where the pre-activations of a row are summed up; n counts the rows of the chunk.
    T* z_row(const Share& my, int64_t l, int64_t d, int64_t row, int half, int64_t n) const {
        if (s.cell != Cell::lstm) return output(l, half) + (row * s.D + d) * R;
        if (!call.reserve) return z_chunk[my.group].get() + n * G * s.H;
        return call.reserve + reserve.gates + (this->sweep(l, d) * N + row) * G * s.H;
    }

    // h_{t-1} of the rows of step t, into to.h_prev; -> how many
    int64_t h_previous(const Share& my, const Direction& way, int64_t l, int64_t d, int64_t t, Rows& to) const {
        const Range batch = this->my_rows(my, t);
        int64_t n = 0;
        for (int half = 0; half < halves; ++half)
            for (int64_t b = batch.begin; b < batch.end; ++b) {
                const T* h0 = this->state(half ? dot->h0 : call.h0, l, d, b, R);
                to.h_prev[n++] = this->previous(way, t, b, output(l, half) + d * R, s.D * R, h0);
            }
        return n;
    }

    // The product of a step: z += W_hh h_{t-1}. Direct: all of z is ready by then, and the product empty.
    Product<T> recurrence(int64_t l, int64_t d, Rows& to, int64_t n, int64_t first, const Range& panels) const {
        const int64_t i = this->sweep(l, d);
        T** z = to.z.get() + first;
        if (direct) {
            const Parameters<const T*>& p = call.parameters[i];
            kernel.direct_product({n,
                                   {s.input(l), R},
                                   {to.x.get() + first, to.h_prev.get()},
                                   {p.w_ih, p.w_hh},
                                   gates,
                                   panels.begin,
                                   panels.end,
                                   to.bias.get(),
                                   z});
        }
        return {n, direct ? 0 : R, to.h_prev.get(), 1, gates, panels.begin, panels.end, weights[i].h.get(), z, z};
    }

    int64_t elman_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first, const Range& panels) {
        const Direction way = this->direction(d);
        Rows& to = rows[my.thread];
        const int64_t n = h_previous(my, way, l, d, way.time(step), to);
        const Product<T> product = recurrence(l, d, to, n, first, panels);
        const bool relu = s.cell == Cell::relu;
        if (dot)
            kernel.elman_step_dual({product, relu});
        else
            kernel.elman_step({product, relu});
        return n;
    }

    int64_t lstm_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first, const Range& panels) {
        const Direction way = this->direction(d);
        const int64_t t = way.time(step), i = this->sweep(l, d);
        const Range batch = this->my_rows(my, t);
        Rows& to = rows[my.thread];
        const int64_t count = h_previous(my, way, l, d, t, to);
        T* const history = cell_history(l, d);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            to.c_prev[n] = to.c[n] = call.c_n + (i * s.B + b) * s.H;
            if (history) {
                to.c_prev[n] = this->previous(way, t, b, history, s.H, this->state(call.c0, l, d, b, s.H));
                to.c[n] = history + row * s.H;
            }
            if (dot) to.c_dot[n] = dot->c_n + (i * s.B + b) * s.H;
            for (int64_t half = 0, r = n; half < halves; ++half, r += batch.end - batch.begin) {
                to.y[r] = output(l, half) + (row * s.D + d) * R;
                to.h[r] = !s.P           ? to.y[r]
                          : call.reserve ? call.reserve + reserve.m + (i * N + row) * s.H
                                         : m_step.get() + ((half * s.D + d) * s.B + b) * s.H;
            }
        }
        const LstmStep<T> values{recurrence(l, d, to, count, first, panels), to.c_prev.get(), to.c.get(), to.h.get()};
        if (dot)
            kernel.lstm_step_dual({values,
                                   {{},
                                    values.product.c,
                                    values.c,
                                    values.c_prev,
                                    to.c_dot.get(),
                                    to.c_dot.get(),
                                    values.h + n,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    nullptr}});
        else
            kernel.lstm_step(values);
        if (s.P) project_output(my, i, count);
        return count;
    }

    // y = W_hr h, of all parts of the units.
    void project_output(const Share& my, int64_t i, int64_t n) {
        group_barriers[my.group].wait();
        Rows& to = rows[my.thread];
        const Range r = this->my_panels(my, projected);
        if (direct)
            kernel.direct_product({n,
                                   {s.H, 0},
                                   {to.h.get(), nullptr},
                                   {call.parameters[i].w_hr, nullptr},
                                   projected,
                                   r.begin,
                                   r.end,
                                   nullptr,
                                   to.y.get()});
        else
            kernel.product(
                {n, s.H, to.h.get(), 1, projected, r.begin, r.end, weights[i].hr.get(), nullptr, to.y.get()});
    }

    // Inference carries the cells in c_n, and so are those of tangents.
    void start_cells(const Share& my, int64_t l, int64_t d, const Range& units) {
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            const int64_t at = (this->sweep(l, d) * s.B + b) * s.H;
            copy_columns(call.c_n + at, this->state(call.c0, l, d, b, s.H), units);
            if (dot) copy_columns(dot->c_n + at, this->state(dot->c0, l, d, b, s.H), units);
        }
    }

    // The cells of all steps of a sweep (N,H), or nullptr: not at hand.
    T* cell_history(int64_t l, int64_t d) const {
        if (call.reserve) return call.reserve + reserve.cells + this->sweep(l, d) * N * s.H;
        return dot ? cells.get() + d * N * s.H : nullptr;
    }

    // Final states, and the output of this layer scaled by dropout for the next one.
    void finish(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) {
        const Direction way = this->direction(d);
        const int64_t i = this->sweep(l, d);
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            const int64_t t = way.end(b), row = sequence.row(t) + b;
            for (int half = 0; half < halves; ++half)
                copy_columns((half ? dot->h_n : call.h_n) + (i * s.B + b) * R, output(l, half) + (row * s.D + d) * R,
                             outputs);
            if (s.cell == Cell::lstm && (call.reserve || dot))
                copy_columns(call.c_n + (i * s.B + b) * s.H, cell_history(l, d) + row * s.H, units);
        }
        if (call.dropout && l < s.L - 1)
            for (int half = 0; half < halves; ++half)
                this->drop_columns(my, dropped[l % 2].get() + half * N * s.D * R + d * R, output(l, half) + d * R,
                                   call.dropout + l * N * s.D * R + d * R, outputs);
    }

    const Forward<T>& call;
    const Tangent<T>* const dot;  // or nullptr
    const int halves;             // of the rows: values, and tangents if there are any
    const Reserve reserve;
    const Columns gates, projected;
    const bool direct;
    const int64_t chunk_steps;
    std::vector<Weights> weights;    // [L*D]
    std::vector<Buffer<T>> z_chunk;  // [groups], inference: rows (G,H) of one chunk
    Buffer<T> m_step;                // (halves,D,B,H), inference: o * tanh(c) before W_hr
    Buffer<T> hidden[2];             // (halves,N,D*R), inference: output of the layer below, by turns
    Buffer<T> dropped[2];            // (halves,N,D*R), the same after dropout
    Buffer<T> cells;                 // (D,N,H), with tangents, which need c_{t-1} beside c_t
    Buffer<T> nothing;               // zeros: tangents that are not given, and of the biases
    std::vector<Rows> rows;          // [threads]
};

}  // namespace

int64_t Shape::rows() const { return Sequence(*this).N(); }

int64_t reserve_per_row(const Shape& shape) { return Reserve(shape, 1).size; }

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
