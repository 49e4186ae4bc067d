#include "products.h"

namespace rnnfast {

template <class T>
Products<T>::Products(const Shape& shape, const Trace<T>& trace, const std::vector<Parameters<const T*>>& parameters,
                      const T* dropout, const Gradients<T>& gradients, int threads)
    : Run<T>(shape, Sweep::backward, threads),
      trace(trace),
      parameters(parameters),
      dropout(dropout),
      gradients(gradients),
      GH(G * s.H),
      input_rows(s.input_rows()),
      recurrent_rows(s.recurrent_rows()),
      units(Columns::of_matrix(s.H, kernel.lanes, plan.splits)),
      outputs(Columns::of_matrix(R, kernel.lanes, plan.splits)) {
    const Columns of_x(Columns::of_matrix(s.I, kernel.lanes, 1)),
        of_hidden(Columns::of_matrix(s.D * R, kernel.lanes, 1));
    x = Buffer<T>(s.D *
                  std::max(gradients.x ? of_x.packed(input_rows) : 0, s.L > 1 ? of_hidden.packed(input_rows) : 0));
    h = Buffer<T>(s.D * outputs.packed(recurrent_rows));
    hr = Buffer<T>(s.P ? s.D * units.packed(s.P) : 0);
    dropped = Buffer<T>(dropout ? N * s.D * R : 0);
    const int64_t widest = std::max({s.L > 1 ? std::max(s.I, s.D * R) : s.I, R, s.H});
    for (int i = 0; i < plan.threads(); ++i)
        scratch.push_back(Scratch(std::max({s.B, block_rows, GH}),
                                  gradients.groups > 1 ? block_rows * s.H * (G + s.cell->unit_parameters) : 0,
                                  Columns::of_matrix(widest, kernel.lanes, 1).packed(block_rows)));
}

// Pointers to those rows of a weight (rows,width) that belong to some columns of a product's gates.
template <class T>
template <class P>
void Products<T>::rows_of_gates(const Slots& slots, const Range& columns, P* w, int64_t width, P** to) const {
    this->for_rows_of_gates(slots, columns, [&](int64_t j, int64_t count, int64_t row) {
        for (int64_t k = 0; k < count; ++k) to[j - columns.begin + k] = w + (row + k) * width;
    });
}

template <class T>
void Products<T>::pack(int64_t l, int thread) {
    const int64_t I = s.input(l);
    const Columns of_x = Columns::of_matrix(I, kernel.lanes, 1);
    const T** const rows = scratch[thread].a.get();
    for (int64_t d = 0; d < s.D; ++d) {
        const Parameters<const T*>& p = parameters[this->index(l, d)];
        if (p.w_hh && (s.T > 1 || gradients.h0)) {
            rows_of_gates(s.cell->recurrent_gates, {0, recurrent_rows}, p.w_hh, R, rows);
            pack_share(outputs, recurrent_rows, rows, thread, h.get() + d * outputs.packed(recurrent_rows));
        }
        if (p.w_hr) {
            for (int64_t r = 0; r < s.P; ++r) rows[r] = p.w_hr + r * s.H;
            pack_share(units, s.P, rows, thread, hr.get() + d * units.packed(s.P));
        }
        if (p.w_ih && wants_input(l)) {
            rows_of_gates(s.cell->input_gates, {0, input_rows}, p.w_ih, I, rows);
            if (sums_back()) std::reverse(rows, rows + input_rows);
            pack_share(of_x, input_rows, rows, thread, x.get() + d * of_x.packed(input_rows));
        }
    }
}

// This thread's part of packing the rows of a matrix (K,columns).
template <class T>
void Products<T>::pack_share(const Columns& columns, int64_t K, const T* const* rows, int thread, T* packed) {
    const Range panels = Range::part(columns.panels, thread, plan.threads());
    kernel.pack_rows(columns, K, rows, panels.begin, panels.end, packed);
}

// The input of layer l as dropout left it, which the forward pass did not save.
template <class T>
void Products<T>::drop(int64_t l, int thread) {
    if (!dropout || l == 0) return;
    const int64_t width = s.D * R;
    const Range all = Range::part(N * width, thread, plan.threads());
    multiply_columns(dropped.get(), trace.output(s, N, l - 1), dropout + (l - 1) * N * width, all);
}

template <class T>
void Products<T>::initial_output_gradient(const Share& my, int64_t l, int64_t d) {
    if (!gradients.h0) return;
    const Direction way = this->direction(d);
    const int64_t i = this->index(l, d);
    Scratch& at = scratch[my.thread];
    const Range panels = this->my_panels(my, outputs);
    int64_t n = 0;
    for (int64_t b = my.batch.begin; b < my.batch.end; ++b, ++n) {
        const int64_t start = way.start(b);
        at.a[n] = start < 0 ? this->zeros.get() : recurrent_row(l, d, sequence.row(start) + b);
        at.init[n] = at.to[n] = gradients.h0 + (i * s.B + b) * R;
    }
    kernel.product({n, parameters[i].w_hh ? recurrent_rows : 0, at.a.get(), 1, outputs, panels.begin, panels.end,
                    h.get() + d * outputs.packed(recurrent_rows), s.cell->carries_h() ? at.init.get() : nullptr,
                    at.to.get()});
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
    if (to.w_ih) to.w_ih += group * input_rows * I;
    if (to.w_hh) to.w_hh += group * recurrent_rows * R;
    if (to.w_hr) to.w_hr += group * s.P * s.H;
    if (to.b_ih) to.b_ih += group * input_rows;
    if (to.b_hh) to.b_hh += group * recurrent_rows;
    if (to.unit) to.unit += group * s.cell->unit_parameters * s.H;
    for_vectors(to, thread, [](const Range&, const Range& numbers, T* vector) {
        std::fill(vector + numbers.begin, vector + numbers.end, T(0));
    });
    Scratch& at = scratch[thread];
    int64_t n = 0;
    bool first = true;
    const auto flush = [&] {
        add_block(to, l, d, n, thread, first);
        add_vectors(to, l, d, n, thread);
        n = 0;
        first = false;
    };
    for (int64_t t = 0; t < s.T; ++t)
        for (int64_t b = group; b < sequence.size(t); b += gradients.groups) {
            at.block[n++] = {t, b, sequence.row(t) + b};
            if (n == block_rows) flush();
        }
    if (n) flush();
    const auto zero = [&](T* w, int64_t rows, int64_t width) {
        const Range mine = Range::part(rows, thread, plan.threads());
        std::fill(w + mine.begin * width, w + mine.end * width, T(0));
    };
    if (to.w_ih && (first || !input(l))) zero(to.w_ih, input_rows, I);
    if (!first) return;
    if (to.w_hh) zero(to.w_hh, recurrent_rows, R);
    if (to.w_hr) zero(to.w_hr, s.P, s.H);
}

// What the n rows in at.block add to the gradients; `first` ones overwrite.
template <class T>
void Products<T>::add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first) {
    const int64_t I = s.input(l), i = this->index(l, d);
    const Direction way = this->direction(d);
    Scratch& at = scratch[thread];
    if (to.w_ih && input(l)) {
        for (int64_t r = 0; r < n; ++r) at.right_row[r] = input(l) + at.block[r].row * I;
        add_outer(
            thread, input_rows, I, n, [&](int64_t r) { return input_row(l, d, at.block[r].row); }, adjoints.dz_stride,
            [&](const Range& mine, T** rows) { rows_of_gates(s.cell->input_gates, mine, to.w_ih, I, rows); }, first);
    }
    if (to.w_hh) {
        const T* const output = trace.output(s, N, l) + d * R;
        Origin from;
        for (int64_t r = 0; r < n; ++r) {
            const auto [t, b, row] = at.block[r];
            if (r == 0 || t != at.block[r - 1].t) from = way.origin(t);
            at.right_row[r] = this->previous(from, t, b, output, s.D * R, this->state(trace.h0, l, d, b, R));
        }
        add_outer(
            thread, recurrent_rows, R, n, [&](int64_t r) { return recurrent_row(l, d, at.block[r].row); },
            adjoints.dz_stride,
            [&](const Range& mine, T** rows) { rows_of_gates(s.cell->recurrent_gates, mine, to.w_hh, R, rows); },
            first);
    }
    if (to.w_hr) {
        for (int64_t r = 0; r < n; ++r) at.right_row[r] = trace.m(s, N, i) + at.block[r].row * s.H;
        add_outer(
            thread, s.P, s.H, n, [&](int64_t r) { return dh_row(l, d, at.block[r].row); }, s.P,
            [&](const Range& mine, T** rows) {
                for (int64_t j = mine.begin; j < mine.end; ++j) *rows++ = to.w_hr + j * s.H;
            },
            first);
    }
}

// w (rows,width) (+)= sum_r row_of(r)^T right_row[r] over n rows, row_of(r) (rows), right_row[r] (width), as far as it
// is this thread's: the outer products of a block. find_rows(range, to): where those rows of w are.
template <class T>
template <class RowOf, class FindRows>
void Products<T>::add_outer(int thread, int64_t rows, int64_t width, int64_t n, const RowOf& row_of, int64_t stride,
                            const FindRows& find_rows, bool first) {
    Scratch& at = scratch[thread];
    const Columns columns = Columns::of_matrix(width, kernel.lanes, 1);
    const Tiling tiling = Tiling::of(rows, columns.panels, plan.threads());
    const Range mine = tiling.rows(rows, thread), panels = tiling.panels(columns.panels, thread);
    const int64_t count = mine.end - mine.begin;
    if (!count || panels.begin == panels.end) return;
    kernel.pack_rows(columns, n, at.right_row.get(), panels.begin, panels.end, at.right.get());
    const auto [left, left_stride] = together(at, n, mine, row_of, stride);
    find_rows(mine, at.to.get());
    for (int64_t j = 0; j < count; ++j) {
        at.a[j] = left + j;
        at.init[j] = at.to[j];
    }
    kernel.product({count, n, at.a.get(), left_stride, columns, panels.begin, panels.end, at.right.get(),
                    first ? nullptr : at.init.get(), at.to.get()});
}

template class Products<float>;
template class Products<double>;

}  // namespace rnnfast
