#include "backward.h"

namespace rnnfast {
namespace {

// Rows that a thread takes at a time in the products after the sweep.
constexpr int64_t block_rows = 128;

}  // namespace

template <class T>
BackwardRun<T>::BackwardRun(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, int threads)
    : Run<T>(shape, threads),
      past(past),
      adjoint(adjoint),
      parameters(past.parameters),
      bend{},
      sweeps(true),
      keep(adjoint.swept),
      reserve(s, N),
      trace(past, reserve),
      units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
      outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)),
      GH(G * s.H) {
    const Swept kept(s);
    if (keep) {
        places = {adjoint.swept + kept.dz, adjoint.swept + kept.dm, adjoint.swept + kept.dc, adjoint.swept + kept.dh,
                  kept.dz_stride};
    } else {
        const int64_t dz_size = s.D * N * kept.dz_stride, dm_size = s.cell == Cell::lstm ? s.D * s.B * s.H : 0;
        own = Buffer<T>(dz_size + dm_size + s.D * N * s.P);
        places = {own.get(), own.get() + dz_size, nullptr, own.get() + dz_size + dm_size, kept.dz_stride};
    }
    if (s.cell == Cell::lstm) dc = Buffer<T>(s.D * s.B * s.H);
    for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
    make_room();
}

template <class T>
BackwardRun<T>::BackwardRun(const Shape& shape, const Past<T>& past, const T* swept, const Trace<T>& dot,
                            const std::vector<Parameters<const T*>>& parameters_dot, const Adjoint<T>& adjoint,
                            const Bend<T>& bend, int threads)
    : Run<T>(shape, threads),
      past(past),
      adjoint(adjoint),
      parameters(parameters_dot),
      bend(bend),
      sweeps(false),
      keep(true),
      reserve(s, N),
      trace(dot),
      units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
      outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)),
      GH(G * s.H) {
    const Swept kept(s);
    T* const from = const_cast<T*>(swept);  // only a sweep writes there, and there is none
    places = {from + kept.dz, from + kept.dm, from + kept.dc, from + kept.dh, kept.dz_stride};
    for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1) && past.dropout; ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
    make_room();
}

// What a pass needs with and without a sweep.
template <class T>
void BackwardRun<T>::make_room() {
    const Columns of_x(Columns::of_matrix(s.I, kernel.lanes, 1)),
        of_hidden(Columns::of_matrix(s.D * R, kernel.lanes, 1));
    x = Buffer<T>(s.D * std::max(adjoint.x ? of_x.packed(GH) : 0, s.L > 1 ? of_hidden.packed(GH) : 0));
    h = Buffer<T>(s.D * outputs.packed(GH));
    hr = Buffer<T>(s.P ? s.D * units.packed(s.P) : 0);
    dropped = Buffer<T>(past.dropout ? N * s.D * R : 0);
    const int64_t widest = std::max({s.L > 1 ? std::max(s.I, s.D * R) : s.I, R, s.H});
    for (int i = 0; i < plan.threads(); ++i)
        scratch.push_back(Scratch(std::max({s.B, block_rows, GH}), adjoint.groups > 1 ? block_rows * GH : 0,
                                  Columns::of_matrix(widest, kernel.lanes, 1).packed(block_rows)));
}

template <class T>
void BackwardRun<T>::work(const Share& my) {
    if (!sweeps && s.cell == Cell::lstm)  // of an Elman cell the bend is there
        for (int64_t l = 0; l < s.L; ++l) {
            const Range mine = Range::part(N * s.D * R, my.thread, plan.threads());
            std::fill(output_bend(l) + mine.begin, output_bend(l) + mine.end, T(0));
        }
    for (int64_t l = s.L - 1; l >= 0; --l) {
        pack(l, my.thread);
        everyone.wait();
        if (sweeps)
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep_backward(my, l, d);
        if (past.dropout && l > 0) drop(l, my.thread);
        everyone.wait();
        if (!sweeps)
            for (int64_t d = 0; d < s.D; ++d) {
                bend_outputs(l, d, my.thread);
                bend_cell_outputs(l, d, my.thread);
            }
        for (int64_t d = my.directions.begin; d < my.directions.end; ++d) initial_output_gradient(my, l, d);
        if (wants_input(l)) input_gradient(l, my.thread);
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t group = 0; group < adjoint.groups; ++group) weight_gradients(l, d, group, my.thread);
        if (l > 0) everyone.wait();
    }
}

template <class T>
void BackwardRun<T>::pack(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns of_x = Columns::of_matrix(I, kernel.lanes, 1);
    for (int64_t d = 0; d < s.D; ++d) {
        const Parameters<const T*>& p = parameters[this->sweep(l, d)];
        if (p.w_hh) pack_share(outputs, GH, p.w_hh, R, thread, h.get() + d * outputs.packed(GH));
        if (p.w_hr) pack_share(units, s.P, p.w_hr, s.H, thread, hr.get() + d * units.packed(s.P));
        if (p.w_ih && wants_input(l)) pack_share(of_x, GH, p.w_ih, I, thread, x.get() + d * of_x.packed(GH));
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

// h_t enters z_dot_{t+1} by W_hh_dot: dz_{t+1} W_hh_dot, on top of what an Elman cell has made of its tangent.
template <class T>
void BackwardRun<T>::bend_outputs(int64_t l, int64_t d, int thread) {
    if (!parameters[this->sweep(l, d)].w_hh) return;
    const Direction way = this->direction(d);
    const Range steps = Range::part(s.T, thread, plan.threads());
    Scratch& my = scratch[thread];
    int64_t n = 0;
    const auto flush = [&] {
        kernel.product({n, GH, my.a.get(), 1, outputs, 0, outputs.panels, h.get() + d * outputs.packed(GH),
                        my.init.get(), my.to.get()});
        n = 0;
    };
    for (int64_t t = steps.begin; t < steps.end; ++t) {
        const int64_t after = t + way.stride();
        for (int64_t b = 0; b < std::min(sequence.size(t), sequence.size(after)); ++b) {
            my.a[n] = dz_row(l, d, sequence.row(after) + b);
            my.init[n] = my.to[n] = output_bend(l) + ((sequence.row(t) + b) * s.D + d) * R;
            if (++n == block_rows) flush();
        }
    }
    flush();
}

// The cell's output enters h_dot_t by W_hr_dot: dh_t W_hr_dot.
template <class T>
void BackwardRun<T>::bend_cell_outputs(int64_t l, int64_t d, int thread) {
    if (!s.P) return;
    T* m = bend.kept + reserve.m + this->sweep(l, d) * N * s.H;
    const Range mine = Range::part(N, thread, plan.threads());
    if (!parameters[this->sweep(l, d)].w_hr) {
        std::fill(m + mine.begin * s.H, m + mine.end * s.H, T(0));
        return;
    }
    Scratch& my = scratch[thread];
    for (int64_t row0 = mine.begin; row0 < mine.end; row0 += block_rows) {
        const int64_t n = std::min(block_rows, mine.end - row0);
        for (int64_t r = 0; r < n; ++r) {
            my.a[r] = dh_row(l, d, row0 + r);
            my.to[r] = m + (row0 + r) * s.H;
        }
        kernel.product(
            {n, s.P, my.a.get(), 1, units, 0, units.panels, hr.get() + d * units.packed(s.P), nullptr, my.to.get()});
    }
}

template <class T>
void BackwardRun<T>::sweep_backward(const Share& my, int64_t l, int64_t d) {
    const Direction way = this->direction(d);
    const Range columns = this->columns_of(units, this->my_panels(my, units));
    if (s.cell == Cell::lstm)
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
            copy_columns(dc_row(d, b), this->state(adjoint.c_n, l, d, b, s.H), columns);
    for (int64_t step = s.T - 1; step >= 0; --step) {
        const int64_t t = way.time(step);
        const Range batch = this->my_rows(my, t);
        // Sequences that run at the next step, too, get dz from there; the others end here.
        const int64_t ended = std::max(batch.begin, std::min(batch.end, sequence.size(t + way.stride())));
        if (adjoint.kept && s.cell == Cell::lstm) add_to_dc(my, l, d, t);
        backward_step(my, l, d, t, {batch.begin, ended}, true);
        backward_step(my, l, d, t, {ended, batch.end}, false);
        if (s.P) {
            group_barriers[my.group].wait();
            lstm_step(my, l, d, t, batch, unproject(my, l, d, t, batch));
        }
        if (adjoint.z || (adjoint.kept && s.cell == Cell::lstm)) add_to_dz(my, l, d, t);
        group_barriers[my.group].wait();
    }
    if (adjoint.c0)  // dc is now that of c_0
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b)
            copy_columns(adjoint.c0 + (this->sweep(l, d) * s.B + b) * s.H, dc_row(d, b), columns);
}

// dL/dh_t of the sequences in `batch`: from y_t and, carried on, from z_{t+1} (or h_n); then through the cell.
template <class T>
void BackwardRun<T>::backward_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, bool carried) {
    if (batch.begin >= batch.end) return;
    const Direction way = this->direction(d);
    Scratch& at = scratch[my.thread];
    const T* dy = output_gradient(l);
    const Range panels = this->my_panels(my, outputs);
    const Range columns = this->columns_of(outputs, panels);
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.to[n] = s.P ? dh_row(l, d, row) : s.cell == Cell::lstm ? dm_row(l, d, row, b) : dz_row(l, d, row);
        at.init[n] = dy ? dy + (row * s.D + d) * R : nullptr;
        if (carried) {
            at.a[n] = dz_row(l, d, sequence.row(t + way.stride()) + b);
        } else {
            const T* dh_n = this->state(adjoint.h_n, l, d, b, R);
            for (int64_t j = columns.begin; j < columns.end; ++j) at.to[n][j] = dh_n[j] + (dy ? at.init[n][j] : T(0));
            at.init[n] = at.to[n];
        }
    }
    const Product<T> product{n,
                             carried ? GH : 0,
                             at.a.get(),
                             1,
                             outputs,
                             panels.begin,
                             panels.end,
                             h.get() + d * outputs.packed(GH),
                             dy || !carried ? at.init.get() : nullptr,
                             at.to.get()};
    if (s.P)
        kernel.product(product);
    else if (s.cell == Cell::lstm)
        lstm_step(my, l, d, t, batch, product);
    else
        elman_step(my, l, d, t, batch, product);
}

// dL/d(o * tanh(c)) = dL/dh W_hr
template <class T>
Product<T> BackwardRun<T>::unproject(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch) {
    Scratch& at = scratch[my.thread];
    const Range panels = this->my_panels(my, units);
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.a[n] = dh_row(l, d, row);
        if (adjoint.kept) at.init[n] = adjoint.kept + reserve.m + (this->sweep(l, d) * N + row) * s.H;
        at.to[n] = dm_row(l, d, row, b);
    }
    return {n,
            s.P,
            at.a.get(),
            1,
            units,
            panels.begin,
            panels.end,
            hr.get() + d * units.packed(s.P),
            adjoint.kept ? at.init.get() : nullptr,
            at.to.get()};
}

template <class T>
void BackwardRun<T>::lstm_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch,
                               const Product<T>& product) {
    const Direction way = this->direction(d);
    Scratch& at = scratch[my.thread];
    const int64_t start = this->sweep(l, d) * N;
    const T* cells = trace.cells + start * s.H;
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.gates[n] = trace.gates + (start + row) * GH;
        at.c[n] = cells + row * s.H;
        at.c_prev[n] = this->previous(way, t, b, cells, s.H, this->state(trace.c0, l, d, b, s.H));
        at.dc[n] = dc_row(d, b);
        at.dz[n] = dz_row(l, d, row);
        if (keep) at.all[n] = places.dc + (start + row) * s.H;
    }
    kernel.lstm_step_backward({product, at.gates.get(), at.c.get(), at.c_prev.get(), at.dc.get(), at.dz.get(),
                               keep ? at.all.get() : nullptr});
}

template <class T>
void BackwardRun<T>::elman_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch,
                                const Product<T>& product) {
    Scratch& at = scratch[my.thread];
    int64_t n = 0;
    for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
        const int64_t row = sequence.row(t) + b;
        at.h[n] = trace.output(s, N, l) + (row * s.D + d) * R;
        if (keep) at.all[n] = dm_row(l, d, row, b);
    }
    kernel.elman_step_backward({product, at.h.get(), keep ? at.all.get() : nullptr, s.cell == Cell::relu});
}

// What reaches z_t from elsewhere than the outputs; this thread adds to the dz that it has just written.
template <class T>
void BackwardRun<T>::add_to_dz(const Share& my, int64_t l, int64_t d, int64_t t) {
    const Range columns = this->columns_of(units, this->my_panels(my, units));
    const Range batch = this->my_rows(my, t);
    const T* all = adjoint.z ? adjoint.z : adjoint.kept + reserve.gates;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
        const int64_t row = sequence.row(t) + b;
        const T* z = all + (this->sweep(l, d) * N + row) * GH;
        T* dz = dz_row(l, d, row);
        for (int64_t gate = 0; gate < GH; gate += s.H)
            for (int64_t j = gate + columns.begin; j < gate + columns.end; ++j) dz[j] += z[j];
    }
}

// And what reaches c_t, before the step that carries it on.
template <class T>
void BackwardRun<T>::add_to_dc(const Share& my, int64_t l, int64_t d, int64_t t) {
    const Range columns = this->columns_of(units, this->my_panels(my, units));
    const Range batch = this->my_rows(my, t);
    const T* cells = adjoint.kept + reserve.cells + (this->sweep(l, d) * N + sequence.row(t)) * s.H;
    for (int64_t b = batch.begin; b < batch.end; ++b)
        for (int64_t j = columns.begin; j < columns.end; ++j) dc_row(d, b)[j] += cells[b * s.H + j];
}

// dL/dh_0 = dz W_hh of each sequence's first step.
template <class T>
void BackwardRun<T>::initial_output_gradient(const Share& my, int64_t l, int64_t d) {
    if (!adjoint.h0) return;
    const Direction way = this->direction(d);
    const int64_t i = this->sweep(l, d);
    Scratch& at = scratch[my.thread];
    const Range panels = this->my_panels(my, outputs);
    int64_t n = 0;
    for (int64_t b = my.batch.begin; b < my.batch.end; ++b, ++n) {
        at.a[n] = dz_row(l, d, sequence.row(way.start(b)) + b);
        at.to[n] = adjoint.h0 + (i * s.B + b) * R;
    }
    kernel.product({n, parameters[i].w_hh ? GH : 0, at.a.get(), 1, outputs, panels.begin, panels.end,
                    h.get() + d * outputs.packed(GH), nullptr, at.to.get()});
}

// The input of layer l as dropout left it, which the forward pass did not keep.
template <class T>
void BackwardRun<T>::drop(int64_t l, int thread) {
    const int64_t width = s.D * R;
    const Range all = Range::part(N * width, thread, plan.threads());
    multiply_columns(dropped.get(), trace.output(s, N, l - 1), past.dropout + (l - 1) * N * width, all);
}

// dx = sum over directions of dz W_ih, and through the dropout below.
template <class T>
void BackwardRun<T>::input_gradient(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns of_x = Columns::of_matrix(I, kernel.lanes, 1);
    T* const more = l && !sweeps ? output_bend(l - 1) : nullptr;  // what dx is to be added to
    const T* const kept = l && adjoint.kept ? adjoint.kept + reserve.hidden + (l - 1) * N * I : nullptr;
    T* const dx = !l ? adjoint.x : more && !past.dropout ? more : d_hidden[(l - 1) % 2].get();
    Scratch& at = scratch[thread];
    const Range mine = Range::part(N, thread, plan.threads());
    for (int64_t row0 = mine.begin; row0 < mine.end; row0 += block_rows) {
        const int64_t n = std::min(block_rows, mine.end - row0);
        for (int64_t r = 0; r < n; ++r) at.init[r] = at.to[r] = dx + (row0 + r) * I;
        const T* const* init = dx == more ? at.init.get() : nullptr;
        for (int64_t d = 0; d < s.D; ++d) {
            const bool moved = parameters[this->sweep(l, d)].w_ih;
            if (!moved && init) continue;
            for (int64_t r = 0; r < n; ++r) at.a[r] = dz_row(l, d, row0 + r);
            kernel.product({n, moved ? GH : 0, at.a.get(), 1, of_x, 0, of_x.panels, x.get() + d * of_x.packed(GH), init,
                            at.to.get()});
            init = at.init.get();
        }
        const Range all{row0 * I, (row0 + n) * I};
        if (l && past.dropout) multiply_columns(dx, dx, past.dropout + (l - 1) * N * I, all);
        if (kept) add_columns(dx, kept, all);
        if (more && dx != more) add_columns(more, dx, all);
    }
}

// The gradients of one group, block by block of its rows. Each thread takes a part of every gradient (see Tiling); the
// order of the sums does not depend on the threads.
template <class T>
void BackwardRun<T>::weight_gradients(int64_t l, int64_t d, int64_t group, int thread) {
    const int64_t I = s.input(l);
    Parameters<T*> to = adjoint.parameters[this->sweep(l, d)];
    if (to.w_ih) to.w_ih += group * GH * I;
    if (to.w_hh) to.w_hh += group * GH * R;
    if (to.w_hr) to.w_hr += group * s.P * s.H;
    const Range mine = Range::part(GH, thread, plan.threads()), my_h = Range::part(s.P, thread, plan.threads());
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
    if (to.w_ih && (first || !input(l))) std::fill(to.w_ih + mine.begin * I, to.w_ih + mine.end * I, T(0));
    if (!first) return;
    if (to.w_hh) std::fill(to.w_hh + mine.begin * R, to.w_hh + mine.end * R, T(0));
    if (to.w_hr) std::fill(to.w_hr + my_h.begin * s.H, to.w_hr + my_h.end * s.H, T(0));
}

// What the n rows in at.block add to the gradients; `first` ones overwrite. Biases have no tangents to meet.
template <class T>
void BackwardRun<T>::add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first) {
    const int64_t I = s.input(l);
    const Direction way = this->direction(d);
    Scratch& at = scratch[thread];
    const auto dz = [&](int64_t r) { return dz_row(l, d, at.block[r].row); };
    if (to.w_ih && input(l)) {
        for (int64_t r = 0; r < n; ++r) at.h[r] = input(l) + at.block[r].row * I;
        add_outer(thread, GH, I, n, dz, places.dz_stride, first, to.w_ih);
    }
    if (to.w_hh) {
        for (int64_t r = 0; r < n; ++r) at.h[r] = h_previous(way, l, d, at.block[r].t, at.block[r].b);
        add_outer(thread, GH, R, n, dz, places.dz_stride, first, to.w_hh);
    }
    if (to.w_hr) {
        const T* m = trace.m + this->sweep(l, d) * N * s.H;
        for (int64_t r = 0; r < n; ++r) at.h[r] = m + at.block[r].row * s.H;
        add_outer(thread, s.P, s.H, n, [&](int64_t r) { return dh_row(l, d, at.block[r].row); }, s.P, first, to.w_hr);
    }
    if (!sweeps || !(to.b_ih || to.b_hh)) return;
    const Range mine = Range::part(GH, thread, plan.threads());
    const auto [left, stride] = together(at, n, mine, dz, places.dz_stride);
    for (T* bias : {to.b_ih, to.b_hh})
        if (bias) kernel.add_rows(n, left, stride, mine.end - mine.begin, bias + mine.begin);
}

// Columns of n rows, and how far apart the rows are. Those of all groups lie side by side, those of one are put
// together.
template <class T>
template <class RowOf>
std::pair<const T*, int64_t> BackwardRun<T>::together(Scratch& at, int64_t n, const Range& columns, const RowOf& row_of,
                                                      int64_t stride) {
    if (adjoint.groups == 1) return {row_of(0) + columns.begin, stride};
    const int64_t count = columns.end - columns.begin;
    for (int64_t r = 0; r < n; ++r) std::copy_n(row_of(r) + columns.begin, count, at.left.get() + r * count);
    return {at.left.get(), count};
}

// w (rows,width) (+)= sum_r row_of(r)^T at.h[r] over n rows, row_of(r) (rows), at.h[r] (width), as far as it is this
// thread's: the outer products of a block.
template <class T>
template <class RowOf>
void BackwardRun<T>::add_outer(int thread, int64_t rows, int64_t width, int64_t n, const RowOf& row_of, int64_t stride,
                               bool first, T* w) {
    Scratch& at = scratch[thread];
    const Columns columns = Columns::of_matrix(width, kernel.lanes, 1);
    const Tiling tiling = Tiling::of(rows, columns.panels, plan.threads());
    const Range mine = tiling.rows(rows, thread), panels = tiling.panels(columns.panels, thread);
    const int64_t count = mine.end - mine.begin;
    if (!count || panels.begin == panels.end) return;
    kernel.pack_rows(columns, n, at.h.get(), panels.begin, panels.end, at.right.get());
    const auto [left, left_stride] = together(at, n, mine, row_of, stride);
    for (int64_t j = 0; j < count; ++j) {
        at.a[j] = left + j;
        at.init[j] = at.to[j] = w + (mine.begin + j) * width;
    }
    kernel.product({count, n, at.a.get(), left_stride, columns, panels.begin, panels.end, at.right.get(),
                    first ? nullptr : at.init.get(), at.to.get()});
}

Swept::Swept(const Shape& s) {
    const int64_t N = s.rows(), ways = s.L * s.D, GH = s.gates() * s.H;
    dz_stride = (GH + 15) / 16 * 16 + 16;  // not a multiple of 4096 bytes: rows would fall on the same cache sets
    dz = 0;
    dm = dz + ways * N * dz_stride;
    dc = dm + ways * N * s.H;
    dh = dc + (s.cell == Cell::lstm ? ways * N * s.H : 0);
    size = dh + ways * N * s.P;
}

template <class T>
void backward(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, int threads) {
    run_with(threads, [&](int n) { return std::make_unique<BackwardRun<T>>(shape, past, adjoint, n); });
}

template class BackwardRun<float>;
template class BackwardRun<double>;
template void backward<float>(const Shape&, const Past<float>&, const Adjoint<float>&, int);
template void backward<double>(const Shape&, const Past<double>&, const Adjoint<double>&, int);

}  // namespace rnnfast
