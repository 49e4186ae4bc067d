// What a backward pass does when a layer's sweep through time has left dz (N,G*H): everything else is one matrix
// product each over all N rows, dx = dz W_ih, dh_0 = dz W_hh, dW = dz^T [x, h], with those gates of dz that W is for.
// The second derivative has the same products with tangents in the place of x, h and W.
#pragma once

#include <utility>

#include "run.h"

namespace rnnfast {

// The arrays of AdjointLayout.
template <class P>
struct AdjointRows {
    P dz, dm, dc, dh;
    int64_t dz_stride;
    bool all;  // of all layers; else dz and dh are of the layer at hand, dm of the step at hand
};

template <class T>
class Products : protected Run<T> {
public:
    virtual ~Products() = default;
    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

protected:
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::everyone;

    // trace, parameters: of the forward pass, or of the tangents. dropout: as in Past.
    Products(const Shape& shape, const Trace<T>& trace, const std::vector<Parameters<const T*>>& parameters,
             const T* dropout, const Gradients<T>& gradients, int threads);

    virtual void work(const Share& my) = 0;

    void pack(int64_t l, int thread);
    void drop(int64_t l, int thread);
    // dx (N,I) (+)= sum over directions of dz W_ih, and through the dropout below; then(range) follows on the numbers
    // of each finished block.
    template <class Then>
    void input_gradient(int64_t l, int thread, T* dx, bool add, const Then& then);
    // dh0 = dz W_hh of the step that each h0 enters; of a cell that carries h, added to what reaches h0 past W_hh,
    // which is there already.
    void initial_output_gradient(const Share& my, int64_t l, int64_t d);
    void weight_gradients(int64_t l, int64_t d, int thread);

    // A gate whose gradients are large comes first in the slots and last in torch's W_ih (GRU's n): sums of its
    // products begin at the other end, with the small ones.
    bool sums_back() const { return s.cell->torch_gates[s.cell->input_gates.first] != 0; }
    bool wants_input(int64_t l) const { return l > 0 || gradients.x; }
    int64_t first_row(int64_t l, int64_t d) const { return (adjoints.all ? this->index(l, d) : d) * N; }
    const T* dz_row(int64_t l, int64_t d, int64_t row) const {
        return adjoints.dz + (first_row(l, d) + row) * adjoints.dz_stride;
    }
    // The part of it that is W_ih's, or W_hh's.
    const T* input_row(int64_t l, int64_t d, int64_t row) const {
        return dz_row(l, d, row) + s.cell->input_gates.first * s.H;
    }
    const T* recurrent_row(int64_t l, int64_t d, int64_t row) const {
        return dz_row(l, d, row) + s.cell->recurrent_gates.first * s.H;
    }
    const T* dh_row(int64_t l, int64_t d, int64_t row) const { return adjoints.dh + (first_row(l, d) + row) * s.P; }

    // Row pointers of one thread, and a block of rows for the weight gradients.
    struct Scratch {
        Scratch(int64_t n, int64_t left_size, int64_t right_size)
            : a(n), init(n), to(n), right_row(n), block(n), left(left_size), right(right_size) {}
        Buffer<const T*> a, init;
        Buffer<T*> to;
        Buffer<const T*> right_row;
        struct Row {
            int64_t t, b, row;
        };
        Buffer<Row> block;
        Buffer<T> left, right;
    };

    // Rows that a thread takes at a time.
    static constexpr int64_t block_rows = 128;

    const Trace<T> trace;
    const std::vector<Parameters<const T*>>& parameters;  // [L*D]
    const T* const dropout;
    const Gradients<T>& gradients;
    AdjointRows<const T*> adjoints;
    const int64_t GH, input_rows, recurrent_rows;
    const Columns units, outputs;  // of W_hr or the cell (H); of h (R)
    Buffer<T> x, h, hr;            // (D, ...) packed W_ih (rows,I), W_hh (rows,R), W_hr (P,H), of the layer at hand
    std::vector<Scratch> scratch;  // [threads]

private:
    // What the first n rows in a thread's block add to the gradients of the biases and of the unit parameters.
    virtual void add_vectors(const Parameters<T*>&, int64_t l, int64_t d, int64_t n, int thread) = 0;

    void pack_share(const Columns& columns, int64_t K, const T* const* rows, int thread, T* packed);
    template <class P>
    void rows_of_gates(const Slots& slots, const Range& columns, P* w, int64_t width, P** to) const;
    void group_gradients(int64_t l, int64_t d, int64_t group, int thread);
    void add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first);
    template <class RowOf, class FindRows>
    void add_outer(int thread, int64_t rows, int64_t width, int64_t n, const RowOf& row_of, int64_t stride,
                   const FindRows& find_rows, bool first);

    const T* input(int64_t l) const {  // (N,I of the layer) or nullptr
        return l == 0 ? trace.x : dropout ? dropped.get() : trace.output(s, N, l - 1);
    }

    Buffer<T> dropped;  // (N,D*R), input of the layer at hand after dropout

    // Columns of n rows, and how far apart the rows are. Those of all groups lie side by side, those of one are put
    // together.
    template <class RowOf>
    std::pair<const T*, int64_t> together(Scratch& at, int64_t n, const Range& columns, const RowOf& row_of,
                                          int64_t stride);

protected:
    // Calls body(columns of dz, numbers of the vector, vector) for a thread's part of each vector among the gradients.
    template <class Body>
    void for_vectors(const Parameters<T*>& to, int thread, const Body& body) const {
        const auto part = [&](int64_t size) { return Range::part(size, thread, plan.threads()); };
        for (const auto& [bias, slots] : {std::pair(to.b_ih, s.cell->input_gates), {to.b_hh, s.cell->recurrent_gates}})
            if (bias)
                this->for_rows_of_gates(slots, part(slots.count * s.H), [&](int64_t j, int64_t count, int64_t row) {
                    const int64_t column = slots.first * s.H + j;
                    body({column, column + count}, {row, row + count}, bias);
                });
        const Range mine = part(s.cell->unit_parameters * s.H);
        if (to.unit) body({GH + mine.begin, GH + mine.end}, mine, to.unit);
    }
    // sums += the first n rows in a thread's block, in some columns of them.
    template <class RowOf>
    void add_rows(int64_t n, const Range& columns, const RowOf& row_of, int64_t stride, int thread, T* sums) {
        const auto [left, apart] = together(scratch[thread], n, columns, row_of, stride);
        kernel.add_rows(n, left, apart, columns.end - columns.begin, sums);
    }
};

template <class T>
template <class Then>
void Products<T>::input_gradient(int64_t l, int thread, T* dx, bool add, const Then& then) {
    const int64_t I = s.input(l);
    const Columns of_x = Columns::of_matrix(I, kernel.lanes, 1);
    Scratch& at = scratch[thread];
    const Range mine = Range::part(N, thread, plan.threads());
    for (int64_t row0 = mine.begin; row0 < mine.end; row0 += block_rows) {
        const int64_t n = std::min(block_rows, mine.end - row0);
        for (int64_t r = 0; r < n; ++r) at.init[r] = at.to[r] = dx + (row0 + r) * I;
        const T* const* init = add ? at.init.get() : nullptr;
        for (int64_t d = 0; d < s.D; ++d) {
            const bool there = parameters[this->index(l, d)].w_ih;
            if (!there && init) continue;
            const int64_t first = sums_back() ? input_rows - 1 : 0;
            for (int64_t r = 0; r < n; ++r) at.a[r] = input_row(l, d, row0 + r) + first;
            kernel.product({n, there ? input_rows : 0, at.a.get(), first ? -1 : 1, of_x, 0, of_x.panels,
                            x.get() + d * of_x.packed(input_rows), init, at.to.get()});
            init = at.init.get();
        }
        const Range all{row0 * I, (row0 + n) * I};
        if (l && dropout) multiply_columns(dx, dx, dropout + (l - 1) * N * I, all);
        then(all);
    }
}

template <class T>
template <class RowOf>
std::pair<const T*, int64_t> Products<T>::together(Scratch& at, int64_t n, const Range& columns, const RowOf& row_of,
                                                   int64_t stride) {
    if (gradients.groups == 1) return {row_of(0) + columns.begin, stride};
    const int64_t count = columns.end - columns.begin;
    for (int64_t r = 0; r < n; ++r) std::copy_n(row_of(r) + columns.begin, count, at.left.get() + r * count);
    return {at.left.get(), count};
}

}  // namespace rnnfast
