#include "backward.h"

namespace rnnfast {
namespace {

// Rows that a thread takes at a time in the products after the sweep.
constexpr int64_t block_rows = 128;

}  // namespace

template <class T>
BackwardRun<T>::BackwardRun(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, bool keep,
                            const Linear* linear, int threads)
    : Run<T>(shape, threads),
      past(past),
      adjoint(adjoint),
      keep(keep),
      linear(linear),
      units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
      outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)),
      GH(G * s.H),
      dz_stride((GH + 15) / 16 * 16 + 16),  // not a multiple of 4096 bytes: rows would fall on the same cache sets
      dz((keep ? s.L : 1) * s.D * N * dz_stride) {
    const Columns x(Columns::of_matrix(s.I, kernel.lanes, 1)), hidden(Columns::of_matrix(s.D * R, kernel.lanes, 1));
    const auto add_term = [&](const Trace<T>& trace, const std::vector<Parameters<const T*>>& parameters,
                              const BackwardRun& from) {
        terms.push_back({trace, parameters, from,
                         Buffer<T>(s.D * std::max(adjoint.x ? x.packed(GH) : 0, s.L > 1 ? hidden.packed(GH) : 0)),
                         Buffer<T>(s.D * outputs.packed(GH)), Buffer<T>(s.P ? s.D * units.packed(s.P) : 0),
                         Buffer<T>(past.dropout ? N * s.D * R : 0)});
    };
    add_term(Trace<T>(past, Reserve(s, N)), past.parameters, *this);
    if (linear) {
        add_term(linear->dot, linear->parameters, linear->first);
        bent = Buffer<T>(N * s.D * R);
        no_dz = Buffer<T>(GH);
        std::fill_n(no_dz.get(), GH, T(0));
    }
    if (s.cell == Cell::lstm) {
        dc = Buffer<T>(s.D * s.B * s.H);
        dh = Buffer<T>(s.D * (keep ? s.L * N : s.B) * s.H);
        if (keep) dc_all = Buffer<T>(s.D * s.L * N * s.H);
    }
    if (s.P) dr = Buffer<T>((keep ? s.L : 1) * s.D * N * s.P);
    for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
    const int64_t widest = std::max({s.L > 1 ? std::max(s.I, s.D * R) : s.I, R, s.H});
    for (int i = 0; i < plan.threads(); ++i)
        scratch.push_back(Scratch(std::max({s.B, block_rows, GH}), adjoint.groups > 1 ? block_rows * GH : 0,
                                  Columns::of_matrix(widest, kernel.lanes, 1).packed(block_rows)));
}

template <class T>
void BackwardRun<T>::work(const Share& my) {
    for (int64_t l = s.L - 1; l >= 0; --l) {
        pack(l, my.thread);
        everyone.wait();
        if (linear) {
            bend_output_gradient(l, my.thread);
            everyone.wait();
        }
        for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep_backward(my, l, d);
        if (past.dropout && l > 0) drop(l, my.thread);
        everyone.wait();
        if (wants_input(l)) input_gradient(l, my.thread);
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t group = 0; group < adjoint.groups; ++group) weight_gradients(l, d, group, my.thread);
        hand_out(l, my.thread);
        if (l > 0) everyone.wait();
    }
}

// What the sweep has left behind, to those who asked for it.
template <class T>
void BackwardRun<T>::hand_out(int64_t l, int thread) {
    const Range mine = Range::part(N, thread, plan.threads());
    for (int64_t d = 0; d < s.D; ++d)
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const int64_t at = this->sweep(l, d) * N + row;
            if (adjoint.z_all) std::copy_n(dz_row(l, d, row), GH, adjoint.z_all + at * GH);
            if (adjoint.cells_all) std::copy_n(dc_all_row(l, d, row), s.H, adjoint.cells_all + at * s.H);
        }
}

template <class T>
void BackwardRun<T>::pack(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns x = Columns::of_matrix(I, kernel.lanes, 1);
    for (Term& term : terms)
        for (int64_t d = 0; d < s.D; ++d) {
            const Parameters<const T*>& p = term.parameters[this->sweep(l, d)];
            if (p.w_hh) pack_share(outputs, GH, p.w_hh, R, thread, term.h.get() + d * outputs.packed(GH));
            if (p.w_hr) pack_share(units, s.P, p.w_hr, s.H, thread, term.hr.get() + d * units.packed(s.P));
            if (p.w_ih && wants_input(l)) pack_share(x, GH, p.w_ih, I, thread, term.x.get() + d * x.packed(GH));
        }
}

// This thread's part of packing w (K,columns).
template <class T>
void BackwardRun<T>::pack_share(const Columns& columns, int64_t K, const T* w, int64_t stride, int thread, T* packed) {
    const Range panels = Range::part(columns.panels, thread, plan.threads());
    Scratch& my = scratch[thread];
    for (int64_t k = 0; k < K; ++k) my.a[k] = w + k * stride;
    kernel.pack_rows(columns, K, my.a.get(), panels.begin, panels.end, packed);
}

// Second order: h_t also enters z_dot_{t+1} by W_hh_dot, so dL/dh_t gets dz_first_{t+1} W_hh_dot.
template <class T>
void BackwardRun<T>::bend_output_gradient(int64_t l, int thread) {
    const T* dy = output_gradient(l);
    const Term& term = terms[1];
    Scratch& at = scratch[thread];
    for (int64_t d = 0; d < s.D; ++d) {
        const Direction way = this->direction(d);
        const bool moved = term.parameters[this->sweep(l, d)].w_hh;
        for (int64_t t = 0; t < s.T; ++t) {
            const Range batch = Range::part(sequence.size(t), thread, plan.threads());
            const int64_t after = t + way.stride();
            int64_t n = 0;
            for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
                const int64_t at_row = (sequence.row(t) + b) * s.D * R + d * R;
                at.a[n] = b < sequence.size(after) ? term.from.dz_row(l, d, sequence.row(after) + b) : no_dz.get();
                at.init[n] = dy ? dy + at_row : nullptr;
                at.dh[n] = bent.get() + at_row;
            }
            kernel.product({n, moved ? GH : 0, at.a.get(), 1, outputs, 0, outputs.panels,
                            term.h.get() + d * outputs.packed(GH), dy ? at.init.get() : nullptr, at.dh.get()});
        }
    }
}

template <class T>
void BackwardRun<T>::sweep_backward(const Share& my, int64_t l, int64_t d) {
    const Direction way = this->direction(d);
    const Range columns = this->columns_of(units, this->my_panels(my, units));
    if (s.cell == Cell::lstm)
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
            copy_columns(dc.get() + (d * s.B + b) * s.H, this->state(adjoint.c_n, l, d, b, s.H), columns);
    for (int64_t step = s.T - 1; step >= 0; --step) {
        const int64_t t = way.time(step);
        const Range batch = this->my_rows(my, t);
        // Sequences that run at the next step, too, get dz from there; the others end here.
        const int64_t ended = std::max(batch.begin, std::min(batch.end, sequence.size(t + way.stride())));
        backward_step(my, l, d, t, {batch.begin, ended}, true);
        backward_step(my, l, d, t, {ended, batch.end}, false);
        if (s.P) {
            group_barriers[my.group].wait();
            lstm_step(my, l, d, t, batch, unproject(my, l, d, t, batch));
        }
        if (adjoint.z) add_to_dz(my, l, d, t);
        group_barriers[my.group].wait();
    }
    initial_state_gradient(my, l, d, columns);
}

// dL/dh_t of the sequences in `batch`: from y_t and, carried on, from z_{t+1} (or h_n); then through the cell.
template <class T>
void BackwardRun<T>::backward_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, bool carried) {
    if (batch.begin >= batch.end) return;
    const Direction way = this->direction(d);
    Scratch& at = scratch[my.thread];
    const T* dy = linear ? bent.get() : output_gradient(l);
    const Range panels = this->my_panels(my, outputs);
    const Range columns = this->columns_of(outputs, panels);
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.dh[n] = s.P ? dr_row(l, d, row) : s.cell == Cell::lstm ? dh_row(l, d, row, b) : dz_row(l, d, row);
        at.init[n] = dy ? dy + (row * s.D + d) * R : nullptr;
        if (carried) {
            at.a[n] = dz_row(l, d, sequence.row(t + way.stride()) + b);
        } else {
            const T* dh_n = this->state(adjoint.h_n, l, d, b, R);
            for (int64_t j = columns.begin; j < columns.end; ++j) at.dh[n][j] = dh_n[j] + (dy ? at.init[n][j] : T(0));
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
                             terms[0].h.get() + d * outputs.packed(GH),
                             dy || !carried ? at.init.get() : nullptr,
                             at.dh.get()};
    if (s.P)
        kernel.product(product);
    else if (s.cell == Cell::lstm)
        lstm_step(my, l, d, t, batch, product);
    else
        elman_step(my, l, d, t, batch, product);
}

// dL/d(o * tanh(c)) = dL/dh W_hr, and of second order dh_first W_hr_dot.
template <class T>
Product<T> BackwardRun<T>::unproject(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch) {
    Scratch& at = scratch[my.thread];
    const Range panels = this->my_panels(my, units);
    const bool moved = linear && linear->parameters[this->sweep(l, d)].w_hr;
    Product<T> product{};
    for (size_t i = moved ? 2 : 1; i-- > 0;) {  // the term that is this pass's own goes last, with the cell's step
        const Term& term = terms[i];
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.a[n] = term.from.dr_row(l, d, row);
            at.init[n] = at.dh[n] = dh_row(l, d, row, b);
        }
        product = {n,
                   s.P,
                   at.a.get(),
                   1,
                   units,
                   panels.begin,
                   panels.end,
                   term.hr.get() + d * units.packed(s.P),
                   moved && i == 0 ? at.init.get() : nullptr,
                   at.dh.get()};
        if (i == 1) kernel.product(product);
    }
    return product;
}

template <class T>
void BackwardRun<T>::lstm_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch,
                               const Product<T>& product) {
    const Direction way = this->direction(d);
    const Trace<T>& trace = terms[0].trace;
    Scratch& at = scratch[my.thread];
    const int64_t start = this->sweep(l, d) * N;
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.gates[n] = trace.gates + (start + row) * GH;
        at.c[n] = trace.cells + (start + row) * s.H;
        at.c_prev[n] = c_previous(trace, way, l, d, t, b);
        at.dc[n] = dc.get() + (d * s.B + b) * s.H;
        at.dz[n] = dz_row(l, d, row);
        if (keep) at.dc_all[n] = dc_all_row(l, d, row);
        if (!linear) continue;
        const BackwardRun& first = linear->first;
        at.z_dot[n] = linear->dot.gates + (start + row) * GH;
        at.c_dot[n] = linear->dot.cells + (start + row) * s.H;
        at.c_dot_prev[n] = c_previous(linear->dot, way, l, d, t, b);
        at.dz_first[n] = first.dz_row(l, d, row);
        at.dc_first[n] = first.dc_all_row(l, d, row);
        at.dh_first[n] = first.dh_row(l, d, row, b);
    }
    const LstmStepBackward<T> step{product,
                                   at.gates.get(),
                                   at.c.get(),
                                   at.c_prev.get(),
                                   at.dc.get(),
                                   at.dz.get(),
                                   keep ? at.dc_all.get() : nullptr};
    if (linear)
        kernel.lstm_step_second({step, at.z_dot.get(), at.c_dot.get(), at.c_dot_prev.get(), at.dz_first.get(),
                                 at.dc_first.get(), at.dh_first.get()});
    else
        kernel.lstm_step_backward(step);
}

template <class T>
void BackwardRun<T>::elman_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch,
                                const Product<T>& product) {
    Scratch& at = scratch[my.thread];
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.h[n] = terms[0].trace.output(s, N, l) + (row * s.D + d) * R;
        if (!linear) continue;
        at.z_dot[n] = linear->dot.gates + (this->sweep(l, d) * N + row) * GH;
        at.dz_first[n] = linear->first.dz_row(l, d, row);
    }
    const ElmanStepBackward<T> step{product, at.h.get(), s.cell == Cell::relu};
    if (linear)
        kernel.elman_step_second({step, at.z_dot.get(), at.dz_first.get()});
    else
        kernel.elman_step_backward(step);
}

// What reaches z_t from elsewhere than the outputs; this thread adds to the dz that it has just written.
template <class T>
void BackwardRun<T>::add_to_dz(const Share& my, int64_t l, int64_t d, int64_t t) {
    const Range columns = this->columns_of(units, this->my_panels(my, units));
    const Range batch = this->my_rows(my, t);
    for (int64_t b = batch.begin; b < batch.end; ++b) {
        const int64_t row = sequence.row(t) + b;
        const T* z = adjoint.z + (this->sweep(l, d) * N + row) * GH;
        T* dz = dz_row(l, d, row);
        for (int64_t gate = 0; gate < GH; gate += s.H)
            for (int64_t j = gate + columns.begin; j < gate + columns.end; ++j) dz[j] += z[j];
    }
}

// After the sweep, dc holds dL/dc_0; dL/dh_0 = dz W_hh of each sequence's first step.
template <class T>
void BackwardRun<T>::initial_state_gradient(const Share& my, int64_t l, int64_t d, const Range& columns) {
    const Direction way = this->direction(d);
    const int64_t i = this->sweep(l, d);
    Scratch& at = scratch[my.thread];
    if (adjoint.c0)
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
            copy_columns(adjoint.c0 + (i * s.B + b) * s.H, dc.get() + (d * s.B + b) * s.H, columns);
    if (!adjoint.h0) return;
    const Range panels = this->my_panels(my, outputs);
    for (const Term& term : terms) {
        if (!term.parameters[i].w_hh) continue;
        int64_t n = 0;
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b, ++n) {
            at.a[n] = term.from.dz_row(l, d, sequence.row(way.start(b)) + b);
            at.init[n] = at.dh[n] = adjoint.h0 + (i * s.B + b) * R;
        }
        kernel.product({n, GH, at.a.get(), 1, outputs, panels.begin, panels.end, term.h.get() + d * outputs.packed(GH),
                        &term == &terms[0] ? nullptr : at.init.get(), at.dh.get()});
    }
}

// The input of layer l as dropout left it, which the forward pass did not keep.
template <class T>
void BackwardRun<T>::drop(int64_t l, int thread) {
    const int64_t width = s.D * R;
    const Range all = Range::part(N * width, thread, plan.threads());
    for (Term& term : terms)
        multiply_columns(term.dropped.get(), term.trace.output(s, N, l - 1), past.dropout + (l - 1) * N * width, all);
}

// dx = sum over directions of dz W_ih, and through the dropout below.
template <class T>
void BackwardRun<T>::input_gradient(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns x = Columns::of_matrix(I, kernel.lanes, 1);
    T* dx = l ? d_hidden[(l - 1) % 2].get() : adjoint.x;
    Scratch& at = scratch[thread];
    const Range mine = Range::part(N, thread, plan.threads());
    for (int64_t row0 = mine.begin; row0 < mine.end; row0 += block_rows) {
        const int64_t n = std::min(block_rows, mine.end - row0);
        for (int64_t r = 0; r < n; ++r) at.init[r] = at.dh[r] = dx + (row0 + r) * I;
        const T* const* init = nullptr;
        for (const Term& term : terms)
            for (int64_t d = 0; d < s.D; ++d) {
                if (!term.parameters[this->sweep(l, d)].w_ih) continue;
                for (int64_t r = 0; r < n; ++r) at.a[r] = term.from.dz_row(l, d, row0 + r);
                kernel.product(
                    {n, GH, at.a.get(), 1, x, 0, x.panels, term.x.get() + d * x.packed(GH), init, at.dh.get()});
                init = at.init.get();
            }
        if (l && past.dropout) multiply_columns(dx, dx, past.dropout + (l - 1) * N * I, {row0 * I, (row0 + n) * I});
    }
}

// The gradients of one group, block by block of its rows. Each thread takes some rows of every gradient; the order of
// the sums does not depend on the threads.
template <class T>
void BackwardRun<T>::weight_gradients(int64_t l, int64_t d, int64_t group, int thread) {
    const int64_t I = s.input(l);
    Parameters<T*> to = adjoint.parameters[this->sweep(l, d)];
    if (to.w_ih) to.w_ih += group * GH * I;
    if (to.w_hh) to.w_hh += group * GH * R;
    if (to.w_hr) to.w_hr += group * s.P * s.H;
    const Range mine = Range::part(GH, thread, plan.threads()), my_r = Range::part(s.P, thread, plan.threads());
    for (T** bias : {&to.b_ih, &to.b_hh}) {
        if (!*bias) continue;
        *bias += group * GH;
        std::fill(*bias + mine.begin, *bias + mine.end, T(0));
    }
    Scratch& at = scratch[thread];
    int64_t n = 0;
    bool first = true;
    const auto flush = [&] {
        add_block(to, l, d, n, thread, first);
        n = 0;
        first = false;
    };
    for (int64_t t = 0; t < s.T; ++t)
        for (int64_t b = group; b < sequence.size(t); b += adjoint.groups) {
            at.block[n++] = {t, b, sequence.row(t) + b};
            if (n == block_rows) flush();
        }
    if (n) flush();
    if (!first) return;
    if (to.w_ih) std::fill(to.w_ih + mine.begin * I, to.w_ih + mine.end * I, T(0));
    if (to.w_hh) std::fill(to.w_hh + mine.begin * R, to.w_hh + mine.end * R, T(0));
    if (to.w_hr) std::fill(to.w_hr + my_r.begin * s.H, to.w_hr + my_r.end * s.H, T(0));
}

// What the n rows in at.block add to the gradients; `first` ones overwrite.
template <class T>
void BackwardRun<T>::add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first) {
    const int64_t I = s.input(l);
    const Range mine = Range::part(GH, thread, plan.threads()), my_r = Range::part(s.P, thread, plan.threads());
    const Direction way = this->direction(d);
    Scratch& at = scratch[thread];
    for (const Term& term : terms) {
        // Rows of all groups lie side by side; those of one group are put together.
        const T* left = term.from.dz_row(l, d, at.block[0].row) + mine.begin;
        int64_t stride = dz_stride;
        if (adjoint.groups > 1) {
            stride = mine.end - mine.begin;
            for (int64_t r = 0; r < n; ++r)
                std::copy_n(term.from.dz_row(l, d, at.block[r].row) + mine.begin, stride, at.left.get() + r * stride);
            left = at.left.get();
        }
        const T* x = input(term, l);
        if (to.w_ih && x) {
            for (int64_t r = 0; r < n; ++r) at.h[r] = x + at.block[r].row * I;
            add_outer(at, mine, n, left, stride, I, first, to.w_ih);
        }
        if (to.w_hh) {
            for (int64_t r = 0; r < n; ++r) at.h[r] = h_previous(term.trace, way, l, d, at.block[r].t, at.block[r].b);
            add_outer(at, mine, n, left, stride, R, first, to.w_hh);
        }
        if (&term == &terms[0])
            for (T* bias : {to.b_ih, to.b_hh})
                if (bias) kernel.add_rows(n, left, stride, mine.end - mine.begin, bias + mine.begin);
        if (to.w_hr) {
            const int64_t width = my_r.end - my_r.begin;
            const T* dr_left = term.from.dr_row(l, d, at.block[0].row) + my_r.begin;
            if (adjoint.groups > 1) {
                for (int64_t r = 0; r < n; ++r)
                    std::copy_n(term.from.dr_row(l, d, at.block[r].row) + my_r.begin, width, at.left.get() + r * width);
                dr_left = at.left.get();
            }
            const T* m = term.trace.m + this->sweep(l, d) * N * s.H;
            for (int64_t r = 0; r < n; ++r) at.h[r] = m + at.block[r].row * s.H;
            add_outer(at, my_r, n, dr_left, adjoint.groups > 1 ? width : s.P, s.H, first, to.w_hr);
        }
        first = false;
    }
}

// w[j] (+)= sum_r left[r][j - rows.begin] * at.h[r] for j in `rows`: the outer products of a block of n rows.
template <class T>
void BackwardRun<T>::add_outer(Scratch& at, const Range& rows, int64_t n, const T* left, int64_t stride, int64_t width,
                               bool first, T* w) {
    const Columns columns = Columns::of_matrix(width, kernel.lanes, 1);
    kernel.pack_rows(columns, n, at.h.get(), 0, columns.panels, at.right.get());
    const int64_t count = rows.end - rows.begin;
    for (int64_t j = 0; j < count; ++j) {
        at.a[j] = left + j;
        at.dh[j] = w + (rows.begin + j) * width;
    }
    kernel.product({count, n, at.a.get(), stride, columns, 0, columns.panels, at.right.get(),
                    first ? nullptr : at.dh.get(), at.dh.get()});
}

template <class T>
void backward(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, int threads) {
    const bool keep = adjoint.cells_all;
    if (!BackwardRun<T>(shape, past, adjoint, keep, nullptr, threads).run())
        BackwardRun<T>(shape, past, adjoint, keep, nullptr, 1).run();
}

template class BackwardRun<float>;
template class BackwardRun<double>;
template void backward<float>(const Shape&, const Past<float>&, const Adjoint<float>&, int);
template void backward<double>(const Shape&, const Past<double>&, const Adjoint<double>&, int);

}  // namespace rnnfast
