// Back-propagation through time of a stack. Layer by layer from the top: the sweep backwards through the steps gives
// dz (N,G*H), and then everything else is one matrix product each over all N rows: dx = dz W_ih, dW = dz^T [x, h].
#include "reserve.h"
#include "run.h"

namespace rnnfast {
namespace {

// Rows that a thread takes at a time in the products after the sweep.
constexpr int64_t block_rows = 128;

template <class T>
class BackwardRun : Run<T> {
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::zeros,
        Run<T>::everyone, Run<T>::group_barriers;

public:
    BackwardRun(const Shape& shape, const Backward<T>& call, int threads)
        : Run<T>(shape, threads),
          call(call),
          reserve(shape, N),
          units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
          outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)),
          GH(G * s.H),
          dz_stride((GH + 15) / 16 * 16 + 16),  // not a multiple of 4096 bytes: rows would fall on the same cache sets
          dz(s.D * N * dz_stride) {
        const Columns x(Columns::of_matrix(s.I, kernel.lanes, 1)), hidden(Columns::of_matrix(s.D * R, kernel.lanes, 1));
        packed_x = Buffer<T>(s.D * std::max(call.dx ? x.packed(GH) : 0, s.L > 1 ? hidden.packed(GH) : 0));
        packed_h = Buffer<T>(s.D * outputs.packed(GH));
        if (s.cell == Cell::lstm) {
            dc = Buffer<T>(s.D * s.B * s.H);
            dh = Buffer<T>(s.D * s.B * s.H);
        }
        if (s.P) {
            dr = Buffer<T>(s.D * N * s.P);
            packed_hr = Buffer<T>(s.D * units.packed(s.P));
        }
        for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
        if (call.dropout) dropped = Buffer<T>(N * s.D * R);
        const int64_t widest = std::max({s.L > 1 ? std::max(s.I, s.D * R) : s.I, R, s.H});
        for (int i = 0; i < plan.threads(); ++i)
            scratch.push_back(Scratch(std::max({s.B, block_rows, GH}),
                                      Columns::of_matrix(widest, kernel.lanes, 1).packed(block_rows)));
    }

    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

private:
    // Of one thread: row pointers, and a block of rows packed for the weight gradients.
    struct Scratch {
        Scratch(int64_t n, int64_t block)
            : a(n), init(n), gates(n), c(n), c_prev(n), h(n), dh(n), dc(n), dz(n), packed(block) {}
        Buffer<const T*> a, init, gates, c, c_prev, h;
        Buffer<T*> dh, dc, dz;
        Buffer<T> packed;
    };

    void work(const Share& my) {
        for (int64_t l = s.L - 1; l >= 0; --l) {
            pack(l, my.thread);
            everyone.wait();
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep_backward(my, l, d);
            if (call.dropout && l > 0) drop(l, my.thread);
            everyone.wait();
            if (l > 0 || call.dx) input_gradient(l, my.thread);
            for (int64_t d = 0; d < s.D; ++d) weight_gradients(l, d, my.thread);
            if (l > 0) everyone.wait();
        }
    }

    void pack(int64_t l, int thread) {
        const int64_t I = s.input(l);
        const Columns x = Columns::of_matrix(I, kernel.lanes, 1);
        for (int64_t d = 0; d < s.D; ++d) {
            const Parameters<const T*>& p = call.parameters[this->sweep(l, d)];
            pack_share(outputs, GH, p.w_hh, R, thread, packed_h.get() + d * outputs.packed(GH));
            if (s.P) pack_share(units, s.P, p.w_hr, s.H, thread, packed_hr.get() + d * units.packed(s.P));
            if (l > 0 || call.dx) pack_share(x, GH, p.w_ih, I, thread, packed_x.get() + d * x.packed(GH));
        }
    }

    // This thread's part of packing w (K,columns).
    void pack_share(const Columns& columns, int64_t K, const T* w, int64_t stride, int thread, T* packed) {
        const Range panels = Range::part(columns.panels, thread, plan.threads());
        Scratch& my = scratch[thread];
        for (int64_t k = 0; k < K; ++k) my.a[k] = w + k * stride;
        kernel.pack_rows(columns, K, my.a.get(), panels.begin, panels.end, packed);
    }

    const T* kept(int64_t section, int64_t l, int64_t d, int64_t width) const {
        return call.reserve + section + this->sweep(l, d) * N * width;
    }
    const T* output(int64_t l) const {  // (N,D*R)
        return l == s.L - 1 ? call.y : call.reserve + reserve.hidden + l * N * s.D * R;
    }
    const T* input(int64_t l) const {  // (N,I of the layer)
        return l == 0 ? call.x : call.dropout ? dropped.get() : output(l - 1);
    }
    const T* output_gradient(int64_t l) const {  // (N,D*R) or nullptr
        return l == s.L - 1 ? call.dy : d_hidden[l % 2].get();
    }
    T* dz_row(int64_t d, int64_t row) const { return dz.get() + (d * N + row) * dz_stride; }
    T* dr_row(int64_t d, int64_t row) const { return dr.get() + (d * N + row) * s.P; }

    void sweep_backward(const Share& my, int64_t l, int64_t d) {
        const Direction way = this->direction(d);
        const Range panels = this->my_panels(my, units);
        const Range columns = this->columns_of(units, panels);
        if (s.cell == Cell::lstm)
            for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
                copy_columns(dc.get() + (d * s.B + b) * s.H, this->state(call.dc_n, l, d, b, s.H), columns);
        for (int64_t step = s.T - 1; step >= 0; --step) {
            const int64_t t = way.time(step);
            const Range batch = this->my_rows(my, t);
            // Sequences that run at the next step, too, get dz from there; the others end here.
            const int64_t ended = std::max(batch.begin, std::min(batch.end, sequence.size(t + way.stride())));
            backward_step(my, l, d, t, {batch.begin, ended}, true);
            if (ended < batch.end) backward_step(my, l, d, t, {ended, batch.end}, false);
            if (s.P) {
                group_barriers[my.group].wait();
                lstm_step(my, l, d, t, batch, unproject(my, d, t, batch));
            }
            group_barriers[my.group].wait();
        }
        initial_state_gradient(my, l, d, columns);
    }

    // dL/dh_t of the sequences in `batch`: from y_t and, carried on, from z_{t+1} (or h_n); then through the cell.
    void backward_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, bool carried) {
        if (batch.begin >= batch.end) return;
        const Direction way = this->direction(d);
        Scratch& at = scratch[my.thread];
        const T* dy = output_gradient(l);
        const Range panels = this->my_panels(my, outputs);
        const Range columns = this->columns_of(outputs, panels);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.dh[n] = s.P ? dr_row(d, row) : s.cell == Cell::lstm ? dh.get() + (d * s.B + b) * s.H : dz_row(d, row);
            at.init[n] = dy ? dy + (row * s.D + d) * R : nullptr;
            if (carried) {
                at.a[n] = dz_row(d, sequence.row(t + way.stride()) + b);
            } else {
                const T* dh_n = this->state(call.dh_n, l, d, b, R);
                for (int64_t j = columns.begin; j < columns.end; ++j)
                    at.dh[n][j] = dh_n[j] + (dy ? at.init[n][j] : T(0));
                at.init[n] = at.dh[n];
            }
        }
        const Product<T> product{n,
                                 carried ? GH : 0,
                                 at.a.get(),
                                 1,
                                 outputs,
                                 panels.begin,
                                 panels.end,
                                 packed_h.get() + d * outputs.packed(GH),
                                 dy || !carried ? at.init.get() : nullptr,
                                 at.dh.get()};
        if (s.P)
            kernel.product(product);
        else if (s.cell == Cell::lstm)
            lstm_step(my, l, d, t, batch, product);
        else
            elman_step(my, l, d, t, batch, product);
    }

    // dL/d(o * tanh(c)) = dL/dh W_hr
    Product<T> unproject(const Share& my, int64_t d, int64_t t, const Range& batch) {
        Scratch& at = scratch[my.thread];
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            at.a[n] = dr_row(d, sequence.row(t) + b);
            at.dh[n] = dh.get() + (d * s.B + b) * s.H;
        }
        const Range panels = this->my_panels(my, units);
        return {n,       s.P,          at.a.get(), 1,
                units,   panels.begin, panels.end, packed_hr.get() + d * units.packed(s.P),
                nullptr, at.dh.get()};
    }

    void lstm_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product) {
        const Direction way = this->direction(d);
        Scratch& at = scratch[my.thread];
        const T* gates = kept(reserve.gates, l, d, GH);
        const T* cells = kept(reserve.cells, l, d, s.H);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.gates[n] = gates + row * GH;
            at.c[n] = cells + row * s.H;
            at.c_prev[n] = this->previous(way, t, b, cells, s.H, this->state(call.c0, l, d, b, s.H));
            at.dc[n] = dc.get() + (d * s.B + b) * s.H;
            at.dz[n] = dz_row(d, row);
        }
        kernel.lstm_step_backward({product, at.gates.get(), at.c.get(), at.c_prev.get(), at.dc.get(), at.dz.get()});
    }

    void elman_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product) {
        Scratch& at = scratch[my.thread];
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n)
            at.h[n] = output(l) + ((sequence.row(t) + b) * s.D + d) * R;
        kernel.elman_step_backward({product, at.h.get(), s.cell == Cell::relu});
    }

    // After the sweep, dc holds dL/dc_0; dL/dh_0 = dz W_hh of each sequence's first step.
    void initial_state_gradient(const Share& my, int64_t l, int64_t d, const Range& columns) {
        const Direction way = this->direction(d);
        const int64_t i = this->sweep(l, d);
        Scratch& at = scratch[my.thread];
        if (call.dc0)
            for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
                copy_columns(call.dc0 + (i * s.B + b) * s.H, dc.get() + (d * s.B + b) * s.H, columns);
        if (!call.dh0) return;
        int64_t n = 0;
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b, ++n) {
            at.a[n] = dz_row(d, sequence.row(way.start(b)) + b);
            at.dh[n] = call.dh0 + (i * s.B + b) * R;
        }
        const Range panels = this->my_panels(my, outputs);
        kernel.product({n, GH, at.a.get(), 1, outputs, panels.begin, panels.end,
                        packed_h.get() + d * outputs.packed(GH), nullptr, at.dh.get()});
    }

    // The input of layer l as dropout left it, which the forward pass did not keep.
    void drop(int64_t l, int thread) {
        const int64_t width = s.D * R;
        const Range all = Range::part(N * width, thread, plan.threads());
        multiply_columns(dropped.get(), output(l - 1), call.dropout + (l - 1) * N * width, all);
    }

    // dx = sum over directions of dz W_ih, and through the dropout below.
    void input_gradient(int64_t l, int thread) {
        const int64_t I = s.input(l);
        const Columns x = Columns::of_matrix(I, kernel.lanes, 1);
        T* dx = l ? d_hidden[(l - 1) % 2].get() : call.dx;
        Scratch& at = scratch[thread];
        const Range mine = Range::part(N, thread, plan.threads());
        for (int64_t row0 = mine.begin; row0 < mine.end; row0 += block_rows) {
            const int64_t n = std::min(block_rows, mine.end - row0);
            for (int64_t r = 0; r < n; ++r) at.dh[r] = dx + (row0 + r) * I;
            for (int64_t d = 0; d < s.D; ++d) {
                for (int64_t r = 0; r < n; ++r) at.a[r] = dz_row(d, row0 + r);
                kernel.product({n, GH, at.a.get(), 1, x, 0, x.panels, packed_x.get() + d * x.packed(GH),
                                d ? at.dh.get() : nullptr, at.dh.get()});
            }
            if (l && call.dropout) multiply_columns(dx, dx, call.dropout + (l - 1) * N * I, {row0 * I, (row0 + n) * I});
        }
    }

    // Each thread takes some rows of every gradient; the order of the sums does not depend on the threads.
    void weight_gradients(int64_t l, int64_t d, int thread) {
        const Parameters<T*>& to = call.gradients[this->sweep(l, d)];
        const int64_t I = s.input(l);
        const Range mine = Range::part(GH, thread, plan.threads());
        const Direction way = this->direction(d);
        Scratch& at = scratch[thread];
        for (T* bias : {to.b_ih, to.b_hh})
            if (bias) std::fill(bias + mine.begin, bias + mine.end, T(0));
        if (N == 0) return clear(to, l, thread);
        int64_t t = 0;  // of the row at hand
        for (int64_t row0 = 0; row0 < N; row0 += block_rows) {
            const int64_t n = std::min(block_rows, N - row0);
            if (to.w_ih) {
                for (int64_t r = 0; r < n; ++r) at.h[r] = input(l) + (row0 + r) * I;
                add_outer(at, mine, n, dz_row(d, row0), dz_stride, I, row0 == 0, to.w_ih);
            }
            if (to.w_hh) {
                for (int64_t r = 0; r < n; ++r) {
                    while (row0 + r >= sequence.row(t + 1)) ++t;
                    const int64_t b = row0 + r - sequence.row(t);
                    at.h[r] = this->previous(way, t, b, output(l) + d * R, s.D * R, this->state(call.h0, l, d, b, R));
                }
                add_outer(at, mine, n, dz_row(d, row0), dz_stride, R, row0 == 0, to.w_hh);
            }
            if (to.w_hr) {
                const T* m = kept(reserve.m, l, d, s.H);
                for (int64_t r = 0; r < n; ++r) at.h[r] = m + (row0 + r) * s.H;
                add_outer(at, Range::part(s.P, thread, plan.threads()), n, dr_row(d, row0), s.P, s.H, row0 == 0,
                          to.w_hr);
            }
            for (T* bias : {to.b_ih, to.b_hh})
                if (bias)
                    kernel.add_rows(n, dz_row(d, row0) + mine.begin, dz_stride, mine.end - mine.begin,
                                    bias + mine.begin);
        }
    }

    // w[j] (+)= sum_r left[r][j] * at.h[r] for j in `rows`: the outer products of a block of n rows.
    void add_outer(Scratch& at, const Range& rows, int64_t n, const T* left, int64_t stride, int64_t width, bool first,
                   T* w) {
        const Columns columns = Columns::of_matrix(width, kernel.lanes, 1);
        kernel.pack_rows(columns, n, at.h.get(), 0, columns.panels, at.packed.get());
        const int64_t count = rows.end - rows.begin;
        for (int64_t j = 0; j < count; ++j) {
            at.a[j] = left + rows.begin + j;
            at.dh[j] = w + (rows.begin + j) * width;
        }
        kernel.product({count, n, at.a.get(), stride, columns, 0, columns.panels, at.packed.get(),
                        first ? nullptr : at.dh.get(), at.dh.get()});
    }

    // No rows, so no sums: zeros.
    void clear(const Parameters<T*>& to, int64_t l, int thread) {
        if (thread) return;
        if (to.w_ih) std::fill_n(to.w_ih, GH * s.input(l), T(0));
        if (to.w_hh) std::fill_n(to.w_hh, GH * R, T(0));
        if (to.w_hr) std::fill_n(to.w_hr, s.P * s.H, T(0));
    }

    const Backward<T>& call;
    const Reserve reserve;
    const Columns units, outputs;  // of W_hr or the cell (H); of h (R)
    const int64_t GH, dz_stride;
    Buffer<T> dz;                             // (D,N,G*H), rows dz_stride apart
    Buffer<T> dr;                             // (D,N,P), projected: dL/dh
    Buffer<T> dh, dc;                         // (D,B,H), of the step at hand
    Buffer<T> packed_x, packed_h, packed_hr;  // (D, ...) W_ih (G*H,I), W_hh (G*H,R), W_hr (P,H) of the layer at hand
    Buffer<T> d_hidden[2];                    // (N,D*R), dL/d output of the lower layers, by turns
    Buffer<T> dropped;                        // (N,D*R), input of the layer at hand after dropout
    std::vector<Scratch> scratch;             // [threads]
};

}  // namespace

template <class T>
void backward(const Shape& shape, const Backward<T>& call, int threads) {
    if (!BackwardRun<T>(shape, call, threads).run()) BackwardRun<T>(shape, call, 1).run();
}

template void backward<float>(const Shape&, const Backward<float>&, int);
template void backward<double>(const Shape&, const Backward<double>&, int);

}  // namespace rnnfast
