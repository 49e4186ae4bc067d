#include "products.h"

namespace rnnfast {

template <class T>
Products<T>::Products(const Shape& shape, const Trace<T>& trace, const std::vector<Parameters<const T*>>& parameters,
                      const T* dropout, const Gradients<T>& gradients, int threads)
    : Run<T>(shape, threads),
      trace(trace),
      parameters(parameters),
      dropout(dropout),
      gradients(gradients),
      GH(G * s.H),
      units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
      outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)) {
    const Columns of_x(Columns::of_matrix(s.I, kernel.lanes, 1)),
        of_hidden(Columns::of_matrix(s.D * R, kernel.lanes, 1));
    x = Buffer<T>(s.D * std::max(gradients.x ? of_x.packed(GH) : 0, s.L > 1 ? of_hidden.packed(GH) : 0));
    h = Buffer<T>(s.D * outputs.packed(GH));
    hr = Buffer<T>(s.P ? s.D * units.packed(s.P) : 0);
    dropped = Buffer<T>(dropout ? N * s.D * R : 0);
    const int64_t widest = std::max({s.L > 1 ? std::max(s.I, s.D * R) : s.I, R, s.H});
    for (int i = 0; i < plan.threads(); ++i)
        scratch.push_back(Scratch(std::max({s.B, block_rows, GH}), gradients.groups > 1 ? block_rows * GH : 0,
                                  Columns::of_matrix(widest, kernel.lanes, 1).packed(block_rows)));
}

template <class T>
void Products<T>::pack(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns of_x = Columns::of_matrix(I, kernel.lanes, 1);
    for (int64_t d = 0; d < s.D; ++d) {
        const Parameters<const T*>& p = parameters[this->index(l, d)];
        if (p.w_hh && (s.T > 1 || gradients.h0))
            pack_share(outputs, GH, p.w_hh, R, thread, h.get() + d * outputs.packed(GH));
        if (p.w_hr) pack_share(units, s.P, p.w_hr, s.H, thread, hr.get() + d * units.packed(s.P));
        if (p.w_ih && wants_input(l)) pack_share(of_x, GH, p.w_ih, I, thread, x.get() + d * of_x.packed(GH));
    }
}

// This thread's part of packing w (K,columns).
template <class T>
void Products<T>::pack_share(const Columns& columns, int64_t K, const T* w, int64_t stride, int thread, T* packed) {
    const Range panels = Range::part(columns.panels, thread, plan.threads());
    Scratch& my = scratch[thread];
    for (int64_t k = 0; k < K; ++k) my.a[k] = w + k * stride;
    kernel.pack_rows(columns, K, my.a.get(), panels.begin, panels.end, packed);
}

// The input of layer l as dropout left it, which the forward pass did not save.
template <class T>
void Products<T>::drop(int64_t l, int thread) {
    if (!dropout || l == 0) return;
    const int64_t width = s.D * R;
    const Range all = Range::part(N * width, thread, plan.threads());
    multiply_columns(dropped.get(), trace.output(s, N, l - 1), dropout + (l - 1) * N * width, all);
}

// dL/dh_0 = dz W_hh of each sequence's first step.
template <class T>
void Products<T>::initial_output_gradient(const Share& my, int64_t l, int64_t d) {
    if (!gradients.h0) return;
    const Direction way = this->direction(d);
    const int64_t i = this->index(l, d);
    Scratch& at = scratch[my.thread];
    const Range panels = this->my_panels(my, outputs);
    int64_t n = 0;
    for (int64_t b = my.batch.begin; b < my.batch.end; ++b, ++n) {
        at.a[n] = dz_row(l, d, sequence.row(way.start(b)) + b);
        at.to[n] = gradients.h0 + (i * s.B + b) * R;
    }
    kernel.product({n, parameters[i].w_hh ? GH : 0, at.a.get(), 1, outputs, panels.begin, panels.end,
                    h.get() + d * outputs.packed(GH), nullptr, at.to.get()});
}

template <class T>
void Products<T>::weight_gradients(int64_t l, int64_t d, int thread) {
    for (int64_t group = 0; group < gradients.groups; ++group) group_gradients(l, d, group, thread);
}

// The gradients of one group, block by block of its rows. Each thread takes a part of every gradient (see Tiling); the
// order of the sums does not depend on the threads.
template <class T>
void Products<T>::group_gradients(int64_t l, int64_t d, int64_t group, int thread) {
    const int64_t I = s.input(l);
    Parameters<T*> to = gradients.parameters[this->index(l, d)];
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
        add_biases(to, l, d, n, thread);
        n = 0;
        first = false;
    };
    for (int64_t t = 0; t < s.T; ++t)
        for (int64_t b = group; b < sequence.size(t); b += gradients.groups) {
            at.block[n++] = {t, b, sequence.row(t) + b};
            if (n == block_rows) flush();
        }
    if (n) flush();
    if (to.w_ih && (first || !input(l))) std::fill(to.w_ih + mine.begin * I, to.w_ih + mine.end * I, T(0));
    if (!first) return;
    if (to.w_hh) std::fill(to.w_hh + mine.begin * R, to.w_hh + mine.end * R, T(0));
    if (to.w_hr) std::fill(to.w_hr + my_h.begin * s.H, to.w_hr + my_h.end * s.H, T(0));
}

// What the n rows in at.block add to the gradients; `first` ones overwrite.
template <class T>
void Products<T>::add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first) {
    const int64_t I = s.input(l), i = this->index(l, d);
    const Direction way = this->direction(d);
    Scratch& at = scratch[thread];
    const auto dz = [&](int64_t r) { return dz_row(l, d, at.block[r].row); };
    if (to.w_ih && input(l)) {
        for (int64_t r = 0; r < n; ++r) at.right_row[r] = input(l) + at.block[r].row * I;
        add_outer(thread, GH, I, n, dz, adjoints.dz_stride, first, to.w_ih);
    }
    if (to.w_hh) {
        for (int64_t r = 0; r < n; ++r) {
            const T* h0 = this->state(trace.h0, l, d, at.block[r].b, R);
            at.right_row[r] =
                this->previous(way, at.block[r].t, at.block[r].b, trace.output(s, N, l) + d * R, s.D * R, h0);
        }
        add_outer(thread, GH, R, n, dz, adjoints.dz_stride, first, to.w_hh);
    }
    if (to.w_hr) {
        for (int64_t r = 0; r < n; ++r) at.right_row[r] = trace.m(s, N, i) + at.block[r].row * s.H;
        add_outer(thread, s.P, s.H, n, [&](int64_t r) { return dh_row(l, d, at.block[r].row); }, s.P, first, to.w_hr);
    }
}

// w (rows,width) (+)= sum_r row_of(r)^T right_row[r] over n rows, row_of(r) (rows), right_row[r] (width), as far as it
// is this thread's: the outer products of a block.
template <class T>
template <class RowOf>
void Products<T>::add_outer(int thread, int64_t rows, int64_t width, int64_t n, const RowOf& row_of, int64_t stride,
                            bool first, T* w) {
    Scratch& at = scratch[thread];
    const Columns columns = Columns::of_matrix(width, kernel.lanes, 1);
    const Tiling tiling = Tiling::of(rows, columns.panels, plan.threads());
    const Range mine = tiling.rows(rows, thread), panels = tiling.panels(columns.panels, thread);
    const int64_t count = mine.end - mine.begin;
    if (!count || panels.begin == panels.end) return;
    kernel.pack_rows(columns, n, at.right_row.get(), panels.begin, panels.end, at.right.get());
    const auto [left, left_stride] = together(at, n, mine, row_of, stride);
    for (int64_t j = 0; j < count; ++j) {
        at.a[j] = left + j;
        at.init[j] = at.to[j] = w + (mine.begin + j) * width;
    }
    kernel.product({count, n, at.a.get(), left_stride, columns, panels.begin, panels.end, at.right.get(),
                    first ? nullptr : at.init.get(), at.to.get()});
}

template class Products<float>;
template class Products<double>;

}  // namespace rnnfast
